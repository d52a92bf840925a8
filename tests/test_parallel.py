"""Several devices and several processes, forced on one host, in programs of their own."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from gipo_jax import sweep
from gipo_jax.sweep import checkpoint, grid, results

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

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


LONG = ("--total-steps", "4800", "--num-logs", "100")
INSIDE = sweep.Options(quiet=True, checkpoint_seconds=0, devices=1)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Left alone, by one process."""
    directory = tmp_path_factory.mktemp("long") / "sweep"
    finish(start(directory, 1, *SETTINGS, *LONG, "--checkpoint-seconds", "60"))
    return directory


def kill_midway(processes: list["subprocess.Popen[str]"], folders: list[Path]) -> None:
    """Kills all once each has saved runs that it is in the middle of."""

    def midway(folder: Path) -> bool:
        found = checkpoint.newest(folder / "checkpoints", lambda text: None)
        return found is not None and any(part["point"] > 2 for part in found[1]["started"])

    while not all(midway(folder) for folder in folders):
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        time.sleep(0.1)
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two processes that were killed."""
    out = tmp_path_factory.mktemp("of_two") / "sweep"
    folders = results.process_folders(out, 2)
    kill_midway(together(out, *SETTINGS, *LONG), folders)
    return out


def resume_alone(directory: Path) -> None:
    runs = grid.decode(results.read_config(directory)["groups"])
    sweep.run(runs, directory, INSIDE, resume=True)


def test_one_process_goes_on_for_two(long: Path, of_two: Path, tmp_path: Path) -> None:
    out = shutil.copytree(of_two, tmp_path / "sweep")
    points = [covered(folder) for folder in results.process_folders(out, 2)]
    resume_alone(out)
    assert min(points) > 0
    assert tables(out) == tables(long)
    assert results.read_config(out)["processes"] == 1


def test_two_processes_go_on_for_one(long: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    # Its arrays lie on two devices, those of the processes on one.
    kill_midway([start(out, 2, *SETTINGS, *LONG)], [out])
    for process in together(out, "--resume"):
        finish(process)
    assert tables(out) == tables(long)
    assert results.read_config(out)["processes"] == 2


class StopError(Exception):
    """Raised in the middle of regrouping, as a kill would come."""


@pytest.mark.parametrize("moment", ["first save", "configuration", "second save"])
def test_a_kill_while_regrouping_loses_nothing(
    long: Path, of_two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    out = shutil.copytree(of_two, tmp_path / "sweep")
    owner, name = (results, "write_atomic") if moment == "configuration" else (checkpoint, "save")
    left = [2 if moment == "second save" else 1]
    original = getattr(owner, name)

    def then_die(path: Path, *arguments: Any) -> Any:
        done = original(path, *arguments)
        left[0] -= name == "save" or path.name == results.CONFIG
        if left[0] == 0:
            raise StopError
        return done

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, then_die)
        with pytest.raises(StopError):
            resume_alone(out)
    if moment == "first save":
        # The folders of the two still count, whoever goes on.
        assert results.read_config(out)["processes"] == 2
        for process in together(out, "--resume"):
            finish(process)
    else:
        assert results.read_config(out)["processes"] == 1
        resume_alone(out)
    assert tables(out) == tables(long)


def together(
    out: Path, *arguments: str, last: tuple[str, ...] = ()
) -> list["subprocess.Popen[str]"]:
    """Starts two processes of a sweep; ``last`` goes to the second alone."""
    with contextlib.closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    meet = ("--distributed", "--coordinator-address", f"127.0.0.1:{port}", "--num-processes", "2")
    own = [("--process-id", "0"), ("--process-id", "1", *last)]
    return [start(out, 1, *arguments, *meet, *words) for words in own]


def test_two_processes_give_what_one_gives(one: Path, tmp_path: Path) -> None:
    for process in together(tmp_path / "sweep", *SETTINGS, *SHORT):
        finish(process)
    assert tables(tmp_path / "sweep") == tables(one)
    parts = [
        pd.read_csv(folder / results.RUNS).run.tolist()
        for folder in sorted((tmp_path / "sweep" / "processes").glob("?-of-2"))
    ]
    assert parts == [[0, 1, 2], [3, 4, 5]]


def test_a_mistake_of_one_process_ends_the_other(tmp_path: Path) -> None:
    processes = together(tmp_path / "sweep", *SETTINGS, *SHORT, last=("--devices", "9"))
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "process 1 was stopped" in errors[0] and "devices: 9" in errors[1]
    assert not (tmp_path / "sweep").exists()


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
