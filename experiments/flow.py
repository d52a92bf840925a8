"""Flow samplers: three ways to bound the ratio of a denoising step, and what over-optimises."""

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from gipo_jax import learner, train
from gipo_jax.analysis import plots, stats
from gipo_jax.analysis.plots import Look
from gipo_jax.config import Config, HParams, stack
from gipo_jax.domains.flow import domain as flow_domain
from gipo_jax.domains.flow import sampler, tasks

from .store import Store


@dataclasses.dataclass(frozen=True)
class Method:
    """An objective with its parameters on a ratio level, and how it is drawn."""

    objective: str
    level: str
    parameters: dict[str, float]
    look: Look


METHODS = {
    "ppo_clip": Method("ppo_clip", "token", {}, plots.look("ppo_clip")),
    "guard_0.05": Method(
        "ppo_clip",
        "ratio_norm",
        {"clip_eps": 0.05},
        Look("#009E73", "^", "-.", "GRPO-Guard ε=0.05"),
    ),
    "guard_0.2": Method(
        "ppo_clip", "ratio_norm", {"clip_eps": 0.2}, Look("#8C6D1F", "v", "-.", "GRPO-Guard ε=0.2")
    ),
    "gipo_0.2": Method("gipo", "token", {"sigma": 0.2}, plots.look("gipo", 0.2)),
    "gipo_1": Method("gipo", "token", {"sigma": 1.0}, plots.look("gipo", 1.0)),
    "no_clip": Method("no_clip", "token", {}, plots.look("no_clip")),
}
CHAINS = 64
"""Chains an iteration and a batch."""

REGIMES: dict[str, dict[str, Any]] = {
    "fresh": {"buffer_size": CHAINS, "min_age": 0},
    "stale": {"buffer_size": 32 * CHAINS, "min_age": 16},
}
SEEDS = {"quick": range(2), "committed": range(10), "full": range(20)}
ITERATIONS = {"quick": 20, "committed": 60, "full": 120}
SAMPLES = 512
RATIO_CHAINS = 4096
SNAPSHOTS = 1 / 3, 3 / 5
"""Parts of training after which the old and the new flow of the ratio figure are taken."""

CURVES = ["eval_return_sampled", "modes_covered", "pairwise_distance", "ess", "log_ratio_abs_p95"]
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def configure(method: Method, iterations: int) -> Config:
    """Static settings of a method."""
    return Config(
        env="flow/ring",
        objective=method.objective,
        ratio_level=method.level,
        activation="silu",
        schedule="constant",
        num_envs=CHAINS,
        rollout_length=1,
        batch_size=CHAINS,
        updates_per_iteration=8,
        total_steps=CHAINS * iterations,
        max_buffer_size=32 * CHAINS,
        num_logs=10,
        eval_episodes=SAMPLES,
    )


def settings(method: Method, config: Config, regime: str, seed: int) -> HParams:
    """Traced settings of a run."""
    return train.make_hparams(
        config,
        objective_params=method.parameters,
        seed=seed,
        learning_rate=5e-4,
        **REGIMES[regime],
    )


