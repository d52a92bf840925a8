"""Policy and value networks (flax), and the action heads that turn outputs into distributions."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gipo_jax import cpu
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


def categorical(num_tokens: int, bins: int) -> ActionHead:
    """The head of ``num_tokens`` tokens with ``bins`` categories each; actions stay tokens."""

    def noise(key: Array, shape: tuple[int, ...]) -> Array:
        return jax.random.uniform(key, (*shape, num_tokens))

    def sample(logits: Array, uniform: Array) -> Array:
        # Inverse of the distribution function: one random number a token instead of one a bin.
        cumulative = jnp.cumsum(jax.nn.softmax(logits), axis=-1)
        # Scaled by the rounded total, so that no number falls behind the last bin.
        threshold = uniform[..., None] * cumulative[..., -1:]
        return jnp.sum(threshold >= cumulative, axis=-1, dtype=jnp.int32)

    axis = cpu.category_axis(bins)

    def log_prob(logits: Array, action: Array) -> Array:
        logits = jnp.moveaxis(logits, -1, axis)
        # A one-hot product: the gradient of a gather is a scatter, which is serial on CPU.
        chosen = jax.nn.one_hot(action, bins, dtype=logits.dtype, axis=axis)
        return jnp.sum(logits * chosen, axis=axis) - jax.nn.logsumexp(logits, axis=axis)

    def entropy(logits: Array) -> Array:
        logits = jnp.moveaxis(logits, -1, axis)
        # The sum is that of log_prob, and so computed once.
        log_probs = logits - jax.nn.logsumexp(logits, axis=axis, keepdims=True)
        return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=axis)

    def kl(old_logits: Array, logits: Array) -> Array:
        old_log_probs, log_probs = (
            jax.nn.log_softmax(jnp.moveaxis(x, -1, axis), axis=axis) for x in (old_logits, logits)
        )
        return jnp.sum(jnp.exp(old_log_probs) * (old_log_probs - log_probs), axis=axis)

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
            for layer in _LARGE if min(x.shape[-3:-1]) >= LARGE_IMAGE else _SMALL:
                x = _convolution(x, *layer, self.precision)
            x = x.reshape(*x.shape[:-3], -1)
        for size in self.hidden_sizes:
            x = activation(dense(size, np.sqrt(2.0), self.precision)(x))
            if self.layer_norm:
                x = norm(self.precision)(x)
        return x


_SMALL = ((16, 3, 1),)  # 3 x 3, as for MinAtar (arXiv:1903.03176)
_LARGE = ((32, 8, 4), (64, 4, 2), (64, 3, 1))  # DQN on Atari (Mnih et al., Nature, 2015)


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
    return nn.relu(dense(channels, np.sqrt(2.0), precision)(jnp.concatenate(patches, -1)))


class PolicyOutput(nn.Module):
    """Last layer of the policy; a Gaussian's spread does not depend on the observation."""

    num_tokens: int
    width: int
    discrete: bool
    precision: Precision = FLOAT32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.discrete:
            outputs = dense(self.num_tokens * self.width, 0.01, self.precision)(x)
            return outputs.reshape(*x.shape[:-1], self.num_tokens, self.width)
        mean = dense(self.num_tokens, 0.01, self.precision)(x)
        first = nn.initializers.constant(-0.5)
        log_std = self.param("log_std", first, (self.num_tokens,), self.precision.param)
        log_std = log_std.astype(mean.dtype)
        return jnp.stack([mean, jnp.broadcast_to(log_std, mean.shape)], axis=-1)


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

    A shared torso is in the policy's group. Observations are floats ``[..., *obs_shape]``.
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

    def layers(sizes: tuple[int, ...], first: bool) -> Torso:
        return Torso(sizes, config.activation, config.layer_norm, conv and first, types)

    torso = layers(shared, first=True)
    policy_tower = layers(own, first=not config.shared_torso)
    value_tower = layers(value_own, first=not config.shared_torso)
    policy_output = PolicyOutput(head.num_tokens, head.output_width, head.discrete, types)
    value_output = dense(1, 1.0, types)

    def flat(obs: Array) -> Array:
        if conv:
            return obs
        return obs.reshape(*obs.shape[: obs.ndim - obs_rank], -1)

    def features(params: Params, obs: Array) -> Array:
        if not config.shared_torso:
            return flat(obs)
        return _apply(torso, params["policy"]["torso"], flat(obs))

    def policy_from(params: Params, x: Array) -> Array:
        x = _apply(policy_tower, params["policy"]["tower"], x)
        return at_least_single(_apply(policy_output, params["policy"]["output"], x))

    def value_from(params: Params, x: Array) -> Array:
        if config.shared_torso and config.detach_value:
            x = jax.lax.stop_gradient(x)
        x = _apply(value_tower, params["value"]["tower"], x)
        return at_least_single(_apply(value_output, params["value"]["output"], x)[..., 0])

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
