"""Flow policies: the sampler against closed forms, GRPO-Guard's ratio, and training."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.stats import multivariate_normal

from gipo_jax import train
from gipo_jax.config import Config, ConfigError, HParams
from gipo_jax.domains import Scores
from gipo_jax.domains.flow import sampler, tasks
from gipo_jax.domains.flow.domain import Row

RING = tasks.make("flow/ring")
SMALL = Config(
    env="flow/ring",
    hidden_sizes=(16,),
    num_envs=4,
    rollout_length=2,
    batch_size=8,
    max_buffer_size=32,
    total_steps=48,
    num_logs=3,
    eval_episodes=4,
)
QUICK_TASK = RING._replace(pretrain_steps=3, pretrain_batch=16)


def made(config: Config = SMALL, task: tasks.Task = QUICK_TASK) -> Any:
    return train.make(config, task)


@functools.cache
def pretrained() -> Any:
    field = sampler.velocity_field(Config(activation="silu"))
    return field, *jax.jit(lambda key: sampler.pretrain(field, RING, key))(jax.random.key(0))


def perturbed(params: Any, scale: float, seed: int = 1) -> Any:
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [
        x + scale * jnp.std(x) * jax.random.normal(key, x.shape)
        for x, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, moved)


@functools.cache
def old_and_new_steps() -> dict[str, Any]:
    """Chains of the pre-trained flow, and what a perturbed flow makes of their steps."""
    field, params, _ = pretrained()
    config = dataclasses.replace(SMALL, activation="silu", hidden_sizes=(64, 64))
    key_noise, key_steps = jax.random.split(jax.random.key(2))
    noise = jax.random.normal(key_noise, (8000, 2))
    chain = jax.jit(lambda: sampler.sample(sampler.bind(field, params), RING, key_steps, noise))()
    rows = Row(chain.points, chain.mean, chain.log_prob, noise[:, 0])
    new = {"policy": perturbed(params, 0.3)}

    def compared(level: str) -> Scores:
        domain = made(dataclasses.replace(config, ratio_level=level), RING)
        batch = domain.batch(None, new, rows, jnp.zeros(len(noise)), HParams())
        return jax.jit(lambda: domain.score(new, batch, HParams()))()

    flow = sampler.bind(field, new["policy"])
    steps = sampler.schedule(RING)
    return {
        "rows": rows,
        "new_mean": np.asarray(sampler.chain_means(flow, steps, chain.points), float),
        "token": compared("token"),
        "ratio_norm": compared("ratio_norm"),
        "steps": steps,
    }


# The flow and its sampler.


def test_flow_matching_fits_the_density() -> None:
    field, params, losses = pretrained()
    noise = jax.random.normal(jax.random.key(5), (2000, 2))
    chain = sampler.sample(sampler.bind(field, params), RING, jax.random.key(6), noise)
    ends = np.asarray(chain.points[:, -1])
    data = np.asarray(RING.sample(jax.random.key(7), 2000))
    assert losses[-50:].mean() < 0.75 * losses[:5].mean()
    # Each of the eight modes has its share, and most points lie near one.
    distance = np.linalg.norm(ends[:, None] - RING.centers, axis=-1)
    assert np.mean(distance.min(axis=1) < 0.45) > 0.8
    share = np.bincount(distance.argmin(axis=1), minlength=8) / len(ends)
    assert share.min() > 0.08 and share.max() < 0.18
    assert energy_distance(ends, data) < 0.01 < energy_distance(np.asarray(noise), data)


def energy_distance(x: Any, y: Any) -> float:
    def mean_distance(a: Any, b: Any) -> float:
        return float(np.linalg.norm(a[:, None] - b, axis=-1).mean())

    return 2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y)


def gaussian_velocity(points: Any, times: Any) -> Any:
    """Exact flow of the density N(m, q I), m = (1, -1/2), q = 1/4: E[eps - x_0 | x_t]."""
    mean, variance = jnp.array([1.0, -0.5]), 0.25
    t = times[..., None]
    spread = (1 - t) ** 2 * variance + t**2
    innovation = (points - (1 - t) * mean) / spread
    return (t - (1 - t) * variance) * innovation - mean


def test_sde_has_the_marginals_of_the_flow_at_any_noise_level() -> None:
    # The Euler step's own error falls with its length, so the steps are many here.
    noise = jax.random.normal(jax.random.key(0), (10_000, 2))
    for level in (0.3, 1.0):
        task = RING._replace(steps=100, noise_level=level)
        chain = sampler.sample(gaussian_velocity, task, jax.random.key(1), noise)
        middle = sampler.schedule(task).time[50]
        for points, t in ((chain.points[:, -1], 0.0), (chain.points[:, 50], middle)):
            mean = (1 - t) * np.array([1.0, -0.5])
            np.testing.assert_allclose(points.mean(0), mean, atol=0.03)
            spread = np.sqrt((1 - t) ** 2 * 0.25 + t**2)
            np.testing.assert_allclose(points.std(0), spread, rtol=0.03)


def test_sde_without_noise_is_the_euler_method_on_the_flow() -> None:
    field, params, _ = pretrained()
    velocity = sampler.bind(field, params)
    noise = jax.random.normal(jax.random.key(3), (5, 2))
    expected = noise
    for i in range(10):
        expected = expected - 0.1 * velocity(expected, jnp.full(5, 1 - i / 10))
    np.testing.assert_allclose(sampler.solve(velocity, RING, noise), expected, atol=1e-4)


def test_ode_of_many_steps_is_the_flow() -> None:
    noise = jax.random.normal(jax.random.key(3), (3, 2))
    task = RING._replace(steps=2000)
    ends = jax.jit(lambda: sampler.solve(gaussian_velocity, task, noise))()
    for start, end in zip(np.asarray(noise), np.asarray(ends), strict=True):
        exact = solve_ivp(
            lambda t, x: np.asarray(gaussian_velocity(jnp.asarray(x), jnp.asarray(t))),
            (1, 0),
            start,
            rtol=1e-5,
        )
        np.testing.assert_allclose(end, exact.y[:, -1], atol=2e-3)


def test_schedule_is_that_of_flow_grpo() -> None:
    steps = sampler.schedule(RING)
    t = np.arange(10, 0, -1) / 10
    np.testing.assert_allclose(steps.time, t, rtol=1e-6)
    np.testing.assert_allclose(steps.sigma[1:], 0.7 * np.sqrt(t[1:] / (1 - t[1:])), rtol=1e-5)
    assert steps.sigma[0] == pytest.approx(0.7 / np.sqrt(0.1), rel=1e-5)
    shifted = sampler.schedule(RING._replace(shift=3.0))
    np.testing.assert_allclose(shifted.time, 3 * t / (1 + 2 * t), rtol=1e-6)
    assert shifted.dt.sum() == pytest.approx(1) and shifted.dt[-1] == pytest.approx(0.25)


# Ratios.


def test_log_ratio_of_a_step_is_that_of_two_gaussians() -> None:
    got = old_and_new_steps()
    rows, std = got["rows"], np.asarray(got["steps"].std, float)
    old, points = (np.asarray(x, float) for x in (rows.behavior_mean, rows.points))
    for step in (0, 4, 9):
        for chain in range(20):
            covariance = std[step] ** 2 * np.eye(2)
            here = points[chain, step + 1]
            exact = multivariate_normal(got["new_mean"][chain, step], covariance).logpdf(here)
            exact -= multivariate_normal(old[chain, step], covariance).logpdf(here)
            assert got["token"].log_ratio[chain, step] == pytest.approx(exact, abs=1e-5)


def test_stored_log_prob_is_the_density_of_the_steps_taken() -> None:
    got = old_and_new_steps()
    rows, std = got["rows"], np.asarray(got["steps"].std, float)
    z = (np.asarray(rows.points[:, 1:], float) - np.asarray(rows.behavior_mean, float)) / std[
        :, None
    ]
    exact = -0.5 * (z**2).sum(-1) - np.log(2 * np.pi * std**2)
    np.testing.assert_allclose(rows.behavior_log_prob, exact, atol=1e-5)
    # The noise of all steps is standard normal, whatever their standard deviation.
    np.testing.assert_allclose(z.std(axis=(0, 2)), 1, atol=0.02)


def test_mean_log_ratio_of_ppo_is_minus_the_kl_of_the_step() -> None:
    scores = old_and_new_steps()["token"]
    x, kl = np.asarray(scores.log_ratio, float), np.asarray(scores.kl, float)
    error = x.std(0) / np.sqrt(len(x))
    assert (np.abs(x.mean(0) + kl.mean(0)) < 4 * error).all()
    # Negative beyond chance in the later steps, and a hundred times as large there.
    assert (x.mean(0)[-4:] < -5 * error[-4:]).all()
    assert x.mean(0)[-1] < 100 * x.mean(0)[:4].mean()


def test_mean_log_ratio_of_grpo_guard_is_zero_at_every_step() -> None:
    x = np.asarray(old_and_new_steps()["ratio_norm"].log_ratio, float)
    error = x.std(0) / np.sqrt(len(x))
    # Ten steps: 3.5 standard errors are left by chance once in 200 seeds.
    assert (np.abs(x.mean(0)) < 3.5 * error).all()


def test_log_ratio_of_grpo_guard_is_the_shift_times_the_noise() -> None:
    got = old_and_new_steps()
    rows, std = got["rows"], np.asarray(got["steps"].std, float)[:, None]
    old = np.asarray(rows.behavior_mean, float)
    noise = (np.asarray(rows.points[:, 1:], float) - old) / std
    shift = got["new_mean"] - old
    np.testing.assert_allclose(
        got["ratio_norm"].log_ratio, (shift * noise).sum(-1), atol=2e-5, rtol=1e-4
    )


def test_loss_of_grpo_guard_has_the_gradient_of_its_formula() -> None:
    """One update's gradient against the formula written anew, clip included, at unequal steps."""
    task = QUICK_TASK._replace(shift=3.0)
    config = dataclasses.replace(SMALL, objective="ppo_clip", ratio_level="ratio_norm")
    domain = made(config, task)
    hparams = train.make_hparams(config, clip_eps=0.02, buffer_size=8)
    state = jax.jit(functools.partial(train.init, domain))(hparams)
    rows = domain.collect(state, hparams, jax.random.key(1)).rows
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
    moved = state.learner._replace(params=perturbed(state.learner.params, 0.2))
    batch = domain.batch(state, moved.params, rows, jnp.zeros(8), hparams)
    _, (metrics, _) = train.update(domain, state, moved, batch, hparams, 0, jnp.ones(()))

    def formula(params: Any) -> Any:
        total = 0.0
        for i in range(task.steps):
            t = domain.steps.time[i]
            dt = t - (domain.steps.time[i + 1] if i < task.steps - 1 else 0)
            level = 1 - (t if i else domain.steps.time[1])
            sigma = task.noise_level * np.sqrt(t / level)
            x, y = rows.points[:, i], rows.points[:, i + 1]
            v = domain.field.apply(params["policy"], x, jnp.full(len(x), t))
            mean = x - v * dt - sigma**2 / (2 * t) * (x + (1 - t) * v) * dt
            old, s = rows.behavior_mean[:, i], sigma * np.sqrt(dt)
            b = ((mean - old) ** 2).sum(-1) / (2 * s**2)
            log_ratio = (((y - old) ** 2).sum(-1) - ((y - mean) ** 2).sum(-1)) / (2 * s**2)
            r = jnp.exp((log_ratio + b) * s)
            a = rows.advantage
            total -= jnp.minimum(r * a, jnp.clip(r, 0.98, 1.02) * a).mean() / dt / task.steps
        return total

    loss, grads = jax.value_and_grad(formula)(moved.params)
    norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
    assert metrics["policy_loss"] == pytest.approx(float(loss), rel=1e-3, abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3)


