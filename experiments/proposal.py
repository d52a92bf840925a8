"""The project's own objective against the field, on tasks and seeds that its development never saw.

``docs/objectives.md`` derives it; the plan fixes form and widths before these runs.
"""

import dataclasses

import numpy as np
import pandas as pd

from experiments import replay_sizes, training, tuning
from experiments.store import DataError, Store
from experiments.training import REGIMES, Method, Task
from experiments.tuning import Cell, Study, Unit
from gipo_jax.analysis import plots, stats

QUESTION = "Is following GIPO no worse than the best method at every staleness?"

PROPOSAL = "following GIPO"
PROGRAM = training.PROGRAMS["contenders"]
METHODS = {
    PROPOSAL: Method("following_gipo", {"mean_weight": 0.7, "sigma_prox": 0.5}),
    "GIPO σ=0.2": Method("gipo", {"sigma": 0.2}),
    "GIPO σ=0.5": Method("gipo", {"sigma": 0.5}),
    "GIPO σ=1": Method("gipo", {"sigma": 1.0}),
    "PPO-Clip": Method("ppo_clip", {"clip_eps": 0.2}),
    "GePPO": Method("geppo", {"clip_eps": 0.2}),
    "decoupled PPO": Method("decoupled_ppo", {"clip_eps": 0.2}),
    "MASPO": Method("maspo", {"sigma": 1.0}),
    "P3O-ESS": Method("p3o_ess", {}),
    "M2PO": Method("m2po", {}),
    "SAPO": Method("sapo", {"tau_pos": 1.0, "tau_neg": 2.0}),
    "No-Clip": Method("no_clip", {}),
}
LEVEL = 0.05
DROPPED = ("FourRooms-misc",)
"""Dropped by the plan's rule: no tuning curve ended above its first logged point.

There that point is 1, as only episodes that reach the goal have ended by then.
"""

RUNS = "proposal_runs"
COLUMNS = [*tuning.KEYS, "seed", "status", "learning_rate", "final_return", "auc"]


@dataclasses.dataclass(frozen=True)
class Scale:
    """Tasks, replay sizes, learning rates and seeds."""

    tasks: tuple[Task, ...]
    ages: tuple[int, ...]
    learning_rates: tuple[float, ...]
    tuning_seeds: range
    seeds: range

    @property
    def study(self) -> Study:
        return Study(
            "proposal",
            PROGRAM,
            METHODS,
            tuple(Cell(age) for age in self.ages),
            self.learning_rates,
            self.tuning_seeds,
            self.seeds,
        )

    @property
    def units(self) -> list[Unit]:
        return [Unit(regime, task) for task in self.tasks for regime in reversed(REGIMES)]


_FOUR_ROOMS = dataclasses.replace(training.CATCH, env="FourRooms-misc", threshold=0.5)
_TASKS = (
    tuning.with_steps(_FOUR_ROOMS, 32_768),
    tuning.with_steps(training.BREAKOUT, 16_384),
    tuning.with_steps(training.INVADERS, 16_384),
)

SCALES = {
    "quick": Scale(
        (tuning.with_steps(training.BREAKOUT, 8_192),),
        (1, 16),
        (1e-3,),
        range(2400, 2401),
        range(3400, 3402),
    ),
    "committed": Scale(
        _TASKS, (1, 16, 128), (3e-4, 1e-3, 3e-3), range(2400, 2403), range(3400, 3410)
    ),
    "full": Scale(
        (*(tuning.with_steps(task, 262_144) for task in _TASKS),),
        (1, 4, 16, 64, 128, 256),
        (1e-4, 3e-4, 1e-3, 3e-3),
        range(2400, 2405),
        range(3400, 3420),
    ),
}


def run(store: Store, preset: str, part: tuple[int, int] = (1, 1)) -> None:
    """Tunes, trains, and stores what is finished after every unit."""
    scale = SCALES[preset]
    tuning.run(store, scale.study, scale.units, part, RUNS, lambda: gather(store, scale))


def gather(store: Store, scale: Scale) -> None:
    """Stores the tables of the finished units."""
    found = tuning.gather(store, scale.study, scale.units)
    if found is None:
        return
    tuned, runs, _ = found
    tables = {"proposal_tuning": tuned, RUNS: runs[COLUMNS]}
    stored = training.write_units(store, tuning.UNIT, tables)
    store.write("proposal_units", tuning.progress(scale.units, stored[RUNS]))


