"""The paper's own ground: Meta-World with fresh and stale replay, under the authors' settings."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pandas as pd

from experiments import training
from experiments.markdown import markdown
from experiments.store import DataError, Store
from experiments.training import BASELINES, GIPO, Method, Sweep
from experiments.verdicts import OPEN, signs
from gipo_jax import environments, protocols, sweep
from gipo_jax.analysis import plots, stats
from gipo_jax.config import Config

QUESTION = "Does GIPO win on Meta-World with stale replay, as the paper reports?"

PROTOCOL = protocols.settings("gipo-metaworld")
EPISODE = int(PROTOCOL["rollout_length"])
"""Steps of an episode, and of an iteration."""

REGIMES = {"stale": 20_000, "fresh": 1_000}
"""Buffer sizes in transitions: 40 iterations of data as the authors had, and 2."""

SHOWN_AS = {"stale": "stale", "fresh": "two-episode buffer"}
"""Names of the regimes in text and figures.

The second is not fresh as the authors' regime is: that had eight times the actors.
"""

PPO, SAPO, NO_CLIP = BASELINES
PAPER = tuple(
    Method("gipo", {"sigma": sigma, "sigma_neg_ratio": negative})
    for sigma in (0.2, 0.5, 1.0)
    for negative in (0.5, 1.0)
)
"""The six variants of the authors' study."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """Size of the study.

    Attributes:
        tasks: EnvPool's names without ``MetaWorld/`` and ``-v3``.
        methods: compared methods.
        regimes: out of ``REGIMES``.
        iterations: of 500 steps.
        seeds: shared by all methods.
    """

    tasks: tuple[str, ...]
    methods: tuple[Method, ...]
    regimes: tuple[str, ...]
    iterations: int
    seeds: range


UNIT = ["regime", "env", "seed"]
"""Columns that tell sweeps apart."""

_FOUR = ("ButtonPress", "ButtonPressTopdown", "CoffeeButton", "ButtonPressWall")
_HARDER = (
    "CoffeePull",
    "Assembly",
    "Basketball",
    "BinPicking",
    "BoxClose",
    "ButtonPressTopdownWall",
)

SCALES = {
    "quick": Scale(("ButtonPress",), (GIPO, PPO), ("stale",), 50, range(1)),
    "committed": Scale(_FOUR, (GIPO, PPO, SAPO), ("stale", "fresh"), 500, range(5)),
    "full": Scale(
        (*_FOUR, *_HARDER),
        (*PAPER, PPO, SAPO, NO_CLIP),
        ("stale", "fresh"),
        10_000,
        range(5),
    ),
}  # fmt: skip


def check() -> None:
    """Raises ConfigError where EnvPool is missing, or cannot run on this device."""
    environments.make(Config(env="MetaWorld/ButtonPress-v3"))


def run(store: Store, preset: str, part: tuple[int, int] = (1, 1)) -> None:
    """Trains what is missing, a sweep a regime, task and seed, and stores what is finished.

    Args:
        part: (i, n): this call takes the i-th of n shares of the sweeps.
    """
    sweeps = _sweeps(SCALES[preset])
    done = training.stored_units(store, "metaworld_runs", UNIT)
    for item in training.take_slice(sweeps, part):
        first = item.runs[0]
        if (item.keys["regime"], first.config.env, first.hparams.seed) in done:
            continue
        training.store_sweeps(store, [item], "loop")
        finished = training.collect(store, sweeps)
        assert finished is not None, "at least this sweep is finished"
        runs, curves = finished
        by_regime = {
            f"metaworld_curves_{regime}": curves[curves["run"].isin(part_of["run"])]
            for regime, part_of in runs.groupby("regime")
        }
        training.write_units(store, UNIT, {"metaworld_runs": runs}, by_regime)


def _sweeps(scale: Scale) -> list[Sweep]:
    """All methods of a regime, task and seed are one sweep, so that what is done can be paired."""
    sweeps = []
    for seed in scale.seeds:
        for regime in scale.regimes:
            for task in scale.tasks:
                settings = PROTOCOL | {
                    "env": f"MetaWorld/{task}-v3",
                    "buffer_size": REGIMES[regime],
                    "max_buffer_size": REGIMES[regime],
                    "total_steps": scale.iterations * EPISODE,
                    "num_logs": min(scale.iterations // 2, 50),
                }
                runs = tuple(
                    run
                    for method in scale.methods
                    for run in sweep.expand(
                        **settings,
                        objective=method.objective,
                        objective_args=method.parameters,
                        seeds=1,
                        seed_offset=seed,
                    )
                )
                sweeps.append(Sweep(f"metaworld_{regime}_{task}_{seed}", runs, {"regime": regime}))
    return sweeps


def draw(store: Store) -> None:
    """Curves per task; scores and comparisons per regime; utilization of new and old data."""
    columns = ["run", "regime", "env", "objective", "sigma", "sigma_neg_ratio", "seed"]
    runs = store.read("metaworld_runs", [*columns, "final_return"])
    names = ["run", "env_steps", "episode_return", "success_rate"]
    regimes = [regime for regime in REGIMES if (runs["regime"] == regime).any()]
    curves = pd.concat([store.read(f"metaworld_curves_{regime}", names) for regime in regimes])
    runs["method"], looks = methods(runs)
    runs["task"] = runs.env.str.removeprefix("MetaWorld/").str.removesuffix("-v3")
    curves = curves.merge(runs[["run", "regime", "task", "method", "seed"]], on="run")
    scored = scores(runs, curves)
    _draw_curves(store, curves, looks)
    _draw_scores(store, scored, looks)
    _draw_utilization(store, curves, looks)
    store.numbers("metaworld_comparison", compare(scored))


def methods(runs: pd.DataFrame) -> tuple[pd.Series, dict[str, plots.Look]]:
    """The name of every run's method in figures, and how each method is drawn."""
    labels, looks = [], {}
    columns = (runs.objective, runs.sigma, runs.sigma_neg_ratio)
    for objective, sigma, negative in zip(*columns, strict=True):
        look = plots.look(objective, sigma if objective == "gipo" else None)
        label = look.label
        if objective == "gipo" and negative != 1:
            label = f"{label}, A ≤ 0: {negative:g}"
            look = dataclasses.replace(look, label=label, linestyle=":")
        labels.append(label)
        looks[label] = look
    return pd.Series(labels, index=runs.index), looks


