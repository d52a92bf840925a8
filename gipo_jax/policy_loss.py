"""The policy's loss on responses of several tokens, for any trainer in JAX."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient
from jax.typing import ArrayLike

from gipo_jax import diagnostics, loss_terms, objectives, ratio_levels, signatures
from gipo_jax.config import LOSS_AGG_MODES, ConfigError

_OF_NONE = {"ess": 1.0, "mean_weight": 1.0}
"""Metrics over nothing that are not 0."""


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
    **parameters: Any,
) -> tuple[Array, dict[str, Any]]:
    """The policy's loss on answers of several tokens, for any trainer in JAX.

    It is minus the aggregated surrogate of the objective. Gradients flow to ``log_prob`` alone, and
    what stands at padding changes neither the loss nor a metric. A log-probability of -inf under
    one policy is a ratio of 0 or beyond all bounds; a token that has it under both is left out.

    Args:
        log_prob: log pi of each token under the policy in training, ``[batch, tokens]``.
        old_log_prob: log mu under the policy that sampled the answers, same shape.
        advantages: ``[batch, tokens]``, or ``[batch]`` where all tokens of an answer share one.
        response_mask: true or 1 for the tokens of the answers, same shape as ``log_prob``; without
            it all count.
        objective: name or function; see ``objectives``.
        ratio_level: one of ``ratio_levels.LEVELS``; by default the objective's own, which is
            ``token`` for most.
        loss_agg_mode: ``token-mean``, the mean over all tokens; ``seq-mean-token-sum`` and
            ``seq-mean-token-mean``, the mean over answers of the sum or the mean over their tokens;
            ``seq-mean-token-sum-norm``, the mean over answers of the sum, over ``max_tokens``.
            Answers without a token do not count.
        max_tokens: length that ``seq-mean-token-sum-norm`` divides by, > 0; by default the width
            of the arrays, so that the parts of a batch add up to the whole.
        parameters: the objective's own parameters, and ``kernel``, ``log_ratio_start`` (of each
            token, ``[batch, tokens]``) or ``state`` where it takes them. Without ``state`` it is
            the first.

    Returns:
        scalar loss, and metrics: scalars ``policy_loss``, ``kl`` (estimate of KL(mu || pi) per
        token), those of ``diagnostics.ratios`` at the ratio level, and ``state``, the next one, if
        the objective has a state. Over no tokens, or none with an advantage, they are those of
        fresh data: 1 for ``ess`` and ``mean_weight``, 0 for the others.

    Raises:
        ConfigError: arrays that do not fit each other, an unknown name, or a ratio level, parameter
            or mask that the objective cannot have.

    >>> log_prob = jnp.log(jnp.array([[0.5, 0.2], [0.4, 0.1]]))
    >>> old_log_prob = jnp.log(jnp.array([[0.4, 0.2], [0.4, 0.2]]))
    >>> loss, metrics = policy_loss(log_prob, old_log_prob, jnp.array([1.0, -1.0]), sigma=0.5)
    >>> round(float(loss), 3)
    -0.235
    """
    spec = objectives.spec(objective)
    signatures.check_single(spec)
    level = ratio_levels.choose(ratio_level, spec)
    _check_aggregation(loss_agg_mode, max_tokens)
    given = _check_parameters(spec, parameters)
    log_prob, old_log_prob, advantages = map(jnp.asarray, (log_prob, old_log_prob, advantages))
    mask = _check_arrays(spec, log_prob, old_log_prob, advantages, response_mask)

    dtype = jnp.promote_types(log_prob.dtype, jnp.float32)
    log_prob, old_log_prob = log_prob.astype(dtype), stop_gradient(old_log_prob.astype(dtype))
    # Impossible under both policies, a token says nothing.
    mask &= ~(jnp.isneginf(log_prob) & jnp.isneginf(old_log_prob))
    token_log_ratio = log_prob - old_log_prob
    advantage = advantages if advantages.ndim == 2 else advantages[:, None]
    advantage = jnp.where(mask, stop_gradient(advantage.astype(dtype)), 0)
    start = given.pop("log_ratio_start", None)
    bound = loss_terms.bind(spec, level, given, old_log_prob, lambda: start, mask)

    log_ratio = ratio_levels.transform(token_log_ratio, level, mask)
    surrogate, state = bound(log_ratio, advantage)
    loss = -loss_terms.aggregate(surrogate, mask, loss_agg_mode, max_tokens)
    log_ratio = stop_gradient(log_ratio)
    weight = loss_terms.objective_weight(bound, log_ratio, advantage)
    token_log_ratio = jnp.where(mask, ratio_levels.bounded(stop_gradient(token_log_ratio)), 0)
    metrics: dict[str, Any] = {
        "kl": jnp.mean(loss_terms.kl_estimate(token_log_ratio), where=mask)
    } | diagnostics.ratios(log_ratio, advantage, weight, mask)
    # What is undefined would make a logger's mean over batches NaN.
    moved = mask & (advantage != 0)
    for name in metrics:
        counted = jnp.any(moved if name in diagnostics.OF_MOVED else mask)
        metrics[name] = jnp.where(counted, metrics[name], _OF_NONE.get(name, 0.0))
    metrics["policy_loss"] = stop_gradient(loss)
    if spec.initial_state is not None:
        metrics["state"] = state
    return loss, metrics


def _check_aggregation(mode: str, max_tokens: ArrayLike | None) -> None:
    if mode not in LOSS_AGG_MODES:
        raise ConfigError("loss_agg_mode", mode, f"one of {', '.join(LOSS_AGG_MODES)}")
    if max_tokens is None:
        return
    if mode != "seq-mean-token-sum-norm":
        raise ConfigError("max_tokens", max_tokens, f"None with loss_agg_mode {mode!r}")
    if isinstance(max_tokens, int | float) and not 0 < max_tokens < math.inf:
        raise ConfigError("max_tokens", max_tokens, "a finite number > 0")


def _check_parameters(spec: signatures.Spec, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What the objective takes beside log-ratio and advantage, with defaults filled in."""
    takes = {
        "kernel": spec.takes_kernel,
        "state": spec.initial_state is not None,
        "log_ratio_start": "log_ratio_start" in spec.inputs,
    }
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


def _check_arrays(
    spec: signatures.Spec,
    log_prob: Array,
    old_log_prob: Array,
    advantages: Array,
    response_mask: Array | None,
) -> Array:
    """Refuses arrays that do not fit each other; the mask, bool ``[batch, tokens]``."""
    shape = jnp.shape(log_prob)
    if len(shape) != 2 or 0 in shape:
        raise ConfigError("log_prob", shape, "the shape (batch, tokens), neither of them 0")
    if jnp.shape(old_log_prob) != shape:
        raise ConfigError("old_log_prob", jnp.shape(old_log_prob), f"the shape {shape} of log_prob")
    if jnp.shape(advantages) not in (shape, shape[:1]):
        valid = f"the shape {shape} of log_prob, or {shape[:1]}"
        raise ConfigError("advantages", jnp.shape(advantages), valid)
    if response_mask is None:
        return jnp.ones(shape, bool)
    response_mask = jnp.asarray(response_mask)
    if jnp.shape(response_mask) != shape:
        valid = f"the shape {shape} of log_prob"
        raise ConfigError("response_mask", jnp.shape(response_mask), valid)
    if spec.kind == "batch" and not spec.takes_mask:
        valid = "one that takes mask, because its statistic of the batch would count padding"
        raise ConfigError("objective", spec.name, valid)
    return response_mask.astype(bool)
