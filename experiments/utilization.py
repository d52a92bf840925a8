"""What stale samples still contribute under each objective, and whether return follows."""

import numpy as np
import pandas as pd
import scipy.stats

from experiments import replay_sizes
from experiments.store import Store
from gipo_jax.analysis import plots

QUESTION = "Does clipping collapse on old data, where, and does return follow?"

SHOWN = {
    "near_zero_fraction_old": "share of old samples\nwith weight < 0.001",
    "ess_old": "effective sample size / n\nof old samples",
    "old_share": "old samples' share\nof all weight",
    "log_ratio_abs_p95": "95th percentile\nof |log r|",
}


def run(store: Store, preset: str, part: tuple[int, int] = (1, 1)) -> None:
    """Uses the runs of replay_sizes."""
    replay_sizes.run(store.of("replay_sizes"), preset, part)


def draw(store: Store) -> None:
    """Utilization over training at the stalest size; by age group; and against return."""
    runs = replay_sizes.load_runs(store)
    curves = replay_sizes.load_curves(store, runs)
    looks = replay_sizes.looks(runs)
    stale = curves[curves.age == curves.age.max()]
    regimes = [r for r in replay_sizes.REGIMES if (runs.regime == r).any()]
    _draw_training(store, stale, looks, regimes)
    _draw_groups(store, runs, stale, looks, regimes)


def _per_seed(curves: pd.DataFrame, by: list[str], value: str) -> pd.DataFrame:
    """Mean over tasks within each seed, so that the seed stays the unit."""
    return curves.groupby([*by, "seed"])[value].mean().reset_index()


def _draw_training(
    store: Store, stale: pd.DataFrame, looks: dict[str, plots.Look], regimes: list[str]
) -> None:
    figure, axes = plots.panels(len(regimes), len(SHOWN), width=9, height=2.1, sharex=True)
    tables = []
    for row, regime in enumerate(regimes):
        part = stale[stale.regime == regime]
        # Logged points of different tasks fall on the same shares of training.
        part = part.assign(progress=part.progress.round(4))
        for axis, (name, label) in zip(axes[row], SHOWN.items(), strict=True):
            table = plots.summarize(
                _per_seed(part, ["method", "progress"], name), ["method", "progress"], name
            )
            tables.append(table.assign(regime=regime, metric=name))
            for method, look in looks.items():
                line = table[table.method == method]
                plots.band(axis, line.progress, line, look)
            axis.set(ylabel=label, ylim=(0, None), title=regime)
            if row == len(regimes) - 1:
                axis.set_xlabel("share of training")
    caption = (
        f"Replay of {stale.age.max()} iterations; old: acted at least 10 iterations ago. Mean over "
        f"{stale.env.nunique()} tasks; shading: 95 % bootstrap interval over seeds."
    )
    handles = plots.legend(looks.values(), markers=False)
    plots.finish(figure, caption, handles, columns=6)
    store.save(figure, "utilization", pd.concat(tables, ignore_index=True))


def _draw_groups(
    store: Store,
    runs: pd.DataFrame,
    stale: pd.DataFrame,
    looks: dict[str, plots.Look],
    regimes: list[str],
) -> None:
    figure, axes = plots.panels(len(regimes), 2, height=2.4)
    rows = []
    for row, regime in enumerate(regimes):
        late = stale[(stale.regime == regime) & (stale.progress > 0.5)]
        groups, follow = axes[row]
        for position, (method, look) in enumerate(looks.items()):
            part = late[late.method == method]
            for name, fill, offset in (("new", "none", 0.12), ("old", "full", -0.12)):
                column = f"near_zero_fraction_{name}"
                table = plots.summarize(
                    _per_seed(part, ["method"], column), ["method"], column
                ).iloc[0]
                y = -position + offset
                groups.plot([table["low"], table["high"]], [y, y], color=look.color, lw=1.3)
                groups.plot(table["mean"], y, look.marker, color=look.color, fillstyle=fill)
                entry = (regime, method, column, table["mean"], table["low"], table["high"])
                rows.append(entry)
        groups.set_yticks([-i for i in range(len(looks))], list(looks))
        groups.set(
            xlabel="share of weights < 0.001", title=f"{regime}: hollow new, filled old data"
        )

        found = replay_sizes.scores(runs, regime, "final_return")
        age = int(stale.age.max())
        means = late.groupby(["method", "env"]).near_zero_fraction.mean()
        ranks = []
        for task_index, task in enumerate(found.tasks):
            share = np.array([means[(method, task)] for method in found.methods])
            score = np.array([found.of(m, age)[:, task_index].mean() for m in found.methods])
            for method, x, score_of in zip(found.methods, share, score, strict=True):
                look = looks[method]
                follow.plot(x, score_of, look.marker, color=look.color, alpha=0.8)
            varied = np.ptp(share) > 0 and np.ptp(score) > 0
            rank = float(scipy.stats.spearmanr(share, score).statistic) if varied else np.nan
            ranks.append(rank)
            rows.append((regime, task, "spearman_near_zero_vs_return", rank, np.nan, np.nan))
        follow.set(xlabel="share of weights < 0.001, all data", ylabel="normalised final return")
        middle = pd.Series(ranks).median()
        follow.set_title(f"{regime}: median rank correlation {middle:.2f}")
    caption = (
        f"Replay of {stale.age.max()} iterations, second half of training. Left: mean over tasks, "
        "95 % bootstrap interval over seeds.\nRight: a point a method and task, mean over seeds; "
        "rank correlations are taken within each task."
    )
    plots.finish(figure, caption, plots.legend(looks.values()), columns=6)
    columns = ["regime", "of", "quantity", "value", "low", "high"]
    store.save(figure, "utilization_groups", pd.DataFrame(rows, columns=columns))