def scores(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Scores of the runs of the seeds that every regime, task and method has finished.

    Returns:
        regime, task, method, seed, ``success`` (mean rate of the last tenth), and, in units of what
        a task has to gain, ``final``, ``area`` (mean of the learning curve) and ``drop`` (from the
        best logged return to the final one, >= 0). A task's 0 is the mean of the first logged
        returns and its 1 the best final mean of a method and regime.

    Raises:
        DataError: no seed has finished them all.
    """
    cells = len(runs[["regime", "task", "method"]].drop_duplicates())
    runs = runs[runs.groupby("seed").run.transform("size") == cells]
    if runs.empty:
        raise DataError("metaworld_runs", "no seed has finished all tasks; continue the same run")
    by_run = curves.sort_values("env_steps").groupby("run")
    late = curves[curves.env_steps > 0.9 * curves.env_steps.max()].groupby("run")
    first, peak, area = (
        runs.run.map(getattr(by_run.episode_return, what)()) for what in ("first", "max", "mean")
    )
    low = first.groupby(runs.task).transform("mean")
    means = runs.groupby(["task", "method", "regime"]).final_return.mean()
    gain = runs.task.map(means.groupby("task").max()) - low
    return runs[["regime", "task", "method", "seed"]].assign(
        final=(runs.final_return - low) / gain,
        area=(area - low) / gain,
        drop=((peak - runs.final_return) / gain).clip(lower=0),
        success=runs.run.map(late.success_rate.mean()),
    )


def _matrix(part: pd.DataFrame, method: str, score: str) -> np.ndarray:
    """A method's scores, seeds x pairs of regime and task."""
    own = part[part.method == method]
    return own.pivot_table(index="seed", columns=["regime", "task"], values=score).to_numpy()


JUDGED = {4: ("final", 1), 6: ("drop", -1), 7: ("area", 1)}
"""Score that decides a claim of the paper here, and its better side."""

LEAST_SEEDS = 3
"""With fewer the verdicts are open."""


def compare(scored: pd.DataFrame) -> pd.DataFrame:
    """GIPO (sigma 1) minus every other method: final return in each regime, the others over both.

    Returns:
        claim, regime, method, ``difference`` (IQM over tasks and seeds) with ``low`` and ``high``,
        judged (against PPO-Clip and SAPO), seeds.
    """
    ours, deciding = _label(GIPO), {_label(PPO), _label(SAPO)}
    rows = []
    for claim, (score, _) in JUDGED.items():
        for regime in REGIMES if claim == 4 else ("both",):
            part = scored if regime == "both" else scored[scored.regime == regime]
            if ours not in set(part.method):
                continue
            for method in part.method.unique():
                if method == ours:
                    continue
                pair = _matrix(part, ours, score), _matrix(part, method, score)
                found = stats.paired_difference(*pair)
                rows.append((claim, regime, method, *found, method in deciding, len(pair[0])))
    names = ["claim", "regime", "method", "difference", "low", "high", "judged", "seeds"]
    return pd.DataFrame(rows, columns=names)


def _label(method: Method) -> str:
    return plots.look(method.objective, method.parameters.get("sigma")).label


def _draw_curves(store: Store, curves: pd.DataFrame, looks: dict[str, plots.Look]) -> None:
    tasks, regimes = curves.task.unique().tolist(), curves.regime.unique().tolist()
    width = max(3.6, min(10.0, 2.4 * len(tasks)))
    figure, axes = plots.panels(len(regimes), len(tasks), width=width, height=2.0)
    by = ["regime", "task", "method", "env_steps"]
    table = plots.summarize(curves, by, "episode_return")
    for row, regime in zip(axes, regimes, strict=True):
        for axis, task in zip(row, tasks, strict=True):
            part = table[(table.regime == regime) & (table.task == task)]
            for method, look in looks.items():
                line = part[part.method == method]
                plots.band(axis, line.env_steps, line, look)
            plots.thousands(axis)
            axis.set(title=f"{task}\n{SHOWN_AS[regime]}", xlabel="environment steps")
    axes[0][0].set_ylabel("return of an episode")
    caption = (
        f"Protocol gipo-metaworld; shading: 95 % bootstrap\ninterval over {curves.seed.nunique()}"
        " seeds. Stale: replay of 40\niterations, an episode each."
    )
    plots.finish(figure, caption, plots.legend(looks.values(), markers=False), columns=4)
    store.save(figure, "metaworld", table)


def _draw_scores(store: Store, scored: pd.DataFrame, looks: dict[str, plots.Look]) -> None:
    """IQM, performance profile and Elo, a row a regime."""
    regimes = scored.regime.unique().tolist()
    figure, axes = plots.panels(len(regimes), 3, width=9, height=2.1)
    thresholds = np.linspace(-0.2, 1.4, 65)
    rows = []
    for (bars, profile, elo), regime in zip(axes, regimes, strict=True):
        part = scored[scored.regime == regime]
        values = np.stack([_matrix(part, method, "final") for method in looks])
        ratings = stats.elo_interval(values, resamples=200)
        for position, (method, look) in enumerate(looks.items()):
            score, rating = values[position], ratings[position]
            interval = stats.bootstrap(score)
            bars.barh(-position, interval.estimate, color=look.color, alpha=0.75)
            bars.plot(interval[1:], [-position] * 2, color="0.2", lw=1.3)
            share, low, high = stats.performance_profile(score, thresholds, resamples=500)
            table = pd.DataFrame({"mean": share, "low": low, "high": high})
            plots.band(profile, thresholds, table, look)
            elo.plot(rating[1:], [-position] * 2, color=look.color, lw=2)
            elo.plot(rating.estimate, -position, look.marker, color=look.color)
            success = float(part[part.method == method].success.mean())
            rows.append((regime, method, *interval, success, *rating, *score.shape))
        for axis in (bars, elo):
            axis.set_yticks([-i for i in range(len(looks))], list(looks))
        bars.set(title=SHOWN_AS[regime], xlabel="normalised final return, IQM")
        profile.set(xlabel="normalised final return  τ", ylabel="share of runs above τ")
        elo.set(xlabel="Elo")
    caption = (
        "0: mean of a task's first returns; 1: its best final mean of a method and regime. Final:"
        " the last tenth of the episodes.\nLines and shading: 95 % bootstrap intervals over"
        f" {scored.seed.nunique()} seeds, within tasks."
    )
    plots.finish(figure, caption)
    names = ["regime", "method", "iqm", "low", "high", "success_rate"]
    names += ["elo", "elo_low", "elo_high", "seeds", "tasks"]
    store.save(figure, "metaworld_scores", pd.DataFrame(rows, columns=names))


_SHOWN = {
    "near_zero_fraction": "share of weights\nbelow 0.001",
    "ess": "effective sample size / n",
}


def _draw_utilization(store: Store, curves: pd.DataFrame, looks: dict[str, plots.Look]) -> None:
    stale = curves[curves.regime == "stale"]
    late = stale[stale.env_steps > stale.env_steps.max() / 2]
    figure, axes = plots.panels(1, len(_SHOWN), width=6.8, height=2.2)
    rows = []
    for axis, (name, label) in zip(axes[0], _SHOWN.items(), strict=True):
        for position, (method, look) in enumerate(looks.items()):
            part = late[late.method == method]
            for age, fill, offset in (("new", "none", 0.14), ("old", "full", -0.14)):
                value = part.groupby("seed")[f"{name}_{age}"].mean().to_numpy()
                interval = stats.bootstrap(value, stats.mean)
                y = -position + offset
                axis.plot(interval[1:], [y, y], color=look.color, lw=1.3)
                axis.plot(interval[0], y, look.marker, color=look.color, fillstyle=fill)
                rows.append((method, f"{name}_{age}", *interval))
        axis.set_yticks([-i for i in range(len(looks))], list(looks))
        axis.set_xlabel(label)
    caption = (
        "Stale regime, second half of training. Hollow: data of at most 2 iterations ago; filled:"
        "\nof at least 10. Mean over tasks, 95 % bootstrap interval over seeds."
    )
    plots.finish(figure, caption)
    names = ["method", "quantity", "mean", "low", "high"]
    store.save(figure, "metaworld_utilization", pd.DataFrame(rows, columns=names))


def findings(table: Callable[[str], pd.DataFrame]) -> str:
    """The plan's verdicts and what decides them, from the stored tables."""
    compared, scored = table("metaworld_comparison"), table("metaworld_scores")
    rows = [
        [
            SHOWN_AS[str(row.regime)],
            row.method,
            f"{row.iqm:.2f} [{row.low:.2f}, {row.high:.2f}]",
            f"{row.success_rate:.0%}",
            f"{row.elo:.0f} [{row.elo_low:.0f}, {row.elo_high:.0f}]",
        ]
        for row in scored.itertuples()
    ]
    count = int(scored.seeds.iloc[0])
    text = f"{scored.tasks.iloc[0]} tasks, {count} seeds. Final return, normalised:"
    header = ["regime", "method", "IQM", "success", "Elo"]
    text += "\n\n" + markdown(header, rows) + "\n\n"
    rows = [
        [
            str(row.claim),
            SHOWN_AS.get(str(row.regime), row.regime),
            row.method,
            f"{row.difference:.3f} [{row.low:.3f}, {row.high:.3f}]",
            "yes" if row.judged else "no",
        ]
        for row in compared.itertuples()
    ]
    header = ["claim", "regime", "GIPO σ=1 minus", "difference", "judged"]
    text += (
        "Claim 4: final return, claim 7: area under the curve, above zero GIPO is better. Claim 6:"
        " drop from the peak, below zero GIPO is steadier.\n\n"
    )
    text += markdown(header, rows)
    found = ", ".join(f"{claim} **{verdict}**" for claim, verdict in verdicts(compared).items())
    alone = [
        f"{SHOWN_AS[str(regime)]}: {verdicts(part)[4]}"
        for regime, part in compared[compared.claim == 4].groupby("regime", sort=False)
    ]
    text += (
        f"\n\nVerdicts on the claims: {found}. Claim 4 in each regime by itself, by the same rule:"
    )
    text += f" {'; '.join(alone)}."
    committed, full = SCALES["committed"], SCALES["full"]
    missing = len(committed.seeds) - count
    left = missing / len(committed.seeds) * _core_hours(committed)
    of_plan = f"{missing} seeds of the plan, {left:.1f} hours of a core, and " if missing else ""
    return text + (
        f"\n\nNot run: {of_plan}preset `full` ({len(full.tasks)} tasks, {len(full.methods)} "
        f"methods, {full.iterations:,} iterations), {_core_hours(full):,.0f} hours of a core."
    )


SECONDS = 0.17
"""Of an iteration on one core of the machine that the results are from."""


def _core_hours(scale: Scale) -> float:
    runs = len(scale.tasks) * len(scale.methods) * len(scale.regimes) * len(scale.seeds)
    return runs * scale.iterations * SECONDS / 3600


def verdicts(compared: pd.DataFrame) -> dict[int, str]:
    """The verdict on each of ``JUDGED``, by the rule of protocol 1."""
    found = {}
    for claim, (_, better) in JUDGED.items():
        part = compared[compared.judged & (compared.claim == claim)]
        found[claim] = OPEN
        if len(part) and part.seeds.min() >= LEAST_SEEDS:
            intervals = list(zip(part.low.tolist(), part.high.tolist(), strict=True))
            found[claim] = signs(intervals, better)
    return found
