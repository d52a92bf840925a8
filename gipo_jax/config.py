"""What a run is: static configuration, traced hyper-parameters, and their validation.

``Config`` holds everything that changes shapes or code; two runs with equal ``Config`` share one
compiled program. ``HParams`` holds everything that only changes numbers; it is a pytree of scalars,
so any of its fields can be swept inside one program by stacking along a leading axis.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

Scalar = float | jax.Array
"""A Python number, or an array of them where runs are stacked."""


class ConfigError(ValueError):
    """A setting is not usable. The message is one line: field, value, what would be valid."""

    def __init__(self, field: str, value: Any, valid: str) -> None:
        super().__init__(f"{field}: {value!r} is not valid; expected {valid}")
        self.field = field


def setting(default: Any, help: str, valid: str, check: Callable[[Any], bool]) -> Any:
    """A dataclass field that carries its own meaning and valid range.

    Args:
        default: value when the user gives none.
        help: one line for ``--help`` and the documentation.
        valid: what would be valid, in words; ends the error message.
        check: true where a value is valid.
    """
    metadata = {"help": help, "valid": valid, "check": check}
    return dataclasses.field(default=default, metadata=metadata)


def _integer(low: int, below: float = math.inf) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v < below


def _one_of(*names: str) -> Callable[[Any], bool]:
    return lambda v: v in names


def _finite(v: Any) -> bool:
    return isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)


def _positive(v: Any) -> bool:
    return _finite(v) and v > 0


def _not_negative(v: Any) -> bool:
    return _finite(v) and v >= 0


def _unit(v: Any) -> bool:
    return _finite(v) and 0 <= v <= 1


def _flag(v: Any) -> bool:
    return isinstance(v, bool)


ACTIVATIONS = ("tanh", "relu", "silu", "elu")
SCHEDULES = ("constant", "linear", "cosine")
ADVANTAGE_MODES = ("stored", "recomputed", "vtrace")
SAMPLING_MODES = ("shuffled", "uniform")
ACTION_HEADS = ("auto", "tokens", "gaussian")
DEFAULT_BUFFER_SIZE = 512
RATIO_LEVELS = (
    "token",
    "joint",
    "sequence",
    "prefix_product",
    "prefix_geometric",
    "prefix_min",
    "ratio_norm",
)
LOSS_AGG_MODES = (
    "token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)
KERNELS = ("gaussian", "laplacian", "cauchy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Static settings: everything that changes shapes or code. Hashable; one program per value.

    ``env`` may be a name, a gymnax environment or a task of tokens, ``objective`` a name or any
    function ``objective(log_ratio, advantage, **its own parameters) -> surrogate``.
    """

    env: Any = setting(
        "CartPole-v1",
        "environment by gymnax's name, or EnvPool's such as MetaWorld/ButtonPress-v3; or a task of"
        " answers of several tokens, such as tokens/reverse or your own; or a density for flows,"
        " flow/ring or flow/moons",
        "a gymnax environment name or object, an EnvPool name, or a task's name, FILE.py:TASK or"
        " object",
        lambda v: isinstance(v, str) or hasattr(v, "step_env") or hasattr(v, "reward"),
    )
    objective: Any = setting(
        "gipo",
        "policy objective",
        "an objective's name or function",
        lambda v: isinstance(v, str) or callable(v),
    )
    kernel: str = setting(
        "gaussian", "shape of the trust weight", f"one of {', '.join(KERNELS)}", _one_of(*KERNELS)
    )
    total_steps: int = setting(
        100_000,
        "environment steps a run takes (answers of token tasks, samples of flows)",
        "an integer >= 1",
        _integer(1),
    )
    num_envs: int = setting(
        4,
        "environments stepped side by side, or prompts answered an iteration",
        "an integer >= 1",
        _integer(1),
    )
    rollout_length: int = setting(
        8,
        "steps each environment takes, or answers to each prompt, an iteration",
        "an integer >= 1",
        _integer(1),
    )
    batch_size: int = setting(
        256, "transitions, or answers, in an update", "an integer >= 1", _integer(1)
    )
    updates_per_iteration: int = setting(
        1, "batches drawn an iteration", "an integer >= 1", _integer(1)
    )
    reuse_per_batch: int = setting(
        1,
        "updates made with each batch; the policy's loss is scaled by 1/sqrt(reuse index + 1)",
        "an integer >= 1",
        _integer(1),
    )
    policy_delay: int = setting(
        1, "the policy takes part in every n-th update", "an integer >= 1", _integer(1)
    )
    max_buffer_size: int | None = setting(
        None,
        "transitions allocated for replay, at least the largest buffer size; a sweep finds it out",
        "an integer >= 1, or None for the default buffer size",
        lambda v: v is None or _integer(1)(v),
    )
    sampling: str = setting(
        "shuffled",
        "how batches are drawn: without replacement (shuffled), or with (uniform)",
        f"one of {', '.join(SAMPLING_MODES)}",
        _one_of(*SAMPLING_MODES),
    )
    advantage_mode: str = setting(
        "stored",
        "advantages: stored at collection, recomputed by the current critic, or V-trace",
        f"one of {', '.join(ADVANTAGE_MODES)}",
        _one_of(*ADVANTAGE_MODES),
    )
    normalize_advantage: bool | None = setting(
        None,
        "standardise advantages in each batch; by default yes, but no on token tasks, where it"
        " would blow up the small differences between answers that are nearly all right",
        "true or false, or None for the default",
        lambda v: v is None or _flag(v),
    )
    ratio_level: str | None = setting(
        None,
        "importance ratio of each token, of the whole action or answer (joint), of a sequence, or"
        " ratio_norm for flows; by default the objective's own, which is token for most",
        f"one of {', '.join(RATIO_LEVELS)}, or None for the objective's own",
        lambda v: v is None or v in RATIO_LEVELS,
    )
    loss_agg_mode: str = setting(
        "token-mean",
        "token tasks: mean of the policy's loss over tokens, or over answers of the sum or the mean"
        " of each one's tokens",
        f"one of {', '.join(LOSS_AGG_MODES)}",
        _one_of(*LOSS_AGG_MODES),
    )
    selection: Any = setting(
        "keep_all",
        "token tasks: which prompts are answered, or which answers are learned from",
        "keep_all, depo, prune, sage or a function",
        lambda v: isinstance(v, str) or callable(v),
    )
    num_candidates: int | None = setting(
        None,
        "prompts drawn an iteration for a selection of prompts to choose num_envs from; by default"
        " 4 times as many",
        "an integer >= 1, or None for the default",
        lambda v: v is None or _integer(1)(v),
    )
    packed_size: int | None = setting(
        None,
        "answers that an update back-propagates through under a selection of answers; by default"
        " half of batch_size",
        "an integer >= 1, or None for the default",
        lambda v: v is None or _integer(1)(v),
    )
    decoder_layers: int = setting(
        3, "token tasks: layers of the transformer", "an integer >= 1", _integer(1)
    )
    decoder_width: int = setting(
        64,
        "token tasks: width of the transformer; its feed-forward part is twice as wide",
        "an integer >= 1 that the heads divide",
        _integer(1),
    )
    decoder_heads: int = setting(
        4, "token tasks: attention heads of the transformer", "an integer >= 1", _integer(1)
    )
    action_head: str = setting(
        "auto",
        "head for Box actions: tokens (categorical bins) or gaussian; auto takes tokens",
        f"one of {', '.join(ACTION_HEADS)}",
        _one_of(*ACTION_HEADS),
    )
    num_bins: int = setting(
        11, "bins for each action dimension with tokens", "an integer >= 2", _integer(2)
    )
    hidden_sizes: tuple[int, ...] = setting(
        (64, 64),
        "widths of the hidden layers",
        "one or more integers >= 1",
        lambda v: isinstance(v, tuple) and len(v) > 0 and all(_integer(1)(n) for n in v),
    )
    value_hidden_sizes: tuple[int, ...] = setting(
        (),
        "widths of the value function's own hidden layers; none given, as the policy's",
        "integers >= 1",
        lambda v: isinstance(v, tuple) and all(_integer(1)(n) for n in v),
    )
    activation: str = setting(
        "tanh", "activation", f"one of {', '.join(ACTIVATIONS)}", _one_of(*ACTIVATIONS)
    )
    layer_norm: bool = setting(
        False, "LayerNorm after each hidden activation", "true or false", _flag
    )
    shared_torso: bool = setting(
        False, "policy and value share the first layers", "true or false", _flag
    )
    detach_value: bool = setting(
        True, "with a shared torso, the value head does not train it", "true or false", _flag
    )
    normalize_obs: bool = setting(
        False, "standardise observations with running statistics", "true or false", _flag
    )
    truncation_is_termination: bool = setting(
        False, "treat a time limit as termination (no bootstrap)", "true or false", _flag
    )
    max_episode_steps: int | None = setting(
        None,
        "time limit; None keeps the environment's own",
        "an integer >= 1, or None",
        lambda v: v is None or _integer(1)(v),
    )
    schedule: str = setting(
        "linear",
        "learning-rate decay over the run",
        f"one of {', '.join(SCHEDULES)}",
        _one_of(*SCHEDULES),
    )
    num_logs: int = setting(20, "points logged a run", "an integer >= 1", _integer(1))
    eval_episodes: int | None = setting(
        None,
        "greedy and sampled evaluation episodes at each logged point; by default 10, 0 in an"
        " EnvPool environment, which has none, and 128 prompts of a token task",
        "an integer >= 0",
        lambda v: v is None or _integer(0)(v),
    )

    @property
    def block_size(self) -> int:
        """Transitions written to replay an iteration."""
        return self.num_envs * self.rollout_length

    @property
    def num_iterations(self) -> int:
        return self.total_steps // self.block_size

    @property
    def allocated_size(self) -> int:
        """Transitions that replay has room for."""
        return self.max_buffer_size or DEFAULT_BUFFER_SIZE


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class HParams:
    """Traced settings: scalars that only change numbers, so that a sweep can stack them."""

    seed: Scalar = setting(0, "seed of the run", "an integer in [0, 2^31)", _integer(0, 2**31))
    buffer_size: Scalar = setting(
        DEFAULT_BUFFER_SIZE,
        "transitions (answers, chains) kept for replay",
        "an integer in [1, 2^31)",
        _integer(1, 2**31),
    )
    min_age: Scalar = setting(
        0,
        "newest iterations of data held back from sampling",
        "an integer in [0, 2^31)",
        _integer(0, 2**31),
    )
    learning_rate: Scalar = setting(
        6e-4, "learning rate of the policy", "a finite number > 0", _positive
    )
    value_learning_rate: Scalar = setting(
        None,
        "learning rate of the value function; None takes the policy's",
        "a finite number > 0, or None",
        lambda v: v is None or _positive(v),
    )
    gamma: Scalar = setting(0.99, "discount", "a number in [0, 1]", _unit)
    gae_lambda: Scalar = setting(
        0.95, "decay of generalised advantage estimation", "a number in [0, 1]", _unit
    )
    entropy_coef: Scalar = setting(
        0.03, "weight of the entropy bonus", "a finite number >= 0", _not_negative
    )
    kl_coef: Scalar = setting(
        0.0, "weight of the penalty KL(behavior || policy)", "a finite number >= 0", _not_negative
    )
    value_coef: Scalar = setting(
        0.5, "weight of the squared value error", "a finite number > 0", _positive
    )
    max_grad_norm: Scalar = setting(
        0.5, "global gradient norm, for policy and value apart", "a finite number > 0", _positive
    )
    warmup_iterations: Scalar = setting(
        0,
        "iterations of linear learning-rate warm-up",
        "an integer in [0, 2^31)",
        _integer(0, 2**31),
    )
    reward_scale: Scalar = setting(
        1.0, "factor on rewards before learning", "a finite number > 0", _positive
    )
    recent_fraction: Scalar = setting(
        0.0, "part of each batch drawn from the newest iteration only", "a number in [0, 1]", _unit
    )
    ess_lr_power: Scalar = setting(
        0.0,
        "policy learning rate times (ESS / batch) to this power; 0.5 is the square-root rule",
        "a finite number >= 0",
        _not_negative,
    )
    temperature: Scalar = setting(
        1.0,
        "token tasks: temperature of the policy, when it samples and when it learns",
        "a finite number > 0",
        _positive,
    )
    imitation_updates: Scalar = setting(
        0,
        "token tasks: updates on demonstrations before reinforcement learning",
        "an integer in [0, 2^31)",
        _integer(0, 2**31),
    )
    objective_params: dict[str, Scalar] = dataclasses.field(default_factory=dict)


