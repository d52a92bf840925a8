"""One iteration against the authors' training of GIPO, in NumPy with 64 bits and no autodiff.

The reference below is written from the description of their training (arXiv:2603.03955 and its
public Meta-World script): network, stored advantages, loss, gradient norm, AdamW and schedule. Ours
gives it the environment's steps and the rows that each batch draws, and nothing else.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments import environment, spaces
from jax.flatten_util import ravel_pytree
from numpy.typing import NDArray

from gipo_jax import buffer, losses, train
from gipo_jax.config import Config
from gipo_jax.learner import sample_indices

STEPS, BLOCKS, BATCH = 16, 4, 16
ROUNDS, REUSE, ACTOR_EVERY = 3, 4, 2
DIMENSIONS, BINS = 2, 11
EPISODE, REWARD_SCALE, GAMMA, LAMBDA = 6, 0.5, 0.99, 0.95
SIGMA, SIGMA_NEG_RATIO, KL_COEF, VALUE_COEF, MAX_NORM = 1.0, 0.5, 0.1, 0.5, 1.0
RATES = {"policy": 1e-2, "value": 3e-2}
WARM_UP, ITERATIONS = 4, 12
# Flax's; PyTorch adds 1e-5 to the variance.
NORM_EPSILON = 1e-6

Numbers = NDArray[np.float64]
Layer = dict[str, Numbers]
Parameters = dict[str, dict[str, Layer]]
"""By group, policy or value, then by layer."""


# The authors' network: blocks of Linear, ReLU and LayerNorm, and two linear outputs.


def block(layer: Layer, x: Numbers) -> tuple[Numbers, tuple[Numbers, ...]]:
    """A block's output, and what its gradient needs."""
    linear = x @ layer["weight"] + layer["bias"]
    hidden = np.maximum(linear, 0)
    centred = hidden - hidden.mean(axis=1, keepdims=True)
    inverse = 1 / np.sqrt((centred**2).mean(axis=1, keepdims=True) + NORM_EPSILON)
    standard = centred * inverse
    return layer["scale"] * standard + layer["shift"], (x, linear, standard, inverse)


def block_gradient(
    layer: Layer, saved: tuple[Numbers, ...], output: Numbers
) -> tuple[Layer, Numbers]:
    """Gradients of a block's parameters and of its input, from that of its output."""
    x, linear, standard, inverse = saved
    of_standard = output * layer["scale"]
    mean = of_standard.mean(axis=1, keepdims=True)
    along = (of_standard * standard).mean(axis=1, keepdims=True)
    of_linear = inverse * (of_standard - mean - along * standard) * (linear > 0)
    gradient = {
        "weight": x.T @ of_linear,
        "bias": of_linear.sum(axis=0),
        "scale": (output * standard).sum(axis=0),
        "shift": output.sum(axis=0),
    }
    return gradient, of_linear @ layer["weight"].T


def log_softmax(logits: Numbers) -> Numbers:
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


class Pass(NamedTuple):
    """A forward pass: log-probabilities of all bins, values, and what gradients need."""

    log_probs: Numbers
    value: Numbers
    saved: dict[str, Any]


def forward(params: Parameters, obs: Numbers) -> Pass:
    policy, value = params["policy"], params["value"]
    features, encoder = block(policy["encoder"], obs)
    hidden, head = block(policy["head"], features)
    logits = hidden @ policy["logits"]["weight"] + policy["logits"]["bias"]
    of_value, value_head = block(value["head"], features)
    output = of_value @ value["output"]["weight"] + value["output"]["bias"]
    saved = {
        "encoder": encoder, "head": head, "hidden": hidden, "value_head": value_head,
        "of_value": of_value,
    }  # fmt: skip
    log_probs = log_softmax(logits.reshape(len(obs), DIMENSIONS, BINS))
    return Pass(log_probs, output[:, 0], saved)


# The authors' data: advantages when it is collected, and a first-in, first-out buffer.


class Data(NamedTuple):
    """Transitions, oldest first, with log-probabilities of all bins as they were then."""

    obs: Numbers
    token: NDArray[np.int64]
    log_probs: Numbers
    advantage: Numbers
    target: Numbers


def collected(
    params: Parameters, obs: Numbers, token: NDArray[np.int64], following: Numbers
) -> Data:
    """A chunk with its advantages (GAE); a time limit counts as death.

    Args:
        params: that acted.
        obs: ``[time, 3]``.
        token: ``[time, dimensions]``.
        following: the observation after the chunk, ``[3]``.
    """
    action = -1 + 2 * token / (BINS - 1)
    reward = REWARD_SCALE * course_reward(obs[:, :DIMENSIONS], action)
    alive = np.round(obs[:, -1] * EPISODE) + 1 < EPISODE
    now = forward(params, obs)
    next_value = np.append(now.value[1:], forward(params, following[None]).value)
    advantage, later = np.zeros(len(obs)), 0.0
    for t in reversed(range(len(obs))):
        delta = reward[t] + GAMMA * alive[t] * next_value[t] - now.value[t]
        later = advantage[t] = delta + GAMMA * LAMBDA * alive[t] * later
    return Data(obs, token, now.log_probs, advantage, advantage + now.value)


