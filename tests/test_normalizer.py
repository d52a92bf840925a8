"""Normalised observations: exact moments, small steps, and no blown-up constant dimension."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments import spaces

from gipo_jax import normalizer, train
from gipo_jax.config import Config


def after(blocks: list[np.ndarray]) -> normalizer.Normalizer:
    moments = normalizer.init(blocks[0].shape[-1:])
    for block in blocks:
        moments = normalizer.update(moments, jnp.asarray(block))
    return moments


class MomentsTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_moments_equal_those_of_all_observations_at_once(self) -> None:
        obs = np.random.default_rng(0).normal([0, 5, -300], [1, 0.01, 40], (12, 4, 8, 3))
        moments = normalizer.init((3,))
        for block in obs:
            moments = self.variant(normalizer.update)(moments, jnp.asarray(block))
        flat = obs.reshape(-1, 3)
        assert moments.total == len(flat) and moments.updates == 12
        np.testing.assert_allclose(moments.mean, flat.mean(0), rtol=1e-4)
        np.testing.assert_allclose(moments.squares / moments.total, flat.var(0), rtol=1e-3)


def test_observations_of_another_shape_are_refused() -> None:
    with pytest.raises(AssertionError, match="shape"):
        normalizer.update(normalizer.init((3,)), jnp.zeros((4, 8, 2)))


def test_before_any_update_observations_are_only_bounded() -> None:
    obs = jnp.array([[0.5, -3.0, 200.0]])
    expected = np.array([[0.5, -3.0, 10.0]])
    np.testing.assert_array_equal(normalizer.normalize(normalizer.init((3,)), obs), expected)


def test_after_many_updates_observations_are_standardised() -> None:
    random = np.random.default_rng(0)
    spread, mean = np.array([0.02, 1.0, 50.0]), np.array([0.1, 0.0, -20.0])
    blocks = [random.normal(mean, spread, (32, 3)) for _ in range(2000)]
    standard = np.asarray(normalizer.normalize(after(blocks), jnp.asarray(np.concatenate(blocks))))
    # What is left of the means, -20 bounded to -10, with 10 of 2010 parts.
    np.testing.assert_allclose(standard.mean(0), np.maximum(mean, -10) * 10 / 2010, atol=0.01)
    np.testing.assert_allclose(standard.std(0), 1, atol=0.03)


@pytest.mark.parametrize("blocks", [1, 5, 1000])
def test_a_small_change_of_a_constant_dimension_stays_small(blocks: int) -> None:
    constant = 3.0
    moments = after([np.full((32, 1), constant)] * blocks)
    before, changed = (
        normalizer.normalize(moments, jnp.array([constant + change])) for change in (0.0, 0.001)
    )
    assert 0 < float(changed[0] - before[0]) <= 0.11
    # The constant itself moves from its own value to 0.
    np.testing.assert_allclose(before, constant * 10 / (10 + blocks), rtol=1e-4)


@pytest.mark.parametrize("scale", [0.02, 1.0, 50.0])
@pytest.mark.parametrize("mean", [0.0, 3.0, -500.0])
def test_each_update_changes_normalised_observations_little(mean: float, scale: float) -> None:
    random = np.random.default_rng(1)
    obs = random.normal(mean, scale, (200, 32, 1)).astype(np.float32)
    moments = normalizer.init((1,))
    for count, block in enumerate(obs):
        before = normalizer.normalize(moments, block)
        moments = normalizer.update(moments, block)
        now = normalizer.normalize(moments, block)
        if count == 0 and abs(mean) > normalizer.BOUND:
            continue  # Every observation lies outside the bounds until the mean is known.
        # In units of a typical value, or of the standard deviation of 1 that it ends at.
        typical = max(float(jnp.median(jnp.abs(now))), 1.0)
        assert float(jnp.median(jnp.abs(now - before))) < 0.2 * typical


@pytest.fixture(scope="module")
def drift() -> np.ndarray:
    """95th percentile of abs(x) after each iteration of CartPole with a policy that stays fixed."""
    config = Config(
        env="CartPole-v1", normalize_obs=True, max_buffer_size=128, batch_size=32,
        total_steps=32 * 60, eval_episodes=0,
    )  # fmt: skip
    domain = train.make(config)
    hparams = train.make_hparams(config, buffer_size=128, learning_rate=1e-30)

    def iterate(state: Any, iteration: jax.Array) -> tuple[Any, jax.Array]:
        state, metrics = train.train_and_log(domain, state, hparams, iteration, iteration + 1)
        return state, metrics["log_ratio_abs_p95"]

    state = train.init(domain, hparams)
    # A first policy is close to uniform whatever it observes; this one is as decided as later ones.
    policy = jax.tree.map(lambda x: 100 * x if x.shape[-1:] == (2,) else x, state.learner.params)
    state = state._replace(learner=state.learner._replace(params=policy))
    last, p95 = jax.jit(lambda s: jax.lax.scan(iterate, s, jnp.arange(60)))(state)
    chex.assert_trees_all_close(last.learner.params, policy, rtol=1e-6, atol=1e-25)
    return np.asarray(p95)


def test_the_second_iteration_sees_nearly_the_observations_of_the_first(drift: np.ndarray) -> None:
    """Any log-ratio here comes from normalisation alone, for the policy does not change."""
    assert 0 < drift[0] < 0.03


def test_normalisation_never_looks_like_staleness_later_on(drift: np.ndarray) -> None:
    assert drift.max() < 0.15
    assert drift[-10:].max() < 0.03


def test_moments_of_bytes_are_of_the_numbers_from_0_to_1_that_networks_see(
    toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = spaces.Box(0, 255, (1,), jnp.uint8)
    monkeypatch.setattr(toy, "observation_space", lambda self, params: space)
    monkeypatch.setattr(toy, "_observe", lambda self, time: jnp.asarray(time, jnp.uint8)[None])
    config = Config(
        env=toy(limit=250, clock=True), normalize_obs=True, num_envs=4, rollout_length=125,
        batch_size=32, max_buffer_size=1000, total_steps=1000, eval_episodes=0, num_logs=1,
    )  # fmt: skip
    state, _ = jax.jit(train.make_train(config))(train.make_hparams(config, buffer_size=1000))
    # Every environment has shown 0 to 249 once.
    shown = np.arange(250) / 255
    moments = state.domain_state.normalizer
    assert moments.total == 1000 and state.domain_state.envs.obs.dtype == jnp.uint8
    np.testing.assert_allclose(moments.mean, [shown.mean()], rtol=1e-5)
    np.testing.assert_allclose(moments.squares / 1000, [shown.var()], rtol=1e-4)
