"""The algorithm: act, label, store, sample, loss, update.

``make_train(config)`` is a whole run as one pure function of its hyper-parameters, buffer size
included::

    state, metrics = jax.jit(jax.vmap(make_train(config)))(hparams)

``train_step`` is one iteration and reads from top to bottom. It collects data with the current
policy, labels it with advantages, adds it to replay, and makes updates from samples of replay. All
randomness comes from ``fold_in(run key, iteration)``, so a run never depends on the runs beside it.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.lax import stop_gradient

from gipo_jax import (
    advantages,
    buffer,
    diagnostics,
    environments,
    losses,
    networks,
    normalizer,
    objectives,
    ratio_levels,
    signatures,
)
from gipo_jax import rollout as rollouts
from gipo_jax.config import Config, ConfigError, HParams, check_fields, check_sizes, stack
from gipo_jax.flow import tasks as flows
from gipo_jax.losses import Batch, BoundObjective
from gipo_jax.rollout import Transition
from gipo_jax.sequences import tasks

Metrics = dict[str, Array]


class ReplayRow(NamedTuple):
    """What replay keeps of a transition. Fields that the advantage mode does not need are None.

    ``stored`` keeps the advantages made at collection. ``recomputed`` and ``vtrace`` keep what is
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
        solved: how many of them solved the task, where the environment says so.
        key: the run's key, never consumed, only folded.
        diverged_at: iteration whose updates gave non-finite parameters, -1 while none has; the
            learner is frozen from before that iteration on.
        counts: sums since the last logged point to report by name, where the algorithm has any.
        selection: what a selection of data has learned, on token tasks.
        reference: parameters of the reference policy, in preference training.
    """

    learner: Learner
    normalizer: normalizer.Normalizer
    envs: rollouts.EnvStates
    replay: Any
    return_sum: Array
    episodes: Array
    solved: Array
    key: Array
    diverged_at: Array
    counts: Any = ()
    selection: Any = ()
    reference: Any = ()


class Parts(NamedTuple):
    """What a static configuration consists of."""

    config: Config
    env: environments.Environment
    head: networks.ActionHead
    network: networks.Network
    objective: signatures.Spec
    ratio_level: str


# One iteration, from top to bottom.


def train_step(
    parts: Parts, state: TrainState, hparams: HParams, iteration: int | Array
) -> tuple[TrainState, Metrics]:
    """One iteration: act, label, store, learn.

    Args:
        parts: of the configuration.
        state: state before the iteration.
        hparams: traced settings of the run.
        iteration: index from 0; under ``vmap`` the same for all runs.

    Returns:
        state after it, and means over its updates of the losses and gradient norms.
    """
    key_act, key_learn = jax.random.split(jax.random.fold_in(state.key, iteration))

    state, transition = act(parts, state, hparams, key_act)
    rows = label(parts, state, hparams, transition)
    state = state._replace(replay=buffer.add(state.replay, rows, iteration))
    learner, metrics = learn(parts, state, hparams, iteration, key_learn)

    state = keep_finite(state, learner, iteration)
    if parts.config.normalize_obs:
        state = state._replace(normalizer=normalizer.update(state.normalizer, transition.obs))
    return state, metrics


def act(
    parts: Parts, state: TrainState, hparams: HParams, key: Array
) -> tuple[TrainState, Transition]:
    """Collects a rollout with the current policy; arrays ``[rollout_length, num_envs, ...]``."""
    envs, transition, return_sum, episodes = rollouts.collect(
        parts.env,
        parts.head,
        policy_of(parts, state.learner.params, state.normalizer),
        state.envs,
        key,
        parts.config.rollout_length,
    )
    transition = transition._replace(reward=transition.reward * hparams.reward_scale)
    solved = state.solved
    if parts.env.reports_success:
        solved += rollouts.solved_episodes(envs) - rollouts.solved_episodes(state.envs)
    state = state._replace(
        envs=envs,
        return_sum=state.return_sum + return_sum,
        episodes=state.episodes + episodes,
        solved=solved,
    )
    return state, transition


def label(parts: Parts, state: TrainState, hparams: HParams, transition: Transition) -> ReplayRow:
    """The part of a rollout that replay keeps, with advantages where they are stored."""
    row = ReplayRow(transition.obs, transition.action, transition.behavior_log_prob)
    if parts.config.advantage_mode != "stored":
        return row._replace(
            reward=transition.reward,
            terminated=transition.terminated,
            truncated=transition.truncated,
            final_obs=transition.final_obs,
        )
    value = functools.partial(parts.network.value, state.learner.params)
    advantage, value_target = advantages.gae(
        transition.reward,
        transition.terminated,
        transition.truncated,
        value(_network_input(parts, state.normalizer, transition.obs)),
        value(_network_input(parts, state.normalizer, transition.final_obs)),
        hparams.gamma,
        hparams.gae_lambda,
    )
    return row._replace(advantage=advantage, value_target=value_target)


def learn(
    parts: Parts, state: TrainState, hparams: HParams, iteration: int | Array, key: Array
) -> tuple[Learner, Metrics]:
    """The update phase. Updates wait until replay holds a batch drawn without replacement."""
    config = parts.config
    updates = config.updates_per_iteration * config.reuse_per_batch
    indices = sample_indices(config, hparams, iteration, key, config.updates_per_iteration)

    def one_update(learner: Learner, count: Array) -> tuple[Learner, Metrics]:
        index = indices[count // config.reuse_per_batch]
        batch = gather(parts, state, learner.params, hparams, index, iteration)
        policy_scale = reuse_scale(config, count)

        def policy_and_value() -> tuple[Learner, Metrics]:
            return update(parts, state, learner, batch, hparams, iteration, policy_scale)

        if config.policy_delay == 1:
            return policy_and_value()
        return jax.lax.cond(
            count % config.policy_delay == 0,
            policy_and_value,
            lambda: update_value(parts, learner, batch, hparams, iteration),
        )

    def all_updates(learner: Learner) -> tuple[Learner, Metrics]:
        learner, metrics = jax.lax.scan(one_update, learner, jnp.arange(updates))
        policy_updates = -(-updates // config.policy_delay)
        return learner, {
            name: jnp.sum(x) / (updates if name.startswith("value") else policy_updates)
            for name, x in metrics.items()
        }

    return once_filled(config, iteration, all_updates, state.learner)


def once_filled(
    config: Config,
    iteration: int | Array,
    all_updates: Callable[[Learner], tuple[Learner, Metrics]],
    learner: Learner,
) -> tuple[Learner, Metrics]:
    """The updates, from the first iteration on that has a batch; before it zeros as metrics."""
    if first_update(config) == 0:
        return all_updates(learner)
    shapes = jax.eval_shape(all_updates, learner)[1]
    return jax.lax.cond(
        jnp.asarray(iteration) >= first_update(config),
        all_updates,
        lambda learner: (learner, jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)),
        learner,
    )


def reuse_scale(config: Config, count: Array) -> Array:
    """Factor on the policy's loss in update ``count`` of an iteration: the authors' damping."""
    return 1 / jnp.sqrt(count % config.reuse_per_batch + 1.0)


def sample_indices(
    config: Config, hparams: HParams, iteration: int | Array, key: Array, batches: int
) -> Array:
    """Newest-first indices of rows, or of segments, ``[batches, per batch]``.

    The newest ``min_age`` iterations are left out, and ``recent_fraction`` of each batch comes from
    the newest one of the rest.
    """
    rows = 1 if config.advantage_mode == "stored" else config.rollout_length
    size, block = config.batch_size // rows, config.block_size // rows
    skipped, valid = buffer.window(
        iteration, hparams.buffer_size, config.block_size, hparams.min_age
    )
    draw = buffer.draw_shuffled if config.sampling == "shuffled" else buffer.draw_uniform
    key_all, key_recent = jax.random.split(key)
    index = draw(key_all, batches, size, valid // rows)
    recent = buffer.draw_uniform(key_recent, batches, size, block)
    from_newest = jnp.arange(size) < hparams.recent_fraction * size
    return skipped // rows + jnp.where(from_newest, recent, index)


def gather(
    parts: Parts,
    state: TrainState,
    params: Any,
    hparams: HParams,
    index: Array,
    iteration: int | Array,
) -> Batch:
    """A batch of replay with advantages and value targets, made anew where they are not stored."""
    config, network = parts.config, parts.network
    read = functools.partial(_network_input, parts, state.normalizer)
    if config.advantage_mode == "stored":
        row, age = buffer.take_rows(state.replay, index, iteration)
        return Batch(
            read(row.obs),
            row.action,
            row.behavior_log_prob,
            row.advantage,
            row.value_target,
            age,
        )
    segment, age = buffer.take_segments(state.replay, index, iteration)
    obs = read(segment.obs)
    rewards = (segment.reward, segment.terminated, segment.truncated)
    outputs, value = network.policy_and_value(params, obs)
    next_value = network.value(params, read(segment.final_obs))
    if config.advantage_mode == "vtrace":
        log_prob = parts.head.log_prob(outputs, segment.action)
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


def update(
    parts: Parts,
    state: TrainState,
    learner: Learner,
    batch: Batch,
    hparams: HParams,
    iteration: int | Array,
    policy_scale: Array,
) -> tuple[Learner, Metrics]:
    """One update of policy and value."""
    advantage = _advantage(parts.config, batch)
    objective = bind_objective(parts, state, learner, hparams, batch)

    def loss(params: Any, probe: Array) -> tuple[Array, losses.Losses]:
        outputs, value = parts.network.policy_and_value(params, batch.obs)
        return losses.actor_critic_loss(
            parts.head.log_prob(outputs, batch.action),
            parts.head.entropy(outputs),
            value,
            batch,
            advantage,
            objective,
            hparams,
            parts.ratio_level,
            policy_scale,
            probe,
        )

    probe = jnp.zeros_like(batch.behavior_log_prob)
    (grads, probe_gradient), terms = jax.grad(loss, argnums=(0, 1), has_aux=True)(
        learner.params, probe
    )
    weight = losses.effective_weight(probe_gradient, advantage, policy_scale)
    ess = diagnostics.effective_sample_size(weight)

    schedule = learning_rate_factor(parts.config, hparams, iteration)
    policy_rate = hparams.learning_rate * ess**hparams.ess_lr_power * schedule
    value_rate = hparams.value_learning_rate * schedule
    policy, policy_opt, policy_norm = apply_gradient(learner, "policy", grads, hparams, policy_rate)
    value, value_opt, value_norm = apply_gradient(learner, "value", grads, hparams, value_rate)
    learner = Learner(
        {"policy": policy, "value": value},
        {"policy": policy_opt, "value": value_opt},
        terms.objective_state,
    )
    return learner, {
        "policy_loss": terms.policy_loss,
        "value_loss": terms.value_loss,
        "entropy": terms.entropy,
        "kl": terms.kl,
        "grad_norm": policy_norm,
        "value_grad_norm": value_norm,
    }


def update_value(
    parts: Parts, learner: Learner, batch: Batch, hparams: HParams, iteration: int | Array
) -> tuple[Learner, Metrics]:
    """One update of the value function alone; it neither runs nor changes the policy's part."""

    def loss(value_params: Any) -> tuple[Array, Array]:
        params = {"policy": learner.params["policy"], "value": value_params}
        error = jnp.mean((parts.network.value(params, batch.obs) - batch.value_target) ** 2)
        return hparams.value_coef * error, error

    grads, value_loss = jax.grad(loss, has_aux=True)(learner.params["value"])
    rate = hparams.value_learning_rate * learning_rate_factor(parts.config, hparams, iteration)
    value, opt_state, norm = apply_gradient(learner, "value", {"value": grads}, hparams, rate)
    learner = learner._replace(
        params=learner.params | {"value": value},
        opt_state=learner.opt_state | {"value": opt_state},
    )
    metrics = dict.fromkeys(("policy_loss", "entropy", "kl", "grad_norm"), jnp.zeros(()))
    return learner, metrics | {"value_loss": value_loss, "value_grad_norm": norm}