def measure(store: Store, preset: str) -> None:
    """Trains all methods; methods of one objective and level share a program, as do regimes."""
    seeds, iterations = SEEDS[preset], ITERATIONS[preset]
    programs: dict[Config, list[tuple[str, str, int]]] = {}
    for name, method in METHODS.items():
        lanes = programs.setdefault(configure(method, iterations), [])
        lanes += [(name, regime, seed) for regime in REGIMES for seed in seeds]
    flows = _pretrain(seeds)
    runs: list[dict[str, Any]] = []
    curves: list[pd.DataFrame] = []
    points: list[pd.DataFrame] = []
    for config, lanes in programs.items():
        print(f"  {len(lanes)} runs of {config.objective} on {config.ratio_level}", flush=True)
        hparams = [settings(METHODS[n], config, r, s) for n, r, s in lanes]
        start = jax.tree.map(
            operator.itemgetter(np.array([s - seeds.start for *_, s in lanes])), flows
        )
        done = _train(config, hparams, start)
        before, after, metrics, diverged = done
        for lane, (name, regime, seed) in enumerate(lanes):
            keys: dict[str, Any] = {"regime": regime, "method": name, "seed": seed}
            first = _describe(before[lane])
            last = _describe(after[lane])
            curve = pd.DataFrame({column: metrics[column][lane] for column in CURVES})
            curve = pd.concat([pd.DataFrame([first]), curve], ignore_index=True)
            stops = [0, *train.log_boundaries(config)]
            curves.append(curve.assign(**keys, samples=CHAINS * np.array(stops)))
            scores = {f"{key}_before": value for key, value in first.items()}
            area = float(metrics["eval_return_sampled"][lane].mean())
            runs.append(keys | scores | last | {"area": area, "diverged": diverged[lane]})
            if seed == seeds[0]:
                points += [
                    _points(after[lane], regime, name),
                    *([_points(before[lane], regime, "before")] if name == "ppo_clip" else []),
                ]
    store.write("flow_runs", pd.DataFrame(runs), 6)
    store.write("flow_curves", pd.concat(curves, ignore_index=True), 4)
    store.write("flow_points", pd.concat(points, ignore_index=True), 4)
    store.write("flow_ratios", _ratios(iterations, seeds, flows), 5)


# Over-optimisation: training sees a reward model that is wrong.

SHIFTS = (1.0, 3.0)
"""Of the times: steps of equal length, and those of Stable Diffusion 3."""

PROXY_SEEDS = {"quick": range(90, 92), "committed": range(20, 30), "full": range(20, 40)}
PROXY_ITERATIONS = {"quick": 4, "committed": 120, "full": 240}
PROXY_CURVES = {"eval_return_sampled": "gold", "eval_proxy": "proxy"}
PROXY_LEVEL = 0.9
"""Of the proxy, at which methods are compared whatever their speed."""


def measure_proxy(store: Store, preset: str) -> None:
    """Trains all methods on the proxy, with steps of equal and of unequal length."""
    seeds, iterations = PROXY_SEEDS[preset], PROXY_ITERATIONS[preset]
    flows, curves = _pretrain(seeds), []
    for shift in SHIFTS:
        for name, method in METHODS.items():
            print(f"  {name}, shift {shift:g}", flush=True)
            config = dataclasses.replace(
                configure(method, iterations),
                env="flow/ring_proxy",
                timestep_shift=shift,
                num_logs=min(20, iterations),
            )
            hparams = [settings(method, config, "fresh", seed) for seed in seeds]
            _, _, metrics, diverged = _train(config, hparams, flows)
            for lane, seed in enumerate(seeds):
                curve = {new: metrics[old][lane] for old, new in PROXY_CURVES.items()}
                keys = {"shift": shift, "method": name, "seed": seed, "diverged": diverged[lane]}
                stops = CHAINS * np.array(train.log_boundaries(config))
                curves.append(pd.DataFrame(curve).assign(**keys, samples=stops))
    store.write("flow_proxy_curves", pd.concat(curves, ignore_index=True), 5)


def proxy_scores(store: Store) -> dict[str, pd.DataFrame]:
    """Curves of proxy and gold reward, and what over-optimisation costs each method."""
    curves = store.read("flow_proxy_curves", ["shift", "method", "seed", "samples", "gold"])
    drawn = [
        plots.summarize(curves, ["shift", "method", "samples"], reward).assign(reward=reward)
        for reward in PROXY_CURVES.values()
    ]
    return {
        "flow_proxy_curves": pd.concat(drawn, ignore_index=True),
        "flow_proxy": summarize_proxy(curves),
    }


def summarize_proxy(curves: pd.DataFrame) -> pd.DataFrame:
    """Final rewards, the fall of the gold one, and differences to PPO-Clip paired on seeds.

    ``gold`` and ``proxy`` are means over the last two logged points. ``fall`` is the gold reward at
    the point where its mean over seeds is highest, minus ``gold``. ``at_level`` is the gold reward
    where the proxy first reaches ``PROXY_LEVEL``, or at the last point if it never does.
    """
    rows = []
    for shift, of_shift in curves.groupby("shift", sort=False):
        found = {name: _over_optimised(own) for name, own in of_shift.groupby("method", sort=False)}
        for method, scores in found.items():
            for score, values in scores.items():
                difference = stats.bootstrap(values - found["ppo_clip"][score], stats.mean)
                rows.append(
                    {"shift": shift, "method": method, "score": score}
                    | stats.bootstrap(values, stats.mean)._asdict()
                    | {f"minus_ppo_{key}": x for key, x in difference._asdict().items()}
                )
    return pd.DataFrame(rows)


