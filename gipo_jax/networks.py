"""Policy and value networks (flax), and the action heads that turn outputs into distributions."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gipo_jax import cpu, fused
from gipo_jax.config import Config, ConfigError
from gipo_jax.environments import Environment

Params = Any

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": jnp.tanh,
    "relu": nn.relu,
    "silu": nn.silu,
    "elu": nn.elu,
}


class ActionHead(NamedTuple):
    """A factorised action distribution; every function works on any leading shape.

    An action is ``num_tokens`` independent tokens. ``outputs`` has shape
    ``[..., num_tokens, output_width]``, actions and log-probabilities ``[..., num_tokens]``.
    """

    num_tokens: int  # action dimensions; 1 for discrete actions
    output_width: int  # network outputs for each token
    discrete: bool  # whether tokens are categories
    noise: Callable[[Array, tuple[int, ...]], Array]  # key, leading shape -> noise of sample
    sample: Callable[[Array, Array], Array]  # outputs, noise -> action
    mode: Callable[[Array], Array]  # outputs -> most likely action
    log_prob: Callable[[Array, Array], Array]  # outputs, action -> log-probability of each token
    entropy: Callable[[Array], Array]  # outputs -> entropy of each token, in nats
    kl: Callable[[Array, Array], Array]  # old outputs, outputs -> KL(old || new) of each token
    to_env: Callable[[Array], Array]  # action -> what the environment's step takes


def make_head(config: Config, env: Environment) -> ActionHead:
    """The head for an environment's actions. Raises ConfigError."""
    if env.num_actions is not None:
        if config.action_head == "gaussian":
            valid = f"'auto' or 'tokens', because {env.name} has discrete actions"
            raise ConfigError("action_head", config.action_head, valid)
        return categorical(1, env.num_actions)._replace(to_env=lambda action: action[..., 0])

    assert env.action_low is not None and env.action_high is not None
    low, high = env.action_low, env.action_high
    bounded = bool(np.all(np.isfinite(low)) and np.all(np.isfinite(high)))

    def shaped(action: Array) -> Array:
        return action.reshape(*action.shape[:-1], *env.action_shape)

    if config.action_head == "gaussian":
        centre, half = ((low + high) / 2, (high - low) / 2) if bounded else (0.0, 1.0)
        return _gaussian(
            len(low), lambda action: shaped(jnp.clip(centre + half * action, low, high))
        )
    if not bounded:
        valid = f"'gaussian', because {env.name} has unbounded actions"
        raise ConfigError("action_head", config.action_head, valid)
    step = (high - low) / (config.num_bins - 1)
    return categorical(len(low), config.num_bins)._replace(
        to_env=lambda action: shaped(low + step * action)
    )


FEW_CATEGORIES = 8


def categorical(num_tokens: int, bins: int) -> ActionHead:
    """The head of ``num_tokens`` tokens with ``bins`` categories each; actions stay tokens."""
    # Few categories are an array each: XLA fuses sums over them with all around, and on CPU it is
    # slow over a last axis of few entries. Many are one array.
    few = bins <= FEW_CATEGORIES
    categories = range(bins) if few else [jnp.arange(bins)]

    def parts(x: Array) -> Sequence[Array]:
        return jnp.unstack(x, axis=-1) if few else [x]

    def whole(x: Array) -> Array:
        """What stands beside each part: a number of each token, ``[..., num_tokens]``."""
        return x if few else x[..., None]

    def total(x: Iterable[Array]) -> Array:
        return functools.reduce(jnp.add, x) if few else jnp.sum(next(iter(x)), axis=-1)

    def largest(x: Sequence[Array]) -> Array:
        most = functools.reduce(jnp.maximum, x) if few else jnp.max(x[0], axis=-1)
        return jax.lax.stop_gradient(most)

    def log_total(logits: Sequence[Array]) -> Array:
        most = largest(logits)
        return jnp.log(total(jnp.exp(x - whole(most)) for x in logits)) + most

    def log_probs(logits: Array) -> Sequence[Array]:
        separate = parts(logits)
        return [x - whole(log_total(separate)) for x in separate]

    def noise(key: Array, shape: tuple[int, ...]) -> Array:
        return jax.random.uniform(key, (*shape, num_tokens))

    def sample(logits: Array, uniform: Array) -> Array:
        # Inverse of the distribution function: one random number a token instead of one a bin.
        separate = parts(logits)
        most = whole(largest(separate))
        unnormalised = [jnp.exp(x - most) for x in separate]
        scale = whole(total(unnormalised))
        probability = [x / scale for x in unnormalised]
        if few:
            cumulative = list(itertools.accumulate(probability))
        else:
            cumulative = [jnp.cumsum(probability[0], axis=-1)]
        # Scaled by the rounded total, so that no number falls behind the last bin.
        threshold = whole(uniform * (cumulative[-1] if few else cumulative[0][..., -1]))
        return total((threshold >= x).astype(jnp.int32) for x in cumulative)

    def log_prob(logits: Array, action: Array) -> Array:
        # A one-hot product: the gradient of a gather is a scatter, which is serial on CPU.
        separate, action = parts(logits), whole(action)
        pairs = zip(separate, categories, strict=True)
        chosen = total(x * (action == category) for x, category in pairs)
        return chosen - log_total(separate)

    def entropy(logits: Array) -> Array:
        # The sum is that of log_prob, and so computed once.
        return -total(jnp.exp(x) * x for x in log_probs(logits))

    def kl(old_logits: Array, logits: Array) -> Array:
        pairs = zip(log_probs(old_logits), log_probs(logits), strict=True)
        return total(jnp.exp(old) * (old - new) for old, new in pairs)

    def mode(logits: Array) -> Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return ActionHead(
        num_tokens, bins, True, noise, sample, mode, log_prob, entropy, kl, lambda action: action
    )


