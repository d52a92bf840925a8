"""The numbers of the studies: stored tables of runs in, tables of scores with intervals out.

All scores of one kind share one normaliser, ``normalized``: 0 and 1 are the worst and the best mean
of a task over what is compared. The seed is the unit of every interval.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats

from gipo_jax.analysis import plots, stats

from .engine import KEYS, Arm, Tables, Trained, best_rates
from .store import DataError, Store
from .tasks import (
    CEILINGS,
    GIPO,
    GIPO_02,
    GIPO_05,
    NO_CLIP,
    PPO,
    REGIMES,
    SAPO,
    THRESHOLDS,
    Cell,
    Method,
    Part,
)

OURS = GIPO.label
"""The method that claims are judged by: sigma 1."""


def normalized(
    runs: pd.DataFrame, value: str, unit: Sequence[str], cell: Sequence[str]
) -> pd.DataFrame:
    """Runs with ``score``, 0 and 1 for the worst and best mean of a unit over its cells.

    Args:
        runs: a row a run. One without a finite value counts as its unit's worst.
        value: column that is normalised.
        unit: columns that tell units apart, each with a scale of its own.
        cell: columns that tell apart what is compared within a unit.

    Returns:
        ``runs`` with ``value`` filled, ``score`` (.5 where all means are equal) and ``span``, the
        unit of the score in those of the value.
    """
    units, cells = (pd.MultiIndex.from_frame(runs[list(n)]) for n in (["seed", *unit], cell))
    filled = runs[value].where(np.isfinite(runs[value].to_numpy(float)))
    filled = filled.fillna(filled.groupby([runs[name] for name in unit]).transform("min"))
    table = pd.Series(filled.to_numpy(float), [cells.to_flat_index(), units.to_flat_index()])
    if table.index.has_duplicates:
        raise DataError("runs", "hold a run twice")
    wide = table.unstack()
    if wide.isna().any(axis=None):
        raise DataError("runs", "are not the same for all tasks")
    raw = wide.to_numpy().reshape(len(wide), runs["seed"].nunique(), -1)
    means = raw.mean(axis=1)
    span = means.max(axis=0) - means.min(axis=0)
    rows = wide.index.get_indexer(cells.to_flat_index())
    columns = wide.columns.get_indexer(units.to_flat_index())
    score = stats.normalize(raw).reshape(len(wide), -1)[rows, columns]
    span = np.where(span > 0, span, 1.0)[columns % len(span)]
    return runs.assign(score=score, span=span, **{value: filled})


@dataclasses.dataclass(frozen=True)
class Grid:
    """Scores of all methods and replay sizes on shared seeds and tasks.

    Attributes:
        values: ``[methods, ages, seeds, tasks]``.
        top: 1 for a run that ends at the ceiling of its task, 0 otherwise, NaN without one; the
            same shape.
        methods, ages, tasks: what the axes are.
    """

    values: np.ndarray
    top: np.ndarray
    methods: list[str]
    ages: list[int]
    tasks: list[str]

    def of(self, method: str, age: int | None = None) -> np.ndarray:
        """Scores ``[seeds, tasks]`` of a method at an age; ages averaged within a seed if None."""
        chosen = self.values[self.methods.index(method)]
        return np.asarray(chosen.mean(axis=0) if age is None else chosen[self.ages.index(age)])

    def at_ceiling(self, *methods: str, age: int | None = None) -> np.ndarray:
        """1 where the runs of all these methods end at the ceiling, ``[ages, seeds, tasks]``."""
        chosen = self.top[[self.methods.index(method) for method in methods]].min(axis=0)
        return np.asarray(chosen if age is None else chosen[[self.ages.index(age)]])

    def minus(self, ours: str, method: str, age: int | None = None) -> stats.TrimmedDifference:
        """The first method minus the second, at an age; ages averaged within a seed if None."""
        at_ceiling = self.at_ceiling(ours, method, age=age)
        return stats.trimmed_difference(self.of(ours, age), self.of(method, age), at_ceiling)

    def intervals(self) -> Iterator[tuple[int, str, stats.Interval]]:
        """Age, method and interquartile mean with its interval."""
        for method in self.methods:
            for age in self.ages:
                yield age, method, stats.bootstrap(self.of(method, age))


PAIRED = " ".join(stats.TrimmedDifference._fields)
"""Columns of a paired difference."""


def at_ceiling(runs: pd.DataFrame) -> pd.Series:
    """1 for runs that end at the ceiling of their task, 0 for others, NaN where it has none."""
    ceiling = runs["env"].map(CEILINGS)
    return (runs["final_return"] >= ceiling).astype(float).where(ceiling.notna())


def grid(runs: pd.DataFrame, value: str = "score") -> Grid:
    """The scores of one regime as an array.

    Args:
        runs: with ``top``, as ``at_ceiling`` gives it.
        value: column of the scores.

    Raises:
        DataError: the regime's tasks do not share one grid.
    """
    methods, tasks = runs.method.unique().tolist(), runs.env.unique().tolist()
    ages, seeds = sorted(runs.age.unique().tolist()), sorted(runs.seed.unique().tolist())
    table = runs.set_index(["method", "age", "seed", "env"])[[value, "top"]]
    index = pd.MultiIndex.from_product([methods, ages, seeds, tasks])
    if table.index.has_duplicates or not index.isin(table.index).all():
        raise DataError("runs", f"regime {runs.regime.iloc[0]!r} has no full grid of runs")
    shape = [len(x) for x in (methods, ages, seeds, tasks)]
    values, top = (column.reshape(shape) for column in table.loc[index].to_numpy(float).T)
    return Grid(values, top, methods, ages, tasks)


def scored(runs: pd.DataFrame, regime: str, value: str) -> Grid:
    """The normalised scores of a regime, by method, replay size, seed and task."""
    return grid(_normalized_regime(runs, regime, value))


def _normalized_regime(runs: pd.DataFrame, regime: str, value: str) -> pd.DataFrame:
    part = runs[runs.regime == regime]
    # A run without a final return counts as the worst, and so at no ceiling.
    found = normalized(part, value, ["env"], ["method", "age"])
    return found.assign(top=at_ceiling(part))


def regimes_of(runs: pd.DataFrame) -> list[str]:
    """The regimes of which there are runs, in the order of ``REGIMES``."""
    return [regime for regime in REGIMES if (runs.regime == regime).any()]


def seed_means(frame: pd.DataFrame, by: Sequence[str], value: str) -> pd.DataFrame:
    """Mean over seeds with its interval, tasks being averaged within a seed first."""
    own = frame.groupby([*by, "seed"])[value].mean().reset_index()
    return plots.summarize(own, list(by), value)


# Runs of protocol 1, which several studies share.

RUN_COLUMNS = (
    *("run", "regime", "env", "objective", "sigma", "age", "seed", "status"),
    *("learning_rate", "final_return", "auc"),
)


def _label(objective: str, sigma: float) -> str:
    return plots.look(objective, sigma if objective == "gipo" else None).label


def load(store: Store, curves: bool = False) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Runs of protocol 1 with ``method``; and their curves, with ``progress`` in (0, 1].

    Raises:
        DataError: as in ``Store.read``.
    """
    runs = store.read("replay_sizes_runs", RUN_COLUMNS)
    runs["method"] = [_label(*pair) for pair in zip(runs.objective, runs.sigma, strict=True)]
    if not curves:
        return runs, runs
    return runs, _curves(store, "replay_sizes", runs)


