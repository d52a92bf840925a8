"""What an objective's signature says: its parameters, inputs and state, read and checked here.

An objective is any function ``f(log_ratio, advantage, **parameters) -> surrogate``; ``declare``
adds what its signature cannot say. The formulas are in ``objectives``.
"""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from gipo_jax.config import RATIO_LEVELS, Config, ConfigError, HParams, is_finite, is_positive

Objective = Callable[..., Any]
InitialState = Callable[[Mapping[str, ArrayLike]], Any]

# What an objective may ask for by naming it in its signature, beside log_ratio and advantage
INPUTS = {
    "behavior_log_prob": "log mu(a|s), same shape as log_ratio",
    "log_ratio_start": "log-ratio under the policy at the start of the update phase, same shape",
    "position": "place of the token in its answer, from 1, and 0 at padding; same shape",
    "behavior_distribution": "log mu of every token, one more axis than log_ratio",
    "policy_distribution": "the same of log pi, without a gradient",
    "margin": "of a pair: log pi(right) - log pi(wrong), less the same under the reference policy",
    "other_log_ratio": "of a pair: log-ratio of the wrong answer, where log_ratio is the right's",
}

DISTRIBUTIONS = ("behavior_distribution", "policy_distribution")  # inputs of token tasks

# What an objective's weight depends on
KINDS = {
    "per-sample": "log-ratio and advantage of the sample",
    "batch": "a statistic of the whole batch",
    "other-input": "another input of the sample",
    "pair": "a right and a wrong answer to one prompt",
}

# Names that mean a setting of the run, so that no parameter of an objective can have them
SETTINGS = frozenset(field.name for kind in (Config, HParams) for field in dataclasses.fields(kind))


class Spec(NamedTuple):
    """What an objective's signature says about it, and below that what it declares."""

    name: str  # name in tables and file columns
    function: Objective  # the objective itself
    params: dict[str, float]  # traced parameters and their defaults
    inputs: tuple[str, ...]  # names out of INPUTS that the function takes
    takes_kernel: bool  # whether it takes the static setting kernel
    takes_mask: bool  # whether it takes mask, false at padding, and None where there is none
    kind: str = "per-sample"  # one of KINDS
    source: str = ""  # paper, as an arXiv number, or empty
    positive: tuple[str, ...] = ()  # parameters that must be > 0
    discrete_only: bool = False  # whether it reads probabilities, not densities
    whole_rows: bool = False  # whether it sums over a row of tokens, which must be one response
    initial_state: InitialState | None = None  # of a stateful one, parameters -> first state
    ratio_level: str = "token"  # the one of config.RATIO_LEVELS that it is meant for
    choices: tuple[str, ...] = ()  # of a switch, the names that its parameter which counts from 0

    @property
    def of_answers(self) -> bool:
        """Whether it is made for answers of several tokens."""
        ordered = self.ratio_level != "token" or "position" in self.inputs
        return ordered or self.takes_distributions

    @property
    def takes_distributions(self) -> bool:
        """Whether it takes the probabilities of all tokens, not only of the one sampled."""
        return any(name in DISTRIBUTIONS for name in self.inputs)


def declare(
    *,
    kind: str = "per-sample",
    source: str = "",
    positive: tuple[str, ...] = (),
    discrete_only: bool = False,
    whole_rows: bool = False,
    initial_state: InitialState | None = None,
    ratio_level: str = "token",
) -> Callable[[Objective], Objective]:
    """Attaches to an objective what its signature cannot say; a plain function needs none of it.

    Args:
        kind: one of ``KINDS``.
        source: paper, as an arXiv number.
        positive: names of parameters that must be > 0, checked before anything compiles.
        discrete_only: true if it reads ``behavior_log_prob`` as the log of a probability, not of a
            density; training then refuses a Gaussian head.
        whole_rows: true if it takes sums along a row of tokens; ``policy_loss`` then refuses rows
            of several responses.
        initial_state: parameters -> first value of ``state``, an array or a pytree of arrays.
        ratio_level: the one it takes unless another is asked for, of ``config.RATIO_LEVELS``.
    """
    said = dict(locals())
    if kind not in KINDS:
        raise ConfigError("kind", kind, f"one of {', '.join(KINDS)}")
    if ratio_level not in RATIO_LEVELS:
        raise ConfigError("ratio_level", ratio_level, f"one of {', '.join(RATIO_LEVELS)}")

    def attach(function: Objective) -> Objective:
        function.declared = said  # type: ignore[attr-defined]
        return function

    return attach


