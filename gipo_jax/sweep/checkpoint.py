"""Checkpoints of a running sweep: all arrays and the progress, written whole or not at all.

A checkpoint is a folder of arrays as Orbax stores them, and the progress in JSON; it gets its
number as name when complete. All processes write their parts of the arrays, process 0 all else.
Orbax reads flipped bits back without a word, so every file has a checksum of ours.
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

from gipo_jax.sweep import cluster
from gipo_jax.sweep.results import ResultsError, write_atomic

FORMAT = 3  # Version of what a checkpoint holds; another version is refused

KEEP = 2

ARRAYS = "arrays"
_PROGRESS = "progress.json"
MANIFEST = "manifest.json"
_TEMPORARY = "incomplete-"


class CheckpointError(ResultsError):
    """A checkpoint cannot be written or used. The message is one line."""


def save(directory: Path, number: int, progress: dict[str, Any], state: Any | None) -> Path:
    """Writes the checkpoint of a number higher than the newest one's; all processes call it."""
    path = directory / f"{number:08d}"
    temporary = directory / f"{_TEMPORARY}{path.name}"
    try:
        if cluster.is_main_process():
            directory.mkdir(parents=True, exist_ok=True)
            for leftover in directory.glob(f"{_TEMPORARY}*"):
                shutil.rmtree(leftover)
            temporary.mkdir()
        if state is not None:
            write_arrays(temporary / ARRAYS, state)
        if cluster.is_main_process():
            stored = {"format": FORMAT, "progress": progress}
            write_atomic(temporary / _PROGRESS, json.dumps(stored))
            seal(temporary)
            # A damaged one that was passed over may have the name.
            shutil.rmtree(path, ignore_errors=True)
            temporary.replace(path)
            _sync_folder(directory)
            for old in numbers(directory)[:-KEEP]:
                shutil.rmtree(directory / f"{old:08d}")
    except Exception as error:
        raise CheckpointError(
            f"cannot write a checkpoint to {directory}: {_line(error)}"
        ) from error
    return path


def numbers(directory: Path) -> list[int]:
    """Numbers of the checkpoints in a folder, the newest last; what has another name is none."""
    named = [path.name for path in directory.glob("*") if path.name.isdecimal() and path.is_dir()]
    return sorted(int(name) for name in named if name == f"{int(name):08d}")


def newest(directory: Path, warn: Callable[[str], None]) -> int | None:
    """Number of the newest whole checkpoint, if any; ``warn`` gets a line for each damaged one."""
    present = numbers(directory)
    for number in reversed(present):
        path = directory / f"{number:08d}"
        problem = damage(path)
        if problem is None:
            return number
        warn(f"checkpoint {path.name} is damaged ({problem}); going back to an earlier one")
    if present:
        raise CheckpointError(
            f"no checkpoint in {directory} is whole; delete that folder to start the sweep over"
        )
    return None


def read_progress(path: Path) -> dict[str, Any]:
    """The progress in a whole checkpoint of this format."""
    stored = json.loads((path / _PROGRESS).read_text(encoding="utf-8"))
    if stored["format"] != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {stored['format']};"
            f" this version of gipo_jax reads format {FORMAT}"
        )
    return stored["progress"]


def write_arrays(path: Path, tree: Any) -> None:
    """Writes a pytree of arrays, keys included, to a new folder; all processes call it together."""
    try:
        with _orbax():
            ocp.save(path.absolute(), {n: _to_save(leaf) for n, leaf in _named(tree).items()})
    except ValueError as error:
        # What the file system said is at the end of a long text.
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def read_arrays(path: Path, like: Any) -> Any:
    """Reads what ``write_arrays`` wrote, however the arrays were spread over devices then.

    ``like`` gives the structure, shapes and types. Arrays with a sharding come to the devices, each
    of which reads only its own part; the others become NumPy arrays. The first axis may differ from
    the stored one, since a layout fills up with runs that are not there: what is too much is left
    out, and what is missing is zero, on devices only.
    """
    wanted = _named(like)
    plain = {name: _plain_shape(leaf) for name, leaf in wanted.items()}
    try:
        with _orbax():
            there = ocp.metadata(path.absolute()).metadata
            for name, expected in plain.items():
                if not _fits(there.get(name), expected):
                    raise CheckpointError(
                        f"checkpoint {path} does not fit: {name} should be"
                        f" {expected.dtype}{list(expected.shape)};"
                        " it was written with other settings or by another version of gipo_jax"
                    )
            stored = ocp.load(
                path.absolute(),
                {name: np.ndarray if x.sharding is None else x for name, x in plain.items()},
            )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"cannot read {path}: {_line(error)}") from error

    def restore(name: str, leaf: Any) -> Any:
        value = stored[name]
        if plain[name].sharding is None and value.ndim:
            value = value[: plain[name].shape[0]]
        return value if leaf.dtype == value.dtype else jax.random.wrap_key_data(value)

    return jax.tree.unflatten(jax.tree.structure(like), [restore(*x) for x in wanted.items()])


def _fits(there: Any, expected: jax.ShapeDtypeStruct) -> bool:
    """Whether a stored array can be read as the expected one."""
    if there is None or there.dtype != expected.dtype or len(there.shape) != len(expected.shape):
        return False
    enough = expected.sharding is not None or there.shape[:1] >= expected.shape[:1]
    return enough and there.shape[1:] == expected.shape[1:]


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
    # Whoever reads says where arrays go: no need to store where they were.
    context.array.saving.enable_write_sharding_file = False
    context.array.saving.array_metadata_store = None
    context.array.loading.enable_padding_and_truncation = True
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


def _to_save(leaf: Any) -> Any:
    plain = _plain(leaf)
    # Of several processes, Orbax takes arrays of all or of NumPy.
    on_host = jax.process_count() > 1 and getattr(plain, "is_fully_addressable", False)
    return np.asarray(plain) if on_host else plain


def _plain_shape(leaf: Any) -> jax.ShapeDtypeStruct:
    """What to read for an array, with its sharding where the caller asked for one."""
    shape = jax.eval_shape(_plain, leaf)
    wanted = leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) else None
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=wanted)


def seal(path: Path) -> None:
    """Writes the checksums of all files of a folder, by which ``damage`` finds what changes."""
    write_atomic(path / MANIFEST, json.dumps(_checksums(path)))


def damage(path: Path) -> str | None:
    """What is wrong with the files of a folder since it was sealed, or None."""
    try:
        expected = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{MANIFEST} cannot be read"
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
        if file.is_file() and file.name != MANIFEST
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
