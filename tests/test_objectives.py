"""Objectives: effective weights against NumPy, GIPO's identities, finiteness, and the interface.

The reference formulas are written in float64 NumPy from the papers' effective weights, not from the
surrogates, so that a sign, a lost stop-gradient or a wrong branch shows as a different weight.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from gipo_jax import objectives
from gipo_jax.config import ConfigError

Floats = NDArray[np.float64]

NAMES = list(objectives.REGISTRY)
# Their update direction is not proportional to A: imitation, and penalties on the distance to mu.
NOT_LINEAR_IN_ADVANTAGE = {"awr", "p3o_ess", "r2vpo"}

LOG_RATIOS = [-80, -30, -5, -2, -1, -0.5, -0.21, -0.1, 0, 0.1, 0.19, 0.5, 1, 2, 2.9, 3.1, 5, 30, 80]
ADVANTAGES = [-3, -1, -0.2, 0.2, 1, 3]


def grid() -> tuple[Floats, Floats]:
    x, advantage = np.array(LOG_RATIOS, float), np.array(ADVANTAGES, float)
    return np.repeat(x, advantage.size), np.tile(advantage, x.size)


def inputs_for(name: str, size: int) -> dict[str, Floats]:
    """Values for what the objective asks for: starts and behaviour probabilities of many sizes."""
    every = {
        "log_ratio_start": np.resize([0.0, 0.4, -1.0, 2.0, -3.0], size),
        "behavior_log_prob": np.log(np.resize([0.02, 0.5, 0.9, 1e-6, 1 - 1e-4, 0.25, 0.4], size)),
    }
    return {key: every[key] for key in objectives.spec(name).inputs}


# ------------------------------------------------------------------ reference effective weights


def ppo(x: Floats, a: Floats) -> Floats:
    r = np.exp(x)
    return np.where(((a > 0) & (r > 1.2)) | ((a < 0) & (r < 0.8)), 0, r)


def soft_gate(x: Floats, tau: ArrayLike) -> Floats:
    r = np.exp(np.minimum(x, 5))
    # p (1 - p) = 1 / (2 + 2 cosh(tau (r - 1)))
    return 4 * r / (2 + 2 * np.cosh(tau * (r - 1)))


def vespo(x: Floats, a: Floats) -> Floats:
    k, rate = np.where(a >= 0, 2, 3), np.where(a >= 0, 3, 2)
    r = np.exp(x)
    return np.exp(rate) * r**k * np.exp(-rate * r)


def maspo(x: Floats, a: Floats) -> Floats:
    r = np.exp(x)
    gated = ((a > 0) & (r > 1)) | ((a < 0) & (r < 1))
    return np.where(gated, np.exp(-((r - 1) ** 2) / 2), 1) * r


def p3o_ess(x: Floats, a: Floats) -> Floats:
    r = np.exp(x)
    c = r.sum() ** 2 / (r.size * (r**2).sum())
    return np.minimum(r, c) + (1 - c) / a


def m2po(x: Floats, a: Floats) -> Floats:
    kept = np.zeros(x.shape, bool)
    total = 0.0
    for count, i in enumerate(sorted(range(x.size), key=lambda i: x[i] ** 2), start=1):
        total += x[i] ** 2
        if total / count > 0.04:
            break
        kept[i] = True
    return np.where(kept, np.exp(x), 0)


def r2vpo(x: Floats, a: Floats) -> Floats:
    r = np.exp(np.minimum(x, 3))
    return r - 2 * 0.04 * (r - 1) * r / a


def spo(x: Floats, a: Floats) -> Floats:
    r = np.exp(np.minimum(x, 3))
    return r * (1 - np.sign(a) * (r - 1) / 0.2)


def geppo(x: Floats, a: Floats, log_ratio_start: Floats) -> Floats:
    r, start = np.exp(x), np.exp(log_ratio_start)
    return np.where(((a > 0) & (r > start + 0.2)) | ((a < 0) & (r < start - 0.2)), 0, r)


def dppo(far: NDArray[np.bool_], x: Floats, a: Floats) -> Floats:
    r = np.exp(x)
    return np.where((a * (r - 1) > 0) & far, 0, np.minimum(r, 20))


def dppo_tv(x: Floats, a: Floats, behavior_log_prob: Floats) -> Floats:
    mu = np.exp(behavior_log_prob)
    return dppo(np.abs(np.minimum(mu * np.exp(x), 1) - mu) > 0.15, x, a)


def dppo_kl(x: Floats, a: Floats, behavior_log_prob: Floats) -> Floats:
    mu = np.exp(behavior_log_prob)
    pi = np.minimum(mu * np.exp(x), 1 - 1e-7)
    kl = mu * np.log(mu / pi) + (1 - mu) * np.log((1 - mu) / (1 - pi))
    return dppo(kl > 0.05, x, a)


REFERENCE: dict[str, Callable[..., Floats]] = {
    "gipo": lambda x, a: np.exp(x) * np.exp(-(x**2) / 2),
    "ppo_clip": ppo,
    "sapo": lambda x, a: soft_gate(x, np.where(a > 0, 1, 1.05)),
    "no_clip": lambda x, a: np.exp(x),
    "dual_clip": lambda x, a: np.where((a < 0) & (np.exp(x) > 3), 0, ppo(x, a)),
    "p3o_soft": lambda x, a: soft_gate(x, 4),
    "cispo": lambda x, a: np.minimum(np.exp(x), 1.2),
    "tis": lambda x, a: np.minimum(np.exp(x), 2),
    "topr": lambda x, a: np.where(a >= 0, 1, np.clip(np.exp(x), 0, 1)),
    "spo": spo,
    "vespo": vespo,
    "maspo": maspo,
    "awr": lambda x, a: np.minimum(np.exp(a / 0.05), 20) / a,
    "p3o_ess": p3o_ess,
    "m2po": m2po,
    "r2vpo": r2vpo,
    "geppo": geppo,
    "dppo_tv": dppo_tv,
    "dppo_kl": dppo_kl,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", ["extreme", "moderate"])
def test_effective_weight_equals_its_formula(name: str, batch: str) -> None:
    x, advantage = grid()
    if batch == "moderate":
        # Extremes make a batch statistic trivial; here it decides something.
        x = np.random.default_rng(0).normal(0, 0.3, x.size)
    inputs = inputs_for(name, x.size)
    expected = REFERENCE[name](x, advantage, **inputs)
    weight = jax.jit(partial(objectives.gradient_weight, name))(x, advantage, **inputs)
    np.testing.assert_allclose(weight, expected, rtol=1e-4, atol=1e-6 if name == "spo" else 1e-12)
    if name == "m2po":
        assert 0 < np.count_nonzero(weight) < weight.size


@pytest.mark.parametrize(
    ("name", "params", "expected"),
    [
        ("gipo", {"sigma": 0.5}, lambda x, a: np.exp(x - 2 * x**2)),
        (
            "gipo",
            {"sigma": 2.0, "sigma_neg_ratio": 0.5},
            lambda x, a: np.exp(x - x**2 / (2 * np.where(a > 0, 2.0, 1.0) ** 2)),
        ),
        ("gipo", {"kernel": "laplacian"}, lambda x, a: np.exp(x - np.abs(x))),
        ("gipo", {"kernel": "cauchy", "sigma": 2.0}, lambda x, a: np.exp(x) / (1 + x**2 / 4)),
        ("gipo", {"weight_clamp": 5.0}, lambda x, a: np.exp(x - np.clip(x, -5, 5) ** 2 / 2)),
        ("ppo_clip", {"clip_eps": 0.5}, lambda x, a: np.where(
            ((a > 0) & (np.exp(x) > 1.5)) | ((a < 0) & (np.exp(x) < 0.5)), 0, np.exp(x))),
        ("sapo", {"tau_neg": 2.0}, lambda x, a: soft_gate(x, np.where(a > 0, 1, 2))),
        ("cispo", {"eps_high": 1.0}, lambda x, a: np.minimum(np.exp(x), 2)),
        ("tis", {"max_ratio": 1.0}, lambda x, a: np.minimum(np.exp(x), 1)),
        ("spo", {"max_log_ratio": 1.0, "eps": 0.5}, lambda x, a: np.exp(np.minimum(x, 1))
            * (1 - np.sign(a) * (np.exp(np.minimum(x, 1)) - 1) / 0.5)),
        ("awr", {"beta": 1.0, "max_weight": 2.0}, lambda x, a: np.minimum(np.exp(a), 2) / a),
    ],
)  # fmt: skip
def test_parameters_enter_the_effective_weight(
    name: str, params: dict[str, Any], expected: Callable[[Floats, Floats], Floats]
) -> None:
    x, advantage = grid()
    weight = objectives.gradient_weight(name, x, advantage, **params)
    np.testing.assert_allclose(weight, expected(x, advantage), rtol=1e-4, atol=1e-12)


# ------------------------------------------------------------------ GIPO's identities


@pytest.mark.parametrize(
    ("objective", "params", "row"),
    [
        ("gipo", {"sigma": 0.5}, [2.5e-6, 0.191, 0.724, 1.12, 0.765, 0.0281, 3.2e-7]),
        ("gipo", {"sigma": 1.0}, [0.00706, 0.393, 0.780, 1.18, 1.57, 1.37, 0.225]),
        ("gipo", {"sigma": 2.0}, [0.0515, 0.471, 0.795, 1.20, 1.88, 3.62, 6.51]),
        ("sapo", {"tau_pos": 1.0}, [0.0822, 0.470, 0.792, 1.19, 1.57, 0.353, 4.5e-7]),
        ("sapo", {"tau_pos": 2.0}, [0.0487, 0.393, 0.769, 1.15, 0.840, 0.0067, 0.0]),
    ],
)
def test_table_of_weights(objective: str, params: dict[str, float], row: list[float]) -> None:
    ratios = jnp.array([0.1, 0.5, 0.8, 1.2, 2, 5, 20])
    weight = objectives.gradient_weight(objective, jnp.log(ratios), 1.0, **params)
    for value, expected in zip(weight, row, strict=True):
        # Half a unit in the last digit that the table prints.
        digits = 2 if expected in (2.5e-6, 3.2e-7, 4.5e-7, 0.0067) else 3
        unit = 10 ** (math.floor(math.log10(expected)) - digits + 1) if expected else 1e-8
        assert abs(float(value) - expected) <= 0.55 * unit


@pytest.mark.parametrize(
    ("sigma", "peak"), [(0.2, 1.0202), (0.5, 1.1331), (1.0, 1.6487), (2.0, 7.3891)]
)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_gipo_is_bounded_and_peaks_at_sigma_squared(
    sigma: float, peak: float, advantage: float
) -> None:
    at_peak = objectives.gradient_weight("gipo", sigma**2, advantage, sigma=sigma)
    assert at_peak == pytest.approx(peak, abs=6e-5)
    x = jnp.linspace(-80, 80, 20_001)
    weight = objectives.gradient_weight("gipo", x, advantage, sigma=sigma)
    assert jnp.max(weight) <= peak + 6e-5
    assert jnp.all(weight >= 0)


def test_gipo_never_quite_vanishes_and_never_exceeds_the_ratio() -> None:
    x = jnp.linspace(-8, 8, 401)
    weight = objectives.gradient_weight("gipo", x, 1.0)
    assert jnp.all(weight > 0)
    assert jnp.all(weight <= jnp.exp(x) * (1 + 1e-6))


def test_gipo_at_ratio_one_is_reinforce() -> None:
    for sigma in (0.1, 0.5, 1.0, 10.0):
        assert objectives.gradient_weight("gipo", 0.0, -2.0, sigma=sigma) == 1


def test_gipo_with_a_wide_weight_is_no_clip() -> None:
    x, advantage = grid()
    wide = objectives.gradient_weight("gipo", x, advantage, sigma=1e6)
    np.testing.assert_allclose(wide, np.exp(x), rtol=1e-4)


@pytest.mark.parametrize("kernel", ["gaussian", "laplacian", "cauchy"])
def test_trust_weight_is_symmetric_in_log_ratio(kernel: str) -> None:
    x = jnp.linspace(0, 80, 101)
    ones = jnp.ones_like(x)
    up = objectives.log_trust_weight(x, ones, sigma=0.7, kernel=kernel)
    down = objectives.log_trust_weight(-x, ones, sigma=0.7, kernel=kernel)
    np.testing.assert_array_equal(up, down)
    assert up[0] == 0 and jnp.all(jnp.diff(up) < 0)


def test_local_expansion_of_gipo() -> None:
    x = np.linspace(-0.05, 0.05, 11)
    for sigma in (0.5, 1.0, 2.0):
        expansion = 1 + x + x**2 * (0.5 - 0.5 / sigma**2)
        weight = objectives.gradient_weight("gipo", x, 1.0, sigma=sigma)
        third_order = 0.05**3 * (1 / 6 + 0.5 / sigma**2)
        np.testing.assert_allclose(weight, expansion, atol=1.1 * third_order + 1e-6)


@pytest.mark.parametrize(
    ("sigma", "expected"), [(None, 0.368), (0.2, 0.239), (0.5, 0.491), (1, 0.595), (2, 0.499)]
)
def test_effective_sample_size_between_gaussians(sigma: float | None, expected: float) -> None:
    # Two Gaussian policies one standard deviation apart: x ~ N(-1/2, 1) under mu.
    x = np.linspace(-10, 10, 20_001)
    density = np.exp(-((x + 0.5) ** 2) / 2)
    if sigma is None:
        weight = objectives.gradient_weight("no_clip", x, 1.0)
    else:
        weight = objectives.gradient_weight("gipo", x, 1.0, sigma=sigma)
    u = np.asarray(weight, np.float64)
    ess = (density @ u) ** 2 / (density @ u**2) / density.sum()
    assert ess == pytest.approx(expected, abs=6e-4)


def test_trust_weight_carries_no_gradient() -> None:
    x = jnp.linspace(-3, 3, 13)

    def surrogate(sigma: float, kernel: str) -> jax.Array:
        return jnp.sum(objectives.gipo(x, jnp.ones_like(x), sigma=sigma, kernel=kernel))

    for kernel in ("gaussian", "laplacian", "cauchy"):
        assert jax.grad(surrogate)(1.0, kernel) == 0
        value = objectives.gipo(x, jnp.ones_like(x), kernel=kernel)
        weight = objectives.gradient_weight("gipo", x, 1.0, kernel=kernel)
        np.testing.assert_allclose(weight, value, rtol=1e-6)


def test_stop_gradient_matters() -> None:
    def attached(log_ratio: jax.Array, advantage: jax.Array, sigma: float = 1.0) -> jax.Array:
        return jnp.exp(log_ratio - log_ratio**2 / (2 * sigma**2)) * advantage

    x = jnp.array([-2.0, 0.5, 2.0, 4.0])
    detached_weight = objectives.gradient_weight("gipo", x, 1.0)
    attached_weight = objectives.gradient_weight(attached, x, 1.0)
    np.testing.assert_allclose(attached_weight, (1 - x) * detached_weight, rtol=1e-5)
    assert attached_weight[2] < 0 < detached_weight[2]


# ------------------------------------------------------------------ single objectives


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"sapo", "p3o_soft"}))
def test_values_are_the_written_surrogates_at_ratio_one(name: str) -> None:
    """At r = 1 a ratio surrogate is A, a score surrogate sg(..) log pi is 0 as x = 0."""
    advantage = jnp.array([2.0, -3.0])
    spec = objectives.spec(name)
    extra: dict[str, Any] = {key: jnp.zeros(2) for key in spec.inputs}
    if spec.initial_state is not None:
        extra["state"] = jnp.float32(0)
    value = spec.function(jnp.zeros(2), advantage, **extra)
    surrogate = value[0] if spec.initial_state is not None else value
    score = {"cispo", "tis", "topr", "vespo", "awr", "p3o_ess", "dppo_tv", "dppo_kl"}
    np.testing.assert_allclose(surrogate, jnp.zeros(2) if name in score else advantage, atol=1e-6)


def test_geppo_equals_ppo_when_the_phase_starts_at_the_behavior_policy() -> None:
    x, advantage = grid()
    start = np.zeros_like(x)
    moved = objectives.gradient_weight("geppo", x, advantage, log_ratio_start=start)
    np.testing.assert_array_equal(moved, objectives.gradient_weight("ppo_clip", x, advantage))


def test_geppo_clips_nothing_at_the_start_of_a_phase() -> None:
    x, advantage = grid()
    weight = objectives.gradient_weight("geppo", x, advantage, log_ratio_start=x)
    np.testing.assert_allclose(weight, np.exp(x), rtol=1e-4)


def test_m2po_keeps_all_of_a_fresh_batch_and_nothing_of_a_hopeless_one() -> None:
    fresh = jnp.full((4, 2), 0.1)
    np.testing.assert_allclose(objectives.gradient_weight("m2po", fresh, 1.0), jnp.exp(fresh))
    assert jnp.all(objectives.gradient_weight("m2po", jnp.full((4, 2), -1.0), 1.0) == 0)


def test_m2po_treats_tokens_as_samples() -> None:
    x = jnp.array([[0.0, 2.0], [0.1, 0.1]])
    kept = objectives.gradient_weight("m2po", x, 1.0) > 0
    np.testing.assert_array_equal(kept, [[True, False], [True, True]])


def test_p3o_ess_on_fresh_data_is_reinforce() -> None:
    weight = objectives.gradient_weight("p3o_ess", jnp.zeros(5), jnp.arange(1.0, 6.0))
    np.testing.assert_allclose(weight, jnp.ones(5), rtol=1e-6)


def test_r2vpo_dual_variable_follows_the_constraint() -> None:
    advantage = jnp.ones((8, 2))
    near, far = jnp.full((8, 2), 0.01), jnp.full((8, 2), 1.0)
    start = objectives.spec("r2vpo").initial_state
    assert start is not None
    first = start({"dual_init": 0.04})
    _, raised = objectives.r2vpo(far, advantage, first)
    _, lowered = objectives.r2vpo(near, advantage, first)
    assert raised == pytest.approx(0.04 + 0.01 * ((math.e - 1) ** 2 - 0.04), rel=1e-5)
    assert 0 < lowered < first < raised
    _, floor = objectives.r2vpo(near, advantage, jnp.float32(0))
    assert floor == 0
    # A larger dual variable holds the policy back harder.
    light = objectives.gradient_weight("r2vpo", 1.0, 1.0, state=0.04)
    heavy = objectives.gradient_weight("r2vpo", 1.0, 1.0, state=0.4)
    assert heavy < light


def test_r2vpo_dual_variable_carries_no_gradient() -> None:
    def next_state(x: jax.Array) -> jax.Array:
        return objectives.r2vpo(x, jnp.ones(4), jnp.float32(0.04))[1]

    np.testing.assert_array_equal(jax.grad(next_state)(jnp.linspace(-1, 1, 4)), jnp.zeros(4))


# ------------------------------------------------------------------ properties of all of them

SIZE = 8
log_ratios = st.lists(st.floats(-80, 80, width=32), min_size=SIZE, max_size=SIZE)
advantages = st.lists(st.floats(-1000, 1000, width=32), min_size=SIZE, max_size=SIZE)


def value_and_gradient(
    name: str, x: jax.Array, advantage: jax.Array, params: dict[str, Any]
) -> tuple[jax.Array, jax.Array]:
    """Surrogate and its gradient with respect to the log-ratio, of its shape."""
    spec = objectives.spec(name)
    extra: dict[str, Any] = {key: jnp.asarray(v) for key, v in inputs_for(name, x.size).items()}
    if spec.initial_state is not None:
        extra["state"] = spec.initial_state(spec.params | params)

    def surrogate(x: jax.Array) -> jax.Array:
        value = spec.function(x, advantage, **extra, **params)
        return value if spec.initial_state is None else value[0]

    value, pull_back = jax.vjp(surrogate, x)
    return value, pull_back(jnp.ones_like(value))[0]


@cache
def compiled(name: str) -> Callable[..., tuple[jax.Array, jax.Array]]:
    return jax.jit(partial(value_and_gradient, name, params={}))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=50, deadline=None)
@given(x=log_ratios, advantage=advantages)
def test_finite_in_float32(name: str, x: list[float], advantage: list[float]) -> None:
    value, gradient = compiled(name)(jnp.array(x), jnp.array(advantage))
    assert value.dtype == gradient.dtype == jnp.float32
    assert jnp.all(jnp.isfinite(value)) and jnp.all(jnp.isfinite(gradient))


@pytest.mark.parametrize("name", NAMES)
def test_finite_where_float32_exponentials_are_not(name: str) -> None:
    x = jnp.array([-1e4, -1e4, -100, -100, 100, 100, 1e4, 1e4])
    advantage = jnp.array([1.0, -1.0] * 4)
    value, gradient = compiled(name)(x, advantage)
    assert jnp.all(jnp.isfinite(value)) and jnp.all(jnp.isfinite(gradient))


@pytest.mark.parametrize("name", sorted(set(NAMES) - NOT_LINEAR_IN_ADVANTAGE))
@settings(max_examples=20, deadline=None)
@given(x=log_ratios)
def test_zero_advantage_gives_zero_gradient(name: str, x: list[float]) -> None:
    _, gradient = compiled(name)(jnp.array(x), jnp.zeros(SIZE))
    np.testing.assert_array_equal(gradient, np.zeros(SIZE))


def test_gradient_at_zero_advantage_of_those_that_keep_one() -> None:
    x, zero = jnp.linspace(-1, 1, SIZE), jnp.zeros(SIZE)
    np.testing.assert_array_equal(compiled("awr")(x, zero)[1], jnp.ones(SIZE))
    r = np.exp(np.linspace(-1, 1, SIZE))
    ess = r.sum() ** 2 / (SIZE * (r**2).sum())
    np.testing.assert_allclose(compiled("p3o_ess")(x, zero)[1], np.full(SIZE, 1 - ess), rtol=1e-5)
    pull = -2 * 0.04 * r * (r - 1)
    np.testing.assert_allclose(compiled("r2vpo")(x, zero)[1], pull, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=3, deadline=None)
@given(x=log_ratios, advantage=advantages)
def test_jit_equals_eager(name: str, x: list[float], advantage: list[float]) -> None:
    eager = value_and_gradient(name, jnp.array(x), jnp.array(advantage), {})
    for a, b in zip(compiled(name)(jnp.array(x), jnp.array(advantage)), eager, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-30)


@pytest.mark.parametrize("name", [n for n in NAMES if objectives.spec(n).params])
def test_vmap_over_parameters_equals_a_loop(name: str) -> None:
    x, advantage = jnp.linspace(-1.5, 1.5, 64), jnp.array([1.0, -2.0] * 32)
    defaults = objectives.spec(name).params
    lanes = [{key: value * factor for key, value in defaults.items()} for factor in (0.5, 1, 2)]
    stacked = {key: jnp.array([lane[key] for lane in lanes]) for key in defaults}
    evaluate = jax.jit(partial(value_and_gradient, name, x, advantage))
    batched = jax.jit(jax.vmap(evaluate))(stacked)
    alone = [evaluate(lane) for lane in lanes]
    np.testing.assert_allclose(batched[0], jnp.stack([a[0] for a in alone]), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(batched[1], jnp.stack([a[1] for a in alone]), rtol=1e-5, atol=1e-7)
    # Parameters that did nothing would pass the comparison above.
    assert not np.allclose(batched[1][0], batched[1][2], rtol=1e-3)


# ------------------------------------------------------------------ the interface


def test_every_objective_is_documented() -> None:
    for name in NAMES:
        spec = objectives.spec(name)
        doc = spec.function.__doc__ or ""
        assert "weight" in doc or "direction" in doc or name == "dppo_kl"
        assert spec.kind in objectives.KINDS
        assert name == "no_clip" or (spec.source.startswith("arXiv:") and spec.source in doc)


def test_spec_reads_signature_and_declaration() -> None:
    spec = objectives.spec("gipo")
    assert spec.params == {"sigma": 1.0, "sigma_neg_ratio": 1.0, "weight_clamp": math.inf}
    assert spec.takes_kernel and spec.kind == "per-sample" and not spec.inputs
    assert objectives.spec("geppo").inputs == ("log_ratio_start",)
    assert objectives.spec("dppo_kl").inputs == ("behavior_log_prob",)
    assert [n for n in NAMES if objectives.spec(n).discrete_only] == ["dppo_tv", "dppo_kl"]
    assert [n for n in NAMES if objectives.spec(n).initial_state] == ["r2vpo"]
    kinds = {n: objectives.spec(n).kind for n in NAMES}
    assert [n for n in NAMES if kinds[n] == "batch"] == ["p3o_ess", "m2po", "r2vpo"]
    assert [n for n in NAMES if kinds[n] == "other-input"] == ["geppo", "dppo_tv", "dppo_kl"]


def test_a_plain_function_is_an_objective() -> None:
    def mine(log_ratio: jax.Array, advantage: jax.Array, power: float = 2) -> jax.Array:
        return jnp.exp(log_ratio * power) * advantage

    spec = objectives.spec(mine)
    assert spec.name == "mine" and spec.params == {"power": 2.0}
    assert spec.kind == "per-sample" and not spec.positive and spec.initial_state is None
    weight = objectives.gradient_weight(mine, jnp.array([0.0, 1.0]), 3.0, power=0.5)
    np.testing.assert_allclose(weight, 0.5 * np.exp([0.0, 0.5]), rtol=1e-6)


def test_a_partial_keeps_what_its_function_declares() -> None:
    spec = objectives.spec(partial(objectives.dppo_kl, delta=0.1))
    assert spec.name == "dppo_kl" and spec.discrete_only
    assert spec.params == {"delta": 0.1, "max_ratio": 20.0}


def no_advantage(log_ratio: jax.Array, weight: float = 1.0) -> jax.Array:
    return log_ratio


def unknown_input(log_ratio: jax.Array, advantage: jax.Array, reward: jax.Array) -> jax.Array:
    return log_ratio


def switch(log_ratio: jax.Array, advantage: jax.Array, flag: bool = True) -> jax.Array:
    return log_ratio


def stateless(log_ratio: jax.Array, advantage: jax.Array, state: jax.Array) -> jax.Array:
    return log_ratio


@objectives.declare(initial_state=lambda params: jnp.zeros(()))
def never_takes_state(log_ratio: jax.Array, advantage: jax.Array) -> jax.Array:
    return log_ratio


@objectives.declare(positive=("sigma",))
def misdeclared(log_ratio: jax.Array, advantage: jax.Array, width: float = 1.0) -> jax.Array:
    return log_ratio


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ("gippo", ["objective", "'gippo'", "ppo_clip", "dppo_kl"]),
        (no_advantage, ["no_advantage", "log_ratio and advantage"]),
        (print, ["print", "log_ratio and advantage"]),
        (unknown_input, ["unknown_input", "reward", "numeric default", "behavior_log_prob"]),
        (switch, ["switch", "flag", "numeric default"]),
        (stateless, ["stateless", "state", "initial_state"]),
        (never_takes_state, ["never_takes_state", "state"]),
        (misdeclared, ["misdeclared", "sigma", "width"]),
    ],
)
def test_spec_errors_name_what_is_wrong(objective: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        objectives.spec(objective)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_declare_refuses_an_unknown_kind() -> None:
    with pytest.raises(ConfigError, match="per-sample"):
        objectives.declare(kind="sequence")


def test_unknown_kernel() -> None:
    with pytest.raises(ConfigError, match="laplacian"):
        objectives.gipo(jnp.zeros(1), jnp.ones(1), kernel="box")


@pytest.mark.parametrize(
    ("objective", "params", "words"),
    [
        ("gipo", {"sigma": 0.0}, ["sigma", "0.0", "> 0"]),
        ("gipo", {"sigma": -1}, ["sigma", "-1", "> 0"]),
        ("gipo", {"sigma": math.nan}, ["sigma", "nan"]),
        ("gipo", {"sigma": math.inf}, ["sigma", "inf"]),
        ("gipo", {"sigma": "wide"}, ["sigma", "'wide'", "number"]),
        ("gipo", {"sigma": True}, ["sigma", "True"]),
        ("gipo", {"weight_clamp": 0.0}, ["weight_clamp", "> 0"]),
        ("gipo", {"tau": 1.0}, ["gipo", "'tau'", "sigma_neg_ratio"]),
        ("no_clip", {"sigma": 1.0}, ["no_clip", "'sigma'", "no parameters"]),
        ("r2vpo", {"dual_rate": math.nan}, ["dual_rate", "finite"]),
    ],
)
def test_check_params_names_what_is_wrong(
    objective: str, params: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        objectives.check_params(objective, params)
    assert all(word in str(error.value) for word in words)


def test_check_params_accepts_what_is_usable() -> None:
    for name in NAMES:
        objectives.check_params(name, objectives.spec(name).params)
    objectives.check_params("gipo", {"sigma": 3, "weight_clamp": math.inf})
    objectives.check_params("r2vpo", {"dual_rate": 0.0})
    objectives.check_params("vespo", {"k_pos": 0})


def test_gradient_weight_at_zero_advantage_is_that_of_a_negative_one() -> None:
    x = jnp.linspace(-1, 1, 5)
    for name in ("gipo", "ppo_clip", "sapo"):
        np.testing.assert_array_equal(
            objectives.gradient_weight(name, x, 0.0), objectives.gradient_weight(name, x, -1.0)
        )
