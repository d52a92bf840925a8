"""Checkpoints of a running sweep: all arrays and the progress, written whole or not at all.

A checkpoint is a folder: arrays as Orbax stores them, and the progress in JSON. It gets its final
name only when complete, and the last two are kept. Orbax reads flipped bits back without a word, so
every file has a checksum of ours, by which a damaged checkpoint is found and passed over.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from gipo_jax.sweep.results import ResultsError, write_atomic

FORMAT = 2
"""Version of what a checkpoint holds; another version is refused."""

KEEP = 2

ARRAYS = "arrays"
_PROGRESS = "progress.json"
_MANIFEST = "manifest.json"
_TEMPORARY = "incomplete-"


class CheckpointError(ResultsError):
    """A checkpoint cannot be written or used. The message is one line."""


def save(directory: Path, progress: dict[str, Any], state: Any | None) -> Path:
    """Writes a checkpoint next to earlier ones, of which the newest but one is dropped.

    Args:
        directory: folder of checkpoints.
        progress: JSON-serialisable.
        state: pytree of arrays, or None.

    Raises:
        CheckpointError: it could not be written; earlier checkpoints are as they were.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(leftover)
        present = _numbers(directory)
        name = f"{max(present, default=0) + 1:08d}"
        temporary = directory / f"{_TEMPORARY}{name}"
        temporary.mkdir()
        if state is not None:
            write_arrays(temporary / ARRAYS, state)
        stored = {"format": FORMAT, "progress": progress}
        write_atomic(temporary / _PROGRESS, json.dumps(stored))
        write_atomic(temporary / _MANIFEST, json.dumps(_checksums(temporary)))
        temporary.replace(directory / name)
        _sync_folder(directory)
        for number in present[: len(present) - KEEP + 1]:
            shutil.rmtree(directory / f"{number:08d}")
    except Exception as error:
        raise CheckpointError(
            f"cannot write a checkpoint to {directory}: {_line(error)}"
        ) from error
    return directory / name


def newest(directory: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, and its progress; None when none was ever completed.

    Args:
        directory: folder of checkpoints.
        warn: called with one line for each damaged checkpoint passed over.

    Raises:
        CheckpointError: all are damaged, or it is of another version.
    """
    numbers = _numbers(directory)
    for number in reversed(numbers):
        path = directory / f"{number:08d}"
        problem = _damage(path)
        if problem is None:
            stored = json.loads((path / _PROGRESS).read_text())
            if stored["format"] != FORMAT:
                raise CheckpointError(
                    f"checkpoint {path} has format {stored['format']};"
                    f" this version of gipo_jax reads format {FORMAT}"
                )
            return path, stored["progress"]
        warn(f"checkpoint {path.name} is damaged ({problem}); going back to an earlier one")
    if numbers:
        raise CheckpointError(
            f"no checkpoint in {directory} is whole; delete that folder to start the sweep over"
        )
    return None


def write_arrays(path: Path, tree: Any) -> None:
    """Writes a pytree of arrays, keys included, to a new folder.

    Raises:
        OSError: it could not be written.
    """
    try:
        with _orbax():
            ocp.save(path.absolute(), {name: _plain(leaf) for name, leaf in _named(tree).items()})
    except ValueError as error:
        # What the file system said is at the end of a long text.
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def read_arrays(path: Path, like: Any) -> Any:
    """Reads what ``write_arrays`` wrote, on whatever devices the arrays were then.

    Args:
        path: its folder.
        like: pytree of arrays or ``jax.ShapeDtypeStruct``: the structure, shapes and types to get.

    Returns:
        pytree like ``like`` of NumPy arrays; keys are JAX key arrays.

    Raises:
        CheckpointError: other shapes or names are stored, so another version wrote it.
    """
    wanted = _named(like)
    try:
        with _orbax():
            stored = ocp.load(path.absolute(), dict.fromkeys(wanted, np.ndarray))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"cannot read {path}: {_line(error)}") from error

    def restore(name: str, leaf: Any) -> Any:
        value, expected = stored[name], jax.eval_shape(_plain, leaf)
        if value.shape != expected.shape or value.dtype != expected.dtype:
            raise CheckpointError(
                f"checkpoint {path} does not fit: {name} should be"
                f" {expected.dtype}{list(expected.shape)};"
                " it was written with other settings or by another version of gipo_jax"
            )
        return value if leaf.dtype == expected.dtype else jax.random.wrap_key_data(value)

    return jax.tree.unflatten(jax.tree.structure(like), [restore(*x) for x in wanted.items()])


def stacked(tree: Any, count: int) -> Any:
    """Shapes and types of ``count`` such trees stacked along a new first axis."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), tree)


@contextlib.contextmanager
def _orbax() -> Iterator[None]:
    """Orbax reads and writes in here as it should, and silently: what it logs, it raises too."""
    context = ocp.Context()
    # Compressing takes several times as long.
    context.array.saving.use_compression = False
    # Memory has no room for a second copy of a large replay.
    context.memory.deepcopy_host_arrays = False
    context.memory.is_prioritized_key_fn = lambda name: False
    context.memory.transfer_concurrent_bytes = 1 << 28
    # Arrays are read back as NumPy's and placed by whoever asked: no need to store where they were.
    context.array.saving.enable_write_sharding_file = False
    context.array.saving.array_metadata_store = None
    log = logging.getLogger("absl")
    log.disabled = True
    try:
        with context:
            yield
    finally:
        log.disabled = False


def _named(tree: Any) -> dict[str, Any]:
    """Leaves of a pytree by their paths in it, in order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator=":"): leaf for path, leaf in leaves}


def _plain(leaf: Any) -> Any:
    """An array, or the words of a key."""
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def _numbers(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in directory.glob("[0-9]*"))


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        expected = json.loads((path / _MANIFEST).read_text())
    except (OSError, ValueError):
        return f"{_MANIFEST} cannot be read"
    try:
        found = _checksums(path)
    except OSError as error:
        return _line(error)
    for name, checksum in expected.items():
        if found.get(name) != checksum:
            return f"{name} does not match its checksum" if name in found else f"{name} is missing"
    return None


def _checksums(path: Path) -> dict[str, int]:
    """CRC-32 of every file but the manifest; forces each to disk on the way."""
    return {
        str(file.relative_to(path)): _checksum(file)
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != _MANIFEST
    }


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _line(error: BaseException) -> str:
    """An exception as one short line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__
