#!/usr/bin/env python
"""Kills a sweep with SIGKILL at random moments, resumes it each time, and compares the results.

python scripts/kill_test.py --kills 20 --processes 2 --out out/kill_test

Moments are drawn from all phases: start and compilation, steps, the writing of a checkpoint, of
metrics, of final parameters. Of several processes one is killed, and the others must then end by
themselves; what they say is in OUT. The sweep must end with the same tables, byte for byte, and
the same parameters as one process gives that is left alone.
"""

import argparse
import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import gipo_jax
from gipo_jax import runtime
from gipo_jax.sweep import cluster, results

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
    options = parser.parse_args()
    runtime.set_cpu_defaults()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    chance = random.Random(options.seed)
    problems = check(options.out, options.kills, chance, print, processes=options.processes)
    for problem in problems:
        print(problem)
    print("different" if problems else "the same as without kills")
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
    root = Path(__file__).resolve().parents[1]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
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
    tables = [
        f"{name} differs"
        for name in COMPARED
        if not (killed / name).exists()
        or (alone / name).read_bytes() != (killed / name).read_bytes()
    ]
    runs = range(len(results.read_runs(alone)))
    return tables or [
        f"parameters of run {run} differ"
        for run in runs
        if not jax.tree.all(jax.tree.map(np.array_equal, *_parameters((alone, killed), run)))
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

if __name__ == "__main__":
    sys.exit(main())
