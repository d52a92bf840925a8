"""The exact bias-variance study in the GridWorld, for one logit and for all of them."""

import functools

import numpy as np
import pandas as pd

from gipo_jax import objectives
from gipo_jax.analysis import gridworld

from ..store import Store

SIGMAS = (0.1, 0.3, 0.5, 1.0, 2.0)
CURVES = {
    "gipo": ("sigma", np.geomspace(0.05, 8, 81)),
    "ppo_clip": ("clip_eps", np.linspace(0.02, 1.62, 41)),
    "sapo": ("tau", np.geomspace(0.05, 60, 41)),
}
"""Each objective's own parameter, so that none is judged by a single setting of it."""


def _objective(name: str, parameter: float) -> objectives.Objective:
    if name == "sapo":
        # The paper's comparison has twice the temperature for negative advantages.
        return functools.partial(objectives.sapo, tau_pos=parameter, tau_neg=2 * parameter)
    if name == "no_clip":
        return objectives.no_clip
    key = CURVES[name][0]
    return functools.partial(objectives.REGISTRY[name], **{key: parameter})


def _study(name: str, parameter: float, behavior: np.ndarray) -> list[dict[str, object]]:
    """The one-logit row and the all-logits row of a method."""
    objective = _objective(name, parameter)
    bias, variance = gridworld.bias_variance(gridworld.TARGET, behavior, objective)
    gradients = gridworld.sample_gradients(gridworld.TARGET, behavior, objective)
    vector = gridworld.vector_bias_variance(gridworld.TARGET, behavior, objective)
    shared = {
        "objective": name,
        "sigma": parameter if name == "gipo" else np.nan,
        "parameter": parameter,
    }
    zero = bool(np.all(gradients == 0))
    return [
        shared | {"bias": bias, "variance": variance, "zero_gradient": zero},
        shared | vector._asdict(),
    ]


def measure(store: Store, preset: str) -> None:
    """Computes the published table, and curves over each objective's own parameter."""
    published = [
        ("no_clip", np.nan),
        *(("gipo", sigma) for sigma in SIGMAS),
        ("ppo_clip", 0.2),
        ("sapo", 1.0),
    ]
    grid = [(name, float(v)) for name, (_, values) in CURVES.items() for v in values]
    tables: list[list[pd.DataFrame]] = [[], []]
    curves: list[list[pd.DataFrame]] = [[], []]
    for case, behavior in gridworld.BEHAVIORS.items():
        for target, methods in ((tables, published), (curves, grid)):
            studies = [_study(name, parameter, behavior) for name, parameter in methods]
            for frames, rows in zip(target, zip(*studies, strict=True), strict=True):
                frame = pd.DataFrame(rows)
                frame.insert(0, "case", case)
                frame["pareto"] = gridworld.pareto(frame.bias, frame.variance)
                frames.append(frame)
    columns = ["case", "objective", "sigma", "bias", "variance", "zero_gradient", "pareto"]
    one, vector = (pd.concat(frames) for frames in tables)
    store.write("gridworld", one[[*columns, "parameter"]])
    store.write("gridworld_vector", vector[[*columns, "parameter", "bias_on_policy"]])
    one, vector = (pd.concat(frames).drop(columns="pareto") for frames in curves)
    store.write("gridworld_curves", one)
    store.write("gridworld_vector_curves", vector)


def scores(store: Store) -> dict[str, pd.DataFrame]:
    """The published settings, for one logit and for all, and the share of others GIPO dominates."""
    columns = ["case", "objective", "sigma", "parameter", "bias", "variance", "zero_gradient"]
    tables, shares = {}, []
    for name in ("gridworld", "gridworld_vector"):
        tables[name] = store.read(name, [*columns, "pareto"])
        shares += [(name, *row) for row in dominated(store.read(f"{name}_curves", columns))]
    names = ["study", "case", "objective", "settings", "share_above_gipo"]
    return tables | {"gridworld_dominated": pd.DataFrame(shares, columns=names)}


def dominated(curves: pd.DataFrame) -> list[tuple[str, str, int, float]]:
    """Share of PPO's and SAPO's settings with more bias than GIPO has at equal variance.

    Settings without any gradient, those that are No-Clip, and those with a variance that GIPO's
    curve does not reach are left out.

    Returns:
        case, objective, settings that are left, share (NaN where none is).
    """
    rows = []
    for (case, name), own in curves[curves.objective != "gipo"].groupby(["case", "objective"]):
        gipo = curves[(curves.case == case) & (curves.objective == "gipo")].sort_values("variance")
        reached = own.variance.between(gipo.variance.min(), gipo.variance.max())
        own = own[reached & ~own.zero_gradient & (own.bias > 1e-6)]
        at_equal_variance = np.interp(own.variance, gipo.variance, gipo.bias)
        above = np.asarray(own.bias) > at_equal_variance
        share = float(above.mean()) if len(above) else float("nan")
        rows.append((str(case), str(name), len(own), share))
    return rows