# The authors' update phase.


def gradients(params: Parameters, batch: Data, use: int, actor: bool) -> Parameters:
    """Gradients of the loss of a batch at its ``use``-th use, by the chain rule."""
    at = forward(params, batch.obs)
    size, found = len(batch.obs), at.saved
    error = (2 * VALUE_COEF / size * (at.value - batch.target))[:, None]
    of_head, _ = block_gradient(
        params["value"]["head"], found["value_head"], error @ params["value"]["output"]["weight"].T
    )
    output = {"weight": found["of_value"].T @ error, "bias": error.sum(axis=0)}
    value = {"head": of_head, "output": output}
    if not actor:
        return {"value": value}

    deviation = batch.advantage - batch.advantage.mean()
    advantage = (deviation / max(np.sqrt((deviation**2).mean()), 1e-8))[:, None]
    chosen = np.eye(BINS)[batch.token]
    log_ratio = (chosen * (at.log_probs - batch.log_probs)).sum(axis=-1)
    sigma = np.where(advantage > 0, SIGMA, SIGMA * SIGMA_NEG_RATIO)
    weight = np.exp(-0.5 * (log_ratio / sigma) ** 2)
    # d loss / d log pi of the chosen bin: the weight is a constant, the ratio its own derivative.
    scale = 1 / np.sqrt(use + 1)
    of_chosen = -scale * weight * np.exp(log_ratio) * advantage / (size * DIMENSIONS)
    probs, old_probs = np.exp(at.log_probs), np.exp(batch.log_probs)
    of_logits = of_chosen[..., None] * (chosen - probs)
    of_logits += KL_COEF / (size * DIMENSIONS) * (probs - old_probs)
    of_logits = of_logits.reshape(size, -1)

    policy = params["policy"]
    of_head, of_features = block_gradient(
        policy["head"], found["head"], of_logits @ policy["logits"]["weight"].T
    )
    of_encoder, _ = block_gradient(policy["encoder"], found["encoder"], of_features)
    logits = {"weight": found["hidden"].T @ of_logits, "bias": of_logits.sum(axis=0)}
    return {"policy": {"encoder": of_encoder, "head": of_head, "logits": logits}, "value": value}


class Adam(NamedTuple):
    """AdamW's state for a group; without weight decay it is Adam."""

    steps: int
    first: dict[str, Layer]
    second: dict[str, Layer]


def norm_of(gradient: Parameters) -> float:
    return float(np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(gradient))))


def updated(
    params: Parameters, optimizer: dict[str, Adam], gradient: Parameters, factor: float
) -> tuple[Parameters, dict[str, Adam]]:
    """Parameters and optimizer after a step of the groups that have a gradient."""
    shrink = min(1.0, MAX_NORM / norm_of(gradient))
    params, optimizer = dict(params), dict(optimizer)
    for group, of_layers in gradient.items():
        steps, first, second = optimizer[group]
        steps += 1
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * shrink * g, first, of_layers)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * (shrink * g) ** 2, second, of_layers)

        def moved(x: Numbers, m: Numbers, v: Numbers, group: str = group, t: int = steps) -> Any:
            root = np.sqrt(v / (1 - 0.999**t)) + 1e-8
            return x - factor * RATES[group] * m / (1 - 0.9**t) / root

        params[group] = jax.tree.map(moved, params[group], first, second)
        optimizer[group] = Adam(steps, first, second)
    return params, optimizer


def rate_factor(iteration: int) -> float:
    if iteration < WARM_UP:
        return iteration / WARM_UP
    return 0.5 * (1 + np.cos(np.pi * (iteration - WARM_UP) / (ITERATIONS - WARM_UP)))


def update_phase(
    params: Parameters, optimizer: dict[str, Adam], batches: list[Data], iteration: int
) -> Parameters:
    for batch in batches:
        for use in range(REUSE):
            gradient = gradients(params, batch, use, actor=use % ACTOR_EVERY == 0)
            params, optimizer = updated(params, optimizer, gradient, rate_factor(iteration))
    return params


# Our side.


def course_reward(position: Any, action: Any) -> Any:
    return 2 - ((position + action) ** 2).sum(-1)


@flax.struct.dataclass
class Place(environment.EnvState):
    """Time and place on the course."""

    position: jax.Array


