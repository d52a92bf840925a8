"""Advantages and value targets over a rollout, with episode ends kept apart from time limits.

Every array has time as its first axis. ``next_value`` is the critic's value of ``final_obs``, the
observation a step led to before any reset; it is never taken from the following row, which may
belong to the next episode.
"""

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


def gae(
    reward: Array,
    terminated: Array,
    truncated: Array,
    value: Array,
    next_value: Array,
    gamma: ArrayLike,
    gae_lambda: ArrayLike,
) -> tuple[Array, Array]:
    """Generalised advantage estimation (arXiv:1506.02438, equation 16).

    delta = r + gamma (1 - terminated) V(final_obs) - V(obs); the sum of (gamma lambda)^k delta
    stops at the end of an episode, whatever ended it.

    Args:
        reward: ``[time, ...]``, the shape of all arrays.
        terminated: bool.
        truncated: bool.
        value: V(obs).
        next_value: V(final_obs).
        gamma: discount in [0, 1].
        gae_lambda: in [0, 1]; 0 gives the one-step error, 1 the Monte-Carlo advantage.

    Returns:
        advantage and value target (advantage + value).
    """
    chex.assert_equal_shape([reward, terminated, truncated, value, next_value])
    chex.assert_type([terminated, truncated], bool)
    delta = reward + gamma * jnp.where(terminated, 0.0, next_value) - value
    decay = jnp.where(terminated | truncated, 0.0, jnp.multiply(gamma, gae_lambda))
    advantage = _discounted_sum(delta, decay)
    return advantage, advantage + value


def vtrace(
    log_ratio: Array,
    reward: Array,
    terminated: Array,
    truncated: Array,
    value: Array,
    next_value: Array,
    gamma: ArrayLike,
    rho_bar: ArrayLike = 1.0,
    c_bar: ArrayLike = 1.0,
) -> tuple[Array, Array]:
    """V-trace (arXiv:1802.01561, section 4.1).

    v = V + sum of gamma^k prod(min(c_bar, r)) min(rho_bar, r) delta, and the advantage
    r + gamma v' - V, where v' is the corrected value of the next step within the episode and
    V(final_obs) at its end or at the end of the rollout. The importance weight of the policy
    gradient itself is left to the objective.

    Args:
        log_ratio: joint log pi(a|s) - log mu(a|s), ``[time, ...]``; not differentiated.
        reward: same shape; the next arguments as in ``gae``.
        terminated: bool.
        truncated: bool.
        value: V(obs).
        next_value: V(final_obs).
        gamma: discount in [0, 1].
        rho_bar: bound on the ratio in each delta, > 0.
        c_bar: bound on the ratio in the trace, > 0.

    Returns:
        advantage and value target v.
    """
    chex.assert_equal_shape([log_ratio, reward, terminated, truncated, value, next_value])
    chex.assert_type([terminated, truncated], bool)
    ratio = jnp.exp(jnp.minimum(jax.lax.stop_gradient(log_ratio), 20.0))
    ended = terminated | truncated
    bootstrap = jnp.where(terminated, 0.0, next_value)
    delta = jnp.minimum(rho_bar, ratio) * (reward + gamma * bootstrap - value)
    correction = _discounted_sum(delta, jnp.where(ended, 0.0, gamma * jnp.minimum(c_bar, ratio)))
    # Inside an episode obs of the next row is final_obs of this one, so its correction applies.
    following = jnp.concatenate([correction[1:], jnp.zeros_like(correction[:1])])
    advantage = reward + gamma * (bootstrap + jnp.where(ended, 0.0, following)) - value
    return advantage, value + correction


def _discounted_sum(x: Array, decay: Array) -> Array:
    """y[t] = x[t] + decay[t] * y[t + 1], zero after the end."""

    def step(carry: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        carry = inputs[0] + inputs[1] * carry
        return carry, carry

    # Several steps at once: on a GPU a trip of the loop costs more than its arithmetic.
    _, summed = jax.lax.scan(step, jnp.zeros_like(x[0]), (x, decay), reverse=True, unroll=16)
    return summed