# What an iteration is made of.


def policy_of(
    parts: Parts, params: Any, moments: normalizer.Normalizer
) -> Callable[[Array], Array]:
    """The policy: observations ``[..., *obs_shape]`` -> outputs of the action head."""
    return lambda obs: parts.network.policy(params, _network_input(parts, moments, obs))


def bind_objective(
    parts: Parts, state: TrainState, learner: Learner, hparams: HParams, batch: Batch
) -> BoundObjective:
    """The objective with its parameters, and with the inputs and state that it asks for."""
    spec, behavior = parts.objective, batch.behavior_log_prob
    given = objective_settings(parts.config, spec, hparams, learner)
    start = None
    if "log_ratio_start" in spec.inputs:
        outputs = parts.network.policy(state.learner.params, batch.obs)
        start = parts.head.log_prob(outputs, batch.action) - behavior
    return losses.bind(spec, parts.ratio_level, given, behavior, start)


def objective_settings(
    config: Config, spec: signatures.Spec, hparams: HParams, learner: Learner
) -> dict[str, Any]:
    """What an objective takes that is the same for every sample: parameters, kernel, state."""
    given: dict[str, Any] = dict(hparams.objective_params)
    if spec.takes_kernel:
        given["kernel"] = config.kernel
    if spec.initial_state is not None:
        given["state"] = learner.objective_state
    return given


