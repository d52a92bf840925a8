"""Objectives: effective weights against NumPy, identities, limits, bounds and finite values.

The reference formulas are written in float64 NumPy from the papers' effective weights, not from the
surrogates, so that a sign, a lost stop-gradient or a wrong branch shows as a different weight.
"""

import ast
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from gipo_jax import objectives
from tests.programs import ROOT

Floats = NDArray[np.float64]

NAMES = list(objectives.REGISTRY)
# Their update direction is not proportional to A: imitation, and penalties on the distance to mu.
NOT_LINEAR_IN_ADVANTAGE = {"awr", "biris", "p3o_ess", "r2vpo"}

LOG_RATIOS = [-80, -30, -5, -2, -1, -0.5, -0.21, -0.1, 0, 0.1, 0.19, 0.5, 1, 2, 2.9, 3.1, 5, 30, 80]
ADVANTAGES = [-3, -1, -0.2, 0.2, 1, 3]


def grid() -> tuple[Floats, Floats]:
    x, advantage = np.array(LOG_RATIOS, float), np.array(ADVANTAGES, float)
    return np.repeat(x, advantage.size), np.tile(advantage, x.size)


def inputs_for(name: str, size: int) -> dict[str, Floats]:
    """The inputs that an objective asks for, over a wide range of values."""
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


def moves_away(x: Floats, a: Floats) -> NDArray[np.bool_]:
    return ((a > 0) & (x > 0)) | ((a < 0) & (x < 0))


def m2po(x: Floats, a: Floats) -> Floats:
    """The cap is found by bisection, where the implementation sorts."""
    r, square = np.exp(x), x[moves_away(x, a)] ** 2
    low, high = 0.0, 1e8
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if np.minimum(square, middle).mean() > 0.04 else (middle, high)
    tau = np.sqrt(low)
    with np.errstate(over="ignore"):
        above = 1 + max(np.exp(tau) - 1, 0.5)
    below = 1 - max(1 - np.exp(-tau), 0.3)
    return np.where(((a > 0) & (r > above)) | ((a < 0) & (r < below)), 0, r)


def m2po_mask(x: Floats, a: Floats) -> Floats:
    """Drops one sample after the other, the largest square first."""
    kept, counted = np.ones(x.shape, bool), moves_away(x, a)
    while (x[kept & counted] ** 2).sum() / x.size > 0.04:
        square = np.where(kept & counted, x**2, -1)
        kept[np.flatnonzero(square == square.max())[-1]] = False
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


def decoupled_ppo(x: Floats, a: Floats, log_ratio_start: Floats) -> Floats:
    change = np.exp(x - log_ratio_start)
    return np.where(((a > 0) & (change > 1.2)) | ((a < 0) & (change < 0.8)), 0, np.exp(x))


def proximal_gipo(
    x: Floats,
    a: Floats,
    log_ratio_start: Floats,
    sigma_stale: float = 1.0,
    sigma_prox: float = 0.5,
) -> Floats:
    r, start = np.exp(x), np.exp(log_ratio_start)
    stale = np.exp(-(log_ratio_start**2) / (2 * sigma_stale**2))
    prox = np.exp(-((r - start) ** 2) / (2 * sigma_prox**2))
    return r * stale * np.where(((a > 0) & (r > start)) | ((a < 0) & (r < start)), prox, 1)


def adaptive_gipo(x: Floats, a: Floats, log_ratio_start: Floats) -> Floats:
    sigma = np.sqrt(np.mean(log_ratio_start**2) / (1 / 0.7**2 - 1))
    return proximal_gipo(x, a, log_ratio_start, sigma)


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
    "biris": lambda x, a: np.exp(x) * (1 - 0.1 * np.sign(x) / a),
    "awr": lambda x, a: np.minimum(np.exp(a / 0.05), 20) / a,
    "p3o_ess": p3o_ess,
    "m2po": m2po,
    "m2po_mask": m2po_mask,
    "r2vpo": r2vpo,
    "adaptive_gipo": adaptive_gipo,
    "geppo": geppo,
    "decoupled_ppo": decoupled_ppo,
    "proximal_gipo": proximal_gipo,
    "dppo_tv": dppo_tv,
    "dppo_kl": dppo_kl,
}


class EffectiveWeightTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(name=NAMES, batch=("extreme", "moderate"))
    def test_effective_weight_equals_its_formula(self, name: str, batch: str) -> None:
        x, advantage = grid()
        if batch == "moderate":
            # Extremes make a batch statistic trivial; here it decides something.
            x = np.random.default_rng(0).normal(0, 0.5, x.size)
        inputs = inputs_for(name, x.size)
        expected = REFERENCE[name](x, advantage, **inputs)
        weight = self.variant(partial(objectives.gradient_weight, name))(x, advantage, **inputs)
        np.testing.assert_allclose(
            weight, expected, rtol=1e-4, atol=1e-6 if name in ("spo", "biris") else 1e-12
        )
        if name.startswith("m2po"):
            assert 0 < np.count_nonzero(np.asarray(weight)) < x.size


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
        ("dppo_tv", {"delta_low": 0.05, "delta_high": 0.3}, lambda x, a: dppo(
            np.abs(np.minimum(0.3 * np.exp(x), 1) - 0.3) > np.where(a > 0, 0.3, 0.05), x, a)),
        ("cispo", {"eps_low": 0.2}, lambda x, a: np.clip(np.exp(x), 0.8, 1.2)),
        ("tis", {"max_ratio": 1.0}, lambda x, a: np.minimum(np.exp(x), 1)),
        ("spo", {"max_log_ratio": 1.0, "eps": 0.5}, lambda x, a: np.exp(np.minimum(x, 1))
            * (1 - np.sign(a) * (np.exp(np.minimum(x, 1)) - 1) / 0.5)),
        ("biris", {"alpha": 0.5}, lambda x, a: np.exp(x) * (1 - 0.5 * np.sign(x) / a)),
        ("awr", {"beta": 1.0, "max_weight": 2.0}, lambda x, a: np.minimum(np.exp(a), 2) / a),
    ],
)  # fmt: skip
def test_parameters_change_the_effective_weight_as_written(
    name: str, params: dict[str, Any], expected: Callable[[Floats, Floats], Floats]
) -> None:
    x, advantage = grid()
    inputs = {key: np.full(x.size, np.log(0.3)) for key in objectives.spec(name).inputs}
    weight = objectives.gradient_weight(name, x, advantage, **inputs, **params)
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
def test_effective_weights_match_the_tabulated_values(
    objective: str, params: dict[str, float], row: list[float]
) -> None:
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
def test_gipo_weight_is_largest_at_log_ratio_sigma_squared(
    sigma: float, peak: float, advantage: float
) -> None:
    at_peak = objectives.gradient_weight("gipo", sigma**2, advantage, sigma=sigma)
    assert at_peak == pytest.approx(peak, abs=6e-5)
    x = jnp.linspace(-80, 80, 20_001)
    weight = objectives.gradient_weight("gipo", x, advantage, sigma=sigma)
    assert jnp.max(weight) <= peak + 6e-5
    assert jnp.all(weight >= 0)


def test_gipo_weight_is_positive_and_at_most_the_ratio() -> None:
    x = jnp.linspace(-8, 8, 401)
    weight = objectives.gradient_weight("gipo", x, 1.0)
    assert jnp.all(weight > 0)
    assert jnp.all(weight <= jnp.exp(x) * (1 + 1e-6))


def test_gipo_at_ratio_one_has_weight_one() -> None:
    for sigma in (0.1, 0.5, 1.0, 10.0):
        assert objectives.gradient_weight("gipo", 0.0, -2.0, sigma=sigma) == 1


def test_gipo_with_large_sigma_equals_no_clip() -> None:
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


def test_gipo_weight_matches_its_taylor_expansion() -> None:
    x = np.linspace(-0.05, 0.05, 11)
    for sigma in (0.5, 1.0, 2.0):
        expansion = 1 + x + x**2 * (0.5 - 0.5 / sigma**2)
        weight = objectives.gradient_weight("gipo", x, 1.0, sigma=sigma)
        third_order = 0.05**3 * (1 / 6 + 0.5 / sigma**2)
        np.testing.assert_allclose(weight, expansion, atol=1.1 * third_order + 1e-6)