def compare(runs: pd.DataFrame) -> pd.DataFrame:
    """The proposal minus every other method in normalised area, by size and over all.

    Returns:
        a row a size (0: all together) and method: ``difference``, the IQM over units and seeds,
        with ``low`` and ``high``; ``best``, whether the method has the highest mean of the others
        at that size; and for all sizes together ``p`` and, over the methods, ``p_holm``.
    """
    scores = [
        replay_sizes.scores(runs, regime, "auc")
        for regime in REGIMES
        if (runs["regime"] == regime).any()
    ]
    ages = scores[0].ages
    rows = []
    for age in (None, *ages):
        # Units of both regimes side by side: each is a stratum of its own.
        values = {
            method: np.concatenate([found.of(method, age) for found in scores], axis=1)
            for method in scores[0].methods
        }
        ours = values.pop(PROPOSAL)
        best = max(values, key=lambda method: float(values[method].mean()))
        for method, theirs in values.items():
            interval = stats.paired_difference(ours, theirs)
            p = stats.p_value(ours, theirs) if age is None else np.nan
            rows.append((age or 0, method, *interval, method == best, p))
    names = ["age", "method", "difference", "low", "high", "best", "p"]
    table = pd.DataFrame(rows, columns=names)
    overall = table["age"] == 0
    table.loc[overall, "p_holm"] = stats.holm(table.loc[overall, "p"])
    return table


def by_unit(runs: pd.DataFrame) -> pd.DataFrame:
    """The proposal minus the best other method of each unit and size, in normalised area.

    Returns:
        a row a regime, task and size: the ``best`` other method by its mean over seeds, and
        ``difference`` (IQM over seeds) with ``low`` and ``high``.
    """
    rows = []
    for regime in REGIMES:
        if not (runs["regime"] == regime).any():
            continue
        found = replay_sizes.scores(runs, regime, "auc")
        for column, task in enumerate(found.tasks):
            for age in found.ages:
                values = {method: found.of(method, age)[:, column] for method in found.methods}
                ours = values.pop(PROPOSAL)
                best = max(values, key=lambda method: float(values[method].mean()))
                interval = stats.paired_difference(ours[:, None], values[best][:, None])
                rows.append((regime, task, age, best, *interval))
    return pd.DataFrame(rows, columns=["regime", "env", "age", "best", "difference", "low", "high"])


def look(label: str) -> plots.Look:
    """How a method is drawn."""
    if label in _LOOKS:
        color, marker = _LOOKS[label]
        return plots.Look(color, marker, "-", label)
    method = METHODS[label]
    sigma = method.parameters.get("sigma") if method.objective == "gipo" else None
    return plots.look(method.objective, sigma)


_LOOKS = {
    PROPOSAL: ("#C00000", "*"),
    "GePPO": ("#CC79A7", "P"),
    "decoupled PPO": ("#7E5FB0", "X"),
    "MASPO": ("#8C6D1F", "v"),
    "P3O-ESS": ("#56B4E9", "<"),
    "M2PO": ("#B3A100", ">"),
}
"""Colour and marker of the methods that no other figure shows."""


def draw(store: Store) -> None:
    """Normalised area against replay size, and the differences to every method."""
    stored = store.read(RUNS, COLUMNS)
    planned = store.read("proposal_units", ["regime", "env", "finished"])
    runs = stored[~stored.env.isin(DROPPED)]
    if runs.empty:
        raise DataError(RUNS, "no unit that counts has finished; continue the same run")
    table = compare(runs)
    regimes = [regime for regime in REGIMES if (runs["regime"] == regime).any()]
    figure, axes = plots.panels(1, len(regimes) + 1, height=3.2, width=10)
    for axis, regime in zip(axes[0], regimes, strict=False):
        found = replay_sizes.scores(runs, regime, "auc")
        shift = np.linspace(0.88, 1.12, len(found.methods))
        for factor, method in zip(shift, found.methods, strict=True):
            intervals = [stats.bootstrap(found.of(method, age)) for age in found.ages]
            line = pd.DataFrame(intervals, columns=["mean", "low", "high"])
            width = 2.2 if method == PROPOSAL else 0.8
            plots.points(axis, np.array(found.ages) * factor, line, look(method), lw=width)
        plots.log_sizes(axis, found.ages, "replay size (iterations, log scale)")
        axis.set(title=f"{regime}, tasks: {len(found.tasks)}", ylabel="area (normalised IQM)")
    axis = axes[0, -1]
    others = [label for label in METHODS if label != PROPOSAL]
    for number, age in enumerate(sorted(table["age"].unique())):
        part = table[table.age == age].set_index("method")
        for y, method in enumerate(others):
            row, at = part.loc[method], -y + 0.3 - 0.2 * number
            color = look(method).color
            axis.plot([row.low, row.high], [at, at], color=color, lw=1.8 if age == 0 else 0.8)
            axis.plot(row.difference, at, "Dos^v*"[number % 6], color=color, markersize=3.5)
    axis.axvline(0, color="0.5", lw=0.8)
    axis.set_yticks([-y for y in range(len(others))], others, fontsize=7.5)
    axis.set(title=f"{PROPOSAL} minus the other", xlabel="difference in area")
    caption = (
        f"{planned.finished.sum()} of {len(planned)} units. Right, from top to bottom: all sizes "
        "(bold), then small to large replay; right of 0 the proposal is better.\nBars: 95 % "
        f"stratified bootstrap interval over {runs.seed.nunique()} seeds."
    )
    plots.finish(figure, caption, plots.legend([look(label) for label in METHODS]), columns=6)
    store.save(figure, "proposal", table)
    store.numbers("proposal_units", planned)
    store.numbers("proposal_by_unit", by_unit(runs))
    store.numbers("proposal_without_dropping", compare(stored))
