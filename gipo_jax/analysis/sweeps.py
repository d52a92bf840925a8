"""Several sweeps as one, and what they found as a table for people."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from gipo_jax.analysis import plots, stats
from gipo_jax.sweep import grid, results

# Settings that differ between sweeps and change no run
_PLACE = ("run", "max_buffer_size")


def read(directories: Sequence[Path]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The runs and the logged points of sweeps, numbered through.

    Settings that are the same in each sweep and differ between them become columns, as in a sweep
    of all. Objects of one name that are not the same are called by the first sweep that has each. A
    run that several sweeps have counts once, as it is in the first of them.

    Raises:
        ResultsError: a folder holds no sweep, or none of them a logged point.
    """
    tables, points, settings, first = [], [], [], 0
    stored = [results.read_config(directory)["groups"] for directory in directories]
    names = _names([grid.named_objects(groups) for groups in stored], directories)
    for directory, groups, called in zip(directories, stored, names, strict=True):
        runs = results.read_runs(directory).assign(sweep=str(directory))
        metrics = results.read_metrics(directory)
        of_runs = grid.settings_of_runs(groups)
        for (field, alone), together in called.items():
            for run in of_runs:
                run[field] = together if run[field] == alone else run[field]
            if field in runs:
                runs[field] = runs[field].replace(alone, together)
        settings += of_runs
        tables.append(runs.assign(run=runs["run"] + first))
        points.append(metrics.assign(run=metrics["run"] + first))
        first += len(runs)
    runs, metrics = (pd.concat(parts, ignore_index=True) for parts in (tables, points))
    if metrics.empty:
        raise results.ResultsError(f"{directories[0]}: there is no logged point to look at yet")
    given = pd.DataFrame(settings, dtype=object)
    given = given.drop(columns=[name for name in _PLACE if name in given])
    own = [name for name in given if name not in runs and given[name].astype(str).nunique() > 1]
    kept = ~given.astype(str).duplicated().to_numpy()
    if len(directories) > 1:
        runs = runs.join(given[own])
        # What one sweep varies is constant, and so no column, in another.
        for name in set(runs) & set(given) - {"env", "objective"}:
            runs[name] = runs[name].where(runs[name].notna(), given[name])
    runs = runs[kept].reset_index(drop=True)
    return runs, metrics[metrics["run"].isin(runs["run"])]


Names = dict[tuple[str, str], str]  # What tables call objects, by field and their own name


def _names(objects: Sequence[dict[tuple[str, str], Any]], places: Sequence[Path]) -> list[Names]:
    """What tells objects of one name in several sweeps apart, where they are not the same."""
    kinds: dict[tuple[str, str], list[tuple[Any, Path]]] = {}
    for found, place in zip(objects, places, strict=True):
        for key, value in found.items():
            known = kinds.setdefault(key, [])
            if not any(grid.same_setting(value, other) for other, _ in known):
                known.append((value, place))
    return [
        {
            key: f"{key[1]} of {place}"
            for key, value in found.items()
            for other, place in kinds[key]
            if len(kinds[key]) > 1 and grid.same_setting(value, other)
        }
        for found in objects
    ]


def draw(directories: Sequence[Path], out: Path) -> list[Path]:
    """Draws the figures of sweeps together into ``out``, and returns the files written.

    Figures are learning curves; final return against buffer size; and, against buffer size, the
    effective sample size, the share of samples with a weight near zero, and the age of the data.

    Raises:
        ResultsError: as in ``read``.
    """
    runs, metrics = read(directories)
    paths = []
    with plots.style():
        for name, figure, _ in plots.sweep_figures(runs.drop(columns="sweep"), metrics):
            paths += plots.save(figure, out / name)
    return paths


def show(directories: Sequence[Path], console: Console) -> None:
    """Prints final returns, methods x buffer sizes, and what diverged or is not finished.

    Raises:
        ResultsError: as in ``read``.
    """
    runs, _ = read(directories)
    names, looks = plots.methods(runs.drop(columns="sweep"))
    runs = runs.assign(method=names)
    sizes = sorted(runs["buffer_size"].unique())
    for env, group in runs.groupby("env", sort=False):
        table = Table(title=str(env), title_justify="left")
        table.add_column("method")
        for size in sizes:
            table.add_column(f"buffer {plots.short_number(size)}")
        for method in looks:
            own = group[group["method"] == method]
            cells = [_cell(own[own["buffer_size"] == size]) for size in sizes]
            if not own.empty:
                table.add_row(method, *cells)
        console.print(table)
    confidence = f"{stats.CONFIDENCE:.0%}"
    console.print(f"final_return over seeds; in brackets {confidence} bootstrap intervals")
    for said, statuses in (("diverged", ["diverged"]), ("unfinished", ["running", "waiting"])):
        found = runs[runs["status"].isin(statuses)]
        for _, own in found.groupby(["sweep", "env", "method", "buffer_size"], sort=False):
            env, method, size = own.iloc[0][["env", "method", "buffer_size"]]
            seeds = ", ".join(str(seed) for seed in own["seed"])
            console.print(f"{said}: {env} {method} buffer {size}, seeds {seeds}", soft_wrap=True)
    for sweep in found["sweep"].unique():
        command = f"gipo-jax sweep --resume --out {shlex.quote(sweep)}"
        console.print(f"continue with: {command}", soft_wrap=True)


def _cell(runs: pd.DataFrame) -> str:
    """Interquartile mean, mean and number of the runs that have a final return."""
    returns = runs["final_return"].to_numpy(float)
    returns = returns[np.isfinite(returns)]
    if not len(returns):
        return "-"
    measures = {"IQM": stats.iqm, "mean": stats.mean}
    lines = [f"{name} {stats.bootstrap(returns, of)}" for name, of in measures.items()]
    return "\n".join([*lines, f"{len(returns)} of {len(runs)} seeds"])
