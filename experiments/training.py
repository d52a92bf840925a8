"""Tasks, methods and scales of the experiments that train, and the sweeps they store.

A sweep is stored once under OUT/sweeps and continued when interrupted; experiments that ask
different questions of the same runs share it.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from experiments import compared, contenders, sequence_methods
from experiments.store import DataError, Store
from gipo_jax import sweep
from gipo_jax.sweep import results


@dataclasses.dataclass(frozen=True)
class Task:
    """An environment and the sizes that go with it.

    Attributes:
        env: name of an environment or a task of answers of several tokens.
        threshold: return that counts as solved enough for sample efficiency.
        settings: fields of Config and HParams.
        updates: batches an iteration, by regime.
    """

    env: str
    threshold: float
    settings: dict[str, Any]
    updates: dict[str, int]

    @property
    def block(self) -> int:
        """Transitions an iteration."""
        return int(self.settings["num_envs"] * self.settings["rollout_length"])


@dataclasses.dataclass(frozen=True)
class Method:
    """What is compared: an objective and its own parameters."""

    objective: str
    parameters: dict[str, float]

    @property
    def sigma(self) -> float:
        return self.parameters.get("sigma", np.nan)


REGIMES = ("gentle", "reuse-heavy")

_CLASSIC: dict[str, Any] = {"num_envs": 8, "rollout_length": 16, "total_steps": 65_536}
_MINATAR: dict[str, Any] = {
    "num_envs": 8,
    "rollout_length": 8,
    "total_steps": 16_384,
    "shared_torso": True,
    "hidden_sizes": (32,),
}
_CLASSIC_UPDATES = {"gentle": 4, "reuse-heavy": 16}
_MINATAR_UPDATES = {"gentle": 2, "reuse-heavy": 4}

CARTPOLE = Task("CartPole-v1", 300, _CLASSIC, _CLASSIC_UPDATES)
ACROBOT = Task("Acrobot-v1", -150, _CLASSIC, _CLASSIC_UPDATES)
PENDULUM = Task(
    "Pendulum-v1", -600, _CLASSIC | {"action_head": "tokens", "gamma": 0.95}, _CLASSIC_UPDATES
)
CATCH = Task("Catch-bsuite", 0.5, _CLASSIC, _CLASSIC_UPDATES)
BREAKOUT = Task("Breakout-MinAtar", 2.5, _MINATAR, _MINATAR_UPDATES)
INVADERS = Task("SpaceInvaders-MinAtar", 7, _MINATAR, _MINATAR_UPDATES)
ASTERIX = Task("Asterix-MinAtar", 2, _MINATAR, _MINATAR_UPDATES)
REACHER = Task("Reacher-misc", 0, _CLASSIC | {"action_head": "tokens"}, _CLASSIC_UPDATES)

COMMON: dict[str, Any] = {
    "batch_size": 64,
    # The same critic for every method, so that tuning a policy's learning rate tunes only that.
    "value_learning_rate": 1e-3,
    "entropy_coef": 0.0,
    "schedule": "linear",
    "eval_episodes": 0,
    "num_logs": 16,
}
"""Settings that every run of these experiments shares."""

GIPO = Method("gipo", {"sigma": 1.0})
BASELINES = (
    Method("ppo_clip", {}),
    # As in the paper's comparison.
    Method("sapo", {"tau_pos": 1.0, "tau_neg": 2.0}),
    Method("no_clip", {}),
)
METHODS = (Method("gipo", {"sigma": 0.2}), Method("gipo", {"sigma": 0.5}), GIPO, *BASELINES)


class Program(NamedTuple):
    """Several objectives behind one function, so that they share a compiled program."""

    objective: Callable[..., Any]
    names: tuple[str, ...]


PROGRAMS = {
    "compared": Program(compared.compared, compared.NAMES),
    "contenders": Program(contenders.contenders, contenders.NAMES),
    "sequence_methods": Program(sequence_methods.sequence_methods, sequence_methods.NAMES),
}

OWN = {
    "sigma": ("gipo", "maspo"),
    "clip_eps": ("ppo_clip", "geppo", "decoupled_ppo"),
    "tau_pos": ("sapo",),
    "tau_neg": ("sapo",),
    "sigma_stale": ("proximal_gipo",),
    "sigma_prox": ("proximal_gipo", "following_gipo"),
    "mean_weight": ("following_gipo",),
}
"""The objectives that have a parameter."""

CURVES = (
    "episode_return",
    "ess",
    "ess_new",
    "ess_old",
    "near_zero_fraction",
    "near_zero_fraction_new",
    "near_zero_fraction_old",
    "old_share",
    "log_ratio_abs_p95",
    "policy_age",
)
"""Columns of metrics.csv kept in thinned curves; ``success_rate`` too, where a task has one."""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep to store.

    Attributes:
        name: folder under OUT/sweeps.
        runs: what is trained.
        keys: columns that its rows of a table get, such as the regime; a list has a value a run.
    """

    name: str
    runs: tuple[sweep.Run, ...]
    keys: dict[str, Any]


def expand(
    task: Task,
    updates: int,
    methods: Iterable[Method],
    ages: Sequence[int],
    seeds: range,
    scale_steps: float = 1.0,
    *,
    program: Program | None = None,
    **settings: Any,
) -> list[sweep.Run]:
    """Runs of several methods on a task.

    Args:
        task: the task.
        updates: batches an iteration.
        methods: compared methods.
        ages: buffer sizes, in iterations.
        seeds: consecutive seeds.
        scale_steps: factor on the task's steps.
        program: one of ``PROGRAMS``, which all methods then share; None compiles each its own.
        settings: further settings; a list is swept.
    """
    steps = int(task.settings["total_steps"] * scale_steps) // task.block * task.block
    shared = COMMON | task.settings | {"total_steps": steps} | settings
    return [
        run
        for method in methods
        for run in sweep.expand(
            **shared,
            env=task.env,
            objective=program.objective if program else method.objective,
            objective_args=method.parameters
            | ({"which": float(program.names.index(method.objective))} if program else {}),
            updates_per_iteration=updates,
            buffer_size=[age * task.block for age in ages],
            seeds=len(seeds),
            seed_offset=seeds.start,
        )
    ]