def _curves(store: Store, name: str, runs: pd.DataFrame) -> pd.DataFrame:
    columns = ["run", "env_steps", "episode_return"]
    table = pd.concat(
        store.read(f"{name}_curves_{regime.replace('-', '_')}", columns)
        for regime in runs.regime.unique()
    )
    table["progress"] = table.env_steps / table.groupby("run").env_steps.transform("max")
    keys = [k for k in ("regime", "env", "method", "age", "seed", "final_return") if k in runs]
    return table.merge(runs[["run", *keys]], on="run") if "method" in runs else table


def replay_sizes(store: Store) -> Tables:
    """Scores by replay size, returns by task, and the comparison of GIPO with every method."""
    runs, _ = load(store)
    regimes = regimes_of(runs)
    rows, ratings, comparison = [], [], []
    for regime in regimes:
        for score in ("final_return", "auc"):
            found = scored(runs, regime, score)
            rows += [(regime, score, *row[:2], *row[2]) for row in found.intervals()]
            comparison += [
                (
                    *(regime, score, age or 0, method),
                    *found.minus(OURS, method, age),
                    *stats.improvement_probability(found.of(OURS, age), found.of(method, age)),
                )
                for method in found.methods
                if method != OURS
                for age in (None, *found.ages)
            ]
        found = scored(runs, regime, "final_return")
        methods, ages, seeds, tasks = found.values.shape
        flat = found.values.transpose(0, 2, 1, 3).reshape(methods, seeds, ages * tasks)
        intervals = stats.elo_interval(flat, prior_draws=1.0, resamples=200)
        pairs = zip(found.methods, intervals, strict=True)
        ratings += [(regime, method, *interval) for method, interval in pairs]
    tables = {
        "replay_sizes": _frame(rows, "regime score age method iqm low high"),
        "replay_sizes_comparison": _frame(
            comparison, f"regime score age method {PAIRED} better better_low better_high"
        ),
        "replay_sizes_elo": _frame(ratings, "regime method elo low high"),
    }
    for regime in regimes:
        own = runs[runs.regime == regime]
        tables[f"replay_sizes_{regime.replace('-', '_')}"] = plots.summarize(
            own, ["env", "method", "age"], "final_return"
        )
    return tables


