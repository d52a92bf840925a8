"""EnvPool inside the compiled step, against EnvPool's own NumPy interface."""

import ctypes.util
import dataclasses
import functools
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest

import gipo_jax
from gipo_jax import agents, cli, environments, learner, networks, rollout, sweep, train
from gipo_jax.config import Config, ConfigError
from gipo_jax.environments import envpool_env
from gipo_jax.sweep import checkpoint, plan
from scripts import metaworld_frames
from tests import programs

envpool = pytest.importorskip("envpool", reason=f"EnvPool is missing: {envpool_env.EXTRA}")

KEY = jax.random.key(7)
BUTTON = "MetaWorld/ButtonPress-v3"
Open = Callable[..., environments.Environment]


@pytest.fixture
def opened() -> Iterator[Open]:
    """Makes simulators, and ends them after the test."""
    made = []

    def open_env(config: Config, keys: jax.Array = KEY[None]) -> environments.Environment:
        made.append(environments.make(config).open(keys))
        return made[-1]

    yield open_env
    for env in made:
        env.close()


def actions(env: environments.Environment, steps: int, seed: int = 0) -> np.ndarray:
    """Random actions ``[steps, envs, *action_shape]``."""
    rng = np.random.default_rng(seed)
    if env.num_actions is not None:
        return rng.integers(env.num_actions, size=(steps, 3)).astype(np.int32)
    return rng.uniform(-1, 1, (steps, 3, *env.action_shape)).astype(np.float32)


def start(env: environments.Environment, envs: int = 3) -> tuple[jax.Array, Any]:
    return jax.jit(lambda: env.reset(KEY, envs))()


def step_all(env: environments.Environment, state: Any, taken: np.ndarray) -> tuple[Any, Any]:
    """Steps environments through ``taken``; the last state, and steps ``[steps, envs]``."""

    def step(state: Any, action: jax.Array) -> Any:
        stepped = env.step(KEY, state, action)
        return stepped.state, stepped._replace(state=None)

    return jax.jit(lambda state: jax.lax.scan(step, state, jnp.asarray(taken)))(state)


class Alone:
    """One environment by the NumPy interface, with the reset in the step after an episode."""

    def __init__(self, name: str, seed: int, options: dict[str, Any]) -> None:
        self.pool = envpool.make(name, env_type="gymnasium", num_envs=1, seed=[seed], **options)
        self.first = self._read(self.pool.reset()[0])
        self.reset_rewards: list[float] = []

    @staticmethod
    def _read(obs: Any) -> np.ndarray:
        if isinstance(obs, dict):
            return np.concatenate([obs[name][0].ravel() for name in sorted(obs)])
        return obs[0].transpose(1, 2, 0) if obs.ndim == 4 else obs[0]

    def step(self, action: np.ndarray) -> tuple[Any, ...]:
        """What an environment of ours should return: obs, reward, ends, final observation."""
        obs, reward, terminated, truncated, info = self.pool.step(action[None])
        self.solved = bool(info["success"][0] > 0) if "success" in info else False
        final = now = self._read(obs)
        if terminated[0] or truncated[0]:
            obs, reset_reward, *_ = self.pool.step(action[None])
            now = self._read(obs)
            self.reset_rewards.append(float(reset_reward[0]))
        return now, reward[0], terminated[0], truncated[0], final


# Meta-World runs out of time together; Hoppers fall one by one; DM Control observes a dict; Atari
# gives bytes and takes discrete actions.
@pytest.mark.parametrize(
    ("name", "steps", "options"),
    [
        (BUTTON, 510, {"partially_observable": False}),
        ("Hopper-v4", 150, {}),
        ("WalkerWalk-v1", 50, {}),
        ("Pong-v5", 30, {}),
        (
            "Breakout-v5:episodic_life=true,stack_num=2",
            100,
            {"episodic_life": True, "stack_num": 2},
        ),
    ],
)
def test_steps_inside_the_program_equal_those_of_the_numpy_interface(
    name: str, steps: int, options: dict[str, Any], opened: Open
) -> None:
    env = opened(Config(env=name, num_envs=3))
    taken = actions(env, steps)
    obs, state = start(env)
    _, ours = step_all(env, state, taken)
    ended = 0
    for i, seed in enumerate(np.asarray(state.seeds).tolist()):
        alone = Alone(name.partition(":")[0], seed, options)
        np.testing.assert_allclose(obs[i], alone.first, rtol=1e-6, atol=1e-6)
        theirs = [np.stack(x) for x in zip(*map(alone.step, taken[:, i]), strict=True)]
        for got, expected in zip((*ours[1:6],), theirs, strict=True):
            assert got[:, i].dtype in (np.float32, np.bool_, np.uint8)
            np.testing.assert_allclose(got[:, i], expected, rtol=1e-6, atol=1e-6)
        ended += len(alone.reset_rewards)
    assert ended > 0 or name in ("WalkerWalk-v1", "Pong-v5")


