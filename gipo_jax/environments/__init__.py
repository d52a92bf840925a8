"""Environments behind one interface: a batch is reset and stepped at once.

- ``interface``: what an environment offers.
- ``gymnax_env``: gymnax, pure JAX.
- ``envpool_env``: EnvPool, simulators in C++ (Meta-World, Gym MuJoCo, DM Control, Atari).

A simulator outside JAX needs pools that are made before a program is compiled::

    env = environments.open_pools(environments.make(config), keys)   # the keys of later resets
    ...                                                              # compile, train
    environments.close_pools(env)                                    # when no program needs them

For an environment in pure JAX these functions do nothing, so that callers need not ask.
"""

import contextlib
import difflib
import math
from collections.abc import Iterator
from typing import Any

import gymnax
import jax
import numpy as np
from jax import Array

from gipo_jax.config import Config, ConfigError
from gipo_jax.environments import envpool_env, gymnax_env
from gipo_jax.environments.interface import Environment, Simulator, Single, Step, single

__all__ = [
    "Environment",
    "Simulator",
    "Single",
    "Step",
    "close_pools",
    "make",
    "open_pools",
    "restore",
    "resume_gap",
    "single",
    "uncached",
]


def make(config: Config) -> Environment:
    """Builds the environment a configuration names.

    A name is gymnax's, or else EnvPool's, which can have options: ``NAME:option=value,...``.

    Args:
        config: uses ``env`` (a name or a gymnax environment object), ``num_envs``,
            ``max_episode_steps`` and ``truncation_is_termination``.

    Raises:
        ConfigError: no such environment, or spaces that no network here reads.
    """
    if not isinstance(config.env, str) or config.env in gymnax.registered_envs:
        # A training function may be made under a trace; bounds of spaces stay numbers there.
        with jax.ensure_compile_time_eval():
            return gymnax_env.make(config)
    names = envpool_env.names()
    if names is not None and envpool_env.base_name(config.env) in names:
        return envpool_env.make(config)
    of_gymnax = f"one of gymnax's names ({', '.join(gymnax.registered_envs)})"
    if names is None:
        valid = f"one of EnvPool's names, with {envpool_env.EXTRA}, or {of_gymnax}"
        raise ConfigError("env", config.env, valid)
    close = difflib.get_close_matches(config.env, [*names, *gymnax.registered_envs], 3, 0.5)
    like = f" (such as {' or '.join(close)})" if close else ""
    raise ConfigError("env", config.env, f"one of EnvPool's names{like}, or {of_gymnax}")


def open_pools(env: Environment, keys: Array, devices: int = 1, axis: str = "runs") -> Environment:
    """Makes the simulators of an environment outside JAX; gives any other back as it is.

    Args:
        env: from ``make``. It serves only to find shapes and types until its pools are open.
        keys: ``[runs]``, the keys that ``reset`` will be called with, each as often as it is here.
        devices: devices that share the runs evenly, in order. Each has a pool of its own.
        axis: with several devices, the mesh axis that ``jax.shard_map`` runs them along.

    Returns:
        the same environment, whose ``reset`` and ``step`` may be compiled. Every key starts once:
        a second ``reset`` with it raises ``envpool_env.PoolError``, because a simulator cannot go
        back to its first random numbers.

    Raises:
        ConfigError: the runs cannot be shared evenly. So does ``reset``, when it is traced on a
            mesh of another number of devices.
    """
    return env if env.simulator is None else env.simulator.open_pools(keys, devices, axis)


def close_pools(env: Environment) -> None:
    """Ends the simulators of ``open_pools``; programs compiled with them must not run again."""
    if env.simulator is not None:
        env.simulator.close_pools()


def restore(env: Environment, state: Any, obs: Any) -> tuple[Any, Any, np.ndarray]:
    """Brings newly opened simulators to a stored state.

    A simulator is reset as often as the stored one was and takes the actions of its current
    episode again. Where that does not lead to the stored observation, bit for bit, it begins a new
    episode.

    Args:
        env: environment whose pools were opened with the keys of the same runs, in order.
        state: stored states of the runs, arrays ``[runs, ...]`` on the host.
        obs: their observations, ``[runs, envs, *obs_shape]``.

    Returns:
        state and observations to go on from, and ``[runs, envs]`` bool: which began a new episode.
    """
    if env.simulator is None:
        return state, obs, np.zeros(np.shape(obs)[:2], bool)
    return env.simulator.restore(state, obs)


def resume_gap(env: Environment) -> str | None:
    """Why a stopped run would go on with new episodes and not exactly; None where it is exact."""
    return None if env.simulator is None else env.simulator.resume_gap


@contextlib.contextmanager
def uncached(env: Environment) -> Iterator[None]:
    """In here programs with simulators in them are not written to JAX's compilation cache.

    They hold the address of a pool, so no other process could use them.
    """
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    if env.host:
        jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)
