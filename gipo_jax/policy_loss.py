"""The policy's loss on responses of several tokens, for any trainer in JAX."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient
from jax.typing import ArrayLike

from gipo_jax import diagnostics, loss_terms, objectives, ratio_levels, segments, signatures
from gipo_jax.config import LOSS_AGG_MODES, ConfigError

RANKED = 1024  # Tokens that percentiles are taken of

# By the names of trainers, the ratio levels at which a rollout policy is corrected for
ROLLOUT_LEVELS = {"token": "token", "sequence": "joint", "mean": "sequence"}
ROLLOUT_MODES = ("truncate", "mask")
ROLLOUT_BOUNDS = (0.0, 2.0)


def policy_loss(
    log_prob: Array,
    old_log_prob: Array,
    advantages: Array,
    response_mask: Array | None = None,
    *,
    objective: str | signatures.Objective = "gipo",
    ratio_level: str | None = None,
    loss_agg_mode: str = "token-mean",
    max_tokens: ArrayLike | None = None,
    denominator: ArrayLike | None = None,
    segment_ids: Array | None = None,
    rollout_log_prob: Array | None = None,
    rollout_level: str = "token",
    rollout_mode: str = "truncate",
    rollout_bounds: tuple[ArrayLike, ArrayLike] = ROLLOUT_BOUNDS,
    metrics: bool = True,
    **parameters: Any,
) -> tuple[Array, dict[str, Any]]:
    """The policy's loss on responses of several tokens, for any trainer in JAX.

    It is minus the aggregated surrogate of the objective. Gradients flow to ``log_prob`` alone, and
    what stands at padding changes neither the loss nor a metric. A log-probability of -inf under
    one policy is a ratio of 0 or beyond all bounds; a token that has it under both is left out.

    Args:
        log_prob: log pi of each token under the policy in training, ``[batch, tokens]``.
        old_log_prob: log mu under the policy that sampled the responses, same shape.
        advantages: ``[batch, tokens]``, or ``[batch]`` where all tokens of a row share one.
        response_mask: true or 1 for the tokens of the responses, same shape as ``log_prob``;
            without it all count, or all with a segment id other than 0.
        objective: name or function; see ``objectives``. Those of kind ``batch`` take their
            statistic over the arrays that are passed.
        ratio_level: one of ``ratio_levels.LEVELS``; by default the objective's own, which is
            ``token`` for most.
        loss_agg_mode: ``token-mean``, the mean over all tokens; ``seq-mean-token-sum`` and
            ``seq-mean-token-mean``, the mean over responses of the sum or the mean over their
            tokens; ``seq-mean-token-sum-norm``, the mean over responses of the sum, over
            ``max_tokens``. Responses without a token do not count.
        max_tokens: length that ``seq-mean-token-sum-norm`` divides by, > 0; by default the width
            of the arrays, so that the parts of a batch add up to the whole. Packed rows need it.
        denominator: what takes the place of the number of tokens, with ``token-mean``, or of
            responses, > 0. With that of a whole step, the losses and gradients of its micro-batches
            add up to those of the step; with 1 the loss is a sum, to divide by
            ``metrics["denominator"]``.
        segment_ids: for packed rows, which response a token belongs to, integers
            ``[batch, tokens]``, 0 at padding. The tokens of a response lie side by side.
        rollout_log_prob: log-probability under the engine that sampled, where ``old_log_prob`` is
            the trainer's own, same shape. The surrogate of each token is then weighted by
            w = exp(old_log_prob - rollout_log_prob), which is not trained. The three options below
            need it.
        rollout_level: w of the ``token``, of the whole response (``sequence``), or e to the
            ``mean`` of the log-ratios of its tokens.
        rollout_mode: w beyond the bounds is moved to the nearer one (``truncate``), or set to 0
            (``mask``).
        rollout_bounds: lowest and highest w, 0 <= low < high.
        metrics: whether to measure; otherwise the metrics are ``state`` alone.
        parameters: the objective's own parameters, and ``kernel``, ``log_ratio_start`` (of each
            token, ``[batch, tokens]``), ``behavior_distribution`` and ``policy_distribution``
            (log-probabilities ``[batch, tokens, vocab]``) or ``state`` where it takes them. Without
            ``state`` it is the first.

    Returns:
        scalar loss, and metrics: scalars ``policy_loss``, ``kl`` (estimate of KL(mu || pi) per
        token), ``denominator`` (tokens or responses in the arrays), those of ``diagnostics.ratios``
        at the ratio level, with percentiles of about 1,024 tokens, and ``state``, the next one, if
        the objective has a state. With ``rollout_log_prob`` also ``rollout_kl`` (estimate of
        KL(rollout || old) per token), ``rollout_mean_weight`` (of w) and ``rollout_out_of_bounds``
        (share of tokens). Each is 0, not NaN, over nothing, for loggers that take means.

    Raises:
        ConfigError: arrays that do not fit each other, an unknown name, a ratio level, parameter or
            mask that the objective cannot have, or an option that would do nothing.

    >>> log_prob = jnp.log(jnp.array([[0.5, 0.2], [0.4, 0.1]]))
    >>> old_log_prob = jnp.log(jnp.array([[0.4, 0.2], [0.4, 0.2]]))
    >>> loss, metrics = policy_loss(log_prob, old_log_prob, jnp.array([1.0, -1.0]), sigma=0.5)
    >>> round(float(loss), 3)
    -0.235
    """
    spec = objectives.spec(objective)
    signatures.check_single(spec)
    level = ratio_levels.choose(ratio_level, spec)
    _check_aggregation(loss_agg_mode, max_tokens, denominator, segment_ids is not None)
    given = _check_parameters(spec, parameters)
    if rollout_log_prob is None:
        _check_no_rollout(rollout_level, rollout_mode, rollout_bounds)
    log_prob = _array("log_prob", log_prob)
    old_log_prob = _array("old_log_prob", old_log_prob)
    advantages = _array("advantages", advantages)
    if response_mask is not None:
        response_mask = _array("response_mask", response_mask)
    if segment_ids is not None:
        segment_ids = _array("segment_ids", segment_ids, whole=True)
    if rollout_log_prob is not None:
        rollout_log_prob = _array("rollout_log_prob", rollout_log_prob)
    arrays = {"old_log_prob": old_log_prob, "rollout_log_prob": rollout_log_prob}
    mask = _check_arrays(spec, log_prob, arrays, advantages, response_mask, segment_ids)
    first = None if segment_ids is None else segments.starts(segment_ids)

    dtype = jnp.promote_types(log_prob.dtype, jnp.float32)
    log_prob, old_log_prob = log_prob.astype(dtype), stop_gradient(old_log_prob.astype(dtype))
    # Impossible under both policies that a ratio compares, a token says nothing.
    others = [log_prob] if rollout_log_prob is None else [log_prob, rollout_log_prob]
    for other in others:
        mask &= ~(jnp.isneginf(other) & jnp.isneginf(old_log_prob))
    token_log_ratio = log_prob - old_log_prob
    advantage = advantages if advantages.ndim == 2 else advantages[:, None]
    advantage = jnp.where(mask, stop_gradient(advantage.astype(dtype)), 0)
    start = given.pop("log_ratio_start", None)
    of_all = [given.pop(name, None) for name in signatures.DISTRIBUTIONS]
    bound = loss_terms.bind(
        spec,
        level,
        given,
        old_log_prob,
        lambda: start,
        mask,
        first,
        distributions=_check_distributions(spec, jnp.shape(log_prob), *of_all),
    )

    log_ratio = ratio_levels.transform(token_log_ratio, level, mask, first)
    surrogate, state = bound(log_ratio, advantage)
    measured: dict[str, Any] = {}
    if rollout_log_prob is not None:
        rollout_log_ratio = old_log_prob - rollout_log_prob.astype(dtype)
        weight, measured = _rollout_weight(
            rollout_log_ratio, mask, first, rollout_level, rollout_mode, rollout_bounds
        )
        surrogate = surrogate * weight
    loss = -loss_terms.aggregate(surrogate, mask, loss_agg_mode, max_tokens, first, denominator)
    if metrics:
        log_ratio = stop_gradient(log_ratio)
        weight = loss_terms.objective_weight(bound, log_ratio, advantage)
        token_log_ratio = jnp.where(mask, ratio_levels.bounded(stop_gradient(token_log_ratio)), 0)
        measured |= {
            "policy_loss": stop_gradient(loss),
            "kl": jnp.mean(loss_terms.kl_estimate(token_log_ratio), where=mask),
            "denominator": loss_terms.count(mask, loss_agg_mode, first),
        } | diagnostics.ratios(log_ratio, advantage, weight, mask, RANKED)
        # A NaN in what counts is shown.
        any_token, any_moved = jnp.any(mask), jnp.any(mask & (advantage != 0))
        for name, x in measured.items():
            counted = any_moved if name in diagnostics.OF_MOVED else any_token
            measured[name] = jnp.where(counted, x, 0)
    else:
        measured = {}
    if spec.initial_state is not None:
        measured["state"] = state
    return loss, measured


def _rollout_weight(
    log_ratio: Array,
    mask: Array,
    first: Array | None,
    level: str,
    mode: str,
    bounds: tuple[ArrayLike, ArrayLike],
) -> tuple[Array, dict[str, Any]]:
    """Weights of tokens for a rollout policy that is not the old one, and what to report of them.

    Truncated or masked importance sampling between sampler and trainer, as the trainers verl
    (rollout correction) and trl (``vllm_importance_sampling_mode``) describe it.
    """
    if level not in ROLLOUT_LEVELS:
        raise ConfigError("rollout_level", level, f"one of {', '.join(ROLLOUT_LEVELS)}")
    if mode not in ROLLOUT_MODES:
        raise ConfigError("rollout_mode", mode, f"one of {', '.join(ROLLOUT_MODES)}")
    pair = isinstance(bounds, tuple | list) and len(bounds) == 2 and all(map(_is_scalar, bounds))
    numbers = [bound for bound in bounds if isinstance(bound, int | float)] if pair else []
    if not pair or (len(numbers) == 2 and not 0 <= numbers[0] < numbers[1]):
        raise ConfigError("rollout_bounds", bounds, "two numbers, 0 <= low < high")
    low, high = bounds
    log_ratio = stop_gradient(log_ratio)
    x = ratio_levels.transform(log_ratio, ROLLOUT_LEVELS[level], mask, first)
    ratio = jnp.exp(x)
    outside = (ratio < low) | (ratio > high)
    weight = jnp.where(outside, 0, ratio) if mode == "mask" else jnp.clip(ratio, low, high)
    token_log_ratio = jnp.where(mask, ratio_levels.bounded(log_ratio), 0)
    return weight, {
        "rollout_kl": jnp.mean(loss_terms.kl_estimate(token_log_ratio), where=mask),
        "rollout_mean_weight": jnp.mean(weight, where=mask),
        "rollout_out_of_bounds": jnp.mean(outside, where=mask),
    }


def _array(name: str, value: Any, whole: bool = False) -> Array:
    """An array of real numbers, or of integers; ConfigError for anything else."""
    kind = jnp.integer if whole else jnp.floating
    try:
        array = jnp.asarray(value)
        usable = jnp.issubdtype(array.dtype, kind) or (not whole and array.dtype.kind in "iub")
    except (TypeError, ValueError):
        usable = False
    if not usable:
        shown = getattr(value, "dtype", type(value).__name__)
        raise ConfigError(
            name, str(shown), f"an array of {'integers' if whole else 'real numbers'}"
        )
    return array


def _check_no_rollout(level: str, mode: str, bounds: Any) -> None:
    """Refuses options of a rollout policy, where there is none."""
    left_out = isinstance(bounds, tuple) and all(
        isinstance(bound, int | float) and bound == default
        for bound, default in itertools.zip_longest(bounds, ROLLOUT_BOUNDS)
    )
    for name, value, default, same in (
        ("rollout_level", level, "token", level == "token"),
        ("rollout_mode", mode, "truncate", mode == "truncate"),
        ("rollout_bounds", bounds, ROLLOUT_BOUNDS, left_out),
    ):
        if not same:
            raise ConfigError(name, value, f"{default!r} without rollout_log_prob")


def _check_aggregation(
    mode: str, max_tokens: ArrayLike | None, denominator: ArrayLike | None, packed: bool
) -> None:
    if mode not in LOSS_AGG_MODES:
        raise ConfigError("loss_agg_mode", mode, f"one of {', '.join(LOSS_AGG_MODES)}")
    fixed = mode == "seq-mean-token-sum-norm"
    if max_tokens is not None and not fixed:
        raise ConfigError("max_tokens", max_tokens, f"None with loss_agg_mode {mode!r}")
    if max_tokens is None and fixed and packed:
        valid = f"a number > 0 with loss_agg_mode {mode!r} and segment_ids"
        raise ConfigError("max_tokens", max_tokens, valid)
    for name, value in (("max_tokens", max_tokens), ("denominator", denominator)):
        usable = value is None or _is_scalar(value)
        if not usable or (isinstance(value, int | float) and not 0 < value < math.inf):
            raise ConfigError(name, value, "a finite number > 0")


def _is_scalar(value: Any) -> bool:
    """Whether a value is a number, traced or not."""
    return isinstance(value, int | float) or (hasattr(value, "dtype") and jnp.ndim(value) == 0)


def _check_parameters(spec: signatures.Spec, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What the objective takes beside log-ratio and advantage, with defaults filled in."""
    takes = {
        "kernel": spec.takes_kernel,
        "state": spec.initial_state is not None,
        "log_ratio_start": "log_ratio_start" in spec.inputs,
    } | {name: name in spec.inputs for name in signatures.DISTRIBUTIONS}
    special = {name: x for name, x in parameters.items() if takes.get(name)}
    own = {name: x for name, x in parameters.items() if name not in special}
    # Of arrays, traced or not, only the names can be checked.
    numbers = {n: x for n, x in own.items() if n not in spec.params or not hasattr(x, "dtype")}
    signatures.check_params(spec, numbers)
    if takes["log_ratio_start"] and "log_ratio_start" not in special:
        valid = f"an array [batch, tokens], because {spec.name} takes it"
        raise ConfigError("log_ratio_start", None, valid)
    given = spec.params | own
    if takes["state"]:
        special.setdefault("state", signatures.first_state(spec, given))
    return given | special


