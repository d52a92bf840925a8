"""EnvPool environments: simulators in C++, stepped from inside the compiled program.

EnvPool gives XLA two foreign functions, one that hands actions to a pool of simulators and one that
takes results from it, so that acting stays a ``lax.scan`` without a callback. What follows from it:

- A program holds its pool's address. A pool is made before it (``Environment.open``) and lives
  until ``Environment.close``.
- A pool is seeded when it is made, from the keys that ``reset`` is later called with, and ``reset``
  looks up the environments made for its key.
- The calls change the pool, so they must happen in order: each passes on a token that the next one
  takes. ``vmap`` over them is impossible.

EnvPool resets an environment in the step after the one that ended its episode. Here ``step`` makes
that extra step itself, so that ``obs`` and ``final_obs`` are as everywhere.

An evaluation has simulators of its own, made anew and ended with their one episode, which a
callback steps. Seeds follow from the run's key and the point, so a resumed run repeats them.
"""

import dataclasses
import functools
import itertools
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import io_callback

from gipo_jax import runtime
from gipo_jax.config import Config, ConfigError
from gipo_jax.environments import options
from gipo_jax.environments.interface import Environment, Simulator, Step

EXTRA = 'pip install "gipo_jax[envpool]"'


class PoolError(RuntimeError):
    """A pool was not opened, or its environments are all in use. The message is one line."""


class PoolState(NamedTuple):
    """State of the ``envs`` environments of a run."""

    token: Array  # [1, 8] uint8, passed from call to call; its value means nothing
    ids: Array  # [envs] int32, which environments of the pool they are
    seeds: Array  # [envs] int32, what they were seeded with
    resets: Array  # [envs] int32, resets so far, the first one included
    elapsed: Array  # [envs] int32, steps of the current episode
    actions: Array | None  # of the current episode, [max_episode_steps, envs, ...], to resume


class _Result(NamedTuple):
    """What a pool answers for one environment."""

    id: Array
    obs: Array
    reward: Array
    terminated: Array
    truncated: Array
    success: Array | None


def names() -> list[str] | None:
    """All environments that EnvPool registers; None when it is not installed."""
    try:
        import envpool
    except ModuleNotFoundError as error:
        if error.name == "envpool":
            return None
        raise ConfigError("env", "EnvPool", f"all it needs ({error}; {EXTRA})") from error
    return envpool.list_all_envs()


def make(config: Config) -> Environment:
    """Builds an EnvPool environment whose pools are not open yet; see ``environments.make``."""
    if sys.platform != "linux":
        raise ConfigError("env", config.env, f"a gymnax name on {sys.platform}; EnvPool is not")
    if jax.default_backend() != "cpu":
        valid = "a gymnax name on an accelerator; EnvPool steps on CPU (JAX_PLATFORMS=cpu)"
        raise ConfigError("env", config.env, valid)
    return _environment(read_task(config), config, (), "")


class Task(NamedTuple):
    """What there is to know of one of EnvPool's environments before a pool of it is made."""

    name: str  # EnvPool's, with the options that were given
    options: dict[str, Any]  # for envpool.make, which takes options.base_name(name)
    encode: Callable[[Sequence[Any], Any], Any]  # leaves [n, ...], numpy module -> [n, *obs_shape]
    obs_shape: tuple[int, ...]
    obs_dtype: np.dtype
    action_shape: tuple[int, ...]
    action_dtype: np.dtype  # type that EnvPool takes
    num_actions: int | None
    action_low: np.ndarray | None
    action_high: np.ndarray | None
    max_episode_steps: int
    reports_success: bool
    resume_gap: str | None  # why a stopped run does not go on exactly, or None


# Replaying an episode's actions after as many resets gives the same bits here; tested in
# tests/environments/test_envpool.py. Box2D's LunarLander does not, other families were not tried.
_REPLAYABLE = (
    "envpool.mujoco.metaworld",
    "envpool.mujoco.gym",
    "envpool.mujoco.dmc",
    "envpool.atari",
)
_LONGEST_REPLAY = 100_000


