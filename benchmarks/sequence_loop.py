"""A trainer of short token sequences as small research code has it: a loop in Python.

    python benchmarks/sequence_loop.py serve WORK
    python benchmarks/sequence_loop.py curves WORK

The settings are those published for google-deepmind/egg: a causal decoder of 3 layers, width 64, 4
heads and feed-forward 128; prompts of 10 binary tokens to be reversed, rewarded by the fraction of
right tokens; 10 prompts x 10 answers a step; Adam at 3e-4. So is its shape: each token of an answer
computes the whole network again, and every step reads its reward back. What is not known of it
follows this project (pre-norm, initial values, the mean of the group as baseline).

It is written from these facts without egg's code, and imports nothing of gipo_jax, so that
scripts/sequence_fidelity.py can check one against the other.

WORK is JSON: ``serve`` takes ``method`` and ``steps`` and answers as benchmarks/peers.py does;
``curves`` takes ``method``, ``seeds``, ``steps``, ``points``, ``prompts`` and prints a JSON list of
[seed, step, reward, exact] of sampled answers to fresh prompts.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

LAYERS, WIDTH, HEADS, FEED_FORWARD = 3, 64, 4, 128
LENGTH, VOCAB = 10, 2
PROMPTS, ANSWERS = 10, 10
CLIP = 0.2
PASSES = {"reinforce": 1, "ppo": 4}
"""Updates on the answers of a step."""

ADAM = optax.adam(3e-4, eps=1e-5)


def init(key: Array) -> Any:
    """Weights: truncated normal of variance 1 / inputs; embeddings and positions 0.02."""
    keys = iter(jax.random.split(key, 64))
    scaled = jax.nn.initializers.lecun_normal()

    def dense(inputs: int, outputs: int) -> Any:
        return {"w": scaled(next(keys), (inputs, outputs)), "b": jnp.zeros(outputs)}

    def norm() -> Any:
        return {"scale": jnp.ones(WIDTH), "shift": jnp.zeros(WIDTH)}

    return {
        "embedding": 0.02 * jax.random.normal(next(keys), (VOCAB, WIDTH)),
        "positions": 0.02 * jax.random.normal(next(keys), (2 * LENGTH, WIDTH)),
        "layers": [
            {
                "norm1": norm(),
                "qkv": dense(WIDTH, 3 * WIDTH),
                "mix": dense(WIDTH, WIDTH),
                "norm2": norm(),
                "up": dense(WIDTH, FEED_FORWARD),
                "down": dense(FEED_FORWARD, WIDTH),
            }
            for _ in range(LAYERS)
        ],
        "norm": norm(),
        "out": dense(WIDTH, VOCAB),
    }


def linear(layer: Any, x: Array) -> Array:
    return x @ layer["w"] + layer["b"]


def normalized(layer: Any, x: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return centred * scale * layer["scale"] + layer["shift"]


def log_probs(params: Any, tokens: Array) -> Array:
    """Log-probabilities ``[batch, time, VOCAB]`` of the token after each of ``[batch, time]``."""
    batch, time_ = tokens.shape
    x = params["embedding"][tokens] + params["positions"][:time_]
    causal = jnp.tril(jnp.ones((time_, time_), bool))
    for layer in params["layers"]:
        q, k, v = jnp.split(linear(layer["qkv"], normalized(layer["norm1"], x)), 3, axis=-1)
        q, k, v = (part.reshape(batch, time_, HEADS, -1) for part in (q, k, v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (WIDTH // HEADS) ** -0.5
        attention = jax.nn.softmax(jnp.where(causal, scores, -1e30))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", attention, v).reshape(batch, time_, WIDTH)
        x = x + linear(layer["mix"], mixed)
        hidden = jax.nn.gelu(linear(layer["up"], normalized(layer["norm2"], x)))
        x = x + linear(layer["down"], hidden)
    return jax.nn.log_softmax(linear(params["out"], normalized(params["norm"], x)))


def answered(params: Any, prompt: Array, key: Array) -> Array:
    """Prompts ``[batch, LENGTH]`` with sampled answers behind them."""

    def one(tokens: Array, inputs: Any) -> Any:
        key, at = inputs
        token = jax.random.categorical(key, log_probs(params, tokens)[:, at - 1])
        return tokens.at[:, at].set(token), None

    tokens = jnp.pad(prompt, ((0, 0), (0, LENGTH)))
    keys = jax.random.split(key, LENGTH)
    return jax.lax.scan(one, tokens, (keys, LENGTH + jnp.arange(LENGTH)))[0]


def of_answers(params: Any, tokens: Array) -> Array:
    """Log-probability of each token of the answers, ``[batch, LENGTH]``."""
    found = log_probs(params, tokens[:, :-1])[:, LENGTH - 1 :]
    return jnp.take_along_axis(found, tokens[:, LENGTH:, None], axis=-1)[..., 0]


def right(tokens: Array) -> Array:
    """Which tokens of the answers are right, ``[batch, LENGTH]``."""
    return tokens[:, LENGTH:] == tokens[:, LENGTH - 1 :: -1]


@jax.jit
def act(params: Any, key: Array) -> tuple[Array, Array, Array]:
    """Tokens, rewards and log-probabilities of a step's answers, prompt after prompt."""
    key_prompt, key_answer = jax.random.split(key)
    prompt = jax.random.randint(key_prompt, (PROMPTS, LENGTH), 0, VOCAB)
    tokens = answered(params, jnp.repeat(prompt, ANSWERS, axis=0), key_answer)
    return tokens, right(tokens).mean(1), of_answers(params, tokens)


