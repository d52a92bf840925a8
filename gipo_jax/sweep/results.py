"""The folder a sweep writes: config.json, runs.csv, metrics.csv, params/, checkpoints/, figures/.

Numbers in the two tables are those of the algorithm alone: no wall-clock time, no host names. Two
executions of one sweep therefore give the same bytes, whatever interrupted them.
"""

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gipo_jax.config import ConfigError

FORMAT = 1
"""Version of the folder's layout; a folder of another version is refused."""

CONFIG = "config.json"
RUNS = "runs.csv"
METRICS = "metrics.csv"
PARAMS = "params"
CHECKPOINTS = "checkpoints"
FIGURES = "figures"
PROCESSES = "processes"

FINAL_PART = 0.1
"""Part of training at its end that ``final_return`` covers."""


class ResultsError(RuntimeError):
    """A results folder cannot be read or written. The message is one line."""


def read_runs(directory: str | Path) -> pd.DataFrame:
    """One row a run: settings, status and returns.

    Raises:
        ResultsError: the folder holds no sweep, or its table cannot be read.
    """
    return _read_table(Path(directory), RUNS)


def read_metrics(directory: str | Path) -> pd.DataFrame:
    """One row a run and logged point. ``run`` refers to ``read_runs``.

    Raises:
        ResultsError: the folder holds no sweep, or its table cannot be read.
    """
    return _read_table(Path(directory), METRICS)


def read_config(directory: str | Path) -> dict[str, Any]:
    """The sweep's settings and provenance, as in ``config.json``.

    Raises:
        ResultsError: no such file, damaged, or of another version.
    """
    path = Path(directory) / CONFIG
    try:
        stored = json.loads(path.read_text())
        version = stored["format"]
    except FileNotFoundError as error:
        raise ResultsError(f"{directory} holds no sweep: there is no {CONFIG} in it") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{path} cannot be read: {error}") from error
    if version != FORMAT:
        raise ResultsError(
            f"{path} has format {version}; this version of gipo_jax reads format {FORMAT}"
        )
    return stored


def _read_table(directory: Path, name: str) -> pd.DataFrame:
    read_config(directory)
    path = directory / name
    try:
        return pd.read_csv(path)
    except FileNotFoundError as error:
        raise ResultsError(f"{path} does not exist: the sweep has logged nothing yet") from error
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path} cannot be read: {error}") from error


def check_holds_sweep(directory: Path, field: str) -> None:
    """Raises ConfigError, naming the setting ``field``, where a folder holds no sweep."""
    if not (directory / CONFIG).exists():
        raise ConfigError(field, str(directory), f"a folder that holds a sweep ({CONFIG})")


def check_directory(directory: Path, resume: bool) -> None:
    """Checks that a sweep may write to a folder, without touching anything.

    Raises:
        ConfigError: it holds another sweep, holds none to resume, or cannot be written to.
    """
    if resume:
        check_holds_sweep(directory, "out")
    elif (directory / CONFIG).exists():
        raise ConfigError(
            "out", str(directory), "a folder without a sweep in it; --resume continues this one"
        )
    nearest = directory
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise ConfigError("out", str(directory), f"a folder, but {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError("out", str(directory), f"a folder with write permission on {nearest}")


def process_folders(directory: Path, count: int) -> list[Path]:
    """Where each of ``count`` processes writes; a single one has no folder of its own."""
    if count == 1:
        return [directory]
    return [directory / PROCESSES / f"{index}-of-{count}" for index in range(count)]


def write_atomic(path: Path, text: str) -> None:
    """Replaces a file as a whole: a reader, or a kill, sees the old text or the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def number(value: Any) -> str:
    """A cell: float32 in the shortest form that reads back as the same float32; NaN is empty."""
    if value is None:
        return ""
    if isinstance(value, float | np.floating):
        return "" if math.isnan(value) else str(np.float32(value))
    return str(value)


def _changed(path: Path) -> ResultsError:
    return ResultsError(f"{path} is shorter than its checkpoint says; it was changed")


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
        self.columns = list(columns)
        self._file = path.open("r+b" if size is not None else "w+b")
        if size is None:
            self._append(",".join(self.columns) + "\n")
        else:
            if self._file.seek(0, os.SEEK_END) < size:
                raise _changed(path)
            self._file.truncate(size)
            self._file.seek(size)

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes rows, one dictionary each; columns a row lacks stay empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        for row in rows:
            writer.writerow([number(row.get(name)) for name in self.columns])
        self._append(text.getvalue())

    def take(self, path: Path, size: int, runs: Iterable[int]) -> None:
        """Appends the rows of some runs from the first ``size`` bytes of another such file.

        Raises:
            ResultsError: the other file is shorter than ``size``.
        """
        with path.open("rb") as file:
            text = file.read(size)
        if len(text) < size:
            raise _changed(path)
        wanted = {str(run) for run in runs}
        rows = text.decode().splitlines(keepends=True)[1:]
        self._append("".join(row for row in rows if row.partition(",")[0] in wanted))

    def sync(self) -> int:
        """Forces rows to disk and returns the size of the file in bytes."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()

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

        ``final_return`` is the mean training return of the episodes that ended in logged points of
        the last tenth of training, NaN when none did. ``eval_return`` is that of the last point.
        """
        points = self._points.get(run, [])
        if not points:
            return {"env_steps": 0, "final_return": math.nan, "eval_return": math.nan}
        late = [p for p in points if p[0] > (1 - FINAL_PART) * num_iterations and p[3] > 0]
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


def merge_tables(paths: Sequence[Path], target: Path, keys: Sequence[str]) -> None:
    """Puts the rows of tables with equal columns into one, sorted by integer columns ``keys``.

    Cells are carried over as text, so no digit changes.
    """
    rows: list[list[str]] = []
    header: list[str] = []
    for path in paths:
        with path.open(newline="") as file:
            reader = csv.reader(file)
            header = next(reader)
            rows.extend(reader)
    order = [header.index(key) for key in keys]
    rows.sort(key=lambda row: tuple(int(row[i]) for i in order))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_atomic(target, text.getvalue())
