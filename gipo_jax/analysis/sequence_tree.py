"""Exact bias and variance of policy gradients over all answers of a small tree.

An answer has ``steps`` tokens, 0 or 1, and each prefix is a node with a distribution over the next
token. Nodes are rows in order of length: node 0 is the empty prefix, nodes 1 and 2 are the prefixes
0 and 1, nodes 3 to 6 are 00, 01, 10 and 11. Answers are rows in the order of binary numbers. All
expectations are sums over the 2^steps answers in float64, so that nothing here is estimated.

The gradient of one answer from the behavior policy mu is

    g = sum over its tokens t of  u_t A_t grad log pi(token t | prefix),

u_t the objective's effective weight at the ratio level's ratio. The estimand is the gradient of the
expected reward under the target policy pi. Only some estimators have it as their mean: plain
importance sampling with the ratio of the whole answer (``joint``), or with the ratio of the prefix
(``prefix_product``) and the advantage of the target policy itself.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike, NDArray

from gipo_jax import objectives, ratio_levels, signatures
from gipo_jax.config import ConfigError

Floats = NDArray[np.floating]

# Advantage of a token: the answer's reward minus the mean reward under the behavior policy, the
# same for all tokens (terminal, what a group of answers to one prompt estimates); or Q - V of the
# target or of the behavior policy at its prefix
ADVANTAGES = ("terminal", "target", "behavior")

MAX_STEPS = 10
BATCH = 2**14  # Answers in the batch of which an objective may take a statistic


class Study(NamedTuple):
    """What the gradient of one answer is in the mean, and how far it scatters."""

    mean: Floats  # expected gradient, [parameters]
    truth: Floats  # gradient of the expected reward of the target policy, [parameters]
    bias: float  # Euclidean distance between the two
    relative_bias: float  # bias over the length of the truth
    cosine: float  # of the angle between the two, which no learning rate mends; NaN for 0
    variance: float  # trace of the covariance of one answer's gradient
    zero_gradient: bool  # whether every answer's gradient is exactly zero


def study(
    target: ArrayLike,
    behavior: ArrayLike,
    reward: ArrayLike,
    objective: str | objectives.Objective = "gipo",
    ratio_level: str | None = None,
    advantage: str = "terminal",
    features: ArrayLike | None = None,
) -> Study:
    """Exact bias and variance of an objective's policy gradient at a ratio level.

    The objective sees a batch of ``BATCH`` answers, each as frequent as under the behavior policy,
    so that a statistic of the batch is exact up to rounding of these numbers. An objective that
    asks for ``log_ratio_start`` is at the start of an update phase, and one with a state has its
    first state.

    Args:
        target: probabilities pi of the next token, > 0, ``[2^steps - 1, 2]``.
        behavior: probabilities mu, likewise.
        reward: of each answer, ``[2^steps]``.
        objective: name or function; ``functools.partial`` sets its parameters.
        ratio_level: one of ``ratio_levels.LEVELS``, or None for the objective's own.
        advantage: one of ``ADVANTAGES``.
        features: ``[2^steps - 1, 2, parameters]``; the logits of the target policy are the product
            with its parameters. By default each logit is a parameter of its own.

    Raises:
        ConfigError: an argument, shape or level that is not usable.

    >>> even = np.full((3, 2), 0.5)
    >>> result = study(even, even, [0, 0, 0, 1], "no_clip")
    >>> round(result.bias, 12)
    0.0
    """
    target, behavior = _check_policy("target", target), _check_policy("behavior", behavior)
    reward, features = _check_sizes(target, behavior, reward, features)
    if advantage not in ADVANTAGES:
        raise ConfigError("advantage", advantage, f"one of {', '.join(ADVANTAGES)}")

    probability = np.exp(log_prob(behavior).sum(axis=1))
    if advantage == "terminal":
        advantages = np.repeat((reward - probability @ reward)[:, None], _steps(target), axis=1)
    else:
        advantages = advantage_of(target if advantage == "target" else behavior, reward)

    weighted = _weighted_advantage(target, behavior, advantages, objective, ratio_level)
    sampled = np.einsum("st,std->sd", weighted, _score(target, features))
    mean = probability @ sampled
    truth = true_gradient(target, reward, features)
    bias, length = np.linalg.norm(mean - truth), np.linalg.norm(truth)
    lengths = length * np.linalg.norm(mean)
    return Study(
        mean=mean,
        truth=truth,
        bias=float(bias),
        relative_bias=float(bias / length) if length > 0 else np.nan,
        cosine=float(mean @ truth / lengths) if lengths > 0 else np.nan,
        variance=float(probability @ np.sum((sampled - mean) ** 2, axis=1)),
        zero_gradient=bool(np.all(sampled == 0)),
    )


def true_gradient(
    target: ArrayLike, reward: ArrayLike, features: ArrayLike | None = None
) -> Floats:
    """Gradient ``[parameters]`` of the expected reward; arguments and errors as in ``study``."""
    target = _check_policy("target", target)
    reward, features = _check_sizes(target, target, reward, features)
    probability = np.exp(log_prob(target).sum(axis=1))
    return np.einsum("s,std->d", probability * reward, _score(target, features))


def advantage_of(policy: ArrayLike, reward: ArrayLike) -> Floats:
    """Q - V of a policy for each token of each answer, ``[2^steps, steps]``.

    Q and V are the expected reward of what follows the prefix with and without the token.
    """
    policy = _check_policy("policy", policy)
    reward, _ = _check_sizes(policy, policy, reward, None)
    steps, after = _steps(policy), reward
    advantages = np.zeros((2**steps, steps))
    for t in reversed(range(steps)):
        q = after.reshape(-1, 2)
        after = np.sum(policy[2**t - 1 : 2 ** (t + 1) - 1] * q, axis=1)
        advantages[:, t] = np.repeat((q - after[:, None]).reshape(-1), 2 ** (steps - t - 1))
    return advantages


def log_prob(policy: ArrayLike) -> Floats:
    """Log-probability of each token of each answer, ``[2^steps, steps]``."""
    policy = _check_policy("policy", policy)
    steps = _steps(policy)
    return np.log(policy[_nodes(steps), answers(steps)])


def answers(steps: int) -> NDArray[np.integer]:
    """All answers of ``steps`` tokens, ``[2^steps, steps]``, in the order of binary numbers."""
    return np.arange(2**steps)[:, None] >> np.arange(steps - 1, -1, -1) & 1


def _steps(policy: Floats) -> int:
    return len(policy).bit_length()


def _nodes(steps: int) -> NDArray[np.integer]:
    """Row of the prefix before each token of each answer, ``[2^steps, steps]``."""
    length = np.arange(steps)
    return 2**length - 1 + (np.arange(2**steps)[:, None] >> steps - length)


def _score(target: Floats, features: Floats) -> Floats:
    """grad log pi of each token of each answer, ``[2^steps, steps, parameters]``."""
    steps = _steps(target)
    score = features - np.einsum("na,nad->nd", target, features)[:, None]
    return score[_nodes(steps), answers(steps)]


def _weighted_advantage(
    target: Floats,
    behavior: Floats,
    advantages: Floats,
    objective: str | objectives.Objective,
    ratio_level: str | None,
) -> Floats:
    """u A of each token of each answer, ``[2^steps, steps]``: the surrogate's own derivative.

    Not u times A, for some objectives move the policy where A is 0.
    """
    spec = objectives.spec(objective)
    signatures.check_single(spec)
    level = ratio_levels.choose(ratio_level, spec)
    log_mu = log_prob(behavior)
    copies = _frequencies(np.exp(log_mu.sum(axis=1)))
    first = np.cumsum(copies) - copies

    with jax.enable_x64(True):
        behavior_log_prob, advantage, log_ratio = (
            jnp.asarray(np.repeat(x, copies, axis=0))
            for x in (log_mu, advantages, log_prob(target) - log_mu)
        )
        given: dict[str, Any] = dict(spec.params)
        if "behavior_log_prob" in spec.inputs:
            given["behavior_log_prob"] = ratio_levels.transform(behavior_log_prob, level)
        if "log_ratio_start" in spec.inputs:
            given["log_ratio_start"] = ratio_levels.transform(log_ratio, level)
        if spec.takes_distributions:
            nodes = np.repeat(_nodes(_steps(target)), copies, axis=0)
            every = (jnp.asarray(np.log(policy)[nodes]) for policy in (behavior, target))
            named = zip(signatures.DISTRIBUTIONS, every, strict=True)
            given |= {name: x for name, x in named if name in spec.inputs}
        if "position" in spec.inputs:
            position = 1 + jnp.arange(log_ratio.shape[1])
            given["position"] = jnp.broadcast_to(position, log_ratio.shape)
        if spec.initial_state is not None:
            state = spec.initial_state(spec.params)
            given["state"] = jax.tree.map(
                lambda x: jnp.asarray(x, jnp.result_type(x, float)), state
            )

        def surrogate(log_ratio: Array) -> Array:
            result = spec.function(ratio_levels.transform(log_ratio, level), advantage, **given)
            return jnp.sum(result if spec.initial_state is None else result[0])

        return np.asarray(jax.grad(surrogate)(log_ratio))[first]


def _frequencies(probability: Floats) -> NDArray[np.integer]:
    """How often each answer stands in the batch of ``BATCH``, once at least."""
    copies = np.maximum(np.rint(BATCH * probability).astype(int), 1)
    # A total that depends on the policy would compile everything anew for each.
    copies[np.argmax(copies)] += BATCH - copies.sum()
    return copies


def _check_policy(field: str, policy: ArrayLike) -> Floats:
    array = np.asarray(policy, float)
    nodes = len(array) if array.ndim else 0
    valid = "probabilities > 0 of shape (2^steps - 1, 2) whose rows sum to 1"
    if array.shape != (nodes, 2) or nodes not in [2**n - 1 for n in range(1, MAX_STEPS + 1)]:
        raise ConfigError(field, array.shape, f"{valid}, with 1 to {MAX_STEPS} steps")
    if not (np.all(array > 0) and np.allclose(array.sum(axis=1), 1, atol=1e-9)):
        raise ConfigError(field, array.tolist(), valid)
    return array


def _check_sizes(
    target: Floats, behavior: Floats, reward: ArrayLike, features: ArrayLike | None
) -> tuple[Floats, Floats]:
    """Rewards and features as arrays of the right shape."""
    nodes = len(target)
    reward = np.asarray(reward, float)
    if behavior.shape != target.shape:
        raise ConfigError("behavior", behavior.shape, f"the shape of the target, {target.shape}")
    if reward.shape != (nodes + 1,):
        raise ConfigError("reward", reward.shape, f"the shape ({nodes + 1},), one for each answer")
    if features is None:
        return reward, np.eye(2 * nodes).reshape(nodes, 2, 2 * nodes)
    features = np.asarray(features, float)
    if features.ndim != 3 or features.shape[:2] != (nodes, 2):
        raise ConfigError("features", features.shape, f"the shape ({nodes}, 2, parameters)")
    return reward, features
