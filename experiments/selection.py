"""Selection of prompts and of answers against none, and preference training from a warm-up."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pandas as pd

from experiments import training
from experiments.store import Store
from gipo_jax import sweep, train
from gipo_jax.analysis import plots, stats
from gipo_jax.analysis.plots import Look
from gipo_jax.config import stack
from gipo_jax.domains.tokens import tasks
from gipo_jax.sweep import results

QUESTION = "What do selecting prompts and pruning answers save, and does DPO learn?"

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
LOOKS = {
    "keep_all": Look("#4D4D4D", "D", ":", "keep all"),
    "depo": Look("#0072B2", "o", "-", "DEPO"),
    "prune": Look("#D55E00", "s", "--", "pruning"),
}
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

DPO_LOOKS = {
    "dpo": Look("#8C6D1F", "v", "-", "DPO"),
    "dpo_weighted": Look("#009E73", "^", "-.", "DPO, trust weight of width 4"),
    "sage": Look("#CC79A7", "P", "--", "DPO, SAGE's pairs"),
}
SEEDS = {"quick": 2, "committed": 10, "full": 30}
ITERATIONS = {"quick": (40, 20), "committed": (2000, 1000), "full": (8000, 4000)}
"""Of the selections, and of preference training."""


def sweeps(preset: str) -> list[training.Sweep]:
    """One sweep for each selection, and for each form of preference training."""
    seeds, (iterations, of_pairs) = SEEDS[preset], ITERATIONS[preset]
    settings = {name: {"selection": name} | own for name, own in SELECTIONS.items()}
    settings = {name: own | {"total_steps": BLOCK * iterations} for name, own in settings.items()}
    settings |= {
        name: PAIRS | own | {"total_steps": BLOCK * of_pairs} for name, own in PREFERENCES.items()
    }
    shared = SHARED | {"seeds": seeds, "num_logs": min(40, of_pairs)}
    return [
        training.Sweep(f"selection_{name}", tuple(sweep.expand(**shared | own)), {"method": name})
        for name, own in settings.items()
    ]


CURVES = "selection_curves"


def run(store: Store, preset: str, part: tuple[int, int] = (1, 1)) -> None:
    """Trains the sweeps that are not stored yet, and stores each when it is finished."""
    planned = sweeps(preset)
    done = training.stored_units(store, CURVES, ["method"])
    for item in training.take_slice(planned, part):
        if (item.keys["method"],) in done:
            continue
        training.store_sweeps(store, [item])
        metrics = results.read_metrics(store.out / "sweeps" / item.name)
        metrics = metrics.sort_values(["run", "iteration"])
        sums = metrics.groupby("run")[["prompts_sampled", "tokens_generated", "tokens_trained"]]
        spent = sums.cumsum().assign(answers=metrics.env_steps)
        seeds = [int(run.hparams.seed) for run in item.runs]
        keys = pd.DataFrame(item.keys | {"seed": metrics.run.map(dict(enumerate(seeds)))})
        columns = ["iteration", "eval_return", "eval_return_sampled"]
        table = pd.concat([keys, metrics[columns], spent], axis=1)
        training.write_units(store, ["method"], {CURVES: table})
    if part[0] == 1 and store.stored("selection_warm_up") is None:
        store.write("selection_warm_up", _warm_up(planned[-1]), 6)


def _warm_up(of_dpo: training.Sweep) -> pd.DataFrame:
    """Exact match that preference training begins with, by seed."""
    domain = train.make(of_dpo.runs[0].config)

    def one(hparams: Any) -> Any:
        acting = domain.acting(train.init(domain, hparams))
        key = jax.random.fold_in(jax.random.key(1), hparams.seed)
        return domain.evaluate(acting, hparams, key, EVALUATED)["eval_return"]

    runs = {int(run.hparams.seed): run.hparams for run in of_dpo.runs}
    exact = jax.jit(lambda h: jax.lax.map(one, h))(stack(list(runs.values())))
    return pd.DataFrame({"seed": list(runs), "eval_return": np.asarray(exact, float)})


def draw(store: Store) -> None:
    """Exact match against each cost, ratios of costs, and preference training."""
    curves = store.read(CURVES, ["method", "seed", "iteration", "eval_return", *COSTS])
    ratios = cost_ratios(curves[curves.method.isin(LOOKS)])
    store.numbers("selection_ratios", ratios)
    pairs = curves[curves.method.isin(DPO_LOOKS)]
    if len(pairs):
        start = store.read("selection_warm_up", ["seed", "eval_return"])
        store.numbers("selection_dpo", rise(pairs, start))

    figure, axes = plots.panels(1, 3, width=10, height=2.6)
    numbers = []
    for axis, cost in zip(axes[0][:2], ("answers", "tokens_trained"), strict=True):
        for method, look in LOOKS.items():
            own = curves[curves.method == method]
            if own.empty:
                continue
            table = plots.summarize(own, ["iteration"], "eval_return")
            spent = own.groupby("iteration")[cost].mean()
            plots.band(axis, spent.loc[table.iteration], table, look)
            numbers.append(table.assign(method=method, cost=cost, spent=spent.to_numpy()))
        axis.axhline(THRESHOLD, color="0.6", linewidth=0.8)
        axis.set(xlabel=COSTS[cost], ylabel="exact match", ylim=(0, 1))
        plots.thousands(axis)
    for method, look in DPO_LOOKS.items():
        own = pairs[pairs.method == method]
        if own.empty:
            continue
        table = plots.summarize(own, ["iteration"], "eval_return")
        plots.band(axes[0][2], table.iteration, table, look)
        numbers.append(table.assign(method=look.label, cost="iteration", spent=table.iteration))
    if len(pairs):
        axes[0][2].axhline(start.eval_return.mean(), color="0.6", linewidth=0.8)
    axes[0][2].set(xlabel="iterations after the warm-up", ylim=(0, 1))
    looks = plots.legend([*LOOKS.values(), *DPO_LOOKS.values()], markers=False)
    count = curves.seed.nunique()
    caption = (
        f"Greedy answers to {EVALUATED} prompts. Shading: 95 % interval of the mean, {count} seeds."
        f" Grey lines: the threshold {THRESHOLD}; on the right, the warm-up's exact match."
    )
    plots.finish(figure, caption, looks)
    store.save(figure, "selection", pd.concat(numbers, ignore_index=True))


def cost_ratios(curves: pd.DataFrame) -> pd.DataFrame:
    """Costs to reach the threshold over those of ``keep_all`` on the same seeds.

    A run that never reaches it counts with all it has spent. Geometric means, with intervals of
    the mean log-ratio over seeds.
    """
    runs = curves.groupby(["method", "seed"])
    spent = pd.DataFrame({key: _to_threshold(run) for key, run in runs}).T
    base = spent.loc["keep_all"] if "keep_all" in spent.index else None
    rows = []
    for method in (name for name in LOOKS if name in spent.index):
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


def findings(table: Callable[[str], pd.DataFrame]) -> str:
    """The plan's verdicts, from the stored tables."""
    ratios = {(row.method, row.cost): row for row in table("selection_ratios").itertuples()}
    text = []
    for name, method, cost in (
        ("DEPO saves rollouts", "depo", "answers"),
        ("Pruning saves back-propagation", "prune", "tokens_trained"),
    ):
        row: Any = ratios[method, cost]
        verdict = "yes" if row.ratio_high < 1 else "no" if row.ratio_low > 1 else "open"
        text.append(
            f"{name}: **{verdict}**, {COSTS[cost]} to {THRESHOLD} over those of keep_all "
            f"{row.ratio_estimate:.2f} [{row.ratio_low:.2f}, {row.ratio_high:.2f}], "
            f"{row.reached} of {row.seeds} runs there."
        )
    for form, own in table("selection_dpo").groupby("method", sort=False):
        cells: dict[Any, Any] = {row.score: row for row in own.itertuples()}
        gain = cells["rise"]
        verdict = "yes" if gain.low > 0 else "no" if gain.high < 0 else "open"
        text.append(
            f"{DPO_LOOKS[str(form)].label} learns from its warm-up: **{verdict}**, exact match "
            f"from {cells['warm_up'].estimate:.2f} to {cells['last'].estimate:.2f}, a rise of "
            f"{gain.estimate:+.2f} [{gain.low:.2f}, {gain.high:.2f}]."
        )
    return " ".join(text)
