"""Objectives as policy losses of tunix (google-tunix), by one call: extra ``tunix``."""

import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.lax import stop_gradient
from tunix.rl import common, function_registry
from tunix.sft import utils

from gipo_jax import loss_terms, segments, signatures
from gipo_jax.policy_loss import policy_loss


def register(
    name: str,
    objective: str | signatures.Objective = "gipo",
    *,
    ratio_level: str | None = None,
    loss_agg_mode: str = "token-mean",
    **parameters: Any,
) -> Callable[..., Any]:
    """Registers an objective as a policy loss of tunix, for ``policy_loss_fn = name``.

    It takes from tunix's example the log-probabilities of the old policy (without them, the
    current ones), packed rows and the weights of ``sampler_is``, and from its algorithm's
    configuration ``temperature``, and ``beta`` with ``kl_loss_mode`` and ``kl_clamp_value``, the
    penalty on the KL divergence to the reference policy. Later versions than 0.1.7 pass
    ``compute_logps_chunk_size`` too, and take sums with their denominators, so that the parts of a
    step add up to the step. There is no entropy bonus.

    Args:
        name: of the loss in tunix's registry; not one of tunix's own.
        objective: name or function; see ``objectives``. One with a state is refused, as tunix has
            no place for it.
        ratio_level: see ``policy_loss``.
        loss_agg_mode: see ``policy_loss``, but ``seq-mean-token-sum-norm``, whose length is the
            width of the arrays; packed rows refuse it.
        parameters: the objective's own.

    Returns:
        the loss function ``(model, example, algo_config, pad_id, eos_id) -> loss and metrics``.
    """

    def loss_fn(
        model: Any,
        train_example: Any,
        algo_config: Any,
        pad_id: int,
        eos_id: int,
        compute_logps_chunk_size: int | None = None,
    ) -> Any:
        segment_ids = getattr(train_example, "segment_ids", None)
        chosen = {
            "segment_ids": segment_ids,
            "segment_positions": getattr(train_example, "segment_positions", None),
            "chunk_size": compute_logps_chunk_size,
        }
        log_prob = common.compute_per_token_logps(
            *nnx.split(model),
            prompt_tokens=train_example.prompt_ids,
            completion_tokens=train_example.completion_ids,
            pad_id=pad_id,
            eos_id=eos_id,
            stop_gradient=False,
            temperature=algo_config.temperature,
            **_taken(common.compute_per_token_logps, chosen),
        )
        old = train_example.old_per_token_logps
        old = stop_gradient(log_prob) if old is None else old
        mask = train_example.completion_mask
        weights = getattr(train_example, "sampler_is_weights", None)
        # Their logarithms stand for the gap between sampler and trainer that they were made from.
        rollout: dict[str, Any] = {}
        if weights is not None:
            rollout["rollout_log_prob"] = old - jnp.log(weights)
            rollout["rollout_bounds"] = (0.0, jnp.inf)
        total, metrics = policy_loss(
            log_prob,
            old,
            train_example.advantages,
            mask,
            objective=objective,
            ratio_level=ratio_level,
            loss_agg_mode=loss_agg_mode,
            denominator=1,
            segment_ids=segment_ids,
            **rollout,
            **parameters,
        )
        count = metrics.pop("denominator")
        metrics["pg_clipfrac"] = metrics["clip_fraction"]  # the name under which tunix logs it
        if getattr(algo_config, "beta", None) and train_example.ref_per_token_logps is not None:
            kl = common.compute_kl_divergence(
                log_prob,
                train_example.ref_per_token_logps,
                algo_config.kl_loss_mode,
                clamp_value=algo_config.kl_clamp_value,
            )
            first = None if segment_ids is None else segments.starts(segment_ids)
            counted = mask.astype(bool)
            penalty = loss_terms.aggregate(kl, counted, loss_agg_mode, None, first, 1)
            metrics["kl_loss"] = penalty / jnp.maximum(count, 1)
            total += algo_config.beta * penalty
        if not hasattr(utils, "LossOutput"):  # up to google-tunix 0.1.7
            return total / jnp.maximum(count, 1), metrics
        weighted = utils.WeightedMetric(total, count, min_denom=1.0)
        return utils.LossOutput(primary_loss=weighted, aux_metrics=metrics)

    return function_registry.register_policy_loss_fn(name)(loss_fn)


def _taken(function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """What is given and not None, of the parameters that this version of a function has."""
    names = inspect.signature(function).parameters
    return {name: x for name, x in given.items() if x is not None and name in names}
