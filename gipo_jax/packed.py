"""Trees of arrays as one vector for each width of number, for loops.

On a GPU every array that a step of a loop writes or carries on is a kernel of its own.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def pack(tree: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The bits of all numbers, and the function that makes the tree of them again."""
    leaves, structure = jax.tree.flatten(tree)
    vectors: dict[int, list[Array]] = {}
    apart, places = [], []
    for x in leaves:
        like = jax.ShapeDtypeStruct(x.shape, x.dtype)
        width = x.dtype.itemsize
        number = jnp.issubdtype(x.dtype, jnp.number) or x.dtype == bool
        if not number or width not in _BITS:
            # Keys and numbers of double width stay apart.
            apart.append(x)
            places.append((like, 0, len(apart) - 1))
            continue
        same = vectors.setdefault(width, [])
        places.append((like, width, sum(vector.size for vector in same)))
        x = x.astype(jnp.uint8) if x.dtype == bool else _as(x, _BITS[width])
        same.append(x.reshape(-1))
    packed = {width: jnp.concatenate(same) for width, same in vectors.items()}

    def unpack(packed_and_apart: Any) -> Any:
        packed, apart = packed_and_apart

        def one(like: Any, width: int, start: int) -> Array:
            if not width:
                return apart[start]
            x = packed[width][start : start + like.size].reshape(like.shape)
            return x.astype(bool) if like.dtype == bool else _as(x, like.dtype)

        return jax.tree.unflatten(structure, [one(*place) for place in places])

    return (packed, apart), unpack


def scan(step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, inputs: Any) -> tuple[Any, Any]:
    """``jax.lax.scan``, bit for bit, with one array of results for each width of number."""
    unpack: Callable[[Any], Any] = tuple

    def packed_step(carry: Any, inputs: Any) -> tuple[Any, Any]:
        nonlocal unpack
        carry, results = step(carry, inputs)
        results, unpack = pack(results)
        return carry, results

    carry, results = jax.lax.scan(packed_step, carry, inputs)
    return carry, jax.vmap(unpack)(results)


def _as(x: Array, dtype: Any) -> Array:
    return jax.lax.bitcast_convert_type(x, dtype)
