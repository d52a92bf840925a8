"""Whether the folder of a sweep is whole: every part of it held against the others.

A folder is whole where nothing is lost: a finished sweep has all that it should have, and one that
was stopped, however it was, goes on from its newest checkpoint to the same results.
"""

import collections
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gipo_jax.config import Config
from gipo_jax.settings import log_boundaries
from gipo_jax.sweep import checkpoint, folder, grid, lock, report, results
from gipo_jax.sweep.plan import Progress
from gipo_jax.sweep.results import ResultsError

MOST_NAMED = 5
"""Runs that a line names at most."""


class Finding(NamedTuple):
    """What was found of a part of a folder.

    Attributes:
        part: its name.
        whole: whether nothing is wrong with it.
        text: what it holds, or what is wrong.
    """

    part: str
    whole: bool
    text: str

    def __str__(self) -> str:
        return f"{self.part}: {'' if self.whole else 'NOT WHOLE: '}{self.text}"


class _Sweep(NamedTuple):
    """What config.json says, and the newest whole checkpoint."""

    directory: Path
    config: dict[str, Any]
    settings: list[dict[str, Any]]
    stops: list[list[int]]  # iterations of the logged points of each run
    blocks: list[int]  # transitions of an iteration
    progress: Progress

    @property
    def finished(self) -> bool:
        return len(self.progress.finished) == len(self.settings)

    @property
    def points(self) -> list[int]:
        """Logged points that each run has made, as the checkpoint knows."""
        points = [0] * len(self.settings)
        for part in self.progress.started:
            for run in part.runs:
                points[run] = part.point
        for run in self.progress.finished:
            points[run] = len(self.stops[run])
        return points


def check(directory: Path, *, at_end: bool = False) -> Iterator[Finding]:
    """Findings on every part of a folder that has a config.json; changes nothing.

    ``at_end`` leaves out what a sweep no longer needs: older checkpoints and event files.
    """
    held = lock.owner(directory)
    try:
        config = results.read_config(directory)
        settings = grid.settings_of_runs(config["groups"])
        sizes = [_sizes(run) for run in settings]
    except (ResultsError, LookupError, TypeError, ValueError) as error:
        yield Finding(results.CONFIG, False, _line(error))
        return
    yield Finding(results.CONFIG, True, f"{len(settings)} runs")

    number, finding = _checkpoints(directory / results.CHECKPOINTS, at_end)
    yield finding
    try:
        progress = folder.read_progress(directory / results.CHECKPOINTS, number)
    except (OSError, ResultsError, LookupError, TypeError, ValueError) as error:
        yield Finding(results.CHECKPOINTS, False, _line(error))
        return
    stops, blocks = [s for s, _ in sizes], [b for _, b in sizes]
    sweep = _Sweep(directory, config, settings, stops, blocks, progress)
    finding = _metrics(sweep)
    yield finding
    if finding.whole:
        yield _runs(sweep)
    else:
        text = f"cannot be judged where {finding.part} is not whole"
        yield Finding(results.RUNS, False, text)
    yield _params(sweep)
    if not at_end and (directory / report.EVENTS).exists():
        yield _events(sweep)
    if held is None:
        yield Finding(lock.NAME, True, "no process writes here")
    elif held.alive:
        yield Finding(lock.NAME, True, f"{held.name} writes here; what it writes now may be missed")
    else:
        text = f"{held.name or 'its process'} is gone; --resume takes the folder over"
        yield Finding(lock.NAME, True, text)


def require_whole(directory: Path) -> None:
    """The audit at the end of a sweep.

    Raises:
        ResultsError: config.json, checkpoints, tables or final parameters are not whole.
    """
    for finding in check(directory, at_end=True):
        if not finding.whole:
            raise ResultsError(f"{directory} was changed while the sweep ran: {finding}")