def _check_distributions(
    spec: signatures.Spec, shape: tuple[int, ...], behavior: Array | None, policy: Array | None
) -> tuple[Any, Any] | None:
    """Refuses log-probabilities of all tokens that are missing or of other tokens."""
    if not spec.takes_distributions:
        return None
    vocab = None
    for name, x in zip(signatures.DISTRIBUTIONS, (behavior, policy), strict=True):
        if name in spec.inputs:
            found = () if x is None else jnp.shape(x)
            if len(found) != 3 or found[:2] != shape or vocab not in (None, found[2]):
                valid = f"log-probabilities {(*shape, vocab or 'vocab')}, as {spec.name} takes them"
                raise ConfigError(name, found or None, valid)
            vocab = found[2]
    return behavior, policy


def _check_arrays(
    spec: signatures.Spec,
    log_prob: Array,
    others: Mapping[str, Array | None],
    advantages: Array,
    response_mask: Array | None,
    segment_ids: Array | None,
) -> Array:
    """Refuses arrays that do not fit each other; the mask, bool ``[batch, tokens]``."""
    shape = jnp.shape(log_prob)
    if len(shape) != 2 or 0 in shape:
        raise ConfigError("log_prob", shape, "the shape (batch, tokens), neither of them 0")
    same = {**others, "response_mask": response_mask, "segment_ids": segment_ids}
    for name, array in same.items():
        if array is not None and jnp.shape(array) != shape:
            raise ConfigError(name, jnp.shape(array), f"the shape {shape} of log_prob")
    packed = segment_ids is not None
    if jnp.shape(advantages) not in ((shape,) if packed else (shape, shape[:1])):
        valid = f"the shape {shape} of log_prob" + ("" if packed else f", or {shape[:1]}")
        raise ConfigError("advantages", jnp.shape(advantages), valid)
    if packed and spec.whole_rows:
        valid = f"None, because {spec.name} takes sums over a row of one response"
        raise ConfigError("segment_ids", shape, valid)
    if response_mask is None and segment_ids is None:
        return jnp.ones(shape, bool)
    if spec.kind == "batch" and not spec.takes_mask:
        valid = "one that takes mask, because its statistic of the batch would count padding"
        raise ConfigError("objective", spec.name, valid)
    mask = jnp.ones(shape, bool) if response_mask is None else response_mask.astype(bool)
    return mask if segment_ids is None else mask & (segment_ids != 0)
