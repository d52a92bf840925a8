"""Protocol 2: every method tuned alike at every replay size, and what that changes.

Protocol 1 (``replay_sizes``) tunes at one replay size with two seeds and uses the rate at all
sizes. Here learning rates, and in a second comparison widths, are tuned at each size.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from experiments import replay_sizes, sample_efficiency, stability, training
from experiments.compared import NAMES
from experiments.store import Store
from experiments.training import REGIMES, Method, Sweep, Task
from experiments.tuning import UNIT, Unit, progress, with_steps
from gipo_jax.analysis import plots, stats

QUESTION = "Does GIPO learn best where every method is tuned at every replay size?"

WIDTHS: dict[str, dict[float, dict[str, float]]] = {
    "gipo": {sigma: {"sigma": sigma} for sigma in (0.2, 0.5, 1.0)},
    "ppo_clip": {eps: {"clip_eps": eps} for eps in (0.1, 0.2, 0.4)},
    # SAPO's two temperatures keep the ratio that they have in the paper's comparison.
    "sapo": {tau: {"tau_pos": tau, "tau_neg": 2 * tau} for tau in (0.5, 1.0, 2.0)},
    "no_clip": {0.0: {}},
}
"""Parameters of an objective by its width: sigma, eps, tau for A > 0; No-Clip has none."""

PAPER = {"gipo": 1.0, "ppo_clip": 0.2, "sapo": 1.0, "no_clip": 0.0}
"""The widths of the paper's comparison."""

CASES = ("papers", "tuned", "one rate")
"""The paper's widths, rate tuned at each size; widths and rate tuned at each size; the paper's
widths, one rate for all sizes."""

TUNING_COLUMNS = [
    *("regime", "env", "objective", "width", "age", "learning_rate", "seed", "status", "auc"),
]
RUN_COLUMNS = ["run", *TUNING_COLUMNS, "final_return"]

RUNS = "tuned_sizes_runs"
JUDGED_CASES = ("papers", "tuned")
BASELINES = ("ppo_clip", "sapo")
JUDGED = {4: 4, 6: 2, 7: 2}
"""Comparisons that are judged in each case, by claim."""

LEVEL = 0.05
"""Adjusted p-value below which a judged comparison counts."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """Size of the study.

    Attributes:
        tasks: environments.
        ages: buffer sizes, in iterations.
        learning_rates: tried for every method, width, task, regime and size.
        tuning_seeds: seeds for that, none of them reported.
        seeds: seeds that are reported.
    """

    tasks: tuple[Task, ...]
    ages: tuple[int, ...]
    learning_rates: tuple[float, ...]
    tuning_seeds: range
    seeds: range


_TASKS = (
    with_steps(training.CARTPOLE, 49_152),
    training.ACROBOT,
    with_steps(training.CATCH, 32_768),
)
_MINATAR = tuple(
    with_steps(task, 262_144) for task in (training.BREAKOUT, training.INVADERS, training.ASTERIX)
)
_RATES = (1e-4, 3e-4, 1e-3, 3e-3)

SCALES = {
    "quick": Scale(
        (with_steps(training.CARTPOLE, 16_384), with_steps(training.CATCH, 16_384)),
        (1, 32),
        (1e-3, 3e-3),
        range(2000, 2001),
        range(3000, 3002),
    ),
    "committed": Scale(_TASKS, (1, 16, 128), _RATES, range(2000, 2005), range(3000, 3010)),
    "full": Scale(
        (*_TASKS, *_MINATAR),
        (1, 4, 16, 64, 128, 256),
        _RATES,
        range(2000, 2010),
        range(3000, 3020),
    ),
}


def units(scale: Scale) -> list[Unit]:
    """All units. A task's two regimes are neighbours, and two equal shares take about as long."""
    both = list(reversed(REGIMES))
    return [
        Unit(regime, task)
        for number, task in enumerate(scale.tasks)
        for regime in (both if number % 2 == 0 else reversed(both))
    ]


