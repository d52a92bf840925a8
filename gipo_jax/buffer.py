"""Ring replay whose capacity is a number, not a shape.

Data comes in blocks of ``[time, envs]``, one an iteration. ``blocks`` of them are allocated, and
iteration i is always written at ``i % blocks``, whatever a run's capacity. Capacity only limits how
far back sampling looks, so runs of any capacity share one program and one contiguous write, and a
run of capacity c draws exactly what a buffer allocated for c would.

Rows are addressed newest first: index 0 is the first row of the newest block. ``window`` says which
indices may be drawn; their rows are written, whole blocks of them, and not yet overwritten.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

Block = Any  # A pytree of arrays [time, envs, ...]
Storage = Any  # The same tree with arrays [blocks, time, envs, ...]


def init(block: Block, blocks: int) -> Storage:
    """Allocates room for ``blocks`` blocks like ``block`` (arrays or their shapes)."""
    return jax.tree.map(lambda x: jnp.zeros((blocks, *x.shape), x.dtype), block)


def add(storage: Storage, block: Block, iteration: int | Array) -> Storage:
    """Writes the block of one iteration over the oldest one.

    ``iteration``, the number of blocks written before, is the same for all runs of a program, so
    that the write stays one contiguous slice under ``vmap``.
    """

    chex.assert_trees_all_equal_structs(storage, block)

    def write(stored: Array, new: Array) -> Array:
        chex.assert_shape(new, stored.shape[1:])
        return jax.lax.dynamic_update_index_in_dim(
            stored, new.astype(stored.dtype), iteration % stored.shape[0], axis=0
        )

    return jax.tree.map(write, storage, block)


def window(
    iteration: int | Array, capacity: ArrayLike, block_size: int, min_age: ArrayLike = 0
) -> tuple[Array, Array]:
    """Newest-first rows that may be drawn once iteration ``iteration`` is written.

    They are ``first .. first + valid - 1``: draw indices in ``[0, valid)`` and add ``first``. With
    ``min_age`` k, data of the newest k iterations is held back, so that ages are ``k ..
    capacity / block_size - 1``. While no block is as old as k the oldest one is drawn from, as in
    training with a lag of k, whose first k updates use data of the first policy.

    Args:
        iteration: index of the newest block.
        capacity: rows kept, a positive multiple of ``block_size`` and at most the allocation.
        block_size: rows a block.
        min_age: blocks held back, in ``[0, capacity / block_size)``.

    Returns:
        ``first`` and ``valid``, int32, both multiples of ``block_size``; ``valid`` > 0.
    """
    # In blocks: rows written in a long run overflow 32 bits.
    blocks = jnp.minimum(jnp.asarray(iteration) + 1, jnp.asarray(capacity) // block_size)
    # Never nothing, even for sizes that do not fit: drawing from no rows would not end.
    blocks = jnp.maximum(blocks, 1)
    held_back = jnp.minimum(jnp.asarray(min_age), blocks - 1)
    return held_back * block_size, (blocks - held_back) * block_size


def draw_uniform(key: Array, num_batches: int, batch_size: int, valid: ArrayLike) -> Array:
    """Newest-first indices ``[num_batches, batch_size]`` of valid rows, drawn with replacement."""
    return jax.random.randint(key, (num_batches, batch_size), 0, valid)


def draw_shuffled(key: Array, num_batches: int, batch_size: int, valid: ArrayLike) -> Array:
    """Newest-first indices drawn without replacement until the rows are used up, then again.

    Rows are put in a random order, cut into whole batches, and put in a new order when fewer than a
    batch are left. The cost depends on the number of indices drawn, not on ``valid``.

    Args:
        key: PRNG key.
        num_batches: batches drawn.
        batch_size: indices a batch.
        valid: rows to draw from, a scalar >= 1. Fewer than a batch of them are repeated evenly.

    Returns:
        ``[num_batches, batch_size]`` int32.
    """
    batches_per_epoch = jnp.maximum(jnp.asarray(valid) // batch_size, 1)
    batch = jnp.arange(num_batches)
    first = (batch % batches_per_epoch) * batch_size
    # The remainder keeps positions below valid, without which the walk in permute might not end.
    position = (first[:, None] + jnp.arange(batch_size)) % valid
    # An epoch holds at least one batch, so num_batches keys are enough.
    epoch_keys = jax.random.bits(key, (num_batches, *_KEY_SHAPE), jnp.uint32)
    batch_keys = epoch_keys[batch // batches_per_epoch]
    return jax.vmap(permute, in_axes=(0, 0, None))(batch_keys, position, valid)


_ROUNDS = 4
_KEY_SHAPE = (_ROUNDS, 2)


def permute(words: Array, index: Array, size: ArrayLike) -> Array:
    """Where a pseudo-random permutation of ``0 .. size - 1`` sends each index; int32, same shape.

    The permutation of a traced size is never written down: each index goes through rounds of
    invertible arithmetic on the next power of two, again and again until it falls below ``size``
    (cycle walking), which is a permutation because every step is invertible. ``words`` are its key,
    random uint32 ``[4, 2]``; sizes go from 1 to 2^31 - 1.
    """
    chex.assert_shape(words, _KEY_SHAPE)
    chex.assert_type(index, int)
    size = jnp.asarray(size, jnp.uint32)
    bits = 32 - jax.lax.clz(size - 1)
    # 32 bits are never needed, so that the shift below stays defined.
    mask = (jnp.uint32(1) << bits) - 1
    shift = (bits + 1) // 2

    def scramble(x: Array) -> Array:
        for multiplier, offset in words:
            x = (x * (multiplier | 1) + offset) & mask
            # With one bit or none the half-width shift could be 0, and x ^ x is not invertible.
            x = x ^ (x >> jnp.maximum(shift, 1))
        return x

    def walk(x: Array) -> Array:
        return jnp.where(x >= size, scramble(x), x)

    def until_inside(x: Array) -> Array:
        return jax.lax.while_loop(lambda x: jnp.any(x >= size), walk, x)

    def fixed_walk(x: Array) -> Array:
        # A GPU's host would wait for the end of a loop of unknown length. Each pass leaves less
        # than half of the indices outside; one in 2^32 may then repeat another.
        return jax.lax.fori_loop(0, 32, lambda _, x: walk(x), x, unroll=True) % size

    first = scramble(index.astype(jnp.uint32))
    walked = jax.lax.platform_dependent(first, cpu=until_inside, default=fixed_walk)
    return walked.astype(jnp.int32)


def take_rows(storage: Storage, index: Array, iteration: int | Array) -> tuple[Block, Array]:
    """Gathers rows at newest-first indices ``[n]``, and their ages in iterations."""
    chex.assert_rank(index, 1)
    blocks, time, envs = jax.tree.leaves(storage)[0].shape[:3]
    age = index // (time * envs)
    row = (iteration - age) % blocks * (time * envs) + index % (time * envs)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:])[row], storage), age


def take_segments(storage: Storage, index: Array, iteration: int | Array) -> tuple[Block, Array]:
    """Gathers whole rollouts of single environments, ``[time, n, ...]``, and their ages in
    iterations.

    A block holds ``envs`` segments, counted newest first.
    """
    chex.assert_rank(index, 1)
    blocks, _, envs = jax.tree.leaves(storage)[0].shape[:3]
    age = index // envs
    block = (iteration - age) % blocks
    return jax.tree.map(lambda x: x[block, :, index % envs].swapaxes(0, 1), storage), age
