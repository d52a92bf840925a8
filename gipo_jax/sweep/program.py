"""The compiled program of a group of runs: which runs share a vector lane, a loop, a device."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gipo_jax import config
from gipo_jax.config import HParams
from gipo_jax.train import Algorithm, Metrics, TrainState

CPU_LANES = 4
"""Runs vectorised together in mode ``vmap`` on CPU.

XLA compiles a batch of 4 and one of 8 to different arithmetic there. A fixed width gives a run the
same bits in a sweep of any size, and wider ones were measured to be no faster.
"""


class Layout(NamedTuple):
    """How ``width`` runs are laid out: over devices, on each in blocks, each of ``lanes``.

    Attributes:
        devices: devices that share the runs evenly.
        blocks: blocks that each device works through one after the other.
        lanes: runs vectorised together in a block.
    """

    devices: tuple[jax.Device, ...]
    blocks: int
    lanes: int

    @property
    def width(self) -> int:
        """Number of runs, padding included."""
        return len(self.devices) * self.blocks * self.lanes


def layout(mode: str, lanes: int | None, devices: Sequence[jax.Device], runs: int) -> Layout:
    """The layout of a number of runs.

    Args:
        mode: ``vmap``, runs side by side in vector operations; ``map``, one block of ``lanes`` runs
            after the other inside the program; ``loop``, one run a device at a time.
        lanes: runs a block in mode ``map``, 1 by default.
        devices: those to use; no more of them than there are blocks.
        runs: number of runs, >= 1. Where they do not fill the layout, it has room for more.
    """
    if mode == "loop":
        return Layout(tuple(devices[:runs]), 1, 1)
    if mode == "vmap":
        on_cpu = devices[0].platform == "cpu"
        width = CPU_LANES if on_cpu else -(-runs // len(devices))
    else:
        width = lanes or 1
    blocks = -(-runs // width)
    used = min(len(devices), blocks)
    return Layout(tuple(devices[:used]), -(-blocks // used), width)


def stack(hparams: Sequence[HParams], width: int) -> HParams:
    """Settings of runs as arrays ``[width]``, the last one repeated to fill up."""
    return config.stack([*hparams, *[hparams[-1]] * (width - len(hparams))])


class Program:
    """``init`` and ``train_and_log`` of an algorithm for a batch of runs, compiled on request.

    Attributes:
        layout: how the runs are laid out.
        metrics: names of the metrics of a logged point.
    """

    def __init__(self, algorithm: Algorithm, layout: Layout, example: HParams) -> None:
        """Traces the program: errors in an objective or environment come up here.

        Args:
            algorithm: of the group.
            layout: of its runs.
            example: settings of any of them.
        """
        self.layout = layout
        mesh = Mesh(np.asarray(layout.devices), ("runs",), axis_types=(AxisType.Auto,))
        self._sharding = NamedSharding(mesh, P("runs"))
        share = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)

        def init(hparams: HParams) -> TrainState:
            return _blocks(layout, algorithm.init, hparams)

        def train_and_log(
            state: TrainState, hparams: HParams, start: Array, stop: Array
        ) -> tuple[TrainState, Metrics]:
            def one(state: TrainState, hparams: HParams) -> tuple[TrainState, Metrics]:
                return algorithm.train_and_log(state, hparams, start, stop)

            return _blocks(layout, one, state, hparams)

        runs = P("runs")
        hparams = self._abstract(stack([example], layout.width))
        step = jax.ShapeDtypeStruct((), jnp.int32)
        init_shared = share(init, in_specs=(runs,), out_specs=runs)
        train_and_log_shared = share(
            train_and_log, in_specs=(runs, runs, P(), P()), out_specs=(runs, runs)
        )
        self._init_traced = jax.jit(init_shared).trace(hparams)
        self.state = self._abstract(self._init_traced.out_info)
        self._train_and_log_traced = jax.jit(train_and_log_shared, donate_argnums=0).trace(
            self.state, hparams, step, step
        )
        self.metrics = list(self._train_and_log_traced.out_info[1])
        self._copy = jax.jit(lambda state: state, out_shardings=self._sharding)
        self._init: Any = None
        self._train_and_log: Any = None

    def compile(self) -> None:
        """Compiles both functions, once."""
        self._init = self._init_traced.lower().compile()
        self._train_and_log = self._train_and_log_traced.lower().compile()

    def place(self, hparams: Sequence[HParams]) -> HParams:
        """Settings of at most ``layout.width`` runs on the devices."""
        return jax.device_put(stack(hparams, self.layout.width), self._sharding)

    def init(self, hparams: HParams) -> TrainState:
        """First states, arrays ``[width, ...]``."""
        return self._init(hparams)

    def restore(self, state: TrainState) -> TrainState:
        """Stored states of some runs, arrays ``[runs, ...]``, on the devices and filled up."""
        padding = self.layout.width - state.diverged_at.shape[0]

        def fill(x: Any) -> Any:
            return x if not padding else _concatenate(x, padding)

        # The copy owns its memory: a buffer that came from the host must not be donated.
        return self._copy(jax.device_put(jax.tree.map(fill, state), self._sharding))

    def train_and_log(
        self, state: TrainState, hparams: HParams, start: int, stop: int
    ) -> tuple[TrainState, dict[str, np.ndarray]]:
        """Iterations ``start .. stop - 1`` of all runs; ``state`` is used up.

        Returns:
            state, and metrics ``[width]`` by name, on the host.
        """
        state, metrics = self._train_and_log(state, hparams, np.int32(start), np.int32(stop))
        return state, jax.device_get(metrics)

    def _abstract(self, tree: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._sharding), tree
        )


def _concatenate(x: Any, padding: int) -> Any:
    xp = jnp if isinstance(x, jax.Array) else np
    return xp.concatenate([x, xp.repeat(x[-1:], padding, axis=0)])


def _blocks(layout: Layout, function: Callable[..., Any], *arguments: Any) -> Any:
    """Applies a function of one run to a device's runs, block by block.

    The first argument is updated in place where the first output has its type, so that a device
    holds all states once and one block twice.
    """
    one = function if layout.lanes == 1 else jax.vmap(function)
    shape = (layout.blocks, layout.lanes) if layout.lanes > 1 else (layout.blocks,)
    split = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), arguments)

    def block(index: Any) -> Any:
        take = functools.partial(jax.lax.dynamic_index_in_dim, index=index, keepdims=False)
        return jax.tree.map(take, split)

    out_shapes = jax.eval_shape(lambda: one(*block(0)))
    # ``train_and_log`` returns its state first; its result replaces its argument.
    in_place = isinstance(out_shapes, tuple) and not hasattr(out_shapes, "_fields")
    empty = functools.partial(jax.tree.map, lambda x: _zeros((layout.blocks, *x.shape), x.dtype))
    carry = (split[0], empty(out_shapes[1])) if in_place else empty(out_shapes)

    def step(index: Array, carry: Any) -> Any:
        now = (carry[0], *split[1:]) if in_place else split
        take = functools.partial(jax.lax.dynamic_index_in_dim, index=index, keepdims=False)
        result = one(*jax.tree.map(take, now))
        return jax.tree.map(
            lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, part, index, 0),
            carry,
            result,
        )

    result = jax.lax.fori_loop(0, layout.blocks, step, carry)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(shape) :]), result)


def _zeros(shape: tuple[int, ...], dtype: Any) -> Array:
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        words = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(shape, dtype))
        return jax.random.wrap_key_data(jnp.zeros(words.shape, words.dtype))
    return jnp.zeros(shape, dtype)
