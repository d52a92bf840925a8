#!/usr/bin/env python
"""Runs the experiments, on the paper's claims and beyond, and draws their figures.

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

from experiments import engine, figures, report
from experiments.store import DataError, NotRunError, Store
from experiments.studies import PRESETS, STUDIES
from gipo_jax import runtime
from gipo_jax.analysis import plots
from gipo_jax.config import ConfigError
from gipo_jax.sweep.interrupts import Interrupted
from gipo_jax.sweep.results import ResultsError

BAD_INPUT, FAILED = 2, 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line of this script; exits with code 2 where it makes no sense."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    known = ", ".join(STUDIES)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all by default; of: {known}")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="quick",
        help="scale: a check in minutes (quick, default), that of results/ (committed), or one for"
        " a GPU (full; metaworld stays on CPU)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/reproduce"),
        help="folder for data and figures (default: %(default)s); what it holds is continued",
    )
    parser.add_argument(
        "--part",
        type=share,
        default=(1, 1),
        metavar="I/N",
        help="train only the I-th of N shares, to spread work over processes or evenings; whoever"
        " comes last draws everything (default: 1/1)",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="also write the verdict on every claim, from the numbers of all figures in --out",
    )
    parser.add_argument("--list", action="store_true", help="list the experiments and stop")
    parser.add_argument("--plot-only", action="store_true", help="redraw from stored data")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in STUDIES:
            parser.error(f"experiment: {name!r} is not valid; expected one of {known}")
    return options


def share(text: str) -> tuple[int, int]:
    """Reads I/N with 1 <= I <= N.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    index, _, count = text.partition("/")
    if index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count):
        return int(index), int(count)
    raise argparse.ArgumentTypeError(f"{text!r} is not valid; expected I/N with 1 <= I <= N")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs and draws.

    Returns:
        exit code: 0; 2 where settings or stored data are not usable; 1 where writing failed; that
        of the signal where one stopped the work, which the same command continues.

    Args:
        arguments: command line without the program's name; ``sys.argv`` by default.
    """
    options = parse(arguments)
    runtime.set_cpu_defaults()
    if options.list:
        for name, study in STUDIES.items():
            print(f"{name:18} {study.question}")
        return 0
    names = options.names or list(STUDIES)
    given = shlex.join(["--preset", options.preset, "--out", options.out.as_posix()])
    try:
        for name in names:
            started = time.monotonic()
            study = STUDIES[name]
            store = Store(options.out, name, given)
            print(f"{name}: {study.question}", flush=True)
            if not options.names and not options.plot_only and study.check is not None:
                try:
                    study.check()
                except ConfigError as missing:
                    print(f"  left out: {missing}")
                    continue
            if not options.plot_only:
                engine.run(study, store, options.preset, options.part)
            try:
                for table, scores in study.scores(store).items():
                    store.numbers(table, scores)
                with plots.style():
                    figures.draw(store)
            except NotRunError as absent:
                # Without names, what is there is redrawn.
                if options.names or not options.plot_only:
                    raise
                print(f"  nothing to draw: {absent}")
            for path in store.figures:
                print(f"  {path}")
            print(f"  {time.monotonic() - started:.0f} s", flush=True)
        if options.report is not None:
            report.write(options.out, options.report)
            print(f"verdicts: {options.report}")
    except (DataError, ConfigError) as error:
        return _fail(str(error), BAD_INPUT)
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}", BAD_INPUT)
    except ResultsError as error:
        return _fail(str(error), FAILED)
    except Interrupted as stop:
        return _fail("stopped, everything is saved; the same command continues", stop.exit_code)
    out = options.out.resolve()
    print(f"figures: {out / 'figures'}\ndata:    {out / 'data'}")
    if (out / "sweeps").exists():
        print(f"runs.csv and metrics.csv of every sweep: {out / 'sweeps'}")
    return 0


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