def _frame(rows: Sequence[Sequence[Any]], columns: str) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=columns.split())


def drops(runs: pd.DataFrame, curves: pd.DataFrame, regime: str) -> Grid:
    """Fall from a run's best logged return to its final one, in normalised units."""
    part = _normalized_regime(runs, regime, "final_return")
    peak = part.run.map(curves.groupby("run").episode_return.max())
    # A run without a final score has fallen by nothing that is known.
    known = runs.final_return.reindex(part.index)
    part["drop"] = ((peak - known) / part.span).clip(lower=0).fillna(0)
    return grid(part, "drop")


def spread(scores: np.ndarray, axis: tuple[int, int] = (-2, -1)) -> np.ndarray:
    """Standard deviation over seeds, averaged over tasks, of ``[..., seeds, tasks]``."""
    return np.asarray(scores.std(axis=axis[0]).mean(axis=-1))


def worst(scores: np.ndarray, axis: tuple[int, int] = (-2, -1)) -> np.ndarray:
    """Score of the worst seed, averaged over tasks, of ``[..., seeds, tasks]``."""
    return np.asarray(scores.min(axis=axis[0]).mean(axis=-1))


def stability(store: Store) -> Tables:
    """Drop from the peak, spread and worst seed by replay size; GIPO's drop minus others'."""
    runs, curves = load(store, curves=True)
    rows: list[tuple[Any, ...]] = []
    for regime in regimes_of(runs):
        finals, fallen = scored(runs, regime, "final_return"), drops(runs, curves, regime)
        for name, found, statistic in (
            ("drop", fallen, stats.iqm),
            ("spread", finals, spread),
            ("worst", finals, worst),
        ):
            for method in found.methods:
                for age in found.ages:
                    interval = stats.bootstrap(found.of(method, age), statistic)
                    rows.append((regime, name, age, method, *interval, *[np.nan] * 4))
        for method in fallen.methods:
            # A drop is bad, so below zero GIPO is the more stable one.
            rows.append((regime, "drop_difference", 0, method, *fallen.minus(OURS, method)))
            own = runs[(runs.regime == regime) & (runs.method == method)]
            count = int((own.status == "diverged").sum())
            rows.append((regime, "diverged", 0, method, count, *[np.nan] * 6))
    columns = f"regime quantity age method {PAIRED}"
    return {"stability": _frame(rows, columns).rename(columns={"difference": "value"})}