def learning_rate_factor(config: Config, hparams: HParams, iteration: int | Array) -> Array:
    """Factor on the learning rates: linear warm-up, then the configured decay.

    Optax's schedules take their lengths as Python numbers; here the warm-up is traced.
    """
    done = jnp.asarray(iteration, jnp.float32)
    warmup = jnp.asarray(hparams.warmup_iterations, jnp.float32)
    warm = jnp.minimum((done + 1) / jnp.maximum(warmup, 1.0), 1.0)
    progress = (done - warmup) / jnp.maximum(config.num_iterations - warmup, 1.0)
    progress = jnp.clip(progress, 0.0, 1.0)
    if config.schedule == "linear":
        return warm * (1 - progress)
    if config.schedule == "cosine":
        return warm * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return warm


def optimizer(hparams: HParams) -> optax.GradientTransformation:
    """Adam on gradients of bounded global norm, without the learning rate."""
    # Flat: on CPU a dozen small arrays cost several times one vector of their total length.
    return optax.flatten(
        optax.chain(
            _clip_by_global_norm(hparams.max_grad_norm),
            optax.scale_by_adam(eps=1e-5),
        )
    )


def _clip_by_global_norm(max_norm: Any) -> optax.GradientTransformation:
    """Like Optax's, but finite gradients whose squares overflow keep their direction.

    Optax divides by the norm, which is then infinite, and returns zeros.
    """

    def clip(updates: Any, params: Any = None) -> Any:
        largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in jax.tree.leaves(updates)]))
        # Squares of numbers below 1e18 do not overflow, and numbers stay as they are.
        shrink = jnp.where(largest > 1e18, 1e18 / largest, 1.0)
        updates = jax.tree.map(lambda x: x * shrink, updates)
        norm = optax.tree.norm(updates)
        factor = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda x: x * factor, updates)

    return optax.stateless(clip)