@pytest.mark.parametrize(
    ("sigma", "expected"), [(None, 0.368), (0.2, 0.239), (0.5, 0.491), (1, 0.595), (2, 0.499)]
)
def test_effective_sample_size_between_two_gaussian_policies(
    sigma: float | None, expected: float
) -> None:
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


def test_without_stop_gradient_the_gipo_weight_changes_sign() -> None:
    def attached(log_ratio: jax.Array, advantage: jax.Array, sigma: float = 1.0) -> jax.Array:
        return jnp.exp(log_ratio - log_ratio**2 / (2 * sigma**2)) * advantage

    x = jnp.array([-2.0, 0.5, 2.0, 4.0])
    detached_weight = objectives.gradient_weight("gipo", x, 1.0)
    attached_weight = objectives.gradient_weight(attached, x, 1.0)
    np.testing.assert_allclose(attached_weight, (1 - x) * detached_weight, rtol=1e-5)
    assert attached_weight[2] < 0 < detached_weight[2]


# ------------------------------------------------------------------ single objectives


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"sapo", "p3o_soft"}))
def test_surrogate_at_ratio_one_is_the_advantage_or_zero(name: str) -> None:
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


@pytest.mark.parametrize("name", ["geppo", "decoupled_ppo"])
def test_nothing_is_clipped_at_the_start_of_an_update_phase(name: str) -> None:
    x, advantage = grid()
    weight = objectives.gradient_weight(name, x, advantage, log_ratio_start=x)
    np.testing.assert_allclose(weight, np.exp(x), rtol=1e-4)


def test_decoupled_ppo_on_fresh_data_equals_ppo() -> None:
    x, advantage = grid()
    fresh = objectives.gradient_weight(
        "decoupled_ppo", x, advantage, log_ratio_start=np.zeros_like(x)
    )
    np.testing.assert_array_equal(fresh, objectives.gradient_weight("ppo_clip", x, advantage))


def test_decoupled_ppo_clips_relative_to_the_start_and_geppo_absolutely() -> None:
    # From r_k = 4 to r = 4.5: a change of 12 %, or of 0.5.
    x, start = jnp.log(jnp.array([4.5])), jnp.log(jnp.array([4.0]))
    for name, expected in (("decoupled_ppo", 4.5), ("geppo", 0.0)):
        weight = objectives.gradient_weight(name, x, 1.0, log_ratio_start=start)
        np.testing.assert_allclose(weight, [expected], rtol=1e-6)


# ------------------------------------------------------------------ proximal GIPO


def proximal_gipo_grid() -> tuple[Floats, Floats, Floats]:
    """Log-ratios now and at the start of the phase, and both signs of the advantage."""
    x, start, advantage = np.meshgrid(
        np.linspace(-4, 4, 41), np.linspace(-3, 3, 31), [-2.0, 0.5], indexing="ij"
    )
    return x.ravel(), advantage.ravel(), start.ravel()


def test_proximal_gipo_equals_gipo_at_the_start_of_a_phase() -> None:
    x, advantage = grid()
    for sigma_prox in (0.1, 0.5, 1e6):
        weight = objectives.gradient_weight(
            "proximal_gipo", x, advantage, log_ratio_start=x, sigma_stale=0.7, sigma_prox=sigma_prox
        )
        expected = objectives.gradient_weight("gipo", x, advantage, sigma=0.7)
        np.testing.assert_allclose(weight, expected, rtol=1e-5)


def test_proximal_gipo_on_fresh_data_equals_maspo() -> None:
    x, advantage = grid()
    weight = objectives.gradient_weight(
        "proximal_gipo", x, advantage, log_ratio_start=np.zeros_like(x), sigma_prox=0.8
    )
    expected = objectives.gradient_weight("maspo", x, advantage, sigma=0.8)
    np.testing.assert_allclose(weight, expected, rtol=1e-5)


