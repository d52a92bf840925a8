"""Where an experiment's tables and figures live, and the manifest that ties them together.

OUT/data/TABLE.csv          what a run measured
OUT/tables/TABLE.csv        scores with their intervals, computed from it
OUT/figures/FIGURE.png|pdf  what drawing made of them
OUT/sweeps/SWEEP/           folders of `gipo-jax sweep`, from which tables were taken
OUT/manifest.json           figure -> command, data files and checksums
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import pandas as pd
from matplotlib.figure import Figure

from gipo_jax import provenance
from gipo_jax.analysis import plots


class DataError(Exception):
    """Stored data cannot be used. The message is one line: file, problem, what would help."""

    def __init__(self, path: Path | str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")


class NotRunError(DataError):
    """The experiment has stored nothing in this folder."""


def sha256(path: Path) -> str:
    """Checksum of a file, as hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Store:
    """The tables and figures of one experiment inside a folder that several experiments share.

    Args:
        out: the folder.
        experiment: name of the experiment.
        options: the command line's options, for the manifest.
    """

    def __init__(self, out: Path, experiment: str, options: str) -> None:
        self.out = out
        self.experiment = experiment
        self.options = options
        self._read: dict[str, dict[str, str]] = {}
        self.sources: dict[str, dict[str, dict[str, str]]] = {}
        self.figures: list[Path] = []

    @property
    def has_read(self) -> dict[str, dict[str, str]]:
        """The stored tables that were read, each with where it comes from."""
        return dict(self._read)

    @property
    def command(self) -> str:
        """The command line that runs this experiment."""
        return f"gipo-jax reproduce {self.experiment} {self.options}"

    def of(self, experiment: str) -> "Store":
        """The same folder for another experiment, whose runs this one shares."""
        return Store(self.out, experiment, self.options)

    def write(self, table: str, frame: pd.DataFrame, digits: int = 8) -> Path:
        """Stores a table as ``data/<table>.csv`` with this many significant digits."""
        path = self.out / "data" / f"{table}.csv"
        _write_csv(path, frame, digits)
        device = provenance.describe()["device"]
        entry = {
            "command": self.command,
            "device": f"{device['count']} x {device['kind']}",
            "jax": jax.__version__,
            "sha256": sha256(path),
        }
        self._record("data", {self._name(path): entry})
        return path

    def read(self, table: str, columns: Sequence[str]) -> pd.DataFrame:
        """Reads a stored table.

        Raises:
            NotRunError: it was never stored.
            DataError: it is lost, damaged or lacks one of ``columns``.
        """
        frame = self._load(table)
        path = self.out / "data" / f"{table}.csv"
        absent = [column for column in columns if column not in frame]
        if absent:
            raise DataError(path, f"lacks the column {absent[0]!r}; rerun {self.experiment!r}")
        if frame.empty:
            raise DataError(path, f"holds no rows; rerun {self.experiment!r}")
        return frame

    def _load(self, table: str) -> pd.DataFrame:
        path = self.out / "data" / f"{table}.csv"
        name, known = self._name(path), self.manifest()["data"]
        if not path.is_file():
            error = DataError if name in known else NotRunError
            raise error(path, f"missing; run experiment {self.experiment!r} first")
        checksum = sha256(path)
        entry = known.get(name, {"command": self.command, "sha256": checksum})
        if checksum != entry["sha256"]:
            raise DataError(path, "does not match its checksum in manifest.json; restore or rerun")
        try:
            frame = pd.read_csv(path)
        except (ValueError, UnicodeDecodeError) as error:
            raise DataError(path, f"not a readable table ({error})".replace("\n", " ")) from error
        self._read[name] = entry
        return frame

    def stored(self, table: str) -> pd.DataFrame | None:
        """Rows that this experiment stored with the same preset; None where there are none.

        Raises:
            DataError: as in ``read``.
        """
        entry = self.manifest()["data"].get(f"data/{table}.csv")
        if entry is None or _settings(entry["command"]) != _settings(self.command):
            return None
        # A store of its own: what is read here is no source of a figure. A table may have no rows,
        # as where nothing is tuned.
        frame = self.of(self.experiment)._load(table)
        return None if frame.empty else frame

    def numbers(self, name: str, table: pd.DataFrame) -> None:
        """Stores a table of scores, which comes from the data read so far."""
        _write_csv(self.out / "tables" / f"{name}.csv", table, 6)
        self.sources.setdefault(name, dict(self._read))

    def scores(self, name: str) -> pd.DataFrame:
        """Reads a table of scores.

        Raises:
            NotRunError: it was never stored.
        """
        path = self.out / "tables" / f"{name}.csv"
        if not path.is_file():
            raise NotRunError(path, f"missing; run experiment {self.experiment!r} first")
        return pd.read_csv(path)

    def save(self, figure: Figure, name: str, numbers: str) -> None:
        """Stores a figure and where its numbers come from: a table of scores, or ``data/NAME``."""
        paths = plots.save(figure, self.out / "figures" / name)
        folder, _, table = numbers.rpartition("/")
        entries = {
            self._name(path): {
                "experiment": self.experiment,
                "sha256": sha256(path),
                "numbers": f"{folder or 'tables'}/{table}.csv",
                "data": self.sources.get(numbers, self._read),
            }
            for path in paths
        }
        self._record("figures", entries)
        self.figures.extend(paths)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.out).as_posix()

    def manifest(self) -> dict[str, Any]:
        """``data`` and ``figures`` by path, each with where it comes from.

        Raises:
            DataError: the file is damaged.
        """
        path = self.out / "manifest.json"
        if not path.exists():
            return {"data": {}, "figures": {}}
        try:
            manifest = json.loads(path.read_text())
            return {"data": dict(manifest["data"]), "figures": dict(manifest["figures"])}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(path, "not a manifest; restore it, or delete it and rerun") from error

    def _record(self, section: str, entries: dict[str, Any]) -> None:
        manifest = self.manifest()
        manifest[section] |= entries
        manifest[section] = dict(sorted(manifest[section].items()))
        _replace(self.out / "manifest.json", json.dumps(manifest, indent=1) + "\n")


def _settings(command: str) -> str:
    """A stored command without the program that ran it and the folder that it wrote to."""
    return re.sub(r"^.*?reproduce(\.py)? | --out .*", "", command)


def _write_csv(path: Path, frame: pd.DataFrame, digits: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, frame.to_csv(index=False, float_format=f"%.{digits}g", lineterminator="\n"))


def _replace(path: Path, text: str) -> None:
    """Writes a whole file or, when interrupted, nothing."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, newline="\n")
    os.replace(partial, path)