def run(store: Store, preset: str, part: tuple[int, int] = (1, 1)) -> None:
    """Tunes, trains with the chosen settings, and stores what is finished after every unit.

    Args:
        part: (i, n): this call takes the i-th of n shares of the units.
    """
    scale = SCALES[preset]
    index, count = part
    for unit in units(scale)[index - 1 :: count]:
        if (unit.regime, unit.task.env) in training.stored_units(store, RUNS, UNIT):
            continue
        training.store_sweeps(store, [tuning_sweep(scale, unit)], "loop")
        reported = reported_sweep(store, scale, unit)
        assert reported is not None, "store_sweeps returns when all runs are through"
        training.store_sweeps(store, [reported], "loop")
        gather(store, scale)


def gather(store: Store, scale: Scale) -> None:
    """Stores the tables of the units whose reported runs are finished."""
    sweeps = []
    for unit in units(scale):
        reported = reported_sweep(store, scale, unit)
        if reported is not None and training.collect(store, [reported]) is not None:
            sweeps.append((tuning_sweep(scale, unit), reported))
    if not sweeps:
        return
    tuned = training.collect(store, [tuning for tuning, _ in sweeps])
    found = training.collect(store, [reported for _, reported in sweeps])
    assert tuned is not None and found is not None, "only finished sweeps are listed"
    runs, curves = found
    returns = curves[["run", "env_steps", "episode_return"]]
    by_regime = {
        curves_table(str(regime)): returns[returns["run"].isin(part["run"])]
        for regime, part in runs.groupby("regime")
    }
    tables = {
        "tuned_sizes_tuning": _with_width(tuned[0])[TUNING_COLUMNS],
        RUNS: _with_width(runs)[RUN_COLUMNS],
    }
    stored = training.write_units(store, UNIT, tables, by_regime)
    store.write("tuned_sizes_units", progress(units(scale), stored[RUNS]))


def curves_table(regime: str) -> str:
    """Name of the table of a regime's learning curves."""
    return f"tuned_sizes_curves_{regime.replace('-', '_')}"


def _with_width(runs: pd.DataFrame) -> pd.DataFrame:
    """Adds ``width``, the one parameter of ``WIDTHS`` that tells a method's settings apart."""
    width = runs["sigma"].fillna(runs["clip_eps"]).fillna(runs["tau_pos"]).fillna(0.0)
    return runs.assign(width=width.round(6))


def tuning_sweep(scale: Scale, unit: Unit) -> Sweep:
    """Every method, width, size and learning rate, on the tuning seeds."""
    methods = [
        Method(objective, parameters)
        for objective in NAMES
        for parameters in WIDTHS[objective].values()
    ]
    settings = _settings(scale, unit, scale.tuning_seeds)
    runs = training.expand(
        methods=methods, ages=scale.ages, learning_rate=list(scale.learning_rates), **settings
    )
    return Sweep(_name("tune", unit), tuple(runs), {"regime": unit.regime})


def reported_sweep(store: Store, scale: Scale, unit: Unit) -> Sweep | None:
    """The runs that are reported; None while tuning is not finished."""
    tuned = training.collect(store, [tuning_sweep(scale, unit)])
    if tuned is None:
        return None
    columns = ["objective", "width", "learning_rate", "age"]
    chosen = choose(_with_width(tuned[0]))[columns].drop_duplicates()
    runs = [
        run
        for objective, width, rate, age in chosen.itertuples(index=False)
        for run in training.expand(
            methods=[Method(objective, WIDTHS[objective][width])],
            ages=[age],
            learning_rate=rate,
            **_settings(scale, unit, scale.seeds),
        )
    ]
    return Sweep(_name("report", unit), tuple(runs), {"regime": unit.regime})


def choose(tuning: pd.DataFrame) -> pd.DataFrame:
    """The setting with the highest mean area under the learning curve, by the rules of each case.

    Args:
        tuning: columns ``TUNING_COLUMNS``, any number of units.

    Returns:
        a row a unit, case, objective and size: regime, env, case, objective, age, width,
        learning_rate. Ties go to the smaller width, then to the smaller rate.
    """
    rows = []
    for (regime, env), unit in tuning.groupby(["regime", "env"], sort=False):
        # A run whose policy never finished an episode counts as the worst.
        unit = unit.assign(auc=unit["auc"].fillna(unit["auc"].min()))
        for objective, own in unit.groupby("objective", sort=False):
            papers = own[np.isclose(own["width"], PAPER[str(objective)])]
            overall = papers.groupby(["width", "learning_rate"])["auc"].mean().idxmax()
            for age, at_size in own.groupby("age"):
                best = {
                    "papers": _best(papers[papers["age"] == age]),
                    "tuned": _best(at_size),
                    "one rate": overall,
                }
                rows += [(regime, env, case, objective, age, *best[case]) for case in CASES]
    names = ["regime", "env", "case", "objective", "age", "width", "learning_rate"]
    return pd.DataFrame(rows, columns=names)


