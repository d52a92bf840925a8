"""Sampling of replay and steps of the optimizer, apart from any domain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gipo_jax import learner
from gipo_jax.config import Config, HParams
from gipo_jax.learner import Learner


@pytest.mark.parametrize("fraction", [0.0, 0.15, 0.27, 0.5, 0.6, 1.0])
def test_recent_fraction_takes_its_share_of_rows_from_the_newest_iteration(fraction: float) -> None:
    config = Config(num_envs=10, rollout_length=10, batch_size=100, max_buffer_size=100_000)
    hparams = HParams(buffer_size=100_000, recent_fraction=fraction)
    index = learner.sample_indices(config, hparams, 5000, jax.random.key(0), 20)
    # One row in a thousand of the others comes from the newest iteration too, by chance.
    rows = np.sum(np.asarray(index) < 100, axis=1)
    assert rows.min() == round(100 * fraction)


def test_moments_of_adam_stay_finite_whatever_the_gradient() -> None:
    params = {"policy": jnp.ones(2)}
    state = Learner(params, {"policy": learner.init_optimizer(params["policy"])}, ())
    hparams = HParams(max_grad_norm=1e30)
    for _ in range(3):
        huge = {"policy": jnp.array([1e38, -1e38])}
        state, _ = learner.gradient_step(
            Config(), state, huge, {"policy": jnp.float32(0.1)}, hparams
        )
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))


def test_joint_grad_norm_clips_policy_and_value_together() -> None:
    params = {"policy": jnp.zeros(2), "value": jnp.zeros(2)}
    first = Learner(params, {g: learner.init_optimizer(params[g]) for g in params}, ())
    grads = {"policy": jnp.array([3.0, 0.0]), "value": jnp.array([0.0, 4.0])}
    rates = {"policy": 0.1, "value": 0.1}
    for joint, expected in ((True, (0.6, 0.8)), (False, (1.0, 1.0))):
        config = Config(joint_grad_norm=joint)
        step, norms = learner.gradient_step(config, first, grads, rates, HParams(max_grad_norm=1.0))
        moments = [step.opt_state[g].mu.max() / 0.1 for g in ("policy", "value")]
        np.testing.assert_allclose(moments, expected, rtol=1e-6)
        assert norms["policy"] == 3
        assert norms["value"] == 4
