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

INIT_STREAM = 2**31 - 1
"""Folded into a run's key for its start, where iterations are not: beyond any of their indices."""

LOG_STREAM = INIT_STREAM - 1
"""Folded into a run's key for its logged points."""


class Learner(NamedTuple):
    """What updates change.

    Attributes:
        params: ``{"policy": ...}``, and ``"value"`` where there is a value function.
        opt_state: an optimizer state for each of them.
        objective_state: state of a stateful objective, else ``()``.
    """

    params: Any
    opt_state: Any
    objective_state: Any


class TrainState(NamedTuple):
    """Everything a run carries from one iteration to the next.

    Attributes:
        learner: parameters and optimizer.
        replay: arrays ``[blocks, rollout_length, num_envs, ...]``.
        domain: what belongs to the domain, such as environments in mid-episode.
        sums: totals since the last logged point by name: ``returns`` and number of the
            ``episodes`` that ended, how many of them ``solved`` the task, and the domain's own.
        key: the run's key, never consumed, only folded.
        diverged_at: iteration whose updates gave non-finite parameters, -1 while none has; the
            learner is frozen from before that iteration on.
    """

    learner: Learner
    replay: Any
    domain: Any
    sums: dict[str, Array]
    key: Array
    diverged_at: Array


def run_key(seed: Any) -> Array:
    """The key of the run with a seed."""
    return jax.random.fold_in(jax.random.key(0), seed)


# Sampling of replay.


def first_update(config: Config) -> int:
    """First iteration that updates: without replacement, once replay holds a whole batch."""
    if config.sampling == "uniform":
        return 0
    return -(-config.batch_size // config.block_size) - 1


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


def gather(config: Config, replay: Any, index: Array, iteration: int | Array) -> tuple[Any, Array]:
    """Rows of replay, or segments, at indices ``[batch]``, and their ages in iterations."""
    take = buffer.take_rows if config.advantage_mode == "stored" else buffer.take_segments
    return take(replay, index, iteration)


# One step of the optimizer.


def init_optimizer(params: Any) -> Any:
    """First state of Adam for the parameters of a group."""
    return _adam(0.0).init(ravel_pytree(params)[0])


def gradient_step(
    config: Config, learner: Learner, grads: Any, rates: dict[str, Any], hparams: HParams
) -> tuple[Learner, dict[str, Array]]:
    """One step of Adam for the parameter groups that have a gradient, and the gradients' norms.

    Norms are bounded by ``max_grad_norm``, each, or with ``joint_grad_norm`` that of all together.
    """
    # Flat: on CPU a dozen small arrays cost several times one vector of their total length.
    flat = {group: ravel_pytree(tree) for group, tree in grads.items()}
    vectors = {group: networks.full(vector) for group, (vector, _) in flat.items()}
    together = [vectors] if config.joint_grad_norm else [{g: v} for g, v in vectors.items()]
    params, opt_state = dict(learner.params), dict(learner.opt_state)
    for bounded in (clip_by_global_norm(part, hparams.max_grad_norm) for part in together):
        for group, vector in bounded.items():
            gradient, adam = vector.astype(flat[group][0].dtype), _adam(hparams.adam_epsilon)
            step, opt_state[group] = adam.update(gradient, learner.opt_state[group])
            updates = flat[group][1](-rates[group] * step)
            params[group] = optax.apply_updates(params[group], updates)
    wide = jax.tree.map(networks.full, grads)
    norms = {group: optax.tree.norm(tree) for group, tree in wide.items()}
    return learner._replace(params=params, opt_state=opt_state), norms


def _adam(epsilon: Any) -> optax.GradientTransformation:
    return optax.scale_by_adam(eps=epsilon)


def clip_by_global_norm(grads: Any, max_norm: Any) -> Any:
    """Like Optax's, but finite gradients whose squares overflow keep their direction.

    Optax divides by the norm, which is then infinite, and returns zeros.
    """
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in jax.tree.leaves(grads)]))
    # Squares of numbers below 1e18 do not overflow, and numbers stay as they are.
    shrink = jnp.where(largest > 1e18, 1e18 / largest, 1.0)
    grads = jax.tree.map(lambda x: x * shrink, grads)
    norm = optax.tree.norm(grads)
    factor = jnp.where(norm < max_norm, 1.0, max_norm / norm)
    return jax.tree.map(lambda x: x * factor, grads)


def learning_rate_factor(config: Config, hparams: HParams, iteration: int | Array) -> Array:
    """Factor on the learning rates: linear warm-up from 0, then the configured decay.

    Optax's schedules take their lengths as Python numbers; here the warm-up is traced.
    """
    done = jnp.asarray(iteration, jnp.float32)
    warmup = jnp.asarray(hparams.warmup_iterations, jnp.float32)
    warm = jnp.where(done < warmup, done / jnp.maximum(warmup, 1.0), 1.0)
    progress = (done - warmup) / jnp.maximum(config.num_iterations - warmup, 1.0)
    progress = jnp.clip(progress, 0.0, 1.0)
    if config.schedule == "linear":
        return warm * (1 - progress)
    if config.schedule == "cosine":
        return warm * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return warm


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
