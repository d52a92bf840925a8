"""Protocol 2: every method tuned alike at every replay size, and what that changes.

Protocol 1 (``replay_sizes``) tunes at one replay size with two seeds and uses the rate at all
sizes. Here learning rates, and in a second comparison widths, are tuned at each size.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from experiments import training
from experiments.compared import NAMES
from experiments.store import Store
from experiments.training import REGIMES, Method, Sweep, Task

QUESTION = "Does GIPO learn best where every method is tuned at every replay size?"

WIDTHS: dict[str, dict[float, dict[str, float]]] = {
    "gipo": {sigma: {"sigma": sigma} for sigma in (0.2, 0.5, 1.0)},
    "ppo_clip": {eps: {"clip_eps": eps} for eps in (0.1, 0.2, 0.4)},
    # SAPO's two temperatures keep the ratio that they have in the paper's comparison.
    "sapo": {tau: {"tau_pos": tau, "tau_neg": 2 * tau} for tau in (0.5, 1.0, 2.0)},
    "no_clip": {0.0: {}},
}
"""Parameters of an objective by its width: sigma, eps, tau for A > 0; No-Clip has none."""

PAPER = {"gipo": 1.0, "ppo_clip": 0.2, "sapo": 1.0, "no_clip": 0.0}
"""The widths of the paper's comparison."""

CASES = ("papers", "tuned", "one rate")
"""The paper's widths, rate tuned at each size; widths and rate tuned at each size; the paper's
widths, one rate for all sizes."""

TUNING_COLUMNS = [
    *("regime", "env", "objective", "width", "age", "learning_rate", "seed", "status", "auc"),
]
RUN_COLUMNS = ["run", *TUNING_COLUMNS, "final_return"]


@dataclasses.dataclass(frozen=True)
class Scale:
    """Size of the study.

    Attributes:
        tasks: environments.
        ages: buffer sizes, in iterations.
        learning_rates: tried for every method, width, task, regime and size.
        tuning_seeds: seeds for that, none of them reported.
        seeds: seeds that are reported.
    """

    tasks: tuple[Task, ...]
    ages: tuple[int, ...]
    learning_rates: tuple[float, ...]
    tuning_seeds: range
    seeds: range


def _with_steps(task: Task, steps: int) -> Task:
    return dataclasses.replace(task, settings=task.settings | {"total_steps": steps})


_TASKS = (
    _with_steps(training.CARTPOLE, 49_152),
    training.ACROBOT,
    _with_steps(training.CATCH, 32_768),
)
_MINATAR = tuple(
    _with_steps(task, 262_144) for task in (training.BREAKOUT, training.INVADERS, training.ASTERIX)
)
_RATES = (1e-4, 3e-4, 1e-3, 3e-3)

SCALES = {
    "quick": Scale(
        (_with_steps(training.CARTPOLE, 16_384), _with_steps(training.CATCH, 16_384)),
        (1, 32),
        (1e-3, 3e-3),
        range(2000, 2001),
        range(3000, 3002),
    ),
    "committed": Scale(_TASKS, (1, 16, 128), _RATES, range(2000, 2005), range(3000, 3010)),
    "full": Scale(
        (*_TASKS, *_MINATAR),
        (1, 4, 16, 64, 128, 256),
        _RATES,
        range(2000, 2010),
        range(3000, 3020),
    ),
}


class Unit(NamedTuple):
    """A task in a regime: what is tuned and reported together."""

    regime: str
    task: Task


def units(scale: Scale) -> list[Unit]:
    """All units. A task's two regimes are neighbours, and two equal shares take about as long."""
    both = list(reversed(REGIMES))
    return [
        Unit(regime, task)
        for number, task in enumerate(scale.tasks)
        for regime in (both if number % 2 == 0 else reversed(both))
    ]


def run(store: Store, preset: str, part: tuple[int, int] = (1, 1)) -> None:
    """Tunes, trains with the chosen settings, and stores what is finished after every unit.

    Args:
        part: (i, n): this call takes the i-th of n shares of the units.
    """
    scale = SCALES[preset]
    index, count = part
    for unit in units(scale)[index - 1 :: count]:
        training.store_sweeps(store, [tuning_sweep(scale, unit)], "loop")
        reported = reported_sweep(store, scale, unit)
        assert reported is not None, "store_sweeps returns when all runs are through"
        training.store_sweeps(store, [reported], "loop")
        gather(store, scale)


