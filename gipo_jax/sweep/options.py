"""How a sweep is executed: settings that do not change what is computed."""

import dataclasses
import re
from typing import Any

from gipo_jax.config import Validator, at_least, flag, one_of, optional, setting

MODES = ("auto", "vmap", "map", "loop")

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def bytes_of(size: Any) -> int | None:
    """Bytes that a text such as ``512MB``, ``8GB`` or ``1000000`` means; None for no such text."""
    found = re.fullmatch(r"\s*(\d*\.?\d+)\s*(?:([KMGT])B)?\s*", str(size), re.IGNORECASE)
    return int(float(found[1]) * 2 ** _UNITS[(found[2] or "").upper()]) if found else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How a sweep is executed. Nothing here changes what is computed, up to rounding."""

    batch_mode: str = setting(
        "auto",
        "runs in vector operations (vmap), one after the other inside the program (map), or one"
        " program call each (loop); auto takes map on CPU and vmap elsewhere",
        one_of(*MODES),
    )
    map_lanes: int | None = setting(
        None, "runs vectorised together in batch mode map; by default 1", optional(at_least(1))
    )
    devices: int | None = setting(
        None, "devices to use; by default all of this host", optional(at_least(1))
    )
    memory_limit: str | None = setting(
        None,
        "memory to plan for; by default what the device, or host, has",
        optional(Validator("a size such as 512MB or 8GB", lambda v: bool(bytes_of(v)))),
    )
    checkpoint_seconds: float = setting(
        60.0,
        "least time between two checkpoints; 0 makes one at every logged point",
        Validator("a number >= 0", lambda v: isinstance(v, int | float) and v >= 0),
    )
    log: str | None = setting(
        None,
        "where logged points go besides the tables: TensorBoard event files, trackio, which is"
        " local, or Weights & Biases",
        optional(one_of("tensorboard", "trackio", "wandb")),
    )
    quiet: bool = setting(False, "show no progress", flag)
