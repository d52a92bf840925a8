"""What a run is: static configuration, traced hyper-parameters, and their validation.

Each field says what it means, which values it takes, in which domains it applies and on which other
fields that depends. ``check_fields`` and ``check_applies`` read all of it off the fields.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

Scalar = float | jax.Array  # A Python number, or an array of them where runs are stacked

CONTROL, TOKENS, FLOW = "control", "tokens", "flow"
# What is trained, by the name of its domain
DOMAINS = {CONTROL: "control tasks", TOKENS: "token tasks", FLOW: "flows"}


class ConfigError(ValueError):
    """A setting is not usable. The message is one line: field, value, what would be valid."""

    def __init__(self, field: str, value: Any, valid: str) -> None:
        super().__init__(f"{field}: {value!r} is not valid; expected {valid}")
        self.field = field


# Which values a field takes.


class Validator(NamedTuple):
    """A test of values that can say in words what passes it; it ends the error message."""

    valid: str
    accepts: Callable[[Any], bool]

    def __call__(self, value: Any) -> bool:
        return self.accepts(value)


def at_least(low: int) -> Validator:
    """Integers from ``low`` on."""
    return Validator(f"an integer >= {low}", lambda v: _is_integer(v) and v >= low)


def one_of(*names: str) -> Validator:
    """Some names."""
    return Validator(f"one of {', '.join(names)}", lambda v: v in names)


def optional(validator: Validator, none: str = "None for the default") -> Validator:
    """What a validator takes, and None; ``none`` says in words what that means."""
    return Validator(f"{validator.valid}, or {none}", lambda v: v is None or validator(v))


def sizes_of_layers(least: int) -> Validator:
    """Tuples of at least so many integers >= 1."""
    size = at_least(1)
    return Validator(
        "one or more integers >= 1" if least else "integers >= 1",
        lambda v: isinstance(v, tuple) and len(v) >= least and all(size(n) for n in v),
    )


def _is_integer(v: Any) -> bool:
    return isinstance(v, int) and not isinstance(v, bool)


_LARGEST, _SMALLEST = (float(getattr(np.finfo(np.float32), name)) for name in ("max", "tiny"))


def is_finite(v: Any) -> bool:
    """Whether a setting is a number, and finite in float32, in which it is computed with."""
    return isinstance(v, int | float) and not isinstance(v, bool) and abs(v) <= _LARGEST


def is_positive(v: Any) -> bool:
    """Whether a setting is such a number > 0; below the normal ones of float32 it would be 0."""
    return is_finite(v) and v >= _SMALLEST


index = Validator("an integer in [0, 2^31)", lambda v: _is_integer(v) and 0 <= v < 2**31)
count = Validator("an integer in [1, 2^31)", lambda v: _is_integer(v) and 1 <= v < 2**31)
positive = Validator("a finite number > 0, in float32", is_positive)
not_negative = Validator("a finite number >= 0, in float32", lambda v: is_finite(v) and v >= 0)
part_of_unit_interval = Validator(
    "two numbers, 0 <= low < high <= 1",
    lambda v: (
        isinstance(v, tuple) and len(v) == 2 and all(map(is_finite, v)) and (0 <= v[0] < v[1] <= 1)
    ),
)
unit_interval = Validator("a number in [0, 1]", lambda v: is_finite(v) and 0 <= v <= 1)
flag = Validator("true or false", lambda v: isinstance(v, bool))
environment = Validator(
    "a name, FILE.py:NAME, or an environment or a task itself", lambda v: v is not None
)


def function_or_name(valid: str) -> Validator:
    """A function, or its name."""
    return Validator(valid, lambda v: isinstance(v, str) or callable(v))


# Where a field applies.


class Needs(Protocol):
    """What ``check_applies`` reads of an objective's ``signatures.Spec``."""

    @property
    def inputs(self) -> tuple[str, ...]: ...
    @property
    def takes_kernel(self) -> bool: ...


class Case(NamedTuple):
    """What decides whether a field applies."""

    config: "Config"
    objective: Needs
    domain: str

    @property
    def pairs(self) -> bool:
        return "margin" in self.objective.inputs

    @property
    def standardized(self) -> bool:
        """Whether advantages are divided by their standard deviation, and so lose their scale."""
        given = self.config.normalize_advantage
        in_batch = self.domain != TOKENS if given is None else given
        return in_batch or self.config.normalize_groups


class Condition(NamedTuple):
    """Where a field applies, and in words why it would do nothing elsewhere."""

    holds: Callable[[Case], bool]
    reason: str


