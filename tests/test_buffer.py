"""Replay: permutations, draws and the ring, with the iteration number written into every row."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import Array
from scipy import stats

from gipo_jax import buffer

TIME, ENVS, BLOCKS = 3, 2, 8
BLOCK = TIME * ENVS

words = st.lists(st.integers(0, 2**32 - 1), min_size=8, max_size=8).map(
    lambda x: np.array(x, np.uint32).reshape(4, 2)
)
permute = jax.jit(buffer.permute)
draw_shuffled = jax.jit(buffer.draw_shuffled, static_argnums=(1, 2))
draw_uniform = jax.jit(buffer.draw_uniform, static_argnums=(1, 2))


# ------------------------------------------------------------------ permute


@given(words, st.integers(1, 5000))
@settings(max_examples=100, deadline=None)
def test_permute_is_a_bijection(key: np.ndarray, size: int) -> None:
    index = np.minimum(np.arange(5000), size - 1)
    image = np.asarray(permute(key, index, size))[:size]
    assert np.array_equal(np.sort(image), np.arange(size))


@given(words, st.integers(2**30, 2**31 - 1))
@settings(max_examples=30, deadline=None)
def test_permute_stays_in_range_up_to_the_largest_size(key: np.ndarray, size: int) -> None:
    index = np.linspace(0, size - 1, 5000).astype(np.int32)
    image = np.asarray(permute(key, index, size))
    assert image.min() >= 0 and image.max() < size
    assert np.unique(image).size == np.unique(index).size


@pytest.mark.parametrize("size", [3, 8, 13])
def test_permute_sends_each_index_anywhere_about_equally_often(size: int) -> None:
    """A hash and not a uniform permutation, so the bounds are on size, not on significance."""
    keys = jax.random.bits(jax.random.key(size), (50_000, 4, 2), jnp.uint32)
    index = jnp.arange(16) % size
    image = np.asarray(jax.vmap(buffer.permute, in_axes=(0, None, None))(keys, index, size))
    for i in range(size):
        share = np.bincount(image[:, i], minlength=size) / len(image)
        assert np.abs(share * size - 1).max() < 0.15
    for i, j in ((0, 1), (0, size // 2), (size - 2, size - 1)):
        counts = np.bincount(image[:, i] * size + image[:, j], minlength=size**2)
        different = ~np.eye(size, dtype=bool).ravel()
        share = counts[different] / len(image)
        assert np.abs(share * different.sum() - 1).max() < 0.8


def test_rows_at_any_distance_share_a_batch_as_often_as_by_chance() -> None:
    """Neighbours in time are neighbours in storage; a batch must not favour or avoid them."""
    batches, size, batch = 2000, 512, 256
    keys = jax.random.bits(jax.random.key(0), (batches, 4, 2), jnp.uint32)
    image = np.asarray(
        jax.vmap(buffer.permute, in_axes=(0, None, None))(keys, jnp.arange(batch), size)
    )
    drawn = np.zeros((batches, size), bool)
    drawn[np.arange(batches)[:, None], image] = True
    chance = batch * (batch - 1) / (size * (size - 1))
    for distance in (1, 2, 4, 32, 256):
        together = np.mean(drawn[:, distance:] & drawn[:, :-distance])
        assert abs(together / chance - 1) < 0.02
    assert abs(drawn.mean(0) / (batch / size) - 1).max() < 0.15


# ------------------------------------------------------------------ draws


@given(st.integers(0, 2**31 - 1), st.integers(1, 200))
@settings(max_examples=100, deadline=None)
def test_shuffled_batches_do_not_repeat_within_an_epoch(seed: int, valid: int) -> None:
    index = np.asarray(draw_shuffled(jax.random.key(seed), 7, 8, valid))
    assert index.shape == (7, 8) and index.dtype == np.int32
    assert index.min() >= 0 and index.max() < valid
    per_epoch = max(valid // 8, 1)
    for first in range(0, 7, per_epoch):
        epoch = index[first : first + per_epoch].ravel()
        counts = np.bincount(epoch, minlength=valid)
        # Fewer rows than a batch are repeated evenly.
        assert counts.max() - counts.min() <= 1
        assert counts.max() == -(-8 // valid)


def test_shuffled_order_differs_between_epochs_and_keys() -> None:
    index = np.asarray(draw_shuffled(jax.random.key(0), 4, 8, 16))
    epochs = index.reshape(2, 16)
    assert not np.array_equal(epochs[0], epochs[1])
    assert np.array_equal(np.sort(epochs), np.tile(np.arange(16), (2, 1)))
    assert not np.array_equal(index, draw_shuffled(jax.random.key(1), 4, 8, 16))


def test_drawing_fewer_rows_than_a_batch_ends() -> None:
    """``permute`` would loop without end for indices at or above its size."""
    for seed in range(10):
        index = np.asarray(draw_shuffled(jax.random.key(seed), 1, 32, 24))
        assert np.unique(index).size == 24


@given(st.integers(0, 2**31 - 1), st.integers(1, 200))
@settings(max_examples=30, deadline=None)
def test_uniform_indices_are_below_the_number_of_valid_rows(seed: int, valid: int) -> None:
    index = np.asarray(draw_uniform(jax.random.key(seed), 7, 8, valid))
    assert index.shape == (7, 8) and index.dtype == np.int32
    assert index.min() >= 0 and index.max() < valid


@pytest.mark.parametrize("draw", [draw_uniform, draw_shuffled])
def test_rows_are_drawn_equally_often(draw: Any) -> None:
    index = np.asarray(draw(jax.random.key(0), 2000, 8, 24))
    assert stats.chisquare(np.bincount(index.ravel(), minlength=24)).pvalue > 1e-4


def test_window_grows_with_the_iterations_up_to_the_capacity() -> None:
    windows = [buffer.window(i, 4 * BLOCK, BLOCK) for i in range(6)]
    assert [int(first) for first, _ in windows] == [0] * 6
    assert [int(valid) // BLOCK for _, valid in windows] == [1, 2, 3, 4, 4, 4]
    # More rows written than 32 bits count.
    first, valid = buffer.window(2**30, 2**20, 1024, 7)
    assert (int(first), int(valid)) == (7 * 1024, 2**20 - 7 * 1024)


@given(st.integers(0, 30), st.integers(1, BLOCKS), st.data())
@settings(max_examples=100, deadline=None)
def test_window_holds_back_the_newest_blocks(iteration: int, kept: int, data: Any) -> None:
    min_age = data.draw(st.integers(0, kept - 1))
    first, valid = buffer.window(iteration, kept * BLOCK, BLOCK, min_age)
    ages = np.unique(np.arange(int(first), int(first + valid)) // BLOCK)
    written = np.arange(min(iteration + 1, kept))
    # Until a block is old enough, the oldest one stands in.
    expected = written[written >= min_age] if iteration >= min_age else [iteration]
    assert np.array_equal(ages, expected)


class TracedTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_draws_and_window_with_traced_sizes(self) -> None:
        """Traced or not, numbers in place of shapes give the same draws."""

        def draws(key: Array, iteration: Array, capacity: Array, min_age: Array) -> Any:
            first, valid = buffer.window(iteration, capacity, BLOCK, min_age)
            return [
                first + draw(key, 3, 4, valid)
                for draw in (buffer.draw_shuffled, buffer.draw_uniform)
            ]

        arguments = jax.random.key(0), jnp.int32(9), jnp.int32(5 * BLOCK), jnp.int32(2)
        drawn = self.variant(draws)(*arguments)
        chex.assert_trees_all_equal(drawn, draws(*arguments))
        for index in drawn:
            assert np.unique(index // BLOCK).min() >= 2 and np.max(index) < 5 * BLOCK


# ------------------------------------------------------------------ the ring


def block_of(iteration: Array | int) -> dict[str, Array]:
    """A block whose rows say when and where they were written; 0 in storage means unwritten."""
    time, env = jnp.meshgrid(jnp.arange(TIME), jnp.arange(ENVS), indexing="ij")
    return {
        "iteration": jnp.full((TIME, ENVS), iteration, jnp.int32) + 1,
        "place": jnp.stack([time, env], axis=-1),
        "flag": time % 2 == 0,
    }


def filled(iterations: Array | int, blocks: int) -> Any:
    """Storage after ``iterations`` writes."""
    storage = buffer.init(block_of(0), blocks)
    return jax.lax.fori_loop(
        0, iterations, lambda i, storage: buffer.add(storage, block_of(i), i), storage
    )


@pytest.mark.parametrize("blocks", [1, 3, BLOCKS])
def test_rows_are_the_newest_and_know_their_age(blocks: int) -> None:
    write = jax.jit(lambda i: filled(i + 1, blocks))
    take = jax.jit(buffer.take_rows)
    for iteration in (0, 1, 2, 5, 7, 8, 11, 40):
        storage = write(iteration)
        for capacity in {1, 2, blocks} & set(range(1, blocks + 1)):
            valid = int(buffer.window(iteration, capacity * BLOCK, BLOCK)[1])
            kept = min(iteration + 1, capacity)
            assert valid == kept * BLOCK
            rows, age = take(storage, jnp.arange(blocks * BLOCK), iteration)
            rows, age = jax.tree.map(lambda x, n=valid: np.asarray(x)[:n], (rows, age))
            assert np.array_equal(rows["iteration"], iteration + 1 - age)
            assert age.min() == 0 and age.max() == kept - 1
            assert rows["flag"].dtype == bool
            assert np.array_equal(rows["flag"], rows["place"][:, 0] % 2 == 0)
            seen = np.column_stack([rows["iteration"], rows["place"]])
            assert len(np.unique(seen, axis=0)) == valid


@given(st.integers(0, 100), st.integers(1, BLOCKS), st.integers(0, 2**31 - 1), st.data())
@settings(max_examples=60, deadline=None)
def test_drawn_rows_are_written_and_within_the_window(
    iteration: int, kept: int, seed: int, data: Any
) -> None:
    min_age = data.draw(st.integers(0, kept - 1))
    rows, age, segments, segment_age = sample_once(iteration, kept * BLOCK, min_age, seed)
    oldest = max(iteration - kept + 1, 0)
    newest = max(iteration - min_age, 0)
    assert rows["iteration"].min() >= oldest + 1
    assert rows["iteration"].max() <= newest + 1
    assert np.array_equal(rows["iteration"], iteration + 1 - age)
    # A segment is one environment's whole rollout of one iteration.
    assert np.array_equal(segments["place"][:, :, 0], np.tile(np.arange(TIME)[:, None], 4))
    assert np.all(segments["place"][:, :, 1] == segments["place"][0, :, 1])
    assert np.array_equal(segments["iteration"], np.tile(iteration + 1 - segment_age, (TIME, 1)))
    assert segments["iteration"].min() >= oldest + 1
    assert segments["iteration"].max() <= newest + 1


def sample(blocks: int, iteration: Array, capacity: Array, min_age: Array, seed: Array) -> Any:
    """One draw of rows and of segments from a ring of ``blocks`` after ``iteration`` + 1 writes."""
    storage = filled(iteration + 1, blocks)
    first, valid = buffer.window(iteration, capacity, BLOCK, min_age)
    key = jax.random.key(seed)
    rows, age = buffer.take_rows(
        storage,
        first
        + jnp.concatenate(
            [
                buffer.draw_shuffled(key, 3, 4, valid).ravel(),
                buffer.draw_uniform(key, 3, 4, valid).ravel(),
            ]
        ),
        iteration,
    )
    segments, segment_age = buffer.take_segments(
        storage,
        first // TIME + buffer.draw_shuffled(key, 2, 2, valid // TIME).ravel(),
        iteration,
    )
    return rows, age, segments, segment_age


_sample_once = jax.jit(sample, static_argnums=0)


def sample_once(iteration: int, capacity: int, min_age: int, seed: int) -> Any:
    return jax.tree.map(np.asarray, _sample_once(BLOCKS, iteration, capacity, min_age, seed))


def test_traced_capacity_draws_what_a_buffer_of_that_size_draws() -> None:
    """Under vmap with mixed capacities and ages, each lane is a buffer of its own static size."""
    capacities, min_ages = np.array([1, 3, BLOCKS, BLOCKS]), np.array([0, 1, 0, 5])
    lanes = jax.jit(jax.vmap(partial(sample, BLOCKS), in_axes=(None, 0, 0, None)))
    for iteration in (0, 2, 3, 9, 30):
        shared = jax.tree.map(np.asarray, lanes(iteration, capacities * BLOCK, min_ages, 5))
        for lane in (1, 2, 3):
            blocks, min_age = int(capacities[lane]), int(min_ages[lane])
            alone = _sample_once(blocks, iteration, blocks * BLOCK, min_age, 5)
            for ours, theirs in zip(jax.tree.leaves(shared), jax.tree.leaves(alone), strict=True):
                assert np.array_equal(ours[lane], theirs)
            ages = shared[1][lane]
            assert ages.min() >= min(min_age, iteration) and ages.max() < blocks


def test_no_minimum_age_draws_as_if_there_were_none() -> None:
    key = jax.random.key(3)
    for iteration in (0, 2, 9):
        first, valid = buffer.window(iteration, 4 * BLOCK, BLOCK, jnp.int32(0))
        rows = min(iteration + 1, 4) * BLOCK
        assert first == 0 and valid == rows
        for draw in (draw_uniform, draw_shuffled):
            assert np.array_equal(first + draw(key, 3, 4, valid), draw(key, 3, 4, rows))


def test_a_block_of_another_shape_is_refused() -> None:
    storage = buffer.init(block_of(0), 2)
    with pytest.raises(AssertionError, match="shape"):
        buffer.add(storage, jax.tree.map(lambda x: x[:1], block_of(0)), 0)
    with pytest.raises(AssertionError, match="rank"):
        buffer.take_rows(storage, jnp.zeros((2, 2), jnp.int32), 0)


def test_storage_keeps_the_types_of_its_blocks() -> None:
    storage = buffer.init({"x": jax.ShapeDtypeStruct((TIME, ENVS, 4), jnp.bool_)}, BLOCKS)
    assert storage["x"].shape == (BLOCKS, TIME, ENVS, 4) and storage["x"].dtype == bool
    written = buffer.add(storage, {"x": jnp.ones((TIME, ENVS, 4))}, 3)
    assert written["x"].dtype == bool
    assert np.array_equal(np.flatnonzero(np.asarray(written["x"]).all((1, 2, 3))), [3])
