"""Interruptions: kills, signals, damaged checkpoints, full disks. All through the command."""

import dataclasses
import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from gipo_jax import sweep
from gipo_jax.config import ConfigError
from gipo_jax.domains.flow import tasks
from gipo_jax.sweep import checkpoint, results
from scripts import kill_test
from tests import programs

pytestmark = [pytest.mark.slow, pytest.mark.optimized]  # bits are those that users get

OPTIONS = sweep.Options(quiet=True, checkpoint_seconds=0, devices=1)


class StopError(Exception):
    """Raised in the middle of a sweep, as a kill would come."""


def runs() -> list[sweep.Run]:
    return sweep.expand(
        num_envs=2,
        rollout_length=4,
        batch_size=8,
        total_steps=96,
        hidden_sizes=(8,),
        num_logs=3,
        eval_episodes=0,
        buffer_size=[16, 64],
        max_buffer_size=64,
        sigma=[0.5, 1.0, 2.0],
        seed_offset=3,
    )


def die_after(monkeypatch: pytest.MonkeyPatch, saves: int) -> None:
    """Lets a number of checkpoints pass, then dies right after one."""
    save = checkpoint.save
    left = [saves]

    def counted(*arguments: object) -> Path:
        path = save(*arguments)  # type: ignore[arg-type]
        left[0] -= 1
        if left[0] == 0:
            raise StopError
        return path

    monkeypatch.setattr(checkpoint, "save", counted)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("alone")
    sweep.run(runs(), directory, OPTIONS)
    return directory


