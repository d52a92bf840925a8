"""Flow matching, and the SDE that samples a flow with Gaussian steps.

Times, signs and noise are Flow-GRPO's (arXiv:2505.05470). A point x_0 of the density and noise eps
give x_t = (1 - t) x_0 + t eps, and the flow's velocity v(x, t) is the mean of eps - x_0 given x_t.
Samples go from t = 1, pure noise, to t = 0. With a step of length dt, the ODE and the SDE with the
same densities at every t are

    x_(t - dt) = x - v dt
    x_(t - dt) = x - [v + sigma_t^2 / (2 t) (x + (1 - t) v)] dt + sigma_t sqrt(dt) eps

with sigma_t = a sqrt(t / (1 - t)); at t = 1, where that is infinite, 1 - t is taken one step later,
as in Flow-GRPO's code. With a = 0 the SDE is the ODE. Each step of the SDE is a Gaussian of mean mu
and standard deviation s = sigma_t sqrt(dt), so a policy of steps has ratios.

The log-ratio of a step is that of its density, the sum over both dimensions. Flow-GRPO's code
(github.com/yifan123/flow_grpo) has the mean over dimensions instead, here half of it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

from gipo_jax import networks
from gipo_jax.config import Config
from gipo_jax.domains.flow.tasks import Task

Velocity = Callable[[Array, Array], Array]  # points [..., 2], times [...] -> velocities [..., 2]

_TIME_FREQUENCIES = np.pi * np.array([0.5, 1.0, 2.0])
_POINT_FREQUENCIES = np.array([1.0, 2.0, 4.0])


class VelocityField(nn.Module):
    """A multi-layer perceptron of the point, with sines and cosines of it and of the time.

    Without the sines a small network fits a ring, but not the modes on it, in a few hundred steps.
    """

    hidden_sizes: tuple[int, ...]
    activation: str
    layer_norm: bool
    precision: networks.Precision = networks.FLOAT32

    @nn.compact
    def __call__(self, points: Array, times: Array) -> Array:
        place = points[..., None] * jnp.asarray(_POINT_FREQUENCIES, jnp.float32)
        time = times[..., None] * jnp.asarray(_TIME_FREQUENCIES, jnp.float32)
        phase = jnp.concatenate([place.reshape(*place.shape[:-2], -1), time], axis=-1)
        x = jnp.concatenate([points, jnp.sin(phase), jnp.cos(phase)], axis=-1)
        x = networks.Torso(
            self.hidden_sizes, self.activation, self.layer_norm, False, self.precision
        )(x)
        return networks.at_least_single(networks.dense(2, 1.0, self.precision)(x))


def velocity_field(config: Config) -> VelocityField:
    """The network of a configuration: its hidden layers and types of numbers."""
    types = networks.precision(config)
    return VelocityField(config.hidden_sizes, config.activation, config.layer_norm, types)


class Chain(NamedTuple):
    """Samples with the steps that led to them."""

    points: Array  # x at t = 1, after every step, and at t = 0, [..., steps + 1, 2]
    mean: Array  # mu of each step, [..., steps, 2]
    log_prob: Array  # log-density of each step, [..., steps]


class Schedule(NamedTuple):
    """Times of the steps and what follows from them, NumPy arrays ``[steps]``."""

    time: np.ndarray  # t before the step, from 1 down, > 0
    dt: np.ndarray  # length of the step, > 0; they add up to 1
    sigma: np.ndarray  # noise sigma_t, >= 0
    std: np.ndarray  # standard deviation of the step, s = sigma_t sqrt(dt)


def schedule(task: Task, noise_level: float | None = None) -> Schedule:
    """The steps of a task, with a ``noise_level`` >= 0 in place of its own if given."""
    level = task.noise_level if noise_level is None else noise_level
    linear = np.linspace(1, 0, task.steps + 1)
    times = task.shift * linear / (1 + (task.shift - 1) * linear)
    time, dt = times[:-1], -np.diff(times)
    before_noise = np.where(time == 1, times[1], time)
    sigma = level * np.sqrt(time / (1 - before_noise))
    return Schedule(*(x.astype(np.float32) for x in (time, dt, sigma, sigma * np.sqrt(dt))))


def step_mean(
    velocity: Velocity, points: Array, time: ArrayLike, dt: ArrayLike, sigma: ArrayLike
) -> Array:
    """Mean mu of a step of the SDE from ``points [..., 2]``; the other arrays broadcast to
    ``[...]``.
    """
    v = velocity(points, jnp.broadcast_to(time, points.shape[:-1]))
    t, dt, sigma = (jnp.asarray(x)[..., None] for x in (time, dt, sigma))
    return points - (v + sigma**2 / (2 * t) * (points + (1 - t) * v)) * dt


def chain_means(velocity: Velocity, steps: Schedule, points: Array) -> Array:
    """Means ``[..., steps, 2]`` of all steps of chains of points ``[..., steps + 1, 2]``."""
    return step_mean(velocity, points[..., :-1, :], steps.time, steps.dt, steps.sigma)


def log_density(points: Array, mean: Array, std: ArrayLike) -> Array:
    """Log-density ``[...]`` of Gaussian steps of deviation ``std`` to points ``[..., 2]``."""
    chex.assert_equal_shape([points, mean])
    squares = jnp.sum((points - mean) ** 2, axis=-1)
    return -squares / (2 * jnp.asarray(std) ** 2) - math.log(2 * math.pi) - 2 * jnp.log(std)


def sample(velocity: Velocity, task: Task, key: Array, noise: Array) -> Chain:
    """Samples by the SDE from x at t = 1, standard normal noise ``[..., 2]``."""
    steps = schedule(task)
    normals = jax.random.normal(key, (task.steps, *noise.shape))

    def one_step(points: Array, inputs: tuple[Schedule, Array]) -> tuple[Array, Chain]:
        now, normal = inputs
        mean = step_mean(velocity, points, now.time, now.dt, now.sigma)
        points = mean + now.std * normal
        # Of the point as it was rounded, so that the log-ratio of unchanged parameters is 0.
        return points, Chain(points, mean, log_density(points, mean, now.std))

    _, chain = jax.lax.scan(one_step, noise, (steps, normals))
    points = jnp.concatenate([noise[None], chain.points])
    last = noise.ndim - 1
    return Chain(
        jnp.moveaxis(points, 0, last),
        jnp.moveaxis(chain.mean, 0, last),
        jnp.moveaxis(chain.log_prob, 0, last),
    )


def solve(velocity: Velocity, task: Task, noise: Array) -> Array:
    """End points of the ODE from noise ``[..., 2]``, by as many Euler steps as the SDE takes."""
    steps = schedule(task, noise_level=0.0)

    def one_step(points: Array, now: Schedule) -> tuple[Array, None]:
        return step_mean(velocity, points, now.time, now.dt, now.sigma), None

    return jax.lax.scan(one_step, noise, steps)[0]


def matching_loss(velocity: Velocity, points: Array, noise: Array, times: Array) -> Array:
    """Mean of abs(v(x_t, t) - (noise - x_0))^2, points being x_0 ``[n, 2]`` (arXiv:2210.02747)."""
    chex.assert_equal_shape([points, noise])
    t = times[:, None]
    error = velocity((1 - t) * points + t * noise, times) - (noise - points)
    return jnp.mean(jnp.sum(error**2, axis=-1))


def pretrain(field: VelocityField, task: Task, key: Array) -> tuple[Any, Array]:
    """Parameters that flow matching fits to the density, and the loss of every update."""
    key_init, key_train = jax.random.split(key)
    params: Any = field.init(key_init, jnp.zeros((1, 2)), jnp.zeros(1))
    rate = optax.cosine_decay_schedule(task.pretrain_rate, task.pretrain_steps)
    # Flat: on CPU a dozen small arrays cost several times one vector of their total length.
    optimizer = optax.flatten(optax.adam(rate))
    n = task.pretrain_batch

    def one_update(carry: tuple[Any, Any], key: Array) -> tuple[tuple[Any, Any], Array]:
        params, opt_state = carry
        key_points, key_noise, key_times = jax.random.split(key, 3)
        points = task.sample(key_points, n)
        noise = jax.random.normal(key_noise, (n, 2))
        # One time in each of n equal intervals: less noise in the gradient.
        times = (jnp.arange(n) + jax.random.uniform(key_times, (n,))) / n

        def loss(params: Any) -> Array:
            return matching_loss(bind(field, params), points, noise, times)

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    keys = jax.random.split(key_train, task.pretrain_steps)
    (params, _), losses = jax.lax.scan(one_update, (params, optimizer.init(params)), keys)
    return params, losses


def bind(field: VelocityField, params: Any) -> Velocity:
    """The flow of given parameters."""

    def velocity(points: Array, times: Array) -> Array:
        output: Array = networks.exact(field.apply)(params, points, times)
        return output

    return velocity
