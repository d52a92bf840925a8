"""Where a sweep's logged points go besides its tables: TensorBoard, trackio, Weights & Biases."""

import contextlib
import contextvars
import importlib
import math
import secrets
import sys
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
        return TensorBoard(directory / "tensorboard", [run.name for run in runs], warn)
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


class Tracker:
    """Callback for trackio and Weights & Biases: a run for each run, a group for each method.

    The project has the name of the sweep's folder. A resumed sweep goes on with its runs, and the
    points that it makes again, which are the same to the bit, are not logged twice.
    """

    def __init__(self, name: str, directory: Path, runs: Sequence[Run]) -> None:
        self._name, self._directory, self._runs = name, directory, runs
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
            "config": grid.flat_settings(one),
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
