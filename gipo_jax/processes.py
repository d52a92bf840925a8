"""Sharing a sweep among processes, on one host or many, that all see its folder.

Each process trains runs of its own and never waits for another inside a program, so a process that
dies takes nothing with it. Processes watch each other by files in the sweep's folder.
"""

import contextlib
import dataclasses
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from gipo_jax.config import ConfigError

BEAT_SECONDS = 1.0
LOST_SECONDS = 25.0
"""Silence after which a process counts as dead."""

GRACE_SECONDS = 25.0
"""Time to save and end by itself once another process is dead."""

EXIT_CODE = 75
"""Exit code where another process was lost: try again later."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """Which of how many processes this one is.

    Attributes:
        index: 0 .. count - 1.
        count: processes in all.
    """

    index: int
    count: int

    def share(self, runs: tuple[int, ...]) -> tuple[int, ...]:
        """The runs of a group that this process trains."""
        bounds = [len(runs) * i // self.count for i in (self.index, self.index + 1)]
        return runs[slice(*bounds)]

    def agree(self, good: bool) -> bool:
        """Waits for all processes; whether all of them are ``good``."""
        if self.count == 1:
            return good
        from jax.experimental import multihost_utils

        return bool(np.all(multihost_utils.process_allgather(np.asarray([good]))))

    def part(self) -> None:
        """Waits for all processes, and leaves JAX's group of them.

        JAX would abort this process when another one dies. From here on all work is local.
        """
        if self.count > 1:
            jax.distributed.shutdown()


ALONE = Processes(0, 1)


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Processes:
    """Joins the other processes; call before any computation.

    Args:
        coordinator_address: ``host:port`` of process 0; with the others, found out under Slurm.
        num_processes: processes in all.
        process_id: index of this one.

    Raises:
        ConfigError: they could not find each other.
    """
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=120,
            heartbeat_timeout_seconds=30,
        )
        return Processes(jax.process_index(), jax.process_count())
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        valid = (
            "--coordinator-address, --num-processes and --process-id that fit each other,"
            f" or a cluster that tells them; {reason}"
        )
        raise ConfigError("distributed", coordinator_address, valid) from error


class Peers:
    """Watches the other processes of a sweep.

    Attributes:
        lost: what to say about a process that is gone, or None.
    """

    def __init__(self, folder: Path, processes: Processes, hint: str) -> None:
        """Announces this process.

        Args:
            folder: where the processes meet.
            processes: this one and their number.
            hint: how to go on, for the message.
        """
        self.lost: str | None = None
        self._folder, self._processes, self._hint = folder, processes, hint
        self._status = "running"
        self._ended = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        self._beat()

    def watch(self) -> None:
        """Begins to watch; call when all have announced themselves."""
        threading.Thread(target=self._watch, daemon=True).start()

    def all_done(self) -> bool:
        """Whether every other process has finished its runs."""
        return all(self._read(index) == "done" for index in self._others())

    def close(self, status: str) -> None:
        """Tells the others how it ended, ``done`` or ``stopped``; the first call counts."""
        if not self._ended.is_set():
            self._status = status
            self._beat()
            self._ended.set()

    def _others(self) -> list[int]:
        return [i for i in range(self._processes.count) if i != self._processes.index]

    def _file(self, index: int) -> Path:
        return self._folder / f"{index}.status"

    def _beat(self) -> None:
        temporary = self._file(self._processes.index).with_suffix(".tmp")
        temporary.write_text(self._status)
        temporary.replace(self._file(self._processes.index))

    def _read(self, index: int) -> str:
        try:
            return self._file(index).read_text()
        except OSError:
            return ""

    def _watch(self) -> None:
        lost_at = None
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                self._beat()
                if self.lost is None:
                    self._look()
            if self.lost is None:
                continue
            lost_at = lost_at or time.monotonic()
            if time.monotonic() - lost_at > GRACE_SECONDS:
                print(f"gipo-jax: {self.lost}; {self._hint}", file=sys.stderr, flush=True)
                os._exit(EXIT_CODE)

    def _look(self) -> None:
        # All times are the file system's, so clocks of hosts may differ.
        now = self._file(self._processes.index).stat().st_mtime
        for index in self._others():
            status = self._read(index)
            if status == "stopped":
                self.lost = f"process {index} was stopped"
            elif status != "done" and now - self._file(index).stat().st_mtime > LOST_SECONDS:
                self.lost = f"process {index} has died"


def wait(condition: Callable[[], bool], give_up: Callable[[], None]) -> None:
    """Waits until a condition holds; ``give_up`` is called in between and may raise."""
    while not condition():
        give_up()
        time.sleep(BEAT_SECONDS / 4)