def times(curves: pd.DataFrame) -> pd.DataFrame:
    """Share of the budget at which each run first logs a return at its task's threshold.

    Args:
        curves: with the keys of their runs and ``progress``.

    Returns:
        a row a run: regime, env, method, age, seed, ``time`` in (0, 1], and ``reached``. A run that
        never gets there is censored: its time is 1.

    Raises:
        DataError: a task without a threshold.
    """
    unknown = set(curves.env) - set(THRESHOLDS)
    if unknown:
        raise DataError("runs", f"no threshold is known for {sorted(unknown)[0]!r}")
    keys = ["regime", "env", "method", "age", "seed"]
    hit = curves.episode_return >= curves.env.map(THRESHOLDS)
    first = curves[hit].groupby(keys).progress.min()
    table = curves[keys].drop_duplicates().set_index(keys).assign(time=first).reset_index()
    table["reached"] = table.time.notna()
    table["time"] = table.time.fillna(1.0)
    return table


def by_seed(table: pd.DataFrame, value: str) -> np.ndarray:
    """A column as ``[seeds, tasks]``, ages averaged within a seed."""
    return table.groupby(["seed", "env"])[value].mean().unstack().to_numpy(float)


def sample_efficiency(store: Store) -> Tables:
    """Restricted mean time, share that got there, and GIPO's paired difference in time.

    ``age`` 0 and regime ``all`` stand for averages.
    """
    _, curves = load(store, curves=True)
    table = times(curves)
    regimes, ages = regimes_of(table), sorted(table.age.unique())
    rows = []
    for regime, age in [(r, a) for r in regimes for a in (0, *ages)] + [("all", 0)]:
        part = table if regime == "all" else table[table.regime == regime]
        part = part[part.age == age] if age else part
        ours = by_seed(part[part.method == OURS], "time")
        for method, own in part.groupby("method", sort=False):
            mine = by_seed(own, "time")
            interval = stats.bootstrap(mine, stats.mean)
            difference = stats.paired_difference(ours, mine, stats.mean)
            rows.append((regime, age, method, *interval, own.reached.mean(), *difference))
    names = "regime age method time time_low time_high reached"
    return {"sample_efficiency": _frame(rows, f"{names} difference difference_low difference_high")}


SHOWN = ("near_zero_fraction_old", "ess_old", "old_share", "log_ratio_abs_p95")
"""What stale samples contribute."""


def utilization(store: Store) -> Tables:
    """Utilization over training at the stalest size, and by age of data in its second half."""
    runs, curves = load(store, curves=True)
    stale = curves[curves.age == curves.age.max()]
    # Logged points of different tasks fall on the same shares of training.
    stale = stale.assign(progress=stale.progress.round(4))
    training, rows = [], []
    for regime in regimes_of(runs):
        part = stale[stale.regime == regime]
        for name in SHOWN:
            table = seed_means(part, ["method", "progress"], name)
            training.append(table.assign(regime=regime, metric=name))
        late = curves[(curves.regime == regime) & (curves.age == curves.age.max())]
        late = late[late.progress > 0.5]
        for method in runs.method.unique():
            for age in ("new", "old"):
                column = f"near_zero_fraction_{age}"
                own = seed_means(late[late.method == method], ["method"], column).iloc[0]
                rows.append((regime, method, column, *own[["mean", "low", "high"]]))
        found = scored(runs, regime, "final_return")
        means = late.groupby(["method", "env"]).near_zero_fraction.mean()
        for index, task in enumerate(found.tasks):
            share = np.array([means[(method, task)] for method in found.methods])
            oldest = int(stale.age.max())
            score = np.array([found.of(m, oldest)[:, index].mean() for m in found.methods])
            varied = np.ptp(share) > 0 and np.ptp(score) > 0
            rank = float(scipy.stats.spearmanr(share, score).statistic) if varied else np.nan
            rows.append((regime, task, "spearman_near_zero_vs_return", rank, np.nan, np.nan))
    return {
        "utilization": pd.concat(training, ignore_index=True),
        "utilization_groups": _frame(rows, "regime of quantity value low high"),
    }