def _best(runs: pd.DataFrame) -> Any:
    return runs.groupby(["width", "learning_rate"])["auc"].mean().idxmax()


def _settings(scale: Scale, unit: Unit, seeds: range) -> dict[str, Any]:
    """What all runs of a unit share, so that they share a compiled program."""
    return {
        "task": unit.task,
        "updates": unit.task.updates[unit.regime],
        "seeds": seeds,
        "program": training.PROGRAMS["compared"],
        "max_buffer_size": max(scale.ages) * unit.task.block,
    }


def _name(what: str, unit: Unit) -> str:
    return f"tuned_{what} {unit.regime} {unit.task.env}".replace(" ", "_")


def load(store: Store) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
    """The reported runs of every case, with a column ``method``, and all learning curves.

    Raises:
        DataError: as in ``Store.read``.
    """
    runs = store.read(RUNS, RUN_COLUMNS)
    chosen = choose(store.read("tuned_sizes_tuning", TUNING_COLUMNS))
    keys = ["regime", "env", "objective", "age", "width", "learning_rate"]
    cases = {}
    for case in CASES:
        own = chosen.loc[chosen["case"] == case, keys].merge(runs, on=keys, validate="1:m")
        own["method"] = own["objective"].map(lambda name, case=case: look(case, name).label)
        cases[case] = own
    present = [regime for regime in REGIMES if (runs["regime"] == regime).any()]
    columns = ["run", "env_steps", "episode_return"]
    curves = pd.concat([store.read(curves_table(regime), columns) for regime in present])
    curves["progress"] = curves.env_steps / curves.groupby("run").env_steps.transform("max")
    return cases, curves


def look(case: str, objective: str) -> plots.Look:
    """How a method is drawn; GIPO's sigma is named where it is the same in all runs."""
    return plots.look(objective, PAPER["gipo"] if objective == "gipo" and case != "tuned" else None)


def draw(store: Store) -> None:
    """Return against replay size in each case, the judged differences, and returns by rate."""
    cases, curves = load(store)
    tuning = store.read("tuned_sizes_tuning", TUNING_COLUMNS)
    planned = store.read("tuned_sizes_units", ["regime", "env", "finished"])
    done = f"{planned.finished.sum()} of {len(planned)} units"
    _draw_returns(store, cases, done)
    _draw_comparisons(store, compare(cases, curves), done)
    _draw_rates(store, tuning, done)
    store.numbers("tuned_sizes_choices", choose(tuning))
    store.numbers("tuned_sizes_units", planned)


def compare(cases: dict[str, pd.DataFrame], curves: pd.DataFrame) -> pd.DataFrame:
    """GIPO minus every other method, in the quantities of claims 4, 6 and 7.

    Returns:
        a row a case, claim, regime, method and size (0: all sizes together): ``difference`` with
        ``low`` and ``high``, ``judged``, and ``p`` and ``p_holm`` for the judged ones.
    """
    rows = [row for case, runs in cases.items() for row in _differences(case, runs, curves)]
    names = ["case", "claim", "regime", "method", "age", "difference", "low", "high", "judged", "p"]
    table = pd.DataFrame(rows, columns=names)
    # Comparisons whose units have not finished count, so that p does not fall back when they do.
    p = table.loc[table["judged"], "p"].to_numpy(float)
    missing = np.ones(max(len(JUDGED_CASES) * sum(JUDGED.values()) - len(p), 0))
    table.loc[table["judged"], "p_holm"] = stats.holm([*p, *missing])[: len(p)]
    return table


