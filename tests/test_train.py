"""The training step: what must come out where the answer is known, and what must not change.

Runs with different traced settings share a program as lanes of ``vmap``, because compiling takes
nearly all the time here.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gymnax.environments import spaces
from jax import Array
from jax.flatten_util import ravel_pytree

from gipo_jax import learner, objectives, train
from gipo_jax.config import Config, HParams
from gipo_jax.domains.control import Control

quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SMALL: dict[str, Any] = {
    "num_envs": 4,
    "rollout_length": 4,
    "batch_size": 16,
    "hidden_sizes": (8,),
    "eval_episodes": 0,
    "total_steps": 16 * 1000,
    "num_logs": 1,
}
BLOCK = 16


def stack(lanes: list[HParams]) -> HParams:
    return jax.tree.map(lambda *x: jnp.array(x), *lanes)


def lane_of(tree: Any, i: int) -> Any:
    """One run out of stacked ones, as NumPy arrays."""

    def pick(x: Any) -> Any:
        return np.asarray(jax.random.key_data(x[i]) if is_key(x) else x[i])

    return jax.tree.map(pick, tree)


def is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def equal(a: Any, b: Any) -> bool:
    """Whether two trees are the same to the bit; NaN equals NaN."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y, equal_nan=x.dtype.kind == "f") for x, y in pairs)


class Program(NamedTuple):
    """A configuration compiled once for a number of lanes."""

    domain: Control
    lanes: list[HParams]
    start: Callable[[HParams], train.TrainState]
    train_and_log: Callable[..., tuple[train.TrainState, dict[str, Array]]]

    def run(
        self, stop: int, lanes: list[HParams] | None = None
    ) -> tuple[train.TrainState, dict[str, Array]]:
        hparams = stack(lanes or self.lanes)
        return self.train_and_log(self.start(hparams), hparams, 0, stop)

    def final(self, stop: int) -> train.TrainState:
        """State after ``stop`` iterations, without compiling what a logged point adds."""

        def run(hparams: HParams) -> train.TrainState:
            def body(iteration: Array, state: train.TrainState) -> train.TrainState:
                return train.train_step(self.domain, state, hparams, iteration)[0]

            return jax.lax.fori_loop(0, stop, body, train.init(self.domain, hparams))

        return quick(jax.vmap(run))(stack(self.lanes))


def program(config: Config, settings: list[dict[str, Any]]) -> Program:
    domain: Any = train.make(config)
    return Program(
        domain,
        [train.make_hparams(config, **x) for x in settings],
        quick(jax.vmap(partial(train.init, domain))),
        quick(jax.vmap(partial(train.train_and_log, domain), in_axes=(0, 0, None, None))),
    )


# ------------------------------------------------------------------ the value of an endless task

ENDLESS: list[dict[str, Any]] = [
    {"gamma": 0.9, "gae_lambda": 0.95},
    {"gamma": 0.9, "gae_lambda": 0.0},
    {"gamma": 0.9, "gae_lambda": 1.0, "reward_scale": 0.1},
    {"gamma": 0.0},
    {"gamma": 0.9, "gae_lambda": 1.0, "buffer_size": 4 * BLOCK},
]


def endless(toy: Any, **settings: Any) -> Program:
    config = Config(
        **(SMALL | {"env": toy(limit=5), "updates_per_iteration": 4} | settings),
        max_buffer_size=4 * BLOCK,
    )
    common = {"learning_rate": 0.001, "value_learning_rate": 0.02, "buffer_size": BLOCK}
    unused = {"gae_lambda"} if config.advantage_mode == "vtrace" else set()
    lanes = [{name: x for name, x in lane.items() if name not in unused} for lane in ENDLESS]
    return program(config, [common | lane for lane in lanes])


def values(program: Program, state: train.TrainState) -> np.ndarray:
    value = jax.vmap(lambda params: program.domain.network.value(params, jnp.ones(1)))
    return np.asarray(value(state.learner.params))


