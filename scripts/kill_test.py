#!/usr/bin/env python
"""Kills a sweep with SIGKILL at random moments, resumes it each time, and compares the results.

python scripts/kill_test.py --kills 20 --processes 2 --out out/kill_test
python scripts/kill_test.py --together 50
python scripts/kill_test.py --faults

Moments are drawn from all phases: start and compilation, steps, the writing of a checkpoint, of
metrics, of final parameters. Of several processes one is killed, and the others must then end by
themselves; what they say is in OUT. The sweep must end with the same tables, byte for byte, and
the same parameters as one process gives that is left alone.

--together starts, or resumes, one sweep by two processes at the same instant: one gets the folder
and the other one line. --faults gives a sweep a full disk, a folder that cannot be written to,
damaged checkpoints, a clock that goes backwards, and processes that stop for longer than others
wait for them.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import gipo_jax
from gipo_jax import cli, runtime
from gipo_jax.sweep import audit, checkpoint, cluster, lock, results

SETTINGS = (
    *("--objective", "gipo", "ppo_clip", "--sigma", "0.5", "1", "--buffer-size", "32", "64"),
    *("--seeds", "2", "--num-envs", "2", "--rollout-length", "8", "--batch-size", "16"),
    *("--hidden-sizes", "8", "--total-steps", "1600", "--num-logs", "10", "--eval-episodes", "0"),
)

COMPARED = ("runs.csv", "metrics.csv")


def main() -> int:
    """Returns 0 if the results are the same, else 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("out/kill_test"))
    parser.add_argument("--processes", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--together", type=int, metavar="N", help="pairs that start together")
    parser.add_argument("--faults", action="store_true", help="full disk, damage, clock, stops")
    options = parser.parse_args()
    runtime.set_cpu_defaults()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    chance = random.Random(options.seed)
    if options.together:
        problems = together(options.out, options.together, print)
    elif options.faults:
        problems = faults(options.out, chance, print)
    else:
        problems = check(options.out, options.kills, chance, print, processes=options.processes)
    for problem in problems:
        print(problem)
    print("different" if problems else "the same as without")
    return 1 if problems else 0


def check(
    out: Path,
    kills: int,
    chance: random.Random,
    say: Callable[[str], None],
    settings: Sequence[str] = SETTINGS,
    processes: int = 1,
) -> list[str]:
    """Runs the sweep alone and with kills.

    Args:
        out: empty folder.
        kills: number of kills.
        chance: source of the moments.
        say: called with a line on each kill.
        settings: of the sweep.
        processes: of the sweep that is killed; that left alone has one.

    Returns:
        differences; empty where there are none.
    """
    alone, killed = out / "alone", out / "killed"
    started = time.monotonic()
    finish(start(alone, settings, 1))
    say(f"left alone: {time.monotonic() - started:.1f} s")
    phases = list(PHASES)
    chance.shuffle(phases)
    done = 0
    while done < kills:
        phase = phases[done % len(phases)]
        resume = ["--resume"] if (killed / "config.json").exists() else list(settings)
        started_now = start(killed, resume, processes)
        victim = chance.choice(started_now)
        PHASES[phase](killed, victim, chance)
        if victim.poll() is not None:
            finish(started_now)
            # Finished before the moment came: begin again, so that every kill hits something.
            compared = differences(alone, killed)
            if compared:
                return compared
            shutil.rmtree(killed)
            continue
        victim.kill()
        moment = time.monotonic()
        for process in started_now:
            # Those that had not met yet wait for each other first.
            process.wait(timeout=cluster.START_SECONDS + 90)
        done += 1
        gone = f"; all gone after {time.monotonic() - moment:.0f} s" if processes > 1 else ""
        say(f"kill {done}: {phase}; {state(killed)}{gone}")
    resume = ["--resume"] if (killed / "config.json").exists() else list(settings)
    finish(start(killed, resume, processes))
    return differences(alone, killed)


def start(out: Path, arguments: Sequence[str], processes: int) -> list["subprocess.Popen[bytes]"]:
    """Starts the processes of the sweep, with a checkpoint at every logged point."""
    command = [sys.executable, "-m", "gipo_jax", "sweep", "--out", str(out), *arguments]
    command += ["--quiet", "--no-figures", "--checkpoint-seconds", "0"]
    environment = _environment()
    if processes == 1:
        return [subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)]
    command += ["--distributed", "--coordinator-address", f"127.0.0.1:{_free_port()}"]
    command += ["--num-processes", str(processes), "--process-id"]
    started = []
    for index in range(processes):
        with (out.parent / f"process-{index}.log").open("ab") as log:
            started.append(
                subprocess.Popen(
                    [*command, str(index)], env=environment, stdout=log, stderr=subprocess.STDOUT
                )
            )
    return started