def apply_gradient(
    learner: Learner, group: str, grads: Any, hparams: HParams, rate: Array
) -> tuple[Any, Any, Array]:
    """One optimizer step of a parameter group: its parameters, optimizer state, gradient norm."""
    params, grads = learner.params[group], grads[group]
    updates, opt_state = optimizer(hparams).update(grads, learner.opt_state[group], params)
    updates = jax.tree.map(lambda u: -rate * u, updates)
    return optax.apply_updates(params, updates), opt_state, optax.tree.norm(grads)


def _network_input(parts: Parts, moments: normalizer.Normalizer, obs: Array) -> Array:
    """Observations as the networks take them."""
    scale = 255.0 if obs.dtype == jnp.uint8 else 1.0
    obs = obs.astype(jnp.float32) / scale
    return normalizer.normalize(moments, obs) if parts.config.normalize_obs else obs


def _advantage(config: Config, batch: Batch) -> Array:
    """Advantages as the objective sees them, ``[batch, tokens]``."""
    standard = config.normalize_advantage is not False
    advantage = losses.standardize(batch.advantage) if standard else batch.advantage
    return jnp.broadcast_to(advantage[:, None], batch.behavior_log_prob.shape)


def keep_finite(state: TrainState, learner: Learner, iteration: int | Array) -> TrainState:
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


