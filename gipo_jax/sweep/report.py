"""What a sweep tells while it runs: progress on the screen, rows to log callbacks."""

import contextlib
import math
import queue
import statistics
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from gipo_jax.config import ConfigError

LINE_SECONDS = 5.0  # Least time between two plain lines of progress
WAITING = 1000  # Logged points that may wait for a slow callback before more are dropped
NAME_LENGTH = 100  # Characters of a folder of event files: file systems take 255 bytes

EVENTS = "tensorboard"
"""Folder of the event files in that of a sweep."""

_EVENT_FILE = "events.out.tfevents."

Rows = Sequence[Mapping[str, Any]]
Callback = Callable[[Rows], None]  # takes a logged point: run, iteration, env_steps, metrics


class Reporter:
    """Shows a live bar on a terminal, plain lines elsewhere, or nothing."""

    def __init__(self, total: int, done: int, show: bool = True, stream: TextIO | None = None):
        """Starts at ``done`` of ``total`` environment steps; the stream is standard error."""
        self._total, self._done, self._show = total, done, show
        self._console = Console(file=stream or sys.stderr, soft_wrap=True, highlight=False)
        self._bar: Progress | None = None
        self._timed, self._seconds, self._last_line = 0, 0.0, 0.0
        if show and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.percentage:3.0f}% {task.fields[text]}"),
                TimeElapsedColumn(),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task("sweep", total=total, completed=done, text="")

    def say(self, text: str) -> None:
        """Prints a line, unless the sweep is quiet."""
        if self._show:
            self._console.print(text, markup=False)

    def warn(self, text: str) -> None:
        """Prints a line, always."""
        self._console.print(f"warning: {text}", markup=False)

    def advance(
        self, steps: int, seconds: float, what: str, env: str, medians: Mapping[str, float]
    ) -> None:
        """Counts steps of all runs together that took so long; medians are returns on ``env``."""
        self._done += steps
        self._timed += steps
        self._seconds += seconds
        rate = self._timed / max(self._seconds, 1e-9)
        left = duration((self._total - self._done) / max(rate, 1e-9))
        returns = ", ".join(f"{name} {value:.1f}" for name, value in medians.items()) or "-"
        text = f"{rate:,.0f} env-steps/s, {left} left; median return on {env}: {returns}"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=what, text=text)
        elif time.monotonic() - self._last_line >= LINE_SECONDS or self._done >= self._total:
            self._last_line = time.monotonic()
            share = 100 * self._done / max(self._total, 1)
            self.say(f"{share:5.1f}% {self._done:,}/{self._total:,} steps, {what}: {text}")

    def close(self) -> None:
        """Takes the bar down."""
        if self._bar is not None:
            self._bar.stop()


def median_returns(
    latest: Mapping[int, float], settings: Sequence[Mapping[str, Any]], env: str
) -> dict[str, float]:
    """Median of the newest returns of runs on one environment, by objective."""
    returns: dict[str, list[float]] = {}
    for run, value in latest.items():
        if settings[run]["env"] == env and not math.isnan(value):
            returns.setdefault(settings[run]["objective"], []).append(value)
    return {name: statistics.median(values) for name, values in returns.items()}


def duration(seconds: float) -> str:
    """``1h02m``, ``3m20s`` or ``45s``."""
    minutes, rest = divmod(int(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


class Dispatcher:
    """Calls callbacks in a thread of its own, so that they can neither block nor end training."""

    def __init__(self, callbacks: Sequence[Callback], warn: Callable[[str], None]) -> None:
        self._callbacks, self._warn, self._dropped = list(callbacks), warn, 0
        self._queue: queue.Queue[Rows | None] = queue.Queue(WAITING)
        # A daemon: a callback that hangs must not keep the program from ending.
        self._thread = threading.Thread(target=self._work, daemon=True)
        if self._callbacks:
            self._thread.start()

    def send(self, rows: Rows) -> None:
        """Hands rows over; drops them if the callbacks are too far behind."""
        try:
            if self._thread.is_alive():
                self._queue.put_nowait(rows)
        except queue.Full:
            self._dropped += 1

    def close(self, seconds: float = 10.0) -> None:
        """Gives the callbacks that long to finish."""
        if not self._thread.is_alive():
            return
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=seconds)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._warn(f"log callbacks are still busy after {seconds:.0f} s; leaving them")
        if self._dropped:
            self._warn(f"{self._dropped} logged points were dropped: log callbacks were too slow")

    def _work(self) -> None:
        while (rows := self._queue.get()) is not None:
            for callback in list(self._callbacks):
                try:
                    callback(rows)
                except Exception as error:
                    self._callbacks.remove(callback)
                    name = getattr(callback, "__name__", type(callback).__name__)
                    self._warn(f"log callback {name} failed and is switched off: {error!r}")


class TensorBoard:
    """Callback that writes TensorBoard event files, one folder per run."""

    def __init__(self, directory: Path, names: Sequence[str], warn: Callable[[str], None]) -> None:
        self._directory, self._names, self._warn = directory, names, warn
        self._writers: dict[int, Any] = {}  # None where a run's files cannot be written

    @staticmethod
    def check() -> None:
        """Raises ConfigError where tensorboardX is not installed."""
        try:
            import tensorboardX  # noqa: F401
        except ImportError as error:
            valid = "false, or install the extra: pip install 'gipo_jax[tensorboard]'"
            raise ConfigError("tensorboard", True, valid) from error

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
            name = f"{run:05d} {self._names[run]}".replace("/", "_")[:NAME_LENGTH]
            _put_before_new_files(self._directory / name)
            # What an earlier execution wrote from here on was lost with it, and is made again.
            self._writers[run] = SummaryWriter(str(self._directory / name), purge_step=step)
        writer = self._writers[run]
        if writer is not None:
            for key, value in row.items():
                if key not in ("run", "iteration", "env_steps"):
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
