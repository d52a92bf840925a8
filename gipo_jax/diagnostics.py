"""Health of the importance ratios: how much of the replay data still moves the policy.

Definitions follow GIPO's utilization metrics. U = u is the objective's effective weight. Age is
counted in iterations since the data was collected.
"""

import chex
import jax
import jax.numpy as jnp
from jax import Array

NEAR_ZERO = 1e-3  # Effective weights below this count as contributing nothing
CLIP_EPS = 0.2  # Half the width of PPO's interval in clip_fraction, whatever the objective
NEW_AGE, OLD_AGE = 2, 10  # Data is new up to age 2 and old from age 10 on, in iterations


OF_MOVED = (
    "ess",
    "near_zero_fraction",
    "masked_fraction",
    "suppressed_fraction",
    "mean_weight",
)
"""What ``ratios`` takes over samples with an advantage: others have no effective weight."""


def effective_sample_size(weight: Array, where: Array | None = None) -> Array:
    """(sum u)^2 / (n sum u^2) in [0, 1]; 0 where every weight is 0, NaN over no samples."""
    where = jnp.ones_like(weight, bool) if where is None else where
    chex.assert_equal_shape([weight, where])
    # Scaled by the largest, so that neither square overflows nor underflows.
    largest = jnp.max(jnp.abs(weight), where=where, initial=0.0)
    scaled = weight / jnp.where(largest > 0, largest, 1.0)
    total = jnp.sum(scaled, where=where)
    squares = jnp.sum(scaled**2, where=where)
    count = jnp.sum(where)
    size = total**2 / jnp.where(squares > 0, squares, 1.0) / jnp.maximum(count, 1)
    return jnp.where(count > 0, size, jnp.nan)


def ratios(
    log_ratio: Array,
    advantage: Array,
    weight: Array,
    where: Array | None = None,
    ranked: int | None = None,
) -> dict[str, Array]:
    """Health of the ratios of one batch, whatever the age of its samples.

    Args:
        log_ratio: x, any shape.
        advantage: A, same shape.
        weight: effective weight u, same shape.
        where: bool, same shape; the samples that count.
        ranked: about how many samples, evenly spaced in the arrays, the percentiles are taken of;
            None for all. Sorting a large batch takes longer than its loss.

    Returns:
        scalars. Over samples with A other than 0, as others have no u: ``ess``,
        ``near_zero_fraction`` (u below 1e-3), ``masked_fraction`` (u = 0), ``suppressed_fraction``
        (trust weight abs(u) / r below 1e-3), ``mean_weight`` (of u). Over all: ``clip_fraction``
        (what PPO with eps 0.2 would ignore), ``log_ratio_abs_p95`` (95th percentile of abs(x)),
        ``log_ratio_p05`` and ``log_ratio_p95`` (percentiles of x, its two tails). NaN over none.
    """
    where = jnp.ones_like(log_ratio, bool) if where is None else where
    chex.assert_equal_shape([log_ratio, advantage, weight, where])
    ratio = jnp.exp(log_ratio)
    clipped = ((ratio > 1 + CLIP_EPS) & (advantage > 0)) | (
        (ratio < 1 - CLIP_EPS) & (advantage < 0)
    )
    trust_weight = weight * jnp.exp(-jnp.maximum(log_ratio, -80.0))
    counted = _evenly_spaced(jnp.where(where, log_ratio, jnp.nan), ranked)
    # A value of the batch: interpolating between two rounds differently from program to program.
    low, high = jnp.nanpercentile(counted, jnp.array([5.0, 95.0]), method="nearest")
    moved = where & (advantage != 0)
    return {
        "ess": effective_sample_size(weight, moved),
        "near_zero_fraction": jnp.mean(jnp.abs(weight) < NEAR_ZERO, where=moved),
        "masked_fraction": jnp.mean(weight == 0, where=moved),
        "suppressed_fraction": jnp.mean(jnp.abs(trust_weight) < NEAR_ZERO, where=moved),
        "clip_fraction": jnp.mean(clipped, where=where),
        "mean_weight": jnp.mean(weight, where=moved),
        "log_ratio_abs_p95": jnp.nanpercentile(jnp.abs(counted), 95),
        "log_ratio_p05": low,
        "log_ratio_p95": high,
    }


def _evenly_spaced(values: Array, count: int | None) -> Array:
    """At most about so many of the values, from the last axis first."""
    if count is None:
        return values
    for axis in reversed(range(values.ndim)):
        step = min(-(-values.size // count), values.shape[axis])
        values = jax.lax.slice_in_dim(values, 0, values.shape[axis], step, axis)
    return values


def utilization(
    log_ratio: Array,
    advantage: Array,
    weight: Array,
    age: Array,
    where: Array | None = None,
) -> dict[str, Array]:
    """Utilization of one batch drawn from replay: the scalars of ``ratios``, and by age of the
    data.

    ``ess`` and ``near_zero_fraction`` of new and of old data apart (``_new``, ``_old``);
    ``old_share`` and ``old_gradient_share`` (of the sum of u and of abs(u A)); ``policy_age`` and
    ``policy_age_max``. NaN where a group is empty. Arrays are ``[batch, tokens]``, ages in
    iterations ``[batch, 1]``.
    """
    chex.assert_rank(log_ratio, 2)
    chex.assert_equal_shape([log_ratio, advantage, weight])
    chex.assert_shape(age, (log_ratio.shape[0], 1))
    where = jnp.ones_like(log_ratio, bool) if where is None else where
    age = jnp.broadcast_to(age, log_ratio.shape)
    moved = where & (advantage != 0)
    new, old = moved & (age <= NEW_AGE), moved & (age >= OLD_AGE)
    near_zero = jnp.abs(weight) < NEAR_ZERO
    gradient = jnp.abs(weight * advantage)
    return ratios(log_ratio, advantage, weight, where) | {
        "ess_new": effective_sample_size(weight, new),
        "ess_old": effective_sample_size(weight, old),
        "near_zero_fraction_new": jnp.mean(near_zero, where=new),
        "near_zero_fraction_old": jnp.mean(near_zero, where=old),
        "old_share": jnp.sum(weight, where=old) / jnp.sum(weight, where=where),
        "old_gradient_share": jnp.sum(gradient, where=old) / jnp.sum(gradient, where=where),
        "policy_age": jnp.mean(age.astype(jnp.float32), where=where),
        "policy_age_max": jnp.max(age, where=where, initial=0).astype(jnp.float32),
    }


def explained_variance(target: Array, prediction: Array) -> Array:
    """1 - Var[target - prediction] / Var[target]; NaN where the target does not vary."""
    chex.assert_equal_shape([target, prediction])
    variance = jnp.var(target)
    return 1 - jnp.var(target - prediction) / jnp.where(variance > 0, variance, jnp.nan)
