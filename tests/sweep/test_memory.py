"""That the memory plan is what a sweep takes."""

from pathlib import Path

import pytest

from tests import programs

pytestmark = pytest.mark.slow

# In a program of its own, whose memory is only the sweep's.
PROGRAM = """
import sys, threading, time
from gipo_jax import runtime
runtime.set_cpu_defaults()
from gipo_jax import sweep
from gipo_jax.sweep import plan, program

runs = sweep.expand(env="Acrobot-v1", buffer_size=32 * 32768, seeds=6, total_steps=96, num_logs=3,
                    eval_episodes=0)
seen = []

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))

def watch():
    while True:
        seen.append(resident())
        time.sleep(0.002)

compile_program = program.Program.compile

def compile_then_watch(self):
    compile_program(self)
    seen.append(resident())
    threading.Thread(target=watch, daemon=True).start()

program.Program.compile = compile_then_watch
sweep.run(runs, sys.argv[1], sweep.Options(devices=1, quiet=True, checkpoint_seconds=0))
group = plan.group_runs(runs)[0]
import jax
planned = plan.slices(group, "map", None, jax.local_devices()[:1], None).bytes
assert group.memory.replay > 0.9 * group.memory.state
print((max(seen) - seen[0]) / planned)
"""


def test_a_sweep_of_large_buffers_takes_the_memory_planned(tmp_path: Path) -> None:
    done = programs.run("-c", PROGRAM, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert 0.75 < float(done.stdout) < 1.25
