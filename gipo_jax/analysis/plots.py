"""Figures. The one owner of style: what a method looks like is decided here and nowhere else.

Colours are Okabe and Ito's, which colour-blind readers tell apart; markers and line styles repeat
the distinction for print without colour. Figures are drawn from stored tables only, never from a
running sweep, and every caption names its interval.
"""

import contextlib
import dataclasses
import textwrap
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from gipo_jax.analysis import stats
from gipo_jax.sweep import results

WIDTH = 7.0  # Width of a figure in inches: a page's text width
PANEL = 2.15  # Height of a row of panels in inches
Drawn = tuple[Figure, pd.DataFrame]  # A figure and the numbers it shows

INTERVAL_CAPTION = "shading and bars: 95 % bootstrap interval over seeds"

_STYLE: Any = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "legend.fontsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "pdf.fonttype": 42,
    # The same data gives the same bytes.
    "svg.hashsalt": "gipo_jax",
}


@dataclasses.dataclass(frozen=True)
class Look:
    """How a method is drawn."""

    color: str  # hexadecimal RGB
    marker: str  # matplotlib marker
    linestyle: Any  # matplotlib line style
    label: str  # name in legends


_OBJECTIVES = {
    "gipo": Look("#0072B2", "o", "-", "GIPO"),
    "ppo_clip": Look("#D55E00", "s", "--", "PPO-Clip"),
    "sapo": Look("#009E73", "^", "-.", "SAPO"),
    "no_clip": Look("#4D4D4D", "D", ":", "No-Clip"),
}
_OTHERS = ("#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#7E5FB0", "#B3A100")
_MARKERS = ("v", "P", "X", "<", ">", "*", "h")
_SIGMA_BLUES = ("#7CC4F0", "#3C9BD6", "#0072B2", "#00426B")
_SIGMA_MARKERS = ("v", "p", "o", "h")
_SIGMA_STYLES = ((0, (1, 1)), (0, (5, 1.5)), "-", (0, (6, 1, 1, 1)))


def look(objective: str, sigma: float | None = None) -> Look:
    """How an objective is drawn, the same in every figure.

    Several sigmas of GIPO are shades of its blue. The look of an unknown name depends on it alone.
    """
    if objective in _OBJECTIVES:
        base = _OBJECTIVES[objective]
    else:
        number = zlib.crc32(objective.encode())
        base = Look(
            _OTHERS[number % len(_OTHERS)], _MARKERS[number % len(_MARKERS)], "-", objective
        )
    if sigma is None or not np.isfinite(sigma):
        return base
    if objective != "gipo":
        return dataclasses.replace(base, label=f"{base.label} σ={sigma:g}")
    shade = int(np.searchsorted([0.35, 0.75, 1.5], sigma))
    return Look(
        _SIGMA_BLUES[shade],
        _SIGMA_MARKERS[shade],
        _SIGMA_STYLES[shade],
        f"GIPO σ={sigma:g}",
    )


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Within it, new figures have this package's style; nothing outside is changed."""
    with matplotlib.rc_context(_STYLE):
        yield


