"""Policy gradients on the denoising steps of a flow.

One pure training program with the functions of ``gipo_jax.train.Algorithm``, so that whatever runs,
sweeps and resumes those runs this one. An iteration samples chains with the current flow, stores
them with their advantages in replay, and makes updates from chains of replay, however old.

What the settings of ``Config`` and ``HParams`` mean here:

- A transition is a chain: one sample with all its steps. An iteration makes ``num_envs`` times
  ``rollout_length`` of them; ``batch_size`` and ``buffer_size`` count chains.
- The tokens of a chain are its steps, ``[batch, steps]``. ``ratio_level`` compares them as those of
  a sequence, and ``ratio_norm`` is GRPO-Guard's ratio.
- Advantages are relative to the group, the chains of one iteration: GRPO's, (R - mean) / std.
  There is no value function.

| method | setting |
|---|---|
| Flow-GRPO (arXiv:2505.05470) | ``objective ppo_clip``, ``ratio_level token`` |
| GRPO-Guard (arXiv:2510.22319) | ``objective ppo_clip``, ``ratio_level ratio_norm`` |
| GIPO (arXiv:2603.03955) | ``objective gipo``, ``ratio_level token`` |
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gipo_jax import (
    buffer,
    diagnostics,
    losses,
    normalizer,
    objectives,
    ratio_levels,
    signatures,
    train,
)
from gipo_jax.config import Config, ConfigError, HParams, check_fields
from gipo_jax.flow import sampler, tasks
from gipo_jax.flow.tasks import Task
from gipo_jax.losses import BoundObjective
from gipo_jax.train import Learner, Metrics, TrainState

RATIO_NORM = "ratio_norm"
"""The ratio level of GRPO-Guard."""

EVALUATED = 128
"""End points that an evaluation draws unless the configuration says how many."""


class ReplayRow(NamedTuple):
    """A chain as replay keeps it; leading axes are those of replay or of a batch.

    Attributes:
        points: x before, between and after the steps, ``[..., steps + 1, 2]``.
        behavior_mean: mu of the flow that made the steps, ``[..., steps, 2]``.
        behavior_log_prob: log-density of the steps under it, ``[..., steps]``.
        advantage: of the chain, ``[...]``.
    """

    points: Array
    behavior_mean: Array
    behavior_log_prob: Array
    advantage: Array


class Parts(NamedTuple):
    """What a static configuration consists of."""

    config: Config
    task: Task
    field: sampler.VelocityField
    steps: sampler.Schedule
    objective: signatures.Spec
    ratio_level: str


class Ratios(NamedTuple):
    """How a flow compares with the one that made the chains, ``[batch, steps]`` each.

    Attributes:
        log_ratio: of the ratio level.
        kl: KL(mu || pi) of each step, abs(mu_theta - mu_old)^2 / (2 s^2).
    """

    log_ratio: Array
    kl: Array


# One iteration, from top to bottom.


def train_step(
    parts: Parts, state: TrainState, hparams: HParams, iteration: int | Array
) -> tuple[TrainState, Metrics]:
    """One iteration: sample, label, store, learn; arguments as in ``gipo_jax.train.train_step``."""
    key_act, key_learn = jax.random.split(jax.random.fold_in(state.key, iteration))

    chain, reward = act(parts, state.learner.params, key_act)
    rows = label(parts, chain, reward * hparams.reward_scale)
    state = state._replace(
        replay=buffer.add(state.replay, rows, iteration),
        return_sum=state.return_sum + jnp.sum(reward),
        episodes=state.episodes + reward.size,
    )
    learner, metrics = learn(parts, state, hparams, iteration, key_learn)
    return train.keep_finite(state, learner, iteration), metrics


def act(parts: Parts, params: Any, key: Array) -> tuple[sampler.Chain, Array]:
    """Samples chains with the current flow: arrays ``[rollout_length, num_envs, ...]``, and their
    rewards."""
    key_noise, key_steps = jax.random.split(key)
    shape = (parts.config.rollout_length, parts.config.num_envs, 2)
    noise = jax.random.normal(key_noise, shape)
    chain = sampler.sample(flow_of(parts, params), parts.task, key_steps, noise)
    return chain, tasks.reward(parts.task, chain.points[..., -1, :])


def label(parts: Parts, chain: sampler.Chain, reward: Array) -> ReplayRow:
    """Chains with their advantages, relative to the mean of the group.

    With ``normalize_advantage`` they are divided by the group's standard deviation, as in GRPO.
    """
    standard = parts.config.normalize_advantage is not False
    advantage = losses.standardize(reward) if standard else reward - jnp.mean(reward)
    return ReplayRow(chain.points, chain.mean, chain.log_prob, advantage)


def learn(
    parts: Parts, state: TrainState, hparams: HParams, iteration: int | Array, key: Array
) -> tuple[Learner, Metrics]:
    """The update phase. Updates wait until replay holds a batch drawn without replacement."""
    config = parts.config
    updates = config.updates_per_iteration * config.reuse_per_batch
    indices = train.sample_indices(config, hparams, iteration, key, config.updates_per_iteration)

    def one_update(learner: Learner, count: Array) -> tuple[Learner, Metrics]:
        index = indices[count // config.reuse_per_batch]
        rows, _ = buffer.take_rows(state.replay, index, iteration)
        policy_scale = train.reuse_scale(config, count)
        return update(parts, state, learner, rows, hparams, iteration, policy_scale)

    def all_updates(learner: Learner) -> tuple[Learner, Metrics]:
        learner, metrics = jax.lax.scan(one_update, learner, jnp.arange(updates))
        return learner, jax.tree.map(jnp.mean, metrics)

    return train.once_filled(config, iteration, all_updates, state.learner)


def update(
    parts: Parts,
    state: TrainState,
    learner: Learner,
    rows: ReplayRow,
    hparams: HParams,
    iteration: int | Array,
    policy_scale: Array,
) -> tuple[Learner, Metrics]:
    """One update of the flow."""
    advantage = _step_advantage(parts, rows)
    objective = bind_objective(parts, state, learner, hparams, rows)

    def loss(params: Any, probe: Array) -> tuple[Array, tuple[Array, Array, Any]]:
        ratios = compare(parts, params, rows)
        surrogate, objective_state = objective(ratios.log_ratio + probe, advantage)
        policy_loss = -jnp.mean(surrogate * surrogate_scale(parts))
        kl = jnp.mean(ratios.kl)
        total = policy_scale * policy_loss + hparams.kl_coef * kl
        return total, (policy_loss, kl, objective_state)

    probe = jnp.zeros_like(rows.behavior_log_prob)
    (grads, probe_gradient), (policy_loss, kl, objective_state) = jax.grad(
        loss, argnums=(0, 1), has_aux=True
    )(learner.params, probe)
    weight = losses.effective_weight(probe_gradient, advantage, policy_scale)
    ess = diagnostics.effective_sample_size(weight / surrogate_scale(parts))
    rate = hparams.learning_rate * ess**hparams.ess_lr_power
    rate *= train.learning_rate_factor(parts.config, hparams, iteration)
    policy, opt_state, norm = train.apply_gradient(learner, "policy", grads, hparams, rate)
    learner = Learner({"policy": policy}, {"policy": opt_state}, objective_state)
    return learner, {"policy_loss": policy_loss, "kl": kl, "grad_norm": norm}


# What an iteration is made of.


def flow_of(parts: Parts, params: Any) -> sampler.Velocity:
    """The flow of a learner's parameters."""
    return sampler.bind(parts.field, params["policy"])


