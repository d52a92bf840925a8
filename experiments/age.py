"""Age of replayed data apart from its amount, after a warm-up that all ages share.

A run that holds back its newest data from the start first repeats the oldest block until there is
one as old as asked for. Here every run trains on the newest 16 iterations for 80 iterations; only
then are ``min_age`` iterations held back, and the pool stays as large.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from gipo_jax import objectives, train
from gipo_jax.config import Config, HParams, stack

from . import engine, scores, width
from .engine import Study, Tables
from .store import Store
from .tasks import ACROBOT, CARTPOLE, CATCH, COMMON, GIPO, NO_CLIP, Method, Task

POOL, WARM_UP = 16, 80
"""Iterations of data that are sampled, and iterations until the newest are held back."""

AGES = (0, 8, 32, 64)
"""Iterations held back after the warm-up."""

METHODS = (GIPO, width.CLIPS[0.2], width.CLIPS[0.8], NO_CLIP)
OBJECTIVES = ("gipo", "ppo_clip", "no_clip")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """Size of the study.

    Attributes:
        tasks: environments.
        seeds: that are reported.
        rates: learning rates tried for every task and method; a single one is not tuned.
        tuning_seeds: seeds for that.
        points: logged after the warm-up.
    """

    tasks: tuple[Task, ...]
    seeds: range
    rates: tuple[float, ...]
    tuning_seeds: range = range(0)
    points: int = 48


def configure(task: Task) -> Config:
    """A task at high reuse, with the authors' KL and optimizer, and room for the oldest pool."""
    static = {field.name for field in dataclasses.fields(Config)}
    given = COMMON | task.settings | width.AUTHORS
    own = {name: value for name, value in given.items() if name in static}
    return Config(
        **own,
        env=task.env,
        objective=objectives.switch(OBJECTIVES),
        updates_per_iteration=task.updates["reuse-heavy"],
        max_buffer_size=(POOL + max(AGES)) * task.block,
    )


def settings(task: Task, method: Method, min_age: int, rate: float, seed: int) -> HParams:
    """A run's traced settings; ``min_age`` holds after the warm-up."""
    traced = {field.name for field in dataclasses.fields(HParams)}
    given = COMMON | task.settings | width.AUTHORS
    return train.make_hparams(
        configure(task),
        objective_params={"which": OBJECTIVES.index(method.objective), **method.parameters},
        **{name: value for name, value in given.items() if name in traced},
        learning_rate=rate,
        seed=seed,
        min_age=min_age,
        buffer_size=(POOL + min_age) * task.block,
    )


def stops(config: Config, points: int) -> np.ndarray:
    """Iterations after which a point is logged, the end of the warm-up first."""
    return np.linspace(WARM_UP, config.num_iterations, points + 1).round().astype(int)


def run(config: Config, runs: Sequence[HParams], points: int) -> dict[str, np.ndarray]:
    """Trains runs; metrics ``[runs, points + 1]``, the end of the warm-up first."""
    domain = train.make(config)
    ends = stops(config, points)
    bounds = (jnp.array([0, *ends[:-1]]), jnp.array(ends))
    block = config.block_size

    def one(hparams: HParams) -> Any:
        def point(state: train.TrainState, bounds: Any) -> Any:
            held = jnp.where(bounds[0] < WARM_UP, 0, hparams.min_age)
            own = dataclasses.replace(hparams, min_age=held, buffer_size=(POOL + held) * block)
            return train.train_and_log(domain, state, own, *bounds)

        return jax.lax.scan(point, train.init(domain, hparams), bounds)[1]

    found: dict[str, np.ndarray] = jax.device_get(
        jax.jit(lambda h: jax.lax.map(one, h))(stack(runs))
    )
    return found


LOGGED = ("eval_return_sampled", "log_ratio_abs_p95", "policy_age")


def trained(
    scale: Scale, task: Task, method: Method, rates: Sequence[float], seeds: range
) -> Tables:
    """Runs of a task and method at every age, and their curves."""
    config = configure(task)
    cells = [(age, rate, seed) for rate in rates for age in AGES for seed in seeds]
    metrics = run(config, [settings(task, method, *cell) for cell in cells], scale.points)
    runs = pd.DataFrame(cells, columns=["min_age", "learning_rate", "seed"])
    runs = runs.assign(run=range(len(runs)), env=task.env, method=method.label)
    ends = stops(config, scale.points)
    curves = pd.DataFrame({name: metrics[name].ravel() for name in LOGGED})
    curves.insert(0, "run", np.repeat(runs.run.to_numpy(), len(ends)))
    curves.insert(1, "iteration", np.tile(ends, len(runs)))
    return {"width_age_runs": runs, "width_age_curves": curves}