def staleness(store: Store) -> Tables:
    """The numbers of the figures of any sweep."""
    columns = ["run", "env", "objective", "sigma", "buffer_size", "seed", "final_return"]
    runs = store.read("staleness_runs", columns)[columns]
    names = ["run", "env_steps", "episode_return", "ess", "near_zero_fraction", "policy_age"]
    curves = store.read("staleness_curves", names)
    return {f"staleness_{name}": table for name, _, table in plots.sweep_figures(runs, curves)}


# Ablations.


def _ablation(store: Store, table: str, name: str, by: Sequence[str], where: Any = None) -> Tables:
    runs = store.read(f"{table}_runs", [*by, "seed", "final_return"])
    runs = runs if where is None else runs[where(runs)]
    return {name: plots.summarize(runs, list(by), "final_return")}


def sigma(store: Store) -> Tables:
    """Final return by sigma, symmetric width."""
    by = ["env", "age", "sigma"]
    return _ablation(store, "sigma", "sigma", by, lambda runs: runs.sigma_neg_ratio == 1)


def asymmetry(store: Store) -> Tables:
    """Final return by the ratio of the widths, at sigma 1."""
    by = ["env", "age", "sigma_neg_ratio"]
    return _ablation(store, "sigma", "asymmetry", by, lambda runs: runs.sigma == 1)


def kernel(store: Store) -> Tables:
    """Final return by kernel and width."""
    return _ablation(store, "kernel", "kernel", ["env", "kernel", "sigma", "age"])


def token_vs_joint(store: Store) -> Tables:
    """Final return by ratio level and width."""
    return _ablation(store, "token_vs_joint", "token_vs_joint", ["age", "ratio_level", "sigma"])


def objective_family(store: Store) -> Tables:
    """Effective weights at whole log-ratios, and scores of every objective, fresh and stale."""
    weights = store.read("objective_family_weights", ["objective", "kind", "log_ratio", "u"])
    whole = np.isclose(weights.log_ratio % 1, 0) | np.isclose(weights.log_ratio % 1, 1)
    runs = store.read("objective_family", ["env", "objective", "age", "seed", "final_return"])
    runs = normalized(runs, "final_return", ["env"], ["objective", "age"])
    rows = []
    for (name, age), own in runs.groupby(["objective", "age"]):
        score = own.pivot(index="seed", columns="env", values="score").to_numpy()
        rows.append((name, age, *stats.bootstrap(score), len(score)))
    return {
        "objective_family_weights": weights[whole],
        "objective_family": _frame(rows, "objective age iqm low high seeds"),
    }


# Protocol 2: rates, and widths, tuned at every replay size.

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

JUDGED_CASES = ("papers", "tuned")
JUDGED = {4: 4, 6: 2, 7: 2}
"""Comparisons that are judged in each case, by claim."""

LEVEL = 0.05
"""Adjusted p-value below which a judged comparison counts."""


def with_width(found: Trained) -> pd.DataFrame:
    """Adds ``width``, the one parameter of ``WIDTHS`` that tells a method's settings apart."""
    return _with_width(found.runs)


def _with_width(runs: pd.DataFrame) -> pd.DataFrame:
    width = runs["sigma"].fillna(runs["clip_eps"]).fillna(runs["tau_pos"]).fillna(0.0)
    return runs.assign(width=width.round(6))