def _gaussian(dimensions: int, to_env: Callable[[Array], Array]) -> ActionHead:
    def noise(key: Array, shape: tuple[int, ...]) -> Array:
        return jax.random.normal(key, (*shape, dimensions))

    def sample(outputs: Array, normal: Array) -> Array:
        return outputs[..., 0] + jnp.exp(outputs[..., 1]) * normal

    def log_prob(outputs: Array, action: Array) -> Array:
        mean, log_std = outputs[..., 0], outputs[..., 1]
        scaled = (action - mean) * jnp.exp(-log_std)
        return -0.5 * scaled**2 - log_std - 0.5 * np.log(2 * np.pi)

    def entropy(outputs: Array) -> Array:
        return outputs[..., 1] + 0.5 * np.log(2 * np.pi * np.e)

    def kl(old_outputs: Array, outputs: Array) -> Array:
        mean, log_std = old_outputs[..., 0] - outputs[..., 0], outputs[..., 1]
        log_ratio = old_outputs[..., 1] - log_std
        return 0.5 * (jnp.exp(2 * log_ratio) + (mean * jnp.exp(-log_std)) ** 2 - 1) - log_ratio

    return ActionHead(
        dimensions, 2, False, noise, sample, lambda outputs: outputs[..., 0], log_prob, entropy,
        kl, to_env,
    )  # fmt: skip


LARGE_IMAGE = 36  # Images from this height and width on go through strided convolutions


class Precision(NamedTuple):
    """Types of numbers: those that layers compute in, None for their inputs', and parameters'."""

    compute: str | None
    param: str


FLOAT32 = Precision(None, "float32")


def precision(config: Config) -> Precision:
    """The types of numbers of a configuration."""
    both = Precision(config.compute_dtype, config.param_dtype)
    return FLOAT32 if set(both) == {"float32"} else both