def test_proximal_gipo_with_wide_stale_weight_is_a_gaussian_geppo() -> None:
    x, advantage, start = proximal_gipo_grid()

    def weight(sigma_prox: float) -> jax.Array:
        return objectives.gradient_weight(
            "proximal_gipo", x, advantage, log_ratio_start=start, sigma_stale=1e6,
            sigma_prox=sigma_prox,
        )  # fmt: skip

    r, r_start = np.exp(x), np.exp(start)
    away = advantage * (r - r_start) > 0
    gate = np.where(away, np.exp(-((r - r_start) ** 2) / (2 * 0.4**2)), 1)
    np.testing.assert_allclose(weight(0.4), r * gate, rtol=1e-4, atol=1e-12)
    # As the gate narrows, it becomes GePPO's clip at its narrowest.
    geppo = objectives.gradient_weight("geppo", x, advantage, log_ratio_start=start, clip_eps=1e-6)
    np.testing.assert_allclose(weight(1e-6), geppo, rtol=1e-4)


def test_proximal_gipo_with_wide_proximal_weight_trusts_by_the_start_alone() -> None:
    x, advantage, start = proximal_gipo_grid()
    weight = objectives.gradient_weight(
        "proximal_gipo", x, advantage, log_ratio_start=start, sigma_stale=0.6, sigma_prox=1e6
    )
    np.testing.assert_allclose(weight, np.exp(x - start**2 / (2 * 0.6**2)), rtol=1e-4)


def test_proximal_gipo_with_two_wide_weights_equals_no_clip() -> None:
    x, advantage, start = proximal_gipo_grid()
    weight = objectives.gradient_weight(
        "proximal_gipo", x, advantage, log_ratio_start=start, sigma_stale=1e6, sigma_prox=1e6
    )
    np.testing.assert_allclose(weight, np.exp(x), rtol=1e-4)


@pytest.mark.parametrize(("sigma_stale", "sigma_prox"), [(0.3, 0.2), (1.0, 0.5), (2.0, 3.0)])
def test_proximal_gipo_weight_stays_within_its_derived_bound(
    sigma_stale: float, sigma_prox: float
) -> None:
    x, advantage, start = proximal_gipo_grid()
    weight = np.asarray(
        objectives.gradient_weight(
            "proximal_gipo", x, advantage, log_ratio_start=start, sigma_stale=sigma_stale,
            sigma_prox=sigma_prox,
        )
    )  # fmt: skip
    leads_back = (advantage < 0) & (x > start)
    peak = np.exp(sigma_stale**2 / 2)
    bound = np.where((advantage > 0) & (x > start), peak + sigma_prox * np.exp(-0.5), peak)
    assert np.all(weight >= 0)
    assert np.all(weight[~leads_back] <= bound[~leads_back] * (1 + 1e-5))
    # Where the update leads back to the start of the phase, no bound holds.
    trust = np.exp(-(start**2) / (2 * sigma_stale**2))
    np.testing.assert_allclose(weight[leads_back], (trust * np.exp(x))[leads_back], rtol=1e-4)


@pytest.mark.parametrize("spread", [0.02, 0.8, 5.0])
def test_adaptive_gipo_has_the_mean_weight_it_aims_at_on_data_of_any_staleness(
    spread: float,
) -> None:
    start = np.random.default_rng(0).normal(0, spread, 200_000)
    # At the start of an update phase u = w_stale r; the last value is padding.
    x, mask = np.append(start, 50.0), np.append(np.ones(start.size, bool), False)
    u = objectives.gradient_weight(
        "adaptive_gipo", x, 1.0, log_ratio_start=x, mean_weight=0.6, mask=mask
    )
    assert np.mean((np.asarray(u) * np.exp(-x))[:-1]) == pytest.approx(0.6, abs=0.005)


def test_adaptive_gipo_trusts_fresh_data_and_any_data_from_a_mean_weight_of_one_on() -> None:
    x, advantage, _ = proximal_gipo_grid()
    for start, mean_weight in ((np.zeros_like(x), 0.7), (x, 1.0), (x, 2.0)):
        u = objectives.gradient_weight(
            "adaptive_gipo", x, advantage, log_ratio_start=start, mean_weight=mean_weight,
            sigma_prox=1e6,
        )  # fmt: skip
        np.testing.assert_allclose(u, np.exp(x), rtol=1e-4)