def read_task(config: Config) -> Task:
    """Looks an environment up. Raises ConfigError where EnvPool, or nothing here, can use it."""
    import envpool
    from envpool.registration import registry
    from gymnasium import spaces

    name = config.env
    settings: dict[str, Any] = {}
    if config.max_episode_steps is not None:
        settings["max_episode_steps"] = config.max_episode_steps
    try:
        defaults = envpool.make_spec(options.base_name(name)).config._asdict()
        # Meta-World hides the goal by default; the papers' agents see it.
        if "partially_observable" in defaults:
            settings["partially_observable"] = False
        known = {
            option: default
            for option, default in defaults.items()
            if option not in _NOT_OPTIONS and isinstance(default, bool | int | float | str)
        }
        settings |= options.read("env", name, known)
        spec = envpool.make_spec(options.base_name(name), **settings)
        with warnings.catch_warnings():
            # gymnasium warns of bounds that it rounds.
            warnings.simplefilter("ignore")
            obs_space = spec.gymnasium_observation_space
            action_space = spec.gymnasium_action_space
    except (ImportError, RuntimeError, AssertionError) as error:
        why = " ".join(str(error).split())
        raise ConfigError("env", name, f"an environment that EnvPool can make ({why})") from error
    if spec.config.max_num_players > 1:
        raise ConfigError("env", name, "an environment of one player")

    encode, obs_shape, obs_dtype = _observations(name, obs_space)
    num_actions = low = high = None
    if isinstance(action_space, spaces.Discrete):
        num_actions = int(action_space.n)
    elif isinstance(action_space, spaces.Box):
        low = np.asarray(action_space.low, np.float32).ravel()
        high = np.asarray(action_space.high, np.float32).ravel()
    else:
        valid = "an environment with Discrete or Box actions"
        raise ConfigError("env", name, f"{valid}, not {type(action_space).__name__}")

    limit = int(spec.config.max_episode_steps)
    gap = None
    if registry.specs[options.base_name(name)][0] not in _REPLAYABLE:
        gap = f"{name} cannot be put back into the middle of an episode"
    elif settings.get("episodic_life"):
        gap = f"{name} goes on with its game after a reset"
    elif limit > _LONGEST_REPLAY:
        gap = f"{name} has episodes of {limit} steps, too many to replay"
    return Task(
        name=name,
        options=settings,
        encode=encode,
        obs_shape=obs_shape,
        obs_dtype=obs_dtype,
        action_shape=tuple(action_space.shape),
        action_dtype=np.dtype(spec.action_array_spec["action"].dtype),
        num_actions=num_actions,
        action_low=low,
        action_high=high,
        max_episode_steps=limit,
        reports_success="info:success" in spec._state_keys,
        resume_gap=gap,
    )


# What the pools, or other settings, decide; and what changes nothing here.
_NOT_OPTIONS = (
    *("num_envs", "batch_size", "num_threads", "max_num_players", "thread_affinity_offset"),
    *("base_path", "seed", "env_seed", "gym_reset_return_info", "max_episode_steps", "task"),
    *("task_name", "xml_file", "reward_threshold", "gymnasium_v5_render_camera"),
)


def _observations(
    name: str, space: Any
) -> tuple[Callable[[Sequence[Any], Any], Any], tuple[int, ...], np.dtype]:
    """How to encode an observation, and the shape and type it then has."""
    from gymnasium import spaces

    single = np.dtype(np.float32)
    if isinstance(space, spaces.Discrete):
        n = int(space.n)

        def one_hot(leaves: Sequence[Any], xp: Any) -> Any:
            return (leaves[0].reshape(-1, 1) == xp.arange(n)).astype(single)

        return one_hot, (n,), single
    if isinstance(space, spaces.Box):
        if space.dtype != np.uint8:
            return lambda leaves, xp: leaves[0].astype(single), tuple(space.shape), single
        if len(space.shape) == 3 and space.shape[0] < space.shape[-1]:
            # Frames come as channels, height, width; convolutions here take channels last.
            channels, height, width = space.shape
            moved = (height, width, channels)
            return lambda leaves, xp: leaves[0].transpose(0, 2, 3, 1), moved, np.dtype(np.uint8)
        return lambda leaves, xp: leaves[0], tuple(space.shape), np.dtype(np.uint8)
    boxes = (
        jax.tree.leaves(_boxes(space), is_leaf=lambda x: not isinstance(x, dict))
        if isinstance(space, spaces.Dict)
        else []
    )
    if not boxes or not all(
        isinstance(box, spaces.Box) and np.issubdtype(box.dtype, np.floating) for box in boxes
    ):
        valid = "an environment with Box or Discrete observations, or a Dict of Box ones"
        raise ConfigError("env", name, f"{valid}, not {space}")

    def concatenate(leaves: Sequence[Any], xp: Any) -> Any:
        return xp.concatenate([x.reshape(len(x), -1).astype(single) for x in leaves], axis=-1)

    return concatenate, (sum(int(np.prod(box.shape)) for box in boxes),), single


def _boxes(space: Any) -> Any:
    """A Dict space as a dict, nested likewise."""
    spaces = getattr(space, "spaces", None)
    return {k: _boxes(v) for k, v in spaces.items()} if isinstance(spaces, dict) else space


