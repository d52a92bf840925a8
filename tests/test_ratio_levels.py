"""Ratio levels against loops in float64 NumPy, their gradients, and padding."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gipo_jax import objectives, ratio_levels
from gipo_jax.config import ConfigError


def reference(x: Any, level: str) -> Any:
    """The table of the module, token by token, for one answer without padding."""
    x = np.asarray(x, np.float64)
    tokens = range(len(x))
    if level == "token":
        return x
    if level == "joint":
        return np.array([x.sum() for _ in tokens])
    if level == "sequence":
        return np.array([x.mean() for _ in tokens])
    if level == "prefix_product":
        return np.array([x[: t + 1].sum() for t in tokens])
    if level == "prefix_geometric":
        return np.array([x[: t + 1].mean() for t in tokens])
    assert level == "prefix_min"
    return np.array([x[t] + (x[:t].min() if t else 0) for t in tokens])


@pytest.fixture
def log_ratio() -> Any:
    return np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)


@pytest.mark.parametrize("level", ratio_levels.LEVELS)
def test_each_level_equals_its_formula(level: str, log_ratio: Any) -> None:
    expected = [reference(row, level) for row in log_ratio]
    result = ratio_levels.transform(jnp.array(log_ratio), level)
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("level", ratio_levels.LEVELS)
@pytest.mark.parametrize("garbage", [3.0, -np.inf, np.nan])
def test_padding_of_any_place_and_value_changes_nothing(
    level: str, garbage: float, log_ratio: Any
) -> None:
    mask = np.array([[1, 1, 1, 0, 0, 0, 0], [0, 1, 0, 1, 1, 0, 1], [1] * 7, [0] * 7], bool)
    padded = jnp.array(np.where(mask, log_ratio, garbage))
    result = np.asarray(ratio_levels.transform(padded, level, jnp.array(mask)))
    for row, kept, values in zip(log_ratio, mask, result, strict=True):
        expected = reference(row[kept], level)
        np.testing.assert_allclose(values[kept], expected, rtol=1e-6, atol=1e-6)
        assert not values[~kept].any()


@pytest.mark.parametrize("level", ratio_levels.LEVELS)
def test_each_token_has_gradient_one_to_itself_alone(level: str, log_ratio: Any) -> None:
    mask = jnp.array([True, True, False, True, True, False, False])
    row = jnp.where(mask, jnp.array(log_ratio[0]), jnp.nan)
    jacobian = jax.jacobian(lambda x: ratio_levels.transform(x, level, mask))(row)
    np.testing.assert_array_equal(jacobian, np.diag(np.asarray(mask, np.float32)))


@pytest.mark.parametrize("level", ratio_levels.LEVELS)
def test_an_answer_of_one_token_has_the_same_ratio_at_every_level(
    level: str, log_ratio: Any
) -> None:
    one = jnp.array(log_ratio[:, :1])
    np.testing.assert_array_equal(ratio_levels.transform(one, level), one)


@pytest.mark.parametrize("level", ratio_levels.LEVELS)
def test_a_log_ratio_of_zero_stays_zero(level: str) -> None:
    assert not ratio_levels.transform(jnp.zeros((2, 5)), level).any()


@pytest.mark.parametrize("level", ratio_levels.LEVELS)
def test_log_ratios_of_hundreds_stay_finite(level: str) -> None:
    x = jnp.array([[300.0, -700.0, 20.0, 500.0]])
    values, pullback = jax.vjp(lambda x: ratio_levels.transform(x, level), x)
    assert np.all(np.isfinite(values))
    np.testing.assert_array_equal(pullback(jnp.ones_like(x))[0], np.ones_like(x))


def test_an_unknown_level_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="ratio_level: 'word' is not valid; expected one of tok"):
        ratio_levels.transform(jnp.zeros((1, 2)), "word")


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mask: \(1, 3\) is not valid; expected .* \(1, 2\)"):
        ratio_levels.transform(jnp.zeros((1, 2)), "token", jnp.ones((1, 3)))


def test_the_table_of_the_module_names_every_level() -> None:
    assert ratio_levels.__doc__ is not None
    rows = [line.split("`")[2] for line in ratio_levels.__doc__.splitlines() if "| ``" in line]
    assert rows == list(ratio_levels.LEVELS)


def test_without_a_level_an_objective_takes_its_own() -> None:
    assert ratio_levels.choose(None, objectives.spec("gipo")) == "token"
    assert ratio_levels.choose(None, objectives.spec("gspo")) == "sequence"
    assert ratio_levels.choose("token", objectives.spec("gspo")) == "token"


def test_a_minimum_over_a_prefix_is_refused_where_probabilities_are_read() -> None:
    assert ratio_levels.choose("prefix_product", objectives.spec("dppo_tv")) == "prefix_product"
    with pytest.raises(ConfigError, match="prefix_geometric, because dppo_tv reads probabilities"):
        ratio_levels.choose("prefix_min", objectives.spec("dppo_tv"))
