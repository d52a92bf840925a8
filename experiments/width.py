"""The decisive study: does the shape of GIPO's weight help, or only its width?

Meta-World under the authors' settings, GIPO (sigma 1) against PPO-Clip, a clip as wide as GIPO's
weight, and plain importance sampling. PLAN.md has the steps and the rules.
"""

import contextlib
import dataclasses
import functools
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.stats

from gipo_jax import protocols
from gipo_jax.analysis import plots, stats

from . import metaworld, scores
from .engine import Study, Sweep, Tables, Trained
from .store import NotRunError, Store
from .tasks import GIPO, GIPO_02, NO_CLIP, PPO, Method

PROTOCOL = protocols.settings("gipo-metaworld")

REGIMES: dict[str, dict[str, Any]] = {
    "stale": {},
    "fresh": {"num_envs": 8},
    "two-episode": {"buffer_size": 1_000},
}
"""What replay holds: 40 iterations; 5 of eight times the data; 2."""

WIDE_PPO = Method("gspo", {"eps_low": 1 - np.exp(-1.0), "eps_high": np.exp(1.0) - 1}, "wide PPO")
"""PPO-Clip where abs(log r) > 1: at the ratio level ``token`` the surrogate is PPO's."""

P3O_ESS = Method("p3o_ess", {}, "P3O-ESS")

RIVALS = {PPO.label: "claim", WIDE_PPO.label: "shape", NO_CLIP.label: "shape"}
"""What GIPO (sigma 1) is judged against, and the question that the comparison answers."""

LEVEL = 0.05
LEAST_SEEDS, LEAST_TASKS = 3, 2
"""With fewer the verdicts are open."""

LEARNT, CEILING = 0.2, 0.8
"""Late success that makes a task usable, and early success from which it is too easy."""

BUTTON = "ButtonPressTopdown"
FALLBACK = ("ButtonPress", "CoffeeButton")
"""Tasks in place of usable ones that are lacking."""

TASKS = (BUTTON, "HandlePress", "Reach")
"""Tasks of the steps after ``width_tasks``, by its rule from the tasks that it has finished."""

RATES: dict[str, float] = {}
"""Rate of a method that ``width_rates`` chose; the others have the authors'."""


class Variant(NamedTuple):
    """A method with settings of its own."""

    method: Method
    settings: Mapping[str, Any] = types.MappingProxyType({})
    name: str = ""

    @property
    def label(self) -> str:
        return self.name or self.method.label


