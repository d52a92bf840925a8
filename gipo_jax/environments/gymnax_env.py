"""gymnax environments: each is pure JAX, and a batch of them is its ``vmap``."""

from collections.abc import Callable
from typing import Any

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
from gymnax.environments import spaces
from gymnax.environments.environment import Environment as Base
from jax import Array

from gipo_jax.config import Config, ConfigError
from gipo_jax.environments.interface import Environment, Step


def make(config: Config) -> Environment:
    """Builds a gymnax environment; see ``environments.make``."""
    env, params = _load(config.env)
    name = config.env if isinstance(config.env, str) else env.name
    if config.max_episode_steps is not None:
        # BernoulliBandit's is a float, and its spaces do not take another type.
        kind = float if isinstance(params.max_steps_in_episode, float) else int
        params = params.replace(max_steps_in_episode=kind(config.max_episode_steps))

    obs_space, action_space = env.observation_space(params), env.action_space(params)
    encode, obs_shape, obs_dtype = _observations(name, obs_space, type(env).__module__)
    num_actions, low, high = _actions(name, action_space)

    def reset_one(key: Array) -> tuple[Array, Any]:
        obs, state = env.reset(key, params)
        return encode(obs), _strong(state)

    def step_one(key: Array, state: Any, action: Array) -> Step:
        obs, state, reward, terminated, truncated, info = env.step(key, state, action, params)
        terminated, truncated = jnp.asarray(terminated, bool), jnp.asarray(truncated, bool)
        if config.truncation_is_termination:
            terminated = terminated | truncated
        return Step(
            state=_strong(state),
            obs=encode(obs),
            reward=jnp.asarray(reward, jnp.float32),
            terminated=terminated,
            truncated=truncated & ~terminated,
            final_obs=encode(info["final_observation"]),
        )

    return Environment(
        name=name,
        reset=lambda key, num_envs: jax.vmap(reset_one)(jax.random.split(key, num_envs)),
        step=jax.vmap(step_one),
        obs_shape=obs_shape,
        obs_dtype=obs_dtype,
        action_shape=tuple(action_space.shape),
        num_actions=num_actions,
        action_low=low,
        action_high=high,
        max_episode_steps=int(params.max_steps_in_episode),
        own_truncation=type(env).is_truncated is not Base.is_truncated,
    )


def _load(env: Any) -> tuple[Any, Any]:
    if not isinstance(env, str):
        return env, env.default_params
    try:
        return gymnax.make(env)
    except OSError as error:
        why = " ".join(str(error).split())
        reason = f"an environment whose data can be loaded ({env}'s could not: {why})"
        raise ConfigError("env", env, reason) from error


def _observations(
    name: str, space: Any, module: str
) -> tuple[Callable[[Array], Array], tuple[int, ...], np.dtype]:
    """How to encode an observation, and the shape and type it then has."""
    if isinstance(space, spaces.Discrete):
        return lambda obs: jax.nn.one_hot(obs, space.n), (space.n,), np.dtype(np.float32)
    if not isinstance(space, spaces.Box):
        valid = "an environment with Box or Discrete observations"
        raise ConfigError("env", name, f"{valid}, not {type(space).__name__}")
    # A byte each in replay instead of four, for gymnax's MinAtar too: zeros and ones as floats.
    dtype = np.dtype(space.dtype)
    if module.startswith("gymnax.environments.minatar."):
        dtype = np.dtype(np.bool_)
    elif dtype not in (np.bool_, np.uint8):
        dtype = np.dtype(np.float32)
    return lambda obs: jnp.asarray(obs, dtype), tuple(space.shape), dtype


def _actions(name: str, space: Any) -> tuple[int | None, np.ndarray | None, np.ndarray | None]:
    """Number of discrete actions, or the bounds of a Box, flattened."""
    if isinstance(space, spaces.Discrete):
        return int(space.n), None, None
    if not isinstance(space, spaces.Box):
        valid = "an environment with Discrete or Box actions"
        raise ConfigError("env", name, f"{valid}, not {type(space).__name__}")
    low = np.broadcast_to(np.asarray(space.low, np.float32), space.shape).ravel()
    high = np.broadcast_to(np.asarray(space.high, np.float32), space.shape).ravel()
    return None, low, high


def _strong(state: Any) -> Any:
    """Drops weak types, which would make a restored state compile anew."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.asarray(x).dtype), state)
