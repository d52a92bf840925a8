"""The exact bias-variance study in the GridWorld, for one logit and for all of them."""

import functools
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from experiments.store import Store
from gipo_jax import objectives
from gipo_jax.analysis import gridworld, plots

QUESTION = "Which objectives trade bias against variance best where both are known exactly?"

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


def run(store: Store, preset: str, part: tuple[int, int] = (1, 1)) -> None:
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


def draw(store: Store) -> None:
    """Variance against bias, a panel a behaviour policy: for one logit, then for all of them."""
    columns = ["case", "objective", "sigma", "parameter", "bias", "variance", "zero_gradient"]
    shares = []
    for name, what in (
        ("gridworld", "one logit, θ(S0, right), actions drawn at S0"),
        ("gridworld_vector", "all twelve logits, states drawn as the behaviour visits them"),
    ):
        table = store.read(name, [*columns, "pareto"])
        curves = store.read(f"{name}_curves", columns)
        figure, axes = plots.panels(1, 4, width=9.5, height=2.5)
        _draw_grid(axes[0, 0])
        handles: list[Any] = []
        cases = {"A": "A: uniform", "B": "B: between", "C": "C: near the target"}
        for axis, (case, title) in zip(axes[0, 1:], cases.items(), strict=True):
            drawn = _draw_case(axis, table[table.case == case], curves[curves.case == case], title)
            handles = max(handles, drawn, key=len)
        axes[0, 1].set_ylabel("bias  |E g - E g No-Clip|")
        caption = (
            f"Exact values, {what}. Curves run over σ, PPO's ε and SAPO's τ; large markers are"
            "\nthe published settings (σ = 0.1, 0.3, 0.5, 1, 2; ε = 0.2; τ = 1 and 2), "
            "ringed where none of these is better in both."
        )
        if table.zero_gradient.any():
            caption += " Red crosses: every sample's gradient is exactly zero."
        plots.finish(figure, caption, handles)
        store.save(figure, name, table)
        shares += [(name, *row) for row in dominated(curves)]
    names = ["study", "case", "objective", "settings", "share_above_gipo"]
    store.numbers("gridworld_dominated", pd.DataFrame(shares, columns=names))


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


def _draw_case(axis: Axes, table: pd.DataFrame, curves: pd.DataFrame, title: str) -> list[Any]:
    handles: list[Any] = []
    for name in ("gipo", "ppo_clip", "sapo", "no_clip"):
        look = plots.look(name)
        curve = curves[(curves.objective == name) & ~curves.zero_gradient]
        marks = table[table.objective == name]
        axis.plot(curve.variance, curve.bias, color=look.color, linestyle=look.linestyle, lw=1.2)
        handles += axis.plot(
            marks.variance,
            marks.bias,
            color=look.color,
            linestyle="none",
            marker=look.marker,
            markersize=5.5,
            label=look.label,
        )
        for mark in marks[marks.objective == "gipo"].itertuples():
            axis.annotate(
                f"{mark.sigma:g}",
                (mark.variance, mark.bias),
                xytext=(4, 3),
                textcoords="offset points",
                fontsize=6.5,
                color=look.color,
            )
    best = table[table.pareto]
    ring: Any = {"linestyle": "none", "marker": "o", "markersize": 10, "fillstyle": "none"}
    handles += axis.plot(best.variance, best.bias, color="k", label="Pareto-optimal", **ring)
    zero = table[table.zero_gradient]
    if not zero.empty:
        cross: Any = {"linestyle": "none", "marker": "x", "markersize": 8, "markeredgewidth": 1.8}
        label = "all gradients zero"
        handles += axis.plot(zero.variance, zero.bias, color="#D00000", label=label, **cross)
    axis.set(title=title, xlabel="variance  Var g")
    axis.set_ylim(bottom=-0.05 * max(table.bias.max(), 1e-9))
    return handles


def _draw_grid(axis: Axes) -> None:
    """The four cells, their values and the target's probabilities."""
    value, _ = gridworld.values(gridworld.TARGET)
    cells = [(0, 1), (1, 1), (0, 0), (1, 0)]
    steps = [(0, 1), (0, -1), (-1, 0), (1, 0)]
    for state, (x, y) in enumerate(cells):
        goal = state == gridworld.GOAL
        color = "#DDEEDD" if goal else "white"
        axis.add_patch(Rectangle((x, y), 1, 1, facecolor=color, edgecolor="0.3"))
        text = "goal" if goal else f"S{state}\nV = {value[state]:.2f}"
        axis.text(x + 0.5, y + (0.5 if goal else 0.57), text, ha="center", va="center", fontsize=7)
        if goal:
            continue
        for probability, (dx, dy) in zip(gridworld.TARGET[state], steps, strict=True):
            axis.annotate(
                "",
                (x + 0.5 + 0.47 * dx, y + 0.5 + 0.47 * dy),
                (x + 0.5 + 0.30 * dx, y + 0.5 + 0.30 * dy),
                arrowprops={"arrowstyle": "-|>", "lw": 6 * probability, "color": "0.45"},
            )
    axis.set(xlim=(-0.02, 2.02), ylim=(-0.02, 2.02), aspect="equal", title="target policy")
    axis.axis("off")
