"""Every gymnax environment behind the interface, and the two ways an episode ends."""

import sys
from pathlib import Path
from typing import Any

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments import spaces

from gipo_jax import cli, environments, networks, rollout
from gipo_jax.config import Config, ConfigError

# MNISTBandit downloads its data.
NAMES = [name for name in gymnax.registered_envs if name != "MNISTBandit-bsuite"]
# Compiling takes nearly all the time here, and half of that is optimisation.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
MINATAR = [name for name in NAMES if name.endswith("-MinAtar")]


def random_steps(env: environments.Environment, head: networks.ActionHead, length: int) -> Any:
    """Transitions of two environments under uniform actions."""
    envs = rollout.reset(env, jax.random.key(0), 2)
    outputs = jnp.zeros((2, head.num_tokens, head.output_width))
    return rollout.collect(env, head, lambda obs: outputs, envs, jax.random.key(1), length)


@pytest.mark.parametrize("name", NAMES)
def test_every_environment_fits_the_interface(name: str) -> None:
    config = Config(env=name)
    env = environments.make(config)
    head = networks.make_head(config, env)
    envs, transition, _, _ = jax.eval_shape(lambda: random_steps(env, head, 4))
    first = jax.eval_shape(lambda: rollout.reset(env, jax.random.key(0), 2))
    assert transition.obs.shape == transition.final_obs.shape == (4, 2, *env.obs_shape)
    assert transition.obs.dtype == transition.final_obs.dtype == env.obs_dtype
    assert transition.reward.shape == (4, 2) and transition.reward.dtype == jnp.float32
    assert transition.terminated.dtype == transition.truncated.dtype == jnp.bool_
    # A state that changed its type, or is weakly typed, would compile a second time.
    like = [(x.shape, x.dtype) for x in jax.tree.leaves(first)]
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(envs)] == like
    assert not any(getattr(x, "weak_type", False) for x in jax.tree.leaves((first, envs)))
    assert env.max_episode_steps >= 1
    assert (env.num_actions is None) == (env.action_low is not None)


# One for each kind of observation and action.
@pytest.mark.parametrize(
    "name", ["Pendulum-v1", "Swimmer-misc", "FrozenLake-misc", "FourRooms-misc", "Catch-bsuite"]
)
def test_environments_step(name: str) -> None:
    config = Config(env=name)
    env = environments.make(config)
    head = networks.make_head(config, env)
    _, transition, _, _ = jax.jit(lambda: random_steps(env, head, 4), compiler_options=QUICK)()
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(transition))
    assert not np.any(transition.terminated & transition.truncated)


@pytest.mark.parametrize("name", MINATAR)
def test_minatar_observations_are_zeros_and_ones(name: str) -> None:
    """So a byte in replay loses nothing."""
    env, params = gymnax.make(name)
    assert environments.make(Config(env=name)).obs_dtype == np.bool_

    def step(carry: Any, key: jax.Array) -> Any:
        obs, state = carry
        action = env.action_space(params).sample(key)
        obs, state, *_ = env.step(key, state, action, params)
        return (obs, state), jnp.all((obs == 0) | (obs == 1)) & jnp.any(obs == 1)

    def run(key: jax.Array) -> jax.Array:
        started = env.reset(key, params)
        return jax.lax.scan(step, started, jax.random.split(key, 400))[1]

    assert np.all(jax.jit(run, compiler_options=QUICK)(jax.random.key(0)))


