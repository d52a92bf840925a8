"""How many environment steps each method needs to reach a return, with censoring shown."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from experiments import replay_sizes
from experiments.store import DataError, Store
from experiments.training import Task
from gipo_jax.analysis import plots, stats

QUESTION = "Does GIPO need fewer environment steps to reach a given return?"

REFERENCE = plots.look("gipo", 1.0).label
THRESHOLDS = replay_sizes.SCALES["full"].tasks


def run(store: Store, preset: str, part: tuple[int, int] = (1, 1)) -> None:
    """Uses the runs of replay_sizes."""
    replay_sizes.run(store.of("replay_sizes"), preset, part)


def times(curves: pd.DataFrame, tasks: Iterable[Task] = THRESHOLDS) -> pd.DataFrame:
    """Share of the budget at which each run first logs a return at its task's threshold.

    Args:
        curves: as ``replay_sizes.load_curves`` gives them.
        tasks: where the thresholds come from.

    Returns:
        a row a run: regime, env, method, age, seed, ``time`` in (0, 1], and ``reached``. A run that
        never gets there is censored: its time is 1.

    Raises:
        DataError: a task without a threshold.
    """
    thresholds = {task.env: task.threshold for task in tasks}
    unknown = set(curves.env) - set(thresholds)
    if unknown:
        raise DataError("replay_sizes_runs", f"no threshold is known for {sorted(unknown)[0]!r}")
    keys = ["regime", "env", "method", "age", "seed"]
    hit = curves.episode_return >= curves.env.map(thresholds)
    first = curves[hit].groupby(keys).progress.min()
    table = curves[keys].drop_duplicates().set_index(keys).assign(time=first).reset_index()
    table["reached"] = table.time.notna()
    table["time"] = table.time.fillna(1.0)
    return table


def matrix(table: pd.DataFrame, value: str) -> np.ndarray:
    """A column as ``[seeds, tasks]``, ages averaged within a seed."""
    return table.groupby(["seed", "env"])[value].mean().unstack().to_numpy(float)


def draw(store: Store) -> None:
    """Share of runs that got there against steps, a panel a regime and replay size."""
    runs = replay_sizes.load_runs(store)
    curves = replay_sizes.load_curves(store, runs)
    looks = replay_sizes.looks(runs)
    table = times(curves)
    regimes = [r for r in replay_sizes.REGIMES if (table.regime == r).any()]
    ages = sorted(table.age.unique())
    figure, axes = plots.panels(len(regimes), len(ages), height=2.2, sharex=True, sharey=True)
    grid = np.sort(curves.progress.round(4).unique())
    for row, regime in enumerate(regimes):
        for axis, age in zip(axes[row], ages, strict=True):
            part = table[(table.regime == regime) & (table.age == age)]
            for method, look in looks.items():
                own = part[part.method == method]
                share = []
                for at in grid:
                    done = own.assign(done=(own.reached & (own.time <= at + 1e-3)).astype(float))
                    share.append(stats.bootstrap(matrix(done, "done"), stats.mean, resamples=300))
                line = pd.DataFrame(share, columns=["mean", "low", "high"])
                plots.band(axis, grid, line, look, drawstyle="steps-post")
            axis.set(title=f"{regime}, replay of {age}", ylim=(0, 1.02), xlim=(0, 1))
            if row == len(regimes) - 1:
                axis.set_xlabel("share of the step budget")
        axes[row, 0].set_ylabel("share of runs at threshold")
    caption = (
        "Share of runs, over all tasks, whose training return has reached the task's threshold. "
        "Runs that never do are\ncensored at 1: they are missing from the curve's end. Shading: "
        "95 % stratified bootstrap interval over seeds."
    )
    plots.finish(figure, caption, plots.legend(looks.values(), markers=False), columns=6)
    store.save(figure, "sample_efficiency", _numbers(table, regimes, ages))


def _numbers(table: pd.DataFrame, regimes: list[str], ages: list[int]) -> pd.DataFrame:
    """Restricted mean time, share that got there, and GIPO's paired difference in time.

    ``age`` 0 and regime ``all`` stand for averages.
    """
    rows = []
    chosen = [(r, a) for r in regimes for a in (0, *ages)] + [("all", 0)]
    for regime, age in chosen:
        part = table if regime == "all" else table[table.regime == regime]
        part = part[part.age == age] if age else part
        ours = matrix(part[part.method == REFERENCE], "time")
        for method, own in part.groupby("method", sort=False):
            mine = matrix(own, "time")
            interval = stats.bootstrap(mine, stats.mean)
            difference = stats.paired_difference(ours, mine, stats.mean)
            rows.append((regime, age, method, *interval, own.reached.mean(), *difference))
    names = ["regime", "age", "method", "time", "time_low", "time_high", "reached"]
    names += ["difference", "difference_low", "difference_high"]
    return pd.DataFrame(rows, columns=names)
