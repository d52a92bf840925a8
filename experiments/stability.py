"""Spread over seeds, worst seed, divergence, and how far return falls from its peak."""

from typing import Any

import numpy as np
import pandas as pd

from experiments import replay_sizes
from experiments.store import Store
from gipo_jax.analysis import plots, stats

QUESTION = "Is training with GIPO more stable: less spread, no collapse, no divergence?"

REFERENCE = plots.look("gipo", 1.0).label


def run(store: Store, preset: str, part: tuple[int, int] = (1, 1)) -> None:
    """Uses the runs of replay_sizes."""
    replay_sizes.run(store.of("replay_sizes"), preset, part)


def spread(scores: np.ndarray, axis: tuple[int, int] = (-2, -1)) -> np.ndarray:
    """Standard deviation over seeds, averaged over tasks, of ``[..., seeds, tasks]``."""
    return np.asarray(scores.std(axis=axis[0]).mean(axis=-1))


def worst(scores: np.ndarray, axis: tuple[int, int] = (-2, -1)) -> np.ndarray:
    """Score of the worst seed, averaged over tasks, of ``[..., seeds, tasks]``."""
    return np.asarray(scores.min(axis=axis[0]).mean(axis=-1))


def drops(runs: pd.DataFrame, curves: pd.DataFrame, regime: str) -> replay_sizes.Scores:
    """Fall from a run's best logged return to its final one, in normalised units."""
    found = replay_sizes.scores(runs, regime, "final_return")
    span = dict(zip(found.tasks, found.span, strict=True))
    part = runs[runs.regime == regime].copy()
    peak = part.run.map(curves.groupby("run").episode_return.max())
    part["drop"] = ((peak - part.final_return) / part.env.map(span)).clip(lower=0).fillna(0)
    axes: Any = [found.methods, found.ages, sorted(part.seed.unique()), found.tasks]
    table = part.set_index(["method", "age", "seed", "env"])["drop"]
    values = table.loc[pd.MultiIndex.from_product(axes)].to_numpy(float)
    return replay_sizes.Scores(
        values.reshape([len(a) for a in axes]), found.methods, found.ages, found.tasks, found.span
    )


def draw(store: Store) -> None:
    """Drop from the peak, spread and worst seed against replay size; divergence as numbers."""
    runs = replay_sizes.load_runs(store)
    curves = replay_sizes.load_curves(store, runs)
    looks = replay_sizes.looks(runs)
    regimes = [r for r in replay_sizes.REGIMES if (runs.regime == r).any()]
    figure, axes = plots.panels(len(regimes), 3, height=2.3, sharex=True)
    rows = []
    for row, regime in enumerate(regimes):
        finals = replay_sizes.scores(runs, regime, "final_return")
        fallen = drops(runs, curves, regime)
        quantities = (
            ("drop", "drop from peak\n(normalised IQM)", fallen, stats.iqm),
            ("spread", "spread over seeds\n(normalised)", finals, spread),
            ("worst", "worst seed\n(normalised)", finals, worst),
        )
        for axis, (name, label, scores, statistic) in zip(axes[row], quantities, strict=True):
            shift = np.linspace(0.9, 1.1, len(scores.methods))
            for factor, method in zip(shift, scores.methods, strict=True):
                found = [stats.bootstrap(scores.of(method, age), statistic) for age in scores.ages]
                line = pd.DataFrame(found, columns=["mean", "low", "high"])
                plots.points(axis, np.array(scores.ages) * factor, line, looks[method])
                for age, interval in zip(scores.ages, found, strict=True):
                    rows.append((regime, name, age, method, *interval))
            plots.log_sizes(axis, scores.ages, "replay size (iterations)")
            axis.set(ylabel=label, title=regime)
            if row < len(regimes) - 1:
                axis.set_xlabel("")
        for method in fallen.methods:
            # A drop is bad, so below zero GIPO is the more stable one.
            difference = stats.paired_difference(fallen.of(REFERENCE), fallen.of(method))
            rows.append((regime, "drop_difference", 0, method, *difference))
            own = runs[(runs.regime == regime) & (runs.method == method)]
            count = int((own.status == "diverged").sum())
            rows.append((regime, "diverged", 0, method, count, np.nan, np.nan))
    diverged = int((runs.status == "diverged").sum())
    caption = (
        "Left: fall from a run's best logged return to its final one. Spread: standard deviation. "
        "Bars: 95 % stratified\nbootstrap interval over "
        f"{runs.seed.nunique()} seeds. Runs that diverged: {diverged} of {len(runs):,}."
    )
    plots.finish(figure, caption, plots.legend(looks.values()), columns=6)
    columns = ["regime", "quantity", "age", "method", "value", "low", "high"]
    store.save(figure, "stability", pd.DataFrame(rows, columns=columns))
