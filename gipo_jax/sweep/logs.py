"""Log callbacks that can neither block nor end training."""

import contextlib
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gipo_jax.config import ConfigError

Rows = Sequence[Mapping[str, Any]]
Callback = Callable[[Rows], None]
"""Takes the rows of a logged point, one a run: ``run``, ``iteration``, ``env_steps``, metrics."""

WAITING = 1000
"""Logged points that may wait for a slow callback before more are dropped."""


class Dispatcher:
    """Calls callbacks in a thread of its own. What they raise is reported once each."""

    def __init__(self, callbacks: Sequence[Callback], warn: Callable[[str], None]) -> None:
        self._callbacks = list(callbacks)
        self._warn = warn
        self._dropped = 0
        self._queue: queue.Queue[Rows | None] = queue.Queue(WAITING)
        # A daemon: a callback that hangs must not keep the program from ending.
        self._thread = threading.Thread(target=self._work, daemon=True)
        if self._callbacks:
            self._thread.start()

    def send(self, rows: Rows) -> None:
        """Hands rows over; drops them if the callbacks are too far behind."""
        if not self._callbacks:
            return
        try:
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


def check_tensorboard() -> None:
    """Checks that event files can be written.

    Raises:
        ConfigError: tensorboardX is not installed.
    """
    try:
        import tensorboardX  # noqa: F401
    except ImportError as error:
        valid = "false, or install the extra: pip install 'gipo_jax[tensorboard]'"
        raise ConfigError("tensorboard", True, valid) from error


class TensorBoard:
    """Callback that writes TensorBoard event files, a folder a run."""

    def __init__(self, directory: Path, names: Sequence[str]) -> None:
        """Prepares; files come with the first rows.

        Args:
            directory: folder of folders.
            names: name of each run, by index.
        """
        self._directory = directory
        self._names = names
        self._writers: dict[int, Any] = {}

    def __call__(self, rows: Rows) -> None:
        from tensorboardX import SummaryWriter

        for row in rows:
            run = int(row["run"])
            if run not in self._writers:
                name = f"{run:05d} {self._names[run]}".replace("/", "_")
                self._writers[run] = SummaryWriter(str(self._directory / name))
            writer = self._writers[run]
            for key, value in row.items():
                if key not in ("run", "iteration", "env_steps"):
                    writer.add_scalar(key, float(value), int(row["env_steps"]))
            writer.flush()
