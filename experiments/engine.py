"""Runs any study of the table: tunes, trains, and stores what is finished.

A sweep is kept under OUT/sweeps and continued when interrupted. What a study has stored of a part
is not trained again, so that it also goes on where its sweeps are not, from its tables alone.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from gipo_jax import objectives, sweep
from gipo_jax.sweep import results

from .store import DataError, Store
from .tasks import COMMON, Cell, Method, Part, Scale, Task

Tables = dict[str, pd.DataFrame]

CURVES = (
    *("episode_return", "ess", "ess_new", "ess_old", "near_zero_fraction"),
    *("near_zero_fraction_new", "near_zero_fraction_old", "old_share", "log_ratio_abs_p95"),
    *("policy_age", "success_rate"),
)
"""Columns of metrics.csv kept in thinned curves, where a task has them."""


class Sweep(NamedTuple):
    """A sweep to train.

    Attributes:
        name: folder under OUT/sweeps.
        runs: what is trained.
        keys: columns that its rows of a table get; a list has a value a run.
    """

    name: str
    runs: tuple[sweep.Run, ...]
    keys: dict[str, Any]


class Trained(NamedTuple):
    """A finished sweep.

    Attributes:
        item: the sweep.
        runs: a row a run, with ``auc``, the mean of its learning curve, ``age`` and the keys.
        metrics: a row a run and logged point.
    """

    item: Sweep
    runs: pd.DataFrame
    metrics: pd.DataFrame


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A row of the table of studies.

    Attributes:
        name: as the command line has it.
        question: what it asks, one line.
        scores: its numbers, from its stored tables.
        presets: size of the study by preset.
        methods: compared methods.
        program: objective that all methods share, so that they compile once (``switch``).
        parts: what is tuned and trained together, of a grid.
        sweeps: the sweeps of what is no grid.
        folders: prefixes of the names of the sweeps that tune and report.
        batch_mode: how the runs of a sweep share the device.
        score: metric whose learning curve gives ``auc``, by which rates are tuned.
        choose: tuning runs and their part -> what is reported, instead of ``best_rates``.
        by: columns of the stored tables that tell parts apart.
        table: the reported runs; its rows say which parts are finished.
        columns: columns of it, by default all; and of the table of the runs that tuned.
        curves: columns of the stored learning curves.
        curves_by_regime: whether these are a table for each regime.
        digits: significant digits of tables and of curves.
        progress: whether a table says which parts are finished.
        extend: a finished sweep -> its runs with further columns.
        tables: a finished sweep -> its tables, instead of those above.
        measure: computes what needs no training, from store and preset.
        runs_of: the study whose runs it shares.
        check: raises ConfigError where the study cannot run here.
    """

    name: str
    question: str
    scores: Callable[[Store], Tables]
    presets: dict[str, Any] = dataclasses.field(default_factory=dict)
    methods: tuple[Method, ...] = ()
    program: Any = None
    parts: "Callable[[Study, Any], list[Part]] | None" = None
    sweeps: Callable[[Any], "list[Sweep]"] | None = None
    folders: tuple[str, str] = ("", "")
    batch_mode: str = "loop"
    score: str = "episode_return"
    choose: Callable[[pd.DataFrame, Part], "list[Arm]"] | None = None
    by: tuple[str, ...] = ("regime", "env")
    table: str = ""
    columns: tuple[tuple[str, ...], ...] = ((), ())
    curves: tuple[str, ...] = ()
    curves_by_regime: bool = True
    digits: tuple[int, int] = (6, 4)
    progress: bool = False
    extend: "Callable[[Trained], pd.DataFrame] | None" = None
    tables: "Callable[[Trained], Tables] | None" = None
    measure: Callable[[Store, str], None] | None = None
    runs_of: "Study | None" = None
    check: Callable[[], None] | None = None


class Arm(NamedTuple):
    """A method on a cell, with the learning rates that it is run at; none for the default."""

    method: Method
    cell: Cell
    rates: tuple[float, ...]


def expand(
    task: Task, updates: int, arm: Arm, seeds: range, program: Any = None, **settings: Any
) -> list[sweep.Run]:
    """Runs of a method on a task, at the cell and the rates of an arm."""
    objective, own = arm.method.objective, arm.method.parameters
    if program is not None:
        own = own | {"which": float(program.names.index(objective))}
        objective = program
    if arm.rates:
        settings["learning_rate"] = list(arm.rates)
    return sweep.expand(
        **COMMON | task.settings | settings,
        env=task.env,
        objective=objective,
        objective_args=own,
        updates_per_iteration=updates,
        buffer_size=arm.cell.age * task.block,
        min_age=arm.cell.min_age,
        seeds=len(seeds),
        seed_offset=seeds.start,
    )


