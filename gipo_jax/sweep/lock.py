"""The lock of a sweep's folder: one process writes to it at a time.

The system drops a lock (``flock``) when its process dies, however it dies. Some file systems that
hosts share keep locks to each host. There the file's time says whether the owner lives: the owner
renews it, and whoever comes from another host watches it for a while.
"""

import contextlib
import fcntl
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from gipo_jax.config import ConfigError
from gipo_jax.sweep.results import ResultsError

NAME = "lock"

RENEWED_SECONDS = 5.0
"""Time between two signs of life of the owner."""

WATCH_SECONDS = 20.0
"""Time without a sign of life after which an owner on another host counts as dead."""


class Owner(NamedTuple):
    """Who wrote a lock, ``process N on HOST``, and whether that process lives."""

    name: str
    alive: bool


class Lock:
    """The lock that this process holds."""

    def __init__(self, path: Path, file: IO[str]) -> None:
        self._path, self._file = path, file

    def check(self) -> None:
        """Raises ResultsError where another process has taken the folder.

        That happens to an owner that was stopped for so long that it counted as dead.
        """
        try:
            mine = os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
            owner = self._path.read_text(encoding="utf-8")
        except OSError:
            mine, owner = False, "another process"
        if not mine or owner != _me():
            raise ResultsError(
                f"{owner or 'another process'} has taken {self._path.parent} over;"
                " this one writes no more"
            )


@contextlib.contextmanager
def hold(directory: Path) -> Iterator[Lock]:
    """Keeps a folder, made where there is none, to this process.

    Raises:
        ConfigError: another process has it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / NAME
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _taken(directory, _read(file)) from error
        except OSError as error:
            print(f"warning: {path} cannot be locked: {error.strerror}", file=sys.stderr)
            known = False
        else:
            known = _is_here(_read(file))
        if (name := _read(file)) and not known and _is_renewed(path):
            raise _taken(directory, name)
        # Whoever held it may have removed the file since it was opened here.
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise _taken(directory, "")
        file.truncate(0)
        file.write(_me())
        file.flush()
        ended = threading.Event()
        renewal = threading.Thread(target=_renew, args=(file, ended), daemon=True)
        renewal.start()
        lock = Lock(path, file)
        try:
            yield lock
        finally:
            ended.set()
            renewal.join()
            with contextlib.suppress(ResultsError):
                lock.check()
                path.unlink()


def owner(directory: Path) -> Owner | None:
    """Who wrote the lock of a folder, None where there is none; takes and changes nothing."""
    try:
        with (directory / NAME).open(encoding="utf-8") as file:
            name, known = _read(file), False
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                known = _is_here(name)
            except BlockingIOError:
                return Owner(name, alive=True)
            except OSError:
                pass
    except FileNotFoundError:
        return None
    return Owner(name, alive=bool(name) and not known and _is_renewed(directory / NAME))


def _taken(directory: Path, name: str) -> ConfigError:
    valid = f"a folder that no other process writes to; {name or 'another process'} does"
    return ConfigError("out", str(directory), valid)


def _me() -> str:
    return f"process {os.getpid()} on {platform.node()}"


def _is_here(name: str) -> bool:
    """Whether an owner is of this host, where the system knows of its lock."""
    return name.endswith(f" on {platform.node()}")


def _read(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _renew(file: IO[str], ended: threading.Event) -> None:
    while not ended.wait(RENEWED_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(file.fileno())


def _is_renewed(path: Path) -> bool:
    """Whether a lock gets a sign of life while it is watched, by no clock but that of its host."""
    ends, first = time.monotonic() + WATCH_SECONDS, None
    while time.monotonic() < ends:
        try:
            # Opened anew: what a file system remembers of a file may be old.
            with path.open("rb") as file:
                seen = os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return False
        if first is not None and seen != first:
            return True
        first = seen
        time.sleep(0.5)
    return False
