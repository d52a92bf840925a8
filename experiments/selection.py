"""Selection of prompts and of responses against none, and preference training from a warm-up.

``COSTS_STUDY`` asks what packing, pruning and DEPO cost and save, in what is computed and in time.
"""

import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from gipo_jax import sweep, train
from gipo_jax.analysis import plots, stats
from gipo_jax.config import stack
from gipo_jax.domains.tokens import tasks

from .engine import Study, Sweep, Tables, Trained
from .store import Store

THRESHOLD = 0.9
PROMPTS, ANSWERS = 16, 8
BLOCK = PROMPTS * ANSWERS
EVALUATED = 256

TASK = tasks.reverse_mixed(2, 8)
SHARED: dict[str, Any] = {
    "env": TASK,
    "num_envs": PROMPTS,
    "rollout_length": ANSWERS,
    "batch_size": BLOCK,
    "buffer_size": BLOCK,
    "learning_rate": 1e-3,
    "warmup_iterations": 20,
    "entropy_coef": 0.01,
    "decoder_layers": 2,
    "decoder_width": 32,
    "eval_episodes": EVALUATED,
    "imitation_updates": 40,
}
SELECTIONS: dict[str, dict[str, Any]] = {
    "keep_all": {},
    "depo": {"num_candidates": 4 * PROMPTS},
    "prune": {"packed_size": BLOCK // 2},
}
NAMES = {
    **{name: name for name in SELECTIONS},
    "dpo": "DPO",
    "dpo_weighted": "DPO, trust weight of width 4",
    "sage": "DPO, pairs of low margin",
}
"""What tables of curves call the methods."""
COSTS = {
    "answers": "answers sampled",
    "tokens_generated": "tokens generated",
    "tokens_trained": "tokens trained on",
}
PAIRS: dict[str, Any] = {
    "objective": "dpo",
    "learning_rate": 3e-4,
    "imitation_updates": 60,
    "buffer_size": 8 * BLOCK,
    "min_age": 4,
}
"""Preference training: stale pairs, and a smaller rate, so that its warm-up is not unlearnt."""

PREFERENCES: dict[str, dict[str, Any]] = {
    "dpo": {"pair_sigma": np.inf},
    "dpo_weighted": {"pair_sigma": 4.0},
    "sage": {"pair_sigma": np.inf, "selection": "low_margin", "packed_size": BLOCK // 2},
}
"""DPO as published; with GIPO's trust weight of 4 nats; on half of the pairs, of low margin.

Tables call the third ``sage``, the former name of the selection.
"""


class Scale(NamedTuple):
    """Seeds, and iterations of the selections and of preference training."""

    seeds: int
    iterations: int
    of_pairs: int


def sweeps(scale: Scale) -> list[Sweep]:
    """One sweep for each selection, and for each form of preference training."""
    settings = {
        name: {"selection": name} | own | {"total_steps": BLOCK * scale.iterations}
        for name, own in SELECTIONS.items()
    }
    settings |= {
        name: PAIRS | own | {"total_steps": BLOCK * scale.of_pairs}
        for name, own in PREFERENCES.items()
    }
    shared = SHARED | {"seeds": scale.seeds, "num_logs": min(40, scale.of_pairs)}
    return [
        Sweep(f"selection_{name}", tuple(sweep.expand(**shared | own)), {"method": name})
        for name, own in settings.items()
    ]


def tables(found: Trained, name: str = "selection_curves") -> Tables:
    """Exact match and what it has cost, a row a run and logged point."""
    metrics = found.metrics.sort_values(["run", "iteration"])
    sums = metrics.groupby("run")[["prompts_sampled", "tokens_generated", "tokens_trained"]]
    spent = sums.cumsum().assign(answers=metrics.env_steps)
    seeds = {number: int(run.hparams.seed) for number, run in enumerate(found.item.runs)}
    keys = pd.DataFrame(found.item.keys | {"seed": metrics.run.map(seeds)})
    columns = ["iteration", "eval_return", "eval_return_sampled"]
    return {name: pd.concat([keys, metrics[columns], spent], axis=1)}


def measure(store: Store, preset: str) -> None:
    """Store what preference training begins with."""
    if store.stored("selection_warm_up") is None:
        store.write("selection_warm_up", _warm_up(sweeps(STUDY.presets[preset])[-1]), 6)


def _warm_up(of_dpo: Sweep) -> pd.DataFrame:
    """Exact match that preference training begins with, by seed."""
    domain = train.make(of_dpo.runs[0].config)

    def one(hparams: Any) -> Any:
        acting = domain.acting(train.init(domain, hparams))
        key = jax.random.fold_in(jax.random.key(1), hparams.seed)
        return domain.evaluate(acting, hparams, key, EVALUATED)["eval_return"]

    runs = {int(run.hparams.seed): run.hparams for run in of_dpo.runs}
    exact = jax.jit(lambda h: jax.lax.map(one, h))(stack(list(runs.values())))
    return pd.DataFrame({"seed": list(runs), "eval_return": np.asarray(exact, float)})


def scores(store: Store) -> Tables:
    """Exact match against each cost, ratios of costs, and preference training."""
    curves = store.read("selection_curves", ["method", "seed", "iteration", "eval_return", *COSTS])
    selected = curves[curves.method.isin(SELECTIONS)]
    order = selected.method.map(list(SELECTIONS).index)
    found = {"selection_ratios": cost_ratios(selected.loc[order.sort_values(kind="stable").index])}
    pairs = curves[curves.method.isin(PREFERENCES)]
    if len(pairs):
        start = store.read("selection_warm_up", ["seed", "eval_return"])
        found["selection_dpo"] = rise(pairs, start)
    numbers = []
    axes = [
        *((cost, SELECTIONS) for cost in ("answers", "tokens_trained")),
        ("iteration", PREFERENCES),
    ]
    for cost, methods in axes:
        for method in methods:
            own = curves[curves.method == method]
            if not own.empty:
                table = plots.summarize(own, ["iteration"], "eval_return")
                spent = own.groupby("iteration")[cost].mean() if cost != "iteration" else None
                at = table.iteration if spent is None else spent.loc[table.iteration].to_numpy()
                numbers.append(table.assign(method=NAMES[method], cost=cost, spent=at))
    return found | {"selection": pd.concat(numbers, ignore_index=True)}


def cost_ratios(
    curves: pd.DataFrame,
    costs: Sequence[str] = tuple(COSTS),
    threshold: float = THRESHOLD,
    base_method: str = "keep_all",
) -> pd.DataFrame:
    """Costs to reach the threshold over those of ``base_method`` on the same seeds.

    A run that never reaches it counts with all it has spent. Geometric means, with intervals of
    the mean log-ratio over seeds.
    """
    runs = curves.groupby(["method", "seed"], sort=False)
    spent = pd.DataFrame({key: _to_threshold(run, costs, threshold) for key, run in runs}).T
    base = spent.loc[base_method] if base_method in spent.index else None
    rows = []
    for method in spent.index.unique(0):
        own = spent.loc[method]
        for cost in costs:
            row = {"method": method, "cost": cost, "reached": int(own.reached.sum())}
            row |= {"seeds": len(own), "spent": own[cost].mean()}
            if base is not None:
                logs = np.log(own[cost].to_numpy(float) / base.loc[own.index, cost].to_numpy(float))
                interval = stats.bootstrap(logs, stats.mean)._asdict()
                row |= {f"ratio_{name}": np.exp(value) for name, value in interval.items()}
            rows.append(row)
    return pd.DataFrame(rows)


def _to_threshold(run: pd.DataFrame, costs: Sequence[str], threshold: float) -> dict[str, float]:
    """Costs of one run up to the first logged point at the threshold."""
    above = np.flatnonzero(run.eval_return.to_numpy() >= threshold)
    point = run.iloc[above[0] if len(above) else -1]
    return {cost: float(point[cost]) for cost in costs} | {"reached": float(len(above) > 0)}


def rise(curves: pd.DataFrame, start: pd.DataFrame) -> pd.DataFrame:
    """Exact match of preference training after the warm-up, and at the first and last logged point.

    Args:
        curves: of preference training.
        start: exact match after the warm-up, by seed.
    """
    rows = []
    warm = start.sort_values("seed").eval_return.to_numpy(float)
    for method, own in curves.groupby("method", sort=False):
        by_seed = own.sort_values("iteration").groupby("seed").eval_return
        first, last = by_seed.first().to_numpy(float), by_seed.last().to_numpy(float)
        scores = {"warm_up": warm, "first": first, "last": last, "rise": last - warm}
        for score, values in scores.items():
            interval = stats.bootstrap(values, stats.mean)._asdict()
            rows.append({"method": method, "score": score, "seeds": len(values)} | interval)
    return pd.DataFrame(rows)


STUDY = Study(
    name="selection",
    question="What do selecting prompts and pruning responses save, and does DPO learn?",
    sweeps=sweeps,
    by=("method",),
    table="selection_curves",
    batch_mode="auto",
    digits=(6, 6),
    presets={
        "quick": Scale(2, 40, 20),
        "committed": Scale(10, 2000, 1000),
        "full": Scale(30, 8000, 4000),
    },
    tables=tables,
    measure=measure,
    scores=scores,
)


# What is computed, and in which time.


CONTROL = "mixed groups, packed"
"""Groups of one reward, whose advantage is 0, are dropped: what pruning has to beat."""


def mixed_groups(group: Any, state: Any, key: Any) -> Any:
    """Weights that drop groups of equal reward, which have no advantage: what costs nothing."""
    return jnp.broadcast_to(1.0 * jnp.any(group.advantage != 0, axis=0), group.advantage.shape)


class Case(NamedTuple):
    """A task and its data, and the methods on it."""

    settings: dict[str, Any]
    threshold: float  # of greedy exact match
    methods: dict[str, dict[str, Any]]


COUNTING: dict[str, Any] = {"env": "tokens/count", "imitation_updates": 0}
PACKING: dict[str, dict[str, Any]] = {
    "keep_all": {},
    "packed": {"packed_size": 80},
    CONTROL: {"selection": mixed_groups, "packed_size": 48},
    "prune, packed": {"selection": "prune", "packed_size": 48},
}
CASES = {
    "fresh": Case(COUNTING, 0.9, PACKING),
    "stale": Case(COUNTING | {"buffer_size": 8 * BLOCK, "min_age": 4}, 0.9, PACKING),
    "hopeless prompts": Case(
        {"env": "tokens/reverse_mixed", "imitation_updates": 40},
        0.3,
        {"keep_all": {}, "depo": {"selection": "depo", "depo_start": 20}},
    ),
}
ALL_COSTS = (*COSTS, "tokens_computed", "flops", "seconds")


class CostsScale(NamedTuple):
    """Size of the study of costs."""

    seeds: int
    iterations: dict[str, int]  # by case
    timings: int  # of each program


def costs_sweeps(scale: CostsScale) -> list[Sweep]:
    """One sweep for each case and method."""
    found = []
    for case, iterations in scale.iterations.items():
        for method, own in CASES[case].methods.items():
            given = SHARED | CASES[case].settings | own
            given |= {"total_steps": BLOCK * iterations, "num_logs": min(20, iterations)}
            keys = {"case": case, "method": method}
            name = f"selection_costs {case} {method}".replace(",", "").replace(" ", "_")
            found.append(Sweep(name, tuple(sweep.expand(**given, seeds=scale.seeds)), keys))
    return found


def measure_costs(store: Store, preset: str) -> None:
    """Store what an update computes and how long an iteration takes, by case and method."""
    if store.stored("selection_costs_programs") is not None:
        return
    scale = COSTS_STUDY.presets[preset]
    items = costs_sweeps(scale)
    steps = [program_costs(item.runs[0]) for item in items]
    seconds: list[list[float]] = [[] for _ in items]
    # In turn, so that what else the machine does strikes all alike.
    for _ in range(scale.timings):
        for (_, iterate), own in zip(steps, seconds, strict=True):
            own.append(iterate())
    rows = [
        item.keys | costs | {"seconds": min(own)}
        for item, (costs, _), own in zip(items, steps, seconds, strict=True)
    ]
    store.write("selection_costs_programs", pd.DataFrame(rows), 6)


def program_costs(run: sweep.Run) -> tuple[dict[str, float], Any]:
    """Costs of an update of a run, and a function that times an iteration, in seconds.

    FLOPs are those of the compiled update by cost analysis, which counts the body of a loop once:
    choosing the rows, some additions for each response, is all that it leaves out.
    """
    domain, hparams = train.make(run.config), run.hparams
    rows = run.config.packed_size or run.config.batch_size
    width = domain.env.prompt_length + domain.env.answer_length - 1
    state = jax.jit(functools.partial(train.init, domain))(hparams)
    index = jnp.arange(run.config.batch_size)

    def update(state: Any, key: Any) -> Any:
        given = train.gather(run.config, state.replay, index, 0)
        batch = domain.batch(state, state.learner.params, *given, hparams, key)
        scale = jnp.ones(())
        return train.update(domain, state, state.learner, batch, hparams, 0, scale)[0]

    analysis: Any = jax.jit(update).lower(state, state.key).compile().cost_analysis()
    step = jax.jit(functools.partial(train.train_step, domain)).lower(state, hparams, 9).compile()

    def iterate() -> float:
        began = time.perf_counter()
        jax.block_until_ready(step(state, hparams, 9))
        return time.perf_counter() - began

    iterate()
    return {"rows": rows, "tokens": rows * width, "flops": analysis["flops"]}, iterate


def costs_scores(store: Store) -> Tables:
    """Costs to the threshold over those of ``keep_all``, those of pruning over those of the free
    control, and how full the rows are.
    """
    columns = ["case", "method", "seed", "iteration", "eval_return", *COSTS]
    curves = store.read("selection_costs_curves", columns)
    programs = store.read(
        "selection_costs_programs", ["case", "method", "rows", "tokens", "flops", "seconds"]
    )
    spent = curves.merge(programs, on=["case", "method"], validate="many_to_one")
    # One update an iteration.
    updates = spent.iteration
    spent = spent.assign(
        tokens_computed=updates * spent.tokens,
        flops=updates * spent.flops,
        seconds=updates * spent.seconds,
    )
    ratios = [
        cost_ratios(own, ALL_COSTS, CASES[str(case)].threshold).assign(case=case)
        for case, own in spent.groupby("case", sort=False)
    ]
    control = [
        cost_ratios(own, ALL_COSTS, CASES[str(case)].threshold, CONTROL)
        .assign(case=case)
        .query("method == 'prune, packed'")
        for case, own in spent.groupby("case", sort=False)
    ]
    last = spent.groupby(["case", "method", "seed"], sort=False).last()
    full = (last.tokens_trained / (last.iteration * last.rows)).groupby(
        ["case", "method"], sort=False
    )
    summary = programs.merge(full.mean().rename("tokens_a_row").reset_index())
    return {
        "selection_costs": pd.concat(ratios),
        "selection_costs_control": pd.concat(control),
        "selection_costs_rows": summary,
    }


COSTS_STUDY = Study(
    name="selection_costs",
    question="What do packing, pruning and DEPO save in computation and time, and at what cost?",
    sweeps=costs_sweeps,
    by=("case", "method"),
    table="selection_costs_curves",
    batch_mode="auto",
    digits=(6, 6),
    presets={
        "quick": CostsScale(2, {"fresh": 20, "stale": 20, "hopeless prompts": 10}, 2),
        "committed": CostsScale(5, {"fresh": 400, "stale": 400, "hopeless prompts": 800}, 30),
        "full": CostsScale(20, {"fresh": 2000, "stale": 2000, "hopeless prompts": 6000}, 100),
    },
    tables=functools.partial(tables, name="selection_costs_curves"),
    measure=measure_costs,
    scores=costs_scores,
)