def loss(params: Any, tokens: Array, reward: Array, old: Array, clipped: bool) -> Array:
    groups = reward.reshape(PROMPTS, ANSWERS)
    advantage = (groups - groups.mean(1, keepdims=True)).reshape(-1, 1)
    found = of_answers(params, tokens)
    if not clipped:
        return -jnp.mean(found * advantage)
    ratio = jnp.exp(found - old)
    bounded = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
    return -jnp.mean(jnp.minimum(ratio * advantage, bounded * advantage))


def make_update(clipped: bool) -> Callable[..., Any]:
    @jax.jit
    def update(params: Any, moments: Any, tokens: Array, reward: Array, old: Array) -> Any:
        grads = jax.grad(loss)(params, tokens, reward, old, clipped)
        step, moments = ADAM.update(grads, moments)
        return optax.apply_updates(params, step), moments

    return update


@jax.jit
def scores(params: Any, prompt: Array, key: Array) -> tuple[Array, Array]:
    """Mean reward, and share of answers that are all right."""
    correct = right(answered(params, prompt, key))
    return correct.mean(), correct.all(1).mean()


class Trainer:
    """One run; ``step`` goes on by a step and gives its mean reward."""

    def __init__(self, method: str, seed: int) -> None:
        self.key, key_params = jax.random.split(jax.random.key(seed))
        self.params = init(key_params)
        self.moments = ADAM.init(self.params)
        self._update, self._passes = make_update(method == "ppo"), PASSES[method]

    def step(self) -> float:
        self.key, key_act = jax.random.split(self.key)
        tokens, reward, old = act(self.params, key_act)
        for _ in range(self._passes):
            self.params, self.moments = self._update(self.params, self.moments, tokens, reward, old)
        return float(reward.mean())


def serve(method: str, steps: int) -> None:
    trainer = Trainer(method, 0)
    begin = time.perf_counter()
    trainer.step()
    print(json.dumps({"compile_s": time.perf_counter() - begin}), flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        for _ in range(steps):
            trainer.step()
        print(json.dumps({"seconds": time.perf_counter() - begin}), flush=True)


def curves(method: str, seeds: list[int], steps: int, points: int, prompts: int) -> None:
    rows = []
    for seed in seeds:
        trainer = Trainer(method, seed)
        for step in range(1, steps + 1):
            trainer.step()
            if step % (steps // points) == 0:
                key_prompt, key_answer = jax.random.split(jax.random.fold_in(trainer.key, 1))
                prompt = jax.random.randint(key_prompt, (prompts, LENGTH), 0, VOCAB)
                reward, exact = scores(trainer.params, prompt, key_answer)
                rows.append([seed, step, float(reward), float(exact)])
        print(f"{method}, seed {seed}: {rows[-1]}", file=sys.stderr, flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    jobs: dict[str, Callable[..., None]] = {"serve": serve, "curves": curves}
    if len(sys.argv) != 3 or sys.argv[1] not in jobs:
        sys.exit("usage: sequence_loop.py serve|curves WORK, with WORK in JSON")
    jobs[sys.argv[1]](**json.loads(sys.argv[2]))
