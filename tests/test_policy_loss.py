"""The loss for other trainers against formulas written in float64 NumPy, token by token."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gipo_jax import diagnostics, losses, objectives, ratio_levels
from gipo_jax.config import LOSS_AGG_MODES, ConfigError
from gipo_jax.losses import policy_loss

BATCH, TOKENS = 6, 5


@pytest.fixture
def data() -> dict[str, Any]:
    """Answers of 1 to 5 tokens, one of them empty, with log-ratios on both sides of every bound."""
    generator = np.random.default_rng(0)
    old = np.log(generator.uniform(0.05, 0.9, size=(BATCH, TOKENS)))
    log_prob = old + generator.normal(scale=0.6, size=(BATCH, TOKENS))
    lengths = np.array([5, 3, 1, 5, 0, 4])
    return {
        "log_prob": np.minimum(log_prob, -0.01).astype(np.float32),
        "old_log_prob": old.astype(np.float32),
        "advantages": np.array([1.2, -0.7, 0.4, -1.5, 2.0, 0.9], np.float32),
        "response_mask": np.arange(TOKENS) < lengths[:, None],
    }


def coefficients(mask: Any, mode: str, max_tokens: float | None = None) -> Any:
    """What each token's surrogate is multiplied with in the loss, up to the sign."""
    lengths = mask.sum(axis=1, keepdims=True)
    answers = np.sum(lengths > 0)
    each = {
        "token-mean": 1 / mask.sum(),
        "seq-mean-token-sum": 1 / answers,
        "seq-mean-token-mean": 1 / (answers * np.maximum(lengths, 1)),
        "seq-mean-token-sum-norm": 1 / (answers * (max_tokens or mask.shape[1])),
    }[mode]
    return np.where(mask, each, 0.0)


# Effective weight u and surrogate of one token from x (of the level), advantage and place t.
Rule = Callable[[float, float, int], tuple[float, float | None]]


def ppo(x: float, a: float, t: int, low: float = 0.2, high: float = 0.2) -> tuple[float, float]:
    r = np.exp(x)
    clipped = np.clip(r, 1 - low, 1 + high)
    return (r if r * a <= clipped * a else 0.0), min(r * a, clipped * a)


def dual_clip(x: float, a: float, t: int) -> tuple[float, float]:
    u, surrogate = ppo(x, a, t)
    return (0.0, 3 * a) if a < 0 and surrogate < 3 * a else (u, surrogate)


def sapo(x: float, a: float, t: int) -> tuple[float, float]:
    tau = 1.0 if a > 0 else 1.05
    gate = 1 / (1 + np.exp(-tau * (np.exp(x) - 1)))
    return 4 * gate * (1 - gate) * np.exp(x), 4 / tau * gate * a


def ctpo(x: float, a: float, t: int) -> tuple[float, float]:
    r, root = np.exp(x), np.sqrt(t)
    surrogate = min(r * a, np.exp(np.clip(x, -0.025 * root, 0.05 * root)) * a)
    if a < 0:
        surrogate = max(surrogate, np.exp(0.05 * root) * a)
    return (r if surrogate == r * a else 0.0), surrogate


def cispo(x: float, a: float, t: int) -> tuple[float, None]:
    return min(np.exp(x), 1.2), None


def tis(x: float, a: float, t: int) -> tuple[float, None]:
    return min(np.exp(x), 2.0), None


def floored(x: float, a: float, t: int) -> tuple[float, None]:
    return float(np.clip(np.exp(x), 0.8, 1.2)), None


def gipo(x: float, a: float, t: int) -> tuple[float, float]:
    u = np.exp(-(x**2) / (2 * 0.5**2)) * np.exp(x)
    return u, u * a


gspo = functools.partial(ppo, low=3e-4, high=4e-4)