def test_a_game_that_goes_on_after_a_lost_life_says_that_resuming_is_not_exact() -> None:
    env = environments.make(Config(env="Breakout-v5:episodic_life=true"))
    gap = env.resume_gap
    assert gap is not None and "goes on with its game" in gap
    assert environments.make(Config(env="Breakout-v5")).resume_gap is None


def test_a_meta_world_episode_is_cut_by_time_and_its_last_observation_is_kept(
    opened: Open,
) -> None:
    env = opened(Config(env=BUTTON, num_envs=3))
    assert env.max_episode_steps == 500 and env.host and env.reports_success
    obs, state = start(env)
    state, steps = step_all(env, state, actions(env, 502))
    assert not steps.terminated.any()
    assert np.array_equal(np.argwhere(steps.truncated.all(-1)).ravel(), [499])
    assert np.array_equal(steps.truncated.any(-1), steps.truncated.all(-1))
    # The bootstrap value is of where the episode ended; the next one starts from the same posture.
    assert np.abs(steps.final_obs[499] - steps.obs[499]).max(-1).min() > 0.05
    np.testing.assert_allclose(steps.obs[499, :, :3], obs[:, :3], atol=0.02)
    assert np.array_equal(steps.final_obs[498], steps.obs[498])
    assert np.array_equal(state.elapsed, [2, 2, 2]) and np.array_equal(state.resets, [2, 2, 2])


def test_the_reward_of_a_reset_is_not_seen(opened: Open) -> None:
    """EnvPool gives one, and it is not zero."""
    env = opened(Config(env=BUTTON, num_envs=3))
    taken = actions(env, 501)
    _, state = start(env)
    _, steps = step_all(env, state, taken)
    alone = Alone(BUTTON, int(state.seeds[0]), {"partially_observable": False})
    for action in taken[:, 0]:
        alone.step(action)
    assert alone.reset_rewards[0] != 0
    assert not np.isin(steps.reward[:, 0], np.asarray(alone.reset_rewards, np.float32)).any()


def test_the_goal_of_a_meta_world_task_is_observed(opened: Open) -> None:
    env = opened(Config(env=BUTTON, num_envs=3))
    obs, _ = start(env)
    goals = np.asarray(obs[:, -3:])
    assert np.all(np.abs(goals[:, 1]) > 0.1), "EnvPool hides the goal by default, as zeros"
    assert len(np.unique(goals, axis=0)) == 3, "each environment draws its own"


def test_images_are_bytes_with_channels_last(opened: Open) -> None:
    env = opened(Config(env="Pong-v5", num_envs=3))
    assert env.obs_shape == (84, 84, 4) and env.obs_dtype == np.uint8 and env.num_actions == 6
    obs, state = start(env)
    _, steps = step_all(env, state, actions(env, 4))
    assert obs.dtype == steps.obs.dtype == steps.final_obs.dtype == jnp.uint8
    assert obs.max() > 100


def test_an_actions_scale_reaches_the_simulator(opened: Open) -> None:
    """HalfCheetah takes doubles and charges 0.1 times their squared sum."""
    config = Config(env="HalfCheetah-v4", num_envs=3, action_head="gaussian")
    env = opened(config)
    head = networks.make_head(config, env)
    _, state = start(env)
    full = head.to_env(jnp.full((3, 6), 0.5))
    _, steps = step_all(env, state, np.asarray(full)[None])
    still = opened(config)
    _, state = start(still)
    _, rest = step_all(still, state, np.zeros((1, 3, 6), np.float32))
    assert np.asarray(full).max() == 0.5
    assert np.all(np.abs(steps.reward - rest.reward) > 0.01)


