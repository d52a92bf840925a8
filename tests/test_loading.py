"""Trained runs as objects, the documented example, and log callbacks."""

import re
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import gipo_jax
from gipo_jax import sweep
from gipo_jax.config import ConfigError
from gipo_jax.sweep import report, results

pytestmark = pytest.mark.timeout(300)

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "sweeps.md"


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
