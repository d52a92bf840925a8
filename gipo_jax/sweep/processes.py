"""Sharing a sweep among processes, on one host or many, that all see its folder.

Each process trains runs of its own and never waits for another inside a program, so a process that
dies takes nothing with it. JAX only brings them together; from then on they watch each other by
files in the sweep's folder.
"""

import contextlib
import dataclasses
import os
import secrets
import socket
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

START_SECONDS = 120.0
"""Time that processes may need to find each other, and then to first show up in the folder."""

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
        launch: the same in processes started together, and another the next time.
    """

    index: int
    count: int
    launch: str = ""

    def share(self, runs: tuple[int, ...]) -> tuple[int, ...]:
        """The runs of a group that this process trains."""
        bounds = [len(runs) * i // self.count for i in (self.index, self.index + 1)]
        return runs[slice(*bounds)]


ALONE = Processes(0, 1)


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Processes:
    """Meets the other processes; call before any computation. JAX is this process's alone after.

    Args:
        coordinator_address: ``host:port`` of process 0; with the others, found out under Slurm.
        num_processes: processes in all.
        process_id: index of this one.

    Raises:
        ConfigError: they could not find each other, or JAX cannot run each by itself.
    """
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=int(START_SECONDS),
            heartbeat_timeout_seconds=30,
        )
        from jax.experimental import multihost_utils

        index, count = jax.process_index(), jax.process_count()
        drawn = np.uint32(secrets.randbits(32))
        launch = f"{int(multihost_utils.broadcast_one_to_all(drawn)):08x}"
        jax.distributed.shutdown()
        _be_alone()
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        valid = (
            "--coordinator-address, --num-processes and --process-id that fit each other,"
            f" or a cluster that tells them; {reason}"
        )
        raise ConfigError("distributed", coordinator_address, valid) from error
    if jax.process_count() > 1:
        valid = "processes that each see only the devices of their own host"
        raise ConfigError("distributed", True, valid)
    return Processes(index, count, launch)


def _be_alone() -> None:
    """Makes JAX forget the group it has left.

    In a group, JAX would abort this process when another one dies, and Orbax would save the arrays
    of all processes together.
    """
    # Devices made anew have the place in the group that was taken last: one of a group of one.
    from jax.extend.backend import clear_backends

    clear_backends()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    jax.distributed.initialize(f"127.0.0.1:{port}", 1, 0, cluster_detection_method="deactivate")
    jax.distributed.shutdown()


_STEPS = ("checking", "ready", "saved", "running", "done")
"""What a process tells the others, in this order; one that ends too early tells ``stopped``."""


class Peers:
    """Watches the other processes of a sweep.

    Attributes:
        lost: what to say about a process that is gone, or None.
    """

    def __init__(self, folder: Path, processes: Processes) -> None:
        """Announces this process and begins to watch.

        Args:
            folder: where the processes meet.
            processes: this one and their number.
        """
        self.lost: str | None = None
        self._folder, self._processes, self._hint = folder, processes, ""
        self._status = "checking"
        self._seen: set[int] = set()
        self._began = time.monotonic()
        self._ended = threading.Event()
        # The main thread tells while the watching one beats.
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self._beat()
        threading.Thread(target=self._watch, daemon=True).start()

    def agree(self, status: str = "ready") -> None:
        """Tells the others how far this process is, and waits until all of them are.

        Args:
            status: one of ``_STEPS``.

        Raises:
            ConfigError: one of them is not going to be.
        """
        self._tell(status)
        self._wait_for(self._others(), status)

    def begin(self, prepare: Callable[[], None], hint: str) -> None:
        """Has process 0 prepare the sweep's folder, and waits until it has.

        Args:
            prepare: called in process 0 alone.
            hint: how to go on if a process is lost.

        Raises:
            ConfigError: process 0 is gone.
        """
        self._hint = f"; {hint}"
        if self._processes.index == 0:
            prepare()
        else:
            self._wait_for([0], "running")
        self._tell("running")

    def all_done(self) -> bool:
        """Whether every other process has finished its runs."""
        return all(self._read(index) == "done" for index in self._others())

    def close(self, status: str) -> None:
        """Tells the others how it ended, ``done`` or ``stopped``; the first call counts.

        Where the sweep never began, nothing is left of it in the folder.
        """
        if self._ended.is_set():
            return
        if self._status == "running":
            self._tell(status)
            self._ended.set()
            return
        # The others are to see that it was there, and then that it is gone.
        time.sleep(2 * BEAT_SECONDS)
        self._ended.set()
        with self._lock, contextlib.suppress(OSError):
            self._file(self._processes.index).unlink()
            for folder in (self._folder, self._folder.parent):
                folder.rmdir()

    def _others(self) -> list[int]:
        return [i for i in range(self._processes.count) if i != self._processes.index]

    def _file(self, index: int) -> Path:
        return self._folder / f"{index}.status"

    def _tell(self, status: str) -> None:
        self._status = status
        self._beat()

    def _beat(self) -> None:
        with self._lock:
            if self._ended.is_set():
                return
            temporary = self._file(self._processes.index).with_suffix(".tmp")
            temporary.write_text(f"{self._processes.launch} {self._status}")
            temporary.replace(self._file(self._processes.index))

    def _read(self, index: int) -> str:
        """What a process last told; empty where it has not, or was of another launch."""
        try:
            launch, _, status = self._file(index).read_text().partition(" ")
        except OSError:
            return ""
        return status if launch == self._processes.launch else ""

    def _wait_for(self, others: list[int], status: str) -> None:
        statuses = _STEPS[_STEPS.index(status) :]
        while not all(self._read(index) in statuses for index in others):
            if self.lost is not None:
                valid = f"settings that all processes take, but {self.lost}: see what it says"
                raise ConfigError("distributed", True, valid)
            time.sleep(BEAT_SECONDS / 4)

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
                print(f"gipo-jax: {self.lost}{self._hint}", file=sys.stderr, flush=True)
                os._exit(EXIT_CODE)

    def _look(self) -> None:
        # All times are the file system's, so clocks of hosts may differ.
        now = self._file(self._processes.index).stat().st_mtime
        for index in self._others():
            status = self._read(index)
            if status:
                self._seen.add(index)
                silent = now - self._file(index).stat().st_mtime > LOST_SECONDS
                gone = status != "done" and silent
            else:
                late = time.monotonic() - self._began > START_SECONDS
                status, gone = ("stopped", False) if index in self._seen else ("", late)
            if status == "stopped":
                self.lost = f"process {index} was stopped"
            elif gone:
                self.lost = f"process {index} has died"


def wait(condition: Callable[[], bool], give_up: Callable[[], None]) -> None:
    """Waits until a condition holds; ``give_up`` is called in between and may raise."""
    while not condition():
        give_up()
        time.sleep(BEAT_SECONDS / 4)