def _tuned(*methods: Method) -> tuple[Variant, ...]:
    """Methods at the rates that were chosen for them."""
    return tuple(
        Variant(m, {"learning_rate": RATES[m.label]} if m.label in RATES else {}) for m in methods
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """Size of a step.

    Attributes:
        variants: what is compared, on shared seeds.
        tasks: EnvPool's names without ``MetaWorld/`` and ``-v3``.
        seeds: of every variant and task.
        iterations: of 500 steps of each environment.
        regime: of ``REGIMES``.
        rates: learning rates that every variant is tried at; none leaves its own.
    """

    variants: tuple[Variant, ...]
    tasks: tuple[str, ...]
    seeds: range
    iterations: int
    regime: str = "stale"
    rates: tuple[float, ...] = ()


def sweeps(name: str, scale: Scale) -> list[Sweep]:
    """All variants of a task, seed and rate are one sweep, so that what is done can be paired."""
    found = []
    for seed in scale.seeds:
        for rate in scale.rates or (None,):
            for task in scale.tasks:
                tried = {} if rate is None else {"learning_rate": rate}
                shared = PROTOCOL | REGIMES[scale.regime] | tried
                made = [
                    (one.label, run)
                    for one in scale.variants
                    for settings in [shared | dict(one.settings)]
                    for run in metaworld.runs_of(task, one.method, scale.iterations, seed, settings)
                ]
                labels, runs = zip(*made, strict=True)
                keys = {"regime": scale.regime, "env": runs[0].config.env, "seed": seed}
                folder = f"{name}_{task}_{seed}" + (f"_{rate:g}" if tried else "")
                found.append(Sweep(folder, runs, keys | tried | {"method": list(labels)}))
    return found


MEASURED = ("log_ratio_abs_p95", "near_zero_fraction", "ess")
"""Metrics of which a run keeps the mean over training."""

COLUMNS = (
    *("run", "regime", "env", "method", "seed", "status", "learning_rate", "success"),
    *("early_success", "late_success", "auc", "final_return", "late_log_ratio_abs_p95", *MEASURED),
)


def with_success(found: Trained) -> pd.DataFrame:
    """Runs with success rates over all of training, its first and its last tenth, and ``MEASURED``.

    What a diverged run has not logged counts as 0.
    """
    metrics = found.metrics
    logged = metrics.pivot(index="env_steps", columns="run", values="success_rate").fillna(0.0)
    runs, end = found.runs.set_index("run"), logged.index.max()
    first = max(0.1 * end + 1, logged.index.min())
    late = metrics[metrics.env_steps > end / 2].groupby("run")[MEASURED[0]].mean()
    return runs.assign(
        success=logged.mean(),
        early_success=logged[logged.index <= first].mean(),
        late_success=logged[logged.index > 0.9 * end].mean(),
        **{f"late_{MEASURED[0]}": late},
        **metrics.groupby("run")[list(MEASURED)].mean(),
    ).reset_index()


def load(store: Store, name: str) -> pd.DataFrame:
    """Stored runs of a step with ``task``.

    Raises:
        DataError: as in ``Store.read``.
    """
    runs = store.read(f"{name}_runs", COLUMNS)
    runs["task"] = runs.env.str.removeprefix("MetaWorld/").str.removesuffix("-v3")
    return runs


def paired(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of the seeds that every task has finished."""
    return runs[runs.groupby("seed").task.transform("nunique") == runs.task.nunique()]


def by_seed(runs: pd.DataFrame, method: str, value: str = "success") -> pd.DataFrame:
    """A method's scores, seeds x tasks."""
    return runs[runs.method == method].pivot(index="seed", columns="task", values=value)


class Estimate(NamedTuple):
    """A mean over tasks with its 95 % t-interval over seeds, and p of no difference from 0."""

    mean: float
    low: float
    high: float
    p: float


def estimate(values: pd.DataFrame) -> Estimate:
    """Mean of ``[seeds, tasks]`` over seeds within tasks; the tasks are given, not drawn.

    The variance is the sum over tasks of that of a task's mean, over tasks squared; degrees of
    freedom are Satterthwaite's. With one seed there is no interval.
    """
    count, tasks = values.shape
    mean = float(values.to_numpy().mean())
    if count < 2:
        return Estimate(mean, np.nan, np.nan, np.nan)
    parts = values.var(ddof=1).to_numpy() / count
    total = parts.sum()
    if total == 0:
        return Estimate(mean, mean, mean, float(mean == 0))
    error = np.sqrt(total) / tasks
    freedom = total**2 / (parts**2 / (count - 1)).sum()
    half = scipy.stats.t.ppf(0.975, freedom) * error
    p = 2 * scipy.stats.t.sf(abs(mean) / error, freedom)
    return Estimate(mean, mean - half, mean + half, float(p))


def summarize(runs: pd.DataFrame) -> pd.DataFrame:
    """Area of success of every method with its interval, and what else a run measured, by mean."""
    others = ["late_success", "auc", "final_return", f"late_{MEASURED[0]}", *MEASURED]
    rows = []
    for method, own in runs.groupby("method", sort=False):
        values = by_seed(runs, str(method))
        rows.append((method, *estimate(values)[:3], *own[others].mean(), *values.shape))
    names = ["method", "success", "low", "high", *others, "seeds", "tasks"]
    return pd.DataFrame(rows, columns=names)


def compare(runs: pd.DataFrame) -> pd.DataFrame:
    """GIPO (sigma 1) minus every rival, and wide PPO minus PPO-Clip.

    Returns:
        a row a pair and task left out ("" for none): ``ours``, ``method``, ``question`` ("" where
        nothing is judged), ``without``, ``difference`` of the area of success with ``low`` and
        ``high``, ``p``, ``p_holm`` over the rivals, seeds, tasks.
    """
    methods, tasks = set(runs.method), sorted(runs.task.unique())
    pairs = [(GIPO.label, m) for m in runs.method.unique() if m != GIPO.label]
    pairs = [*pairs, (WIDE_PPO.label, PPO.label)]
    rows = []
    for ours, method in [(a, b) for a, b in pairs if a in methods]:
        values = by_seed(runs, ours) - by_seed(runs, method)
        judged = ours == GIPO.label and method in RIVALS
        for without in ["", *(tasks if len(tasks) > 1 else [])]:
            part = values.drop(columns=without) if without else values
            question = RIVALS[method] if judged else ""
            rows.append((ours, method, question, without, *estimate(part), *part.shape))
    names = ["ours", "method", "question", "without", "difference", "low", "high", "p"]
    table = pd.DataFrame(rows, columns=[*names, "seeds", "tasks"])
    for _, part in table[table.question != ""].groupby("without"):
        # A rival that has not run counts, so that p does not grow when it has.
        p = [*part.p.fillna(1.0), *np.ones(len(RIVALS) - len(part))]
        table.loc[part.index, "p_holm"] = stats.holm(p)[: len(part)]
    return table


OPEN = "open"


def verdicts(compared: pd.DataFrame) -> pd.DataFrame:
    """The plan's verdicts, on all tasks and without each.

    Args:
        compared: as ``compare`` gives it.

    Returns:
        a row a ``without``: ``claim`` (holds, contradicted, open), ``shape`` (helps, harms, not
        shown, open), ``reading``.
    """
    rows = []
    for without, part in compared[compared.question != ""].groupby("without", sort=False):
        left = np.where(part.p_holm < LEVEL, np.sign(part.difference), 0)
        sign = dict(zip(part.method, left.astype(int), strict=True))
        enough = part.seeds.min() >= LEAST_SEEDS and part.tasks.min() >= LEAST_TASKS
        if not enough or set(sign) != set(RIVALS):
            rows.append((without, OPEN, OPEN, OPEN))
            continue
        claim = {1: "holds", -1: "contradicted", 0: OPEN}[sign[PPO.label]]
        wide, plain = sign[WIDE_PPO.label], sign[NO_CLIP.label]
        shape = "helps" if wide > 0 and plain > 0 else "harms" if wide < 0 else "not shown"
        if claim != "holds":
            reading = "no gain over PPO-Clip to explain"
        else:
            reading = "the shape helps" if shape == "helps" else "the gain is the width"
        rows.append((without, claim, shape, reading))
    return pd.DataFrame(rows, columns=["without", "claim", "shape", "reading"])


def curves(name: str, store: Store) -> pd.DataFrame:
    """Success rate over training, mean over seeds, by task and method.

    Raises:
        DataError: as in ``Store.read``.
    """
    logged = store.read(f"{name}_curves", ["run", "env_steps", "success_rate"])
    logged = logged.merge(load(store, name)[["run", "task", "method"]], on="run")
    return plots.summarize(logged, ["task", "method", "env_steps"], "success_rate")


def judged(name: str, store: Store) -> Tables:
    """Means, comparisons, verdicts and curves of a step."""
    runs = paired(load(store, name))
    compared = compare(runs)
    return {
        name: curves(name, store),
        f"{name}_scores": summarize(runs),
        f"{name}_comparison": compared,
        f"{name}_verdicts": verdicts(compared),
    }


def _stale(store: Store) -> Tables:
    return judged("width", store)


def _fresh(store: Store) -> Tables:
    """As on stale data; and what staleness adds to GIPO's lead, on the seeds of both."""
    tables = judged("width_fresh", store)
    try:
        stale = paired(load(store.of("width"), "width"))
    except NotRunError:
        return tables
    fresh = paired(load(store, "width_fresh"))
    rows = []
    for method in (PPO.label, NO_CLIP.label):
        leads = [by_seed(runs, GIPO.label) - by_seed(runs, method) for runs in (stale, fresh)]
        values = (leads[0] - leads[1]).dropna(how="all").dropna(axis="columns")
        rows.append((method, *estimate(values), *values.shape))
    names = ["method", "difference", "low", "high", "p", "seeds", "tasks"]
    return tables | {"width_fresh_interaction": pd.DataFrame(rows, columns=names)}


def _described(name: str, store: Store) -> Tables:
    """Means, and every variant minus the first."""
    runs = paired(load(store, name))
    first, *others = runs.method.unique()
    rows = [
        (first, method, *estimate(by_seed(runs, method) - by_seed(runs, first)))
        for method in others
    ]
    names = ["first", "method", "difference", "low", "high", "p"]
    return {
        f"{name}_scores": summarize(runs),
        f"{name}_differences": pd.DataFrame(rows, columns=names),
    }


def choose_tasks(runs: pd.DataFrame) -> pd.DataFrame:
    """Success of the pilot's tasks, and which of them the next steps take.

    Returns:
        a row a task and method: early, late and mean success, return; ``usable`` by the plan's
        rule, ``room`` (distance of the area, mean of the methods, from 0.5), ``chosen``.
    """
    columns = ["task", "method", "early_success", "late_success", "success", "final_return"]
    by_task = runs.groupby("task", sort=False)
    highest: Any = by_task[["early_success", "late_success"]].max()
    usable = (highest.late_success > LEARNT) & (highest.early_success <= CEILING)
    room: Any = (by_task.success.mean() - 0.5).abs()
    chosen = room[usable].sort_values(kind="stable").index[:2]
    return runs[columns].assign(
        usable=runs.task.map(usable), room=runs.task.map(room), chosen=runs.task.isin(chosen)
    )


def _tasks(store: Store) -> Tables:
    return {
        "width_tasks": curves("width_tasks", store),
        "width_tasks_choice": choose_tasks(load(store, "width_tasks")),
    }


def choose_rates(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean area of success by method and rate.

    Returns:
        method, learning_rate, ``success``, ``chosen`` (the best, ties to the smaller rate),
        ``edge`` (chosen, and the largest or smallest rate tried).
    """
    by = ["method", "learning_rate"]
    table = runs.groupby(by, sort=False).success.mean().reset_index().sort_values(by)
    best = table.groupby("method").success.idxmax()
    rates = table.groupby("method").learning_rate
    edge = table.learning_rate.isin([*rates.min(), *rates.max()])
    chosen = table.index.isin(best)
    return table.assign(chosen=chosen, edge=edge & chosen)


def _rates(store: Store) -> Tables:
    runs = load(store, "width_rates")
    # A rate counts with the tasks and seeds that all rates of the method have.
    pairs = runs.groupby(["task", "seed"]).run.transform("size")
    return {"width_rates": choose_rates(runs[pairs == pairs.max()])}


# The same question on gymnax, where both families of widths are tuned at every replay size.

AUTHORS: dict[str, Any] = {
    **{key: PROTOCOL[key] for key in ("kl", "kl_coef", "joint_grad_norm", "max_grad_norm")},
    "adam_epsilon": PROTOCOL["adam_epsilon"],
    "eval_episodes": 32,
}
"""What a study on gymnax takes of the protocol, and fresh episodes at each logged point."""

CLIPS = {
    eps: Method("ppo_clip", {"clip_eps": eps}, f"PPO-Clip ε={eps:g}")
    for eps in (0.1, 0.2, 0.4, 0.8, 1.6)
}
SIGMAS = {sigma: Method("gipo", {"sigma": sigma}) for sigma in (0.2, 0.5, 1.0, 2.0, 4.0)}
FAMILIES = (*SIGMAS.values(), *CLIPS.values(), NO_CLIP)

RULE = {4: 0.1, 16: 0.2, 64: 0.4, 128: 0.4, 256: 0.4}
"""A clip for each replay size, chosen before any run."""

BEST_GIPO, BEST_PPO, BY_RULE = "best GIPO", "best PPO-Clip", "PPO-Clip by the rule"
PAIRS = (
    (GIPO.label, CLIPS[0.2].label),
    (BEST_GIPO, BEST_PPO),
    (GIPO.label, NO_CLIP.label),
)
"""What is judged in each regime."""

DESCRIBED = ((BY_RULE, GIPO.label), (BY_RULE, BEST_GIPO), (BY_RULE, NO_CLIP.label))
"""The rule against each, without a verdict."""


def best_widths(tuned: pd.DataFrame) -> pd.DataFrame:
    """The width of each family with the highest tuning area in a cell.

    Returns:
        regime, env, age, ``family`` (``BEST_GIPO``, ``BEST_PPO``) and method.
    """
    cell = ["regime", "env", "age"]
    worst = tuned.groupby(["regime", "env"]).auc.transform("min")
    by = [*cell, "method", "learning_rate"]
    areas = tuned.assign(auc=tuned.auc.fillna(worst)).groupby(by, sort=False).auc.mean()
    highest: Any = areas.groupby([*cell, "method"], sort=False).max().reset_index()
    found = []
    for family, members in ((BEST_GIPO, SIGMAS), (BEST_PPO, CLIPS)):
        own = highest[highest.method.isin([m.label for m in members.values()])]
        best = own.loc[own.groupby(cell, sort=False).auc.idxmax()]
        found.append(best[[*cell, "method"]].assign(family=family))
    return pd.concat(found, ignore_index=True)


def with_choices(runs: pd.DataFrame, best: pd.DataFrame) -> pd.DataFrame:
    """Runs, and again those that a choice of width names, with its name as their method."""
    cell = ["regime", "env", "age", "method"]
    chosen = runs.merge(best, on=cell).drop(columns="method").rename(columns={"family": "method"})
    clips = {age: CLIPS[eps].label for age, eps in RULE.items()}
    by_rule = runs[runs.method == runs.age.map(clips)]
    return pd.concat([runs, chosen, by_rule.assign(method=BY_RULE)], ignore_index=True)


def compare_sizes(scored: pd.DataFrame) -> pd.DataFrame:
    """Differences of a regime's scores over all replay sizes, those of ``PAIRS`` with Holm's p."""
    means: Any = scored.groupby(["method", "env", "seed"]).score.mean().unstack("env")
    has = set(scored.method)
    rows = [
        (*pair, pair in PAIRS, *estimate(values), *values.shape)
        for pair in (*PAIRS, *DESCRIBED)
        if has.issuperset(pair)
        for values in [means.loc[pair[0]] - means.loc[pair[1]]]
    ]
    names = ["ours", "method", "judged", "difference", "low", "high", "p", "seeds", "tasks"]
    table = pd.DataFrame(rows, columns=names)
    p = table.p[table.judged]
    table.loc[table.judged, "p_holm"] = stats.holm([*p, *np.ones(len(PAIRS) - len(p))])[: len(p)]
    return table


def sizes(store: Store) -> Tables:
    """Scores by replay size, judged differences, best widths, and policy lag beside the score."""
    names = ["regime", "env", "method", "age", "seed", "auc", *scores.LATE]
    runs = store.read("width_sizes_runs", names)
    tables = {"width_sizes_units": store.read("width_sizes_units", ["regime", "env", "finished"])}
    best = runs.head(0)[["regime", "env", "age", "method"]].assign(family="")
    with contextlib.suppress(NotRunError):
        best = best_widths(store.read("width_sizes_tuning", names[:6]))
        tables["width_sizes_best"] = best
    means, compared, lags = [], [], []
    for regime in scores.regimes_of(runs):
        scored = scores.normalized(runs[runs.regime == regime], "auc", ["env"], ["method", "age"])
        everything = with_choices(scored, best)
        for age in (0, *sorted(runs.age.unique())):
            part = everything[everything.age == age] if age else everything
            by_method: Any = part.groupby(["method", "env", "seed"]).score.mean().unstack("env")
            means += [
                (regime, age, method, *estimate(by_method.loc[method])[:3])
                for method in part.method.unique()
            ]
        compared.append(compare_sizes(everything).assign(regime=regime))
        lag = scored.assign(lag_by_age=scored.log_ratio_abs_p95 / scored.policy_age)
        by = ["regime", "env", "method", "age"]
        lags.append(lag.groupby(by, sort=False)[["lag_by_age", "score"]].mean().reset_index())
    return tables | {
        "width_sizes": pd.DataFrame(
            means, columns=["regime", "age", "method", "score", "low", "high"]
        ),
        "width_sizes_comparison": pd.concat(compared, ignore_index=True),
        "width_sizes_lag": pd.concat(lags, ignore_index=True),
    }


# The rows of the table.

_HALF = {"param_dtype": "bfloat16", "compute_dtype": "bfloat16"}
_FIVE = (GIPO, PPO, WIDE_PPO, NO_CLIP, P3O_ESS)
_BUFFER = (
    Variant(GIPO),
    Variant(GIPO_02),
    Variant(GIPO, {"learning_rate": 1e-4}, "GIPO σ=1, rate 1e-4"),
    Variant(GIPO, {"kl_coef": 1.0}, "GIPO σ=1, KL 1"),
    Variant(GIPO, {"updates_per_iteration": 2}, "GIPO σ=1, 2 rounds"),
    Variant(PPO),
)
_BOTH_WIDTHS = (
    *(Variant(GIPO), Variant(PPO)),
    *(Variant(m, _HALF, f"{m.label}, bfloat16") for m in (GIPO, PPO)),
)
PILOTED = ("WindowOpen", "DrawerOpen", "HandlePress", "Reach", "PlateSlide", "DoorOpen")


def _quick(*variants: Variant, **changed: Any) -> Scale:
    """A check of one task and seed."""
    given: dict[str, Any] = {"tasks": TASKS[:1], "seeds": range(1), "iterations": 20}
    return Scale(variants=variants, **given | changed)


def _step(
    name: str, question: str, numbers: Any, quick: Scale, committed: Scale, by: tuple[str, ...] = ()
) -> Study:
    """A step; ``full`` is three times as long."""
    full = dataclasses.replace(committed, iterations=min(3 * committed.iterations, 10_000))
    return Study(
        name=name,
        question=question,
        sweeps=functools.partial(sweeps, name),
        by=("env", "seed", *by),
        columns=(COLUMNS, ()),
        curves=("episode_return", "success_rate", "log_ratio_abs_p95", "near_zero_fraction"),
        curves_by_regime=False,
        extend=with_success,
        presets={"quick": quick, "committed": committed, "full": full},
        scores=numbers,
        check=metaworld.check,
    )


ROWS = (
    _step(
        "width_tasks",
        "On which Meta-World tasks is there room for a difference? (pilot)",
        _tasks,
        _quick(Variant(GIPO)),
        Scale(
            variants=(Variant(GIPO), Variant(PPO)),
            tasks=PILOTED,
            seeds=range(7000, 7001),
            iterations=1_000,
        ),
    ),
    _step(
        "width_rates",
        "Which learning rate does each method need on stale Meta-World data?",
        _rates,
        _quick(Variant(WIDE_PPO), rates=(3e-4, 1e-3)),
        Scale(
            variants=tuple(Variant(m) for m in _FIVE[:4]),
            tasks=TASKS[1:],
            seeds=range(7100, 7102),
            iterations=500,
            rates=(1e-4, 3e-4, 1e-3),
        ),
        by=("learning_rate",),
    ),
    _step(
        "width",
        "Stale Meta-World: does the Gaussian's shape help, or its width?",
        _stale,
        _quick(*_tuned(*_FIVE[:4])),
        Scale(
            variants=_tuned(*_FIVE),
            tasks=TASKS,
            seeds=range(7200, 7206),
            iterations=1_500,
        ),
    ),
    _step(
        "width_fresh",
        "The same with data as fresh as the authors' fresh regime",
        _fresh,
        _quick(*_tuned(GIPO, PPO), regime="fresh"),
        Scale(
            variants=_tuned(GIPO, PPO, NO_CLIP),
            tasks=TASKS,
            seeds=range(7200, 7203),
            iterations=500,
            regime="fresh",
        ),
    ),
    _step(
        "width_buffer",
        "What makes GIPO fall behind with a buffer of two episodes?",
        functools.partial(_described, "width_buffer"),
        _quick(*_BUFFER[:1], *_BUFFER[3:4], regime="two-episode"),
        Scale(
            variants=_BUFFER,
            tasks=(BUTTON, "CoffeeButton"),
            seeds=range(7400, 7405),
            iterations=500,
            regime="two-episode",
        ),
    ),
    _step(
        "width_half",
        "Does PPO-Clip lose more than GIPO to parameters in bfloat16?",
        functools.partial(_described, "width_half"),
        _quick(_BOTH_WIDTHS[0], _BOTH_WIDTHS[2]),
        Scale(variants=_BOTH_WIDTHS, tasks=TASKS[:2], seeds=range(7600, 7603), iterations=500),
    ),
    _step(
        "width_length",
        "Does the order of the methods last to the authors' length?",
        functools.partial(judged, "width_length"),
        _quick(Variant(GIPO)),
        Scale(
            variants=(Variant(GIPO), Variant(PPO), Variant(NO_CLIP)),
            tasks=(BUTTON,),
            seeds=range(7500, 7503),
            iterations=10_000,
        ),
    ),
)
