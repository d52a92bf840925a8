"""The headline: return against replay size, for GIPO and tuned baselines, in two regimes."""

import dataclasses

import numpy as np
import pandas as pd

from experiments import training
from experiments.store import DataError, Store
from experiments.training import METHODS, REGIMES, Method, Sweep, Task
from gipo_jax.analysis import plots, stats

QUESTION = "Does GIPO learn best over replay sizes from on-policy to 128 iterations old?"

RUN_COLUMNS = [
    *("run", "regime", "env", "objective", "sigma", "age", "seed", "status"),
    *("learning_rate", "final_return", "auc"),
]


@dataclasses.dataclass(frozen=True)
class Scale:
    """Size of the study.

    Attributes:
        tasks: environments.
        methods: compared methods.
        ages: buffer sizes, in iterations.
        seeds: seeds that are reported.
        learning_rates: tried for every method, task and regime; a single one is not tuned.
        tuning_seeds: seeds for that, others than those reported.
        tuning_age: buffer size for that, in iterations.
        scale_steps: factor on the tasks' steps.
    """

    tasks: tuple[Task, ...]
    methods: tuple[Method, ...]
    ages: tuple[int, ...]
    seeds: range
    learning_rates: tuple[float, ...]
    tuning_seeds: range
    tuning_age: int
    scale_steps: float


_TASKS = (
    training.CARTPOLE,
    training.ACROBOT,
    training.CATCH,
    training.PENDULUM,
    training.BREAKOUT,
    training.INVADERS,
)

SCALES = {
    "quick": Scale(
        tasks=(training.CARTPOLE, training.CATCH),
        methods=(Method("gipo", {"sigma": 0.5}), *METHODS[2:]),
        ages=(1, 32),
        seeds=range(3),
        learning_rates=(1e-3,),
        tuning_seeds=range(1000, 1001),
        tuning_age=16,
        scale_steps=0.25,
    ),
    "committed": Scale(
        tasks=_TASKS,
        methods=METHODS,
        ages=(1, 16, 128),
        seeds=range(10),
        learning_rates=(3e-4, 1e-3, 3e-3),
        tuning_seeds=range(1000, 1002),
        tuning_age=16,
        scale_steps=1.0,
    ),
    "full": Scale(
        tasks=(*_TASKS, training.ASTERIX),
        methods=METHODS,
        ages=(1, 4, 16, 64, 128, 256),
        seeds=range(20),
        learning_rates=(1e-4, 3e-4, 1e-3, 3e-3),
        tuning_seeds=range(1000, 1005),
        tuning_age=16,
        scale_steps=16.0,
    ),
}


def run(store: Store, preset: str, part: tuple[int, int] = (1, 1)) -> None:
    """Tunes learning rates, trains with the chosen ones, and stores what is finished as tables.

    Args:
        part: (i, n): this call takes the i-th of n shares of the tasks and regimes.
    """
    scale = SCALES[preset]
    # The reuse-heavy regime first: it is where staleness should matter.
    pairs = [(regime, task) for regime in reversed(REGIMES) for task in scale.tasks]
    index, count = part
    for regime, task in pairs[index - 1 :: count]:
        tuning = _tuning(scale, regime, task)
        training.store_sweeps(store, tuning, "loop")
        main = _main(store, scale, regime, task)
        training.store_sweeps(store, [main] if main else [], "loop")

    mains = [_main(store, scale, regime, task) for regime, task in pairs]
    finished = training.collect(store, [main for main in mains if main is not None])
    if finished is not None:
        runs, curves = finished
        store.write("replay_sizes_runs", runs, 6)
        # A file a regime: together they would be too large for a repository.
        for regime in REGIMES:
            part_of = curves["run"].isin(runs.loc[runs["regime"] == regime, "run"])
            if part_of.any():
                store.write(_curves_table(regime), curves[part_of], 3)
    tuned = training.collect(store, [s for r, t in pairs for s in _tuning(scale, r, t)])
    if tuned is not None:
        store.write("replay_sizes_tuning", tuned[0], 6)


def _settings(scale: Scale, task: Task) -> dict[str, int]:
    # The same allocation in both sweeps of a task makes the same program, which is compiled once.
    return {"max_buffer_size": max(*scale.ages, scale.tuning_age) * task.block}


