"""The command: options, and one line for every mistake, before anything is compiled or written."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import gipo_jax
from gipo_jax import cli, sweep
from gipo_jax.config import ConfigError
from gipo_jax.sweep import results, runner

BARE = (
    *("--num-envs", "2", "--rollout-length", "4", "--batch-size", "8", "--total-steps", "96"),
    *("--hidden-sizes", "8", "--num-logs", "3", "--eval-episodes", "0"),
    "--quiet",
    "--no-figures",
)
SMALL = (*BARE, "--buffer-size", "16")

MINE = """
import jax.numpy as jnp

def mine(log_ratio, advantage, bound=2.0):
    return jnp.minimum(jnp.exp(log_ratio), bound) * advantage

def broken(log_ratio, advantage):
    return undefined_name * advantage
"""


@pytest.fixture
def mine(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return str(path)


def fails(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """The one line that a command line with a mistake gives."""
    assert cli.main(arguments) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("gipo-jax: "), error
    return error


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ("--env Nowhere-v0", ("env", "Nowhere-v0", "CartPole-v1")),
        ("--objective gippo", ("objective", "gippo", "ppo_clip")),
        ("--objective ppo_clip --sigma 1", ("sigma", "ppo_clip", "clip_eps")),
        ("--sigma 0", ("sigma", "0")),
        ("--sigma nan", ("sigma", "nan")),
        ("--sigma one", ("sigma", "one")),
        ("--gamma 1.5", ("gamma", "1.5", "[0, 1]")),
        ("--gamma 0.9 -0.1", ("gamma", "-0.1")),
        ("--seeds 0", ("seeds", "0")),
        ("--seeds two", ("seeds", "two")),
        ("--num-envs x", ("num_envs", "x")),
        ("--buffer-size 12", ("buffer_size", "12", "multiple of")),
        ("--buffer-size 8 --batch-size 16", ("buffer_size", "8", "batch_size 16")),
        ("--total-steps 97", ("total_steps", "97")),
        ("--log paper", ("log", "paper", "tensorboard")),
        ("--batch-mode fast", ("batch_mode", "fast", "vmap")),
        ("--memory-limit much", ("memory_limit", "much", "8GB")),
        ("--kernel square", ("kernel", "square", "cauchy")),
        ("--env CartPole-v1 --action-head gaussian", ("action_head", "gaussian")),
        ("--no-such-option 3", ("--no-such-option",)),
        ("--objective-arg sigma", ("objective-arg", "NAME=VALUE")),
        ("--objective-arg width=3", ("width", "sigma")),
        ("--objective nowhere.py:f", ("objective", "nowhere.py")),
        ("--num-processes 2", ("--num-processes", "--distributed")),
        ("--sigma 1 --sigma 2", ("--sigma", "twice")),
        ("--clip-eps .1 --clip-eps .2 --objective ppo_clip", ("--clip-eps", "twice")),
        ("--objective-arg sigma=1 --objective-arg sigma=2", ("objective-arg", "sigma", "twice")),
        ("--sigma 3 --objective-arg sigma=2", ("sigma", "2", "[3]", "twice")),
        ("--env-arg gravity=1 --env-arg gravity=2", ("env-arg", "gravity", "twice")),
        ("--map-lanes 2 --batch-mode loop", ("map_lanes", "batch mode map")),
        ("--sigma 1e-46", ("sigma", "1e-46", "float32")),
        ("--learning-rate 1e39", ("learning_rate", "1e+39", "float32")),
        ("--objective spo --objective-arg eps=1e39", ("eps", "1e+39", "float32")),
        ("--total-steps 137438953472", ("total_steps", "137438953472", "2^31 iterations")),
        ("--env CartPole-v1:gravity=nan", ("env", "gravity=nan", "gravity=9.8")),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: str, names: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    settings = BARE if "--buffer-size" in arguments else SMALL
    error = fails(capsys, "sweep", *settings, *arguments.split(), "--out", str(out))
    for name in names:
        assert name in error
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ("--list --preset full", ("--list", "alone")),
        ("--list bounds", ("--list", "alone")),
        ("bounds --plot-only --preset full", ("--preset", "--plot-only")),
        ("--plot-only --part 2/2", ("--part", "--plot-only")),
    ],
)
def test_an_option_of_reproduce_that_would_do_nothing_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: str, names: tuple[str, ...]
) -> None:
    error = fails(capsys, "reproduce", *arguments.split())
    assert all(name in error for name in names), error


def test_a_sweep_without_out_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--out" in fails(capsys, "sweep")


def test_a_folder_without_a_name_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["sweep", *SMALL, "--out", ""], ["plot", "", "--out", "x"], ["check", ""]):
        assert "'' is not valid; expected a folder" in fails(capsys, *command)
    assert not list(tmp_path.iterdir())


def test_a_folder_inside_a_file_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert "is a file" in fails(capsys, "sweep", *SMALL, "--out", str(tmp_path / "file" / "out"))


def test_a_folder_without_permission_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An administrator may write anywhere, so the system's answer is put in its mouth.
    monkeypatch.setattr(results.os, "access", lambda path, mode: False)
    error = fails(capsys, "sweep", *SMALL, "--out", str(tmp_path / "out"))
    assert "permission" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["/proc/x", "/sys/x/y"])
def test_a_folder_that_takes_no_file_is_refused_before_anything_is_traced(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.setattr(runner, "_trace", lambda *arguments: pytest.fail("traced"))
    assert f"out: '{out}' is not valid; expected a folder" in fails(
        capsys, "sweep", *SMALL, "--out", out
    )


def test_a_folder_is_tried_without_leaving_a_trace(tmp_path: Path) -> None:
    before = tmp_path.stat()
    results.check_directory(tmp_path / "out", resume=False)
    assert tmp_path.stat() == before and not list(tmp_path.iterdir())


def test_a_folder_with_nothing_to_resume_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "holds a sweep" in fails(capsys, "sweep", "--resume", "--out", str(tmp_path))


def test_a_home_folder_is_expanded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"'{tmp_path}/mine'" in fails(capsys, "sweep", "--resume", "--out=~/mine")


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"{sys.executable} -m gipo_jax objectives | true"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stderr == ""


@pytest.mark.parametrize("command", ["plot", "show"])
def test_looking_at_a_folder_without_a_sweep_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    assert "a folder that holds a sweep" in fails(capsys, command, str(tmp_path))


@pytest.fixture(scope="module")
def two_sweeps(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Sweeps of two learning rates, which neither of them varies; the first has a run diverged
    and a run unfinished, by its table."""
    folder = tmp_path_factory.mktemp("two")
    outs = str(folder / "a"), str(folder / "b")
    for out, rate in zip(outs, ("0.001", "0.01"), strict=True):
        settings = [*SMALL, "--env", "Catch-bsuite", "--learning-rate", rate, "--seeds", "3"]
        assert cli.main(["sweep", *settings, "--out", out]) == 0
    table = results.read_runs(outs[0])
    table["final_return"] = [1.0, 2.0, 6.0]
    table["status"] = ["done", "diverged", "waiting"]
    table.to_csv(Path(outs[0], results.RUNS), index=False)
    return outs


