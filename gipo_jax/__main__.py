"""``python -m gipo_jax``: the command ``gipo-jax``."""

import sys

from gipo_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
