"""Losses registered with tunix, or with a stand-in that has the same signatures."""

import importlib
import importlib.util
import inspect
import sys
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.project.test_guide import BLOCK, DOCS

PAD, END = 0, 1
VOCAB, PROMPT, COMPLETION, BATCH = 7, 3, 5, 4
CHUNK = 2
INSTALLED = importlib.util.find_spec("tunix") is not None


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
    ref_per_token_logps: jax.Array | None = None
    segment_ids: jax.Array | None = None
    segment_positions: jax.Array | None = None
    sampler_is_weights: jax.Array | None = None


class Algorithm(NamedTuple):
    temperature: float = 0.7
    beta: float | None = None
    kl_loss_mode: str = "kl"
    kl_clamp_value: float | None = None


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


def log_prob_of(model: Bigram, tokens: jax.Array) -> jax.Array:
    """Log-probabilities of all tokens but the first."""
    log_prob = jax.nn.log_softmax(model(tokens)[0][:, :-1] / Algorithm().temperature)
    return jnp.take_along_axis(log_prob, tokens[:, 1:, None], -1)[..., 0]


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
        segment_ids: jax.Array | None = None,
        segment_positions: jax.Array | None = None,
        chunk_size: int = 0,
    ) -> jax.Array:
        assert chunk_size == CHUNK
        if segment_ids is not None:  # a packed row begins without a prompt
            return jnp.pad(
                log_prob_of(nnx.merge(graphdef, state), completion_tokens), ((0, 0), (1, 0))
            )
        assert (pad_id, eos_id, stop_gradient) == (PAD, END, False)
        assert temperature == Algorithm().temperature
        tokens = jnp.concatenate([prompt_tokens, completion_tokens], axis=1)
        return log_prob_of(nnx.merge(graphdef, state), tokens)[:, PROMPT - 1 :]

    def register_policy_loss_fn(name: str) -> Any:
        return lambda function: registry.setdefault(name, function)

    names = ("tunix", "tunix.rl", "tunix.sft")
    modules = {name: types.ModuleType(name) for name in names}
    common: Any = types.SimpleNamespace(
        compute_per_token_logps=compute_per_token_logps,
        compute_kl_divergence=lambda log_prob, other, mode, clamp_value: log_prob - other,
    )
    functions = types.SimpleNamespace(
        register_policy_loss_fn=register_policy_loss_fn, get_policy_loss_fn=registry.get
    )
    utils = types.SimpleNamespace(WeightedMetric=Weighted, LossOutput=Output)
    modules["tunix.rl"].__dict__.update(common=common, function_registry=functions)
    modules["tunix.sft"].__dict__.update(utils=utils if with_output else types.SimpleNamespace())
    return modules


