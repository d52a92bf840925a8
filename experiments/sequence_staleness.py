"""Answers of several tokens under stale replay: objectives by lag, and ratio levels by lag.

Every update learns from the answers that the policy of ``lag`` iterations ago gave, one iteration
of them. At lag 0 all ratios are 1, where every objective has the same gradient at every level, so
that one run of each seed stands for all of them.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from experiments import training, tuning
from experiments.markdown import markdown
from experiments.store import Store
from experiments.training import Method, Task
from experiments.tuning import Cell, Study, Unit
from gipo_jax import ratio_levels
from gipo_jax.analysis import plots, stats

QUESTION = "Which objective, and which ratio level, survives which lag on answers of 10 tokens?"

PROGRAM = training.PROGRAMS["sequence_methods"]
GIPO, WIDE_GIPO = "GIPO σ=1", "GIPO σ=3.2"
METHODS = {
    GIPO: Method("gipo", {"sigma": 1.0}),
    WIDE_GIPO: Method("gipo", {"sigma": 10**0.5}),
    "PPO-Clip": Method("ppo_clip", {"clip_eps": 0.2}),
    "SAPO": Method("sapo", {"tau_pos": 1.0, "tau_neg": 1.05}),
    "CISPO": Method("cispo", {}),
    "TIS": Method("tis", {}),
    "VESPO": Method("vespo", {}),
    "No-Clip": Method("no_clip", {}),
}
"""With the defaults of each. The wide GIPO has the width of one token's ratio for the joint ratio
of 10 independent tokens, whose logarithm spreads by the root of 10 as much."""

AT_ALL_LEVELS = (GIPO, "PPO-Clip", "TIS", "VESPO")
LEVELS = tuple(level for level in ratio_levels.LEVELS if level != "token")
CHANCE = 0.5
"""Reward, the share of right tokens, of a policy that knows nothing."""
KEPT = 0.9
"""Part of the on-policy gain over ``CHANCE`` that a method has to keep at a lag to survive it."""

SETTINGS: dict[str, Any] = {
    "num_envs": 8,
    "rollout_length": 8,
    "batch_size": 64,
    "value_learning_rate": None,
    "decoder_layers": 1,
    "decoder_width": 32,
    "decoder_heads": 4,
}


class Scale(NamedTuple):
    """Size of the study.

    Attributes:
        iterations: of 64 answers.
        lags: in iterations, for all objectives at token level.
        levels: ratio levels beside the token's.
        level_lags: lags at which these are run.
        learning_rates: tried for every method, level and lag; a single one is not tuned.
        tuning_seeds: seeds for that, none of them reported.
        seeds: seeds that are reported.
    """

    iterations: int
    lags: tuple[int, ...]
    levels: tuple[str, ...]
    level_lags: tuple[int, ...]
    learning_rates: tuple[float, ...]
    tuning_seeds: range
    seeds: range


SCALES = {
    "quick": Scale(48, (4,), ("joint",), (4,), (1e-3,), range(2700, 2701), range(3700, 3702)),
    "committed": Scale(
        500, (4, 16, 64), LEVELS, (16,), (1e-3,), range(2700, 2701), range(3700, 3704)
    ),
    "full": Scale(
        3000,
        (4, 16, 64, 256),
        LEVELS,
        (4, 16, 64, 256),
        (3e-4, 1e-3, 3e-3, 1e-2),
        range(2700, 2705),
        range(3700, 3720),
    ),
}


def parts(scale: Scale) -> Iterator[tuple[Study, Unit]]:
    """What is trained, the token level first: a study and its one unit, a ratio level, each."""
    lags = [Cell(lag + 1, lag) for lag in scale.lags]
    level_lags = [Cell(lag + 1, lag) for lag in scale.level_lags]
    yield _study("sequences_on_policy", scale, {GIPO: METHODS[GIPO]}, [Cell(1)]), _unit(scale)
    yield _study("sequences_lag", scale, METHODS, lags), _unit(scale)
    for level in scale.levels:
        names = (*AT_ALL_LEVELS, WIDE_GIPO) if level == "joint" else AT_ALL_LEVELS
        shown = {name: METHODS[name] for name in names}
        yield _study("sequences_level", scale, shown, level_lags), _unit(scale, level)


def _study(name: str, scale: Scale, methods: dict[str, Method], cells: Sequence[Cell]) -> Study:
    rates, tuning_seeds, seeds = scale.learning_rates, scale.tuning_seeds, scale.seeds
    return Study(name, PROGRAM, methods, tuple(cells), rates, tuning_seeds, seeds)


def _unit(scale: Scale, level: str = "token") -> Unit:
    steps = scale.iterations * SETTINGS["num_envs"] * SETTINGS["rollout_length"]
    settings = SETTINGS | {"ratio_level": level, "total_steps": steps}
    return Unit(level, Task("tokens/reverse", 0.9, settings, {level: 1}))


def run(store: Store, preset: str, part: tuple[int, int] = (1, 1)) -> None:
    """Tunes and trains what is missing, a ratio level after the other, and stores what is done."""
    index, count = part
    scale = SCALES[preset]
    for study, unit in list(parts(scale))[index - 1 :: count]:
        tuning.train(store, study, unit)
        gather(store, scale)


COLUMNS = ["level", "method", "lag", "seed", "status", "learning_rate", "auc"]
LATE = ("episode_return", "success_rate")
"""Metrics of which a run keeps the mean over the last logged points, an eighth of training."""
WHOLE = ("ess", "near_zero_fraction", "log_ratio_abs_p95")
"""Metrics of which it keeps the mean over all points, but those where no answer is better than
another, which have none."""


def gather(store: Store, scale: Scale) -> None:
    """Stores the tables of the finished parts."""
    tuned, reported, thinned = [], [], []
    for study, unit in parts(scale):
        found = tuning.gather(store, study, [unit])
        if found is None:
            continue
        tuning_runs, runs, curves = found
        points = sorted(curves["env_steps"].unique())
        late = curves[curves["env_steps"].isin(points[-max(len(points) // 8, 1) :])]
        runs = runs.merge(late.groupby("run")[list(LATE)].mean(), on="run")
        runs = runs.merge(curves.groupby("run")[list(WHOLE)].mean(), on="run")
        runs = runs.rename(columns={"regime": "level", "min_age": "lag"})
        tuning_runs = tuning_runs.rename(columns={"regime": "level", "min_age": "lag"})
        tuned.append(tuning_runs[COLUMNS])
        reported.append(runs[[*COLUMNS, *LATE, *WHOLE]])
        if unit.regime == "token":
            keys = runs[["run", "method", "lag", "seed"]]
            curves = curves.merge(keys, on="run")
            thinned.append(curves[["method", "lag", "seed", "env_steps", "episode_return"]])
    if reported:
        store.write("sequence_staleness_tuning", pd.concat(tuned, ignore_index=True), 6)
        store.write("sequence_staleness_runs", pd.concat(reported, ignore_index=True), 6)
    if thinned:
        store.write("sequence_staleness_curves", pd.concat(thinned, ignore_index=True), 4)


def draw(store: Store) -> None:
    """Curves at token level, the final reward by lag and by level, and the plan's verdicts."""
    runs = store.read("sequence_staleness_runs", [*COLUMNS, *LATE, *WHOLE])
    curves = store.read(
        "sequence_staleness_curves", ["method", "lag", "seed", "env_steps", "episode_return"]
    )
    table = scores(runs)
    _draw_curves(store, curves)
    _draw_lags(store, table)
    _draw_levels(store, table)
    store.numbers("sequence_staleness_token_minus_joint", token_minus_joint(runs))


