"""Trains the runs of a sweep and writes their results."""

import contextlib
import dataclasses
import functools
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from gipo_jax import train, user_files
from gipo_jax.config import ConfigError, check_fields
from gipo_jax.sweep import audit, checkpoint, cluster, grid, plan, results
from gipo_jax.sweep.folder import Folder
from gipo_jax.sweep.grid import Run
from gipo_jax.sweep.interrupts import EXIT_CODES, Interrupted, StopSignals, catch_stop_signals
from gipo_jax.sweep.options import Options, bytes_of
from gipo_jax.sweep.plan import Group, Part, Slices
from gipo_jax.sweep.program import Program
from gipo_jax.sweep.report import (
    EVENTS,
    Callback,
    Dispatcher,
    Reporter,
    TensorBoard,
    median_returns,
)


class Summary(NamedTuple):
    """What a finished sweep reports."""

    directory: Path  # its folder
    compilations: int  # programs compiled, one per group of runs that still had something to do
    diverged: tuple[int, ...]  # indices of the runs that diverged


def run(
    runs: Sequence[Run],
    directory: str | Path,
    options: Options | None = None,
    *,
    resume: bool = False,
    on_log: Callback | None = None,
) -> Summary:
    """Trains runs and writes their results.

    Everything is checked before anything is compiled or written. In a cluster (see ``cluster``) all
    processes call it with the same arguments.

    Args:
        runs: from ``expand``, or made by hand.
        directory: folder for the results, see ``results``.
        options: how to execute.
        resume: go on with the sweep in ``directory``, which must be of the same runs.
        on_log: called in process 0 with the rows of each logged point, in a thread of its own; what
            it raises is reported and does not end the sweep.

    Raises:
        ConfigError: a setting is not usable.
        results.ResultsError: reading or writing failed; the last checkpoint stands.
        Interrupted: SIGTERM or Ctrl-C came, and everything is saved; or another process is gone.
    """
    directory, options = Path(directory).expanduser().absolute(), options or Options()
    doing = "read"
    try:
        folder, jobs = _prepare(runs, directory, options, resume)
        doing = "write to"
        _train(runs, folder, jobs, options, on_log)
    except OSError as error:
        raise results.ResultsError(
            f"cannot {doing} {directory}: {error.strerror or error};"
            f" what the last checkpoint holds is safe; {_how_to_resume(directory)}"
        ) from error
    except Exception as error:
        if cluster.is_lost(error):
            text = f"another process is gone; {_how_to_resume(directory)}"
            raise Interrupted(text, cluster.LOST_CODE) from error
        raise
    return Summary(directory, len(jobs), tuple(sorted(folder.progress.diverged)))


class GroupJob(NamedTuple):
    """A group with what is left to do of it."""

    group: Group
    slices: Slices
    program: Program
    parts: list[Part]


class SweepContext(NamedTuple):
    """What the training of any part needs."""

    runs: Sequence[Run]
    folder: Folder
    options: Options
    signals: StopSignals
    reporter: Reporter
    dispatcher: Dispatcher


def _train(
    runs: Sequence[Run],
    folder: Folder,
    jobs: Sequence[GroupJob],
    options: Options,
    on_log: Callback | None,
) -> None:
    """Trains what is left: group by group, part by part, logged point by logged point."""
    main = cluster.is_main_process()
    reporter = Reporter(*_steps(runs, folder), show=main and not options.quiet)
    callbacks, held = [on_log] if on_log and main else [], contextlib.ExitStack()
    if options.tensorboard and main:
        names = [run.name for run in runs]
        board = TensorBoard(folder.directory / EVENTS, names, reporter.warn)
        callbacks.append(board)
        held.callback(board.close)
    with (
        catch_stop_signals() as signals,
        contextlib.closing(reporter),
        held,
        contextlib.closing(Dispatcher(callbacks, reporter.warn)) as dispatcher,
    ):
        names = [name for job in jobs for name in job.program.metrics]
        cluster.run_on_all_processes(lambda: held.enter_context(folder.owned()))
        folder.open(names, dataclasses.asdict(options))
        for job in jobs:
            reporter.say(plan.plan_line(job.group, job.slices))
        context = SweepContext(runs, folder, options, signals, reporter, dispatcher)
        for job in jobs:
            at_once = plan.parts_at_once(job.group, job.slices)
            while job.parts:
                served = job.parts[:at_once]
                with _compiled(job, [part.runs for part in served], reporter) as program:
                    for _ in served:
                        part = folder.take_up(job.parts.pop(0))
                        _train_part(context, job.group, program, part)
        folder.close()
        if main:
            audit.require_whole(folder.directory)


def _train_part(context: SweepContext, group: Group, program: Program, part: Part) -> None:
    """Trains a part from its last logged point to its end."""
    runs, folder, options, signals, reporter, dispatcher = context
    config = group.domain.config
    stops, env = [0, *train.log_boundaries(config)], grid.env_name(config.env)
    hparams = program.place([group.settings(run) for run in part.runs])
    state = program.start(hparams, part.state, len(part.runs))
    part = part._replace(state=None)
    if program.new_episodes:
        reporter.say(f"{program.new_episodes} environments began a new episode")
    _save_or_stop(folder, signals, options, part._replace(state=state))
    for point in range(part.point, len(stops) - 1):
        start, stop = stops[point], stops[point + 1]
        began = time.monotonic()
        state, metrics, diverged_at = program.train_and_log(state, hparams, start, stop)
        seconds = time.monotonic() - began
        dispatcher.send(folder.add(group, part.runs, stop, metrics))
        for run in folder.add_diverged(part.runs, diverged_at):
            reporter.say(f"{runs[run].name}: diverged")
        steps = (stop - start) * config.block_size * len(part.runs)
        medians = median_returns(folder.latest, folder.settings, env)
        reporter.advance(steps, seconds, group.name, env, medians)
        training = None
        if stop < stops[-1]:
            training = Part(part.runs, point + 1, state)
        else:
            folder.finish(part.runs, group.domain.acting(state))
        _save_or_stop(folder, signals, options, training)


