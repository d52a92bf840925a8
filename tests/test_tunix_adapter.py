"""The adapter of docs/sequences.md under tunix, or under a stand-in with the same signatures."""

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gipo_jax.losses import policy_loss
from tests.project.test_guide import BLOCK, DOCS

PAD, END = 0, 1
VOCAB, PROMPT, COMPLETION, BATCH = 7, 3, 5, 4


class Bigram(nnx.Module):
    """Logits of the next token from the last one, called as tunix calls a model."""

    def __init__(self) -> None:
        self.table = nnx.Param(jax.random.normal(jax.random.key(0), (VOCAB, VOCAB)))

    def __call__(self, tokens: jax.Array, **given: Any) -> tuple[jax.Array, None]:
        return self.table[...][tokens], None


class Example(NamedTuple):
    """The fields of tunix's ``TrainExample`` that a loss reads."""

    prompt_ids: jax.Array
    completion_ids: jax.Array
    completion_mask: jax.Array
    advantages: jax.Array
    old_per_token_logps: jax.Array | None
    segment_ids: jax.Array | None = None


class Algorithm(NamedTuple):
    temperature: float = 0.7


class Weighted(NamedTuple):
    unreduced_sum: jax.Array
    denominator: jax.Array
    min_denom: float

    def compute(self) -> jax.Array:
        return self.unreduced_sum / jnp.maximum(self.denominator, self.min_denom)


class Output(NamedTuple):
    primary_loss: Weighted
    aux_metrics: dict[str, Any]


def expected_log_prob(table: jax.Array, example: Example) -> jax.Array:
    before = jnp.concatenate([example.prompt_ids[:, -1:], example.completion_ids[:, :-1]], axis=1)
    log_prob = jax.nn.log_softmax(table[before] / Algorithm().temperature)
    return jnp.take_along_axis(log_prob, example.completion_ids[..., None], -1)[..., 0]


def stand_in(with_output: bool) -> dict[str, types.ModuleType]:
    """Modules named as tunix's, with as much of them as a loss sees."""
    registry: dict[str, Any] = {}

    def compute_per_token_logps(
        graphdef: Any,
        state: Any,
        prompt_tokens: jax.Array,
        completion_tokens: jax.Array,
        pad_id: int,
        eos_id: int,
        stop_gradient: bool = True,
        temperature: float = 1.0,
    ) -> jax.Array:
        assert (pad_id, eos_id, stop_gradient) == (PAD, END, False)
        assert temperature == Algorithm().temperature
        tokens = jnp.concatenate([prompt_tokens, completion_tokens], axis=1)
        logits, _ = nnx.merge(graphdef, state)(tokens)
        log_prob = jax.nn.log_softmax(logits[:, PROMPT - 1 : -1] / temperature)
        return jnp.take_along_axis(log_prob, completion_tokens[..., None], -1)[..., 0]

    def register_policy_loss_fn(name: str) -> Any:
        return lambda function: registry.setdefault(name, function)

    names = ("tunix", "tunix.rl", "tunix.sft")
    modules = {name: types.ModuleType(name) for name in names}
    common: Any = types.SimpleNamespace(compute_per_token_logps=compute_per_token_logps)
    functions = types.SimpleNamespace(
        register_policy_loss_fn=register_policy_loss_fn, get_policy_loss_fn=registry.get
    )
    utils = types.SimpleNamespace(WeightedMetric=Weighted, LossOutput=Output)
    modules["tunix.rl"].__dict__.update(common=common, function_registry=functions)
    modules["tunix.sft"].__dict__.update(utils=utils if with_output else types.SimpleNamespace())
    return modules


@pytest.fixture(params=["pair", "LossOutput"])
def loss_fn(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The registered loss: of tunix where it is installed, else of both of its signatures."""
    if importlib.util.find_spec("tunix") is None:
        for name, module in stand_in(request.param == "LossOutput").items():
            monkeypatch.setitem(sys.modules, name, module)
    elif request.param == "LossOutput":
        pytest.skip("tunix itself has one signature")
    blocks = BLOCK.findall((DOCS / "sequences.md").read_text(encoding="utf-8"))
    (text,) = (text for _, name, text in blocks if name == "tunix_gipo.py")
    exec(compile(text, "tunix_gipo.py", "exec"), {"__name__": "tunix_gipo"})
    registry: Any = importlib.import_module("tunix.rl").function_registry
    return registry.get_policy_loss_fn("gipo")


def example(old: bool) -> Example:
    key_prompt, key_answer = jax.random.split(jax.random.key(1))
    lengths = jnp.array([5, 2, 3, 4])[:, None]
    mask = jnp.arange(COMPLETION) < lengths
    answer = jax.random.randint(key_answer, (BATCH, COMPLETION), 2, VOCAB)
    given = Example(
        jax.random.randint(key_prompt, (BATCH, PROMPT), 2, VOCAB),
        jnp.where(mask, answer, PAD),
        mask.astype(jnp.int32),
        jnp.array([1.0, -0.5, 0.3, -0.8]),
        None,
    )
    if not old:
        return given
    table = jax.random.normal(jax.random.key(2), (VOCAB, VOCAB))
    return given._replace(old_per_token_logps=expected_log_prob(table, given))


def value(result: Any) -> tuple[jax.Array, Any]:
    """Loss and metrics of either signature."""
    if hasattr(result, "primary_loss"):
        return result.primary_loss.compute(), result.aux_metrics
    return result


@pytest.mark.parametrize("old", [False, True])
def test_the_loss_under_tunix_is_the_policy_loss_of_its_batch(loss_fn: Any, old: bool) -> None:
    batch, model = example(old), Bigram()
    table = model.table[...]

    def of_tunix(model: Bigram) -> tuple[jax.Array, Any]:
        return value(loss_fn(model, batch, Algorithm(), pad_id=PAD, eos_id=END))

    def expected(table: jax.Array) -> tuple[jax.Array, Any]:
        log_prob = expected_log_prob(table, batch)
        behavior = batch.old_per_token_logps
        behavior = jax.lax.stop_gradient(log_prob) if behavior is None else behavior
        return policy_loss(log_prob, behavior, batch.advantages, batch.completion_mask)

    (loss, metrics), grads = nnx.value_and_grad(of_tunix, has_aux=True)(model)
    (wanted, _), gradient = jax.value_and_grad(expected, has_aux=True)(table)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    np.testing.assert_allclose(grads["table"][...], gradient, rtol=1e-4, atol=1e-6)
    assert gradient.any()
    assert {"kl", "pg_clipfrac"} <= metrics.keys()
    assert (metrics["kl"] > 0.01) == old


def test_packed_rows_are_refused_under_tunix(loss_fn: Any) -> None:
    batch = example(False)._replace(segment_ids=jnp.ones((BATCH, COMPLETION)))
    with pytest.raises(ValueError, match="one answer a row"):
        loss_fn(Bigram(), batch, Algorithm(), pad_id=PAD, eos_id=END)
