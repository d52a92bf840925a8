"""Statistics against hand values, SciPy and plain loops."""

from typing import Any

import numpy as np
import pytest
import scipy.stats

from gipo_jax.analysis import stats

RUNS = np.random.default_rng(5).normal(size=(10, 3))


def test_iqm_by_hand() -> None:
    # The middle half of 0..7 is 2, 3, 4, 5, wherever the values lie in the array.
    scores = np.array([[7, 0], [1, 6], [2, 5], [4, 3]])
    assert stats.iqm(scores) == 3.5
    np.testing.assert_allclose(stats.iqm(np.stack([scores, scores + 1]), axis=(1, 2)), [3.5, 4.5])
    np.testing.assert_allclose(stats.iqm(scores, axis=0), [3, 4])


def test_bootstrap_covers_and_repeats() -> None:
    # The mean's interval has a known width: 2 x 1.96 standard errors.
    scores = np.random.default_rng(0).normal(3, 1, size=(200, 1))
    interval = stats.bootstrap(scores, stats.mean)
    assert interval.estimate == pytest.approx(scores.mean())
    assert interval.high - interval.low == pytest.approx(
        2 * 1.96 * scores.std() / np.sqrt(200), rel=0.06
    )
    assert stats.bootstrap(scores, stats.mean) == interval
    assert stats.bootstrap(scores, stats.mean, seed=1) != interval


def test_bootstrap_keeps_the_strata() -> None:
    # Two tasks, each constant: resampling within a task cannot change anything.
    scores = np.tile([0.0, 100.0], (5, 1))
    assert stats.bootstrap(scores, stats.mean) == (50, 50, 50)


def test_bootstrap_against_scipy() -> None:
    ours = stats.bootstrap(RUNS[:, 0], stats.iqm, resamples=20_000)
    reference: Any = scipy.stats.bootstrap
    theirs = reference(
        (RUNS[:, 0],),
        lambda x, axis: scipy.stats.trim_mean(x, 0.25, axis=axis),
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    np.testing.assert_allclose(ours[1:], theirs, atol=0.02)


def test_improvement_probability_by_hand() -> None:
    # 1 > 0, 1 < 2, 3 > 0, 3 > 2: three games of four.
    assert stats.improvement_probability([1, 3], [0, 2]).estimate == 0.75
    assert stats.improvement_probability([1, 1], [1, 1, 1]) == (0.5, 0.5, 0.5)
    first, second = RUNS[:5], RUNS[5:]
    expected = np.mean(
        [scipy.stats.mannwhitneyu(first[:, t], second[:, t]).statistic / 25 for t in range(3)]
    )
    assert stats.improvement_probability(first, second).estimate == pytest.approx(expected)


def test_paired_difference_removes_what_seeds_share() -> None:
    seed_effect = np.arange(8.0)[:, None] * 100
    interval = stats.paired_difference(seed_effect + 2, seed_effect)
    np.testing.assert_array_equal(interval, (2, 2, 2))
    with pytest.raises(ValueError, match="shared"):
        stats.paired_difference(RUNS, RUNS[1:])


def test_failures_that_an_iqm_trims_show_in_its_mean_and_ceiling_share() -> None:
    both = np.ones((8, 1))
    fails = both.copy()
    fails[:2] = -3.0
    unknown = np.full(8, np.nan)
    at_ceiling = np.concatenate([fails[:, 0] == 1, unknown])
    found = stats.trimmed_difference(fails, both, at_ceiling)
    assert (found.difference, found.mean, found.both_at_ceiling) == (0, -1, 0.75)
    assert found[:3] == stats.paired_difference(fails, both, stats.iqm)
    assert found[3:6] == stats.paired_difference(fails, both, stats.mean)
    assert np.isnan(stats.trimmed_difference(fails, both, unknown).both_at_ceiling)


def test_performance_profile_by_hand() -> None:
    share, low, high = stats.performance_profile([[0.0, 1.0], [2.0, 3.0]], [-1, 0, 1.5, 3])
    np.testing.assert_allclose(share, [1, 0.75, 0.5, 0])
    assert np.all(low <= share) and np.all(share <= high)
    assert low[0] == high[0] == 1


def test_normalize_by_hand() -> None:
    scores = np.array([[[0.0, 5], [2, 5]], [[4, 5], [6, 5]], [[2, 5], [4, 5]]])
    # Task 0's means are 1, 5 and 3; all of task 1's are 5.
    normal = stats.normalize(scores)
    np.testing.assert_allclose(normal[:, :, 0], [[-0.25, 0.25], [0.75, 1.25], [0.25, 0.75]])
    np.testing.assert_allclose(normal[:, :, 1], 0.5)


def test_wins_by_hand() -> None:
    scores = np.array([[[1.0], [2.0]], [[1.0], [0.0]]])
    np.testing.assert_allclose(stats.wins(scores), [[0, 1.5], [0.5, 0]])


def test_elo_by_hand() -> None:
    gap = 400 * np.log10(3)
    np.testing.assert_allclose(stats.elo([[0, 3], [1, 0]]), [1000 + gap / 2, 1000 - gap / 2])
    # 6 of 8 with two drawn games added is 6 + 1 of 10.
    gap = 400 * np.log10(7 / 3)
    ratings = stats.elo([[0, 6], [2, 0]], prior_draws=2)
    np.testing.assert_allclose(ratings, [1000 + gap / 2, 1000 - gap / 2])


def test_elo_recovers_the_model() -> None:
    truth = np.array([1150.0, 1000, 850])
    chance = 1 / (1 + 10 ** ((truth[None] - truth[:, None]) / 400))
    np.fill_diagonal(chance, 0)
    np.testing.assert_allclose(stats.elo(50 * chance), truth, atol=1e-3)


def test_elo_without_a_maximum() -> None:
    with pytest.raises(ValueError, match="prior_draws"):
        stats.elo([[0, 4], [0, 0]])
    assert stats.elo([[0, 4], [0, 0]], prior_draws=1)[0] > 1100


def test_elo_interval_holds_the_estimate() -> None:
    scores = np.stack([RUNS + 0.5, RUNS, RUNS[::-1]])
    for interval in stats.elo_interval(scores, resamples=50):
        assert interval.low <= interval.estimate <= interval.high


@pytest.mark.parametrize("scores", [np.zeros((0, 2)), [np.nan, 1.0], np.zeros((2, 2, 2))])
def test_bad_scores(scores: Any) -> None:
    with pytest.raises(ValueError, match="score"):
        stats.bootstrap(scores)


def test_bootstrap_of_several_tasks_is_that_of_a_loop_over_seeds_of_each_task() -> None:
    rng = np.random.default_rng(1)
    repeated = []
    for _ in range(5000):
        drawn = [task[rng.integers(0, len(task), len(task))] for task in RUNS.T]
        repeated.append(scipy.stats.trim_mean(np.concatenate(drawn), 0.25))
    expected = np.percentile(repeated, [2.5, 97.5])
    np.testing.assert_allclose(stats.bootstrap(RUNS, resamples=20_000)[1:], expected, atol=0.02)