def test_proximal_gipo_in_expectation() -> None:
    """Sums over the actions of random policies: mu, the one at the start of the phase, and pi."""
    for seed in range(50):
        logits = np.random.default_rng(seed).normal(size=(3, 6), scale=1.5)
        mu, start, pi = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        advantage = np.random.default_rng(seed + 100).normal(size=6)
        for now in (start, pi):
            x, x_start = np.log(now / mu), np.log(start / mu)
            weight = objectives.gradient_weight(
                "proximal_gipo", x, advantage, log_ratio_start=x_start, sigma_stale=0.8
            )
            u = np.asarray(weight, float)
            stale = np.exp(-(x_start**2) / (2 * 0.8**2))
            assert mu @ u <= now @ stale * (1 + 1e-5) <= 1 + 1e-5
            if now is start:
                assert mu @ u**2 <= np.exp(0.8**2 / 4)
            # What w_prox measures: twice the total variation distance moved in this phase.
            moved = mu @ np.abs(np.exp(x) - np.exp(x_start))
            assert moved == pytest.approx(np.abs(now - start).sum(), abs=1e-12)


# Second moments of x over the samples that move away: 0.04 is in between.
SPREADS = [0.05, 0.15, 0.3, 0.6, 2.0]


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("name", ["m2po", "m2po_mask"])
def test_m2po_variants_equal_numpy_at_any_staleness(name: str, spread: float) -> None:
    random = np.random.default_rng(int(100 * spread))
    weight = jax.jit(partial(objectives.gradient_weight, name))
    for _ in range(20):
        x, advantage = random.normal(0, spread, 64), random.normal(size=64)
        np.testing.assert_allclose(weight(x, advantage), REFERENCE[name](x, advantage), rtol=1e-4)


def test_m2po_clips_where_capped_squares_average_to_the_bound() -> None:
    x = jnp.array([0.1, 0.5, 1.0, 3.0, -3.0, -0.4])
    advantage = jnp.array([1.0, 1.0, 1.0, 1.0, 1.0, -1.0])
    # 0.01 + 0.16 + 0.25 + 2 tau^2 = 5 * 0.2 over the five that move away, so tau = 0.54.
    weight = objectives.gradient_weight(
        "m2po", x, advantage, max_second_moment=0.2, min_eps_high=1e-6, min_eps_low=1e-6
    )
    expected = np.exp(x) * np.array([1, 1, 0, 0, 1, 1])
    np.testing.assert_allclose(weight, expected, rtol=1e-6)