def grid(
    study: Study, scale: Scale, part: Part, prefix: str, seeds: range, arms: Sequence[Arm]
) -> Sweep:
    """The sweep of the arms of a part."""
    runs: list[sweep.Run] = []
    keys: dict[str, Any] = part.keys | {"method": [], "min_age": []}
    longest = max(cell.age for cell in (*part.cells, *scale.tuning_cells))
    for task in part.tasks:
        steps = int(task.settings["total_steps"] * scale.steps) // task.block * task.block
        settings = part.settings | {"total_steps": steps}
        if study.program is not None:
            # The same allocation in all sweeps of a task makes the same program.
            settings["max_buffer_size"] = longest * task.block
        for arm in arms:
            updates = task.updates[part.regime]
            own = expand(task, updates, arm, seeds, study.program, **settings)
            runs += own
            keys["method"] += [arm.method.label] * len(own)
            keys["min_age"] += [arm.cell.min_age] * len(own)
    name = part.folder.format(prefix).replace(" ", "_").replace("/", "_")
    return Sweep(name, tuple(runs), keys)


def tuning_sweep(study: Study, scale: Scale, part: Part) -> Sweep | None:
    """Every method, cell and rate on the tuning seeds; None where there is nothing to tune."""
    if len(scale.rates) < 2 or not scale.tuning_seeds:
        return None
    cells = scale.tuning_cells or part.cells
    arms = [Arm(method, cell, scale.rates) for method in part.methods for cell in cells]
    return grid(study, scale, part, study.folders[0], scale.tuning_seeds, arms)


def reported_sweep(study: Study, scale: Scale, part: Part, tuned: pd.DataFrame | None) -> Sweep:
    """Every method and cell on the reported seeds, at the best rate where rates were tuned."""
    if tuned is None:
        arms = [Arm(method, cell, scale.rates) for method in part.methods for cell in part.cells]
    elif study.choose is not None:
        arms = study.choose(tuned, part)
    else:
        best = best_rates(tuned).set_index(["method", "age", "min_age"])["learning_rate"].to_dict()
        arms = [
            Arm(method, cell, (float(best[method.label, *tuned_at]),))
            for method in part.methods
            for cell in part.cells
            for tuned_at in [scale.tuning_cells[0] if scale.tuning_cells else cell]
        ]
    return grid(study, scale, part, study.folders[1], scale.seeds, arms)


KEYS = ["regime", "env", "method", "age", "min_age"]
"""Columns that tell a method on a cell from others."""


def best_rates(tuned: pd.DataFrame) -> pd.DataFrame:
    """The rate of the highest mean area under the learning curve, a row of ``KEYS`` each.

    A run whose policy never finished an episode counts as its unit's worst; ties go to the smaller
    rate.
    """
    worst = tuned.groupby(["regime", "env"])["auc"].transform("min")
    filled = tuned.assign(auc=tuned["auc"].fillna(worst))
    means = filled.groupby([*KEYS, "learning_rate"], sort=False)["auc"].mean().reset_index()
    means = means.sort_values("learning_rate", kind="stable")
    return means.loc[means.groupby(KEYS, sort=False)["auc"].idxmax()].sort_index()


def run(study: Study, store: Store, preset: str, share: tuple[int, int] = (1, 1)) -> None:
    """Computes, or tunes and trains, what is not stored yet; stores each part when it is finished.

    Args:
        share: (i, n): this call takes the i-th of n shares of the parts.
    """
    if study.runs_of is not None:
        return run(study.runs_of, store.of(study.runs_of.name), preset, share)
    index, count = share
    if study.measure is not None and index == 1:
        study.measure(store, preset)
    if study.sweeps is not None:
        for item in study.sweeps(study.presets[preset])[index - 1 :: count]:
            if not is_stored(study, store, [tuple(item.keys[name] for name in study.by)]):
                write(study, store, _tables(study, train(study, store, item)))
    if study.parts is not None:
        scale = study.presets[preset]
        parts = study.parts(study, scale)
        for part in parts[index - 1 :: count]:
            if not is_stored(study, store, _marks(study, part)):
                _run_part(study, store, scale, part)
                if study.progress:
                    done = [is_stored(study, store, _marks(study, part)) for part in parts]
                    planned = pd.DataFrame([part.keys for part in parts]).assign(finished=done)
                    store.write(f"{study.name}_units", planned)
    return None


def _run_part(study: Study, store: Store, scale: Scale, part: Part) -> None:
    tables: Tables = {}
    first, tuned = tuning_sweep(study, scale, part), None
    if first is not None:
        found = train(study, store, first)
        tuned = found.runs
        extended = study.extend(found) if study.extend else tuned
        tables[f"{study.name}_tuning"] = _columns(extended, study.columns[1])
    reported = reported_sweep(study, scale, part, tuned)
    tables |= _tables(study, train(study, store, reported))
    write(study, store, tables)


def _marks(study: Study, part: Part) -> list[tuple[Any, ...]]:
    """What the rows of a part have in the columns ``study.by``; its cells where it is the lag."""
    return [
        tuple(cell.min_age if name == "lag" else part.keys[name] for name in study.by)
        for cell in part.cells
    ]


