"""Acting and evaluating on an environment small enough to say what must come out."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gipo_jax import environments, networks, rollout
from gipo_jax.config import Config

LENGTH, ENVS = 8, 3


def parts(env: Any) -> tuple[environments.Environment, networks.ActionHead]:
    config = Config(env=env)
    made = environments.make(config)
    return made, networks.make_head(config, made)


def policy(obs: jax.Array) -> jax.Array:
    """Prefers the second action, the more the later in the episode."""
    return jnp.stack([jnp.zeros_like(obs), 0.3 * obs], axis=-1)


def test_collect(toy: Any) -> None:
    env, head = parts(toy(limit=5, clock=True, pay=1.0))

    @jax.jit
    def run() -> Any:
        first = rollout.reset(env, jax.random.key(0), ENVS)
        middle, *early = rollout.collect(env, head, policy, first, jax.random.key(1), LENGTH)
        _, *late = rollout.collect(env, head, policy, middle, jax.random.key(2), LENGTH)
        return early, late

    (early, early_sum, early_count), (late, late_sum, late_count) = run()
    data = jax.tree.map(lambda a, b: np.concatenate([a, b]), early, late)
    steps = 2 * LENGTH

    # Environments go on where the last rollout left them, and episodes are five steps.
    assert data.obs.shape == (steps, ENVS, 1)
    clock = np.arange(steps) % 5
    assert np.array_equal(data.obs[..., 0], np.tile(clock[:, None], ENVS))
    assert np.array_equal(data.final_obs[..., 0], data.obs[..., 0] + 1)
    assert np.array_equal(data.truncated, np.tile((clock == 4)[:, None], ENVS))
    assert not data.terminated.any()

    # The reward is the action, and the stored log-probability is that of the action taken.
    assert np.array_equal(data.reward, data.action[..., 0].astype(np.float32))
    assert 0 < data.action.mean() < 1
    expected = head.log_prob(policy(jnp.asarray(data.obs)), jnp.asarray(data.action))
    np.testing.assert_allclose(data.behavior_log_prob, expected, atol=1e-6)

    # Returns are of whole episodes, also of those that began in the rollout before.
    assert (early_count, late_count) == (ENVS * 1, ENVS * 2)
    assert early_sum == data.reward[:5].sum()
    assert late_sum == data.reward[5:15].sum()

    # Environments and steps have noise of their own.
    actions = data.action[..., 0]
    assert len(np.unique(actions, axis=1).T) == ENVS
    assert not np.array_equal(actions[:LENGTH], actions[LENGTH:])


def test_evaluate_greedy_and_sampled(toy: Any) -> None:
    env, head = parts(toy(limit=5, pay=1.0))

    def constant(logit: float) -> Any:
        def evaluate(key: jax.Array) -> Any:
            outputs = jnp.tile(jnp.array([0.0, logit]), (80, 1, 1))
            return rollout.evaluate(env, head, lambda obs: outputs, key, 40)

        return [float(x) for x in jax.jit(evaluate)(jax.random.key(0))[:2]]

    probability = 1 / (1 + np.exp(-0.5))
    greedy, sampled = constant(0.5)
    assert greedy == 5
    assert abs(sampled - 5 * probability) < 4 * np.sqrt(5 * probability * (1 - probability) / 40)
    assert sampled < 5
    greedy, sampled = constant(-0.5)
    assert greedy == 0 and sampled > 0


def test_evaluation_stops_with_the_episode(toy: Any) -> None:
    """Episodes of different lengths, each counted once."""
    env, head = parts(toy(limit=6, pay=0.0))
    steps = iter(range(100))

    def one_step(key: jax.Array, state: Any, action: jax.Array) -> Any:
        taken = env.step(key, state, action)
        # The second action ends the episode.
        return taken._replace(terminated=taken.terminated | (action == 1))

    quits = dataclasses.replace(env, step=one_step)

    def outputs(obs: jax.Array) -> jax.Array:
        next(steps)
        return jnp.tile(jnp.array([0.1, 0.0]), (obs.shape[0], 1, 1))

    greedy, sampled, *_ = rollout.evaluate(quits, head, outputs, jax.random.key(0), 200)
    # Traced once, so that a loop and not an unrolled program runs the episodes.
    assert next(steps) <= 2
    assert greedy == 6
    # Geometric with continuation p = sigmoid(0.1), cut at 6.
    p = 1 / (1 + np.exp(-0.1))
    expected = sum(p**k for k in range(6))
    assert abs(sampled - expected) < 0.4


def test_an_evaluation_counts_what_an_episode_solved_and_not_the_one_after_it(toy: Any) -> None:
    env, head = parts(toy(limit=4, clock=True))

    def one_step(key: jax.Array, state: Any, action: jax.Array) -> Any:
        taken = env.step(key, state, action)
        # The first environment's second step solves; the second one's episode ends before that.
        quits = jnp.arange(4) == 1
        solved = (taken.final_obs[:, 0] == 2) & (jnp.arange(4) < 2)
        return taken._replace(terminated=taken.terminated | quits, success=solved)

    solves = dataclasses.replace(env, step=one_step, reports_success=True)
    outputs = jnp.zeros((4, 1, 2))
    made = rollout.evaluate(solves, head, lambda obs: outputs, jax.random.key(0), 2)
    assert made.solved_greedy == 0.5 and made.solved_sampled == 0
