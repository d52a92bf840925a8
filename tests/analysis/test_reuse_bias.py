"""Reuse bias: exact returns against enumeration, the estimate, the metric and the experiment."""

import functools
import itertools
from pathlib import Path
from typing import Any

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest

from experiments import figures
from experiments.exact import reuse_bias as experiment
from experiments.store import Store
from gipo_jax import objectives, ratio_levels
from gipo_jax.analysis import plots, reuse_bias

TREE = experiment.token_tree()


def policies(task: reuse_bias.Task, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of a target and of a behaviour policy that differ in every state."""
    logits = np.random.default_rng(seed).normal(size=(2, *task.reward.shape))
    target, behavior = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return target, behavior


def every_episode(task: reuse_bias.Task) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First-state probability ``[n]``, states and actions ``[n, length]`` of all episodes."""
    start, next_state = np.asarray(task.start, float), np.asarray(task.next_state)
    firsts = np.flatnonzero(start)
    actions = np.array(list(itertools.product(range(next_state.shape[1]), repeat=task.length)))
    state = np.repeat(firsts, len(actions))
    actions = np.tile(actions, (len(firsts), 1))
    states = []
    for action in actions.T:
        states.append(state)
        state = next_state[state, action]
    return start[states[0]], np.array(states).T, actions


@pytest.mark.parametrize("name", experiment.TASKS)
def test_the_estimate_is_the_true_return_in_expectation_over_all_episodes(name: str) -> None:
    task = experiment.TASKS[name]()
    target, behavior = policies(task)
    first, state, action = every_episode(task)
    episode_return = np.asarray(task.reward, float)[state, action].sum(axis=1)
    probability = {
        label: first * np.exp(table[state, action].sum(axis=1))
        for label, table in (("target", target), ("behavior", behavior))
    }
    assert probability["behavior"].sum() == pytest.approx(1, abs=1e-6)
    enumerated = probability["target"] @ episode_return
    with jax.enable_x64(True):
        columns = (state, action, behavior[state, action], episode_return)
        buffer = reuse_bias.Buffer(*(jnp.asarray(column) for column in columns))
        each = np.asarray(reuse_bias.weighted_returns(jnp.asarray(target), buffer))
        exact = float(reuse_bias.true_return(task, jnp.asarray(target)))
    assert exact == pytest.approx(enumerated, abs=1e-6)
    assert probability["behavior"] @ each == pytest.approx(exact, abs=1e-6)


def test_sampled_episodes_have_the_true_return_on_average() -> None:
    task = experiment.catch()
    target, _ = policies(task)
    buffer = reuse_bias.sample(task, jnp.asarray(target, jnp.float32), jax.random.key(0), 4000)
    measured = np.asarray(buffer.episode_return)
    exact = float(reuse_bias.true_return(task, jnp.asarray(target)))
    assert abs(measured.mean() - exact) < 3 * measured.std() / np.sqrt(len(measured))
    assert set(np.unique(measured)) == {0, 1}


def test_the_tables_of_catch_agree_with_the_environment() -> None:
    task = experiment.catch()
    env, params = gymnax.make("Catch-bsuite")
    step = jax.jit(env.step)
    generator = np.random.default_rng(0)
    seen = set()
    for seed in range(12):
        obs, state = env.reset(jax.random.key(seed), params)
        same = (np.asarray(task.obs) == np.ravel(obs)).all(axis=1)
        index = int(np.argmax(same))
        assert same.sum() == 1
        assert task.start[index] > 0
        for time in range(task.length):
            np.testing.assert_array_equal(task.obs[index], np.ravel(obs))
            action = int(generator.integers(3))
            obs, state, reward, terminated, _, _ = step(jax.random.key(time), state, action, params)
            assert bool(terminated) == (time == task.length - 1)
            expected = (float(reward) + 1) / 2 if terminated else 0
            assert float(task.reward[index, action]) == expected
            index = int(task.next_state[index, action])
        seen.add(expected)
    assert seen == {0, 1}


def test_the_tree_rewards_answers_with_at_most_two_wrong_tokens() -> None:
    _, state, action = every_episode(TREE)
    returns = np.asarray(TREE.reward)[state, action].sum(axis=1)
    wrong = (action != np.array(experiment.ANSWER)).sum(axis=1)
    np.testing.assert_array_equal(returns, wrong <= 2)


def measured_bias(log_probs: Any, behavior: Any, keys: Any, episodes: int) -> np.ndarray:
    """Reuse bias of one policy on many buffers."""

    def one(key: Any) -> Any:
        buffer = reuse_bias.sample(TREE, behavior, key, episodes)
        estimate = reuse_bias.estimated_return(log_probs, buffer)
        return reuse_bias.reuse_bias(estimate, reuse_bias.true_return(TREE, log_probs))

    return np.asarray(jax.jit(jax.vmap(one))(keys))


def test_a_policy_chosen_without_the_buffer_has_no_reuse_bias() -> None:
    target, behavior = (jnp.asarray(0.5 * x, jnp.float32) for x in policies(TREE))
    target, behavior = jax.nn.log_softmax(target), jax.nn.log_softmax(behavior)
    bias = measured_bias(target, behavior, jax.random.split(jax.random.key(1), 2000), 40)
    assert abs(bias.mean()) < 3 * bias.std() / np.sqrt(len(bias))
    # The estimate of a single buffer is far off, so that a mean of 0 says something.
    assert bias.std() > 0.2


def test_a_policy_optimised_on_the_buffer_has_a_positive_reuse_bias() -> None:
    settings = [experiment.Setting(experiment.NO_CLIP, 3e-3)]
    estimate, true = experiment.optimize_all(TREE, "joint", 40, range(60), settings)
    bias = np.asarray(reuse_bias.reuse_bias(estimate, true))
    assert bias.mean() > 5 * bias.std() / np.sqrt(len(bias))
    assert true.mean() > 37 / 256 + 0.05, "the policy learnt nothing"


def tabular(params: Any, obs: Any) -> Any:
    """A policy whose parameters are its logits."""
    return params


def optimized(objective: Any, level: str, updates: int = 20) -> np.ndarray:
    """Logits after full-batch updates on one buffer of the tree."""
    behavior = jnp.asarray(policies(TREE)[1], jnp.float32)
    buffer = reuse_bias.sample(TREE, behavior, jax.random.key(2), 40)
    advantage = buffer.episode_return
    new = reuse_bias.optimize(
        TREE, tabular, behavior, buffer, objective, advantage, 0.1, level, updates
    )
    return np.asarray(new)


@pytest.mark.parametrize("level", experiment.LEVELS)
def test_biris_with_alpha_zero_takes_exactly_the_steps_of_no_clip(level: str) -> None:
    plain = optimized(objectives.no_clip, level)
    np.testing.assert_array_equal(optimized(lambda x, a: objectives.biris(x, a, 0), level), plain)
    assert np.any(optimized(lambda x, a: objectives.biris(x, a, 0.1), level) != plain)


def test_the_updates_are_those_of_adam_on_the_papers_loss() -> None:
    behavior = jnp.asarray(policies(TREE)[1], jnp.float32)
    buffer = reuse_bias.sample(TREE, behavior, jax.random.key(2), 40)

    def paper(logits: Any) -> Any:
        chosen = jax.nn.log_softmax(logits)[buffer.state, buffer.action]
        weight = jnp.exp(jnp.sum(chosen - buffer.behavior_log_prob, axis=1))
        # The derivative of abs at 0 is taken as 0.
        distance = jnp.where(weight == 1, 0, jnp.abs(weight - 1))
        return jnp.mean(-weight * buffer.episode_return + 0.1 * distance)

    adam, logits = optax.adam(0.1), behavior
    moments = adam.init(logits)
    for _ in range(20):
        step, moments = adam.update(jax.grad(paper)(logits), moments)
        logits = optax.apply_updates(logits, step)
    biris = functools.partial(objectives.biris, alpha=0.1)
    np.testing.assert_allclose(optimized(biris, "joint"), logits, atol=2e-3)
    assert np.abs(optimized(biris, "token") - logits).max() > 0.1


def test_one_update_of_adam_moves_each_visited_logit_by_the_learning_rate() -> None:
    behavior = policies(TREE)[1]
    moved = np.abs(optimized(objectives.no_clip, "joint", updates=1) - behavior.astype(np.float32))
    assert moved.max() == pytest.approx(0.1, rel=1e-3)
    assert np.any(moved == 0), "states outside the buffer keep their logits"


@pytest.mark.parametrize("alpha", [0.0, 0.1, 2.0])
def test_effective_weight_of_biris_is_the_derivative_of_its_surrogate(alpha: float) -> None:
    x, advantage = np.array([-3.0, -0.5, -0.01, 0.01, 0.7, 4.0]), np.array([1, -1, 0.3, 2, -2, 1.0])

    def surrogate(x: np.ndarray) -> np.ndarray:
        return np.exp(x) * advantage - alpha * np.abs(np.exp(x) - 1)

    numeric = (surrogate(x + 1e-6) - surrogate(x - 1e-6)) / 2e-6 / advantage
    with jax.enable_x64(True):
        weight = objectives.gradient_weight("biris", x, advantage, alpha=alpha)
    np.testing.assert_allclose(weight, numeric, rtol=1e-6)


def test_biris_at_the_joint_level_has_the_gradient_of_the_papers_loss() -> None:
    generator = np.random.default_rng(3)
    x, returns = generator.normal(0, 0.3, (5, 4)), generator.uniform(0, 1, 5)

    def paper(x: np.ndarray) -> float:
        weight = np.exp(x.sum(axis=1))
        return float(np.mean(weight * returns - 0.1 * np.abs(weight - 1)))

    numeric = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        change = np.zeros_like(x)
        change[index] = 1e-6
        numeric[index] = (paper(x + change) - paper(x - change)) / 2e-6

    def surrogate(x: Any) -> Any:
        advantage = jnp.broadcast_to(jnp.asarray(returns)[:, None], x.shape)
        each = objectives.biris(ratio_levels.transform(x, "joint"), advantage, 0.1)
        return jnp.mean(each) * x.shape[1]

    with jax.enable_x64(True):
        gradient = np.asarray(jax.grad(surrogate)(jnp.asarray(x)))
    np.testing.assert_allclose(gradient, numeric, rtol=1e-5, atol=1e-9)


def test_matching_rate_interpolates_to_the_target_return() -> None:
    rates = np.array(experiment.RATES)
    returns = 0.2 + 0.1 * np.log10(rates / rates[0])
    assert experiment.matching_rate(returns, 0.3) == pytest.approx(1e-2)
    assert experiment.matching_rate(returns, 0.1) == rates[0]
    # Out of reach: the rate that comes nearest.
    assert experiment.matching_rate(returns, 0.9) == rates[-1]


@pytest.mark.slow
def test_the_experiment_measures_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "SEEDS", {"quick": (4, 2)})
    monkeypatch.setattr(experiment, "TASKS", {"token tree": experiment.token_tree})
    monkeypatch.setattr(experiment, "LEVELS", {"joint": "joint ratio"})
    monkeypatch.setattr(experiment, "SIZES", (30,))
    store = Store(tmp_path, "reuse_bias", "test")
    experiment.measure(store, "quick")
    for name, scores in experiment.scores(store).items():
        store.numbers(name, scores)
    with plots.style():
        figures.draw(store)
    runs = pd.read_csv(tmp_path / "data" / "reuse_bias.csv")
    # Five objectives, four settings, four seeds.
    assert len(runs) == 5 * 4 * 4
    table = pd.read_csv(tmp_path / "tables" / "reuse_bias.csv")
    chosen = (table.rate == "shared") & (table["size"] == 30)
    row = table[chosen & (table.objective == "no_clip")].iloc[0]
    own = runs[(runs.rate == "shared") & (runs.objective == "no_clip")]
    assert row.bias == pytest.approx(np.mean(own.estimate / own.true_return - 1), rel=1e-4)
    assert row.bias_low <= row.bias <= row.bias_high
    assert row.bias_difference == 0 and row.return_difference == 0
    assert table[chosen].learning_rate.nunique() == 1
    assert (tmp_path / "figures" / "reuse_bias.png").stat().st_size > 10_000
