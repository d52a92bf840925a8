"""The folder of a sweep, written: tables, final parameters, checkpoints.

All processes hold the same ``Folder`` and call it alike. Arrays are written by all together, the
rest by process 0.
"""

import csv
import dataclasses
import io
import json
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gipo_jax import provenance
from gipo_jax.config import ConfigError
from gipo_jax.sweep import checkpoint, cluster, grid, results
from gipo_jax.sweep.grid import Run
from gipo_jax.sweep.plan import Group, Part
from gipo_jax.sweep.results import ResultsError, write_atomic


@dataclasses.dataclass
class Progress:
    """What a checkpoint says of a sweep, beside the arrays.

    Attributes:
        number: of the newest checkpoint, 0 where there is none.
        finished: indices of the runs that are through.
        diverged: iteration in which runs diverged, by index.
        started: parts in the middle of training.
        metrics_bytes: size of metrics.csv; None for a new file.
    """

    number: int = 0
    finished: list[int] = dataclasses.field(default_factory=list)
    diverged: dict[int, int] = dataclasses.field(default_factory=dict)
    started: list[Part] = dataclasses.field(default_factory=list)
    metrics_bytes: int | None = None


class Folder:
    """The folder of a sweep.

    Attributes:
        directory: where it is.
        progress: how far the sweep is.
        returns: of every run so far; in process 0 only.
    """

    def __init__(self, directory: Path, runs: Sequence[Run], resume: bool) -> None:
        """Checks that the folder can take the sweep; touches nothing.

        Args:
            directory: where it is.
            runs: of the sweep.
            resume: whether the folder holds this sweep already, or no sweep.

        Raises:
            ConfigError: it holds another sweep, holds none to resume, or cannot be written to.
            ResultsError: it is of another version.
        """
        results.check_directory(directory, resume)
        self.directory, self.progress, self.returns = directory, Progress(), Returns()
        self.encoded = json.loads(json.dumps(grid.encode(runs)))
        self._runs, self._resume = runs, resume
        self._settings = [grid.described(run) for run in runs]
        self._file: MetricsFile | None = None
        self._changed = False
        if resume:
            found = grid.difference(results.read_config(directory)["groups"], self.encoded)
            if found is not None:
                name, before, now = found
                raise ConfigError(name, now, f"{before!r}, as in the sweep that {directory} holds")

    def newest_checkpoint(self) -> int:
        """Number of the newest checkpoint that is whole, 0 where there is none.

        Raises:
            checkpoint.CheckpointError: all are damaged.
        """

        def warn(text: str) -> None:
            print(text, file=sys.stderr)

        return checkpoint.newest(self._checkpoints, warn) or 0 if self._resume else 0

    def load(self, number: int) -> None:
        """Takes over the progress of a checkpoint; the states of started parts stay where they are.

        Args:
            number: of the checkpoint, 0 for none.

        Raises:
            checkpoint.CheckpointError: it is of another version.
        """
        if number:
            stored = checkpoint.read_progress(self._checkpoints / f"{number:08d}")
            self.progress = Progress(
                number,
                stored["finished"],
                {int(run): iteration for run, iteration in stored["diverged"].items()},
                [Part(tuple(part["runs"]), part["point"], None) for part in stored["started"]],
                stored["metrics_bytes"],
            )

    def load_states(self, like: Sequence[Any]) -> None:
        """Reads the states of the started parts; all processes call it together.

        Args:
            like: shapes, types and places of each, see ``checkpoint.read_arrays``.

        Raises:
            checkpoint.CheckpointError: they cannot be read or do not fit.
        """
        if like:
            path = self._checkpoints / f"{self.progress.number:08d}" / checkpoint.ARRAYS
            states = checkpoint.read_arrays(path, list(like))
            self.progress.started = [
                part._replace(state=state)
                for part, state in zip(self.progress.started, states, strict=True)
            ]

    def open(self, metrics: Sequence[str], options: Mapping[str, Any]) -> None:
        """Begins to write.

        Args:
            metrics: names of the metrics of a logged point.
            options: how the sweep is executed, for the record.
        """
        self._saved_at = time.monotonic()
        if not cluster.is_first():
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        columns = list(dict.fromkeys(["run", "iteration", "env_steps", *metrics]))
        here: dict[str, Any] = {
            "command": shlex.join(sys.argv),
            "provenance": provenance.describe(),
            "options": options,
        }
        if not self._resume:
            config = {"format": results.FORMAT, **here, "resumed": [], "metrics": columns}
            config |= {"groups": self.encoded}
        else:
            config = results.read_config(self.directory)
            columns = config["metrics"]
            # Where versions or devices changed, numbers may have too.
            if here["provenance"] != [config, *config["resumed"]][-1]["provenance"]:
                config["resumed"].append(here)
        write_atomic(self.directory / results.CONFIG, json.dumps(config, indent=1) + "\n")
        path = self.directory / results.METRICS
        self._file = MetricsFile(path, columns, self.progress.metrics_bytes)
        self.returns.load(path)
        self._write_runs()

    def add(
        self,
        group: Group,
        runs: Sequence[int],
        iteration: int,
        metrics: Mapping[str, np.ndarray],
    ) -> list[dict[str, Any]]:
        """Writes a logged point of some runs of a group.

        Args:
            group: the group.
            runs: their indices.
            iteration: iterations made.
            metrics: ``[width]`` by name.

        Returns:
            the rows written.
        """
        at = {"iteration": iteration, "env_steps": iteration * group.algorithm.config.block_size}
        rows = [
            {"run": run} | at | {name: values[lane] for name, values in metrics.items()}
            for lane, run in enumerate(runs)
        ]
        self._changed = True
        if self._file is not None:
            self._file.add(rows)
            self.returns.add(rows)
        return rows

    def add_diverged(self, runs: Sequence[int], diverged_at: np.ndarray) -> list[int]:
        """Takes note of runs that diverged, iteration ``[width]`` or -1; returns the new ones."""
        found = dict(zip(runs, diverged_at.tolist(), strict=False))
        new = [run for run in runs if found[run] >= 0 and run not in self.progress.diverged]
        self.progress.diverged |= {run: found[run] for run in new}
        return new

    def take_up(self, part: Part) -> Part:
        """A part goes into training: checkpoints no longer hold it as one that waits."""
        self.progress.started = [p for p in self.progress.started if p is not part]
        return part

    def finish(self, runs: Sequence[int], state: Any) -> None:
        """Writes the final parameters of runs; all processes call it together."""
        folder = self.directory / results.PARAMS
        temporary = folder / f"{runs[0]:06d}.tmp"
        if cluster.is_first():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        kept = {"params": state.learner.params, "normalizer": state.normalizer}
        checkpoint.write_arrays(temporary / checkpoint.ARRAYS, kept)
        if cluster.is_first():
            (temporary / "runs.json").write_text(json.dumps(list(runs)))
            shutil.rmtree(temporary.with_suffix(""), ignore_errors=True)
            temporary.replace(temporary.with_suffix(""))
        self.progress.finished += runs

    def seconds_unsaved(self) -> float:
        """Time since the last checkpoint; -1 where there is nothing new to save."""
        return time.monotonic() - self._saved_at if self._changed else -1.0

    def save(self, training: Part | None = None) -> None:
        """Makes a checkpoint of everything; all processes call it together.

        Args:
            training: the part that is in training, with its state.
        """
        progress = self.progress
        parts = ([training] if training is not None else []) + progress.started
        if self._file is not None:
            progress.metrics_bytes = self._file.sync()
        progress.number += 1
        stored = {
            "finished": progress.finished,
            "diverged": progress.diverged,
            "metrics_bytes": progress.metrics_bytes,
            "started": [{"runs": part.runs, "point": part.point} for part in parts],
        }
        states = [part.state for part in parts]
        checkpoint.save(self._checkpoints, progress.number, stored, states or None)
        self._saved_at, self._changed = time.monotonic(), False
        if self._file is not None:
            self._write_runs()

    def close(self) -> None:
        """Saves, and sorts metrics.csv by run: in whatever order runs were trained."""
        self.save()
        if self._file is not None:
            self._file.sort()

    @property
    def _checkpoints(self) -> Path:
        return self.directory / results.CHECKPOINTS

    def _write_runs(self) -> None:
        finished = set(self.progress.finished)
        rows = []
        for index, (run, settings) in enumerate(zip(self._runs, self._settings, strict=True)):
            summary = self.returns.summary(index, run.config.num_iterations)
            status = (
                "done" if index in finished else "running" if summary["env_steps"] else "waiting"
            )
            diverged = self.progress.diverged.get(index)
            rows.append(
                settings
                | {"run": index, "status": status if diverged is None else "diverged"}
                | {"diverged_step": diverged and diverged * run.config.block_size}
                | summary
            )
        text = table_text(run_columns(self._settings), rows)
        write_atomic(self.directory / results.RUNS, text)


