"""Dense networks in one kernel each way, for accelerators: ``mlp="fused"``.

Layer by layer, the hidden activations of a batch are most of the bytes that an update moves. Here a
kernel keeps those of some rows on the chip, and the backward pass computes them anew. Written with
Pallas: Triton on GPUs, Mosaic on TPUs, and its interpreter on CPU, which is right and slow.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu, triton

from gipo_jax.config import ConfigError

Layers = tuple[tuple[Array, Array], ...]  # kernel [in, out] and bias [1, out] of each layer
Activation = Callable[[Array], Array]
Network = Callable[[Layers, Array], Array]
Precision = str | jax.lax.DotAlgorithmPreset

_WIDEST = 128
_MOST_WEIGHTS = 40_960  # With what products need, all of an H100's shared memory
_NARROW = 16
_MOST_IN_SHARED_MEMORY = 12_000  # Weights
_CHUNK = 32  # Rows whose activations are on the chip at once
_ROWS = 512  # Rows of which one program adds up the weights' gradients


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def mlp(activation: Activation, layers: Sequence[tuple[Array, Array]], x: Array) -> Array:
    """Outputs ``[rows, out]`` of dense layers, all but the last with an activation after it.

    Args:
        activation: of each number apart.
        layers: kernel ``[in, out]`` and bias ``[out]`` of each, float32; see ``check``.
        x: ``[rows, in]``, float32.
    """
    return _forward(activation, layers, x)[0]


def _forward(
    activation: Activation, layers: Sequence[tuple[Array, Array]], x: Array
) -> tuple[Array, Any]:
    outputs = layers[-1][1].shape[0]
    y = _on_platform(_forward_kernel, activation, _pad_layers(layers), _pad_rows(x))
    return y[: x.shape[0], :outputs], (layers, x)


def _backward(activation: Activation, residuals: Any, dy: Array) -> tuple[Any, Array]:
    layers, x = residuals
    # Rows that fill up the last block have a gradient of 0.
    dx, *grads = _on_platform(
        _backward_kernel, activation, _pad_layers(layers), _pad_rows(x), _pad_rows(dy)
    )
    sums = [jnp.sum(grad, axis=0) for grad in grads]
    pairs = zip(sums[::2], sums[1::2], layers, strict=True)
    exact = tuple((k[: w.shape[0], : w.shape[1]], c[0, : b.size]) for k, c, (w, b) in pairs)
    return exact, dx[: x.shape[0], : x.shape[1]]


mlp.defvjp(_forward, _backward)


def check(widths: tuple[int, ...]) -> None:
    """Refuses layers that a GPU's shared memory cannot hold. Raises ConfigError."""
    weights = sum(_width(a) * _width(b) for a, b in itertools.pairwise(widths))
    if max(widths) > _WIDEST or weights > _MOST_WEIGHTS:
        valid = f"'layers', because observation, hidden sizes and outputs {widths} are more than"
        valid += f" {_WIDEST} wide, or more than {_MOST_WEIGHTS} weights with widths as powers of 2"
        raise ConfigError("mlp", "fused", valid)


def plain(
    activation: Activation, layers: Layers, x: Array, precision: Precision = "highest"
) -> Array:
    """The same layer by layer."""
    for i, (kernel, bias) in enumerate(layers):
        x = _product(x, kernel, precision) + bias
        x = x if i == len(layers) - 1 else activation(x)
    return x


def row_numbers(columns: int, platform: str) -> int:
    """About how many numbers two networks keep for each row of so many columns in an update.

    A TPU fills up the columns of every array beside the kernels to 128.
    """
    return 22 * 128 if platform == "tpu" else 4 * _width(columns) + 64


def _product(x: Array, kernel: Array, precision: Precision) -> Array:
    """Matrix product; written out where a side is too narrow for Triton's own."""
    if min(kernel.shape) < _NARROW:
        return jnp.sum(x[:, :, None] * kernel[None], axis=1)
    return jnp.dot(x, kernel, precision=precision)


