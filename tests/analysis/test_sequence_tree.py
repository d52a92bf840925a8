"""The exact study of sequences against finite differences, simulation and identities."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import stop_gradient

from gipo_jax import objectives, ratio_levels
from gipo_jax.analysis import sequence_tree
from gipo_jax.analysis.gridworld import softmax
from gipo_jax.config import ConfigError

LEVELS = tuple(ratio_levels.LEVELS)
READS_PROBABILITIES = [
    name for name in objectives.ALL if "behavior_log_prob" in objectives.spec(name).inputs
]


def pairs() -> list[tuple[str, str]]:
    """Every objective with every level that it can have."""
    return [
        (name, level)
        for name in objectives.ALL
        for level in LEVELS
        if level != "prefix_min" or name not in READS_PROBABILITIES
        if level == "token" or not objectives.spec(name).takes_distributions
    ]


def tree(steps: int, seed: int = 0, drift: float = 0.5) -> tuple[Any, Any, Any]:
    """Target, behavior and rewards drawn at random."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(2**steps - 1, 2))
    behavior = softmax(logits + drift * generator.normal(size=logits.shape))
    return softmax(logits), behavior, generator.uniform(size=2**steps)


def probability(policy: Any, answer: tuple[int, ...]) -> float:
    """Probability of an answer, walked node by node."""
    node, product = 0, 1.0
    for token in answer:
        product *= policy[node, token]
        node = 2 * node + 1 + token
    return product