def _sizes(settings: Mapping[str, Any]) -> tuple[list[int], int]:
    """Iterations of a run's logged points, and transitions of an iteration."""
    names = ("num_envs", "rollout_length", "total_steps", "num_logs")
    config = Config(**{name: settings[name] for name in names})
    return log_boundaries(config), config.block_size


def _checkpoints(directory: Path, only_newest: bool) -> tuple[int, Finding]:
    """The newest whole checkpoint, 0 where there is none."""
    numbers, newest, problems = checkpoint.numbers(directory), 0, []
    numbers = numbers[-1:] if only_newest else numbers
    for number in numbers:
        path = directory / f"{number:08d}"
        problem = checkpoint.damage(path)
        if problem is None:
            newest = number
        # A sweep that goes on removes old ones.
        elif path.exists():
            problems.append(f"{path.name}: {problem}")
    if problems:
        rest = f"; --resume goes back to {newest:08d}" if newest else ""
        return newest, Finding(results.CHECKPOINTS, False, "; ".join(problems) + rest)
    text = ", ".join(f"{n:08d}" for n in numbers) or "none yet"
    return newest, Finding(results.CHECKPOINTS, True, text)


def _metrics(sweep: _Sweep) -> Finding:
    path, saved = sweep.directory / results.METRICS, sweep.progress.metrics_bytes
    if saved is None:
        return Finding(path.name, True, "nothing saved yet")
    try:
        text = path.read_bytes()
    except OSError as error:
        return Finding(path.name, False, _line(error))
    if len(text) < saved:
        short = f"{len(text)} bytes, {saved} when the newest checkpoint was made"
        return Finding(path.name, False, short)
    lines = text[:saved].decode(errors="replace").splitlines()
    problem = _problem_of_rows(sweep, lines) if lines else "empty"
    if problem:
        return Finding(path.name, False, problem)
    rest = f", and {len(text) - saved} bytes that --resume makes again" if text[saved:] else ""
    return Finding(path.name, not (rest and sweep.finished), f"{len(lines) - 1} rows{rest}")


def _problem_of_rows(sweep: _Sweep, lines: Sequence[str]) -> str | None:
    """What is wrong with the lines of metrics.csv that a checkpoint counts on."""
    columns = sweep.config["metrics"]
    if lines[0].split(",") != columns:
        return "other columns than config.json says"
    found: list[list[int]] = [[] for _ in sweep.settings]
    for place, line in enumerate(lines[1:], 2):
        cells = line.split(",")
        try:
            run, iteration, steps = (int(cell) for cell in cells[:3])
            _ = [float(cell) for cell in cells[3:] if cell]
            whole = len(cells) == len(columns) and steps == iteration * sweep.blocks[run]
            whole &= run >= 0
            found[run].append(iteration)
        except (ValueError, IndexError):
            whole = False
        if not whole:
            return f"line {place} is no row of this sweep"
    for run, (points, stops) in enumerate(zip(sweep.points, sweep.stops, strict=True)):
        expected = stops[:points]
        if found[run] == expected:
            continue
        if lost := sorted(set(expected) - set(found[run])):
            return f"run {run} lacks {_some('iteration', lost)}"
        if len(set(found[run])) < len(found[run]):
            twice = sorted({i for i in found[run] if found[run].count(i) > 1})
            return f"run {run} has {_some('iteration', twice)} twice"
        if sorted(found[run]) == expected:
            return f"iterations of run {run} are out of order"
        more = sorted(set(found[run]) - set(expected))
        return f"run {run} has {_some('iteration', more)}, which it has not made"
    return None