def number(value: Any) -> str:
    """A cell: float32 in the shortest form that reads back as the same float32; NaN is empty."""
    if value is None:
        return ""
    if isinstance(value, float | np.floating):
        return "" if math.isnan(value) else str(np.float32(value))
    return str(value)


class MetricsFile:
    """Appends rows to metrics.csv, and knows how many bytes of it a checkpoint covers."""

    def __init__(self, path: Path, columns: Sequence[str], size: int | None) -> None:
        """Opens the file.

        Args:
            path: the file.
            columns: names, of which the first are ``run``, ``iteration`` and ``env_steps``.
            size: bytes to keep of what is there; None starts anew.

        Raises:
            ResultsError: the file is shorter than ``size``.
        """
        self.columns, self._path = list(columns), path
        self._file = path.open("r+b" if size is not None else "w+b")
        if size is None:
            self._append(",".join(self.columns) + "\n")
        else:
            if self._file.seek(0, os.SEEK_END) < size:
                raise ResultsError(f"{path} is shorter than its checkpoint says; it was changed")
            self._file.truncate(size)
            self._file.seek(size)

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes rows, one dictionary each; columns a row lacks stay empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        for row in rows:
            writer.writerow([number(row.get(name)) for name in self.columns])
        self._append(text.getvalue())

    def sync(self) -> int:
        """Forces rows to disk and returns the size of the file in bytes."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def sort(self) -> None:
        """Sorts rows by run and iteration, and closes the file."""
        self._file.close()
        header, *rows = self._path.read_text().splitlines(keepends=True)
        rows.sort(key=lambda row: [int(cell) for cell in row.split(",", 2)[:2]])
        write_atomic(self._path, header + "".join(rows))

    def _append(self, text: str) -> None:
        self._file.write(text.encode())
        self._file.flush()


class Returns:
    """Returns of every run so far, for the summary in runs.csv."""

    columns = ("run", "iteration", "env_steps", "episode_return", "episodes", "eval_return")

    def __init__(self) -> None:
        self._points: dict[int, list[tuple[float, ...]]] = {}

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            point = tuple(float(row.get(name, math.nan)) for name in self.columns[1:])
            self._points.setdefault(int(row["run"]), []).append(point)

    def load(self, path: Path) -> None:
        """Takes in the rows of an existing metrics.csv."""
        table = pd.read_csv(path)
        present = [name for name in self.columns if name in table]
        single = table[present].astype(dict.fromkeys(present[3:], np.float32))
        self.add(dict(zip(present, row, strict=True)) for row in single.itertuples(index=False))

    def summary(self, run: int, num_iterations: int) -> dict[str, float]:
        """``env_steps``, ``final_return`` and ``eval_return`` of a run.

        ``final_return`` is the mean training return of the episodes that ended in the last logged
        points, as many as cover at least a tenth of training; NaN when none ended there.
        ``eval_return`` is that of the last point.
        """
        points = self._points.get(run, [])
        if not points:
            return {"env_steps": 0, "final_return": math.nan, "eval_return": math.nan}
        late = [p for p in points if 10 * p[0] > 9 * num_iterations and p[3] > 0]
        episodes = sum(p[3] for p in late)
        final = sum(p[2] * p[3] for p in late) / episodes if episodes else math.nan
        return {
            "env_steps": int(points[-1][1]),
            "final_return": final,
            "eval_return": points[-1][4],
        }

    def latest(self, runs: Iterable[int]) -> list[float]:
        """Newest training returns of runs, where there is one."""
        values = (self._points[run][-1][2] for run in runs if run in self._points)
        return [value for value in values if not math.isnan(value)]


def run_columns(described: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns of runs.csv: those always there, then other settings that differ between runs."""
    values: dict[str, set[Any]] = {}
    for settings in described:
        for name, value in settings.items():
            values.setdefault(name, set()).add(value)
    varying = [name for name, found in values.items() if len(found) > 1]
    first = ("run", "env", "objective", "sigma", "sigma_neg_ratio", "buffer_size", "seed")
    last = ("status", "diverged_step", "env_steps", "final_return", "eval_return")
    return [*first, *(name for name in varying if name not in first), *last]


def table_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """A CSV table of rows."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([number(row.get(name)) for name in columns] for row in rows)
    return text.getvalue()