def declared(objective: Objective) -> dict[str, Any]:
    """The arguments of an objective's ``declare``."""
    return getattr(_named(objective), "declared", {})


def _named(objective: Objective) -> Objective:
    """The function inside partial applications, from the first that has a name."""
    while isinstance(objective, functools.partial) and not hasattr(objective, "__name__"):
        objective = objective.func
    return objective


def spec(objective: Objective) -> Spec:
    """Reads an objective's name, parameters and needs off its signature and declaration.

    Raises ConfigError where training could not call it, or a parameter has the name of a setting.
    """
    inner, said = _named(objective), declared(objective)
    name = getattr(inner, "__name__", type(inner).__name__)
    try:
        parameters = dict(inspect.signature(objective).parameters)
    except (TypeError, ValueError):
        parameters = {}
    if list(parameters)[:2] != ["log_ratio", "advantage"]:
        valid = "a function whose first two parameters are log_ratio and advantage"
        raise ConfigError("objective", name, valid)
    # What is bound stays bound, also against a setting of the run.
    bound = objective.keywords if isinstance(objective, functools.partial) else {}
    params: dict[str, float] = {}
    inputs: list[str] = []
    for key, parameter in list(parameters.items())[2:]:
        if key in INPUTS:
            inputs.append(key)
        elif key in ("kernel", "mask", "state"):
            continue
        elif key in SETTINGS:
            valid = f"another name for this parameter, because {key} is a setting of every run"
            raise ConfigError(f"objective {name}", key, valid)
        elif isinstance(parameter.default, int | float) and not isinstance(parameter.default, bool):
            params[key] = float(parameter.default)
        else:
            valid = f"a parameter with a numeric default, or one of {', '.join(INPUTS)}"
            raise ConfigError(f"objective {name}", key, valid)
    if ("state" in parameters) != (said.get("initial_state") is not None):
        valid = "a parameter 'state' together with declare(initial_state=...)"
        raise ConfigError(f"objective {name}", "state", valid)
    for key in said.get("positive", ()):
        if key not in params:
            valid = f"declare(positive=...) to name its own parameters ({', '.join(params)})"
            raise ConfigError(f"objective {name}", key, valid)
    return Spec(
        name=name,
        function=objective,
        params=params,
        inputs=tuple(inputs),
        takes_kernel="kernel" in parameters and "kernel" not in bound,
        takes_mask="mask" in parameters,
        **said,
    )


def switch(specs: Sequence[Spec]) -> Objective:
    """An objective that is the one of index ``which`` in ``specs``; see ``objectives.switch``."""
    name = "+".join(spec.name for spec in specs)
    levels = {spec.ratio_level for spec in specs}
    if len(levels) > 1:
        raise ConfigError("objective", name, f"some of one ratio level, not {', '.join(levels)}")
    for spec in specs:
        check_single(spec)
    defaults: dict[str, set[float]] = {}
    for spec in specs:
        for key, default in spec.params.items():
            defaults.setdefault(key, set()).add(default)
    params = {key: values.pop() for key, values in defaults.items() if len(values) == 1}
    stateful = [spec for spec in specs if spec.initial_state is not None]

    def chosen(log_ratio: Array, advantage: Array, which: ArrayLike, **given: Any) -> Any:
        state = given.get("state", {})

        def apply(spec: Spec) -> tuple[Array, Any]:
            takes = {*spec.inputs, *spec.params, *("kernel",) * spec.takes_kernel}
            takes |= {"mask"} if spec.takes_mask else set()
            own = {key: value for key, value in given.items() if key in takes}
            if spec.initial_state is None:
                return evaluate(spec, log_ratio, advantage, **own)[0], state
            result, new = evaluate(spec, log_ratio, advantage, state=state[spec.name], **own)
            return result, state | {spec.name: new}

        branches = [functools.partial(apply, spec) for spec in specs]
        result, state = jax.lax.switch(jnp.asarray(which, jnp.int32), branches)
        return (result, state) if stateful else result

    needs = ["log_ratio", "advantage", *dict.fromkeys(n for spec in specs for n in spec.inputs)]
    needs += ["state"] * bool(stateful)
    optional: dict[str, Any] = {"which": 0.0} | params
    optional |= {"kernel": "gaussian"} if any(spec.takes_kernel for spec in specs) else {}
    optional |= {"mask": None} if any(spec.takes_mask for spec in specs) else {}
    parameter = functools.partial(inspect.Parameter, kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
    chosen.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [*map(parameter, needs), *(parameter(n, default=x) for n, x in optional.items())]
    )
    chosen.__name__ = name
    kinds = {spec.kind for spec in specs}
    chosen.declared = {  # type: ignore[attr-defined]
        "kind": next(kind for kind in ("batch", "other-input", "per-sample") if kind in kinds),
        "positive": tuple(n for n in params if any(n in spec.positive for spec in specs)),
        "discrete_only": any(spec.discrete_only for spec in specs),
        "whole_rows": any(spec.whole_rows for spec in specs),
        "initial_state": _states(stateful) if stateful else None,
        "ratio_level": levels.pop(),
        "choices": tuple(spec.name for spec in specs),
    }
    return chosen


