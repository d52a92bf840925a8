"""What a sweep will compile and hold: groups of runs, their memory, and slices that fit."""

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
from gipo_jax.domains.tokens import selection
from gipo_jax.sweep import program
from gipo_jax.sweep.grid import Run, env_name
from gipo_jax.sweep.options import Options
from gipo_jax.sweep.program import Layout

USABLE = 0.9
"""Part of the memory that a plan may take: the rest is for the program itself."""


SIMULATOR_BYTES = 20 * 2**20
"""What an environment outside JAX takes, measured on Meta-World."""

MOST_SIMULATORS = 64
"""Environments outside JAX that wait for their part at most, so that a sweep starts soon."""


class Memory(NamedTuple):
    """Bytes that one run takes.

    Attributes:
        params: policy and value parameters.
        optimizer: optimizer state.
        replay: all allocated rows.
        other: environments, normaliser, counters.
        work: what a step makes and drops: a rollout, a batch and its activations, gradients.
    """

    params: int
    optimizer: int
    replay: int
    other: int
    work: int

    @property
    def state(self) -> int:
        """Bytes carried from one iteration to the next."""
        return self.params + self.optimizer + self.replay + self.other


class Group(NamedTuple):
    """Runs that share a compiled program.

    Attributes:
        name: for people.
        domain: what they train on; its configuration allocates the largest buffer among them.
        runs: their indices in the sweep.
        hparams: their settings.
        memory: bytes of each.
    """

    name: str
    domain: Domain
    runs: tuple[int, ...]
    hparams: tuple[HParams, ...]
    memory: Memory

    def settings(self, run: int) -> HParams:
        """Settings of a run by its index in the sweep."""
        return self.hparams[self.runs.index(run)]


class Part(NamedTuple):
    """Runs that go through the program together.

    Attributes:
        runs: their indices in the sweep.
        point: logged points already made.
        state: their stored states; None at the start.
    """

    runs: tuple[int, ...]
    point: int
    state: Any | None