_BINS = Condition(lambda c: c.config.action_head != "gaussian", "a gaussian head has no bins")
_FUSED = Condition(
    lambda c: (
        not (c.config.layer_norm or c.config.shared_torso)
        and {c.config.compute_dtype, c.config.param_dtype} == {"float32"}
    ),
    "its kernels compute in float32, without layer_norm and shared_torso",
)
_SHARED = Condition(lambda c: c.config.shared_torso, "shared_torso is false")
_TRACES = Condition(
    lambda c: c.config.advantage_mode != "vtrace", "advantage_mode 'vtrace' does not use it"
)
_DEPO = Condition(lambda c: c.config.selection == "depo", "only selection depo uses it")
_KERNEL = Condition(lambda c: c.objective.takes_kernel, "the objective takes no kernel")
_NO_PAIRS = Condition(lambda c: not c.pairs, "the objective compares pairs of whole answers")
_REWARD = Condition(lambda c: not c.pairs, "pairs have no reward")
_REWARD_COUNTS = Condition(
    lambda c: c.domain == CONTROL or not c.standardized,
    "standardised advantages have no scale, and nothing else learns from rewards",
)


def setting(
    default: Any,
    help: str,
    check: Validator,
    *,
    domains: Sequence[str] = tuple(DOMAINS),
    applies: Sequence[Condition] = (),
    follows: str = "",
    integer: bool = False,
) -> Any:
    """A dataclass field that carries its own meaning and valid range.

    It is refused where it would do nothing: outside its ``domains``, and unless all of ``applies``
    hold. Where it is None it ``follows`` another field.
    """
    metadata = {
        "help": help,
        "valid": check.valid,
        "check": check,
        "domains": tuple(domains),
        "applies": tuple(applies),
        "follows": follows,
        "integer": integer,
    }
    return dataclasses.field(default=default, metadata=metadata)


def of_control(default: Any, help: str, check: Validator, **more: Any) -> Any:
    """A setting of control tasks alone."""
    return setting(default, help, check, domains=[CONTROL], **more)


def of_tokens(default: Any, help: str, check: Validator, **more: Any) -> Any:
    """A setting of token tasks alone."""
    return setting(default, help, check, domains=[TOKENS], **more)