def test_m2po_never_clips_inside_its_least_interval() -> None:
    stale = jnp.log(jnp.array([1.49, 1.51, 5.0, 0.71, 0.69, 0.1]))
    advantage = jnp.array([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    weight = objectives.gradient_weight("m2po", stale, advantage, max_second_moment=1e-4)
    np.testing.assert_array_equal(weight > 0, [True, False, False, True, False, False])


def test_m2po_mask_divides_by_the_number_of_all_samples() -> None:
    # One sample moves away; its x^2 = 0.09 counts as 0.09 of one sample, 0.03 of three.
    x, advantage = jnp.array([0.3, -2.0, -2.0]), jnp.ones(3)
    assert objectives.gradient_weight("m2po_mask", x[:1], advantage[:1])[0] == 0
    np.testing.assert_allclose(
        objectives.gradient_weight("m2po_mask", x, advantage), jnp.exp(x), rtol=1e-6
    )


@pytest.mark.parametrize("name", ["m2po", "m2po_mask"])
def test_m2po_variants_keep_samples_that_move_back(name: str) -> None:
    x, advantage = jnp.array([[5.0, -5.0], [3.0, -3.0]]), jnp.array([[-1.0, 1.0], [-2.0, 2.0]])
    weight = objectives.gradient_weight(name, x, advantage)
    np.testing.assert_allclose(weight, jnp.exp(x), rtol=1e-5)


def test_m2po_variants_treat_tokens_as_samples() -> None:
    x = jnp.array([[0.0, 2.0], [0.1, 0.1]])
    for name in ("m2po", "m2po_mask"):
        kept = objectives.gradient_weight(name, x, 1.0) > 0
        np.testing.assert_array_equal(kept, [[True, False], [True, True]])


def test_p3o_ess_on_fresh_data_has_weight_one() -> None:
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
    assert raised == pytest.approx(0.04 + 0.01, rel=1e-5)  # held at max_dual_step
    _, free = objectives.r2vpo(far, advantage, first, max_dual_step=1.0)
    assert free == pytest.approx(0.04 + 0.01 * ((math.e - 1) ** 2 - 0.04), rel=1e-5)
    _, fast = objectives.r2vpo(near, advantage, jnp.float32(1.0), dual_rate=10.0)
    assert fast == pytest.approx(1.0 - 0.01, rel=1e-5)
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
def test_value_and_gradient_are_finite_in_float32(
    name: str, x: list[float], advantage: list[float]
) -> None:
    value, gradient = compiled(name)(jnp.array(x), jnp.array(advantage))
    assert value.dtype == gradient.dtype == jnp.float32
    assert jnp.all(jnp.isfinite(value)) and jnp.all(jnp.isfinite(gradient))


@pytest.mark.parametrize("name", NAMES)
def test_finite_where_float32_exponentials_are_not(name: str) -> None:
    advantage = jnp.array([1.0, -1.0] * 4)
    for near, far in ((100, 1e4), (88, 1e30)):
        x = jnp.repeat(jnp.array([-far, -near, near, far]), 2)
        value, gradient = compiled(name)(x, advantage)
        assert jnp.all(jnp.isfinite(value)) and jnp.all(jnp.isfinite(gradient))


@pytest.mark.parametrize(
    "name", [n for n in NAMES if "log_ratio_start" in objectives.spec(n).inputs]
)
def test_value_and_gradient_are_finite_wherever_the_phase_starts(name: str) -> None:
    levels = jnp.array([-1e30, -1e4, -100.0, -1.0, 0.0, 1.0, 100.0, 1e4, 1e30])
    x, start = (axis.ravel() for axis in jnp.meshgrid(levels, levels))
    function = objectives.spec(name).function
    for advantage in (jnp.ones_like(x), -jnp.ones_like(x)):
        value, pull_back = jax.vjp(lambda x, a=advantage: function(x, a, start), x)
        assert jnp.all(jnp.isfinite(value))
        assert jnp.all(jnp.isfinite(pull_back(jnp.ones_like(value))[0]))


@pytest.mark.parametrize("name", sorted(set(NAMES) - NOT_LINEAR_IN_ADVANTAGE))
@settings(max_examples=20, deadline=None)
@given(x=log_ratios)
def test_zero_advantage_gives_zero_gradient(name: str, x: list[float]) -> None:
    _, gradient = compiled(name)(jnp.array(x), jnp.zeros(SIZE))
    np.testing.assert_array_equal(gradient, np.zeros(SIZE))


def test_gradient_at_zero_advantage_where_it_is_not_zero() -> None:
    x, zero = jnp.linspace(-1, 1, SIZE), jnp.zeros(SIZE)
    np.testing.assert_array_equal(compiled("awr")(x, zero)[1], jnp.ones(SIZE))
    r = np.exp(np.linspace(-1, 1, SIZE))
    np.testing.assert_allclose(
        compiled("biris")(x, zero)[1], -0.1 * np.sign(np.linspace(-1, 1, SIZE)) * r, rtol=1e-5
    )
    ess = r.sum() ** 2 / (SIZE * (r**2).sum())
    np.testing.assert_allclose(compiled("p3o_ess")(x, zero)[1], np.full(SIZE, 1 - ess), rtol=1e-5)
    penalty = -2 * 0.04 * r * (r - 1)
    np.testing.assert_allclose(compiled("r2vpo")(x, zero)[1], penalty, rtol=1e-5)


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


@pytest.mark.parametrize("name", NAMES)
def test_arrays_of_other_shapes_are_refused(name: str) -> None:
    """They would broadcast to a surrogate of the right shape and the wrong values."""
    spec = objectives.spec(name)
    x, wrong = jnp.zeros((3, 3)), jnp.ones(3)
    inputs = {key: jnp.zeros((3, 3)) - 1 for key in spec.inputs}
    state = {} if spec.initial_state is None else {"state": jnp.zeros(())}
    spec.function(x, jnp.ones((3, 3)), **inputs, **state)
    with pytest.raises(AssertionError, match=r"\(3,\)"):
        spec.function(x, wrong, **inputs, **state)
    for key in inputs:
        with pytest.raises(AssertionError, match=r"\(3,\)"):
            spec.function(x, jnp.ones((3, 3)), **inputs | {key: wrong})


def test_numbers_are_accepted_in_place_of_arrays() -> None:
    assert jax.grad(objectives.gipo)(0.0, 2.0) == 2
    assert objectives.ppo_clip(jnp.zeros(3), 1.0).shape == (3,)


# ------------------------------------------------------------------ helpers


def test_clamp_straight_through_bounds_the_value_and_not_the_gradient() -> None:
    x = jnp.array([-1e30, -2.0, 1.0, 3.0, 1e30])
    value, pull_back = jax.vjp(lambda x: objectives.clamp_straight_through(x, 2.0), x)
    np.testing.assert_array_equal(value, jnp.minimum(x, 2.0))
    np.testing.assert_array_equal(pull_back(jnp.ones(5))[0], jnp.ones(5))


def test_ratio_is_the_exponential_up_to_its_bound() -> None:
    x = jnp.array([-1e4, -1.0, 0.0, 3.0, 3.5, 1e4])
    value, pull_back = jax.vjp(lambda x: objectives.ratio(x, 3.0), x)
    np.testing.assert_allclose(value, np.exp(np.minimum(x, 3)), rtol=1e-6)
    np.testing.assert_array_equal(pull_back(jnp.ones(6))[0], value)
    assert jnp.all(jnp.isfinite(objectives.ratio(x) * 1000.0))


def test_weighted_score_has_its_weight_as_effective_weight() -> None:
    def halved(log_ratio: jax.Array, advantage: jax.Array) -> jax.Array:
        return objectives.weighted_score(jnp.exp(log_ratio / 2), log_ratio, advantage)

    x, advantage = grid()
    weight = objectives.gradient_weight(halved, x, advantage)
    np.testing.assert_allclose(weight, np.exp(x / 2), rtol=1e-5)


@pytest.mark.parametrize("center", [1.0, 3.0])
def test_clipped_surrogate_is_the_minimum_that_it_says(center: float) -> None:
    r, advantage = np.exp(np.linspace(-3, 3, 61)), 2.0
    for a in (advantage, -advantage):
        clipped = np.clip(r, center - 0.5, center + 0.5)
        surrogate = objectives.clipped_surrogate(jnp.array(r), jnp.full(61, a), center, 0.5)
        np.testing.assert_allclose(surrogate, np.minimum(r * a, clipped * a), rtol=1e-6)


def test_clipped_surrogate_keeps_the_whole_gradient_at_the_ends_of_its_interval() -> None:
    ends = jnp.array([0.5, 1.5])
    for a in (1.0, -1.0):
        pull = jax.grad(lambda r, a=a: objectives.clipped_surrogate(r, a, 1.0, 0.5).sum())(ends)
        np.testing.assert_array_equal(pull, [a, a])


def readme_fork() -> Callable[..., jax.Array]:
    """The objective that the README writes as an example."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = next(b for b in text.split("```python\n")[1:] if "def student_t" in b).split("```")[0]
    wanted = (ast.Import, ast.ImportFrom, ast.FunctionDef)
    kept: list[ast.stmt] = [n for n in ast.parse(block).body if isinstance(n, wanted)]
    names: dict[str, Any] = {}
    exec(compile(ast.Module(kept, []), "README.md", "exec"), names)
    return names["student_t"]


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_the_objective_in_the_readme_is_finite_and_bounded_on_stale_data(scale: float) -> None:
    fork = readme_fork()
    x = jnp.concatenate([jnp.linspace(-200, 200, 4001), jnp.array([-1e30, -1e4, 1e4, 1e30])])
    for advantage in (1.0, -1.0):
        value, pull_back = jax.vjp(lambda x, a=advantage: fork(x, jnp.full_like(x, a), scale), x)
        u = pull_back(jnp.ones_like(x))[0] / advantage
        assert jnp.all(jnp.isfinite(value)) and jnp.all(jnp.isfinite(u))
        assert jnp.all(u >= 0) and jnp.max(u) <= 1 + 9 / 16 * scale + 1e-5
        assert jnp.max(u) > 1
        r = np.exp(np.clip(np.asarray(x, float), -80, 30))
        expected = r / (1 + ((r - 1) / scale) ** 2 / 3) ** 2
        near = np.abs(x) < 10
        np.testing.assert_allclose(u[near], expected[near], rtol=1e-4)