@pytest.fixture(params=["pair", "LossOutput"])
def register(request: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The call that registers, with tunix where it is installed, else with either signature."""
    if not INSTALLED:
        for name, module in stand_in(request.param == "LossOutput").items():
            monkeypatch.setitem(sys.modules, name, module)
    elif request.param == "LossOutput":
        pytest.skip("tunix itself has one signature")
    monkeypatch.delitem(sys.modules, "gipo_jax.integrations.tunix", raising=False)
    return importlib.import_module("gipo_jax.integrations.tunix").register


def called(loss_fn: Any, model: Bigram, batch: Example, algorithm: Algorithm) -> Any:
    """Loss and metrics of either signature; later versions than 0.1.7 pass a size of chunks."""
    has_chunks = (
        "chunk_size"
        in inspect.signature(
            importlib.import_module("tunix.rl").common.compute_per_token_logps
        ).parameters
    )
    more = {"compute_logps_chunk_size": CHUNK} if has_chunks else {}
    result = loss_fn(model, batch, algorithm, pad_id=PAD, eos_id=END, **more)
    if hasattr(result, "primary_loss"):
        return result.primary_loss.compute(), result.aux_metrics
    return result


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


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("old", [False, True])
def test_the_loss_under_tunix_is_the_policy_loss_of_its_batch(
    register: Any, old: bool, mode: str
) -> None:
    batch, model = example(old), Bigram()
    weights = jnp.linspace(0.5, 1.5, BATCH * COMPLETION).reshape(BATCH, COMPLETION)
    batch = batch._replace(sampler_is_weights=weights)
    loss_fn = register("ours", "ppo_clip", ratio_level="sequence", loss_agg_mode=mode, clip_eps=0.3)
    assert (
        importlib.import_module("tunix.rl").function_registry.get_policy_loss_fn("ours") is loss_fn
    )
    table = model.table[...]

    def of_tunix(model: Bigram) -> tuple[jax.Array, Any]:
        return called(loss_fn, model, batch, Algorithm())

    def expected(table: jax.Array) -> jax.Array:
        log_prob = expected_log_prob(table, batch)
        behavior = batch.old_per_token_logps
        behavior = jax.lax.stop_gradient(log_prob) if behavior is None else behavior
        loss, total = jnp.zeros(()), 0
        for row in range(BATCH):
            counted = batch.completion_mask[row] == 1
            x = (log_prob - behavior)[row][counted]
            mean = jax.lax.stop_gradient(jnp.mean(x)) + x - jax.lax.stop_gradient(x)
            ratio, a = jnp.exp(mean), batch.advantages[row]
            surrogate = jnp.minimum(ratio * a, jnp.clip(ratio, 0.7, 1.3) * a)
            each = surrogate * weights[row][counted]
            loss -= jnp.sum(each) if mode == "token-mean" else jnp.mean(each)
            total += each.size if mode == "token-mean" else 1
        return loss / total

    (loss, metrics), grads = nnx.value_and_grad(of_tunix, has_aux=True)(model)
    wanted, gradient = jax.value_and_grad(expected)(table)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    np.testing.assert_allclose(grads["table"][...], gradient, rtol=1e-4, atol=1e-6)
    assert gradient.any()
    assert {"kl", "pg_clipfrac"} <= metrics.keys()
    assert (metrics["kl"] > 0.01) == old


def test_a_reference_policy_is_kept_near_by_beta_under_tunix(register: Any) -> None:
    batch, model = example(True), Bigram()
    table = jax.random.normal(jax.random.key(3), (VOCAB, VOCAB))
    reference = expected_log_prob(table, batch)
    loss_fn = register("ours")
    without, _ = called(loss_fn, model, batch, Algorithm())
    batch = batch._replace(ref_per_token_logps=reference)
    loss, metrics = called(loss_fn, model, batch, Algorithm(beta=0.3))
    gap = (expected_log_prob(model.table[...], batch) - reference)[batch.completion_mask == 1]
    np.testing.assert_allclose(metrics["kl_loss"], np.mean(gap), rtol=1e-5)
    np.testing.assert_allclose(loss - without, 0.3 * np.mean(gap), rtol=1e-4)


def test_packed_rows_under_tunix_give_what_their_responses_give_apart(register: Any) -> None:
    if INSTALLED:
        pytest.skip("the model of this test does not read segments")
    apart, model = example(True), Bigram()
    loss_fn = register("ours", ratio_level="sequence")
    loss, _ = called(loss_fn, model, apart, Algorithm())

    def packed(x: jax.Array, prompt: Any) -> jax.Array:
        """Two responses a row, each behind its prompt."""
        prompts = jnp.broadcast_to(prompt, (BATCH, PROMPT)).astype(x.dtype)
        return jnp.concatenate([prompts, x], axis=1).reshape(BATCH // 2, -1)

    ids = jnp.broadcast_to(jnp.arange(BATCH)[:, None] % 2 + 1, (BATCH, COMPLETION))
    advantages = jnp.broadcast_to(apart.advantages[:, None], (BATCH, COMPLETION))
    old = apart.old_per_token_logps
    assert old is not None
    rows = Example(
        jnp.zeros((BATCH // 2, 0), jnp.int32),
        packed(apart.completion_ids, apart.prompt_ids),
        packed(apart.completion_mask, 0),
        packed(advantages, 0),
        packed(old, 0),
        segment_ids=packed(ids, ids[:, :1]),
    )
    together, _ = called(loss_fn, model, rows, Algorithm())
    np.testing.assert_allclose(together, loss, rtol=1e-5)


def test_the_page_on_sequences_registers_a_loss(register: Any) -> None:
    blocks = BLOCK.findall((DOCS / "sequences.md").read_text(encoding="utf-8"))
    (text,) = (text for _, name, text in blocks if name == "tunix_gipo.py")
    exec(compile(text, "tunix_gipo.py", "exec"), {"__name__": "tunix_gipo"})
    loss_fn = importlib.import_module("tunix.rl").function_registry.get_policy_loss_fn("gipo")
    assert jnp.isfinite(called(loss_fn, Bigram(), example(True), Algorithm())[0])
