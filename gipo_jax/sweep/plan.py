"""What a sweep will compile and hold: groups of runs, their memory, and slices that fit."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gipo_jax import train
from gipo_jax.config import ConfigError, HParams
from gipo_jax.domains import Domain
from gipo_jax.sweep import grid, program
from gipo_jax.sweep.grid import Run, env_name
from gipo_jax.sweep.options import Options
from gipo_jax.sweep.program import Layout

USABLE = 0.9  # Part of the memory that a plan may take: the rest is for the program itself


SIMULATOR_BYTES = 20 * 2**20  # What an environment outside JAX takes, measured on Meta-World

MOST_SIMULATORS = 64  # outside JAX that wait for their part, so that a sweep starts soon


class Memory(NamedTuple):
    """Bytes that one run takes."""

    state: int  # carried from one iteration to the next
    replay: int  # part of ``state``: all allocated rows
    work: int  # made and dropped in a step: a rollout, a batch and its activations, gradients


class Group(NamedTuple):
    """Runs that share a compiled program."""

    name: str
    domain: Domain  # its configuration allocates the largest buffer among the runs
    runs: tuple[int, ...]  # indices in the sweep
    hparams: tuple[HParams, ...]
    memory: Memory

    def settings(self, run: int) -> HParams:
        """Settings of a run by its index in the sweep."""
        return self.hparams[self.runs.index(run)]


class Part(NamedTuple):
    """Runs that go through the program together."""

    runs: tuple[int, ...]  # indices in the sweep
    point: int  # logged points already made
    state: Any | None  # their stored states, None at the start


@dataclasses.dataclass
class Progress:
    """What a checkpoint says of a sweep, beside the arrays."""

    number: int = 0  # of the newest checkpoint, 0 where there is none
    finished: list[int] = dataclasses.field(default_factory=list)  # indices of runs
    diverged: dict[int, int] = dataclasses.field(default_factory=dict)  # run: iteration
    started: list[Part] = dataclasses.field(default_factory=list)
    metrics_bytes: int | None = None  # size of metrics.csv; None for a new file


class Slices(NamedTuple):
    """How a group goes through the devices: parts of it, one after the other."""

    parts: tuple[tuple[int, ...], ...]  # indices in the sweep
    layout: Layout  # of the largest part; all parts use it
    bytes: int  # needed on all devices together
    limit: int | None  # bytes there are, if known


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups runs by static configuration and checks each; raises ConfigError."""
    members: dict[Any, list[int]] = {}
    for index, run in enumerate(runs):
        config = dataclasses.replace(run.config, max_buffer_size=None)
        varied = tuple(sorted(run.hparams.env_params or ()))
        members.setdefault((config, varied), []).append(index)
    groups = []
    for (config, _), indices in members.items():
        hparams = [train.make_hparams(runs[i].config, **vars(runs[i].hparams)) for i in indices]
        # An allocation that the user asked for stands.
        sizes = [int(h.buffer_size) for h in hparams]
        sizes += [runs[index].config.max_buffer_size or 0 for index in indices]
        domain = train.make(dataclasses.replace(config, max_buffer_size=max(sizes)))
        memory = measure(domain, hparams[0])
        name = grid.program_name(config)
        groups.append(Group(name, domain, tuple(indices), tuple(hparams), memory))
    return groups


# Memory.


def measure(domain: Domain, hparams: HParams) -> Memory:
    """Bytes of one run, from shapes alone."""
    carried = jax.eval_shape(lambda: train.init(domain, hparams))
    config = domain.config
    params, replay, state = size(carried.learner.params), size(carried.replay), size(carried)
    row = replay / max(config.max_buffer_size or 1, 1)
    activations = 4 * domain.activations * config.batch_size
    work = row * (2 * config.block_size + 4 * config.batch_size) + activations + 2 * params
    if domain.host:
        state += config.num_envs * SIMULATOR_BYTES
        work += 2 * domain.eval_episodes * SIMULATOR_BYTES
    return Memory(state, replay, int(work))


def size(tree: Any) -> int:
    """Bytes of a pytree of arrays or shapes."""

    def leaf_size(leaf: Any) -> int:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        return math.prod(leaf.shape) * leaf.dtype.itemsize

    return sum(leaf_size(leaf) for leaf in jax.tree.leaves(tree))


def needed(memory: Memory, layout: Layout) -> int:
    """Bytes on all devices: all states, and a copy of one block where there are several."""
    at_work = len(layout.devices) * layout.lanes
    copies = at_work if layout.blocks > 1 else 0
    return (layout.width + copies) * memory.state + at_work * memory.work


def memory_limit(devices: Sequence[jax.Device]) -> int | None:
    """Bytes that devices of this process have together; None where they do not say."""
    if devices[0].platform == "cpu":
        return _host_memory()
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    return sum(limits) if all(limits) else None  # type: ignore[arg-type]


def _host_memory() -> int | None:
    """Free memory of the host, or of the control group if that is less; None where unknown."""
    free = []
    with contextlib.suppress(OSError, KeyError, ValueError):
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(int(fields["MemAvailable"].split()[0]) * 1024)
    # A group without a limit says "max", which is no number.
    with contextlib.suppress(OSError, ValueError):
        limit, used = (Path(f"/sys/fs/cgroup/memory.{n}").read_text() for n in ("max", "current"))
        free.append(max(int(limit) - int(used), 0))
    if not free:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(free) if free else None


