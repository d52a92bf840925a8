"""GAE and V-trace against a plain loop, at episode boundaries, and where they must agree."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from gipo_jax import advantages

TIME, ENVS = 24, 5
gae = jax.jit(advantages.gae)
vtrace = jax.jit(advantages.vtrace)


def rollout(seed: int) -> dict[str, Any]:
    """Random arrays with several episode ends of each kind, some of both kinds at once."""
    random = np.random.default_rng(seed)

    def normal() -> np.ndarray:
        return random.normal(size=(TIME, ENVS)).astype(np.float32)

    return {
        "reward": normal(),
        "terminated": random.random((TIME, ENVS)) < 0.12,
        "truncated": random.random((TIME, ENVS)) < 0.12,
        "value": normal(),
        "next_value": normal(),
    }


def loop_gae(data: dict[str, Any], gamma: float, lam: float) -> np.ndarray:
    """Sums the discounted errors forward from each step until the episode or the data ends."""
    advantage = np.zeros((TIME, ENVS))
    for env in range(ENVS):
        for start in range(TIME):
            weight, total = 1.0, 0.0
            for t in range(start, TIME):
                after = 0.0 if data["terminated"][t, env] else data["next_value"][t, env]
                error = data["reward"][t, env] + gamma * after - data["value"][t, env]
                total += weight * error
                if data["terminated"][t, env] or data["truncated"][t, env]:
                    break
                weight *= gamma * lam
            advantage[start, env] = total
    return advantage


def loop_vtrace(
    data: dict[str, Any], log_ratio: np.ndarray, gamma: float, rho_bar: float, c_bar: float
) -> tuple[np.ndarray, np.ndarray]:
    """Equation 1 of the paper, written forward from each step."""
    target = np.zeros((TIME, ENVS))
    advantage = np.zeros((TIME, ENVS))
    ratio = np.exp(log_ratio.astype(float))
    for env in range(ENVS):
        for start in range(TIME):
            weight, total = 1.0, float(data["value"][start, env])
            for t in range(start, TIME):
                after = 0.0 if data["terminated"][t, env] else data["next_value"][t, env]
                error = data["reward"][t, env] + gamma * after - data["value"][t, env]
                total += weight * min(rho_bar, ratio[t, env]) * error
                if data["terminated"][t, env] or data["truncated"][t, env]:
                    break
                weight *= gamma * min(c_bar, ratio[t, env])
            target[start, env] = total
        for t in range(TIME):
            if data["terminated"][t, env]:
                after = 0.0
            elif data["truncated"][t, env] or t == TIME - 1:
                after = data["next_value"][t, env]
            else:
                # V-trace's own correction of the next state, on top of its value.
                correction = target[t + 1, env] - data["value"][t + 1, env]
                after = data["next_value"][t, env] + correction
            advantage[t, env] = data["reward"][t, env] + gamma * after - data["value"][t, env]
    return advantage, target


class LoopTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters((0.99, 0.95), (0.9, 1.0), (0.7, 0.0), (1.0, 1.0))
    def test_gae_equals_the_loop(self, gamma: float, lam: float) -> None:
        for seed in range(4):
            data = rollout(seed)
            advantage, target = self.variant(advantages.gae)(**data, gamma=gamma, gae_lambda=lam)
            expected = loop_gae(data, gamma, lam)
            np.testing.assert_allclose(advantage, expected, atol=1e-4)
            np.testing.assert_allclose(target, expected + data["value"], atol=1e-4)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters((0.99, 1.0, 1.0), (0.9, 2.0, 0.5), (1.0, np.inf, np.inf))
    def test_vtrace_equals_the_loop(self, gamma: float, rho_bar: float, c_bar: float) -> None:
        for seed in range(4):
            data, random = rollout(seed), np.random.default_rng(seed)
            log_ratio = random.normal(size=(TIME, ENVS)).astype(np.float32) * 0.7
            result = self.variant(advantages.vtrace)(
                log_ratio, **data, gamma=gamma, rho_bar=rho_bar, c_bar=c_bar
            )
            expected = loop_vtrace(data, log_ratio, gamma, rho_bar, c_bar)
            chex.assert_trees_all_close(result, expected, rtol=1e-3, atol=1e-3)


def test_arrays_of_other_shapes_or_types_are_refused() -> None:
    data = rollout(0)
    for name in data:
        with pytest.raises(AssertionError, match="shape"):
            gae(**data | {name: data[name][:, :1]}, gamma=0.9, gae_lambda=0.9)
        with pytest.raises(AssertionError, match="shape"):
            vtrace(data["value"], **data | {name: data[name][:, :1]}, gamma=0.9)
    for name in ("terminated", "truncated"):
        with pytest.raises(AssertionError, match="type"):
            gae(**data | {name: data["reward"]}, gamma=0.9, gae_lambda=0.9)


def gae_and_vtrace(data: dict[str, Any]) -> list[np.ndarray]:
    log_ratio = 0.3 * data["value"]
    results = [
        *gae(**data, gamma=0.9, gae_lambda=0.8),
        *vtrace(log_ratio, **data, gamma=0.9),
    ]
    return [np.asarray(x) for x in results]


@pytest.mark.parametrize("seed", range(3))
def test_no_step_depends_on_what_follows_its_episode(seed: int) -> None:
    """Whatever follows the end of an episode leaves everything before it as it was, to the bit."""
    data = rollout(seed)
    before = gae_and_vtrace(data)
    random = np.random.default_rng(100 + seed)
    checked = 0
    for env in range(ENVS):
        for end in np.flatnonzero(data["terminated"][:, env] | data["truncated"][:, env]):
            later = (slice(end + 1, None), env)
            changed = {name: x.copy() for name, x in data.items()}
            for name in ("reward", "value", "next_value"):
                changed[name][later] += 1000 * random.normal(size=TIME - end - 1)
            for name in ("terminated", "truncated"):
                changed[name][later] ^= random.random(TIME - end - 1) < 0.5
            for old, new in zip(before, gae_and_vtrace(changed), strict=True):
                assert np.array_equal(old[: end + 1, env], new[: end + 1, env])
                if end < TIME - 1:
                    assert not np.array_equal(old[end + 1 :, env], new[end + 1 :, env])
                others = np.arange(ENVS) != env
                assert np.array_equal(old[:, others], new[:, others])
            checked += 1
    assert checked > 15


def test_the_value_after_the_end_counts_only_at_a_time_limit() -> None:
    data = rollout(0)
    for flags, counts in (
        ((True, False), False),
        ((False, True), True),
        # Termination wins where a step does both.
        ((True, True), False),
    ):
        ended = data | {name: data[name].copy() for name in ("terminated", "truncated")}
        ended["terminated"][9, 2], ended["truncated"][9, 2] = flags
        changed = ended | {"next_value": ended["next_value"].copy()}
        changed["next_value"][9, 2] += 5
        for old, new in zip(gae_and_vtrace(ended), gae_and_vtrace(changed), strict=True):
            assert (old[9, 2] != new[9, 2]) == counts


def test_the_last_row_bootstraps_from_its_next_value() -> None:
    data = rollout(0)
    data["terminated"][:] = data["truncated"][:] = False
    changed = data | {"next_value": data["next_value"].copy()}
    changed["next_value"][-1] += 5
    for old, new in zip(gae_and_vtrace(data), gae_and_vtrace(changed), strict=True):
        assert np.all(old[-1] != new[-1])


def test_gae_with_lambda_zero_or_no_discount_is_the_textbook_value() -> None:
    data = rollout(1)
    error, _ = gae(**data, gamma=0.0, gae_lambda=0.7)
    np.testing.assert_allclose(error, data["reward"] - data["value"], atol=1e-6)
    one_step, _ = gae(**data, gamma=0.9, gae_lambda=0.0)
    after = np.where(data["terminated"], 0, data["next_value"])
    np.testing.assert_allclose(one_step, data["reward"] + 0.9 * after - data["value"], atol=1e-5)
    # Without discount, an episode that terminates has its plain return as target.
    data["terminated"][:] = data["truncated"][:] = False
    data["terminated"][-1] = True
    data["next_value"][:-1] = data["value"][1:]
    _, returns = gae(**data, gamma=1.0, gae_lambda=1.0)
    expected = np.cumsum(data["reward"][::-1], axis=0)[::-1]
    np.testing.assert_allclose(returns, expected, atol=1e-4)


def test_vtrace_on_policy_is_gae_with_lambda_one() -> None:
    data = rollout(2)
    # Within an episode the value of final_obs is that of the next row.
    inside = ~(data["terminated"] | data["truncated"])[:-1]
    data["next_value"][:-1][inside] = data["value"][1:][inside]
    expected = gae(**data, gamma=0.95, gae_lambda=1.0)
    result = vtrace(np.zeros((TIME, ENVS), np.float32), **data, gamma=0.95)
    for ours, theirs in zip(result, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_vtrace_at_extreme_ratios_keeps_the_value_and_stays_finite() -> None:
    data = rollout(3)
    far = np.full((TIME, ENVS), -80, np.float32)
    advantage, target = vtrace(far, **data, gamma=0.9)
    np.testing.assert_allclose(target, data["value"], atol=1e-6)
    after = np.where(data["terminated"], 0, data["next_value"])
    np.testing.assert_allclose(advantage, data["reward"] + 0.9 * after - data["value"], atol=1e-5)
    for x in vtrace(-far, **data, gamma=0.9):
        assert np.all(np.isfinite(x))


def test_vtrace_has_no_gradient_in_the_ratio() -> None:
    data = rollout(0)

    def total(log_ratio: jax.Array) -> jax.Array:
        return sum((jnp.sum(x) for x in vtrace(log_ratio, **data, gamma=0.9)), jnp.zeros(()))

    assert np.all(jax.grad(total)(jnp.ones((TIME, ENVS))) == 0)