def choose(tuning: pd.DataFrame) -> pd.DataFrame:
    """The setting with the highest mean area under the learning curve, by the rules of each case.

    Args:
        tuning: runs that tuned, of any number of units, with ``width``.

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
            for age, at_size in own.groupby("age"):
                best = {
                    "papers": _best(papers[papers["age"] == age]),
                    "tuned": _best(at_size),
                    "one rate": _best(papers),
                }
                rows += [(regime, env, case, objective, age, *best[case]) for case in CASES]
    return _frame(rows, "regime env case objective age width learning_rate")


def _best(runs: pd.DataFrame) -> Any:
    return runs.groupby(["width", "learning_rate"])["auc"].mean().idxmax()


def chosen_arms(tuned: pd.DataFrame, part: Part) -> list[Arm]:
    """What protocol 2 reports of a unit."""
    columns = ["objective", "width", "learning_rate", "age"]
    chosen = choose(_with_width(tuned))[columns].drop_duplicates()
    return [
        Arm(Method(objective, WIDTHS[objective][width]), Cell(age), (rate,))
        for objective, width, rate, age in chosen.itertuples(index=False)
    ]


def case_label(case: str, objective: str) -> str:
    """Name of a method; GIPO's sigma is named where it is the same in all runs."""
    return _label(objective, PAPER["gipo"] if case != "tuned" else np.nan)


def load_cases(store: Store) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
    """The reported runs of every case, with a column ``method``, and all learning curves.

    Raises:
        DataError: as in ``Store.read``.
    """
    runs = store.read("tuned_sizes_runs", ["run", "objective", "width", "age", "final_return"])
    chosen = choose(store.read("tuned_sizes_tuning", ["objective", "width", "age", "auc"]))
    keys = ["regime", "env", "objective", "age", "width", "learning_rate"]
    cases = {}
    for case in CASES:
        own = chosen.loc[chosen["case"] == case, keys].merge(runs, on=keys, validate="1:m")
        cases[case] = own.assign(method=[case_label(case, name) for name in own.objective])
    return cases, _curves(store, "tuned_sizes", runs)


def tuned_sizes(store: Store) -> Tables:
    """Scores by replay size in each case, judged differences, choices, and areas by rate."""
    cases, curves = load_cases(store)
    tuning = store.read("tuned_sizes_tuning", ["objective", "width", "age", "auc"])
    rows = [
        (case, regime, *row[:2], *row[2])
        for case, runs in cases.items()
        for regime in regimes_of(runs)
        for row in scored(runs, regime, "final_return").intervals()
    ]
    differences = [row for case, runs in cases.items() for row in _differences(case, runs, curves)]
    papers = tuning[np.isclose(tuning["width"], tuning["objective"].map(PAPER))]
    papers = normalized(papers, "auc", ["regime", "env"], ["objective", "age", "learning_rate"])
    return {
        "tuned_sizes": _frame(rows, "case regime age method iqm low high"),
        "tuned_sizes_comparison": corrected(differences),
        "tuned_sizes_rates": seed_means(
            papers, ["regime", "objective", "age", "learning_rate"], "score"
        ),
        "tuned_sizes_choices": choose(tuning),
        "tuned_sizes_units": store.read("tuned_sizes_units", ["regime", "env", "finished"]),
    }


def corrected(differences: list[tuple[Any, ...]]) -> pd.DataFrame:
    """Differences with ``p_holm``, p adjusted over the judged ones."""
    table = _frame(differences, f"case claim regime method age {PAIRED} judged p")
    # Comparisons whose units have not finished count, so that p does not fall back when they do.
    p = table.loc[table["judged"], "p"].to_numpy(float)
    missing = np.ones(max(len(JUDGED_CASES) * sum(JUDGED.values()) - len(p), 0))
    table.loc[table["judged"], "p_holm"] = stats.holm([*p, *missing])[: len(p)]
    return table