def store_sweeps(store: Store, sweeps: Sequence[Sweep], batch_mode: str = "auto") -> None:
    """Trains what is not trained yet; a finished sweep is only looked at."""
    for item in sweeps:
        directory = store.out / "sweeps" / item.name
        exists = (directory / results.CONFIG).exists()
        if finished(store, item) is not None:
            continue
        print(f"  sweep {item.name}: {len(item.runs)} runs", flush=True)
        sweep.run(item.runs, directory, sweep.Options(batch_mode=batch_mode), resume=exists)


def collect(store: Store, sweeps: Sequence[Sweep]) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """Rows of all finished sweeps: runs with their scores, and thinned curves.

    Returns:
        runs, with a column ``auc``, the mean of the learning curve, beside ``final_return``; and
        curves, whose column ``run`` refers to it. None while no sweep is finished.
    """
    tables, curves, offset = [], [], 0
    for item in sweeps:
        directory = store.out / "sweeps" / item.name
        runs = finished(store, item)
        if runs is None:
            continue
        metrics = results.read_metrics(directory)
        returns = metrics.groupby("run")["episode_return"]
        runs["auc"] = runs["run"].map(returns.mean())
        # No episode ended in the last logged points: the newest that did counts.
        runs["final_return"] = runs["final_return"].fillna(runs["run"].map(returns.last()))
        task_block = [run.config.block_size for run in item.runs]
        runs["age"] = runs["buffer_size"] // np.array(task_block)
        if "which" in runs:
            names = PROGRAMS[runs["objective"].iloc[0]].names
            runs["objective"] = [names[int(index)] for index in runs["which"]]
            # A table of runs leaves out what all have alike, and the shared program takes every
            # parameter; a method has only its own.
            given = pd.DataFrame([run.hparams.objective_params for run in item.runs], dtype=float)
            for name in OWN.keys() & set(given):
                runs[name] = given[name].where(runs["objective"].isin(OWN[name]))
        runs["learning_rate"] = [float(run.hparams.learning_rate) for run in item.runs]
        for name, value in item.keys.items():
            runs[name] = value
        for frame in (runs, metrics):
            frame["run"] += offset
        offset += len(runs)
        tables.append(runs.drop(columns=["eval_return", "which"], errors="ignore"))
        present = [name for name in (*CURVES, "success_rate") if name in metrics]
        curves.append(metrics[["run", "env_steps", *present]])
    if not tables:
        return None
    return pd.concat(tables, ignore_index=True), pd.concat(curves, ignore_index=True)


def stored_units(store: Store, table: str, by: Sequence[str]) -> set[tuple[Any, ...]]:
    """Units, told apart by the columns ``by``, that a stored table has rows of."""
    stored = store.stored(table)
    return set() if stored is None else set(stored[list(by)].itertuples(index=False, name=None))


def write_units(
    store: Store,
    by: Sequence[str],
    tables: dict[str, pd.DataFrame],
    curves: dict[str, pd.DataFrame] | None = None,
) -> dict[str, pd.DataFrame]:
    """Stores tables of finished units; what is stored of other units stays.

    So a study goes on where its sweeps are not, from its tables alone.

    Args:
        by: columns that tell units apart.
        tables: by name.
        curves: by name; their column ``run`` refers to that of the one table that has it.

    Returns:
        ``tables`` as stored.
    """
    written, shift, kept_runs = {}, 0, pd.Series(dtype=int)
    for name, fresh in tables.items():
        stored = store.stored(name)
        if stored is not None:
            keys = [pd.MultiIndex.from_frame(frame[list(by)]) for frame in (stored, fresh)]
            stored = stored[~keys[0].isin(keys[1])]
        if stored is not None and not stored.empty:
            if "run" in stored:
                kept_runs, shift = stored["run"], int(stored["run"].max()) + 1
                fresh = fresh.assign(run=fresh["run"] + shift)
            fresh = pd.concat([stored, fresh], ignore_index=True)
        store.write(name, fresh, 6)
        written[name] = fresh
    for name, fresh in (curves or {}).items():
        stored = store.stored(name)
        fresh = fresh.assign(run=fresh["run"] + shift)
        if stored is not None:
            fresh = pd.concat([stored[stored["run"].isin(kept_runs)], fresh], ignore_index=True)
        store.write(name, fresh, 4)
    return written


def take_slice(sweeps: Sequence[Sweep], part: tuple[int, int]) -> list[Sweep]:
    """The i-th of n shares of the sweeps, i from 1."""
    index, count = part
    return list(sweeps[index - 1 :: count])


def finished(store: Store, item: Sweep) -> pd.DataFrame | None:
    """The runs of a sweep, or None while some are not through.

    Raises:
        DataError: its folder holds another sweep.
    """
    directory = store.out / "sweeps" / item.name
    if not (directory / results.CONFIG).exists():
        return None
    try:
        runs = results.read_runs(directory)
    except results.ResultsError:
        return None
    if len(runs) != len(item.runs):
        raise DataError(directory, "holds another sweep; give another --out")
    return runs if runs["status"].isin(["done", "diverged"]).all() else None
