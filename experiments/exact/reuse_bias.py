"""Reuse bias: how much better a policy looks on the buffer it was optimised on than it is.

Both tasks are finite, so every true return is exact. The setting follows the BIRIS paper
(arXiv:2209.07074): the learner starts as the behaviour policy, the buffer stays as it is, and Adam
takes 20 full-batch updates on it.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from gymnax.environments.bsuite import catch as gymnax_catch
from jax import Array

from gipo_jax import loss_terms, networks, objectives
from gipo_jax.analysis import reuse_bias, stats

from ..store import Store

SIZES = (30, 40, 50)
"""Episodes in the buffer."""

UPDATES = 20
PILOT_SEED = 1000
PILOT_SIZE = 40
SEEDS = {"quick": (5, 5), "committed": (50, 20), "full": (500, 100)}
"""Seeds of the experiment, from 0 on, and of the pilot, from PILOT_SEED on."""

RATES = tuple(float(rate) for rate in np.geomspace(1e-3, 1e-1, 9))


class Method(NamedTuple):
    """An objective by name; sigma is NaN where it has none."""

    objective: str
    sigma: float = np.nan


NO_CLIP = Method("no_clip")
OBJECTIVES: dict[Method, Callable[[Array, Array], Array]] = {
    NO_CLIP: objectives.no_clip,
    Method("biris"): functools.partial(objectives.biris, alpha=0.1),
    Method("gipo", 0.2): functools.partial(objectives.gipo, sigma=0.2),
    Method("gipo", 1.0): functools.partial(objectives.gipo, sigma=1.0),
    Method("ppo_clip"): functools.partial(objectives.ppo_clip, clip_eps=0.2),
}
LEVELS = {"joint": "joint ratio", "token": "ratio per token"}
"""Ratio levels at which every objective is used, and what figures call them."""


def catch() -> reuse_bias.Task:
    """gymnax's Catch as tables, made by its own step: 1 for a caught ball, 0 for a missed one."""
    env, params = gymnax.make("Catch-bsuite")
    rows, columns, actions = env.rows, env.columns, env.num_actions
    y, ball, paddle = jnp.meshgrid(
        jnp.arange(rows - 1), jnp.arange(columns), jnp.arange(columns), indexing="ij"
    )

    def one(y: Array, ball: Array, paddle: Array) -> Any:
        state = gymnax_catch.EnvState(
            time=y, ball_x=ball, ball_y=y, paddle_x=paddle, paddle_y=rows - 1, prev_done=False
        )

        def step(action: Array) -> tuple[Array, Array]:
            _, after, reward, *_ = env.step_env(jax.random.key(0), state, action, params)
            index = (after.ball_y * columns + after.ball_x) * columns + after.paddle_x
            return jnp.where(after.prev_done, 0, index), (reward + after.prev_done) / 2

        return *jax.vmap(step)(jnp.arange(actions)), env.get_obs(state).ravel()

    next_state, reward, obs = jax.vmap(one)(y.ravel(), ball.ravel(), paddle.ravel())
    first = (y == 0) & (paddle == columns // 2)
    start = first.ravel() / first.sum()
    return reuse_bias.Task(start, next_state, reward, obs, rows - 1)


ANSWER = (0, 1, 1, 0, 1, 0, 0, 1)
NEEDED = 6


def token_tree() -> reuse_bias.Task:
    """Sequences of 8 tokens out of 2: 1 where at least 6 of them are the answer's, else 0.

    States are the 255 prefixes of fewer than 8 tokens, shortest first; a policy sees the tokens so
    far and their number, one-hot.
    """
    length = len(ANSWER)
    prefixes = [
        tuple(int(bit) for bit in f"{number:b}"[1:]) for number in range(1, 2**length)
    ]  # fmt: skip
    index = {prefix: state for state, prefix in enumerate(prefixes)}
    obs = np.zeros((len(prefixes), length, 3), np.float32)
    next_state = np.zeros((len(prefixes), 2), int)
    reward = np.zeros((len(prefixes), 2), np.float32)
    for state, prefix in enumerate(prefixes):
        obs[state, len(prefix), 2] = 1
        for position, token in enumerate(prefix):
            obs[state, position, token] = 1
        for token in (0, 1):
            after = (*prefix, token)
            next_state[state, token] = index.get(after, 0)
            if len(after) == length:
                reward[state, token] = np.sum(np.equal(after, ANSWER)) >= NEEDED
    start = np.zeros(len(prefixes), np.float32)
    start[0] = 1
    return reuse_bias.Task(
        start=jnp.asarray(start),
        next_state=jnp.asarray(next_state),
        reward=jnp.asarray(reward),
        obs=jnp.asarray(obs.reshape(len(obs), -1)),
        length=length,
    )


TASKS: dict[str, Callable[[], reuse_bias.Task]] = {"Catch-bsuite": catch, "token tree": token_tree}


def network(actions: int) -> nn.Module:
    """A policy with one hidden layer of 32 units, near uniform at first."""
    return nn.Sequential(
        [networks.Torso((32,), "tanh", False, False), networks.PolicyOutput(1, actions, True)]
    )


class Setting(NamedTuple):
    """One way to optimise.

    Attributes:
        method: one of ``OBJECTIVES``.
        learning_rate: Adam's.
        standardized: whether advantages are standardised or plain returns.
    """

    method: Method
    learning_rate: float
    standardized: bool = False


def optimize_all(
    task: reuse_bias.Task, level: str, episodes: int, seeds: range, settings: Sequence[Setting]
) -> tuple[np.ndarray, np.ndarray]:
    """Optimises on one buffer for each seed and setting, in one program.

    Args:
        task: the task.
        level: one of ``LEVELS``.
        episodes: size of the buffer.
        seeds: one network and one buffer each, the same for all settings and levels.
        settings: what is compared.

    Returns:
        estimated and true return of the new policy, ``[seeds, settings]`` each.
    """
    model = network(task.reward.shape[1])

    def policy(params: Any, obs: Array) -> Array:
        logits: Any = model.apply(params, obs)
        return logits[:, 0]

    def run(seed: Array) -> tuple[Array, Array]:
        key_init, key_buffer = jax.random.split(jax.random.key(seed))
        params = model.init(key_init, task.obs)
        behavior = jax.nn.log_softmax(policy(params, task.obs))
        key_buffer = jax.random.fold_in(key_buffer, episodes)
        buffer = reuse_bias.sample(task, behavior, key_buffer, episodes)
        returns = buffer.episode_return

        def optimize(which: Array, rate: Array, standardized: Array) -> tuple[Array, Array]:
            def objective(log_ratio: Array, advantage: Array) -> Array:
                return jax.lax.switch(which, list(OBJECTIVES.values()), log_ratio, advantage)

            advantage = jnp.where(standardized, loss_terms.standardize(returns), returns)
            new = reuse_bias.optimize(
                task, policy, params, buffer, objective, advantage, rate, level, UPDATES
            )
            log_probs = jax.nn.log_softmax(policy(new, task.obs))
            estimate = reuse_bias.estimated_return(log_probs, buffer)
            return estimate, reuse_bias.true_return(task, log_probs)

        return jax.vmap(optimize)(*columns)

    which = [list(OBJECTIVES).index(setting.method) for setting in settings]
    _, rates, standardized = zip(*settings, strict=True)
    columns = [jnp.asarray(column) for column in (which, rates, standardized)]
    estimate, true = jax.jit(jax.vmap(run))(jnp.arange(seeds.start, seeds.stop))
    return np.asarray(estimate), np.asarray(true)


TARGETS = {"Catch-bsuite": 0.3, "token tree": 0.4}
"""True return at which methods are compared with equal success."""


def measure(store: Store, preset: str) -> None:
    """Finds learning rates with the pilot's seeds, then measures every method at every size."""
    seeds, pilot_seeds = SEEDS[preset]
    tasks = {name: make() for name, make in TASKS.items()}
    pilot = pd.concat(
        [_pilot(tasks[name], name, level, pilot_seeds) for name in tasks for level in LEVELS]
    )
    store.write("reuse_bias_pilot", pilot, digits=5)
    runs = [
        _measure_sizes(tasks[name], name, level, seeds, pilot) for name in tasks for level in LEVELS
    ]
    store.write("reuse_bias", pd.concat(runs), digits=5)


def _pilot(task: reuse_bias.Task, name: str, level: str, seeds: int) -> pd.DataFrame:
    """Means over the pilot's seeds, a row a method and learning rate."""
    settings = [Setting(method, rate) for method in OBJECTIVES for rate in RATES]
    chosen = range(PILOT_SEED, PILOT_SEED + seeds)
    estimate, true = optimize_all(task, level, PILOT_SIZE, chosen, settings)
    bias = np.asarray(reuse_bias.reuse_bias(estimate, true))
    frame = pd.DataFrame([_labels(name, level, setting) for setting in settings])
    return frame.assign(true_return=true.mean(axis=0), reuse_bias=bias.mean(axis=0))


def _measure_sizes(
    task: reuse_bias.Task, name: str, level: str, seeds: int, pilot: pd.DataFrame
) -> pd.DataFrame:
    """A row a run. Standardised advantages take the rate that was matched with plain returns."""
    pilot = pilot[pilot.task == name]
    own = {
        method: group.true_return.to_numpy()
        for method, group in _by_method(pilot[pilot.level == level])
    }
    plain = pilot[(pilot.level == "joint") & (pilot.objective == "no_clip")].true_return
    shared = matching_rate(plain.to_numpy(), TARGETS[name])
    settings, choices = [], []
    for method in OBJECTIVES:
        matched = matching_rate(own[method], TARGETS[name])
        best = RATES[int(np.argmax(own[method]))]
        settings += [
            Setting(method, matched),
            Setting(method, shared),
            Setting(method, best),
            Setting(method, matched, standardized=True),
        ]
        choices += ["matched", "shared", "best", "matched"]
    frames = []
    for size in SIZES:
        estimate, true = optimize_all(task, level, size, range(seeds), settings)
        for index, (setting, choice) in enumerate(zip(settings, choices, strict=True)):
            labels = _labels(name, level, setting) | {"rate": choice, "size": size}
            values = {"estimate": estimate[:, index], "true_return": true[:, index]}
            frames.append(pd.DataFrame(labels | {"seed": np.arange(seeds)} | values))
    return pd.concat(frames)


def _labels(task: str, level: str, setting: Setting) -> dict[str, Any]:
    advantage = "standardized" if setting.standardized else "return"
    labels = {"task": task, "level": level, "advantage": advantage, **setting.method._asdict()}
    return labels | {"learning_rate": setting.learning_rate}


def _by_method(frame: pd.DataFrame) -> Iterator[tuple[Method, pd.DataFrame]]:
    """Rows of each method, in stored order."""
    for (objective, sigma), rows in frame.groupby(["objective", "sigma"], dropna=False, sort=False):
        width = float(sigma)  # type: ignore[arg-type]
        # Two NaNs are different keys unless they are the same object.
        method = Method(str(objective)) if np.isnan(width) else Method(str(objective), width)
        yield method, rows


def matching_rate(returns: np.ndarray, target: float) -> float:
    """The smallest rate whose mean true return is the target, or else the best of ``RATES``.

    Args:
        returns: mean true return at each of ``RATES``; linear in log rate between them.
        target: a true return.
    """
    above = returns >= target
    if not above.any():
        return RATES[int(np.argmax(returns))]
    first = int(np.argmax(above))
    if first == 0:
        return RATES[0]
    position = (target - returns[first - 1]) / (returns[first] - returns[first - 1])
    low, high = np.log(RATES[first - 1 : first + 1])
    return float(np.exp(low + position * (high - low)))


def scores(store: Store) -> dict[str, pd.DataFrame]:
    """Reuse bias and true return by size of the buffer, and by learning rate in the pilot."""
    keys = ["task", "objective", "sigma", "level"]
    columns = ["rate", "advantage", "size", "learning_rate", "seed", "estimate", "true_return"]
    runs = store.read("reuse_bias", [*keys, *columns])
    runs["reuse_bias"] = np.asarray(
        reuse_bias.reuse_bias(runs.estimate.to_numpy(), runs.true_return.to_numpy())
    )
    pilot = store.read("reuse_bias_pilot", [*keys, "learning_rate", "true_return", "reuse_bias"])
    return {"reuse_bias": summarize(runs), "reuse_bias_rates": pilot}


ALL_SIZES = 0


def summarize(runs: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds with 95 % intervals, and paired differences to No-Clip of the same level.

    Args:
        runs: a row a run, with its ``reuse_bias``.

    Returns:
        a row for each task, rate, advantage, level, method and size, and one for all sizes
        together, whose size is ``ALL_SIZES``.
    """
    groups = ["task", "rate", "advantage", "level"]
    rows = []
    for labels, group in runs.groupby(groups, sort=False):
        methods = dict(_by_method(group))
        values = {method: _by_seed(own) for method, own in methods.items()}
        reference = values[NO_CLIP]
        for method, own in values.items():
            for size in (*SIZES, ALL_SIZES):
                some = list(SIZES) if size == ALL_SIZES else [size]
                bias, true = own["reuse_bias"][some], own["true_return"][some]
                plain_bias = reference["reuse_bias"][some]
                plain_return = reference["true_return"][some]
                intervals = {
                    "bias": stats.bootstrap(bias, stats.mean),
                    "return": stats.bootstrap(true, stats.mean),
                    "bias_difference": stats.paired_difference(bias, plain_bias, stats.mean),
                    "return_difference": stats.paired_difference(true, plain_return, stats.mean),
                }
                row = dict(zip(groups, labels, strict=True))
                row |= method._asdict() | {"size": size}
                row["learning_rate"] = methods[method].learning_rate.iloc[0]
                row["estimate"] = own["estimate"][some].to_numpy().mean()
                for name, interval in intervals.items():
                    row |= {name: interval.estimate}
                    row |= {f"{name}_low": interval.low, f"{name}_high": interval.high}
                row["less_bias_than_no_clip"] = (bias < plain_bias).to_numpy().mean()
                rows.append(row | {"seeds": len(bias)})
    return pd.DataFrame(rows)


def _by_seed(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Values of one method, a row a seed and a column a size."""
    names = ("estimate", "true_return", "reuse_bias")
    return {name: runs.pivot(index="seed", columns="size", values=name) for name in names}
