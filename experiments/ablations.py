"""What the ablations share: tasks, a fresh and a stale replay size, and one way to draw them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pandas as pd

from experiments import training
from experiments.store import Store
from experiments.training import Method, Sweep, Task
from gipo_jax.analysis import plots

FRESH, STALE = 1, 128
"""Replay sizes, in iterations."""

AGE_LOOKS = {
    FRESH: plots.Look("#E69F00", "o", "-", "fresh: replay of 1 iteration"),
    STALE: plots.Look("#5B3A96", "s", "--", "stale: replay of 128 iterations"),
}

REGIME = "reuse-heavy"


@dataclasses.dataclass(frozen=True)
class Scale:
    """Tasks, seeds and factor on the tasks' steps."""

    tasks: tuple[Task, ...]
    seeds: range
    scale_steps: float


SCALES = {
    "quick": Scale((training.CARTPOLE,), range(3), 0.25),
    "committed": Scale((training.CARTPOLE, training.CATCH), range(10), 1.0),
    "full": Scale(
        (training.CARTPOLE, training.ACROBOT, training.CATCH, training.PENDULUM), range(20), 8.0
    ),
}


def run(
    store: Store,
    table: str,
    tasks: Sequence[Task],
    methods: Sequence[Method],
    scale: Scale,
    settings: Sequence[dict[str, Any]] = ({},),
) -> None:
    """Trains every method at both replay sizes and stores ``<table>_runs``.

    Args:
        settings: static settings; each entry is run, and its values become columns.
    """
    sweeps = []
    for number, chosen in enumerate(settings):
        runs = [
            run
            for task in tasks
            for run in training.expand(
                task,
                task.updates[REGIME],
                methods,
                (FRESH, STALE),
                scale.seeds,
                scale.scale_steps,
                **chosen,
            )
        ]
        name = table if len(settings) == 1 else f"{table}_{number}"
        sweeps.append(Sweep(name, tuple(runs), dict(chosen)))
    # One program call a run: sweeps of any number of runs then share compiled programs.
    training.store_sweeps(store, sweeps, "loop")
    finished = training.collect(store, sweeps)
    assert finished is not None, "store_sweeps returns when all runs are through"
    store.write(f"{table}_runs", finished[0], 6)


def draw_lines(
    store: Store, table: str, column: str, label: str, name: str, where: pd.Series | None = None
) -> None:
    """Final return against one numeric setting, a panel a task, a line a replay size.

    Args:
        table: stored table ``<table>_runs``.
        column: the setting, on a logarithmic axis.
        label: of the axis.
        name: of the figure.
        where: which rows of the table to show; all by default.
    """
    runs = store.read(f"{table}_runs", ["env", "age", "seed", "final_return", column])
    runs = runs if where is None else runs[where]
    envs = runs.env.unique().tolist()
    numbers = plots.summarize(runs, ["env", "age", column], "final_return")
    figure, axes = plots.panels(1, len(envs), width=max(3.6, min(7.0, 3.4 * len(envs))), height=2.5)
    for axis, env in zip(axes[0], envs, strict=True):
        for age, look in AGE_LOOKS.items():
            line = numbers[(numbers.env == env) & (numbers.age == age)]
            plots.points(axis, line[column], line, look)
        plots.log_sizes(axis, numbers[column], label)
        axis.set(title=env, ylabel="final return")
    plots.finish(figure, caption(runs), plots.legend(AGE_LOOKS.values()), columns=1)
    store.save(figure, name, numbers)


def caption(runs: pd.DataFrame) -> str:
    """The interval, for a caption."""
    return (
        f"GIPO, reuse-heavy. Mean; bars: 95 % bootstrap\ninterval over {runs.seed.nunique()} seeds."
    )