@pytest.fixture(scope="module")
def stored(toy: Any) -> Program:
    return endless(toy)


VALUES = np.array([10, 10, 1, 1, 10])


def test_time_limits_do_not_lower_the_value_of_an_endless_task(
    stored: Program,
) -> None:
    """Reward 1 for ever, cut every five steps: the value is 1 / (1 - gamma), whatever lambda."""
    state, metrics = stored.run(400)
    np.testing.assert_allclose(values(stored, state) / VALUES, 1, atol=0.02)
    assert np.all(np.asarray(metrics["episode_return"]) == 5)
    assert np.all(np.asarray(metrics["episodes"]) == 400 * 4 * 4 // 5)
    assert np.all(state.diverged_at == -1)


@pytest.mark.parametrize("mode", ["recomputed", "vtrace"])
def test_recomputed_and_vtrace_give_the_value_of_an_endless_task(toy: Any, mode: str) -> None:
    program = endless(toy, advantage_mode=mode)
    np.testing.assert_allclose(values(program, program.final(400)) / VALUES, 1, atol=0.02)


def test_truncation_is_termination_drops_the_bootstrap_at_time_limits(toy: Any) -> None:
    # Whole episodes, or the share of last steps would differ from one rollout to the next.
    program = endless(
        toy, truncation_is_termination=True, num_envs=2, rollout_length=8, max_episode_steps=8
    )
    value = values(program, program.final(400))
    # One state, whose value is the mean over steps of 1 + gamma V, and in one of eight of 1.
    np.testing.assert_allclose(value[1], 1 / (1 - 0.9 * 7 / 8), rtol=0.02)
    # Monte Carlo: the mean over steps of the discounted rest of the episode.
    returns = np.mean([(1 - 0.9**left) / 0.1 for left in range(1, 9)])
    np.testing.assert_allclose(value[2], 0.1 * returns, rtol=0.02)
    np.testing.assert_allclose(value[3], 1, rtol=0.02)
    np.testing.assert_allclose(value[4], returns, rtol=0.02)


# ------------------------------------------------------------------ runs apart from each other


def test_seeds_differ_in_parameters_actions_and_samples(stored: Program) -> None:
    config = stored.domain.config
    lanes = [train.make_hparams(config, seed=s, buffer_size=4 * BLOCK) for s in (0, 1, 2, 1, 3)]
    first = stored.start(stack(lanes))
    state, _ = stored.run(8, lanes)
    kernels = [
        x for x in jax.tree.leaves(first.learner.params) if x.ndim == 3 and x.shape[-2:] != (1, 1)
    ]
    assert kernels
    draw = jax.vmap(lambda key: learner.sample_indices(config, lanes[0], 8, key, 2))
    for x in (*kernels, np.asarray(state.replay.action), np.asarray(draw(state.key))):
        assert len(np.unique(np.reshape(x, (5, -1)), axis=0)) == 4
    # The same seed is the same run, wherever in the program it stands.
    assert equal(lane_of(state, 1), lane_of(state, 3))


def test_diverged_run_is_frozen_and_leaves_other_runs_unchanged(stored: Program) -> None:
    lanes = [train.make_hparams(stored.domain.config, seed=s, buffer_size=64) for s in range(5)]
    state, _ = stored.run(3, lanes)
    broken = [*lanes]
    broken[2] = train.make_hparams(stored.domain.config, seed=2, buffer_size=64, learning_rate=1e38)

    healthy, _ = stored.train_and_log(state, stack(lanes), 3, 6)
    frozen, _ = stored.train_and_log(state, stack(broken), 3, 6)
    assert list(healthy.diverged_at) == [-1] * 5
    assert list(frozen.diverged_at) == [-1, -1, 3, -1, -1]
    assert equal(lane_of(frozen.learner, 2), lane_of(state.learner, 2))
    for lane in (0, 1, 3, 4):
        assert equal(lane_of(frozen, lane), lane_of(healthy, lane))
    # It stays frozen, and keeps its mark, also where its settings would now be harmless.
    later, _ = stored.train_and_log(frozen, stack(lanes), 6, 9)
    assert list(later.diverged_at) == [-1, -1, 3, -1, -1]
    assert equal(lane_of(later.learner, 2), lane_of(state.learner, 2))
    assert not equal(lane_of(later.learner, 1), lane_of(frozen.learner, 1))


def test_training_twice_from_the_same_inputs_gives_the_same_bits(stored: Program) -> None:
    once, again = stored.run(5), stored.run(5)
    assert all(equal(lane_of(once, i), lane_of(again, i)) for i in range(5))


def test_logging_at_other_points_gives_the_same_state(
    stored: Program,
) -> None:
    """And a second call does not compile a second time."""
    hparams = stack(stored.lanes)
    whole, _ = stored.run(7)
    state, _ = stored.run(3)
    compiled: list[str] = []

    def note(event: str, *_: Any, **__: Any) -> None:
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            compiled.append(event)

    # The size of the function's cache would not do: JAX may empty it between tests.
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        state, _ = stored.train_and_log(state, hparams, 3, 7)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert not compiled
    for field in ("learner", "replay", "domain_state", "key", "diverged_at"):
        a, b = ({"x": getattr(s, field)} for s in (whole, state))
        assert all(equal(lane_of(a, i), lane_of(b, i)) for i in range(5))


def test_traced_buffer_size_equals_a_buffer_allocated_with_that_size(toy: Any) -> None:
    def run(allocated: int) -> Any:
        config = Config(
            env=toy(clock=True, pay=1.0), max_buffer_size=allocated * BLOCK,
            updates_per_iteration=2, **SMALL,
        )  # fmt: skip
        sizes = (1, allocated, 2)
        lanes = [{"buffer_size": x * BLOCK, "learning_rate": 0.03} for x in sizes]
        state, metrics = program(config, lanes).run(11)
        picked = {"learner": state.learner, "envs": state.domain_state.envs, "metrics": metrics}
        return [lane_of(picked, i) for i in range(3)]

    shared, alone = run(8), run(2)
    assert equal(shared[0], alone[0])
    assert equal(shared[2], alone[2]) and equal(shared[2], alone[1])
    assert not equal(shared[0]["learner"], shared[2]["learner"])
    assert not equal(shared[1]["learner"], shared[2]["learner"])
    assert [lane["metrics"]["policy_age_max"] for lane in shared] == [0, 7, 1]
    assert alone[2]["metrics"]["policy_age"] == pytest.approx(0.5, abs=0.3)


# ------------------------------------------------------------------ on-policy, forked, normalised


@objectives.declare(initial_state=lambda params: jnp.zeros(()))
def forked(
    log_ratio: Array, advantage: Array, state: Array, sign: float = 1.0
) -> tuple[Array, Array]:
    """Importance sampling up or down the advantage; remembers the largest log-ratio it saw."""
    largest = jnp.maximum(state, jnp.max(jnp.abs(jax.lax.stop_gradient(log_ratio))))
    return sign * jnp.exp(log_ratio) * advantage, largest


@pytest.fixture(scope="module")
def fresh(toy: Any) -> tuple[Program, train.TrainState, list[dict[str, np.ndarray]]]:
    """On-policy runs up and down the objective in a task that pays for the second action."""
    config = Config(
        env=toy(limit=6, clock=True, pay=1.0), objective=forked, normalize_obs=True,
        max_buffer_size=40 * BLOCK, **(SMALL | {"eval_episodes": 8}),
    )  # fmt: skip
    common = {"buffer_size": BLOCK, "learning_rate": 0.03, "gamma": 0.5}
    made = program(config, [common | {"sign": 1.0}, common | {"sign": -1.0}])
    hparams = stack(made.lanes)
    state, points = made.start(hparams), []
    for start, stop in ((0, 1), (1, 40)):
        state, metrics = made.train_and_log(state, hparams, start, stop)
        points.append({k: np.asarray(v) for k, v in metrics.items()})
    return made, state, points


def test_first_update_on_fresh_data_has_ratio_one(fresh: Any) -> None:
    """Acting and learning see observations through the same statistics."""
    _, state, _ = fresh
    assert np.all(state.learner.objective_state < 1e-5)


def test_observation_statistics_equal_numpy_mean_and_variance(fresh: Any) -> None:
    _, state, _ = fresh
    # Replay has room for all 40 rollouts, in their original units.
    for lane in range(2):
        obs = np.asarray(state.replay.obs[lane], float).reshape(-1, 1)
        assert obs.max() == 5
        moments = state.domain_state.normalizer
        assert moments.total[lane] == obs.size
        np.testing.assert_allclose(moments.mean[lane], obs.mean(0), rtol=1e-4)
        variance = (
            state.domain_state.normalizer.squares[lane] / state.domain_state.normalizer.total[lane]
        )
        np.testing.assert_allclose(variance, obs.var(0), rtol=1e-4)


def test_objective_with_flipped_sign_learns_to_avoid_reward(fresh: Any) -> None:
    """The same run with the sign of the surrogate turned learns to avoid what pays."""
    _, _, points = fresh
    assert np.array_equal(points[1]["eval_return"], [6, 0])
    up, down = points[1]["eval_return_sampled"]
    assert down < 1.5 and up > 4.5


def test_episode_return_is_nan_when_no_episode_finished(fresh: Any) -> None:
    _, _, (first, second) = fresh
    assert np.all(first["episodes"] == 0) and np.all(np.isnan(first["episode_return"]))
    # Episodes of six steps, of which four were before the second point.
    assert np.all(second["episodes"] == 4 * (40 * 4 // 6))
    assert np.all(np.isfinite(second["episode_return"]))
    assert np.all(np.isnan(second["ess_old"])) and np.all(second["policy_age"] == 0)


# ------------------------------------------------------------------ the loss, independently


SIGMA, NARROW, ENTROPY, KL = 0.2, 0.5, 0.05, 0.3


@pytest.mark.parametrize("joint", [False, True])
def test_update_follows_an_independently_written_loss(toy: Any, joint: bool) -> None:
    """GIPO with two tokens on stale data, the batch being all of replay."""
    config = Config(
        env=toy(clock=True, pay=1.0, actions=spaces.Box(0, 1, (2,))), num_bins=3,
        ratio_level="joint" if joint else "token", max_buffer_size=4 * BLOCK,
        **(SMALL | {"batch_size": 4 * BLOCK}),
    )  # fmt: skip
    domain: Any = train.make(config)
    network = domain.network
    hparams = train.make_hparams(
        config, buffer_size=4 * BLOCK, learning_rate=0.1, sigma=SIGMA, sigma_neg_ratio=NARROW,
        entropy_coef=ENTROPY, kl_coef=KL, value_coef=0.7,
    )  # fmt: skip
    step = quick(partial(train.train_step, domain))
    before = quick(partial(train.init, domain))(hparams)
    states = [before]
    for iteration in range(9):
        before, (states, metrics) = states[-1], record(states, step, hparams, iteration)
    # Updates wait until replay holds a batch.
    assert equal(states[0].learner, states[3].learner)
    assert not equal(states[3].learner, states[4].learner)
    after = states[-1]
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), after.replay)

    def loss(params: Any) -> tuple[Array, dict[str, Array]]:
        logits = network.policy(params, rows.obs)
        log_policy = jax.nn.log_softmax(logits)
        taken = jnp.take_along_axis(log_policy, rows.action[..., None], axis=-1)[..., 0]
        token_ratio = taken - rows.behavior_log_prob
        x = token_ratio
        if joint:  # every token has the ratio of the action, and a gradient of its own
            total_ratio = jnp.broadcast_to(token_ratio.sum(-1, keepdims=True), x.shape)
            x = jax.lax.stop_gradient(total_ratio - x) + x
        advantage = (rows.advantage - rows.advantage.mean()) / rows.advantage.std()
        advantage = advantage[:, None]
        width = jnp.where(advantage > 0, SIGMA, SIGMA * NARROW)
        weight = jax.lax.stop_gradient(jnp.exp(-(x**2) / (2 * width**2)))
        surrogate = jnp.mean(weight * jnp.exp(x) * advantage)
        entropy = -jnp.mean(jnp.sum(jnp.exp(log_policy) * log_policy, axis=-1))
        kl = jnp.mean(jnp.exp(token_ratio) - 1 - token_ratio)
        value_loss = jnp.mean((network.value(params, rows.obs) - rows.value_target) ** 2)
        total = -surrogate - ENTROPY * entropy + KL * kl + 0.7 * value_loss
        spread = jnp.max(jnp.abs(x))
        parts = {"policy_loss": -surrogate, "entropy": entropy, "kl": kl, "value_loss": value_loss}
        return total, parts | {"spread": spread}

    gradient, parts = quick(jax.grad(loss, has_aux=True))(before.learner.params)
    assert parts.pop("spread") > 0.3
    for name, value in parts.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-3, err_msg=name)
    for group, name in (("policy", "grad_norm"), ("value", "value_grad_norm")):
        norm = optax.tree.norm(gradient[group])
        np.testing.assert_allclose(metrics[name], norm, rtol=1e-3, err_msg=name)
        # Adam's mean moves to the clipped gradient by a tenth.
        old, new = (
            next(x for x in jax.tree.leaves(s.learner.opt_state[group]) if x.ndim == 1)
            for s in (before, after)
        )
        clipped = jax.tree.map(lambda g, n=norm: g * jnp.minimum(1, 0.5 / n), gradient[group])
        flat = ravel_pytree(clipped)[0]
        np.testing.assert_allclose((new - 0.9 * old) / 0.1, flat, atol=1e-4)


