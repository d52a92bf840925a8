"""Trains the runs of a sweep and writes their results."""

import dataclasses
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gipo_jax import provenance, train
from gipo_jax.config import ConfigError, check_fields
from gipo_jax.sweep import checkpoint, grid, logs, plan, results
from gipo_jax.sweep.grid import Run
from gipo_jax.sweep.interrupts import Interrupted, Interrupts
from gipo_jax.sweep.options import Options
from gipo_jax.sweep.plan import Group, Slices
from gipo_jax.sweep.processes import ALONE, Peers, Processes, wait
from gipo_jax.sweep.program import Program
from gipo_jax.sweep.progress import Reporter


class Summary(NamedTuple):
    """What a finished sweep reports.

    Attributes:
        directory: its folder.
        compilations: programs compiled, one a group of runs that still had something to do.
        diverged: indices of the runs that diverged.
    """

    directory: Path
    compilations: int
    diverged: tuple[int, ...]


def run(
    runs: Sequence[Run],
    directory: str | Path,
    options: Options | None = None,
    *,
    resume: bool = False,
    on_log: logs.Callback | None = None,
    processes: Processes = ALONE,
) -> Summary:
    """Trains runs and writes their results.

    Everything is checked before anything is compiled or written.

    Args:
        runs: from ``expand``, or made by hand.
        directory: folder for the results, see ``results``.
        options: how to execute.
        resume: go on with the sweep in ``directory``, which must be of the same runs.
        on_log: called with the rows of each logged point, in a thread of its own; what it raises
            is reported and does not end the sweep.
        processes: from ``processes.start``, where several share the sweep.

    Raises:
        ConfigError: a setting is not usable.
        results.ResultsError: what is on disk cannot be used, or writing
            failed; the last checkpoint stands.
        Interrupted: SIGTERM or Ctrl-C came; everything is saved.
    """
    options = options or Options()
    directory = Path(directory).absolute()
    results.check_directory(directory, resume)
    peers = Peers(directory / results.PROCESSES, processes) if processes.count > 1 else None
    try:
        worker = _Worker(list(runs), directory, options, resume, processes, peers)
        if peers is not None:
            peers.agree()
        callbacks: list[logs.Callback] = [on_log] if on_log else []
        if options.tensorboard:
            callbacks.append(logs.TensorBoard(directory / "tensorboard", [r.name for r in runs]))
        return worker.work(callbacks)
    finally:
        if peers is not None:
            peers.close("stopped")


class _Part(NamedTuple):
    """Runs that go through the program together.

    Attributes:
        runs: their indices.
        point: logged points already made.
        state: their stored states, NumPy arrays ``[runs, ...]``; None at the start.
    """

    runs: tuple[int, ...]
    point: int
    state: Any | None


class _Task(NamedTuple):
    """A group with what is left to do of it."""

    group: Group
    slices: Slices
    program: Program
    parts: tuple[_Part, ...]