def _differences(case: str, runs: pd.DataFrame, curves: pd.DataFrame) -> list[tuple[Any, ...]]:
    """GIPO minus every other method in the quantities of claims 4, 6 and 7; size 0: all sizes."""
    rows: list[tuple[Any, ...]] = []
    ours = case_label(case, "gipo")
    others = [case_label(case, name) for name in WIDTHS if name != "gipo"]

    def add(
        claim: int, regime: str, method: str, age: int, found: Any, pair: Any, statistic: Any
    ) -> None:
        judged = case in JUDGED_CASES and method in (PPO.label, SAPO.label) and age == 0
        judged &= claim != 6 or regime == "reuse-heavy"
        p = stats.p_value(pair[0], pair[1], statistic) if judged else np.nan
        rows.append((case, claim, regime, method, age, *found, judged, p))

    keys = ["run", "regime", "env", "method", "age", "seed"]
    timed = times(curves.merge(runs[keys], on="run"))
    spent = {name: by_seed(own, "time") for name, own in timed.groupby("method")}
    for regime in regimes_of(runs):
        final, fallen = scored(runs, regime, "final_return"), drops(runs, curves, regime)
        for method in others:
            for age in (None, *final.ages):
                pair = final.of(ours, age), final.of(method, age)
                found = final.minus(ours, method, age)
                add(4, regime, method, age or 0, found, pair, stats.iqm)
            pair = fallen.of(ours), fallen.of(method)
            add(6, regime, method, 0, fallen.minus(ours, method), pair, stats.iqm)
    for method in others:
        pair = spent[ours], spent[method]
        mean = stats.paired_difference(*pair, stats.mean)
        add(7, "all", method, 0, (*mean, *mean, np.nan), pair, stats.mean)
    return rows


# Age of the data apart from the amount of it.

LATE = ("policy_age", "near_zero_fraction", "ess", "log_ratio_abs_p95")
"""Metrics of which a run keeps the mean over the second half of training."""


def with_late_means(found: Trained) -> pd.DataFrame:
    """Runs with the means of ``LATE``."""
    metrics = found.metrics
    halfway = metrics.groupby("run")["env_steps"].transform("max") / 2
    late = metrics[metrics["env_steps"] > halfway].groupby("run")[list(LATE)].mean()
    return found.runs.merge(late, on="run")


def age_and_size(store: Store) -> Tables:
    """Scores in every cell, and the effects of older data and of a wider window."""
    columns = [*KEYS, "seed", "final_return", *LATE]
    runs = store.read("age_and_size_runs", columns)
    planned = store.read("age_and_size_units", ["regime", "env", "finished"])
    runs["width"] = runs["age"] - runs["min_age"]
    runs = normalized(runs, "final_return", ["env"], ["method", "age", "min_age"])
    cells = ["method", "width", "min_age"]
    used = ["policy_age", "near_zero_fraction", "ess", "score"]
    return {
        "age_and_size": seed_means(runs, cells, "score"),
        "age_and_size_effects": slopes(runs),
        "age_and_size_utilization": runs.groupby(cells, sort=False)[used].mean().reset_index(),
        "age_and_size_units": planned,
    }


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
                by_seed(own[own[column] == end], "score")
                for end in (own[column].max(), own[column].min())
            )
            rows.append((method, effect, *stats.paired_difference(last, first, stats.mean)))
    return _frame(rows, "method effect difference low high")


# The project's own objective.

PROPOSAL = "following GIPO"
CONTENDERS = (
    Method("following_gipo", {"mean_weight": 0.7, "sigma_prox": 0.5}, PROPOSAL),
    *(GIPO_02, GIPO_05, GIPO, PPO),
    Method("geppo", {"clip_eps": 0.2}, "GePPO"),
    Method("decoupled_ppo", {"clip_eps": 0.2}, "decoupled PPO"),
    Method("maspo", {"sigma": 1.0}, "MASPO"),
    Method("p3o_ess", {}, "P3O-ESS"),
    Method("m2po", {}, "M2PO"),
    *(SAPO, NO_CLIP),
)
DROPPED = ("FourRooms-misc",)
"""Dropped by the plan's rule: no tuning curve ended above its first logged point.

There that point is 1, as only episodes that reach the goal have ended by then.
"""