def compare(parts: Parts, params: Any, rows: ReplayRow) -> Ratios:
    """Log-ratios and KL of the steps of chains ``[batch, ...]`` under other parameters."""
    mean = sampler.chain_means(flow_of(parts, params), parts.steps, rows.points)
    log_prob = sampler.log_density(rows.points[..., 1:, :], mean, parts.steps.std)
    log_ratio = log_prob - rows.behavior_log_prob
    shift = jnp.sum((mean - rows.behavior_mean) ** 2, axis=-1)
    kl = shift / (2 * parts.steps.std**2)
    if parts.ratio_level == RATIO_NORM:
        return Ratios(ratio_norm(log_ratio, kl, parts.steps.std), kl)
    return Ratios(ratio_levels.transform(log_ratio, parts.ratio_level), kl)


def ratio_norm(log_ratio: Array, kl: Array, std: Any) -> Array:
    """GRPO-Guard's log-ratio, (x + b) s, with b the KL of the step (arXiv:2510.22319).

    Under the flow that made the step, x = D eps / s - abs(D)^2 / (2 s^2) with D = mu_theta - mu_old
    and eps standard normal. The mean -abs(D)^2 / (2 s^2) and the spread abs(D) / s depend on the
    step. Here (x + b) s = D eps: mean 0 and spread abs(D).

    Args:
        log_ratio: x, ``[..., steps]``.
        kl: b, same shape.
        std: s of the steps, ``[steps]``.
    """
    return (log_ratio + kl) * std