# Tasks.


def test_diversity_figures_know_a_collapsed_set_of_points() -> None:
    upper = jnp.asarray(RING.centers[RING.rewarded], jnp.float32)
    assert tasks.modes_covered(RING, jnp.repeat(upper, 5, axis=0)) == 4
    assert tasks.modes_covered(RING, jnp.repeat(upper[:1], 20, axis=0)) == 1
    assert tasks.modes_covered(RING, -jnp.repeat(upper, 5, axis=0)) == 0
    assert tasks.pairwise_distance(jnp.repeat(upper[:1], 20, axis=0)) == 0
    assert tasks.pairwise_distance(jnp.array([[0.0, 0], [3, 4], [0, 0]])) == pytest.approx(10 / 3)
    np.testing.assert_allclose(tasks.reward(RING, upper), 1, atol=1e-6)
    assert tasks.reward(RING, upper[0] * (2.4 / 2)) == pytest.approx(np.exp(-0.5), abs=1e-5)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_samples_of_a_density_lie_near_its_modes(name: str) -> None:
    task = tasks.make(name)
    points = np.asarray(task.sample(jax.random.key(0), 4000))
    nearest = np.linalg.norm(points[:, None] - task.centers, axis=-1)
    assert (np.bincount(nearest.argmin(1), minlength=8) > 300).all()
    assert nearest.min(1).max() < 1


