"""Age of the data apart from the amount of it.

A larger buffer holds data that is older and also more varied. Here learning samples a window of
``width`` iterations of data whose newest ``min_age`` iterations are held back, so that either
varies while the other stays.
"""

import dataclasses

import numpy as np
import pandas as pd

from experiments import training, tuning
from experiments.store import Store
from experiments.training import Method, Task
from experiments.tuning import Cell, Study, Unit
from gipo_jax.analysis import plots, stats

QUESTION = "Is it the age of replayed data that costs return, or the size of the buffer?"

REGIME = "reuse-heavy"
PROGRAM = training.PROGRAMS["compared"]
METHODS = {
    "GIPO σ=0.2": Method("gipo", {"sigma": 0.2}),
    "GIPO σ=1": Method("gipo", {"sigma": 1.0}),
    "PPO-Clip": Method("ppo_clip", {"clip_eps": 0.2}),
    "SAPO": Method("sapo", {"tau_pos": 1.0, "tau_neg": 2.0}),
    "No-Clip": Method("no_clip", {}),
}
LATE = ("policy_age", "near_zero_fraction", "ess", "log_ratio_abs_p95")
"""Metrics of which a run keeps the mean over the second half of training."""

RUNS = "age_and_size_runs"
COLUMNS = [*tuning.KEYS, "seed", "status", "learning_rate", "final_return", "auc", *LATE]


@dataclasses.dataclass(frozen=True)
class Scale:
    """Tasks, and a grid of held-back iterations and window widths, both in iterations."""

    tasks: tuple[Task, ...]
    min_ages: tuple[int, ...]
    widths: tuple[int, ...]
    learning_rates: tuple[float, ...]
    tuning_seeds: range
    seeds: range

    @property
    def study(self) -> Study:
        cells = tuple(
            Cell(min_age + width, min_age) for width in self.widths for min_age in self.min_ages
        )
        return Study(
            "age", PROGRAM, METHODS, cells, self.learning_rates, self.tuning_seeds, self.seeds
        )

    @property
    def units(self) -> list[Unit]:
        return [Unit(REGIME, task) for task in self.tasks]


_SHORT = (
    tuning.with_steps(training.CATCH, 32_768),
    tuning.with_steps(training.CARTPOLE, 49_152),
)

SCALES = {
    "quick": Scale(
        (tuning.with_steps(training.CATCH, 16_384),),
        (0, 16),
        (1, 16),
        (1e-3,),
        range(2200, 2201),
        range(3200, 3203),
    ),
    "committed": Scale(
        _SHORT, (0, 16, 64), (1, 16, 64), (3e-4, 1e-3, 3e-3), range(2200, 2203), range(3200, 3210)
    ),
    "full": Scale(
        (*_SHORT, training.ACROBOT),
        (0, 4, 16, 64, 128),
        (1, 4, 16, 64, 128),
        (1e-4, 3e-4, 1e-3, 3e-3),
        range(2200, 2205),
        range(3200, 3220),
    ),
}


def run(store: Store, preset: str, part: tuple[int, int] = (1, 1)) -> None:
    """Tunes in every cell, trains, and stores what is finished after every task."""
    scale = SCALES[preset]
    tuning.run(store, scale.study, scale.units, part, RUNS, lambda: gather(store, scale))


def gather(store: Store, scale: Scale) -> None:
    """Stores the tables of the finished tasks."""
    found = tuning.gather(store, scale.study, scale.units)
    if found is None:
        return
    tuned, runs, curves = found
    halfway = curves.groupby("run")["env_steps"].transform("max") / 2
    late = curves[curves["env_steps"] > halfway].groupby("run")[list(LATE)].mean()
    tables = {"age_and_size_tuning": tuned, RUNS: runs.merge(late, on="run")[COLUMNS]}
    stored = training.write_units(store, tuning.UNIT, tables)
    store.write("age_and_size_units", tuning.progress(scale.units, stored[RUNS]))


def load(store: Store) -> pd.DataFrame:
    """Stored runs with ``width`` and ``score``, the final return normalised per task.

    Raises:
        DataError: as in ``Store.read``.
    """
    runs = store.read(RUNS, COLUMNS)
    runs["width"] = runs["age"] - runs["min_age"]
    # A run without a finite score counts as the task's worst.
    by_task = runs.groupby("env")["final_return"]
    runs["final_return"] = runs["final_return"].fillna(by_task.transform("min"))
    means = runs.groupby(["env", "method", "age", "min_age"])["final_return"].mean().groupby("env")
    low, span = means.min(), means.max() - means.min()
    runs["score"] = (runs["final_return"] - runs["env"].map(low)) / runs["env"].map(span)
    return runs


