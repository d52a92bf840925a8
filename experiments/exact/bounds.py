"""The bound on a sample's gradient, what it buys for finite samples, and what it costs."""

import functools
from typing import NamedTuple

import numpy as np
import pandas as pd

from gipo_jax import objectives
from gipo_jax.analysis import gridworld

from ..store import Store

BOUND_SIGMAS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 2.5, 3.0)
SIGMAS = (0.5, 1.0, 2.0)
SHIFTS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5)
SAMPLE_SIZES = (16, 64, 256, 1024, 4096, 16384, 65536)
FAILURE = 0.05
"""A bound may fail with this probability."""

REPEATS = {"quick": 2000, "committed": 10_000, "full": 100_000}
DRAWS = {"quick": 100_000, "committed": 400_000, "full": 2_000_000}
SEED = 7


class Bandit(NamedTuple):
    """A stale bandit: 64 actions, drawn by a behaviour policy that has since been left behind.

    Attributes:
        behavior: probabilities mu, ``[actions]``.
        log_ratio: log pi - log mu, ``[actions]``.
        advantage: in [-1, 1], ``[actions]``.
        score: d log pi(a) / d logit of the best action, in [-1, 1], ``[actions]``.
    """

    behavior: np.ndarray
    log_ratio: np.ndarray
    advantage: np.ndarray
    score: np.ndarray


def make_bandit() -> Bandit:
    """The bandit of the concentration study; its largest ratio is about 100."""
    generator = np.random.default_rng(SEED)
    logits = generator.normal(0, 1.0, 64)
    behavior = gridworld.softmax(logits)
    target = gridworld.softmax(logits + generator.normal(0, 2.0, 64))
    advantage = generator.uniform(-1, 1, 64)
    advantage -= target @ advantage
    advantage /= np.abs(advantage).max()
    best = int(np.argmax(target * advantage))
    score = np.eye(64)[best] - target[best]
    return Bandit(behavior, np.log(target / behavior), advantage, score)


def hoeffding(bound: float, n: np.ndarray) -> np.ndarray:
    """Deviation that a mean of n values in [-bound, bound] exceeds with probability FAILURE."""
    return bound * np.sqrt(2 * np.log(2 / FAILURE) / n)


def empirical_bernstein(bound: float, variance: np.ndarray, n: np.ndarray) -> np.ndarray:
    """The same from the sample variance: Maurer and Pontil's bound (arXiv:0907.3740), two-sided."""
    log_term = np.log(4 / FAILURE)
    return np.sqrt(2 * variance * log_term / n) + 7 * 2 * bound * log_term / (3 * (n - 1))


def ess_closed_form(sigma: float, shift: np.ndarray) -> np.ndarray:
    """Normalised ESS of u between two Gaussian policies a Mahalanobis distance ``shift`` apart."""

    def moment(a: float, b: float) -> np.ndarray:
        # E[exp(a x - b x^2)] for x ~ N(-s^2 / 2, s^2), the log-ratio under the behaviour policy.
        variance, mean = shift**2, -(shift**2) / 2
        scale = 1 + 2 * b * variance
        return np.exp((a * mean + a**2 * variance / 2 - b * mean**2) / scale) / np.sqrt(scale)

    precision = 0.0 if np.isinf(sigma) else 1 / sigma**2
    return moment(1, precision / 2) ** 2 / moment(2, precision)


def _weight(sigma: float, log_ratio: np.ndarray, advantage: np.ndarray | float) -> np.ndarray:
    """Effective weights of GIPO, or of No-Clip where sigma is infinite."""
    objective = (
        objectives.no_clip if np.isinf(sigma) else functools.partial(objectives.gipo, sigma=sigma)
    )
    return np.asarray(objectives.gradient_weight(objective, log_ratio, advantage), float)


def measure(store: Store, preset: str) -> None:
    """Measures the largest weight, the error of the estimator over n, and ESS over the shift."""
    generator = np.random.default_rng(SEED + 1)

    log_ratio = np.linspace(-12, 12, 48_001)
    largest = [
        (sigma, np.exp(sigma**2 / 2), weight.max(), log_ratio[weight.argmax()], weight.min() > 0)
        for sigma in BOUND_SIGMAS
        for weight in [_weight(sigma, log_ratio, 1.0)]
    ]
    columns = ["sigma", "bound", "measured", "at_log_ratio", "all_positive"]
    store.write("bounds_magnitude", pd.DataFrame(largest, columns=columns))

    store.write("bounds_concentration", _concentration(generator, REPEATS[preset]))

    rows = []
    for shift in SHIFTS:
        sample = generator.normal(-(shift**2) / 2, shift, DRAWS[preset])
        for sigma in (*SIGMAS, 0.2, np.inf):
            weight = _weight(sigma, sample, 1.0)
            simulated = weight.sum() ** 2 / (weight**2).sum() / len(weight)
            closed = float(ess_closed_form(sigma, np.array(shift)))
            rows.append((sigma, shift, simulated, closed))
    store.write("bounds_ess", pd.DataFrame(rows, columns=["sigma", "shift", "simulated", "closed"]))


def _concentration(generator: np.random.Generator, repeats: int) -> pd.DataFrame:
    """Errors of the mean of n samples of u A d log pi, about its own mean and the true gradient."""
    bandit = make_bandit()
    truth = bandit.behavior @ (np.exp(bandit.log_ratio) * bandit.advantage * bandit.score)
    rows = []
    for sigma in (*SIGMAS, np.inf):
        weight = _weight(sigma, bandit.log_ratio, bandit.advantage)
        value = weight * bandit.advantage * bandit.score
        own = bandit.behavior @ value
        # The bound an analyst has without looking at the data: on u, with |A| and |score| <= 1.
        bound = np.exp(sigma**2 / 2) if np.isfinite(sigma) else np.exp(bandit.log_ratio).max()
        for n in SAMPLE_SIZES:
            # With finitely many actions the counts say all about a sample, whatever its size.
            share = generator.multinomial(n, bandit.behavior, size=repeats) / n
            mean = share @ value
            variance = (share @ value**2 - mean**2) * n / (n - 1)
            rows.append(
                {
                    "sigma": sigma,
                    "n": n,
                    "repeats": repeats,
                    "error": np.quantile(np.abs(mean - own), 1 - FAILURE),
                    "error_to_truth": np.quantile(np.abs(mean - truth), 1 - FAILURE),
                    "bias": abs(own - truth),
                    "hoeffding": hoeffding(bound, np.array(n)),
                    "bernstein": np.median(empirical_bernstein(bound, variance, np.array(n))),
                    "hoeffding_failures": np.mean(
                        np.abs(mean - own) > hoeffding(bound, np.array(n))
                    ),
                    "bernstein_failures": np.mean(
                        np.abs(mean - own) > empirical_bernstein(bound, variance, np.array(n))
                    ),
                }
            )
    return pd.DataFrame(rows)


def scores(store: Store) -> dict[str, pd.DataFrame]:
    """Errors of the mean beside their two bounds."""
    return {"bounds": store.read("bounds_concentration", ["sigma", "n", "error", "error_to_truth"])}
