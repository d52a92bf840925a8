"""Learning rates tuned for every method in every cell of a study, then runs on seeds of their own.

A unit is a task in a regime, a cell a pair of replay size and ``min_age``. All runs of a unit share
one compiled program.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import pandas as pd

from experiments import training
from experiments.store import Store
from experiments.training import Method, Program, Sweep, Task
from gipo_jax import sweep


class Unit(NamedTuple):
    """A task in a regime: what is tuned and reported together."""

    regime: str
    task: Task


class Cell(NamedTuple):
    """Data to learn from: the newest ``age`` iterations without the newest ``min_age`` of them."""

    age: int
    min_age: int = 0


@dataclasses.dataclass(frozen=True)
class Study:
    """What is tuned and reported.

    Attributes:
        name: prefix of its sweeps.
        program: what its methods share.
        methods: compared methods by label.
        cells: data to learn from.
        learning_rates: tried for every method, unit and cell; a single one is not tuned.
        tuning_seeds: seeds for that, none of them reported.
        seeds: seeds that are reported.
    """

    name: str
    program: Program
    methods: dict[str, Method]
    cells: tuple[Cell, ...]
    learning_rates: tuple[float, ...]
    tuning_seeds: range
    seeds: range


UNIT = ["regime", "env"]
"""Columns that tell units apart."""

KEYS = [*UNIT, "method", "age", "min_age"]
TUNING_COLUMNS = [*KEYS, "learning_rate", "seed", "status", "auc"]


def with_steps(task: Task, steps: int) -> Task:
    """The task with another number of steps."""
    return dataclasses.replace(task, settings=task.settings | {"total_steps": steps})


def make_sweep(
    study: Study, unit: Unit, what: str, seeds: range, rates: dict[tuple[str, Cell], list[float]]
) -> Sweep:
    """A sweep over the rates of every label and cell, with both as columns."""
    runs: list[sweep.Run] = []
    keys: dict[str, list[object]] = {"method": [], "min_age": []}
    for (label, cell), tried in rates.items():
        own = training.expand(
            unit.task,
            unit.task.updates[unit.regime],
            [study.methods[label]],
            [cell.age],
            seeds,
            program=study.program,
            learning_rate=tried,
            min_age=cell.min_age,
            max_buffer_size=max(cell.age for cell in study.cells) * unit.task.block,
        )
        runs += own
        keys["method"] += [label] * len(own)
        keys["min_age"] += [cell.min_age] * len(own)
    name = f"{study.name}_{what} {unit.regime} {unit.task.env}"
    name = name.replace(" ", "_").replace("/", "_")
    return Sweep(name, tuple(runs), {"regime": unit.regime, **keys})


def tuning_sweep(study: Study, unit: Unit) -> Sweep:
    """Every method, cell and learning rate, on the tuning seeds."""
    rates = {
        (label, cell): list(study.learning_rates) for label in study.methods for cell in study.cells
    }
    return make_sweep(study, unit, "tune", study.tuning_seeds, rates)


def reported_sweep(store: Store, study: Study, unit: Unit) -> Sweep | None:
    """Every method and cell at its best rate, on the reported seeds; None while that is unknown."""
    only = list(study.learning_rates)
    rates = {(label, cell): only for label in study.methods for cell in study.cells}
    if len(only) > 1:
        tuned = training.collect(store, [tuning_sweep(study, unit)])
        if tuned is None:
            return None
        best = best_rates(tuned[0])
        keys = zip(best["method"], best["age"], best["min_age"], strict=True)
        rates = {
            (label, Cell(int(age), int(min_age))): [float(rate)]
            for (label, age, min_age), rate in zip(keys, best["learning_rate"], strict=True)
        }
    return make_sweep(study, unit, "report", study.seeds, rates)


def best_rates(tuning: pd.DataFrame) -> pd.DataFrame:
    """The rate of the highest mean area under the learning curve, a row of ``KEYS`` each.

    A run whose policy never finished an episode counts as its unit's worst; ties go to the smaller
    rate.
    """
    worst = tuning.groupby(["regime", "env"])["auc"].transform("min")
    filled = tuning.assign(auc=tuning["auc"].fillna(worst))
    means = filled.groupby([*KEYS, "learning_rate"], sort=False)["auc"].mean().reset_index()
    means = means.sort_values("learning_rate", kind="stable")
    return means.loc[means.groupby(KEYS, sort=False)["auc"].idxmax()].sort_index()


def train(store: Store, study: Study, unit: Unit) -> None:
    """Tunes and reports a unit, unless that is done."""
    if len(study.learning_rates) > 1:
        training.store_sweeps(store, [tuning_sweep(study, unit)], "loop")
    reported = reported_sweep(store, study, unit)
    assert reported is not None, "store_sweeps returns when all runs are through"
    training.store_sweeps(store, [reported], "loop")


def run(
    store: Store,
    study: Study,
    units: list[Unit],
    part: tuple[int, int],
    table: str,
    write: Callable[[], None],
) -> None:
    """Tunes and reports a share of the units, but for those that ``table`` has.

    ``write`` stores what is finished after each.
    """
    index, count = part
    for unit in units[index - 1 :: count]:
        if (unit.regime, unit.task.env) in training.stored_units(store, table, UNIT):
            continue
        train(store, study, unit)
        write()


def gather(
    store: Store, study: Study, units: list[Unit]
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame] | None:
    """What the finished units gave.

    Returns:
        tuning runs, none where nothing was tuned, reported runs and their curves; None while no
        unit is finished.
    """
    finished = []
    for unit in units:
        reported = reported_sweep(store, study, unit)
        if reported is not None and training.collect(store, [reported]) is not None:
            finished.append((tuning_sweep(study, unit), reported))
    tuned = training.collect(store, [tuning for tuning, _ in finished])
    found = training.collect(store, [reported for _, reported in finished])
    if found is None:
        return None
    none = pd.DataFrame(columns=TUNING_COLUMNS)
    return (none if tuned is None else tuned[0][TUNING_COLUMNS]), *found


def progress(study_units: list[Unit], runs: pd.DataFrame) -> pd.DataFrame:
    """Planned units with a column ``finished``."""
    done = set(runs[["regime", "env"]].itertuples(index=False, name=None))
    rows = [
        (unit.regime, unit.task.env, (unit.regime, unit.task.env) in done) for unit in study_units
    ]
    return pd.DataFrame(rows, columns=["regime", "env", "finished"])
