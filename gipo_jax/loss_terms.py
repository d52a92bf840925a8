"""Terms of the loss, as pure functions of arrays; ``train.loss`` puts them together."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from gipo_jax import ratio_levels, segments, signatures
from gipo_jax.objectives import clamp_straight_through

# log_ratio, advantage -> surrogate, next state: an objective with all else filled in
SurrogateFunction = Callable[[Array, Array], tuple[Array, Any]]

MAX_KL_RATIO = 20.0  # Ratio at which the KL penalty's gradient stops growing


def bind(
    spec: signatures.Spec,
    ratio_level: str,
    given: Mapping[str, Any],
    behavior_log_prob: Array,
    log_ratio_start: Callable[[], Array] | None = None,
    mask: Array | None = None,
    first: Array | None = None,
    ordered: bool = True,
    distributions: tuple[Array, Array] | None = None,
) -> SurrogateFunction:
    """An objective with its parameters, kernel and state, and those of its inputs it asks for."""
    given = dict(given)

    def at_level(x: Array) -> Array:
        return ratio_levels.transform(x, ratio_level, mask, first)

    if "behavior_log_prob" in spec.inputs:
        given["behavior_log_prob"] = at_level(behavior_log_prob)
    if "log_ratio_start" in spec.inputs:
        assert log_ratio_start is not None
        given["log_ratio_start"] = at_level(log_ratio_start())
    if spec.takes_distributions:
        assert distributions is not None
        named = zip(signatures.DISTRIBUTIONS, distributions, strict=True)
        given |= {name: jax.lax.stop_gradient(x) for name, x in named if name in spec.inputs}
    if spec.takes_mask and mask is not None:
        given["mask"] = mask
    if ordered and "position" in spec.inputs:
        counted = jnp.ones_like(behavior_log_prob, bool) if mask is None else mask
        place = segments.running_sum(counted.astype(int), first)
        given["position"] = jnp.where(counted, place, 0)
    return functools.partial(signatures.evaluate, spec, **given)


def bind_pairs(
    spec: signatures.Spec, given: Mapping[str, Any], log_ratio: Array, other_log_ratio: Array
) -> SurrogateFunction:
    """An objective of pairs of responses as a function of their margins; ``[batch]`` each."""

    def objective(margin: Array, is_pair: Array) -> tuple[Array, Any]:
        inputs = {"margin": margin, "other_log_ratio": other_log_ratio}
        asked = {name: x for name, x in inputs.items() if name in spec.inputs}
        return signatures.evaluate(spec, log_ratio, is_pair, **asked, **given)

    return objective


def objective_weight(objective: SurrogateFunction, log_ratio: Array, advantage: Array) -> Array:
    """Effective weights u: the surrogate's derivative over A, and 0 where A is 0."""
    total = jax.grad(lambda x: jnp.sum(objective(x, advantage)[0]))
    weighted = total(jax.lax.stop_gradient(log_ratio))
    return jnp.where(advantage == 0, 0.0, weighted / jnp.where(advantage == 0, 1.0, advantage))


def aggregate(
    values: Array,
    mask: Array,
    loss_agg_mode: str,
    max_tokens: ArrayLike | None = None,
    first: Array | None = None,
    denominator: ArrayLike | None = None,
) -> Array:
    """One number for values ``[batch, tokens]``, 0 over none; modes as in ``policy_loss``."""
    values = jnp.where(mask, values, 0)
    if loss_agg_mode == "seq-mean-token-mean":
        values = values / jnp.maximum(segments.total(mask.astype(int), first), 1)
    elif loss_agg_mode == "seq-mean-token-sum-norm":
        values = values / (values.shape[1] if max_tokens is None else max_tokens)
    if denominator is None:
        denominator = jnp.maximum(count(mask, loss_agg_mode, first), 1)
    return jnp.sum(values) / denominator


def count(mask: Array, loss_agg_mode: str, first: Array | None = None) -> Array:
    """How many tokens, or responses with a token, the mean of a mode is over."""
    if loss_agg_mode != "token-mean":
        mask &= segments.running_sum(mask.astype(int), first) == 1
    return jnp.sum(mask)


def standardize(advantage: Array) -> Array:
    """Advantages of a batch with mean 0 and population standard deviation 1 (floor 1e-8)."""
    deviation = advantage - jnp.mean(advantage)
    return deviation / jnp.maximum(jnp.std(advantage), 1e-8)


def kl_estimate(log_ratio: Array) -> Array:
    """Estimate of KL(mu || pi) from actions of mu: r - 1 - log r >= 0, with r at most e^20."""
    return jnp.exp(jnp.minimum(log_ratio, 20.0)) - 1 - log_ratio


def kl_penalty(log_ratio: Array) -> Array:
    """``kl_estimate`` to minimise. Its gradient is r - 1, with r bounded to ``MAX_KL_RATIO``.

    Without the bound a few stale samples would decide the whole batch.
    """
    bounded = clamp_straight_through(log_ratio, math.log(MAX_KL_RATIO))
    return jnp.exp(bounded) - 1 - log_ratio
