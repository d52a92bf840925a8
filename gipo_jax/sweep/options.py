"""How a sweep is executed: settings that do not change what is computed."""

import dataclasses
from typing import Any

from gipo_jax.config import setting

MODES = ("auto", "vmap", "map", "loop")


def _optional_count(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How a sweep is executed. Nothing here changes what is computed, up to rounding."""

    batch_mode: str = setting(
        "auto",
        "runs in vector operations (vmap), one after the other inside the program (map), or one"
        " program call each (loop); auto takes map on CPU and vmap elsewhere",
        f"one of {', '.join(MODES)}",
        lambda v: v in MODES,
    )
    map_lanes: int | None = setting(
        None,
        "runs vectorised together in batch mode map; by default 1",
        "an integer >= 1",
        _optional_count,
    )
    devices: int | None = setting(
        None, "devices to use; by default all of this host", "an integer >= 1", _optional_count
    )
    memory_limit: str | None = setting(
        None,
        "memory to plan for, such as 8GB; by default what the device, or host, has",
        "a size such as 512MB or 8GB",
        lambda v: v is None or isinstance(v, str),
    )
    checkpoint_seconds: float = setting(
        60.0,
        "least time between two checkpoints; 0 makes one at every logged point",
        "a number >= 0",
        lambda v: isinstance(v, int | float) and v >= 0,
    )
    tensorboard: bool = setting(
        False,
        "also write TensorBoard event files",
        "true or false",
        lambda v: isinstance(v, bool),
    )
    quiet: bool = setting(False, "show no progress", "true or false", lambda v: isinstance(v, bool))
