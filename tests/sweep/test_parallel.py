"""Several devices and several processes, forced on one host, in programs of their own."""

import contextlib
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest

from gipo_jax import sweep
from gipo_jax.sweep import checkpoint, grid, results
from tests import programs

pytestmark = pytest.mark.slow

SETTINGS = (
    *("--sigma", "0.5", "1", "2", "--num-envs", "2", "--rollout-length", "4"),
    *("--batch-size", "8", "--hidden-sizes", "8", "--num-logs", "100", "--total-steps", "4800"),
    *("--eval-episodes", "0", "--buffer-size", "16", "--seeds", "2"),
)
EACH_POINT = ("--checkpoint-seconds", "0")
INSIDE = sweep.Options(quiet=True, checkpoint_seconds=60, devices=1)

Processes = list["subprocess.Popen[str]"]


def start(out: Path, devices: int, *arguments: str) -> "subprocess.Popen[str]":
    flags = (
        f"--xla_force_host_platform_device_count={devices}"
        " --xla_cpu_enable_concurrency_optimized_scheduler=false"
    )
    command = ("-m", "gipo_jax", "sweep", "--out", str(out), "--no-figures", *arguments)
    return programs.start(*command, XLA_FLAGS=flags)


def start_two(out: Path, *arguments: str, second: tuple[str, ...] = ()) -> Processes:
    """Starts two processes of a sweep; ``second`` goes to the second alone."""
    with contextlib.closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    meet = ("--distributed", "--coordinator-address", f"127.0.0.1:{port}", "--num-processes", "2")
    own = [("--process-id", "0"), ("--process-id", "1", *second)]
    return [start(out, 1, *arguments, *meet, *words) for words in own]


def finish(*processes: "subprocess.Popen[str]") -> list[str]:
    """Waits for processes to end well; what each said."""
    ended = [programs.wait(process) for process in processes]
    assert [done.returncode for done in ended] == [0] * len(processes), ended
    return [done.stderr for done in ended]


def tables(directory: Path) -> list[bytes]:
    return [(directory / name).read_bytes() for name in (results.RUNS, results.METRICS)]


def resume_alone(directory: Path) -> None:
    runs = grid.decode(results.read_config(directory)["groups"])
    sweep.run(runs, directory, INSIDE, resume=True)


def wait_until_midway(processes: Processes, out: Path, beyond: int = 0) -> None:
    """Waits for two checkpoints in the middle of training, after a number of earlier ones."""
    while not (out / "checkpoints" / f"{beyond + 2:08d}").exists():
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        time.sleep(0.02)


def kill_one(processes: Processes, victim: int) -> tuple[float, int, str]:
    """Kills one of two processes: seconds that the other lives on, its exit code, what it said."""
    processes[victim].kill()
    began = time.monotonic()
    done = programs.wait(processes[1 - victim])
    programs.wait(processes[victim])
    return time.monotonic() - began, done.returncode, done.stderr


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of one process and one device."""
    directory = tmp_path_factory.mktemp("uninterrupted") / "sweep"
    finish(start(directory, 1, *SETTINGS))
    return directory


@pytest.fixture(scope="module")
def killed_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two processes, of which the second was killed in the middle of training."""
    out = tmp_path_factory.mktemp("killed_pair") / "sweep"
    processes = start_two(out, *SETTINGS, *EACH_POINT)
    wait_until_midway(processes, out)
    seconds, code, error = kill_one(processes, victim=1)
    assert seconds < 90
    assert code == 75, error
    assert "another process is gone; continue with: gipo-jax sweep --resume" in error
    return out


def test_tables_do_not_depend_on_the_number_of_devices(uninterrupted: Path, tmp_path: Path) -> None:
    # Six runs on four devices: two places are filled up, and dropped.
    finish(start(tmp_path / "sweep", 4, *SETTINGS))
    assert tables(tmp_path / "sweep") == tables(uninterrupted)


