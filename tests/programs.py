"""Programs that tests start: each has a limit, and none outlives its test.

The limit is for what hangs: a machine that is ten times busier than usual stays within it.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 800
_started: list["subprocess.Popen[str]"] = []


def start(
    *command: str | Path, before: tuple[str, ...] = (), **environment: str
) -> subprocess.Popen[str]:
    """Starts Python in this checkout, which it imports; :func:`end_all` kills it after the test.

    Args:
        command: arguments of Python.
        before: program that starts Python, with its arguments.
        environment: variables of the environment besides those of this process.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [*before, sys.executable, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path} | environment,
    )
    _started.append(process)
    return process


def wait(process: "subprocess.Popen[str]") -> subprocess.CompletedProcess[str]:
    """Returns how a program ended and what it said."""
    output, error = process.communicate(timeout=SECONDS)
    return subprocess.CompletedProcess(process.args, process.returncode, output, error)


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Starts Python as :func:`start` does, and waits for its end."""
    return wait(start(*command, **options))


def end_all() -> None:
    """Kills the programs that are still running."""
    while _started:
        process = _started.pop()
        process.kill()
        process.communicate()
