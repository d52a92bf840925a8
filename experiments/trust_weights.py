"""The paper's first figure: what each objective does to a sample as its ratio leaves 1."""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from experiments.store import Store
from gipo_jax import objectives
from gipo_jax.analysis import plots

QUESTION = "What weight does a sample keep as its importance ratio leaves 1?"

SIGMAS = (0.2, 0.5, 1.0, 2.0)
SAPO_TAU = {"tau_pos": 1.0, "tau_neg": 2.0}
"""SAPO as in the paper's comparison; SAPO's own default is 1 / 1.05."""

FLOOR = 1e-9
ZERO = 1.4e-11
"""Lower end of the logarithmic axis, and where an exact zero is drawn below it."""


def run(store: Store, preset: str, part: tuple[int, int] = (1, 1)) -> None:
    """Evaluates w = u / r and u on a grid of log-ratios; the same for every preset."""
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


def draw(store: Store) -> None:
    """w against log r; u against r and against log r, for both signs of the advantage."""
    frame = store.read("trust_weights", ["objective", "sigma", "advantage", "log_ratio", "u", "w"])
    figure, axes = plots.panels(2, 3, height=2.3)
    handles = []
    for row, (advantage, sign) in enumerate([(1, "A > 0"), (-1, "A < 0")]):
        weight, linear, logarithmic = axes[row]
        chosen = frame[frame.advantage == advantage]
        for (name, sigma), line in _methods(chosen):
            look = plots.look(name, sigma)
            style: Any = {"color": look.color, "linestyle": look.linestyle, "label": look.label}
            near = line[line.log_ratio.abs() <= 4]
            weight.plot(near.log_ratio, near.w, **style)
            near = line[line.log_ratio <= np.log(6)]
            linear.plot(np.exp(near.log_ratio), near.u, **style)
            # The others only underflow: they are never zero by construction.
            visible = line.u.where(line.u > 0, ZERO if name == "ppo_clip" else np.nan)
            (drawn,) = logarithmic.plot(line.log_ratio, visible, **style)
            handles += [drawn] if row == 0 else []
        weight.set(xlabel="log ratio  log r", ylabel=f"{sign}\nweight of the surrogate  u / r")
        linear.set(xlabel="ratio  r", ylabel="effective weight  u", xlim=(0, 6), ylim=(-0.1, 4))
        logarithmic.set(xlabel="log ratio  log r", ylabel="effective weight  u", yscale="log")
        logarithmic.set(ylim=(FLOOR / 1000, 1e4), yticks=[1e-9, 1e-6, 1e-3, 1, 1e3])
        logarithmic.axhspan(FLOOR / 1000, FLOOR / 5, color="0.92", zorder=0)
        # PPO-Clip is zero on the other side.
        side, align = (-7.8, "left") if advantage > 0 else (7.8, "right")
        logarithmic.text(side, ZERO, "exactly 0", fontsize=7, ha=align, va="center", color="0.35")
        for axis, center in ((weight, 0), (linear, 1), (logarithmic, 0)):
            axis.axvline(center, color="0.7", linewidth=0.8, zorder=0)
    caption = (
        "Every sample's gradient is u · A · ∇ log π. Exact values. "
        "PPO-Clip: ε = 0.2; SAPO: τ = 1 for A > 0 and 2 for A < 0."
    )
    plots.finish(figure, caption, handles, columns=7)

    at = frame[frame.log_ratio.isin([-8, -5, -2, 0, 2, 5, 8])]
    store.save(figure, "trust_weights", at.drop(columns="w"))


def _methods(frame: pd.DataFrame) -> Iterator[tuple[tuple[str, float], pd.DataFrame]]:
    """Rows of each method, in stored order."""
    for (name, sigma), rows in frame.groupby(["objective", "sigma"], dropna=False, sort=False):
        yield (str(name), float(sigma)), rows  # type: ignore[arg-type]
