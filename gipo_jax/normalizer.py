"""Standardising observations with their running mean and standard deviation.

A batch is collected under the moments known then and learnt from under later ones. If they differ
much, the log-ratio shows staleness where there is none. Two measures keep that small: the moments
count for little at first (``PRIOR_UPDATES``), and a dimension that hardly varies is not blown up
(``MIN_STD``).
"""

from typing import NamedTuple

import chex
import jax.numpy as jnp
from jax import Array

PRIOR_UPDATES = 10.0  # updates until half standardised (on a logarithmic scale)

MIN_STD = 1e-2  # Least standard deviation that observations are divided by


BOUND = 10.0  # Largest absolute value of a normalised observation


class Normalizer(NamedTuple):
    """Moments of all observations seen so far."""

    total: Array  # number of observations
    mean: Array  # [*obs_shape]
    squares: Array  # [*obs_shape], sum of squared deviations from the mean
    updates: Array  # number of calls of update


def init(obs_shape: tuple[int, ...]) -> Normalizer:
    """A normaliser that has seen no observation: ``normalize`` only bounds them."""
    zero, zeros = jnp.float32(0), jnp.zeros(obs_shape, jnp.float32)
    return Normalizer(zero, zeros, zeros, zero)


def update(normalizer: Normalizer, obs: Array) -> Normalizer:
    """Adds observations ``[..., *obs_shape]`` (the parallel algorithm of Chan et al., 1979)."""
    chex.assert_tree_shape_suffix(obs, normalizer.mean.shape)
    obs = obs.astype(jnp.float32).reshape(-1, *normalizer.mean.shape)
    added = obs.shape[0]
    mean = jnp.mean(obs, axis=0)
    total = normalizer.total + added
    delta = mean - normalizer.mean
    return Normalizer(
        total,
        normalizer.mean + delta * added / total,
        normalizer.squares
        + jnp.sum((obs - mean) ** 2, axis=0)
        + delta**2 * normalizer.total * added / total,
        normalizer.updates + 1,
    )


def normalize(normalizer: Normalizer, obs: Array) -> Array:
    """Standardises observations ``[..., *obs_shape]`` and bounds them to [-10, 10].

    After n updates the result is (obs - mean) / max(std, MIN_STD)^c + (1 - c) mean, with the last
    mean bounded too and c = n / (n + PRIOR_UPDATES): from the observation at n = 0 to its standard
    score in small steps.
    """
    confidence = normalizer.updates / (normalizer.updates + PRIOR_UPDATES)
    std = jnp.sqrt(normalizer.squares / jnp.maximum(normalizer.total, 1.0))
    scaled = (obs - normalizer.mean) / jnp.maximum(std, MIN_STD) ** confidence
    offset = (1 - confidence) * jnp.clip(normalizer.mean, -BOUND, BOUND)
    return jnp.clip(scaled + offset, -BOUND, BOUND)
