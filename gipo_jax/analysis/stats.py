"""Statistics over seeds: the seed is the unit of replication, tasks are strata.

Scores are arrays ``[seeds, tasks]``, one per method; where several methods are compared at once,
``[methods, seeds, tasks]``. The measures follow rliable (arXiv:2108.13264), the rating follows
Bradley and Terry. Every bootstrap has its own seed, so an interval can be repeated to the digit.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.optimize
import scipy.sparse.csgraph
import scipy.stats
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.floating]

RESAMPLES = 2000
CONFIDENCE = 0.95
BOOTSTRAP_SEED = 20260304

START_RATING = 1000.0
RATING_SCALE = 400.0


class Interval(NamedTuple):
    """An estimate and its percentile bootstrap interval; floats, or arrays of one shape."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:.3g} [{self.low:.3g}, {self.high:.3g}]"


def iqm(scores: ArrayLike, axis: int | tuple[int, ...] | None = None) -> Floats:
    """Interquartile mean: the mean of the middle half of the values along ``axis`` (all if None).

    >>> float(iqm([0, 1, 2, 3, 4, 5, 6, 1000]))
    3.5
    """
    scores = np.asarray(scores, float)
    if isinstance(axis, tuple):
        moved = np.moveaxis(scores, axis, range(-len(axis), 0))
        scores, axis = moved.reshape(*moved.shape[: -len(axis)], -1), -1
    return np.asarray(scipy.stats.trim_mean(scores, 0.25, axis=axis))


def mean(scores: ArrayLike, axis: int | tuple[int, ...] | None = None) -> Floats:
    """Arithmetic mean, in the form that ``bootstrap`` takes a statistic."""
    return np.asarray(np.mean(np.asarray(scores, float), axis=axis))


def bootstrap(
    scores: ArrayLike,
    statistic: Callable[..., ArrayLike] = iqm,
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = BOOTSTRAP_SEED,
) -> Interval:
    """Percentile interval of a statistic of one method, by a stratified bootstrap over seeds.

    Seeds are drawn with replacement within every task apart, so each task keeps its weight.

    Args:
        scores: ``[seeds, tasks]``, or ``[seeds]`` for a single task.
        statistic: ``statistic(scores [..., seeds, tasks], axis=(-2, -1))`` -> ``[...]``.
        resamples: bootstrap samples, >= 1.
        confidence: coverage, in (0, 1).
        seed: the bootstrap's own.

    Raises:
        ValueError: no scores, or a score that is not finite.
    """
    scores = _matrix(scores)
    drawn = statistic(_resample(scores, resamples, np.random.default_rng(seed)), axis=(-2, -1))
    return _interval(statistic(scores, axis=(-2, -1)), np.asarray(drawn), confidence)


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    statistic: Callable[..., ArrayLike] = iqm,
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = BOOTSTRAP_SEED,
) -> Interval:
    """Statistic of ``first - second``, whose rows are the same seeds; else as in ``bootstrap``."""
    first, second = _matrix(first), _matrix(second)
    if first.shape != second.shape:
        raise ValueError(f"shapes {first.shape} and {second.shape} differ: seeds must be shared")
    return bootstrap(
        first - second, statistic, resamples=resamples, confidence=confidence, seed=seed
    )


class TrimmedDifference(NamedTuple):
    """An interquartile mean of paired differences, and what it may hide.

    Where most pairs are at a ceiling, their differences are about 0 and the failures of one side
    are what is trimmed. So the mean and the share of those pairs stand beside it.

    Attributes:
        difference, low, high: interquartile mean with its interval.
        mean, mean_low, mean_high: mean with its interval.
        both_at_ceiling: share of pairs of which both are at the ceiling; NaN where none is known.
    """

    difference: float
    low: float
    high: float
    mean: float
    mean_low: float
    mean_high: float
    both_at_ceiling: float


