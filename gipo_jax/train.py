"""The algorithm: collect, store, sample, loss, update. One loop for control, tokens and flows.

``make_train(config)`` is a whole run as one pure function of its hyper-parameters, buffer size
included::

    state, metrics = jax.jit(jax.vmap(make_train(config)))(hparams)

``train_step`` is one iteration and reads from top to bottom: it collects data with the current
policy, adds it to replay, and makes updates from samples of replay. What differs between control,
responses of tokens and flows is the ``Domain``. All randomness comes from ``fold_in(run key,
iteration)``, so a run never depends on the runs beside it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gipo_jax import buffer, diagnostics, domains, losses, packed, signatures
from gipo_jax.config import Config, HParams, check_sizes, stack
from gipo_jax.domains import Batch, Domain
from gipo_jax.learner import (
    LOG_STREAM,
    Learner,
    Metrics,
    TrainState,
    gather,
    gradient_step,
    init_optimizer,
    keep_finite,
    learning_rate_factor,
    run_key,
    sample_indices,
    updates_begin,
)
from gipo_jax.settings import fill_defaults, grid, log_boundaries, make_hparams

__all__ = [
    "Learner",
    "TrainState",
    "grid",
    "log_boundaries",
    "make",
    "make_hparams",
    "make_train",
    "open_env",
    "select",
    "stack",
    "train_and_log",
    "train_step",
]

open_env = domains.open_env


# One iteration, from top to bottom.


def train_step(
    domain: Domain, state: TrainState, hparams: HParams, iteration: int | Array
) -> tuple[TrainState, Metrics]:
    """One iteration: collect, store, learn; and means over its updates of losses and norms.

    Under ``vmap`` the iteration, from 0, is the same for all runs.
    """
    key = jax.random.fold_in(state.key, iteration)
    key_collect, key_learn, key_use = jax.random.split(key, 3)

    collected = domain.collect(state, hparams, key_collect)
    state = state._replace(replay=buffer.add(state.replay, collected.rows, iteration))
    learner, metrics, counts = learn(domain, state, hparams, iteration, key_learn, key_use)

    # With min_age there may be fewer rows than a batch, and the batch would repeat them.
    updated = jnp.asarray(iteration) >= updates_begin(domain.config, hparams)
    state = keep_finite(state, learner, iteration, updated)
    metrics, counts = jax.tree.map(lambda x: jnp.where(updated, x, 0), (metrics, counts))
    counts = collected.counts | counts
    totals = {name: total + counts.get(name, 0) for name, total in state.totals.items()}
    return state._replace(domain_state=collected.domain_state, totals=totals), metrics


def learn(
    domain: Domain,
    state: TrainState,
    hparams: HParams,
    iteration: int | Array,
    key: Array,
    key_use: Array,
) -> tuple[Learner, Metrics, Metrics]:
    """The update phase: ``updates_per_iteration`` batches, each used ``reuse_per_batch`` times.

    The policy takes part in the first use of a batch and in every ``policy_delay``-th after it; in
    use i, counted from 0, the surrogate is multiplied by 1 / sqrt(i + 1), as in the authors' code.
    Where batches are drawn without replacement, updates begin once a batch of rows may be drawn.

    Returns:
        learner after it, means over the updates, and sums of ``Batch.counts``.
    """
    config = domain.config
    reuse, delay = config.reuse_per_batch, config.policy_delay
    batches = config.updates_per_iteration

    def use_batch(learner: Learner, inputs: Any) -> tuple[Learner, Any]:
        number, gathered = inputs
        rows, age = gathered if domain.gather_once else take(gathered)

        def one_use(learner: Learner, use: Array, train_policy: bool) -> tuple[Learner, Any]:
            key = jax.random.fold_in(key_use, number * reuse + use)
            batch = domain.batch(state, learner.params, rows, age, hparams, key)
            scale = 1 / jnp.sqrt(use + 1.0)
            return update(
                domain, state, learner, batch, hparams, iteration, scale, train_policy=train_policy
            )

        def one_round(learner: Learner, first: Array) -> tuple[Learner, Any]:
            learner, (metrics, counts) = one_use(learner, first, train_policy=True)
            if delay == 1:
                return learner, (metrics, counts)
            learner, (rest, _) = packed.scan(
                lambda learner, use: one_use(learner, use, train_policy=False),
                learner,
                first + jnp.arange(1, delay),
            )
            metrics |= {name: jnp.append(metrics[name], rest[name]) for name in rest}
            return learner, (metrics, counts)

        return packed.scan(one_round, learner, jnp.arange(0, reuse, delay))

    def take(index: Array) -> tuple[Any, Array]:
        return gather(config, state.replay, index, iteration)

    indices = sample_indices(config, hparams, iteration, key, batches)
    inputs = jnp.arange(batches), jax.vmap(take)(indices) if domain.gather_once else indices
    learner, (metrics, counts) = packed.scan(use_batch, state.learner, inputs)
    means = {name: jnp.mean(x.reshape(-1)) for name, x in metrics.items()}
    return learner, means, jax.tree.map(jnp.sum, counts)


def update(
    domain: Domain,
    start: TrainState,
    learner: Learner,
    batch: Batch,
    hparams: HParams,
    iteration: int | Array,
    policy_scale: Array,
    *,
    train_policy: bool = True,
) -> tuple[Learner, tuple[Metrics, Metrics]]:
    """One update of policy and value function, or of the latter alone.

    ``start`` is the state at the start of the update phase; the rest is as in ``losses.loss``.
    """
    trained = learner.params if train_policy else {"value": learner.params["value"]}

    def loss_of(params: Any) -> tuple[Array, losses.Terms]:
        everything = learner.params | params
        arguments = (domain, start, learner, everything, batch, hparams, policy_scale)
        return losses.loss(*arguments, train_policy=train_policy)

    grads, terms = jax.grad(loss_of, has_aux=True)(trained)
    schedule = learning_rate_factor(domain.config, hparams, iteration)
    rates = {
        "policy": hparams.learning_rate * terms.ess**hparams.ess_lr_power * schedule,
        "value": hparams.value_learning_rate * schedule,
    }
    learner, norms = gradient_step(domain.config, learner, grads, rates, hparams)
    names = {"policy": "grad_norm", "value": "value_grad_norm"}
    metrics = terms.metrics | {names[group]: norm for group, norm in norms.items()}
    return learner._replace(objective_state=terms.objective_state), (metrics, batch.counts)


# Whole runs.


def init(domain: Domain, hparams: HParams) -> TrainState:
    """First state of a run; its key is ``fold_in(key(0), seed)``."""
    key = run_key(hparams.seed)
    params, domain_state = domain.init(hparams, key)
    opt_state = {group: init_optimizer(params[group]) for group in params}
    objective_state = signatures.first_state(domain.objective, hparams.objective_params)
    return TrainState(
        learner=Learner(params, opt_state, objective_state),
        replay=buffer.init(domain.block, domain.config.allocated_size // domain.config.block_size),
        domain_state=domain_state,
        totals=dict.fromkeys(("returns", "episodes", "solved", *domain.own_totals), jnp.zeros(())),
        key=key,
        diverged_at=jnp.int32(-1),
    )


def train_and_log(
    domain: Domain, state: TrainState, hparams: HParams, start: int | Array, stop: int | Array
) -> tuple[TrainState, Metrics]:
    """Iterations ``start .. stop - 1``, then evaluation and diagnostics: one logged point.

    Under ``vmap`` start and stop are the same for all runs. Metrics are float32 scalars by name,
    NaN where undefined, such as the mean return of no episodes.
    """
    state = state._replace(totals=jax.tree.map(jnp.zeros_like, state.totals))
    compares = "log_ratio_start" in domain.objective.inputs

    def step(
        iteration: Array, carry: tuple[TrainState, Any, Metrics]
    ) -> tuple[TrainState, Any, Metrics]:
        state, _, metric_sums = carry
        before = state.learner.params if compares else ()
        state, metrics = train_step(domain, state, hparams, iteration)
        return state, before, jax.tree.map(jnp.add, metric_sums, metrics)

    shapes = jax.eval_shape(lambda s: train_step(domain, s, hparams, start)[1], state)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    carry = (state, state.learner.params if compares else (), zeros)
    state, before, metric_sums = jax.lax.fori_loop(start, stop, step, carry)
    learned = jnp.asarray(stop) - jnp.maximum(start, updates_begin(domain.config, hparams))
    metrics = {name: x / jnp.maximum(learned, 0) for name, x in metric_sums.items()}
    metrics["episode_return"] = state.totals["returns"] / state.totals["episodes"]
    metrics["episodes"] = state.totals["episodes"]

    last = jnp.asarray(stop) - 1
    key = jax.random.fold_in(jax.random.fold_in(state.key, LOG_STREAM), last)
    start_params = before if compares else state.learner.params
    return state, metrics | report(domain, state, hparams, last, key, start_params)


def report(
    domain: Domain,
    state: TrainState,
    hparams: HParams,
    iteration: int | Array,
    key: Array,
    start_params: Any,
) -> Metrics:
    """Diagnostics of a fresh sample of replay under the policy as it now is, and evaluation.

    ``start_params`` are those at the start of the last update phase: objectives that compare with
    them clip there, and not at the policy as it now is.
    """
    key_evaluate, key_diagnose = jax.random.split(key)
    config, params = domain.config, state.learner.params
    index = sample_indices(config, hparams, iteration, key_diagnose, 1)[0]
    batch = domain.batch(state, params, *gather(config, state.replay, index, iteration), hparams)
    scores = domain.score(params, batch, hparams)
    start = state._replace(learner=state.learner._replace(params=start_params))
    bound = losses.bind_objective(domain, start, state.learner, batch, scores, hparams)
    weight, advantage = bound.weight()
    metrics = diagnostics.utilization(
        bound.log_ratio, advantage, weight, batch.age[:, None], batch.mask
    )
    if scores.value is not None:
        variance = diagnostics.explained_variance(batch.value_target, scores.value)
        metrics["explained_variance"] = variance
    metrics |= domain.metrics(state, batch)
    if domain.eval_episodes:
        acting = domain.acting(state)
        metrics |= domain.evaluate(acting, hparams, key_evaluate, domain.eval_episodes)
    return metrics


def make_train(config: Config, env: Any = None) -> Callable[[HParams], tuple[TrainState, Metrics]]:
    """A whole run, start to end, as one pure function of its hyper-parameters.

    It works under ``jit``, ``vmap``, ``lax.map`` and ``shard_map``, alone and combined, with any
    traced settings mixed. Replay is allocated for ``config.max_buffer_size`` transitions. A
    buffer size or ``min_age`` that does not fit turns all results into NaN, since a traced value
    cannot be refused; ``grid`` and ``make_hparams`` refuse it beforehand.

    Args:
        config: static settings.
        env: only for environments simulated outside JAX, from ``open_env``, and for a task of
            tokens or a flow in place of the named one. An environment of your own goes into
            ``Config(env=...)``.

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


