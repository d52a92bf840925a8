"""Development of the project's own objective, on tasks and seeds that its comparison never uses."""

import dataclasses

import numpy as np
import pandas as pd

from experiments import training, tuning
from experiments.store import Store
from experiments.training import Method, Sweep, Task
from experiments.tuning import Cell, Study, Unit
from gipo_jax.analysis import plots

QUESTION = "Which widths should proximal GIPO have, and should they follow the data?"

REGIME = "reuse-heavy"
PROGRAM = training.PROGRAMS["contenders"]
VARIANTS = {
    f"stale {stale:g}, prox {prox:g}": Method(
        "proximal_gipo", {"sigma_stale": stale, "sigma_prox": prox}
    )
    for stale in (0.5, 1.0, 2.0, 100.0)
    for prox in (0.5, 1.0)
} | {
    f"mean weight {mean:g}, prox 0.5": Method(
        "following_gipo", {"mean_weight": mean, "sigma_prox": 0.5}
    )
    for mean in (0.7, 0.9, 0.97)
}
"""Fixed widths, and stale widths that follow the data."""

COLUMNS = [*tuning.TUNING_COLUMNS, "final_return"]


@dataclasses.dataclass(frozen=True)
class Scale:
    """Tasks, replay sizes, learning rates and seeds; half of the seeds tunes for the other half."""

    tasks: tuple[Task, ...]
    ages: tuple[int, ...]
    learning_rates: tuple[float, ...]
    seeds: range


_TASKS = (
    tuning.with_steps(training.CARTPOLE, 32_768),
    tuning.with_steps(training.CATCH, 32_768),
    training.ACROBOT,
)

SCALES = {
    "quick": Scale(
        (tuning.with_steps(training.CATCH, 16_384),), (1, 16), (1e-3, 3e-3), range(4000, 4002)
    ),
    "committed": Scale(_TASKS, (1, 16, 128), (3e-4, 1e-3, 3e-3), range(4000, 4006)),
    "full": Scale(
        (*_TASKS, tuning.with_steps(training.PENDULUM, 262_144)),
        (1, 16, 128),
        (1e-4, 3e-4, 1e-3, 3e-3),
        range(4000, 4016),
    ),
}


def sweep_of(scale: Scale, task: Task) -> Sweep:
    """All variants, sizes and rates on a task."""
    cells = tuple(Cell(age) for age in scale.ages)
    study = Study("develop", PROGRAM, VARIANTS, cells, scale.learning_rates, scale.seeds, range(0))
    return tuning.tuning_sweep(study, Unit(REGIME, task))


def run(store: Store, preset: str, part: tuple[int, int] = (1, 1)) -> None:
    """Trains all variants, task by task, and stores what is finished."""
    scale = SCALES[preset]
    index, count = part
    done = training.stored_units(store, "proposal_development", ["env"])
    for task in scale.tasks[index - 1 :: count]:
        if (task.env,) in done:
            continue
        training.store_sweeps(store, [sweep_of(scale, task)], "loop")
        found = training.collect(store, [sweep_of(scale, task) for task in scale.tasks])
        assert found is not None, "at least this task is finished"
        training.write_units(store, ["env"], {"proposal_development": found[0][COLUMNS]})


def crossed_scores(runs: pd.DataFrame) -> pd.DataFrame:
    """Areas at the rate that is best on the other half of the seeds, normalised per task.

    Returns:
        rows of ``tuning.KEYS``, seed and ``score``, 0 and 1 for the worst and best mean of a task
        over variants and sizes.
    """
    seeds = sorted(runs["seed"].unique())
    first = runs["seed"].isin(seeds[: len(seeds) // 2])
    parts = []
    for chosen_on, scored_on in ((first, ~first), (~first, first)):
        keys = [*tuning.KEYS, "learning_rate"]
        best = tuning.best_rates(runs[chosen_on])[keys]
        parts.append(runs[scored_on].merge(best, on=keys))
    scored = pd.concat(parts, ignore_index=True)
    worst = scored.groupby("env")["auc"].transform("min")
    scored["auc"] = scored["auc"].fillna(worst)
    means = scored.groupby(tuning.KEYS)["auc"].mean().groupby("env")
    low, span = means.min(), means.max() - means.min()
    scored["score"] = (scored["auc"] - scored["env"].map(low)) / scored["env"].map(span)
    return scored[[*tuning.KEYS, "seed", "score"]]


def rank(scores: pd.DataFrame) -> pd.DataFrame:
    """Variants by the plan's rule, the one to freeze first.

    Returns:
        a row a variant: ``mean`` over tasks and sizes, its standard error over seeds, ``worst``
        size's mean. First come those within one standard error of the best mean, by worst size.
    """
    by_seed = scores.groupby(["method", "seed"])["score"].mean().groupby("method")
    by_size = scores.groupby(["method", "age"])["score"].mean().groupby("method")
    table = pd.DataFrame({"mean": by_seed.mean(), "error": by_seed.sem(), "worst": by_size.min()})
    best = table.iloc[int(table["mean"].to_numpy().argmax())]
    table["close"] = table["mean"] >= best["mean"] - best["error"]
    return table.sort_values(["close", "worst"], ascending=False).reset_index()


def draw(store: Store) -> None:
    """Normalised area of every variant, over all sizes and at each."""
    runs = store.read("proposal_development", COLUMNS)
    scores = crossed_scores(runs)
    ranked = rank(scores)
    ages = sorted(scores["age"].unique())
    figure, axes = plots.panels(1, 1 + len(ages), height=3.2, width=9, sharey=True, sharex=True)
    tables = []
    for axis, age in zip(axes[0], (0, *ages), strict=True):
        part = scores if age == 0 else scores[scores["age"] == age]
        by_seed = part.groupby(["method", "seed"])["score"].mean().reset_index()
        table = plots.summarize(by_seed, ["method"], "score").set_index("method")
        for y, method in enumerate(ranked["method"]):
            row = table.loc[method]
            color = "#0072B2" if VARIANTS[method].objective == "proximal_gipo" else "#D55E00"
            axis.plot([row["low"], row["high"]], [-y, -y], color=color, lw=1.3)
            axis.plot(row["mean"], -y, "o", color=color, markersize=4)
        axis.set(title=f"replay of {age}" if age else "all sizes", xlabel="area (normalised)")
        tables.append(table.reset_index().assign(age=age))
    axes[0, 0].set_yticks(-np.arange(len(ranked)), ranked["method"], fontsize=7)
    caption = (
        f"Development: {', '.join(runs.env.unique())}, reuse-heavy. Blue: fixed widths; orange: "
        "the stale width follows the batch.\nThe rate is picked on half of the seeds and scored on "
        f"the other. Bars: 95 % bootstrap interval over {runs.seed.nunique()} seeds. On top: the "
        "best by the plan's rule."
    )
    plots.finish(figure, caption)
    store.save(figure, "proposal_development", pd.concat(tables, ignore_index=True))
    store.numbers("proposal_development_rank", ranked)