_INTEGERS = ("seed", "buffer_size", "min_age", "warmup_iterations", "imitation_updates")


def stack(hparams: Sequence[HParams]) -> HParams:
    """Settings of several runs as one pytree of NumPy arrays ``[runs]``."""

    def column(path: Any, *values: Any) -> np.ndarray:
        integer = jax.tree_util.keystr(path, simple=True) in _INTEGERS
        return np.asarray(values, np.int32 if integer else np.float32)

    return jax.tree_util.tree_map_with_path(column, *hparams)


def check_fields(settings: Any) -> None:
    """Checks every field of a dataclass made of ``setting`` fields; raises ConfigError."""
    for field in dataclasses.fields(settings):
        check = field.metadata.get("check")
        value = getattr(settings, field.name)
        if check is not None and not check(value):
            raise ConfigError(field.name, value, field.metadata["valid"])


def check_sizes(config: Config, hparams: HParams) -> None:
    """Checks the rules that tie fields together; raises ConfigError.

    Raises:
        ConfigError: block, buffer, batch and step counts do not fit each other.
    """
    block = config.block_size
    product = f"num_envs {config.num_envs} x rollout_length {config.rollout_length} = {block}"
    if config.total_steps % block:
        near = max(config.total_steps // block, 1) * block
        raise ConfigError(
            "total_steps", config.total_steps, f"a multiple of {product}, such as {near}"
        )
    size, age = int(hparams.buffer_size), int(hparams.min_age)
    if size % block or size < block:
        near = max(size // block, 1) * block
        raise ConfigError("buffer_size", size, f"a positive multiple of {product}, such as {near}")
    if config.max_buffer_size is not None and (
        config.max_buffer_size % block or config.max_buffer_size < size
    ):
        raise ConfigError(
            "max_buffer_size",
            config.max_buffer_size,
            f"a multiple of {product} and at least the buffer size {size}",
        )
    if age * block >= size:
        raise ConfigError(
            "min_age",
            age,
            f"less than the {size // block} iterations that buffer_size {size} holds",
        )
    if config.sampling == "shuffled" and size - age * block < config.batch_size:
        held_back = f" beside the {age * block} held back by min_age {age}" if age else ""
        raise ConfigError(
            "buffer_size",
            size,
            f"at least batch_size {config.batch_size}{held_back}, which is drawn without"
            " replacement (or sampling 'uniform')",
        )
    if config.advantage_mode != "stored" and config.batch_size % config.rollout_length:
        raise ConfigError(
            "batch_size",
            config.batch_size,
            f"a multiple of rollout_length {config.rollout_length}, because advantage_mode"
            f" {config.advantage_mode!r} samples whole segments",
        )
