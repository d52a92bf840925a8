"""Environments of the user's own: accepted and right, or refused in one line."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gipo_jax
from gipo_jax import agents, cli, environments, networks, rollout, sweep, train
from gipo_jax.config import Config, ConfigError, HParams
from gipo_jax.sweep import grid, results
from tests.conftest import Toy

SMALL: dict[str, Any] = {
    "num_envs": 2, "rollout_length": 4, "batch_size": 8, "total_steps": 16, "num_logs": 2,
    "hidden_sizes": (4,), "eval_episodes": 2,
}  # fmt: skip


def refusal(make: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as error:
        make()
    assert "\n" not in str(error.value)
    return str(error.value)


def made(env: Any, **more: Any) -> environments.Environment:
    return environments.make(Config(env=env, **more))


# ------------------------------------------------------------------ plain functions


def begin(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    start = jax.random.randint(key, (), -1, 2).astype(jnp.float32)
    return start[None], start


def move(key: jax.Array, x: jax.Array, action: jax.Array) -> Any:
    x = x + 2 * action - 1
    return x[None], x, 10 * x, jnp.abs(x) > 2


WALK = environments.functional(
    begin, move, obs_shape=(1,), num_actions=2, max_episode_steps=5, name="walk"
)


def test_functions_become_an_environment_that_ends_truncates_and_resets() -> None:
    """Against the same walk in NumPy, which takes only the starts from the environment."""
    actions = np.random.default_rng(0).integers(0, 2, (60, 3))
    obs, state = WALK.reset(jax.random.key(0), 3)

    def step(state: Any, inputs: Any) -> Any:
        stepped = WALK.step(inputs[0], state, inputs[1])
        return stepped.state, stepped._replace(state=None)

    keys = jax.random.split(jax.random.key(1), (60, 3))
    _, steps = jax.jit(lambda s: jax.lax.scan(step, s, (keys, jnp.asarray(actions))))(state)
    x, elapsed = np.array(obs[:, 0]), np.zeros(3, int)
    seen = set()
    for t in range(60):
        x, elapsed = x + 2 * actions[t] - 1, elapsed + 1
        terminated = np.abs(x) > 2
        truncated = (elapsed == 5) & ~terminated
        np.testing.assert_array_equal(steps.final_obs[t, :, 0], x)
        np.testing.assert_array_equal(steps.reward[t], 10 * x)
        np.testing.assert_array_equal(steps.terminated[t], terminated)
        np.testing.assert_array_equal(steps.truncated[t], truncated)
        done = terminated | truncated
        np.testing.assert_array_equal(steps.obs[t, ~done, 0], x[~done])
        assert set(np.unique(steps.obs[t, done, 0])) <= {-1, 0, 1}
        seen |= set(zip(terminated.tolist(), truncated.tolist(), strict=True))
        x, elapsed = np.where(done, steps.obs[t, :, 0], x), np.where(done, 0, elapsed)
    assert seen == {(False, False), (True, False), (False, True)}


def test_it_is_what_config_takes_hashed_by_identity() -> None:
    config = Config(env=WALK, **SMALL)
    assert config == Config(env=WALK, **SMALL) and hash(config) == hash(Config(env=WALK, **SMALL))
    again = environments.functional(
        begin, move, obs_shape=(1,), num_actions=2, max_episode_steps=5, name="walk"
    )
    assert config != Config(env=again, **SMALL)
    assert environments.make(config) is WALK
    _, metrics = jax.jit(train.make_train(config))(HParams(buffer_size=16))
    assert np.all(np.isfinite(metrics["eval_return"]))


def test_a_limit_of_its_own_is_kept() -> None:
    text = refusal(lambda: made(WALK, max_episode_steps=3))
    assert text == (
        "max_episode_steps: 3 is not valid; expected None: walk keeps a limit of its own, 5"
    )


class Keyed(NamedTuple):
    key: jax.Array
    bytes: jax.Array


def test_states_may_hold_keys_and_actions_be_a_box_and_images_be_bytes() -> None:
    def reset(key: jax.Array) -> Any:
        image = jax.random.randint(key, (3, 3, 1), 0, 256).astype(jnp.uint8)
        return image, Keyed(key, image)

    def step(key: jax.Array, state: Keyed, action: jax.Array) -> Any:
        assert action.shape == (2,) and action.dtype == jnp.float32
        return state.bytes, state._replace(key=key), action.sum(), False

    env = environments.functional(
        reset, step, obs_shape=(3, 3, 1), low=[-1, 0], high=[1, 3], max_episode_steps=2,
        name="noise",
    )  # fmt: skip
    assert env.obs_dtype == np.uint8 and env.action_shape == (2,)
    head = networks.make_head(Config(), env)
    outputs = jnp.zeros((2, head.num_tokens, head.output_width))
    _, transition, _, _ = jax.jit(
        lambda: rollout.collect(
            env, head, lambda obs: outputs, rollout.reset(env, jax.random.key(0), 2),
            jax.random.key(1), 4,
        )
    )()  # fmt: skip
    assert transition.truncated[:, 0].tolist() == [False, True, False, True]
    assert not np.array_equal(transition.obs[1], transition.obs[2])


GOOD: dict[str, Any] = {"obs_shape": (1,), "num_actions": 2, "max_episode_steps": 5}


def functional(reset: Any = begin, step: Any = move, **changed: Any) -> environments.Environment:
    return environments.functional(reset, step, **GOOD | {"name": "w"} | changed)


def broken(key: jax.Array, x: jax.Array, action: jax.Array) -> Any:
    return undefined  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"obs_shape": (2,)}, r"w: obs of reset: 'float32\[1\]' .*float32\[2\]"),
        (
            {
                "reset": lambda key: (jnp.zeros(1, complex), 0),
                "step": lambda key, x, action: (jnp.zeros(1, complex), x, 1.0, True),
            },
            "obs: 'complex64' .*real numbers",
        ),
        ({"num_actions": None}, r"w: actions: .*num_actions, or low and high"),
        ({"low": [0.0], "high": [1.0]}, r"w: actions: "),
        ({"num_actions": None, "low": [1.0], "high": [0.0]}, r"w: low: .*less than high"),
        ({"num_actions": 2.5}, r"w: num_actions: 2.5 .*integer"),
        ({"max_episode_steps": 0}, r"w: max_episode_steps: 0 .*integer"),
        ({"step": lambda k, x, a: (x[None], x, 0.0)}, r"w: step: '3 values' .*4 values obs, state"),
        ({"step": lambda k, x, a: (x, x, 0.0, False)}, r"w: obs of step: 'float32\[\]'"),
        ({"step": lambda k, x, a: (x[None], a, 0.0, False)}, r"w: state of step: 'int32\[\]'"),
        ({"step": lambda k, x, a: (x[None], (x,), 0.0, False)}, r"w: state of step: "),
        ({"step": lambda k, x, a: (x[None], x, x[None], False)}, r"w: reward: 'float32\[1\]'"),
        ({"step": lambda k, x, a: (x[None], x, 0.0, 1.0)}, r"w: terminated: 'float32\[\]' .*bool"),
        ({"step": broken}, r"w: step: .*test_own.py:\d+, in broken: NameError"),
        ({"reset": lambda key: jnp.zeros(1)}, r"w: reset: .*2 values obs, state"),
    ],
)
def test_functions_that_break_their_word_are_refused(change: dict[str, Any], words: str) -> None:
    assert re.search(words, refusal(lambda: functional(**change)))


# ------------------------------------------------------------------ gymnax objects and classes


class ScaledObsOnly(Toy):
    def step(self, key: Any, state: Any, action: Any, params: Any = None) -> Any:
        obs, *rest = super().step(key, state, action, params)
        return obs / 255, *rest


class Endless(Toy):
    def is_truncated(self, state: Any, params: Any) -> Any:
        return jnp.bool_(False)


class RewardOfOne(Toy):
    def step_env(self, key: Any, state: Any, action: Any, params: Any) -> Any:
        obs, state, reward, terminated, info = super().step_env(key, state, action, params)
        return obs, state, reward[None], terminated, info


class WrongSpace(Toy):
    def observation_space(self, params: Any) -> Any:
        return gymnax.environments.spaces.Box(0, 1, (2,), jnp.float32)


class FloatsAsBytes(Toy):
    def observation_space(self, params: Any) -> Any:
        return gymnax.environments.spaces.Box(0, 255, (1,), jnp.uint8)


class OldStep(Toy):
    def step(self, key: Any, state: Any, action: Any, params: Any = None) -> Any:
        obs, state, reward, done, truncated, info = super().step(key, state, action, params)
        return obs, state, reward, done | truncated, info


class Raising(Toy):
    def step_env(self, key: Any, state: Any, action: Any, params: Any) -> Any:
        raise RuntimeError("no physics")


class StepEnvOnly:
    def step_env(self, *_: Any) -> Any: ...


class NeedsArgument(Toy):
    def __init__(self, size: int) -> None:
        super().__init__()


@pytest.mark.parametrize(
    ("env", "words"),
    [
        (ScaledObsOnly(), r"ScaledObsOnly: final_obs: .*same as obs in mid-episode"),
        (Endless(), r"Endless: terminated or truncated: .*max_episode_steps, 5"),
        (RewardOfOne(), r"RewardOfOne: reward: 'float32\[1\]' .*float32\[\]"),
        (WrongSpace(), r"WrongSpace: obs of reset: 'float32\[1\]' .*float32\[2\]"),
        (FloatsAsBytes(), r"FloatsAsBytes: type of obs: 'float32' .*uint8"),
        (OldStep(), r"OldStep: step: '5 values' .*the 6 values obs, state, reward, terminated"),
        (Raising(), r"Raising: 'RuntimeError' .*test_own.py:\d+, in step_env: .*no physics"),
        (StepEnvOnly(), r"env: 'StepEnvOnly' .*it has no reset, step, observation_space"),
        (StepEnvOnly, r"env: 'StepEnvOnly' .*it has no reset, step, observation_space"),
        (NeedsArgument, r"env: 'NeedsArgument' .*without arguments; .*missing 1 required"),
        ((begin, move), r"env: .*not tuple; environments.functional makes one"),
        (3, r"env: 3 .*not int"),
    ],
)  # fmt: skip
def test_objects_that_break_the_contract_are_refused(env: Any, words: str) -> None:
    assert re.search(words, refusal(lambda: made(env)))


@pytest.mark.parametrize("env", [Toy, lambda: Toy(), lambda: WALK])
def test_classes_and_functions_make_the_environment_once(env: Any) -> None:
    assert made(env).max_episode_steps == 5
    assert len(sweep.expand(env=env, **SMALL, buffer_size=16, seeds=2)) == 2


def test_the_check_works_where_the_training_function_is_made_in_a_trace() -> None:
    config = Config(env=Toy(limit=2), **SMALL)
    jax.eval_shape(jax.vmap(lambda h: train.make_train(config)(h)), train.grid(config, seed=[0])[0])
    bad = Config(env=ScaledObsOnly(), **SMALL)
    with pytest.raises(ConfigError, match="final_obs"):
        jax.eval_shape(lambda h: train.make_train(bad)(h), HParams())


def test_spaces_of_another_library_are_read() -> None:
    class Own(Toy):
        def observation_space(self, params: Any) -> Any:
            return gymnasium.spaces.Box(0, 9, (1,), np.float32)

    assert made(Own(actions=gymnasium.spaces.Discrete(3))).num_actions == 3
    text = refusal(lambda: made(Own(actions=gymnasium.spaces.Discrete(3, start=1))))
    assert "Discrete or Box actions, not Discrete(3, start=1)" in text


@pytest.mark.parametrize("shape", [(2, 5, 1), (1, 1, 3), (5, 2, 1)])
def test_images_too_small_for_a_convolution_are_seen(shape: tuple[int, ...]) -> None:
    head = networks.categorical(1, 2)
    network = networks.make(Config(), shape, head)
    params = network.init(jax.random.key(0))
    assert network.value(params, jnp.zeros(shape)) != network.value(params, jnp.ones(shape))


# ------------------------------------------------------------------ parameters


def fall(env: environments.Environment) -> np.ndarray:
    """Observations of a pendulum nobody holds."""
    one = environments.single(env)
    _, state = one.reset(jax.random.key(0))
    return np.asarray(one.step(jax.random.key(1), state, jnp.zeros(1)).obs)


def test_a_parameter_in_the_name_is_the_same_as_one_that_is_traced() -> None:
    plain, named = made("Pendulum-v1"), made("Pendulum-v1:g=2.5,m=2")
    env, params = gymnax.make("Pendulum-v1")
    params = params.replace(g=2.5, m=2.0)
    _, state = env.reset(jax.random.split(jax.random.key(0), 1)[0], params)
    wanted = env.step(jax.random.key(1), state, jnp.zeros(1), params)[0]
    np.testing.assert_array_equal(fall(named), wanted)
    traced = jax.jit(lambda g: fall_of(plain.with_params({"g": g, "m": 2})))(2.5)
    np.testing.assert_allclose(traced, wanted, rtol=1e-6)
    assert not np.array_equal(fall(plain), wanted)


def fall_of(env: environments.Environment) -> jax.Array:
    one = environments.single(env)
    _, state = one.reset(jax.random.key(0))
    return one.step(jax.random.key(1), state, jnp.zeros(1)).obs


@pytest.mark.parametrize(
    ("env", "params", "words"),
    [
        ("Pendulum-v1:h=2", {"g": 2}, r"env: 'Pendulum-v1:h=2' .*Pendulum-v1:NAME=VALUE,.*g=10.0"),
        ("Pendulum-v1", {"h": 2}, r"env_params: 'h' .*g=10.0"),
        ("Pendulum-v1", {"g": "low"}, r"env_params: .*finite numbers by name"),
        ("Pendulum-v1", {"max_torque": 1}, r"'max_torque' .*decide the spaces, .* the name"),
        ("CartPole-v1", {"max_steps_in_episode": 9}, r"env_params: 'max_steps_in_episode'"),
        (WALK, {"wind": 1}, r"env_params: .*none: walk takes no parameters"),
        ("tokens/reverse", {"g": 1}, r"env_params: .*token tasks do not use it"),
    ],
)  # fmt: skip
def test_parameters_an_environment_does_not_take_are_refused(
    env: Any, params: Any, words: str
) -> None:
    assert re.search(words, refusal(lambda: train.make_hparams(Config(env=env), env_params=params)))


def test_numeric_parameters_are_swept_in_one_program() -> None:
    runs = sweep.expand(
        env="Pendulum-v1", **SMALL, buffer_size=16, env_params={"g": [1.0, 10.0], "m": 2}
    )
    assert [run.hparams.env_params for run in runs] == [{"g": 1.0, "m": 2}, {"g": 10.0, "m": 2}]
    assert "env_params.g=1.0" in runs[0].name and runs[0].config == runs[1].config
    assert grid.decode(grid.encode(runs)) == runs
    stored, other = grid.encode(runs[:1]), grid.encode(runs[1:])
    assert grid.difference(stored, other) == ("env_params.g", 1.0, 10.0)
    config = Config(env="Pendulum-v1", **SMALL)
    hparams, rows = train.grid(config, buffer_size=16, env_params={"g": [1.0, 10.0]})
    assert [row["env_params"] for row in rows] == [{"g": 1.0}, {"g": 10.0}]
    state, _ = jax.jit(jax.vmap(train.make_train(config)))(hparams)
    envs = state.domain_state.envs
    # The starts are those of one seed; what they lead to is not.
    assert not np.array_equal(envs.obs[0], envs.obs[1])
    agent = agents.agent(config, hparams, state, run=0)
    np.testing.assert_allclose(fall(agent.env), fall(made("Pendulum-v1:g=1")), rtol=1e-6)


# ------------------------------------------------------------------ the command line

MY_ENV = """
import jax.numpy as jnp
from gipo_jax import environments
from gymnax.environments.classic_control.pendulum import Pendulum