def test_updates_wait_until_a_batch_of_rows_is_as_old_as_min_age(toy: Any) -> None:
    """Before that a batch would hold some rows several times."""
    config = Config(
        env=toy(clock=True), max_buffer_size=8 * BLOCK, **(SMALL | {"batch_size": 2 * BLOCK})
    )
    hparams = train.make_hparams(config, buffer_size=8 * BLOCK, min_age=3, learning_rate=0.1)
    domain = train.make(config)
    step, states = quick(partial(train.train_step, domain)), [train.init(domain, hparams)]
    for iteration in range(5):
        states, metrics = record(states, step, hparams, iteration)
        # In iteration 4 the blocks of iterations 0 and 1 are old enough: a batch of two.
        assert (metrics["value_loss"] > 0) == (iteration == 4)
    assert equal(states[0].learner, states[4].learner)
    assert not equal(states[4].learner, states[5].learner)


def record(
    states: list[train.TrainState], step: Any, hparams: HParams, iteration: int
) -> tuple[list[train.TrainState], dict[str, Array]]:
    state, metrics = step(states[-1], hparams, iteration)
    return [*states, state], metrics


# ------------------------------------------------------------------ reuse, schedules


STILL: dict[str, Any] = {"learning_rate": 1e-12, "value_coef": 1e-6}
UPDATED: list[dict[str, Any]] = [
    {"learning_rate": 0.01, "value_learning_rate": 0.04},
    {"learning_rate": 0.01, "warmup_iterations": 4},
    STILL,
]