def show(size: float) -> str:
    """A size with its unit."""
    for unit in ("bytes", "KB", "MB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GB"


# Slices.


def slices(
    group: Group,
    mode: str,
    lanes: int | None,
    devices: Sequence[jax.Device],
    limit: int | None,
) -> Slices:
    """Cuts a group into the fewest parts that fit in ``limit`` bytes on all devices."""
    runs = group.runs
    parts = -(-len(runs) // len(devices)) if mode == "loop" else 1
    while True:
        width = -(-len(runs) // parts)
        layout = program.layout(mode, lanes, devices, width)
        total = needed(group.memory, layout)
        if limit is None or total <= USABLE * limit:
            cut = tuple(tuple(runs[i : i + width]) for i in range(0, len(runs), width))
            return Slices(cut, layout, total, limit)
        if width == 1:
            raise ConfigError("memory_limit", show(limit), _would_fit(group, total, layout, limit))
        parts = -(-len(runs) // (width - 1))


def _would_fit(group: Group, total: int, layout: Layout, limit: int) -> str:
    """The memory that one run of a group needs, and the buffer that would fit."""
    config, (state, replay, work) = group.domain.config, group.memory
    text = f"at least {show(total / USABLE)} for {group.name}, replay being {show(replay)} a run"
    spare = USABLE * limit / layout.width - (state - replay + work)
    rows = spare * (config.max_buffer_size or config.block_size) / max(replay, 1)
    fitting = int(rows) // config.block_size * config.block_size
    return f"{text}; a buffer_size up to {fitting} would fit" if fitting > 0 else text


def plan_line(group: Group, slices: Slices) -> str:
    """The memory plan of a group, in one line."""
    memory, runs = group.memory, len(group.runs)
    text = f"{group.name}: {runs} runs, each {show(memory.state + memory.work)}"
    text += f" ({show(memory.replay)} of it replay); {show(slices.bytes)}"
    if slices.limit is not None:
        text += f" of {show(slices.limit)}"
    if len(slices.parts) > 1 and slices.layout.width > len(slices.layout.devices):
        text += f", in {len(slices.parts)} slices of up to {len(slices.parts[0])} runs"
    gap = group.domain.resume_gap
    if gap is not None:
        text += f"; --resume will go on with new episodes: {gap}"
    return text


def parts_at_once(group: Group, slices: Slices) -> int:
    """Parts that one program serves: all, or as many as have room for simulators outside JAX."""
    if not group.domain.host:
        return len(slices.parts)
    simulators = slices.layout.width * group.domain.config.num_envs
    more = MOST_SIMULATORS // simulators - 1
    if slices.limit is not None:
        spare = USABLE * slices.limit - slices.bytes
        more = min(more, int(spare / (simulators * SIMULATOR_BYTES)))
    return 1 + max(more, 0)


def remaining(group: Group, slices: Slices, progress: Progress) -> list[Part]:
    """What is left to train of a group: the started parts, cut where they must be, then others."""
    width, parts, taken = slices.layout.width, [], set(progress.finished)
    for part in progress.started:
        if part.runs[0] not in group.runs:
            continue
        taken |= set(part.runs)
        if len(part.runs) <= width:
            parts.append(part)
            continue
        # The layout has become narrower since.
        for i in range(0, len(part.runs), width):
            cut = slice(i, i + width)
            state = jax.tree.map(lambda x, cut=cut: x[cut], part.state)
            parts.append(Part(part.runs[cut], part.point, state))
    fresh = [tuple(run for run in runs if run not in taken) for runs in slices.parts]
    return parts + [Part(runs, 0, None) for runs in fresh if runs]


# Options.


def batch_mode(options: Options, domain: Domain, platform: str) -> str:
    """The batch mode of a group, ``vmap``, ``map`` or ``loop``, that fits options and domain."""
    mode, on_host = options.batch_mode, domain.host
    if mode == "auto":
        # To resume, simulators replay what they did: only the runs in training with loop.
        mode = "loop" if on_host else "map" if platform == "cpu" else "vmap"
    because = f"because {env_name(domain.config.env)} is simulated outside JAX"
    if on_host and jax.process_count() > 1:
        raise ConfigError("distributed", True, f"one process, {because}")
    if on_host and mode == "vmap":
        raise ConfigError("batch_mode", mode, f"map or loop, {because}")
    if options.map_lanes is not None and mode != "map":
        raise ConfigError("map_lanes", options.map_lanes, "left out, or batch mode map")
    if on_host and (options.map_lanes or 1) > 1:
        raise ConfigError("map_lanes", options.map_lanes, f"1, {because}")
    return mode


def choose_devices(options: Options) -> list[jax.Device]:
    """As many devices of each process as the options say."""
    count = options.devices
    if count is None:
        return jax.devices()
    if count > jax.local_device_count():
        valid = f"at most {jax.local_device_count()}, the devices of this process"
        raise ConfigError("devices", count, valid)
    processes = range(jax.process_count())
    return [d for process in processes for d in jax.local_devices(process)[:count]]
