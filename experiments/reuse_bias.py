"""Reuse bias: how much better a policy looks on the buffer it was optimised on than it is.

Both tasks are finite, so every true return is exact. The setting follows the BIRIS paper
(arXiv:2209.07074): the learner starts as the behaviour policy, the buffer stays as it is, and Adam
takes 20 full-batch updates on it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from gymnax.environments.bsuite import catch as gymnax_catch
from jax import Array

from experiments.store import Store
from gipo_jax import losses, networks, objectives
from gipo_jax.analysis import plots, reuse_bias, stats

QUESTION = "Does damping by GIPO also lower the reuse bias of a policy optimised on a fixed buffer?"

SIZES = (30, 40, 50)
"""Episodes in the buffer."""

UPDATES = 20
PILOT_SEED = 1000
PILOT_SIZE = 40
SEEDS = {"quick": (5, 5), "committed": (50, 20), "full": (500, 100)}
"""Seeds of the experiment, from 0 on, and of the pilot, from PILOT_SEED on."""

RATES = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)


class Method(NamedTuple):
    """An objective and the ratio that it sees; sigma is NaN where the objective has none."""

    objective: str
    sigma: float
    level: str

    @property
    def function(self) -> Callable[[Array, Array], Array]:
        """The objective with its parameters filled in."""
        function = objectives.REGISTRY[self.objective]
        if self.objective == "gipo":
            return functools.partial(function, sigma=self.sigma)
        return functools.partial(function, alpha=0.1) if self.objective == "biris" else function


LEVELS = ("joint", "token")
METHODS = tuple(
    Method(objective, sigma, level)
    for level in LEVELS
    for objective, sigma in (
        ("no_clip", np.nan),
        ("biris", np.nan),
        ("gipo", 0.2),
        ("gipo", 1.0),
        ("ppo_clip", np.nan),
    )
)


def catch() -> reuse_bias.Task:
    """gymnax's Catch as tables, made by its own step: 1 for a caught ball, 0 for a missed one."""
    env, params = gymnax.make("Catch-bsuite")
    rows, columns, actions = env.rows, env.columns, env.num_actions
    y, ball, paddle = jnp.meshgrid(
        jnp.arange(rows - 1), jnp.arange(columns), jnp.arange(columns), indexing="ij"
    )

    def one(y: Array, ball: Array, paddle: Array) -> Any:
        state = gymnax_catch.EnvState(
            time=y, ball_x=ball, ball_y=y, paddle_x=paddle, paddle_y=rows - 1, prev_done=False
        )

        def step(action: Array) -> tuple[Array, Array]:
            _, after, reward, *_ = env.step_env(jax.random.key(0), state, action, params)
            index = (after.ball_y * columns + after.ball_x) * columns + after.paddle_x
            return jnp.where(after.prev_done, 0, index), (reward + after.prev_done) / 2

        return *jax.vmap(step)(jnp.arange(actions)), env.get_obs(state).ravel()

    next_state, reward, obs = jax.vmap(one)(y.ravel(), ball.ravel(), paddle.ravel())
    first = (y == 0) & (paddle == columns // 2)
    start = first.ravel() / first.sum()
    return reuse_bias.Task(start, next_state, reward, obs, rows - 1)


ANSWER = (0, 1, 1, 0, 1, 0, 0, 1)
NEEDED = 6


def token_tree() -> reuse_bias.Task:
    """Sequences of 8 tokens out of 2: 1 where at least 6 of them are the answer's, else 0.

    States are the 255 prefixes of fewer than 8 tokens, shortest first; a policy sees the tokens so
    far and their number, one-hot.
    """
    length = len(ANSWER)
    prefixes = [
        tuple(int(bit) for bit in f"{number:b}"[1:]) for number in range(1, 2**length)
    ]  # fmt: skip
    index = {prefix: state for state, prefix in enumerate(prefixes)}
    obs = np.zeros((len(prefixes), length, 3), np.float32)
    next_state = np.zeros((len(prefixes), 2), int)
    reward = np.zeros((len(prefixes), 2), np.float32)
    for state, prefix in enumerate(prefixes):
        obs[state, len(prefix), 2] = 1
        for position, token in enumerate(prefix):
            obs[state, position, token] = 1
        for token in (0, 1):
            after = (*prefix, token)
            next_state[state, token] = index.get(after, 0)
            if len(after) == length:
                reward[state, token] = np.sum(np.equal(after, ANSWER)) >= NEEDED
    start = np.zeros(len(prefixes), np.float32)
    start[0] = 1
    return reuse_bias.Task(
        *(jnp.asarray(x) for x in (start, next_state, reward, obs.reshape(len(obs), -1))), length
    )


TASKS: dict[str, Callable[[], reuse_bias.Task]] = {"Catch-bsuite": catch, "token tree": token_tree}


def network(actions: int) -> nn.Module:
    """A policy with one hidden layer of 32 units, near uniform at first."""
    return nn.Sequential(
        [networks.Torso((32,), "tanh", False, False), networks.PolicyOutput(1, actions, True)]
    )


def measure(
    task: reuse_bias.Task,
    method: Method,
    episodes: int,
    seeds: range,
    rates: Sequence[float],
    standardized: Sequence[bool],
) -> tuple[np.ndarray, np.ndarray]:
    """Optimises on one buffer for each seed and setting; one program.

    Args:
        task: the task.
        method: the method.
        episodes: size of the buffer.
        seeds: one network and one buffer each, the same for all methods.
        rates: learning rate of each setting.
        standardized: whether advantages are standardised or plain returns, for each setting.

    Returns:
        estimated and true return of the new policy, ``[seeds, settings]`` each.
    """
    model = network(task.reward.shape[1])

    def policy(params: Any, obs: Array) -> Array:
        logits: Any = model.apply(params, obs)
        return logits[:, 0]

    def run(seed: Array) -> tuple[Array, Array]:
        key_init, key_buffer = jax.random.split(jax.random.key(seed))
        params = model.init(key_init, task.obs)
        behavior = jax.nn.log_softmax(policy(params, task.obs))
        key_buffer = jax.random.fold_in(key_buffer, episodes)
        buffer = reuse_bias.sample(task, behavior, key_buffer, episodes)

        def setting(rate: Array, standardized: Array) -> tuple[Array, Array]:
            returns = buffer.episode_return
            new = reuse_bias.optimize(
                task,
                policy,
                params,
                buffer,
                method.function,
                jnp.where(standardized, losses.standardize(returns), returns),
                rate,
                method.level,
                UPDATES,
            )
            log_probs = jax.nn.log_softmax(policy(new, task.obs))
            estimate = reuse_bias.estimated_return(log_probs, buffer)
            return estimate, reuse_bias.true_return(task, log_probs)

        return jax.vmap(setting)(jnp.asarray(rates), jnp.asarray(standardized))

    estimate, true = jax.jit(jax.vmap(run))(jnp.arange(seeds.start, seeds.stop))
    return np.asarray(estimate), np.asarray(true)