def whole_run(domain: Domain) -> Callable[[HParams], tuple[TrainState, Metrics]]:
    """``make_train`` for a domain that is made already."""
    config = domain.config
    check_sizes(config, HParams(buffer_size=config.allocated_size))
    stops = log_boundaries(config)
    points = (jnp.array([0, *stops[:-1]]), jnp.array(stops))

    def train(hparams: HParams) -> tuple[TrainState, Metrics]:
        hparams = fill_defaults(config, hparams)

        def point(state: TrainState, bounds: tuple[Array, Array]) -> tuple[TrainState, Metrics]:
            return train_and_log(domain, state, hparams, *bounds)

        state = nan_if_buffer_does_not_fit(config, hparams, init(domain, hparams))
        return jax.lax.scan(point, state, points)

    return train


def make(config: Config, env: Any = None) -> Domain:
    """Builds what a static configuration trains on, without compiling anything."""
    return domains.make(config, env)


def select(tree: Any, run: int) -> Any:
    """One run out of the results of a vmapped call: every array without its first axis."""
    return jax.tree.map(lambda x: x[run], tree)


def nan_if_buffer_does_not_fit(config: Config, hparams: HParams, state: TrainState) -> TrainState:
    """NaN for a run whose traced sizes replay cannot hold, which could not be refused before."""
    size, block = jnp.asarray(hparams.buffer_size), config.block_size
    fits = (size >= block) & (size <= config.allocated_size) & (size % block == 0)
    usable = size - jnp.asarray(hparams.min_age) * block
    fits &= usable >= (config.batch_size if config.sampling == "shuffled" else block)
    params = jax.tree.map(lambda x: jnp.where(fits, x, jnp.nan), state.learner.params)
    return state._replace(learner=state.learner._replace(params=params))
