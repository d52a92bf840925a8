"""Whether answers of several tokens are learnt, by thresholds that the plan fixed."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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


class Task(NamedTuple):
    """A task and what has to be reached on it, as the exact match of sampled answers.

    Attributes:
        settings: of the runs.
        mean: least mean over seeds at the end.
        worst: least of any seed at the end.
        start: range of the mean over seeds before training.
    """

    settings: dict[str, Any]
    mean: float
    worst: float
    start: tuple[float, float]


TASKS = {
    "reverse": Task(
        {
            "env": "tokens/reverse",
            "total_steps": 60_000,
            "num_envs": 10,
            "rollout_length": 10,
            "batch_size": 100,
            "buffer_size": 100,
            "max_buffer_size": 100,
            "updates_per_iteration": 2,
            "learning_rate": 1e-3,
            "entropy_coef": 0.003,
            "decoder_layers": 1,
            "decoder_width": 32,
            "num_logs": 20,
            "eval_episodes": 512,
        },
        mean=0.95,
        worst=0.8,
        start=(0.0, 0.01),
    ),
}


class Scale(NamedTuple):
    """Seeds, and the factor on the tasks' steps."""

    seeds: range
    steps: float


SCALES = {
    "quick": Scale(range(1), 0.01),
    "committed": Scale(range(10), 1),
    "full": Scale(range(20), 1),
}


def runs(settings: dict[str, Any], seeds: range) -> list[sweep.Run]:
    """A run a method and seed."""
    return sweep.expand(
        **settings,
        objective=PROGRAM.objective,
        which=[float(PROGRAM.names.index(name)) for name in METHODS],
        seeds=len(seeds),
        seed_offset=seeds.start,
    )


def sweeps(scale: Scale) -> list[Sweep]:
    """A sweep for each task."""
    made = []
    for name, task in TASKS.items():
        steps = int(scale.steps * task.settings["total_steps"])
        planned = runs(task.settings | {"total_steps": steps}, scale.seeds)
        made.append(Sweep(f"sequence_learning_{name}", tuple(planned), {"task": name}))
    return made


CURVES = ["task", "objective", "seed", "env_steps", "eval_return", "eval_return_sampled"]


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
    """Exact match over training, a line a seed, and a row of numbers a task and method."""
    curves = store.read("sequence_learning", CURVES)
    tasks = [name for name in TASKS if name in set(curves.task)]
    figure, axes = plots.panels(len(tasks), 2, width=7.0, height=2.2, sharey=True)
    rows = []
    for row, task in zip(axes, tasks, strict=True):
        for axis, (score, label) in zip(
            row,
            {"eval_return": "most likely", "eval_return_sampled": "sampled"}.items(),
            strict=True,
        ):
            for method in METHODS:
                own = curves[(curves.task == task) & (curves.objective == method)]
                look = plots.look(method)
                for _, line in own.groupby("seed"):
                    axis.plot(line.env_steps, line[score], color=look.color, lw=0.6, alpha=0.4)
                table = plots.summarize(own, ["env_steps"], score)
                plots.band(axis, table.env_steps, table, look)
            axis.axhline(TASKS[task].mean, color="0.5", lw=0.8, linestyle=":")
            axis.set(title=f"{task}, {label} answers", ylim=(-0.02, 1.02))
            plots.thousands(axis)
        row[0].set_ylabel("exact match")
        rows += thresholds(curves[curves.task == task], TASKS[task])
    for axis in axes[-1]:
        axis.set_xlabel("answers")
    caption = (
        f"Thin: {curves.seed.nunique()} seeds. Thick: their mean; shading: its 95 % bootstrap"
        " interval. Dotted: the threshold of the mean."
    )
    looks = [plots.look(method) for method in METHODS]
    plots.finish(figure, caption, plots.legend(looks, markers=False))
    store.save(figure, "sequence_learning", pd.DataFrame(rows))


def thresholds(curves: pd.DataFrame, task: Task) -> list[dict[str, Any]]:
    """A row a method: exact match of sampled answers before and after, and what is reached."""
    rows = []
    for method, own in curves.groupby("objective", sort=False):
        first = own[own.env_steps == 0].eval_return_sampled.to_numpy(float)
        last = own[own.env_steps == own.env_steps.max()]
        end = last.eval_return_sampled.to_numpy(float)
        interval = stats.bootstrap(end, stats.mean)
        in_range = task.start[0] <= np.mean(first) <= task.start[1]
        reached = in_range and interval.estimate >= task.mean and end.min() >= task.worst
        rows.append(
            {"task": curves.task.iloc[0], "objective": method, "start": first.mean()}
            | {"mean": interval.estimate, "low": interval.low, "high": interval.high}
            | {"worst": end.min(), "greedy": last.eval_return.mean(), "reached": reached}
        )
    return rows
