"""Packing: the rows that an update computes, and which responses of its batch stand in them.

The rows are ``packed_size``, each as wide as the longest prompt with its response. Where two
responses may fit into one they are joined in dense rows, otherwise each has a row: ``joins`` says
which. Either way responses of weight 0 are left out, and where the others do not all fit, a random
part of them is taken: as many as always fit, each equally likely, with weights that grow by the
inverse of that part. So the gradient keeps its expectation.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array

from gipo_jax.config import Config
from gipo_jax.domains.tokens.tasks import Task
from gipo_jax.signatures import Spec


class Weights(NamedTuple):
    """Factors on what each response adds to a mean over responses, ``[responses]`` each."""

    answer: Array  # for means over responses
    token: Array  # for means over tokens


class Joined(NamedTuple):
    """Responses in dense rows."""

    # Place ``response * width + token`` in the batch of each token, -1 at padding, [rows, width]
    source: Array
    weights: Weights  # of the responses of the batch, 0 for those that are in no row

    def take(self, x: Array) -> Array:
        """The values ``[batch, width]`` in their rows, 0 at padding; ``[batch]`` for each token."""
        if x.ndim == 1:
            x = jnp.broadcast_to(x[:, None], (x.size, self.source.shape[1]))
        return jnp.where(self.source >= 0, x.reshape(-1)[self.source], 0)

    @property
    def response(self) -> Array:
        """Number of the response of each token from 1, 0 at padding, ``[rows, width]``."""
        return self.source // self.source.shape[1] + 1

    @property
    def position(self) -> Array:
        """Place of each token in its prompt and response, from 0, ``[rows, width]``."""
        return jnp.maximum(self.source, 0) % self.source.shape[1]


def joins(task: Task, objective: Spec) -> bool:
    """Whether two responses may stand in one row.

    Those of a pair, and those whose objective takes sums over a row or the probabilities of all
    tokens, have a row each.
    """
    alone = objective.whole_rows or objective.takes_distributions or "margin" in objective.inputs
    two_shortest, width = 2 * task.prompt_length, task.prompt_length + task.answer_length - 1
    return not alone and task.end is not None and two_shortest <= width


def size(task: Task, length: Array, joined: bool) -> Array:
    """Part of a row that each response of so many tokens takes."""
    before, most = task.prompt_length - 1, task.answer_length
    return (length + before) / (most + before) if joined else jnp.ones_like(length, jnp.float32)


def rows_of(config: Config, of_answers: bool) -> int | None:
    """Rows of an update; None where every response of a batch has one."""
    if config.packed_size is None and of_answers:
        return -(-config.batch_size // 2)
    return config.packed_size


def apart(weight: Array, length: Array, noise: Array, rows: int) -> tuple[Array, Weights]:
    """A row for each response: ascending places in the batch ``[rows]``, and their weights.

    Where fewer than ``rows`` have a weight, responses of weight 0 fill up. With these weights a
    mean over the rows, or over their tokens, is what it would be over the whole batch.

    Args:
        weight: of each response, ``[batch]``.
        length: tokens of each response.
        noise: uniform in [0, 1), independent of all else, same shape.
        rows: number of rows.
    """
    chex.assert_equal_shape([weight, length, noise])
    kept = weight > 0
    index = jnp.sort(_first(kept, noise)[:rows])
    crowded = jnp.maximum(jnp.sum(kept) / rows, 1.0)
    of_tokens = jnp.sum(length[index]) / jnp.sum(length)
    factors = Weights(crowded * (rows / length.size), crowded * of_tokens)
    return index, Weights(weight[index] * factors.answer, weight[index] * factors.token)


def join(weight: Array, length: Array, noise: Array, rows: int, width: int, before: int) -> Joined:
    """Dense rows (Dense Prompt Packing, arXiv:2603.04135): where each of their tokens comes from.

    The longest response is placed first, and each in the first row with room for it. Where one has
    no room, only as many as were placed before it are taken, at random, and they get the places of
    those, the longest that of the longest: so they fit, whichever they are.

    Args:
        weight, length, noise: as of ``apart``.
        rows: number of rows.
        width: tokens of a row, at least those of any response and its prompt.
        before: tokens of the prompt in front of those that a response is predicted from.
    """
    chex.assert_equal_shape([weight, length, noise])
    # Where all weights are 0 something is packed too: a mean over nothing is no number.
    kept = (weight > 0) | ~jnp.any(weight > 0)
    size, end = length + before, rows * width

    def place(carry: tuple[Array, Array], response: Array) -> tuple[tuple[Array, Array], Array]:
        used, room = carry
        fits = used + size[response] <= width
        row = jnp.argmax(fits)
        room &= fits[row] & kept[response]
        start = jnp.where(room, row * width + used[row], end)
        return (used.at[row].add(jnp.where(room, size[response], 0)), room), start

    nothing = (jnp.zeros(rows, size.dtype), jnp.bool_(True))
    starts = jax.lax.scan(place, nothing, _first(kept, -size))[1]
    count = jnp.sum(starts < end)
    taken = jnp.zeros_like(kept).at[_first(kept, noise)].set(jnp.arange(kept.size) < count)
    response, token = _first(taken, -size)[:, None], jnp.arange(width)
    there = (token < size[response]) & (starts < end)[:, None]
    source = jnp.full(end, -1)
    source = source.at[jnp.where(there, starts[:, None] + token, end)].set(
        response * width + token, mode="drop"
    )
    weight = jnp.where(taken, weight, 0) * (jnp.sum(kept) / count)
    of_tokens = jnp.sum(length, where=taken) / jnp.sum(length)
    weights = Weights(weight * (count / length.size), weight * of_tokens)
    return Joined(source.reshape(rows, width), weights)


def _first(kept: Array, value: Array) -> Array:
    """Places of all, those that are kept first, of small values before large ones."""
    return jnp.lexsort((value, ~kept))