def trimmed_difference(
    first: ArrayLike, second: ArrayLike, at_ceiling: ArrayLike
) -> TrimmedDifference:
    """Interquartile mean of ``first - second`` with what it may hide beside it.

    Args:
        first, second: as in ``paired_difference``.
        at_ceiling: 1 where both of a pair are at the ceiling, 0 where not, and NaN where there is
            none; any shape.

    >>> trimmed_difference([1, 1, 1, 1, 1, 0], [1] * 6, [1, 1, 1, 1, 1, 0])[::3]
    (0.0, -0.16666666666666666, 0.8333333333333334)
    """
    estimates = (paired_difference(first, second, statistic) for statistic in (iqm, mean))
    return TrimmedDifference(*next(estimates), *next(estimates), known_mean(at_ceiling))


def known_mean(values: ArrayLike) -> float:
    """Mean of the values that are not NaN; NaN where all are."""
    values = np.asarray(values, float)
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def p_value(
    first: ArrayLike,
    second: ArrayLike,
    statistic: Callable[..., ArrayLike] = iqm,
    *,
    resamples: int = RESAMPLES,
    seed: int = BOOTSTRAP_SEED,
) -> float:
    """Two-sided bootstrap p-value that ``statistic(first - second)`` is zero, on shared seeds.

    Twice the smaller share of resamples on either side of zero, at least ``1 / resamples``; it is
    below 0.05 about where the 95 % interval of ``paired_difference`` leaves zero out.
    """
    difference = _matrix(first) - _matrix(second)
    drawn = np.asarray(
        statistic(_resample(difference, resamples, np.random.default_rng(seed)), axis=(-2, -1))
    )
    smaller = min(float((drawn <= 0).mean()), float((drawn >= 0).mean()))
    return min(max(2 * smaller, 1 / resamples), 1.0)


