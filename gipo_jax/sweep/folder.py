"""The folder of a sweep, written: all processes call it alike, and process 0 writes the text."""

import contextlib
import csv
import io
import json
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd

from gipo_jax import provenance
from gipo_jax.config import ConfigError
from gipo_jax.sweep import checkpoint, cluster, grid, lock, results
from gipo_jax.sweep.grid import Run
from gipo_jax.sweep.lock import Lock
from gipo_jax.sweep.plan import Group, Part, Progress
from gipo_jax.sweep.results import ResultsError, write_atomic


class Folder:
    """The folder of a sweep: how far the sweep is (``progress``), and its files."""

    def __init__(self, directory: Path, runs: Sequence[Run], resume: bool) -> None:
        """Checks that the folder can take the sweep, or holds it already; touches nothing."""
        results.check_directory(directory, resume)
        self.directory, self.progress = directory, Progress()
        self.latest: dict[int, float] = {}
        self.encoded = json.loads(json.dumps(grid.encode(runs)))
        self._runs, self._resume = runs, resume
        self.settings = grid.settings_of_runs(self.encoded)
        self.checkpoints = directory / results.CHECKPOINTS
        self._file: IO[bytes] | None = None
        self._lock: Lock | None = None
        self._changed = False
        self._present = checkpoint.numbers(self.checkpoints)
        if resume:
            found = grid.difference(results.read_config(directory)["groups"], self.encoded)
            if found is not None:
                name, before, now = found
                raise ConfigError(name, now, f"{before!r}, as in the sweep that {directory} holds")

    def load(self, number: int) -> None:
        """Takes over the progress of a checkpoint, 0 for none, without the states of its parts."""
        self.progress = read_progress(self.checkpoints, number)

    def load_states(self, like: list[Any]) -> None:
        """Reads the states of the started parts, for ``like`` see ``checkpoint.read_arrays``."""
        if like:
            path = self.checkpoints / f"{self.progress.number:08d}" / checkpoint.ARRAYS
            pairs = zip(self.progress.started, checkpoint.read_arrays(path, like), strict=True)
            self.progress.started = [part._replace(state=state) for part, state in pairs]

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Keeps the folder to this sweep.

        Raises:
            ConfigError: another process writes to it, or has since ``self`` was made.
        """
        if not cluster.is_main_process():
            yield
            return
        with lock.hold(self.directory) as held:
            results.check_directory(self.directory, self._resume)
            if checkpoint.numbers(self.checkpoints) != self._present:
                valid = "a folder that no other process has changed since this one began"
                raise ConfigError("out", str(self.directory), valid)
            self._lock = held
            yield

    def open(self, metrics: Sequence[str], options: Mapping[str, Any]) -> None:
        """Begins to write tables of these metrics; options are for the record."""
        self._saved_at = time.monotonic()
        if not cluster.is_main_process():
            return
        self._columns = list(dict.fromkeys(["run", "iteration", "env_steps", *metrics]))
        here: dict[str, Any] = {
            "command": shlex.join(sys.argv),
            "provenance": provenance.describe(),
            "options": options,
        }
        if not self._resume:
            config = {"format": results.FORMAT, **here, "resumed": [], "metrics": self._columns}
            config |= {"groups": self.encoded}
        else:
            config = results.read_config(self.directory)
            self._columns = config["metrics"]
            # Where versions or devices changed, numbers may have too.
            if here["provenance"] != [config, *config["resumed"]][-1]["provenance"]:
                config["resumed"].append(here)
        write_atomic(self.directory / results.CONFIG, json.dumps(config, indent=1) + "\n")
        path, size = self.directory / results.METRICS, self.progress.metrics_bytes
        if size is None:
            write_atomic(path, ",".join(self._columns) + "\n")
        elif path.stat().st_size < size:
            raise ResultsError(f"{path} is shorter than its checkpoint says; it was changed")
        else:
            os.truncate(path, size)
        self._file = path.open("ab")
        self._write_runs()

    def add(
        self, group: Group, runs: Sequence[int], iteration: int, metrics: Mapping[str, np.ndarray]
    ) -> list[dict[str, Any]]:
        """Writes a logged point of runs, metrics ``[width]`` by name, and returns its rows."""
        at = {"iteration": iteration, "env_steps": iteration * group.domain.config.block_size}
        rows = [
            {"run": run} | at | {name: values[lane] for name, values in metrics.items()}
            for lane, run in enumerate(runs)
        ]
        self._changed = True
        self.latest |= {row["run"]: float(row.get("episode_return", math.nan)) for row in rows}
        if self._file is not None:
            self._check_lock()
            self._file.write(_csv(self._columns, rows).encode())
            self._file.flush()
        return rows

    def add_diverged(self, runs: Sequence[int], diverged_at: np.ndarray) -> list[int]:
        """Notes runs that diverged, iteration ``[width]`` or -1, and returns the new ones."""
        found = dict(zip(runs, diverged_at.tolist(), strict=False))
        new = [run for run in runs if found[run] >= 0 and run not in self.progress.diverged]
        self.progress.diverged |= {run: found[run] for run in new}
        return new

    def take_up(self, part: Part) -> Part:
        """Moves a part into training: checkpoints no longer hold it as one that waits."""
        self.progress.started = [p for p in self.progress.started if p is not part]
        return part

    def finish(self, runs: Sequence[int], acting: Any) -> None:
        """Writes what runs that have finished act with; see ``Domain.acting``."""
        folder = self.directory / results.PARAMS
        temporary = folder / f"{runs[0]:06d}.tmp"
        if cluster.is_main_process():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        checkpoint.write_arrays(temporary / checkpoint.ARRAYS, acting)
        if cluster.is_main_process():
            (temporary / results.MEMBERS).write_text(json.dumps(list(runs)), encoding="utf-8")
            checkpoint.seal(temporary)
            shutil.rmtree(temporary.with_suffix(""), ignore_errors=True)
            temporary.replace(temporary.with_suffix(""))
        self.progress.finished += runs

    def seconds_unsaved(self) -> float:
        """Time since the last checkpoint; -1 where there is nothing new to save."""
        return time.monotonic() - self._saved_at if self._changed else -1.0

    def save(self, training: Part | None = None) -> None:
        """Makes a checkpoint of everything, with the state of the part that is in training."""
        self._check_lock()
        progress = self.progress
        parts = ([training] if training is not None else []) + progress.started
        if self._file is not None:
            os.fsync(self._file.fileno())
            progress.metrics_bytes = self._file.tell()
        progress.number += 1
        stored = {
            "finished": progress.finished,
            "diverged": progress.diverged,
            "metrics_bytes": progress.metrics_bytes,
            "started": [{"runs": part.runs, "point": part.point} for part in parts],
        }
        states = [part.state for part in parts]
        checkpoint.save(self.checkpoints, progress.number, stored, states or None)
        self._saved_at, self._changed = time.monotonic(), False
        if self._file is not None:
            self._write_runs()

    def close(self) -> None:
        """Saves, and sorts metrics.csv by run, in whatever order runs were trained."""
        self.save()
        if self._file is not None:
            self._file.close()
            path = self.directory / results.METRICS
            header, *rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
            rows.sort(key=lambda row: [int(cell) for cell in row.split(",", 2)[:2]])
            write_atomic(path, header + "".join(rows))

    def _check_lock(self) -> None:
        if self._lock is not None:
            self._lock.check()

    def _write_runs(self) -> None:
        """Writes runs.csv from the settings, the progress and metrics.csv."""
        sizes = [(run.config.num_iterations, run.config.block_size) for run in self._runs]
        metrics = self.directory / results.METRICS
        text = runs_table(self.settings, sizes, self.progress, metrics)
        write_atomic(self.directory / results.RUNS, text)


def read_progress(checkpoints: Path, number: int) -> Progress:
    """The progress in a whole checkpoint, 0 for none, without the states of its parts."""
    if not number:
        return Progress()
    stored = checkpoint.read_progress(checkpoints / f"{number:08d}")
    stored["diverged"] = {int(run): at for run, at in stored["diverged"].items()}
    started = [Part(tuple(p["runs"]), p["point"], None) for p in stored["started"]]
    return Progress(number, **stored | {"started": started})


def runs_table(
    settings: Sequence[Mapping[str, Any]],
    sizes: Sequence[tuple[int, int]],
    progress: Progress,
    metrics: Path | IO[str],
) -> str:
    """The text of runs.csv.

    Args:
        settings: all settings of each run.
        sizes: iterations, and transitions of an iteration, of each run.
        progress: how far the sweep is.
        metrics: metrics.csv.
    """
    finished, rows = set(progress.finished), []
    for run, summary in enumerate(summaries(metrics, [iterations for iterations, _ in sizes])):
        status = "running" if summary["env_steps"] else "waiting"
        row = {**settings[run], **summary, "run": run}
        row["status"] = "done" if run in finished else status
        if run in progress.diverged:
            row |= {"status": "diverged", "diverged_step": progress.diverged[run] * sizes[run][1]}
        rows.append(row)
    columns = _run_columns(settings)
    return ",".join(columns) + "\n" + _csv(columns, rows)


def _cell(value: Any) -> str:
    """A cell: float32 in the shortest form that reads back as the same float32; NaN is empty."""
    if value is None:
        return ""
    if isinstance(value, float | np.floating):
        return "" if math.isnan(value) else str(np.float32(value))
    return str(value)


def _csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Lines of a CSV table; columns that a row lacks stay empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([_cell(row.get(name)) for name in columns] for row in rows)
    return text.getvalue()


def _run_columns(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns of runs.csv: those always there, then other settings that differ between runs."""
    names = dict.fromkeys(name for run in settings for name in run)
    varying = [n for n in names if len({run[n] for run in settings if n in run}) > 1]
    first = ("run", "env", "objective", "sigma", "sigma_neg_ratio", "buffer_size", "seed")
    last = ("status", "diverged_step", "env_steps", "final_return", "eval_return")
    return [*first, *(name for name in varying if name not in first), *last]


