"""``gipo-jax check`` and the lock: what is not whole is found and named, what is whole passes."""

import json
import os
import platform
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gipo_jax import agents, cli, sweep
from gipo_jax.config import ConfigError
from gipo_jax.sweep import audit, checkpoint, lock, results
from gipo_jax.sweep import runner as sweep_runner

pytestmark = pytest.mark.slow

OPTIONS = sweep.Options(quiet=True, checkpoint_seconds=0, devices=1, tensorboard=True)


class StopError(Exception):
    """Raised in the middle of a sweep, as a kill would come."""


def runs() -> list[sweep.Run]:
    return sweep.expand(
        env="Catch-bsuite",
        num_envs=2,
        rollout_length=4,
        batch_size=8,
        total_steps=96,
        hidden_sizes=(4,),
        num_logs=3,
        eval_episodes=0,
        buffer_size=[16, 64],
        seeds=2,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("audit") / "finished"
    sweep.run(runs(), directory, OPTIONS)
    return directory


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that died after it had logged a point more than its newest checkpoint has."""
    directory = tmp_path_factory.mktemp("audit") / "stopped"
    save, left = checkpoint.save, [3]

    def dying(*arguments: object) -> Path:
        left[0] -= 1
        if left[0] == 0:
            raise StopError
        return save(*arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", dying)
        with pytest.raises(StopError):
            sweep.run(runs(), directory, OPTIONS)
    return directory


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "copy")


def lines(directory: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str]]:
    """The exit code of ``gipo-jax check`` and what it says of each part."""
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    code = cli.main(["check", str(directory)])
    *parts, verdict = capsys.readouterr().out.splitlines()
    assert verdict == f"{directory} is {'whole' if code == 0 else 'not whole'}"
    assert before == {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    return code, dict(part.split(": ", 1) for part in parts)


def test_a_finished_sweep_is_whole(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lines(finished, capsys) == (
        0,
        {
            "config.json": "4 runs",
            "checkpoints": "00000003, 00000004",
            "metrics.csv": "12 rows",
            "runs.csv": "4 done",
            "params": "4 runs",
            "tensorboard": "4 runs",
            "lock": "no process writes here",
        },
    )


def test_a_sweep_that_died_is_whole_up_to_its_checkpoint(
    stopped: Path, tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = lines(stopped, capsys)
    assert code == 0
    assert said["checkpoints"] == "00000001, 00000002"
    assert said["metrics.csv"].startswith("8 rows, and ")
    assert said["metrics.csv"].endswith("bytes that --resume makes again")
    assert said["runs.csv"] == "4 running"
    shutil.copytree(stopped, tmp_path / "copy")
    sweep.run(runs(), tmp_path / "copy", OPTIONS, resume=True)
    code, said = lines(tmp_path / "copy", capsys)
    assert (code, said["runs.csv"], said["tensorboard"]) == (0, "4 done", "4 runs")
    for name in (results.RUNS, results.METRICS):
        assert (tmp_path / "copy" / name).read_bytes() == (finished / name).read_bytes()


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        text = (directory / name).read_text()
        assert old in text
        (directory / name).write_text(text.replace(old, new, 1))

    return change


def flip(pattern: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = max(directory.glob(pattern), key=lambda path: path.stat().st_size)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0x40
        path.write_bytes(content)

    return change


def repeat_a_row(directory: Path) -> None:
    path = directory / results.METRICS
    rows = path.read_text().splitlines(keepends=True)
    # The same length, so that only the rows tell.
    rows[2] = rows[1].rstrip("\n").ljust(len(rows[2]) - 1, "0") + "\n"
    path.write_text("".join(rows))


def swap_rows(directory: Path) -> None:
    path = directory / results.METRICS
    header, first, second, *rest = path.read_text().splitlines(keepends=True)
    path.write_text("".join([header, second, first, *rest]))


def remove(name: str) -> Callable[[Path], None]:
    return lambda directory: shutil.rmtree(directory / name)


@pytest.mark.parametrize(
    ("change", "part", "said"),
    [
        (edit("config.json", '"format"', '"f'), "config.json", "cannot be read"),
        (edit("config.json", '"total_steps": 96', '"total_steps": 88'), "metrics.csv", "run 0 "),
        (edit("runs.csv", "done", "waiting"), "runs.csv", "line 2 does not agree"),
        (edit("runs.csv", "\n1,", "\n7,"), "runs.csv", "line 3 does not agree"),
        (edit("metrics.csv", "\n1,8,", "\n1,6,"), "metrics.csv", "no row of this sweep"),
        (edit("metrics.csv", "\n1,8,64", "\n1,9,72"), "metrics.csv", "run 1 lacks iteration 8"),
        (edit("metrics.csv", "\n1,8,", "\n1,x,"), "metrics.csv", "line 6 is no row"),
        (edit("metrics.csv", "run,", "ran,"), "metrics.csv", "other columns"),
        (lambda d: os.truncate(d / "metrics.csv", 900), "metrics.csv", "900 bytes, "),
        (repeat_a_row, "metrics.csv", "run 0 lacks iteration 8"),
        (edit("metrics.csv", "\n1,8,", "\n-3,8,"), "metrics.csv", "line 6 is no row"),
        (swap_rows, "metrics.csv", "iterations of run 0 are out of order"),
        (flip("checkpoints/00000003/progress.json"), "checkpoints", "00000003: progress.json"),
        (flip("params/*/**/d/*"), "params", "does not match its checksum"),
        (remove("params"), "params", "none of runs 0, 1, 2, 3, done"),
        (flip("tensorboard/*/events*"), "tensorboard", ""),
    ],
)
def test_what_is_not_whole_is_named(
    copy: Path,
    change: Callable[[Path], None],
    part: str,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(copy)
    code, found = lines(copy, capsys)
    assert code == 1
    assert found[part].startswith("NOT WHOLE: ") and said in found[part], found


def test_a_folder_without_a_sweep_is_a_mistake_of_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", str(tmp_path)]) == 2
    assert "holds a sweep" in capsys.readouterr().err


def test_a_sweep_ends_with_the_same_audit(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(stopped, tmp_path / "copy")
    monkeypatch.setattr(checkpoint, "seal", lambda path: (path / "manifest.json").write_text("{"))
    with pytest.raises(results.ResultsError, match=r"changed while .* checkpoints: NOT WHOLE"):
        sweep.run(runs(), tmp_path / "copy", OPTIONS, resume=True)


def test_damaged_parameters_are_not_loaded(copy: Path) -> None:
    agents.load(copy, 0)
    flip("params/*/**/d/*")(copy)
    with pytest.raises(results.ResultsError, match="is damaged: arrays/"):
        agents.load(copy, 0)


# The lock.


def test_the_lock_of_a_living_process_is_named(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    me = f"process {os.getpid()} on {platform.node()}"
    with lock.hold(copy):
        assert lock.owner(copy) == lock.Owner(me, alive=True)
        assert lines(copy, capsys)[1]["lock"].startswith(f"{me} writes here")
        with pytest.raises(ConfigError, match=f"no other process writes to; {me} does"):
            lock.hold(copy).__enter__()
    assert lock.owner(copy) is None


def test_the_lock_of_a_dead_process_is_stale(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "lock").write_text(f"process 1 on {platform.node()}")
    assert lines(copy, capsys)[1]["lock"].startswith("process 1 on ")
    assert lock.owner(copy) == lock.Owner(f"process 1 on {platform.node()}", alive=False)
    with lock.hold(copy):
        pass


@pytest.mark.parametrize("lives", [True, False])
def test_where_hosts_do_not_see_each_others_locks_signs_of_life_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lives: bool
) -> None:
    monkeypatch.setattr(lock, "WATCH_SECONDS", 3.0)
    path, ended = tmp_path / "lock", threading.Event()
    path.write_text("process 5 on another")

    def renew() -> None:
        while not ended.wait(0.2):
            os.utime(path)

    owner = threading.Thread(target=renew)
    if lives:
        owner.start()
    try:
        assert lock.owner(tmp_path) == lock.Owner("process 5 on another", alive=lives)
        if lives:
            with pytest.raises(ConfigError, match="process 5 on another does"):
                lock.hold(tmp_path).__enter__()
            assert path.read_text() == "process 5 on another"
        else:
            with lock.hold(tmp_path):
                assert path.read_text().startswith(f"process {os.getpid()} ")
    finally:
        ended.set()
        if lives:
            owner.join()


def test_an_owner_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "RENEWED_SECONDS", 0.05)
    with lock.hold(tmp_path):
        seen = set()
        for _ in range(200):
            seen.add((tmp_path / "lock").stat().st_mtime_ns)
            time.sleep(0.02)
            if len(seen) > 2:
                return
    pytest.fail("the lock keeps its time")


def test_an_owner_that_counted_as_dead_writes_no_more(tmp_path: Path) -> None:
    """As of a process that was stopped for long, on a file system without common locks."""
    directory, taken = tmp_path / "sweep", list[bytes]()

    def take(rows: object) -> None:
        if not taken:
            (directory / "lock").unlink()
            (directory / "lock").write_text("process 5 on another")
            taken.append((directory / results.METRICS).read_bytes())

    def wait_for_it(*arguments: object) -> None:
        for _ in range(500):
            if taken:
                return
            time.sleep(0.01)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_runner, "_save_or_stop", wait_for_it)
        with pytest.raises(results.ResultsError, match=r"^process 5 on another has taken .* over"):
            sweep.run(runs(), directory, OPTIONS, on_log=take)
    assert (directory / results.METRICS).read_bytes() == taken[0]
    assert (directory / "lock").read_text() == "process 5 on another"


def test_findings_are_one_line(copy: Path) -> None:
    (copy / "checkpoints/00000004/progress.json").write_text(json.dumps({"format": 99}))
    assert all("\n" not in str(finding) for finding in audit.check(copy))