def holm(p_values: ArrayLike) -> Floats:
    """Holm's adjustment of p-values for their number; below 0.05 they hold jointly at 5 %.

    The i-th smallest of m values is multiplied by m - i + 1 and is at least the one before it
    (Holm, 1979).

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, float)
    order = np.argsort(p)
    adjusted = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(adjusted, 1.0)[np.argsort(order)]


def improvement_probability(
    first: ArrayLike,
    second: ArrayLike,
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = BOOTSTRAP_SEED,
) -> Interval:
    """P(a run of ``first`` beats a run of ``second``), averaged over tasks; ties count one half.

    0.5 means no difference. The numbers of seeds may differ; the rest as in ``bootstrap``.
    """
    first, second = _matrix(first), _matrix(second)
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"{first.shape[1]} and {second.shape[1]} tasks cannot be compared")

    def probability(x: Floats, y: Floats) -> Floats:
        difference = x[..., :, None, :] - y[..., None, :, :]
        return np.mean((np.sign(difference) + 1) / 2, axis=(-3, -2, -1))

    generator = np.random.default_rng(seed)
    drawn = probability(
        _resample(first, resamples, generator), _resample(second, resamples, generator)
    )
    return _interval(probability(first, second), drawn, confidence)


def performance_profile(
    scores: ArrayLike,
    thresholds: ArrayLike,
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = BOOTSTRAP_SEED,
) -> tuple[Floats, Floats, Floats]:
    """Share of runs whose score exceeds each of ``thresholds [n]``, with its pointwise interval.

    Returns (share, low, high), ``[n]`` each; the rest as in ``bootstrap``.
    """
    scores = _matrix(scores)
    thresholds = np.asarray(thresholds, float)
    drawn = _resample(scores, resamples, np.random.default_rng(seed))
    share = np.stack([(scores > t).mean() for t in thresholds])
    shares = np.stack([(drawn > t).mean(axis=(-2, -1)) for t in thresholds], axis=-1)
    low, high = _percentiles(shares, confidence)
    return share, low, high


def normalize(scores: ArrayLike) -> Floats:
    """Min-max normalisation per task over the methods' means: worst mean 0, best mean 1.

    The scale depends on the set of methods compared, and single runs may fall outside [0, 1]. Where
    all means of a task are equal, every run of it scores 0.5. Shapes are ``[methods, seeds,
    tasks]``.
    """
    scores = np.asarray(scores, float)
    means = scores.mean(axis=1)
    low, high = means.min(axis=0), means.max(axis=0)
    scale = np.where(high > low, high - low, 1.0)
    return np.where(high > low, (scores - low) / scale, 0.5)


def wins(scores: ArrayLike) -> Floats:
    """Games won by row against column method over same-seed pairs on every task, ties half each.

    ``scores [methods, seeds, tasks]`` -> ``[methods, methods]``, diagonal 0.
    """
    scores = np.asarray(scores, float)
    difference = scores[:, None] - scores[None]
    games = ((np.sign(difference) + 1) / 2).sum(axis=(-2, -1))
    np.fill_diagonal(games, 0)
    return games


def elo(games: ArrayLike, *, prior_draws: float = 0.0) -> Floats:
    """Ratings ``[methods]`` of the Bradley-Terry model by maximum likelihood; mean 1000, scale 400.

    Row beats column with probability 1 / (1 + 10^((rating_column - rating_row) / 400)).

    Args:
        games: games won by row against column, ``[methods, methods]``, as ``wins`` gives them.
        prior_draws: drawn games added to every pair, >= 0. A method that won or lost every game has
            no finite rating without some, which raises ValueError.

    >>> elo([[0, 3], [1, 0]]).round(2).tolist()
    [1095.42, 904.58]
    """
    games = np.asarray(games, float) + prior_draws / 2
    np.fill_diagonal(games, 0)
    components, _ = scipy.sparse.csgraph.connected_components(games > 0, connection="strong")
    if components > 1:
        raise ValueError(
            "a group of methods won every game against the rest: ratings are not finite;"
            " give prior_draws > 0"
        )

    def negative_log_likelihood(strength: Floats) -> tuple[float, Floats]:
        gap = strength[:, None] - strength[None]
        loss = np.sum(games * np.logaddexp(0, -gap))
        missed = games / (1 + np.exp(gap))
        # The quadratic term only fixes the free constant: it is 0 at the reported solution.
        center = strength.mean()
        return loss + center**2, missed.sum(axis=0) - missed.sum(axis=1) + 2 * center / len(games)

    fit = scipy.optimize.minimize(
        negative_log_likelihood, np.zeros(len(games)), jac=True, method="BFGS", tol=1e-10
    )
    return START_RATING + RATING_SCALE / np.log(10) * (fit.x - fit.x.mean())


def elo_interval(
    scores: ArrayLike,
    *,
    prior_draws: float = 1.0,
    resamples: int = 500,
    confidence: float = CONFIDENCE,
    seed: int = BOOTSTRAP_SEED,
) -> list[Interval]:
    """Elo of each method with its interval; a bootstrap draw keeps the seeds of all methods paired.

    ``scores [methods, seeds, tasks]``, seeds shared; the rest as in ``elo`` and ``bootstrap``.
    """
    scores = np.asarray(scores, float)
    rating = elo(wins(scores), prior_draws=prior_draws)
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        rows = generator.integers(scores.shape[1], size=scores.shape[1:])
        drawn.append(elo(wins(np.take_along_axis(scores, rows[None], 1)), prior_draws=prior_draws))
    low, high = _percentiles(np.stack(drawn), confidence)
    return [Interval(*map(float, row)) for row in zip(rating, low, high, strict=True)]


def _matrix(scores: ArrayLike) -> Floats:
    scores = np.asarray(scores, float)
    scores = scores[:, None] if scores.ndim == 1 else scores
    if scores.ndim != 2 or scores.size == 0:
        raise ValueError(f"scores of shape {scores.shape}: expected [seeds, tasks]")
    if not np.all(np.isfinite(scores)):
        raise ValueError("a score is not finite: decide what such a run counts as first")
    return scores


def _resample(scores: Floats, resamples: int, generator: np.random.Generator) -> Floats:
    """``[resamples, seeds, tasks]``: seeds drawn with replacement, each task on its own."""
    rows = generator.integers(scores.shape[0], size=(resamples, *scores.shape))
    return np.take_along_axis(scores[None], rows, axis=1)


def _percentiles(drawn: Floats, confidence: float) -> tuple[Floats, Floats]:
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
    return low, high


def _interval(estimate: ArrayLike, drawn: Floats, confidence: float) -> Interval:
    low, high = _percentiles(drawn, confidence)
    return Interval(float(np.asarray(estimate)), float(low), float(high))