def summaries(metrics: Path | IO[str], iterations: Sequence[int]) -> list[dict[Any, Any]]:
    """``env_steps``, ``final_return`` and ``eval_return`` of every run so far.

    ``final_return`` is the mean training return of the episodes that ended in the last logged
    points, as many as cover at least a tenth of training; NaN when none ended there, or one of them
    is NaN.
    """
    floats = ["episode_return", "episodes", "eval_return"]
    wanted = ["run", "iteration", "env_steps", *floats]
    table = pd.read_csv(metrics, usecols=lambda name: name in wanted).reindex(columns=wanted)
    table[floats] = table[floats].astype(np.float32).astype(float)
    late = 10 * table["iteration"] > 9 * np.asarray(iterations)[table["run"]]
    ended = table[late & (table["episodes"] > 0)]
    returned = ended["episode_return"] * ended["episodes"]
    sums = returned.groupby(ended["run"]).sum()
    # A sum leaves NaN out, and a return that is no number would count as 0.
    sums = sums.mask(returned.isna().groupby(ended["run"]).any())
    last = table.groupby("run").tail(1).set_index("run")[["env_steps", "eval_return"]]
    last["final_return"] = sums / ended.groupby("run")["episodes"].sum()
    last = last.reindex(range(len(iterations)))
    last["env_steps"] = last["env_steps"].fillna(0).astype(int)
    return last.to_dict("records")