CASES: dict[str, tuple[dict[str, Any], str, Rule]] = {
    "PPO": ({"objective": "ppo_clip"}, "token", ppo),
    "dual clip": ({"objective": "dual_clip"}, "token", dual_clip),
    "GSPO": ({"objective": "gspo"}, "sequence", gspo),
    "CISPO": ({"objective": "cispo"}, "token", cispo),
    "SAPO": ({"objective": "sapo"}, "token", sapo),
    "TIS": ({"objective": "tis"}, "token", tis),
    "CTPO": ({"objective": "ctpo"}, "prefix_product", ctpo),
    "MinPRO": ({"objective": "minpro"}, "prefix_min", cispo),
    "MinPRO with a port's floor": ({"objective": "minpro", "eps_low": 0.2}, "prefix_min", floored),
    "PPO at prefix_min": (
        {"objective": "ppo_clip", "ratio_level": "prefix_min"},
        "prefix_min",
        ppo,
    ),
    "GIPO of answers": (
        {"objective": "gipo", "ratio_level": "joint", "sigma": 0.5},
        "joint",
        gipo,
    ),
}


def level_ratio(x: Any, level: str, t: int) -> float:
    """Log-ratio of the level for the token at place t, from 1, of an answer's log-ratios."""
    before = x[:t]
    return {
        "token": lambda: x[t - 1],
        "joint": lambda: x.sum(),
        "sequence": lambda: x.mean(),
        "prefix_product": before.sum,
        "prefix_geometric": before.mean,
        "prefix_min": lambda: x[t - 1] + (before[:-1].min() if t > 1 else 0.0),
    }[level]()


def evaluated(
    data: dict[str, Any], modes: Sequence[str] = LOSS_AGG_MODES, **given: Any
) -> dict[str, Any]:
    """For each aggregation ``(loss, metrics), gradient`` of a call, compiled together."""

    def call(arrays: dict[str, Any], mode: str) -> Any:
        def loss(log_prob: jax.Array) -> Any:
            arguments: dict[str, Any] = arrays | {"log_prob": log_prob} | given
            return policy_loss(**arguments, loss_agg_mode=mode)

        return jax.value_and_grad(loss, has_aux=True)(arrays["log_prob"])

    arrays = {name: jnp.array(x) for name, x in data.items()}
    return jax.jit(lambda arrays: {mode: call(arrays, mode) for mode in modes})(arrays)


def once(data: dict[str, Any], mode: str = "token-mean", **given: Any) -> Any:
    """``(loss, metrics), gradient`` of a call."""
    return evaluated(data, [mode], **given)[mode]


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_numpy(case: str, data: dict[str, Any]) -> None:
    given, level, rule = CASES[case]
    x = data["log_prob"].astype(np.float64) - data["old_log_prob"]
    mask, advantage = data["response_mask"], data["advantages"].astype(np.float64)
    weight, surrogate = np.zeros(x.shape), np.zeros(x.shape)
    for row in range(BATCH):
        answer = x[row][mask[row]]
        for t in range(1, len(answer) + 1):
            u, value = rule(level_ratio(answer, level, t), advantage[row], t)
            weight[row, t - 1] = u
            surrogate[row, t - 1] = np.nan if value is None else value

    results = evaluated(data, **given)
    for mode, ((loss, metrics), gradient) in results.items():
        scale = coefficients(mask, mode)
        expected = -scale * weight * advantage[:, None]
        assert np.any(expected != 0)
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6, err_msg=mode)
        if not np.any(np.isnan(surrogate[mask])):
            total = -np.sum((scale * surrogate)[mask])
            np.testing.assert_allclose(loss, total, rtol=1e-5, atol=1e-6, err_msg=mode)
        assert metrics["policy_loss"] == loss
    counted = weight[mask]
    size = counted.sum() ** 2 / (counted.size * np.sum(counted**2))
    np.testing.assert_allclose(metrics["ess"], size, rtol=1e-5)
    np.testing.assert_allclose(metrics["masked_fraction"], np.mean(counted == 0), rtol=1e-5)


def test_every_clip_is_reached_in_the_cases_above(data: dict[str, Any]) -> None:
    x = (data["log_prob"] - data["old_log_prob"])[data["response_mask"]]
    a = np.broadcast_to(data["advantages"][:, None], (BATCH, TOKENS))[data["response_mask"]]
    clipped = [ppo(x_, a_, 1)[0] == 0 for x_, a_ in zip(x, a, strict=True)]
    assert 3 <= sum(clipped) <= len(clipped) - 3


