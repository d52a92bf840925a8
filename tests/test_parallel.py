"""Several devices and several processes, forced on one host, in programs of their own."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from gipo_jax import checkpoint, results

pytestmark = pytest.mark.timeout(400)

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = (
    *("--sigma", "0.5", "1", "2", "--num-envs", "2", "--rollout-length", "4"),
    *("--batch-size", "8", "--hidden-sizes", "8", "--num-logs", "3"),
    *("--eval-episodes", "0", "--buffer-size", "16", "--seeds", "2"),
    *("--checkpoint-seconds", "0"),
)
SHORT = ("--total-steps", "96")


def start(out: Path, devices: int, *arguments: str) -> "subprocess.Popen[str]":
    flags = (
        f"--xla_force_host_platform_device_count={devices}"
        " --xla_cpu_enable_concurrency_optimized_scheduler=false"
    )
    return subprocess.Popen(
        [sys.executable, "-m", "gipo_jax", "sweep", "--out", str(out), *arguments],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags},
    )


def finish(process: "subprocess.Popen[str]") -> str:
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 0, error
    return error


def tables(directory: Path) -> list[bytes]:
    return [(directory / name).read_bytes() for name in (results.RUNS, results.METRICS)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("one") / "sweep"
    finish(start(directory, 1, *SETTINGS, *SHORT))
    return directory


@pytest.mark.parametrize("devices", [2, 4])
def test_results_do_not_depend_on_the_number_of_devices(
    one: Path, tmp_path: Path, devices: int
) -> None:
    # Six runs on four devices: two places are filled up, and dropped.
    finish(start(tmp_path / "sweep", devices, *SETTINGS, *SHORT))
    assert tables(tmp_path / "sweep") == tables(one)


def together(out: Path, *arguments: str) -> list["subprocess.Popen[str]"]:
    with contextlib.closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    meet = ("--distributed", "--coordinator-address", f"127.0.0.1:{port}", "--num-processes", "2")
    return [start(out, 1, *arguments, *meet, "--process-id", str(index)) for index in range(2)]


def test_two_processes_give_what_one_gives(one: Path, tmp_path: Path) -> None:
    for process in together(tmp_path / "sweep", *SETTINGS, *SHORT):
        finish(process)
    assert tables(tmp_path / "sweep") == tables(one)
    parts = [
        pd.read_csv(folder / results.RUNS).run.tolist()
        for folder in sorted((tmp_path / "sweep" / "processes").glob("?-of-2"))
    ]
    assert parts == [[0, 1, 2], [3, 4, 5]]


def test_a_mistake_ends_all_processes(tmp_path: Path) -> None:
    for process in together(tmp_path / "sweep", *SETTINGS, *SHORT, "--memory-limit", "1KB"):
        error = process.communicate(timeout=200)[1]
        assert process.returncode == 2
        assert "memory_limit" in error and "Traceback" not in error
    assert not (tmp_path / "sweep").exists()


def test_when_a_process_dies_the_other_says_so_and_the_sweep_resumes(tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    long = [*SETTINGS, "--total-steps", "9600000"]
    long[long.index("--num-logs") + 1] = "20000"
    folders = [out / "processes" / f"{index}-of-2" for index in range(2)]
    arguments = [*long, "--checkpoint-seconds", "2"]
    saved = [-1, -1]
    # Process 0 is the one that the others found each other through.
    for victim in (1, 0):
        processes = together(out, *arguments)
        # Both go on from where they were: what a checkpoint covers is never written again.
        while any(covered(folder) <= size for folder, size in zip(folders, saved, strict=True)):
            assert all(process.poll() is None for process in processes), processes[0].communicate()
            time.sleep(0.1)
        processes[victim].kill()
        killed_at = time.monotonic()
        error = processes[1 - victim].communicate(timeout=120)[1]
        assert time.monotonic() - killed_at < 60
        assert processes[1 - victim].returncode == 75, error
        last = error.splitlines()[-1]
        assert f"process {victim} has died, everything is saved" in last and "--resume" in last
        assert "Traceback" not in error
        saved = [covered(folder) for folder in folders]
        arguments = ["--resume", "--checkpoint-seconds", "2"]


def covered(folder: Path) -> int:
    """Bytes of metrics that the newest checkpoint of a process covers."""
    found = checkpoint.newest(folder / "checkpoints", print)
    return -1 if found is None else found[1]["metrics_bytes"]
