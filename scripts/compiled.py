"""The benchmark ``compiled``: programs compiled for accelerators that are not there, and counted.

XLA compiles for a described device. The text of what it would launch is counted by
benchmarks/hlo.py, program by program in processes of benchmarks/compiled_worker.py. Nothing is run
and nothing is timed: the table's last column is a model of two constants.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scripts import peer_env

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"

Work = dict[str, Any]
Row = dict[str, Any]

MODEL = {"h100": {"launch_s": 2.5e-6, "bytes_per_s": 3.35e12}}
"""Seconds a launch and bytes a second of memory: what the modelled time of a device consists of.

A TPU launches nothing from a host inside a program, so that its time is not modelled.
"""

SPACE_GB = {"cuda": 8, "tpu": 2.5, "peers": 2.5}
"""Free space that making an environment needs."""

COMPILE_SECONDS = 7200
"""Limit on compiling one program."""

PPO: Work = {
    "env": "CartPole-v1",
    "objective": "ppo_clip",
    "num_envs": 64,
    "rollout_length": 128,
    "batch_size": 2048,
    "updates_per_iteration": 16,
    "hidden_sizes": [64, 64],
    "activation": "tanh",
    "eval_episodes": 0,
}
"""4 passes of 4 minibatches over 8,192 transitions, as the peers do it."""

PEER_WORK: Work = {
    "num_envs": 64,
    "rollout_length": 128,
    "epochs": 4,
    "minibatches": 4,
    "total_steps": 4 * 8192,
}
"""The same for benchmarks/peers.py."""


def program(config: Work, buffer_size: int, **more: Any) -> Work:
    """A program to compile, and the repetitions in it by which its parts are found.

    Args:
        config: fields of ``Config``.
        buffer_size: transitions, responses or samples in replay.
        more: ``kind``, what is compiled: ``make_train``, or the program of a ``sweep``;
            ``env_steps``, if it is not the rollout's length; ``gae_steps``, likewise.
    """
    steps = more.get("env_steps", config.get("rollout_length", 8))
    return {
        "kind": "make_train",
        "config": config,
        "buffer_size": buffer_size,
        "env_steps": steps,
        "gae_steps": steps,
        "updates": config.get("updates_per_iteration", 1),
    } | more


MINATAR = PPO | {"env": "Breakout-MinAtar"}
TOKENS = {
    "env": "tokens/reverse",
    "num_envs": 16,
    "rollout_length": 8,
    "batch_size": 128,
    "updates_per_iteration": 2,
    "eval_episodes": 0,
}
HALF = {"compute_dtype": "bfloat16"}

PROGRAMS: dict[str, Work] = {
    "ppo": program(PPO, 8192),
    "defaults": program({"env": "CartPole-v1", "eval_episodes": 0}, 512),
    "gaussian": program(
        {
            "env": "Pendulum-v1",
            "action_head": "gaussian",
            "num_envs": 16,
            "rollout_length": 64,
            "updates_per_iteration": 16,
            "eval_episodes": 0,
        },
        4096,
    ),
    "minatar": program(MINATAR, 8192),
    "minatar_bf16": program(MINATAR | HALF, 8192),
    "fused": program(PPO | {"mlp": "fused"}, 8192),
    "normalize_obs": program(PPO | {"normalize_obs": True}, 8192),
    "recomputed": program(PPO | {"advantage_mode": "recomputed"}, 8192),
    "vtrace": program(PPO | {"advantage_mode": "vtrace"}, 8192),
    "tokens": program(TOKENS, 512, env_steps=10, gae_steps=None),
    "tokens_bf16": program(TOKENS | HALF, 512, env_steps=10, gae_steps=None),
    "flow": program({"env": "flow/ring", "eval_episodes": 0}, 512, env_steps=10, gae_steps=None),
    "sweep": program(PPO, 8192, kind="sweep"),
}
"""What is compiled; ``sweep`` on a mesh of all devices, without communication between them."""


def runs_on(devices: int) -> int:
    """Runs of a program: 256 on one device, and at least 4 on each of several."""
    return max(256, 4 * devices)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the benchmark."""
    group = parser.add_argument_group("compiled")
    group.add_argument(
        "--device", nargs="+", default=["h100"],
        help="h100, h100:1x1x8 (hosts, then devices) or a TPU topology such as v5e:16x16 (h100)",
    )  # fmt: skip
    group.add_argument(
        "--program", nargs="+", choices=PROGRAMS, metavar="PROGRAM",
        help=f"of {', '.join(PROGRAMS)}; all on one device, sweep on several",
    )  # fmt: skip
    group.add_argument(
        "--peer", nargs="+", default=[],
        help="rejax, purejaxrl=CHECKOUT: compiled beside the program ppo, which is the same work",
    )  # fmt: skip
    group.add_argument(
        "--checkout", nargs="+", type=Path, default=[ROOT],
        help="of this project, to compile instead of this one; several stand side by side",
    )  # fmt: skip
    group.add_argument(
        "--cache", type=Path,
        help="folder for environments with the compilers, up to 8 GB (a temporary one)",
    )  # fmt: skip
    group.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep the programs there, for benchmarks/hlo.py"
    )


