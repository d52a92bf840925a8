"""Every figure, as a declaration: its table, what is a panel, a line and an axis, and its kind.

Figures are drawn from stored tables alone. There are six kinds: ``lines`` over a quantity, with
bars, as ``bands``, or bare (``curves``); a ``forest`` of intervals; a ``heat`` map; and for what is
no interval the ``frontier`` of bias and variance and a ``cloud`` of samples. Captions are prose and
stand in RESULTS.md; here a figure says what its axes are.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from gipo_jax import ratio_levels
from gipo_jax.analysis import plots
from gipo_jax.analysis.plots import Look as Style
from gipo_jax.domains.flow import tasks as flow_tasks

from . import flow, metaworld, scores, selection, sequences, width
from .store import NotRunError, Store
from .tasks import FRESH, REUSE, STALE

CLAIMS = {
    4: "final return (> 0: GIPO better)",
    6: "drop from peak (< 0: steadier)",
    7: "time to threshold (< 0: faster)",
}

STYLES = {
    **{m.label: m.style for m in (*scores.CONTENDERS, *sequences.METHODS)},
    **{plots.look(name).label: plots.look(name) for name in scores.WIDTHS},
    plots.look("gipo", 2.0).label: plots.look("gipo", 2.0),
    # Methods that no other figure shows.
    scores.PROPOSAL: Style("#C00000", "*", "-", scores.PROPOSAL),
    "GePPO": Style("#CC79A7", "P", "-", "GePPO"),
    "decoupled PPO": Style("#7E5FB0", "X", "-", "decoupled PPO"),
    "MASPO": Style("#8C6D1F", "v", "-", "MASPO"),
    "P3O-ESS": Style("#56B4E9", "<", "-", "P3O-ESS"),
    "M2PO": Style("#B3A100", ">", "-", "M2PO"),
    width.WIDE_PPO.label: Style("#E69F00", "^", "--", width.WIDE_PPO.label),
    "CISPO": Style("#CC79A7", "P", "-", "CISPO"),
    "TIS": Style("#E69F00", "v", "-", "TIS"),
    "VESPO": Style("#8C6D1F", "X", "-", "VESPO"),
    # Data.
    "fresh": Style("#E69F00", "o", "-", f"fresh: replay of {FRESH} iteration"),
    "stale": Style("#5B3A96", "s", "--", f"stale: replay of {STALE} iterations"),
    "older": Style("#5B3A96", "s", "none", "older data"),
    "wider": Style("#E69F00", "o", "none", "wider window"),
    "all sizes": Style("#222222", "D", "none", "all sizes"),
    # Selection of prompts and responses, and preference training.
    "keep_all": Style("#222222", "D", ":", "keep all"),
    "depo": Style("#0072B2", "o", "-", "DEPO"),
    "prune": Style("#E69F00", "s", "--", "pruning"),
    "DPO": Style("#222222", "v", "-", "DPO"),
    "DPO, trust weight of width 4": Style("#009E73", "^", "-.", "DPO, trust weight of width 4"),
    "DPO, SAGE's pairs": Style("#CC79A7", "P", "--", "DPO, SAGE's pairs"),
    # Flows.
    **{m.look.label: m.look for m in flow.METHODS.values()},
    "token": Style("#D55E00", "o", "-", "x, log-ratio of a step"),
    "ratio_norm": Style("#009E73", "s", "-", "(x + b) s, GRPO-Guard"),
    "above": Style("#0072B2", "^", "-", "r > 1.2"),
    "below": Style("#D55E00", "v", "--", "r < 0.8"),
}
"""How methods and data are drawn, by what tables call them."""

BLUES = ("#9ECAE1", "#3C9BD6", "#0072B2", "#00426B", "#001F33")


def style(name: str) -> Style:
    """How a line is drawn: by its name, or by that of an objective."""
    return STYLES[name] if name in STYLES else plots.look(name)


Prepare = Callable[[pd.DataFrame], pd.DataFrame]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure.

    Attributes:
        name: of its files.
        study: whose scores it shows.
        kind: what draws a panel: axis, the panel's rows, and this declaration.
        table: of ``OUT/tables``, by default that of its name; or ``data/NAME``.
        prepare: the table -> rows with the columns below.
        join: the store -> these rows, where they are of several tables.
        panel: column that has a panel for each value.
        row: column that has a row of panels for each value.
        line: column with a line, or a mark, for each value.
        x: column of the horizontal axis.
        y: column of the vertical axis, whose interval, if any, is ``low`` to ``high``.
        label: of the axes: ``(x, y)``; y may have one for each row of panels.
        titles: of the panels, where their values are none.
        scale: of the axes: ``linear``, ``log``, ``sizes`` (a tick each), ``names`` or ``short``.
        limits: of the vertical axis.
        zero: a vertical or horizontal line of no difference.
        size: width of the figure and height of a row, in inches.
        options: of the panels' axes, such as ``sharey``.
    """

    name: str
    study: str
    kind: Callable[[Axes, pd.DataFrame, "Figure"], None]
    table: str = ""
    prepare: Prepare = lambda table: table
    join: Callable[[Store], pd.DataFrame] | None = None
    panel: str = ""
    row: str = ""
    line: str = "method"
    x: str = "age"
    y: str = "mean"
    label: tuple[str, Any] = ("", "")
    titles: dict[Any, str] = dataclasses.field(default_factory=dict)
    scale: tuple[str, str] = ("linear", "linear")
    limits: tuple[float | None, float | None] = (None, None)
    zero: float | None = None
    size: tuple[float, float] = (plots.WIDTH, 2.4)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def draw(store: Store) -> None:
    """Draws the figures of a store's study from its tables.

    Raises:
        NotRunError: none of its tables is there.
    """
    for figure in FIGURES:
        if figure.study == store.experiment:
            try:
                _draw(store, figure)
            except NotRunError:
                if figure.study != "evidence":
                    raise


