"""A run of the tests ends, and says which test hung and where."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import programs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

# A native call that keeps the interpreter's lock and lets no signal through, and a program beside.
HANGS = """
import ctypes, pathlib, signal, subprocess

def test_passes_before():
    pass

def test_hangs():
    pathlib.Path(__file__).with_name("pid").write_text(str(subprocess.Popen(["sleep", "900"]).pid))
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    ctypes.PyDLL(None).sleep(900)

def test_passes_after():
    pass
"""
STACK = 'File ".*test_it.py", line 10 in test_hangs'


def run(folder: Path, *limits: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_it.py").write_text(HANGS)
    (folder / "pytest.ini").write_text("\n".join(["[pytest]", *limits]))
    command = ["-m", "pytest", "-p", "tests.limits", "-n", "2", "--dist=worksteal", "--durations=0"]
    return programs.run(*command, "-v", folder, COLUMNS="200")


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_test_that_hangs_in_a_native_call_is_ended_with_its_stack_and_the_others_are_run(
    tmp_path: Path,
) -> None:
    done = run(tmp_path, "faulthandler_timeout=5", "faulthandler_exit_on_timeout=true")
    assert done.returncode == 1
    assert re.search("FAILED .*test_it.py::test_hangs - worker .* crashed while", done.stdout)
    assert "1 failed, 2 passed" in done.stdout
    assert re.search(STACK, done.stderr)
    assert not running(int((tmp_path / "pid").read_text()))


def test_a_run_of_all_tests_is_ended_with_stacks_and_durations(tmp_path: Path) -> None:
    seconds = 5
    while not (tmp_path / "pid").exists():  # where it ended before the test began
        seconds *= 2
        done = run(tmp_path, f"total_timeout={seconds}")
    assert done.returncode in (1, 2)  # 1 where the end of its processes is noticed first
    assert re.search(r"running for \d+ s: .*test_it.py::test_hangs", done.stdout)
    assert "slowest durations" in done.stdout
    assert re.search(STACK, done.stderr)
    assert not running(int((tmp_path / "pid").read_text()))