class Updated(NamedTuple):
    """What one iteration makes of the parameters of each lane of ``UPDATED``."""

    before: Any
    after: Any
    metrics: dict[str, Array]


@pytest.fixture(scope="module")
def updated(toy: Any) -> dict[str, Updated]:
    """One batch, used once; twice; or twice with the actor taking part in the first only.

    The value may train the shared torso, which belongs to the policy's parameters.
    """

    def run(**settings: Any) -> Updated:
        config = Config(
            env=toy(clock=True, pay=1.0), shared_torso=True, detach_value=False,
            max_buffer_size=BLOCK, **(SMALL | {"hidden_sizes": (8, 6)}), **settings,
        )  # fmt: skip
        domain = train.make(config)
        lanes = [train.make_hparams(config, buffer_size=BLOCK, **x) for x in UPDATED]

        def step(hparams: HParams) -> Updated:
            state = train.init(domain, hparams)
            after, metrics = train.train_step(domain, state, hparams, 0)
            return Updated(state.learner.params, after.learner.params, metrics)

        return quick(jax.vmap(step))(stack(lanes))

    return {
        "once": run(),
        "twice": run(reuse_per_batch=2),
        "critic": run(reuse_per_batch=2, policy_delay=2),
    }


def test_policy_delay_leaves_the_policy_unchanged(
    updated: dict[str, Updated],
) -> None:
    once, twice, critic = (updated[x].after for x in ("once", "twice", "critic"))

    def apart(a: Any, b: Any) -> float:
        both = zip(jax.tree.leaves(lane_of(a, 0)), jax.tree.leaves(lane_of(b, 0)), strict=True)
        return max(np.abs(x - y).max() for x, y in both)

    # Two programs round differently; an update moves parameters by about the learning rate.
    assert apart(critic["policy"], once["policy"]) < 1e-6
    assert apart(twice["policy"], once["policy"]) > 1e-3
    for again in (critic, twice):
        assert apart(again["value"], once["value"]) > 1e-3