def test_cppo_equals_its_rule_token_by_token() -> None:
    generator = np.random.default_rng(1)
    mu = generator.uniform(0.1, 0.9, size=(8, 7))
    pi = np.clip(mu + generator.normal(scale=0.12, size=mu.shape), 0.02, 0.98)
    advantage, lengths = generator.normal(size=8), generator.integers(1, 8, size=8)
    kept = np.zeros(mu.shape)
    for row, length in enumerate(lengths):
        divergence = np.abs(pi - mu)[row, :length]
        budget = np.clip(np.percentile(divergence, 90), 0.02, 0.04)
        spent = allowed = 0.0
        for t in range(length):
            weight = 1 - 0.2 * t / max(length - 1, 1)
            away = advantage[row] * (pi[row, t] / mu[row, t] - 1) > 0
            limit = min(0.15, 0.15 + budget * allowed - spent)
            kept[row, t] = not away or weight * divergence[t] <= limit
            spent, allowed = spent + weight * divergence[t], allowed + weight
    mask = np.arange(7) < lengths[:, None]
    # The budget of the prefix decides somewhere, not the threshold of the token alone.
    away = mask & (advantage[:, None] * (pi - mu) > 0)
    assert np.any(away & (kept == 0) & (np.abs(pi - mu) < 0.15)) and np.any(away & (kept == 1))

    gradient = jax.grad(lambda x: policy_loss(x, *rest, objective="cppo")[0])
    rest = [jnp.array(x, jnp.float32) for x in (np.log(mu), advantage, mask)]
    expected = -kept * pi / mu * advantage[:, None] / mask.sum()
    np.testing.assert_allclose(
        gradient(jnp.array(np.log(pi), jnp.float32)), expected, rtol=1e-4, atol=1e-6
    )


VOCAB = 6


def distributions() -> tuple[Any, Any]:
    """Two policies of a vocabulary of six, ``[batch, tokens, vocab]``, up to one impossible token.

    They are close in some places and far apart in others.
    """
    generator = np.random.default_rng(5)
    logits = 2 * generator.normal(size=(BATCH, TOKENS, VOCAB))
    distance = generator.choice([0.1, 0.4, 1.5], size=(BATCH, TOKENS, 1))
    both = [np.exp(logits), np.exp(logits + distance * generator.normal(size=logits.shape))]
    for row, policy in enumerate(both):
        policy[row, 0, row] = 0
    return tuple(x / x.sum(axis=-1, keepdims=True) for x in both)


@functools.cache
def divergence_gradients() -> Callable[..., Any]:
    """Gradients of the loss of the two top-k objectives, k traced, in one program."""

    def both(log_prob: Any, arrays: dict[str, Any]) -> Any:
        def loss(log_prob: Any, name: str) -> Any:
            return policy_loss(log_prob, objective=name, **arrays)[0]

        names = ("dppo_topk_tv", "dppo_topk_kl")
        return {name: jax.grad(loss)(log_prob, name) for name in names}

    return jax.jit(both)