def _make_pool(task: Task, seeds: np.ndarray, threads: int, **settings: int) -> Any:
    """An EnvPool of simulators with these seeds, and threads that simulate."""
    import envpool

    return envpool.make(
        options.base_name(task.name),
        env_type="gymnasium",
        num_envs=seeds.size,
        num_threads=max(1, min(seeds.size, threads)),
        seed=seeds.ravel().tolist(),
        **settings,
        **task.options,
    )


class _Pool:
    """Simulators of some runs in one EnvPool, which answers for one environment at a time."""

    def __init__(self, task: Task, seeds: np.ndarray, threads: int) -> None:
        self._task = task
        self._pool = _make_pool(task, seeds, threads, batch_size=1)
        # The foreign functions take and give what EnvPool says only where double precision exists:
        # without it they are declared single, and doubles overflow the buffers.
        with jax.enable_x64(True):
            calls: tuple[Any, ...] = self._pool.xla()
        _, self._recv, self._send, _ = calls
        ids = np.arange(seeds.size, dtype=np.int32).reshape(seeds.shape)
        self._free = list(zip(seeds, ids, strict=True))

    def close(self) -> None:
        """Ends the simulators and their threads."""
        self._pool = self._send = self._recv = None

    def send(self, token: Array, id: Array, action: Array) -> Array:
        """Starts a step, or a reset after the end of an episode; to be traced."""
        with jax.enable_x64(True):
            action = action[None].astype(self._task.action_dtype)
            return self._send(token[0], action, id[None])[None]

    def recv(self, token: Array) -> tuple[Array, _Result]:
        """Waits for one step to be done; to be traced."""
        with jax.enable_x64(True):
            token, (obs, reward, terminated, truncated, info) = self._recv(token[0])
            return token[None], _Result(
                id=info["env_id"][0],
                obs=self._task.encode(jax.tree.leaves(obs), jnp)[0],
                reward=reward[0].astype(jnp.float32),
                terminated=terminated[0],
                truncated=truncated[0],
                success=info["success"][0] > 0 if self._task.reports_success else None,
            )

    def claim(self, seeds: np.ndarray) -> np.ndarray:
        """Ids ``[envs]`` of environments that were seeded so and that nobody uses yet."""
        for index, (own, ids) in enumerate(self._free):
            if np.array_equal(own, seeds):
                del self._free[index]
                return ids
        raise PoolError(
            f"no environment of {self._task.name} is left for this run; open makes one for each"
            " key, and each starts once"
        )

    def reset(self, id: int) -> np.ndarray:
        """Resets an environment and gives its observation ``[*obs_shape]``."""
        obs, _ = self._pool.reset(np.array([id], np.int32))
        return self._task.encode(jax.tree.leaves(obs), np)[0]

    def step(self, id: int, action: np.ndarray) -> np.ndarray:
        """Steps an environment and gives its observation ``[*obs_shape]``."""
        obs = self._pool.step(action[None], np.array([id], np.int32))[0]
        return self._task.encode(jax.tree.leaves(obs), np)[0]


# Programs know pools by their addresses alone, so something else must keep them alive.
_open_pools: dict[int, tuple[_Pool, ...]] = {}