def collector(env: environments.Environment, length: int) -> Callable[[Any, jax.Array], Any]:
    """Acts by a policy that reads the observation; the environments after, and the steps."""
    head = networks.make_head(Config(env=env.name, num_bins=5), env)

    def policy(obs: jax.Array) -> jax.Array:
        flat = obs.reshape(len(obs), -1)[:, :5].astype(jnp.float32)
        logits = jnp.resize(flat, (len(obs), head.num_tokens, head.output_width))
        return jnp.sin(3 * logits)

    collect = functools.partial(rollout.collect, env, head, policy, length=length)
    return jax.jit(lambda envs, key: collect(envs, key)[:2])


def restored(
    env: environments.Environment, envs: rollout.EnvStates
) -> tuple[rollout.EnvStates, int]:
    """One run's environments put into newly opened pools, as from a checkpoint."""
    stored = jax.tree.map(lambda x: np.asarray(x)[None], envs)
    state, begun = rollout.restore(env, stored)
    return jax.tree.map(lambda x: jnp.asarray(x[0]), state), begun


# Meta-World at the end of an episode and within one, and one of each family that can be replayed.
@pytest.mark.parametrize(
    ("name", "length"),
    [("Hopper-v4", 90), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("MetaWorld/BoxClose-v3", 500), (BUTTON, 330), ("HopperHop-v1", 70), ("Breakout-v5", 40)
    ))],
)  # fmt: skip
def test_restored_environments_continue_bit_identically(
    name: str, length: int, opened: Open
) -> None:
    config = Config(env=name, num_envs=2)
    env = opened(config)
    assert env.resume_gap is None
    envs, collect = jax.jit(lambda: rollout.reset(env, KEY, 2))(), collector(env, length)
    for i in range(2):
        envs, _ = collect(envs, jax.random.key(i))
    expected = collect(envs, jax.random.key(2))

    again = opened(config)
    state, begun = restored(again, envs)
    assert begun == 0
    found = collector(again, length)(state, jax.random.key(2))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert np.array_equal(a, b)


def test_an_environment_that_cannot_be_restored_says_so_and_begins_a_new_episode(
    opened: Open,
) -> None:
    config = Config(env="LunarLander-v3", num_envs=2)
    env = opened(config)
    gap = env.resume_gap
    assert gap is not None and "LunarLander-v3" in gap and "\n" not in gap
    envs = jax.jit(lambda: rollout.reset(env, KEY, 2))()
    envs, _ = collector(env, 30)(envs, jax.random.key(0))
    assert np.all(envs.state.elapsed == 30)
    again = opened(config)
    state, begun = restored(again, envs)
    assert begun == 2
    assert np.all(state.state.elapsed == 0) and np.all(state.episode_return == 0)
    _, steps = collector(again, 5)(state, jax.random.key(1))
    assert np.all(np.isfinite(steps.obs)) and np.array_equal(steps.obs[0], state.obs)


def test_successful_episodes_are_counted(toy: Any) -> None:
    """Solved at some step of the episode is solved, and the next episode starts unsolved."""
    config = Config(env=toy(limit=4, clock=True), num_envs=2)
    plain = environments.make(config)

    def step(keys: Any, state: Any, action: Any) -> environments.Step:
        # In the third step of an episode, for the first environment alone.
        stepped = plain.step(keys, state, action)
        return stepped._replace(success=(stepped.final_obs[:, 0] == 3) & jnp.array([True, False]))

    env = dataclasses.replace(plain, step=step, reports_success=True)
    head = networks.make_head(config, env)
    outputs = jnp.zeros((2, 1, 2))
    envs = rollout.reset(env, KEY, 2)
    totals = []
    for length, solved, successes in [
        (3, [1, 0], [0, 0]),
        (1, [0, 0], [1, 0]),
        (8, [0, 0], [3, 0]),
    ]:
        envs, *_ = rollout.collect(env, head, lambda obs: outputs, envs, KEY, length)
        assert envs.successes is not None
        assert np.array_equal(envs.successes.solved, np.array(solved, bool))
        assert np.array_equal(envs.successes.episodes, successes)
        totals.append(rollout.solved_episodes(envs))
    assert totals == [0, 1, 3]


