"""gymnax environments: each is pure JAX, and a batch of them is its ``vmap``."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
from gymnax.environments.environment import Environment as Base
from jax import Array

from gipo_jax.config import ConfigError
from gipo_jax.environments import contract, options
from gipo_jax.environments.functional import stored_dtype, strong
from gipo_jax.environments.interface import Environment, Step

_METHODS = ("reset", "step", "observation_space", "action_space", "default_params")
_LIMIT = "max_steps_in_episode"
_PARTS = "obs, state, reward, terminated, truncated, info"


def make(given: Any, limit: int | None) -> Environment:
    """A gymnax environment by name, or given as an object, with its own time limit or another."""
    name = given if isinstance(given, str) else str(getattr(given, "name", type(given).__name__))
    env, params = _load(given, name)
    if limit is not None:
        # BernoulliBandit's is a float, and its spaces do not take another type.
        params = params.replace(**{_LIMIT: type(getattr(params, _LIMIT))(limit)})
    try:
        made = _environment(env, params, name)
    except Exception as error:
        raise contract.failed(name, error) from error
    # gymnax vouches for its own.
    if not type(env).__module__.startswith("gymnax.environments."):
        contract.check_once(made, type(env) if isinstance(given, str) else env)
    return dataclasses.replace(made, vary=lambda values: _vary(env, params, name, values))


def _load(given: Any, name: str) -> tuple[Any, Any]:
    """The object and its parameters."""
    if isinstance(given, str):
        base = options.base_name(given)
        try:
            env, params = gymnax.make(base)
        except OSError as error:
            why = " ".join(str(error).split())
            reason = f"an environment whose data can be loaded ({base}'s could not: {why})"
            raise ConfigError("env", given, reason) from error
        return env, params.replace(**options.read("env", given, _parameters(params)))
    missing = [method for method in _METHODS if not hasattr(given, method)]
    if missing:
        valid = f"a gymnax environment with {', '.join(_METHODS)}; it has no {', '.join(missing)}"
        raise ConfigError("env", name, valid)
    params = given.default_params
    if not hasattr(params, _LIMIT) or not hasattr(params, "replace"):
        raise ConfigError("env", name, f"default_params, a gymnax EnvParams with {_LIMIT}")
    return given, params


def _parameters(params: Any) -> dict[str, Any]:
    """Parameters that may be set, with their values."""
    kinds = bool | int | float | str
    return {k: v for k, v in vars(params).items() if k != _LIMIT and isinstance(v, kinds)}


def _vary(env: Any, params: Any, name: str, values: Mapping[str, Any]) -> Environment:
    """The environment with other numeric parameters, which may be traced."""
    known = {k: v for k, v in _parameters(params).items() if type(v) in (int, float)}
    for key in values:
        if key not in known:
            raise ConfigError("env_params", key, options.valid(name, known))
    types = {key: jnp.int32 if isinstance(known[key], int) else jnp.float32 for key in values}
    traced = {key: jnp.asarray(value, types[key]) for key, value in values.items()}
    try:
        return _environment(env, params.replace(**traced), name)
    except jax.errors.JAXTypeError as error:
        valid = "none that decide the spaces, which go into the name"
        raise ConfigError("env_params", ", ".join(values), f"{valid}, {name}:NAME=VALUE") from error


def _environment(env: Any, params: Any, name: str) -> Environment:
    """The environment with these parameters."""
    encode, obs_shape, obs_dtype = _observations(
        name, env.observation_space(params), type(env).__module__
    )
    action_space = env.action_space(params)
    num_actions, low, high = _actions(name, action_space)

    def reset_one(key: Array) -> tuple[Array, Any]:
        obs, state = contract.parts(f"{name}: reset", env.reset(key, params), "obs, state")
        return encode(obs), strong(state)

    def step_one(key: Array, state: Any, action: Array) -> Step:
        stepped = contract.parts(f"{name}: step", env.step(key, state, action, params), _PARTS)
        obs, state, reward, terminated, truncated, info = stepped
        terminated, truncated = jnp.asarray(terminated, bool), jnp.asarray(truncated, bool)
        return Step(
            state=strong(state),
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
        max_episode_steps=int(getattr(params, _LIMIT)),
        own_truncation=getattr(type(env), "is_truncated", None) is not Base.is_truncated,
    )


def _is(space: Any, kind: str) -> bool:
    """Whether a space is a Box, or a Discrete one that counts from 0, of whatever library."""
    names = [cls.__name__ for cls in type(space).__mro__]
    return kind in names and not getattr(space, "start", 0)


def _observations(
    name: str, space: Any, module: str
) -> tuple[Callable[[Array], Array], tuple[int, ...], np.dtype]:
    """How to encode an observation, and the shape and type it then has."""
    if _is(space, "Discrete"):
        return lambda obs: jax.nn.one_hot(obs, space.n), (int(space.n),), np.dtype(np.float32)
    if not _is(space, "Box"):
        raise ConfigError("env", name, f"Box or Discrete observations, not {space}")
    # A byte each in replay instead of four, for gymnax's MinAtar too: zeros and ones as floats.
    minatar = module.startswith("gymnax.environments.minatar.")
    dtype = np.dtype(np.bool_) if minatar else stored_dtype(space.dtype)

    def encode(obs: Array) -> Array:
        if dtype.itemsize == 1 and not minatar and jnp.result_type(obs) != dtype:
            valid = f"{dtype}, as its observation space says"
            raise ConfigError(f"{name}: type of obs", str(jnp.result_type(obs)), valid)
        return jnp.asarray(obs, dtype)

    return encode, tuple(space.shape), dtype


def _actions(name: str, space: Any) -> tuple[int | None, np.ndarray | None, np.ndarray | None]:
    """Number of discrete actions, or the bounds of a Box, flattened."""
    if _is(space, "Discrete"):
        return int(space.n), None, None
    if not _is(space, "Box"):
        raise ConfigError("env", name, f"Discrete or Box actions, not {space}")
    low = np.broadcast_to(np.asarray(space.low, np.float32), space.shape).ravel()
    high = np.broadcast_to(np.asarray(space.high, np.float32), space.shape).ravel()
    return None, low, high
