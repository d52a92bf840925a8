"""The GridWorld study against the published table and against plain simulation."""

import functools
from typing import Any

import numpy as np
import pytest

from gipo_jax import objectives
from gipo_jax.analysis import gridworld
from gipo_jax.config import ConfigError

# GIPO paper's study: bias and variance for the behaviours A, B and C, to six digits.
TABLE: dict[Any, list[tuple[float, float]]] = {
    "no_clip": [(0, 0.016488), (0, 0.015799), (0, 0.015912)],
    0.1: [(0.086289, 0.0), (0.083952, 0.000133), (0.080139, 0.000824)],
    0.3: [(0.068444, 0.003006), (0.044778, 0.007759), (0.033783, 0.009567)],
    0.5: [(0.039673, 0.008504), (0.020888, 0.011763), (0.014599, 0.012925)],
    1.0: [(0.012652, 0.013823), (0.005884, 0.014594), (0.003960, 0.015059)],
    2.0: [(0.003376, 0.015764), (0.001517, 0.015483), (0.001011, 0.015691)],
    "ppo_clip": [(0.086306, 0), (0.086306, 0), (0.063095, 0.012340)],
    "sapo": [(0.012961, 0.014261), (0.007235, 0.014606), (0.005269, 0.014968)],
}


def objective_of(name: Any) -> Any:
    if name == "sapo":
        return functools.partial(objectives.sapo, tau_pos=1.0, tau_neg=2.0)
    if isinstance(name, float):
        return functools.partial(objectives.gipo, sigma=name)
    return name


@pytest.mark.parametrize("name", TABLE, ids=str)
@pytest.mark.parametrize("case", "ABC")
def test_bias_and_variance_match_the_published_table(name: Any, case: str) -> None:
    expected = TABLE[name]["ABC".index(case)]
    measured = gridworld.bias_variance(
        gridworld.TARGET, gridworld.BEHAVIORS[case], objective_of(name)
    )
    # Half a unit in the last of six printed digits.
    np.testing.assert_allclose(measured, expected, rtol=0, atol=5.001e-7)


@pytest.mark.parametrize("case", "ABC")
def test_no_clip_is_unbiased_to_float64_rounding(case: str) -> None:
    for state, action in ((0, 3), (1, 1), (2, 0)):
        bias, _ = gridworld.bias_variance(
            gridworld.TARGET, gridworld.BEHAVIORS[case], "no_clip", state, action
        )
        assert bias < 1e-15
    study = gridworld.vector_bias_variance(
        gridworld.TARGET, gridworld.BEHAVIORS[case], objectives.no_clip
    )
    assert study.bias < 1e-15


def test_float64_inside_the_study_leaves_float32_outside() -> None:
    gridworld.bias_variance(gridworld.TARGET, gridworld.BEHAVIORS["A"], "gipo")
    assert objectives.gradient_weight("gipo", 0.1, 1.0).dtype == np.float32


def test_values_of_the_target_policy_match_the_paper() -> None:
    value, advantage = gridworld.values(gridworld.TARGET)
    assert value[0] == pytest.approx(-3.581813, abs=5e-7)
    np.testing.assert_allclose(
        advantage[0], [-0.641819, 0.236112, -0.641819, 0.236112], rtol=0, atol=5e-7
    )
    np.testing.assert_allclose((gridworld.TARGET * advantage).sum(axis=1), 0, atol=1e-12)


def test_ppo_has_only_zero_gradients_in_cases_a_and_b() -> None:
    zero = {
        case: bool(np.all(gridworld.sample_gradients(gridworld.TARGET, mu, "ppo_clip") == 0))
        for case, mu in gridworld.BEHAVIORS.items()
    }
    assert zero == {"A": True, "B": True, "C": False}