def on_two_devices(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in a process of two devices, which must succeed."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    done = programs.run("-c", script, *arguments, XLA_FLAGS=flags)
    assert done.returncode == 0, done.stderr
    return done


SWEPT = """
import dataclasses, sys
import pandas as pd
from gipo_jax import cli, sweep

runs = sweep.expand(
    env="Hopper-v4", num_envs=2, rollout_length=30, batch_size=30, total_steps=60, num_logs=1,
    buffer_size=120, hidden_sizes=(4,), seeds=5, eval_episodes=2,
)
sweep.run(runs, sys.argv[1] + "/all", sweep.Options(devices=2, batch_mode="loop"))
sweep.run(runs[3:], sys.argv[1] + "/last", sweep.Options(devices=1, batch_mode="loop", quiet=True))
tables = [pd.read_csv(f"{sys.argv[1]}/{name}/metrics.csv") for name in ("all", "last")]
tables[0].run -= 3
tables = [table[table.run >= 0].set_index("run").sort_index() for table in tables]
pd.testing.assert_frame_equal(*tables, check_exact=True)
"""


@pytest.mark.slow
@pytest.mark.long
def test_parts_of_a_loop_on_two_devices_find_their_own_simulators(tmp_path: Path) -> None:
    done = on_two_devices(SWEPT, str(tmp_path))
    assert done.stderr.count(": compiled in") == 1


SHARDED = """
import jax, numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec as P
from gipo_jax import cli, environments, networks, rollout, sweep, train
from gipo_jax.config import Config

config = Config(env="Hopper-v4", num_envs=2)
closed = environments.make(config)
head = networks.make_head(config, closed)
keys = jax.random.split(jax.random.key(5), 4)
outputs = np.zeros((2, head.num_tokens, head.output_width), np.float32)

def run(env, key):
    envs = rollout.reset(env, key, 2)
    return rollout.collect(env, head, lambda obs: outputs, envs, key, 60)[1].final_obs

shared = closed.open(keys, devices=2)
mesh = Mesh(np.asarray(jax.devices()), ("runs",), axis_types=(AxisType.Auto,))
some = lambda keys: jax.lax.map(lambda key: run(shared, key), keys)
side_by_side = jax.jit(jax.shard_map(
    some, mesh=mesh, in_specs=P("runs"), out_specs=P("runs"), check_vma=False))(keys)
for key, found in zip(keys, side_by_side):
    alone = closed.open(key[None])
    assert np.array_equal(jax.jit(lambda: run(alone, key))(), found)
print(len(jax.devices()), "devices")
"""


@pytest.mark.slow
def test_runs_on_two_devices_equal_each_run_alone() -> None:
    done = on_two_devices(SHARDED)
    assert done.stdout == "2 devices\n"


def test_a_run_starts_once_in_its_pool(opened: Open) -> None:
    env = opened(Config(env="Hopper-v4", num_envs=1))
    env.reset(KEY, 1)
    with pytest.raises(Exception, match="PoolError: no environment of Hopper-v4 is left"):
        env.reset(KEY, 1)
    with pytest.raises(ConfigError, match="num_envs: 2 is not valid; expected 1"):
        env.reset(KEY, 2)


def test_vmap_over_runs_is_refused_in_one_line(opened: Open) -> None:
    env = opened(Config(env="Hopper-v4", num_envs=1), jax.random.split(KEY, 2))

    def run(key: jax.Array) -> jax.Array:
        _, state = env.reset(key, 1)
        return env.step(key, state, jnp.zeros((1, 3))).obs

    with pytest.raises(ConfigError, match=r"^env: 'Hopper-v4' .* needs lax.map") as error:
        jax.eval_shape(jax.vmap(run), jax.random.split(KEY, 2))
    assert "\n" not in str(error.value)
    assert jax.jit(lambda keys: jax.lax.map(run, keys))(jax.random.split(KEY, 2)).shape == (
        2,
        1,
        11,
    )


def test_devices_that_would_share_a_pool_are_refused_in_one_line(opened: Open) -> None:
    closed = environments.make(Config(env="Hopper-v4", num_envs=1))
    keys = jax.random.split(KEY, 3)
    with pytest.raises(
        ConfigError, match=r"^devices: 2 is not valid; .* number of runs, 3: [^\n]*$"
    ):
        closed.open(keys, devices=2)

    env = opened(Config(env="Hopper-v4", num_envs=1))
    mesh = jax.sharding.AbstractMesh((2,), ("runs",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("runs")
    start = jax.shard_map(
        lambda keys: env.reset(keys[0], 1)[0], mesh=mesh, in_specs=spec, out_specs=spec
    )
    with pytest.raises(ConfigError, match=r"^devices: 2 is not valid; expected 1, ") as error:
        jax.eval_shape(start, keys[:2])
    assert "\n" not in str(error.value)


def test_closed_pools_have_shapes_and_cannot_run() -> None:
    env = environments.make(Config(env=BUTTON, num_envs=2))
    obs, state = jax.eval_shape(lambda: env.reset(KEY, 2))
    action = jnp.zeros((2, 4))
    stepped = jax.eval_shape(lambda state: env.step(KEY, state, action), state)
    assert obs.shape == stepped.obs.shape == (2, 39)
    assert jax.tree.map(lambda x: x.shape, stepped.state) == jax.tree.map(lambda x: x.shape, state)
    with pytest.raises(Exception, match="PoolError: MetaWorld/ButtonPress-v3 has no pools"):
        env.reset(KEY, 2)


def threads() -> int:
    """Threads of this process, those of simulators included."""
    return len(list(Path("/proc/self/task").iterdir()))


# Hoppers fall one by one; DM Control observes a dict; Meta-World says when a task is solved; Atari
# gives bytes, and its time limit comes before the end of the game.
@pytest.mark.parametrize(
    ("config", "options"),
    [
        (Config(env="Hopper-v4", num_bins=5), {}),
        (Config(env="WalkerWalk-v1", num_bins=5, max_episode_steps=20), {}),
        (
            Config(env="MetaWorld/Reach-v3", num_bins=5, max_episode_steps=60),
            {"partially_observable": False},
        ),
        (Config(env="Breakout-v5", max_episode_steps=30), {}),
    ],
)
def test_evaluation_equals_episodes_of_the_numpy_interface(
    config: Config, options: dict[str, Any]
) -> None:
    closed, episodes = environments.make(config), 3
    head = networks.make_head(config, closed)
    if config.max_episode_steps is not None:
        options = options | {"max_episode_steps": config.max_episode_steps}

    def policy(obs: jax.Array) -> jax.Array:
        flat = obs.reshape(len(obs), -1)[:, :7].astype(jnp.float32)
        return jnp.sin(3 * jnp.resize(flat, (len(obs), head.num_tokens, head.output_width)))

    evaluate = functools.partial(rollout.evaluate, closed, head, policy, episodes=episodes)
    before = threads()
    made = jax.jit(evaluate)(KEY)
    assert threads() <= before + 2, "simulators end with their episodes"

    # Each simulator alone, and actions drawn from the same random numbers.
    key_reset, key_steps = jax.random.split(KEY)
    seeds = np.asarray(jax.random.randint(key_reset, (2 * episodes,), 0, 2**31 - 1, jnp.int32))
    alone = [Alone(config.env, seed, options) for seed in seeds.tolist()]
    obs = np.stack([one.first for one in alone])
    returns, lengths = np.zeros(2 * episodes), np.zeros(2 * episodes, int)
    solved, running = np.zeros(2 * episodes, bool), np.ones(2 * episodes, bool)
    for time in range(closed.max_episode_steps):
        outputs = policy(jnp.asarray(obs))
        key_noise, _ = jax.random.split(jax.random.fold_in(key_steps, time))
        drawn = head.sample(outputs, head.noise(key_noise, (2 * episodes,)))
        action = np.where(np.arange(6)[:, None] < episodes, head.mode(outputs), drawn)
        taken = np.asarray(head.to_env(jnp.asarray(action)))
        for i in np.flatnonzero(running):
            _, reward, terminated, truncated, obs[i] = alone[i].step(taken[i])
            returns[i] += reward
            lengths[i] += 1
            solved[i] |= alone[i].solved
            running[i] = not (terminated or truncated)
        if not running.any():
            break
    greedy, sampled = slice(0, episodes), slice(episodes, None)
    np.testing.assert_allclose(made.greedy, returns[greedy].mean(), rtol=1e-5)
    np.testing.assert_allclose(made.sampled, returns[sampled].mean(), rtol=1e-5)
    if closed.reports_success:
        assert made.solved_greedy == np.float32(solved[greedy].mean())
        assert made.solved_sampled == np.float32(solved[sampled].mean())
    else:
        assert made.solved_greedy is None and made.solved_sampled is None
    assert config.env != "Hopper-v4" or len(set(lengths)) > 2, "episodes of several lengths"


# LunarLander cannot be put back into mid-episode; its evaluation is exact all the same.
@pytest.mark.parametrize("name", ["LunarLander-v3", "Hopper-v4"])
def test_an_evaluation_follows_from_its_key_alone(name: str) -> None:
    config = Config(env=name)
    env = environments.make(config)
    head = networks.make_head(config, env)

    def policy(obs: jax.Array) -> jax.Array:
        return jnp.sin(jnp.resize(obs, (len(obs), head.num_tokens, head.output_width)))

    evaluate = jax.jit(functools.partial(rollout.evaluate, env, head, policy, episodes=2))
    first, other, again = (evaluate(key)[:2] for key in (KEY, jax.random.key(8), KEY))
    assert first == again and first != other


def test_an_evaluation_under_vmap_is_refused_in_one_line() -> None:
    env = environments.make(Config(env="Hopper-v4")).for_evaluation()
    with pytest.raises(ConfigError, match=r"^env: 'Hopper-v4' .* needs lax.map"):
        jax.eval_shape(jax.vmap(lambda key: env.reset(key, 1)), jax.random.split(KEY, 2))


def test_programs_with_simulators_stay_out_of_the_compilation_cache(
    opened: Open, tmp_path: Path
) -> None:
    env = opened(Config(env="Hopper-v4", num_envs=1))
    _, state = start(env, 1)

    def compile() -> None:
        step = jax.jit(lambda state: env.step(KEY, state, jnp.zeros((1, 3))))
        step.lower(state).compile()

    from jax.experimental.compilation_cache import compilation_cache

    before = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        compilation_cache.reset_cache()
        with environments.uncached():
            compile()
        assert not list(tmp_path.iterdir())
        compile()
        assert list(tmp_path.iterdir())
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("MetaWorld/ButonPress-v3", "such as MetaWorld/ButtonPress-v3"),
        ("Chess-v1", "one player"),
        ("Breakout-v5:lives=3", "episodic_life=false, reward_clip=false"),
        ("Breakout-v5:episodic_life=yes", "Breakout-v5:NAME=VALUE,..."),
        ("Breakout-v5:stack_num=2.5", "stack_num=4"),
        ("Breakout-v5:seed=1", "Breakout-v5:NAME=VALUE,..."),
        ("BabyAI-UnlockPickup-v0", "Box or Discrete observations, or a Dict of Box ones"),
    ],
)
def test_environments_that_cannot_be_used_are_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^env: '{name}' is not valid") as error:
        environments.make(Config(env=name))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_accelerators_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ConfigError, match=r"^env: .* on an accelerator"):
        environments.make(Config(env=BUTTON))