def _environment() -> dict[str, str]:
    root = Path(__file__).resolve().parents[1]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path}


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def finish(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Waits for the processes of a sweep to end well."""
    for process in processes:
        if process.wait(timeout=600) != 0:
            raise SystemExit(f"the sweep failed: exit code {process.returncode}")


def state(directory: Path) -> str:
    """What a kill left behind."""
    numbers = sorted(p.name for p in directory.glob("checkpoints/*"))
    metrics = directory / "metrics.csv"
    size = metrics.stat().st_size if metrics.exists() else 0
    return f"checkpoints {', '.join(numbers) or 'none'}, metrics.csv {size} bytes"


def differences(alone: Path, killed: Path) -> list[str]:
    """Tables that are not byte for byte the same, or runs with other parameters."""
    runs = range(len(results.read_runs(alone)))
    return _other_tables(alone, killed) or [
        f"parameters of run {run} differ"
        for run in runs
        if not jax.tree.all(jax.tree.map(np.array_equal, *_parameters((alone, killed), run)))
    ]


def _other_tables(alone: Path, killed: Path) -> list[str]:
    return [
        f"{name} differs"
        for name in COMPARED
        if not (killed / name).exists()
        or (alone / name).read_bytes() != (killed / name).read_bytes()
    ]


def _parameters(directories: Sequence[Path], run: int) -> list[Any]:
    return [gipo_jax.load(directory, run).params for directory in directories]


def _wait(process: "subprocess.Popen[bytes]", happened: Callable[[], bool]) -> None:
    while process.poll() is None and not happened():
        time.sleep(0.0005)


def _at_start(directory: Path, process: "subprocess.Popen[bytes]", chance: random.Random) -> None:
    time.sleep(chance.uniform(0.0, 6.0))


def _compiling(directory: Path, process: "subprocess.Popen[bytes]", chance: random.Random) -> None:
    before = _stamp(directory / "runs.csv")
    # The table is written right before the first program is compiled.
    _wait(process, lambda: _stamp(directory / "runs.csv") != before)
    time.sleep(chance.uniform(0.0, 1.0))


def _stepping(directory: Path, process: "subprocess.Popen[bytes]", chance: random.Random) -> None:
    _metrics(directory, process, chance)
    time.sleep(chance.uniform(0.0, 0.2))


def _metrics(directory: Path, process: "subprocess.Popen[bytes]", chance: random.Random) -> None:
    _compiling(directory, process, chance)
    for _ in range(chance.randint(1, 8)):
        before = _stamp(directory / "metrics.csv")
        _wait(process, lambda before=before: _stamp(directory / "metrics.csv") != before)  # type: ignore[misc]


def _checkpoint(directory: Path, process: "subprocess.Popen[bytes]", chance: random.Random) -> None:
    _metrics(directory, process, chance)
    _wait(process, lambda: any(directory.glob("checkpoints/incomplete-*")))
    time.sleep(chance.uniform(0.0, 0.01))


def _params(directory: Path, process: "subprocess.Popen[bytes]", chance: random.Random) -> None:
    _wait(process, lambda: any(directory.glob("params/*.tmp")))
    time.sleep(chance.uniform(0.0, 0.003))


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


PHASES: dict[str, Callable[[Path, "subprocess.Popen[bytes]", random.Random], None]] = {
    "checkpoint write": _checkpoint,
    "start": _at_start,
    "step": _stepping,
    "metrics write": _metrics,
    "compilation": _compiling,
    "parameters write": _params,
}


# Two processes that begin at the same instant.

TINY = (
    *("--env", "Catch-bsuite", "--num-envs", "2", "--rollout-length", "8", "--batch-size", "16"),
    *("--hidden-sizes", "8", "--total-steps", "320", "--num-logs", "20", "--eval-episodes", "0"),
    *("--buffer-size", "16", "32", "--quiet", "--no-figures", "--checkpoint-seconds", "0"),
)


def together(out: Path, pairs: int, say: Callable[[str], None]) -> list[str]:
    """Starts and resumes a sweep by two processes at the same instant, in turns.

    Returns:
        what is not as it should be: one exit code 0 and tables as of a sweep alone, and one line
        from the other process.
    """
    context = multiprocessing.get_context("spawn")
    barrier, pipes, workers = context.Barrier(2), [], []
    for _ in range(2):
        here, there = context.Pipe()
        workers.append(context.Process(target=_serve, args=(there, barrier), daemon=True))
        workers[-1].start()
        pipes.append(here)
    alone, begun, problems, late = out / "alone", out / "begun", [], 0

    def both(*commands: Sequence[str]) -> list[tuple[int, str]]:
        for pipe, command in zip(pipes, commands, strict=True):
            pipe.send(list(command))
        return [pipe.recv() for pipe in pipes]

    def command(directory: Path, *arguments: str) -> list[str]:
        return ["sweep", "--out", str(directory), *arguments]

    # Both have compiled once, and so are at the same place from then on.
    codes = both(command(alone, *TINY), command(out / "other", *TINY))
    if [code for code, _ in codes] != [0, 0] or differences(alone, out / "other"):
        return [f"two sweeps in two folders: {codes}"]
    _stop_early(begun)
    for pair in range(pairs):
        directory, resumed = out / f"pair-{pair}", bool(pair % 2)
        if resumed:
            shutil.copytree(begun, directory)
        arguments = ("--resume",) if resumed else TINY
        answers = sorted(both(*[command(directory, *arguments)] * 2))
        (_, _), (code, said) = answers
        what = f"pair {pair} ({'resumed' if resumed else 'started'})"
        # One that comes when the other has ended finds a whole sweep.
        came_late = code == 0 or "--resume continues this one" in said
        late += came_late
        line = "out: " in said and len(said.splitlines()) == 1
        if answers[0][0] != 0 or not (code == 0 or (code == 2 and line)):
            problems.append(f"{what}: {answers}")
        if code == 0 and not resumed:
            problems.append(f"{what}: both began a new sweep")
        problems += [f"{what}: {text}" for text in _other_tables(alone, directory)]
        problems += [f"{what}: {x}" for x in audit.check(directory) if not x.whole]
        say(f"{what}: {' '.join(said.split()) or 'nothing was left to do'}")
        shutil.rmtree(directory)
    say(f"{pairs} pairs, in {late} of them one came when the other had ended")
    for pipe in pipes:
        pipe.send(None)
    for worker in workers:
        worker.join(60)
    return problems


def _serve(pipe: Any, barrier: Any) -> None:
    """Runs commands of gipo-jax, each at the same instant as the other process."""
    while (command := pipe.recv()) is not None:
        said = io.StringIO()
        barrier.wait()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = cli.main(command)
        pipe.send((code, said.getvalue()))


def _stop_early(directory: Path) -> None:
    """Begins the sweep of ``TINY`` and ends it after a few checkpoints, as a kill would."""
    command = [sys.executable, "-m", "gipo_jax", "sweep", "--out", str(directory), *TINY]
    process = subprocess.Popen(command, env=_environment(), stdout=subprocess.DEVNULL)
    _wait(process, lambda: (directory / results.CHECKPOINTS / f"{5:08d}").exists())
    if process.poll() is not None:
        raise SystemExit("the sweep ended before it could be stopped")
    process.kill()
    process.wait()


# Faults of the machine.


def faults(out: Path, chance: random.Random, say: Callable[[str], None]) -> list[str]:
    """Gives a sweep one fault after the other.

    Returns:
        faults after which the sweep, resumed, is not that of ``TINY`` left alone, or that did not
        end in one line with an intact last checkpoint.
    """
    alone, begun, problems = out / "alone", out / "begun", []
    for text in _ended_well(_attempt(alone, TINY)):
        return [f"left alone: {text}"]
    _stop_early(begun)
    for name, fault in FAULTS.items():
        directory = out / name.replace(" ", "-")
        began = time.monotonic()
        found = [*fault(begun, directory, chance, say)]
        if directory.exists():
            found += differences(alone, directory)
            found += [str(x) for x in audit.check(directory) if not x.whole]
            _release(directory)
        say(f"{name}: {'; '.join(found) or 'as it should be'} ({time.monotonic() - began:.0f} s)")
        problems += [f"{name}: {text}" for text in found]
    return problems


def _attempt(
    out: Path, arguments: Sequence[str], program: str = "", limit: int | None = None
) -> tuple[int, str]:
    """The exit code of a sweep and what it says; ``program`` runs before it in its process.

    No file may grow beyond ``limit`` blocks of 1024 bytes.
    """
    words = ["sweep", "--out", str(out), *arguments]
    code = f"{program}\nimport sys\nfrom gipo_jax import cli\nsys.exit(cli.main({words!r}))"
    before = ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "-"] if limit else []
    done = subprocess.run(
        [*before, sys.executable, "-c", code],
        env=_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=1200,
        check=False,
    )
    return done.returncode, done.stderr


def _ended_well(ended: tuple[int, str]) -> list[str]:
    code, said = ended
    return [] if code == 0 else [f"exit code {code}: {said[-500:]}"]


def _ended_in_a_line(ended: tuple[int, str], *words: str) -> list[str]:
    """What is wrong with the end of a sweep that should have failed in one line."""
    code, said = ended
    line = (said.splitlines() or [""])[-1]
    if code == 0:
        return ["it did not fail"]
    if "Traceback" in said or not line.startswith("gipo-jax: "):
        return [f"no line: {said[-500:]}"]
    return [f"{word!r} is not in: {line}" for word in words if word not in line]


def _newest(directory: Path) -> int:
    """Number of the newest checkpoint of a folder."""
    return checkpoint.numbers(directory / results.CHECKPOINTS)[-1]


def _checkpoint_stands(directory: Path) -> list[str]:
    """Whether the newest checkpoint of a folder is whole."""
    warned: list[str] = []
    number = checkpoint.newest(directory / results.CHECKPOINTS, warned.append)
    return warned if number else ["no checkpoint is left"]


def _mounted(directory: Path, kilobytes: int) -> bool:
    """Whether a file system of that size in memory could be mounted at a new folder."""
    directory.mkdir()
    size = f"size={kilobytes}k"
    command = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(directory)]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    return False


def _remount(directory: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(directory)], check=True)


def _release(directory: Path) -> None:
    if os.path.ismount(directory):
        subprocess.run(["umount", str(directory)], check=True)
    shutil.rmtree(directory)


def _full_disk(
    begun: Path, out: Path, chance: random.Random, say: Callable[[str], None]
) -> Iterator[str]:
    if _mounted(out, 1 << 20):
        shutil.copytree(begun, out, dirs_exist_ok=True)
        space = os.statvfs(out)
        used = (space.f_blocks - space.f_bfree) * space.f_frsize // 1024
        newest = out / results.CHECKPOINTS / f"{_newest(out):08d}"
        # Folders take no space in memory.
        files = [path for path in newest.rglob("*") if path.is_file()]
        needed = sum(path.stat().st_blocks for path in files) // 2
        # Room for a part of the next checkpoint, at most half: what a sweep that goes on removes
        # first, such as the lock of the one before, makes some more.
        room = used + chance.randrange(16, max(needed // 2, 17))
        say(f"full disk: a file system of {room} KB in memory, {used} KB of it taken")
        _remount(out, f"size={room}k")
        yield from _ended_in_a_line(_attempt(out, ["--resume"]), "No space left on device")
        yield from _checkpoint_stands(out)
        _remount(out, "size=1g")
    else:
        largest = max(path.stat().st_size for path in begun.rglob("*"))
        limit = max(largest // 1024 + 1, (begun / results.METRICS).stat().st_size // 1024 + 2)
        say(f"full disk: mount is not permitted; no file may grow beyond {limit} KB")
        shutil.copytree(begun, out, dirs_exist_ok=True)
        yield from _ended_in_a_line(_attempt(out, ["--resume"], limit=limit), "File too large")
        yield from _checkpoint_stands(out)
    yield from _ended_well(_attempt(out, ["--resume"]))


def _read_only(
    begun: Path, out: Path, chance: random.Random, say: Callable[[str], None]
) -> Iterator[str]:
    mounted = _mounted(out, 1 << 20)
    shutil.copytree(begun, out, dirs_exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    if mounted:
        _remount(out, "ro")
    elif os.geteuid():
        out.chmod(0o555)
    else:
        say("read-only folder: left out, since nothing stops this user from writing")
        yield from _ended_well(_attempt(out, ["--resume"]))
        return
    yield from _ended_in_a_line(_attempt(out, ["--resume"]), "out: ")
    if before != {path: path.stat().st_mtime_ns for path in out.rglob("*")}:
        yield "the folder was changed"
    if mounted:
        _remount(out, "rw")
    else:
        out.chmod(0o755)
    yield from _checkpoint_stands(out)
    yield from _ended_well(_attempt(out, ["--resume"]))


def _damaged(
    begun: Path, out: Path, chance: random.Random, say: Callable[[str], None]
) -> Iterator[str]:
    numbers = checkpoint.numbers(begun / results.CHECKPOINTS)
    folders = [f"{results.CHECKPOINTS}/{number:08d}" for number in numbers]
    files = [path for path in (begun / folders[-1]).rglob("*") if path.is_file()]
    for change in (_truncate, _flip):
        for path in (max(files, key=lambda path: path.stat().st_size), chance.choice(files)):
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(begun, out)
            change(out / path.relative_to(begun), chance)
            ended = _attempt(out, ["--resume"])
            yield from _ended_well(ended)
            if path.stat().st_size and "is damaged" not in ended[1]:
                yield f"damage of {path.name} was not seen"
    shutil.rmtree(out)
    shutil.copytree(begun, out)
    for folder in folders:
        _flip(out / folder / checkpoint.MANIFEST, chance)
    before = (out / results.METRICS).read_bytes()
    yield from _ended_in_a_line(_attempt(out, ["--resume"]), "is whole; delete that folder")
    if (out / results.METRICS).read_bytes() != before:
        yield "a sweep without a whole checkpoint was changed"
    shutil.rmtree(out / results.CHECKPOINTS)
    yield from _ended_well(_attempt(out, ["--resume"]))


def _truncate(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size) if path.stat().st_size else 0)


def _flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)


BACKWARDS = """
import time
_now, _began = time.time, time.time()
time.time = lambda: 2 * _began - 100_000 - _now()
"""


def _clock(
    begun: Path, out: Path, chance: random.Random, say: Callable[[str], None]
) -> Iterator[str]:
    say("clock: Python's time.time runs backwards in the process, from a day before")
    shutil.copytree(begun, out)
    yield from _ended_well(_attempt(out, ["--resume", "--tensorboard"], BACKWARDS))


def _stopped(
    begun: Path, out: Path, chance: random.Random, say: Callable[[str], None]
) -> Iterator[str]:
    shutil.copytree(begun, out)
    before = _stamp(out / results.METRICS)
    (process,) = start(out, ["--resume"], 1)
    _wait(process, lambda: _stamp(out / results.METRICS) != before)
    process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    # The other process watches for signs of life only where it comes from another host.
    yield from _ended_in_a_line(_attempt(out, ["--resume"]), f"process {process.pid} on ")
    time.sleep(max(0.0, lock.WATCH_SECONDS + 5 - (time.monotonic() - began)))
    process.send_signal(signal.SIGCONT)
    if process.wait(timeout=600):
        yield f"the process that was stopped ended with {process.returncode}"


def _one_of_two_stopped(
    begun: Path, out: Path, chance: random.Random, say: Callable[[str], None]
) -> Iterator[str]:
    before = _stamp(out / results.RUNS)
    processes = start(out, TINY, 2)
    _wait(processes[0], lambda: _stamp(out / results.RUNS) != before)
    victim, other = chance.sample(processes, 2)
    victim.send_signal(signal.SIGSTOP)
    code = other.wait(timeout=cluster.START_SECONDS + cluster.HEARTBEAT_SECONDS + 120)
    said = (out.parent / f"process-{processes.index(other)}.log").read_text(errors="replace")
    # Where JAX notes the silence before a collective does, it aborts the process itself: what it
    # calls then cannot be a function of Python (jaxlib 0.10 fails to convert its argument).
    aborted = code == -signal.SIGABRT and JAX_ABORTS in said
    if not aborted and code != cluster.LOST_CODE:
        yield f"the other process ended with {code}: {said[-500:]}"
    say(f"the other process ended with {code}")
    victim.send_signal(signal.SIGCONT)
    if victim.wait(timeout=cluster.START_SECONDS + 120) == 0:
        yield "the process that was stopped ended well"
    yield from [str(finding) for finding in audit.check(out) if not finding.whole]
    yield from _ended_well(_attempt(out, ["--resume"]))


JAX_ABORTS = "JAX distributed service detected fatal errors"
"""What JAX says where it aborts a process because another one is silent."""

Fault = Callable[[Path, Path, random.Random, Callable[[str], None]], Iterable[str]]
FAULTS: dict[str, Fault] = {
    "full disk": _full_disk,
    "read-only folder": _read_only,
    "damaged checkpoint": _damaged,
    "clock": _clock,
    "stopped process": _stopped,
    "one of two processes stopped": _one_of_two_stopped,
}

if __name__ == "__main__":
    sys.exit(main())
