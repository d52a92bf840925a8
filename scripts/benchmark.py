"""Times this project and its peers; compilation and running apart.

    python scripts/benchmark.py [NAME ...] [--quick] [--repeats N] [--out FILE]
    python scripts/benchmark.py revision --against CHECKOUT
    python scripts/benchmark.py metaworld_authors --authors-checkout DIR
    python scripts/benchmark.py compiled [--device h100 v5e:16x16] [--peer rejax] [--cache DIR]
    python scripts/benchmark.py --table FILE

Cases of one benchmark run in turn, over and over, so that what else the machine does hits all of
them alike. Each repeat is kept; tables show the median and the range. Peers are installed, on first
use, in an environment of their own (.venv-peer) and timed in processes of their own.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Scripts are part of the checkout, not of the installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gipo_jax import runtime

runtime.set_cpu_defaults()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import struct  # noqa: E402
from gymnax.environments import environment, spaces  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from gipo_jax import (  # noqa: E402
    buffer,
    environments,
    learner,
    networks,
    protocols,
    provenance,
    rollout,
    train,
)
from gipo_jax.config import Config  # noqa: E402
from gipo_jax.domains import Domain, control, tokens  # noqa: E402
from gipo_jax.environments import envpool_env  # noqa: E402
from gipo_jax.sweep import plan, program  # noqa: E402
from scripts import compiled, peer_env  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks"
PEER_VENV = ROOT / ".venv-peer"
PEER_PYTHON = PEER_VENV / "bin" / "python"
AUTHORS_VENV = ROOT / ".venv-authors"
AUTHORS_SCRIPT = "metaworld_ppo_discrete_simple_complete.py"
"""In a checkout of github.com/distanceLu/GIPO."""
WORKER_SECONDS = 600
"""Limit on one compilation or one repeat in a worker process."""

Work = dict[str, Any]
Row = dict[str, Any]

ACCELERATOR_AIMS = {"env_steps_per_s": 20e6, "times_better_peer": 2.0}
"""Aims of ``accelerator`` on one GPU with 1,024 runs."""

PPO_WORK: Work = {
    "num_envs": 64,
    "rollout_length": 128,
    "epochs": 4,
    "minibatches": 4,
    "total_steps": 524_288,
}
"""What this project and rejax do alike: CartPole-v1, on-policy, two layers of 64 tanh units."""


@dataclasses.dataclass(frozen=True)
class Context:
    """Options of a call."""

    repeats: int
    quick: bool
    console: Console
    against: Path | None = None
    authors: Path | None = None
    compiled: argparse.Namespace = dataclasses.field(default_factory=argparse.Namespace)
    stored: Sequence[Row] = ()


# Timing


def row(benchmark: str, case: Work, unit: str, work: float, seconds: list[float]) -> Row:
    """One measured case: ``work`` units were done in each of ``seconds``."""
    rates = [work / s for s in seconds]
    return {
        "benchmark": benchmark,
        "case": case,
        "unit": unit,
        "median": statistics.median(rates),
        "low": min(rates),
        "high": max(rates),
        "seconds": seconds,
    }


def in_turn(cases: Sequence[Callable[[], float]], repeats: int) -> list[list[float]]:
    """Runs all cases once to warm up, then ``repeats`` rounds; seconds of each case."""
    for case in cases:
        case()
    rounds = [[case() for case in cases] for _ in range(repeats)]
    return [list(column) for column in zip(*rounds, strict=True)]


def stopwatch(run: Callable[[], Any]) -> float:
    """Seconds until the result of ``run`` is there."""
    begin = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - begin


class Training:
    """A compiled group of runs; a call times a number of iterations.

    Attributes:
        compile_s: seconds of compilation.
        planned: bytes that a sweep plans for it.
        env_steps: environment steps of one call, all runs together.
        updates: likewise.
    """

    def __init__(
        self,
        config: Config,
        runs: int,
        iterations: int,
        buffer_size: int,
        mode: str = "auto",
        lanes: int | None = None,
        started: int = 0,
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        """Compiles.

        Args:
            config: of all runs; they differ in their seeds.
            runs: their number.
            iterations: iterations a call.
            buffer_size: of all runs.
            mode: batch mode; ``auto`` as in sweeps.
            lanes: see ``program.layout``.
            started: iteration the first call starts from; a late one finds a full buffer.
            devices: all by default.
        """
        config = dataclasses.replace(
            config, max_buffer_size=buffer_size, total_steps=config.block_size * 1_000_000
        )
        devices = devices or jax.local_devices()
        if mode == "auto":
            mode = "map" if devices[0].platform == "cpu" else "vmap"
        hparams = [
            train.make_hparams(config, seed=seed, buffer_size=buffer_size) for seed in range(runs)
        ]
        self.layout = program.layout(mode, lanes, devices, runs)
        self.domain = train.make(config)
        if self.domain.host:
            # Simulators are opened for runs that fill the layout.
            env = train.open_env(config, range(runs), len(self.layout.devices))
            self.domain = train.make(config, env)
        self.planned = plan.needed(plan.measure(self.domain, hparams[0]), self.layout)
        self._program = program.Program(self.domain, self.layout, hparams[0])
        begin = time.perf_counter()
        self._program.compile()
        self.compile_s = time.perf_counter() - begin
        # One call of the program takes as many runs as the layout holds.
        width = self.layout.width
        parts = [hparams[i : i + width] for i in range(0, runs, width)]
        self._hparams = [self._program.place(part) for part in parts]
        self._states: list[Any] = []
        self._next, self._iterations = started, iterations
        self.env_steps = runs * iterations * config.block_size
        self.updates = runs * iterations * config.updates_per_iteration * config.reuse_per_batch

    def __call__(self) -> float:
        if not self._states:
            self._states = [jax.block_until_ready(self._program.init(h)) for h in self._hparams]
        start, stop = self._next, self._next + self._iterations
        self._next = stop
        begin = time.perf_counter()
        for part, hparams in enumerate(self._hparams):
            state, *_ = self._program.train_and_log(self._states[part], hparams, start, stop)
            self._states[part] = state
        jax.block_until_ready(self._states)
        return time.perf_counter() - begin


def training_rows(
    context: Context, name: str, cases: Mapping[str, Training], axis: str
) -> list[Row]:
    """Times trainings in turn; environment steps and updates a second of each."""
    *seconds, product = in_turn([*cases.values(), matmul()], context.repeats)
    rows = []
    for (label, case), times in zip(cases.items(), seconds, strict=True):
        measured = row(name, {axis: label}, "env-steps/s", case.env_steps, times)
        measured["updates_per_s"] = case.updates / statistics.median(times)
        measured["compile_s"] = case.compile_s
        domain = control.make(case.domain.config)
        config, env, head = domain.config, domain.env, domain.head
        outputs = head.num_tokens * head.output_width
        flops = iteration_flops(config, math.prod(env.obs_shape), outputs)
        flops *= case.env_steps / config.block_size
        measured["fraction_of_matmul"] = roofline_fraction(flops, times, product)
        rows.append(measured)
    return rows


MATMUL_FLOPS = 2e10
"""Operations of one call of ``matmul()``."""


def matmul(size: int = 1024) -> Callable[[], float]:
    """Times a chain of square float32 products of about ``MATMUL_FLOPS``."""
    times = max(2, round(MATMUL_FLOPS / (2 * size**3)))
    scale = MATMUL_FLOPS / (times * 2 * size**3)
    x = jnp.full((size, size), 1 / size)
    chain = jax.jit(lambda x: jax.lax.fori_loop(0, times, lambda _, y: y @ x, x))
    return lambda: scale * stopwatch(lambda: chain(x))


def roofline_fraction(flops: float, seconds: list[float], product: list[float]) -> float:
    """Share of the machine's rate of matrix products, both measured in one run."""
    rate = MATMUL_FLOPS / statistics.median(product)
    return flops / statistics.median(seconds) / rate


