"""The Meta-World script of GIPO's authors, paced; scripts/benchmark.py runs this file.

    metaworld_authors.py SCRIPT WORK

It runs in an environment of its own, with PyTorch and the official Meta-World, and imports nothing
of this project. SCRIPT is theirs, in a checkout of github.com/distanceLu/GIPO, and its ``main``
runs as it is. It logs a scalar named System/EnvSteps in every iteration, and there its writer waits
until it is asked to go on. Protocol as in benchmarks/peers.py.
"""

import contextlib
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

# The script asks for off-screen rendering, of which it renders nothing: its library can be missing.
os.environ["MUJOCO_GL"] = "disable"
# One core a run, as PyTorch would not guess.
torch.set_num_threads(1)

ANSWERS = sys.stdout
"""The script prints to standard output, which is kept for the protocol."""


def paced(warm: int, iterations: int) -> type[SummaryWriter]:
    """A writer that waits after ``warm`` iterations and again after every ``iterations``."""

    class Paced(SummaryWriter):
        done = 0
        begin = time.perf_counter()

        def add_scalar(self, tag: str, *arguments: Any, **named: Any) -> None:
            super().add_scalar(tag, *arguments, **named)
            if tag == "System/EnvSteps":
                self.done += 1
                if self.done >= warm and (self.done - warm) % iterations == 0:
                    self.wait()

        def wait(self) -> None:
            seconds = time.perf_counter() - self.begin
            answer = {"torch": torch.__version__} if self.done == warm else {"seconds": seconds}
            print(json.dumps(answer), file=ANSWERS, flush=True)
            if not sys.stdin.readline():
                raise SystemExit(0)
            self.begin = time.perf_counter()

    return Paced


def load(script: Path) -> Any:
    """Imports the script under a name of its own; its dataclasses look their module up."""
    spec = importlib.util.spec_from_file_location("authors", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["authors"] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    script, work = Path(sys.argv[1]), json.loads(sys.argv[2])
    # It creates files beside the folder it logs to and reads TMPDIR.
    with tempfile.TemporaryDirectory() as logs, contextlib.redirect_stdout(sys.stderr):
        authors = load(script)
        authors.SummaryWriter = paced(work["warm"], work["iterations"])
        sys.argv = [str(script), *work["arguments"], "--log-dir", logs]
        authors.main()
