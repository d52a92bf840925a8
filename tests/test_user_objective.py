"""Objectives from a user's file: errors name the file, line and function, before any work."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from gipo_jax import cli, objectives, train
from gipo_jax.config import Config, HParams

MINE = """
import jax.numpy as jnp
from gipo_jax import objectives


def raises(log_ratio, advantage, power=1.0):
    return helper(log_ratio * power)


def helper(x):
    return x @ jnp.ones((3, 3, 7))  # line 11


def branches(log_ratio, advantage):
    if log_ratio[0, 0] > 0:  # line 15
        return log_ratio
    return advantage


def nothing(log_ratio, advantage):
    pass


def averaged(log_ratio, advantage):
    return jnp.mean(log_ratio * advantage)


def row(log_ratio, advantage):
    return (log_ratio * advantage)[:, 0]


def integer(log_ratio, advantage):
    return jnp.int32(log_ratio * advantage)


def wants_reward(log_ratio, advantage, reward):
    return log_ratio * reward


def takes_a_setting(log_ratio, advantage, gamma=1.0):
    return gamma * log_ratio * advantage


def needless_state(log_ratio, advantage):
    return log_ratio * advantage, jnp.zeros(())


@objectives.declare(initial_state=lambda params: jnp.zeros(()))
def forgets_state(log_ratio, advantage, state):
    return log_ratio * advantage


@objectives.declare(initial_state=lambda params: jnp.zeros(()))
def grows_state(log_ratio, advantage, state):
    return log_ratio * advantage, jnp.zeros(3)


@objectives.declare(initial_state=lambda params: params["width"])
def no_first_state(log_ratio, advantage, state, power=1.0):
    return log_ratio * advantage, state


@objectives.declare(positive=("width",))
def bounded(log_ratio, advantage, width=1.0):
    return jnp.exp(jnp.minimum(log_ratio, width)) * advantage
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    (tmp_path / "unfinished.py").write_text("def f(:\n", encoding="utf-8")
    (tmp_path / "imports.py").write_text("\nimport no_such_module\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        # What the user's code raises, where it raises it.
        ("mine.py:raises", ["mine.py:11", "helper", "TypeError", "'raises'"]),
        ("mine.py:branches", ["mine.py:15", "branches", "TracerBoolConversionError"]),
        ("imports.py:f", ["imports.py:2", "ModuleNotFoundError", "no_such_module"]),
        ("unfinished.py:f", ["unfinished.py:1", "SyntaxError"]),
        ("mine.py:absent", ["FILE.py:FUNCTION", "mine.py has no absent"]),
        ("absent.py:mine", ["absent.py", "no file"]),
        # What it should have taken or returned.
        ("mine.py:wants_reward", ["wants_reward", "reward", "behavior_log_prob"]),
        ("mine.py:nothing", ["nothing", "'None'", "float32[256, 1]"]),
        ("mine.py:averaged", ["averaged", "'float32[]'", "float32[256, 1]"]),
        ("mine.py:row", ["row", "'float32[256]'", "float32[256, 1]"]),
        ("mine.py:integer", ["integer", "'int32[256, 1]'", "float32[256, 1]"]),
        ("mine.py:needless_state", ["needless_state", "'tuple'", "surrogate"]),
        ("mine.py:forgets_state", ["forgets_state", "pair (surrogate, new state)"]),
        ("mine.py:grows_state", ["grows_state", "'float32[3]'", "float32[]"]),
        ("mine.py:takes_a_setting", ["takes_a_setting", "'gamma'", "another name"]),
        ("mine.py:no_first_state", ["no_first_state", "initial_state", "KeyError: 'width'"]),
    ],
)
def test_a_faulty_objective_ends_in_one_line_before_anything_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], objective: str, words: list[str]
) -> None:
    arguments = ["--hidden-sizes", "8", "--eval-episodes", "0", "--total-steps", "1024"]
    code = cli.main(["sweep", "--objective", objective, *arguments, "--out", "out"])
    message = capsys.readouterr().err
    assert code == 2
    assert message.count("\n") == 1 and "Traceback" not in message
    for word in words:
        assert word in message
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        (["width=0"], ["width", "> 0"]),
        (["width=1", "-2"], ["width", "-2", "> 0"]),
        (["width=wide"], ["width", "'wide'", "number"]),
        (["height=1"], ["height", "bounded", "width"]),
        (["width"], ["objective-arg", "NAME=VALUE"]),
    ],
)
def test_arguments_of_a_user_objective_are_checked_before_anything_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], argument: list[str], words: list[str]
) -> None:
    objective = ["--objective", "mine.py:bounded", "--objective-arg", *argument]
    code = cli.main(["sweep", *objective, "--total-steps", "1024", "--out", "out"])
    message = capsys.readouterr().err
    assert code == 2
    assert message.count("\n") == 1
    for word in words:
        assert word in message
    assert not (folder / "out").exists()


def test_listing_names_every_objective(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["objectives"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["NAME", "KIND", "PARAMETERS", "PAPER"]
    by_name = {row.split()[0]: row for row in rows}
    assert list(by_name) == list(objectives.KNOWN)
    for name, row in by_name.items():
        spec = objectives.spec(name)
        assert row.split()[1] == spec.kind
        assert spec.source in row
        assert all(f"{key}={value:g}" in row for key, value in spec.params.items())
    assert "kernel" in by_name["gipo"]


def test_a_run_freezes_before_the_update_that_makes_its_objective_state_nan() -> None:
    @objectives.declare(initial_state=lambda params: jnp.float32(0))
    def forgetful(log_ratio, advantage, state):  # type: ignore[no-untyped-def]
        return log_ratio * advantage, jnp.where(state < 2, state + 1, jnp.nan)

    config = Config(
        objective=forgetful, num_envs=2, rollout_length=4, batch_size=8, updates_per_iteration=1,
        total_steps=40, hidden_sizes=(4,), eval_episodes=0, num_logs=1, max_buffer_size=8,
    )  # fmt: skip
    state, _ = jax.jit(train.make_train(config))(HParams(buffer_size=8))
    assert state.diverged_at == 2
    assert state.learner.objective_state == 2