def _block(rows: int) -> int:
    """Rows of a program of the backward pass: a multiple of a chunk."""
    return min(_ROWS, -(-rows // _CHUNK) * _CHUNK)


def _width(columns: int) -> int:
    """The next power of 2, as Triton's arrays need it."""
    return 1 << (columns - 1).bit_length()


def _pad(x: Array, rows: int) -> Array:
    """Zeros behind rows and columns."""
    return jnp.pad(x, ((0, rows - x.shape[0]), (0, _width(x.shape[1]) - x.shape[1])))


def _pad_rows(x: Array) -> Array:
    return _pad(x, x.shape[0] + -x.shape[0] % _block(x.shape[0]))


def _pad_layers(layers: Sequence[tuple[Array, Array]]) -> Layers:
    return tuple((_pad(w, _width(w.shape[0])), _pad(b[None], 1)) for w, b in layers)


def _on_platform(call: Callable[..., Any], activation: Activation, *arrays: Any) -> Any:
    """A kernel as the platform runs it."""

    def of(precision: Precision = "highest", **options: Any) -> Callable[..., Any]:
        network = functools.partial(plain, activation, precision=precision)
        return functools.partial(call, network, options)

    # On a GPU's tensor cores three products of 11 bits keep what one of 24 bits keeps beside them.
    # They need all weights in shared memory, several times.
    small = sum(kernel.size for kernel, _ in arrays[0]) <= _MOST_IN_SHARED_MEMORY
    three = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3 if small else "highest"
    return jax.lax.platform_dependent(
        *arrays,
        cpu=of(interpret=True),
        cuda=of(three, compiler_params=triton.CompilerParams(num_stages=1)),
        tpu=of(compiler_params=tpu.CompilerParams()),
    )


def _forward_kernel(network: Network, options: Any, layers: Layers, x: Array) -> Array:
    def kernel(x_ref: Any, *refs: Any) -> None:
        *weights, y_ref = refs
        y_ref[...] = network(_read(weights), x_ref[...])

    # Acting passes few rows: a program for each chunk.
    shape = (x.shape[0], layers[-1][1].shape[1])
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(shape, x.dtype),
        grid=(x.shape[0] // _CHUNK,),
        in_specs=[_rows(_CHUNK, x.shape[1]), *map(_whole, jax.tree.leaves(layers))],
        out_specs=_rows(_CHUNK, shape[1]),
        **options,
    )(x, *jax.tree.leaves(layers))


def _backward_kernel(
    network: Network, options: Any, layers: Layers, x: Array, dy: Array
) -> list[Array]:
    """Gradients of the rows, and those of the weights as one part of each program."""
    weights = jax.tree.leaves(layers)
    rows = _block(x.shape[0])
    programs = x.shape[0] // rows

    def kernel(x_ref: Any, dy_ref: Any, *refs: Any) -> None:
        given, dx_ref, grad_refs = refs[: len(weights)], refs[len(weights)], refs[-len(weights) :]
        layers = _read(given)

        def chunk(i: Any, sums: Any) -> Any:
            here = pl.ds(i * _CHUNK, _CHUNK)
            _, pull = jax.vjp(network, layers, x_ref[here, :])
            grads, dx_ref[here, :] = pull(dy_ref[here, :])
            return jax.tree.map(jnp.add, sums, grads)

        sums = jax.lax.fori_loop(0, rows // _CHUNK, chunk, jax.tree.map(jnp.zeros_like, layers))
        for ref, total in zip(grad_refs, jax.tree.leaves(sums), strict=True):
            ref[...] = total

    parts = [pl.BlockSpec((None, *w.shape), lambda i: (i, 0, 0)) for w in weights]
    return pl.pallas_call(
        kernel,
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            *(jax.ShapeDtypeStruct((programs, *w.shape), w.dtype) for w in weights),
        ],
        grid=(programs,),
        in_specs=[_rows(rows, x.shape[1]), _rows(rows, dy.shape[1]), *map(_whole, weights)],
        out_specs=[_rows(rows, x.shape[1]), *parts],
        **options,
    )(x, dy, *weights)


def _read(refs: Sequence[Any]) -> Layers:
    numbers = [ref[...] for ref in refs]
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def _rows(rows: int, columns: int) -> pl.BlockSpec:
    return pl.BlockSpec((rows, columns), lambda i: (i, 0))


def _whole(x: Array) -> pl.BlockSpec:
    return pl.BlockSpec(x.shape, lambda i: (0, 0))