class Course(environment.Environment):
    """Steps towards the origin; observes the position and the part of the episode that is over."""

    @property
    def default_params(self) -> environment.EnvParams:
        return environment.EnvParams(max_steps_in_episode=EPISODE)

    def _observe(self, state: Any) -> jax.Array:
        return jnp.append(state.position, state.time / EPISODE)

    def reset_env(self, key: jax.Array, params: Any) -> tuple[jax.Array, Any]:
        state = Place(time=jnp.int32(0), position=jax.random.normal(key, (DIMENSIONS,)))
        return self._observe(state), state

    def step_env(self, key: jax.Array, state: Any, action: Any, params: Any) -> Any:
        reward = course_reward(state.position, action)
        state = Place(time=state.time + 1, position=0.9 * state.position + 0.5 * action)
        return self._observe(state), state, reward, jnp.bool_(False), {}

    def action_space(self, params: Any) -> Any:
        return spaces.Box(-1, 1, (DIMENSIONS,), jnp.float32)

    def observation_space(self, params: Any) -> Any:
        return spaces.Box(-10, 10, (DIMENSIONS + 1,), jnp.float32)


CONFIG = Config(
    env=Course(),
    num_envs=1,
    rollout_length=STEPS,
    total_steps=STEPS * ITERATIONS,
    max_buffer_size=STEPS * BLOCKS,
    batch_size=BATCH,
    updates_per_iteration=ROUNDS,
    reuse_per_batch=REUSE,
    policy_delay=ACTOR_EVERY,
    kl="exact",
    joint_grad_norm=True,
    num_bins=BINS,
    hidden_sizes=(12, 10),
    value_hidden_sizes=(9,),
    shared_torso=True,
    detach_value=True,
    activation="relu",
    layer_norm=True,
    truncation_is_termination=True,
    schedule="cosine",
    eval_episodes=0,
)
DOMAIN = train.make(CONFIG)
HPARAMS = train.make_hparams(
    CONFIG,
    buffer_size=STEPS * BLOCKS,
    sigma=SIGMA,
    sigma_neg_ratio=SIGMA_NEG_RATIO,
    learning_rate=RATES["policy"],
    value_learning_rate=RATES["value"],
    gamma=GAMMA,
    gae_lambda=LAMBDA,
    entropy_coef=0.0,
    kl_coef=KL_COEF,
    value_coef=VALUE_COEF,
    max_grad_norm=MAX_NORM,
    adam_epsilon=1e-8,
    warmup_iterations=WARM_UP,
    reward_scale=REWARD_SCALE,
)


def of_group(tree: Any) -> dict[str, Layer]:
    """Parameters of one of our groups, or what has their shape, by the names above."""

    def linear(layer: Any) -> Layer:
        return {"weight": layer["kernel"], "bias": layer["bias"]}

    def normed(part: Any) -> Layer:
        layers = part["params"]
        norm = layers["LayerNorm_0"]
        return linear(layers["Dense_0"]) | {"scale": norm["scale"], "shift": norm["bias"]}

    tree = jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
    if "torso" in tree:
        named = {"encoder": normed(tree["torso"]), "head": normed(tree["tower"])}
        return named | {"logits": linear(tree["output"]["params"]["Dense_0"])}
    return {"head": normed(tree["tower"]), "output": linear(tree["output"]["params"])}


def of_params(params: Any) -> Parameters:
    return {group: of_group(tree) for group, tree in params.items()}


def of_optimizer(learner: train.Learner) -> dict[str, Adam]:
    def adam(group: str) -> Adam:
        state, unravel = learner.opt_state[group], ravel_pytree(learner.params[group])[1]
        moments = (of_group(unravel(x)) for x in (state.mu, state.nu))
        return Adam(int(state.count), *moments)

    return {group: adam(group) for group in learner.params}


def flat(tree: Any) -> Numbers:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


class Iteration(NamedTuple):
    """Ours before and after an iteration, and the reference's data for it."""

    number: int
    before: train.TrainState
    after: train.TrainState
    rows: NDArray[np.int64]
    data: Data

    @property
    def batches(self) -> list[Data]:
        """Batches drawn; rows count from the newest block's first."""
        block, row = self.rows // STEPS, self.rows % STEPS
        oldest_first = len(self.data.obs) - (block + 1) * STEPS + row
        return [Data(*(x[index] for x in self.data)) for index in oldest_first]


