"""Objectives inside training: each runs, gets what it asks for, keeps its state; reweighting."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from gipo_jax import learner, objectives, train
from gipo_jax.config import Config, ConfigError, HParams

pytestmark = pytest.mark.slow

NAMES = list(objectives.REGISTRY)
BLOCK = 16
TINY: dict[str, Any] = {
    "num_envs": 4,
    "rollout_length": 4,
    "batch_size": BLOCK,
    "hidden_sizes": (8,),
    "eval_episodes": 0,
    "schedule": "constant",
    "total_steps": BLOCK * 40,
    "max_buffer_size": BLOCK * 16,
    "num_logs": 1,
}
UPDATES = 4


def settings_of(config: Config, **overrides: Any) -> HParams:
    return train.make_hparams(config, **({"buffer_size": BLOCK * 16} | overrides))


def stack(lanes: list[HParams]) -> HParams:
    return jax.tree.map(lambda *x: jnp.array(x), *lanes)


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_fits_the_training_step(name: str) -> None:
    """Traced, not compiled: a step takes what it returns, for the objective itself."""
    config = Config(**TINY, objective=name)
    domain, hparams = train.make(config), settings_of(config)
    state = jax.eval_shape(lambda: train.init(domain, hparams))
    after, _ = jax.eval_shape(lambda s: train.train_step(domain, s, hparams, 0), state)
    alike = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), after, state)
    assert jax.tree.all(alike)


def first_record(params: Any) -> dict[str, Array]:
    zero = jnp.zeros(())
    return {
        "dual": jnp.asarray(params["dual_init"], jnp.float32),
        "updates": zero,
        "drift_at_start": zero,
        "drift_later": zero,
        "largest_probability": zero,
        "smallest_probability": zero + 1,
    }


@objectives.declare(initial_state=first_record)
def any_of_them(
    log_ratio: Array,
    advantage: Array,
    behavior_log_prob: Array,
    log_ratio_start: Array,
    state: dict[str, Array],
    which: float = 0.0,
    dual_init: float = 0.04,
    dual_rate: float = 0.01,
    delta: float = 0.04,
) -> tuple[Array, dict[str, Array]]:
    """The objective of index ``which``, so that all of them train in one program; and a record of
    what the training step filled in."""
    given = {"behavior_log_prob": behavior_log_prob, "log_ratio_start": log_ratio_start}

    def branch(name: str) -> Any:
        spec = objectives.spec(name)
        inputs = {key: given[key] for key in spec.inputs}

        def apply() -> tuple[Array, Array]:
            if spec.initial_state is None:
                return spec.function(log_ratio, advantage, **inputs), state["dual"]
            dual = {"state": state["dual"], "dual_rate": dual_rate, "delta": delta}
            return spec.function(log_ratio, advantage, **dual, **inputs)

        return apply

    surrogate, dual = jax.lax.switch(jnp.int32(which), [branch(name) for name in NAMES])
    drift = jax.lax.stop_gradient(jnp.max(jnp.abs(log_ratio - log_ratio_start)))
    at_start = state["updates"] % UPDATES == 0
    probability = jnp.exp(behavior_log_prob)
    return surrogate, {
        "dual": dual,
        "updates": state["updates"] + 1,
        "drift_at_start": jnp.maximum(state["drift_at_start"], jnp.where(at_start, drift, 0)),
        "drift_later": jnp.maximum(state["drift_later"], jnp.where(at_start, 0, drift)),
        "largest_probability": jnp.maximum(state["largest_probability"], jnp.max(probability)),
        "smallest_probability": jnp.minimum(state["smallest_probability"], jnp.min(probability)),
    }


DUALS = {
    "kept": {"dual_init": 0.1, "dual_rate": 0.0},
    "raised": {"dual_init": 0.1, "dual_rate": 0.5, "delta": 1e-6},
    "lowered": {"dual_init": 0.1, "dual_rate": 0.5, "delta": 10.0},
}


@pytest.fixture(scope="module")
def family() -> tuple[train.TrainState, train.TrainState]:
    """First and last states of a run of each objective, then of ``DUALS``; leading axis lanes."""
    config = Config(**TINY, objective=any_of_them, updates_per_iteration=UPDATES)
    domain = train.make(config)
    settings: list[dict[str, Any]] = [{"which": i} for i in range(len(NAMES))]
    settings += [{"which": NAMES.index("r2vpo"), **dual} for dual in DUALS.values()]
    lanes = stack([settings_of(config, learning_rate=0.03, **lane) for lane in settings])

    def ends(hparams: HParams) -> tuple[train.TrainState, train.TrainState]:
        first = train.init(domain, hparams)

        def body(iteration: Array, state: train.TrainState) -> train.TrainState:
            return train.train_step(domain, state, hparams, iteration)[0]

        return first, jax.lax.fori_loop(0, 8, body, first)

    return jax.jit(lambda lanes: jax.lax.map(ends, lanes))(lanes)


def test_every_objective_trains(family: tuple[train.TrainState, train.TrainState]) -> None:
    before, after = (jax.tree.map(np.asarray, state.learner.params) for state in family)
    for lane, name in enumerate(NAMES):
        assert family[1].diverged_at[lane] == -1, name
        for group in ("policy", "value"):
            old = [x[lane] for x in jax.tree.leaves(before[group])]
            new = [x[lane] for x in jax.tree.leaves(after[group])]
            assert all(np.all(np.isfinite(x)) for x in new), name
            assert any(not np.array_equal(a, b) for a, b in zip(old, new, strict=True)), name
    # Runs alike in all but the objective end apart, save where the difference lies at ratios that
    # so short a training does not reach.
    alike = {"dual_clip", "tis", "geppo", "dppo_tv", "dppo_kl"}
    ends = {
        np.concatenate([x[lane].ravel() for x in jax.tree.leaves(after)]).tobytes()
        for lane, name in enumerate(NAMES)
        if name not in alike
    }
    assert len(ends) == len(NAMES) - len(alike)


def test_objectives_get_the_inputs_they_name(
    family: tuple[train.TrainState, train.TrainState],
) -> None:
    record = family[1].learner.objective_state
    assert np.all(record["updates"] == 8 * UPDATES)
    # The policy at the start of the phase is the current one in its first update only.
    assert np.all(record["drift_at_start"] < 1e-6)
    assert np.all(record["drift_later"] > 1e-3)
    # Two actions, collected by a policy close to uniform.
    assert np.all(record["smallest_probability"] > 0)
    assert np.all(record["largest_probability"] < 1)
    assert np.all(record["largest_probability"] > 0.5)


def test_state_is_swept_and_carried_through_training(
    family: tuple[train.TrainState, train.TrainState],
) -> None:
    first, last = (np.asarray(state.learner.objective_state["dual"]) for state in family)
    lanes = dict(zip([*NAMES, *DUALS], last, strict=True))
    assert lanes["r2vpo"] != np.float32(0.04)
    assert lanes["gipo"] == np.float32(0.04)
    assert np.all(first[-len(DUALS) :] == np.float32(0.1))
    assert lanes["kept"] == np.float32(0.1)
    assert lanes["raised"] > 0.1
    assert lanes["lowered"] == 0


@pytest.mark.parametrize("name", ["dppo_tv", "dppo_kl"])
def test_probability_objectives_refuse_a_gaussian_head(name: str) -> None:
    pendulum: dict[str, Any] = {"env": "Pendulum-v1", "objective": name}
    with pytest.raises(ConfigError, match=f"action_head: 'gaussian'.*'tokens'.*{name}"):
        train.make(Config(**pendulum, action_head="gaussian"))
    train.make(Config(**pendulum, action_head="tokens"))


# ------------------------------------------------------------------ reweighting


@pytest.fixture(scope="module")
def reweighted() -> dict[str, Any]:
    """Lanes that share a state made stale by the plain rule and differ from there on."""
    config = Config(**TINY, objective="gipo")
    domain = train.make(config)
    plain = settings_of(config, learning_rate=0.03)
    varied = {
        "plain": {},
        "root": {"ess_lr_power": 0.5},
        "linear": {"ess_lr_power": 1.0},
        "kl": {"kl_coef": 3.0},
        "half_recent": {"recent_fraction": 0.5},
        "recent": {"recent_fraction": 1.0},
    }
    lanes = stack([settings_of(config, learning_rate=0.03, **v) for v in varied.values()])

    @jax.jit
    def train_and_log(state: Any, lanes: HParams, start: int, stop: int) -> Any:
        return jax.lax.map(
            lambda lane: train.train_and_log(domain, lane[0], lane[1], start, stop), (state, lanes)
        )

    same = stack([plain] * len(varied))
    first = jax.jit(lambda lanes: jax.lax.map(lambda lane: train.init(domain, lane), lanes))(same)
    stale, _ = train_and_log(first, same, 0, 20)
    once, _ = train_and_log(stale, lanes, 20, 21)
    _, metrics = train_and_log(stale, lanes, 20, 40)

    def moved(group: str) -> dict[str, float]:
        change = jax.tree.map(
            lambda a, b: jnp.sum((a - b) ** 2, axis=tuple(range(1, a.ndim))),
            once.learner.params[group],
            stale.learner.params[group],
        )
        total = np.sqrt(np.sum([np.asarray(x) for x in jax.tree.leaves(change)], axis=0))
        return dict(zip(varied, total.tolist(), strict=True))

    return {
        "policy_step": moved("policy"),
        "value_step": moved("value"),
        **{k: dict(zip(varied, np.asarray(v).tolist(), strict=True)) for k, v in metrics.items()},
    }


def test_ess_scales_the_policy_learning_rate_only(reweighted: dict[str, Any]) -> None:
    policy, value = reweighted["policy_step"], reweighted["value_step"]
    root, linear = policy["root"] / policy["plain"], policy["linear"] / policy["plain"]
    # The data is stale, so that ESS / batch < 1; the power is the one asked for.
    assert linear < 0.99
    assert root == pytest.approx(np.sqrt(linear), rel=1e-3)
    assert value["root"] == value["linear"] == value["plain"]


def test_kl_penalty_keeps_the_policy_near_the_data(reweighted: dict[str, Any]) -> None:
    assert reweighted["kl"]["kl"] < 0.7 * reweighted["kl"]["plain"]
    assert reweighted["log_ratio_abs_p95"]["kl"] < reweighted["log_ratio_abs_p95"]["plain"]


def test_recent_fraction_draws_from_the_newest_iteration(reweighted: dict[str, Any]) -> None:
    age = reweighted["policy_age"]
    assert age["recent"] == 0 == reweighted["policy_age_max"]["recent"]
    assert 0 < age["half_recent"] < 0.75 * age["plain"]
    # Half of the batch is still drawn from all of replay.
    assert reweighted["policy_age_max"]["half_recent"] > 2


def test_utilization_is_judged_against_the_start_of_the_last_update_phase() -> None:
    """Where the clips of an objective that compares with it act, counted in NumPy."""
    config = Config(**TINY, objective="geppo", updates_per_iteration=8)
    domain, hparams = train.make(config), settings_of(config, learning_rate=0.1)
    step = jax.jit(train.train_and_log, static_argnums=(0, 3, 4))
    first = jax.jit(lambda: train.init(domain, hparams))()
    before, _ = step(domain, first, hparams, 0, 3)
    after, metrics = step(domain, before, hparams, 3, 4)

    key = jax.random.fold_in(jax.random.fold_in(after.key, learner.LOG_STREAM), 3)
    index = learner.sample_indices(config, hparams, 3, jax.random.split(key)[1], 1)[0]
    rows, age = learner.gather(config, after.replay, index, 3)
    batch = domain.batch(after, after.learner.params, rows, age, hparams)
    ratios = [
        np.exp(np.asarray(domain.score(state.learner.params, batch, hparams).log_ratio, float))
        for state in (before, after)
    ]
    moved = ratios[1] - ratios[0]
    advantage = np.asarray(batch.advantage)[:, None]
    advantage = advantage - advantage.mean() if domain.standardize else advantage
    clipped = np.where(advantage > 0, moved > 0.2, moved < -0.2)
    assert 0 < clipped.mean() < 1
    assert metrics["masked_fraction"] == pytest.approx(clipped.mean(), abs=1e-6)