def gather(store: Store, scale: Scale) -> None:
    """Stores the tables of the units whose reported runs are finished."""
    sweeps = []
    for unit in units(scale):
        reported = reported_sweep(store, scale, unit)
        if reported is not None and training.collect(store, [reported]) is not None:
            sweeps.append((tuning_sweep(scale, unit), reported))
    if not sweeps:
        return
    tuned = training.collect(store, [tuning for tuning, _ in sweeps])
    found = training.collect(store, [reported for _, reported in sweeps])
    assert tuned is not None and found is not None, "only finished sweeps are listed"
    runs, curves = found
    store.write("tuned_sizes_tuning", _with_width(tuned[0])[TUNING_COLUMNS], 6)
    store.write("tuned_sizes_runs", _with_width(runs)[RUN_COLUMNS], 6)
    returns = curves[["run", "env_steps", "episode_return"]]
    for regime in REGIMES:
        part_of = returns["run"].isin(runs.loc[runs["regime"] == regime, "run"])
        if part_of.any():
            store.write(curves_table(regime), returns[part_of], 4)


def curves_table(regime: str) -> str:
    """Name of the table of a regime's learning curves."""
    return f"tuned_sizes_curves_{regime.replace('-', '_')}"


def _with_width(runs: pd.DataFrame) -> pd.DataFrame:
    """Adds ``width``, the one parameter of ``WIDTHS`` that tells a method's settings apart."""
    width = runs["sigma"].fillna(runs["clip_eps"]).fillna(runs["tau_pos"]).fillna(0.0)
    return runs.assign(width=width.round(6))


def tuning_sweep(scale: Scale, unit: Unit) -> Sweep:
    """Every method, width, size and learning rate, on the tuning seeds."""
    methods = [
        Method(objective, parameters)
        for objective in NAMES
        for parameters in WIDTHS[objective].values()
    ]
    settings = _settings(scale, unit, scale.tuning_seeds)
    runs = training.expand(
        methods=methods, ages=scale.ages, learning_rate=list(scale.learning_rates), **settings
    )
    return Sweep(_name("tune", unit), tuple(runs), {"regime": unit.regime})


def reported_sweep(store: Store, scale: Scale, unit: Unit) -> Sweep | None:
    """The runs that are reported; None while tuning is not finished."""
    tuned = training.collect(store, [tuning_sweep(scale, unit)])
    if tuned is None:
        return None
    columns = ["objective", "width", "learning_rate", "age"]
    chosen = choose(_with_width(tuned[0]))[columns].drop_duplicates()
    runs = [
        run
        for objective, width, rate, age in chosen.itertuples(index=False)
        for run in training.expand(
            methods=[Method(objective, WIDTHS[objective][width])],
            ages=[age],
            learning_rate=rate,
            **_settings(scale, unit, scale.seeds),
        )
    ]
    return Sweep(_name("report", unit), tuple(runs), {"regime": unit.regime})


def choose(tuning: pd.DataFrame) -> pd.DataFrame:
    """The setting with the highest mean area under the learning curve, by the rules of each case.

    Args:
        tuning: columns ``TUNING_COLUMNS``, any number of units.

    Returns:
        a row a unit, case, objective and size: regime, env, case, objective, age, width,
        learning_rate. Ties go to the smaller width, then to the smaller rate.
    """
    rows = []
    for (regime, env), unit in tuning.groupby(["regime", "env"], sort=False):
        # A run whose policy never finished an episode counts as the worst.
        unit = unit.assign(auc=unit["auc"].fillna(unit["auc"].min()))
        for objective, own in unit.groupby("objective", sort=False):
            papers = own[np.isclose(own["width"], PAPER[str(objective)])]
            overall = papers.groupby(["width", "learning_rate"])["auc"].mean().idxmax()
            for age, at_size in own.groupby("age"):
                best = {
                    "papers": _best(papers[papers["age"] == age]),
                    "tuned": _best(at_size),
                    "one rate": overall,
                }
                rows += [(regime, env, case, objective, age, *best[case]) for case in CASES]
    names = ["regime", "env", "case", "objective", "age", "width", "learning_rate"]
    return pd.DataFrame(rows, columns=names)


def _best(runs: pd.DataFrame) -> Any:
    return runs.groupby(["width", "learning_rate"])["auc"].mean().idxmax()


def _settings(scale: Scale, unit: Unit, seeds: range) -> dict[str, Any]:
    """What all runs of a unit share, so that they share a compiled program."""
    return {
        "task": unit.task,
        "updates": unit.task.updates[unit.regime],
        "seeds": seeds,
        "one_program": True,
        "max_buffer_size": max(scale.ages) * unit.task.block,
    }


def _name(what: str, unit: Unit) -> str:
    return f"tuned_{what} {unit.regime} {unit.task.env}".replace(" ", "_")
