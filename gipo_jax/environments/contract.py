"""What is asked of an environment, checked in one line before a program with it is compiled."""

import contextlib
import traceback
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gipo_jax import user_files
from gipo_jax.config import ConfigError
from gipo_jax.environments.interface import Environment, Step, single

_PACKAGE = Path(__file__).parents[1]

LONGEST_CHECK = 10_000
"""Steps of a random episode that are tried at most."""


_checked: weakref.WeakSet[Any] = weakref.WeakSet()


def vouch(owner: Any) -> None:
    """Takes it that what was made of an object is right."""
    with contextlib.suppress(TypeError):  # one without weak references is checked each time
        _checked.add(owner)


def check_once(env: Environment, owner: Any) -> None:
    """``check`` for the first environment that is made of an object."""
    if owner not in _checked:
        check(env)
        vouch(owner)


def check(env: Environment) -> None:
    """Refuses an environment whose arrays are not those it declares, or whose episodes are wrong.

    One episode of random actions is played: in its middle ``obs`` and ``final_obs`` must be the
    same, and it must end within ``max_episode_steps``. Raises ConfigError.
    """
    name, one = env.name, single(env)
    keys = jax.eval_shape(lambda: jax.random.key(0))
    obs = jax.ShapeDtypeStruct(tuple(env.obs_shape), env.obs_dtype)
    flag, number = jax.ShapeDtypeStruct((), jnp.bool_), jax.ShapeDtypeStruct((), jnp.float32)
    first, state = shapes(name, lambda key: parts(name, one.reset(key), "obs, state"), keys)
    same(f"{name}: obs of reset", first, obs)
    action = jax.eval_shape(lambda key: _random_action(env, key), keys)
    step: Step = shapes(name, one.step, keys, state, action)
    success = flag if env.reports_success else None
    wanted = (state, obs, number, flag, flag, obs, success)
    for field, given, form in zip(Step._fields, step, wanted, strict=True):
        same(f"{name}: {field}", given, form)

    def episode(key: Array) -> tuple[Array, Array, Array]:
        def go_on(carry: Any) -> Any:
            time, _, agree, state = carry
            key_action, key_step = jax.random.split(jax.random.fold_in(key, time))
            step = one.step(key_step, state, _random_action(env, key_action))
            done = step.terminated | step.truncated
            equal = (step.obs == step.final_obs) | (step.obs != step.obs)
            return time + 1, done, agree & (done | jnp.all(equal)), step.state

        def going(carry: Any) -> Array:
            return ~carry[1] & (carry[0] < min(env.max_episode_steps, LONGEST_CHECK))

        start = jnp.int32(0), jnp.bool_(False), jnp.bool_(True), one.reset(key)[1]
        return jax.lax.while_loop(going, go_on, start)[:3]

    try:
        time, done, agree = jax.jit(episode)(jax.random.key(0))
    except Exception as error:
        raise failed(name, error) from error
    if not agree:
        valid = "the same as obs in mid-episode; a wrapper must change both"
        raise ConfigError(f"{name}: final_obs", "another array", valid)
    if not done and time < LONGEST_CHECK:
        valid = f"set in an episode of max_episode_steps, {env.max_episode_steps}"
        raise ConfigError(f"{name}: terminated or truncated", False, valid)


def check_params(env: Environment, names: Sequence[str]) -> None:
    """Refuses the first parameter that the environment does not have, or that cannot be traced."""
    for name in names:
        where, key = f"env_params: {name}", jax.random.key(0)

        def one_step(value: Array, name: str = name, key: Array = key) -> Any:
            one = single(env.with_params({name: value}))
            obs, state = one.reset(key)
            step = one.step(key, state, _random_action(env, key))
            return (obs, state), (step.obs, step.state)

        try:
            first, after = jax.eval_shape(one_step, 1.0)
        except ConfigError:
            raise
        except Exception as error:
            text = (str(error).strip().splitlines() or [""])[0]
            valid = f"one that can be traced; give it as {env.name}:{name}=VALUE ({text})"
            raise ConfigError("env_params", name, valid) from error
        same(where, after, first)


def _random_action(env: Environment, key: Array) -> Array:
    if env.num_actions is not None:
        return jax.random.randint(key, env.action_shape, 0, env.num_actions)
    assert env.action_low is not None and env.action_high is not None
    normal = jax.random.normal(key, env.action_low.shape)
    return jnp.clip(normal, env.action_low, env.action_high).reshape(env.action_shape)


def parts(where: str, given: Any, names: str) -> Any:
    """What a function returned, refused where it is no tuple of as many parts as named."""
    number = names.count(",") + 1
    if not isinstance(given, tuple) or len(given) != number:
        shown = f"{len(given)} values" if isinstance(given, tuple) else type(given).__name__
        raise ConfigError(where, shown, f"the {number} values {names}")
    return given


def shapes(where: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Shapes of what a function returns, with its errors in one line."""
    try:
        return jax.eval_shape(function, *arguments)
    except Exception as error:
        raise failed(where, error) from error


def failed(where: str, error: Exception) -> ConfigError:
    """The error of code of the user's own in one line; a ConfigError is one already."""
    if isinstance(error, ConfigError):
        return error
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    own = [f for f in files if "site-packages" not in f.parts and _PACKAGE not in f.parents]
    first_line = (str(error).strip().splitlines() or [""])[0]
    place = user_files.located(error, own[-1]) if own else f"code that runs: {first_line}"
    return ConfigError(where, type(error).__name__, str(place))


def same(where: str, given: Any, wanted: Any) -> None:
    """Refuses arrays, or trees of them, of other shapes or types than the wanted ones."""
    structures = [str(jax.tree.structure(tree)) for tree in (given, wanted)]
    if structures[0] != structures[1]:
        raise ConfigError(where, *structures)
    for (path, x), y in zip(jax.tree.leaves_with_path(given), jax.tree.leaves(wanted), strict=True):
        if _form(x) != _form(y):
            raise ConfigError(f"{where}{jax.tree_util.keystr(path)}", _form(x), _form(y))


def scalar(where: str, given: Any) -> None:
    """Refuses what is no scalar number."""
    kinds = jnp.floating, jnp.integer
    if given.shape != () or not any(jnp.issubdtype(given.dtype, kind) for kind in kinds):
        raise ConfigError(where, _form(given), "a scalar number")


def _form(x: Any) -> str:
    """Type and shape, such as float32[3]."""
    return f"{jnp.result_type(x)}{list(jnp.shape(x))}"