@pytest.mark.parametrize(
    "devices", [pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long), 4]
)
def test_one_process_resumes_a_sweep_of_two_on_any_number_of_devices(
    uninterrupted: Path, killed_pair: Path, tmp_path: Path, devices: int
) -> None:
    out = shutil.copytree(killed_pair, tmp_path / "sweep")
    assert (out / results.METRICS).stat().st_size > 0
    finish(start(out, devices, "--resume"))
    assert tables(out) == tables(uninterrupted)
    config = results.read_config(out)
    assert config["provenance"]["processes"] == 2
    assert config["resumed"][-1]["provenance"]["processes"] == 1
    assert config["resumed"][-1]["provenance"]["device"]["count"] == devices


@pytest.mark.long
def test_two_processes_resume_a_sweep_of_one_and_survive_the_death_of_process_0(
    uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    alone = start(out, 2, *SETTINGS, *EACH_POINT)
    wait_until_midway([alone], out)
    alone.kill()
    alone.communicate()
    newest = checkpoint.newest(out / "checkpoints", pytest.fail)
    assert newest is not None
    processes = start_two(out, "--resume", *EACH_POINT)
    wait_until_midway(processes, out, beyond=newest)
    # The processes are connected through process 0.
    seconds, code, _ = kill_one(processes, victim=0)
    assert seconds < 90
    assert code != 0
    newest = checkpoint.newest(out / "checkpoints", pytest.fail)
    (out / "checkpoints" / f"{newest:08d}" / "progress.json").write_text("{")
    first, second = finish(*start_two(out, "--resume"))
    assert f"checkpoint {newest:08d} is damaged" in first
    assert "damaged" not in second
    assert tables(out) == tables(uninterrupted)


def test_a_signal_to_one_process_stops_both_at_the_same_point(
    uninterrupted: Path, killed_pair: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(killed_pair, tmp_path / "sweep")
    newest = checkpoint.newest(out / "checkpoints", pytest.fail)
    assert newest is not None
    # In loop mode two runs are trained at a time: of the six that were started, four have to wait.
    processes = start_two(out, "--resume", "--batch-mode", "loop", *EACH_POINT)
    wait_until_midway(processes, out, beyond=newest)
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        done = programs.wait(process)
        assert done.returncode == 75, done.stderr
        assert "stopped by SIGTERM, everything is saved" in done.stderr.splitlines()[-1]
    newest = checkpoint.newest(out / "checkpoints", pytest.fail)
    progress = checkpoint.read_progress(out / "checkpoints" / f"{newest:08d}")
    assert [part["runs"] for part in progress["started"]] == [[0, 1], [2, 3], [4, 5]]
    assert progress["metrics_bytes"] == (out / results.METRICS).stat().st_size
    resume_alone(out)
    # Compiled with few optimizations, a loop rounds otherwise than vmap; test_sweep has their bits.
    for name in (results.RUNS, results.METRICS):
        found, expected = (pd.read_csv(folder / name) for folder in (out, uninterrupted))
        pd.testing.assert_frame_equal(found, expected, rtol=1e-4, atol=1e-5)


def test_a_mistake_of_one_process_ends_the_other(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    elsewhere = str(tmp_path / "file" / "sweep")
    processes = start_two(tmp_path / "sweep", *SETTINGS, second=("--out", elsewhere))
    ended = [programs.wait(process) for process in processes]
    assert [done.returncode for done in ended] == [2, 2], ended
    assert "process 1 does not" in ended[0].stderr and "is a file" in ended[1].stderr
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("both", "second", "message"),
    [
        (("--memory-limit", "1KB"), (), "memory_limit"),
        (("--gamma", "7"), (), "gamma"),
        ((), ("--gamma", "0.5"), "the same settings in all processes"),
    ],
)
def test_a_mistake_ends_all_processes_with_one_line(
    tmp_path: Path, both: tuple[str, ...], second: tuple[str, ...], message: str
) -> None:
    for process in start_two(tmp_path / "sweep", *SETTINGS, *both, second=second):
        done = programs.wait(process)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not (tmp_path / "sweep").exists()