def test_any_policies_and_any_objective_are_accepted() -> None:
    target, behavior = np.random.default_rng(0).dirichlet(np.ones(4), size=(2, 3))
    bias, variance = gridworld.bias_variance(target, behavior, lambda x, a: 0.0 * x * a, 2, 1, 0.5)
    mean = behavior[2] @ gridworld.sample_gradients(target, behavior, "no_clip", 2, 1, 0.5)
    np.testing.assert_allclose((bias, variance), (abs(mean), 0))
    # An action outside both supports leaves everything finite.
    corner = np.tile([0.0, 0.5, 0.0, 0.5], (3, 1))
    assert np.all(np.isfinite(gridworld.bias_variance(corner, gridworld.BEHAVIORS["A"], "gipo")))
    assert np.all(np.isfinite(gridworld.bias_variance(gridworld.TARGET, corner, "gipo")))


def simulate(policy: Any, episodes: int, seed: int) -> Any:
    """States and actions of whole episodes from S0, walked one step at a time."""
    generator = np.random.default_rng(seed)
    steps = []
    for _ in range(episodes):
        state = 0
        while state != gridworld.GOAL:
            action = generator.choice(4, p=policy[state])
            steps.append((state, action))
            state = gridworld.NEXT_STATE[state, action]
    return np.array(steps)


def test_state_distribution_matches_simulated_walks() -> None:
    policy = gridworld.BEHAVIORS["B"]
    states = simulate(policy, 2000, 0)[:, 0]
    shares = np.bincount(states, minlength=3) / len(states)
    np.testing.assert_allclose(gridworld.state_distribution(policy), shares, atol=0.02)


def test_vector_study_matches_simulated_walks() -> None:
    target, behavior = gridworld.TARGET, gridworld.BEHAVIORS["B"]
    states, actions = simulate(behavior, 3000, 1).T
    _, advantage = gridworld.values(target)

    def gradients(objective: str) -> Any:
        x = np.log(target / behavior)[states, actions]
        sampled_advantage = advantage[states, actions]
        u = np.asarray(objectives.gradient_weight(objective, x, sampled_advantage))
        score = np.zeros((len(states), 3, 4))
        score[np.arange(len(states)), states] = np.eye(4)[actions] - target[states]
        return ((u * sampled_advantage)[:, None, None] * score).reshape(-1, 12)

    sampled, reference = gradients("gipo"), gradients("no_clip")
    study = gridworld.vector_bias_variance(target, behavior, "gipo")
    bias = np.linalg.norm(sampled.mean(0) - reference.mean(0))
    assert study.bias == pytest.approx(bias, rel=0.1)
    assert study.variance == pytest.approx(sampled.var(axis=0).sum(), rel=0.05)
    assert not study.zero_gradient


def test_on_policy_data_gives_no_bias() -> None:
    study = gridworld.vector_bias_variance(gridworld.TARGET, gridworld.TARGET, "gipo")
    assert study.bias < 1e-15
    assert study.bias_on_policy < 1e-15


def test_pareto_keeps_points_that_no_other_beats() -> None:
    assert gridworld.pareto([0, 1, 2, 1], [2, 1, 0, 3]).tolist() == [True, True, True, False]
    assert gridworld.pareto([1, 1], [1, 1]).tolist() == [True, True]


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("target", {"target": np.ones((3, 4))}),
        ("behavior", {"behavior": np.full((2, 4), 0.25)}),
        ("state", {"state": 3}),
        ("action", {"action": -1}),
        ("gamma", {"gamma": 1.0}),
    ],
)
def test_bad_input_is_refused_by_name(field: str, arguments: dict[str, Any]) -> None:
    usual: Any = {"target": gridworld.TARGET, "behavior": gridworld.TARGET, "objective": "gipo"}
    with pytest.raises(ConfigError, match=field):
        gridworld.bias_variance(**{**usual, **arguments})


def test_a_policy_that_never_reaches_the_goal_is_refused() -> None:
    with pytest.raises(ConfigError, match="reaches the goal"):
        gridworld.state_distribution(np.tile([1.0, 0, 0, 0], (3, 1)))