def _environment(task: Task, config: Config, pools: tuple[_Pool, ...], axis: str) -> Environment:
    """The environment with its pools, one for each device along the mesh axis; none when closed."""
    num_envs = config.num_envs

    def device() -> Array:
        """Index of the device, traced, which is that of its pool."""
        try:
            devices = jax.lax.axis_size(axis)
        except NameError:  # no mesh
            devices = 1
        if pools and devices != len(pools):
            valid = f"{len(pools)}, for which open made pools; two would mix in one"
            raise ConfigError("devices", devices, valid)
        return jax.lax.axis_index(axis) if len(pools) > 1 else jnp.int32(0)

    def on_device(call: Callable[..., Any], *arguments: Any) -> Any:
        if len(pools) == 1:
            return call(pools[0], *arguments)
        branches = [functools.partial(call, pool) for pool in pools]
        return jax.lax.switch(device(), branches, *arguments)

    send = functools.partial(on_device, _Pool.send)
    recv = functools.partial(on_device, _Pool.recv)
    unbatched = _unbatched(task)

    def start(device: np.ndarray, seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not pools:
            raise PoolError(f"{task.name} has no pools; Environment.open makes them")
        pool = pools[int(device)]
        ids = pool.claim(np.asarray(seeds))
        return ids, np.stack([pool.reset(id) for id in ids.tolist()])

    def reset(key: Array, num: int) -> tuple[Array, PoolState]:
        if num != num_envs:
            raise ConfigError("num_envs", num, f"{num_envs}, as its pools have")
        seeds = _seeds(key, num)
        integers = jax.ShapeDtypeStruct((num,), jnp.int32)
        first = jax.ShapeDtypeStruct((num, *task.obs_shape), task.obs_dtype)
        ids, obs = io_callback(start, (integers, first), device(), seeds)
        actions = None
        if task.resume_gap is None:
            shape = (task.max_episode_steps, num, *task.action_shape)
            actions = jnp.zeros(shape, jnp.int32 if task.num_actions else jnp.float32)
        return obs, PoolState(
            token=jnp.zeros((1, 8), jnp.uint8),
            ids=ids,
            seeds=seeds,
            resets=jnp.ones(num, jnp.int32),
            elapsed=jnp.zeros(num, jnp.int32),
            actions=actions,
        )

    def step(keys: Array, state: PoolState, action: Array) -> Step:
        del keys  # the pools have random numbers of their own
        ids, token = unbatched(state.ids), state.token

        def send_if(token: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, None]:
            due, id, action = inputs
            sent = jax.lax.cond(due, send, lambda token, *_: token, token, id, action)
            return sent, None

        token, _ = jax.lax.scan(
            lambda token, inputs: (send(token, *inputs), None), token, (ids, action)
        )
        token, result = jax.lax.scan(lambda token, _: recv(token), token, None, num_envs)
        if num_envs > 1:
            # Whoever is done first answers first.
            result = jax.tree.map(lambda x: x[jnp.argsort(result.id)], result)
        done = result.terminated | result.truncated

        def restart(token: Array) -> tuple[Array, Array]:
            token, _ = jax.lax.scan(send_if, token, (done, ids, action))

            def take(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
                token, obs = carry
                token, first = recv(token)
                row = first.id - ids[0]
                return token, jax.lax.dynamic_update_index_in_dim(obs, first.obs, row, 0)

            return jax.lax.fori_loop(0, jnp.sum(done), take, (token, result.obs))

        token, obs = jax.lax.cond(jnp.any(done), restart, lambda token: (token, result.obs), token)
        actions = state.actions
        if actions is not None:
            actions = actions.at[state.elapsed, jnp.arange(num_envs)].set(action)
        return Step(
            state=state._replace(
                token=token,
                resets=state.resets + done,
                elapsed=jnp.where(done, 0, state.elapsed + 1),
                actions=actions,
            ),
            obs=obs,
            reward=result.reward,
            terminated=result.terminated,
            truncated=result.truncated & ~result.terminated,
            final_obs=result.obs,
            success=result.success,
        )

    def closed_step(keys: Array, state: PoolState, action: Array) -> Step:
        """Only the types of ``step``: a sweep plans before it makes simulators."""
        return of_one_episode()[1](keys, state.ids[0], action)._replace(state=state)

    def open(keys: Array, devices: int, axis: str) -> Environment:
        if len(keys) % devices:
            valid = f"a divisor of the number of runs, {len(keys)}: each device has a pool for some"
            raise ConfigError("devices", devices, valid)
        seeds = np.asarray(jax.vmap(lambda key: _seeds(key, num_envs))(keys))
        threads = min(num_envs, runtime.available_cores() // devices)
        made = tuple(_Pool(task, part, threads) for part in np.split(seeds, devices))
        _open_pools[id(made)] = made
        return _environment(task, config, made, axis)

    def close() -> None:
        _open_pools.pop(id(pools), None)
        for pool in pools:
            pool.close()

    def restore(state: PoolState, obs: np.ndarray) -> tuple[PoolState, np.ndarray, np.ndarray]:
        runs = len(state.ids)
        parts = [_restore_run(pools[run * len(pools) // runs], state, obs, run)
                 for run in range(runs)]  # fmt: skip
        return jax.tree.map(lambda *x: np.stack(x), *parts)

    def of_one_episode() -> tuple[Callable[..., Any], Callable[..., Any]]:
        return _of_one_episode(task, runtime.available_cores() // max(len(pools), 1))

    fields = {field.name for field in dataclasses.fields(Environment)}
    spaces = {name: value for name, value in task._asdict().items() if name in fields}
    return Environment(
        **spaces,
        reset=reset,
        step=step if pools else closed_step,
        simulator=Simulator(
            open=open,
            close=close,
            restore=restore,
            of_one_episode=of_one_episode,
            resume_gap=task.resume_gap,
        ),
    )


class _Episodes:
    """Simulators that play one episode each, all of them stepped at once from the host."""

    def __init__(self, task: Task, seeds: np.ndarray, threads: int) -> None:
        self._task, self._pool = task, _make_pool(task, seeds, threads)
        self.running, self._steps = np.ones(seeds.size, bool), 0
        self.obs = np.array(task.encode(jax.tree.leaves(self._pool.reset()[0]), np))

    def step(self, action: np.ndarray) -> tuple[np.ndarray, ...]:
        """Steps those in mid-episode; observations of others stay, and all else of theirs is 0."""
        ids = np.flatnonzero(self.running).astype(np.int32)
        obs, reward, terminated, truncated, info = self._pool.step(action[ids], ids)
        ids = info["env_id"]
        self.obs[ids] = self._task.encode(jax.tree.leaves(obs), np)
        self._steps += 1
        in_time = self._steps < self._task.max_episode_steps
        self.running[ids] = ~(terminated | truncated) & in_time
        made = [np.zeros(len(self.running), t) for t in (np.float32, bool, bool, bool)]
        success = info["success"] > 0 if self._task.reports_success else False
        for row, value in zip(made, (reward, terminated, truncated, success), strict=True):
            row[ids] = value
        return self.obs.copy(), *made


def _of_one_episode(
    task: Task, threads: int
) -> tuple[Callable[[Array, int], tuple[Array, Array]], Callable[[Array, Array, Array], Step]]:
    """``reset`` and ``step`` of simulators made at each ``reset``; their state is a number."""
    playing: dict[int, _Episodes] = {}
    numbers = itertools.count()
    unbatched = _unbatched(task)

    def start(seeds: Any) -> tuple[np.int32, np.ndarray]:
        number = next(numbers)
        playing[number] = _Episodes(task, np.asarray(seeds), threads)
        return np.int32(number), playing[number].obs.copy()

    def advance(number: Any, action: Any) -> tuple[Any, ...]:
        episodes = playing[int(number)]
        made = episodes.step(np.asarray(action))
        if not episodes.running.any():
            del playing[int(number)]
        return number, *made

    def types(num: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Of a number, observations, rewards and flags."""
        number, flag = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((num,), jnp.bool_)
        obs = jax.ShapeDtypeStruct((num, *task.obs_shape), task.obs_dtype)
        return number, obs, jax.ShapeDtypeStruct((num,), jnp.float32), flag, flag, flag

    def reset(key: Array, num: int) -> tuple[Array, Array]:
        number, obs = io_callback(start, types(num)[:2], unbatched(_seeds(key, num)))
        return obs, number

    def step(keys: Array, state: Array, action: Array) -> Step:
        del keys  # the simulators have random numbers of their own
        # The number goes from call to call, so that these stay in order.
        number, obs, reward, terminated, truncated, success = io_callback(
            advance, types(len(action)), unbatched(state), action
        )
        success = success if task.reports_success else None
        return Step(number, obs, reward, terminated, truncated, obs, success)

    return reset, step


def _unbatched(task: Task) -> Callable[[Array], Array]:
    """The identity, which refuses ``vmap``."""

    @jax.custom_batching.custom_vmap
    def unbatched(x: Array) -> Array:
        return x

    @unbatched.def_vmap
    def refuse(*_: Any) -> Any:
        valid = "an environment in pure JAX under vmap; this one needs lax.map (map or loop)"
        raise ConfigError("env", task.name, valid)

    return unbatched


def _restore_run(
    pool: _Pool, state: PoolState, obs: np.ndarray, run: int
) -> tuple[PoolState, np.ndarray, np.ndarray]:
    """Brings a run's environments to where they were; see ``Environment.restore``."""
    stored: Any = jax.tree.map(lambda x: np.asarray(x[run]), state)
    ids = pool.claim(stored.seeds)
    resets, elapsed = stored.resets.copy(), stored.elapsed.copy()
    now = np.array(obs[run])
    restarted = np.zeros(len(ids), bool)
    for i, id in enumerate(ids.tolist()):
        for _ in range(resets[i]):
            found = pool.reset(id)
        if stored.actions is not None:
            for action in stored.actions[: elapsed[i], i]:
                found = pool.step(id, action)
        restarted[i] = not np.array_equal(found, now[i])
        if restarted[i]:
            now[i] = pool.reset(id)
            resets[i], elapsed[i] = resets[i] + 1, 0
    return stored._replace(ids=ids, resets=resets, elapsed=elapsed), now, restarted


def _seeds(key: Array, num_envs: int) -> Array:
    """What the environments of a run are seeded with, ``[num_envs]`` int32."""
    return jax.random.randint(key, (num_envs,), 0, 2**31 - 1, jnp.int32)
