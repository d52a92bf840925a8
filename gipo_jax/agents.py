"""Trained runs as objects to act with, from a vmapped call or from a sweep's folder."""

import functools
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from gipo_jax import domains, train
from gipo_jax.config import Config, ConfigError, HParams
from gipo_jax.sweep import checkpoint, grid, results


class Agent(NamedTuple):
    """A trained run."""

    config: Config  # its static settings
    hparams: HParams  # its traced settings
    params: Any  # {"policy": ..., "value": ...}
    env: Any  # the environment it was trained in
    # obs [..., *obs_shape], key -> action [..., *action_shape], as the environment's step takes it.
    # With a PRNG key it samples, without one it takes the most likely
    policy: Callable[..., Array]
    evaluate: Callable[..., tuple[Array, Array]]  # key, episodes -> mean return: likeliest, sampled


def agent(
    config: Config, hparams: HParams, state: train.TrainState, run: int | None = None
) -> Agent:
    """The agent that a run of ``train.make_train(config)`` trained.

    Args:
        config: the configuration.
        hparams: what the training function took.
        state: the final state it returned.
        run: which run, where the call was vmapped; None where it was not.
    """
    if run is not None:
        count = state.diverged_at.shape[0] if np.ndim(state.diverged_at) else 0
        if run not in range(count):
            raise ConfigError("run", run, f"a run of the results, 0 to {count - 1}")
        hparams, state = train.select((hparams, state), run)
    domain = train.make(config)
    return _agent(domain, hparams, domain.acting(state))


def load(directory: str | Path, run: int = 0, *, env: Any = None, objective: Any = None) -> Agent:
    """Reads a trained run.

    Args:
        directory: folder of a sweep, which may still be running.
        run: index of the run, as in ``runs.csv``.
        env: the environment object, if the sweep was given one instead of a name.
        objective: the objective's function, if the sweep was given one from no file.

    Raises:
        results.ResultsError: no sweep there, or the run has not finished.
        ConfigError: no such run, or ``env`` or ``objective`` is needed.
    """
    directory = Path(directory).expanduser()
    runs = grid.decode(results.read_config(directory)["groups"], env, objective)
    if run not in range(len(runs)):
        raise ConfigError("run", run, f"a run of the sweep, 0 to {len(runs) - 1}")
    config, hparams = runs[run].config, runs[run].hparams
    domain = train.make(config)
    for folder, members in results.params_folders(directory):  # noqa: B007
        if run in members:
            break
    else:
        raise results.ResultsError(f"run {run} of {directory} has not finished")
    # Those of an earlier version have no checksums.
    if (folder / checkpoint.MANIFEST).exists() and (problem := checkpoint.damage(folder)):
        raise results.ResultsError(f"{folder} is damaged: {problem}")
    acting = jax.eval_shape(lambda: domain.acting(train.init(domain, hparams)))
    count = len(members)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), acting)
    stored = checkpoint.read_arrays(folder / checkpoint.ARRAYS, like)
    mine = jax.tree.map(operator.itemgetter(members.index(run)), stored)
    return _agent(domain, hparams, mine)


def _agent(domain: domains.Domain, hparams: HParams, acting: Any) -> Agent:
    return Agent(
        domain.config,
        hparams,
        acting["params"],
        domain.env_of(hparams),
        functools.partial(domain.choose_action, acting, hparams),
        functools.partial(_evaluate, domain, acting, hparams),
    )


def _evaluate(
    domain: domains.Domain, acting: Any, hparams: HParams, key: Array, episodes: int = 10
) -> tuple[Array, Array]:
    measured = jax.jit(domain.evaluate, static_argnums=3)(acting, hparams, key, episodes)
    return measured["eval_return"], measured["eval_return_sampled"]
