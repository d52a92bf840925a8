"""What every domain of training shares: state, optimizer, learning-rate schedule, sampling.

``gipo_jax.train`` is the loop, ``gipo_jax.domains`` says what control, tokens and flows are to it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.flatten_util import ravel_pytree

from gipo_jax import buffer, networks
from gipo_jax.config import Config, HParams

Metrics = dict[str, Array]

INIT_STREAM = 2**31 - 1  # Stream id for the start of a run, larger than any iteration's index
LOG_STREAM = INIT_STREAM - 1  # Stream id for its logged points


class Learner(NamedTuple):
    """What updates change."""

    params: Any  # {"policy": ...}, and "value" where there is a value function
    opt_state: Any  # an optimizer state for each of them
    objective_state: Any  # state of a stateful objective, else ()


class TrainState(NamedTuple):
    """Everything a run carries from one iteration to the next."""

    learner: Learner  # parameters and optimizer
    replay: Any  # arrays [blocks, rollout_length, num_envs, ...]
    domain_state: Any  # what belongs to the domain, such as environments in mid-episode
    totals: dict[str, Array]  # since the last logged point: returns, episodes, solved, the domain's
    key: Array  # the run's key, never consumed, only folded
    diverged_at: Array  # iteration whose updates were not finite, and froze the learner; or -1


def run_key(seed: Any) -> Array:
    """The key of the run with a seed."""
    return jax.random.fold_in(jax.random.key(0), seed)


# Sampling of replay.


def first_update(config: Config) -> int:
    """First iteration that updates: without replacement, once replay has a batch of rows."""
    if config.sampling == "uniform":
        return 0
    return -(-config.batch_size // config.block_size) - 1


def updates_begin(config: Config, hparams: HParams) -> Any:
    """``first_update`` of a run: with ``min_age`` a batch of several blocks is there later.

    A batch of one block or less is drawn from the oldest until one is as old as ``min_age``.
    """
    return first_update(config) + hparams.min_age if first_update(config) else 0


# How batches are drawn, by the setting sampling
DRAWS = {"shuffled": buffer.draw_shuffled, "uniform": buffer.draw_uniform}


def sample_indices(
    config: Config, hparams: HParams, iteration: int | Array, key: Array, batches: int
) -> Array:
    """Newest-first indices of rows, or of segments, ``[batches, per batch]``.

    The newest ``min_age`` iterations are left out, and ``recent_fraction`` of each batch comes from
    the newest one of the rest.
    """
    rows_per_draw = 1 if config.advantage_mode == "stored" else config.rollout_length
    size, block = config.batch_size // rows_per_draw, config.block_size // rows_per_draw
    skipped, valid = buffer.window(
        iteration, hparams.buffer_size, config.block_size, hparams.min_age
    )
    key_all, key_recent = jax.random.split(key)
    index = DRAWS[config.sampling](key_all, batches, size, valid // rows_per_draw)
    recent = buffer.draw_uniform(key_recent, batches, size, block)
    from_newest = jnp.arange(size) < jnp.round(hparams.recent_fraction * size)
    return skipped // rows_per_draw + jnp.where(from_newest, recent, index)


def gather(config: Config, replay: Any, index: Array, iteration: int | Array) -> tuple[Any, Array]:
    """Rows of replay, or segments, at indices ``[batch]``, and their ages in iterations."""
    take = buffer.take_rows if config.advantage_mode == "stored" else buffer.take_segments
    return take(replay, index, iteration)


# One step of the optimizer.


def make_optimizer(epsilon: Any) -> optax.GradientTransformation:
    """The optimizer of each group of parameters; ``gradient_step`` applies the learning rate."""
    return optax.scale_by_adam(eps=epsilon)


def init_optimizer(params: Any) -> Any:
    """First state of the optimizer for the parameters of a group."""
    return make_optimizer(0.0).init(ravel_pytree(params)[0])


def gradient_step(
    config: Config, learner: Learner, grads: Any, rates: dict[str, Any], hparams: HParams
) -> tuple[Learner, dict[str, Array]]:
    """One optimizer step of the parameter groups that have a gradient; and the gradients' norms.

    Gradients are clipped to ``max_grad_norm``, policy and value apart or, with ``joint_grad_norm``,
    together; norms are those before.
    """
    # Flat: on CPU a dozen small arrays cost several times one vector of their total length.
    vectors, unravel = {}, {}
    for group, tree in grads.items():
        vectors[group], unravel[group] = ravel_pytree(tree)
    parts = [list(grads)] if config.joint_grad_norm else [[group] for group in grads]
    params, opt_state = dict(learner.params), dict(learner.opt_state)
    norms = {group: _norm(vectors[group], grads[group]) for group in grads}
    for part in parts:
        same = {group: grads[group] for group in part}
        clipped = clip_by_global_norm(
            {group: vectors[group] for group in part}, hparams.max_grad_norm, same
        )
        for group, gradient in clipped.items():
            optimizer = make_optimizer(hparams.adam_epsilon)
            step, opt_state[group] = optimizer.update(gradient, learner.opt_state[group])
            updates = unravel[group](-rates[group] * step)
            params[group] = optax.apply_updates(params[group], updates)
    return learner._replace(params=params, opt_state=opt_state), norms


def clip_by_global_norm(vectors: Any, max_norm: Any, trees: Any) -> Any:
    """Like Optax's, which returns zeros for finite gradients whose squares overflow; here they keep
    their direction. ``trees`` are the gradients that ``vectors`` hold.
    """
    norm = _norm(vectors, trees)
    overflows = jnp.isinf(norm)
    # The second norm costs nothing: both sums are of one pass.
    shrink = jnp.where(overflows, 1e-25, 1.0)
    norm = jnp.where(overflows, _norm(vectors, trees, 1e-25), norm)
    # Squares of numbers below 1e18, which Adam keeps, do not overflow.
    max_norm = jnp.where(overflows, jnp.minimum(max_norm, 1e18), max_norm)
    factor = jnp.where(norm < max_norm * shrink, 1.0, max_norm / norm)

    def clipped(x: Array) -> Array:
        return (networks.at_least_single(x) * shrink * factor).astype(x.dtype)

    return jax.tree.map(clipped, vectors)


def _norm(vectors: Any, trees: Any, scale: float = 1.0) -> Array:
    """Norm of gradients times ``scale``; half-width numbers are added up in single precision."""

    def of(numbers: Any) -> Array:
        return optax.tree.norm(jax.tree.map(lambda x: scale * networks.at_least_single(x), numbers))

    # XLA on CPU would put a vector together anew, number by number, for each sum over it.
    return jax.lax.platform_dependent(
        vectors, trees, cpu=lambda _, trees: of(trees), default=lambda vectors, _: of(vectors)
    )


def learning_rate_factor(config: Config, hparams: HParams, iteration: int | Array) -> Array:
    """Factor on the learning rates: linear warm-up from 0, traced, then the configured decay."""
    step = jnp.asarray(iteration, jnp.float32)
    warmup = jnp.asarray(hparams.warmup_iterations, jnp.float32)
    warm = jnp.where(step < warmup, step / jnp.maximum(warmup, 1.0), 1.0)
    progress = (step - warmup) / jnp.maximum(config.num_iterations - warmup, 1.0)
    progress = jnp.clip(progress, 0.0, 1.0)
    if config.schedule == "linear":
        return warm * (1 - progress)
    if config.schedule == "cosine":
        return warm * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return warm


def keep_finite(
    state: TrainState, learner: Learner, iteration: int | Array, updated: Array
) -> TrainState:
    """Takes the new learner where it was ``updated``, unless it or an earlier one is not finite."""
    numbers, _ = ravel_pytree((learner.params, learner.objective_state))
    finite = jnp.all(jnp.isfinite(numbers)) | ~updated
    good = finite & updated & (state.diverged_at < 0)
    return state._replace(
        learner=jax.tree.map(lambda new, old: jnp.where(good, new, old), learner, state.learner),
        diverged_at=jnp.where(
            finite | (state.diverged_at >= 0), state.diverged_at, jnp.int32(iteration)
        ),
    )
