"""Environments behind one interface: a batch is reset and stepped at once.

- ``interface``: what an environment offers.
- ``gymnax_env``: gymnax, pure JAX.
- ``envpool_env``: EnvPool, simulators in C++ (Meta-World, Gym MuJoCo, DM Control, Atari).

A simulator outside JAX is made before a program with it is compiled::

    env = environments.make(config).open(keys)   # the keys of later resets
    ...                                          # compile, train
    env.close()                                  # when no program needs it
"""

import contextlib
import difflib
import math
import warnings
from collections.abc import Iterator
from typing import Any

import gymnax
import jax

from gipo_jax.config import Config, ConfigError
from gipo_jax.environments import envpool_env, gymnax_env
from gipo_jax.environments.interface import Environment, Single, Step, single

__all__ = [
    "Environment",
    "Single",
    "Step",
    "make",
    "single",
    "uncached",
]


def make(config: Config) -> Environment:
    """Builds the environment that ``config.env`` names, or is, a gymnax environment object.

    A name is gymnax's, or else EnvPool's, which can have options: ``NAME:option=value,...``.
    Raises ConfigError for no such environment, or spaces that no network here reads.
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


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """In here programs are not written to JAX's compilation cache.

    Those with simulators hold the address of a pool, so no other process could use them.
    """
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)


_RENAMED = {"open_pools": Environment.open, "close_pools": Environment.close}


def __getattr__(name: str) -> Any:
    """Old names, which stay for a release."""
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = _RENAMED[name]
    text = f"{name}(env) is now env.{new.__name__}(); the old name goes with the next release"
    warnings.warn(text, DeprecationWarning, stacklevel=2)
    return new