def _over_optimised(own: pd.DataFrame) -> dict[str, np.ndarray]:
    """Scores of the seeds of a method, in order."""
    gold, proxy = (
        own.pivot(index="seed", columns="samples", values=reward).sort_index().to_numpy(float)
        for reward in ("gold", "proxy")
    )
    peak = gold.mean(axis=0).argmax()
    reached = proxy >= PROXY_LEVEL
    first = np.where(reached.any(axis=1), reached.argmax(axis=1), gold.shape[1] - 1)
    final = gold[:, -2:].mean(axis=1)
    return {
        "proxy": proxy[:, -2:].mean(axis=1),
        "rise": proxy[:, -2:].mean(axis=1) - proxy[:, 0],
        "gold": final,
        "fall": gold[:, peak] - final,
        "at_level": gold[np.arange(len(gold)), first],
        "reached": reached.any(axis=1).astype(float),
    }


def _pretrain(seeds: range) -> Any:
    """Parameters of the flow that runs of each seed begin with, whatever their method."""
    domain = flow_domain.make(configure(METHODS["ppo_clip"], 1))
    pretrained = jax.vmap(lambda seed: domain.pretrain(learner.run_key(seed)))
    return jax.jit(pretrained)(jnp.array(seeds))


def _init(domain: flow_domain.Flow, hparams: HParams, flow: Any) -> train.TrainState:
    """First state of a run from a flow trained before."""
    state = train.init(domain, hparams)
    return state._replace(learner=state.learner._replace(params={"policy": flow}))


def _ends(domain: flow_domain.Flow, state: train.TrainState, key: jax.Array) -> jax.Array:
    """End points of the SDE, ``[samples, 2]``."""
    key_noise, key_steps = jax.random.split(key)
    noise = jax.random.normal(key_noise, (SAMPLES, 2))
    return domain.choose_action(domain.acting(state), HParams(), noise, key_steps)


def _train(config: Config, hparams: list[HParams], flows: Any) -> tuple[np.ndarray, ...]:
    """End points before and after training, ``[runs, samples, 2]``, metrics and divergence."""
    domain = flow_domain.make(config)
    stops = train.log_boundaries(config)
    bounds = (jnp.array([0, *stops[:-1]]), jnp.array(stops))

    def one(hparams: HParams, flow: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(1), hparams.seed)
        key_before, key_after = jax.random.split(key)
        start = _init(domain, hparams, flow)
        state, metrics = jax.lax.scan(
            lambda state, bounds: train.train_and_log(domain, state, hparams, *bounds),
            start,
            bounds,
        )
        before, after = _ends(domain, start, key_before), _ends(domain, state, key_after)
        return before, after, metrics, state.diverged_at

    result: tuple[np.ndarray, ...] = jax.device_get(jax.jit(jax.vmap(one))(stack(hparams), flows))
    return result


def _describe(points: np.ndarray) -> dict[str, float]:
    task = tasks.ring()
    return {
        "eval_return_sampled": float(tasks.reward(task, points).mean()),
        "modes_covered": float(tasks.modes_covered(task, points)),
        "pairwise_distance": float(tasks.pairwise_distance(points)),
    }


def _points(points: np.ndarray, regime: str, method: str) -> pd.DataFrame:
    columns = {"regime": regime, "method": method, "x": points[:, 0], "y": points[:, 1]}
    return pd.DataFrame(columns)