def _runs(sweep: _Sweep) -> Finding:
    path, checkpoints = sweep.directory / results.RUNS, sweep.directory / results.CHECKPOINTS
    if not sweep.progress.number:
        return Finding(path.name, True, "nothing saved yet")
    older = [n for n in checkpoint.numbers(checkpoints) if n < sweep.progress.number]
    try:
        text = path.read_bytes().decode()
        metrics = (sweep.directory / results.METRICS).read_bytes()
        # A kill between a checkpoint and its table leaves that of the one before.
        earlier = [folder.read_progress(checkpoints, number) for number in (0, *older)]
        expected, *others = (_runs_table(sweep, p, metrics) for p in (sweep.progress, *earlier))
    except (OSError, ResultsError, ValueError, LookupError) as error:
        return Finding(path.name, False, _line(error))
    if text not in (expected, *others):
        lines = itertools.zip_longest(text.splitlines(), expected.splitlines())
        first = next((n for n, (one, other) in enumerate(lines, 1) if one != other), 0)
        said = f"line {first} does not agree with config.json and metrics.csv"
        return Finding(path.name, False, said)
    counts = collections.Counter(_status(sweep, run) for run in range(len(sweep.settings)))
    said = ", ".join(f"{count} {status}" for status, count in counts.items())
    behind = "" if text == expected else "; the table is a checkpoint behind"
    return Finding(path.name, True, said + behind)


def _runs_table(sweep: _Sweep, progress: Progress, metrics: bytes) -> str:
    """What runs.csv says at a checkpoint."""
    saved = progress.metrics_bytes
    table = metrics.partition(b"\n")[0] + b"\n" if saved is None else metrics[:saved]
    sizes = [(stops[-1], block) for stops, block in zip(sweep.stops, sweep.blocks, strict=True)]
    return folder.runs_table(sweep.settings, sizes, progress, io.StringIO(table.decode()))


def _status(sweep: _Sweep, run: int) -> str:
    if run in sweep.progress.diverged:
        return "diverged"
    if run in sweep.progress.finished:
        return "done"
    return "running" if sweep.points[run] else "waiting"


def _params(sweep: _Sweep) -> Finding:
    try:
        folders = results.params_folders(sweep.directory)
    except ResultsError as error:
        return Finding(results.PARAMS, False, _line(error))
    done, there, unsealed = set(sweep.progress.finished), set(), 0
    for path, members in folders:
        if not done.intersection(members):
            continue
        if not (path / checkpoint.MANIFEST).exists():
            unsealed += 1
            problem = None if (path / checkpoint.ARRAYS).is_dir() else "no arrays"
        else:
            problem = checkpoint.damage(path)
        if problem:
            return Finding(results.PARAMS, False, f"{path.name}: {problem}")
        there.update(members)
    if lost := sorted(done - there):
        return Finding(results.PARAMS, False, f"none of {_some('run', lost)}, done")
    rest = ", without checksums, from an earlier version" if unsealed else ""
    return Finding(results.PARAMS, True, f"{len(done)} runs{rest}")


def _events(sweep: _Sweep) -> Finding:
    try:
        steps = report.event_steps(sweep.directory / report.EVENTS)
    except ImportError:
        return Finding(report.EVENTS, True, "not read: tensorboardX is not installed")
    except (OSError, ValueError) as error:
        return Finding(report.EVENTS, False, _line(error))
    for run, points in enumerate(sweep.points):
        expected = [stop * sweep.blocks[run] for stop in sweep.stops[run][:points]]
        found = steps.get(run, [])
        last = expected[-1] if expected else 0
        known = found if sweep.finished else [step for step in found if step <= last]
        if not sweep.config["options"]["tensorboard"]:
            # Switched on by a later execution.
            expected = expected[len(expected) - len(known) :]
        if known != expected:
            wrong = sorted(set(expected) ^ set(known)) or known
            return Finding(report.EVENTS, False, f"run {run}: {_some('step', wrong)} lost or twice")
    return Finding(report.EVENTS, True, f"{len(steps)} runs")


def _some(what: str, numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:MOST_NAMED]))
    more = f" and {len(numbers) - MOST_NAMED} more" if len(numbers) > MOST_NAMED else ""
    return f"{what}{'s' if len(numbers) > 1 else ''} {shown}{more}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