def gains(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """What a run has gained since the warm-up ended.

    Returns:
        the runs with ``gain``, the mean of the points after the warm-up minus its end; and
        ``gain_by_generation``, the same up to as many generations as the oldest pool has. A
        generation is the mean age of what is sampled, ``min_age`` and half a pool, in iterations.
    """
    first = curves.groupby("run").iteration.transform("min")
    start = curves[curves.iteration == first].set_index("run").eval_return_sampled
    after = curves[curves.iteration > first].merge(runs[["run", "min_age"]], on="run")
    length = after.min_age + POOL / 2
    generations = (after.iteration - WARM_UP) / length
    equal = generations[after.min_age == after.min_age.max()].max()
    early = after[generations <= equal + 1e-9]
    return runs.assign(
        gain=runs.run.map(after.groupby("run").eval_return_sampled.mean() - start),
        gain_by_generation=runs.run.map(early.groupby("run").eval_return_sampled.mean() - start),
    )


def measure(store: Store, preset: str) -> None:
    """Tunes and trains every task and method that is not stored."""
    scale: Scale = STUDY.presets[preset]
    for task in scale.tasks:
        for method in METHODS:
            if engine.is_stored(STUDY, store, [(task.env, method.label)]):
                continue
            print(f"  {task.env}: {method.label}", flush=True)
            rate, tables = scale.rates[0], {}
            if len(scale.rates) > 1:
                tried = trained(scale, task, method, scale.rates, scale.tuning_seeds)
                tuned = gains(*tried.values())
                means = tuned.groupby("learning_rate").gain.mean()
                rate = float(means.index.to_numpy(float)[means.to_numpy().argmax()])
                tables["width_age_tuning"] = tuned.drop(columns="run")
            tables |= trained(scale, task, method, (rate,), scale.seeds)
            engine.write(STUDY, store, tables)


def tables(store: Store) -> Tables:
    """Gains at every age, and those at the oldest pool minus those at the newest."""
    columns = ["run", "env", "method", "min_age", "learning_rate", "seed"]
    runs = store.read("width_age_runs", columns)
    found = gains(runs, store.read("width_age_curves", ["run", "iteration", *LOGGED]))
    # In units of what a task has to gain: the best mean of a method and age.
    for name in ("gain", "gain_by_generation"):
        means = found.groupby(["env", "method", "min_age"])[name].mean().groupby("env").max()
        found[name] = found[name] / found.env.map(means)
    rows, differences = [], []
    for method, own in found.groupby("method", sort=False):
        for name in ("gain", "gain_by_generation"):
            wide: Any = own.pivot(index=["min_age", "seed"], columns="env", values=name)
            ages = sorted(own.min_age.unique())
            rows += [(method, name, age, *width.estimate(wide.loc[age])[:3]) for age in ages]
            older = width.estimate(wide.loc[ages[-1]] - wide.loc[ages[0]])
            differences.append((method, name, *older, *wide.loc[ages[0]].shape))
    return {
        "width_age": scores._frame(rows, "method score min_age mean low high"),
        "width_age_older": scores._frame(
            differences, "method score difference low high p seeds tasks"
        ),
    }


_LONG = (CARTPOLE.lasting(4 * 49_152), ACROBOT.lasting(4 * 49_152))

STUDY = Study(
    name="width_age",
    question="Does old data cost return where training does not begin with it?",
    by=("env", "method"),
    measure=measure,
    presets={
        "quick": Scale(
            tasks=(CATCH.lasting(16_384),), seeds=range(7900, 7902), rates=(1e-3,), points=6
        ),
        "committed": Scale(
            tasks=_LONG,
            seeds=range(7900, 7910),
            rates=(3e-4, 1e-3, 3e-3),
            tuning_seeds=range(7880, 7883),
        ),
        "full": Scale(
            tasks=_LONG,
            seeds=range(7900, 7920),
            rates=(1e-4, 3e-4, 1e-3, 3e-3),
            tuning_seeds=range(7880, 7885),
        ),
    },
    scores=tables,
)
