"""Acting: a fixed number of steps in parallel environments, and evaluation episodes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gipo_jax import packed
from gipo_jax.environments import Environment
from gipo_jax.networks import ActionHead

Policy = Callable[[Array], Array]  # observations [n, *obs_shape] -> outputs of the head


class Transition(NamedTuple):
    """Steps of parallel environments; every array starts ``[time, envs]``.

    ``final_obs`` is where the step led, before any reset; the next row's ``obs`` follows it.
    ``behavior_outputs``, the head's outputs that the action was drawn from, are None unless kept.
    """

    obs: Array
    action: Array
    behavior_log_prob: Array
    reward: Array
    terminated: Array
    truncated: Array
    final_obs: Array
    behavior_outputs: Array | None = None


class Successes(NamedTuple):
    """Tasks solved, where the environment says so."""

    solved: Array  # [envs], bool, at some step of the current episode
    episodes: Array  # [envs], int32, episodes that ended solved since the start of the run


class EnvStates(NamedTuple):
    """Environments in mid-episode."""

    state: Any  # the environments' own states
    obs: Array  # [envs, *obs_shape]
    episode_return: Array  # [envs] reward so far in the current episode
    successes: Successes | None = None  # tasks solved; None where the environment does not say


def reset(env: Environment, key: Array, num_envs: int) -> EnvStates:
    """Starts ``num_envs`` environments."""
    obs, state = env.reset(key, num_envs)
    successes = None
    if env.reports_success:
        successes = Successes(jnp.zeros(num_envs, bool), jnp.zeros(num_envs, jnp.int32))
    return EnvStates(state, obs, jnp.zeros(num_envs), successes)


def solved_episodes(envs: EnvStates) -> Array:
    """Episodes that ended solved since the start of the run, where the environment says so."""
    assert envs.successes is not None
    return jnp.sum(envs.successes.episodes)


def restore(env: Environment, envs: EnvStates) -> tuple[EnvStates, int]:
    """Goes on from stored environments of several runs; and how many had to begin a new episode."""
    state, obs, restarted = env.restore(envs.state, envs.obs)
    returns: Any = np.where(restarted, np.float32(0), envs.episode_return)
    successes = envs.successes
    if successes is not None:
        solved: Any = ~restarted & successes.solved
        successes = successes._replace(solved=solved)
    envs = EnvStates(state, obs, returns, successes)
    return envs, int(restarted.sum())


def collect(
    env: Environment,
    head: ActionHead,
    policy: Policy,
    envs: EnvStates,
    key: Array,
    length: int,
    keep_outputs: bool = False,
) -> tuple[EnvStates, Transition, Array, Array]:
    """Acts for ``length`` steps; also transitions ``[length, envs]``, and of the episodes that
    ended the sum of their returns and their number.
    """
    num_envs = envs.obs.shape[0]
    key_noise, key_env = jax.random.split(key)
    noise = head.noise(key_noise, (length, num_envs))
    env_keys = jax.random.split(key_env, (length, num_envs))

    carried, unpack = packed.pack(envs)

    def step(carried: Any, inputs: tuple[Array, Array]) -> tuple[Any, Any]:
        envs, (noise, keys) = unpack(carried), inputs
        outputs = policy(envs.obs)
        action = head.sample(outputs, noise)
        stepped = env.step(keys, envs.state, head.to_env(action))
        transition = Transition(
            obs=envs.obs,
            action=action,
            behavior_log_prob=head.log_prob(outputs, action),
            reward=stepped.reward,
            terminated=stepped.terminated,
            truncated=stepped.truncated,
            final_obs=stepped.final_obs,
            behavior_outputs=outputs if keep_outputs else None,
        )
        done = stepped.terminated | stepped.truncated
        episode_return = envs.episode_return + stepped.reward
        finished = jnp.where(done, episode_return, 0.0)
        running = jnp.where(done, 0.0, episode_return)
        successes = envs.successes
        if successes is not None and stepped.success is not None:
            solved = successes.solved | stepped.success
            successes = Successes(solved & ~done, successes.episodes + (solved & done))
        envs = EnvStates(stepped.state, stepped.obs, running, successes)
        return packed.pack(envs)[0], (transition, finished, done)

    carried, (transitions, finished, done) = packed.scan(step, carried, (noise, env_keys))
    return unpack(carried), transitions, jnp.sum(finished), jnp.sum(done)


class Evaluation(NamedTuple):
    """Fresh episodes, those played greedily apart from those played by sampling."""

    greedy: Array  # mean undiscounted return with the most likely actions
    sampled: Array  # with sampled actions
    solved_greedy: Array | None = None  # share solved at some step; None if unknown
    solved_sampled: Array | None = None  # with sampled actions, likewise


def evaluate(
    env: Environment, head: ActionHead, policy: Policy, key: Array, episodes: int
) -> Evaluation:
    """Plays fresh episodes, ``episodes`` (>= 1) of each kind.

    Each starts from its own reset and counts once, however short, so that the mean neither lags nor
    prefers short episodes, as does that of the episodes that ended while training: of a policy
    worth 500 in half of the steps and 10 in the other, that makes 20, since short ones end more
    often.
    """
    env = env.for_evaluation()
    key_reset, key_steps = jax.random.split(key)
    greedy = jnp.arange(2 * episodes) < episodes
    started = reset(env, key_reset, 2 * episodes)
    running = jnp.ones(2 * episodes, bool)

    def step(carry: tuple[EnvStates, Array, Array]) -> tuple[EnvStates, Array, Array]:
        envs, running, time = carry
        key_noise, key_env = jax.random.split(jax.random.fold_in(key_steps, time))
        outputs = policy(envs.obs)
        sampled = head.sample(outputs, head.noise(key_noise, (2 * episodes,)))
        action = jnp.where(greedy[:, None], head.mode(outputs), sampled)
        keys = jax.random.split(key_env, 2 * episodes)
        stepped = env.step(keys, envs.state, head.to_env(action))
        returns = envs.episode_return + jnp.where(running, stepped.reward, 0.0)
        successes = envs.successes
        if successes is not None and stepped.success is not None:
            solved = successes.solved | (running & stepped.success)
            successes = successes._replace(solved=solved)
        running = running & ~stepped.terminated & ~stepped.truncated
        return EnvStates(stepped.state, stepped.obs, returns, successes), running, time + 1

    # The environment's own limit ends every episode; the bound is for one that forgets to.
    ended, _, _ = jax.lax.while_loop(
        lambda carry: jnp.any(carry[1]) & (carry[2] < env.max_episode_steps),
        step,
        (started, running, jnp.int32(0)),
    )

    def means(x: Array) -> tuple[Array, Array]:
        return jnp.mean(x[:episodes]), jnp.mean(x[episodes:])

    solved = () if ended.successes is None else means(ended.successes.solved)
    return Evaluation(*means(ended.episode_return), *solved)
