"""Whole runs as one pure function: under vmap, map and shard_map, and as a sweep trains them."""

from functools import partial
from pathlib import Path
from typing import Any

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from jax.flatten_util import ravel_pytree

import gipo_jax
from gipo_jax import agents, sweep, train
from gipo_jax.config import Config, ConfigError, HParams
from gipo_jax.domains.flow import tasks as flow_tasks
from gipo_jax.domains.tokens import tasks as token_tasks

BLOCK = 16
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
SMALL: dict[str, Any] = {
    "num_envs": 4,
    "rollout_length": 4,
    "batch_size": BLOCK,
    "hidden_sizes": (8,),
    "eval_episodes": 0,
    "total_steps": BLOCK * 1000,
    "num_logs": 1,
}


def same_bits(a: Any, b: Any) -> bool:
    """Whether two trees are the same to the bit; NaN equals NaN."""

    def plain(x: Any) -> np.ndarray:
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(
        np.array_equal(plain(x), plain(y), equal_nan=plain(x).dtype.kind == "f") for x, y in pairs
    )


WHOLE: dict[str, Any] = SMALL | {"total_steps": BLOCK * 6, "num_logs": 4, "batch_size": 3 * BLOCK}


def whole_config(toy: Any) -> Config:
    return Config(env=toy(pay=1.0, clock=True), max_buffer_size=4 * BLOCK, **WHOLE)


def compiled(function: Any) -> Any:
    return jax.jit(function, compiler_options=QUICK)


NAMES = [*gymnax.registered_envs, *token_tasks.TASKS, *flow_tasks.TASKS]
WITHOUT_DATA = {"MNISTBandit-bsuite"}  # downloads its images


@pytest.mark.parametrize("name", sorted({*NAMES} - WITHOUT_DATA))
def test_default_settings_of_every_environment_make_a_program(name: str) -> None:
    """Also where the training function itself is made inside a trace."""
    config = Config(env=name)
    shapes = jax.eval_shape(lambda h: train.make_train(config)(h), train.make_hparams(config))
    assert shapes[1]["eval_return_sampled"].shape == (config.num_logs,)


def test_make_train_logs_points_and_waits_for_a_full_batch(toy: Any) -> None:
    """The first update comes with the third rollout, at which replay holds a batch."""
    config = whole_config(toy)
    state, metrics = compiled(train.make_train(config))(HParams(buffer_size=3 * BLOCK))
    assert train.log_boundaries(config) == [1, 3, 4, 6]
    assert all(x.shape == (4,) for x in metrics.values())
    assert np.array_equal(metrics["policy_age_max"], [0, 2, 2, 2])
    assert state.replay.advantage.shape == (4, 4, 4)
    # Means over the iterations that updated, of which the first point has none.
    for name in ("entropy", "value_loss", "grad_norm"):
        assert list(np.isnan(metrics[name])) == [True, False, False, False]
    np.testing.assert_allclose(metrics["entropy"][1:], np.log(2), rtol=0.01)


