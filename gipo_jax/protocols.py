"""Settings of published experiments under one name, each with where it comes from.

A protocol is a set of values for fields of ``Config`` and ``HParams``; whatever is given beside it
wins. It names no environment, objective or seed: these are what an experiment varies.
"""

from collections.abc import Container
from typing import Any, NamedTuple

from gipo_jax.config import ConfigError


class Setting(NamedTuple):
    """A value of a protocol."""

    value: Any  # for the field or parameter that has its name
    source: str  # what the experiment did, one line


class Protocol(NamedTuple):
    """The settings of a published experiment."""

    summary: str  # one line for --help
    source: str  # publication and code
    settings: dict[str, Setting]  # by the name of a field of Config or HParams
    objective_params: dict[str, Setting]  # by the name, for objectives that have it


_GIPO_METAWORLD = Protocol(
    summary="Meta-World with stale replay, as the authors of GIPO ran it",
    source="arXiv:2603.03955; github.com/distanceLu/GIPO at 5aae0ad, its Meta-World script, and the"
    " record of a run for what that script has changed since",
    settings={
        # Acting.
        "num_envs": Setting(1, "one environment"),
        "rollout_length": Setting(500, "an iteration acts for 500 steps, which is one episode"),
        "total_steps": Setting(5_000_000, "a run's record: 10,000 iterations of 500 steps"),
        "truncation_is_termination": Setting(
            True, "a time limit ends an episode without a bootstrap value, as death does"
        ),
        "reward_scale": Setting(0.001, "rewards are multiplied by 0.001"),
        # Replay.
        "buffer_size": Setting(20_000, "first in, first out, of the last 20,000 transitions"),
        "min_age": Setting(0, "no data is held back"),
        "batch_size": Setting(512, "batches of 512"),
        "sampling": Setting("shuffled", "a batch is drawn without replacement"),
        "updates_per_iteration": Setting(5, "a run's record: 5 sampling rounds an iteration"),
        "reuse_per_batch": Setting(
            2, "a run's record: each batch is used twice; code: damped by 1/sqrt(use)"
        ),
        "policy_delay": Setting(2, "a run's record: the actor takes part in every second use"),
        # Losses.
        "advantage_mode": Setting("stored", "advantages are computed at collection and stored"),
        "normalize_advantage": Setting(True, "standardised in each batch"),
        "ratio_level": Setting("token", "one ratio for each action dimension"),
        "gamma": Setting(0.99, "discount 0.99"),
        "gae_lambda": Setting(0.95, "lambda 0.95 of generalised advantage estimation"),
        "value_coef": Setting(0.5, "value coefficient 0.5 on the squared error"),
        "entropy_coef": Setting(0.0, "no entropy bonus"),
        "kl_coef": Setting(0.1, "KL(behavior || policy) coefficient 0.1"),
        "kl": Setting("exact", "code: over all categories, from stored logits, for every method"),
        # Network.
        "action_head": Setting("tokens", "categorical bins for each action dimension"),
        "num_bins": Setting(256, "256 bins, value -1 + 2 token / 255"),
        "hidden_sizes": Setting((512, 512), "encoder of 512, policy head with 512 of its own"),
        "value_hidden_sizes": Setting((256,), "value head with 256 of its own"),
        "shared_torso": Setting(True, "policy and value share the encoder"),
        "detach_value": Setting(True, "the value's loss does not train the encoder"),
        "activation": Setting("relu", "Linear, ReLU, LayerNorm"),
        "layer_norm": Setting(True, "Linear, ReLU, LayerNorm"),
        "normalize_obs": Setting(False, "observations as they are"),
        "compute_dtype": Setting("float32", "float32 as on a CPU; on CUDA theirs is bfloat16"),
        "param_dtype": Setting(
            "float32",
            "float32 as on a CPU; on CUDA theirs is bfloat16, optimizer state included, in which"
            " steps below 2^-9 of a weight are lost",
        ),
        # Optimizer.
        "learning_rate": Setting(3e-4, "policy and encoder 3e-4"),
        "value_learning_rate": Setting(3e-3, "value head 3e-3"),
        "warmup_iterations": Setting(10, "10 iterations of linear warm-up"),
        "schedule": Setting("cosine", "cosine decay"),
        "max_grad_norm": Setting(1.0, "gradient norm 1.0"),
        "joint_grad_norm": Setting(True, "code: one norm over policy and value"),
        "adam_epsilon": Setting(1e-8, "code: AdamW's default epsilon"),
        # Reporting.
        "num_logs": Setting(100, "scores are means over the last 100 episodes, one point here"),
        "eval_episodes": Setting(0, "scores are of training episodes"),
    },
    objective_params={
        "sigma_neg_ratio": Setting(1.0, "paper: a symmetric weight; the script's default is 0.5"),
    },
)

_GIPO_METAWORLD_HEAD = Protocol(
    summary="the same by the defaults of the authors' repository: fewer iterations, more reuse",
    source="github.com/distanceLu/GIPO at 5aae0ad, its Meta-World script",
    settings=_GIPO_METAWORLD.settings
    | {
        "total_steps": Setting(500_000, "the script's default: 1,000 iterations of 500 steps"),
        "updates_per_iteration": Setting(10, "the script's default: 10 rounds an iteration"),
        "reuse_per_batch": Setting(
            10, "the script's default: each batch is used 10 times, damped by 1/sqrt(use)"
        ),
        "policy_delay": Setting(10, "the script's default: the actor takes part in every 10th use"),
    },
    objective_params={
        "sigma_neg_ratio": Setting(0.5, "the script's default; the paper's weight is symmetric"),
    },
)

PROTOCOLS = {"gipo-metaworld": _GIPO_METAWORLD, "gipo-metaworld-head": _GIPO_METAWORLD_HEAD}


def settings(name: str) -> dict[str, Any]:
    """Values of a protocol by the names of fields of ``Config`` and ``HParams``."""
    return {field: setting.value for field, setting in _find(name).settings.items()}


def objective_params(name: str, taken: Container[str]) -> dict[str, Any]:
    """Values of a protocol for those parameters of objectives that are ``taken``."""
    values = {key: setting.value for key, setting in _find(name).objective_params.items()}
    return {key: value for key, value in values.items() if key in taken}


def _find(name: str) -> Protocol:
    if name not in PROTOCOLS:
        raise ConfigError("protocol", name, f"one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
