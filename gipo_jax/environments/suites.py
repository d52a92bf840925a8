"""Suites of environments in pure JAX, each an extra: brax, MuJoCo Playground, Craftax, xminigrid.

Only their ``reset`` and ``step`` of one episode are used, and none of their wrappers: the limit and
resets are those of ``functional``. Parameters follow the name, as in ``brax/ant:backend=spring``.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gipo_jax.config import ConfigError
from gipo_jax.environments import options
from gipo_jax.environments.functional import functional
from gipo_jax.environments.interface import Environment

Maker = Callable[[Any, str, int | None], Environment]


class Suite(NamedTuple):
    """Where a suite comes from."""

    module: str
    extra: str
    make: Maker  # module, name, time limit or None for the suite's own -> environment


def is_suite(name: str) -> bool:
    """Whether a name is of a suite, ``SUITE/NAME``."""
    return name.partition("/")[0] in SUITES


@functools.cache
def make(name: str, limit: int | None) -> Environment:
    """The environment of a name ``SUITE/NAME:parameter=value,...``. Raises ConfigError."""
    suite = SUITES[name.partition("/")[0]]
    try:
        module = importlib.import_module(suite.module)
    except ImportError as error:
        valid = f'a name whose suite is installed: pip install "gipo_jax[{suite.extra}]" ({error})'
        raise ConfigError("env", name, valid) from error
    return suite.make(module, name, limit)


def _known(name: str, names: Iterable[str]) -> str:
    """The suite's own name of an environment."""
    own = options.base_name(name).partition("/")[2]
    if own not in names:
        raise ConfigError("env", name, f"one of {', '.join(names)}")
    return own


def _scalars(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if isinstance(v, bool | int | float | str)}


def _brax(envs: Any, name: str, limit: int | None) -> Environment:
    maker = envs._envs[_known(name, envs._envs)]
    defaults = {k: p.default for k, p in inspect.signature(maker.__init__).parameters.items()}
    env = maker(**options.read("env", name, _scalars(defaults)))
    return _physics(env, name, limit or 1000)


def _playground(module: Any, name: str, limit: int | None) -> Environment:
    registry = module.registry
    own = _known(name, registry.ALL_ENVS)
    config = registry.get_default_config(own)
    given = options.read("env", name, _scalars(dict(config)))
    try:
        env = registry.load(own, config_overrides=given)
    except Exception as error:
        why = " ".join(str(error).split())
        valid = f"one that can be loaded; locomotion and manipulation download their models ({why})"
        raise ConfigError("env", name, valid) from error
    return _physics(env, name, limit or int(config.episode_length))


def _physics(env: Any, name: str, limit: int) -> Environment:
    """An environment of brax or MuJoCo Playground, whose actions are all from -1 to 1."""
    first = jax.eval_shape(env.reset, jax.eval_shape(lambda: jax.random.key(0)))
    if isinstance(first.obs, dict):
        raise ConfigError("env", name, f"one observation, not several: {', '.join(first.obs)}")

    def reset(key: Array) -> tuple[Any, Any]:
        state = env.reset(key)
        return state.obs, state

    def step(key: Array, state: Any, action: Array) -> tuple[Any, Any, Any, Any]:
        state = env.step(state, action)
        return state.obs, state, state.reward, state.done > 0

    return functional(
        reset, step, obs_shape=first.obs.shape, low=[-1.0] * env.action_size,
        high=[1.0] * env.action_size, max_episode_steps=limit, name=name,
    )  # fmt: skip


_CRAFTAX = [f"Craftax-{kind}-v1" for kind in ("Symbolic", "Pixels")]
_CRAFTAX += [name.replace("Craftax", "Craftax-Classic") for name in _CRAFTAX]


def _craftax(module: Any, name: str, limit: int | None) -> Environment:
    env = module.make_craftax_env_from_name(_known(name, _CRAFTAX), auto_reset=False)
    defaults = _scalars(vars(env.default_params))
    own = int(defaults.pop("max_timesteps"))
    # Its flag would mix the time limit with death.
    params = env.default_params.replace(
        max_timesteps=jnp.iinfo(jnp.int32).max, **options.read("env", name, defaults)
    )
    shape = tuple(env.observation_space(params).shape)

    def stored(obs: Array) -> Array:
        """Pixels as bytes, which they were made from."""
        return jnp.round(obs * 255).astype(jnp.uint8) if len(shape) == 3 else obs

    def reset(key: Array) -> tuple[Any, Any]:
        obs, state = env.reset_env(key, params)
        return stored(obs), state

    def step(key: Array, state: Any, action: Array) -> tuple[Any, Any, Any, Any]:
        obs, state, reward, done, _ = env.step_env(key, state, action, params)
        return stored(obs), state, reward, done

    return functional(
        reset, step, obs_shape=shape, num_actions=env.action_space(params).n,
        max_episode_steps=limit or own, name=name,
    )  # fmt: skip


def _xminigrid(module: Any, name: str, limit: int | None) -> Environment:
    from xminigrid.core.constants import NUM_COLORS, NUM_TILES

    own = _known(name, module.registered_environments())
    defaults = _scalars(vars(module.make(own)[1]))
    defaults.pop("max_steps", None)
    given = options.read("env", name, defaults)
    env, params = module.make(own, **given, **({"max_steps": limit} if limit else {}))
    height, width, _ = env.observation_shape(params)

    def planes(obs: Array) -> Array:
        """Tiles and colours, which have no order, as planes of zeros and ones."""
        tiles, colors = jnp.moveaxis(obs, -1, 0)
        hot = [jax.nn.one_hot(tiles, NUM_TILES), jax.nn.one_hot(colors, NUM_COLORS)]
        return jnp.concatenate(hot, axis=-1).astype(bool)

    def reset(key: Array) -> tuple[Any, Any]:
        timestep = env.reset(params, key)
        return planes(timestep.observation), timestep

    def step(key: Array, state: Any, action: Array) -> tuple[Any, Any, Any, Any]:
        timestep = env.step(params, state, action)
        return planes(timestep.observation), timestep, timestep.reward, timestep.discount == 0

    return functional(
        reset, step, obs_shape=(height, width, NUM_TILES + NUM_COLORS),
        num_actions=env.num_actions(params), max_episode_steps=int(params.max_steps), name=name,
    )  # fmt: skip


SUITES = {
    "brax": Suite("brax.envs", "brax", _brax),
    "playground": Suite("mujoco_playground", "brax", _playground),
    "craftax": Suite("craftax.craftax_env", "craftax", _craftax),
    "xminigrid": Suite("xminigrid", "xminigrid", _xminigrid),
}
