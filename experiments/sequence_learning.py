"""Whether answers of several tokens are learnt, by thresholds that the plan fixed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pandas as pd

from experiments import training
from experiments.store import Store
from experiments.training import Sweep
from gipo_jax import sweep, train
from gipo_jax.analysis import plots, stats
from gipo_jax.config import HParams
from gipo_jax.sweep import results

QUESTION = "Do GIPO and PPO-Clip learn to reverse ten tokens on every seed?"

PROGRAM = training.PROGRAMS["sequence_methods"]
METHODS = ("gipo", "ppo_clip")


MEAN, WORST = 0.95, 0.8
"""Least exact match of sampled answers at the end: mean over seeds, and of any seed."""
START = 0.01
"""Largest mean over seeds before training."""

SETTINGS: dict[str, Any] = {
    "env": "tokens/reverse",
    "total_steps": 60_000,
    "num_envs": 10,
    "rollout_length": 10,
    "batch_size": 100,
    "buffer_size": 100,
    "max_buffer_size": 100,
    "updates_per_iteration": 2,
    "learning_rate": 1e-3,
    "decoder_layers": 1,
    "decoder_width": 32,
    "num_logs": 20,
    "eval_episodes": 512,
}


class Attempt(NamedTuple):
    """An entropy bonus, and the first of its own reported seeds."""

    entropy_coef: float
    first_seed: int


ATTEMPTS = {"first": Attempt(0.003, 0), "second": Attempt(0.01, 10)}
"""The first missed the thresholds; a pilot on further seeds set the bonus of the second."""


class Scale(NamedTuple):
    """Number of seeds, and the factor on the steps."""

    seeds: int
    steps: float


SCALES = {
    "quick": Scale(1, 0.01),
    "committed": Scale(10, 1),
    "full": Scale(10, 1),
}


def runs(attempt: Attempt, seeds: int, **changed: Any) -> list[sweep.Run]:
    """A run a method and seed; ``changed`` settings win over those of the study."""
    settings: dict[str, Any] = SETTINGS | {"entropy_coef": attempt.entropy_coef} | changed
    return sweep.expand(
        **settings,
        objective=PROGRAM.objective,
        which=[float(PROGRAM.names.index(name)) for name in METHODS],
        seeds=seeds,
        seed_offset=attempt.first_seed,
    )


def sweeps(scale: Scale) -> list[Sweep]:
    """A sweep for each attempt."""
    steps = int(scale.steps * SETTINGS["total_steps"])
    return [
        Sweep(
            f"sequence_learning_{name}",
            tuple(runs(attempt, scale.seeds, total_steps=steps)),
            {"attempt": name},
        )
        for name, attempt in ATTEMPTS.items()
    ]


CURVES = ["attempt", "objective", "seed", "env_steps", "eval_return", "eval_return_sampled"]


def run(store: Store, preset: str, part: tuple[int, int] = (1, 1)) -> None:
    """Trains what is missing, and stores curves that begin with the first policy."""
    planned = sweeps(SCALES[preset])
    training.store_sweeps(store, training.take_slice(planned, part), "loop")
    frames = []
    for item in planned:
        if training.collect(store, [item]) is None:
            continue
        directory = store.out / "sweeps" / item.name
        done, metrics = results.read_runs(directory), results.read_metrics(directory)
        done["objective"] = [PROGRAM.names[int(index)] for index in done["which"]]
        metrics = metrics.merge(done[["run", "objective", "seed"]], on="run")
        metrics = pd.concat([_starts(item, done), metrics], ignore_index=True)
        frames.append(metrics.assign(**item.keys)[CURVES])
    if frames:
        store.write("sequence_learning", pd.concat(frames, ignore_index=True), 5)


def _starts(item: Sweep, done: pd.DataFrame) -> pd.DataFrame:
    """Exact match of the first policy of every run."""
    config = item.runs[0].config
    algorithm = train.make(config)

    @jax.jit
    def one(hparams: HParams) -> tuple[jax.Array, jax.Array]:
        state = algorithm.init(hparams)
        key = jax.random.fold_in(jax.random.key(1), hparams.seed)
        return algorithm.evaluate(state.learner.params, state.normalizer, key, config.eval_episodes)

    # The first policy depends on the seed alone, not on the objective.
    by_seed = {run.hparams.seed: run.hparams for run in item.runs}
    found = {seed: one(jax.tree.map(jnp.asarray, hparams)) for seed, hparams in by_seed.items()}
    first = done[["run", "objective", "seed"]].assign(env_steps=0)
    first["eval_return"] = [float(found[seed][0]) for seed in first.seed]
    first["eval_return_sampled"] = [float(found[seed][1]) for seed in first.seed]
    return first


def draw(store: Store) -> None:
    """Exact match over training, a line a seed, and a row of numbers an attempt and method."""
    curves = store.read("sequence_learning", CURVES)
    attempts = [name for name in ATTEMPTS if name in set(curves.attempt)]
    figure, axes = plots.panels(1, len(attempts), width=3.5 * len(attempts), sharey=True)
    rows = []
    for axis, name in zip(axes[0], attempts, strict=True):
        part = curves[curves.attempt == name]
        for method in METHODS:
            own, look = part[part.objective == method], plots.look(method)
            for _, line in own.groupby("seed"):
                axis.plot(
                    line.env_steps, line.eval_return_sampled, color=look.color, lw=0.6, alpha=0.4
                )
            table = plots.summarize(own, ["env_steps"], "eval_return_sampled")
            plots.band(axis, table.env_steps, table, look)
        axis.axhline(MEAN, color="0.5", lw=0.8, linestyle=":")
        axis.set(title=f"{name}, entropy bonus {ATTEMPTS[name].entropy_coef:g}", xlabel="answers")
        axis.set_ylim(-0.02, 1.02)
        plots.thousands(axis)
        rows += thresholds(part)
    axes[0][0].set_ylabel("exact match, sampled")
    count = curves.groupby("attempt").seed.nunique().max()
    caption = (
        f"Thin: {count} seeds, other ones in the second panel. Thick: their mean; shading: its 95 %"
        " bootstrap interval. Dotted: the threshold of the mean."
    )
    looks = [plots.look(method) for method in METHODS]
    plots.finish(figure, caption, plots.legend(looks, markers=False))
    store.save(figure, "sequence_learning", pd.DataFrame(rows))


def findings(read: Callable[[str], pd.DataFrame]) -> str:
    """The plan's verdicts, from the stored table."""
    table = read("sequence_learning")
    intervals = table[["mean", "low", "high"]].to_numpy(float)
    cells = [
        f"{row.attempt} attempt, {plots.look(str(row.objective)).label}:"
        f" {'**reached**' if row.reached else '**missed**'}, mean"
        f" {stats.Interval(*interval)}, worst seed {row.worst:.3g}"
        for row, interval in zip(table.itertuples(), intervals, strict=True)
    ]
    return f"Exact match of sampled answers at the end. {'; '.join(cells)}."


def thresholds(curves: pd.DataFrame) -> list[dict[str, Any]]:
    """A row a method: exact match of sampled answers before and after, and what is reached."""
    rows = []
    for method, own in curves.groupby("objective", sort=False):
        first = own[own.env_steps == 0].eval_return_sampled.to_numpy(float).mean()
        last = own[own.env_steps == own.env_steps.max()]
        end = last.eval_return_sampled.to_numpy(float)
        interval = stats.bootstrap(end, stats.mean)
        reached = first <= START and interval.estimate >= MEAN and end.min() >= WORST
        rows.append(
            {"attempt": curves.attempt.iloc[0], "objective": method, "start": first}
            | {"mean": interval.estimate, "low": interval.low, "high": interval.high}
            | {"worst": end.min(), "greedy": last.eval_return.mean(), "reached": reached}
        )
    return rows