def test_policy_loss_of_a_reused_batch_is_damped(
    updated: dict[str, Updated],
) -> None:
    """Where nothing moves, the gradient of the second use is that of the first over sqrt 2."""
    lane = UPDATED.index(STILL)
    once, twice, critic = (lane_of(updated[x].metrics, lane) for x in ("once", "twice", "critic"))
    assert once["grad_norm"] > 1e-3
    ratio = twice["grad_norm"] / once["grad_norm"]
    np.testing.assert_allclose(ratio, (1 + 1 / np.sqrt(2)) / 2, rtol=1e-3)
    for again in (twice, critic):
        np.testing.assert_allclose(again["value_grad_norm"], once["value_grad_norm"], rtol=1e-5)
    # Means over the updates that the actor took part in.
    for name in ("policy_loss", "entropy", "kl", "grad_norm"):
        np.testing.assert_allclose(critic[name], once[name], rtol=1e-5, atol=1e-7)


def test_adam_first_step_equals_the_scheduled_learning_rates(updated: dict[str, Updated]) -> None:
    """Adam's first step is its learning rate in every parameter that has a gradient."""
    before, after, _ = updated["once"]
    for group, rates in (("policy", [0.01, 0.0]), ("value", [0.04, 0.0])):
        moved = jax.tree.map(lambda a, b: jnp.abs(a - b), after[group], before[group])
        largest = [max(x.max() for x in jax.tree.leaves(lane_of(moved, i))) for i in range(2)]
        np.testing.assert_allclose(largest, rates, rtol=0.02, atol=1e-9)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 10, 100])