def surrogate_scale(parts: Parts) -> Any:
    """Factor on the surrogate of each step, ``[steps]`` or a number.

    GRPO-Guard divides by dt, since D has a factor dt, so that steps of all lengths count alike.
    """
    return 1 / parts.steps.dt if parts.ratio_level == RATIO_NORM else 1.0


def bind_objective(
    parts: Parts, state: TrainState, learner: Learner, hparams: HParams, rows: ReplayRow
) -> BoundObjective:
    """The objective with its parameters, and with the inputs and state that it asks for."""
    spec, behavior = parts.objective, rows.behavior_log_prob
    given = train.objective_settings(parts.config, spec, hparams, learner)
    start = None
    if "log_ratio_start" in spec.inputs:
        start = compare(parts, state.learner.params, rows).log_ratio
    # ``compare`` gives log-ratios of the level already; a chain has no padding, but an order.
    return losses.bind(spec, "token", given, behavior, start, jnp.ones_like(behavior, bool))


def _step_advantage(parts: Parts, rows: ReplayRow) -> Array:
    """Advantages as the objective sees them, ``[batch, steps]``: all steps have the chain's."""
    return jnp.broadcast_to(rows.advantage[:, None], rows.behavior_log_prob.shape)


# The start of a run, and what is reported of it.


def init(parts: Parts, hparams: HParams) -> TrainState:
    """First state of a run, its flow pre-trained; the run's key is ``fold_in(key(0), seed)``."""
    return init_from(parts, hparams, pretrain(parts, hparams.seed))


def pretrain(parts: Parts, seed: Any) -> Any:
    """Parameters of the flow that a run of this seed begins with."""
    key = jax.random.fold_in(_run_key(seed), train.INIT_STREAM)
    return sampler.pretrain(parts.field, parts.task, key)[0]


def init_from(parts: Parts, hparams: HParams, flow_params: Any) -> TrainState:
    """First state of a run from a flow trained before."""
    return TrainState(
        learner=Learner(
            {"policy": flow_params},
            {"policy": train.optimizer(hparams).init(flow_params)},
            signatures.first_state(parts.objective, hparams.objective_params),
        ),
        normalizer=normalizer.init((2,)),
        envs=(),  # type: ignore[arg-type]  # no chain goes on in the next iteration
        replay=empty_replay(parts),
        return_sum=jnp.zeros(()),
        episodes=jnp.zeros(()),
        solved=jnp.zeros(()),
        key=_run_key(hparams.seed),
        diverged_at=jnp.int32(-1),
    )


def _run_key(seed: Any) -> Array:
    return jax.random.fold_in(jax.random.key(0), seed)