@pytest.mark.parametrize("top_k", [1, 3, np.inf])
def test_the_divergence_of_dppo_is_over_the_likeliest_tokens_and_the_rest(
    top_k: float, data: dict[str, Any]
) -> None:
    mu, pi = distributions()
    taken = np.random.default_rng(6).integers(VOCAB, size=(BATCH, TOKENS, 1))
    taken[0, 0], taken[1, 0] = 5, 4  # possible under both
    old, new = (np.take_along_axis(x, taken, axis=-1)[..., 0] for x in (mu, pi))
    mask, advantage = data["response_mask"], data["advantages"].astype(np.float64)
    divergence = {"dppo_topk_tv": np.zeros(mask.shape), "dppo_topk_kl": np.zeros(mask.shape)}
    for row, t in zip(*np.nonzero(mask), strict=True):
        order = sorted(range(VOCAB), key=lambda i: -mu[row, t, i])
        top = order[: int(min(top_k, VOCAB))]
        buckets = [(mu[row, t, i], pi[row, t, i]) for i in top]
        buckets.append((1 - sum(m for m, _ in buckets), 1 - sum(p for _, p in buckets)))
        divergence["dppo_topk_tv"][row, t] = sum(abs(p - m) for m, p in buckets) / 2
        divergence["dppo_topk_kl"][row, t] = sum(
            m * (np.log(m / p) if p > 0 else np.inf) for m, p in buckets if m > 1e-12
        )
    with np.errstate(divide="ignore"):
        log_old, log_new, log_mu, log_pi = (
            jnp.array(np.log(x), jnp.float32) for x in (old, new, mu, pi)
        )
    arrays = {"old_log_prob": log_old, "advantages": jnp.array(advantage, jnp.float32)}
    arrays |= {"response_mask": jnp.array(mask), "top_k": jnp.float32(top_k)}
    arrays |= {"behavior_distribution": log_mu, "policy_distribution": log_pi}
    a, r = advantage[:, None], new / old
    # Between neighbouring divergences of tokens, so that each of them decides once.
    for name, found in divergence.items():
        steps = np.sort(found[mask & (a * (r - 1) > 0) & np.isfinite(found)])
        for low in (steps[:-1] + steps[1:]) / 2:
            delta = {"delta_low": np.float32(low), "delta_high": np.float32(1.5 * low)}
            masked = (a * (r - 1) > 0) & (found > np.where(a > 0, 1.5 * low, low))
            expected = np.where(mask & ~masked, -np.minimum(r, 20) * a / mask.sum(), 0)
            gradient = divergence_gradients()(log_new, arrays | delta)[name]
            np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7, err_msg=name)


def test_with_two_tokens_the_exact_divergence_is_the_binary_one() -> None:
    generator = np.random.default_rng(7)
    mu, pi = generator.uniform(0.01, 0.99, size=(2, 50))
    every = [jnp.log(jnp.stack([x, 1 - x], axis=-1)) for x in (mu, pi)]
    advantage = jnp.array(generator.normal(size=50))
    x = jnp.log(pi) - jnp.log(mu)
    for kind in ("tv", "kl"):
        exact = objectives.spec(f"dppo_exact_{kind}").function(x, advantage, *every)
        top = objectives.spec(f"dppo_topk_{kind}").function(x, advantage, *every, top_k=2)
        binary = objectives.spec(f"dppo_{kind}").function(x, advantage, jnp.log(mu))
        np.testing.assert_allclose(exact, binary, rtol=1e-6)
        np.testing.assert_array_equal(exact, top)
        assert 0 < np.count_nonzero(exact) < 50


def extra_inputs(name: str) -> dict[str, Any]:
    """What an objective asks for beside its parameters."""
    mu, pi = (jnp.log(jnp.array(x, jnp.float32)) for x in distributions())
    every = {
        "log_ratio_start": jnp.full((BATCH, TOKENS), 0.1),
        "behavior_distribution": mu,
        "policy_distribution": pi,
    }
    return {key: every[key] for key in objectives.spec(name).inputs if key in every}