def test_learning_rate_schedule_equals_numpy_formula(schedule: str, warmup: int) -> None:
    config = Config(**(SMALL | {"total_steps": BLOCK * 50}), schedule=schedule)
    hparams = train.make_hparams(config, warmup_iterations=warmup)
    iteration = np.arange(50)
    factor_at = jax.vmap(partial(learner.learning_rate_factor, config, hparams))
    factor = np.asarray(factor_at(jnp.arange(50)))
    rise = np.minimum(iteration / warmup, 1) if warmup else np.ones(50)
    progress = np.clip((iteration - warmup) / max(50 - warmup, 1), 0, 1)
    decay = {
        "constant": np.ones(50),
        "linear": 1 - progress,
        "cosine": (1 + np.cos(np.pi * progress)) / 2,
    }[schedule]
    np.testing.assert_allclose(factor, rise * decay, atol=1e-6)
    assert np.all(factor[warmup > 0 :] > 0) and factor.max() <= 1
    if warmup < 50:
        assert factor[warmup] == pytest.approx(1)


# ------------------------------------------------------------------ states and conveniences


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"advantage_mode": "recomputed", "normalize_obs": True},
        {
            "advantage_mode": "vtrace",
            "shared_torso": True,
            "layer_norm": True,
            "hidden_sizes": (4, 4),
        },
        {"env": "Pendulum-v1", "ratio_level": "joint"},
        {"env": "Pendulum-v1", "action_head": "gaussian", "sampling": "uniform"},
        {"env": "Breakout-MinAtar", "objective": "r2vpo", "batch_size": 32},
        {"env": "FrozenLake-misc", "policy_delay": 2, "reuse_per_batch": 2},
    ],
)
def test_train_and_log_keeps_types_and_gives_scalar_metrics(
    settings: dict[str, Any],
) -> None:
    """Types, also weak ones, included: or it would compile twice. And all metrics are scalars."""
    config = Config(**(SMALL | {"eval_episodes": 2} | settings), max_buffer_size=2 * BLOCK)
    domain = train.make(config)
    hparams = train.make_hparams(config, buffer_size=2 * BLOCK)
    state = jax.eval_shape(partial(train.init, domain), hparams)
    step = partial(train.train_and_log, domain)
    after, metrics = jax.eval_shape(step, state, hparams, 0, 3)

    def described(tree: Any) -> Any:
        return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)

    assert described(after) == described(state)
    assert all(x.shape == () and x.dtype == jnp.float32 for x in metrics.values())
    assert not any(x.weak_type for x in jax.tree.leaves(state))
    names = {
        "episode_return", "episodes", "eval_return", "eval_return_sampled", "ess", "ess_new",
        "ess_old", "near_zero_fraction", "near_zero_fraction_new", "near_zero_fraction_old",
        "clip_fraction", "suppressed_fraction", "mean_weight", "policy_age", "policy_age_max",
        "log_ratio_abs_p95", "log_ratio_p05", "log_ratio_p95", "masked_fraction",
        "old_share", "old_gradient_share",
        "kl", "entropy", "policy_loss", "value_loss",
        "grad_norm", "value_grad_norm", "explained_variance",
    }  # fmt: skip
    assert set(metrics) == names


