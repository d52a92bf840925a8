"""Reuse bias on a fixed buffer, measured exactly (arXiv:2209.07074).

A policy that is optimised on a buffer looks better on that same buffer than it is. The excess of
its importance-sampling estimate over its true return, relative to the true return, is the reuse
bias; tasks here are finite, so that the true return is a sum. A policy is given by its
log-probabilities in every state, ``[states, actions]``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from gipo_jax import ratio_levels

Params = Any
# params, obs [states, features] -> logits [states, actions]
Policy = Callable[[Params, Array], Array]


class Task(NamedTuple):
    """A finite task: steps are deterministic, and every episode has the same length."""

    start: Array  # probability of each first state, [states]
    next_state: Array  # where an action leads, [states, actions]; anything at the end
    reward: Array  # of a state and an action, [states, actions]
    obs: Array  # what a policy sees of each state, [states, features]
    length: int  # steps of an episode


class Buffer(NamedTuple):
    """Episodes of a behaviour policy."""

    state: Array  # [episodes, length]
    action: Array
    behavior_log_prob: Array  # log mu of each action, same shape
    episode_return: Array  # sum of an episode's rewards, [episodes]


def true_return(task: Task, log_probs: Array) -> Array:
    """Exact expected return of a policy, undiscounted: a scalar, by backward induction."""
    probs = jnp.exp(log_probs)

    def backward(_: int, value: Array) -> Array:
        return jnp.sum(probs * (task.reward + value[task.next_state]), axis=-1)

    return task.start @ jax.lax.fori_loop(0, task.length, backward, jnp.zeros_like(probs[:, 0]))


def sample(task: Task, log_probs: Array, key: Array, episodes: int) -> Buffer:
    """Episodes of a policy."""
    key_start, key_actions = jax.random.split(key)
    first = jax.random.categorical(key_start, jnp.log(task.start), shape=(episodes,))

    def step(state: Array, key: Array) -> tuple[Array, tuple[Array, Array]]:
        action = jax.random.categorical(key, log_probs[state])
        return task.next_state[state, action], (state, action)

    _, (state, action) = jax.lax.scan(step, first, jax.random.split(key_actions, task.length))
    state, action = state.T, action.T
    episode_return = jnp.sum(task.reward[state, action], axis=-1)
    return Buffer(state, action, log_probs[state, action], episode_return)


def weighted_returns(log_probs: Array, buffer: Buffer) -> Array:
    """W G of each episode, ``[episodes]``: its return times the ratio of its whole trajectory."""
    log_ratio = log_probs[buffer.state, buffer.action] - buffer.behavior_log_prob
    return jnp.exp(jnp.sum(log_ratio, axis=-1)) * buffer.episode_return


def estimated_return(log_probs: Array, buffer: Buffer) -> Array:
    """Mean of W G, unbiased for a policy that was chosen without looking at the buffer."""
    return jnp.mean(weighted_returns(log_probs, buffer))


def reuse_bias(estimate: ArrayLike, true_return: ArrayLike) -> Array:
    """(estimate - true return) / true return, for true returns > 0 (arXiv:2209.07074)."""
    return (jnp.asarray(estimate) - true_return) / true_return


def optimize(
    task: Task,
    policy: Policy,
    params: Params,
    buffer: Buffer,
    objective: Callable[[Array, Array], Array],
    advantage: Array,
    learning_rate: ArrayLike,
    ratio_level: str = "joint",
    updates: int = 20,
) -> Params:
    """Parameters after full-batch updates by Adam on one buffer, which stays as it is.

    With plain importance sampling at the joint level, and an episode's return as its advantage, the
    surrogate is ``estimated_return`` itself. With ``biris`` it is that minus alpha times the mean
    of abs(W - 1), as in the paper. ``objective`` takes log-ratio and advantage ``[episodes,
    length]``; all steps of an episode share its advantage ``[episodes]``.
    """
    per_step = jnp.broadcast_to(advantage[:, None], buffer.action.shape)
    adam = optax.scale_by_adam()

    def loss(params: Params) -> Array:
        log_probs = jax.nn.log_softmax(policy(params, task.obs))
        log_ratio = log_probs[buffer.state, buffer.action] - buffer.behavior_log_prob
        surrogate = objective(ratio_levels.transform(log_ratio, ratio_level), per_step)
        return -jnp.mean(surrogate)

    def update(_: int, carry: tuple[Params, Any]) -> tuple[Params, Any]:
        params, moments = carry
        direction, moments = adam.update(jax.grad(loss)(params), moments)
        return jax.tree.map(lambda p, d: p - learning_rate * d, params, direction), moments

    last, _ = jax.lax.fori_loop(0, updates, update, (params, adam.init(params)))
    return last