EXTRA: dict[str, dict[str, Any]] = {name: extra_inputs(name) for name in objectives.ALL}
NAMES = [name for name in objectives.ALL if not name.startswith("dppo_exact")]
"""Without two that are others with k infinite."""


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, "token-mean") for name in NAMES),
        *(("gipo", mode) for mode in LOSS_AGG_MODES[1:]),
    ],
)
def test_padding_of_any_length_and_content_changes_nothing(
    name: str, mode: str, data: dict[str, Any]
) -> None:
    def wider(x: Any) -> Any:
        """Nine more tokens, and other values where there was padding already."""
        x = np.asarray(x)
        padded = np.pad(x, ((0, 0), (0, 9), (0, 0))[: x.ndim])
        if x.dtype == bool:
            return padded
        mask = np.pad(data["response_mask"], ((0, 0), (0, 9)))
        return np.where(mask if x.ndim == 2 else mask[..., None], padded, np.nan)

    extra: dict[str, Any] = dict(EXTRA.get(name, {}))
    fixed = {"max_tokens": 20} if mode == "seq-mean-token-sum-norm" else {}
    padded = {n: x if x.ndim == 1 else wider(x) for n, x in data.items()}
    extra_padded: dict[str, Any] = {n: jnp.array(wider(x)) for n, x in extra.items()}
    (loss, metrics), gradient = once(data, mode, objective=name, **extra, **fixed)
    (loss_padded, metrics_padded), gradient_padded = once(
        padded, mode, objective=name, **extra_padded, **fixed
    )
    np.testing.assert_allclose(loss_padded, loss, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(gradient_padded[:, :TOKENS], gradient, rtol=1e-6, atol=1e-7)
    assert not gradient_padded[:, TOKENS:].any()
    assert metrics_padded.keys() == metrics.keys()
    for key, value in metrics.items():
        np.testing.assert_allclose(metrics_padded[key], value, rtol=2e-6, err_msg=key)


@pytest.mark.parametrize("level", ratio_levels.LEVELS)
def test_at_ratio_one_the_gradient_is_that_of_reinforce(level: str, data: dict[str, Any]) -> None:
    same = data | {"old_log_prob": data["log_prob"]}
    scale = coefficients(data["response_mask"], "token-mean")
    for objective in ("gipo", "sapo", "tis"):
        (_, metrics), gradient = once(same, objective=objective, ratio_level=level)
        np.testing.assert_allclose(gradient, -scale * data["advantages"][:, None], rtol=1e-6)
        assert metrics["kl"] == 0 and metrics["log_ratio_p95"] == 0


def test_advantages_of_tokens_and_of_answers_give_the_same_loss(data: dict[str, Any]) -> None:
    tokens = np.broadcast_to(data["advantages"][:, None], (BATCH, TOKENS))
    for x, y in zip(
        jax.tree.leaves(once(data)),
        jax.tree.leaves(once(data | {"advantages": tokens})),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)


def test_without_a_mask_every_token_counts(data: dict[str, Any]) -> None:
    full = data | {"response_mask": np.ones((BATCH, TOKENS))}
    none = {name: x for name, x in data.items() if name != "response_mask"}
    assert once(full)[0][0] == once(none)[0][0]


@pytest.mark.parametrize(
    ("name", "level"),
    [
        (name, level)
        for level in ("token", "joint", "prefix_min")
        for name in NAMES
        if level == "token" or not objectives.spec(name).takes_distributions
    ],
)
def test_impossible_tokens_give_finite_losses_and_gradients(
    name: str, level: str, data: dict[str, Any]
) -> None:
    """Log-probabilities of -inf under the policy, under the one that sampled, and under both."""
    if level == "prefix_min" and "behavior_log_prob" in objectives.spec(name).inputs:
        level = "prefix_product"
    log_prob, old = data["log_prob"].copy(), data["old_log_prob"].copy()
    log_prob[0, 0] = log_prob[1, 1] = log_prob[2, 0] = -np.inf
    old[1, 0] = old[3, 0] = old[2, 0] = -np.inf
    given = data | {"log_prob": log_prob, "old_log_prob": old}
    extra = EXTRA.get(name, {})
    (loss, _), gradient = once(given, objective=name, ratio_level=level, **extra)
    assert np.isfinite(loss) and np.all(np.isfinite(gradient))
    assert gradient[2, 0] == 0


def test_an_impossible_token_has_ratio_zero(data: dict[str, Any]) -> None:
    log_prob = data["log_prob"].copy()
    log_prob[0, 0] = -np.inf
    mask = data["response_mask"]
    for name in ("gipo", "ppo_clip", "no_clip"):
        (loss, _), gradient = once(data | {"log_prob": log_prob}, objective=name)
        (without, _), _ = once(
            data | {"response_mask": mask & (np.arange(mask.size).reshape(mask.shape) > 0)},
            objective=name,
        )
        assert gradient[0, 0] == 0
        # Its surrogate is 0, and it counts as a token: row 0 has a positive advantage.
        np.testing.assert_allclose(loss, without * (mask.sum() - 1) / mask.sum(), rtol=1e-5)


def test_parts_of_a_batch_add_up_to_the_whole(data: dict[str, Any]) -> None:
    """Micro-batches of different longest answers, with the length left to the arrays' width."""
    whole = once(data, "seq-mean-token-sum-norm")[1]
    rows = (slice(0, 2), slice(2, BATCH))
    parts = [once({n: x[r] for n, x in data.items()}, "seq-mean-token-sum-norm")[1] for r in rows]
    answers = [np.sum(data["response_mask"][r].any(axis=1)) for r in rows]
    scaled = [part * n / sum(answers) for part, n in zip(parts, answers, strict=True)]
    np.testing.assert_allclose(np.concatenate(scaled), whole, rtol=1e-6, atol=1e-9)


def test_a_bound_kernel_stays_bound(data: dict[str, Any]) -> None:
    bound = functools.partial(objectives.gipo, kernel="laplacian")
    assert not objectives.spec(bound).takes_kernel
    assert once(data, objective=bound)[0][0] == once(data, kernel="laplacian")[0][0]


def test_a_fixed_length_divides_the_sum_of_tokens(data: dict[str, Any]) -> None:
    summed = once(data, "seq-mean-token-sum")[0][0]
    normed = once(data, "seq-mean-token-sum-norm", max_tokens=20)[0][0]
    np.testing.assert_allclose(normed, summed / 20, rtol=1e-6)


def test_gradients_flow_to_the_trained_policy_alone(data: dict[str, Any]) -> None:
    arrays: dict[str, Any] = {name: jnp.array(x) for name, x in data.items()}
    for name in ("old_log_prob", "advantages"):

        def loss(x: jax.Array, name: str = name) -> jax.Array:
            return policy_loss(**arrays | {name: x})[0]

        assert not jax.grad(loss)(arrays[name]).any()


def test_parameters_may_be_traced_and_vmapped(data: dict[str, Any]) -> None:
    arrays: dict[str, Any] = {name: jnp.array(x) for name, x in data.items()}
    sigmas = jnp.array([0.3, 1.0])
    together = jax.jit(jax.vmap(lambda s: policy_loss(**arrays, sigma=s)[0]))(sigmas)
    apart = [policy_loss(**arrays, sigma=float(sigma))[0] for sigma in sigmas]
    np.testing.assert_allclose(together, apart, rtol=1e-6)


def test_half_precision_is_computed_in_float32(data: dict[str, Any]) -> None:
    half: dict[str, Any] = {
        name: jnp.array(x, jnp.bfloat16 if name != "response_mask" else bool)
        for name, x in data.items()
    }
    loss, metrics = policy_loss(**half)
    exact: dict[str, Any] = {name: x.astype(jnp.float32) for name, x in half.items()}
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, policy_loss(**exact)[0], rtol=1e-6)
    assert all(np.isfinite(value) for value in metrics.values())


