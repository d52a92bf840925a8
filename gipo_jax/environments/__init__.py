"""Environments behind one interface: a batch is reset and stepped at once.

- ``interface``: what an environment offers.
- ``functional``: one made from functions of your own.
- ``gymnax_env``: gymnax, pure JAX; ``suites``: others in pure JAX, such as brax and Craftax.
- ``envpool_env``: EnvPool, simulators in C++ (Meta-World, Gym MuJoCo, DM Control, Atari).
- ``contract``: what is asked of an environment of your own, ``options``: parameters in names.

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

from gipo_jax import user_files
from gipo_jax.config import Config, ConfigError
from gipo_jax.environments import contract, envpool_env, gymnax_env, suites
from gipo_jax.environments.contract import check_params
from gipo_jax.environments.functional import functional
from gipo_jax.environments.interface import Environment, Single, Step, single
from gipo_jax.environments.options import base_name

__all__ = [
    "Environment",
    "Single",
    "Step",
    "check_params",
    "functional",
    "make",
    "single",
    "uncached",
]


def make(config: Config) -> Environment:
    """Builds the environment that ``config.env`` names, or is.

    A name is gymnax's, of a suite in ``suites.SUITES``, or else EnvPool's, and may set parameters:
    ``NAME:parameter=value,...``.
    One of your own is an ``Environment``, a gymnax environment, a class or function without
    arguments that makes one, or FILE.py:NAME of these, and is checked; see ``contract.check``.
    Raises ConfigError for no such environment, or one that breaks its contract.
    """
    given = user_files.resolve("env", config.env)
    if not isinstance(given, str) and not any(hasattr(given, m) for m in ("step", "step_env")):
        valid = f"an environment or a task, not {type(given).__name__}"
        raise ConfigError("env", config.env, f"{valid}; environments.functional makes one")
    # A training function may be made under a trace; bounds of spaces stay numbers there.
    with jax.ensure_compile_time_eval():
        if isinstance(given, Environment):
            if config.max_episode_steps is not None:
                valid = f"None: {given.name} keeps a limit of its own, {given.max_episode_steps}"
                raise ConfigError("max_episode_steps", config.max_episode_steps, valid)
            contract.check_once(given, given)
            return given
        if isinstance(given, str) and suites.is_suite(given):
            return suites.make(given, config.max_episode_steps)
        if not isinstance(given, str) or base_name(given) in gymnax.registered_envs:
            return gymnax_env.make(given, config.max_episode_steps)
    names = envpool_env.names()
    if names is not None and base_name(given) in names:
        return envpool_env.make(config)
    of_gymnax = f"one of gymnax's names ({', '.join(gymnax.registered_envs)})"
    of_gymnax += f", or of a suite ({'/NAME, '.join(suites.SUITES)}/NAME)"
    if names is None:
        valid = f"one of EnvPool's names, with {envpool_env.EXTRA}, or {of_gymnax}"
        raise ConfigError("env", given, valid)
    close = difflib.get_close_matches(given, [*names, *gymnax.registered_envs], 3, 0.5)
    like = f" (such as {' or '.join(close)})" if close else ""
    raise ConfigError("env", given, f"one of EnvPool's names{like}, or {of_gymnax}")


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
