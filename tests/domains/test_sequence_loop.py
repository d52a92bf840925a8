"""Training on sequences against benchmarks/sequence_loop.py, which shares no code with it."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from benchmarks import sequence_loop as loop
from gipo_jax import losses
from gipo_jax.config import Config
from gipo_jax.domains.tokens import decoder
from scripts import sequence_fidelity

OURS = decoder.make(loop.VOCAB, loop.LENGTH, loop.LENGTH)


def translated(params: Any) -> Any:
    """Parameters, or gradients, of our decoder in the loop's arrangement."""
    ours = params["params"]

    def dense(layer: Any) -> Any:
        return {"w": layer["kernel"], "b": layer["bias"]}

    def norm(number: int) -> Any:
        layer = ours[f"LayerNorm_{number}"]
        return {"scale": layer["scale"], "shift": layer["bias"]}

    return {
        "embedding": ours["Embed_0"]["embedding"],
        "positions": ours["positions"],
        "layers": [
            {
                "norm1": norm(2 * layer),
                "qkv": dense(ours[f"Attention_{layer}"]["Dense_0"]),
                "mix": dense(ours[f"Attention_{layer}"]["Dense_1"]),
                "norm2": norm(2 * layer + 1),
                "up": dense(ours[f"Dense_{2 * layer}"]),
                "down": dense(ours[f"Dense_{2 * layer + 1}"]),
            }
            for layer in range(loop.LAYERS)
        ],
        "norm": norm(2 * loop.LAYERS),
        "out": dense(ours[f"Dense_{2 * loop.LAYERS}"]),
    }


@pytest.mark.parametrize("clipped", [False, True])
def test_the_policy_gradient_of_a_batch_equals_that_of_an_independent_trainer(
    clipped: bool,
) -> None:
    params = OURS.init(jax.random.key(0))
    behavior = jax.tree.map(
        lambda x: x + 0.05 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), params
    )
    tokens, reward, old = loop.act(translated(behavior), jax.random.key(1))
    prompt, answer = tokens[:, : loop.LENGTH], tokens[:, loop.LENGTH :]
    groups = np.asarray(reward).reshape(loop.PROMPTS, loop.ANSWERS)
    advantage = (groups - groups.mean(1, keepdims=True)).ravel()

    def ours(params: Any) -> jax.Array:
        log_prob, _ = OURS.score(params, prompt, answer)
        loss, _ = losses.policy_loss(
            log_prob,
            old if clipped else jax.lax.stop_gradient(log_prob),
            jnp.asarray(advantage),
            jnp.ones_like(log_prob),
            objective="ppo_clip" if clipped else "no_clip",
        )
        return loss

    found = translated(jax.jit(jax.grad(ours))(params))
    expected = jax.jit(jax.grad(loop.loss), static_argnums=4)(
        translated(params), tokens, reward, old, clipped
    )
    ratio = jnp.exp(loop.of_answers(translated(params), tokens) - old)
    assert jnp.mean(jnp.abs(ratio - 1) > loop.CLIP) > 0.05  # PPO's clip has something to do
    scale = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(expected))
    assert scale > 1e-3
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale), found, expected
    )


def test_curves_that_differ_are_told_from_curves_that_agree() -> None:
    # Seeds vary by .03 about a mean, the two trainers' in opposite order.
    rows = [
        (by, method, seed, step, step / 4 + shift + sign * 0.01 * (seed - 4.5))
        for method, moved in (("same", 0.0), ("other", 0.2))
        for by, shift, sign in (("gipo_jax", moved, 1), ("loop", 0.0, -1))
        for seed in range(10)
        for step in range(1, 4)
    ]
    curves = pd.DataFrame(rows, columns=["by", "method", "seed", "step", "exact"])
    same, other = sequence_fidelity.compare(curves).to_dict("records")
    assert same["low"] < 0 < same["high"]
    assert same["agree"] == same["points"] == 3
    assert other["low"] > 0 and other["agree"] == 0
    assert other["difference"] == pytest.approx(0.2)


def test_the_loop_prints_a_point_for_each_seed_and_interval(
    capsys: pytest.CaptureFixture[str],
) -> None:
    loop.curves("reinforce", seeds=[0, 1], steps=4, points=2, prompts=8)
    rows = json.loads(capsys.readouterr().out)
    assert [row[:2] for row in rows] == [[0, 2], [0, 4], [1, 2], [1, 4]]
    for _, _, reward, exact in rows:
        assert 0 <= exact <= reward <= 1
    assert rows[1][2] != rows[3][2]  # seeds differ


def test_the_loop_and_our_settings_make_the_same_number_of_updates() -> None:
    for method, passes in loop.PASSES.items():
        config = Config(
            **{
                name: value
                for name, value in sequence_fidelity.settings(method, 4).items()
                if name in Config.__dataclass_fields__
            }
        )
        assert config.updates_per_iteration * config.reuse_per_batch == passes
        assert config.block_size == config.batch_size == loop.PROMPTS * loop.ANSWERS
        assert config.num_iterations == 4