def crossed_scores(runs: pd.DataFrame) -> pd.DataFrame:
    """Areas at the rate that is best on the other half of the seeds, normalised per task.

    Returns:
        rows of ``KEYS``, seed and ``score``.
    """
    seeds = sorted(runs["seed"].unique())
    first = runs["seed"].isin(seeds[: len(seeds) // 2])
    keys = [*KEYS, "learning_rate"]
    halves = [
        runs[on].merge(best_rates(runs[chosen])[keys], on=keys)
        for chosen, on in ((first, ~first), (~first, first))
    ]
    found = normalized(pd.concat(halves), "auc", ["env"], ["method", "age", "min_age"])
    return found[[*KEYS, "seed", "score"]]


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


def proposal_development(store: Store) -> Tables:
    """Area of every variant, over all sizes (0) and at each, and their order by the plan's rule."""
    scores = crossed_scores(store.read("proposal_development", [*KEYS, "learning_rate", "auc"]))
    tables = [
        seed_means(
            scores if age == 0 else scores[scores["age"] == age], ["method"], "score"
        ).assign(age=age)
        for age in (0, *sorted(scores["age"].unique()))
    ]
    return {
        "proposal_development": pd.concat(tables, ignore_index=True),
        "proposal_development_rank": rank(scores),
    }


def proposal(store: Store) -> Tables:
    """The proposal against every method: over all units and in each."""
    stored = store.read("proposal_runs", [*KEYS, "seed", "auc", "final_return"])
    planned = store.read("proposal_units", ["regime", "env", "finished"])
    runs = stored[~stored.env.isin(DROPPED)]
    if runs.empty:
        raise DataError("proposal_runs", "no unit that counts has finished; continue the same run")
    return {
        "proposal": compare_proposal(runs),
        "proposal_units": planned,
        "proposal_by_unit": proposal_by_unit(runs),
        "proposal_without_dropping": compare_proposal(stored),
    }


def compare_proposal(runs: pd.DataFrame) -> pd.DataFrame:
    """The proposal minus every other method in normalised area, by size and over all.

    Returns:
        a row a size (0: all together) and method: the columns of ``PAIRED`` over units and seeds;
        ``best``, whether the method has the highest mean of the others at that size; and for all
        sizes together ``p`` and, over the methods, ``p_holm``.
    """
    found = [scored(runs, regime, "auc") for regime in regimes_of(runs)]
    rows = []
    for age in (None, *found[0].ages):
        # Units of both regimes side by side: each is a stratum of its own.
        values = {
            method: np.concatenate([one.of(method, age) for one in found], axis=1)
            for method in found[0].methods
        }
        ours = values.pop(PROPOSAL)
        best = max(values, key=lambda method: float(values[method].mean()))
        for method, theirs in values.items():
            tops = [one.at_ceiling(PROPOSAL, method, age=age) for one in found]
            difference = stats.trimmed_difference(ours, theirs, np.concatenate(tops, axis=-1))
            p = stats.p_value(ours, theirs) if age is None else np.nan
            rows.append((age or 0, method, *difference, method == best, p))
    table = _frame(rows, f"age method {PAIRED} best p")
    overall = table["age"] == 0
    table.loc[overall, "p_holm"] = stats.holm(table.loc[overall, "p"])
    return table


def proposal_by_unit(runs: pd.DataFrame) -> pd.DataFrame:
    """The proposal minus the best other method of each unit and size, in normalised area.

    Returns:
        a row a regime, task and size: the ``best`` other method by its mean over seeds, and the
        columns of ``PAIRED`` over seeds.
    """
    rows = []
    for regime in regimes_of(runs):
        found = scored(runs, regime, "auc")
        for column, task in enumerate(found.tasks):
            for age in found.ages:
                values = {method: found.of(method, age)[:, column] for method in found.methods}
                ours = values.pop(PROPOSAL)
                best = max(values, key=lambda method: float(values[method].mean()))
                tops = found.at_ceiling(PROPOSAL, best, age=age)[..., column]
                difference = stats.trimmed_difference(ours, values[best], tops)
                rows.append((regime, task, age, best, *difference))
    return _frame(rows, f"regime env age best {PAIRED}")