def test_the_proxy_pays_beside_the_modes_and_is_what_training_sees() -> None:
    task = tasks.make("flow/ring_proxy")
    modes = jnp.asarray(task.centers[task.rewarded])
    for place, proxy, gold in ((1.0, np.exp(-0.25 / 0.64), 1.0), (1.25, 1.0, np.exp(-0.25 / 0.32))):
        np.testing.assert_allclose(tasks.training_reward(task, place * modes), proxy, rtol=1e-5)
        np.testing.assert_allclose(tasks.reward(task, place * modes), gold, rtol=1e-5)
        np.testing.assert_allclose(tasks.training_reward(RING, place * modes), gold, rtol=1e-5)

    domain = made(task=task._replace(steps=3, pretrain_steps=1, pretrain_batch=4))
    hparams = HParams()
    state = jax.jit(functools.partial(train.init, domain))(hparams)
    made_of_it = jax.jit(domain.collect)(state, hparams, jax.random.key(0))
    seen = tasks.training_reward(task, made_of_it.rows.points[..., -1, :])
    assert made_of_it.counts["returns"] == pytest.approx(float(jnp.sum(seen)), rel=1e-5)


def test_a_setting_gives_a_task_steps_of_unequal_length() -> None:
    shifted = made(dataclasses.replace(SMALL, timestep_shift=3.0))
    for name, found in shifted.steps._asdict().items():
        expected = getattr(sampler.schedule(RING._replace(shift=3.0)), name)
        np.testing.assert_array_equal(found, expected, err_msg=name)
    assert shifted.steps.dt[0] < shifted.steps.dt[-1] / 5