WALK = environments.functional(
    lambda key: (jnp.zeros(1), jnp.float32(0)),
    lambda key, x, action: ((x + action)[None], x + action, action, x > 3),
    obs_shape=(1,), num_actions=2, max_episode_steps=5, name="walk",
)
def make():
    return WALK
class Mine(Pendulum):
    pass
NUMBER = 3
"""
OPTIONS = (
    "--num-envs 2 --rollout-length 4 --batch-size 8 --total-steps 32 --num-logs 2"
    " --eval-episodes 2 --hidden-sizes 4 --buffer-size 16 --out out --quiet"
)


@pytest.mark.slow
def test_an_environment_in_a_file_is_trained_resumed_and_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_env.py").write_text(MY_ENV)
    arguments = f"sweep --env my_env.py:WALK my_env.py:make {OPTIONS}"
    assert cli.main(arguments.split()) == 0
    table = results.read_runs("out")
    assert list(table["env"]) == ["my_env.py:WALK", "my_env.py:make"]
    assert list(table["status"]) == ["done", "done"]
    agent = gipo_jax.load("out", run=0)
    assert agent.env.name == "walk" and agent.policy(jnp.zeros(1)).shape == ()
    assert cli.main(["sweep", "--resume", "--out", "out"]) == 0
    Path("my_env.py").write_text(MY_ENV + "\n# another\n")
    capsys.readouterr()
    assert cli.main(["sweep", "--resume", "--out", "out"]) == 2
    assert "it has changed since" in capsys.readouterr().err


@pytest.mark.slow
def test_parameters_are_swept_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_env.py").write_text(MY_ENV)
    arguments = f"sweep --env my_env.py:Mine --env-arg g=1 10 {OPTIONS}"
    assert cli.main(arguments.split()) == 0
    table = results.read_runs("out")
    assert list(table["env_params.g"]) == [1, 10] and list(table["status"]) == ["done", "done"]


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ("my_env.py:NUMBER", "an environment or a task, not int"),
        ("my_env.py:NOTHING", "has no NOTHING"),
        ("other.py:WALK", "there is no file other.py"),
    ],
)
def test_a_file_without_the_environment_is_refused_in_one_line(
    env: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_env.py").write_text(MY_ENV)
    assert cli.main(["sweep", "--env", env, "--out", "out"]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1
    assert not Path("out").exists()


# ------------------------------------------------------------------ any object


@dataclasses.dataclass(frozen=True)
class Grammar:
    """An environment that counts its steps, and what it gets wrong."""

    obs_shape: tuple[int, ...]
    obs_dtype: str
    num_actions: int | None
    limit: int
    ends_at: int | None
    reward_shape: tuple[int, ...]
    flag: str
    state: str

    @property
    def right(self) -> bool:
        return (self.reward_shape, self.flag, self.state) == ((), "bool", "same")

    def make(self) -> environments.Environment:
        def observe(time: jax.Array) -> jax.Array:
            return jnp.full(self.obs_shape, time).astype(self.obs_dtype)

        def step(key: jax.Array, time: jax.Array, action: jax.Array) -> Any:
            time = time + 1
            ended = time == (self.ends_at or -1)
            after: Any = {"same": time, "float": time + 0.5, "tuple": (time,)}[self.state]
            reward = jnp.full(self.reward_shape, time)
            return observe(time), after, reward, ended.astype(self.flag)

        box = {} if self.num_actions else {"low": [-1.0], "high": [1.0]}
        return environments.functional(
            lambda key: (observe(jnp.int32(0)), jnp.int32(0)), step, obs_shape=self.obs_shape,
            num_actions=self.num_actions, max_episode_steps=self.limit, name="any", **box,
        )  # fmt: skip


grammars = st.builds(
    Grammar,
    obs_shape=st.sampled_from([(), (1,), (3,), (2, 2), (1, 2, 1), (4, 3, 2)]),
    obs_dtype=st.sampled_from(["float32", "float16", "int32", "uint8", "bool"]),
    num_actions=st.sampled_from([None, 1, 3]),
    limit=st.integers(1, 5),
    ends_at=st.sampled_from([None, 1, 2, 3, 9]),
    reward_shape=st.sampled_from([(), (), (), (1,)]),
    flag=st.sampled_from(["bool", "bool", "bool", "float32", "int32"]),
    state=st.sampled_from(["same", "same", "same", "float", "tuple"]),
)


@settings(
    max_examples=25, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
@given(grammars)
def test_any_environment_is_accepted_and_right_or_refused_in_one_line(grammar: Grammar) -> None:
    if not grammar.right:
        assert refusal(grammar.make).startswith("any: ")
        return
    env = made(grammar.make())
    head = networks.make_head(Config(), env)
    outputs = jnp.zeros((2, head.num_tokens, head.output_width))
    _, transition, _, episodes = jax.jit(
        lambda: rollout.collect(
            env, head, lambda obs: outputs, rollout.reset(env, jax.random.key(0), 2),
            jax.random.key(1), 6,
        )
    )()  # fmt: skip
    length = min(grammar.limit, grammar.ends_at or 99)
    time = np.arange(6) % length
    ended = time == length - 1
    terminates = grammar.ends_at is not None and grammar.ends_at <= grammar.limit

    def stored(x: np.ndarray) -> np.ndarray:
        return np.broadcast_to(
            x.astype(grammar.obs_dtype)
            .astype(env.obs_dtype)
            .reshape(6, *[1] * (1 + len(env.obs_shape))),
            (6, 2, *env.obs_shape),
        )

    np.testing.assert_array_equal(transition.obs, stored(time))
    np.testing.assert_array_equal(transition.final_obs, stored(time + 1))
    np.testing.assert_array_equal(transition.reward[:, 0], time + 1)
    np.testing.assert_array_equal(transition.terminated[:, 1], ended & terminates)
    np.testing.assert_array_equal(transition.truncated[:, 1], ended & (not terminates))
    assert episodes == 2 * ended.sum()
    network = networks.make(Config(), env.obs_shape, head)
    assert np.isfinite(network.value(network.init(jax.random.key(0)), jnp.zeros(env.obs_shape)))