def test_replay_stores_only_the_fields_of_the_advantage_mode() -> None:
    kept = {}
    for mode in ("stored", "recomputed"):
        config = Config(**SMALL, advantage_mode=mode, max_buffer_size=3 * BLOCK)
        replay = train.init(
            train.make(config), train.make_hparams(config, buffer_size=3 * BLOCK)
        ).replay
        assert replay.obs.shape == (3, 4, 4, 4)
        kept[mode] = {name for name, x in replay._asdict().items() if x is not None}
    both = {"obs", "action", "behavior_log_prob"}
    assert kept["stored"] == both | {"advantage", "value_target"}
    assert kept["recomputed"] == both | {"reward", "terminated", "truncated", "final_obs"}


# ------------------------------------------------------------------ gradients too large to square


def test_clipping_keeps_the_direction_of_gradients_whose_squares_overflow() -> None:
    """optax.clip_by_global_norm divides by an infinite norm and returns zeros."""
    for size in (1e-3, 3.0, 1e17, 1e20, 1e30):
        grads = {"a": jnp.array([3.0, 0.0]) * size, "b": jnp.array(-4.0) * size}
        clipped = learner.clip_by_global_norm(grads, 0.5, grads)
        scale = min(1.0, 0.5 / (5 * size)) * size
        np.testing.assert_allclose(clipped["a"], np.array([3.0, 0.0]) * scale, rtol=1e-5)
        np.testing.assert_allclose(clipped["b"], -4.0 * scale, rtol=1e-5)
    infinite = {"a": jnp.array([jnp.inf])}
    assert not np.isfinite(learner.clip_by_global_norm(infinite, 0.5, infinite)["a"]).all()
