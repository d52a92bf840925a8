"""The loss of a batch, written as in the paper, and the effective weights that come with it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gipo_jax import diagnostics, loss_terms, ratio_levels
from gipo_jax.config import Config, HParams
from gipo_jax.domains import Batch, Domain, Scores
from gipo_jax.learner import Learner, Metrics, TrainState

# Part of the public interface: ``losses.policy_loss`` is the loss for other trainers.
from gipo_jax.policy_loss import policy_loss as policy_loss


class Terms(NamedTuple):
    """What a loss gives beside its value."""

    metrics: Metrics  # its parts, scalars by name
    ess: Array  # effective sample size of the batch over its size, in [0, 1]
    objective_state: Any  # next state of the objective


def loss(
    domain: Domain,
    start: TrainState,
    learner: Learner,
    params: Any,
    batch: Batch,
    hparams: HParams,
    policy_scale: Array | float = 1.0,
    *,
    train_policy: bool = True,
) -> tuple[Array, Terms]:
    """The loss of a batch, and its terms.

    loss = - policy_scale * mean surrogate     the policy objective (GIPO: arXiv:2603.03955)
           - entropy_coef * mean entropy
           + kl_coef * mean KL(mu || pi)
           + value_coef * mean (V - target)^2

    mu is the policy that collected the data. Derivatives are by ``params``; ``start`` is the state
    at the start of the update phase, whose policy some objectives compare with, and ``learner`` the
    one that this update changes, with the objective's state. Without ``train_policy`` the last term
    alone is left.
    """
    scores = domain.score(params, batch, hparams)
    total, metrics = jnp.zeros(()), {}
    ess, objective_state = jnp.ones(()), learner.objective_state
    if train_policy:
        bound = bind_objective(domain, start, learner, batch, scores, hparams)
        surrogate, objective_state = bound.function(bound.x, bound.advantage)
        surrogate_loss = -_mean_surrogate(domain.config, batch, surrogate)
        total = policy_scale * surrogate_loss
        metrics["policy_loss"] = surrogate_loss
        ess = _effective_sample_size(bound, batch)

        factor = 1.0 if batch.token_weight is None else batch.token_weight
        if scores.entropy is not None:
            metrics["entropy"] = jnp.mean(scores.entropy * factor, where=batch.mask)
            total -= hparams.entropy_coef * metrics["entropy"]
        if scores.kl is not None:
            penalty = reported = scores.kl
        else:
            penalty = loss_terms.kl_penalty(bound.token_log_ratio)
            reported = loss_terms.kl_estimate(jax.lax.stop_gradient(bound.token_log_ratio))
        total += hparams.kl_coef * jnp.mean(penalty * factor, where=batch.mask)
        metrics["kl"] = jnp.mean(reported * factor, where=batch.mask)
    if scores.value is not None:
        metrics["value_loss"] = jnp.mean((scores.value - batch.value_target) ** 2)
        total += hparams.value_coef * metrics["value_loss"]
    return total, Terms(metrics, ess, objective_state)


class BoundObjective(NamedTuple):
    """An objective at a batch."""

    function: loss_terms.SurrogateFunction  # x, advantage -> surrogate, next state
    x: Array  # what it is a function of: log-ratios [batch, tokens], or margins [batch]
    advantage: Array  # as the objective sees it, the shape of x
    log_ratio: Array  # of the ratio level, [batch, tokens]
    token_log_ratio: Array  # of each token, [batch, tokens]; 0 at padding

    def weight(self) -> tuple[Array, Array]:
        """Effective weights u and advantages, ``[batch, tokens]`` each."""
        weight = loss_terms.objective_weight(self.function, self.x, self.advantage)
        if weight.ndim == 2:
            return weight, self.advantage
        shape = self.log_ratio.shape
        pairs = (weight[:, None], self.advantage[:, None])
        return jnp.broadcast_to(pairs[0], shape), jnp.broadcast_to(pairs[1], shape)


def bind_objective(
    domain: Domain,
    start: TrainState,
    learner: Learner,
    batch: Batch,
    scores: Scores,
    hparams: HParams,
) -> BoundObjective:
    """The objective with its parameters, inputs and state, at what it is a function of."""
    spec, mask, level = domain.objective, batch.mask, domain.ratio_level
    x = scores.log_ratio if mask is None else jnp.where(mask, scores.log_ratio, 0)
    x = ratio_levels.bounded(x)
    log_ratio = ratio_levels.transform(x, level, mask, batch.first)
    given: dict[str, Any] = dict(hparams.objective_params)
    if spec.takes_kernel:
        given["kernel"] = domain.config.kernel
    if spec.initial_state is not None:
        given["state"] = learner.objective_state
    if scores.margin is not None and scores.other_log_ratio is not None:
        pairwise = loss_terms.bind_pairs(spec, given, log_ratio[:, 0], scores.other_log_ratio)
        return BoundObjective(pairwise, scores.margin, batch.advantage, log_ratio, x)

    def log_ratio_start() -> Array:
        return domain.score(start.learner.params, batch, hparams).log_ratio

    function = loss_terms.bind(
        spec,
        level,
        given,
        batch.behavior_log_prob,
        log_ratio_start,
        mask,
        batch.first,
        ordered=domain.ordered,
        distributions=scores.distributions,
    )
    advantage = loss_terms.standardize(batch.advantage) if domain.standardize else batch.advantage
    if advantage.ndim == 1:
        advantage = jnp.broadcast_to(advantage[:, None], log_ratio.shape)
    if mask is not None:
        advantage = jnp.where(mask, advantage, 0)
    return BoundObjective(function, log_ratio, advantage, log_ratio, x)


def _mean_surrogate(config: Config, batch: Batch, surrogate: Array) -> Array:
    if batch.surrogate_weight is not None:
        surrogate = surrogate * batch.surrogate_weight
    if batch.mask is None or surrogate.ndim == 1:
        return jnp.mean(surrogate)
    return loss_terms.aggregate(
        surrogate, batch.mask, config.loss_agg_mode, batch.max_tokens, batch.first
    )


def _effective_sample_size(bound: BoundObjective, batch: Batch) -> Array:
    """Effective sample size over the samples with an advantage; 1 where none has one."""
    weight, advantage = bound.weight()
    moved = advantage != 0 if batch.mask is None else batch.mask & (advantage != 0)
    ess = diagnostics.effective_sample_size(weight, moved)
    return jnp.where(jnp.isnan(ess), 1.0, ess)
