"""Work-arounds for XLA on CPU. Each keeps the mathematics and costs accelerators nothing.

Measurements behind them are in benchmarks/NOTES.md.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

FEW_COLUMNS = 8  # Up to this many columns a matrix counts as narrow

_MANY_ROWS = 512


def orthogonal(scale: float) -> Callable[..., Array]:
    """Orthogonal initialiser that draws run by run on CPU when it is vmapped.

    A batched QR decomposition on CPU waits, in a thread of XLA's pool, for work that it gave to the
    same pool. Once every thread of a small pool does so, the program deadlocks.
    """
    initialise = nn.initializers.orthogonal(scale)

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        def draw(key: Array) -> Array:
            # Its decomposition takes no half-width numbers.
            return initialise(key, shape, jnp.float32).astype(dtype)

        one_by_one = jax.custom_batching.sequential_vmap(draw)
        return jax.lax.platform_dependent(key, cpu=one_by_one, default=draw)

    return init


def dot_general(columns: int) -> Callable[..., Array] | None:
    """Product for a dense layer of ``columns`` outputs, to pass to Flax; None is Flax's own.

    XLA's matrix product on CPU is slow for a narrow kernel: with many rows, an update of a policy
    with two actions takes 1.3 times as long as with one matrix-vector product for each column.
    """
    return _narrow_product if columns <= FEW_COLUMNS else None


def _narrow_product(x: Array, kernel: Array, *_: Any, **__: Any) -> Array:
    def by_column(x: Array, kernel: Array) -> Array:
        return jnp.stack([x @ column for column in kernel.T], axis=-1)

    if x.size < _MANY_ROWS * x.shape[-1]:
        return x @ kernel
    return jax.lax.platform_dependent(x, kernel, cpu=by_column, default=jnp.matmul)