@contextlib.contextmanager
def _compiled(
    job: GroupJob, parts: Sequence[Sequence[int]], reporter: Reporter
) -> Iterator[Program]:
    """The program of a job, compiled once; with simulators outside JAX, one for these parts."""
    group, layout, program = job.group, job.slices.layout, job.program
    domain = group.domain
    if domain.host:
        seeds = []
        for runs in parts:
            own = [int(group.settings(run).seed) for run in runs]
            seeds.append(own + [own[-1]] * (layout.width - len(own)))
        # A device has the simulators of its share of every part.
        devices = len(layout.devices)
        by_device = np.reshape(seeds, (len(parts), devices, -1)).swapaxes(0, 1).ravel()
        domain = domain.open(by_device.tolist(), devices)
        program = Program(domain, layout, group.hparams[0])
    try:
        if not program.is_compiled:
            reporter.say(f"{group.name}: compiling")
            began = time.monotonic()
            program.compile()
            reporter.say(f"{group.name}: compiled in {time.monotonic() - began:.1f} s")
        yield program
    finally:
        domain.close()


def _prepare(
    runs: Sequence[Run], directory: Path, options: Options, resume: bool
) -> tuple[Folder, list[GroupJob]]:
    """Checks everything and traces the programs; nothing is compiled or written."""

    def check() -> tuple[Folder, list[Group], int, int]:
        if not runs:
            raise ConfigError("runs", [], "at least one run")
        check_fields(options)
        if options.tensorboard:
            TensorBoard.check()
        folder = Folder(directory, runs, resume)
        groups = plan.group_runs(runs)
        memory = plan.memory_limit(jax.local_devices()[: options.devices])
        number = None
        # Whole checkpoints are read for this: once is enough.
        if resume and cluster.is_main_process():
            warn = functools.partial(print, file=sys.stderr)
            number = checkpoint.newest(folder.checkpoints, warn)
        return folder, groups, memory or 0, number or 0

    folder, groups, memory, number = cluster.run_on_all_processes(check)
    cluster.check_same("settings", json.dumps([folder.encoded, dataclasses.asdict(options)]))
    memories, numbers = cluster.gather(memory, number).T
    # Groups are cut alike everywhere: for the process with the least memory.
    free = int(memories.min()) * jax.process_count() or None
    limit = bytes_of(options.memory_limit) or free

    def arrange() -> list[GroupJob]:
        folder.load(int(numbers[0]))
        devices, jobs = plan.choose_devices(options), []
        for group in groups:
            mode = plan.batch_mode(options, group.domain, devices[0].platform)
            # Slices of all runs: those of an interrupted sweep come out the same again.
            slices = plan.slices(group, mode, options.map_lanes, devices, limit)
            if not set(group.runs) <= set(folder.progress.finished):
                jobs.append(GroupJob(group, slices, _trace(group, slices), []))
        return jobs

    jobs = cluster.run_on_all_processes(arrange)
    _load_states(folder, jobs)
    progress = folder.progress
    for job in jobs:
        job.parts.extend(plan.remaining(job.group, job.slices, progress))
    progress.started = [p for job in jobs for p in job.parts if p.state is not None]
    return folder, jobs


def _trace(group: Group, slices: Slices) -> Program:
    """The traced program of a group; what a user's objective raises is shown as theirs."""
    objective = group.domain.objective
    try:
        return Program(group.domain, slices.layout, group.hparams[0])
    except ConfigError:
        raise
    except Exception as error:
        file = user_files.source_file(objective.function)
        if file is None or (place := user_files.located(error, file)) is None:
            raise
        raise ConfigError("objective", objective.name, place) from error


def _load_states(folder: Folder, jobs: Sequence[GroupJob]) -> None:
    """Reads the states of started parts, that of the first to the devices, where it goes on at
    once.
    """
    programs = {run: job.program for job in jobs for run in job.group.runs}
    like = []
    for index, part in enumerate(folder.progress.started):
        program = programs[part.runs[0]]
        wide = len(part.runs) > program.layout.width
        on_host = index > 0 or wide or program.domain.host
        like.append(program.on_host(len(part.runs)) if on_host else program.state)
    folder.load_states(like)


def _save_or_stop(
    folder: Folder, signals: StopSignals, options: Options, training: Part | None
) -> None:
    """Makes a checkpoint when it is time to, and stops if any process was asked to; all agree."""
    numbers, unsaved = cluster.gather(signals.received, folder.seconds_unsaved()).T
    received = int(numbers.max())
    if received or unsaved[0] >= options.checkpoint_seconds:
        folder.save(training)
    if received:
        name = signal.Signals(received).name
        text = f"stopped by {name}, everything is saved; {_how_to_resume(folder.directory)}"
        raise Interrupted(text, EXIT_CODES[name])


def _steps(runs: Sequence[Run], folder: Folder) -> tuple[int, int]:
    """Environment steps of all runs together, and those made already."""
    done = sum(runs[run].config.total_steps for run in folder.progress.finished)
    for part in folder.progress.started:
        config = runs[part.runs[0]].config
        stops = [0, *train.log_boundaries(config)]
        done += len(part.runs) * stops[part.point] * config.block_size
    return sum(run.config.total_steps for run in runs), done


def _how_to_resume(directory: Path) -> str:
    out = shlex.quote(os.path.relpath(directory))
    return f"continue with: gipo-jax sweep --resume --out {out}"
