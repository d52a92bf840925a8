"""Runs studies and draws their figures: what ``gipo-jax reproduce`` does."""

import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from gipo_jax.analysis import plots
from gipo_jax.config import ConfigError
from gipo_jax.sweep.interrupts import Interrupted

from . import engine, figures, report
from .store import DataError, NotRunError, Store
from .studies import PRESETS, STUDIES


def run(
    names: Sequence[str],
    preset: str,
    out: Path,
    *,
    part: str = "1/1",
    verdicts: Path | None = None,
    plot_only: bool = False,
) -> None:
    """Runs what is not stored yet, and draws it.

    Args:
        names: studies; none for all that can run here.
        preset: scale, one of ``PRESETS``.
        out: folder for data and figures; what it holds is continued.
        part: ``I/N`` trains the I-th of N shares.
        verdicts: file for the verdict on every claim, from the numbers of all figures in ``out``.
        plot_only: redraws what is stored.

    Raises:
        ConfigError: a setting is not usable.
        DataError: what is stored is not usable.
        ResultsError: a sweep could not be read or written.
        Interrupted: a signal stopped the work; the same command continues it.
    """
    for name in names:
        if name not in STUDIES:
            raise ConfigError("experiment", name, f"one of {', '.join(STUDIES)}")
    if preset not in PRESETS:
        raise ConfigError("preset", preset, f"one of {', '.join(PRESETS)}")
    share = _share(part)
    given = shlex.join(["--preset", preset, "--out", out.as_posix()])
    try:
        for name in names or STUDIES:
            started = time.monotonic()
            study = STUDIES[name]
            store = Store(out, name, given)
            print(f"{name}: {study.question}", flush=True)
            if not names and not plot_only and study.check is not None:
                try:
                    study.check()
                except ConfigError as missing:
                    print(f"  left out: {missing}")
                    continue
            if not plot_only:
                engine.run(study, store, preset, share)
            try:
                for table, scores in study.scores(store).items():
                    store.numbers(table, scores)
                with plots.style():
                    figures.draw(store)
            except NotRunError as absent:
                # Without names, what is there is redrawn.
                if names or not plot_only:
                    raise
                print(f"  nothing to draw: {absent}")
            for path in store.figures:
                print(f"  {path}")
            print(f"  {time.monotonic() - started:.0f} s", flush=True)
        if verdicts is not None:
            report.write(out, verdicts)
            print(f"verdicts: {verdicts}")
    except OSError as error:
        raise DataError(error.filename, str(error.strerror)) from error
    except Interrupted as stop:
        text = "stopped, everything is saved; the same command continues"
        raise Interrupted(text, stop.exit_code) from stop
    out = out.resolve()
    print(f"figures: {out / 'figures'}\ndata:    {out / 'data'}")
    if (out / "sweeps").exists():
        print(f"runs.csv and metrics.csv of every sweep: {out / 'sweeps'}")


def _share(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count):
        return int(index), int(count)
    raise ConfigError("part", text, "I/N with 1 <= I <= N")