def iteration_flops(config: Config, inputs: int, outputs: int) -> float:
    """Operations of the matrix products of one iteration with separate towers of dense layers.

    Acting takes the policy forward, labels the value twice, an update both forward and, for the
    gradients of weights and inputs, twice as much again, save for the input of the first layer.
    """

    def tower(outputs: int) -> tuple[int, int]:
        sizes = (inputs, *config.hidden_sizes, outputs)
        products = [a * b for a, b in itertools.pairwise(sizes)]
        return sum(products), products[0]

    (policy, policy_first), (value, value_first) = tower(outputs), tower(1)
    updates = config.updates_per_iteration * config.reuse_per_batch
    learning = config.batch_size * (6 * (policy + value) - 2 * (policy_first + value_first))
    return config.block_size * (2 * policy + 4 * value) + updates * learning


# Worker processes


class Worker:
    """A process that compiles, warms up, and then times one repeat whenever asked."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._command = command
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(environment),
        )
        self.about = self._answer()

    def __call__(self) -> float:
        self.start()
        return self.finish()

    def start(self) -> None:
        """Asks for a repeat, without waiting for it."""
        assert self._process.stdin is not None
        self._process.stdin.write("run\n")
        self._process.stdin.flush()

    def finish(self) -> float:
        """Seconds of the repeat that was asked for, once it is done."""
        return float(self._answer()["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        # A hung process cannot be asked to stop.
        killer = threading.Timer(WORKER_SECONDS, self._process.kill)
        killer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            killer.cancel()
        if not line:
            code = self._process.wait()
            raise RuntimeError(f"worker ended with code {code}: {shlex.join(self._command)}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


@contextlib.contextmanager
def workers(commands: Sequence[Sequence[str]], extra: Mapping[str, str]) -> Iterator[list[Worker]]:
    """Starts workers one after the other; each has compiled when the next one starts."""
    flag = f"--{runtime.SCHEDULER_FLAG}=false"
    environment = {**os.environ, "XLA_FLAGS": flag, **extra}
    started: list[Worker] = []
    try:
        for command in commands:
            started.append(Worker(command, environment))
        yield started
    finally:
        for worker in started:
            worker.close()


def own_worker(what: str, work: Work) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), "--worker", what, json.dumps(work)]


def peer_worker(peer: str, work: Work) -> list[str]:
    python = peer_env.interpreter(PEER_VENV, RESULTS / "peer-constraints.txt")
    return [str(python), str(RESULTS / "peers.py"), peer, json.dumps(work)]


def authors_worker(checkout: Path, work: Work) -> list[str]:
    python = peer_env.interpreter(
        AUTHORS_VENV,
        RESULTS / "metaworld-constraints.txt",
        RESULTS / "metaworld-authors-constraints.txt",
    )
    script = checkout / AUTHORS_SCRIPT
    return [str(python), str(RESULTS / "metaworld_authors.py"), str(script), json.dumps(work)]


def installed_peers() -> list[str]:
    """Trainers of others that the peers' environment has; none where there is no environment.

    For a GPU, add ``jax[cuda12]`` to it. PureJaxRL is not on PyPI: clone it next to it and name the
    clone in PYTHONPATH.
    """
    modules = {"rejax": "rejax", "purejaxrl": "purejaxrl.ppo"}
    return [
        peer
        for peer, module in modules.items()
        if PEER_PYTHON.exists()
        and subprocess.run([PEER_PYTHON, "-c", f"import {module}"], capture_output=True).returncode
        == 0
    ]


def serve(what: str, work: Work) -> None:
    """Runs as a worker: one line once warm, then one for each line on stdin."""
    run, about = WORKERS[what](work)
    run()
    print(json.dumps(about), flush=True)
    for _ in sys.stdin:
        print(json.dumps({"seconds": run()}), flush=True)


def ppo_config(work: Work) -> Config:
    block = work["num_envs"] * work["rollout_length"]
    return Config(
        env="CartPole-v1",
        objective="ppo_clip",
        num_envs=work["num_envs"],
        rollout_length=work["rollout_length"],
        batch_size=block // work["minibatches"],
        updates_per_iteration=work["epochs"] * work["minibatches"],
        hidden_sizes=(64, 64),
        activation="tanh",
        mlp=work.get("mlp", "layers"),
        eval_episodes=0,
    )


def ppo_worker(work: Work) -> tuple[Callable[[], float], Work]:
    config = ppo_config(work)
    block = config.block_size
    mode = work.get("mode", "auto")
    training = Training(config, work["runs"], work["total_steps"] // block, block, mode)
    about: Work = {"compile_s": training.compile_s}
    if "mode" in work:
        about |= memory_of(training) | {"fresh_d95": fresh_d95(training.domain)}
    return training, about


def fresh_d95(domain: Domain) -> float:
    """95th percentile of |log r| on data of the very same policy: 0 but for rounding."""
    hparams = train.make_hparams(domain.config, buffer_size=domain.config.allocated_size)

    @jax.jit
    def log_ratio(key: jax.Array) -> jax.Array:
        state = train.init(domain, hparams)
        rows = domain.collect(state, hparams, key).rows
        replay = buffer.add(state.replay, rows, 0)
        gathered = learner.gather(domain.config, replay, jnp.arange(domain.config.batch_size), 0)
        batch = domain.batch(state, state.learner.params, *gathered, hparams)
        return domain.score(state.learner.params, batch, hparams).log_ratio

    return float(np.percentile(np.abs(log_ratio(jax.random.key(0))), 95))


def replay_worker(work: Work) -> tuple[Callable[[], float], Work]:
    """This project's replay on the work of ``flashbax_replay`` in benchmarks/peers.py."""
    lead = (work["rollout_length"], work["num_envs"])
    block = {
        "obs": jnp.zeros((*lead, work["obs_size"])),
        "action": jnp.zeros((*lead, 1), jnp.int32),
        "behavior_log_prob": jnp.zeros((*lead, 1)),
        "advantage": jnp.zeros(lead),
        "value_target": jnp.zeros(lead),
    }
    size = work["num_envs"] * work["rollout_length"]

    def iteration(index: jax.Array, carry: Any) -> Any:
        storage, total = carry
        new = jax.tree.map(lambda x: x + total.astype(x.dtype), block)
        storage = buffer.add(storage, new, index)
        key = jax.random.fold_in(jax.random.key(0), index)
        _, valid = buffer.window(index, work["capacity"], size)
        for draw in buffer.draw_uniform(key, work["batches"], work["batch_size"], valid):
            batch, _ = buffer.take_rows(storage, draw, index)
            total += sum(jnp.sum(x).astype(jnp.float32) for x in jax.tree.leaves(batch))
        return storage, total

    def run(carry: Any) -> Any:
        return jax.lax.fori_loop(0, work["iterations"], iteration, carry)

    state = [jax.jit(lambda: (buffer.init(block, work["capacity"] // size), jnp.zeros(())))()]
    begin = time.perf_counter()
    compiled = jax.jit(run, donate_argnums=0).lower(state[0]).compile()
    compile_s = time.perf_counter() - begin

    def timed() -> float:
        begin = time.perf_counter()
        state[0] = jax.block_until_ready(compiled(state[0]))
        return time.perf_counter() - begin

    return timed, {"compile_s": compile_s}


def memory_worker(work: Work) -> tuple[Callable[[], float], Work]:
    """Peak memory of a group."""
    config = Config(env="CartPole-v1", num_envs=16, rollout_length=32, eval_episodes=0)
    training = Training(config, work["runs"], 2, work["buffer_size"])
    return training, memory_of(training)


def memory_of(training: Training) -> Work:
    """Peak memory of a first call beyond what the compiled process holds, and the sweep's plan."""
    on_cpu = jax.local_devices()[0].platform == "cpu"

    def held(field: str) -> int:
        if not on_cpu:
            stats = jax.local_devices()[0].memory_stats() or {}
            return int(stats["peak_bytes_in_use" if field == "VmHWM" else "bytes_in_use"])
        text = Path("/proc/self/status").read_text()
        found = re.search(rf"{field}:\s+(\d+) kB", text)
        assert found is not None
        return int(found[1]) * 1024

    before = held("VmRSS")
    if on_cpu:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    training()
    return {"planned": training.planned, "measured": held("VmHWM") - before}


def compile_worker(work: Work) -> tuple[Callable[[], float], Work]:
    """Programs built for a group, counted from the start of a process, and their seconds."""
    count = 0

    def count_compilation(event: str, duration_secs: float, **_: str | int) -> None:
        nonlocal count
        count += event.endswith("backend_compile_duration")

    jax.monitoring.register_event_duration_secs_listener(count_compilation)
    training = Training(Config(env=work["env"]), work["runs"], 1, 2048)
    about = {"compile_s": training.compile_s, "programs": count}
    return training, about


def metaworld_worker(work: Work) -> tuple[Callable[[], float], Work]:
    """Whole iterations of a run under the authors' settings, with a full buffer."""
    config, size = authors_config(work["env"])
    full = size // config.block_size
    training = Training(config, 1, work["iterations"], size, "loop", started=full)
    return training, {"compile_s": training.compile_s}


def authors_config(env: str) -> tuple[Config, int]:
    """The authors' settings for a task, and the size of their buffer."""
    fields = {field.name for field in dataclasses.fields(Config)}
    settings = protocols.settings("gipo-metaworld")
    config = Config(env=env, **{k: v for k, v in settings.items() if k in fields})
    return config, settings["buffer_size"]


WORKERS: dict[str, Callable[[Work], tuple[Callable[[], float], Work]]] = {
    "ppo": ppo_worker,
    "replay": replay_worker,
    "memory": memory_worker,
    "compile": compile_worker,
    "metaworld": metaworld_worker,
}


def against_peer(
    context: Context,
    name: str,
    case: Work,
    unit: str,
    work: float,
    commands: list[list[str]],
    limit: Callable[[], float],
) -> tuple[list[Row], list[float]]:
    """Times this project and a peer in turn; the last row is the ratio of each round.

    Args:
        limit: timed in the same rounds, such as ``matmul()``.

    Returns:
        rows of this project, the peer and the ratio; seconds of ``limit``.
    """
    with workers(commands, {}) as (ours, theirs):
        *seconds, limits = in_turn([ours, theirs, limit], context.repeats)
        about = [ours.about, theirs.about]
    rows = [
        row(name, case | {"by": by}, unit, work, times) | {"compile_s": info["compile_s"]}
        for by, times, info in zip(("gipo_jax", "peer"), seconds, about, strict=True)
    ]
    ratios = [theirs / ours for ours, theirs in zip(*seconds, strict=True)]
    rows.append(row(name, case | {"by": "ratio"}, "times", 1.0, [1 / r for r in ratios]))
    return rows, limits


# Benchmarks


def bench_peer(context: Context) -> list[Row]:
    """PPO against rejax 0.1.3 on identical work, 1 and 8 runs."""
    rows = []
    for runs in (1, 8):
        steps = PPO_WORK["total_steps"] // (8 if context.quick else 1)
        work = PPO_WORK | {"runs": runs, "total_steps": steps}
        commands = [own_worker("ppo", work), peer_worker("rejax", work)]
        measured, product = against_peer(
            context, "peer", {"runs": runs}, "env-steps/s", runs * steps, commands, matmul()
        )
        block = work["num_envs"] * work["rollout_length"]
        flops = runs * steps / block * iteration_flops(ppo_config(work), 4, 2)
        for by in measured[:2]:
            by["fraction_of_matmul"] = roofline_fraction(flops, by["seconds"], product)
        rows += measured
    return rows


def bench_accelerator(context: Context) -> list[Row]:
    """PPO with 1 to 1,024 runs side by side in vector operations, beside the peers there are."""
    rows = device_constants(context)
    steps = PPO_WORK["total_steps"] // (32 if context.quick else 1)
    peers = installed_peers()
    own = {"gipo_jax": "layers", "gipo_jax, fused": "fused"}
    for runs in (1, 4) if context.quick else (1, 16, 64, 256, 1024):
        work = PPO_WORK | {"runs": runs, "total_steps": steps, "mode": "vmap"}
        commands = [own_worker("ppo", work | {"mlp": mlp}) for mlp in own.values()]
        commands += [peer_worker(peer, work) for peer in peers]
        # Several processes share the device: none may take all its memory beforehand.
        with workers(commands, {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}) as started:
            about = [worker.about for worker in started]
            seconds = in_turn(started, context.repeats)
        block = work["num_envs"] * work["rollout_length"]
        updates = runs * steps // block * work["epochs"] * work["minibatches"]
        for by, info, times in zip((*own, *peers), about, seconds, strict=True):
            case = {"runs": runs, "by": by}
            measured = row("accelerator", case, "env-steps/s", runs * steps, times)
            measured["compile_s"] = info["compile_s"]
            if by in own:
                measured["updates_per_s"] = updates / statistics.median(times)
                measured |= {key: info[key] for key in ("planned", "measured", "fresh_d95")}
                if runs == 1024:
                    measured["aim"] = ACCELERATOR_AIMS["env_steps_per_s"]
            rows.append(measured)
        if peers:
            better = min(seconds[len(own) :], key=statistics.median)
            for by, times in zip(own, seconds, strict=False):
                ratios = [ours / theirs for ours, theirs in zip(times, better, strict=True)]
                case = {"runs": runs, "by": f"{by}, by the better peer"}
                ratio = row("accelerator", case, "times", 1.0, ratios)
                rows.append(ratio | {"aim": ACCELERATOR_AIMS["times_better_peer"]})
    return rows


def device_constants(context: Context) -> list[Row]:
    """What the model of ``compiled`` assumes, measured: launches and bytes a second."""
    launches, numbers = (1_000, 2**20) if context.quick else (20_000, 2**28)
    one_by_one = jax.jit(lambda x: jax.lax.fori_loop(0, launches, lambda _, x: jnp.sin(x[::-1]), x))
    double = jax.jit(lambda x: 2 * x)
    small, large = jnp.ones(1024), jnp.ones(numbers)
    seconds = in_turn(
        [lambda: stopwatch(lambda: one_by_one(small)), lambda: stopwatch(lambda: double(large))],
        context.repeats,
    )
    return [
        row(
            "accelerator", {"by": "steps of a loop of one kernel"}, "steps/s", launches, seconds[0]
        ),
        row("accelerator", {"by": "doubling an array"}, "bytes/s", 8 * numbers, seconds[1]),
    ]


REVISION_CASES: dict[str, Work] = {
    "PPO, 1 run": {"work": "ppo", "runs": 1, "iterations": 64},
    "PPO, 8 runs": {"work": "ppo", "runs": 8, "iterations": 16},
    "defaults, 8 runs": {"work": "defaults", "runs": 8, "iterations": 200},
    "replay of 2^16": {"work": "replay", "runs": 1, "iterations": 400},
    "Meta-World shapes": {"work": "manipulator", "runs": 1, "iterations": 2},
}
"""What two revisions do alike; benchmarks/revision_worker.py builds it in either."""


def bench_revision(context: Context) -> list[Row]:
    """Training by this checkout against that of ``--against``, case by case."""
    against = context.against
    assert against is not None
    rows = []
    for label, work in list(REVISION_CASES.items())[: 1 if context.quick else None]:
        work = work | {"iterations": work["iterations"] // (16 if context.quick else 1)}
        script = str(RESULTS / "revision_worker.py")
        commands = [
            [sys.executable, script, str(checkout), json.dumps(work)]
            for checkout in (ROOT, against.resolve())
        ]
        with workers(commands, {}) as started:
            seconds = in_turn(started, context.repeats)
        for by, times in zip(("this", "before"), seconds, strict=True):
            case = {"case": label, "by": by}
            rows.append(row("revision", case, "iterations/s", work["iterations"], times))
        ratios = [ours / theirs for ours, theirs in zip(*seconds, strict=True)]
        rows.append(row("revision", {"case": label, "by": "ratio"}, "times", 1.0, ratios))
    return rows


def bench_pure(context: Context) -> list[Row]:
    """``make_train`` under ``jit`` and ``lax.map`` against a sweep, 8 runs on one device."""
    iterations = 40 if context.quick else 400
    config = Config(env="CartPole-v1", eval_episodes=0, num_logs=1)
    config = dataclasses.replace(config, total_steps=iterations * config.block_size)
    grid, _ = train.grid(config, seed=range(8))
    run = train.make_train(config)
    pure = jax.jit(lambda hparams: jax.lax.map(run, hparams)).lower(grid).compile()
    swept = Training(config, 8, iterations, config.allocated_size, devices=jax.devices()[:1])
    cases: list[Callable[[], float]] = [lambda: stopwatch(lambda: pure(grid)), swept]
    seconds = in_turn(cases, context.repeats)
    rows = [
        row("pure", {"by": by}, "env-steps/s", swept.env_steps, times)
        for by, times in zip(("make_train", "sweep"), seconds, strict=True)
    ]
    ratios = [ours / theirs for ours, theirs in zip(*seconds, strict=True)]
    return [*rows, row("pure", {"by": "ratio"}, "times", 1.0, ratios)]


def bench_replay(context: Context) -> list[Row]:
    """Adding and sampling against flashbax on identical shapes."""
    rows = []
    for exponent in (12, 16, 20):
        work = {
            "num_envs": 16,
            "rollout_length": 32,
            "capacity": 2**exponent,
            "batch_size": 256,
            "batches": 4,
            "obs_size": 4,
            "iterations": 500 if context.quick else 2000,
        }
        commands = [own_worker("replay", work), peer_worker("flashbax", work)]
        case = {"capacity": f"2^{exponent}"}
        measured, copying = against_peer(
            context, "replay", case, "iterations/s", work["iterations"], commands, copy()
        )
        # A row is read and written when it is added, and again when it is drawn.
        moved = work["num_envs"] * work["rollout_length"] + work["batches"] * work["batch_size"]
        row_bytes = 4 * (work["obs_size"] + 4)
        bandwidth = COPY_BYTES / statistics.median(copying)
        for by in measured[:2]:
            by["fraction_of_copy"] = by["median"] * 2 * moved * row_bytes / bandwidth
        rows += measured
    return rows


def bench_runs(context: Context) -> list[Row]:
    """Default settings with 1, 4, 16 (and 64) runs in one program."""
    counts = (1, 4, 8, 16) if context.quick else (1, 2, 4, 8, 16, 64)
    config = Config(env="CartPole-v1", eval_episodes=0)
    cases = {str(runs): Training(config, runs, max(3200 // runs, 200), 2048) for runs in counts}
    rows = training_rows(context, "runs", cases, "runs")
    for measured in rows:
        measured["times_one_run"] = measured["median"] / rows[0]["median"]
    return rows


def bench_modes(context: Context) -> list[Row]:
    """Batch modes for 8 runs, small default updates and larger on-policy ones."""
    small = Config(env="CartPole-v1", eval_episodes=0)
    large = dataclasses.replace(
        small, num_envs=64, rollout_length=128, batch_size=2048, updates_per_iteration=16
    )
    cases = {}
    for size, config, iterations, rows in (("small", small, 200, 2048), ("large", large, 4, 8192)):
        for mode in ("vmap", "map", "loop"):
            cases[f"{mode}, {size}"] = Training(config, 8, iterations, rows, mode)
    return training_rows(context, "modes", cases, "mode")


def bench_capacity(context: Context) -> list[Row]:
    """Step time with full buffers of 2^12 to 2^20 transitions."""
    config = Config(
        env="CartPole-v1",
        num_envs=16,
        rollout_length=32,
        batch_size=512,
        updates_per_iteration=4,
        eval_episodes=0,
    )
    exponents = (12, 16, 20) if context.quick else (12, 14, 16, 18, 20)
    cases = {
        f"2^{n}": Training(config, 1, 400, 2**n, started=2**n // config.block_size)
        for n in exponents
    }
    return training_rows(context, "capacity", cases, "capacity")


def bench_network(context: Context) -> list[Row]:
    """Widths of the two hidden layers."""
    widths = (64, 256) if context.quick else (32, 64, 128, 256, 512)
    cases = {
        str(width): Training(
            Config(env="CartPole-v1", hidden_sizes=(width, width), eval_episodes=0), 1, 200, 2048
        )
        for width in widths
    }
    return training_rows(context, "network", cases, "width")


def bench_objectives(context: Context) -> list[Row]:
    """Eight runs of one objective, of two, of four: one program each."""
    names = ("gipo", "ppo_clip", "sapo", "no_clip")
    rows, groups = [], {}
    for count in (1, 2, 4):
        groups[count] = [
            Training(
                Config(env="CartPole-v1", objective=name, eval_episodes=0), 8 // count, 200, 2048
            )
            for name in names[:count]
        ]
    runs = [lambda g=group: sum(training() for training in g) for group in groups.values()]
    for (count, group), times in zip(groups.items(), in_turn(runs, context.repeats), strict=True):
        steps = sum(training.env_steps for training in group)
        measured = row("objectives", {"objectives": count}, "env-steps/s", steps, times)
        measured["compile_s"] = sum(training.compile_s for training in group)
        rows.append(measured)
    return rows


def bench_sequences(context: Context) -> list[Row]:
    """Answers a second on ``tokens/reverse`` at egg's sizes: training, and sampling alone.

    ``loop`` is benchmarks/sequence_loop.py, one process a core, with egg's published settings. Our
    sampling has a key-value cache; ``uncached`` computes the whole network again for each token.
    """
    # google-deepmind/egg: 10 tokens of 2, 10 prompts x 10 answers, 3 layers, width 64, 4 heads.
    config = Config(
        env="tokens/reverse",
        objective="no_clip",
        num_envs=10,
        rollout_length=10,
        batch_size=100,
        updates_per_iteration=1,
        eval_episodes=0,
    )
    iterations = 16 if context.quick else 160
    trained = {
        runs: Training(config, runs, iterations // runs, config.block_size) for runs in (1, 8)
    }
    made = tokens.make(config)
    params = jax.jit(made.decoder.init)(jax.random.key(0))
    prompt = jnp.zeros((config.block_size, made.env.prompt_length), jnp.int32)

    def uncached(params: Any, prompt: jax.Array, key: jax.Array) -> jax.Array:
        length = made.env.answer_length
        tokens = jnp.pad(prompt, ((0, 0), (0, length)))

        def one(tokens: jax.Array, inputs: Any) -> Any:
            key, position = inputs
            logits = made.decoder.logits(params, tokens)[:, position - 1]
            token = jax.random.categorical(key, logits)
            return tokens.at[:, position].set(token), None

        positions = prompt.shape[1] + jnp.arange(length)
        return jax.lax.scan(one, tokens, (jax.random.split(key, length), positions))[0]

    def sampling(function: Callable[..., Any]) -> Callable[[], float]:
        def repeated(key: jax.Array) -> jax.Array:
            keys = jax.random.split(key, iterations)
            # Its sum alone, so that no answer is left out as unused.
            return jnp.sum(jax.lax.map(lambda k: jnp.sum(function(params, prompt, k)), keys))

        compiled = jax.jit(repeated).lower(jax.random.key(1)).compile()
        return lambda: stopwatch(lambda: compiled(jax.random.key(1)))

    def label_of(runs: int) -> str:
        return f"training, {runs} run{'s'[: runs > 1]}"

    cases: dict[str, Callable[[], float]] = {label_of(runs): trained[runs] for runs in trained}
    cases["sampling"] = sampling(lambda *arguments: made.decoder.sample(*arguments)[0])
    cases["sampling, uncached"] = sampling(uncached)
    cores = sorted(os.sched_getaffinity(0))[: max(trained)]
    work = {"method": "reinforce", "steps": iterations // len(cores)}
    command = [sys.executable, str(RESULTS / "sequence_loop.py"), "serve", json.dumps(work)]
    pinned = [["taskset", "--cpu-list", str(core), *command] for core in cores]
    with workers(pinned, {"OMP_NUM_THREADS": "1"}) as started:
        cases[f"loop, {len(cores)} runs"] = side_by_side(started)
        seconds = dict(zip(cases, in_turn([*cases.values()], context.repeats), strict=True))
    rows = []
    for label, times in seconds.items():
        measured = row(
            "sequences", {"case": label}, "answers/s", iterations * config.block_size, times
        )
        case = cases[label]
        if isinstance(case, Training):
            measured["compile_s"] = case.compile_s
        rows.append(measured)
    loop = seconds[f"loop, {len(cores)} runs"]
    for runs in trained:
        # Both did the same number of answers.
        ratios = [ours / theirs for ours, theirs in zip(seconds[label_of(runs)], loop, strict=True)]
        ratio = row("sequences", {"case": f"{label_of(runs)}, by loop"}, "times", 1.0, ratios)
        rows.append(ratio | ({"aim": LOOP_AIM} if runs == 8 else {}))
    return rows


LOOP_AIM = 3.0
"""Aim of ``sequences`` with 8 runs: times the answers a second of the loop on as many cores."""

COPY_BYTES = 2**31
"""Traffic of one call of ``copy()``, reading and writing."""


def copy() -> Callable[[], float]:
    """Times passes that read and write all of an array of 256 MiB."""
    x = jnp.zeros(2**26, jnp.float32)
    passes = COPY_BYTES // (2 * x.nbytes)
    chain = jax.jit(lambda x: jax.lax.fori_loop(0, passes, lambda i, y: y + i, x))
    return lambda: stopwatch(lambda: chain(x))


def bench_roofline(context: Context) -> list[Row]:
    """What the machine does at best: float32 products and memory traffic."""
    sizes = (512, 1024, 2048)
    *products, traffic = in_turn([*map(matmul, sizes), copy()], context.repeats)
    rows = [
        row("roofline", {"product": f"{n}^3"}, "GFLOP/s", MATMUL_FLOPS / 1e9, seconds)
        for n, seconds in zip(sizes, products, strict=True)
    ]
    return [*rows, row("roofline", {"copy": "256 MiB"}, "GB/s", COPY_BYTES / 1e9, traffic)]


@struct.dataclass
class _ManipulatorState(environment.EnvState):
    time: int


@struct.dataclass
class _ManipulatorParams(environment.EnvParams):
    max_steps_in_episode: int = 500


class ManipulatorShapes(environment.Environment[_ManipulatorState, _ManipulatorParams]):
    """An environment with the shapes of Meta-World and no physics: 39 observed, 4 acted."""

    @property
    def name(self) -> str:
        return "ManipulatorShapes"

    @property
    def default_params(self) -> _ManipulatorParams:
        return _ManipulatorParams()

    def step_env(self, key: Any, state: Any, action: Any, params: Any) -> Any:
        state = _ManipulatorState(time=state.time + 1)
        return jax.random.normal(key, (39,)), state, jnp.sum(action), jnp.bool_(False), {}

    def reset_env(self, key: Any, params: Any) -> Any:
        return jax.random.normal(key, (39,)), _ManipulatorState(time=jnp.int32(0))

    def is_truncated(self, state: Any, params: Any) -> Any:
        return state.time >= params.max_steps_in_episode

    def action_space(self, params: Any = None) -> spaces.Box:
        return spaces.Box(-1.0, 1.0, (4,))

    def observation_space(self, params: Any) -> spaces.Box:
        return spaces.Box(-np.inf, np.inf, (39,))


def bench_metaworld(context: Context) -> list[Row]:
    """Updates at the paper's Meta-World shapes, without the acting between them."""
    base = Config(
        env=ManipulatorShapes(),
        num_envs=1,
        rollout_length=500,
        batch_size=512,
        num_bins=256,
        hidden_sizes=(512, 512),
        value_hidden_sizes=(256,),
        activation="relu",
        layer_norm=True,
        shared_torso=True,
        eval_episodes=0,
    )
    few, many = 2, 18 if context.quick else 34
    cases = {
        (every, updates): Training(
            dataclasses.replace(base, policy_delay=every, updates_per_iteration=updates),
            1,
            1,
            20_000,
            started=40,
        )
        for every in (1, 2)
        for updates in (few, many)
    }
    *seconds, product = in_turn([*cases.values(), matmul()], context.repeats)
    by_case = dict(zip(cases, seconds, strict=True))
    rate = MATMUL_FLOPS / statistics.median(product)
    # The difference of two programs leaves the updates alone.
    update = {
        every: [
            (b - a) / (many - few)
            for a, b in zip(by_case[every, few], by_case[every, many], strict=True)
        ]
        for every in (1, 2)
    }
    rows = []
    for every in (1, 2):
        # By medians: single differences scatter more than either term.
        medians = [statistics.median(by_case[every, n]) for n in (few, many)]
        measured = row("metaworld", {"policy_delay": every}, "updates/s", 1.0, update[every])
        measured["median"] = (many - few) / (medians[1] - medians[0])
        rows.append(measured)
    rows[0]["fraction_of_matmul"] = rows[0]["median"] * metaworld_flops(512) / rate
    speedup = rows[1]["median"] / rows[0]["median"]
    rows.append(row("metaworld", {"policy_delay": "2 against 1"}, "times", 1.0, [1 / speedup]))
    return rows


def metaworld_flops(batch: int) -> float:
    """Floating-point operations of the matrix products of one update, the network of the paper.

    Forward and weight gradient of every layer; the gradient of the input of every layer but the
    first and the first of the value head, whose input is detached.
    """
    layers = {"encoder": 39 * 512, "policy": 512 * 512 + 512 * 1024}
    value_first, value_last = 512 * 256, 256
    total = layers["encoder"] + layers["policy"] + value_first + value_last
    inputs = layers["policy"] + value_last
    return 2.0 * batch * (2 * total + inputs)


AUTHORS_AIM = 6.0
"""Aim of ``metaworld_authors``: times the iterations a second of the authors' script."""


def bench_metaworld_authors(context: Context) -> list[Row]:
    """Whole iterations of two runs at once, one a core, against the authors' own script.

    An iteration acts for 500 steps and makes 5 rounds of 2 updates, one of them with the actor. The
    script runs with PyTorch on the official simulator. Its work does not grow with its buffer
    beyond a millisecond, so a few iterations warm it up.
    """
    cores = sorted(os.sched_getaffinity(0))[:2]
    if context.authors is None or envpool_env.names() is None or len(cores) < 2:
        missing = f"--authors-checkout DIR, two cores, and {envpool_env.EXTRA}"
        context.console.print(f"metaworld_authors is left out: it needs {missing}")
        return []
    iterations = 4 if context.quick else 10
    config, _ = authors_config("MetaWorld/ButtonPress-v3")
    arguments = {
        "task-name": "button-press-v3",
        "device": "cpu",
        "train-iters": 1_000_000,
        "sample-rounds": config.updates_per_iteration,
        "reuse-per-batch": config.reuse_per_batch,
        "actor-every": config.policy_delay,
        "eval-every-iters": 0,
    }
    pairs = itertools.chain.from_iterable((f"--{k}", str(v)) for k, v in arguments.items())
    ours = own_worker("metaworld", {"env": config.env, "iterations": iterations})
    work = {"arguments": list(pairs), "warm": 4, "iterations": iterations}
    theirs = authors_worker(context.authors, work)
    pinned = [
        ["taskset", "--cpu-list", str(core), *command]
        for command in (ours, theirs)
        for core in cores
    ]
    with workers(pinned, {"OMP_NUM_THREADS": "1"}) as started:
        pair, authors = started[:2], started[2:]
        about = pair[0].about
        seconds = in_turn([side_by_side(pair), side_by_side(authors)], context.repeats)
    rows = [
        row("metaworld_authors", {"runs": 2, "by": by}, "iterations/s", 2 * iterations, times)
        for by, times in zip(("gipo_jax", "authors"), seconds, strict=True)
    ]
    rows[0]["compile_s"] = about["compile_s"]
    ratios = [ours / theirs for ours, theirs in zip(*seconds, strict=True)]
    ratio = row("metaworld_authors", {"runs": 2, "by": "ratio"}, "times", 1.0, ratios)
    return [*rows, ratio | {"aim": AUTHORS_AIM}]


def side_by_side(several: Sequence[Worker]) -> Callable[[], float]:
    """One repeat of several workers at once; seconds until the last is done."""

    def run() -> float:
        begin = time.perf_counter()
        for worker in several:
            worker.start()
        for worker in several:
            worker.finish()
        return time.perf_counter() - begin

    return run


def bench_envpool(context: Context) -> list[Row]:
    """Acting in Meta-World against EnvPool's own loop over NumPy arrays.

    ``taskset -c 0 python scripts/benchmark.py envpool`` gives both the same one core.
    """
    if envpool_env.names() is None:
        context.console.print(f"envpool is left out: {envpool_env.EXTRA}")
        return []
    tasks = ("ButtonPress", "BoxClose", "CoffeePull")
    return [measured for task in tasks for measured in _acting(context, f"MetaWorld/{task}-v3")]


def _acting(context: Context, name: str) -> list[Row]:
    """One episode of a task: steps alone, steps with the paper's policy, and EnvPool's loop."""
    import envpool

    config, _ = authors_config(name)
    steps, closed = config.rollout_length, environments.make(config)
    head = networks.make_head(config, closed)
    network = networks.make(config, closed.obs_shape, head)
    params = network.init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 2)
    env = closed.open(keys)
    actions = jax.random.uniform(jax.random.key(2), (steps, 1, 4), minval=-1, maxval=1)

    def step(envs: rollout.EnvStates) -> tuple[rollout.EnvStates, Any]:
        def one(state: Any, action: Any) -> Any:
            stepped = env.step(keys, state, action)
            return stepped.state, (stepped.reward, stepped.obs, stepped.final_obs)

        state, out = jax.lax.scan(one, envs.state, actions)
        return envs._replace(state=state), out

    def act(envs: rollout.EnvStates) -> tuple[rollout.EnvStates, Any]:
        policy = functools.partial(network.policy, params)
        return rollout.collect(env, head, policy, envs, keys[0], steps)[:2]

    def in_program(run: Callable[[Any], Any], key: Any) -> Callable[[], float]:
        run = jax.jit(run)
        envs = rollout.reset(env, key, 1)

        def go() -> Any:
            nonlocal envs
            envs, out = run(envs)
            return envs, out

        return lambda: stopwatch(go)

    pool = envpool.make(
        name, env_type="gymnasium", num_envs=1, num_threads=1, partially_observable=False
    )
    pool.reset()
    taken = np.asarray(actions)

    def loop() -> None:
        for action in taken:
            pool.step(action)

    cases = {
        "steps in the program": in_program(step, keys[0]),
        "steps and the paper's policy": in_program(act, keys[1]),
        "EnvPool's NumPy loop": lambda: stopwatch(loop),
    }
    seconds = in_turn(list(cases.values()), context.repeats)
    env.close()
    rows = []
    for label, times in zip(cases, seconds, strict=True):
        rows.append(row("envpool", {"task": name, "by": label}, "env-steps/s", steps, times))
        ratios = [theirs / own for theirs, own in zip(seconds[-1], times, strict=True)]
        rows[-1]["times_the_loop"] = statistics.median(ratios)
    return rows


def bench_memory(context: Context) -> list[Row]:
    """Peak memory of 8 runs against what the sweep's plan says."""
    rows = []
    for exponent in (18,) if context.quick else (16, 18, 20):
        work = {"runs": 8, "buffer_size": 2**exponent}
        with workers([own_worker("memory", work)], _own_flags()) as (worker,):
            measured, planned = worker.about["measured"], worker.about["planned"]
        case = {"buffer_size": f"2^{exponent}"}
        measured_row = row("memory", case, "measured / planned", measured / planned, [1.0])
        rows.append(measured_row | {"measured": measured, "planned": planned})
    return rows


def bench_compile(context: Context) -> list[Row]:
    """Compilations and their time in a fresh process, without and with a filled cache."""
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        extra = _own_flags() | {"JAX_COMPILATION_CACHE_DIR": cache}
        for start in ("cold", "cached"):
            seconds, count = [], 0
            for repeat in range(1 if context.quick else 3):
                # Cold starts each need an empty cache; the cached ones share the last.
                folder = f"{cache}/{repeat}" if start == "cold" else f"{cache}/0"
                work = {"env": "CartPole-v1", "runs": 8}
                extra["JAX_COMPILATION_CACHE_DIR"] = folder
                with workers([own_worker("compile", work)], extra) as (worker,):
                    seconds.append(worker.about["compile_s"])
                    count = worker.about["programs"]
            measured = row("compile", {"start": start}, "seconds", 1.0, [1 / s for s in seconds])
            rows.append(measured | {"programs": count})
    return rows


def bench_compiled(context: Context) -> Iterator[Row]:
    """Programs compiled for accelerators that need not be there, counted and not timed."""
    return compiled.rows(context.compiled, context.stored, context.console)


def _own_flags() -> dict[str, str]:
    return {"XLA_FLAGS": os.environ["XLA_FLAGS"]}


BENCHMARKS: dict[str, Callable[[Context], Iterable[Row]]] = {
    name.removeprefix("bench_"): function
    for name, function in list(globals().items())
    if name.startswith("bench_")
}

ON_REQUEST = ("revision", "compiled")
"""Benchmarks that run only where they are named."""


# Results


def show(results: Mapping[str, Any], console: Console) -> None:
    """Draws the table of stored results."""
    about = results["about"]
    device = about["device"]
    console.print(
        f"{device['count']} x {device['kind']}, {about['platform']},"
        f" jax {about['packages']['jax']}, revision {about['revision']}, load {results['load']}\n"
        f"{results['command']}"
    )
    counted = [row for row in results["rows"] if row["benchmark"] == "compiled"]
    if counted:
        compiled.show(counted, console)
    timed = [row for row in results["rows"] if row["benchmark"] != "compiled"]
    if not timed:
        return
    table = Table("benchmark", "case", "median", "range", "unit", "compile s", "more")
    last = None
    for measured in timed:
        if last not in (None, measured["benchmark"]):
            table.add_section()
        last = measured["benchmark"]
        case = ", ".join(f"{name} {value}" for name, value in measured["case"].items())
        known = {"benchmark", "case", "unit", "median", "low", "high", "seconds", "compile_s"}
        more = ", ".join(f"{k} {v:,.4g}" for k, v in measured.items() if k not in known)
        compile_s = f"{measured['compile_s']:.1f}" if "compile_s" in measured else ""
        spread = f"{measured['low']:,.4g} .. {measured['high']:,.4g}"
        median = f"{measured['median']:,.4g}"
        table.add_row(last, case, median, spread, measured["unit"], compile_s, more)
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"of {', '.join(BENCHMARKS)}; all but {', '.join(ON_REQUEST)}",
    )
    parser.add_argument("--quick", action="store_true", help="smaller work, fewer cases")
    parser.add_argument("--repeats", type=int, default=5, help="repeats of each case (5)")
    parser.add_argument(
        "--against", type=Path, metavar="CHECKOUT", help="other revision, for the case revision"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="JSON file (benchmarks/DATE-NAMES.json); compiled goes on behind the programs in it",
    )
    parser.add_argument("--table", type=Path, metavar="FILE", help="only draw stored results")
    parser.add_argument(
        "--authors-checkout",
        type=Path,
        metavar="DIR",
        help="a checkout of github.com/distanceLu/GIPO, for metaworld_authors",
    )
    compiled.add_options(parser)
    parser.add_argument("--worker", nargs=2, metavar=("KIND", "JSON"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    if options.worker is None or options.worker[0] != "compile":
        jax.config.update("jax_enable_compilation_cache", False)  # compilation is timed
    if options.worker:
        serve(options.worker[0], json.loads(options.worker[1]))
        return 0
    if options.table:
        show(json.loads(options.table.read_text()), console)
        return 0
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown or options.repeats < 1:
        parser.error(f"NAME must be of {', '.join(BENCHMARKS)}, --repeats at least 1")
    authors = options.authors_checkout
    if authors is not None and not (authors / AUTHORS_SCRIPT).is_file():
        parser.error(f"--authors-checkout: {str(authors)!r} holds no {AUTHORS_SCRIPT}")

    if ("revision" in options.names) != (options.against is not None):
        parser.error("the case revision and --against CHECKOUT go together")
    if "compiled" in options.names and (problem := compiled.misfit(options)):
        parser.error(problem)
    names = options.names or [name for name in BENCHMARKS if name not in ON_REQUEST]
    started = datetime.datetime.now(datetime.UTC)
    out = options.out or RESULTS / f"{started:%Y-%m-%d}-{'-'.join(options.names) or 'all'}.json"
    results: dict[str, Any] = {
        "started": started.isoformat(timespec="seconds"),
        "command": f"python scripts/benchmark.py {shlex.join(sys.argv[1:])}",
        "about": provenance.describe(),
        "cores": runtime.available_cores(),
        "load": [round(x, 2) for x in os.getloadavg()],
        "rows": [],
    }
    # Compiled programs do not depend on when they are compiled, so that a call can go on.
    stored = json.loads(out.read_text())["rows"] if out.exists() else []
    context = Context(
        options.repeats, options.quick, console, options.against, authors, options, stored
    )
    for name in names:
        with console.status(name) if console.is_terminal else contextlib.nullcontext():
            for measured in BENCHMARKS[name](context):
                results["rows"].append(measured)
                # A long call that is cut short keeps what it has.
                out.write_text(json.dumps(results, indent=1) + "\n")
    show(results, console)
    console.print(f"stored in {os.path.relpath(out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
