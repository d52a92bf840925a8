"""The folder of a sweep, read: config.json, runs.csv, metrics.csv, params/, checkpoints/, figures/.

Numbers in the two tables are those of the algorithm alone: no wall-clock time, no host names. Two
executions of one sweep therefore give the same bytes, whatever interrupted them.
"""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pandas as pd

from gipo_jax.config import ConfigError

FORMAT = 2  # Version of the folder's layout; a folder of another version is refused

CONFIG = "config.json"
RUNS = "runs.csv"
METRICS = "metrics.csv"
PARAMS = "params"
MEMBERS = "runs.json"
CHECKPOINTS = "checkpoints"
FIGURES = "figures"

# Columns that are text, whatever they look like
_TEXT = ("env", "objective", "kernel", "ratio_level", "selection", "status")


class ResultsError(RuntimeError):
    """A results folder cannot be read or written. The message is one line."""


def read_runs(directory: str | Path) -> pd.DataFrame:
    """One row per run: settings, status and returns."""
    return _read_table(Path(directory), RUNS)


def read_metrics(directory: str | Path) -> pd.DataFrame:
    """One row per run and logged point. ``run`` refers to ``read_runs``."""
    return _read_table(Path(directory), METRICS)


def read_config(directory: str | Path) -> dict[str, Any]:
    """The sweep's settings and provenance, as in ``config.json``."""
    path = Path(directory) / CONFIG
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        version = stored["format"]
        lost = {"command", "options", "metrics", "groups"} - set(stored)
    except FileNotFoundError as error:
        raise ResultsError(f"{directory} holds no sweep: there is no {CONFIG} in it") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{path} cannot be read: {error}") from error
    if version != FORMAT:
        raise ResultsError(
            f"{path} has format {version!r}; this version of gipo_jax reads format {FORMAT}"
        )
    if lost:
        raise ResultsError(f"{path} cannot be read: it has no {min(lost)}")
    return stored


def params_folders(directory: Path) -> list[tuple[Path, list[int]]]:
    """Folders of final parameters in a sweep's folder, and the runs of each, in their order there.

    Raises:
        ResultsError: one does not say whose it is.
    """
    found = []
    for path in sorted((directory / PARAMS).glob("*")):
        if path.name.isdecimal():
            try:
                found.append((path, json.loads((path / MEMBERS).read_text(encoding="utf-8"))))
            except (OSError, ValueError) as error:
                raise ResultsError(f"{path / MEMBERS} cannot be read: {error}") from error
    return found


def _read_table(directory: Path, name: str) -> pd.DataFrame:
    read_config(directory)
    path = directory / name
    try:
        # An objective may be called null.
        types = dict.fromkeys(_TEXT, str)
        return pd.read_csv(path, keep_default_na=False, na_values=[""], dtype=types)
    except FileNotFoundError as error:
        raise ResultsError(f"{path} does not exist: the sweep has logged nothing yet") from error
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path} cannot be read: {error}") from error


def check_holds_sweep(directory: Path, field: str) -> None:
    """Raises ConfigError, naming the setting ``field``, where a folder holds no sweep."""
    if not (directory / CONFIG).exists():
        raise ConfigError(field, str(directory), f"a folder that holds a sweep ({CONFIG})")


def check_directory(directory: Path, resume: bool) -> None:
    """Raises ConfigError where a sweep may not write to a folder; touches nothing."""
    if resume:
        check_holds_sweep(directory, "out")
    files = () if resume else (RUNS, METRICS, PARAMS, CHECKPOINTS, FIGURES)
    present = [name for name in files if (directory / name).exists()]
    nearest = next(path for path in (directory, *directory.parents) if path.exists())
    if not resume and (directory / CONFIG).exists():
        valid = "a folder without a sweep in it; --resume continues this one"
    elif present:
        valid = f"a folder without {present[0]}: a sweep writes it"
    elif not nearest.is_dir():
        valid = f"a folder, but {nearest} is a file"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        valid = f"a folder with write permission on {nearest}"
    elif problem := _takes_no_file(nearest):
        valid = f"a folder that takes files; {nearest}: {problem}"
    else:
        return
    raise ConfigError("out", str(directory), valid)


def _takes_no_file(directory: Path) -> str | None:
    """Why no file can be made in a folder, found out with one that never has a name."""
    if not hasattr(os, "O_TMPFILE"):
        return None
    try:
        os.close(os.open(directory, os.O_TMPFILE | os.O_WRONLY, 0o600))
    except OSError as error:
        unknown = error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)
        # File systems without any space, such as /proc, show the state of the system.
        if not unknown or os.statvfs(directory).f_blocks == 0:
            return error.strerror
    return None


def write_atomic(path: Path, text: str) -> None:
    """Replaces a file as a whole: a reader, or a kill, sees the old text or the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
