"""The paper's own ground: Meta-World with fresh and stale replay, under the authors' settings."""

import dataclasses
from typing import Any

import numpy as np
import pandas as pd

from gipo_jax import environments, protocols, sweep
from gipo_jax.analysis import plots, stats
from gipo_jax.config import Config

from . import engine
from .engine import Study, Sweep, Tables
from .store import DataError, Store
from .tasks import GIPO, NO_CLIP, PPO, SAPO, Method

PROTOCOL = protocols.settings("gipo-metaworld") | {
    # As the stored runs had them, from before the protocol took the authors' values.
    "kl": "sampled",
    "joint_grad_norm": False,
    "adam_epsilon": 1e-5,
}
EPISODE = int(PROTOCOL["rollout_length"])
"""Steps of an episode, and of an iteration."""

REGIMES = {"stale": 20_000, "fresh": 1_000}
"""Buffer sizes in transitions: 40 iterations of data as the authors had, and 2."""

SHOWN_AS = {"stale": "stale", "fresh": "two-episode buffer"}
"""Names of the regimes in text and figures.

The second is not fresh as the authors' regime is: that had eight times the actors.
"""

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


_FOUR = ("ButtonPress", "ButtonPressTopdown", "CoffeeButton", "ButtonPressWall")
_HARDER = (
    *("CoffeePull", "Assembly", "Basketball", "BinPicking", "BoxClose"),
    "ButtonPressTopdownWall",
)


def check() -> None:
    """Raises ConfigError where EnvPool is missing, or cannot run on this device."""
    environments.make(Config(env="MetaWorld/ButtonPress-v3"))


def sweeps(scale: Scale) -> list[Sweep]:
    """All methods of a regime, task and seed are one sweep, so that what is done can be paired."""
    found = []
    for seed in scale.seeds:
        for regime in scale.regimes:
            for task in scale.tasks:
                settings = PROTOCOL | {"buffer_size": REGIMES[regime]}
                runs = tuple(
                    run
                    for method in scale.methods
                    for run in runs_of(task, method, scale.iterations, seed, settings)
                )
                keys = {"regime": regime, "env": runs[0].config.env, "seed": seed}
                found.append(Sweep(f"metaworld_{regime}_{task}_{seed}", runs, keys))
    return found


