"""Running and total values of the responses in rows of tokens: one response a row, or several.

``first`` is true where a response of a packed row begins, ``[..., tokens]``, and None where each
row holds one.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


def starts(segment_ids: Array) -> Array:
    """``first`` for ids of responses, ``[..., tokens]``: a response ends where the id changes."""
    begins = jnp.ones_like(segment_ids[..., :1], bool)
    return jnp.concatenate([begins, segment_ids[..., 1:] != segment_ids[..., :-1]], axis=-1)


def running_sum(x: Array, first: Array | None) -> Array:
    """x_1 + ... + x_t of each response."""
    return jnp.cumsum(x, axis=-1) if first is None else _running(jnp.add, x, first)


def running_min(x: Array, first: Array | None) -> Array:
    """Smallest of x_1 ... x_t of each response."""
    if first is None:
        return jax.lax.cummin(x, axis=x.ndim - 1)
    return _running(jnp.minimum, x, first)


def total(x: Array, first: Array | None) -> Array:
    """Sum over the response of each token; without packing ``[..., 1]``."""
    if first is None:
        return jnp.sum(x, axis=-1, keepdims=True)
    last = jnp.concatenate([first[..., 1:], jnp.ones_like(first[..., :1])], axis=-1)
    return _running(jnp.add, x, first) + _running(jnp.add, x, last, reverse=True) - x


def before(x: Array, first: Array | None, nothing: float) -> Array:
    """The value at the token before in the response, and ``nothing`` at its first."""
    moved = jnp.concatenate([jnp.full_like(x[..., :1], nothing), x[..., :-1]], axis=-1)
    return moved if first is None else jnp.where(first, nothing, moved)


def _running(
    combine: Callable[[Array, Array], Array], x: Array, first: Array, reverse: bool = False
) -> Array:
    """``combine`` over the tokens of each response up to this one; in reverse, from it on."""

    def join(earlier: tuple[Array, Array], later: tuple[Array, Array]) -> tuple[Array, Array]:
        return earlier[0] | later[0], jnp.where(later[0], later[1], combine(earlier[1], later[1]))

    return jax.lax.associative_scan(join, (first, x), reverse=reverse, axis=x.ndim - 1)[1]