# The start of a run, and what is reported of it.


def init(parts: Parts, hparams: HParams) -> TrainState:
    """First state of a run; its key is ``fold_in(key(0), seed)``."""
    key, key_params, key_envs = start_keys(hparams.seed)
    params = parts.network.init(key_params)
    opt_state = {group: optimizer(hparams).init(params[group]) for group in params}
    objective_state = signatures.first_state(parts.objective, hparams.objective_params)
    return TrainState(
        learner=Learner(params, opt_state, objective_state),
        normalizer=normalizer.init(parts.env.obs_shape),
        envs=rollouts.reset(parts.env, key_envs, parts.config.num_envs),
        replay=empty_replay(parts),
        return_sum=jnp.zeros(()),
        episodes=jnp.zeros(()),
        solved=jnp.zeros(()),
        key=key,
        diverged_at=jnp.int32(-1),
    )


def start_keys(seed: Any) -> tuple[Array, Array, Array]:
    """Keys of a run with a seed: its own, one for the parameters, one for the environments."""
    key = jax.random.fold_in(jax.random.key(0), seed)
    key_params, key_envs = jax.random.split(jax.random.fold_in(key, INIT_STREAM))
    return key, key_params, key_envs


def open_env(config: Config, seeds: Iterable[int], devices: int = 1) -> environments.Environment:
    """The environment of some runs, with its simulators made; see ``environments.open_pools``.

    Args:
        config: static settings.
        seeds: of the runs that will start in it, each as often as there are such runs.
        devices: devices that share the runs evenly, in order.
    """
    keys = jnp.stack([start_keys(seed)[2] for seed in seeds])
    return environments.open_pools(environments.make(config), keys, devices)


