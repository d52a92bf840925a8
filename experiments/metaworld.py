"""The paper's own ground: Meta-World with fresh and stale replay, under the authors' settings."""

import dataclasses

import numpy as np
import pandas as pd

from experiments import training
from experiments.store import Store
from experiments.training import BASELINES, GIPO, Method, Sweep
from gipo_jax import protocols, sweep
from gipo_jax.analysis import plots, stats

QUESTION = "Does GIPO win on Meta-World with stale replay, as the paper reports?"

PROTOCOL = protocols.settings("gipo-metaworld")
EPISODE = int(PROTOCOL["rollout_length"])
"""Steps of an episode, and of an iteration."""

REGIMES = {"stale": 20_000, "fresh": 1_000}
"""Buffer sizes in transitions: 40 iterations of data as the authors had, and 2."""

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

_SIX = (
    "ButtonPress",
    "ButtonPressTopdown",
    "CoffeeButton",
    "ButtonPressWall",
    "CoffeePull",
    "Assembly",
)

SCALES = {
    "quick": Scale(("ButtonPress",), (GIPO, PPO), ("stale",), 50, range(1)),
    "committed": Scale(_SIX, (GIPO, Method("gipo", {"sigma": 0.2}), PPO), ("stale", "fresh"), 1000,
                       range(5)),
    "full": Scale(
        (*_SIX, "Basketball", "BinPicking", "BoxClose", "ButtonPressTopdownWall"),
        (*PAPER, PPO, SAPO, NO_CLIP),
        ("stale", "fresh"),
        10_000,
        range(5),
    ),
}  # fmt: skip


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
                    # Ten iterations a point, so that the last tenth is the authors' 100 episodes.
                    "num_logs": min(100, scale.iterations // 2),
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
    """Curves per task; normalised scores per regime; utilization of new and old data."""
    columns = ["run", "regime", "env", "objective", "sigma", "sigma_neg_ratio", "seed"]
    runs = store.read("metaworld_runs", [*columns, "final_return"])
    names = ["run", "env_steps", "episode_return", "success_rate"]
    regimes = [regime for regime in REGIMES if (runs["regime"] == regime).any()]
    curves = pd.concat([store.read(f"metaworld_curves_{regime}", names) for regime in regimes])
    runs["method"], looks = _methods(runs)
    runs["task"] = runs.env.str.removeprefix("MetaWorld/").str.removesuffix("-v3")
    curves = curves.merge(runs[["run", "regime", "task", "method", "seed"]], on="run")
    _draw_curves(store, curves, looks)
    _draw_scores(store, runs, looks)
    _draw_utilization(store, curves, looks)


def _methods(runs: pd.DataFrame) -> tuple[pd.Series, dict[str, plots.Look]]:
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
            axis.set(title=f"{task}, {regime}", xlabel="environment steps")
    axes[0][0].set_ylabel("return of an episode")
    caption = (
        f"Protocol gipo-metaworld; shading: 95 % bootstrap\ninterval over {curves.seed.nunique()}"
        " seeds. Stale: replay of 40\niterations; fresh: of 2."
    )
    plots.finish(figure, caption, plots.legend(looks.values(), markers=False), columns=4)
    store.save(figure, "metaworld", table)


def scores(runs: pd.DataFrame, regime: str) -> tuple[list[str], np.ndarray]:
    """Final returns of a regime, normalised per task over the means of the compared methods.

    Only tasks and seeds that every method has finished count.

    Returns:
        methods, and scores ``[methods, seeds, tasks]``.
    """
    part = runs[runs.regime == regime]
    methods = part.method.unique().tolist()
    cube = part.pivot_table(index=["task", "seed"], columns="method", values="final_return")
    done = cube[methods].dropna()
    # A rectangle of tasks and seeds: the seeds that every task has.
    seeds = [s for s, part in done.groupby("seed") if len(part) == _task_count(done)]
    table = done[done.index.get_level_values("seed").isin(seeds)].unstack("seed")
    values = np.stack([table[method].to_numpy().T for method in methods])
    means = values.mean(axis=1)
    low, high = means.min(axis=0), means.max(axis=0)
    return methods, (values - low) / np.where(high > low, high - low, 1.0)


def _task_count(done: pd.DataFrame) -> int:
    """Tasks in a table indexed by task and seed."""
    return done.index.get_level_values("task").nunique()


def _draw_scores(store: Store, runs: pd.DataFrame, looks: dict[str, plots.Look]) -> None:
    regimes = runs.regime.unique().tolist()
    figure, axes = plots.panels(1, len(regimes), width=max(3.6, 3.4 * len(regimes)), height=2.2)
    rows = []
    for axis, regime in zip(axes[0], regimes, strict=True):
        methods, values = scores(runs, regime)
        for position, (method, score) in enumerate(zip(methods, values, strict=True)):
            interval = stats.bootstrap(score)
            look = looks[method]
            axis.barh(-position, interval.estimate, color=look.color, alpha=0.75)
            axis.plot(interval[1:], [-position] * 2, color="0.2", lw=1.3)
            rows.append((regime, method, *interval, score.shape[0], score.shape[1]))
        axis.set_yticks([-i for i in range(len(methods))], methods)
        axis.set(title=regime, xlabel="normalised final return, IQM")
    caption = (
        "0 is the worst and 1 the best mean of a task among\nthese methods. Lines: 95 % stratified"
        " bootstrap intervals\nover seeds. Final: the last tenth of the episodes."
    )
    plots.finish(figure, caption)
    names = ["regime", "method", "iqm", "low", "high", "seeds", "tasks"]
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