def _states(specs: Sequence[Spec]) -> InitialState:
    """First states of several objectives by name."""

    def initial_state(params: Mapping[str, ArrayLike]) -> dict[str, Any]:
        own = {spec.name: {k: params.get(k, v) for k, v in spec.params.items()} for spec in specs}
        return {spec.name: first_state(spec, own[spec.name]) for spec in specs}

    return initial_state


def check_single(spec: Spec) -> None:
    """Refuses an objective of pairs of answers where there are none. Raises ConfigError."""
    if "margin" in spec.inputs:
        valid = "one for single actions or answers; pairs of answers are only on token tasks"
        raise ConfigError("objective", spec.name, valid)


def check_params(spec: Spec, params: Mapping[str, Any]) -> None:
    """Checks values for an objective's own parameters, Python numbers, before anything compiles."""
    for key, value in params.items():
        if key not in spec.params:
            known = ", ".join(spec.params) or "no parameters"
            raise ConfigError(f"parameter of {spec.name}", key, known)
        if key == "which" and spec.choices and value not in range(len(spec.choices)):
            names = ", ".join(f"{i} for {name}" for i, name in enumerate(spec.choices))
            raise ConfigError(key, value, names)
        positive = key in spec.positive
        usable = is_positive(value) if positive else is_finite(value)
        # A default may be infinite.
        if not usable and (isinstance(value, bool) or value != spec.params[key]):
            valid = f"a finite number{' > 0' if positive else ''}, in float32"
            raise ConfigError(key, value, valid)


def first_state(spec: Spec, params: Mapping[str, ArrayLike]) -> Any:
    """First state of a stateful objective, arrays of definite types; ``()`` for any other."""
    if spec.initial_state is None:
        return ()
    try:
        state = jax.tree.map(jnp.asarray, spec.initial_state(params))
    except Exception as error:
        valid = f"a function of the parameters that gives arrays; {type(error).__name__}: {error}"
        raise ConfigError(f"objective {spec.name}", "initial_state", valid) from error
    # A weak type, as of jnp.asarray(1.0), would change in the first update.
    return jax.tree.map(lambda x: x.astype(x.dtype), state)


def evaluate(spec: Spec, log_ratio: Array, advantage: Array, **given: Any) -> tuple[Array, Any]:
    """Calls an objective and checks what it returns, since any user may have written it.

    ``given`` is all that it takes beside log-ratio and advantage, which have one shape. Returns the
    surrogate, of that shape, and the next state, ``()`` where there is none.
    """
    name = f"objective {spec.name}"
    result, state = spec.function(log_ratio, advantage, **given), ()
    if spec.initial_state is not None:
        if not isinstance(result, tuple) or len(result) != 2:
            raise ConfigError(name, _type_and_shape(result), "a pair (surrogate, new state)")
        result, state = result
        with contextlib.suppress(ValueError):  # another structure, which is refused below
            state = jax.tree.map(_in_type_of, given["state"], state)
        before, after = (jax.tree.map(_type_and_shape, tree) for tree in (given["state"], state))
        if before != after:
            raise ConfigError(name, after, f"a new state like the one before, {before}")
    surrogate, wanted = _type_and_shape(result), _type_and_shape(log_ratio)
    if surrogate != wanted:
        valid = f"a surrogate {wanted}, one number for each log-ratio"
        raise ConfigError(name, surrogate, valid)
    return result, state


def _in_type_of(before: Any, new: Any) -> Any:
    """A new state in the floating-point type of the one before, which float64 data would widen."""
    floats = [isinstance(x, Array) and jnp.issubdtype(x.dtype, jnp.floating) for x in (before, new)]
    return new.astype(before.dtype) if all(floats) else new


def _type_and_shape(value: Any) -> str:
    """An array's type and shape in words, or the type of anything else."""
    if isinstance(value, Array):
        return f"{value.dtype}{list(value.shape)}"
    return "None" if value is None else type(value).__name__