@pytest.fixture(scope="module")
def died(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("died")
    with pytest.MonkeyPatch.context() as patch:
        die_after(patch, 2)
        with pytest.raises(StopError):
            sweep.run(runs(), directory, OPTIONS)
    return directory


@pytest.fixture
def stopped(died: Path, tmp_path: Path) -> Path:
    """A sweep that died with two checkpoints of running programs."""
    return shutil.copytree(died, tmp_path / "stopped")


def same(one: Path, other: Path) -> bool:
    return not kill_test.differences(one, other)


def test_a_resumed_sweep_ends_with_the_same_bytes(alone: Path, stopped: Path) -> None:
    sweep.run(runs(), stopped, OPTIONS, resume=True)
    assert same(alone, stopped)


def test_a_sweep_resumed_in_another_batch_mode_has_the_same_tables(
    alone: Path, stopped: Path
) -> None:
    options = sweep.Options(quiet=True, checkpoint_seconds=0, batch_mode="loop", devices=1)
    sweep.run(runs(), stopped, options, resume=True)
    for name in kill_test.COMPARED:
        assert (alone / name).read_bytes() == (stopped / name).read_bytes()


@pytest.mark.parametrize(
    ("env", "settings"),
    [
        ("flow/ring", {"hidden_sizes": (8,)}),
        pytest.param(
            "tokens/reverse", {"decoder_layers": 1, "decoder_width": 8}, marks=pytest.mark.long
        ),
    ],
)
def test_flows_and_token_tasks_resume_to_the_same_bytes(
    env: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = tasks.ring()._replace(pretrain_steps=2)
    monkeypatch.setitem(tasks.TASKS, "flow/ring", lambda: short)
    runs = sweep.expand(
        env=env,
        num_envs=2,
        rollout_length=2,
        batch_size=4,
        total_steps=32,
        num_logs=4,
        eval_episodes=0,
        buffer_size=[4, 16],
        **settings,
    )
    sweep.run(runs, tmp_path / "alone", OPTIONS)
    with monkeypatch.context() as patch:
        die_after(patch, 2)
        with pytest.raises(StopError):
            sweep.run(runs, tmp_path / "stopped", OPTIONS)
    assert not same(tmp_path / "alone", tmp_path / "stopped")
    sweep.run(runs, tmp_path / "stopped", OPTIONS, resume=True)
    assert same(tmp_path / "alone", tmp_path / "stopped")


@pytest.mark.parametrize("name", ["arrays/state/manifest.ocdbt", "progress.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "garbled", "missing"])
def test_a_damaged_checkpoint_is_passed_over(
    stopped: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sorted((stopped / "checkpoints").iterdir())[-1] / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content if damage == "garbled" else content[: len(content) // 2])
    warned: list[str] = []
    assert checkpoint.newest(stopped / "checkpoints", warned.append) == 1
    assert len(warned) == 1 and "00000002 is damaged" in warned[0]


def test_a_sweep_resumed_from_the_checkpoint_before_a_damaged_one_ends_the_same(
    alone: Path, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (stopped / "checkpoints/00000002/arrays/state/manifest.ocdbt").write_bytes(b"")
    sweep.run(runs(), stopped, OPTIONS, resume=True)
    assert "checkpoint 00000002 is damaged" in capsys.readouterr().err
    assert same(alone, stopped)


def test_a_sweep_of_which_every_checkpoint_is_damaged_is_refused_untouched(stopped: Path) -> None:
    for path in stopped.glob("checkpoints/*/manifest.json"):
        path.write_text("{")
    metrics = (stopped / "metrics.csv").read_bytes()
    with pytest.raises(checkpoint.CheckpointError, match="delete that folder"):
        sweep.run(runs(), stopped, OPTIONS, resume=True)
    assert (stopped / "metrics.csv").read_bytes() == metrics


def test_resuming_with_other_settings_is_refused(stopped: Path) -> None:
    others = [
        dataclasses.replace(r, hparams=dataclasses.replace(r.hparams, gamma=0.5)) for r in runs()
    ]
    with pytest.raises(ConfigError, match=r"^gamma: 0.5 is not valid; expected 0.99"):
        sweep.run(others, stopped, OPTIONS, resume=True)
    with pytest.raises(ConfigError, match=r"^number of runs: 5"):
        sweep.run(runs()[:5], stopped, OPTIONS, resume=True)


def test_a_checkpoint_of_another_version_is_refused(stopped: Path) -> None:
    newest = sorted((stopped / "checkpoints").iterdir())[-1]
    stored = json.loads((newest / "progress.json").read_text())
    (newest / "progress.json").write_text(json.dumps(stored | {"format": 99}))
    (newest / "manifest.json").write_text(json.dumps(checkpoint._checksums(newest)))
    with pytest.raises(checkpoint.CheckpointError, match="format 99"):
        sweep.run(runs(), stopped, OPTIONS, resume=True)


def test_a_results_folder_of_another_version_is_refused(stopped: Path) -> None:
    stored = json.loads((stopped / "config.json").read_text())
    (stopped / "config.json").write_text(json.dumps(stored | {"format": 99}))
    with pytest.raises(results.ResultsError, match="format 99"):
        sweep.run(runs(), stopped, OPTIONS, resume=True)


def test_a_finished_sweep_resumes_to_itself(alone: Path, tmp_path: Path) -> None:
    shutil.copytree(alone, tmp_path / "copy")
    summary = sweep.run(runs(), tmp_path / "copy", OPTIONS, resume=True)
    assert summary.compilations == 0
    assert same(alone, tmp_path / "copy")


def test_only_the_last_two_checkpoints_are_kept(alone: Path) -> None:
    assert len(list((alone / "checkpoints").iterdir())) == 2


def test_a_failed_save_leaves_earlier_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = checkpoint.save(tmp_path, 1, {"n": 1}, None)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_arrays", full)
    with pytest.raises(checkpoint.CheckpointError, match="No space left on device") as caught:
        checkpoint.save(tmp_path, 2, {"n": 2}, [1])
    assert "\n" not in str(caught.value)
    assert checkpoint.newest(tmp_path, pytest.fail) == 1
    assert checkpoint.read_progress(first) == {"n": 1}


# In a program of its own, where a file may not grow beyond 100 KB: that fails as on a full disk.
FULL = """
import pathlib, resource, sys
import numpy as np
from gipo_jax.sweep import checkpoint

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoint.save(pathlib.Path(sys.argv[1]), 2, {}, [np.arange(100_000)])
except checkpoint.CheckpointError as error:
    print(error)
"""


def test_a_checkpoint_that_finds_no_room_fails_with_one_line(tmp_path: Path) -> None:
    first = checkpoint.save(tmp_path, 1, {"n": 1}, None)
    done = programs.run("-c", FULL, tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert "cannot write a checkpoint" in done.stdout and "File too large" in done.stdout
    assert done.stdout.count("\n") == 1
    assert checkpoint.newest(tmp_path, pytest.fail) == 1
    assert checkpoint.read_progress(first) == {"n": 1}


@pytest.mark.long
def test_a_sweep_killed_three_times_ends_like_one_left_alone(tmp_path: Path) -> None:
    settings = [word for word in kill_test.SETTINGS if word != "ppo_clip"]
    assert kill_test.check(tmp_path, 3, random.Random(0), print, settings) == []


def begin(out: Path, before: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    """Starts a sweep that would take long."""
    arguments = [word for word in kill_test.SETTINGS if word != "ppo_clip"]
    arguments[arguments.index("--total-steps") + 1] = "1600000"
    arguments[arguments.index("--num-logs") + 1] = "10000"
    arguments += ["--checkpoint-seconds", "0", "--no-figures", "--out", str(out)]
    return programs.start("-m", "gipo_jax", "sweep", *arguments, before=before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    out = tmp_path / "sweep"
    process = begin(out)
    while process.poll() is None and not list(out.glob("checkpoints/*/manifest.json")):
        time.sleep(0.05)
    process.send_signal(number)
    error = programs.wait(process).stderr
    assert process.returncode == code, error
    assert f"stopped by {number.name}, everything is saved" in error.splitlines()[-1]
    assert "gipo-jax sweep --resume --out" in error.splitlines()[-1]
    assert "Traceback" not in error
    newest = checkpoint.newest(out / "checkpoints", pytest.fail)
    progress = checkpoint.read_progress(out / "checkpoints" / f"{newest:08d}")
    # Saved after the last row, not only at some earlier point.
    assert progress["metrics_bytes"] == (out / "metrics.csv").stat().st_size


def test_a_full_disk_is_one_line_and_the_sweep_can_go_on(tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    # Writing beyond 40 KB in a file fails as on a full disk.
    process = begin(out, ("bash", "-c", 'ulimit -f 40; exec "$@"', "-"))
    error = programs.wait(process).stderr
    last = error.splitlines()[-1]
    assert process.returncode == 1, error
    assert "cannot write" in last and "File too large" in last
    assert "Traceback" not in error
    assert checkpoint.newest(out / "checkpoints", pytest.fail) is not None