def test_a_name_that_both_libraries_have_is_gymnaxs() -> None:
    assert "CartPole-v1" in (envpool_env.names() or [])
    assert not environments.make(Config(env="CartPole-v1")).host


SMALL = Config(
    env="Hopper-v4", num_envs=2, rollout_length=50, batch_size=50, total_steps=400, num_logs=2,
    max_buffer_size=200,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.optimized
def test_a_run_in_a_simulator_trains_inside_one_program() -> None:
    env = train.open_env(SMALL, [3, 4])
    runs, _ = train.grid(SMALL, seed=[3, 4], buffer_size=200)
    _, both = jax.jit(lambda runs: jax.lax.map(train.make_train(SMALL, env), runs))(runs)
    env.close()
    assert np.all(both["episodes"] > 0) and "eval_return" not in both
    env = train.open_env(SMALL, [4])
    _, alone = jax.jit(train.make_train(SMALL, env))(train.select(runs, 1))
    env.close()
    for name, values in alone.items():
        np.testing.assert_array_equal(values, both[name][1], err_msg=name)


@pytest.mark.slow
@pytest.mark.optimized
def test_a_run_in_a_simulator_is_evaluated_on_fresh_episodes_that_do_not_disturb_it() -> None:
    evaluated = dataclasses.replace(SMALL, eval_episodes=2)
    runs, results = {}, {}
    for config in (SMALL, evaluated):
        env = train.open_env(config, [3])
        hparams = train.make_hparams(config, seed=3, buffer_size=200)
        runs[config], results[config] = jax.jit(train.make_train(config, env))(hparams)
        env.close()
    for name, values in results[SMALL].items():
        np.testing.assert_array_equal(values, results[evaluated][name], err_msg=name)
    measured = [results[evaluated][name] for name in ("eval_return", "eval_return_sampled")]
    assert {*results[evaluated]} - {*results[SMALL]} == {"eval_return", "eval_return_sampled"}
    assert len({float(x) for values in measured for x in values}) == 4, "fresh at each point"

    # The trained agent plays the last point's episodes again, without simulators made beforehand.
    state = runs[evaluated]
    last = evaluated.num_iterations - 1
    key = jax.random.fold_in(jax.random.fold_in(state.key, learner.LOG_STREAM), last)
    agent = agents.agent(evaluated, hparams, state)
    again = agent.evaluate(jax.random.split(key)[0], 2)
    np.testing.assert_allclose(again, [values[-1] for values in measured], rtol=1e-5)


def test_simulators_of_an_evaluation_count_in_the_memory_plan() -> None:
    hparams = train.make_hparams(SMALL, buffer_size=200)
    few, more = (
        plan.measure(train.make(dataclasses.replace(SMALL, eval_episodes=n)), hparams)
        for n in (0, 32)
    )
    assert more.work - few.work == 64 * plan.SIMULATOR_BYTES and more.state == few.state


@pytest.mark.slow
def test_the_success_rate_of_meta_world_is_reported() -> None:
    config = dataclasses.replace(
        SMALL, env=BUTTON, num_envs=1, rollout_length=500, batch_size=500, total_steps=1000,
        max_buffer_size=500, hidden_sizes=(4,), eval_episodes=1,
    )  # fmt: skip
    env = train.open_env(config, [0])
    hparams = train.make_hparams(config, buffer_size=500)
    _, metrics = jax.jit(train.make_train(config, env))(hparams)
    env.close()
    assert np.array_equal(metrics["episodes"], [1, 1])
    for name in ("success_rate", "eval_success", "eval_success_sampled"):
        assert np.all((metrics[name] == 0) | (metrics[name] == 1)), name


# ------------------------------------------------------------------ sweeps


class StopError(Exception):
    """Raised right after a checkpoint, as a kill would come."""


def swept() -> list[sweep.Run]:
    return sweep.expand(
        env="Hopper-v4", num_envs=2, rollout_length=30, batch_size=30, total_steps=300, num_logs=5,
        buffer_size=120, hidden_sizes=(4,), seeds=2, eval_episodes=2,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["loop", pytest.param("map", marks=pytest.mark.long)])
def test_a_sweep_in_simulators_resumes_in_mid_episode_to_the_same_bytes(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = sweep.Options(quiet=True, checkpoint_seconds=0, devices=1, batch_mode=mode)
    sweep.run(swept(), tmp_path / "whole", options)
    save, left = checkpoint.save, [3]

    def stop_after_three(*arguments: Any) -> Any:
        path = save(*arguments)
        left[0] -= 1
        if left[0] == 0:
            raise StopError
        return path

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", stop_after_three)
        with pytest.raises(StopError):
            sweep.run(swept(), tmp_path / "stopped", options)
    sweep.run(swept(), tmp_path / "stopped", options, resume=True)
    for table in ("runs.csv", "metrics.csv"):
        whole, resumed = ((tmp_path / x / table).read_bytes() for x in ("whole", "stopped"))
        assert whole == resumed, table
    assert b"eval_return_sampled" in whole and b"success" not in whole


@pytest.mark.slow
@pytest.mark.long
def test_runs_of_a_loop_share_a_program_and_a_narrow_limit_changes_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = sweep.Options(devices=1, batch_mode="loop")
    tables = []
    for most, compiled in ((4, 1), (1, 2)):
        monkeypatch.setattr(plan, "MOST_SIMULATORS", most)
        sweep.run(swept(), tmp_path / str(most), options)
        assert capsys.readouterr().err.count(": compiled in") == compiled
        tables.append((tmp_path / str(most) / "metrics.csv").read_bytes())
    assert len(set(tables)) == 1


@pytest.mark.slow
def test_an_episode_of_a_trained_policy_is_drawn(tmp_path: Path) -> None:
    for library in metaworld_frames.LIBRARIES:
        if ctypes.util.find_library(library.removeprefix("lib").removesuffix(".so.1")) is None:
            pytest.skip(f"{library} is missing")
    runs = sweep.expand(
        env="MetaWorld/Reach-v3:frame_skip=10", num_envs=1, rollout_length=40, batch_size=40,
        total_steps=40, max_episode_steps=40, buffer_size=40, hidden_sizes=(4,),
        action_head="gaussian",
    )  # fmt: skip
    sweep.run(runs, tmp_path / "sweep", sweep.Options(quiet=True, devices=1))
    out = tmp_path / "episode.png"
    # MuJoCo ends a process in which it cannot render.
    command = (metaworld_frames.__file__, tmp_path / "sweep", "--frames", "2", "--out", out)
    done = programs.run(*command)
    assert done.returncode == 0, done.stderr
    drawn = plt.imread(out)[..., :3]
    half = drawn.shape[1] // 2
    left, right = drawn[:, :half], drawn[:, -half:]
    # The arm has moved, under each picture's own title.
    assert left.std() > 0.1 and np.abs(left - right).mean() > 0.005


def test_drawing_an_episode_without_opengl_or_of_another_task_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def loaded(name: str) -> Any:
        return SimpleNamespace(env=SimpleNamespace(name=name))

    out = tmp_path / "episode.png"
    monkeypatch.setattr(gipo_jax, "load", lambda *_: loaded("Hopper-v4"))
    for libraries, word in (((), "Meta-World"), (("libnowhere.so.1",), "libnowhere.so.1")):
        monkeypatch.setattr(metaworld_frames, "LIBRARIES", libraries)
        assert metaworld_frames.main([str(tmp_path), "--out", str(out)]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and word in message and not out.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--env", "MetaWorld/ButtonPres-v3"], ["env", "MetaWorld/ButtonPress-v3"]),
        (["--env", BUTTON, "--batch-mode", "vmap"], ["batch_mode", "map or loop", BUTTON]),
        (["--env", BUTTON, "--batch-mode", "map", "--map-lanes", "2"], ["map_lanes: 2", BUTTON]),
        (["--env", BUTTON, "--protocol", "gipo-meta"], ["protocol", "gipo-metaworld"]),
        (["--env", BUTTON, "--ratio-level", "prefix_min"], ["ratio_level", "no order"]),
        (["--env", BUTTON, "--devices", "999"], ["devices: 999", "at most"]),
        (["--env", "Pong-v5", "--action-head", "gaussian"], ["action_head", "discrete actions"]),
    ],
)
def test_a_simulator_sweep_that_cannot_run_ends_in_one_line_with_nothing_written(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    sizes = ["--total-steps", "640", "--buffer-size", "512"]
    assert cli.main(["sweep", *arguments, *sizes, "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and not out.exists()
    assert all(word in message for word in words), message