@pytest.mark.slow
def test_make_train_under_vmap_equals_single_runs_with_one_compilation(toy: Any) -> None:
    config = whole_config(toy)
    hparams, rows = train.grid(
        config, seed=range(2), buffer_size=[3 * BLOCK, 4 * BLOCK], sigma=[0.5, 1.0],
        learning_rate=0.01,
    )  # fmt: skip
    assert len(rows) == 8
    assert rows[0] == {
        "seed": 0, "buffer_size": 3 * BLOCK, "sigma": 0.5, "learning_rate": 0.01
    }  # fmt: skip
    assert rows[1]["sigma"] == 1.0 and rows[2]["buffer_size"] == 4 * BLOCK
    traced = 0

    def counted(hparams: HParams) -> Any:
        nonlocal traced
        traced += 1
        return train.make_train(config)(hparams)

    every = compiled(jax.vmap(counted))
    state, metrics = every(hparams)
    every(jax.tree.map(lambda x: x[::-1], hparams))
    assert traced == 1
    assert all(x.shape == (8, 4) for x in metrics.values())
    one = compiled(train.make_train(config))
    for i in (0, 3, 6):
        alone, alone_metrics = one(train.select(hparams, i))
        for name, x in alone_metrics.items():
            np.testing.assert_allclose(metrics[name][i], x, rtol=1e-4, atol=1e-5, err_msg=name)
        for a, b in zip(
            jax.tree.leaves(train.select(state, i).learner.params),
            jax.tree.leaves(alone.learner.params),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, atol=1e-4)
    # Settings matter: no two rows end alike.
    ends = np.asarray(jax.vmap(lambda p: ravel_pytree(p)[0])(state.learner.params))
    assert len(np.unique(ends, axis=0)) == 8


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.long
def test_make_train_under_map_and_shard_map_gives_the_bits_of_single_runs(toy: Any) -> None:
    config = whole_config(toy)
    hparams, _ = train.grid(config, seed=range(2), sigma=[0.5, 1.0], buffer_size=4 * BLOCK)
    run = train.make_train(config)
    mesh = jax.make_mesh((1,), ("runs",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("runs")
    mapped = partial(jax.lax.map, run)
    shared = jax.shard_map(mapped, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    one, ways = jax.jit(run), [jax.jit(mapped)(hparams), jax.jit(shared)(hparams)]
    for i in range(4):
        alone = one(train.select(hparams, i))
        assert all(same_bits(train.select(way, i), alone) for way in ways)


@pytest.mark.slow
def test_default_hparams_train_without_being_completed(toy: Any) -> None:
    config = Config(env=toy(pay=1.0), **(WHOLE | {"batch_size": BLOCK}))
    run = compiled(train.make_train(config))
    _, metrics = run(HParams())
    _, complete = run(train.make_hparams(config))
    assert same_bits(metrics, complete)


@pytest.mark.parametrize(
    "misfit", [{"buffer_size": 8 * BLOCK}, {"buffer_size": 50}, {"min_age": 4}, {"min_age": 3}]
)
def test_traced_sizes_that_do_not_fit_give_nan_and_never_wrong_numbers(
    toy: Any, misfit: dict[str, int]
) -> None:
    config = whole_config(toy)
    settings: dict[str, Any] = {"buffer_size": 4 * BLOCK} | misfit
    _, metrics = compiled(train.make_train(config))(HParams(**settings))
    assert np.all(np.isnan(metrics["ess"])) and np.all(np.isnan(metrics["entropy"][1:]))
    with pytest.raises(ConfigError, match=next(iter(misfit))):
        train.grid(config, **settings)


def test_grid_refuses_what_no_run_could_use(toy: Any) -> None:
    config = whole_config(toy)
    for settings, message in (
        ({"buffer_size": 8 * BLOCK}, "max_buffer_size: 64 .*at least the buffer size 128"),
        ({"seed": []}, "seed: .*at least one value"),
        ({"sigmma": 1.0}, "sigmma: 1.0 .*sigma"),
        ({"buffer_size": 64, "sigma": [1.0, -1.0]}, "sigma: -1.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            train.grid(config, **settings)


@pytest.mark.slow
@pytest.mark.optimized
def test_sweep_and_make_train_give_the_same_bits(toy: Any, tmp_path: Path) -> None:
    """Metrics as stored, and final parameters, of every run."""
    env = toy(pay=1.0, clock=True)
    sizes = [3 * BLOCK, 4 * BLOCK]
    config = Config(env=env, max_buffer_size=4 * BLOCK, **WHOLE)
    runs = sweep.expand(env=env, buffer_size=sizes, seeds=2, **WHOLE)
    options = sweep.Options(quiet=True, batch_mode="map", devices=1)
    sweep.run(runs, tmp_path / "sweep", options)
    stored = pd.read_csv(tmp_path / "sweep" / "metrics.csv", dtype=np.float32)

    hparams, rows = train.grid(config, buffer_size=sizes, seed=range(2))
    state, metrics = jax.jit(partial(jax.lax.map, train.make_train(config)))(hparams)
    for i, row in enumerate(rows):
        swept = stored[stored.run == i]
        for name, x in metrics.items():
            np.testing.assert_array_equal(swept[name], x[i], err_msg=f"{name} of {row}")
        loaded = gipo_jax.load(tmp_path / "sweep", run=i, env=env)
        assert (loaded.hparams.buffer_size, loaded.hparams.seed) == tuple(row.values())
        assert same_bits(loaded.params, train.select(state, i).learner.params)


@pytest.mark.slow
def test_agent_of_a_vmapped_run_acts_and_evaluates_like_that_run(toy: Any) -> None:
    settings = {"total_steps": BLOCK * 100, "eval_episodes": 4, "normalize_obs": True}
    config = Config(
        env=toy(limit=6, clock=True, pay=1.0), max_buffer_size=4 * BLOCK,
        **(SMALL | settings),
    )  # fmt: skip
    hparams, _ = train.grid(config, seed=[0, 1], learning_rate=[1e-9, 0.03], buffer_size=4 * BLOCK)
    state, metrics = compiled(jax.vmap(train.make_train(config)))(hparams)
    for run in (1, 3):
        trained = agents.agent(config, hparams, state, run)
        assert trained.hparams.seed == run // 2
        obs = jnp.arange(6.0)[:, None]
        # The second action pays, so a trained agent takes it everywhere.
        assert np.array_equal(trained.policy(obs), np.ones(6))
        assert trained.policy(obs, jax.random.key(0)).shape == (6,)
        greedy, sampled = trained.evaluate(jax.random.key(1), 5)
        assert greedy == 6 == metrics["eval_return"][run, -1]
        assert 4 < sampled <= 6
    with pytest.raises(ConfigError, match=r"run: 4 .*0 to 3"):
        agents.agent(config, hparams, state, 4)
