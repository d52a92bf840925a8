"""Control: environments stepped side by side, with a value function."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

from gipo_jax import (
    advantages,
    environments,
    fused,
    networks,
    normalizer,
    objectives,
    ratio_levels,
    signatures,
)
from gipo_jax import rollout as rollouts
from gipo_jax.config import CONTROL, Config, ConfigError, HParams, check_applies, check_fields
from gipo_jax.domains.interface import Batch, Collected, Domain, Scores
from gipo_jax.learner import INIT_STREAM, Metrics, TrainState, run_key
from gipo_jax.normalizer import Normalizer

EVAL_EPISODES = 10
"""Episodes of an evaluation, greedy and sampled each, unless the configuration says how many.

Where they are simulated outside JAX there are none, since they cost as much as training does.
"""


class State(NamedTuple):
    """What control carries from one iteration to the next."""

    normalizer: Normalizer  # moments of the observations, fixed within an iteration
    envs: rollouts.EnvStates  # environments in mid-episode


class Row(NamedTuple):
    """What replay keeps of a transition. Fields that the settings do not need are None.

    ``stored`` keeps the advantages made at collection, ``recomputed`` and ``vtrace`` what is needed
    to make them anew, and an exact KL the outputs of the behaviour policy.
    """

    obs: Any
    action: Any
    behavior_log_prob: Any
    advantage: Any = None
    value_target: Any = None
    reward: Any = None
    terminated: Any = None
    truncated: Any = None
    final_obs: Any = None
    behavior_outputs: Any = None


class Control(Domain):
    """Rollouts of environments; see ``Domain``."""

    ordered = False

    def __init__(self, config: Config, env: environments.Environment) -> None:
        self.config, self.env = config, env
        self.host, self.resume_gap = env.host, env.resume_gap
        self.head = networks.make_head(config, env)
        self.network = networks.make(config, env.obs_shape, self.head)
        self.objective = objectives.spec(config.objective)
        self.ratio_level = ratio_levels.choose(config.ratio_level, self.objective)
        self.standardize = config.normalize_advantage is not False
        self.gather_once = len(env.obs_shape) < 3  # batches of images are too large for it
        self.cut_once = not env.own_truncation and config.rollout_length <= env.max_episode_steps
        self.activations = 6 * sum(config.hidden_sizes)
        if config.mlp == "fused":
            self.activations = fused.row_numbers(math.prod(env.obs_shape), jax.default_backend())
        if len(env.obs_shape) == 3:
            towers = 1 if config.shared_torso else 2
            self.activations += networks.image_numbers(env.obs_shape, towers)
        default = 0 if env.host else EVAL_EPISODES
        self.eval_episodes = default if config.eval_episodes is None else config.eval_episodes
        self.block = self._block()

    def init(self, hparams: HParams, key: Array) -> tuple[Any, State]:
        key_params, key_envs = _start_keys(key)
        envs = rollouts.reset(self.env_of(hparams), key_envs, self.config.num_envs)
        return self.network.init(key_params), State(normalizer.init(self.env.obs_shape), envs)

    def env_of(self, hparams: HParams) -> environments.Environment:
        return self.env.with_params(hparams.env_params)

    def open(self, seeds: Iterable[int], devices: int = 1) -> Domain:
        if not self.host:
            return self
        return make(self.config, open_env(self.config, seeds, devices))

    def close(self) -> None:
        self.env.close()

    def restore(self, state: TrainState) -> tuple[TrainState, int]:
        envs, begun = rollouts.restore(self.env, state.domain_state.envs)
        return state._replace(domain_state=state.domain_state._replace(envs=envs)), begun

    def collect(self, state: TrainState, hparams: HParams, key: Array) -> Collected:
        config, (moments, envs_before) = self.config, state.domain_state
        policy = self._policy(self.acting(state))
        keep = config.kl == "exact"
        envs, transition, returns, episodes = rollouts.collect(
            self.env_of(hparams), self.head, policy, envs_before, key, config.rollout_length, keep
        )
        counts = {"returns": returns, "episodes": episodes}
        if self.env.reports_success:
            before, after = (rollouts.solved_episodes(x) for x in (envs_before, envs))
            counts["solved"] = after - before
        transition = transition._replace(reward=transition.reward * hparams.reward_scale)
        if config.truncation_is_termination:
            done = transition.terminated | transition.truncated
            transition = transition._replace(terminated=done, truncated=jnp.zeros_like(done))
        rows = self._with_targets(state, hparams, transition)
        if config.normalize_obs:
            moments = normalizer.update(moments, networks.numbers(transition.obs))
        return Collected(rows, State(moments, envs), counts)

    def _with_targets(
        self, state: TrainState, hparams: HParams, transition: rollouts.Transition
    ) -> Row:
        """What replay keeps of a rollout: with ``stored`` its advantages and value targets."""
        row = Row(
            transition.obs,
            transition.action,
            transition.behavior_log_prob,
            behavior_outputs=transition.behavior_outputs,
        )
        if self.config.advantage_mode != "stored":
            return row._replace(
                reward=transition.reward,
                terminated=transition.terminated,
                truncated=transition.truncated,
                final_obs=transition.final_obs,
            )
        moments, params = state.domain_state.normalizer, state.learner.params
        ends = (transition.reward, transition.terminated, transition.truncated)
        values = self._values(params, moments, transition)
        advantage, value_target = advantages.gae(*ends, *values, hparams.gamma, hparams.gae_lambda)
        return row._replace(advantage=advantage, value_target=value_target)

    def batch(
        self,
        state: TrainState,
        params: Any,
        rows: Row,
        age: Array,
        hparams: HParams,
        key: Array | None = None,
    ) -> Batch:
        config, moments = self.config, state.domain_state.normalizer
        obs = self._input(moments, rows.obs)
        data = (obs, rows.action, rows.behavior_outputs)
        if config.advantage_mode == "stored":
            return Batch(
                data, rows.behavior_log_prob, rows.advantage, age, value_target=rows.value_target
            )
        rewards_and_ends = (rows.reward, rows.terminated, rows.truncated)
        values = self._values(params, moments, rows)
        if config.advantage_mode == "vtrace":
            log_prob = self.head.log_prob(self.network.policy(params, obs), rows.action)
            log_ratio = jnp.sum(log_prob - rows.behavior_log_prob, axis=-1)
            targets = advantages.vtrace(log_ratio, *rewards_and_ends, *values, hparams.gamma)
        else:
            targets = advantages.gae(*rewards_and_ends, *values, hparams.gamma, hparams.gae_lambda)
        advantage, value_target = stop_gradient(targets)
        age = jnp.broadcast_to(age, advantage.shape)
        batch = Batch(data, rows.behavior_log_prob, advantage, age, value_target=value_target)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)

    def _values(self, params: Any, moments: Normalizer, rows: Any) -> tuple[Array, Array]:
        """V(obs) and V(final_obs) of rows ``[time, envs]``."""

        def value(obs: Array) -> Array:
            return self.network.value(params, self._input(moments, obs))

        def of_all(obs: Array) -> Array:
            if self.gather_once:
                return value(obs)
            # An update's batch of images fits in memory, a whole rollout of them need not.
            steps = max(1, self.config.batch_size // obs.shape[1])
            return jax.lax.map(value, obs, batch_size=steps)

        if not self.cut_once:
            return of_all(rows.obs), of_all(rows.final_obs)
        # A step led to the next row's observation, or to the end of an episode. What came then
        # matters only where the time limit cut it, which a rollout no longer than it meets once.
        cut = jnp.argmax(rows.truncated, axis=0)
        at_cut = jax.vmap(lambda obs, step: obs[step], (1, 0))(rows.final_obs, cut)
        values = of_all(jnp.concatenate([rows.obs, rows.final_obs[-1:], at_cut[None]]))
        return values[:-2], jnp.where(rows.truncated, values[-1], values[1:-1])

    def score(self, params: Any, batch: Batch, hparams: HParams) -> Scores:
        obs, action, behavior_outputs = batch.data
        outputs, value = self.network.policy_and_value(params, obs)
        exact = behavior_outputs is not None
        return Scores(
            log_ratio=self.head.log_prob(outputs, action) - batch.behavior_log_prob,
            entropy=self.head.entropy(outputs),
            kl=self.head.kl(behavior_outputs, outputs) if exact else None,
            value=value,
        )

    def acting(self, state: TrainState) -> Any:
        return {"params": state.learner.params, "normalizer": state.domain_state.normalizer}

    def evaluate(self, acting: Any, hparams: HParams, key: Array, episodes: int) -> Metrics:
        env, policy = self.env_of(hparams), self._policy(acting)
        made = rollouts.evaluate(env, self.head, policy, key, episodes)
        names = ("eval_return", "eval_return_sampled", "eval_success", "eval_success_sampled")
        return {name: x for name, x in zip(names, made, strict=True) if x is not None}

    def choose_action(
        self, acting: Any, hparams: HParams, obs: Array, key: Array | None = None
    ) -> Array:
        head, obs = self.head, jnp.asarray(obs)
        outputs = self._policy(acting)(obs)
        if key is None:
            return head.to_env(head.mode(outputs))
        batch = obs.shape[: obs.ndim - len(self.env.obs_shape)]
        return head.to_env(head.sample(outputs, head.noise(key, batch)))

    def metrics(self, state: TrainState, batch: Batch) -> Metrics:
        if not self.env.reports_success:
            return {}
        return {"success_rate": state.totals["solved"] / state.totals["episodes"]}

    def _policy(self, acting: Any) -> Callable[[Array], Array]:
        """The policy: observations ``[..., *obs_shape]`` -> outputs of the action head."""
        params, moments = acting["params"], acting["normalizer"]
        return lambda obs: self.network.policy(params, self._input(moments, obs))

    def _input(self, moments: Normalizer, obs: Array) -> Array:
        """Observations as the networks take them."""
        if not self.config.normalize_obs:
            return obs
        return normalizer.normalize(moments, networks.numbers(obs))

    def _block(self) -> Row:
        """Shapes of an iteration's rows."""
        head, one, flag = self.head, self.like(), self.like(dtype=jnp.bool_)
        obs = self.like(*self.env.obs_shape, dtype=self.env.obs_dtype)
        action = self.like(head.num_tokens, dtype=jnp.int32 if head.discrete else jnp.float32)
        row = Row(obs, action, self.like(head.num_tokens))
        if self.config.kl == "exact":
            row = row._replace(behavior_outputs=self.like(head.num_tokens, head.output_width))
        if self.config.advantage_mode == "stored":
            return row._replace(advantage=one, value_target=one)
        return row._replace(reward=one, terminated=flag, truncated=flag, final_obs=obs)


