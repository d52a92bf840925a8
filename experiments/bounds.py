"""The bound on a sample's gradient, what it buys for finite samples, and what it costs."""

import functools
from typing import NamedTuple

import numpy as np
import pandas as pd

from experiments.store import Store
from gipo_jax import objectives
from gipo_jax.analysis import gridworld, plots

QUESTION = "Does sigma bound every update, and do estimates concentrate as the bound implies?"

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


def run(store: Store, preset: str, part: tuple[int, int] = (1, 1)) -> None:
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


def _look(sigma: float) -> plots.Look:
    return plots.look("no_clip") if np.isinf(sigma) else plots.look("gipo", sigma)


def draw(store: Store) -> None:
    """The bound, concentration against the two inequalities, error to the truth, and ESS."""
    magnitude = store.read("bounds_magnitude", ["sigma", "bound", "measured", "at_log_ratio"])
    error = store.read(
        "bounds_concentration",
        ["sigma", "n", "error", "error_to_truth", "hoeffding", "bernstein", "hoeffding_failures"],
    )
    ess = store.read("bounds_ess", ["sigma", "shift", "simulated", "closed"])
    figure, axes = plots.panels(2, 2, height=2.5)
    handles = []

    axis = axes[0, 0]
    gipo = plots.look("gipo")
    axis.plot(magnitude.sigma, magnitude.bound, color="0.3", lw=1, label="bound  exp(σ²/2)")
    axis.plot(
        magnitude.sigma,
        magnitude.measured,
        gipo.marker,
        color=gipo.color,
        label="largest u measured",
    )
    axis.set(yscale="log", xlabel="σ (nats)", ylabel="effective weight  u", title="(a) bound on u")
    axis.legend()

    axis = axes[0, 1]
    for sigma in (1.0, np.inf):
        part, look = error[error.sigma == sigma], _look(sigma)
        axis.plot(part.n, part.error, color=look.color, marker=look.marker, linestyle="-")
        axis.plot(part.n, part.bernstein, color=look.color, linestyle="--", lw=1)
        axis.plot(part.n, part.hoeffding, color=look.color, linestyle=":", lw=1)
    for style, label in (("-", "measured"), ("--", "empirical Bernstein"), (":", "Hoeffding")):
        axis.plot([], [], color="0.3", linestyle=style, lw=1, label=label)
    axis.legend(fontsize=7)
    axis.set(xscale="log", yscale="log", xlabel="samples  n", title="(b) error about its own mean")
    axis.set_ylabel("95th percentile of |error|")

    axis = axes[1, 0]
    for sigma in (*SIGMAS, np.inf):
        part, look = error[error.sigma == sigma], _look(sigma)
        axis.plot(
            part.n, part.error_to_truth, color=look.color, marker=look.marker, ls=look.linestyle
        )
    axis.set(
        xscale="log", yscale="log", xlabel="samples  n", title="(c) error to the true gradient"
    )
    axis.set_ylabel("95th percentile of |error|")

    axis = axes[1, 1]
    for sigma in (0.2, *SIGMAS, np.inf):
        part, look = ess[ess.sigma == sigma], _look(sigma)
        axis.plot(part["shift"], part.closed, color=look.color, linestyle=look.linestyle)
        axis.plot(part["shift"], part.simulated, color=look.color, marker=look.marker, ls="none")
        handles += axis.plot(
            [], [], color=look.color, linestyle=look.linestyle, marker=look.marker, label=look.label
        )
    axis.set(xlabel="policy shift  s (Mahalanobis)", ylabel="normalised ESS", ylim=(0, 1.02))
    axis.set_title("(d) effective sample size")

    repeats = f"{int(error.repeats.iloc[0]):,}"
    caption = (
        f"(b, c) 64-armed stale bandit, {repeats} repeats a point; bounds hold with probability "
        "0.95.\n(d) two Gaussian policies: lines are the closed form, markers a simulation."
    )
    plots.finish(figure, caption, handles)
    store.save(figure, "bounds", error)