def test_an_objective_with_a_state_returns_the_next_one(data: dict[str, Any]) -> None:
    first = once(data, objective="r2vpo")[0][1]["state"]
    x = (data["log_prob"] - data["old_log_prob"])[data["response_mask"]]
    expected = 0.04 + 0.01 * (np.mean((np.exp(x) - 1) ** 2) - 0.04)
    np.testing.assert_allclose(first, expected, rtol=1e-5)
    second = once(data, objective="r2vpo", state=first)[0][1]["state"]
    assert second > first


def test_a_function_of_the_user_takes_the_mask(data: dict[str, Any]) -> None:
    @objectives.declare(kind="batch")
    def centered(log_ratio: Any, advantage: Any, mask: Any = None) -> Any:
        return (advantage - jnp.mean(advantage, where=mask)) * jnp.exp(log_ratio)

    (_, metrics), gradient = once(data, objective=centered)
    mask, a = data["response_mask"], np.broadcast_to(data["advantages"][:, None], (BATCH, TOKENS))
    ratio = np.exp(data["log_prob"] - data["old_log_prob"])
    expected = np.where(mask, -(a - a[mask].mean()) * ratio / mask.sum(), 0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)
    assert np.isfinite(metrics["ess"])


def test_no_tokens_at_all_give_a_loss_of_zero(data: dict[str, Any]) -> None:
    empty = data | {"response_mask": np.zeros((BATCH, TOKENS), bool)}
    for name in ("gipo", "p3o_ess", "m2po", "m2po_mask", "cppo"):
        for (loss, _), gradient in evaluated(empty, objective=name).values():
            assert loss == 0 and not gradient.any()


