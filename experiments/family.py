"""All built-in objectives as one, so that their comparison compiles one program a task.

An objective is part of a compiled program; here the choice among them is a traced number. A sweep's
folder remembers the checksum of this file, so nothing else is in it.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gipo_jax import objectives

NAMES = tuple(objectives.REGISTRY)


def _first_states(params: Mapping[str, Any]) -> dict[str, Any]:
    specs = [objectives.spec(name) for name in NAMES]
    return {s.name: s.initial_state(s.params) for s in specs if s.initial_state is not None}


@objectives.declare(kind="other-input", initial_state=_first_states, discrete_only=True)
def any_of_them(
    log_ratio: Array,
    advantage: Array,
    behavior_log_prob: Array,
    log_ratio_start: Array,
    state: dict[str, Any],
    which: float = 0.0,
) -> tuple[Array, dict[str, Any]]:
    """The objective of index ``which`` in ``NAMES``, with its defaults."""
    given = {"behavior_log_prob": behavior_log_prob, "log_ratio_start": log_ratio_start}

    def branch(name: str) -> Any:
        spec = objectives.spec(name)
        inputs = {key: given[key] for key in spec.inputs}

        def apply() -> tuple[Array, dict[str, Any]]:
            if spec.initial_state is None:
                return spec.function(log_ratio, advantage, **inputs), state
            surrogate, new = spec.function(log_ratio, advantage, state=state[name], **inputs)
            return surrogate, state | {name: new}

        return apply

    return jax.lax.switch(jnp.int32(which), [branch(name) for name in NAMES])