def _ratios(iterations: int, seeds: range, flows: Any) -> pd.DataFrame:
    """Log-ratios by step of old chains under a newer flow, plain and corrected, for every seed."""
    method = METHODS["no_clip"]
    config = configure(method, iterations)
    domain = flow_domain.make(config)
    guard = flow_domain.make(dataclasses.replace(config, ratio_level=flow_domain.RATIO_NORM))
    old_at, new_at = (round(part * iterations) for part in SNAPSHOTS)

    def one(hparams: HParams, flow: Any) -> tuple[jax.Array, jax.Array]:
        state = _init(domain, hparams, flow)
        state, _ = train.train_and_log(domain, state, hparams, 0, old_at)
        old = domain.flow(state.learner.params)
        key = jax.random.fold_in(jax.random.key(2), hparams.seed)
        key_noise, key_steps = jax.random.split(key)
        noise = jax.random.normal(key_noise, (RATIO_CHAINS, 2))
        chain = sampler.sample(old, domain.env, key_steps, noise)
        advantage = age = jnp.zeros(RATIO_CHAINS)
        rows = flow_domain.Row(chain.points, chain.mean, chain.log_prob, advantage)
        state, _ = train.train_and_log(domain, state, hparams, old_at, new_at)
        params = state.learner.params
        batch = domain.batch(state, params, rows, age, hparams)
        return (
            domain.score(params, batch, hparams).log_ratio,
            guard.score(params, batch, hparams).log_ratio,
        )

    hparams = stack([settings(method, config, "stale", seed) for seed in seeds])
    measured = jax.jit(jax.vmap(one))(hparams, flows)
    rows = []
    for level, values in zip(("token", "ratio_norm"), measured, strict=True):
        for seed, by_step in zip(seeds, np.asarray(values, float), strict=True):
            for step, x in enumerate(by_step.T, start=1):
                quantiles = zip(QUANTILES, np.quantile(x, QUANTILES), strict=True)
                rows.append(
                    {"level": level, "seed": seed, "step": step, "mean": x.mean()}
                    | {"error": x.std() / np.sqrt(len(x)), "std": x.std()}
                    | {f"q{100 * q:02.0f}": value for q, value in quantiles}
                    | {"above": np.mean(x > np.log(1.2)), "below": np.mean(x < np.log(0.8))}
                )
    return pd.DataFrame(rows)


def scores(store: Store) -> dict[str, pd.DataFrame]:
    """Learning curves with diversity, scores, ends of samples, and ratios by step."""
    runs = store.read("flow_runs", ["regime", "method", "seed", *CURVES[:3], "area"])
    curves = store.read("flow_curves", ["regime", "method", "samples", *CURVES[:3]])
    points = store.read("flow_points", ["regime", "method", "x", "y"])
    ratios = store.read("flow_ratios", ["level", "seed", "step", "mean", "error"])
    learning = [
        plots.summarize(curves[curves.regime == regime], ["method", "samples"], column).assign(
            regime=regime, score=column
        )
        for regime in REGIMES
        for column in CURVES[:3]
    ]
    by_step = ratios.groupby(["level", "step"])
    pooled = by_step.mean().reset_index().drop(columns="seed")
    pooled["error"] = by_step["error"].agg(lambda e: np.sqrt((e**2).sum()) / len(e)).to_numpy()
    return {
        "flow_learning": pd.concat(learning, ignore_index=True),
        "flow_scores": summarize(runs),
        "flow_samples": points.groupby(["regime", "method"]).mean().reset_index(),
        "flow_ratios": pooled,
    }


def summarize(runs: pd.DataFrame) -> pd.DataFrame:
    """Scores by regime and method, the rise of the reward, and differences to PPO-Clip."""
    runs = runs.assign(rise=runs.eval_return_sampled - runs.eval_return_sampled_before)
    rows = []
    for (regime, method), group in runs.groupby(["regime", "method"], sort=False):
        group = group.sort_values("seed")
        clip = runs[(runs.regime == regime) & (runs.method == "ppo_clip")].sort_values("seed")
        for score in ("eval_return_sampled", "area", "rise", "modes_covered", "pairwise_distance"):
            values = group[score].to_numpy(float)
            difference = stats.bootstrap(values - clip[score].to_numpy(float), stats.mean)
            rows.append(
                {"regime": regime, "method": method, "score": score}
                | stats.bootstrap(values, stats.mean)._asdict()
                | {f"minus_ppo_{key}": x for key, x in difference._asdict().items()}
            )
    return pd.DataFrame(rows)
