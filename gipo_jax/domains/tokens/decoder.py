"""A small causal transformer as a policy over answers (flax), sampled with a key-value cache.

A prompt has a fixed length, and the answer follows it. Where the task has an end token, an answer
ends with its first one; the tokens after it are padding, which ``answer_mask`` leaves out.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from gipo_jax import cpu, networks, packed
from gipo_jax.config import ConfigError

Params = Any
Cache = tuple[tuple[Array, Array], ...]  # keys and values a layer, [batch, heads, time, size]


class Decoder(NamedTuple):
    """A policy over answers as pure functions.

    Prompts are int32 ``[batch, prompt_length]``, answers and what is said of their tokens
    ``[batch, answer_length]``.
    """

    init: Callable[[Array], Params]  # key -> params
    # params, tokens [batch, time] -> [batch, time, vocab] of the token after each one
    logits: Callable[[Params, Array], Array]
    # params, prompt, key, temperature=1.0 -> answer, log_prob (0 at padding)
    sample: Callable[..., tuple[Array, Array]]
    greedy: Callable[[Params, Array], Array]  # params, prompt -> answer of likeliest tokens
    # params, prompt, answer, temperature=1.0 -> log_prob, entropy in nats (anything at padding)
    score: Callable[..., tuple[Array, Array]]
    # as score, and the log-probability of every token, [batch, answer_length, vocab]
    score_all: Callable[..., tuple[Array, Array, Array]]
    # params, tokens, the tokens after them, their positions and responses, temperature=1.0 -> as
    # score, all [rows, width]: of rows that hold several prompts with their responses, in which a
    # token sees those of its own response alone
    score_joined: Callable[..., tuple[Array, Array]]
    mask: Callable[[Array], Array]  # answer -> bool, same shape; false at padding


def make(
    vocab: int,
    prompt_length: int,
    answer_length: int,
    end: int | None = None,
    *,
    layers: int = 3,
    width: int = 64,
    heads: int = 4,
    feed_forward: int = 128,
    precision: networks.Precision = networks.FLOAT32,
) -> Decoder:
    """Builds a decoder; the default size has about 0.1 million parameters.

    Args:
        vocab: number of tokens, >= 2.
        prompt_length: tokens of a prompt, >= 1.
        answer_length: most tokens of an answer, the end token included, >= 1.
        end: token that ends an answer, in [0, vocab); None where all have ``answer_length`` tokens.
        layers: number of layers, >= 1.
        width: of the residual stream, which the attention ``heads`` must divide (else ConfigError).
        feed_forward: width of the hidden layer of the feed-forward part, >= 1.
        precision: types of numbers.
    """
    if width % heads:
        raise ConfigError("decoder_width", width, f"a multiple of decoder_heads {heads}")
    time = prompt_length + answer_length
    network = Transformer(vocab, time, layers, width, heads, feed_forward, precision)
    head = networks.categorical(answer_length, vocab)

    apply = networks.exact(network.apply)

    def init(key: Array) -> Params:
        return network.init(key, jnp.zeros((1, 1), jnp.int32))

    def logits(params: Params, tokens: Array) -> Array:
        return apply(params, tokens)[0]

    def generate(
        params: Params,
        prompt: Array,
        choose: Callable[[Array, Any], Array],
        noise: Any,
        temperature: ArrayLike,
    ) -> tuple[Array, Array]:
        """Answers whose tokens ``choose(logits [batch, vocab], noise)`` picks one by one."""
        shape = (prompt.shape[0], heads, time - 1, width // heads)
        nothing = jnp.zeros(shape, precision.compute or jnp.float32)
        cache: Cache = ((nothing, nothing),) * layers
        if prompt_length > 1:
            cache = apply(params, prompt[:, :-1], cache, 0)[1]

        def step(carry: Any, inputs: Any) -> Any:
            token, ended, cache = carry
            position, noise = inputs
            outputs, cache = apply(params, token[:, None], cache, position)
            outputs = outputs[:, 0] / temperature
            token = choose(outputs, noise)
            log_prob = head.log_prob(outputs, token)
            if end is not None:
                token, log_prob = jnp.where(ended, end, token), jnp.where(ended, 0.0, log_prob)
                ended = ended | (token == end)
            return (token, ended, cache), (token, log_prob)

        first = (prompt[:, -1], jnp.zeros(prompt.shape[0], bool), cache)
        positions = prompt_length - 1 + jnp.arange(answer_length)
        answer, log_prob = packed.scan(step, first, (positions, noise))[1]
        return answer.T, log_prob.T

    def sample(
        params: Params, prompt: Array, key: Array, temperature: ArrayLike = 1.0
    ) -> tuple[Array, Array]:
        noise = head.noise(key, (prompt.shape[0],)).T
        return generate(params, prompt, head.sample, noise, temperature)

    def greedy(params: Params, prompt: Array) -> Array:
        return generate(params, prompt, lambda outputs, _: head.mode(outputs), None, 1.0)[0]

    def score_all(
        params: Params, prompt: Array, answer: Array, temperature: ArrayLike = 1.0
    ) -> tuple[Array, Array, Array]:
        tokens = jnp.concatenate([prompt, answer[:, :-1]], axis=1)
        outputs = logits(params, tokens)[:, prompt_length - 1 :] / temperature
        every = jax.nn.log_softmax(outputs)
        return head.log_prob(outputs, answer), head.entropy(outputs), every

    def score(*arguments: Any) -> tuple[Array, Array]:
        log_prob, entropy, _ = score_all(*arguments)
        return log_prob, entropy

    def score_joined(
        params: Params,
        tokens: Array,
        following: Array,
        position: Array,
        response: Array,
        temperature: ArrayLike = 1.0,
    ) -> tuple[Array, Array]:
        outputs = apply(params, tokens, None, 0, (position, response))[0] / temperature
        return head.log_prob(outputs, following), head.entropy(outputs)

    def mask(answer: Array) -> Array:
        return answer_mask(answer, end)

    return Decoder(init, logits, sample, greedy, score, score_all, score_joined, mask)


def answer_mask(answer: Array, end: int | None) -> Array:
    """True for the tokens of answers up to the first end token, that one included."""
    if end is None:
        return jnp.ones_like(answer, bool)
    is_end = answer == end
    return jnp.cumsum(is_end, axis=-1) - is_end == 0


class Transformer(nn.Module):
    """Causal transformer with learnt positions; LayerNorm comes before each part."""

    vocab: int
    max_length: int
    layers: int
    width: int
    heads: int
    feed_forward: int
    precision: networks.Precision = networks.FLOAT32

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        cache: Cache | None = None,
        start: int | Array = 0,
        joined: tuple[Array, Array] | None = None,
    ) -> tuple[Array, Cache]:
        """Logits ``[batch, time, vocab]`` of tokens ``[batch, time]``, and keys and values.

        With a cache, the tokens stand at positions ``start, start + 1, ...`` after those that the
        cache holds, and their keys and values are written into it. Rows that are ``joined`` say
        position and response of each token, and a token sees those of its own response alone.
        """
        compute, param = self.precision
        positions = self.param("positions", _INIT, (self.max_length, self.width), param)
        x = nn.Embed(self.vocab, self.width, compute, param, embedding_init=_INIT)(tokens)
        if joined is None:
            positions = jax.lax.dynamic_slice_in_dim(positions, start, tokens.shape[1])
        else:
            positions = positions[joined[0]]
        response = None if joined is None else joined[1]
        x = x + positions.astype(x.dtype)
        written = []
        for layer in range(self.layers):
            mixed, entry = Attention(self.heads, self.precision)(
                networks.norm(self.precision)(x),
                None if cache is None else cache[layer],
                start,
                response,
            )
            x = x + mixed
            normed = networks.norm(self.precision)(x)
            hidden = nn.gelu(_dense(self.feed_forward, self.precision)(normed))
            x = x + _dense(self.width, self.precision)(hidden)
            written.append(entry)
        logits = _dense(self.vocab, self.precision)(networks.norm(self.precision)(x))
        return networks.at_least_single(logits), tuple(written)


class Attention(nn.Module):
    """Causal self-attention with several heads, within a response where rows hold several."""

    heads: int
    precision: networks.Precision = networks.FLOAT32

    @nn.compact
    def __call__(
        self,
        x: Array,
        cache: tuple[Array, Array] | None,
        start: int | Array,
        response: Array | None,
    ) -> tuple[Array, tuple[Array, Array]]:
        batch, time, width = x.shape
        size = width // self.heads
        projected = _dense(3 * width, self.precision)(x).reshape(batch, time, 3, self.heads, size)
        query, key, value = jnp.moveaxis(projected, (2, 3), (0, 2))
        if cache is not None:
            key = jax.lax.dynamic_update_slice_in_dim(cache[0], key, start, axis=2)
            value = jax.lax.dynamic_update_slice_in_dim(cache[1], value, start, axis=2)
        visible = jnp.arange(key.shape[2]) <= start + jnp.arange(time)[:, None]
        if response is not None:
            visible &= (response[:, :, None] == response[:, None, :])[:, None]
        scores = jnp.einsum("bhqd,bhkd->bhqk", query, key) / jnp.sqrt(size)
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        mixed = jnp.einsum("bhqk,bhkd->bhqd", weights, value)
        mixed = jnp.moveaxis(mixed, 1, 2).reshape(batch, time, width)
        return _dense(width, self.precision)(mixed), (key, value)


_INIT = nn.initializers.normal(0.02)


def _dense(size: int, precision: networks.Precision) -> nn.Dense:
    compute, param = precision
    return nn.Dense(size, dtype=compute, param_dtype=param, dot_general=cpu.dot_general(size))
