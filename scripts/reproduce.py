#!/usr/bin/env python
"""Runs ``gipo-jax reproduce`` from this checkout.

python scripts/reproduce.py --list
python scripts/reproduce.py gridworld bounds --preset quick --out runs/reproduce
python scripts/reproduce.py --plot-only --out results
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gipo_jax import cli


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with these arguments, by default those of ``sys.argv``."""
    return cli.main(["reproduce", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