def at_least_single(x: Array) -> Array:
    """Outputs of a network in at least single precision, for probabilities and values."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def exact(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with float32 products of 24 bits, for what enters a log-probability.

    Recent GPUs keep 11 bits and TPUs 8 by default: a ratio of policies would then differ from 1 on
    the data of the very same policy.
    """

    @functools.wraps(function)
    def precise(*arguments: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return function(*arguments)

    return precise


class Torso(nn.Module):
    """Hidden layers: for images convolutions first, then dense layers."""

    hidden_sizes: tuple[int, ...]
    activation: str
    layer_norm: bool
    conv: bool
    precision: Precision = FLOAT32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        activation = _ACTIVATIONS[self.activation]
        if self.conv:
            for layer in _layers(x.shape):
                x = _convolution(x, *layer, self.precision)
            x = x.reshape(*x.shape[:-3], -1)
        for size in self.hidden_sizes:
            x = activation(dense(size, np.sqrt(2.0), self.precision)(x))
            if self.layer_norm:
                x = norm(self.precision)(x)
        return x


_SMALL = ((16, 3, 1),)  # 3 x 3, as for MinAtar (arXiv:1903.03176)
_LARGE = ((32, 8, 4), (64, 4, 2), (64, 3, 1))  # DQN on Atari (Mnih et al., Nature, 2015)


def _layers(shape: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    """Channels, kernel and stride of each convolution of images ``[..., height, width, _]``."""
    return _LARGE if min(shape[-3:-1]) >= LARGE_IMAGE else _SMALL


def image_numbers(obs_shape: tuple[int, ...], towers: int) -> int:
    """About how many numbers an update keeps for the convolutions of an image."""
    height, width, channels = obs_shape
    total, sources = 0, 1
    for out, kernel, stride in _layers(obs_shape):
        height, width = ((size - kernel) // stride + 1 for size in (height, width))
        # Patches, at first the same for all towers, and outputs with their gradients.
        total += height * width * (sources * kernel**2 * channels + 2 * towers * out)
        channels, sources = out, towers
    return total


def _convolution(x: Array, channels: int, kernel: int, stride: int, precision: Precision) -> Array:
    """A convolution and its ReLU, without padding; the side of its kernel is a multiple of the
    stride.
    """
    # A dense layer over patches. XLA on CPU is slow at the gradient of a convolution inside a loop
    # (measured: 23 times), and at one whose kernels differ by run, as under vmap.
    height, width = ((size - kernel) // stride + 1 for size in x.shape[-3:-1])
    steps = kernel // stride
    rows, columns = height + steps - 1, width + steps - 1
    blocks = x[..., : rows * stride, : columns * stride, :]
    blocks = blocks.reshape(*x.shape[:-3], rows, stride, columns, stride, x.shape[-1])
    blocks = blocks.swapaxes(-4, -3).reshape(*x.shape[:-3], rows, columns, -1)
    shifts = itertools.product(range(steps), repeat=2)
    patches = [blocks[..., i : i + height, j : j + width, :] for i, j in shifts]
    layer = dense(channels, np.sqrt(2.0), precision)
    return nn.relu(layer(numbers(jnp.concatenate(patches, -1))))


def numbers(x: Array) -> Array:
    """Observations as numbers: flags as 0 and 1, bytes from 0 to 1; others as they are."""
    if x.dtype == jnp.uint8:
        return x.astype(jnp.float32) / 255.0
    return x.astype(jnp.float32) if x.dtype == bool else x


class PolicyOutput(nn.Module):
    """Last layer of the policy; a Gaussian's spread does not depend on the observation."""

    num_tokens: int
    width: int
    discrete: bool
    precision: Precision = FLOAT32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        columns = self.num_tokens * (self.width if self.discrete else 1)
        x = dense(columns, 0.01, self.precision)(x)
        if self.discrete:
            return self.shaped(x)
        first = nn.initializers.constant(-0.5)
        return self.shaped(
            x, self.param("log_std", first, (self.num_tokens,), self.precision.param)
        )

    @nn.nowrap
    def shaped(self, x: Array, log_std: Array | None = None) -> Array:
        """Outputs of the head, ``[..., num_tokens, width]``, from those of the dense layer."""
        if log_std is None:
            return x.reshape(*x.shape[:-1], self.num_tokens, self.width)
        return jnp.stack([x, jnp.broadcast_to(log_std.astype(x.dtype), x.shape)], axis=-1)


def dense(size: int, scale: float, precision: Precision) -> nn.Dense:
    """A dense layer with orthogonal initial weights."""
    return nn.Dense(
        size,
        dtype=precision.compute,
        param_dtype=precision.param,
        kernel_init=cpu.orthogonal(scale),
        dot_general=cpu.dot_general(size),
    )


def norm(precision: Precision) -> nn.LayerNorm:
    """A LayerNorm."""
    return nn.LayerNorm(dtype=precision.compute, param_dtype=precision.param)


class Network(NamedTuple):
    """Policy and value as pure functions of ``params = {"policy": ..., "value": ...}``.

    A shared torso is in the policy's group. Observations ``[..., *obs_shape]`` are of any type that
    ``numbers`` takes.
    """

    init: Callable[[Array], Params]  # key -> params
    policy: Callable[[Params, Array], Array]  # params, obs -> outputs [..., tokens, width]
    value: Callable[[Params, Array], Array]  # params, obs -> [...]
    policy_and_value: Callable[[Params, Array], tuple[Array, Array]]  # both; a torso once


def make(config: Config, obs_shape: tuple[int, ...], head: ActionHead) -> Network:
    """Builds the network of a configuration.

    Separate towers take ``hidden_sizes`` each. A shared torso takes all but the last of them, and
    policy and value have a last hidden layer of their own. ``value_hidden_sizes`` replaces the
    value's part.
    """
    # A convolution would leave nothing of an image narrower than its kernel.
    conv = len(obs_shape) == 3 and min(obs_shape[:2]) >= 3
    types = precision(config)
    if config.shared_torso and not conv and len(config.hidden_sizes) == 1:
        valid = "False with one hidden size, because all but the last are shared"
        raise ConfigError("shared_torso", True, valid)
    obs_rank = len(obs_shape)
    shared, own = config.hidden_sizes[:-1], config.hidden_sizes[-1:]
    if not config.shared_torso:
        shared, own = (), config.hidden_sizes
    value_own = config.value_hidden_sizes or own
    if config.mlp == "fused":
        if conv:
            raise ConfigError("mlp", config.mlp, "'layers', because observations are images")
        outputs = head.num_tokens * (head.output_width if head.discrete else 1)
        fused.check((math.prod(obs_shape), *own, outputs))
        fused.check((math.prod(obs_shape), *value_own, 1))

    def layers(sizes: tuple[int, ...], first: bool) -> Torso:
        return Torso(sizes, config.activation, config.layer_norm, conv and first, types)

    torso = layers(shared, first=True)
    policy_tower = layers(own, first=not config.shared_torso)
    value_tower = layers(value_own, first=not config.shared_torso)
    policy_output = PolicyOutput(head.num_tokens, head.output_width, head.discrete, types)
    value_output = dense(1, 1.0, types)

    def flat(obs: Array) -> Array:
        if conv:
            # Patches of bytes, which repeat each of them, are a quarter of those of numbers.
            return obs
        return numbers(obs).reshape(*obs.shape[: obs.ndim - obs_rank], -1)

    @exact
    def features(params: Params, obs: Array) -> Array:
        if not config.shared_torso:
            return flat(obs)
        return _apply(torso, params["policy"]["torso"], flat(obs))

    @exact
    def policy_from(params: Params, x: Array) -> Array:
        if config.mlp == "fused":
            output = params["policy"]["output"]["params"]
            x = in_one_kernel(params["policy"]["tower"], output["Dense_0"], x)
            return policy_output.shaped(x, output.get("log_std"))
        x = _apply(policy_tower, params["policy"]["tower"], x)
        return at_least_single(_apply(policy_output, params["policy"]["output"], x))

    def value_from(params: Params, x: Array) -> Array:
        if config.shared_torso and config.detach_value:
            x = jax.lax.stop_gradient(x)
        if config.mlp == "fused":
            output = params["value"]["output"]["params"]
            return in_one_kernel(params["value"]["tower"], output, x)[..., 0]
        x = _apply(value_tower, params["value"]["tower"], x)
        return at_least_single(_apply(value_output, params["value"]["output"], x)[..., 0])

    def in_one_kernel(tower: Params, output: Params, x: Array) -> Array:
        hidden = [tower["params"][f"Dense_{i}"] for i in range(len(tower["params"]))]
        layers = tuple((layer["kernel"], layer["bias"]) for layer in (*hidden, output))
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        y = fused.mlp(_ACTIVATIONS[config.activation], layers, rows)
        return y.reshape(*x.shape[:-1], -1)

    def init(key: Array) -> Params:
        key_torso, key_policy, key_output, key_value, key_value_output = jax.random.split(key, 5)
        x = flat(jnp.zeros(obs_shape))
        params: Params = {"policy": {}, "value": {}}
        if config.shared_torso:
            params["policy"]["torso"], x = _init(torso, key_torso, x)
        params["policy"]["tower"], hidden = _init(policy_tower, key_policy, x)
        params["policy"]["output"], _ = _init(policy_output, key_output, hidden)
        params["value"]["tower"], hidden = _init(value_tower, key_value, x)
        params["value"]["output"], _ = _init(value_output, key_value_output, hidden)
        return params

    def policy_and_value(params: Params, obs: Array) -> tuple[Array, Array]:
        x = features(params, obs)
        return policy_from(params, x), value_from(params, x)

    return Network(
        init=init,
        policy=lambda params, obs: policy_from(params, features(params, obs)),
        value=lambda params, obs: value_from(params, features(params, obs)),
        policy_and_value=policy_and_value,
    )


def _apply(module: nn.Module, params: Params, x: Array) -> Array:
    output: Any = module.apply(params, x)
    return output


def _init(module: nn.Module, key: Array, x: Array) -> tuple[Params, Array]:
    """Parameters of a module, and its output's shape as zeros for the module after it."""
    output, params = module.init_with_output(key, x)
    return params, jnp.zeros_like(output)
