"""Where results come from: versions, device, revision."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("gipo_jax", "jax", "jaxlib", "flax", "optax", "gymnax", "numpy")


def describe() -> dict[str, Any]:
    """Versions of what computes, devices and processes, and this package's git revision if any."""
    devices = jax.devices()
    return {
        "revision": _revision(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "device": {"kind": devices[0].device_kind, "count": len(devices)},
        "processes": jax.process_count(),
    }


def _revision() -> str | None:
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        # An installed copy can lie inside an unrelated repository.
        if Path(git("rev-parse", "--show-toplevel")) != folder.parent:
            return None
        dirty = "-dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "HEAD") + dirty
    except (OSError, subprocess.SubprocessError):
        return None