class Slices(NamedTuple):
    """How a group goes through the devices: parts of it, one after the other.

    Attributes:
        parts: indices in the sweep of the runs of each part.
        layout: of the largest part; all parts use it.
        bytes: memory needed on all devices together.
        limit: memory there is, None if unknown.
    """

    parts: tuple[tuple[int, ...], ...]
    layout: Layout
    bytes: int
    limit: int | None


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups runs by static configuration and checks each of them.

    Raises:
        ConfigError: a run's settings are not usable.
    """
    members: dict[Any, list[int]] = {}
    for index, run in enumerate(runs):
        members.setdefault(dataclasses.replace(run.config, max_buffer_size=None), []).append(index)
    groups = []
    for config, indices in members.items():
        hparams = [_checked(runs[index]) for index in indices]
        # An allocation that the user asked for stands.
        sizes = [int(h.buffer_size) for h in hparams]
        sizes += [runs[index].config.max_buffer_size or 0 for index in indices]
        domain = train.make(dataclasses.replace(config, max_buffer_size=max(sizes)))
        name = f"{env_name(config.env)} {domain.objective.name}"
        if config.kernel != "gaussian":
            name += f" {config.kernel}"
        if config.ratio_level is not None:
            name += f" {config.ratio_level}"
        if config.selection != "keep_all":
            name += f" {selection.name_of(config.selection)}"
        memory = measure(domain, hparams[0])
        groups.append(Group(name, domain, tuple(indices), tuple(hparams), memory))
    return groups


def _checked(run: Run) -> HParams:
    values = {f.name: getattr(run.hparams, f.name) for f in dataclasses.fields(run.hparams)}
    return train.make_hparams(run.config, **values)


def measure(domain: Domain, hparams: HParams) -> Memory:
    """Bytes of one run, from shapes alone."""
    state = jax.eval_shape(lambda: train.init(domain, hparams))
    config = domain.config
    params, optimizer = size(state.learner.params), size(state.learner.opt_state)
    replay = size(state.replay)
    row = replay / max(config.max_buffer_size or 1, 1)
    activations = 4 * domain.activations * config.batch_size
    work = row * (2 * config.block_size + 4 * config.batch_size) + activations + 2 * params
    other = size(state) - params - optimizer - replay
    if domain.host:
        other += config.num_envs * SIMULATOR_BYTES
        work += 2 * domain.eval_episodes * SIMULATOR_BYTES
    return Memory(params, optimizer, replay, other, int(work))


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
    return layout.width * memory.state + copies * memory.state + at_work * memory.work


def slices(
    group: Group,
    mode: str,
    lanes: int | None,
    devices: Sequence[jax.Device],
    limit: int | None,
) -> Slices:
    """Cuts a group into the fewest parts that fit in memory, ``limit`` bytes on all devices.

    For ``mode`` and ``lanes`` see ``program.layout``.

    Raises:
        ConfigError: not even one run fits; the message says what would.
    """
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
            raise ConfigError("memory_limit", show(limit), _options(group, total, layout, limit))
        parts = -(-len(runs) // (width - 1))


def parts_at_once(group: Group, slices: Slices) -> int:
    """Parts that one compiled program serves.

    All of them, but for simulators outside JAX: a program holds the addresses of those of all its
    parts, which must fit in memory beside the part that trains.
    """
    if not group.domain.host:
        return len(slices.parts)
    simulators = slices.layout.width * group.domain.config.num_envs
    more = MOST_SIMULATORS // simulators - 1
    if slices.limit is not None:
        spare = USABLE * slices.limit - slices.bytes
        more = min(more, int(spare / (simulators * SIMULATOR_BYTES)))
    return 1 + max(more, 0)


def remaining(
    group: Group, slices: Slices, finished: Sequence[int], started: Sequence[Part]
) -> list[Part]:
    """What is left to train of a group: the started parts, cut where they must be, then others."""
    width = slices.layout.width
    mine = [part for part in started if part.runs[0] in group.runs]
    parts = []
    for part in mine:
        if len(part.runs) <= width:
            parts.append(part)
            continue
        # The layout has become narrower since.
        for i in range(0, len(part.runs), width):
            cut = slice(i, i + width)
            state = jax.tree.map(lambda x, cut=cut: x[cut], part.state)
            parts.append(Part(part.runs[cut], part.point, state))
    taken = {*finished, *(run for part in mine for run in part.runs)}
    fresh = [tuple(run for run in runs if run not in taken) for runs in slices.parts]
    return parts + [Part(runs, 0, None) for runs in fresh if runs]


def batch_mode(options: Options, domain: Domain, platform: str) -> str:
    """The batch mode of a group: ``vmap``, ``map`` or ``loop``.

    Simulators outside JAX (``domain.host``) step one run after the other.

    Raises:
        ConfigError: the options do not go with each other or with the domain.
    """
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
    """As many devices of each process. Raises ConfigError where it has fewer than asked for."""
    count = options.devices
    if count is None:
        return jax.devices()
    if count > jax.local_device_count():
        valid = f"at most {jax.local_device_count()}, the devices of this process"
        raise ConfigError("devices", count, valid)
    processes = range(jax.process_count())
    return [d for process in processes for d in jax.local_devices(process)[:count]]


def _options(group: Group, total: int, layout: Layout, limit: int) -> str:
    memory, config = group.memory, group.domain.config
    text = (
        f"at least {show(int(total / USABLE))} for {group.name}: {show(memory.state)} a run, of"
        f" which replay {show(memory.replay)}"
    )
    if layout.lanes > 1:
        text += f", {layout.lanes} runs at a time (batch mode loop takes one)"
    rows = config.max_buffer_size or config.block_size
    spare = USABLE * limit / layout.width - (memory.state - memory.replay + memory.work)
    fitting = int(spare / max(memory.replay / rows, 1)) // config.block_size * config.block_size
    if fitting >= config.block_size:
        text += f"; a buffer_size up to {fitting} would fit"
    return text


def memory_limit(devices: Sequence[jax.Device]) -> int | None:
    """Bytes that devices of this process have together; None where they do not say."""
    if devices[0].platform == "cpu":
        return _host_memory()
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    return sum(limits) if all(limits) else None  # type: ignore[arg-type]


def _host_memory() -> int | None:
    """Free memory of the host, or of the control group if that is less."""
    found = []
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(fields["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        try:
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        except (OSError, ValueError, AttributeError):
            return None
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            found.append(int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return max(min(found), 0)


def parse_size(text: str) -> int:
    """Bytes from text such as ``512MB``, ``8GB`` or ``1000000``; powers of 1024.

    Raises:
        ConfigError: not a size.
    """
    units = {"": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30, "TB": 2**40}
    digits = text.strip().upper().rstrip("KMGTB")
    try:
        value = int(float(digits) * units[text.strip().upper()[len(digits) :].strip()])
    except (KeyError, ValueError, OverflowError):
        value = 0
    if value <= 0:
        raise ConfigError("memory_limit", text, "a size such as 512MB or 8GB")
    return value


def show(size: float) -> str:
    """A size with its unit."""
    for unit in ("bytes", "KB", "MB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GB"


def lines(group: Group, slices: Slices) -> list[str]:
    """The memory plan of a group, to print."""
    memory = group.memory
    parts = ", ".join(
        f"{name} {show(value)}"
        for name, value in (
            ("parameters", memory.params),
            ("optimizer", memory.optimizer),
            ("replay", memory.replay),
            ("environments", memory.other),
            ("rollout and batch", memory.work),
        )
    )
    runs = sum(len(part) for part in slices.parts)
    limit = f" of {show(slices.limit)}" if slices.limit is not None else ""
    text = [f"{group.name}: {runs} runs, each {parts}; {show(slices.bytes)}{limit} in all"]
    if len(slices.parts) > 1 and slices.layout.width > len(slices.layout.devices):
        width = len(slices.parts[0])
        text.append(f"  more than fits at once: {len(slices.parts)} slices of up to {width} runs")
    if group.domain.resume_gap is not None:
        text.append(f"  --resume will go on with new episodes: {group.domain.resume_gap}")
    return text