def empty_replay(parts: Parts) -> Any:
    """Replay with nothing in it, arrays ``[blocks, rollout_length, num_envs, ...]``."""
    config, steps = parts.config, parts.task.steps

    def like(*shape: int) -> Any:
        full = (config.rollout_length, config.num_envs, *shape)
        return jax.ShapeDtypeStruct(full, jnp.float32)

    row = ReplayRow(like(steps + 1, 2), like(steps, 2), like(steps), like())
    return buffer.init(row, config.allocated_size // config.block_size)


def report(
    parts: Parts, state: TrainState, hparams: HParams, iteration: int | Array, key: Array
) -> Metrics:
    """Diagnostics of a fresh sample of replay under the flow as it now is, and evaluation."""
    key_evaluate, key_diagnose = jax.random.split(key)
    config, params = parts.config, state.learner.params
    index = train.sample_indices(config, hparams, iteration, key_diagnose, 1)[0]
    rows, age = buffer.take_rows(state.replay, index, iteration)
    log_ratio = compare(parts, params, rows).log_ratio
    advantage = _step_advantage(parts, rows)
    objective = bind_objective(parts, state, state.learner, hparams, rows)
    weight = losses.objective_weight(objective, log_ratio, advantage)
    metrics = diagnostics.utilization(log_ratio, advantage, weight, age[:, None])
    points = EVALUATED if config.eval_episodes is None else config.eval_episodes
    if points:
        ends, sampled = draw(parts, params, key_evaluate, points)
        metrics["eval_return"] = jnp.mean(tasks.reward(parts.task, ends))
        metrics["eval_return_sampled"] = jnp.mean(tasks.reward(parts.task, sampled))
        metrics["modes_covered"] = tasks.modes_covered(parts.task, sampled)
        metrics["pairwise_distance"] = tasks.pairwise_distance(sampled)
    return metrics


def draw(parts: Parts, params: Any, key: Array, n: int) -> tuple[Array, Array]:
    """End points of the ODE and of the SDE from the same noise, ``[n, 2]`` each."""
    key_noise, key_steps = jax.random.split(key)
    noise = jax.random.normal(key_noise, (n, 2))
    return (
        choose_action(parts, params, None, noise),
        choose_action(parts, params, None, noise, key_steps),
    )


def evaluate(
    parts: Parts, params: Any, moments: Any, key: Array, episodes: int
) -> tuple[Array, Array]:
    """Mean reward of fresh end points of the ODE, and of the SDE; ``moments`` is not read."""
    ends, sampled = draw(parts, params, key, episodes)
    return jnp.mean(tasks.reward(parts.task, ends)), jnp.mean(tasks.reward(parts.task, sampled))


def choose_action(
    parts: Parts, params: Any, moments: Any, obs: Array, key: Array | None = None
) -> Array:
    """End points for noise ``[..., 2]``: of the SDE with a key, else of the ODE."""
    flow, noise = flow_of(parts, params), jnp.asarray(obs)
    if key is None:
        return sampler.solve(flow, parts.task, noise)
    return sampler.sample(flow, parts.task, key, noise).points[..., -1, :]


# Whole runs.


def make(config: Config, task: Task | None = None) -> train.Algorithm:
    """Builds the training program of a static configuration, without compiling anything.

    Args:
        config: the configuration; ``env`` names a task.
        task: in place of the named one, such as a task of one's own.

    Raises:
        ConfigError: a setting is not usable, or would do nothing here.
    """
    parts = make_parts(config, task)
    return train.Algorithm(
        config=config,
        env=parts.task,
        objective=parts.objective,
        init=functools.partial(init, parts),
        train_step=functools.partial(train_step, parts),
        report=functools.partial(report, parts),
        evaluate=functools.partial(evaluate, parts),
        choose_action=functools.partial(choose_action, parts),
        first_update=train.first_update(config),
        activations=6 * sum(config.hidden_sizes) * parts.task.steps,
    )


def make_parts(config: Config, task: Task | None = None) -> Parts:
    """Task, network and objective of a configuration.

    Raises:
        ConfigError: a setting is not usable, or would do nothing here.
    """
    check_fields(config)
    for field in dataclasses.fields(config):
        if field.name in _WITHOUT_MEANING and getattr(config, field.name) != field.default:
            valid = f"its default {field.default!r}, because a flow has nothing that it would set"
            raise ConfigError(field.name, getattr(config, field.name), valid)
    if config.eval_episodes == 1:
        raise ConfigError("eval_episodes", 1, "0, or at least 2 points to measure distances")
    objective = objectives.spec(config.objective)
    signatures.check_single(objective)
    if objective.discrete_only:
        valid = "an objective that takes densities, which the steps of a flow have"
        raise ConfigError("objective", objective.name, valid)
    if task is None:
        task = tasks.make(config.env)
    level = config.ratio_level
    if level != RATIO_NORM:
        level = ratio_levels.choose(level, objective)
    velocity = sampler.velocity_field(config)
    return Parts(config, task, velocity, sampler.schedule(task), objective, level)


_WITHOUT_MEANING = (
    "policy_delay",
    "advantage_mode",
    "action_head",
    "num_bins",
    "value_hidden_sizes",
    "shared_torso",
    "detach_value",
    "normalize_obs",
    "truncation_is_termination",
    "max_episode_steps",
    "selection",
    "num_candidates",
    "packed_size",
)


def make_train(
    config: Config, task: Task | None = None
) -> Callable[[HParams], tuple[TrainState, Metrics]]:
    """A whole run as one pure function of its hyper-parameters; see ``gipo_jax.train.make_train``.

    >>> config = Config(env="flow/ring", total_steps=64, batch_size=32, eval_episodes=16)
    >>> state, metrics = jax.jit(make_train(config))(HParams(seed=3))
    >>> metrics["eval_return"].shape
    (2,)
    """
    return train.whole_run(make(config, task))
