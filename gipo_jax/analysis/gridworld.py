"""Exact bias and variance of policy-gradient estimators in a 2x2 GridWorld (arXiv:2603.03955).

States S0 top-left, S1 top-right, S2 bottom-left; the goal, bottom-right, is absorbing. Actions up,
down, left, right are deterministic, and a step off the grid stays. A step from a non-goal state
costs 1. All is exact but for the rounding of float64, effective weights included.
"""

from typing import NamedTuple

import jax
import numpy as np
from jax import Array
from numpy.typing import ArrayLike, NDArray

from gipo_jax import objectives
from gipo_jax.config import ConfigError

Floats = NDArray[np.floating]

ACTIONS = ("up", "down", "left", "right")
GOAL = 3
# State reached from each non-goal state by each action, [3, 4]
NEXT_STATE = np.array([[0, 2, 0, 1], [1, GOAL, 0, 1], [0, 2, 2, GOAL]])


def softmax(logits: ArrayLike) -> Floats:
    """Probabilities ``[..., 4]`` of logits ``[..., 4]``."""
    shifted = np.exp(np.asarray(logits, float) - np.max(logits, axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def _mixture(uniform: float, right: float, down: float) -> Floats:
    row = np.full(4, uniform / 4) + right * softmax([0, 0, 0, 1]) + down * softmax([0, 1, 0, 0])
    return np.tile(row, (3, 1))


# The paper's target policy, [3, 4]: leans to down and right in every state
TARGET: Floats = np.tile(softmax([0, 1, 0, 1]), (3, 1))

# The paper's three behaviour policies, [3, 4] each; A is uniform, C nearest to the target
BEHAVIORS: dict[str, Floats] = {
    "A": _mixture(1.0, 0.0, 0.0),
    "B": _mixture(0.4, 0.3, 0.3),
    "C": _mixture(0.2, 0.4, 0.4),
}


class VectorStudy(NamedTuple):
    """Bias and variance of the gradient with respect to all twelve logits."""

    bias: float  # Euclidean distance between the estimator's mean and No-Clip's
    variance: float  # trace of the estimator's covariance, for one sample
    # From the gradient of the target's own states: no per-sample ratio corrects for those visited.
    bias_on_policy: float
    zero_gradient: bool  # whether every sample's gradient is exactly zero


def values(policy: ArrayLike, gamma: float = 0.9) -> tuple[Floats, Floats]:
    """Exact V ``[3]`` and advantage ``[3, 4]`` of a policy ``[3, 4]``, gamma in [0, 1)."""
    policy = _check_table("policy", policy)
    if not 0 <= gamma < 1:
        raise ConfigError("gamma", gamma, "a number in [0, 1)")
    value: Floats = np.linalg.solve(np.eye(3) - gamma * _transition(policy), -np.ones(3))
    # The goal is worth 0, so its column is appended as such.
    action_value: Floats = -1 + gamma * np.append(value, 0.0)[NEXT_STATE]
    return value, action_value - value[:, None]


def state_distribution(policy: ArrayLike, start: int = 0) -> Floats:
    """Share of an episode's steps spent in each non-goal state, ``[3]``, beginning at ``start``.

    Undiscounted: it is the distribution of states in a replay buffer that the policy filled.
    Raises ConfigError where the policy may never reach the goal.
    """
    policy = _check_table("policy", policy)
    _check_index("start", start, 3)
    try:
        visits = np.linalg.solve((np.eye(3) - _transition(policy)).T, np.eye(3)[start])
    except np.linalg.LinAlgError as error:
        raise ConfigError(
            "policy", policy.tolist(), "a policy that reaches the goal from every state"
        ) from error
    return visits / visits.sum()


def sample_gradients(
    target: ArrayLike,
    behavior: ArrayLike,
    objective: str | objectives.Objective,
    state: int = 0,
    action: int = 3,
    gamma: float = 0.9,
) -> Floats:
    """g(a) = u A d log pi(a|state) / d logit(state, action) of each action, ``[4]``.

    Arguments and errors as in ``bias_variance``.
    """
    _check_index("state", state, 3)
    _check_index("action", action, 4)
    target, behavior = _check_table("target", target), _check_table("behavior", behavior)
    _, advantage = values(target, gamma)
    weight = _weight(target, behavior, advantage, objective)
    return (weight * advantage)[state] * _score(target)[state, :, state, action]


def bias_variance(
    target: ArrayLike,
    behavior: ArrayLike,
    objective: str | objectives.Objective,
    state: int = 0,
    action: int = 3,
    gamma: float = 0.9,
) -> tuple[float, float]:
    """Exact bias and variance of one logit's policy gradient, sampled from the behaviour policy.

    bias = |E g - E g_NoClip| and variance = Var g over a ~ behavior(. | state), with g as in
    ``sample_gradients`` and the exact advantage of the target policy.

    Args:
        target: action probabilities pi, ``[3, 4]``.
        behavior: action probabilities mu, ``[3, 4]``.
        objective: name or any per-sample objective ``f(log_ratio, advantage)``.
        state: row of the logit, in [0, 3).
        action: column of the logit, in [0, 4).
        gamma: discount, in [0, 1).

    Raises:
        ConfigError: a table, index or discount outside its range.

    >>> from gipo_jax import objectives
    >>> bias, variance = bias_variance(TARGET, BEHAVIORS["A"], objectives.no_clip)
    >>> round(bias, 6), round(variance, 6)
    (0.0, 0.016488)
    """
    sampled = sample_gradients(target, behavior, objective, state, action, gamma)
    target, behavior = np.asarray(target, float), np.asarray(behavior, float)
    _, advantage = values(target, gamma)
    mean = behavior[state] @ sampled
    # mu r = pi wherever mu acts at all.
    corrected = np.where(behavior > 0, target, 0.0)[state] * advantage[state]
    no_clip = corrected @ _score(target)[state, :, state, action]
    return float(abs(mean - no_clip)), float(behavior[state] @ (sampled - mean) ** 2)


def vector_bias_variance(
    target: ArrayLike,
    behavior: ArrayLike,
    objective: str | objectives.Objective,
    gamma: float = 0.9,
    start: int = 0,
) -> VectorStudy:
    """The same study for all twelve logits at once, over the states that the behaviour visits.

    A sample is (state, action) with the state from ``state_distribution(behavior, start)`` and the
    action from ``behavior``.
    """
    target, behavior = _check_table("target", target), _check_table("behavior", behavior)
    _, advantage = values(target, gamma)
    states = state_distribution(behavior, start)[:, None]
    probability = states * behavior
    score = _score(target)

    def mean(weighted: Floats) -> Floats:
        return np.einsum("sa,satb->tb", weighted * advantage, score)

    weight = _weight(target, behavior, advantage, objective)
    center = mean(probability * weight)
    no_clip = mean(states * np.where(behavior > 0, target, 0.0))
    on_policy = mean(state_distribution(target, start)[:, None] * target)
    sampled = (weight * advantage)[:, :, None, None] * score
    return VectorStudy(
        bias=float(np.linalg.norm(center - no_clip)),
        variance=float(np.einsum("sa,satb->", probability, (sampled - center) ** 2)),
        bias_on_policy=float(np.linalg.norm(center - on_policy)),
        zero_gradient=bool(np.all(sampled[probability > 0] == 0)),
    )


def pareto(bias: ArrayLike, variance: ArrayLike) -> NDArray[np.bool_]:
    """True where no other point is at least as good in both and better in one; shape ``[n]``."""
    points = np.stack([np.asarray(bias, float), np.asarray(variance, float)], axis=-1)
    no_worse = np.all(points[None] <= points[:, None], axis=-1)
    better = np.any(points[None] < points[:, None], axis=-1)
    return ~np.any(no_worse & better, axis=1)


def _weight(
    target: Floats, behavior: Floats, advantage: Floats, objective: str | objectives.Objective
) -> Floats:
    """Effective weights u ``[3, 4]``; 0 for actions that the target never takes."""
    function = objectives.spec(objective).function if isinstance(objective, str) else objective

    def per_sample(log_ratio: Array, advantage: Array) -> Array:
        return function(log_ratio, advantage)

    # An action outside a support gets some finite ratio: its weight or its probability is 0.
    tiny = 1e-300
    log_ratio = np.log(np.maximum(target, tiny)) - np.log(np.maximum(behavior, tiny))
    with jax.enable_x64(True):
        weight = objectives.gradient_weight(per_sample, np.clip(log_ratio, -80, 80), advantage)
    return np.where(target > 0, np.asarray(weight), 0.0)


def _score(target: Floats) -> Floats:
    """score[s, a, t, b] = d log pi(a|s) / d logit(t, b), ``[3, 4, 3, 4]``."""
    score = np.zeros((3, 4, 3, 4))
    for s in range(3):
        score[s, :, s, :] = np.eye(4) - target[s]
    return score


def _transition(policy: Floats) -> Floats:
    """Probability ``[3, 3]`` of moving between non-goal states."""
    return np.einsum("sa,sat->st", policy, np.eye(4)[NEXT_STATE])[:, :GOAL]


def _check_table(field: str, table: ArrayLike) -> Floats:
    array = np.asarray(table, float)
    valid = "probabilities of shape (3, 4) whose rows sum to 1"
    if array.shape != (3, 4):
        raise ConfigError(field, f"array of shape {array.shape}", valid)
    if not (np.all(array >= 0) and np.allclose(array.sum(axis=1), 1, atol=1e-6)):
        raise ConfigError(field, array.tolist(), valid)
    return array


def _check_index(field: str, index: int, size: int) -> None:
    if index not in range(size):
        raise ConfigError(field, index, f"an integer from 0 to {size - 1}")