def is_stored(study: Study, store: Store, marks: list[tuple[Any, ...]]) -> bool:
    """Whether the stored table of the reported runs has rows of all marks."""
    stored = store.stored(study.table or f"{study.name}_runs")
    if stored is None:
        return False
    return set(marks) <= set(stored[list(study.by)].itertuples(index=False, name=None))


def train(study: Study, store: Store, item: Sweep) -> Trained:
    """Trains a sweep, unless that is done.

    Raises:
        DataError: its folder holds another sweep.
    """
    directory = store.out / "sweeps" / item.name
    exists = (directory / results.CONFIG).exists()
    if exists and _is_finished(directory, item):
        return read(directory, item, study.score)
    print(f"  sweep {item.name}: {len(item.runs)} runs", flush=True)
    sweep.run(item.runs, directory, sweep.Options(batch_mode=study.batch_mode), resume=exists)
    return read(directory, item, study.score)


def _is_finished(directory: Path, item: Sweep) -> bool:
    try:
        runs = results.read_runs(directory)
    except results.ResultsError:
        return False
    # Rows are told apart by their place, which an earlier version may have given to other runs.
    places = [(run.hparams.seed, run.hparams.buffer_size) for run in item.runs]
    if places != list(zip(runs["seed"], runs["buffer_size"], strict=True)):
        raise DataError(directory, "holds another sweep; give another --out")
    return bool(runs["status"].isin(["done", "diverged"]).all())


def read(directory: Path, item: Sweep, score: str = "episode_return") -> Trained:
    """The runs of a finished sweep, with scores and the settings that tell them apart.

    Fresh episodes, where they are the score, also give the final one: the last tenth of points.
    """
    runs, metrics = results.read_runs(directory), results.read_metrics(directory)
    returns = metrics.groupby("run")[score]
    runs["auc"] = runs["run"].map(returns.mean())
    if score != "episode_return":
        late = metrics[metrics["env_steps"] > 0.9 * metrics["env_steps"].max()]
        runs["final_return"] = runs["run"].map(late.groupby("run")[score].mean())
    # No episode ended in the last logged points: the newest that did counts.
    runs["final_return"] = runs["final_return"].fillna(runs["run"].map(returns.last()))
    runs["age"] = runs["buffer_size"] // np.array([run.config.block_size for run in item.runs])
    names = getattr(item.runs[0].config.objective, "names", ())
    if names:
        # The shared program takes every parameter; a method has only its own.
        given = pd.DataFrame([run.hparams.objective_params for run in item.runs], dtype=float)
        runs["objective"] = [names[int(index)] for index in given.pop("which")]
        for name in given:
            owners = [method for method in names if name in objectives.spec(method).params]
            runs[name] = given[name].where(runs["objective"].isin(owners))
    runs["learning_rate"] = [float(run.hparams.learning_rate) for run in item.runs]
    runs = runs.assign(**item.keys).drop(columns=["eval_return", "which"], errors="ignore")
    return Trained(item, runs, metrics)


def _tables(study: Study, found: Trained) -> Tables:
    """The tables of a finished sweep."""
    if study.tables is not None:
        return study.tables(found)
    runs = study.extend(found) if study.extend else found.runs
    tables = {study.table or f"{study.name}_runs": _columns(runs, study.columns[0])}
    if study.curves:
        name, regime = f"{study.name}_curves", found.item.keys["regime"]
        # A file a regime: together they would be too large for a repository.
        name += f"_{regime.replace('-', '_')}" if study.curves_by_regime else ""
        kept = [column for column in study.curves if column in found.metrics]
        tables[name] = found.metrics[["run", "env_steps", *kept]]
    return tables


def _columns(runs: pd.DataFrame, columns: tuple[str, ...]) -> pd.DataFrame:
    return (
        runs[list(columns)]
        if columns
        else runs.drop(columns=["method", "min_age"], errors="ignore")
    )


def write(study: Study, store: Store, tables: Tables) -> None:
    """Stores tables of a finished part; what is stored of other parts stays.

    Curves have no column of ``study.by``: their ``run`` refers to that of the table before them.
    """
    shift, kept = 0, pd.Series(dtype=int)
    for name, fresh in tables.items():
        by = [column for column in study.by if column in fresh]
        stored, curves = store.stored(name), "run" in fresh and bool(study.by) and not by
        if stored is not None and curves:
            stored = stored[stored["run"].isin(kept)]
        elif not by:
            stored = None
        elif stored is not None:
            keys = [pd.MultiIndex.from_frame(frame[by]) for frame in (stored, fresh)]
            stored = stored[~keys[0].isin(keys[1])]
        if "run" in fresh:
            if not curves:
                kept = pd.Series(dtype=int) if stored is None else stored["run"]
                shift = 0 if kept.empty else int(kept.max()) + 1
            fresh = fresh.assign(run=fresh["run"] + shift)
        if stored is not None and not stored.empty:
            fresh = pd.concat([stored, fresh], ignore_index=True)
        store.write(name, fresh, study.digits[curves or name.endswith("_curves")])
