"""What every environment offers: a batch stepped at once, arrays in and out, endings kept apart."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from gipo_jax.config import ConfigError


class Step(NamedTuple):
    """One step of ``envs`` environments. ``obs`` follows an automatic reset, ``final_obs`` not."""

    state: Any  # states after any reset
    obs: Array  # [envs, *obs_shape], what the next action is chosen from
    reward: Array  # [envs], float32
    terminated: Array  # [envs], bool; the episode ended by its own rules
    truncated: Array  # [envs], bool; the time limit cut it, and it did not terminate
    final_obs: Array  # [envs, *obs_shape], the observation the step led to
    success: Array | None = None  # [envs], bool, solved now; None where unknown


@dataclasses.dataclass(frozen=True, eq=False)
class Environment:
    """A batch of environments of one kind, as functions to jit; hashed by identity.

    The methods know about simulators, so that callers need not ask: in pure JAX they do nothing.
    """

    name: str  # its name in the library it comes from
    reset: Callable[[Array, int], tuple[Array, Any]]  # key, num_envs -> obs, state
    # keys [envs], state, action [envs, *action_shape] -> Step
    step: Callable[[Array, Any, Array], Step]
    obs_shape: tuple[int, ...]  # shape of an observation; an image is [height, width, channels]
    obs_dtype: Any  # type observations are stored in; uint8 counts from 0 to 255
    action_shape: tuple[int, ...]  # shape of an action
    num_actions: int | None  # number of discrete actions; None with a Box
    action_low: np.ndarray | None  # [action_dim] lower bounds of a Box; None with discrete actions
    action_high: np.ndarray | None  # upper bounds likewise
    max_episode_steps: int  # time limit in steps
    reports_success: bool = False  # whether Step.success is there
    own_truncation: bool = False  # whether anything but the time limit truncates
    # values by name, which may be traced -> the same with other parameters; None without any
    vary: "Callable[[Mapping[str, Any]], Environment] | None" = None
    simulator: "Simulator | None" = None  # None for one that is pure JAX

    @property
    def host(self) -> bool:
        """Whether it is simulated outside JAX: no ``vmap`` over it, and ``open`` first."""
        return self.simulator is not None

    @property
    def resume_gap(self) -> str | None:
        """Why a stopped run would go on with new episodes and not exactly; None where exact."""
        return None if self.simulator is None else self.simulator.resume_gap

    def open(self, keys: Array, devices: int = 1, axis: str = "runs") -> "Environment":
        """Makes its simulators, before a program with them is compiled.

        Args:
            keys: ``[runs]``, the keys that ``reset`` will be called with, each as often as here.
            devices: devices that share the runs evenly, in order. Each has simulators of its own.
            axis: with several devices, the mesh axis that ``jax.shard_map`` runs them along.

        Returns:
            the same environment, to compile with. Every key starts once: a second ``reset`` with it
            raises ``envpool_env.PoolError``, for a simulator has no way back to its first numbers.

        Raises:
            ConfigError: the runs cannot be shared evenly. So does ``reset``, when it is traced on a
                mesh of another number of devices.
        """
        return self if self.simulator is None else self.simulator.open(keys, devices, axis)

    def close(self) -> None:
        """Ends the simulators of ``open``; programs compiled with them must not run again."""
        if self.simulator is not None:
            self.simulator.close()

    def restore(self, state: Any, obs: Any) -> tuple[Any, Any, np.ndarray]:
        """Brings newly opened simulators to a stored state.

        A simulator is reset as often as the stored one was and takes the actions of its current
        episode again. Where that does not lead to the stored observation, bit for bit, it begins a
        new episode.

        Args:
            state: stored states of the runs whose keys ``open`` had, ``[runs, ...]`` on the host.
            obs: their observations, ``[runs, envs, *obs_shape]``.

        Returns:
            state and observations to go on from, and which began anew, bool ``[runs, envs]``.
        """
        if self.simulator is None:
            return state, obs, np.zeros(np.shape(obs)[:2], bool)
        return self.simulator.restore(state, obs)

    def for_evaluation(self) -> "Environment":
        """The environment to play one fresh episode in, at any time and without ``open``.

        Outside JAX, each ``reset`` makes simulators that its key seeds and their last episode ends.
        """
        if self.simulator is None:
            return self
        reset, step = self.simulator.of_one_episode()
        return dataclasses.replace(self, reset=reset, step=step, simulator=None)

    def with_params(self, values: Mapping[str, Any] | None) -> "Environment":
        """The environment with other values of its parameters, by name; they may be traced.

        Raises ConfigError where it has no such parameters, or one that cannot be traced is.
        """
        if not values:
            return self
        if self.vary is None:
            valid = f"none: {self.name} takes no parameters"
            raise ConfigError("env_params", ", ".join(values), valid)
        return self.vary(values)


class Simulator(NamedTuple):
    """What an environment outside JAX needs besides; see the methods of ``Environment``."""

    open: Callable[[Array, int, str], Environment]
    close: Callable[[], None]
    restore: Callable[[Any, Any], tuple[Any, Any, np.ndarray]]
    of_one_episode: Callable[[], tuple[Callable[..., Any], Callable[..., Any]]]
    resume_gap: str | None


class Single(NamedTuple):
    """One environment, without the leading axis."""

    reset: Callable[[Array], tuple[Array, Any]]  # key -> obs [*obs_shape], state
    step: Callable[[Array, Any, Array], Step]  # the same without the axis of environments


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
