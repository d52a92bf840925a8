"""Environments behind one interface: a batch is reset and stepped at once.

- ``interface``: what an environment offers.
- ``gymnax_env``: gymnax, pure JAX.
"""

from gipo_jax.config import Config
from gipo_jax.environments import gymnax_env
from gipo_jax.environments.interface import Environment, Single, Step, single

__all__ = ["Environment", "Single", "Step", "make", "single"]


def make(config: Config) -> Environment:
    """Builds the environment a configuration names.

    Args:
        config: uses ``env`` (a name or a gymnax environment object), ``max_episode_steps`` and
            ``truncation_is_termination``.

    Raises:
        ConfigError: no such environment, or spaces that no network here reads.
    """
    return gymnax_env.make(config)
