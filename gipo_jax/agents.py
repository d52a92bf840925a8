"""Trained runs as objects: parameters and a policy to call."""

import json
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from gipo_jax import normalizer, train
from gipo_jax.config import Config, ConfigError, HParams
from gipo_jax.environments import Environment
from gipo_jax.sweep import checkpoint, grid, results


class Trained(NamedTuple):
    """A trained run.

    Attributes:
        config: its static settings.
        hparams: its traced settings.
        params: ``{"policy": ..., "value": ...}``.
        env: the environment it was trained in.
        policy: ``obs [..., *obs_shape], key -> action [..., *action_shape]``, as the environment's
            ``step`` takes it. With a PRNG key it samples, without one it takes the most likely.
    """

    config: Config
    hparams: HParams
    params: Any
    env: Environment
    policy: Callable[..., Array]


def load(directory: str | Path, run: int = 0, *, env: Any = None, objective: Any = None) -> Trained:
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
    directory = Path(directory)
    runs = grid.decode(results.read_config(directory)["groups"], env, objective)
    if run not in range(len(runs)):
        raise ConfigError("run", run, f"a run of the sweep, 0 to {len(runs) - 1}")
    config, hparams = runs[run].config, runs[run].hparams
    algorithm = train.make(config)
    for folder in sorted((directory / results.PARAMS).glob("[0-9]*")):
        if folder.suffix or run not in (members := json.loads((folder / "runs.json").read_text())):
            continue
        kept = {
            "params": jax.eval_shape(algorithm.network.init, jax.random.key(0)),
            "normalizer": normalizer.init(algorithm.env.obs_shape),
        }
        like = checkpoint.stacked(kept, len(members))
        stored = checkpoint.read_arrays(folder / checkpoint.ARRAYS, like)
        lane = operator.itemgetter(members.index(run))
        mine = jax.tree.map(lane, stored)
        policy = _policy(algorithm, mine["params"], mine["normalizer"])
        return Trained(config, hparams, mine["params"], algorithm.env, policy)
    raise results.ResultsError(f"run {run} of {directory} has not finished")


def _policy(
    algorithm: train.Algorithm, params: Any, moments: normalizer.Normalizer
) -> Callable[..., Array]:
    head, env = algorithm.head, algorithm.env

    def policy(obs: ArrayLike, key: Array | None = None) -> Array:
        obs = jnp.asarray(obs, jnp.float32)
        if algorithm.config.normalize_obs:
            obs = normalizer.normalize(moments, obs)
        outputs = algorithm.network.policy(params, obs)
        if key is None:
            return head.to_env(head.mode(outputs))
        batch = obs.shape[: obs.ndim - len(env.obs_shape)]
        return head.to_env(head.sample(outputs, head.noise(key, batch)))

    return policy