@pytest.mark.parametrize("change", ["advantages", "response_mask"])
def test_metrics_over_nothing_are_0(change: str, data: dict[str, Any]) -> None:
    empty = data | {change: np.zeros_like(data[change])}
    for (_, metrics), _ in evaluated(empty, objective="gipo").values():
        assert {float(metrics[name]) for name in diagnostics.OF_MOVED} == {0}
        assert all(np.isfinite(x) for x in metrics.values())
        if change == "response_mask":
            assert metrics["kl"] == metrics["log_ratio_abs_p95"] == metrics["clip_fraction"] == 0


def test_a_nan_of_ones_own_is_not_hidden(data: dict[str, Any]) -> None:
    spoilt = data | {"log_prob": np.where(data["response_mask"], np.nan, data["log_prob"])}
    for (_, metrics), _ in evaluated(spoilt, objective="gipo").values():
        assert np.isnan(metrics["kl"]) and np.isnan(metrics["mean_weight"])


def test_lists_are_taken_as_arrays(data: dict[str, Any]) -> None:
    arrays: dict[str, Any] = {name: jnp.array(x) for name, x in data.items()}
    lists = {name: x.tolist() for name, x in data.items()}
    expected, _ = losses.policy_loss(**arrays)
    assert losses.policy_loss(**lists)[0] == expected


@objectives.declare(kind="batch")
def without_mask(log_ratio: Any, advantage: Any) -> Any:
    return log_ratio * advantage / jnp.mean(advantage)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("response_mask", {"response_mask": jnp.ones((BATCH, TOKENS + 1))}),
        ("response_mask", {"response_mask": jnp.ones(BATCH)}),
        ("old_log_prob", {"old_log_prob": jnp.zeros((BATCH, 1))}),
        ("log_prob", {"log_prob": jnp.zeros(BATCH)}),
        ("log_prob", {"log_prob": jnp.zeros((0, TOKENS))}),
        ("advantages", {"advantages": jnp.zeros((BATCH, 1))}),
        ("loss_agg_mode", {"loss_agg_mode": "mean"}),
        ("max_tokens", {"max_tokens": 4}),
        ("max_tokens", {"max_tokens": 0, "loss_agg_mode": "seq-mean-token-sum-norm"}),
        ("ratio_level", {"ratio_level": "word"}),
        ("ratio_level", {"ratio_level": "prefix_min", "objective": "dppo_tv"}),
        ("objective", {"objective": "gopi"}),
        ("objective", {"objective": without_mask}),
        ("sigma", {"sigma": -1.0}),
        ("parameter of gipo", {"tau": 1.0}),
        ("parameter of ppo_clip", {"objective": "ppo_clip", "kernel": "gaussian"}),
        ("kernel", {"kernel": "box"}),
        ("log_ratio_start", {"objective": "geppo"}),
        ("behavior_distribution", {"objective": "dppo_exact_tv"}),
        (
            "policy_distribution",
            EXTRA["dppo_topk_kl"]
            | {"objective": "dppo_topk_kl", "policy_distribution": jnp.zeros((BATCH, TOKENS, 5))},
        ),
        ("ratio_level", {"ratio_level": "joint", "objective": "dppo_topk_tv"}),
    ],
)
def test_bad_input_is_refused_by_name(
    field: str, change: dict[str, Any], data: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: "):
        losses.policy_loss(**{name: jnp.array(x) for name, x in data.items()} | change)
