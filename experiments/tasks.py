"""Tasks, methods and scales that the studies are made of."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from gipo_jax.analysis import plots


@dataclasses.dataclass(frozen=True)
class Task:
    """An environment and the sizes that go with it.

    Attributes:
        env: name of an environment or a task of responses of several tokens.
        threshold: return that counts as solved enough for sample efficiency.
        settings: fields of Config and HParams.
        updates: batches an iteration, by regime.
    """

    env: str
    threshold: float
    settings: dict[str, Any]
    updates: dict[str, int]

    @property
    def block(self) -> int:
        """Transitions an iteration."""
        return int(self.settings["num_envs"] * self.settings["rollout_length"])

    def lasting(self, steps: int) -> "Task":
        """The task with another number of steps."""
        return dataclasses.replace(self, settings=self.settings | {"total_steps": steps})


REGIMES = ("gentle", "reuse-heavy")
"""How often data is reused, as stored tables call it; see ``REUSE``."""

REUSE = {"gentle": "low reuse", "reuse-heavy": "high reuse"}
"""What figures and reports call the regimes."""

_CLASSIC: dict[str, Any] = {"num_envs": 8, "rollout_length": 16, "total_steps": 65_536}
_MINATAR: dict[str, Any] = {
    "num_envs": 8,
    "rollout_length": 8,
    "total_steps": 16_384,
    "shared_torso": True,
    "hidden_sizes": (32,),
}
_CLASSIC_UPDATES = {"gentle": 4, "reuse-heavy": 16}
_MINATAR_UPDATES = {"gentle": 2, "reuse-heavy": 4}
_TOKENS = _CLASSIC | {"action_head": "tokens"}

CARTPOLE = Task("CartPole-v1", 300, _CLASSIC, _CLASSIC_UPDATES)
ACROBOT = Task("Acrobot-v1", -150, _CLASSIC, _CLASSIC_UPDATES)
PENDULUM = Task("Pendulum-v1", -600, _TOKENS | {"gamma": 0.95}, _CLASSIC_UPDATES)
CATCH = Task("Catch-bsuite", 0.5, _CLASSIC, _CLASSIC_UPDATES)
FOUR_ROOMS = dataclasses.replace(CATCH, env="FourRooms-misc")
REACHER = Task("Reacher-misc", 0, _TOKENS, _CLASSIC_UPDATES)
BREAKOUT = Task("Breakout-MinAtar", 2.5, _MINATAR, _MINATAR_UPDATES)
INVADERS = Task("SpaceInvaders-MinAtar", 7, _MINATAR, _MINATAR_UPDATES)
ASTERIX = Task("Asterix-MinAtar", 2, _MINATAR, _MINATAR_UPDATES)

SIX = (CARTPOLE, ACROBOT, CATCH, PENDULUM, BREAKOUT, INVADERS)
"""The tasks of protocol 1."""

THRESHOLDS = {task.env: task.threshold for task in (*SIX, ASTERIX)}

CEILINGS = {CARTPOLE.env: 475.0, ACROBOT.env: -100.0, CATCH.env: 0.9}
"""Final return from which a run counts as at the ceiling; the other tasks of a grid have none.

Gym registers the first two as solved there; in Catch it is 19 of 20 balls.
"""

COMMON: dict[str, Any] = {
    "batch_size": 64,
    # The same critic for every method, so that tuning a policy's learning rate tunes only that.
    "value_learning_rate": 1e-3,
    "entropy_coef": 0.0,
    "schedule": "linear",
    "eval_episodes": 0,
    "num_logs": 16,
}
"""Settings that every run of a grid shares, unless its task has others."""


@dataclasses.dataclass(frozen=True)
class Method:
    """What is compared: an objective and its own parameters; a list of values is swept."""

    objective: Any
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    name: str = ""

    @property
    def sigma(self) -> float:
        return float(self.parameters.get("sigma", np.nan))

    @property
    def label(self) -> str:
        """What tables and figures call it."""
        return self.name or self.style.label

    @property
    def style(self) -> plots.Look:
        """How it is drawn."""
        style = plots.look(self.objective, self.sigma if self.objective == "gipo" else None)
        return dataclasses.replace(style, label=self.name) if self.name else style


GIPO_02, GIPO_05, GIPO = (Method("gipo", {"sigma": sigma}) for sigma in (0.2, 0.5, 1.0))
PPO = Method("ppo_clip", {"clip_eps": 0.2})
SAPO = Method("sapo", {"tau_pos": 1.0, "tau_neg": 2.0})
"""With the temperatures of the paper's comparison."""
NO_CLIP = Method("no_clip")


class Cell(NamedTuple):
    """Data to learn from: the newest ``age`` iterations without the newest ``min_age`` of them."""

    age: int
    min_age: int = 0


def replay(*ages: int) -> tuple[Cell, ...]:
    """Replay of the newest ``ages`` iterations."""
    return tuple(Cell(age) for age in ages)


def windows(widths: tuple[int, ...], min_ages: tuple[int, ...]) -> tuple[Cell, ...]:
    """Replay of ``widths`` iterations behind the newest ``min_ages``."""
    return tuple(Cell(min_age + width, min_age) for width in widths for min_age in min_ages)


FRESH, STALE = 1, 128
"""Replay of the studies that have just two, in iterations."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """Size of a study of a grid.

    Attributes:
        tasks: environments.
        cells: data that is learnt from, in iterations.
        seeds: seeds that are reported.
        rates: learning rates tried for every method, regime and task; a single one is not tuned,
            and none leaves the default.
        tuning_seeds: seeds for that, none of them reported.
        tuning_cells: the one cell at which rates are tuned for all; none tunes in every cell.
        methods: compared methods; None for those of the study.
        steps: factor on the tasks' steps.
    """

    tasks: tuple[Task, ...]
    seeds: range
    cells: tuple[Cell, ...] = replay(FRESH, STALE)
    rates: tuple[float, ...] = ()
    tuning_seeds: range = range(0)
    tuning_cells: tuple[Cell, ...] = ()
    methods: tuple[Method, ...] | None = None
    steps: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """What a study trains, stores and pairs as a whole.

    Attributes:
        folder: last part of the names of its sweeps.
        keys: columns of its rows, by which it is told from other parts.
        regime: key of the tasks' updates an iteration.
        tasks, methods, cells: their product is trained.
        settings: further settings.
    """

    folder: str
    keys: dict[str, Any]
    regime: str
    tasks: tuple[Task, ...]
    methods: tuple[Method, ...]
    cells: tuple[Cell, ...]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