# Training.


@pytest.mark.slow
def test_run_is_pure_and_does_not_depend_on_the_runs_beside_it() -> None:
    run = train.make_train(SMALL, QUICK_TASK)
    hparams, _ = train.grid(SMALL, seed=[0, 1], buffer_size=[8, 32], sigma=0.5)
    together, metrics = jax.jit(jax.vmap(run))(hparams)
    one = train.select(hparams, 2)
    alone, own = jax.jit(run)(one)
    for name, values in own.items():
        np.testing.assert_allclose(metrics[name][2], values, rtol=2e-3, atol=1e-4)
    for x, y in zip(
        jax.tree.leaves(train.select(together.learner, 2)),
        jax.tree.leaves(alone.learner),
        strict=True,
    ):
        np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-4)


def test_a_flow_takes_the_ratio_level_of_its_objective_unless_told_otherwise() -> None:
    gspo = dataclasses.replace(SMALL, objective="gspo")
    assert made(SMALL).ratio_level == "token"
    assert made(gspo).ratio_level == "sequence"
    assert made(dataclasses.replace(gspo, ratio_level="joint")).ratio_level == "joint"


def test_an_objective_that_reads_positions_gets_the_steps_of_a_chain() -> None:
    config = dataclasses.replace(SMALL, objective="ctpo")
    state, _ = first_iterations(config, 3, buffer_size=32, learning_rate=0.01)
    assert state.diverged_at == -1


