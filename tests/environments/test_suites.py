"""Each suite behind the interface, against its own ``reset`` and ``step``.

``bash scripts/suites.sh`` installs the suites in an environment of their own and runs these.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gipo_jax import environments, train
from gipo_jax.config import Config, ConfigError
from gipo_jax.environments import suites

INSTALLED = {
    name: importlib.util.find_spec(suite.module.partition(".")[0]) is not None
    for name, suite in suites.SUITES.items()
}
NAMES = (
    "brax/inverted_pendulum:backend=spring",
    "brax/ant:backend=spring",
    "playground/CartpoleBalance",
    "craftax/Craftax-Classic-Symbolic-v1",
    "craftax/Craftax-Symbolic-v1",
    "xminigrid/MiniGrid-Empty-8x8",
)


def installed(name: str) -> Any:
    suite = name.partition("/")[0]
    extra = suites.SUITES[suite].extra
    reason = f'{suite} is missing: pip install "gipo_jax[{extra}]" (bash scripts/suites.sh)'
    return pytest.param(name, marks=pytest.mark.skipif(not INSTALLED[suite], reason=reason))


Own = tuple[Callable[[Any], Any], Callable[[Any, Any, Any], Any]]


def own_functions(name: str) -> Own:
    """``reset(key) -> obs, state`` and ``step(key, state, action) -> obs, state, reward, ended``.

    Written with the suite's own names, without the adapter.
    """
    suite, _, rest = name.partition("/")
    if suite == "brax":
        from brax import envs

        env = envs.get_environment(rest.partition(":")[0], backend="spring")
    if suite == "playground":
        from mujoco_playground import registry

        env = registry.load(rest)
    if suite in ("brax", "playground"):

        def reset(key: Any) -> Any:
            state = env.reset(key)
            return state.obs, state

        def step(key: Any, state: Any, action: Any) -> Any:
            state = env.step(state, action)
            return state.obs, state, state.reward, state.done

        return reset, step
    if suite == "craftax":
        from craftax.craftax_env import make_craftax_env_from_name

        craft = make_craftax_env_from_name(rest, auto_reset=False)
        params = craft.default_params
        return (
            lambda key: craft.reset_env(key, params),
            lambda key, state, action: craft.step_env(key, state, action, params)[:4],
        )
    import xminigrid

    grid, grid_params = xminigrid.make(rest)

    def seen(timestep: Any) -> Any:
        obs = timestep.observation
        tiles = obs[..., :1] == np.arange(13)
        return jnp.concatenate([tiles, obs[..., 1:] == np.arange(12)], -1), timestep

    def grid_step(key: Any, timestep: Any, action: Any) -> Any:
        timestep = grid.step(grid_params, timestep, action)
        return *seen(timestep), timestep.reward, timestep.discount == 0

    return lambda key: seen(grid.reset(grid_params, key)), grid_step


def random_actions(env: environments.Environment, steps: int) -> jax.Array:
    if env.num_actions is not None:
        return jax.random.randint(jax.random.key(2), (steps, 1), 0, env.num_actions)
    return jax.random.uniform(jax.random.key(2), (steps, 1, *env.action_shape), minval=-1.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", map(installed, NAMES))
def test_a_random_rollout_is_that_of_the_suites_own_functions(name: str) -> None:
    steps = 20
    env = environments.make(Config(env=name))
    reset, step = own_functions(name)
    keys, actions = jax.random.split(jax.random.key(1), (steps, 1)), random_actions(env, steps)

    @jax.jit
    def ours(key: jax.Array) -> Any:
        def one(state: Any, inputs: Any) -> Any:
            stepped = env.step(inputs[0], state, inputs[1])
            return stepped.state, stepped._replace(state=None)

        obs, state = env.reset(key, 1)
        return obs[0], jax.lax.scan(one, state, (keys, actions))[1]

    @jax.jit
    def theirs(key: jax.Array) -> Any:
        def one(state: Any, inputs: Any) -> Any:
            obs, state, reward, ended = step(jax.random.split(inputs[0][0])[0], state, inputs[1][0])
            return weakless(state), (obs, reward, ended)

        obs, state = reset(jax.random.split(key, 1)[0])
        return obs, jax.lax.scan(one, weakless(state), (keys, actions))[1]

    first, stepped = ours(jax.random.key(0))
    own_first, (obs, reward, ended) = theirs(jax.random.key(0))
    np.testing.assert_allclose(first, own_first, atol=1e-6)
    # Up to the first end: what follows is a reset of ours.
    length = int(np.argmax(np.append(np.asarray(ended, bool), True))) + 1
    length = min(length, steps)
    np.testing.assert_allclose(stepped.final_obs[:length, 0], obs[:length], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(stepped.reward[:length, 0], reward[:length], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(stepped.terminated[:length, 0], np.asarray(ended, bool)[:length])
    assert not np.any(stepped.truncated[:length])
    assert np.any(stepped.final_obs[0] != stepped.final_obs[length - 1])


def weakless(tree: Any) -> Any:
    def array(x: Any) -> Any:
        keyed = jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)
        return x if keyed else jnp.asarray(x, jnp.asarray(x).dtype)

    return jax.tree.map(array, tree)


@pytest.mark.slow
@pytest.mark.parametrize("name", map(installed, NAMES[2:]))
def test_it_truncates_resets_and_trains(name: str) -> None:
    config = Config(
        env=name, max_episode_steps=3, num_envs=2, rollout_length=4, batch_size=8, total_steps=32,
        num_logs=2, eval_episodes=1, hidden_sizes=(8,),
    )  # fmt: skip
    env = environments.make(config)
    assert env.max_episode_steps == 3
    trained = train.make_train(config)
    state, metrics = jax.jit(trained)(train.make_hparams(config, buffer_size=16))
    assert all(np.isfinite(metrics[k]).all() for k in ("eval_return", "policy_loss", "grad_norm"))
    assert state.diverged_at == -1 and np.all(metrics["grad_norm"][-1] > 0)
    # Four episodes of three steps in 16: nothing died so soon after a start.
    np.testing.assert_array_equal(metrics["episodes"], [4, 6])


@pytest.mark.slow
@pytest.mark.parametrize("name", [installed("craftax/Craftax-Classic-Symbolic-v1")])
def test_a_suites_own_limit_truncates(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Craftax's flag is set by death and by its limit alike."""
    from craftax.craftax_classic.envs import craftax_symbolic_env as module

    kind = module.CraftaxClassicSymbolicEnvNoAutoReset
    monkeypatch.setattr(kind, "default_params", module.EnvParams(max_timesteps=2))
    suites.make.cache_clear()
    env = environments.make(Config(env=name))
    suites.make.cache_clear()
    one, flags = environments.single(env), []
    step = jax.jit(one.step)
    _, state = one.reset(jax.random.key(0))
    for _ in range(3):
        stepped = step(jax.random.key(1), state, jnp.int32(0))
        state = stepped.state
        flags.append((bool(stepped.terminated), bool(stepped.truncated)))
    assert flags == [(False, False), (False, True), (False, False)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [installed("craftax/Craftax-Classic-Pixels-v1")])
def test_images_are_bytes(name: str) -> None:
    env = environments.make(Config(env=name))
    obs, _ = jax.jit(lambda key: env.reset(key, 1))(jax.random.key(0))
    assert obs.dtype == env.obs_dtype == np.uint8 and obs.shape[1:] == (63, 63, 3)
    assert obs.max() > 100


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("brax/cat", "one of ant, fast, halfcheetah"),
        ("brax/ant:wings=2", r"brax/ant:NAME=VALUE,.*backend=generalized"),
        ("playground/Cat", "AcrobotSwingup"),
        ("craftax/Craftax-v9", "Craftax-Symbolic-v1"),
        ("xminigrid/Empty", "MiniGrid-Empty-8x8"),
    ],
)
def test_an_unknown_name_is_refused_with_the_known_ones(name: str, words: str) -> None:
    suite = name.partition("/")[0]
    if not INSTALLED[suite]:
        words = rf"pip install \"gipo_jax\[{suites.SUITES[suite].extra}\]\""
    with pytest.raises(ConfigError, match=f"^env: .*{words}") as error:
        environments.make(Config(env=name))
    assert "\n" not in str(error.value)