def _draw(store: Store, figure: Figure) -> None:
    name = figure.table or figure.name
    folder, _, stored = name.rpartition("/")
    if figure.join is not None:
        table = figure.join(store)
    else:
        table = figure.prepare(store.read(stored, []) if folder else store.scores(name))
    values = {
        column: list(dict.fromkeys(table[column])) if column else [""]
        for column in (figure.panel, figure.row)
    }
    rows, panels = values[figure.row], values[figure.panel]
    width, height = figure.size
    drawn, axes = plots.panels(len(rows), len(panels), width=width, height=height, **figure.options)
    for row, own_axes in zip(rows, axes, strict=True):
        for panel, axis in zip(panels, own_axes, strict=True):
            part = table[table[figure.row] == row] if figure.row else table
            part = part[part[figure.panel] == panel] if figure.panel else part
            figure.kind(axis, part, figure)
            titles = [figure.titles.get(value, str(value)) for value in (panel, row) if value != ""]
            fits = len(", ".join(titles)) < 13 * width / len(panels)
            axis.set_title((", " if fits else "\n").join(titles), fontsize=8.5)
            axis.set_xlabel(figure.label[0] if row == rows[-1] else "")
        label = figure.label[1]
        own_axes[0].set_ylabel(label[row] if isinstance(label, dict) else label)
    lines = dict.fromkeys(table[figure.line]) if figure.line else ()
    looks = [style(line) for line in lines] if figure.kind is not heat else []
    handles = plots.legend(looks, markers=figure.kind is not bands) if len(looks) > 1 else None
    plots.finish(drawn, "", handles, columns=max(2, int(width / 1.5)))
    store.save(drawn, figure.name, name)


def _ends(part: pd.DataFrame, figure: Figure) -> pd.DataFrame:
    """Estimates with their intervals, as ``plots`` takes them; none where the table has none."""
    low, high = ("low", "high") if "low" in part else (figure.y, figure.y)
    return part[[figure.y, low, high]].set_axis(["mean", "low", "high"], axis="columns")


def _scale(axis: Axes, part: pd.DataFrame, figure: Figure) -> None:
    horizontal, vertical = figure.scale
    if horizontal == "sizes":
        plots.log_sizes(axis, part[figure.x], "")
    elif horizontal == "log":
        axis.set_xscale("log")
        ticks = sorted(part[figure.x].unique())
        if len(ticks) < 6:
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
    elif horizontal == "short":
        plots.thousands(axis)
    if vertical == "log":
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_major_locator(FixedLocator([0.01, 0.03, 0.1, 0.3, 1, 3]))
        axis.yaxis.set_minor_locator(NullLocator())
    if figure.limits != (None, None):
        axis.set_ylim(*figure.limits)
    if figure.zero is not None:
        axis.axhline(figure.zero, color="0.5", lw=0.8, zorder=0)


