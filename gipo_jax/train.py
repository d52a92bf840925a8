"""The algorithm: act, store, learn from replay. Pure functions of one run, to jit, vmap and scan.

One iteration (``train_step``) acts with the current policy, labels the new data with advantages,
adds it to replay, and makes ``updates_per_iteration`` updates from samples of replay. All
randomness comes from ``fold_in(run key, iteration)``, so a run never depends on the runs beside it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.lax import stop_gradient

from gipo_jax import (
    advantages,
    buffer,
    diagnostics,
    environments,
    networks,
    normalizer,
    objectives,
    signatures,
)
from gipo_jax import rollout as rollouts
from gipo_jax.config import Config, ConfigError, HParams, check_fields, check_sizes
from gipo_jax.rollout import Transition

Metrics = dict[str, Array]


class ReplayRow(NamedTuple):
    """What replay keeps of a transition. Fields that the advantage mode does not need are None.

    ``stored`` keeps the labels made at collection; ``recomputed`` and ``vtrace`` keep what is
    needed to make them anew.
    """

    obs: Array
    action: Array
    behavior_log_prob: Array
    advantage: Array | None = None
    value_target: Array | None = None
    reward: Array | None = None
    terminated: Array | None = None
    truncated: Array | None = None
    final_obs: Array | None = None


class Learner(NamedTuple):
    """What updates change.

    Attributes:
        params: ``{"policy": ..., "value": ...}``.
        opt_state: an optimizer state for each of the two.
        objective_state: state of a stateful objective, else ``()``.
    """

    params: Any
    opt_state: Any
    objective_state: Any


class TrainState(NamedTuple):
    """Everything a run carries from one iteration to the next.

    Attributes:
        learner: parameters and optimizer.
        normalizer: moments of the observations, fixed within an iteration.
        envs: environments in mid-episode.
        replay: arrays ``[blocks, rollout_length, num_envs, ...]``.
        return_sum: sum of the returns of episodes that ended since the last logged point.
        episodes: their number.
        key: the run's key, never consumed, only folded.
        diverged_at: iteration whose updates gave non-finite parameters, -1 while none has; the
            learner is frozen from before that iteration on.
    """

    learner: Learner
    normalizer: normalizer.Normalizer
    envs: rollouts.EnvStates
    replay: Any
    return_sum: Array
    episodes: Array
    key: Array
    diverged_at: Array


class Batch(NamedTuple):
    """A labelled sample of replay; arrays ``[batch, ...]``, the behavior's ``[batch, tokens]``."""

    obs: Array
    action: Array
    behavior_log_prob: Array
    advantage: Array
    value_target: Array
    age: Array