ACTIVATIONS = ("tanh", "relu", "silu", "elu")
SCHEDULES = ("constant", "linear", "cosine")
ADVANTAGE_MODES = ("stored", "recomputed", "vtrace")
SAMPLING_MODES = ("shuffled", "uniform")
ACTION_HEADS = ("auto", "tokens", "gaussian")
DTYPES = ("float32", "bfloat16")
DEFAULT_BUFFER_SIZE = 512
RATIO_LEVELS = (
    *("token", "joint", "sequence", "prefix_product", "prefix_geometric", "prefix_min"),
    "ratio_norm",
)
LOSS_AGG_MODES = (
    *("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"),
)
KERNELS = ("gaussian", "laplacian", "cauchy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Static settings: everything that changes shapes or code. Hashable; one program per value.

    ``env`` may be a name, an environment (``environments.functional`` or gymnax makes it) or a task
    of tokens, ``objective`` a name or any function ``objective(log_ratio, advantage, **its own
    parameters) -> surrogate``.
    """

    env: Any = setting(
        "CartPole-v1",
        "environment by the name of gymnax, a suite (brax/ant, playground/CartpoleBalance,"
        " craftax/Craftax-Symbolic-v1, xminigrid/MiniGrid-Empty-8x8) or EnvPool"
        " (MetaWorld/ButtonPress-v3), with parameters as in Pendulum-v1:g=9.8; or a task of answers"
        " of several tokens, such as tokens/reverse; or an environment or task of your own,"
        " FILE.py:NAME; or a density for flows, flow/ring or flow/moons",
        environment,
    )
    objective: Any = setting(
        "gipo", "policy objective", function_or_name("an objective's name or function")
    )
    kernel: str = setting(
        "gaussian", "shape of the trust weight", one_of(*KERNELS), applies=[_KERNEL]
    )
    total_steps: int = setting(
        100_000,
        "environment steps a run takes (answers of token tasks, samples of flows)",
        at_least(1),
    )
    num_envs: int = setting(
        4, "environments stepped side by side, or prompts answered an iteration", at_least(1)
    )
    rollout_length: int = setting(
        8, "steps each environment takes, or answers to each prompt, an iteration", at_least(1)
    )
    batch_size: int = setting(256, "transitions, or answers, in an update", at_least(1))
    updates_per_iteration: int = setting(1, "batches drawn an iteration", at_least(1))
    reuse_per_batch: int = setting(
        1,
        "updates made with each batch; the policy's loss is scaled by 1/sqrt(reuse index + 1)",
        at_least(1),
    )
    policy_delay: int = of_control(
        1, "the policy takes part in every n-th update with a batch", at_least(1)
    )
    max_buffer_size: int | None = setting(
        None,
        "transitions allocated for replay, at least the largest buffer size; a sweep finds it out",
        optional(at_least(1), "None for the default buffer size"),
    )
    sampling: str = setting(
        "shuffled",
        "how batches are drawn: without replacement (shuffled), or with (uniform)",
        one_of(*SAMPLING_MODES),
    )
    advantage_mode: str = of_control(
        "stored",
        "advantages: stored at collection, recomputed by the current critic, or V-trace",
        one_of(*ADVANTAGE_MODES),
    )
    normalize_advantage: bool | None = setting(
        None,
        "standardise advantages in each batch; by default yes, but no on token tasks, where it"
        " would blow up the small differences between answers that are nearly all right",
        optional(flag),
        applies=[_NO_PAIRS],
    )
    normalize_groups: bool = of_tokens(
        False,
        "divide advantages by the standard deviation of rewards over the answers to each prompt, as"
        " GRPO does",
        flag,
        applies=[_REWARD],
    )
    ratio_level: str | None = setting(
        None,
        "importance ratio of each token, of the whole action or answer (joint), of a sequence, or"
        " ratio_norm for flows; by default the objective's own, which is token for most",
        optional(one_of(*RATIO_LEVELS), "None for the objective's own"),
    )
    kl: str = of_control(
        "sampled",
        "KL penalty: estimated at the sampled action, or exact, for which replay keeps the"
        " behaviour policy's outputs",
        one_of("sampled", "exact"),
    )
    loss_agg_mode: str = of_tokens(
        "token-mean",
        "mean of the policy's loss over tokens, or over answers of the sum or the mean of each"
        " one's tokens",
        one_of(*LOSS_AGG_MODES),
        applies=[_NO_PAIRS],
    )
    selection: Any = of_tokens(
        "keep_all",
        "which prompts are answered, or which answers are learned from",
        function_or_name("keep_all, depo, prune, low_margin or a function"),
    )
    num_candidates: int | None = of_tokens(
        None,
        "prompts drawn an iteration for a selection of prompts to choose num_envs from; by default"
        " 4 times as many",
        optional(at_least(1)),
    )
    depo_range: tuple[float, float] = of_tokens(
        (0.15, 0.85),
        "lowest and highest estimated share of right answers to a prompt that is answered",
        part_of_unit_interval,
        applies=[_DEPO],
    )
    depo_start: int = of_tokens(
        100, "iterations in which the estimate only learns", at_least(0), applies=[_DEPO]
    )
    depo_learning_rate: float = of_tokens(
        1e-3, "learning rate of the estimate", positive, applies=[_DEPO]
    )
    depo_updates: int = of_tokens(
        4, "updates of the estimate an iteration", at_least(1), applies=[_DEPO]
    )
    packed_size: int | None = of_tokens(
        None,
        "rows that an update computes, each as wide as the longest prompt with its answer: short"
        " answers are joined in them, and of those that do not fit a random part is taken; by"
        " default batch_size, and half of it under a selection of answers",
        optional(at_least(1)),
    )
    decoder_layers: int = of_tokens(3, "layers of the transformer", at_least(1))
    decoder_width: int = of_tokens(
        64,
        "width of the transformer, which its heads divide; its feed-forward part is twice as wide",
        at_least(1),
    )
    decoder_heads: int = of_tokens(4, "attention heads of the transformer", at_least(1))
    timestep_shift: float | None = setting(
        None,
        "s in the times s t / (1 + (s - 1) t) of a flow's steps; 1 for equal steps",
        optional(positive, "None for the task's own"),
        domains=[FLOW],
    )
    action_head: str = of_control(
        "auto",
        "head for Box actions: tokens (categorical bins) or gaussian; auto takes tokens",
        one_of(*ACTION_HEADS),
    )
    num_bins: int = of_control(
        11, "bins for each action dimension with tokens", at_least(2), applies=[_BINS]
    )
    hidden_sizes: tuple[int, ...] = setting(
        (64, 64), "widths of the hidden layers", sizes_of_layers(1), domains=[CONTROL, FLOW]
    )
    value_hidden_sizes: tuple[int, ...] = of_control(
        (),
        "widths of the value function's own hidden layers; none given, as the policy's",
        sizes_of_layers(0),
    )
    activation: str = setting("tanh", "activation", one_of(*ACTIVATIONS), domains=[CONTROL, FLOW])
    layer_norm: bool = setting(
        False, "LayerNorm after each hidden activation", flag, domains=[CONTROL, FLOW]
    )
    shared_torso: bool = of_control(False, "policy and value share the first layers", flag)
    detach_value: bool = of_control(
        True, "with a shared torso, the value head does not train it", flag, applies=[_SHARED]
    )
    mlp: str = of_control(
        "layers",
        "dense networks layer by layer, or fused: in one kernel each way, which on accelerators"
        " keeps hidden activations on the chip and on CPU is only slow",
        one_of("layers", "fused"),
        applies=[_FUSED],
    )
    compute_dtype: str = setting(
        "float32", "type of the numbers in which networks compute", one_of(*DTYPES)
    )
    param_dtype: str = setting(
        "float32", "type of the numbers that keep parameters and optimizer state", one_of(*DTYPES)
    )
    normalize_obs: bool = of_control(
        False, "standardise observations with running statistics", flag
    )
    truncation_is_termination: bool = of_control(
        False, "treat a time limit as termination (no bootstrap)", flag
    )
    max_episode_steps: int | None = of_control(
        None, "time limit; None keeps the environment's own", optional(at_least(1), "None")
    )
    joint_grad_norm: bool = of_control(False, "one gradient norm over policy and value", flag)
    schedule: str = setting("linear", "learning-rate decay over the run", one_of(*SCHEDULES))
    num_logs: int = setting(20, "points logged a run", at_least(1))
    eval_episodes: int | None = setting(
        None,
        "greedy and sampled evaluation episodes at each logged point; by default 10, 128 prompts"
        " of a token task, and 0 in an EnvPool environment, where each is simulated anew (500 steps"
        " in Meta-World); experiments score eval_return_sampled over 32 or more, since the mean of"
        " training episodes counts short ones too often and lags",
        optional(at_least(0)),
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
        return self.max_buffer_size or self.default_buffer_size

    @property
    def default_buffer_size(self) -> int:
        """The buffer size that is not given: the default, filled up to whole blocks."""
        return -(-DEFAULT_BUFFER_SIZE // self.block_size) * self.block_size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class HParams:
    """Traced settings: scalars that only change numbers, as a pytree that a sweep can stack."""

    seed: Scalar = setting(0, "seed of the run", index, integer=True)
    buffer_size: Scalar = setting(
        DEFAULT_BUFFER_SIZE,
        "transitions (answers, chains) kept for replay; the default fills up whole iterations",
        count,
        integer=True,
    )
    min_age: Scalar = setting(
        0, "newest iterations of data held back from sampling", index, integer=True
    )
    learning_rate: Scalar = setting(6e-4, "learning rate of the policy", positive)
    value_learning_rate: Scalar = of_control(
        None,
        "learning rate of the value function; None takes the policy's",
        optional(positive, "None"),
        follows="learning_rate",
    )
    gamma: Scalar = of_control(0.99, "discount", unit_interval)
    gae_lambda: Scalar = of_control(
        0.95, "decay of generalised advantage estimation", unit_interval, applies=[_TRACES]
    )
    entropy_coef: Scalar = setting(
        0.03, "weight of the entropy bonus", not_negative, domains=[CONTROL, TOKENS]
    )
    kl_coef: Scalar = setting(0.0, "weight of the penalty KL(behavior || policy)", not_negative)
    value_coef: Scalar = of_control(0.5, "weight of the squared value error", positive)
    max_grad_norm: Scalar = setting(
        0.5,
        "global gradient norm, for policy and value apart unless joint_grad_norm is on",
        positive,
    )
    adam_epsilon: Scalar = setting(
        1e-5, "what Adam adds to the root of the second moment", positive
    )
    warmup_iterations: Scalar = setting(
        0, "iterations of linear learning-rate warm-up", index, integer=True
    )
    reward_scale: Scalar = setting(
        1.0, "factor on rewards before learning", positive, applies=[_REWARD, _REWARD_COUNTS]
    )
    recent_fraction: Scalar = setting(
        0.0, "part of each batch drawn from the newest iteration only", unit_interval
    )
    ess_lr_power: Scalar = setting(
        0.0,
        "policy learning rate times (ESS / batch) to this power; 0.5 is the square-root rule",
        not_negative,
    )
    temperature: Scalar = of_tokens(
        1.0, "temperature of the policy, when it samples and when it learns", positive
    )
    imitation_updates: Scalar = of_tokens(
        0, "updates on demonstrations before reinforcement learning", index, integer=True
    )
    env_params: dict[str, Scalar] | None = of_control(
        None,
        "parameters of the environment by name, those that do not decide its spaces",
        optional(
            Validator(
                "finite numbers by name",
                lambda v: isinstance(v, dict) and all(map(is_finite, v.values())),
            ),
            "None",
        ),
    )
    objective_params: dict[str, Scalar] = dataclasses.field(default_factory=dict)


def stack(hparams: Sequence[HParams]) -> HParams:
    """Settings of several runs as one pytree of NumPy arrays ``[runs]``."""
    integers = {f.name for f in dataclasses.fields(HParams) if f.metadata.get("integer")}

    def column(path: Any, *values: Any) -> np.ndarray:
        integer = jax.tree_util.keystr(path, simple=True) in integers
        return np.asarray(values, np.int32 if integer else np.float32)

    return jax.tree_util.tree_map_with_path(column, *hparams)


# The checks.


def check_fields(settings: Any) -> None:
    """Checks every field of a dataclass made of ``setting`` fields; raises ConfigError."""
    for field in dataclasses.fields(settings):
        check = field.metadata.get("check")
        value = getattr(settings, field.name)
        if check is not None and not check(value):
            raise ConfigError(field.name, value, check.valid)


def check_applies(
    config: Config, hparams: HParams | None = None, *, domain: str, objective: Needs
) -> None:
    """Refuses every setting that would do nothing: one that is not at its default and has no use.

    What depends on the environment, task or selection itself is theirs to check.
    """
    case = Case(config, objective, domain)
    for settings in (config, hparams) if hparams is not None else (config,):
        for field in dataclasses.fields(settings):
            meta, value = field.metadata, getattr(settings, field.name)
            if not meta or value == field.default:
                continue
            if meta["follows"] and value == getattr(settings, meta["follows"]):
                continue
            reasons = [c.reason for c in meta["applies"] if not c.holds(case)]
            if domain not in meta["domains"]:
                reasons = [f"{DOMAINS[domain]} do not use it"]
            if reasons:
                raise ConfigError(field.name, value, f"left at {field.default!r}: {reasons[0]}")


def check_sizes(config: Config, hparams: HParams) -> None:
    """Checks the rules that tie sizes and counts together; raises ConfigError."""
    block, batch, reuse = config.block_size, config.batch_size, config.reuse_per_batch
    size, age = int(hparams.buffer_size), int(hparams.min_age)
    product = f"num_envs {config.num_envs} x rollout_length {config.rollout_length} = {block}"
    allocated, segments = config.max_buffer_size, config.advantage_mode != "stored"
    held_back = f" beside the {age * block} held back by min_age {age}" if age else ""

    def multiple(value: int) -> str:
        return f"multiple of {product}, such as {max(value // block, 1) * block}"

    rules = (
        ("total_steps", config.total_steps % block == 0, f"a {multiple(config.total_steps)}"),
        (
            "total_steps",
            config.num_iterations < 2**31,
            f"fewer than 2^31 iterations of {product}",
        ),
        (
            "policy_delay",
            reuse % config.policy_delay == 0,
            f"a divisor of reuse_per_batch {reuse}, because the delay starts anew with each batch",
        ),
        ("buffer_size", size >= block and size % block == 0, f"a positive {multiple(size)}"),
        (
            "max_buffer_size",
            allocated is None or (allocated >= size and allocated % block == 0),
            f"a multiple of {product} and at least the buffer size {size}",
        ),
        (
            "min_age",
            age * block < size,
            f"less than the {size // block} iterations that buffer_size {size} holds",
        ),
        (
            "buffer_size",
            config.sampling != "shuffled" or size - age * block >= batch,
            f"at least batch_size {batch}{held_back}, which is drawn without replacement"
            " (or sampling 'uniform')",
        ),
        (
            "batch_size",
            not segments or batch % config.rollout_length == 0,
            f"a multiple of rollout_length {config.rollout_length}, because advantage_mode"
            f" {config.advantage_mode!r} samples whole segments",
        ),
    )
    values = vars(config) | {"buffer_size": size, "min_age": age}
    for field, holds, valid in rules:
        if not holds:
            raise ConfigError(field, values[field], valid)
