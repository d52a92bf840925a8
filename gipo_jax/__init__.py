"""GIPO (arXiv:2603.03955) in JAX: policy objectives for stale replay data, in compiled sweeps."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gipo_jax.agents import Agent

__version__ = "0.2.0"


def load(directory: Any, run: int = 0, *, env: Any = None, objective: Any = None) -> "Agent":
    """A trained run of a sweep's folder; see ``gipo_jax.agents.load``."""
    # Importing gymnax takes seconds and computes; the package itself should do neither.
    from gipo_jax import agents

    return agents.load(directory, run, env=env, objective=objective)
