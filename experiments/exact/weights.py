"""What each objective does to a sample as its ratio leaves 1: the effective weight u.

Every sample's gradient is u * A * grad log pi; the surrogate weighs it by w = u / r.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax import Array

from gipo_jax import objectives

from ..store import Store
from ..switch import any_of_them

SIGMAS = (0.2, 0.5, 1.0, 2.0)
SAPO_TAU = {"tau_pos": 1.0, "tau_neg": 2.0}
"""SAPO as in the paper's comparison; SAPO's own default is 1 / 1.05."""


def measure_paper(store: Store, preset: str) -> None:
    """Evaluate w = u / r and u of the paper's objectives on a grid of log-ratios."""
    log_ratio = np.linspace(-8, 8, 641)
    methods: list[tuple[str, float, objectives.Objective]] = [
        *(("gipo", s, functools.partial(objectives.gipo, sigma=s)) for s in SIGMAS),
        ("ppo_clip", np.nan, objectives.ppo_clip),
        ("sapo", np.nan, functools.partial(objectives.sapo, **SAPO_TAU)),
        ("no_clip", np.nan, objectives.no_clip),
    ]
    rows = []
    for name, sigma, objective in methods:
        for advantage in (1.0, -1.0):
            u = np.asarray(objectives.gradient_weight(objective, log_ratio, advantage), float)
            rows.append(
                pd.DataFrame(
                    {
                        "objective": name,
                        "sigma": sigma,
                        "advantage": advantage,
                        "log_ratio": log_ratio,
                        "u": u,
                        "w": u / np.exp(log_ratio),
                    }
                )
            )
    store.write("trust_weights", pd.concat(rows))


def score_paper(store: Store) -> dict[str, pd.DataFrame]:
    """u of the paper's objectives at some log-ratios."""
    frame = store.read("trust_weights", ["objective", "sigma", "advantage", "log_ratio", "u", "w"])
    at = frame[frame.log_ratio.isin([-8, -5, -2, 0, 2, 5, 8])]
    return {"trust_weights": at.drop(columns="w")}


REFERENCE_SHIFT = 0.3
"""Distance, in standard deviations, between the two Gaussian policies of the reference batch."""

MU, START = 0.25, 0.5
"""Behaviour probability shown for DPPO, and log-ratio at the start of the phase for GePPO."""


def weights() -> pd.DataFrame:
    """u of every objective on a grid of log-ratios, for A = 1 and A = -1.

    A batch statistic is that of a reference batch of 255 samples, log-ratios between two Gaussian
    policies, which the sample joins.
    """
    grid = np.linspace(-3, 3, 241)
    quantiles = jax.scipy.stats.norm.ppf((jnp.arange(255) + 0.5) / 255)
    reference = REFERENCE_SHIFT * quantiles - REFERENCE_SHIFT**2 / 2
    inputs = {"behavior_log_prob": jnp.log(MU), "log_ratio_start": jnp.float32(START)}
    frames = []
    for name in any_of_them.names:
        spec = objectives.spec(name)
        given = {key: jnp.full(256, inputs[key]) for key in spec.inputs}
        for advantage in (1.0, -1.0):

            def weight(
                x: Array, name: str = name, a: float = advantage, given: Any = given
            ) -> Array:
                batch = jnp.concatenate([x[None], reference])
                return objectives.gradient_weight(name, batch, a, **given)[0]

            u = np.asarray(jax.vmap(weight)(jnp.asarray(grid)), float)
            possible = grid <= (-np.log(MU) if spec.discrete_only else np.inf)
            frames.append(
                pd.DataFrame(
                    {
                        "objective": name,
                        "kind": spec.kind,
                        "advantage": advantage,
                        "log_ratio": grid[possible],
                        "u": u[possible],
                    }
                )
            )
    return pd.concat(frames)


def measure_family(store: Store, preset: str) -> None:
    """Evaluate u of every objective; the same for every preset."""
    store.write("objective_family_weights", weights())
