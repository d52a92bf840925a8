"""Environments from plain functions of one's own, and the one time limit and automatic reset."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gipo_jax.config import ConfigError, count
from gipo_jax.environments import contract
from gipo_jax.environments.interface import Environment, Step

Reset = Callable[[Array], tuple[Any, Any]]
Transition = Callable[[Array, Any, Array], tuple[Any, Any, Any, Any]]


class Timed(NamedTuple):
    """The state that ``functional`` makes: the functions' own, and steps of the episode."""

    state: Any
    elapsed: Array


def functional(
    reset: Reset,
    step: Transition,
    *,
    obs_shape: tuple[int, ...],
    num_actions: int | None = None,
    low: Any = None,
    high: Any = None,
    max_episode_steps: int,
    name: str,
) -> Environment:
    """An environment from pure functions of one episode; the time limit and resets are added.

    Args:
        reset: ``key -> obs [*obs_shape], state``. Observations of bool and uint8 stay bytes, and
            the networks see uint8 from 0 to 1; all others become float32.
        step: ``key, state, action -> obs, state, reward, terminated``, scalars the last two. The
            action is an int32 scalar, or float32 of the shape of ``low``.
        obs_shape: shape of an observation; an image is ``(height, width, channels)``.
        num_actions: number of discrete actions; or else
        low: lower bounds of a Box of actions, and
        high: upper bounds, of one shape; infinite ones need the gaussian head.
        max_episode_steps: steps after which an episode is truncated.
        name: for tables and messages.

    Raises:
        ConfigError: the functions fail, or do not give what is said of them.

    >>> walk = functional(
    ...     lambda key: (jnp.zeros(1), jnp.float32(0)),
    ...     lambda key, x, a: ((x + a - 0.5)[None], x + a - 0.5, x, jnp.abs(x) > 3),
    ...     obs_shape=(1,), num_actions=2, max_episode_steps=50, name="walk",
    ... )  # fmt: skip
    >>> walk.max_episode_steps
    50
    """
    bounds = _actions(name, num_actions, low, high)
    shape = () if bounds is None else bounds[0].shape
    if not count(max_episode_steps):
        raise ConfigError(f"{name}: max_episode_steps", max_episode_steps, count.valid)
    action = jax.ShapeDtypeStruct(shape, jnp.int32 if bounds is None else jnp.float32)
    dtype = _check(name, reset, step, tuple(obs_shape), action)

    def first(keys: Array) -> tuple[Array, Timed]:
        obs, state = jax.vmap(reset)(keys)
        return obs.astype(dtype), Timed(strong(state), jnp.zeros(len(keys), jnp.int32))

    def one(key: Array, timed: Timed, action: Array) -> tuple[Array, Array, Timed, Array, Array]:
        key_step, key_reset = jax.random.split(key)
        obs, state, reward, terminated = step(key_step, timed.state, action)
        state = Timed(strong(state), timed.elapsed + 1)
        return key_reset, obs.astype(dtype), state, jnp.float32(reward), jnp.bool_(terminated)

    def step_all(keys: Array, timed: Timed, action: Array) -> Step:
        keys, obs, state, reward, terminated = jax.vmap(one)(keys, timed, action)
        truncated = (state.elapsed >= max_episode_steps) & ~terminated
        done = terminated | truncated

        def begin() -> tuple[Array, Timed]:
            def choose(new: Array, old: Array) -> Array:
                return jnp.where(done.reshape(-1, *[1] * (new.ndim - 1)), new, old)

            return jax.tree.map(choose, first(keys), (obs, state))

        # A reset may cost more than a step: none is made where no episode ends.
        next_obs, state = jax.lax.cond(jnp.any(done), begin, lambda: (obs, state))
        return Step(state, next_obs, reward, terminated, truncated, obs)

    made = Environment(
        name=name,
        reset=lambda key, num_envs: first(jax.random.split(key, num_envs)),
        step=step_all,
        obs_shape=tuple(obs_shape),
        obs_dtype=dtype,
        action_shape=shape,
        num_actions=num_actions,
        action_low=None if bounds is None else bounds[0].ravel(),
        action_high=None if bounds is None else bounds[1].ravel(),
        max_episode_steps=max_episode_steps,
        own_truncation=False,
    )
    contract.vouch(made)
    return made


def stored_dtype(dtype: Any) -> np.dtype:
    """The type that replay keeps observations in: bytes as they are, all else as float32.

    Raises ConfigError where that would lose a part of them.
    """
    if np.dtype(dtype).kind == "c":
        raise ConfigError("obs", str(dtype), "real numbers, integers or booleans")
    small = np.dtype(dtype) in (np.bool_, np.uint8)
    return np.dtype(dtype) if small else np.dtype(np.float32)


def strong(state: Any) -> Any:
    """Arrays without weak types, which would make a restored state compile anew."""

    def array(x: Any) -> Array:
        is_key = jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)
        return x if is_key else jnp.asarray(x, jnp.asarray(x).dtype)

    return jax.tree.map(array, state)


def _actions(
    name: str, num_actions: Any, low: Any, high: Any
) -> tuple[np.ndarray, np.ndarray] | None:
    """The bounds of a Box, or None for discrete actions."""
    if (num_actions is None) == (low is None) or (low is None) != (high is None):
        given = f"num_actions={num_actions}, low={low}, high={high}"
        raise ConfigError(f"{name}: actions", given, "num_actions, or low and high")
    if num_actions is not None:
        if not count(num_actions):
            raise ConfigError(f"{name}: num_actions", num_actions, count.valid)
        return None
    bounds = np.asarray(low, np.float32), np.asarray(high, np.float32)
    if bounds[0].shape != bounds[1].shape or not np.all(bounds[0] < bounds[1]):
        raise ConfigError(f"{name}: low", low, f"less than high, {high}, and of its shape")
    return bounds


def _check(
    name: str, reset: Reset, step: Transition, obs_shape: tuple[int, ...], action: Any
) -> np.dtype:
    """Refuses functions that do not give what is said of them; the type observations are kept in.

    Nothing is computed.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))

    def begin(key: Array) -> Any:
        obs, state = contract.parts(f"{name}: reset", reset(key), "obs, state")
        return obs, strong(state)

    def go_on(key: Array, state: Any, action: Array) -> Any:
        parts = "obs, state, reward, terminated"
        obs, state, *rest = contract.parts(f"{name}: step", step(key, state, action), parts)
        return obs, strong(state), *rest

    obs, state = contract.shapes(f"{name}: reset", begin, key)
    where = f"{name}: step"
    after, state_after, reward, terminated = contract.shapes(where, go_on, key, state, action)
    wanted = jax.ShapeDtypeStruct(obs_shape, getattr(obs, "dtype", jnp.float32))
    contract.same(f"{name}: obs of reset", obs, wanted)
    contract.same(f"{name}: obs of step", after, obs)
    contract.same(f"{name}: state of step", state_after, state)
    contract.scalar(f"{name}: reward", reward)
    contract.same(f"{name}: terminated", terminated, jax.ShapeDtypeStruct((), jnp.bool_))
    if math.prod(obs_shape) < 1:
        raise ConfigError(f"{name}: obs_shape", obs_shape, "sizes >= 1")
    return stored_dtype(obs.dtype)
