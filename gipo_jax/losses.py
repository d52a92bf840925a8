"""The loss of one batch, written as in the paper, and the effective weights that come with it.

    loss =   minus the mean surrogate       the policy objective (GIPO: arXiv:2603.03955)
           - entropy_coef * mean entropy
           + kl_coef * mean KL(mu || pi)
           + value_coef * mean (V - target)^2

mu is the policy that collected the data. Everything here is a pure function of arrays.

One thing differs from the formula. The surrogate takes ``log_ratio + probe``, where ``probe`` is
zero. Its gradient is -u A / n, so one backward pass gives the gradient of the parameters and the
effective weight u of every sample (``effective_weight``).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient
from jax.typing import ArrayLike

from gipo_jax import ratio_levels
from gipo_jax.config import HParams
from gipo_jax.objectives import clamp_straight_through

BoundObjective = Callable[[Array, Array], tuple[Array, Any]]
"""``log_ratio, advantage -> surrogate, next state``: an objective with all else filled in."""

MAX_KL_RATIO = 20.0
"""Ratio at which the KL penalty's gradient stops growing."""


class Batch(NamedTuple):
    """A labelled sample of replay.

    Attributes:
        obs: ``[batch, *obs_shape]``.
        action: ``[batch, tokens]``.
        behavior_log_prob: log mu of each action token, ``[batch, tokens]``.
        advantage: ``[batch]``.
        value_target: ``[batch]``.
        age: iterations since collection, ``[batch]``.
    """

    obs: Array
    action: Array
    behavior_log_prob: Array
    advantage: Array
    value_target: Array
    age: Array


class Losses(NamedTuple):
    """Parts of a loss, scalars, and the next state of the objective."""

    policy_loss: Array
    entropy: Array
    kl: Array
    value_loss: Array
    objective_state: Any


def actor_critic_loss(
    log_prob: Array,
    entropy: Array,
    value: Array,
    batch: Batch,
    advantage: Array,
    objective: BoundObjective,
    hparams: HParams,
    ratio_level: str = "token",
    policy_scale: Array | float = 1.0,
    probe: Array | float = 0.0,
) -> tuple[Array, Losses]:
    """The loss of policy and value on one batch.

    Args:
        log_prob: log pi of the batch's actions, ``[batch, tokens]``.
        entropy: of the policy, per token, same shape.
        value: V(obs), ``[batch]``.
        batch: the sample.
        advantage: as the objective sees it, ``[batch, tokens]``.
        objective: maps log-ratio and advantage to the surrogate.
        hparams: coefficients of the loss.
        ratio_level: see ``ratio_levels``.
        policy_scale: factor on the surrogate.
        probe: zeros ``[batch, tokens]``; see the module's docstring.

    Returns:
        scalar loss, and its parts.
    """
    token_log_ratio = log_prob - batch.behavior_log_prob
    log_ratio = ratio_levels.transform(token_log_ratio, ratio_level)

    surrogate, objective_state = objective(log_ratio + probe, advantage)
    policy_loss = -jnp.mean(surrogate)
    mean_entropy = jnp.mean(entropy)
    kl = jnp.mean(kl_penalty(token_log_ratio))
    value_loss = jnp.mean((value - batch.value_target) ** 2)

    loss = (
        policy_scale * policy_loss
        - hparams.entropy_coef * mean_entropy
        + hparams.kl_coef * kl
        + hparams.value_coef * value_loss
    )
    reported_kl = jnp.mean(kl_estimate(stop_gradient(token_log_ratio)))
    return loss, Losses(policy_loss, mean_entropy, reported_kl, value_loss, objective_state)


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


def effective_weight(probe_gradient: Array, advantage: Array, policy_scale: ArrayLike) -> Array:
    """Effective weights u from the loss's gradient with respect to ``probe``; 0 where A is 0.

    Args:
        probe_gradient: ``[batch, tokens]``.
        advantage: as the objective saw it, broadcast against it.
        policy_scale: as the loss had it, > 0.
    """
    weighted = -probe_gradient * (probe_gradient.size / jnp.asarray(policy_scale))
    return jnp.where(advantage == 0, 0.0, weighted / jnp.where(advantage == 0, 1.0, advantage))


def objective_weight(objective: BoundObjective, log_ratio: Array, advantage: Array) -> Array:
    """Effective weights u of an objective at given log-ratios; 0 where A is 0."""

    def mean_loss(probe: Array) -> Array:
        return -jnp.mean(objective(log_ratio + probe, advantage)[0])

    return effective_weight(jax.grad(mean_loss)(jnp.zeros_like(log_ratio)), advantage, 1.0)
