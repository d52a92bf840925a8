"""Selection of prompts and of responses against none, and preference training from a warm-up."""

from typing import Any, NamedTuple

import jax
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
    "sage": "DPO, SAGE's pairs",
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
    "sage": {"pair_sigma": np.inf, "selection": "sage", "packed_size": BLOCK // 2},
}
"""DPO as published; with GIPO's trust weight of 4 nats; on half of the pairs, chosen by SAGE."""


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


def tables(found: Trained) -> Tables:
    """Exact match and what it has cost, a row a run and logged point."""
    metrics = found.metrics.sort_values(["run", "iteration"])
    sums = metrics.groupby("run")[["prompts_sampled", "tokens_generated", "tokens_trained"]]
    spent = sums.cumsum().assign(answers=metrics.env_steps)
    seeds = {number: int(run.hparams.seed) for number, run in enumerate(found.item.runs)}
    keys = pd.DataFrame(found.item.keys | {"seed": metrics.run.map(seeds)})
    columns = ["iteration", "eval_return", "eval_return_sampled"]
    return {"selection_curves": pd.concat([keys, metrics[columns], spent], axis=1)}


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
    found = {"selection_ratios": cost_ratios(curves[curves.method.isin(SELECTIONS)])}
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


def cost_ratios(curves: pd.DataFrame) -> pd.DataFrame:
    """Costs to reach the threshold over those of ``keep_all`` on the same seeds.

    A run that never reaches it counts with all it has spent. Geometric means, with intervals of
    the mean log-ratio over seeds.
    """
    runs = curves.groupby(["method", "seed"])
    spent = pd.DataFrame({key: _to_threshold(run) for key, run in runs}).T
    base = spent.loc["keep_all"] if "keep_all" in spent.index else None
    rows = []
    for method in (name for name in SELECTIONS if name in spent.index):
        own = spent.loc[method]
        for cost in COSTS:
            row = {"method": method, "cost": cost, "reached": int(own.reached.sum())}
            row |= {"seeds": len(own), "spent": own[cost].mean()}
            if base is not None:
                logs = np.log(own[cost].to_numpy(float) / base.loc[own.index, cost].to_numpy(float))
                interval = stats.bootstrap(logs, stats.mean)._asdict()
                row |= {f"ratio_{name}": np.exp(value) for name, value in interval.items()}
            rows.append(row)
    return pd.DataFrame(rows)


def _to_threshold(run: pd.DataFrame) -> dict[str, float]:
    """Costs of one run up to the first logged point at the threshold."""
    above = np.flatnonzero(run.eval_return.to_numpy() >= THRESHOLD)
    point = run.iloc[above[0] if len(above) else -1]
    return {cost: float(point[cost]) for cost in COSTS} | {"reached": float(len(above) > 0)}


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