def slopes(runs: pd.DataFrame) -> pd.DataFrame:
    """How much a method's score changes when the window moves back, and when it widens.

    Returns:
        a row a method and effect: ``older``, the score at the largest ``min_age`` minus that at the
        smallest, at equal widths; ``wider``, the same for widths at equal ``min_age``. Means over
        the other setting and tasks, with 95 % bootstrap intervals over seeds.
    """
    rows = []
    for method, own in runs.groupby("method", sort=False):
        for effect, column in (("older", "min_age"), ("wider", "width")):
            last, first = (
                own[own[column] == end]
                .groupby(["seed", "env"])["score"]
                .mean()
                .unstack()
                .to_numpy()
                for end in (own[column].max(), own[column].min())
            )
            rows.append((method, effect, *stats.paired_difference(last, first, stats.mean)))
    return pd.DataFrame(rows, columns=["method", "effect", "difference", "low", "high"])


def looks() -> dict[str, plots.Look]:
    """The look of every method."""
    return {
        label: plots.look(method.objective, method.parameters.get("sigma"))
        for label, method in METHODS.items()
    }


def draw(store: Store) -> None:
    """Return and utilization against age at equal size, and the effects of age and size."""
    runs = load(store)
    planned = store.read("age_and_size_units", ["regime", "env", "finished"])
    done = f"{planned.finished.sum()} of {len(planned)} tasks"
    _draw_returns(store, runs, done)
    _draw_utilization(store, runs, done)
    store.numbers("age_and_size_units", planned)


def _draw_returns(store: Store, runs: pd.DataFrame, done: str) -> None:
    widths = sorted(runs["width"].unique())
    appearance = looks()
    figure, axes = plots.panels(1, len(widths) + 1, height=2.7, width=9.5)
    seeds = runs.groupby(["method", "width", "min_age", "seed"])["score"].mean().reset_index()
    table = plots.summarize(seeds, ["method", "width", "min_age"], "score")
    for axis, width in zip(axes[0], widths, strict=False):
        for label, look in appearance.items():
            line = table[(table.method == label) & (table.width == width)]
            plots.points(axis, np.arange(len(line)), line, look)
        held = sorted(runs["min_age"].unique())
        axis.set_xticks(range(len(held)), [str(n) for n in held])
        axis.set_ylim(table["low"].min() - 0.05, table["high"].max() + 0.05)
        axis.set(title=f"window of {width}", xlabel="iterations held back")
    axes[0, 0].set_ylabel("final return (normalised)")
    effects, axis = slopes(runs), axes[0, -1]
    for y, (label, look) in enumerate(appearance.items()):
        for effect, offset, fill in (("older", 0.13, "full"), ("wider", -0.13, "none")):
            row = effects[(effects.method == label) & (effects.effect == effect)].iloc[0]
            at = -y + offset
            axis.plot([row.low, row.high], [at, at], color=look.color, lw=1.3)
            axis.plot(row.difference, at, look.marker, color=look.color, fillstyle=fill)
    axis.axvline(0, color="0.5", lw=0.8)
    axis.set_yticks([-y for y in range(len(appearance))], list(appearance), fontsize=7.5)
    axis.set(title="filled: oldest - newest\nhollow: widest - narrowest", xlabel="change")
    caption = (
        f"Reuse-heavy, {done}. A window of n iterations of data behind those held back; the rate "
        f"is tuned in every cell.\nBars: 95 % bootstrap interval over {runs.seed.nunique()} seeds."
    )
    plots.finish(figure, caption, plots.legend(appearance.values()), columns=5)
    store.save(figure, "age_and_size", table)
    store.numbers("age_and_size_effects", effects)


def _draw_utilization(store: Store, runs: pd.DataFrame, done: str) -> None:
    """Utilization and return against the mean age of sampled data, a point a cell."""
    shown = {
        "near_zero_fraction": "share of weights < 0.001",
        "ess": "effective sample size / n",
        "score": "final return (normalised)",
    }
    widths = sorted(runs["width"].unique())
    markers = dict(zip(widths, "os^Dv", strict=False))
    keys = ["method", "width", "min_age"]
    table = runs.groupby(keys, sort=False)[["policy_age", *shown]].mean().reset_index()
    appearance = looks()
    figure, axes = plots.panels(1, len(shown), height=2.6, width=9)
    for axis, (column, label) in zip(axes[0], shown.items(), strict=True):
        for method, look in appearance.items():
            own = table[table.method == method].sort_values("policy_age")
            axis.plot(own.policy_age + 1, own[column], color=look.color, lw=0.7, alpha=0.6)
            for width, marker in markers.items():
                part = own[own.width == width]
                axis.plot(part.policy_age + 1, part[column], marker, color=look.color, markersize=4)
        axis.set_xscale("log", base=2)
        axis.set(xlabel="1 + mean age of data (iterations)", ylabel=label)
    shapes = ("circle", "square", "triangle", "diamond", "wedge")
    names = ", ".join(f"{shape} {width}" for width, shape in zip(widths, shapes, strict=False))
    caption = (
        f"Reuse-heavy, {done}. A point a cell, mean over tasks and seeds, second half of training; "
        f"marker: width of the window ({names})."
    )
    plots.finish(figure, caption, plots.legend(appearance.values(), markers=False), columns=5)
    store.save(figure, "age_and_size_utilization", table)
