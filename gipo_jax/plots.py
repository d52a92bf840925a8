"""Figures. The one owner of style: what a method looks like is decided here and nowhere else.

Colours are Okabe and Ito's, which colour-blind readers tell apart; markers and line styles repeat
the distinction for print without colour. Figures are drawn from stored tables only, never from a
running sweep, and every caption names its interval.
"""

import contextlib
import dataclasses
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from gipo_jax import stats

WIDTH = 7.0
"""Width of a figure in inches: a page's text width."""

PANEL = 2.15
"""Height of a row of panels in inches."""

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
    """How a method is drawn.

    Attributes:
        color: hexadecimal RGB.
        marker: matplotlib marker.
        linestyle: matplotlib line style.
        label: name in legends.
    """

    color: str
    marker: str
    linestyle: str
    label: str


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
    """How an objective is drawn, the same in every figure; sigmas of GIPO are shades of its blue.

    Args:
        objective: its name; unknown names get a look of their own that depends on the name alone.
        sigma: width, to tell several of them apart.
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
        _SIGMA_STYLES[shade],  # type: ignore[arg-type]
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
    figure.supxlabel(caption, fontsize=7.5, color="0.35")


def save(figure: Figure, stem: Path) -> list[Path]:
    """Writes ``stem``.png and ``stem``.pdf and returns both; equal data gives equal bytes."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(stem.name + suffix) for suffix in (".png", ".pdf")]
    figure.savefig(paths[0], metadata={"Software": None})
    figure.savefig(paths[1], metadata={"CreationDate": None, "Creator": None, "Producer": None})
    return paths


def summarize(frame: pd.DataFrame, by: Sequence[str], value: str) -> pd.DataFrame:
    """Mean over seeds and its 95 % bootstrap interval, for every combination of ``by``.

    Args:
        frame: rows of single runs; those without a finite ``value`` are left out.
        by: columns that tell the combinations apart.
        value: column averaged.

    Returns:
        Columns ``by``, ``mean``, ``low``, ``high``, ``seeds`` (rows averaged), ordered by ``by``.
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
    """A number as a tick shows it: 512, 4k, 131k, 2M.

    >>> [short_number(v) for v in (0.5, 512, 4096, 1_500_000)]
    ['0.5', '512', '4k', '1.5M']
    """
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            scaled = value / size
            return f"{scaled:.3g}{suffix}" if scaled < 3 else f"{scaled:.0f}{suffix}"
    return f"{value:g}"


def thousands(axes: Axes) -> None:
    """Writes the x ticks short, as in 50k."""
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: short_number(v)))
