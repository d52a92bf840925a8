"""Rare tokens under a sampler that differs from the trainer: which of them an objective masks.

Sampler and trainer have the same parameters, as where an inference engine computes in another type
of numbers or samples at another temperature. The policy has not moved at all.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pandas as pd

from gipo_jax import losses, objectives, train
from gipo_jax.analysis import stats
from gipo_jax.config import Config
from gipo_jax.domains.tokens import decoder
from gipo_jax.domains.tokens.domain import Tokens
from gipo_jax.networks import Precision

from .store import Store


class Sampler(NamedTuple):
    """How answers are sampled; the trainer has float32 and temperature 1."""

    compute: str | None
    temperature: float


SAMPLERS = {
    "bfloat16": Sampler("bfloat16", 1.0),
    "temperature 1.2": Sampler(None, 1.2),
    "temperature 0.8": Sampler(None, 0.8),
}
METHODS: dict[str, tuple[str, dict[str, float]]] = {
    "PPO-Clip": ("ppo_clip", {}),
    "DPPO TV, binary": ("dppo_tv", {}),
    "DPPO TV, top 3": ("dppo_topk_tv", {"top_k": 3.0}),
    "DPPO TV, exact": ("dppo_exact_tv", {}),
    "DPPO KL, binary": ("dppo_kl", {}),
    "DPPO KL, top 3": ("dppo_topk_kl", {"top_k": 3.0}),
    "DPPO KL, exact": ("dppo_exact_kl", {}),
}
BINS = {"rare": (0.0, 0.1), "middle": (0.1, 0.9), "likely": (0.9, 1.1)}
"""Probability of a token under the sampler, from and below."""

SEEDS = {"quick": range(4900, 4902), "committed": range(4000, 4010), "full": range(4000, 4020)}
PROMPTS = {"quick": 32, "committed": 1024, "full": 4096}
UPDATES = {"quick": 5, "committed": 300, "full": 300}
COLUMNS = ["sampler", "method", "seed", "probability", "tokens", "masked", "divergence"]


def configure() -> Config:
    """The task and decoder of the study of learning: adding numbers, a vocabulary of 12."""
    return Config(
        env="tokens/add",
        total_steps=128,
        num_logs=1,
        num_envs=16,
        rollout_length=8,
        batch_size=128,
        decoder_layers=2,
    )


def measure(store: Store, preset: str) -> None:
    """Imitates demonstrations, samples answers in every way, and counts tokens of weight 0."""
    config = configure()
    domain = train.make(config)
    assert isinstance(domain, Tokens)
    compiled = jax.jit(functools.partial(_one, domain, PROMPTS[preset]))
    rows: list[dict[str, Any]] = []
    for seed in SEEDS[preset]:
        hparams = train.make_hparams(
            config, seed=seed, learning_rate=1e-3, imitation_updates=UPDATES[preset]
        )
        for sampler, found in jax.device_get(compiled(hparams)).items():
            for name, (low, high) in BINS.items():
                inside = found["counts"] & (low <= found["mu"]) & (found["mu"] < high)
                if not inside.any():
                    continue
                keys = {"sampler": sampler, "seed": seed, "probability": name}
                keys |= {"tokens": int(inside.sum())}
                keys |= {"divergence": float(found["divergence"][inside].mean())}
                for method, masked in found["masked"].items():
                    rows.append(keys | {"method": method, "masked": float(masked[inside].mean())})
    store.write("mismatch_runs", pd.DataFrame(rows)[COLUMNS], 6)


def _one(domain: Tokens, prompts: int, hparams: Any) -> dict[str, Any]:
    """For each sampler: probability and total variation of each token, and how often each method
    masks it, the mean over advantages of 1 and -1."""
    task, params = domain.env, train.init(domain, hparams).learner.params["policy"]
    key = jax.random.fold_in(jax.random.key(3), hparams.seed)
    prompt = jax.vmap(task.prompt)(jax.random.split(key, prompts))
    found = {}
    for number, (name, sampler) in enumerate(SAMPLERS.items()):
        policy = decoder.make(
            task.vocab,
            task.prompt_length,
            task.answer_length,
            task.end,
            layers=domain.config.decoder_layers,
            width=domain.config.decoder_width,
            heads=domain.config.decoder_heads,
            feed_forward=2 * domain.config.decoder_width,
            precision=Precision(sampler.compute, "float32"),
        )
        answer, _ = policy.sample(
            params, prompt, jax.random.fold_in(key, number), sampler.temperature
        )
        tokens = jnp.concatenate([prompt, answer[:, :-1]], axis=1)

        def every(logits: Any, temperature: float, tokens: Any = tokens) -> jax.Array:
            outputs = logits(params, tokens)[:, task.prompt_length - 1 :]
            return jax.nn.log_softmax(outputs / temperature)

        log_mu, log_pi = every(policy.logits, sampler.temperature), every(domain.decoder.logits, 1)
        found[name] = masks(answer, log_mu, log_pi) | {"counts": policy.mask(answer)}
    return found


def masks(answer: jax.Array, log_mu: jax.Array, log_pi: jax.Array) -> dict[str, Any]:
    """What each method masks of tokens sampled under ``log_mu [batch, tokens, vocab]``."""

    def taken(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, answer[..., None], axis=-1)[..., 0]

    old, new = taken(log_mu), taken(log_pi)

    def masked(objective: str, parameters: dict[str, float], advantage: float) -> jax.Array:
        asked = objectives.spec(objective).inputs
        every = {"behavior_distribution": log_mu, "policy_distribution": log_pi}
        given = {name: x for name, x in every.items() if name in asked}

        def loss(log_prob: jax.Array) -> jax.Array:
            arguments: dict[str, Any] = parameters | given
            return losses.policy_loss(
                log_prob, old, jnp.full_like(old, advantage), objective=objective, **arguments
            )[0]

        return jax.grad(loss)(new) == 0

    return {
        "mu": jnp.exp(old),
        "divergence": jnp.sum(jnp.abs(jnp.exp(log_pi) - jnp.exp(log_mu)), axis=-1) / 2,
        "masked": {
            name: (masked(*method, 1.0).astype(float) + masked(*method, -1.0)) / 2
            for name, method in METHODS.items()
        },
    }


def scores(store: Store) -> dict[str, pd.DataFrame]:
    """Share of tokens masked, and that minus PPO-Clip's, mean over seeds with intervals."""
    runs = store.read("mismatch_runs", COLUMNS).sort_values("seed", kind="stable")
    rows = []
    for (sampler, probability, method), own in runs.groupby(
        ["sampler", "probability", "method"], sort=False
    ):
        clip = runs[(runs.sampler == sampler) & (runs.probability == probability)]
        clip = clip[clip.method == "PPO-Clip"]
        difference = own.masked.to_numpy(float) - clip.masked.to_numpy(float)
        rows.append(
            {"sampler": sampler, "probability": probability, "method": method}
            | {"tokens": own.tokens.mean(), "divergence": own.divergence.mean()}
            | stats.bootstrap(own.masked.to_numpy(float), stats.mean)._asdict()
            | {
                f"minus_ppo_{key}": x
                for key, x in stats.bootstrap(difference, stats.mean)._asdict().items()
            }
        )
    return {"mismatch": pd.DataFrame(rows)}
