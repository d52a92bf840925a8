"""Several objectives as one, so that the methods of a study share one compiled program a task.

An objective is part of a compiled program. Where many of them meet on many tasks, compiling takes
longer than training; here the choice among them is a traced number. The folder of a sweep keeps the
checksum of this file, so nothing else is in it.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gipo_jax import objectives


def switch(title: str, *names: str, **parameters: float) -> Any:
    """Make the objective that is ``names[which]``, ``which`` being its first parameter.

    Args:
        title: name of the objective in tables and files.
        names: objectives; also the attribute ``names`` of the result.
        parameters: parameters that can be set, and their defaults. Each goes to the objectives
            that have it, and the other parameters keep the defaults of their objectives.
    """
    specs = [objectives.spec(name) for name in names]
    inputs = list(dict.fromkeys(key for spec in specs for key in spec.inputs))
    stateful = [spec for spec in specs if spec.initial_state is not None]

    def first_states(params: Mapping[str, Any]) -> dict[str, Any]:
        return {spec.name: spec.initial_state(spec.params) for spec in stateful}  # type: ignore[misc]

    def evaluate(log_ratio: Any, advantage: Any, which: Any = 0.0, **given: Any) -> Any:
        state = given.get("state", {})

        def branch(spec: Any) -> Any:
            own = {key: given[key] for key in spec.inputs}
            own |= {key: given.get(key, parameters[key]) for key in parameters.keys() & spec.params}

            def apply() -> Any:
                if spec.initial_state is not None:
                    surrogate, new = spec.function(
                        log_ratio, advantage, state=state[spec.name], **own
                    )
                    return surrogate, state | {spec.name: new}
                surrogate = spec.function(log_ratio, advantage, **own)
                return (surrogate, state) if stateful else surrogate

            return apply

        return jax.lax.switch(jnp.asarray(which, jnp.int32), [branch(spec) for spec in specs])

    required = ["log_ratio", "advantage", *inputs, *(["state"] if stateful else [])]
    optional = {"which": 0.0} | parameters
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    described: Any = evaluate
    described.__name__, described.names = title, names
    described.__signature__ = inspect.Signature(
        [inspect.Parameter(name, kind) for name in required]
        + [inspect.Parameter(name, kind, default=value) for name, value in optional.items()]
    )
    return objectives.declare(
        kind="other-input" if inputs else "per-sample",
        positive=tuple(p for p in parameters if any(p in spec.positive for spec in specs)),
        initial_state=first_states if stateful else None,
        discrete_only=any(spec.discrete_only for spec in specs),
    )(described)


_PAPER = {"sigma": 1.0, "clip_eps": 0.2, "tau_pos": 1.0, "tau_neg": 2.0}

compared = switch("compared", "gipo", "ppo_clip", "sapo", "no_clip", **_PAPER)
"""The four objectives of the paper."""

contenders = switch(
    "contenders",
    *("gipo", "ppo_clip", "sapo", "no_clip", "geppo", "decoupled_ppo", "maspo", "p3o_ess", "m2po"),
    *("proximal_gipo", "following_gipo"),
    **_PAPER | {"sigma_stale": 1.0, "sigma_prox": 0.5, "mean_weight": 0.7},
)
"""The objectives that the project's own are compared with."""

sequence_methods = switch(
    "sequence_methods",
    *("gipo", "ppo_clip", "sapo", "cispo", "tis", "vespo", "no_clip"),
    **_PAPER | {"tau_neg": 1.05},
)
"""The objectives compared on responses of several tokens."""

any_of_them = switch("any_of_them", *objectives.REGISTRY)
"""Every objective of single samples, with its defaults."""