def empty_replay(parts: Parts) -> Any:
    """Replay with nothing in it, arrays ``[blocks, rollout_length, num_envs, ...]``."""
    config, env, head = parts.config, parts.env, parts.head

    def like(shape: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct((config.rollout_length, config.num_envs, *shape), dtype)

    obs, token = like(env.obs_shape, env.obs_dtype), (head.num_tokens,)
    action = like(token, jnp.int32 if head.discrete else jnp.float32)
    row = ReplayRow(obs, action, like(token))
    if config.advantage_mode == "stored":
        row = row._replace(advantage=like(()), value_target=like(()))
    else:
        flag = like((), jnp.bool_)
        row = row._replace(reward=like(()), terminated=flag, truncated=flag, final_obs=obs)
    return buffer.init(row, config.allocated_size // config.block_size)


def report(
    parts: Parts, state: TrainState, hparams: HParams, iteration: int | Array, key: Array
) -> Metrics:
    """Diagnostics of a fresh sample of replay under the policy as it now is, and evaluation."""
    key_evaluate, key_diagnose = jax.random.split(key)
    config, params = parts.config, state.learner.params
    index = sample_indices(config, hparams, iteration, key_diagnose, 1)[0]
    batch = gather(parts, state, params, hparams, index, iteration)
    outputs, value = parts.network.policy_and_value(params, batch.obs)
    log_prob = parts.head.log_prob(outputs, batch.action)
    log_ratio = log_prob - batch.behavior_log_prob
    log_ratio = ratio_levels.transform(log_ratio, parts.ratio_level)
    advantage = _advantage(config, batch)
    objective = bind_objective(parts, state, state.learner, hparams, batch)
    weight = losses.objective_weight(objective, log_ratio, advantage)
    metrics = diagnostics.utilization(log_ratio, advantage, weight, batch.age[:, None])
    metrics["explained_variance"] = diagnostics.explained_variance(batch.value_target, value)
    if parts.env.reports_success:
        metrics["success_rate"] = state.solved / state.episodes
    episodes = config.eval_episodes
    if episodes is None:
        episodes = 0 if parts.env.host else 10
    if episodes:
        metrics["eval_return"], metrics["eval_return_sampled"] = evaluate(
            parts, params, state.normalizer, key_evaluate, episodes
        )
    return metrics


def evaluate(
    parts: Parts, params: Any, moments: normalizer.Normalizer, key: Array, episodes: int
) -> tuple[Array, Array]:
    """Mean return of fresh episodes with the most likely actions, and with sampled ones."""
    policy = policy_of(parts, params, moments)
    return rollouts.evaluate(parts.env, parts.head, policy, key, episodes)


def choose_action(
    parts: Parts, params: Any, moments: normalizer.Normalizer, obs: Array, key: Array | None = None
) -> Array:
    """Action ``[..., *action_shape]`` for observations, sampled with a key, else the most likely.

    It is what the environment's ``step`` takes.
    """
    head, obs = parts.head, jnp.asarray(obs)
    outputs = policy_of(parts, params, moments)(obs)
    if key is None:
        return head.to_env(head.mode(outputs))
    batch = obs.shape[: obs.ndim - len(parts.env.obs_shape)]
    return head.to_env(head.sample(outputs, head.noise(key, batch)))


def first_update(config: Config) -> int:
    """First iteration that updates: without replacement, once replay holds a whole batch."""
    if config.sampling == "uniform":
        return 0
    return -(-config.batch_size // config.block_size) - 1


# Streams folded into a run's key where iterations are not: beyond any iteration's index.
INIT_STREAM = 2**31 - 1
_LOG_STREAM = 2**31 - 2


# Whole runs, of this algorithm or any other with the same functions.


class Algorithm(NamedTuple):
    """A training program for one static configuration; every function is pure.

    Attributes:
        config: the configuration.
        env: its environment, or task.
        objective: what its objective needs.
        init: ``hparams -> state``.
        train_step: ``state, hparams, iteration -> state, metrics``.
        report: ``state, hparams, iteration, key -> metrics`` of a logged point.
        evaluate: ``params, normalizer, key, episodes -> greedy, sampled`` mean return.
        choose_action: ``params, normalizer, obs, key=None -> action``.
        first_update: first iteration that updates.
        activations: about how many numbers an update keeps for each sample, to plan memory.
        host: whether its environments are simulated outside JAX, and so cannot be vmapped.
    """

    config: Config
    env: Any
    objective: signatures.Spec
    init: Callable[[HParams], TrainState]
    train_step: Callable[[TrainState, HParams, Any], tuple[TrainState, Metrics]]
    report: Callable[[TrainState, HParams, Any, Array], Metrics]
    evaluate: Callable[..., tuple[Array, Array]]
    choose_action: Callable[..., Array]
    first_update: int
    activations: int
    host: bool = False

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
        zero = jnp.zeros(())
        counts = jax.tree.map(jnp.zeros_like, state.counts)
        state = state._replace(return_sum=zero, episodes=zero, solved=zero, counts=counts)

        def step(iteration: Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            state, sums = carry
            state, metrics = self.train_step(state, hparams, iteration)
            return state, jax.tree.map(jnp.add, sums, metrics)

        shapes = jax.eval_shape(self.train_step, state, hparams, start)[1]
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        state, sums = jax.lax.fori_loop(start, stop, step, (state, zeros))
        learned = jnp.maximum(jnp.asarray(stop) - jnp.maximum(start, self.first_update), 0)
        metrics = {name: x / learned for name, x in sums.items()}
        metrics["episode_return"] = state.return_sum / state.episodes
        metrics["episodes"] = state.episodes

        last = jnp.asarray(stop) - 1
        key = jax.random.fold_in(jax.random.fold_in(state.key, _LOG_STREAM), last)
        return state, metrics | self.report(state, hparams, last, key)


def make_train(
    config: Config, env: environments.Environment | None = None
) -> Callable[[HParams], tuple[TrainState, Metrics]]:
    """A whole run, start to end, as one pure function of its hyper-parameters.

    It works under ``jit``, ``vmap``, ``lax.map`` and ``shard_map``, alone and combined, with any
    traced settings mixed. Replay is allocated for ``config.max_buffer_size`` transitions. A
    buffer size or ``min_age`` that does not fit turns all results into NaN, since a traced value
    cannot be refused; ``grid`` and ``make_hparams`` refuse it beforehand.

    Args:
        config: static settings.
        env: from ``open_env``, where the environment is simulated outside JAX.

    Returns:
        function ``hparams -> state, metrics``: the final state, and metrics ``[logged points]`` by
        name (``[runs, logged points]`` under ``vmap``).

    Raises:
        ConfigError: a setting is not usable.

    >>> config = Config(env="CartPole-v1", total_steps=64, eval_episodes=0, batch_size=32)
    >>> state, metrics = jax.jit(make_train(config))(HParams(seed=3))
    >>> metrics["entropy"].shape
    (2,)
    """
    return whole_run(make(config, env))


def whole_run(algorithm: Algorithm) -> Callable[[HParams], tuple[TrainState, Metrics]]:
    """``make_train`` for an algorithm that is made already."""
    config = algorithm.config
    check_sizes(config, HParams(buffer_size=config.allocated_size))
    stops = log_boundaries(config)
    points = (jnp.array([0, *stops[:-1]]), jnp.array(stops))

    def train(hparams: HParams) -> tuple[TrainState, Metrics]:
        hparams = complete(config, hparams)

        def point(state: TrainState, bounds: tuple[Array, Array]) -> tuple[TrainState, Metrics]:
            return algorithm.train_and_log(state, hparams, *bounds)

        state = _poison_misfits(config, hparams, algorithm.init(hparams))
        return jax.lax.scan(point, state, points)

    return train


def make(config: Config, env: environments.Environment | None = None) -> Algorithm:
    """Builds the training program of a static configuration, without compiling anything.

    Args:
        config: the configuration.
        env: from ``open_env``, where the environment is simulated outside JAX and the program is
            to run; by default it is made here.

    Raises:
        ConfigError: a setting is not usable; see the message.
    """
    if tasks.is_task(config.env):
        # The algorithms of token tasks and of flows are built from functions of this module.
        from gipo_jax.sequences import train as of_sequences

        return of_sequences.make(config)
    if isinstance(config.env, str) and config.env.startswith(flows.PREFIX):
        from gipo_jax.flow import train as of_flows

        return of_flows.make(config)
    parts = make_parts(config, env)
    return Algorithm(
        config=config,
        env=parts.env,
        objective=parts.objective,
        init=functools.partial(init, parts),
        train_step=functools.partial(train_step, parts),
        report=functools.partial(report, parts),
        evaluate=functools.partial(evaluate, parts),
        choose_action=functools.partial(choose_action, parts),
        first_update=first_update(config),
        activations=6 * sum(config.hidden_sizes),
        host=parts.env.host,
    )


def make_parts(config: Config, env: environments.Environment | None = None) -> Parts:
    """Environment, action head, network and objective of a configuration.

    Raises:
        ConfigError: a setting is not usable; see the message.
    """
    check_fields(config)
    check_unused(config, SEQUENCE_ONLY, "control tasks do not use it")
    env = environments.make(config) if env is None else env
    if env.host and config.eval_episodes:
        valid = f"0, because {env.name} is simulated outside JAX: its training episodes tell"
        raise ConfigError("eval_episodes", config.eval_episodes, valid)
    objective = objectives.spec(config.objective)
    signatures.check_single(objective)
    head = networks.make_head(config, env)
    if objective.discrete_only and not head.discrete:
        valid = f"'tokens', because {objective.name} reads probabilities of discrete actions"
        raise ConfigError("action_head", config.action_head, valid)
    if "position" in objective.inputs:
        valid = "one for actions, because the tokens of an action have no order"
        raise ConfigError("objective", objective.name, valid)
    level = ratio_levels.choose(config.ratio_level, objective)
    if level not in ("token", "joint"):
        valid = "'token' or 'joint', because the tokens of an action have no order"
        raise ConfigError("ratio_level", level, valid)
    network = networks.make(config, env.obs_shape, head)
    return Parts(config, env, head, network, objective, level)


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
    hparams = HParams(**overrides, objective_params=own)
    check_fields(hparams)
    if tasks.is_task(config.env):
        from gipo_jax.sequences import train as of_sequences

        of_sequences.check_hparams(config, hparams)
    else:
        check_unused(hparams, SEQUENCE_ONLY, "control tasks do not use it")
    hparams = complete(config, hparams)
    signatures.check_params(spec, hparams.objective_params)
    check_sizes(config, hparams)
    return hparams


SEQUENCE_ONLY = (
    "decoder_layers",
    "decoder_width",
    "decoder_heads",
    "loss_agg_mode",
    "selection",
    "num_candidates",
    "packed_size",
    "temperature",
    "imitation_updates",
)
"""Settings, static and traced, of token tasks alone."""


def check_unused(settings: Config | HParams, names: Iterable[str], reason: str) -> None:
    """Refuses settings that would do nothing. Raises ConfigError where one is not its default."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name in names and value != field.default:
            raise ConfigError(field.name, value, f"left at {field.default!r}: {reason}")


def complete(config: Config, hparams: HParams) -> HParams:
    """The same settings with what was left open filled in."""
    value_rate = hparams.value_learning_rate
    defaults = objectives.spec(config.objective).params
    return dataclasses.replace(
        hparams,
        value_learning_rate=hparams.learning_rate if value_rate is None else value_rate,
        objective_params={**defaults, **hparams.objective_params},
    )


def grid(config: Config, **settings: Any) -> tuple[HParams, list[dict[str, Any]]]:
    """All combinations of traced settings, stacked for ``jax.vmap(make_train(config))``.

    Args:
        config: the static settings; ``max_buffer_size`` bounds the buffer sizes.
        settings: fields of ``HParams`` and parameters of the objective, each a value or a sequence
            of values.

    Returns:
        settings as arrays ``[runs]``, and what each row is; the last name varies fastest.

    Raises:
        ConfigError: a combination is not usable.

    >>> hparams, rows = grid(Config(), seed=range(2), sigma=[0.5, 1.0])
    >>> rows[1]
    {'seed': 0, 'sigma': 1.0}
    """
    columns = {name: _values(name, value) for name, value in settings.items()}
    rows = [
        dict(zip(columns, values, strict=True)) for values in itertools.product(*columns.values())
    ]
    allocated = dataclasses.replace(config, max_buffer_size=config.allocated_size)
    return stack([make_hparams(allocated, **row) for row in rows]), rows


def _values(name: str, value: Any) -> list[Any]:
    values = list(value) if isinstance(value, Iterable) else [value]
    if not values:
        raise ConfigError(name, value, "at least one value")
    return [v.item() if isinstance(v, np.generic | Array) else v for v in values]


def select(tree: Any, run: int) -> Any:
    """One run out of the results of a vmapped call: every array without its first axis."""
    return jax.tree.map(lambda x: x[run], tree)


def log_boundaries(config: Config) -> list[int]:
    """Iterations after which a point is logged: ``num_logs`` evenly spaced, every one if fewer."""
    points = min(config.num_logs, config.num_iterations)
    return [config.num_iterations * (i + 1) // points for i in range(points)]


def _poison_misfits(config: Config, hparams: HParams, state: TrainState) -> TrainState:
    """NaN for a run whose traced sizes replay cannot hold, which could not be refused before."""
    size, block = jnp.asarray(hparams.buffer_size), config.block_size
    fits = (size >= block) & (size <= config.allocated_size) & (size % block == 0)
    usable = size - jnp.asarray(hparams.min_age) * block
    fits &= usable >= (config.batch_size if config.sampling == "shuffled" else block)
    params = jax.tree.map(lambda x: jnp.where(fits, x, jnp.nan), state.learner.params)
    return state._replace(learner=state.learner._replace(params=params))
