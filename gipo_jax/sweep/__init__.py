"""Sweeps: many runs trained by few programs, in a folder that any interruption leaves usable.

``expand`` turns lists of settings into runs, ``run`` trains them::

    runs = sweep.expand(objective=["gipo", "ppo_clip"], buffer_size=[512, 8192], seeds=5)
    sweep.run(runs, "results")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gipo_jax.sweep.grid import Run as Run
    from gipo_jax.sweep.grid import expand as expand
    from gipo_jax.sweep.interrupts import Interrupted as Interrupted
    from gipo_jax.sweep.options import Options as Options
    from gipo_jax.sweep.runner import Summary as Summary
    from gipo_jax.sweep.runner import run as run

_HOMES = {
    "Interrupted": "interrupts",
    "Options": "options",
    "Run": "grid",
    "Summary": "runner",
    "expand": "grid",
    "run": "runner",
}


def __getattr__(name: str) -> Any:
    # Importing the environments computes, and a cluster must be joined before that.
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"gipo_jax.sweep.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