def _differences(case: str, runs: pd.DataFrame, curves: pd.DataFrame) -> list[tuple[Any, ...]]:
    """The rows of ``compare`` of one case."""
    rows: list[tuple[Any, ...]] = []
    ours = look(case, "gipo").label
    deciding = {look(case, name).label for name in BASELINES}

    def add(
        claim: int,
        regime: str,
        method: str,
        age: int,
        pair: tuple[np.ndarray, np.ndarray],
        statistic: Callable[..., np.ndarray],
    ) -> None:
        judged = case in JUDGED_CASES and method in deciding and age == 0
        judged &= claim != 6 or regime == "reuse-heavy"
        interval = stats.paired_difference(pair[0], pair[1], statistic)
        p = stats.p_value(pair[0], pair[1], statistic) if judged else np.nan
        rows.append((case, claim, regime, method, age, *interval, judged, p))

    keys = ["run", "regime", "env", "method", "age", "seed"]
    timed = sample_efficiency.times(curves.merge(runs[keys], on="run"), SCALES["full"].tasks)
    times = {name: sample_efficiency.matrix(own, "time") for name, own in timed.groupby("method")}
    others = [look(case, name).label for name in NAMES if name != "gipo"]
    for regime in (r for r in REGIMES if (runs["regime"] == r).any()):
        final = replay_sizes.scores(runs, regime, "final_return")
        fallen = stability.drops(runs, curves, regime)
        for method in others:
            for age in (None, *final.ages):
                pair = final.of(ours, age), final.of(method, age)
                add(4, regime, method, age or 0, pair, stats.iqm)
            add(6, regime, method, 0, (fallen.of(ours), fallen.of(method)), stats.iqm)
    for method in others:
        add(7, "all", method, 0, (times[ours], times[method]), stats.mean)
    return rows


def _draw_returns(store: Store, cases: dict[str, pd.DataFrame], done: str) -> None:
    """Normalised final return against replay size, a row a case, a column a regime."""
    regimes = [r for r in REGIMES if any((runs["regime"] == r).any() for runs in cases.values())]
    figure, axes = plots.panels(len(cases), len(regimes), height=2.1, sharex=True, sharey=True)
    rows = []
    for row, (case, runs) in enumerate(cases.items()):
        for axis, regime in zip(axes[row], regimes, strict=True):
            found = replay_sizes.scores(runs, regime, "final_return")
            shift = np.linspace(0.92, 1.08, len(NAMES))
            for factor, objective in zip(shift, NAMES, strict=True):
                appearance = look(case, objective)
                method = appearance.label
                intervals = [stats.bootstrap(found.of(method, age)) for age in found.ages]
                table = pd.DataFrame(intervals, columns=["mean", "low", "high"])
                plots.points(axis, np.array(found.ages) * factor, table, appearance)
                rows += [
                    (case, regime, age, method, *interval)
                    for age, interval in zip(found.ages, intervals, strict=True)
                ]
            plots.log_sizes(axis, found.ages, "replay size (iterations, log scale)")
            axis.set_title(f"{_CASE_NAMES[case]}: {regime}, tasks: {len(found.tasks)}")
            if row < len(cases) - 1:
                axis.set_xlabel("")
        axes[row, 0].set_ylabel("final return\n(normalised IQM)")
    seeds = next(iter(cases.values())).seed.nunique()
    caption = (
        f"Protocol 2, {done}. 0 is the worst and 1 the best mean of a task over the methods and "
        f"sizes of a case.\nInterquartile mean over tasks and seeds; bars: 95 % stratified "
        f"bootstrap interval over {seeds} seeds."
    )
    handles = plots.legend([look("tuned", name) for name in NAMES])
    plots.finish(figure, caption, handles, columns=4)
    columns = ["case", "regime", "age", "method", "iqm", "low", "high"]
    store.save(figure, "tuned_sizes", pd.DataFrame(rows, columns=columns))


_CASE_NAMES = {
    "papers": "paper's widths",
    "tuned": "tuned widths",
    "one rate": "one rate for all sizes",
}


