"""Trained runs as objects, the documented example, and log callbacks."""

import re
import struct
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import gipo_jax
from gipo_jax import sweep
from gipo_jax.config import ConfigError
from gipo_jax.sweep import report, results
from tests.programs import ROOT

DOCUMENT = ROOT / "docs" / "sweeps.md"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short sweep of an environment that gymnax can draw without more packages."""
    directory = tmp_path_factory.mktemp("trained") / "results"
    rows: list[Any] = []
    runs = sweep.expand(
        env="Catch-bsuite",
        num_envs=2,
        rollout_length=4,
        batch_size=8,
        total_steps=96,
        hidden_sizes=(8,),
        num_logs=3,
        eval_episodes=0,
        buffer_size=16,
        seeds=2,
        normalize_obs=True,
    )

    def fail(rows: Any) -> None:
        raise RuntimeError("on purpose")

    def both(points: Any) -> None:
        rows.extend(points)
        fail(points)

    options = sweep.Options(quiet=True, tensorboard=True, devices=1)
    sweep.run(runs, directory, options, on_log=both)
    assert [row["run"] for row in rows] == [0, 1]  # switched off after it failed
    return directory


def test_a_loaded_policy_acts(trained: Path) -> None:
    runs = [gipo_jax.load(trained, run=run) for run in range(2)]
    assert [run.hparams.seed for run in runs] == [0, 1]
    obs, _ = runs[0].env.reset(jax.random.key(0), 5)
    greedy = runs[0].policy(obs)
    assert greedy.shape == (5,)
    assert runs[0].policy(obs[0]) == greedy[0]
    assert runs[0].policy(obs, jax.random.key(1)).shape == (5,)
    first, second = (np.asarray(jax.tree.leaves(run.params)[0]) for run in runs)
    assert not np.array_equal(first, second)


def test_loading_a_run_that_is_not_there_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^run: 2 "):
        gipo_jax.load(trained, run=2)
    with pytest.raises(results.ResultsError, match="holds no sweep"):
        gipo_jax.load(tmp_path)


def test_the_documented_example_draws_an_episode(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.S)
    example = next(block for block in blocks if "gipo_jax.load" in block)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "example").symlink_to(trained)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    exec(compile(example, str(DOCUMENT), "exec"), {})
    assert (tmp_path / "episode.gif").read_bytes().startswith(b"GIF")


def test_tensorboard_files_are_written(trained: Path) -> None:
    assert len(list(trained.glob("tensorboard/*/events*"))) == 2


def events(directory: Path) -> list[Any]:
    """The events of all files of TensorBoard under a folder, the oldest file first."""
    from tensorboardX.proto import event_pb2

    found = []
    for file in sorted(directory.rglob("events*"), key=lambda path: path.stat().st_mtime_ns):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack("<Q", data[at : at + 8])
            found.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return found


def row(run: int, env_steps: int) -> dict[str, Any]:
    return {"run": run, "iteration": env_steps // 8, "env_steps": env_steps, "entropy": 0.5}


def test_tensorboard_drops_the_points_that_a_resumed_sweep_makes_again(tmp_path: Path) -> None:
    for steps in ((8, 16, 24), (16, 24)):
        board = report.TensorBoard(tmp_path, ["run"], pytest.fail)
        for number in steps:
            board([row(0, number)])
        board.close()
    starts = [e.step for e in events(tmp_path) if e.WhichOneof("what") == "session_log"]
    # TensorBoard forgets what an earlier session wrote from the start of the next one on.
    assert starts[-1] == 16


@pytest.mark.parametrize("clock", [2e9 + 100, 2e9, 1.9e9])
def test_tensorboard_shows_each_point_once_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: float
) -> None:
    for now, steps in ((2e9, (8, 16, 24)), (clock, (16, 24, 32)), (clock, (32, 40))):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        board = report.TensorBoard(tmp_path, ["run"], pytest.fail)
        for number in steps:
            board([row(0, number)])
        board.close()
    assert report.event_steps(tmp_path) == {0: [8, 16, 24, 32, 40]}


def test_tensorboard_takes_names_of_any_length_and_a_fault_of_one_run_leaves_the_others(
    tmp_path: Path,
) -> None:
    warned: list[str] = []
    board = report.TensorBoard(tmp_path, ["long" * 100, "b", "c"], warned.append)
    (tmp_path / "00001 b").write_text("in the way")
    for steps in (8, 16):
        board([row(run, steps) for run in range(3)])
    board.close()
    written = [event.step for event in events(tmp_path) if event.summary.value]
    assert sorted(written) == [8, 8, 16, 16]
    assert len(warned) == 1 and "00001 b" in warned[0]


def hang(event: threading.Event) -> None:
    event.wait()


def test_a_log_callback_that_hangs_holds_up_nothing() -> None:
    never = threading.Event()
    warned: list[str] = []
    dispatcher = report.Dispatcher([lambda rows: hang(never)], warned.append)
    for _ in range(report.WAITING + 5):
        dispatcher.send([])
    dispatcher.close(seconds=0.2)
    never.set()
    assert any("still busy" in text for text in warned)
    assert any("dropped" in text for text in warned)
