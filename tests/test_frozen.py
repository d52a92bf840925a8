"""Training computes what it computed before, to the bit on CPU: 20 iterations of every domain.

The numbers in ``tests/frozen`` were stored by ``python -m tests.test_frozen``. They hold for one
version of XLA on one kind of processor, which round alike. Elsewhere the first three iterations are
compared, before differences in rounding have grown. Where a mended fault changes a number, the
stored ones change in a commit that says so.
"""

import hashlib
import json
import platform
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the same settings as under pytest, before JAX is imported
    __import__("tests.conftest")

import jax
import jaxlib
import numpy as np
import pytest

from gipo_jax import train
from gipo_jax.config import Config

FOLDER = Path(__file__).parent / "frozen"

CONTROL: dict[str, Any] = {
    "env": "CartPole-v1",
    "num_envs": 4,
    "rollout_length": 8,
    "batch_size": 32,
    "updates_per_iteration": 2,
    "total_steps": 640,
    "max_buffer_size": 128,
    "num_logs": 20,
    "eval_episodes": 0,
}
EVALUATED = {"eval_episodes": 2}
TOKENS = CONTROL | {"env": "tokens/reverse", "decoder_width": 16, "decoder_layers": 1}
TOKENS_TRACED: dict[str, Any] = {"imitation_updates": 3}
FLOW = CONTROL | {"env": "flow/ring"}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "control_stored": (CONTROL | EVALUATED, {"recent_fraction": 0.25, "ess_lr_power": 0.5}),
    "control_recomputed": (CONTROL | {"advantage_mode": "recomputed"}, {"kl_coef": 0.1}),
    "control_vtrace": (
        CONTROL | {"advantage_mode": "vtrace", "objective": "ppo_clip", "sampling": "uniform"},
        {},
    ),
    "control_delay": (
        CONTROL | {"reuse_per_batch": 4, "policy_delay": 2, "num_envs": 8, "total_steps": 1280},
        {},
    ),
    "control_reuse": (CONTROL | {"reuse_per_batch": 3, "objective": "proximal_gipo"}, {}),
    "control_normalized": (CONTROL | {"normalize_obs": True, "schedule": "cosine"}, {}),
    "control_stateful": (CONTROL | {"objective": "r2vpo"}, {}),
    "control_held_back": (CONTROL, {"min_age": 2, "reward_scale": 0.1}),
    "control_shared": (
        CONTROL
        | {
            "shared_torso": True,
            "detach_value": False,
            "layer_norm": True,
            "value_hidden_sizes": (16,),
        },
        {"value_learning_rate": 1e-3},
    ),
    "control_gaussian": (
        CONTROL | {"env": "Pendulum-v1", "action_head": "gaussian", "ratio_level": "joint"},
        {},
    ),
    "control_images": (CONTROL | {"env": "Breakout-MinAtar"}, {}),
    "control_authors": (
        CONTROL
        | {
            "env": "Pendulum-v1",
            "kl": "exact",
            "joint_grad_norm": True,
            "shared_torso": True,
            "layer_norm": True,
            "reuse_per_batch": 2,
            "policy_delay": 2,
            "schedule": "cosine",
        },
        {"kl_coef": 0.1, "adam_epsilon": 1e-8, "warmup_iterations": 4, "sigma_neg_ratio": 0.5},
    ),
    "tokens_plain": (TOKENS | EVALUATED, TOKENS_TRACED | {"kl_coef": 0.1}),
    "tokens_prune": (TOKENS | {"selection": "prune"}, TOKENS_TRACED),
    "tokens_depo": (TOKENS | {"selection": "depo", "reuse_per_batch": 2}, TOKENS_TRACED),
    "tokens_dpo": (TOKENS | {"objective": "dpo"}, TOKENS_TRACED),
    "tokens_stateful": (
        TOKENS | {"objective": "r2vpo", "loss_agg_mode": "seq-mean-token-sum"},
        TOKENS_TRACED,
    ),
    "flow_plain": (FLOW | EVALUATED, {"kl_coef": 0.1, "ess_lr_power": 0.5}),
    "flow_guard": (FLOW | {"objective": "ppo_clip", "ratio_level": "ratio_norm"}, {}),
}


def processor() -> str:
    """What decides how XLA on CPU rounds: its version and the instructions it may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        flags = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        flags = platform.processor()
    digest = hashlib.sha256(" ".join(sorted(flags.split())).encode()).hexdigest()[:16]
    return f"jaxlib {jaxlib.__version__}, {platform.machine()} {digest}"


def trained(name: str) -> dict[str, np.ndarray]:
    """Metrics ``[20]`` of a case, and sums over its final parameters."""
    static, traced = CASES[name]
    config = Config(**static)
    hparams = train.make_hparams(config, seed=3, buffer_size=128, learning_rate=3e-3, **traced)
    state, metrics = jax.jit(train.make_train(config))(hparams)
    leaves = jax.tree.leaves(state.learner.params)
    sums = {f"params_{i}": np.sum(np.asarray(x), dtype=np.float64) for i, x in enumerate(leaves)}
    return {name: np.asarray(x) for name, x in (metrics | sums).items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_twenty_iterations_give_the_stored_numbers(name: str) -> None:
    stored = np.load(FOLDER / f"{name}.npz")
    same = json.loads((FOLDER / "processor.json").read_text()) == processor()
    result = trained(name)
    for key in stored if same else [k for k in stored if not k.startswith("params")]:
        if same:
            np.testing.assert_array_equal(result[key], stored[key], err_msg=key)
        else:
            np.testing.assert_allclose(
                result[key][:3],
                stored[key][:3],
                rtol=1e-3,
                atol=1e-3,
                err_msg=key,
            )


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for case in sys.argv[1:] or CASES:
        np.savez_compressed(FOLDER / f"{case}.npz", **trained(case))  # type: ignore[arg-type]
    (FOLDER / "processor.json").write_text(json.dumps(processor()) + "\n", encoding="utf-8")
