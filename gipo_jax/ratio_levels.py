"""Ratio levels: which probabilities an importance ratio compares, for answers of several tokens.

``transform`` turns the log-ratio of each token, x_t = log pi(token t) - log mu(token t), into the
log-ratio of its level, before an objective sees it. So every objective has every level.

| level | log-ratio of token t, T tokens in the answer | source |
|---|---|---|
| ``token`` | x_t | PPO, arXiv:1707.06347; GRPO, arXiv:2402.03300 |
| ``joint`` | sum of all x | importance sampling of answers: TOPR, arXiv:2503.14286 |
| ``sequence`` | (sum of all x) / T | GSPO, arXiv:2507.18071 |
| ``prefix_product`` | x_1 + ... + x_t | CTPO, arXiv:2605.07331 |
| ``prefix_geometric`` | (x_1 + ... + x_t) / t | ``geomean`` in CTPO's code, horizon-llm/CTPO |
| ``prefix_min`` | x_t + min of x_1 ... x_(t-1), x_1 for t = 1 | MinPRO, arXiv:2601.22718 |

CTPO's two forms are verified from its code. MinPRO's is unverified, for its code was not found:
whether it holds the factor of the prefix at 1 is unknown, and here it is free.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from gipo_jax import segments
from gipo_jax.config import ConfigError
from gipo_jax.gradients import straight_through
from gipo_jax.signatures import Spec

MAX_LOG_RATIO = 1e4  # Bound on log-ratios; e to this power is infinite and e to its negative is 0


def transform(
    log_ratio: Array, level: str, mask: Array | None = None, first: Array | None = None
) -> Array:
    """The log-ratio of a level for every token; 0 with gradient 0 at padding.

    Each token keeps a gradient of 1 to its own log-ratio and of 0 to all others. So an objective
    moves the policy by u A grad log pi(token t) for each token t, with its effective weight u taken
    at the level's ratio. The sum of that over the tokens of an answer is u A grad log pi(answer)
    where all tokens share one ratio, as GSPO's and TOPR's gradients are; CTPO's code takes the same
    gradient at its prefixes.

    Args:
        log_ratio: x, ``[..., tokens]``, in the order in which the tokens were chosen. The result is
            bounded to +-``MAX_LOG_RATIO``, so that probabilities of 0 give finite gradients.
        level: one of ``LEVELS``.
        mask: true or 1 for the tokens of the answer, same shape; the others are padding, wherever
            they lie, and may be anything, NaN included. All tokens count without it.
        first: true where a response begins, same shape, for rows that hold several; see
            ``segments``.

    Raises:
        ConfigError: an unknown level, or a mask of another shape.
    """
    if level not in LEVELS:
        raise ConfigError("ratio_level", level, f"one of {', '.join(LEVELS)}")
    if mask is None:
        mask = jnp.ones_like(log_ratio, bool)
    if mask.shape != log_ratio.shape:
        raise ConfigError("mask", mask.shape, f"the shape of the log-ratio, {log_ratio.shape}")
    mask = mask.astype(bool)
    log_ratio = jnp.where(mask, log_ratio, 0)
    values = jnp.where(mask, bounded(LEVELS[level](bounded(log_ratio), mask, first)), 0)
    # One ratio for each token even where all share it: [batch, 1] would leave the mask, means over
    # tokens and the scale of the gradient (a token's own at ratio 1) different from other levels.
    return straight_through(values, log_ratio)


def bounded(log_ratio: Array) -> Array:
    """Log-ratios with their infinite ones replaced by bounds whose ratio is 0, or overflows."""
    return straight_through(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO), log_ratio)


def choose(level: str | None, spec: Spec) -> str:
    """The level asked for, or else the objective's own; ConfigError where it has no such level."""
    valid = dict.fromkeys(LEVELS)
    if "behavior_log_prob" in spec.inputs:
        del valid["prefix_min"]
    if spec.takes_distributions:
        valid = {"token": None}
    level = spec.ratio_level if level is None else level
    if not isinstance(level, str) or level not in valid:
        reason = f", because {spec.name} reads probabilities" if level == "prefix_min" else ""
        raise ConfigError("ratio_level", level, f"one of {', '.join(valid)}{reason}")
    return level


def _token(x: Array, mask: Array, first: Array | None) -> Array:
    return x


def _joint(x: Array, mask: Array, first: Array | None) -> Array:
    return jnp.broadcast_to(segments.total(x, first), x.shape)


def _sequence(x: Array, mask: Array, first: Array | None) -> Array:
    length = segments.total(mask.astype(int), first)
    return _joint(x, mask, first) / jnp.maximum(length, 1)


def _prefix_product(x: Array, mask: Array, first: Array | None) -> Array:
    return segments.running_sum(x, first)


def _prefix_geometric(x: Array, mask: Array, first: Array | None) -> Array:
    place = segments.running_sum(mask.astype(int), first)
    return _prefix_product(x, mask, first) / jnp.maximum(place, 1)


def _prefix_min(x: Array, mask: Array, first: Array | None) -> Array:
    smallest = segments.running_min(jnp.where(mask, x, jnp.inf), first)
    before = segments.before(smallest, first, jnp.inf)
    return x + jnp.where(jnp.isinf(before), 0, before)


# Name and values of each level, from log-ratio (0 at padding), mask and first tokens
LEVELS: dict[str, Callable[[Array, Array, Array | None], Array]] = {
    "token": _token,
    "joint": _joint,
    "sequence": _sequence,
    "prefix_product": _prefix_product,
    "prefix_geometric": _prefix_geometric,
    "prefix_min": _prefix_min,
}