def make(config: Config, env: environments.Environment | None = None) -> Control:
    """Control of a configuration; see ``domains.make``."""
    check_fields(config)
    objective = objectives.spec(config.objective)
    check_applies(config, domain=CONTROL, objective=objective)
    env = environments.make(config) if env is None else env
    signatures.check_single(objective)
    domain = Control(config, env)
    if objective.discrete_only and not domain.head.discrete:
        valid = f"'tokens', because {objective.name} reads probabilities of discrete actions"
        raise ConfigError("action_head", config.action_head, valid)
    if objective.takes_distributions:
        valid = "one for actions, of which replay keeps no probabilities but those of the one taken"
        raise ConfigError("objective", objective.name, valid)
    if "position" in objective.inputs:
        valid = "one for actions, because the tokens of an action have no order"
        raise ConfigError("objective", objective.name, valid)
    if domain.ratio_level not in ("token", "joint"):
        valid = "'token' or 'joint', because the tokens of an action have no order"
        raise ConfigError("ratio_level", domain.ratio_level, valid)
    return domain


def check_hparams(config: Config, hparams: HParams) -> None:
    """Refuses parameters that the environment does not take. Raises ConfigError."""
    if hparams.env_params:
        _check_params(config, tuple(hparams.env_params))


@functools.cache
def _check_params(config: Config, names: tuple[str, ...]) -> None:
    environments.check_params(environments.make(config), names)


def _start_keys(key: Array) -> tuple[Array, Array]:
    """Keys of a run's parameters and environments, from the run's own."""
    key_params, key_envs = jax.random.split(jax.random.fold_in(key, INIT_STREAM))
    return key_params, key_envs


def open_env(config: Config, seeds: Iterable[int], devices: int = 1) -> environments.Environment:
    """The environment of runs of these seeds with its simulators made; see ``Environment.open``."""
    keys = jnp.stack([_start_keys(run_key(seed))[1] for seed in seeds])
    return environments.make(config).open(keys, devices)
