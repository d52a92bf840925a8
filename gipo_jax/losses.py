"""The loss of one batch, written as in the paper, and the effective weights that come with it.

``policy_loss`` is for other trainers: the policy's part, on answers of several tokens with padding.
``actor_critic_loss`` is the loss of this project's control tasks::

    loss =   minus the mean surrogate       the policy objective (GIPO: arXiv:2603.03955)
           - entropy_coef * mean entropy
           + kl_coef * mean KL(mu || pi)
           + value_coef * mean (V - target)^2

mu is the policy that collected the data. Everything here is a pure function of arrays.

One thing in it differs from the formula. The surrogate takes ``log_ratio + probe``, where
``probe`` is zero. Its gradient is -u A / n, so one backward pass gives the gradient of the
parameters and the effective weight u of every sample (``effective_weight``).
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient
from jax.typing import ArrayLike

from gipo_jax import diagnostics, objectives, ratio_levels, signatures
from gipo_jax.config import LOSS_AGG_MODES, ConfigError, HParams
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
    padding changes neither the loss nor a metric, whatever stands there.

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
        max_tokens: length that ``seq-mean-token-sum-norm`` divides by, > 0; by default that of the
            longest answer in the batch, so that padding does not matter.
        parameters: the objective's own parameters, and ``kernel``, ``log_ratio_start`` (of each
            token, ``[batch, tokens]``) or ``state`` where it takes them. Without ``state`` it is
            the first.

    Returns:
        scalar loss, and metrics: scalars ``policy_loss``, ``kl`` (estimate of KL(mu || pi) per
        token), those of ``diagnostics.ratios`` at the ratio level, and ``state``, the next one, if
        the objective has a state.

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
    mask = _check_arrays(spec, log_prob, old_log_prob, advantages, response_mask)

    dtype = jnp.promote_types(log_prob.dtype, jnp.float32)
    log_prob, old_log_prob = log_prob.astype(dtype), stop_gradient(old_log_prob.astype(dtype))
    advantage = advantages if advantages.ndim == 2 else advantages[:, None]
    advantage = jnp.where(mask, stop_gradient(advantage.astype(dtype)), 0)
    start = given.pop("log_ratio_start", None)
    bound = bind(spec, level, given, old_log_prob, start, mask)

    loss, log_ratio, state = masked_policy_loss(
        log_prob, old_log_prob, advantage, mask, bound, level, loss_agg_mode, max_tokens
    )
    log_ratio = stop_gradient(log_ratio)
    weight = objective_weight(bound, log_ratio, advantage)
    token_log_ratio = jnp.where(mask, stop_gradient(log_prob) - old_log_prob, 0)
    metrics: dict[str, Any] = {
        "policy_loss": stop_gradient(loss),
        "kl": jnp.mean(kl_estimate(token_log_ratio), where=mask),
    } | diagnostics.ratios(log_ratio, advantage, weight, mask)
    if spec.initial_state is not None:
        metrics["state"] = state
    return loss, metrics


def masked_policy_loss(
    log_prob: Array,
    behavior_log_prob: Array,
    advantage: Array,
    mask: Array,
    objective: BoundObjective,
    ratio_level: str,
    loss_agg_mode: str,
    max_tokens: ArrayLike | None = None,
) -> tuple[Array, Array, Any]:
    """``policy_loss`` without checks and metrics, of an objective with all else filled in.

    Args:
        log_prob: ``[batch, tokens]``.
        behavior_log_prob: same shape.
        advantage: same shape, 0 at padding.
        mask: bool, same shape.
        objective: maps log-ratio and advantage to the surrogate.
        ratio_level: see ``ratio_levels``.
        loss_agg_mode: see ``policy_loss``; and ``max_tokens``.

    Returns:
        scalar loss, log-ratio of the level ``[batch, tokens]``, and next state of the objective.
    """
    log_ratio = ratio_levels.transform(log_prob - behavior_log_prob, ratio_level, mask)
    surrogate, state = objective(log_ratio, advantage)
    return -aggregate(surrogate, mask, loss_agg_mode, max_tokens), log_ratio, state


def aggregate(
    values: Array, mask: Array, loss_agg_mode: str, max_tokens: ArrayLike | None = None
) -> Array:
    """One number for values ``[batch, tokens]``; modes as in ``policy_loss``, 0 over no tokens."""
    values = jnp.where(mask, values, 0)
    lengths = jnp.sum(mask, axis=1)
    if loss_agg_mode == "token-mean":
        return jnp.sum(values) / jnp.maximum(jnp.sum(lengths), 1)
    answers = jnp.sum(values, axis=1)
    if loss_agg_mode == "seq-mean-token-mean":
        answers = answers / jnp.maximum(lengths, 1)
    elif loss_agg_mode == "seq-mean-token-sum-norm":
        longest = jnp.maximum(jnp.max(lengths), 1)
        answers = answers / (longest if max_tokens is None else max_tokens)
    return jnp.sum(answers) / jnp.maximum(jnp.sum(lengths > 0), 1)


def bind(
    spec: signatures.Spec,
    ratio_level: str,
    given: Mapping[str, Any],
    behavior_log_prob: Array,
    log_ratio_start: Array | None,
    mask: Array | None = None,
) -> BoundObjective:
    """An objective with its parameters, and with those of its inputs that it asks for.

    Args:
        spec: the objective.
        ratio_level: see ``ratio_levels``.
        given: its parameters, kernel and state.
        behavior_log_prob: of each token, ``[batch, tokens]``.
        log_ratio_start: of each token, same shape; None where the objective does not ask for it.
        mask: bool, same shape; None without padding and where tokens have no order.
    """
    given = dict(given)
    if "behavior_log_prob" in spec.inputs:
        given["behavior_log_prob"] = ratio_levels.transform(behavior_log_prob, ratio_level, mask)
    if "log_ratio_start" in spec.inputs:
        assert log_ratio_start is not None
        given["log_ratio_start"] = ratio_levels.transform(log_ratio_start, ratio_level, mask)
    if spec.takes_mask and mask is not None:
        given["mask"] = mask
    if mask is not None and "position" in spec.inputs:
        given["position"] = jnp.where(mask, jnp.cumsum(mask, axis=-1), 0)
    return functools.partial(signatures.evaluate, spec, **given)


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
    if len(shape) != 2:
        raise ConfigError("log_prob", shape, "the shape (batch, tokens)")
    if jnp.shape(old_log_prob) != shape:
        raise ConfigError("old_log_prob", jnp.shape(old_log_prob), f"the shape {shape} of log_prob")
    if jnp.shape(advantages) not in (shape, shape[:1]):
        valid = f"the shape {shape} of log_prob, or {shape[:1]}"
        raise ConfigError("advantages", jnp.shape(advantages), valid)
    if response_mask is None:
        return jnp.ones(shape, bool)
    if jnp.shape(response_mask) != shape:
        valid = f"the shape {shape} of log_prob"
        raise ConfigError("response_mask", jnp.shape(response_mask), valid)
    if spec.kind == "batch" and not spec.takes_mask:
        valid = "one that takes mask, because its statistic of the batch would count padding"
        raise ConfigError("objective", spec.name, valid)
    return response_mask.astype(bool)
