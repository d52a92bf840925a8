"""Dense networks in one kernel each way, as the interpreter of kernels runs them."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gipo_jax import fused, networks, train
from gipo_jax.config import Config, ConfigError

ACTIVATIONS: dict[str, Any] = {
    "tanh": (np.tanh, lambda x: 1 - np.tanh(x) ** 2),
    "relu": (lambda x: np.maximum(x, 0), lambda x: x > 0),
    "elu": (lambda x: np.where(x > 0, x, np.expm1(x)), lambda x: np.where(x > 0, 1, np.exp(x))),
    "silu": (
        lambda x: x / (1 + np.exp(-x)),
        lambda x: (1 + np.exp(-x) + x * np.exp(-x)) / (1 + np.exp(-x)) ** 2,
    ),
}
"""Functions and derivatives in NumPy."""


def by_hand(name: str, layers: Any, x: Any, dy: Any) -> tuple[Any, Any, Any]:
    """Outputs, gradients of the layers and of the rows in double precision."""
    function, slope = ACTIVATIONS[name]
    inputs, before = [], []
    for i, (kernel, bias) in enumerate(layers):
        inputs.append(x)
        before.append(x @ kernel + bias)
        x = before[-1] if i == len(layers) - 1 else function(before[-1])
    grads = []
    for i in reversed(range(len(layers))):
        dy = dy if i == len(layers) - 1 else dy * slope(before[i])
        grads.append((inputs[i].T @ dy, dy.sum(0)))
        dy = dy @ layers[i][0].T
    return x, tuple(reversed(grads)), dy


@pytest.mark.parametrize(
    ("name", "widths", "rows"),
    [
        ("tanh", (4, 64, 64, 2), 700),  # more than one program of rows, the last not filled
        ("relu", (39, 128, 1), 64),
        ("silu", (3, 5, 7), 1),
        ("elu", (17, 9, 24, 16), 33),
    ],
)
def test_values_and_gradients_are_those_of_the_layers_one_by_one(
    name: str, widths: tuple[int, ...], rows: int
) -> None:
    rng = np.random.default_rng(0)
    runs = 2
    layers = tuple(
        (rng.normal(size=(runs, a, b)) / a**0.5, rng.normal(size=(runs, b)))
        for a, b in itertools.pairwise(widths)
    )
    x, dy = rng.normal(size=(runs, rows, widths[0])), rng.normal(size=(runs, rows, widths[-1]))

    def both(layers: Any, x: Any, dy: Any) -> Any:
        activation = networks._ACTIVATIONS[name]
        y, pull = jax.vjp(lambda *given: fused.mlp(activation, *given), layers, x)
        return y, *pull(dy)

    single = jax.tree.map(jnp.float32, (layers, x, dy))
    ours = jax.jit(jax.vmap(both))(*single)
    for run in range(runs):
        expected = by_hand(name, *jax.tree.map(lambda a, run=run: a[run], (layers, x, dy)))
        for got, right in zip(
            jax.tree.leaves(jax.tree.map(lambda a, run=run: a[run], ours)),
            jax.tree.leaves(expected),
            strict=True,
        ):
            np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-5 * np.abs(right).max())


@pytest.mark.slow
@pytest.mark.parametrize("head", [pytest.param("tokens", marks=pytest.mark.long), "gaussian"])
def test_training_in_one_kernel_goes_like_training_layer_by_layer(head: str) -> None:
    config = Config(
        env="Pendulum-v1", action_head=head, total_steps=640, num_logs=2, eval_episodes=0
    )
    hparams = train.stack([train.make_hparams(config, seed=seed) for seed in range(2)])
    found = [
        jax.jit(jax.vmap(train.make_train(dataclasses.replace(config, mlp=mlp))))(hparams)
        for mlp in ("layers", "fused")
    ]
    params, fused_params = (jax.tree.leaves(state.learner.params) for state, _ in found)
    for one, other in zip(params, fused_params, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
    for name, one in found[0][1].items():
        np.testing.assert_allclose(one, found[1][1][name], rtol=2e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("shape", "hidden", "message"),
    [
        ((10, 10, 4), (64,), "mlp: 'fused' .*'layers', because observations are images"),
        ((129,), (64,), r"mlp: 'fused' .*\(129, 64, 2\) are more than 128 wide"),
        ((4,), (256,), r"mlp: 'fused' .*\(4, 256, 2\) are more than 128 wide"),
        ((100,), (128, 128, 128), "mlp: 'fused' .*or more than 40960 weights"),
    ],
)
def test_networks_that_do_not_fit_on_the_chip_are_refused(
    shape: tuple[int, ...], hidden: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        networks.make(Config(mlp="fused", hidden_sizes=hidden), shape, networks.categorical(1, 2))
