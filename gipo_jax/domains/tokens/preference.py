"""Preference training: the loss compares a right answer to a prompt with a wrong one.

It is what token tasks do with an objective that takes ``margin``, such as ``dpo``. Each answer of a
group gets a partner: a random answer to the same prompt that is right where it is wrong, or the
other way round. The pair is stored in place of the answer; where the whole group is right, or
wrong, there is none, and the row counts 0. The reference policy is the one that training begins
with, after imitation.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gipo_jax import ratio_levels, signatures
from gipo_jax.config import Config, ConfigError


class Wrong(NamedTuple):
    """The wrong answer of a pair, as replay keeps it beside the right one.

    Attributes:
        answer: ``[..., answer_length]``.
        behavior_log_prob: log mu of each token, same shape; 0 at padding.
        reference_margin: log-probability of the right minus that of the wrong answer under the
            reference policy, ``[...]``.
    """

    answer: Array
    behavior_log_prob: Array
    reference_margin: Array


class Pairs(NamedTuple):
    """For each answer of a group the places of its pair, ``[answers, prompts]`` each."""

    right: Array
    wrong: Array
    exists: Array


def is_preference(spec: signatures.Spec) -> bool:
    """Whether an objective compares pairs of answers."""
    return "margin" in spec.inputs


def pair(exact: Array, key: Array) -> Pairs:
    """Pairs each answer with a random one to the same prompt that is its opposite.

    Args:
        exact: whether an answer is right, bool ``[answers, prompts]``.
        key: PRNG key.

    Returns:
        indices along the answers, and whether the group has both kinds; without, both indices are
        meaningless.
    """
    opposite = exact[:, None] != exact
    noise = jax.random.uniform(key, opposite.shape)
    partner = jnp.argmax(jnp.where(opposite, noise, -1.0), axis=1)
    own = jnp.broadcast_to(jnp.arange(exact.shape[0])[:, None], exact.shape)
    exists = jnp.any(exact, axis=0) & ~jnp.all(exact, axis=0)
    return Pairs(
        right=jnp.where(exact, own, partner),
        wrong=jnp.where(exact, partner, own),
        exists=jnp.broadcast_to(exists, exact.shape),
    )


def take(values: Array, place: Array) -> Array:
    """Values ``[answers, prompts, ...]`` at places ``[answers, prompts]`` along the answers."""
    place = place.reshape(*place.shape, *[1] * (values.ndim - 2))
    return jnp.take_along_axis(values, place, axis=0)


def objective_values(
    spec: signatures.Spec,
    given: dict[str, Any],
    log_prob: tuple[Array, Array],
    behavior_log_prob: tuple[Array, Array],
    mask: tuple[Array, Array],
    reference_margin: Array,
    is_pair: Array,
) -> tuple[Array, Array, Any]:
    """What a preference objective says of a batch of pairs.

    Args:
        spec: the objective.
        given: its parameters and state.
        log_prob: log pi of each token of the right and of the wrong answers, ``[batch, tokens]``.
        behavior_log_prob: log mu, likewise.
        mask: false at padding, likewise.
        reference_margin: see ``Wrong``, ``[batch]``.
        is_pair: 1 for a pair, 0 for a row without one, ``[batch]``.

    Returns:
        surrogate ``[batch]``, its derivative with respect to the margin ``[batch]``, and the next
        state of the objective.
    """

    def total(x: tuple[Array, Array], counted: tuple[Array, Array]) -> Array:
        right, wrong = (
            jnp.sum(jnp.where(c, v, 0), axis=1) for v, c in zip(x, counted, strict=True)
        )
        return right - wrong

    margin = total(log_prob, mask) - reference_margin
    right, wrong = (
        ratio_levels.transform(new - old, "joint", counted)[:, 0]
        for new, old, counted in zip(log_prob, behavior_log_prob, mask, strict=True)
    )

    def surrogate(margin: Array) -> tuple[Array, Any]:
        inputs = {"margin": margin, "other_log_ratio": wrong}
        asked = {name: x for name, x in inputs.items() if name in spec.inputs}
        return signatures.evaluate(spec, right, is_pair, **asked, **given)

    values, state = surrogate(margin)
    weight = jax.grad(lambda m: jnp.sum(surrogate(m)[0]))(jax.lax.stop_gradient(margin))
    return values, weight, state


def check(config: Config, spec: signatures.Spec) -> None:
    """Refuses settings that preference training does not have.

    Raises:
        ConfigError: one that is not at its default, or an input that pairs do not have.
    """
    because = f"because {spec.name} compares whole answers"
    if config.ratio_level not in (None, "joint"):
        raise ConfigError("ratio_level", config.ratio_level, f"'joint' or left out, {because}")
    for field, default in (("loss_agg_mode", "token-mean"), ("normalize_advantage", None)):
        value = getattr(config, field)
        if value not in (default, False):
            raise ConfigError(field, value, f"left out, {because}")
    others = set(spec.inputs) - {"margin", "other_log_ratio"}
    if others:
        valid = "margin and other_log_ratio alone, the inputs that a pair has"
        raise ConfigError(f"objective {spec.name}", min(others), valid)