class _Worker:
    """Trains the runs of a sweep. Construction checks, ``work`` acts."""

    def __init__(
        self,
        runs: list[Run],
        directory: Path,
        options: Options,
        resume: bool,
        processes: Processes,
        peers: Peers | None,
    ) -> None:
        if not runs:
            raise ConfigError("runs", [], "at least one run")
        check_fields(options)
        if options.tensorboard:
            logs.check_tensorboard()
        self.runs, self.directory, self.options, self.resume = runs, directory, options, resume
        self.processes, self.peers = processes, peers
        # Where several processes write, each has a folder of its own; process 0 merges.
        self.folder = results.process_folders(directory, processes.count)[processes.index]
        self.encoded = json.loads(json.dumps(grid.encode(runs)))
        # The folders that count; not this one's as long as the sweep was of other processes.
        self.sources = [self.folder]
        if resume:
            stored = results.read_config(directory)
            self._check_same(stored)
            if stored["processes"] != processes.count:
                self.sources = results.process_folders(directory, stored["processes"])
        self.regroups = self.sources != [self.folder]
        self.groups = plan.group_runs(runs)
        self.mine = [index for group in self.groups for index in processes.share(group.runs)]
        self.group_of = {index: group for group in self.groups for index in group.runs}

        self.reporter = Reporter(0, 0, show=False)
        self.finished: list[int] = []
        self.diverged: dict[int, int] = {}
        self.started: list[_Part] = []
        self.metrics_bytes: dict[Path, int] = {}
        if resume:
            for source in self.sources:
                self._load_checkpoint(source)
        self.tasks = self._plan()
        # As they will be trained: cut to the layout of now.
        self.started = [p for task in self.tasks for p in task.parts if p.state is not None]

    def work(self, callbacks: Sequence[logs.Callback]) -> Summary:
        """Runs what is left; see ``run``."""
        done = sum(self._block_steps(run) for run in self.finished)
        done += sum(self._block_steps(r, part.point) for part in self.started for r in part.runs)
        total = sum(self._block_steps(run) for run in self.mine)
        self.reporter = Reporter(total, done, show=not self.options.quiet)
        dispatcher = logs.Dispatcher(callbacks, self.reporter.warn)
        try:
            with Interrupts() as interrupts:
                self.interrupts, self.dispatcher = interrupts, dispatcher
                self._open()
                for task in self.tasks:
                    for line in plan.lines(task.group, task.slices):
                        self.reporter.say(line)
                for task in self.tasks:
                    self._train(task)
                self._finish()
            if self.peers is not None:
                self.peers.close("done")
        except OSError as error:
            raise results.ResultsError(
                f"cannot write to {self.directory}: {error.strerror or error};"
                f" what the last checkpoint holds is safe; {self._how_to_resume()}"
            ) from error
        finally:
            dispatcher.close()
            self.reporter.close()
        return Summary(self.directory, len(self.tasks), tuple(sorted(self.diverged)))

    # Before anything is written.

    def _check_same(self, stored: Mapping[str, Any]) -> None:
        found = grid.difference(stored["groups"], self.encoded)
        if found is not None:
            name, before, now = found
            raise ConfigError(name, now, f"{before!r}, as in the sweep that {self.directory} holds")

    def _load_checkpoint(self, source: Path) -> None:
        """Takes over what the newest checkpoint of a folder holds of the runs of this process."""
        found = checkpoint.newest(
            source / results.CHECKPOINTS, lambda text: print(text, file=sys.stderr)
        )
        if found is None:
            return
        path, progress = found
        mine = set(self.mine)
        self.finished += mine.intersection(progress["finished"])
        self.diverged |= {int(k): v for k, v in progress["diverged"].items() if int(k) in mine}
        self.metrics_bytes[source] = progress["metrics_bytes"]
        parts = progress["started"]
        if mine.isdisjoint(run for part in parts for run in part["runs"]):
            return
        shapes = []
        for part in parts:
            group = self.group_of[part["runs"][0]]
            one = jax.eval_shape(group.algorithm.init, group.hparams[0])
            shapes.append(checkpoint.stacked(one, len(part["runs"])))
        states = checkpoint.read_arrays(path / checkpoint.ARRAYS, shapes)
        for part, state in zip(parts, states, strict=True):
            lanes = [lane for lane, run in enumerate(part["runs"]) if run in mine]
            if len(lanes) < len(part["runs"]):
                state = jax.tree.map(lambda x, lanes=lanes: x[np.asarray(lanes, int)], state)
            if lanes:
                runs = tuple(part["runs"][lane] for lane in lanes)
                self.started.append(_Part(runs, part["point"], state))

    def _plan(self) -> list[_Task]:
        devices = jax.local_devices()
        if self.options.devices is not None:
            if self.options.devices > len(devices):
                valid = f"at most {len(devices)}, the devices of this host"
                raise ConfigError("devices", self.options.devices, valid)
            devices = devices[: self.options.devices]
        mode = self.options.batch_mode
        if mode == "auto":
            mode = "map" if devices[0].platform == "cpu" else "vmap"
        if self.options.map_lanes is not None and mode != "map":
            raise ConfigError("map_lanes", self.options.map_lanes, "left out, or batch mode map")
        limit = plan.memory_limit(devices)
        if self.options.memory_limit is not None:
            limit = plan.parse_size(self.options.memory_limit)

        tasks = []
        for group in self.groups:
            # Slices of the whole share: those of an interrupted sweep come out the same again.
            share = self.processes.share(group.runs)
            if not share:
                continue
            slices = plan.slices(group, share, mode, self.options.map_lanes, devices, limit)
            parts = self._parts(group, slices)
            if parts:
                program = self._trace(group, slices)
                tasks.append(_Task(group, slices, program, parts))
        return tasks

    def _parts(self, group: Group, slices: Slices) -> tuple[_Part, ...]:
        width = len(slices.parts[0])
        parts = []
        for part in self.started:
            if part.runs[0] in group.runs:
                # The layout may have become narrower since.
                for i in range(0, len(part.runs), width):
                    chosen = slice(i, i + width)
                    state = jax.tree.map(lambda x, chosen=chosen: x[chosen], part.state)
                    parts.append(_Part(part.runs[chosen], part.point, state))
        taken = {*self.finished, *(r for part in self.started for r in part.runs)}
        for indices in slices.parts:
            left = tuple(index for index in indices if index not in taken)
            if left:
                parts.append(_Part(left, 0, None))
        return tuple(parts)

    def _trace(self, group: Group, slices: Slices) -> Program:
        objective = group.algorithm.objective
        try:
            return Program(group.algorithm, slices.layout, group.hparams[0])
        except ConfigError:
            raise
        except Exception as error:
            # Tracing runs the user's function; an error that passed through it is theirs.
            file = grid.source_file(objective.function)
            if file is None or not grid.passed_through(error, file):
                raise
            raise ConfigError("objective", objective.name, grid.located(error, file)) from error

    # From here on the folder is written to.

    def _open(self) -> None:
        columns = ["run", "iteration", "env_steps"]
        names = [name for task in self.tasks for name in task.program.metrics]
        columns += list(dict.fromkeys(names))
        if self.resume:
            columns = results.read_config(self.directory)["metrics"]
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.regroups:
            self._take_over(columns)
        if self.peers is not None:
            self.peers.begin(lambda: self._write_config(columns), self._how_to_resume())
        else:
            self._write_config(columns)
        if not self.regroups:
            self._open_metrics(columns, self.metrics_bytes.get(self.folder))
            self.saved_at = time.monotonic()
            self._write_runs()

    def _open_metrics(self, columns: Sequence[str], size: int | None) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / results.METRICS
        self.file = results.MetricsFile(path, columns, size)
        for source, covered in self.metrics_bytes.items():
            if source != self.folder:
                self.file.take(source / results.METRICS, covered, self.mine)
        self.returns = results.Returns()
        self.returns.load(path)

    def _take_over(self, columns: Sequence[str]) -> None:
        """Makes this process's folder from those of the processes that the sweep was of.

        Those stay as they are, and count, until ``config.json`` tells of the new ones.
        """
        # Left by an earlier attempt, or from when there were as many processes before.
        shutil.rmtree(self.folder / results.CHECKPOINTS, ignore_errors=True)
        self._open_metrics(columns, None)
        self._save()
        if self.peers is not None:
            self.peers.agree("saved")

    def _write_config(self, columns: Sequence[str]) -> None:
        path = self.directory / results.CONFIG
        if not self.resume:
            results.write_atomic(path, self._config_text(columns))
        elif self.regroups:
            stored = results.read_config(self.directory) | {"processes": self.processes.count}
            results.write_atomic(path, json.dumps(stored, indent=1) + "\n")
            for source in self.sources:
                shutil.rmtree(source / results.CHECKPOINTS, ignore_errors=True)

    def _config_text(self, columns: Sequence[str]) -> str:
        stored = {
            "format": results.FORMAT,
            "command": shlex.join(sys.argv),
            "provenance": provenance.describe(),
            "options": dataclasses.asdict(self.options),
            "processes": self.processes.count,
            "metrics": columns,
            "groups": self.encoded,
        }
        return json.dumps(stored, indent=1) + "\n"

    def _train(self, task: _Task) -> None:
        self.reporter.say(f"{task.group.name}: compiling")
        started = time.monotonic()
        task.program.compile()
        self.reporter.say(f"{task.group.name}: compiled in {time.monotonic() - started:.1f} s")
        for part in task.parts:
            self.started = [other for other in self.started if other is not part]
            self._train_part(task, part)

    def _train_part(self, task: _Task, part: _Part) -> None:
        group, program = task.group, task.program
        settings = [group.hparams[group.runs.index(run)] for run in part.runs]
        hparams = program.place(settings)
        state = program.init(hparams) if part.state is None else program.restore(part.state)
        stops = train.log_boundaries(group.algorithm.config)
        for point in range(part.point, len(stops)):
            self._stop_if_asked(part.runs, point, state)
            start, stop = stops[point - 1] if point else 0, stops[point]
            began = time.monotonic()
            state, metrics = program.train_and_log(state, hparams, start, stop)
            seconds = time.monotonic() - began
            self._record(group, part.runs, stop, metrics, state)
            steps = (stop - start) * group.algorithm.config.block_size * len(part.runs)
            self.reporter.advance(steps, seconds, group.name, self._medians())
            last = point + 1 == len(stops)
            if not last and self._checkpoint_due():
                self._save(part.runs, point + 1, state)
        self._save_params(part.runs, state)
        self.finished += part.runs
        if self._checkpoint_due():
            self._save()

    def _record(
        self,
        group: Group,
        runs: Sequence[int],
        stop: int,
        metrics: Mapping[str, np.ndarray],
        state: train.TrainState,
    ) -> None:
        env_steps = stop * group.algorithm.config.block_size
        rows = [
            {"run": run, "iteration": stop, "env_steps": env_steps}
            | {name: values[lane] for name, values in metrics.items()}
            for lane, run in enumerate(runs)
        ]
        self.file.add(rows)
        self.returns.add(rows)
        self.dispatcher.send(rows)
        for run, iteration in zip(runs, np.asarray(state.diverged_at).tolist(), strict=False):
            if iteration >= 0 and run not in self.diverged:
                self.diverged[run] = iteration
                self.reporter.say(f"{self.runs[run].name}: diverged in iteration {iteration}")

    def _medians(self) -> dict[str, float]:
        by_objective: dict[str, list[int]] = {}
        for group in self.groups:
            by_objective.setdefault(group.algorithm.objective.name, []).extend(group.runs)
        medians = {}
        for name, indices in by_objective.items():
            latest = self.returns.latest(indices)
            if latest:
                medians[name] = float(np.median(latest))
        return medians

    def _stop_if_asked(
        self, runs: Sequence[int] = (), point: int = 0, state: Any | None = None
    ) -> None:
        received = self.interrupts.received
        lost = self.peers.lost if self.peers is not None else None
        if received is not None or lost is not None:
            self._save(runs, point, state)
            reason = lost or f"stopped by {received}"
            raise Interrupted(
                received or "SIGTERM", f"{reason}, everything is saved; {self._how_to_resume()}"
            )

    def _how_to_resume(self) -> str:
        out = shlex.quote(os.path.relpath(self.directory))
        return f"continue with: gipo-jax sweep --resume --out {out}"

    def _checkpoint_due(self) -> bool:
        return time.monotonic() - self.saved_at >= self.options.checkpoint_seconds

    def _save(self, runs: Sequence[int] = (), point: int = 0, state: Any | None = None) -> None:
        """Makes a checkpoint of everything, with ``state`` of the runs now in training."""
        parts = list(self.started)
        if state is not None:
            count = len(runs)
            # Slicing copies, which the largest sweeps have no memory for.
            kept = jax.tree.map(lambda x: x if len(x) == count else x[:count], state)
            parts.insert(0, _Part(tuple(runs), point, kept))
        progress = {
            "finished": self.finished,
            "diverged": self.diverged,
            "metrics_bytes": self.file.sync(),
            "started": [{"runs": part.runs, "point": part.point} for part in parts],
        }
        states = [part.state for part in parts]
        checkpoint.save(self.folder / results.CHECKPOINTS, progress, states or None)
        self._write_runs()
        self.saved_at = time.monotonic()

    def _save_params(self, runs: Sequence[int], state: train.TrainState) -> None:
        folder = self.directory / results.PARAMS
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{runs[0]:06d}"
        temporary = folder / f"{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        kept = {"params": state.learner.params, "normalizer": state.normalizer}
        kept = jax.tree.map(lambda x: x[: len(runs)], kept)
        checkpoint.write_arrays(temporary / checkpoint.ARRAYS, kept)
        (temporary / "runs.json").write_text(json.dumps(list(runs)))
        shutil.rmtree(folder / name, ignore_errors=True)
        temporary.replace(folder / name)

    def _write_runs(self) -> None:
        described = [grid.described(run) for run in self.runs]
        columns = results.run_columns(described)
        finished = set(self.finished)
        rows = []
        for index in sorted(self.mine):
            run, settings = self.runs[index], described[index]
            summary = self.returns.summary(index, run.config.num_iterations)
            status = (
                "done" if index in finished else "running" if summary["env_steps"] else "waiting"
            )
            diverged = self.diverged.get(index)
            rows.append(
                settings
                | {"run": index, "status": status if diverged is None else "diverged"}
                | {"diverged_step": diverged and diverged * run.config.block_size}
                | summary
            )
        text = results.table_text(columns, rows)
        results.write_atomic(self.folder / results.RUNS, text)

    def _finish(self) -> None:
        self._save()
        folders = [self.folder]
        if self.peers is not None:
            if self.processes.index > 0:
                return
            wait(self.peers.all_done, self._stop_if_asked)
            folders = results.process_folders(self.directory, self.processes.count)
        self.file.close()
        tables = ((results.METRICS, ("run", "iteration")), (results.RUNS, ("run",)))
        for name, keys in tables:
            results.merge_tables([f / name for f in folders], self.directory / name, keys)

    def _block_steps(self, run: int, points: int | None = None) -> int:
        """Environment steps of a run after a number of logged points; all by default."""
        config = self.runs[run].config
        if points is None:
            return config.total_steps
        stops = [0, *train.log_boundaries(config)]
        return stops[points] * config.block_size