def test_a_sweep_is_shown_with_its_returns_and_what_diverged_or_is_unfinished(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    two_sweeps: tuple[str, str],
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    capsys.readouterr()
    assert cli.main(["show", two_sweeps[0]]) == 0
    text = capsys.readouterr().out
    assert "IQM 3 [1, 6]" in text and "mean 3 [1, 6]" in text and "3 of 3 seeds" in text
    assert "diverged: Catch-bsuite GIPO buffer 16, seeds 1" in text
    assert "unfinished: Catch-bsuite GIPO buffer 16, seeds 2" in text
    assert f"--resume --out {two_sweeps[0]}" in text


def test_sweeps_are_shown_and_drawn_together_with_the_setting_that_tells_them_apart(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    two_sweeps: tuple[str, str],
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    capsys.readouterr()
    # The first again: its runs count once.
    assert cli.main(["show", *two_sweeps, two_sweeps[0]]) == 0
    text = capsys.readouterr().out
    assert "learning_rate=0.001" in text and "learning_rate=0.01" in text
    assert text.count("3 of 3 seeds") == 2
    assert "--out" in fails(capsys, "plot", *two_sweeps)
    (tmp_path / "file").write_text("")
    for out in ("/proc/x", str(tmp_path / "file")):
        assert out in fails(capsys, "plot", *two_sweeps, "--out", out, code=1)
    cut = shutil.copytree(two_sweeps[1], tmp_path / "cut")
    config = (cut / results.CONFIG).read_text()
    (cut / results.CONFIG).write_text(config.replace('"groups"', '"group"'))
    for command in ("show", "plot"):
        assert "has no groups" in fails(capsys, command, str(cut), code=1)
    assert cli.main(["plot", *two_sweeps, "--out", str(tmp_path)]) == 0
    assert list(tmp_path.glob("*.png"))


def test_an_error_in_a_users_objective_is_shown_as_theirs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, mine: str
) -> None:
    out = tmp_path / "out"
    error = fails(capsys, "sweep", *SMALL, "--objective", f"{mine}:broken", "--out", str(out))
    assert f"{mine}:8, in broken: NameError: name 'undefined_name'" in error
    assert not out.exists()


def test_a_file_that_does_not_run_is_shown_with_its_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "bad.py").write_text("\nx = 1 / 0\n")
    (tmp_path / "worse.py").write_text("\n\ndef f(:\n")
    reference = f"{tmp_path}/bad.py:f"
    error = fails(capsys, "sweep", "--objective", reference, "--out", str(tmp_path / "out"))
    assert "bad.py:2" in error and "ZeroDivisionError" in error
    reference = f"{tmp_path}/worse.py:f"
    error = fails(capsys, "sweep", "--objective", reference, "--out", str(tmp_path / "out"))
    assert "worse.py:3" in error and "SyntaxError" in error


