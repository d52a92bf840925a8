"""The compiled program of a group of runs: which runs share a vector lane, a loop, a device."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gipo_jax import config, environments, train
from gipo_jax.config import HParams
from gipo_jax.domains import Domain
from gipo_jax.learner import Metrics, TrainState

CPU_LANES = 4
"""Runs vectorised together in mode ``vmap`` on CPU.

XLA compiles a batch of 4 and one of 8 to different arithmetic there. A fixed width gives a run the
same bits in a sweep of any size, and wider ones were measured to be no faster.
"""


class Layout(NamedTuple):
    """How ``width`` runs are laid out: over devices, on each in blocks, each of ``lanes``."""

    devices: tuple[jax.Device, ...]  # which share the runs evenly
    blocks: int  # that each device works through one after the other
    lanes: int  # runs vectorised together in a block

    @property
    def width(self) -> int:
        """Number of runs, padding included."""
        return len(self.devices) * self.blocks * self.lanes


def layout(mode: str, lanes: int | None, devices: Sequence[jax.Device], runs: int) -> Layout:
    """The layout of runs; where they do not fill it, it has room for more.

    Mode ``vmap`` has runs side by side in vector operations, ``map`` one block of ``lanes`` (1 by
    default) after the other inside the program, ``loop`` one run per device at a time. Of one
    process's devices no more are used than there are blocks; of several processes', all take part.
    """
    least = len(devices) if len({device.process_index for device in devices}) > 1 else 1
    if mode == "loop":
        return Layout(tuple(devices[: max(runs, least)]), 1, 1)
    if mode == "vmap":
        on_cpu = devices[0].platform == "cpu"
        width = CPU_LANES if on_cpu else -(-runs // len(devices))
    else:
        width = lanes or 1
    blocks = -(-runs // width)
    used = max(min(len(devices), blocks), least)
    return Layout(tuple(devices[:used]), -(-blocks // used), width)


def stack(hparams: Sequence[HParams], width: int) -> HParams:
    """Settings of runs as arrays ``[width]``, the last one repeated to fill up."""
    return config.stack([*hparams, *[hparams[-1]] * (width - len(hparams))])


class Program:
    """``train.init`` and ``train.train_and_log`` for a batch of runs, compiled on request.

    Devices of all processes form a mesh, on which each trains runs of its own.
    """

    new_episodes = 0

    def __init__(self, domain: Domain, layout: Layout, example: HParams) -> None:
        """Traces the program, so that errors in an objective come here."""
        self.layout = layout
        self.domain = domain
        mesh = Mesh(np.asarray(layout.devices), ("runs",), axis_types=(AxisType.Auto,))
        self._sharding = NamedSharding(mesh, P("runs"))
        share = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)

        def init(hparams: HParams) -> TrainState:
            return _blocks(layout, functools.partial(train.init, domain), hparams)

        def train_and_log(
            state: TrainState, hparams: HParams, start: Array, stop: Array
        ) -> tuple[TrainState, Metrics]:
            def one(state: TrainState, hparams: HParams) -> tuple[TrainState, Metrics]:
                return train.train_and_log(domain, state, hparams, start, stop)

            return _blocks(layout, one, state, hparams)

        def fill(restored: TrainState, first: TrainState, present: Array) -> TrainState:
            def choose(x: Array, y: Array) -> Array:
                return jnp.where(present.reshape(-1, *[1] * (x.ndim - 1)), x, y)

            return jax.tree.map(choose, restored, first)

        runs = P("runs")
        hparams = self._abstract(stack([example], layout.width))
        step = jax.ShapeDtypeStruct((), jnp.int32)
        init_shared = share(init, in_specs=(runs,), out_specs=runs)
        train_and_log_shared = share(
            train_and_log, in_specs=(runs, runs, P(), P()), out_specs=(runs, runs)
        )
        self.init_function = jax.jit(init_shared), (hparams,)
        self._init_traced = self.init_function[0].trace(hparams)
        self.state = self._abstract(self._init_traced.out_info)
        arguments = self.state, hparams, step, step
        self.train_and_log_function = jax.jit(train_and_log_shared, donate_argnums=0), arguments
        self._train_and_log_traced = self.train_and_log_function[0].trace(*arguments)
        self.metrics = list(self._train_and_log_traced.out_info[1])
        # What came from a file may lie in memory that is not JAX's to reuse: copies do not.
        fill_shared = share(fill, in_specs=(runs, runs, runs), out_specs=runs)
        self._fill = jax.jit(fill_shared, donate_argnums=1)
        self._copy = jax.jit(functools.partial(jax.tree.map, jnp.copy))
        self._init: Any = None
        self._train_and_log: Any = None

    def compile(self) -> None:
        """Compiles both functions, once."""
        with environments.uncached() if self.domain.host else contextlib.nullcontext():
            self._init = self._init_traced.lower().compile()
            self._train_and_log = self._train_and_log_traced.lower().compile()

    @property
    def is_compiled(self) -> bool:
        return self._train_and_log is not None

    def place(self, hparams: Sequence[HParams]) -> HParams:
        """Settings of at most ``layout.width`` runs on the devices."""
        return self._place(stack(hparams, self.layout.width))

    def init(self, hparams: HParams) -> TrainState:
        """First states, arrays ``[width, ...]``."""
        return self._init(hparams)

    def on_host(self, runs: int) -> TrainState:
        """Shapes and types of the states of a number of runs as NumPy arrays."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((runs, *x.shape[1:]), x.dtype), self.state
        )

    def start(self, hparams: HParams, stored: Any, runs: int) -> TrainState:
        """First states, or ``stored`` ones of ``runs`` to go on from.

        They are arrays ``[width, ...]`` on the devices, or NumPy arrays ``[runs, ...]``.
        """
        if stored is None:
            return self.init(hparams)
        if not isinstance(stored.diverged_at, jax.Array):
            last = np.minimum(np.arange(self.layout.width), runs - 1)
            stored = jax.tree.map(lambda x: x[last], stored)
            stored, self.new_episodes = self.domain.restore(stored)
            return self._copy(self._place(stored))
        if runs == self.layout.width:
            return self._copy(stored)
        # First states cost what a run does before its first iteration, and use up simulators.
        first = self.init(hparams)
        return self._fill(stored, first, self._place(np.arange(self.layout.width) < runs))

    def train_and_log(
        self, state: TrainState, hparams: HParams, start: int, stop: int
    ) -> tuple[TrainState, dict[str, np.ndarray], np.ndarray]:
        """Iterations ``start .. stop - 1`` of all runs; ``state`` is used up.

        Also gives, on every host, metrics ``[width]`` by name and ``diverged_at`` ``[width]``.
        """
        state, metrics = self._train_and_log(state, hparams, np.int32(start), np.int32(stop))
        seen = (metrics, state.diverged_at)
        return state, *(
            jax.device_get(seen)
            if jax.process_count() == 1
            else multihost_utils.process_allgather(seen, tiled=True)
        )

    def _place(self, tree: Any) -> Any:
        """Host arrays ``[width, ...]``, the same in every process, on the devices."""

        def place(x: Any) -> Array:
            if isinstance(x, jax.Array):
                return jax.random.wrap_key_data(place(np.asarray(jax.random.key_data(x))))
            return jax.make_array_from_callback(x.shape, self._sharding, lambda index: x[index])

        return jax.tree.map(place, tree)

    def _abstract(self, tree: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._sharding), tree
        )


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
