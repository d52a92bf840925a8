"""What every environment offers: a batch stepped at once, arrays in and out, endings kept apart."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array


class Step(NamedTuple):
    """One step of ``envs`` environments. ``obs`` follows an automatic reset, ``final_obs`` not.

    Attributes:
        state: states after any reset.
        obs: ``[envs, *obs_shape]``, what the next action is chosen from.
        reward: ``[envs]``, float32.
        terminated: ``[envs]``, bool; the episode ended by its own rules.
        truncated: ``[envs]``, bool; the time limit cut it, and it did not terminate.
        final_obs: ``[envs, *obs_shape]``, the observation the step led to.
        success: ``[envs]``, bool, the task is solved now; None where success is not reported.
    """

    state: Any
    obs: Array
    reward: Array
    terminated: Array
    truncated: Array
    final_obs: Array
    success: Array | None = None


class Environment(NamedTuple):
    """A batch of environments of one kind, as functions to jit.

    Attributes:
        name: its name in the library it comes from.
        reset: ``key, num_envs -> obs [num_envs, *obs_shape], state``.
        step: ``keys [envs], state, action [envs, *action_shape] -> Step``.
        obs_shape: shape of an observation; an image is ``[height, width, channels]``.
        obs_dtype: type observations are stored in; ``uint8`` counts from 0 to 255.
        action_shape: shape of an action.
        num_actions: number of discrete actions; None with a Box.
        action_low: ``[action_dim]`` lower bounds of a Box; None with discrete actions.
        action_high: upper bounds likewise.
        max_episode_steps: time limit in steps.
        reports_success: whether ``Step.success`` is there.
        simulator: what an environment outside JAX needs besides; None for one that is pure JAX.
    """

    name: str
    reset: Callable[[Array, int], tuple[Array, Any]]
    step: Callable[[Array, Any, Array], Step]
    obs_shape: tuple[int, ...]
    obs_dtype: Any
    action_shape: tuple[int, ...]
    num_actions: int | None
    action_low: np.ndarray | None
    action_high: np.ndarray | None
    max_episode_steps: int
    reports_success: bool = False
    simulator: "Simulator | None" = None

    @property
    def host(self) -> bool:
        """Whether it is simulated outside JAX: no ``vmap`` over it, and ``open_pools`` first."""
        return self.simulator is not None


class Simulator(NamedTuple):
    """What an environment outside JAX needs besides; use the functions of ``environments``.

    Attributes:
        open_pools: see ``environments.open_pools``.
        close_pools: see ``environments.close_pools``.
        restore: see ``environments.restore``.
        resume_gap: see ``environments.resume_gap``.
    """

    open_pools: Callable[[Array, int, str], Environment]
    close_pools: Callable[[], None]
    restore: Callable[[Any, Any], tuple[Any, Any, np.ndarray]]
    resume_gap: str | None


class Single(NamedTuple):
    """One environment, without the leading axis.

    Attributes:
        reset: ``key -> obs [*obs_shape], state``.
        step: ``key, state, action [*action_shape] -> Step`` of arrays without ``envs``.
    """

    reset: Callable[[Array], tuple[Array, Any]]
    step: Callable[[Array, Any, Array], Step]


def single(env: Environment) -> Single:
    """One environment to step by hand: the functions of ``env`` for a batch of one."""

    def first(tree: Any) -> Any:
        return jax.tree.map(lambda x: x[0], tree)

    def batch(tree: Any) -> Any:
        return jax.tree.map(lambda x: x[None], tree)

    def reset(key: Array) -> tuple[Array, Any]:
        return first(env.reset(key, 1))

    def step(key: Array, state: Any, action: Array) -> Step:
        return first(env.step(key[None], batch(state), action[None]))

    return Single(reset, step)
