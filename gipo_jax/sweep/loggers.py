"""Where a sweep's logged points go besides its tables: TensorBoard, trackio, Weights & Biases."""

import contextlib
import contextvars
import importlib
import math
import secrets
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from gipo_jax.config import ConfigError
from gipo_jax.sweep import grid
from gipo_jax.sweep.grid import Run
from gipo_jax.sweep.report import Rows

MODULES = {"tensorboard": "tensorboardX", "trackio": "trackio", "wandb": "wandb"}
NAME_LENGTH = (
    100  # Characters of a run's name: file systems take 255 bytes, trackers 128 characters
)

EVENTS = "tensorboard"  # Folder of the event files in that of a sweep
_EVENT_FILE = "events.out.tfevents."

# Names of columns that say which point a row is
_PLACE = ("run", "iteration", "env_steps")


class Logger(Protocol):
    """A log callback that is closed at the end."""

    def __call__(self, rows: Rows) -> None: ...

    def close(self) -> None: ...


def check(name: str) -> None:
    """Raises ConfigError where the package of a logger is not installed."""
    try:
        importlib.import_module(MODULES[name])
    except ImportError as error:
        valid = f"a logger that is installed: pip install 'gipo_jax[{name}]'"
        raise ConfigError("log", name, valid) from error


def make(name: str, directory: Path, runs: Sequence[Run], warn: Callable[[str], None]) -> Logger:
    """The logger of a sweep in ``directory``; ``warn`` takes a line."""
    if name == "tensorboard":
        return TensorBoard(directory / EVENTS, [run.name for run in runs], warn)
    return Tracker(name, directory, runs)


def _name(run: int, name: str) -> str:
    return f"{run:05d} {name}"[:NAME_LENGTH]


class TensorBoard:
    """Callback that writes TensorBoard event files, one folder per run."""

    def __init__(self, directory: Path, names: Sequence[str], warn: Callable[[str], None]) -> None:
        self._directory, self._names, self._warn = directory, names, warn
        self._writers: dict[int, Any] = {}  # None where a run's files cannot be written

    def __call__(self, rows: Rows) -> None:
        for row in rows:
            run = int(row["run"])
            try:
                self._write(run, row)
            except OSError as error:
                self._writers[run] = None
                self._warn(f"no more TensorBoard events of run {run}: {error}")

    def _write(self, run: int, row: Mapping[str, Any]) -> None:
        from tensorboardX import SummaryWriter

        step = int(row["env_steps"])
        if run not in self._writers:
            name = _name(run, self._names[run]).replace("/", "_")
            _put_before_new_files(self._directory / name)
            # What an earlier execution wrote from here on was lost with it, and is made again.
            self._writers[run] = SummaryWriter(str(self._directory / name), purge_step=step)
        writer = self._writers[run]
        if writer is not None:
            for key, value in row.items():
                if key not in _PLACE:
                    writer.add_scalar(key, float(value), step)
            writer.flush()

    def close(self) -> None:
        """Writes what still waits in the writers' own threads."""
        for writer in self._writers.values():
            if writer is not None:
                writer.close()


def _put_before_new_files(folder: Path) -> None:
    """Renames event files that a new one, named by the clock, would not come after.

    Files are read by name, and what is purged has to come before what is made again.
    """
    now = f"{_EVENT_FILE}{time.time() - 1:010.0f}"
    files = sorted(folder.glob(f"{_EVENT_FILE}*"))
    if files and files[-1].name >= now:
        for index, file in enumerate(files):
            file.rename(folder / f"{_EVENT_FILE}{index:010d}.{len(files)}{file.suffix}")


def event_steps(directory: Path) -> dict[int, list[int]]:
    """Steps that the event files of each run show, in order, once what was purged is left out.

    Raises:
        ImportError: tensorboardX is not installed.
        ValueError: a file is damaged.
    """
    from tensorboardX.proto import event_pb2

    steps: dict[int, list[int]] = {}
    for folder in sorted(directory.iterdir()):
        shown: list[int] = []
        counted = None  # one tag of each point
        for file in sorted(folder.glob(f"{_EVENT_FILE}*")):
            data, at = file.read_bytes(), 0
            while at < len(data):
                (length,) = struct.unpack_from("<Q", data.ljust(at + 8, b"\0"), at)
                if at + 16 + length > len(data):
                    break  # a record that a kill cut off
                try:
                    event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
                except Exception as error:
                    raise ValueError(f"{file} is damaged") from error
                if event.HasField("session_log"):
                    shown = [step for step in shown if step < event.step]
                for value in event.summary.value:
                    counted = counted or value.tag
                    shown += [event.step] * (value.tag == counted)
                at += 16 + length
        steps[int(folder.name[:5])] = shown
    return steps


class Tracker:
    """Callback for trackio and Weights & Biases: a run for each run, a group for each method.

    The project has the name of the sweep's folder. A resumed sweep goes on with its runs, and the
    points that it makes again, which are the same to the bit, are not logged twice.
    """

    def __init__(self, name: str, directory: Path, runs: Sequence[Run]) -> None:
        self._name, self._directory, self._runs = name, directory, runs
        self._settings = grid.settings_of_runs(grid.encode(runs))
        self._open: dict[int, tuple[Any, int]] = {}  # with the first step that is not logged yet
        self._identity = directory / f"{name}.id"  # what tells this sweep from others of its name
        self._resume = "allow" if self._identity.exists() else "never"

    def __call__(self, rows: Rows) -> None:
        for row in rows:
            run, step = int(row["run"]), int(row["env_steps"])
            if run not in self._open:
                self._open[run] = self._start(run)
            tracked, first = self._open[run]
            if step >= first:
                values = {key: float(row[key]) for key in row if key not in _PLACE}
                shown = {key: value for key, value in values.items() if not math.isnan(value)}
                tracked.log(shown, step=step)
            if step == self._runs[run].config.total_steps:
                self._finish(run)

    def _start(self, run: int) -> tuple[Any, int]:
        """A run of the tracker, and the first step that it takes."""
        one = self._runs[run]
        if not self._identity.exists():
            self._identity.write_text(secrets.token_hex(4), encoding="utf-8")
        options: dict[str, Any] = {
            "project": self._directory.name,
            "name": _name(run, one.name),
            "group": one.name.partition(" seed=")[0],
            "config": self._settings[run],
            "resume": self._resume,
        }
        own: dict[str, Any]
        if self._name == "wandb":
            identity = self._identity.read_text(encoding="utf-8")
            own = {"id": f"{identity}-{run}", "dir": self._directory, "reinit": "create_new"}
        else:
            own = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        init = importlib.import_module(self._name).init
        with contextlib.redirect_stdout(sys.stderr):
            # trackio finishes the run that its context holds before it begins another.
            tracked = contextvars.copy_context().run(init, **options, **own)
        return tracked, tracked.step if self._name == "wandb" else tracked._next_step

    def _finish(self, run: int) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            tracked, _ = self._open.pop(run)
            tracked.finish()

    def close(self) -> None:
        """Sends what still waits."""
        for run in list(self._open):
            self._finish(run)