def _draw_comparisons(store: Store, table: pd.DataFrame, done: str) -> None:
    """The judged differences with their intervals, a panel a claim."""
    judged = table[table["judged"]].copy()
    judged["adjusted"] = judged["p_holm"] < LEVEL
    titles = {
        4: "4: final return (> 0: GIPO better)",
        6: "6: drop from peak (< 0: steadier)",
        7: "7: time to threshold (< 0: faster)",
    }
    figure, axes = plots.panels(1, 3, height=2.4, width=9.5)
    for axis, (claim, title) in zip(axes[0], titles.items(), strict=True):
        part = judged[judged["claim"] == claim].reset_index(drop=True)
        labels = []
        for y, row in enumerate(part.itertuples()):
            objective = next(
                name for name in NAMES if look(str(row.case), name).label == row.method
            )
            appearance = look(str(row.case), objective)
            axis.plot([row.low, row.high], [-y, -y], color=appearance.color, lw=1.5)
            fill = "full" if row.adjusted else "none"
            axis.plot(row.difference, -y, appearance.marker, color=appearance.color, fillstyle=fill)
            where = "" if row.regime == "all" else f", {row.regime}"
            labels.append(f"{row.method}{where}\n({row.case})")
        axis.axvline(0, color="0.5", lw=0.8)
        axis.set_yticks([-y for y in range(len(labels))], labels, fontsize=7)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("GIPO minus the other")
    caption = (
        f"Protocol 2, {done}. Bars: 95 % bootstrap interval of the paired difference, uncorrected. "
        f"Filled: Holm-adjusted p < {LEVEL} over all {len(JUDGED_CASES) * sum(JUDGED.values())}."
    )
    plots.finish(figure, caption)
    store.save(figure, "tuned_sizes_comparison", table)


def _draw_rates(store: Store, tuning: pd.DataFrame, done: str) -> None:
    """Area under the learning curve against the learning rate, a line a replay size."""
    papers = tuning[np.isclose(tuning["width"], tuning["objective"].map(PAPER))].copy()
    papers["auc"] = papers["auc"].fillna(papers.groupby(["regime", "env"])["auc"].transform("min"))
    keys = ["regime", "env", "objective", "age", "learning_rate"]
    means = papers.groupby(keys)["auc"].mean().groupby(["regime", "env"])
    low, span = means.min(), means.max() - means.min()
    unit = pd.MultiIndex.from_frame(papers[["regime", "env"]])
    papers["score"] = (papers["auc"].to_numpy() - low.loc[unit].to_numpy()) / span.loc[
        unit
    ].to_numpy()
    # The mean over tasks within a seed, so that the seed stays the unit.
    keys = ["regime", "objective", "age", "learning_rate"]
    seeds = papers.groupby([*keys, "seed"])["score"].mean().reset_index()
    table = plots.summarize(seeds, keys, "score")
    regimes = [regime for regime in REGIMES if (table["regime"] == regime).any()]
    figure, axes = plots.panels(len(regimes), len(NAMES), height=2.0, sharex=True, sharey=True)
    ages = sorted(table["age"].unique())
    shades = ("#E69F00", "#0072B2", "#5B3A96", "#009E73", "#CC79A7", "#4D4D4D")
    looks = [
        plots.Look(shades[i % 6], "os^Dv*"[i % 6], "-", f"replay of {age}")
        for i, age in enumerate(ages)
    ]
    for row, regime in enumerate(regimes):
        for axis, objective in zip(axes[row], NAMES, strict=True):
            for age, appearance in zip(ages, looks, strict=True):
                line = table[
                    (table.regime == regime) & (table.objective == objective) & (table.age == age)
                ]
                plots.points(axis, line.learning_rate, line, appearance)
            axis.set_xscale("log")
            axis.minorticks_off()
            axis.set_title(f"{look('papers', objective).label}, {regime}", fontsize=8.5)
            if row == len(regimes) - 1:
                axis.set_xlabel("learning rate")
        axes[row, 0].set_ylabel("area under curve\n(normalised)")
    caption = (
        f"Tuning runs of protocol 2, {done}, the paper's widths. 0 is the worst and 1 the best "
        f"mean of a unit.\nBars: 95 % bootstrap interval over {seeds.seed.nunique()} seeds."
    )
    plots.finish(figure, caption, plots.legend(looks), columns=6)
    store.save(figure, "tuned_sizes_rates", table)
