"""The transformer: cache, sampled distribution, end tokens, and vmap against lax.map."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gipo_jax.config import ConfigError
from gipo_jax.domains.tokens import decoder

VOCAB, PROMPT, ANSWER, END = 3, 4, 5, 2
SMALL: dict[str, Any] = {"layers": 2, "width": 16, "heads": 2, "feed_forward": 24}


@pytest.fixture(scope="module")
def small() -> decoder.Decoder:
    return decoder.make(VOCAB, PROMPT, ANSWER, END, **SMALL)


@pytest.fixture(scope="module")
def params(small: decoder.Decoder) -> Any:
    return jax.jit(small.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def prompts() -> jax.Array:
    return jax.random.randint(jax.random.key(1), (64, PROMPT), 0, VOCAB)


def test_log_probabilities_of_sampling_equal_those_without_a_cache(
    small: decoder.Decoder, params: Any, prompts: jax.Array
) -> None:
    answer, log_prob = jax.jit(small.sample)(params, prompts, jax.random.key(2), 0.7)
    uncached, _ = jax.jit(small.score)(params, prompts, answer, 0.7)
    mask = small.mask(answer)
    assert 0.2 < jnp.mean(mask) < 0.95  # some answers end early, others do not
    np.testing.assert_allclose(log_prob[mask], uncached[mask], rtol=0, atol=1e-5)
    assert jnp.max(jnp.abs(jnp.diff(log_prob[mask]))) > 0.1  # not all the same number


def test_a_prompt_of_one_token_needs_no_earlier_cache() -> None:
    short = decoder.make(VOCAB, 1, ANSWER, **SMALL)
    params = jax.jit(short.init)(jax.random.key(0))
    prompt = jnp.array([[0], [1]])
    answer, log_prob = jax.jit(short.sample)(params, prompt, jax.random.key(1))
    uncached, _ = jax.jit(short.score)(params, prompt, answer)
    np.testing.assert_allclose(log_prob, uncached, rtol=0, atol=1e-5)


def test_a_later_token_never_changes_an_earlier_logit(small: decoder.Decoder, params: Any) -> None:
    tokens = jax.random.randint(jax.random.key(3), (1, PROMPT + ANSWER), 0, VOCAB)
    changed = tokens.at[0, 5].set((tokens[0, 5] + 1) % VOCAB)
    before, after = small.logits(params, tokens), small.logits(params, changed)
    np.testing.assert_array_equal(before[0, :5], after[0, :5])
    assert jnp.max(jnp.abs(before[0, 5:] - after[0, 5:])) > 1e-3


def test_the_first_token_depends_on_every_token_of_the_prompt(
    small: decoder.Decoder, params: Any
) -> None:
    def first(prompt: jax.Array) -> jax.Array:
        return small.logits(params, prompt)[0, -1]

    prompt = jnp.zeros((1, PROMPT), jnp.int32)
    for place in range(PROMPT):
        assert jnp.max(jnp.abs(first(prompt.at[0, place].set(1)) - first(prompt))) > 1e-3


def test_answers_come_with_the_probability_that_their_score_says() -> None:
    two = decoder.make(2, 2, 3, **SMALL)
    params = jax.jit(two.init)(jax.random.key(4))
    prompt = jnp.tile(jnp.array([[0, 1]]), (8, 1))
    every = jnp.array(list(itertools.product(range(2), repeat=3)))
    probability = jnp.exp(jnp.sum(two.score(params, prompt, every)[0], axis=-1))
    np.testing.assert_allclose(jnp.sum(probability), 1, rtol=1e-5)

    count = 20_000
    answer, _ = jax.jit(two.sample)(params, jnp.tile(prompt[:1], (count, 1)), jax.random.key(5))
    share = np.bincount(answer @ jnp.array([4, 2, 1]), minlength=8) / count
    # Five standard errors of a share of one half.
    np.testing.assert_allclose(share, probability, rtol=0, atol=5 * 0.5 / np.sqrt(count))


def test_greedy_takes_the_most_likely_token_at_each_step(
    small: decoder.Decoder, params: Any, prompts: jax.Array
) -> None:
    answer = jax.jit(small.greedy)(params, prompts)
    tokens = jnp.concatenate([prompts, answer], axis=1)
    best = jnp.argmax(small.logits(params, tokens), axis=-1)[:, PROMPT - 1 : -1]
    mask = small.mask(answer)
    np.testing.assert_array_equal(answer[mask], best[mask])


def test_after_the_end_token_come_end_tokens_of_log_probability_zero(
    small: decoder.Decoder, params: Any, prompts: jax.Array
) -> None:
    answer, log_prob = jax.jit(small.sample)(params, prompts, jax.random.key(6))
    for row, logs in zip(np.asarray(answer), np.asarray(log_prob), strict=True):
        ends = np.flatnonzero(row == END)
        length = ends[0] + 1 if len(ends) else ANSWER
        assert np.all(row[length:] == END)
        assert np.all(logs[length:] == 0) and np.all(logs[:length] < 0)


def test_the_mask_ends_with_the_first_end_token() -> None:
    answer = jnp.array([[0, 2, 1, 2], [2, 0, 0, 0], [0, 1, 0, 1]])
    expected = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    np.testing.assert_array_equal(decoder.answer_mask(answer, END), np.array(expected, bool))
    assert decoder.answer_mask(answer, None).all()


def test_runs_under_vmap_sample_what_they_sample_alone(
    small: decoder.Decoder, prompts: jax.Array
) -> None:
    keys = jax.random.split(jax.random.key(7), 3)

    def run(key: jax.Array) -> Any:
        return small.sample(small.init(key), prompts, key)

    together = jax.jit(jax.vmap(run))(keys)
    apart = jax.jit(lambda keys: jax.lax.map(run, keys))(keys)
    np.testing.assert_array_equal(together[0], apart[0])
    np.testing.assert_allclose(together[1], apart[1], rtol=0, atol=1e-5)


def test_the_default_size_has_a_tenth_of_a_million_parameters() -> None:
    params = jax.eval_shape(decoder.make(2, 10, 10).init, jax.random.key(0))
    assert 90_000 < sum(x.size for x in jax.tree.leaves(params)) < 110_000


def test_a_width_that_the_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^decoder_width: 30 .* decoder_heads 4"):
        decoder.make(2, 10, 10, width=30)
