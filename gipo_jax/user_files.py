"""Objectives and tasks of the user's own, named as FILE.py:NAME."""

import hashlib
import importlib.util
import sys
import traceback
from pathlib import Path
from typing import Any

from gipo_jax.config import ConfigError


def is_reference(name: str) -> bool:
    """Whether a name means something in a file."""
    return ".py:" in name


def load(field: str, reference: str, what: str) -> Any:
    """What ``path/to/file.py:name`` names. A file runs once a process.

    Args:
        field: the setting, for messages.
        reference: file and name in it.
        what: what the name should be of, such as FUNCTION, for messages.

    Raises:
        ConfigError: no such file or name, or running the file fails.
    """
    path, _, name = reference.rpartition(":")
    file, form = Path(path).expanduser().resolve(), f"FILE.py:{what}"
    if not file.is_file():
        raise ConfigError(field, reference, f"{form}, but there is no file {path}")
    module_name = f"gipo_jax_user_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    if module_name not in sys.modules:
        loading = importlib.util.spec_from_file_location(module_name, file)
        if loading is None or loading.loader is None:
            raise ConfigError(field, reference, f"{form} with a Python file")
        module = importlib.util.module_from_spec(loading)
        sys.modules[module_name] = module
        try:
            loading.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            raise ConfigError(field, reference, located(error, file) or str(error)) from error
    found = getattr(sys.modules[module_name], name, None)
    if found is None:
        raise ConfigError(field, reference, f"{form}, but {path} has no {name}")
    return found


def located(error: BaseException, file: Path) -> str | None:
    """Where in a user's file an error arose, and what it says, in one line.

    None where no code of the file was running.
    """
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == file]
    if not frames and not isinstance(error, SyntaxError):
        return None
    place = f"{file}:{error.lineno}" if isinstance(error, SyntaxError) else ""
    if frames:
        place = f"{file}:{frames[-1].lineno}, in {frames[-1].name}"
    text = (str(error).strip().splitlines() or [""])[0]
    return f"code that runs; {place}: {type(error).__name__}: {text}"


def digest(file: Path) -> str:
    """SHA-256 of a file, to see whether it has changed."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