def panels(
    rows: int, columns: int, *, width: float = WIDTH, height: float = PANEL, **kwargs: Any
) -> tuple[Figure, np.ndarray]:
    """A figure and its axes ``[rows, columns]``, apart from pyplot's global state."""
    figure = Figure(figsize=(width, height * rows + 0.75), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    return figure, axes


def finish(
    figure: Figure, caption: str, handles: Sequence[Any] | None = None, columns: int = 6
) -> None:
    """Adds a legend above all panels and a caption, which names intervals, below them."""
    if handles:
        figure.legend(
            handles=handles,
            loc="outside upper center",
            ncols=min(columns, len(handles)),
            columnspacing=1.2,
            handlelength=2.2,
        )
    # About 17 characters of this size fit in an inch.
    width = int(17 * figure.get_figwidth())
    wrapped = "\n".join(textwrap.fill(line, width) for line in caption.splitlines())
    figure.supxlabel(wrapped, fontsize=7.5, color="0.35")


def save(figure: Figure, stem: Path) -> list[Path]:
    """Writes ``stem``.png and ``stem``.pdf and returns both; equal data gives equal bytes."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(stem.name + suffix) for suffix in (".png", ".pdf")]
    figure.savefig(paths[0], metadata={"Software": None})
    figure.savefig(paths[1], metadata={"CreationDate": None, "Creator": None, "Producer": None})
    return paths


def summarize(frame: pd.DataFrame, by: Sequence[str], value: str) -> pd.DataFrame:
    """Mean over seeds and its 95 % bootstrap interval, for every combination of ``by``, in order.

    Columns are ``by``, ``mean``, ``low``, ``high`` and ``seeds``, the rows averaged; rows of
    ``frame``, single runs, without a finite ``value`` are left out.
    """
    rows = []
    finite = frame[np.isfinite(frame[value].to_numpy(float))]
    for key, group in finite.groupby(list(by), dropna=False, sort=True):
        interval = stats.bootstrap(group[value].to_numpy(float), stats.mean, resamples=1000)
        rows.append([*key, *interval, len(group)])
    return pd.DataFrame(rows, columns=[*by, "mean", "low", "high", "seeds"])


def band(axes: Axes, x: Any, table: pd.DataFrame, appearance: Look, **kwargs: Any) -> Any:
    """A line of ``table['mean']`` over ``x`` with its interval shaded; returns the line."""
    (line,) = axes.plot(
        x,
        table["mean"],
        color=appearance.color,
        linestyle=appearance.linestyle,
        label=appearance.label,
        **kwargs,
    )
    axes.fill_between(
        x, table["low"], table["high"], color=appearance.color, alpha=0.15, linewidth=0
    )
    return line


def points(axes: Axes, x: Any, table: pd.DataFrame, appearance: Look, **kwargs: Any) -> Any:
    """A marked line of ``table['mean']`` over ``x`` with bars for its interval; returns it."""
    mean = table["mean"].to_numpy()
    bars = np.stack([mean - table["low"], table["high"] - mean]).clip(min=0)
    container = axes.errorbar(
        x,
        mean,
        bars,
        color=appearance.color,
        linestyle=appearance.linestyle,
        marker=appearance.marker,
        label=appearance.label,
        capsize=2,
        elinewidth=1,
        **kwargs,
    )
    return container


def log_sizes(axes: Axes, sizes: Iterable[float], label: str) -> None:
    """A logarithmic x axis with a tick at each of the sizes that were run."""
    sizes = sorted(set(sizes))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: short_number(v)))
    if len(sizes) == 1:
        axes.set_xlim(sizes[0] / 2, sizes[0] * 2)
    axes.set_xlabel(label)


def short_number(value: float) -> str:
    """A number as a tick shows it; multiples of 1024, as buffer sizes are, in binary thousands.

    >>> [short_number(v) for v in (0.5, 512, 8192, 20_000, 1_500_000)]
    ['0.5', '512', '8k', '20k', '1.5M']
    """
    if value >= 1024 and value % 1024 == 0:
        return f"{value / 1024:g}k"
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:g}"


def thousands(axes: Axes) -> None:
    """Writes the x ticks short, as in 50k."""
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: short_number(v)))


# Columns of runs.csv that do not tell methods apart
_RESULTS = {
    "run",
    "env",
    "buffer_size",
    "seed",
    "status",
    "diverged_step",
    "env_steps",
    "final_return",
    "eval_return",
}


def methods(runs: pd.DataFrame) -> tuple[pd.Series, dict[str, Look]]:
    """Names the method of each run, and gives the look of each name in order of first appearance.

    A method is its objective, and whatever else was swept for that objective. ``runs`` are as
    ``results.read_runs`` gives them.
    """
    names: dict[Any, str] = {}
    looks: dict[str, Look] = {}
    for objective, group in runs.groupby("objective", sort=False):
        swept = [
            column
            for column in group
            if column not in _RESULTS and group[column].nunique(dropna=False) > 1
        ]
        others = [column for column in swept if column != "sigma"]
        variants: dict[Any, int] = {}
        for index, row in zip(group.index, group.to_dict("records"), strict=True):
            sigma = row["sigma"] if "sigma" in swept else None
            variant = tuple(row[column] for column in others)
            shade = variants.setdefault(variant, len(variants))
            base = look(str(objective), sigma)
            extra = "".join(f" {c}={_plain(v)}" for c, v in zip(others, variant, strict=True))
            names[index] = base.label + extra
            if base.label + extra not in looks:
                looks[base.label + extra] = dataclasses.replace(
                    base, color=_lighter(base.color, shade), label=base.label + extra
                )
    return runs.index.to_series().map(names), looks


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _lighter(color: str, steps: int) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    keep = 0.72 ** min(steps, 5)
    return "#" + "".join(f"{round(255 - (255 - c) * keep):02X}" for c in (red, green, blue))


def draw_sweep(directory: str | Path) -> list[Path]:
    """Draws what a sweep measured into ``figures/`` of its folder, and returns the files written.

    Figures are learning curves; final return against buffer size; and, against buffer size, the
    effective sample size, the share of samples with a weight near zero, and the age of the data.
    Raises ``results.ResultsError`` where the folder holds no sweep, or nothing to draw yet.
    """
    directory = Path(directory)
    runs, metrics = results.read_runs(directory), results.read_metrics(directory)
    if metrics.empty:
        raise results.ResultsError(f"{directory / results.METRICS} holds no logged point yet")
    paths = []
    with style():
        for name, figure, _ in sweep_figures(runs, metrics):
            paths += save(figure, directory / results.FIGURES / name)
    return paths


def sweep_figures(
    runs: pd.DataFrame, metrics: pd.DataFrame
) -> Iterator[tuple[str, Figure, pd.DataFrame]]:
    """The figures of ``draw_sweep`` one by one: name, figure, and the numbers it shows."""
    names, looks = methods(runs)
    runs = runs.assign(method=names)
    columns = ["run", "env", "method", "buffer_size", "seed"]
    metrics = metrics.merge(runs[columns], on="run")
    yield "learning_curves", *_draw_curves(metrics, looks)
    yield "return_vs_buffer", *_draw_returns(runs, looks)
    yield "utilization", *_draw_utilization(metrics, looks)


def _draw_curves(metrics: pd.DataFrame, looks: dict[str, Look]) -> Drawn:
    """A row an environment, a column a buffer size, a line a method."""
    envs, sizes = _unique(metrics, "env"), sorted(_unique(metrics, "buffer_size"))
    if len(sizes) > 5:
        sizes = [sizes[i] for i in np.linspace(0, len(sizes) - 1, 5).round().astype(int)]
    figure, axes = panels(len(envs), len(sizes), sharex="row", sharey="row")
    # A point at which no episode ended keeps the newest return: leaving out such runs would make
    # a method look best where its slow episodes are unfinished.
    newest = metrics.sort_values("env_steps").groupby("run").episode_return.ffill()
    metrics = metrics.assign(episode_return=newest)
    table = summarize(metrics, ["env", "buffer_size", "method", "env_steps"], "episode_return")
    for row, env in enumerate(envs):
        for column, size in enumerate(sizes):
            axis = axes[row, column]
            chosen = table[(table.env == env) & (table.buffer_size == size)]
            _lines(band, axis, "env_steps", chosen, looks)
            axis.set_title(f"{env}, buffer {short_number(size)}")
            thousands(axis)
            axis.set_xlabel("environment steps")
        axes[row, 0].set_ylabel("episode return")
    _explain(figure, "Mean return of training episodes", metrics, legend(looks.values(), False))
    return figure, table


def _draw_returns(runs: pd.DataFrame, looks: dict[str, Look]) -> Drawn:
    """A panel an environment: final return against buffer size."""
    envs = _unique(runs, "env")
    columns = min(len(envs), 3)
    rows = -(-len(envs) // columns)
    figure, axes = panels(rows, columns, width=min(WIDTH, 0.6 + 3.2 * columns), height=2.6)
    table = summarize(runs, ["env", "method", "buffer_size"], "final_return")
    for axis, env in zip(axes.flat, envs, strict=False):
        _lines(points, axis, "buffer_size", table[table.env == env], looks)
        log_sizes(axis, runs[runs.env == env].buffer_size, "buffer size (transitions, log scale)")
        axis.set(title=env, ylabel="final return")
    for axis in axes.flat[len(envs) :]:
        axis.remove()
    final = "Mean return in the last logged points (a tenth of training or more)"
    _explain(figure, final, runs, legend(looks.values()))
    return figure, table


def _draw_utilization(metrics: pd.DataFrame, looks: dict[str, Look]) -> Drawn:
    """A row an environment; effective sample size, near-zero weights and age of the data."""
    envs = _unique(metrics, "env")
    shown = {
        "ess": "effective sample size / n",
        "near_zero_fraction": "share of weights < 0.001",
        "policy_age": "age of data (iterations)",
    }
    figure, axes = panels(len(envs), len(shown))
    # The first half still fills the buffer and learns fastest; the second says how it settles.
    half = metrics.groupby("run")["env_steps"].transform("max") / 2
    keys = ["env", "method", "buffer_size", "seed"]
    tables = []
    late = metrics[metrics.env_steps > half].groupby(keys, as_index=False)[list(shown)].mean()
    for row, env in enumerate(envs):
        for axis, (name, label) in zip(axes[row], shown.items(), strict=True):
            part = late[late.env == env]
            table = summarize(part, ["method", "buffer_size"], name)
            tables.append(table.assign(env=env, metric=name))
            _lines(points, axis, "buffer_size", table, looks)
            log_sizes(axis, part.buffer_size, "buffer size (transitions)")
            axis.set_title(env)
            axis.set_ylabel(label)
            axis.set_ylim(bottom=0)
        axes[row, 0].set_ylim(0, 1.03)
    _explain(figure, "Means over the second half of training", metrics, legend(looks.values()))
    return figure, pd.concat(tables, ignore_index=True)


def legend(looks: Iterable[Look], markers: bool = True) -> list[Line2D]:
    """Handles for a legend that several panels share."""
    return [
        Line2D(
            [],
            [],
            color=entry.color,
            linestyle=entry.linestyle,
            marker=entry.marker if markers else "",
            label=entry.label,
        )
        for entry in looks
    ]


def _unique(frame: pd.DataFrame, column: str) -> list[Any]:
    return frame[column].drop_duplicates().tolist()


def _lines(
    draw: Callable[..., Any], axes: Axes, x: str, table: pd.DataFrame, looks: dict[str, Look]
) -> None:
    """A line for each method over a column of a table, by ``band`` or ``points``."""
    for method, appearance in looks.items():
        # Numbers also where no episode has ended, and so no row is left.
        line = table[table.method == method][[x, "mean", "low", "high"]].astype(float)
        draw(axes, line[x], line, appearance)


def _explain(figure: Figure, what: str, frame: pd.DataFrame, handles: Sequence[Any]) -> None:
    """Says what a figure shows, over how many seeds, and with which interval."""
    count = frame["seed"].nunique()
    seeds = f"{count} seeds" if count > 1 else "1 seed"
    columns = max(2, int(figure.get_figwidth() / 1.35))
    finish(figure, f"{what}; {seeds}, {INTERVAL_CAPTION}.", handles, columns)
