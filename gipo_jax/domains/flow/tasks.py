"""Densities in the plane that a flow learns, each with a reward on the end point.

The reward is high at some modes only, so that a policy can raise it and keep several. One that
collapses gets the same reward, which is why diversity is measured beside it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gipo_jax.config import ConfigError

PREFIX = "flow/"  # What the names of these tasks begin with, where a configuration names them


class Task(NamedTuple):
    """A density, a reward on its points, and the sampler's settings."""

    name: str  # as a configuration has it, such as flow/ring
    sample: Callable[[Array, int], Array]  # key, n -> points [n, 2] of the density
    centers: np.ndarray  # points that stand for the modes of the density, [modes, 2]
    rewarded: np.ndarray  # which of them are rewarded, bool [modes]
    width: float  # distance at which the reward of a mode has fallen to e^-1/2
    steps: int = 10  # denoising steps
    noise_level: float = 0.7  # a in sigma_t = a sqrt(t / (1 - t)), as in Flow-GRPO
    shift: float = 1.0  # of the times, 1 for equal steps; 3 in Stable Diffusion 3
    # points [..., 2] -> what training sees in place of the reward, which evaluations measure
    proxy: Callable[[Array], Array] | None = None
    pretrain_steps: int = 800  # updates of flow matching that a run begins with
    pretrain_batch: int = 512  # points in such an update
    pretrain_rate: float = 2e-2  # Adam's first learning rate, which decays along a cosine


def is_task(env: Any) -> bool:
    """Whether the setting ``env`` means a task of this kind, and not an environment."""
    return isinstance(env, str) and env.startswith(PREFIX)


def make(name: str) -> Task:
    """The task of a name."""
    if name not in TASKS:
        raise ConfigError("env", name, f"one of {', '.join(TASKS)}")
    # A training function may be made under a trace; centers of modes stay numbers there.
    with jax.ensure_compile_time_eval():
        return TASKS[name]()


def ring() -> Task:
    """Eight Gaussians on a circle of radius 2, standard deviation 0.15; the upper four pay."""
    angles = 2 * np.pi * (np.arange(8) + 0.5) / 8
    centers = 2.0 * np.stack([np.cos(angles), np.sin(angles)], axis=-1)

    def sample(key: Array, n: int) -> Array:
        key_mode, key_noise = jax.random.split(key)
        mode = jax.random.randint(key_mode, (n,), 0, len(centers))
        return jnp.asarray(centers)[mode] + 0.15 * jax.random.normal(key_noise, (n, 2))

    return Task(f"{PREFIX}ring", sample, centers, centers[:, 1] > 0, width=0.4)


def ring_proxy() -> Task:
    """``ring`` under a reward model that places the modes a quarter too far out, and wider.

    The modes have a reward of 0.68 under it. Where it is highest, the true reward is 0.46.
    """
    task = ring()
    model = task._replace(centers=1.25 * task.centers, width=2**0.5 * task.width)

    def proxy(points: Array) -> Array:
        return reward(model, points)

    return task._replace(name=f"{PREFIX}ring_proxy", proxy=proxy)


def moons() -> Task:
    """Two half circles of radius 1.5 that reach into each other, noise 0.1; the upper one pays."""

    def arcs(lower: Array | np.ndarray, angle: Array | np.ndarray) -> tuple[Array, Array]:
        x = 1.5 * jnp.cos(angle) + jnp.where(lower, 0.75, -0.75)
        y = jnp.where(lower, 0.375 - 1.5 * jnp.sin(angle), 1.5 * jnp.sin(angle) - 0.375)
        return x, y

    def sample(key: Array, n: int) -> Array:
        key_moon, key_angle, key_noise = jax.random.split(key, 3)
        lower = jax.random.bernoulli(key_moon, shape=(n,))
        points = arcs(lower, jax.random.uniform(key_angle, (n,), maxval=np.pi))
        return jnp.stack(points, axis=-1) + 0.1 * jax.random.normal(key_noise, (n, 2))

    lower = np.repeat([False, True], 4)
    centers = np.stack(arcs(lower, np.tile((np.arange(4) + 0.5) * np.pi / 4, 2)), axis=-1)
    return Task(f"{PREFIX}moons", sample, centers, ~lower, width=0.4)


# Tasks by name
TASKS: dict[str, Callable[[], Task]] = {
    f"{PREFIX}ring": ring,
    f"{PREFIX}ring_proxy": ring_proxy,
    f"{PREFIX}moons": moons,
}


def reward(task: Task, points: Array | np.ndarray) -> Array:
    """exp(-d^2 / (2 width^2)) of points ``[..., 2]``, d the distance to the next rewarded mode."""
    squares = _squared_distances(points, task.centers[task.rewarded])
    return jnp.exp(-jnp.min(squares, axis=-1) / (2 * task.width**2))


def training_reward(task: Task, points: Array) -> Array:
    """What training sees of points ``[..., 2]``: the proxy of a task that has one."""
    return reward(task, points) if task.proxy is None else task.proxy(points)


def modes_covered(task: Task, points: Array | np.ndarray) -> Array:
    """How many rewarded modes a set of points ``[n, 2]`` covers.

    A mode is covered if at least a quarter of its equal share of the points, 1 / (4 x rewarded
    modes), lies within two widths of it and nearest to it.
    """
    centers = task.centers[task.rewarded]
    squares = _squared_distances(points, centers)
    near = jnp.min(squares, axis=-1) <= (2 * task.width) ** 2
    nearest = jax.nn.one_hot(jnp.argmin(squares, axis=-1), len(centers)) * near[:, None]
    share = jnp.mean(nearest, axis=0)
    return jnp.sum(share >= 1 / (4 * len(centers)), dtype=jnp.float32)


def pairwise_distance(points: Array | np.ndarray) -> Array:
    """Mean distance of two different points of a set ``[n, 2]``, n >= 2."""
    squares = _squared_distances(points, points)
    n = len(points)
    return jnp.sum(jnp.sqrt(squares)) / (n * (n - 1))


def _squared_distances(points: Array | np.ndarray, centers: Array | np.ndarray) -> Array:
    """``[..., 2]`` and ``[m, 2]`` -> ``[..., m]``."""
    offset = jnp.asarray(points)[..., None, :] - jnp.asarray(centers, jnp.float32)
    return jnp.sum(offset**2, axis=-1)
