"""Settings that must stand before JAX is imported, and what several files use."""

import os
import tempfile

# XLA's scheduler on CPU can deadlock in vmapped training programs; entry points set this
# themselves, tests import the modules below them.
_FLAG = "--xla_cpu_enable_concurrency_optimized_scheduler"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=false".strip()

# Most programs of the tests run for moments, and compile in half of the time without optimizations;
# half of what is left is saved by kernels of an older and simpler path. Not so those that are
# marked as optimized.
_OLD_KERNELS = " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] += _OLD_KERNELS
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

# Tests that train the same program compile it once; commands that tests start share it too.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="gipo_jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

from collections.abc import Iterator  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import pytest  # noqa: E402
from flax import struct  # noqa: E402
from gymnax.environments import environment, spaces  # noqa: E402
from jax._src import compiler  # noqa: E402

from tests import limits  # noqa: E402


@struct.dataclass
class ToyParams(environment.EnvParams):
    """What is added to each reward."""

    bonus: float = 0.0


class Toy(environment.Environment):
    """One state, two actions: reward ``1 - pay + pay * action``, so 1 for ever with ``pay`` 0.

    Args:
        limit: time limit.
        ends_at: step at which an episode terminates; None for never.
        pay: part of the reward that the action decides.
        clock: observe the time in the episode, and not a constant 1.
        actions: action space, by default two actions.
    """

    def __init__(
        self,
        limit: int = 5,
        ends_at: int | None = None,
        pay: float = 0.0,
        clock: bool = False,
        actions: Any = None,
    ) -> None:
        super().__init__()
        self.limit, self.ends_at, self.pay, self.clock = limit, ends_at, pay, clock
        self.actions = actions or spaces.Discrete(2)

    @property
    def default_params(self) -> ToyParams:
        return ToyParams(max_steps_in_episode=self.limit)

    def _observe(self, time: jax.Array) -> jax.Array:
        return jnp.float32(time if self.clock else 1)[None]

    def reset_env(self, key: jax.Array, params: Any) -> tuple[jax.Array, Any]:
        state = environment.EnvState(time=jnp.int32(0))
        return self._observe(state.time), state

    def step_env(self, key: jax.Array, state: Any, action: Any, params: Any) -> Any:
        state = environment.EnvState(time=state.time + 1)
        reward = 1 - self.pay + self.pay * jnp.float32(action).sum() + params.bonus
        terminated = jnp.bool_(False) if self.ends_at is None else state.time >= self.ends_at
        return self._observe(state.time), state, reward, terminated, {}

    def action_space(self, params: Any) -> Any:
        return self.actions

    def observation_space(self, params: Any) -> spaces.Box:
        return spaces.Box(0, self.limit, (1,), jnp.float32)


@pytest.fixture(scope="session")
def toy() -> type[Toy]:
    """The class of an environment small enough to reason about, and quick to compile."""
    return Toy


_options_of_users = compiler.get_compile_options


def _options(*arguments: Any, **settings: Any) -> Any:
    options = _options_of_users(*arguments, **settings)
    if not jax.config.read("jax_disable_most_optimizations"):
        options.env_option_overrides += [("xla_cpu_use_fusion_emitters", True)]
    return options


compiler.get_compile_options = _options


@pytest.fixture(scope="module", autouse=True)
def _optimize_a_module(request: pytest.FixtureRequest) -> Iterator[None]:
    yield from _optimize(request)


@pytest.fixture(autouse=True)
def _optimize_a_test(request: pytest.FixtureRequest) -> Iterator[None]:
    yield from _optimize(request)


def _optimize(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiles as for users, in this process and in those it starts, what is marked so."""
    marked = request.node.get_closest_marker("optimized") is not None
    if not marked or not jax.config.read("jax_disable_most_optimizations"):
        yield
        return
    jax.clear_caches()  # of programs that were compiled otherwise
    jax.config.update("jax_disable_most_optimizations", False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
        patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace(_OLD_KERNELS, ""))
        yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()


def pytest_addoption(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.register(limits)
