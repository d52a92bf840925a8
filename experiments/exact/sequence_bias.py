"""Answers of several tokens: exact bias and variance of every objective at every ratio level.

Trees of 8 tokens out of 2, small enough to sum over all answers (``gipo_jax.analysis.
sequence_tree``). A tree has a target policy, drawn at random, and behavior policies at several
distances from it.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from gipo_jax import objectives, ratio_levels
from gipo_jax.analysis import plots, sequence_tree, stats
from gipo_jax.analysis.gridworld import softmax

from ..store import Store
from . import reuse_bias

STEPS = len(reuse_bias.ANSWER)
LEVELS = tuple(ratio_levels.LEVELS)


class Scale(NamedTuple):
    """Size of the study.

    Attributes:
        trees: random trees, numbered from 0.
        distances: standard deviation of the behavior's logits about the target's.
    """

    trees: int
    distances: tuple[float, ...]


SCALES = {
    "quick": Scale(2, (1.0,)),
    "committed": Scale(10, (0.25, 0.5, 1.0, 2.0)),
    "full": Scale(100, (0.125, 0.25, 0.5, 1.0, 2.0)),
}

GIPO_WIDTHS = (0.2, 0.5, 1.0)
COMPARED = ("gipo", "ppo_clip", "tis", "vespo", "no_clip")
"""Objectives whose bias is drawn against the distance, and that have the target's advantage too."""

BATCH = 100
"""Answers in the mean whose error is reported."""

SHOWN = 1.0
"""Distance of the tables by objective."""


class Method(NamedTuple):
    """An objective at a ratio level; ``sigma`` is GIPO's width, NaN for others."""

    objective: str
    sigma: float
    level: str


def methods() -> list[Method]:
    """Every objective at every level it can have; those made for one level at that alone."""
    found = []
    for name in objectives.ALL:
        spec = objectives.spec(name)
        levels = [spec.ratio_level] if name in objectives.SEQUENCE else LEVELS
        if "behavior_log_prob" in spec.inputs:
            levels = [level for level in levels if level != "prefix_min"]
        widths = GIPO_WIDTHS if name == "gipo" else (np.nan,)
        found += [Method(name, width, level) for width in widths for level in levels]
    return found


class Tree(NamedTuple):
    """Target policy, and what is added to its logits for distance 1, ``[2^STEPS - 1, 2]``."""

    logits: np.ndarray
    drift: np.ndarray


def tree(number: int) -> Tree:
    """The n-th tree: standard normal logits and drift."""
    drawn = np.random.default_rng(number).normal(size=(2, 2**STEPS - 1, 2))
    return Tree(drawn[0], drawn[1])


def reward() -> np.ndarray:
    """1 for an answer with enough tokens of the right one, as in ``reuse_bias``, else 0."""
    right = sequence_tree.answers(STEPS) == np.array(reuse_bias.ANSWER)
    return (right.sum(axis=1) >= reuse_bias.NEEDED).astype(float)


def measure(store: Store, preset: str) -> None:
    """Computes all studies; nothing is drawn at random but the trees."""
    scale = SCALES[preset]
    rows = []
    for number in range(scale.trees):
        for distance in scale.distances:
            print(f"  tree {number + 1} of {scale.trees}, distance {distance:g}", flush=True)
            rows += _studies(number, distance)
    store.write("sequence_bias", pd.DataFrame(rows), 6)


def _studies(number: int, distance: float) -> list[dict[str, Any]]:
    logits, drift = tree(number)
    target, behavior, rewards = softmax(logits), softmax(logits + distance * drift), reward()
    length = np.linalg.norm(sequence_tree.true_gradient(target, rewards))
    log_mu, log_pi = (sequence_tree.log_prob(x).sum(axis=1) for x in (behavior, target))
    kl = np.exp(log_mu) @ (log_mu - log_pi)
    where = {"tree": number, "distance": distance, "kl": kl}
    rows = []
    for method in methods():
        objective: str | objectives.Objective = method.objective
        if method.objective == "gipo":
            objective = functools.partial(objectives.gipo, sigma=method.sigma)
        advantages = ("terminal", "target") if method.objective in COMPARED else ("terminal",)
        for advantage in advantages:
            result = sequence_tree.study(
                target, behavior, rewards, objective, method.level, advantage
            )
            rows.append(
                where
                | method._asdict()
                | {
                    "advantage": advantage,
                    "bias": result.relative_bias,
                    "cosine": result.cosine,
                    "noise": np.sqrt(result.variance) / length,
                }
            )
    return rows


SCORES = {
    "cosine": "cosine of the angle\nto the true gradient",
    "bias": "bias / length of\nthe true gradient",
    "noise": "standard deviation of one answer\n/ length of the true gradient",
    "error": f"error of the mean of {BATCH} answers\n/ length of the true gradient",
}
"""What is reported of a method; ``error`` is the root of bias^2 + noise^2 / ``BATCH``."""

KEYS = ["advantage", "distance", "objective", "sigma", "level"]


def scores(store: Store) -> dict[str, pd.DataFrame]:
    """All methods at one distance, the compared ones over the distance, and token minus joint."""
    frame = store.read("sequence_bias", [*KEYS, "tree", "kl", "bias", "cosine", "noise"])
    frame["error"] = np.sqrt(frame.bias**2 + frame.noise**2 / BATCH)
    table = summarize(frame)
    terminal = table[table.advantage == "terminal"]
    shown = terminal[terminal.distance == SHOWN]
    pairs = zip(shown.objective, shown.sigma, strict=True)
    compared = terminal[terminal.objective.isin(COMPARED)]
    return {
        "sequence_bias": shown.assign(method=[plots.look(*pair).label for pair in pairs]),
        "sequence_bias_distance": compared[(compared.objective != "gipo") | (compared.sigma == 1)],
        "sequence_bias_token_minus_joint": token_minus_joint(frame),
    }


def summarize(frame: pd.DataFrame) -> pd.DataFrame:
    """Means over trees with 95 % bootstrap intervals, a row for each of ``KEYS``.

    An objective that clips everything has no angle; its cosine counts as 0.
    """
    rows = []
    for key, group in frame.fillna({"cosine": 0.0}).groupby(KEYS, dropna=False, sort=False):
        row = dict(zip(KEYS, key, strict=True)) | {"kl": group.kl.mean()}
        for score in SCORES:
            interval = stats.bootstrap(group[score].to_numpy(float), stats.mean)
            row |= {score: interval.estimate}
            row |= {f"{score}_low": interval.low, f"{score}_high": interval.high}
        rows.append(row)
    return pd.DataFrame(rows)


def token_minus_joint(frame: pd.DataFrame) -> pd.DataFrame:
    """Paired difference over trees, with its interval, of every score and objective."""
    rows = []
    keys = ["advantage", "distance", "objective", "sigma"]
    for key, group in frame.fillna({"cosine": 0.0}).groupby(keys, dropna=False, sort=False):
        by_level = {level: own.sort_values("tree") for level, own in group.groupby("level")}
        if not {"token", "joint"} <= set(by_level):
            continue
        for score in SCORES:
            token, joint = (by_level[name][score].to_numpy(float) for name in ("token", "joint"))
            interval = stats.paired_difference(token, joint, stats.mean)
            row = dict(zip(keys, key, strict=True)) | {"score": score}
            rows.append(row | interval._asdict())
    return pd.DataFrame(rows)
