#!/usr/bin/env python
"""Runs the paper's experiments and draws their figures.

python scripts/reproduce.py --list
python scripts/reproduce.py gridworld bounds --preset quick --out runs/reproduce
python scripts/reproduce.py --plot-only --out results
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# The experiments are part of the checkout, not of the installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import experiments
from experiments.store import DataError, Store
from gipo_jax import plots
from gipo_jax.config import ConfigError

BAD_INPUT = 2


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line of this script; exits with code 2 where it makes no sense."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    known = ", ".join(experiments.REGISTRY)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all by default; of: {known}")
    parser.add_argument(
        "--preset",
        choices=experiments.PRESETS,
        default="quick",
        help="scale: a check in minutes (quick, default), that of results/ (committed), or one for"
        " a GPU (full)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/reproduce"),
        help="folder for data and figures (default: %(default)s); what it holds is continued",
    )
    parser.add_argument("--list", action="store_true", help="list the experiments and stop")
    parser.add_argument("--plot-only", action="store_true", help="redraw from stored data")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in experiments.REGISTRY:
            parser.error(f"experiment: {name!r} is not valid; expected one of {known}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs and draws; returns the exit code: 0, or 2 where settings or stored data are not usable.

    Args:
        arguments: command line without the program's name; ``sys.argv`` by default.
    """
    options = parse(arguments)
    if options.list:
        for name, module in experiments.REGISTRY.items():
            print(f"{name:18} {module.QUESTION}")
        return 0
    names = options.names or list(experiments.REGISTRY)
    given = ["--preset", options.preset, "--out", options.out.as_posix()]
    try:
        for name in names:
            started = time.monotonic()
            module = experiments.REGISTRY[name]
            command = shlex.join(["python", "scripts/reproduce.py", name, *given])
            store = Store(options.out, name, command)
            print(f"{name}: {module.QUESTION}", flush=True)
            if not options.plot_only:
                module.run(store, options.preset)
            with plots.style():
                module.draw(store)
            for path in store.figures:
                print(f"  {path}")
            print(f"  {time.monotonic() - started:.0f} s", flush=True)
    except (DataError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return BAD_INPUT
    print(f"figures, data and manifest.json: {options.out.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
