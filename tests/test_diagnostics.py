"""Utilization metrics against plain NumPy."""

from collections.abc import Callable
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from gipo_jax import diagnostics

BATCH, TOKENS = 200, 2


def batch(seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    # Further out the weight below is so small that it may or may not count as zero.
    log_ratio = np.clip(random.normal(size=(BATCH, TOKENS), scale=0.8), -2.5, 2.5)
    advantage = random.normal(size=(BATCH, TOKENS))
    trust_weight = np.exp(-(log_ratio**2) / 0.1)
    return {
        "log_ratio": log_ratio.astype(np.float32),
        "advantage": advantage.astype(np.float32),
        "weight": (trust_weight * np.exp(log_ratio)).astype(np.float32),
        "age": random.integers(0, 20, size=(BATCH, 1)).astype(np.int32),
    }


def ess(weight: np.ndarray) -> float:
    weight = weight.astype(float)
    return weight.sum() ** 2 / (weight.size * (weight**2).sum())


class UtilizationTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(0, 1, 2)
    def test_utilization_equals_numpy(self, seed: int) -> None:
        data = batch(seed)
        x, a, u = data["log_ratio"], data["advantage"], data["weight"]
        age = np.broadcast_to(data["age"], x.shape)
        new, old = age <= 2, age >= 10
        assert new.any() and old.any() and (~new & ~old).any()
        ratio = np.exp(x)
        dead = ((ratio > 1.2) & (a > 0)) | ((ratio < 0.8) & (a < 0))
        expected = {
            "ess": ess(u),
            "ess_new": ess(u[new]),
            "ess_old": ess(u[old]),
            "near_zero_fraction": np.mean(u < 1e-3),
            "near_zero_fraction_new": np.mean(u[new] < 1e-3),
            "near_zero_fraction_old": np.mean(u[old] < 1e-3),
            "clip_fraction": dead.mean(),
            "suppressed_fraction": np.mean(np.abs(u) / np.exp(x) < 1e-3),
            "masked_fraction": 0,
            "mean_weight": u.mean(),
            "old_share": u[old].sum() / u.sum(),
            "old_gradient_share": np.abs(u * a)[old].sum() / np.abs(u * a).sum(),
            "log_ratio_abs_p95": np.percentile(np.abs(x), 95),
            "log_ratio_p05": np.percentile(x, 5, method="nearest"),
            "log_ratio_p95": np.percentile(x, 95, method="nearest"),
            "policy_age": age.mean(),
            "policy_age_max": age.max(),
        }
        assert 0 < expected["near_zero_fraction"] < 1 and 0 < expected["clip_fraction"] < 1
        result = self.variant(diagnostics.utilization)(**data)
        assert result.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(result[name], value, rtol=1e-4, err_msg=name)
            assert result[name].shape == () and result[name].dtype == jnp.float32


def test_a_large_negative_weight_is_not_suppressed() -> None:
    metrics = diagnostics.ratios(jnp.zeros(2), jnp.ones(2), jnp.array([-27.0, 1e-5]))
    assert metrics["suppressed_fraction"] == 0.5


def test_samples_that_do_not_count_change_no_metric() -> None:
    data = batch(3)
    expected = diagnostics.utilization(**data)
    wider = {name: np.pad(x, ((0, 0), (0, 3)), constant_values=7) for name, x in data.items()}
    where = np.arange(TOKENS + 3) < np.full((BATCH, 1), TOKENS)
    result = diagnostics.utilization(**wider | {"age": data["age"], "where": where})
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, rtol=1e-6, err_msg=name)


def test_masked_samples_are_those_with_an_advantage_and_no_weight() -> None:
    weight, advantage = jnp.array([0.0, 0.0, 1.0, 2.0]), jnp.array([1.0, 0.0, -1.0, 1.0])
    result = diagnostics.ratios(jnp.zeros(4), advantage, weight)
    np.testing.assert_allclose(result["masked_fraction"], 1 / 3)


def test_metrics_of_an_empty_age_group_are_nan() -> None:
    data = batch(0) | {"age": np.zeros((BATCH, 1), np.int32)}
    result = diagnostics.utilization(**data)
    for name in ("ess_old", "near_zero_fraction_old"):
        assert np.isnan(result[name])
    assert result["old_share"] == 0
    np.testing.assert_allclose(result["ess_new"], result["ess"], rtol=1e-5)


def test_effective_sample_size_at_its_least_and_largest() -> None:
    size = diagnostics.effective_sample_size
    np.testing.assert_allclose(size(jnp.full(50, 3.0)), 1, rtol=1e-6)
    np.testing.assert_allclose(size(jnp.eye(50)[0]), 1 / 50, rtol=1e-6)
    assert size(jnp.zeros(50)) == 0
    assert np.isnan(size(jnp.ones(50), jnp.zeros(50, bool)))
    # Squares of these overflow, or vanish, in float32.
    np.testing.assert_allclose(size(jnp.array([1e30, 1e30])), 1, rtol=1e-6)
    np.testing.assert_allclose(size(jnp.array([1e-30, 1e-30])), 1, rtol=1e-6)


def test_explained_variance_equals_numpy() -> None:
    random = np.random.default_rng(0)
    target = random.normal(size=300).astype(np.float32)
    prediction = (target + 0.5 * random.normal(size=300) + 3).astype(np.float32)
    expected = 1 - np.var(target - prediction) / np.var(target)
    explained: Callable[..., Any] = diagnostics.explained_variance
    np.testing.assert_allclose(explained(target, prediction), expected, rtol=1e-4)
    np.testing.assert_allclose(explained(target, target), 1)
    np.testing.assert_allclose(explained(target, jnp.zeros(300)), 0, atol=1e-6)
    assert np.isnan(explained(jnp.ones(300), prediction))


def test_arrays_of_other_shapes_are_refused() -> None:
    data = batch(0)
    for name in data:
        with pytest.raises(AssertionError, match="shape"):
            diagnostics.utilization(**data | {name: data[name][:-1]})
    with pytest.raises(AssertionError, match="shape"):
        # A column of ages would broadcast over the tokens; a row would count wrong ages.
        diagnostics.utilization(**data | {"age": data["age"][:, 0]})
    with pytest.raises(AssertionError, match="shape"):
        diagnostics.explained_variance(jnp.ones((3, 1)), jnp.ones(3))