def lines(axis: Axes, part: pd.DataFrame, figure: Figure) -> None:
    """A marked line for each of ``line``, with bars side by side so that none hides another."""
    names = list(dict.fromkeys(part[figure.line]))
    shifts = np.linspace(-1, 1, len(names)) if len(names) > 1 else np.zeros(1)
    places = list(dict.fromkeys(part[figure.x]))
    for shift, name in zip(shifts, names, strict=True):
        own = part[part[figure.line] == name]
        if figure.scale[0] == "names":
            x: Any = own[figure.x].map(places.index) + 0.03 * len(names) * shift
        elif figure.scale[0] in ("sizes", "log"):
            x = own[figure.x] * 1.08**shift
        else:
            x = own[figure.x]
        plots.points(axis, x, _ends(own, figure), style(name))
    if figure.scale[0] == "names":
        axis.set_xticks(range(len(places)), [figure.titles.get(p, str(p)) for p in places])
        axis.set_xlim(-0.5, len(places) - 0.5)
    _scale(axis, part, figure)


def curves(axis: Axes, part: pd.DataFrame, figure: Figure) -> None:
    """A line without marks or intervals for each of ``line``."""
    for name, own in part.groupby(figure.line, sort=False):
        look = style(str(name))
        axis.plot(own[figure.x], own[figure.y], color=look.color, linestyle=look.linestyle)
    _scale(axis, part, figure)


def bands(axis: Axes, part: pd.DataFrame, figure: Figure) -> None:
    """A line for each of ``line`` with its interval shaded."""
    for name, own in part.groupby(figure.line, sort=False):
        plots.band(axis, own[figure.x], _ends(own, figure), style(str(name)))
    _scale(axis, part, figure)


def forest(axis: Axes, part: pd.DataFrame, figure: Figure) -> None:
    """Intervals from left to right, a row for each of ``x``, a mark for each of ``line``.

    A tick is the mean of paired differences beside their interquartile mean.
    """
    labels = list(dict.fromkeys(part[figure.x]))
    rows: Any = part.itertuples()
    for row in rows:
        label, at = getattr(row, figure.x), getattr(row, figure.line)
        marks, look = part[part[figure.x] == label][figure.line].tolist(), style(at)
        y = -labels.index(label) + 0.6 * (0.5 - (marks.index(at) + 0.5) / len(marks))
        filled = "full" if getattr(row, "filled", True) else "none"
        axis.plot([row.low, row.high], [y, y], color=look.color, lw=1.4)
        value = getattr(row, figure.y)
        axis.plot(value, y, look.marker, color=look.color, markersize=4.5, fillstyle=filled)
        if "both_at_ceiling" in part:
            axis.plot(row.mean, y, "|", color="black", markersize=8)
    axis.set_yticks([-i for i in range(len(labels))], labels, fontsize=7.5)
    axis.set_ylim(-len(labels) + 0.4, 0.6)
    if figure.zero is not None:
        axis.axvline(figure.zero, color="0.5", lw=0.8, zorder=0)