def misfit(options: argparse.Namespace) -> str | None:
    """What is wrong with the options, in one line; None if nothing is."""
    for peer in options.peer:
        name, _, checkout = peer.partition("=")
        valid = "rejax, or purejaxrl=CHECKOUT with a clone of PureJaxRL"
        if name == "purejaxrl":
            if not (Path(checkout) / "purejaxrl" / "ppo.py").is_file():
                return f"--peer: {peer!r} is not usable, give {valid}"
        elif peer != "rejax":
            return f"--peer: {peer!r} is not usable, give {valid}"
    for checkout in options.checkout:
        if not (checkout / "gipo_jax" / "train.py").is_file():
            return f"--checkout: {str(checkout)!r} is no checkout of this project"
    return None


class Environments:
    """Python environments with the compilers of devices, made in a folder on first use."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)

    @functools.cache  # noqa: B019
    def own(self, kind: str) -> Path:
        """Interpreter of this project's requirements and of ``cuda`` or ``tpu``."""
        venv = self._place(kind)
        wanted = {"VENV": str(venv), "EXTRAS": kind, "PYTHON": sys.executable}
        setup = ["bash", str(ROOT / "scripts" / "setup.sh")]
        subprocess.run(setup, env={**os.environ, **wanted}, check=True, stdout=subprocess.DEVNULL)
        return venv / "bin" / "python"

    @functools.cache  # noqa: B019
    def peers(self) -> Path:
        """Interpreter of the peers' requirements."""
        return peer_env.interpreter(self._place("peers"), BENCHMARKS / "peer-constraints.txt")

    @functools.cache  # noqa: B019
    def packages(self, kind: str) -> Path:
        """Folder of the packages of ``own``: for the compiler to be the same in the peers'."""
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        found = subprocess.run(
            [self.own(kind), "-c", code], capture_output=True, text=True, check=True
        )
        return Path(found.stdout.strip())

    def _place(self, name: str) -> Path:
        venv, needed = self._folder / f"venv-{name}", SPACE_GB[name]
        free = shutil.disk_usage(self._folder).free / 1e9
        if not venv.exists() and free < needed:
            raise SystemExit(
                f"--cache: {str(self._folder)!r} has {free:.1f} GB free, but {name} needs {needed}"
            )
        return venv


def rows(options: argparse.Namespace, stored: Sequence[Row], console: Console) -> Iterator[Row]:
    """Compiles and counts one program after the other, but for those that ``stored`` rows have."""
    known = [row for row in stored if row.get("counter") == counter() and "error" not in row]
    wanted, missing = [], []
    for device, name, by, work in jobs(options):
        case = {"program": name, "device": device, "by": by, "runs": work["runs"]}
        # A package with changes of its own has no revision.
        same = [row for row in known if row["case"] == case and not by.endswith("+")]
        wanted += same[:1]
        missing += [] if same else [(case, work)]
    yield from wanted
    with contextlib.ExitStack() as stack:
        folder = options.cache or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        places = Environments(folder)
        for case, work in missing:
            compiled = compile_one(places, case["device"], work)
            what = ", ".join(str(value) for value in case.values())
            console.print(f"{what} runs: {compiled.get('error', 'compiled')}")
            row = {"benchmark": "compiled", "case": case, "counter": counter()}
            yield row | modelled(compiled, case["device"])


def counter() -> str:
    """What tells one version of the counter from another."""
    return hashlib.sha256((BENCHMARKS / "hlo.py").read_bytes()).hexdigest()[:12]