def test_a_users_objective_is_swept_and_resumed(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    mine: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = str(tmp_path / "out")
    settings = [*SMALL, "--objective", f"{mine}:mine", "--objective-arg", "bound=1.5", "3"]
    begun = ["sweep", *settings, "--seeds", "2", "--log", "tensorboard", "--out", out]
    monkeypatch.setattr(sys, "argv", ["gipo-jax", *begun])
    assert cli.main() == 0
    assert f"4 runs; results in {out}" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"^env: 'CartPole-v1' .* this sweep has CartPole-v1"):
        gipo_jax.load(out, env="CartPole-v1")
    table = results.read_runs(out)
    assert table.objective.tolist() == ["mine"] * 4

    # It goes on to log where it was begun to.
    taken: list[sweep.Options] = []

    def run(runs: object, out: str, options: sweep.Options, resume: bool) -> SimpleNamespace:
        taken.append(options)
        return SimpleNamespace(diverged=())

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "run", run)
        assert cli.main(["sweep", "--resume", "--out", out]) == 0
    assert (taken[0].log, taken[0].quiet) == ("tensorboard", True)
    capsys.readouterr()
    assert table.bound.tolist() == [1.5, 1.5, 3, 3]

    # Everything is there: going on finds nothing to do, with or without the settings.
    assert cli.main(["sweep", "--resume", "--out", out]) == 0
    # It stays quiet and without figures, as it was begun.
    assert capsys.readouterr().err == "" and not Path(out, "figures").exists()
    assert cli.main(["sweep", "--resume", *settings, "--seeds", "2", "--out", out]) == 0
    # The same code in another place is the same objective.
    elsewhere = shutil.copy(mine, tmp_path / "elsewhere.py")
    settings[settings.index(f"{mine}:mine")] = f"{elsewhere}:mine"
    assert cli.main(["sweep", "--resume", *settings, "--seeds", "2", "--out", out]) == 0
    capsys.readouterr()
    assert "seed: [0] is not valid; expected [0, 1]" in fails(
        capsys, "sweep", "--resume", *settings, "--out", out
    )
    assert "resume" in fails(capsys, "sweep", *settings, "--out", out)
    Path(mine).write_text(MINE.replace("2.0", "4.0"))
    assert "has changed since" in fails(capsys, "sweep", "--resume", "--out", out)


@pytest.mark.slow
def test_a_sweep_ends_with_figures_and_says_what_to_do_next(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with_figures = [word for word in SMALL if word != "--no-figures"]
    assert cli.main(["sweep", *with_figures, "--out", str(tmp_path / "drawn")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert list((tmp_path / "drawn" / "figures").glob("*.png"))
    assert lines[-1].startswith("next: ") and f"{tmp_path}/drawn/figures" in lines[-1]
    assert cli.main(["sweep", *SMALL, "--out", str(tmp_path / "plain")]) == 0
    assert f"gipo-jax plot {tmp_path}/plain" in capsys.readouterr().out.splitlines()[-1]
    assert not (tmp_path / "plain" / "figures").exists()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["--actor-every", "0"], "--policy-delay"),
        (["--actor-every=0"], "--policy-delay"),
        (["--tensorboard", "--policy-delay", "0"], "--log=tensorboard"),
        (["--no-time-limit-is-death", "--policy-delay", "0"], "--no-truncation-is-termination"),
    ],
)
def test_an_old_option_name_works_and_names_the_new_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, old: list[str], new: str
) -> None:
    # The value 0 is refused under the setting's name of today, before anything is trained.
    assert cli.main(["sweep", *SMALL, *old, "--out", str(tmp_path / "out")]) == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert warning == f"gipo-jax: {old[0].partition('=')[0]} is called {new} now"
    assert "policy_delay: 0 is not valid" in error


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"gipo-jax {gipo_jax.__version__}\n"


def test_help_lists_every_option_with_its_default_and_meaning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["sweep", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    options = """
        --env --objective --sigma --sigma-neg-ratio --kernel --buffer-size --seeds --seed-offset
        --total-steps --num-envs --rollout-length --batch-size --updates-per-iteration
        --learning-rate --value-learning-rate --gamma --gae-lambda --resume --out --clip-eps
        --batch-mode --distributed --log --objective-arg
    """
    for option in options.split():
        assert f"{option} " in text
    assert "discount; a number in [0, 1] (default: 0.99)" in text
    assert "(default: gipo 1" in text


def test_objectives_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["objectives"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["NAME", "KIND", "PARAMETERS", "PAPER"]
    gipo = next(line for line in lines if line.startswith("gipo"))
    assert "per-sample" in gipo and "sigma=1" in gipo and "2603.03955" in gipo