def heat(axis: Axes, part: pd.DataFrame, figure: Figure) -> None:
    """A cell for each of ``line`` and ``x`` with its value and ``note``; the best is framed."""
    grid, notes = (
        part.pivot(index=figure.line, columns=figure.x, values=v) for v in (figure.y, "note")
    )
    values = grid.to_numpy(float)
    low, high = figure.limits
    axis.imshow(values, cmap="cividis", vmin=low, vmax=high, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        dark = value < ((low or 0.0) + (high or 1.0)) / 2
        text = f"{value:.2f}  ({notes.iloc[row, column]!s})"
        color = "white" if dark else "black"
        axis.text(column, row, text, ha="center", va="center", fontsize=7.5, color=color)
    for column, row in enumerate(values.argmax(axis=0)):
        corner = (column - 0.48, row - 0.47)
        axis.add_patch(Rectangle(corner, 0.96, 0.94, fill=False, ec="#D55E00", lw=2))
    axis.set_xticks(range(len(grid.columns)), [str(age) for age in grid.columns])
    axis.set_yticks(range(len(grid.index)), [f"{width:g}" for width in grid.index])
    axis.grid(visible=False)


def frontier(axis: Axes, part: pd.DataFrame, figure: Figure) -> None:
    """Bias against variance: the published settings of each objective on its curve."""
    for name in ("gipo", "ppo_clip", "sapo", "no_clip"):
        look, own = plots.look(name), part[part.objective == name]
        curve, marks = own[own.published == 0], own[own.published == 1]
        curve = curve[~curve.zero_gradient]
        axis.plot(curve.variance, curve.bias, color=look.color, linestyle=look.linestyle, lw=1.2)
        axis.plot(marks.variance, marks.bias, look.marker, color=look.color, markersize=5.5)
        for mark in marks[marks.objective == "gipo"].itertuples():
            spot: Any = (mark.variance, mark.bias)
            axis.annotate(
                f"{mark.sigma:g}", spot, xytext=(4, 3), textcoords="offset points", fontsize=6.5
            )
    marks = part[part.published == 1]
    best, zero = marks[marks.pareto == 1], marks[marks.zero_gradient]
    axis.plot(best.variance, best.bias, "o", color="k", markersize=10, fillstyle="none")
    axis.plot(zero.variance, zero.bias, "x", color="#D00000", markersize=8, markeredgewidth=1.8)
    axis.set_ylim(bottom=-0.05 * max(marks.bias.max(), 1e-9), top=1.15 * marks.bias.max())
    axis.set_xlim(right=1.1 * marks.variance.max())


def cloud(axis: Axes, part: pd.DataFrame, figure: Figure) -> None:
    """Samples of a flow, and the modes that are rewarded."""
    ring = flow_tasks.ring()
    x, y = ring.centers[ring.rewarded].T
    axis.scatter(x, y, s=260, color="#F0E442", alpha=0.6, linewidths=0)
    name = part.method.iloc[0] if len(part) else "before"
    color = flow.METHODS[name].look.color if name in flow.METHODS else "0.3"
    axis.scatter(part.x, part.y, s=1.5, color=color, linewidths=0)
    axis.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal")


# Tables in the form that the kinds take.


def _weights(table: pd.DataFrame) -> pd.DataFrame:
    """Effective weights; a method is named by its objective and width."""
    names = [plots.look(*pair).label for pair in zip(table.objective, table.sigma, strict=True)]
    sign = table.advantage.map({1.0: "A > 0", -1.0: "A < 0"})
    return table.assign(method=names, sign=sign)[table.log_ratio.abs() <= 4]


def _melted(table: pd.DataFrame, columns: Sequence[str], **constant: Any) -> pd.DataFrame:
    kept = [name for name in table if name not in columns]
    return table.melt(kept, list(columns), "quantity", "value").assign(**constant)


def _bounds(table: pd.DataFrame) -> pd.DataFrame:
    """The estimator's error about its own mean and to the truth, by width."""
    names = ["No-Clip" if np.isinf(sigma) else f"GIPO σ={sigma:g}" for sigma in table.sigma]
    own = table.assign(method=names)
    return _melted(own[["method", "n", "error", "error_to_truth"]], ["error", "error_to_truth"])


def _gridworld(store: Store) -> pd.DataFrame:
    """Published settings and curves, for one logit and for all."""
    names = {"gridworld": "one logit", "gridworld_vector": "all logits"}
    frames = [
        store.read(f"{name}{end}", []).assign(gradient=title, published=int(not end))
        for name, title in names.items()
        for end in ("", "_curves")
    ]
    return pd.concat(frames)


def _by_age(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(data=table.age.map({table.age.min(): "fresh", table.age.max(): "stale"}))


def _family(table: pd.DataFrame) -> pd.DataFrame:
    """Objectives by their score on stale data, the best on top."""
    stale = table[table.age == table.age.max()].sort_values("iqm", ascending=False)
    order = {name: number for number, name in enumerate(stale.objective)}
    names = [plots.look(name).label for name in table.objective]
    return (
        _by_age(table)
        .assign(name=names)
        .sort_values("objective", key=lambda column: column.map(order), kind="stable")
    )


def _judged(table: pd.DataFrame) -> pd.DataFrame:
    """Judged differences; filled where Holm's correction leaves them."""
    own = table[table.judged].sort_values("claim", kind="stable")
    regimes = own.regime.map(lambda regime: f", {REUSE[regime]}" if regime in REUSE else "")
    where = own.method + regimes + "\n(" + own.case + " widths)"
    where = where.str.replace("papers", "paper's")
    return own.assign(where=where, filled=own.p_holm < scores.LEVEL)


def _proposal(table: pd.DataFrame) -> pd.DataFrame:
    own = table[table.age == 0].sort_values("difference")
    return own.assign(size="all sizes", filled=own.p_holm < scores.LEVEL)


def _reuse_bias(table: pd.DataFrame) -> pd.DataFrame:
    """Reuse bias minus that of No-Clip at equal true return, over all sizes."""
    own = table[(table.rate == "matched") & (table.advantage == "return") & (table["size"] == 0)]
    own = own[own.objective != "no_clip"]
    names = [plots.look(*pair).label for pair in zip(own.objective, own.sigma, strict=True)]
    ends = {"low": own.bias_difference_low, "high": own.bias_difference_high}
    return own.assign(method=names, **ends)


def _ordered(column: str, *values: str) -> Prepare:
    """Rows in the order of a column's values."""
    place = {value: number for number, value in enumerate(values)}
    return lambda table: table.sort_values(column, key=lambda own: own.map(place), kind="stable")


def _lags(table: pd.DataFrame) -> pd.DataFrame:
    """What each method keeps of the on-policy gain at each lag."""
    own = table[table.lag > 0].sort_values("lag", kind="stable")
    return own.assign(low=own.kept_low, high=own.kept_high)


def _distances(table: pd.DataFrame) -> pd.DataFrame:
    names = [plots.look(*pair).label for pair in zip(table.objective, table.sigma, strict=True)]
    own = table.assign(method=names, low=table.error_low, high=table.error_high)
    return _ordered("level", *ratio_levels.LEVELS)(own)


def _flow_methods(table: pd.DataFrame) -> pd.DataFrame:
    labels = [flow.METHODS[name].look.label for name in table.method]
    return _ordered("reward", "proxy", "gold")(table.assign(method=labels))


def _ratios(table: pd.DataFrame) -> pd.DataFrame:
    """Mean of log-ratios in units of their spread, and shares outside PPO's clip, by step."""
    error = 2 * table.error / table["std"]
    center = table["mean"] / table["std"]
    ends = {"value": center, "low": center - error, "high": center + error}
    mean = table[["level", "step"]].assign(panel="mean / standard deviation", **ends)
    token = table[table.level == "token"]
    shares = [
        token[["step"]].assign(
            panel="share outside PPO's clip", level=name, **dict.fromkeys(ends, token[name])
        )
        for name in ("above", "below")
    ]
    return pd.concat([mean, *shares])


def _selection(table: pd.DataFrame) -> pd.DataFrame:
    names = selection.COSTS | {"iteration": "preference training: iterations after the warm-up"}
    return table.assign(cost=table.cost.map(names))


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    own = _ordered("regime", "fresh", "stale")(table)
    return own.assign(regime=own.regime.map(metaworld.SHOWN_AS))


def _rivals(table: pd.DataFrame) -> pd.DataFrame:
    """GIPO minus each rival, over all tasks and without each; filled where Holm leaves it."""
    own = table.fillna({"question": "", "without": ""})
    own = own[own.question != ""]
    tasks = own.without.map(lambda task: f"without {task}" if task else "all tasks")
    return own.assign(shown=tasks, filled=own.p_holm < width.LEVEL)


def _best_width(table: pd.DataFrame) -> pd.DataFrame:
    counts = table.best_in.astype(str) + "/" + table.tasks.astype(str)
    return table.assign(note=counts).sort_values("regime", kind="stable")


REGIME_TITLES: dict[Any, str] = REUSE | {
    name: plots.look(name).label for name in ("gipo", "ppo_clip", "sapo")
}
"""Titles of panels that are a regime or an objective."""

FIGURES = (
    Figure(
        name="trust_weights",
        study="trust_weights",
        kind=curves,
        table="data/trust_weights",
        prepare=_weights,
        panel="sign",
        x="log_ratio",
        y="u",
        label=("log ratio  log r", "effective weight  u"),
        limits=(-0.1, 4),
    ),
    Figure(
        name="gridworld",
        study="gridworld",
        kind=frontier,
        join=_gridworld,
        panel="case",
        row="gradient",
        line="objective",
        label=("variance  Var g", "bias  |E g - E g No-Clip|"),
        titles={"A": "A: uniform", "B": "B: between", "C": "C: near the target"},
        size=(8.5, 2.3),
    ),
    Figure(
        name="bounds",
        study="bounds",
        kind=lines,
        prepare=_bounds,
        panel="quantity",
        x="n",
        y="value",
        label=("samples  n", "95th percentile of |error|"),
        titles={"error": "about its own mean", "error_to_truth": "to the true gradient"},
        scale=("short", "linear"),
        options={"subplot_kw": {"xscale": "log", "yscale": "log"}},
    ),
    Figure(
        name="staleness_return_vs_buffer",
        study="staleness",
        kind=lines,
        panel="env",
        x="buffer_size",
        label=("buffer size (transitions, log scale)", "final return"),
        scale=("sizes", "linear"),
    ),
    Figure(
        name="staleness_learning_curves",
        study="staleness",
        kind=bands,
        panel="buffer_size",
        row="env",
        x="env_steps",
        label=("environment steps", "episode return"),
        titles={128: "buffer 128", 1024: "buffer 1k", 8192: "buffer 8k"},
        scale=("short", "linear"),
        size=(plots.WIDTH, 2.0),
        options={"sharey": "row"},
    ),
    Figure(
        name="tuned_sizes_comparison",
        study="tuned_sizes",
        kind=forest,
        prepare=_judged,
        panel="claim",
        x="where",
        y="difference",
        label=("GIPO minus the other\n(tick: mean of the pairs)", ""),
        titles={claim: f"{claim}: {title}" for claim, title in CLAIMS.items()},
        zero=0,
        size=(10, 3.4),
    ),
    Figure(
        name="age_and_size",
        study="age_and_size",
        kind=forest,
        table="age_and_size_effects",
        line="effect",
        x="method",
        y="difference",
        label=("change of the normalised final return", ""),
        zero=0,
        size=(5.4, 2.2),
    ),
    Figure(
        name="sigma",
        study="sigma",
        kind=lines,
        prepare=_by_age,
        panel="env",
        line="data",
        x="sigma",
        label=("σ (nats, log scale)", "final return"),
        scale=("sizes", "linear"),
    ),
    Figure(
        name="objective_family",
        study="objective_family",
        kind=forest,
        prepare=_family,
        line="data",
        x="name",
        y="iqm",
        label=("normalised final return (IQM over tasks and seeds)", ""),
        size=(5.2, 4.6),
    ),
    Figure(
        name="metaworld",
        study="metaworld",
        kind=bands,
        prepare=_shown,
        panel="task",
        row="regime",
        x="env_steps",
        label=("environment steps", "return of an episode"),
        scale=("short", "linear"),
        size=(9.6, 2.0),
    ),
    *(
        Figure(
            name=name,
            study=name,
            kind=bands,
            panel="task",
            x="env_steps",
            label=("environment steps", "success rate"),
            scale=("short", "linear"),
            limits=(0, 1),
            size=(9.6, 2.2),
        )
        for name in ("width_tasks", "width")
    ),
    Figure(
        name="width_comparison",
        study="width",
        kind=forest,
        prepare=_rivals,
        panel="shown",
        x="method",
        y="difference",
        label=("GIPO σ=1 minus the other,\narea of the success rate", ""),
        zero=0,
        size=(10, 1.9),
        options={"sharex": True, "sharey": True},
    ),
    Figure(
        name="proposal",
        study="proposal",
        kind=forest,
        prepare=_proposal,
        line="size",
        x="method",
        y="difference",
        label=(f"area of {scores.PROPOSAL} minus that of the other\n(tick: mean of the pairs)", ""),
        zero=0,
        size=(5.2, 2.8),
    ),
    Figure(
        name="reuse_bias",
        study="reuse_bias",
        kind=forest,
        prepare=_reuse_bias,
        panel="task",
        row="level",
        x="method",
        y="bias_difference",
        label=("reuse bias minus that of No-Clip", ""),
        titles={"joint": "joint ratio", "token": "ratio per token"},
        zero=0,
        size=(7.6, 1.5),
    ),
    Figure(
        name="flow_samples",
        study="flow",
        kind=cloud,
        table="data/flow_points",
        prepare=_ordered("method", "before", *flow.METHODS),
        panel="method",
        row="regime",
        line="",
        titles={name: method.look.label for name, method in flow.METHODS.items()},
        size=(11, 1.6),
        options={"sharex": True, "sharey": True},
    ),
    Figure(
        name="flow_proxy",
        study="flow_proxy",
        kind=lines,
        table="flow_proxy_curves",
        prepare=_flow_methods,
        panel="shift",
        row="reward",
        x="samples",
        label=("samples", {"proxy": "proxy reward", "gold": "gold reward"}),
        titles={1.0: "equal steps", 3.0: "shift 3"},
        size=(7, 2.4),
    ),
    Figure(
        name="flow_ratios",
        study="flow",
        kind=lines,
        prepare=_ratios,
        panel="panel",
        line="level",
        x="step",
        y="value",
        label=("step, noise to sample", ""),
        zero=0,
    ),
    Figure(
        name="selection",
        study="selection",
        kind=bands,
        prepare=_selection,
        panel="cost",
        x="spent",
        label=("", "exact match, greedy"),
        scale=("short", "linear"),
        limits=(0, 1),
        zero=selection.THRESHOLD,
        size=(10, 2.6),
    ),
    Figure(
        name="sequence_bias_distance",
        study="sequence_bias",
        kind=lines,
        prepare=_distances,
        panel="level",
        x="kl",
        y="error",
        label=("KL(μ || π) (nats)", "error of the mean of 100\n/ length of the gradient"),
        limits=(0.5, 4),
        size=(10.5, 2.2),
        options={"sharey": True, "subplot_kw": {"xscale": "log", "yscale": "log"}},
    ),
    Figure(
        name="sequence_staleness",
        study="sequence_staleness",
        kind=lines,
        prepare=_lags,
        x="lag",
        y="kept",
        label=("lag (iterations)", "share of the on-policy gain kept"),
        scale=("names", "linear"),
        zero=sequences.KEPT,
        size=(6.4, 2.8),
    ),
    Figure(
        name="sequence_lag",
        study="sequence_lag",
        kind=lines,
        prepare=_lags,
        panel="level",
        x="lag",
        y="kept",
        label=("lag (iterations)", "share of the on-policy gain kept"),
        scale=("names", "linear"),
        zero=sequences.KEPT,
        size=(11, 2.6),
        options={"sharey": True},
    ),
    Figure(
        name="policy_lag",
        study="evidence",
        kind=lines,
        prepare=_ordered("regime", *REUSE, "Meta-World"),
        panel="regime",
        titles=REGIME_TITLES,
        label=("replay size (iterations)", "policy lag:\n95th percentile of |log r|"),
        scale=("sizes", "log"),
        size=(9, 2.6),
        options={"sharey": True},
    ),
    Figure(
        name="metaworld_interaction",
        study="evidence",
        kind=lines,
        prepare=_shown,
        x="regime",
        label=("", "final return (normalised, mean)"),
        scale=("names", "linear"),
        titles={"stale": "stale replay (40 episodes)"},
        size=(5.2, 3.0),
    ),
    Figure(
        name="best_width",
        study="evidence",
        kind=heat,
        prepare=_best_width,
        panel="objective",
        row="regime",
        line="width",
        y="score",
        titles=REGIME_TITLES,
        label=("replay size (iterations)", "width: σ, clip ε, τ"),
        limits=(0, 1),
        size=(8, 1.9),
    ),
    Figure(
        name="rates_at_16",
        study="evidence",
        kind=lines,
        prepare=lambda table: table.drop(columns=["min", "max"]),
        panel="env",
        row="regime",
        x="learning_rate",
        titles=REGIME_TITLES,
        label=("learning rate", "area under the curve\n(return)"),
        scale=("log", "linear"),
        size=(7.5, 2.4),
    ),
)
