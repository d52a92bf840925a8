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
from gipo_jax.sequences import tasks
from gipo_jax.sweep import results

QUESTION = "What do selecting prompts and pruning answers save, and does DPO learn?"

THRESHOLD = 0.9
PROMPTS, ANSWERS = 16, 8
BLOCK = PROMPTS * ANSWERS
EVALUATED = 256
WARM_UP = 100
"""Updates on demonstrations before training."""

TASK = tasks.reverse_mixed(2, 6)
SHARED: dict[str, Any] = {
    "env": TASK,
    "num_envs": PROMPTS,
    "rollout_length": ANSWERS,
    "batch_size": BLOCK,
    "buffer_size": BLOCK,
    "learning_rate": 1e-3,
    "entropy_coef": 0.0,
    "decoder_layers": 2,
    "decoder_width": 32,
    "eval_episodes": EVALUATED,
    "imitation_updates": WARM_UP,
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
WEIGHTS = {"inf": np.inf, "4": 4.0}
"""Widths of the trust weight on stale pairs, in nats; without one it is DPO as published."""

DPO_LOOKS = {
    "inf": Look("#8C6D1F", "v", "-", "DPO"),
    "4": Look("#009E73", "^", "-.", "DPO, trust weight of width 4"),
}
SEEDS = {"quick": 2, "committed": 10, "full": 30}
ITERATIONS = {"quick": (40, 20), "committed": (1200, 400), "full": (4800, 1600)}
"""Of the selections, and of preference training."""


def sweeps(preset: str) -> list[training.Sweep]:
    """One sweep for each selection, and one of preference training."""
    seeds, (iterations, of_dpo) = SEEDS[preset], ITERATIONS[preset]
    shared = SHARED | {"seeds": seeds, "num_logs": min(40, iterations)}
    found = [
        training.Sweep(
            f"selection_{name}",
            tuple(
                sweep.expand(
                    **shared | settings, selection=name, total_steps=BLOCK * iterations
                )
            ),
            {"method": name},
        )
        for name, settings in SELECTIONS.items()
    ]  # fmt: skip
    stale = {"buffer_size": 8 * BLOCK, "min_age": 4}
    runs = sweep.expand(
        **shared | stale, objective="dpo", pair_sigma=list(WEIGHTS.values()),
        total_steps=BLOCK * of_dpo,
    )  # fmt: skip
    return [*found, training.Sweep("selection_dpo", tuple(runs), {})]


def run(store: Store, preset: str, part: tuple[int, int] = (1, 1)) -> None:
    """Trains the sweeps, and stores the curves of those that are finished."""
    planned = sweeps(preset)
    training.store_sweeps(store, training.take_slice(planned, part))
    curves = []
    for item in planned:
        metrics = _finished(store, item)
        if metrics is None:
            continue
        by_run = {
            run: {
                "method": item.keys.get("method", "dpo"),
                "seed": int(settings.hparams.seed),
                "pair_sigma": settings.hparams.objective_params.get("pair_sigma", np.nan),
            }
            for run, settings in enumerate(item.runs)
        }
        keys = pd.DataFrame([by_run[run] for run in metrics.run])
        curves.append(pd.concat([keys, metrics.drop(columns="run")], axis=1))
    if curves:
        table = pd.concat(curves, ignore_index=True)
        # A table has no infinity.
        table["pair_sigma"] = table.pair_sigma.map(lambda s: "" if np.isnan(s) else f"{s:g}")
        store.write("selection_curves", table, 6)
    if part[0] == 1:
        store.write("selection_warm_up", _warm_up(planned[-1]), 6)


def _warm_up(of_dpo: training.Sweep) -> pd.DataFrame:
    """Exact match that preference training begins with, by seed."""
    algorithm = train.make(of_dpo.runs[0].config)

    def one(hparams: Any) -> Any:
        state = algorithm.init(hparams)
        key = jax.random.fold_in(jax.random.key(1), hparams.seed)
        return algorithm.evaluate(state.learner.params, (), key, EVALUATED)[0]

    runs = {int(run.hparams.seed): run.hparams for run in of_dpo.runs}
    exact = jax.jit(lambda h: jax.lax.map(one, h))(train.stack(list(runs.values())))
    return pd.DataFrame({"seed": list(runs), "eval_return": np.asarray(exact, float)})


def _finished(store: Store, item: training.Sweep) -> pd.DataFrame | None:
    """Exact match and summed costs at the logged points of a finished sweep."""
    if training.finished(store, item) is None:
        return None
    metrics = results.read_metrics(store.out / "sweeps" / item.name).sort_values(
        ["run", "iteration"]
    )
    sums = metrics.groupby("run")[["prompts_sampled", "tokens_generated", "tokens_trained"]]
    spent = sums.cumsum().assign(answers=metrics.env_steps)
    columns = ["run", "iteration", "eval_return", "eval_return_sampled"]
    return pd.concat([metrics[columns], spent], axis=1).reset_index(drop=True)


def draw(store: Store) -> None:
    """Exact match against each cost, ratios of costs, and preference training."""
    columns = ["method", "seed", "pair_sigma", "eval_return", *COSTS]
    curves = store.read("selection_curves", columns).assign(
        pair_sigma=lambda t: t.pair_sigma.astype(str).str.removesuffix(".0")
    )
    ratios = cost_ratios(curves[curves.method != "dpo"])
    store.numbers("selection_ratios", ratios)
    pairs = curves[curves.method == "dpo"]
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
    for sigma, look in DPO_LOOKS.items():
        own = pairs[pairs.pair_sigma == sigma]
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
    for sigma, own in curves.groupby("pair_sigma", sort=False):
        by_seed = own.sort_values("iteration").groupby("seed").eval_return
        first, last = by_seed.first().to_numpy(float), by_seed.last().to_numpy(float)
        scores = {"warm_up": warm, "first": first, "last": last}
        scores |= {"rise": last - first, "rise_from_warm_up": last - warm}
        for score, values in scores.items():
            interval = stats.bootstrap(values, stats.mean)._asdict()
            rows.append({"pair_sigma": sigma, "score": score, "seeds": len(values)} | interval)
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
    for sigma, own in table("selection_dpo").groupby("pair_sigma"):
        cells = {row.score: row for row in own.itertuples()}
        first: Any = cells["rise"]
        warm: Any = cells["rise_from_warm_up"]
        learns = "yes" if first.low > 0 else "no"
        kept = "" if warm.low > 0 else " It did not get above the warm-up."
        text.append(
            f"DPO, width {sigma:g}, learns, by the plan's rule: **{learns}**, exact match from the "
            f"first to the last point {first.estimate:+.2f} [{first.low:.2f}, {first.high:.2f}]; "
            f"from the warm-up {warm.estimate:+.2f} [{warm.low:.2f}, {warm.high:.2f}].{kept}"
        )
    return " ".join(text)
