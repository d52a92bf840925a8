"""Running mean and variance of observations."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class Normalizer(NamedTuple):
    """Moments of all observations seen so far.

    Attributes:
        total: number of observations.
        mean: ``[*obs_shape]``.
        squares: ``[*obs_shape]``, sum of squared deviations from the mean.
    """

    total: Array
    mean: Array
    squares: Array


def init(obs_shape: tuple[int, ...]) -> Normalizer:
    """Moments of nothing: ``normalize`` then leaves observations as they are."""
    return Normalizer(jnp.zeros(()), jnp.zeros(obs_shape), jnp.zeros(obs_shape))


def update(normalizer: Normalizer, obs: Array) -> Normalizer:
    """Adds observations ``[..., *obs_shape]`` (the parallel algorithm of Chan et al., 1979)."""
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
    )


def normalize(normalizer: Normalizer, obs: Array) -> Array:
    """Standardises observations ``[..., *obs_shape]`` and bounds them to [-10, 10]."""
    variance = normalizer.squares / jnp.maximum(normalizer.total, 1.0)
    scale = jnp.where(normalizer.total > 0, jnp.sqrt(variance + 1e-8), 1.0)
    standard = (obs - normalizer.mean) / scale
    return jnp.where(normalizer.total > 0, jnp.clip(standard, -10.0, 10.0), obs)