@pytest.fixture(scope="module")
def iterations() -> list[Iteration]:
    """All iterations of a run, each from our state before it."""
    state = jax.jit(partial(train.init, DOMAIN))(HPARAMS)
    train_step = jax.jit(partial(train.train_step, DOMAIN))
    chunks: list[Data] = []
    found = []
    for index in range(ITERATIONS):
        after, _ = train_step(state, HPARAMS, index)
        written = jax.tree.map(lambda x, i=index: np.asarray(x[i % BLOCKS, :, 0]), after.replay)
        chunks.append(
            collected(
                of_params(state.learner.params),
                written.obs.astype(np.float64),
                written.action.astype(np.int64),
                np.asarray(after.domain_state.envs.obs[0], np.float64),
            )
        )
        data = Data(*(np.concatenate(x) for x in zip(*chunks[-BLOCKS:], strict=True)))
        key = jax.random.split(jax.random.fold_in(state.key, index), 3)[1]
        rows = np.asarray(sample_indices(CONFIG, HPARAMS, index, key, ROUNDS), np.int64)
        found.append(Iteration(index, state, after, rows, data))
        state = after
    return found


def test_data_of_a_rollout_are_labelled_as_the_authors_do(iterations: list[Iteration]) -> None:
    for iteration in iterations:
        newest = jax.tree.map(
            lambda x, i=iteration.number: np.asarray(x[i % BLOCKS, :, 0], np.float64),
            iteration.after.replay,
        )
        expected: Any = Data._make(x[-STEPS:] for x in iteration.data)
        chosen = np.take_along_axis(expected.log_probs, expected.token[..., None], -1)[..., 0]
        for ours, theirs in (
            (log_softmax(newest.behavior_outputs), expected.log_probs),
            (newest.behavior_log_prob, chosen),
            (newest.advantage, expected.advantage),
            (newest.value_target, expected.target),
        ):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("use", [0, 2])
def test_policy_and_value_gradients_of_a_batch_are_the_authors(
    iterations: list[Iteration], use: int
) -> None:
    """Of stale rows with ratios far from 1, and of a later use of the batch."""
    iteration = iterations[7]
    learner = iteration.before.learner
    state = iteration.after._replace(learner=learner)

    @jax.jit
    def gradient(rows: Any) -> Any:
        taken = buffer.take_rows(state.replay, rows, iteration.number)
        batch = DOMAIN.batch(state, learner.params, *taken, HPARAMS)

        def loss(params: Any) -> Any:
            scale = 1 / np.sqrt(use + 1)
            return losses.loss(DOMAIN, state, learner, params, batch, HPARAMS, scale)[0]

        return jax.grad(loss)(learner.params)

    params = of_params(learner.params)
    assert iteration.rows.min() < STEPS and iteration.rows.max() >= (BLOCKS - 1) * STEPS
    for rows, batch in zip(iteration.rows, iteration.batches, strict=True):
        log_ratio = forward(params, batch.obs).log_probs - batch.log_probs
        ratio = np.exp(np.take_along_axis(log_ratio, batch.token[..., None], -1))
        assert ratio.max() > 1.3 and ratio.min() < 0.7
        expected, ours = gradients(params, batch, use, actor=True), of_params(gradient(rows))
        for group in ("policy", "value"):
            error = np.abs(flat(ours[group]) - flat(expected[group])).max()
            assert error < 1e-5 * np.abs(flat(expected[group])).max(), group


@pytest.mark.parametrize("index", [1, 4, 7])
def test_parameters_after_an_iteration_are_the_authors(
    iterations: list[Iteration], index: int
) -> None:
    """In warm-up, at the full rate, and in the decay.

    The bound is relative to the largest step of an entry. Adam's 1 - 0.999^t loses up to 3e-5 to
    32 bits in the first steps, and its root half of that; the rounding of gradients adds less.
    """
    iteration = iterations[index]
    learner = iteration.before.learner
    start, batches = of_params(learner.params), iteration.batches
    assert norm_of(gradients(start, batches[0], 0, actor=True)) > MAX_NORM
    expected = update_phase(start, of_optimizer(learner), batches, index)
    ours = of_params(iteration.after.learner.params)
    for group in ("policy", "value"):
        step = np.abs(flat(expected[group]) - flat(start[group])).max()
        error = np.abs(flat(ours[group]) - flat(expected[group])).max()
        assert error < 5e-5 * step, group


def test_replay_keeps_the_behavior_outputs_for_an_exact_kl_alone() -> None:
    for kl, shape in (("exact", (BLOCKS, STEPS, 1, DIMENSIONS, BINS)), ("sampled", None)):
        domain = train.make(dataclasses.replace(CONFIG, kl=kl))

        def one_iteration(domain: Any = domain) -> Any:
            return train.train_step(domain, train.init(domain, HPARAMS), HPARAMS, 0)[0].replay

        outputs = jax.eval_shape(one_iteration).behavior_outputs
        assert (outputs if outputs is None else outputs.shape) == shape