def test_first_update_on_fresh_chains_has_log_ratio_zero() -> None:
    _, metrics = first_iterations(SMALL, 1, buffer_size=8, learning_rate=1e-9)
    assert metrics["log_ratio_abs_p95"] < 1e-3
    assert metrics["policy_age_max"] == 0


def test_min_age_holds_back_the_newest_chains() -> None:
    _, metrics = first_iterations(SMALL, 6, buffer_size=32, min_age=3, learning_rate=3e-3)
    assert metrics["policy_age"] == 3 and metrics["log_ratio_abs_p95"] > 1e-2


def first_iterations(config: Config, n: int, **settings: Any) -> tuple[Any, Any]:
    domain = train.make(config, QUICK_TASK)
    hparams = train.make_hparams(config, **settings)
    state = jax.jit(lambda: train.init(domain, hparams))()
    return jax.jit(lambda s: train.train_and_log(domain, s, hparams, 0, n))(state)


@pytest.mark.parametrize(
    ("objective", "level"),
    [
        ("m2po", "joint"),
        ("r2vpo", "token"),
        ("proximal_gipo", "ratio_norm"),
    ],
)
def test_objectives_of_every_kind_train_a_flow(objective: str, level: str) -> None:
    config = dataclasses.replace(SMALL, objective=objective, ratio_level=level)
    state, metrics = first_iterations(config, 3, buffer_size=16)
    assert state.diverged_at == -1
    assert np.isfinite(metrics["policy_loss"]) and metrics["grad_norm"] > 0
    # The chains of the first iteration are compared with a flow that has moved since.
    assert metrics["kl"] > 0 and metrics["log_ratio_abs_p95"] > 0


@pytest.mark.slow
def test_other_density_and_reward_of_ones_own() -> None:
    task = tasks.make("flow/moons")._replace(name="mine", steps=4, pretrain_steps=2)
    state, metrics = jax.jit(train.make_train(SMALL, task))(HParams(buffer_size=32))
    assert state.replay.points.shape == (4, 2, 4, 5, 2)
    assert metrics["eval_return"].shape == (3,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"env": "flow/square"}, "env: 'flow/square' is not valid; expected one of flow/ring"),
        (
            {"shared_torso": True},
            "shared_torso: True is not valid; expected left at False: flows do not use it",
        ),
        ({"advantage_mode": "vtrace"}, "advantage_mode"),
        ({"objective": "dppo_tv"}, "objective: 'dppo_tv' is not valid"),
        ({"eval_episodes": 1}, "eval_episodes: 1 is not valid; expected 0, or at least 2"),
    ],
)
def test_settings_that_a_flow_cannot_use_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        train.make(dataclasses.replace(SMALL, **settings))
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_ratio_norm_is_refused_where_there_is_no_flow() -> None:
    with pytest.raises(ConfigError, match=r"^ratio_level: 'ratio_norm' is not valid"):
        train.make(Config(ratio_level="ratio_norm"))


@pytest.mark.slow
def test_reward_rises_and_the_modes_stay() -> None:
    config = Config(
        env="flow/ring",
        objective="gipo",
        activation="silu",
        num_envs=64,
        rollout_length=1,
        batch_size=64,
        updates_per_iteration=4,
        total_steps=64 * 60,
        max_buffer_size=64,
        eval_episodes=512,
        num_logs=2,
    )
    hparams = train.make_hparams(config, buffer_size=64, learning_rate=6e-4)
    state, metrics = jax.jit(train.make_train(config))(hparams)
    assert metrics["eval_return_sampled"][-1] > 0.6
    assert metrics["modes_covered"][-1] >= 3
    assert state.diverged_at == -1
