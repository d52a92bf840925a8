"""Preference training: the loss compares a right answer to a prompt with a wrong one.

It is what token tasks do with an objective that takes ``margin``, such as ``dpo``. Each answer of a
group gets a random partner to the same prompt, right where it is wrong or the other way round, and
the pair is stored in its place; where the whole group is right, or wrong, the row counts 0. The
reference policy is the one that training begins with, after imitation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gipo_jax import signatures
from gipo_jax.config import Config, ConfigError


class Wrong(NamedTuple):
    """The wrong answer of a pair, as replay keeps it beside the right one."""

    answer: Array  # [..., answer_length]
    behavior_log_prob: Array  # log mu of each token, same shape; 0 at padding
    reference_margin: Array  # log pi(right) - log pi(wrong) of the reference policy, [...]


class Pairs(NamedTuple):
    """For each answer of a group the places of its pair, ``[answers, prompts]`` each."""

    right: Array
    wrong: Array
    exists: Array


def is_preference(spec: signatures.Spec) -> bool:
    """Whether an objective compares pairs of answers."""
    return "margin" in spec.inputs


def pair(exact: Array, key: Array) -> Pairs:
    """Pairs each answer, bool ``[answers, prompts]``, with a random opposite one to its prompt.

    In a group without both kinds no pair exists, and its indices mean nothing.
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


def difference(values: tuple[Array, Array], masks: tuple[Array, Array]) -> Array:
    """Sum over the tokens of the right responses minus that of the wrong ones, ``[batch]``."""
    right, wrong = (
        jnp.sum(jnp.where(mask, x, 0), axis=1) for x, mask in zip(values, masks, strict=True)
    )
    return right - wrong


def check(config: Config, spec: signatures.Spec) -> None:
    """Refuses settings that preference training does not have. Raises ConfigError."""
    because = f"because {spec.name} compares whole answers"
    if config.ratio_level not in (None, "joint"):
        raise ConfigError("ratio_level", config.ratio_level, f"'joint' or left out, {because}")
    others = set(spec.inputs) - {"margin", "other_log_ratio"}
    if others:
        valid = "margin and other_log_ratio alone, the inputs that a pair has"
        raise ConfigError(f"objective {spec.name}", min(others), valid)
