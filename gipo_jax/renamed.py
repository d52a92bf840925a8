"""Old names that stay for a release, with a warning."""

import importlib
import importlib.util
import warnings
from typing import Any


def submodule(old: str, new: str, name: str) -> Any:
    """The module ``name`` of the package ``new``, which was asked for as ``old``."""
    if name.startswith("_") or importlib.util.find_spec(f"{new}.{name}") is None:
        raise AttributeError(f"module {old!r} has no attribute {name!r}")
    text = f"{old}.{name} is now {new}.{name}; the old name goes with the next release"
    warnings.warn(text, DeprecationWarning, stacklevel=3)
    return importlib.import_module(f"{new}.{name}")