def test_answers_are_all_binary_numbers_in_order() -> None:
    assert sequence_tree.answers(2).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_the_true_gradient_equals_finite_differences() -> None:
    generator = np.random.default_rng(1)
    logits, reward = generator.normal(size=(7, 2)), generator.normal(size=8)

    def expected_reward(logits: Any) -> float:
        policy = softmax(logits)
        every = sequence_tree.answers(3)
        return sum(r * probability(policy, row) for r, row in zip(reward, every, strict=True))

    numeric, step = np.zeros(14), 1e-5
    for i in range(14):
        up, down = logits.copy(), logits.copy()
        up.flat[i] += step
        down.flat[i] -= step
        numeric[i] = (expected_reward(up) - expected_reward(down)) / (2 * step)
    exact = sequence_tree.true_gradient(softmax(logits), reward)
    np.testing.assert_allclose(exact, numeric, rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_the_ratio_of_the_whole_answer_is_unbiased_with_a_terminal_reward(steps: int) -> None:
    result = sequence_tree.study(*tree(steps), "no_clip", "joint")
    assert result.bias < 1e-12
    assert result.cosine == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_the_prefix_product_is_unbiased_with_the_advantage_of_the_target(steps: int) -> None:
    result = sequence_tree.study(*tree(steps), "no_clip", "prefix_product", "target")
    assert result.bias < 1e-12


@pytest.mark.parametrize(
    ("level", "advantage"),
    [
        ("prefix_product", "terminal"),
        ("prefix_product", "behavior"),
        *((level, "target") for level in LEVELS if level not in ("joint", "prefix_product")),
    ],
)
def test_every_other_ratio_is_biased(level: str, advantage: str) -> None:
    assert sequence_tree.study(*tree(4), "no_clip", level, advantage).relative_bias > 0.01


@pytest.mark.parametrize("name", objectives.ALL)
def test_at_log_ratio_zero_all_levels_have_the_same_gradient(name: str) -> None:
    target, _, reward = tree(4)
    results = [
        sequence_tree.study(target, target, reward, name, level)
        for level in (level for other, level in pairs() if other == name)
    ]
    for result in results[1:]:
        np.testing.assert_array_equal(result.mean, results[0].mean)
        assert result.variance == results[0].variance
    if name != "awr":  # weighs by the advantage alone, so its gradient is another even here
        np.testing.assert_allclose(results[0].mean, results[0].truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", objectives.ALL)
def test_with_one_step_all_levels_are_identical(name: str) -> None:
    results = [
        sequence_tree.study(*tree(1), name, level) for other, level in pairs() if other == name
    ]
    for result in results[1:]:
        np.testing.assert_array_equal(result.mean, results[0].mean)


@pytest.mark.parametrize(("name", "level"), pairs())
def test_every_objective_has_a_finite_study_at_every_level(name: str, level: str) -> None:
    result = sequence_tree.study(*tree(3, drift=2.0), name, level)
    assert np.all(np.isfinite([result.bias, result.variance]))
    assert result.bias == pytest.approx(np.linalg.norm(result.mean - result.truth))


def test_the_study_of_sapo_equals_the_mean_and_variance_over_drawn_answers() -> None:
    target, behavior, reward = tree(3)
    every = sequence_tree.answers(3)
    mu = np.array([probability(behavior, row) for row in every])
    assert mu.sum() == pytest.approx(1)
    drawn = np.random.default_rng(0).choice(8, size=200_000, p=mu)

    gradients = np.zeros((8, 7, 2))
    for row, answer in enumerate(every):
        node, product = 0, 1.0
        for token in answer:
            product *= target[node, token] / behavior[node, token]
            advantage = reward[row] - mu @ reward
            tau = 1.0 if advantage > 0 else 1.05
            gate = 1 / (1 + np.exp(-tau * (product - 1)))
            weight = 4 * product * gate * (1 - gate)
            gradients[row, node] += weight * advantage * (np.eye(2)[token] - target[node])
            node = 2 * node + 1 + token
    sampled = gradients.reshape(8, 14)[drawn]
    result = sequence_tree.study(target, behavior, reward, "sapo", "prefix_product")
    # Five standard errors.
    error = 5 * np.sqrt(result.variance / len(drawn))
    np.testing.assert_allclose(result.mean, sampled.mean(axis=0), rtol=0, atol=error)
    assert result.variance == pytest.approx(sampled.var(axis=0).sum(), rel=0.02)


def test_advantages_of_a_policy_are_zero_in_the_mean_at_every_node() -> None:
    target, _, reward = tree(3)
    advantage = sequence_tree.advantage_of(target, reward)
    assert advantage[0, 0] == advantage[3, 0] != advantage[4, 0]
    for t, half in ((0, 4), (1, 2), (2, 1)):
        for start in range(0, 8, 2 * half):
            node = 2**t - 1 + start // (2 * half)
            pair = advantage[[start, start + half], t]
            assert target[node] @ pair == pytest.approx(0, abs=1e-12)
    q = reward[6:8]
    assert advantage[7, 2] == pytest.approx(q[1] - target[6] @ q)


def test_features_give_the_gradient_of_their_own_parameters() -> None:
    target, behavior, reward = tree(3)
    features = np.random.default_rng(3).normal(size=(7, 2, 4))
    small = sequence_tree.study(target, behavior, reward, "gipo", features=features)
    full = sequence_tree.study(target, behavior, reward, "gipo")
    chain = features.reshape(14, 4).T
    np.testing.assert_allclose(small.mean, chain @ full.mean, rtol=0, atol=1e-12)
    np.testing.assert_allclose(small.truth, chain @ full.truth, rtol=0, atol=1e-12)


def test_a_function_of_the_user_and_its_parameters_are_studied() -> None:
    def tempered(log_ratio: Any, advantage: Any, power: float = 0.5) -> Any:
        return jnp.exp(stop_gradient((power - 1) * log_ratio) + log_ratio) * advantage

    plain = sequence_tree.study(*tree(3), "no_clip", "joint")
    whole = sequence_tree.study(*tree(3), functools.partial(tempered, power=1.0), "joint")
    half = sequence_tree.study(*tree(3), tempered, "joint")
    np.testing.assert_allclose(whole.mean, plain.mean, rtol=0, atol=1e-12)
    assert half.bias > 1e-3 and half.variance < plain.variance


def test_a_statistic_of_the_batch_is_that_under_the_behavior_policy() -> None:
    target, behavior, reward = tree(4)
    every = sequence_tree.answers(4)
    mu = np.array([probability(behavior, row) for row in every])
    ratio = np.array([probability(target, row) for row in every]) / mu

    def scaled(log_ratio: Any, advantage: Any) -> Any:
        return stop_gradient(jnp.mean(jnp.exp(log_ratio) ** 2) * advantage) * log_ratio

    def plain(log_ratio: Any, advantage: Any) -> Any:
        return advantage * log_ratio

    with_statistic = sequence_tree.study(target, behavior, reward, scaled, "joint").mean
    without = sequence_tree.study(target, behavior, reward, plain, "joint").mean
    np.testing.assert_allclose(with_statistic / without, mu @ ratio**2, rtol=1e-3)


def test_an_objective_that_clips_everything_is_marked() -> None:
    target, behavior = np.array([[0.9, 0.1]]), np.array([[0.5, 0.5]])
    result = sequence_tree.study(target, behavior, [0.0, 1.0], "gipo")
    assert not result.zero_gradient
    result = sequence_tree.study(target, behavior, [1.0, 0.0], "ppo_clip")
    assert result.zero_gradient and np.isnan(result.cosine)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("target", {"target": np.full((4, 2), 0.5)}),
        ("target", {"target": np.array([[0.0, 1.0]] * 3)}),
        ("behavior", {"behavior": np.full((7, 2), 0.5)}),
        ("reward", {"reward": np.zeros(3)}),
        ("advantage", {"advantage": "exact"}),
        ("ratio_level", {"ratio_level": "word"}),
        ("ratio_level", {"ratio_level": "prefix_min", "objective": "dppo_tv"}),
        ("features", {"features": np.zeros((3, 2))}),
        ("objective", {"objective": "gopi"}),
    ],
)
def test_bad_input_is_refused_by_name(field: str, change: dict[str, Any]) -> None:
    target, behavior, reward = tree(2)
    usual: dict[str, Any] = {"target": target, "behavior": behavior, "reward": reward}
    with pytest.raises(ConfigError, match=f"^{field}"):
        sequence_tree.study(**usual | change)