def runs_of(
    task: str, method: Method, iterations: int, seed: int, settings: dict[str, Any]
) -> list[sweep.Run]:
    """A method on a task, with up to 50 logged points."""
    sizes = {
        "max_buffer_size": settings["buffer_size"],
        "total_steps": iterations * settings["num_envs"] * EPISODE,
        "num_logs": min(iterations // 2, 50),
    }
    return sweep.expand(
        **settings | sizes,
        env=f"MetaWorld/{task}-v3",
        objective=method.objective,
        objective_args=method.parameters,
        seed_offset=seed,
    )


def load(store: Store) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Stored runs with ``method`` and ``task``, and their curves.

    Raises:
        DataError: as in ``Store.read``.
    """
    columns = ["run", "regime", "env", "objective", "sigma", "sigma_neg_ratio", "seed"]
    runs = store.read("metaworld_runs", [*columns, "final_return"])
    names = ["run", "env_steps", "episode_return", "success_rate", "log_ratio_abs_p95"]
    regimes = [regime for regime in REGIMES if (runs["regime"] == regime).any()]
    curves = pd.concat([store.read(f"metaworld_curves_{regime}", names) for regime in regimes])
    variants = zip(runs.objective, runs.sigma, runs.sigma_neg_ratio, strict=True)
    runs["method"] = [style(*variant).label for variant in variants]
    runs["task"] = runs.env.str.removeprefix("MetaWorld/").str.removesuffix("-v3")
    return runs, curves.merge(runs[["run", "regime", "task", "method", "seed"]], on="run")


def scores(store: Store) -> Tables:
    """Curves per task; scores and comparisons per regime; utilization of new and old data."""
    runs, curves = load(store)
    found = score_runs(runs, curves)
    by = ["regime", "task", "method", "env_steps"]
    return {
        "metaworld": plots.summarize(curves, by, "episode_return"),
        "metaworld_scores": summarize(found),
        "metaworld_utilization": utilization(curves),
        "metaworld_comparison": compare(found),
    }


def style(objective: str, sigma: float, negative: float) -> plots.Look:
    """How a method is drawn."""
    own = plots.look(objective, sigma if objective == "gipo" else None)
    if objective == "gipo" and negative != 1:
        return dataclasses.replace(own, label=f"{own.label}, A ≤ 0: {negative:g}", linestyle=":")
    return own


def score_runs(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Scores of the runs of the seeds that every regime, task and method has finished.

    Returns:
        regime, task, method, seed, ``success`` (mean rate of the last tenth), ``top`` (1 where that
        is 1, the ceiling of every task), and, in units of what a task has to gain, ``final``,
        ``area`` (mean of the learning curve) and ``drop`` (from the best logged return to the final
        one, >= 0). A task's 0 is the mean of the first logged returns and its 1 the best final mean
        of a method and regime.

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
    success = runs.run.map(late.success_rate.mean())
    return runs[["regime", "task", "method", "seed"]].assign(
        final=(runs.final_return - low) / gain,
        area=(area - low) / gain,
        drop=((peak - runs.final_return) / gain).clip(lower=0),
        success=success,
        top=(success == 1).astype(float),
    )


def _matrix(part: pd.DataFrame, method: str, score: str) -> np.ndarray:
    """A method's scores, seeds x pairs of regime and task."""
    own = part[part.method == method]
    return own.pivot_table(index="seed", columns=["regime", "task"], values=score).to_numpy()


def summarize(scored: pd.DataFrame) -> pd.DataFrame:
    """Interquartile mean, success rate and Elo of every method in each regime."""
    rows = []
    for regime, part in scored.groupby("regime", sort=False):
        methods = part.method.unique().tolist()
        values = np.stack([_matrix(part, method, "final") for method in methods])
        ratings = stats.elo_interval(values, resamples=200)
        for method, score, rating in zip(methods, values, ratings, strict=True):
            success = float(part[part.method == method].success.mean())
            rows.append((regime, method, *stats.bootstrap(score), success, *rating, *score.shape))
    names = ["regime", "method", "iqm", "low", "high", "success_rate"]
    names += ["elo", "elo_low", "elo_high", "seeds", "tasks"]
    return pd.DataFrame(rows, columns=names)


def utilization(curves: pd.DataFrame) -> pd.DataFrame:
    """Near-zero weights and effective sample size of stale runs, by age of data, second half."""
    stale = curves[curves.regime == "stale"]
    late = stale[stale.env_steps > stale.env_steps.max() / 2]
    rows = []
    for name in ("near_zero_fraction", "ess"):
        for method, part in late.groupby("method", sort=False):
            for age in ("new", "old"):
                value = part.groupby("seed")[f"{name}_{age}"].mean().to_numpy()
                rows.append((method, f"{name}_{age}", *stats.bootstrap(value, stats.mean)))
    return pd.DataFrame(rows, columns=["method", "quantity", "mean", "low", "high"])


JUDGED = {4: ("final", 1), 6: ("drop", -1), 7: ("area", 1)}
"""Score that decides a claim of the paper here, and its better side."""

LEAST_SEEDS = 3
"""With fewer the verdicts are open."""


def compare(scored: pd.DataFrame) -> pd.DataFrame:
    """GIPO (sigma 1) minus every other method: final return in each regime, the others over both.

    Returns:
        claim, regime, method, the fields of ``stats.TrimmedDifference`` over tasks and seeds,
        judged (against PPO-Clip and SAPO), seeds.
    """
    ours, deciding = GIPO.label, {PPO.label, SAPO.label}
    rows = []
    for claim, (score, _) in JUDGED.items():
        for regime in REGIMES if claim == 4 else ("both",):
            part = scored if regime == "both" else scored[scored.regime == regime]
            if ours not in set(part.method):
                continue
            for method in part.method.unique():
                if method == ours:
                    continue
                first, second = (_matrix(part, name, score) for name in (ours, method))
                tops = _matrix(part, ours, "top") * _matrix(part, method, "top")
                found = stats.trimmed_difference(first, second, tops)
                rows.append((claim, regime, method, *found, method in deciding, len(first)))
    names = ["claim", "regime", "method", *stats.TrimmedDifference._fields, "judged", "seeds"]
    return pd.DataFrame(rows, columns=names)


STUDY = Study(
    name="metaworld",
    question="Does GIPO win on Meta-World with stale replay, as the paper reports?",
    sweeps=sweeps,
    by=("regime", "env", "seed"),
    curves=engine.CURVES,
    presets={
        "quick": Scale(("ButtonPress",), (GIPO, PPO), ("stale",), 50, range(1)),
        "committed": Scale(_FOUR, (GIPO, PPO, SAPO), ("stale", "fresh"), 500, range(5)),
        "full": Scale(
            (*_FOUR, *_HARDER),
            (*PAPER, PPO, SAPO, NO_CLIP),
            ("stale", "fresh"),
            10_000,
            range(5),
        ),
    },
    scores=scores,
    check=check,
)