def jobs(options: argparse.Namespace) -> Iterator[tuple[str, str, str, Work]]:
    """Device, program, whose it is, and what the worker must know."""
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    for device in options.device:
        count = number_of_devices(device)
        for name in options.program or (list(PROGRAMS) if count == 1 else ["sweep"]):
            common = PROGRAMS[name] | {"device": device, "runs": runs_on(count)}
            several: list[tuple[str, Work]] = [
                (f"gipo_jax {revision(path)}", {"checkout": str(path.resolve())})
                for path in options.checkout
            ]
            if name == "ppo":
                peer_work = PEER_WORK | {"runs": common["runs"]}
                for peer in options.peer:
                    by, _, checkout = peer.partition("=")
                    several.append((by, {"peer": peer_work, "peer_checkout": checkout}))
            for by, more in several:
                work = common | more | {"by": by.split()[0]}
                if options.keep:
                    file = f"{name}-{by}-{device}.txt".replace(" ", "-").replace(":", "-")
                    work["keep"] = str(options.keep.resolve() / file)
                yield device, name, by, work


def number_of_devices(device: str) -> int:
    """Devices of a topology such as ``v5e:2x2``; 1 where none is given."""
    count = 1
    for size in device.partition(":")[2].split("x"):
        count *= int(size or 1)
    return count


def compile_one(places: Environments, device: str, work: Work) -> Work:
    """What the worker says of a program, or ``error`` with its last words."""
    kind = "cuda" if device.partition(":")[0] in MODEL else "tpu"
    script = str(BENCHMARKS / "compiled_worker.py")
    python, packages = places.own(kind), []
    if "peer" in work:
        python, packages = places.peers(), [str(places.packages(kind))]
    command = [str(python), script, json.dumps(work), *packages]
    # The same flags for all: XLA's own. Flags of this process are for the CPU.
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONPATH")}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=COMPILE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not compiled in {COMPILE_SECONDS} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    answer: Work = json.loads(done.stdout.splitlines()[-1])
    return answer


def modelled(compiled: Work, device: str) -> Work:
    """Adds the modelled seconds of an iteration, and its constants, where there is a model."""
    model = MODEL.get(device.partition(":")[0])
    if model is None or "error" in compiled:
        return compiled
    seconds = compiled["iteration"] * model["launch_s"]
    seconds += compiled["iteration_bytes"] / model["bytes_per_s"]
    return compiled | {"model": model, "modelled_s": seconds}


def revision(checkout: Path) -> str:
    """Short revision of a checkout's package, with a plus sign if it has changed since."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments, "--", "gipo_jax"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = "+" if git("status", "--porcelain") else ""
        return git("log", "-1", "--abbrev=7", "--format=%h") + changed
    except (OSError, subprocess.CalledProcessError):
        return checkout.resolve().name


def show(found: Sequence[Row], console: Console) -> None:
    """Draws tables of stored rows, one for each device."""
    for place in dict.fromkeys((row["case"]["device"], row["case"]["runs"]) for row in found):
        mine = [row for row in found if (row["case"]["device"], row["case"]["runs"]) == place]
        console.print(table(f"{place[0]}, {place[1]} runs", mine))
    for name, model in MODEL.items():
        console.print(
            f"Modelled, not timed: {name} with {1e6 * model['launch_s']} us a launch and"
            f" {model['bytes_per_s'] / 1e12} TB/s."
        )
    console.print(
        "Kernels; GB moved in an iteration; GB of temporaries; memory held, of that a sweep plans;"
        " instructions of communication; reads by the host inside an iteration."
    )


def table(title: str, found: Sequence[Row]) -> Table:
    """The programs compiled for one device."""
    drawn = Table(
        "program", "by", "env-step", "GAE step", "update", "rest", "iteration", "GB", "temp. GB",
        "of plan", "comm.", "reads", "model ms",
        title=title,
    )  # fmt: skip
    for row in sorted(found, key=lambda row: list(PROGRAMS).index(row["case"]["program"])):
        case = row["case"]
        if "error" in row:
            drawn.add_row(case["program"], case["by"], "not compiled")
            continue
        gae = f"{row['gae_step']:.2g} x {row['gae_steps']}" if row["gae_steps"] else ""
        update = f"{row['update']:.0f}" if row["update"] is not None else "in rest"
        planned = f"{row['held'] / row['planned']:.2f}" if "planned" in row else ""
        inside = sum(read_back["in_iteration"] for read_back in row["read_backs"])
        drawn.add_row(
            case["program"], case["by"], f"{row['env_step']:.0f}", gae, update,
            f"{row['rest']:,.0f}", f"{row['iteration']:,.0f}",
            f"{row['iteration_bytes'] / 1e9:,.1f}", f"{row['temporaries'] / 1e9:.2f}", planned,
            f"{row['collectives']}", f"{inside}",
            f"{1e3 * row['modelled_s']:,.1f}" if "modelled_s" in row else "",
        )  # fmt: skip
    failed = [f"{row['case']['program']}: {row['error']}" for row in found if "error" in row]
    drawn.caption = "\n".join(failed) or None
    return drawn