def test_floats_of_an_environment_of_ones_own_stay_whatever_its_name(
    toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy, "name", "Own-MinAtar")
    env = environments.make(Config(env=toy(limit=3, clock=True)))
    assert env.obs_dtype == np.float32
    assert [float(s.final_obs[0]) for s in run_out(env, 3)] == [1, 2, 3]


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.bool_])
def test_bytes_of_a_space_stay_bytes(dtype: Any, toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    space = spaces.Box(0, 255, (1,), dtype)
    monkeypatch.setattr(toy, "observation_space", lambda self, params: space)
    monkeypatch.setattr(toy, "_observe", lambda self, time: jnp.ones(1, dtype))
    env = environments.make(Config(env=toy()))
    assert env.obs_dtype == env.reset(jax.random.key(0), 2)[0].dtype == dtype


def run_out(env: environments.Environment, steps: int) -> list[environments.Step]:
    one = environments.single(env)
    _, state = one.reset(jax.random.key(0))
    taken = []
    for i in range(steps):
        taken.append(one.step(jax.random.key(i), state, jnp.int32(i % 2)))
        state = taken[-1].state
    return taken


def flags(steps: list[environments.Step]) -> list[tuple[bool, bool]]:
    return [(bool(s.terminated), bool(s.truncated)) for s in steps]


NEITHER, TERMINATED, TRUNCATED = (False, False), (True, False), (False, True)


def test_termination_and_time_limit_are_apart(toy: Any) -> None:
    endless, ending = toy(limit=3), toy(limit=30, ends_at=3)
    assert flags(run_out(environments.make(Config(env=endless)), 4)) == [
        NEITHER, NEITHER, TRUNCATED, NEITHER,
    ]  # fmt: skip
    assert flags(run_out(environments.make(Config(env=ending)), 4)) == [
        NEITHER, NEITHER, TERMINATED, NEITHER,
    ]  # fmt: skip


def test_termination_wins_when_a_step_does_both(toy: Any) -> None:
    env = environments.make(Config(env=toy(limit=2, ends_at=2)))
    assert flags(run_out(env, 2)) == [NEITHER, TERMINATED]


def test_the_time_limit_may_be_set(toy: Any) -> None:
    env = environments.make(Config(env=toy(limit=30), max_episode_steps=2))
    assert env.max_episode_steps == 2
    assert flags(run_out(env, 3)) == [NEITHER, TRUNCATED, NEITHER]
    assert environments.make(Config(env="CartPole-v1")).max_episode_steps == 500


def test_the_time_limit_may_be_set_where_gymnax_keeps_it_as_a_float() -> None:
    env = environments.make(Config(env="BernoulliBandit-misc", max_episode_steps=2))
    assert flags(run_out(env, 3)) == [NEITHER, TRUNCATED, NEITHER]


@pytest.mark.parametrize("ends_at", [None, 3])
def test_final_obs_precedes_the_reset(toy: Any, ends_at: int | None) -> None:
    steps = run_out(environments.make(Config(env=toy(limit=3, ends_at=ends_at, clock=True))), 4)
    assert [float(s.final_obs[0]) for s in steps] == [1, 2, 3, 1]
    assert [float(s.obs[0]) for s in steps] == [1, 2, 0, 1]


def test_an_unknown_environment_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^env: 'CartPole-v9' .*CartPole-v1") as error:
        environments.make(Config(env="CartPole-v9"))
    assert "\n" not in str(error.value)


def test_data_that_cannot_be_loaded_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> Any:
        raise OSError("no\nnetwork")

    monkeypatch.setattr(gymnax, "make", offline)
    with pytest.raises(ConfigError, match=r"^env: 'MNISTBandit-bsuite' .*no network") as error:
        environments.make(Config(env="MNISTBandit-bsuite"))
    assert "\n" not in str(error.value)


def test_spaces_that_no_network_reads_are_refused(
    toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = spaces.Tuple([spaces.Discrete(2), spaces.Discrete(2)])
    with pytest.raises(ConfigError, match=r"env: 'Toy' .*Discrete or Box actions, not "):
        environments.make(Config(env=toy(actions=pair)))
    monkeypatch.setattr(toy, "observation_space", lambda self, params: pair)
    with pytest.raises(ConfigError, match=r"env: 'Toy' .*Box or Discrete observations, not "):
        environments.make(Config(env=toy()))


def test_discrete_observations_are_one_hot() -> None:
    env = environments.make(Config(env="FrozenLake-misc"))
    obs, _ = env.reset(jax.random.key(0), 3)
    assert obs.shape == (3, 16) and np.all(obs.sum(-1) == 1) and obs.dtype == jnp.float32


def test_a_single_environment_steps_as_one_of_a_batch() -> None:
    env = environments.make(Config(env="Pendulum-v1"))
    one = environments.single(env)
    keys = jax.random.split(jax.random.key(0), 2)
    obs, state = one.reset(keys[0])
    batch_obs, batch_state = env.reset(keys[0], 1)
    assert np.array_equal(obs, batch_obs[0])
    action = jnp.array([0.5])
    stepped, batch = one.step(keys[1], state, action), env.step(keys[1:], batch_state, action[None])
    for single, batched in zip(jax.tree.leaves(stepped), jax.tree.leaves(batch), strict=True):
        assert np.array_equal(single, batched[0])


def test_old_names_of_opening_and_closing_warn_and_work(toy: Any) -> None:
    env = environments.make(Config(env=toy()))
    with pytest.warns(DeprecationWarning, match=r"open_pools\(env\) is now env.open\(\)"):
        assert environments.open_pools(env, jax.random.key(0)[None]) is env
    with pytest.warns(DeprecationWarning, match=r"close_pools\(env\) is now env.close\(\)"):
        environments.close_pools(env)
    assert env.resume_gap is None and env.for_evaluation() is env


def test_a_missing_envpool_is_named_with_how_to_install_it_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "envpool", None)
    out = tmp_path / "out"
    assert cli.main(["sweep", "--env", "HalfCheetah-v4", "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert "env: 'HalfCheetah-v4'" in message and 'pip install "gipo_jax[envpool]"' in message
    assert message.count("\n") == 1 and not out.exists()
