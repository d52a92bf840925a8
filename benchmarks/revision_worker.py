"""Trains with the code of a checkout: a worker process of ``scripts/benchmark.py revision``.

    python benchmarks/revision_worker.py CHECKOUT JSON

It uses only what earlier revisions have too: ``Config`` and the ``Training`` of their benchmark.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

checkout, work = Path(sys.argv[1]), json.loads(sys.argv[2])
sys.path[:0] = [str(checkout), str(checkout / "scripts")]

import benchmark  # noqa: E402
import jax  # noqa: E402

import gipo_jax  # noqa: E402
from gipo_jax.config import Config  # noqa: E402

if checkout not in Path(gipo_jax.__file__).parents:
    raise SystemExit(f"gipo_jax is that of {gipo_jax.__file__}, not of {checkout}")

ROWS = {"ppo": 8192, "defaults": 2048, "replay": 2**16, "manipulator": 20_000}
"""Transitions in replay."""


def config_of(name: str) -> Config:
    """The configuration that the revisions compared have alike."""
    base = Config(env="CartPole-v1", eval_episodes=0)
    changes: dict[str, dict[str, Any]] = {
        "ppo": {
            "objective": "ppo_clip",
            "num_envs": 64,
            "rollout_length": 128,
            "batch_size": 2048,
            "updates_per_iteration": 16,
            "hidden_sizes": (64, 64),
            "activation": "tanh",
        },
        "defaults": {},
        "replay": {
            "num_envs": 16,
            "rollout_length": 32,
            "batch_size": 512,
            "updates_per_iteration": 4,
        },
        "manipulator": {
            "env": benchmark.ManipulatorShapes(),
            "num_envs": 1,
            "rollout_length": 500,
            "batch_size": 512,
            "num_bins": 256,
            "hidden_sizes": (512, 512),
            "value_hidden_sizes": (256,),
            "activation": "relu",
            "layer_norm": True,
            "shared_torso": True,
            "updates_per_iteration": 10,
        },
    }
    return dataclasses.replace(base, **changes[name])


jax.config.update("jax_enable_compilation_cache", False)
config = config_of(work["work"])
rows = ROWS[work["work"]]
training = benchmark.Training(
    config, work["runs"], work["iterations"], rows, started=rows // config.block_size
)
print(json.dumps({"compile_s": training.compile_s}), flush=True)
for _ in sys.stdin:
    print(json.dumps({"seconds": training()}), flush=True)