class PolicyGradient(NamedTuple):
    """The objective at one batch: what its surrogate is and how it pulls on each log-probability.

    Attributes:
        surrogate: ``[batch, tokens]``, maximised.
        gradient: d surrogate / d log_ratio = u * A, same shape.
        weight: u, same shape.
        state: the objective's next state.
    """

    surrogate: Array
    gradient: Array
    weight: Array
    state: Any


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """A training program for one static configuration; every method is pure."""

    config: Config
    env: environments.Environment
    head: networks.ActionHead
    network: networks.Network
    objective: signatures.Spec

    def init(self, hparams: HParams) -> TrainState:
        """First state of a run; its key is ``fold_in(key(0), seed)``.

        Raises:
            ConfigError: ``config.max_buffer_size`` is left open.
        """
        key = jax.random.fold_in(jax.random.key(0), hparams.seed)
        key_params, key_envs = jax.random.split(jax.random.fold_in(key, _INIT_STREAM))
        params = self.network.init(key_params)
        optimizer = _optimizer(hparams)
        objective_state = signatures.first_state(self.objective, hparams.objective_params)
        return TrainState(
            learner=Learner(
                params, {k: optimizer.init(params[k]) for k in params}, objective_state
            ),
            normalizer=normalizer.init(self.env.obs_shape),
            envs=rollouts.reset(self.env, key_envs, self.config.num_envs),
            replay=self._empty_replay(),
            return_sum=jnp.zeros(()),
            episodes=jnp.zeros(()),
            key=key,
            diverged_at=jnp.int32(-1),
        )

    def train_step(
        self, state: TrainState, hparams: HParams, iteration: int | Array
    ) -> tuple[TrainState, Metrics]:
        """One iteration: act, store, learn.

        Args:
            state: state before the iteration.
            hparams: traced settings of the run.
            iteration: index from 0; under ``vmap`` the same for all runs.

        Returns:
            state after it, and means over its updates of the losses and gradient norms.
        """
        key_act, key_draw = jax.random.split(jax.random.fold_in(state.key, iteration))
        params = state.learner.params

        envs, transition, return_sum, episodes = rollouts.collect(
            self.env,
            self.head,
            lambda obs: self.network.policy(params, self._read(state.normalizer, obs)),
            state.envs,
            key_act,
            self.config.rollout_length,
        )
        transition = transition._replace(reward=transition.reward * hparams.reward_scale)
        block = self._label(params, state.normalizer, transition, hparams)
        state = state._replace(
            envs=envs,
            replay=buffer.add(state.replay, block, iteration),
            return_sum=state.return_sum + return_sum,
            episodes=state.episodes + episodes,
        )

        learner, metrics = self._learn(state, hparams, iteration, key_draw)
        state = _keep_finite(state, learner, iteration)
        if self.config.normalize_obs:
            state = state._replace(normalizer=normalizer.update(state.normalizer, transition.obs))
        return state, metrics

    def train_and_log(
        self, state: TrainState, hparams: HParams, start: int | Array, stop: int | Array
    ) -> tuple[TrainState, Metrics]:
        """Iterations ``start .. stop - 1``, then evaluation and diagnostics: one logged point.

        Args:
            state: state before iteration ``start``.
            hparams: traced settings of the run.
            start: first iteration; under ``vmap`` the same for all runs, as ``stop``.
            stop: one past the last iteration, > ``start``.

        Returns:
            state, and float32 scalars by name. NaN where undefined, such as the mean return of no
            episodes.
        """
        state = state._replace(return_sum=jnp.zeros(()), episodes=jnp.zeros(()))

        def step(iteration: Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            state, sums = carry
            state, metrics = self.train_step(state, hparams, iteration)
            return state, jax.tree.map(jnp.add, sums, metrics)

        shapes = jax.eval_shape(self.train_step, state, hparams, start)[1]
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        state, sums = jax.lax.fori_loop(start, stop, step, (state, zeros))
        learned = jnp.maximum(jnp.asarray(stop) - jnp.maximum(start, self._first_update), 0)
        metrics = {k: v / learned for k, v in sums.items()}
        metrics["episode_return"] = state.return_sum / state.episodes
        metrics["episodes"] = state.episodes

        last = jnp.asarray(stop) - 1
        key_evaluate, key_diagnose = jax.random.split(
            jax.random.fold_in(jax.random.fold_in(state.key, _LOG_STREAM), last)
        )
        metrics |= self._diagnose(state, hparams, last, key_diagnose)
        if self.config.eval_episodes:
            metrics["eval_return"], metrics["eval_return_sampled"] = rollouts.evaluate(
                self.env,
                self.head,
                lambda obs: self.network.policy(
                    state.learner.params, self._read(state.normalizer, obs)
                ),
                key_evaluate,
                self.config.eval_episodes,
            )
        return state, metrics

    def _read(self, moments: normalizer.Normalizer, obs: Array) -> Array:
        """Observations as the networks take them."""
        obs = obs.astype(jnp.float32)
        return normalizer.normalize(moments, obs) if self.config.normalize_obs else obs

    def _label(
        self,
        params: Any,
        moments: normalizer.Normalizer,
        transition: Transition,
        hparams: HParams,
    ) -> ReplayRow:
        """The part of a rollout that replay keeps, with advantages where they are stored."""
        kept = ReplayRow(transition.obs, transition.action, transition.behavior_log_prob)
        if self.config.advantage_mode != "stored":
            return kept._replace(
                reward=transition.reward,
                terminated=transition.terminated,
                truncated=transition.truncated,
                final_obs=transition.final_obs,
            )
        advantage, value_target = advantages.gae(
            transition.reward,
            transition.terminated,
            transition.truncated,
            self.network.value(params, self._read(moments, transition.obs)),
            self.network.value(params, self._read(moments, transition.final_obs)),
            hparams.gamma,
            hparams.gae_lambda,
        )
        return kept._replace(advantage=advantage, value_target=value_target)

    @property
    def _first_update(self) -> int:
        """First iteration that updates: without replacement, once replay holds a whole batch."""
        if self.config.sampling == "uniform":
            return 0
        return -(-self.config.batch_size // self.config.block_size) - 1

    def _learn(
        self, state: TrainState, hparams: HParams, iteration: int | Array, key: Array
    ) -> tuple[Learner, Metrics]:
        """The update phase. Updates wait until replay holds a batch drawn without replacement."""
        config = self.config
        updates = config.updates_per_iteration * config.reuse_per_batch
        indices = self._draw(key, hparams, iteration, config.updates_per_iteration)

        def update(learner: Learner, count: Array) -> tuple[Learner, Metrics]:
            index = indices[count // config.reuse_per_batch]
            batch = self._sample(state, learner.params, hparams, index, iteration)
            # The authors' damping of reused batches.
            scale = 1 / jnp.sqrt(count % config.reuse_per_batch + 1.0)
            if config.policy_delay == 1:
                return self._update_both(state, learner, batch, hparams, iteration, scale)
            return jax.lax.cond(
                count % config.policy_delay == 0,
                lambda: self._update_both(state, learner, batch, hparams, iteration, scale),
                lambda: self._update_value(learner, batch, hparams, iteration),
            )

        def learn(learner: Learner) -> tuple[Learner, Metrics]:
            learner, metrics = jax.lax.scan(update, learner, jnp.arange(updates))
            actor_updates = -(-updates // config.policy_delay)
            return learner, {
                name: jnp.sum(x) / (updates if name.startswith("value") else actor_updates)
                for name, x in metrics.items()
            }

        if self._first_update == 0:
            return learn(state.learner)
        shapes = jax.eval_shape(learn, state.learner)[1]
        return jax.lax.cond(
            jnp.asarray(iteration) >= self._first_update,
            learn,
            lambda learner: (learner, jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)),
            state.learner,
        )

    def _draw(self, key: Array, hparams: HParams, iteration: int | Array, batches: int) -> Array:
        """Newest-first indices of rows, or of segments, ``[batches, per batch]``."""
        config = self.config
        rows = 1 if config.advantage_mode == "stored" else config.rollout_length
        size, block = config.batch_size // rows, config.block_size // rows
        _, valid = buffer.window(iteration, hparams.buffer_size, config.block_size)
        draw = buffer.draw_shuffled if config.sampling == "shuffled" else buffer.draw_uniform
        key_all, key_recent = jax.random.split(key)
        index = draw(key_all, batches, size, valid // rows)
        recent = buffer.draw_uniform(key_recent, batches, size, block)
        return jnp.where(jnp.arange(size) < hparams.recent_fraction * size, recent, index)

    def _sample(
        self,
        state: TrainState,
        params: Any,
        hparams: HParams,
        index: Array,
        iteration: int | Array,
    ) -> Batch:
        """Gathers a batch and gives it advantages and value targets."""
        if self.config.advantage_mode == "stored":
            row, age = buffer.take_rows(state.replay, index, iteration)
            obs = self._read(state.normalizer, row.obs)
            return Batch(
                obs, row.action, row.behavior_log_prob, row.advantage, row.value_target, age
            )
        segment, age = buffer.take_segments(state.replay, index, iteration)
        obs = self._read(state.normalizer, segment.obs)
        final_obs = self._read(state.normalizer, segment.final_obs)
        rewards = (segment.reward, segment.terminated, segment.truncated)
        outputs, value = self.network.policy_and_value(params, obs)
        next_value = self.network.value(params, final_obs)
        if self.config.advantage_mode == "vtrace":
            log_prob = self.head.log_prob(outputs, segment.action)
            log_ratio = jnp.sum(log_prob - segment.behavior_log_prob, axis=-1)
            labels = advantages.vtrace(log_ratio, *rewards, value, next_value, hparams.gamma)
        else:
            labels = advantages.gae(*rewards, value, next_value, hparams.gamma, hparams.gae_lambda)
        batch = Batch(
            obs,
            segment.action,
            segment.behavior_log_prob,
            *stop_gradient(labels),
            jnp.broadcast_to(age, value.shape),
        )
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)

    def _policy_gradient(
        self, state: TrainState, learner: Learner, hparams: HParams, batch: Batch, log_prob: Array
    ) -> PolicyGradient:
        """Evaluates the objective, and only what it asks for, at log pi(a|s) = ``log_prob``."""
        joint = self.config.joint_ratio

        def ratio(log_prob: Array) -> Array:
            log_ratio = log_prob - batch.behavior_log_prob
            return jnp.sum(log_ratio, axis=-1, keepdims=True) if joint else log_ratio

        log_ratio = stop_gradient(ratio(log_prob))
        advantage = jnp.broadcast_to(self._advantage(batch), log_ratio.shape)
        extra: dict[str, Any] = dict(hparams.objective_params)
        if self.objective.takes_kernel:
            extra["kernel"] = self.config.kernel
        if "behavior_log_prob" in self.objective.inputs:
            behavior = batch.behavior_log_prob
            extra["behavior_log_prob"] = (
                jnp.sum(behavior, axis=-1, keepdims=True) if joint else behavior
            )
        if "log_ratio_start" in self.objective.inputs:
            outputs = self.network.policy(state.learner.params, batch.obs)
            extra["log_ratio_start"] = ratio(self.head.log_prob(outputs, batch.action))
        if self.objective.initial_state is not None:
            extra["state"] = learner.objective_state

        def surrogate(log_ratio: Array) -> tuple[Array, Any]:
            return signatures.evaluate(self.objective, log_ratio, advantage, **extra)

        value, pullback, objective_state = jax.vjp(surrogate, log_ratio, has_aux=True)
        gradient = pullback(jnp.ones_like(value))[0]
        weight = jnp.where(advantage == 0, 0.0, gradient / jnp.where(advantage == 0, 1, advantage))
        return PolicyGradient(value, gradient, weight, objective_state)

    def _advantage(self, batch: Batch) -> Array:
        """Advantages of a batch, ``[batch, 1]``, standardised where the configuration says so."""
        advantage = batch.advantage
        if self.config.normalize_advantage:
            deviation = advantage - jnp.mean(advantage)
            advantage = deviation / jnp.maximum(jnp.std(advantage), 1e-8)
        return advantage[:, None]

    def _update_both(
        self,
        state: TrainState,
        learner: Learner,
        batch: Batch,
        hparams: HParams,
        iteration: int | Array,
        scale: Array,
    ) -> tuple[Learner, Metrics]:
        """One update of policy and value."""

        def loss(params: Any) -> tuple[Array, tuple[PolicyGradient, Metrics]]:
            outputs, value = self.network.policy_and_value(params, batch.obs)
            log_prob = self.head.log_prob(outputs, batch.action)
            entropy = jnp.mean(self.head.entropy(outputs))
            value_loss = jnp.mean((value - batch.value_target) ** 2)
            result = self._policy_gradient(state, learner, hparams, batch, log_prob)
            log_ratio = log_prob - batch.behavior_log_prob
            pull = jnp.mean(result.gradient * log_prob)
            if self.config.joint_ratio:
                pull = pull * self.head.num_tokens
            total = (
                -scale * pull
                - hparams.entropy_coef * entropy
                + hparams.kl_coef * jnp.mean(_kl_pull(log_ratio))
                + hparams.value_coef * value_loss
            )
            metrics = {
                "policy_loss": -jnp.mean(result.surrogate),
                "value_loss": value_loss,
                "entropy": entropy,
                "kl": jnp.mean(_kl(log_ratio)),
            }
            return total, (result, metrics)

        grads, (result, metrics) = jax.grad(loss, has_aux=True)(learner.params)
        ess = diagnostics.effective_sample_size(result.weight)
        rate = hparams.learning_rate * ess**hparams.ess_lr_power
        schedule = self._schedule(hparams, iteration)
        policy, policy_opt, metrics["grad_norm"] = _apply(
            learner, "policy", grads, hparams, rate * schedule
        )
        value, value_opt, metrics["value_grad_norm"] = _apply(
            learner, "value", grads, hparams, hparams.value_learning_rate * schedule
        )
        learner = Learner(
            {"policy": policy, "value": value},
            {"policy": policy_opt, "value": value_opt},
            result.state,
        )
        return learner, metrics

    def _update_value(
        self, learner: Learner, batch: Batch, hparams: HParams, iteration: int | Array
    ) -> tuple[Learner, Metrics]:
        """One update of the value function alone; it neither runs nor changes the policy's part."""

        def loss(value_params: Any) -> Array:
            params = {"policy": learner.params["policy"], "value": value_params}
            return jnp.mean((self.network.value(params, batch.obs) - batch.value_target) ** 2)

        value_loss, grads = jax.value_and_grad(loss)(learner.params["value"])
        grads = {"value": jax.tree.map(lambda g: hparams.value_coef * g, grads)}
        rate = hparams.value_learning_rate * self._schedule(hparams, iteration)
        value, opt, norm = _apply(learner, "value", grads, hparams, rate)
        zero = jnp.zeros(())
        metrics = {
            "policy_loss": zero,
            "value_loss": value_loss,
            "entropy": zero,
            "kl": zero,
            "grad_norm": zero,
            "value_grad_norm": norm,
        }
        return learner._replace(
            params=learner.params | {"value": value}, opt_state=learner.opt_state | {"value": opt}
        ), metrics

    def _schedule(self, hparams: HParams, iteration: int | Array) -> Array:
        """Factor on the learning rates: linear warm-up, then the configured decay."""
        total = self.config.num_iterations
        done = jnp.asarray(iteration, jnp.float32)
        warmup = jnp.asarray(hparams.warmup_iterations, jnp.float32)
        warm = jnp.minimum((done + 1) / jnp.maximum(warmup, 1.0), 1.0)
        progress = jnp.clip((done - warmup) / jnp.maximum(total - warmup, 1.0), 0.0, 1.0)
        if self.config.schedule == "linear":
            return warm * (1 - progress)
        if self.config.schedule == "cosine":
            return warm * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return warm

    def _diagnose(
        self, state: TrainState, hparams: HParams, iteration: int | Array, key: Array
    ) -> Metrics:
        """Utilization of a fresh sample of replay under the policy as it now is."""
        index = self._draw(key, hparams, iteration, 1)[0]
        batch = self._sample(state, state.learner.params, hparams, index, iteration)
        outputs, value = self.network.policy_and_value(state.learner.params, batch.obs)
        log_prob = self.head.log_prob(outputs, batch.action)
        result = self._policy_gradient(state, state.learner, hparams, batch, log_prob)
        log_ratio = log_prob - batch.behavior_log_prob
        if self.config.joint_ratio:
            log_ratio = jnp.sum(log_ratio, axis=-1, keepdims=True)
        return diagnostics.utilization(
            log_ratio,
            jnp.broadcast_to(self._advantage(batch), log_ratio.shape),
            result.weight,
            result.weight * jnp.exp(-jnp.maximum(log_ratio, -80.0)),
            batch.age[:, None],
        ) | {"explained_variance": diagnostics.explained_variance(batch.value_target, value)}

    def _empty_replay(self) -> Any:
        config, env, head = self.config, self.env, self.head
        lead = (config.rollout_length, config.num_envs)

        def like(shape: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
            return jax.ShapeDtypeStruct((*lead, *shape), dtype)

        obs, token = like(env.obs_shape, env.obs_dtype), (head.num_tokens,)
        block = ReplayRow(
            obs, like(token, jnp.int32 if head.discrete else jnp.float32), like(token)
        )
        if config.advantage_mode == "stored":
            block = block._replace(advantage=like(()), value_target=like(()))
        else:
            block = block._replace(
                reward=like(()),
                terminated=like((), jnp.bool_),
                truncated=like((), jnp.bool_),
                final_obs=obs,
            )
        if config.max_buffer_size is None:
            valid = "the largest buffer_size that the algorithm will run with"
            raise ConfigError("max_buffer_size", None, valid)
        return buffer.init(block, config.max_buffer_size // config.block_size)


_DEFAULTS = HParams()

# Streams folded into a run's key where iterations are not: beyond any iteration's index.
_INIT_STREAM = 2**31 - 1
_LOG_STREAM = 2**31 - 2


def make(config: Config) -> Algorithm:
    """Builds the training program of a static configuration, without compiling anything.

    Raises:
        ConfigError: a setting is not usable; see the message.
    """
    check_fields(config)
    env = environments.make(config)
    objective = objectives.spec(config.objective)
    head = networks.make_head(config, env)
    if objective.discrete_only and not head.discrete:
        valid = f"'tokens', because {objective.name} reads probabilities of discrete actions"
        raise ConfigError("action_head", config.action_head, valid)
    return Algorithm(config, env, head, networks.make(config, env.obs_shape, head), objective)


def make_hparams(
    config: Config, *, objective_params: Mapping[str, float] | None = None, **overrides: Any
) -> HParams:
    """Traced settings of a run, complete and checked.

    Args:
        config: the static settings they go with.
        objective_params: the objective's own parameters; those not given take their defaults.
        overrides: fields of ``HParams``; a parameter of the objective may be given here too.

    Raises:
        ConfigError: unknown, out of range, or at odds with ``config``.
    """
    spec = objectives.spec(config.objective)
    own = {name: overrides.pop(name) for name in spec.params if name in overrides}
    own |= objective_params or {}
    fields = {field.name for field in dataclasses.fields(HParams)}
    for name in (set(own) - set(spec.params)) | (set(overrides) - fields):
        valid = sorted(spec.params) + sorted(fields - {"objective_params"})
        raise ConfigError(name, own.get(name, overrides.get(name)), f"one of {', '.join(valid)}")
    overrides.setdefault("learning_rate", _DEFAULTS.learning_rate)
    if overrides.get("value_learning_rate") is None:
        overrides["value_learning_rate"] = overrides["learning_rate"]
    hparams = HParams(**overrides, objective_params=spec.params | own)
    check_fields(hparams)
    signatures.check_params(spec, hparams.objective_params)
    check_sizes(config, hparams)
    return hparams


def log_boundaries(config: Config) -> list[int]:
    """Iterations after which a point is logged: ``num_logs`` evenly spaced, every one if fewer."""
    points = min(config.num_logs, config.num_iterations)
    return [config.num_iterations * (i + 1) // points for i in range(points)]


def train(config: Config, hparams: HParams) -> tuple[TrainState, Metrics]:
    """Trains one run from start to end.

    Args:
        config: static settings.
        hparams: from ``make_hparams``.

    Returns:
        final state, and metrics ``[logged points]`` by name.
    """
    if config.max_buffer_size is None:
        config = dataclasses.replace(config, max_buffer_size=int(hparams.buffer_size))
    algorithm = make(config)
    check_sizes(config, hparams)
    train_and_log: Callable[..., Any] = jax.jit(algorithm.train_and_log, donate_argnums=0)
    state = jax.jit(algorithm.init)(hparams)
    points, start = [], 0
    for stop in log_boundaries(config):
        state, metrics = train_and_log(state, hparams, start, stop)
        points.append(metrics)
        start = stop
    return state, jax.tree.map(lambda *x: jnp.stack(x), *points)


def _optimizer(hparams: HParams) -> optax.GradientTransformation:
    # Flat: on CPU a dozen small arrays cost several times one vector of their total length.
    return optax.flatten(
        optax.chain(
            optax.clip_by_global_norm(hparams.max_grad_norm),
            optax.scale_by_adam(eps=1e-5),
        )
    )


def _apply(
    learner: Learner, group: str, grads: Any, hparams: HParams, rate: Array
) -> tuple[Any, Any, Array]:
    """One optimizer step of a parameter group: its parameters, optimizer state, gradient norm."""
    params, grads = learner.params[group], grads[group]
    updates, opt_state = _optimizer(hparams).update(grads, learner.opt_state[group], params)
    updates = jax.tree.map(lambda u: -rate * u, updates)
    return optax.apply_updates(params, updates), opt_state, optax.tree.norm(grads)


def _kl(log_ratio: Array) -> Array:
    """Estimate of KL(mu || pi) from actions of mu, per token: r - 1 - log r, r bounded to e^20."""
    return jnp.exp(jnp.minimum(log_ratio, 20.0)) - 1 - log_ratio


def _kl_pull(log_ratio: Array) -> Array:
    """Something whose gradient is that of ``_kl``, r - 1, with r bounded to 20.

    The bound only acts where pi takes an action 20 times as often as mu did; without it a few
    stale samples would decide the whole batch.
    """
    return stop_gradient(jnp.minimum(jnp.exp(log_ratio), 20.0) - 1) * log_ratio


def _keep_finite(state: TrainState, learner: Learner, iteration: int | Array) -> TrainState:
    """Takes the new learner, unless it or an earlier one is not finite."""
    sums = [jnp.sum(x) for x in jax.tree.leaves((learner.params, learner.objective_state))]
    finite = jnp.all(jnp.isfinite(jnp.stack(sums)))
    good = finite & (state.diverged_at < 0)
    return state._replace(
        learner=jax.tree.map(lambda new, old: jnp.where(good, new, old), learner, state.learner),
        diverged_at=jnp.where(
            finite | (state.diverged_at >= 0), state.diverged_at, jnp.int32(iteration)
        ),
    )