def _tuning(scale: Scale, regime: str, task: Task) -> list[Sweep]:
    """The tuning sweep, if there is anything to tune."""
    if len(scale.learning_rates) == 1:
        return []
    runs = training.expand(
        task,
        task.updates[regime],
        scale.methods,
        (scale.tuning_age,),
        scale.tuning_seeds,
        scale.scale_steps,
        program=training.PROGRAMS["compared"],
        learning_rate=list(scale.learning_rates),
        **_settings(scale, task),
    )
    return [Sweep(f"tuning {regime} {task.env}".replace(" ", "_"), tuple(runs), {"regime": regime})]


def _main(store: Store, scale: Scale, regime: str, task: Task) -> Sweep | None:
    """The reported sweep; None while its learning rates are not known."""
    rates = dict.fromkeys(range(len(scale.methods)), scale.learning_rates[0])
    if len(scale.learning_rates) > 1:
        tuned = training.collect(store, _tuning(scale, regime, task))
        if tuned is None:
            return None
        table = tuned[0]
        for index, method in enumerate(scale.methods):
            own = table[table.objective == method.objective]
            own = own[own.sigma == method.sigma] if np.isfinite(method.sigma) else own
            means = own.groupby("learning_rate")["auc"].mean()
            rates[index] = float(means.index.to_numpy(float)[means.to_numpy().argmax()])
    runs = [
        run
        for index, method in enumerate(scale.methods)
        for run in training.expand(
            task,
            task.updates[regime],
            (method,),
            scale.ages,
            scale.seeds,
            scale.scale_steps,
            program=training.PROGRAMS["compared"],
            learning_rate=rates[index],
            **_settings(scale, task),
        )
    ]
    return Sweep(f"replay {regime} {task.env}".replace(" ", "_"), tuple(runs), {"regime": regime})


def _curves_table(regime: str) -> str:
    return f"replay_sizes_curves_{regime.replace('-', '_')}"


def load_curves(store: Store, runs: pd.DataFrame) -> pd.DataFrame:
    """Stored curves with the columns that tell runs apart, and ``progress`` in (0, 1].

    Raises:
        DataError: as in ``Store.read``.
    """
    curves = pd.concat(
        store.read(_curves_table(regime), ["run", "env_steps", *training.CURVES])
        for regime in runs["regime"].unique()
    )
    curves = curves.merge(
        runs[["run", "regime", "env", "method", "age", "seed", "final_return"]], on="run"
    )
    curves["progress"] = curves.env_steps / curves.groupby("run").env_steps.transform("max")
    return curves


def load_runs(store: Store) -> pd.DataFrame:
    """Stored runs with a column ``method``, the name in figures.

    Raises:
        DataError: as in ``Store.read``.
    """
    runs = store.read("replay_sizes_runs", RUN_COLUMNS)
    runs["method"] = [
        plots.look(objective, sigma if objective == "gipo" else None).label
        for objective, sigma in zip(runs.objective, runs.sigma, strict=True)
    ]
    return runs