def scores(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each level, method and lag: scores with intervals, and whether it survives.

    ``kept`` is the gain of the final reward over ``CHANCE`` as part of that of the on-policy runs,
    paired on seeds.
    """
    policy = runs[runs.lag == 0].set_index("seed").episode_return
    rows = []
    for (level, method, lag), own in runs.groupby(["level", "method", "lag"], sort=False):
        row = {"level": level, "method": method, "lag": lag}
        row["learning_rate"] = own.learning_rate.iloc[0]
        for score in ("episode_return", "success_rate", "auc", "ess"):
            interval = stats.bootstrap(own[score].to_numpy(float), stats.mean)
            row |= {score: interval.estimate, f"{score}_low": interval.low}
            row |= {f"{score}_high": interval.high}
        gain = own.set_index("seed").episode_return.loc[policy.index].to_numpy() - CHANCE
        kept = stats.bootstrap(gain / (policy.mean() - CHANCE), stats.mean)
        row |= {"kept": kept.estimate, "kept_low": kept.low, "kept_high": kept.high}
        row["verdict"] = "survives" if kept.low >= KEPT else "lost" if kept.high < KEPT else "open"
        rows.append(row | {"diverged": int((own.status == "diverged").sum()), "seeds": len(own)})
    return pd.DataFrame(rows)


def token_minus_joint(runs: pd.DataFrame) -> pd.DataFrame:
    """Area at token level minus that on the joint ratio, paired on seeds, at each lag.

    The last rows compare GIPO per token with the wide GIPO on the joint ratio.
    """
    pairs = [*((name, name) for name in (*AT_ALL_LEVELS, WIDE_GIPO)), (GIPO, WIDE_GIPO)]
    by = ["level", "method", "lag"]
    areas = {key: own.sort_values("seed").auc.to_numpy(float) for key, own in runs.groupby(by)}
    rows = []
    for token, joint in pairs:
        for lag in sorted(map(int, runs[runs.level == "joint"].lag.unique())):
            difference = stats.paired_difference(
                areas["token", token, lag], areas["joint", joint, lag], stats.mean
            )
            row = {"token": token, "joint": joint, "lag": lag}
            rows.append(row | difference._asdict())
    return pd.DataFrame(rows)


def findings(read: Callable[[str], pd.DataFrame]) -> str:
    """The plan's verdicts, from the stored tables."""
    table = read("sequence_staleness_levels")
    pairs = read("sequence_staleness_token_minus_joint")
    own = pairs[(pairs.token == GIPO) & (pairs.joint == GIPO)]
    better, worse = int((own.low > 0).sum()), int((own.high < 0).sum())
    verdict = "yes" if better == len(own) else "partly" if better and not worse else "no"
    wide = pairs[(pairs.token == GIPO) & (pairs.joint == WIDE_GIPO)]
    cells = [
        f"{stats.Interval(*interval)} at lag {lag:g}{what}"
        for what, rows in (("", own), (" for the wide joint GIPO", wide))
        for lag, *interval in rows[["lag", "estimate", "low", "high"]].to_numpy(float)
    ]
    undecided = verdict == "no" and not worse
    text = (
        f"Does GIPO (σ = 1) per token beat the joint ratio? **{verdict}**"
        f"{' by the rule of the plan: the interval holds 0' if undecided else ''}."
        f" Area, token minus joint: {'; '.join(cells)}.\n\n"
    )
    verdicts, rows = ("survives", "open", "lost"), []
    for (level, lag), part in table[table.lag > 0].groupby(["level", "lag"], sort=False):
        names = [", ".join(part[part.verdict == verdict].method) or "-" for verdict in verdicts]
        rows.append([level, lag, *names])
    return text + markdown(["level", "lag", *verdicts], rows)


def _look(method: str) -> plots.Look:
    own = METHODS[method]
    look = plots.look(own.objective, own.sigma if own.objective == "gipo" else None)
    return dataclasses.replace(look, label=method)


def _draw_curves(store: Store, curves: pd.DataFrame) -> None:
    lags = [lag for lag in sorted(curves.lag.unique()) if lag]
    figure, axes = plots.panels(1, len(lags), width=9.0, height=2.6, sharey=True)
    table = plots.summarize(curves, ["lag", "method", "env_steps"], "episode_return")
    for axis, lag in zip(axes[0], lags, strict=True):
        line = table[table.lag == 0]
        axis.plot(line.env_steps, line["mean"], color="0.6", lw=3, alpha=0.6, label="on-policy")
        for method in METHODS:
            line = table[(table.lag == lag) & (table.method == method)]
            plots.band(axis, line.env_steps, line, _look(method))
        axis.set(title=f"lag {lag}", xlabel="answers")
        plots.thousands(axis)
    axes[0][0].set_ylabel("reward (share of right tokens)")
    handles = [axes[0][0].lines[0], *plots.legend(map(_look, METHODS), markers=False)]
    caption = (
        f"tokens/reverse, ratio per token; {curves.seed.nunique()} seeds, "
        f"{plots.INTERVAL_CAPTION}. Grey: lag 0, where all methods are the same."
    )
    plots.finish(figure, caption, handles, columns=5)
    store.save(figure, "sequence_staleness_curves", table)


def _draw_lags(store: Store, table: pd.DataFrame) -> None:
    token = table[table.level == "token"]
    policy, lags = token[token.lag == 0].iloc[0], sorted(set(token.lag) - {0})
    shown = {
        "episode_return": "final reward",
        "success_rate": "final exact match",
        "ess": "effective sample size / n, whole run",
    }
    figure, axes = plots.panels(1, len(shown), width=9.0, height=2.6)
    for axis, (score, label) in zip(axes[0], shown.items(), strict=True):
        axis.axhline(policy[score], color="0.6", lw=3, alpha=0.6, label="on-policy")
        for number, method in enumerate(METHODS):
            line = token[(token.method == method) & (token.lag > 0)].sort_values("lag")
            bars = line[[score, f"{score}_low", f"{score}_high"]]
            bars = bars.set_axis(["mean", "low", "high"], axis="columns")
            # Side by side, so that no interval hides another.
            x = np.arange(len(line)) + 0.07 * (number - 3.5)
            plots.points(axis, x, bars, _look(method))
        axis.set_xticks(range(len(lags)), [str(lag) for lag in lags])
        axis.set(xlabel="lag (iterations)", ylabel=label)
    handles = [axes[0][0].lines[0], *plots.legend(map(_look, METHODS))]
    caption = (
        f"tokens/reverse, ratio per token; mean over the last eighth of training and"
        f" {policy.seeds} seeds. Bars: 95 % bootstrap interval over seeds. Grey: lag 0."
    )
    plots.finish(figure, caption, handles, columns=5)
    store.save(figure, "sequence_staleness", token)


def _draw_levels(store: Store, table: pd.DataFrame) -> None:
    drawn = (*AT_ALL_LEVELS, WIDE_GIPO)
    others = table[table.level != "token"]
    if others.empty:
        return
    lags = sorted(others.lag.unique())
    names = [level for level in ratio_levels.LEVELS if level in set(table.level)]
    part = table[table.lag.isin(lags) & table.method.isin(drawn)]
    figure, axes = plots.panels(2, len(lags), width=8.0, height=2.3, sharex=True, sharey="row")
    shown = {"auc": "mean reward of the run", "episode_return": "final reward"}
    for row, (score, label) in zip(axes, shown.items(), strict=True):
        for axis, lag in zip(row, lags, strict=True):
            axis.axhline(table[table.lag == 0][score].iloc[0], color="0.6", lw=3, alpha=0.6)
            for number, method in enumerate(drawn):
                line = part[(part.lag == lag) & (part.method == method)].set_index("level")
                line = line.loc[[name for name in names if name in line.index]]
                bars = line[[score, f"{score}_low", f"{score}_high"]]
                bars = bars.set_axis(["mean", "low", "high"], axis="columns")
                x = [names.index(str(name)) + 0.1 * (number - 2) for name in line.index]
                look = dataclasses.replace(_look(method), linestyle="none")
                plots.points(axis, np.array(x), bars, look)
            axis.set_xticks(range(len(names)), names, rotation=25, ha="right")
            axis.set_title(f"lag {lag}")
        row[0].set_ylabel(label)
    looks = [dataclasses.replace(_look(m), linestyle="none") for m in drawn]
    caption = (
        f"tokens/reverse; mean over {part.seeds.max()} seeds; bars: 95 % bootstrap interval over"
        " seeds. Grey: lag 0."
    )
    plots.finish(figure, caption, plots.legend(looks))
    store.save(figure, "sequence_staleness_levels", table)