def looks(runs: pd.DataFrame) -> dict[str, plots.Look]:
    """The look of every method, in stored order."""
    found = runs.drop_duplicates("method")
    return {
        method: plots.look(objective, sigma if objective == "gipo" else None)
        for method, objective, sigma in zip(found.method, found.objective, found.sigma, strict=True)
    }


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of a regime as an array.

    Attributes:
        values: ``[methods, ages, seeds, tasks]``, normalised per task over the means of all
            combinations of method and age.
        methods, ages, tasks: what the axes are.
        span: best minus worst mean, by task: the unit of normalised scores.
    """

    values: np.ndarray
    methods: list[str]
    ages: list[int]
    tasks: list[str]
    span: np.ndarray

    def of(self, method: str, age: int | None = None) -> np.ndarray:
        """Scores ``[seeds, tasks]`` of a method at an age; ages averaged within a seed if None."""
        chosen = self.values[self.methods.index(method)]
        return chosen.mean(axis=0) if age is None else chosen[self.ages.index(age)]


def scores(runs: pd.DataFrame, regime: str, column: str) -> Scores:
    """Normalised scores of a regime. A run without a finite score counts as the task's worst.

    Raises:
        DataError: the regime's tasks do not share one grid.
    """
    part = runs[runs.regime == regime]
    methods, tasks = part.method.unique().tolist(), part.env.unique().tolist()
    ages, seeds = sorted(part.age.unique().tolist()), sorted(part.seed.unique().tolist())
    table = part.set_index(["method", "age", "seed", "env"])[column]
    grid = pd.MultiIndex.from_product([methods, ages, seeds, tasks])
    if table.index.has_duplicates or not grid.isin(table.index).all():
        raise DataError("replay_sizes_runs", f"regime {regime!r} has no full grid of runs")
    raw = table.loc[grid].to_numpy(float).reshape(-1, len(seeds), len(tasks))
    worst = np.nanmin(raw, axis=(0, 1))
    raw = np.where(np.isfinite(raw), raw, worst)
    means = raw.mean(axis=1)
    normal = stats.normalize(raw).reshape(len(methods), len(ages), len(seeds), len(tasks))
    span = means.max(axis=0) - means.min(axis=0)
    return Scores(normal, methods, ages, tasks, np.where(span > 0, span, 1.0))


def draw(store: Store) -> None:
    """The headline, returns task by task, profiles, and the comparison with each baseline."""
    runs = load_runs(store)
    appearance = looks(runs)
    regimes = [regime for regime in REGIMES if (runs.regime == regime).any()]
    _draw_headline(store, runs, appearance, regimes)
    for regime in regimes:
        _draw_tasks(store, runs[runs.regime == regime], appearance, regime)
    _draw_comparison(store, runs, appearance, regimes)


def _draw_headline(
    store: Store, runs: pd.DataFrame, appearance: dict[str, plots.Look], regimes: list[str]
) -> None:
    figure, axes = plots.panels(2, len(regimes), height=2.5, sharex=True)
    rows = []
    for column, regime in enumerate(regimes):
        for row, (score, label) in enumerate(
            [("final_return", "final return"), ("auc", "area under curve")]
        ):
            found = scores(runs, regime, score)
            axis = axes[row, column]
            shift = np.linspace(0.9, 1.1, len(found.methods))
            for factor, method in zip(shift, found.methods, strict=True):
                intervals = [stats.bootstrap(found.of(method, age)) for age in found.ages]
                table = pd.DataFrame(intervals, columns=["mean", "low", "high"])
                plots.points(axis, np.array(found.ages) * factor, table, appearance[method])
                rows += [
                    (regime, score, age, method, *interval)
                    for age, interval in zip(found.ages, intervals, strict=True)
                ]
            plots.log_sizes(axis, found.ages, "replay size (iterations, log scale)")
            if row == 0:
                axis.set_title(f"{regime} ({len(found.tasks)} tasks)")
                axis.set_xlabel("")
            if column == 0:
                axis.set_ylabel(f"{label}\n(normalised IQM)")
    seeds = runs.seed.nunique()
    caption = (
        "Scores are 0 for the worst and 1 for the best mean of a task over the methods and sizes "
        "compared here.\nInterquartile mean over tasks and seeds; bars: 95 % stratified bootstrap "
        f"interval over {seeds} seeds."
    )
    plots.finish(figure, caption, plots.legend(appearance.values()), columns=6)
    columns = ["regime", "score", "age", "method", "iqm", "low", "high"]
    store.save(figure, "replay_sizes", pd.DataFrame(rows, columns=columns))


def _draw_tasks(
    store: Store, runs: pd.DataFrame, appearance: dict[str, plots.Look], regime: str
) -> None:
    envs = runs.env.unique().tolist()
    columns = min(3, len(envs))
    figure, axes = plots.panels(-(-len(envs) // columns), columns, height=2.3)
    table = plots.summarize(runs, ["env", "method", "age"], "final_return")
    for axis, env in zip(axes.flat, envs, strict=False):
        for method, look in appearance.items():
            line = table[(table.env == env) & (table.method == method)]
            plots.points(axis, line.age, line, look)
        plots.log_sizes(axis, runs.age, "replay size (iterations)")
        axis.set(title=env, ylabel="final return")
    for axis in axes.flat[len(envs) :]:
        axis.remove()
    caption = (
        f"Regime: {regime}. Mean return of the last logged points; bars: 95 % bootstrap "
        f"interval over {runs.seed.nunique()} seeds."
    )
    plots.finish(figure, caption, plots.legend(appearance.values()), columns=6)
    store.save(figure, f"replay_sizes_{regime.replace('-', '_')}", table)


def compare(runs: pd.DataFrame, regimes: list[str]) -> pd.DataFrame:
    """GIPO (sigma 1) against every other method: paired differences and improvement probability.

    Returns:
        rows of regime, score, age (0: mean over ages), method, the IQM of the paired difference and
        the probability that GIPO's run is better, each with its interval.
    """
    reference = plots.look("gipo", 1.0).label
    rows = []
    for regime in regimes:
        for score in ("final_return", "auc"):
            found = scores(runs, regime, score)
            for method in found.methods:
                if method == reference:
                    continue
                for age in (None, *found.ages):
                    ours, theirs = found.of(reference, age), found.of(method, age)
                    difference = stats.paired_difference(ours, theirs)
                    better = stats.improvement_probability(ours, theirs)
                    rows.append((regime, score, age or 0, method, *difference, *better))
    parts = [f"{name}{end}" for name in ("difference", "better") for end in ("", "_low", "_high")]
    return pd.DataFrame(rows, columns=["regime", "score", "age", "method", *parts])


def _draw_comparison(
    store: Store, runs: pd.DataFrame, appearance: dict[str, plots.Look], regimes: list[str]
) -> None:
    """Performance profiles, Elo, and GIPO's difference to each method at each size."""
    figure, axes = plots.panels(len(regimes), 3, height=2.5)
    comparison = compare(runs, regimes)
    ratings = []
    for row, regime in enumerate(regimes):
        found = scores(runs, regime, "final_return")
        profile, elo, difference = axes[row]
        thresholds = np.linspace(-0.1, 1.2, 53)
        for method in found.methods:
            everything = np.concatenate(list(found.values[found.methods.index(method)]), axis=0)
            share, low, high = stats.performance_profile(everything, thresholds, resamples=500)
            table = pd.DataFrame({"mean": share, "low": low, "high": high})
            plots.band(profile, thresholds, table, appearance[method])
        profile.set(xlabel="normalised final return  τ", ylabel="share of runs above τ")
        profile.set_title(f"{regime}: profile")

        flat = found.values.transpose(0, 2, 1, 3).reshape(
            len(found.methods), found.values.shape[2], -1
        )
        intervals = stats.elo_interval(flat, prior_draws=1.0, resamples=200)
        for position, (method, interval) in enumerate(zip(found.methods, intervals, strict=True)):
            look = appearance[method]
            elo.plot(interval[1:], [-position] * 2, color=look.color, lw=2)
            elo.plot(interval.estimate, -position, look.marker, color=look.color)
            ratings.append((regime, method, *interval))
        elo.set_yticks([-i for i in range(len(found.methods))], found.methods)
        elo.set(xlabel="Elo", title=f"{regime}: rating")

        part = comparison[(comparison.regime == regime) & (comparison.score == "final_return")]
        others = [m for m in found.methods if m in set(part.method)]
        for number, age in enumerate(found.ages):
            line = part[part.age == age].set_index("method").loc[others]
            y = -np.arange(len(others)) + 0.25 * (1 - number)
            for at, look_of, entry in zip(y, others, line.itertuples(), strict=True):
                color, marker = appearance[look_of].color, "os^Dv*"[number % 6]
                difference.plot(
                    [entry.difference_low, entry.difference_high], [at, at], color=color, lw=1.3
                )
                difference.plot(entry.difference, at, marker, color=color, markersize=4)
        difference.axvline(0, color="0.5", lw=0.8)
        difference.set_yticks([-i for i in range(len(others))], others)
        difference.set(xlabel="GIPO σ=1 minus the other", title=f"{regime}: difference")
    caption = (
        "Normalised final return; right: IQM of the paired difference on shared seeds, above 0 "
        "where GIPO σ=1 is better;\neach triple from top to bottom: small to large replay. Elo: "
        "Bradley-Terry over same-seed pairs, one drawn game added a pair.\n"
        "Bars and shading: 95 % bootstrap intervals over seeds."
    )
    plots.finish(figure, caption, plots.legend(appearance.values()), columns=6)
    store.save(figure, "replay_sizes_comparison", comparison)
    names = ["regime", "method", "elo", "low", "high"]
    store.numbers("replay_sizes_elo", pd.DataFrame(ratings, columns=names))
