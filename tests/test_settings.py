"""Every setting does something in each of its domains, and is refused in all others.

A short run of each domain is the base, and one setting is changed to another valid value. A traced
setting has to change final parameters or metrics; all of them run in one program. A static setting
has to change the program, without the parts that parameters and metrics do not depend on: compiling
one for each would take minutes.
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import numpy as np
import pytest
from gymnax.environments import spaces
from jax.interpreters import partial_eval

from gipo_jax import train
from gipo_jax.config import CONTROL, DOMAINS, FLOW, TOKENS, Config, ConfigError, HParams

pytestmark = pytest.mark.slow

FIELDS = {f.name: f for kind in (Config, HParams) for f in dataclasses.fields(kind) if f.metadata}
STATIC = {field.name for field in dataclasses.fields(Config)}

SHARED: dict[str, Any] = {
    "num_envs": 2,
    "rollout_length": 4,
    "batch_size": 8,
    "reuse_per_batch": 2,
    "total_steps": 32,
    "max_buffer_size": 32,
    "num_logs": 2,
    "eval_episodes": 0,
    # Data soon becomes stale, and gradients are clipped.
    "buffer_size": 32,
    "learning_rate": 0.05,
    "max_grad_norm": 0.05,
    "kl_coef": 0.1,
}
BASE: dict[str, dict[str, Any]] = {
    CONTROL: SHARED
    | {
        "hidden_sizes": (4, 4),
        "num_bins": 3,
    },
    TOKENS: SHARED
    | {
        "env": "tokens/reverse",
        "decoder_layers": 1,
        "decoder_width": 4,
        "decoder_heads": 1,
    },
    FLOW: SHARED | {"env": "flow/ring", "hidden_sizes": (4,)},
}
NEEDED: dict[str, dict[str, Any]] = {
    "detach_value": {"shared_torso": True},
    "num_candidates": {"selection": "depo"},
    "depo_range": {"selection": "depo"},
    "depo_start": {"selection": "depo"},
    "depo_learning_rate": {"selection": "depo"},
    "depo_updates": {"selection": "depo"},
    "action_head": {"num_bins": Config.num_bins},
}
"""Without which a setting is refused."""

OTHER: dict[str, Any] = {
    "objective": "ppo_clip",
    "kernel": "laplacian",
    "total_steps": 24,
    "num_envs": 4,
    "rollout_length": 2,
    "batch_size": 4,
    "updates_per_iteration": 2,
    "reuse_per_batch": 3,
    "policy_delay": 2,
    "max_buffer_size": 64,
    "sampling": "uniform",
    "advantage_mode": "recomputed",
    "ratio_level": "joint",
    "kl": "exact",
    "loss_agg_mode": "seq-mean-token-sum",
    "selection": "prune",
    "num_candidates": 3,
    "depo_range": (0.0, 0.5),
    "depo_start": 1,
    "depo_learning_rate": 0.1,
    "depo_updates": 2,
    "packed_size": 6,
    "decoder_layers": 2,
    "decoder_width": 8,
    "decoder_heads": 2,
    "timestep_shift": 3.0,
    "action_head": "gaussian",
    "num_bins": 5,
    "hidden_sizes": (8, 4),
    "value_hidden_sizes": (8,),
    "activation": "relu",
    "layer_norm": True,
    "shared_torso": True,
    "detach_value": False,
    "mlp": "fused",
    "compute_dtype": "bfloat16",
    "param_dtype": "bfloat16",
    "normalize_obs": True,
    "truncation_is_termination": True,
    "max_episode_steps": 2,
    "normalize_groups": True,
    "joint_grad_norm": True,
    "schedule": "cosine",
    "num_logs": 1,
    "eval_episodes": 2,
    "seed": 1,
    "buffer_size": 16,
    "min_age": 1,
    "learning_rate": 0.1,
    "value_learning_rate": 0.1,
    "gamma": 0.5,
    "gae_lambda": 0.5,
    "entropy_coef": 1.0,
    "kl_coef": 1.0,
    "value_coef": 1e-4,
    "max_grad_norm": 1e-4,
    "adam_epsilon": 0.01,
    "warmup_iterations": 4,
    "reward_scale": 1e-3,
    "recent_fraction": 1.0,
    "ess_lr_power": 1.0,
    "temperature": 0.5,
    "imitation_updates": 2,
    "env_params": {"bonus": 1.0},
}
"""Another valid value of each setting."""

OTHER_IN: dict[tuple[str, str], Any] = {
    (CONTROL, "env"): "Pendulum-v1",
    (TOKENS, "env"): "tokens/add",
    (FLOW, "env"): "flow/moons",
    (CONTROL, "normalize_advantage"): False,
    (TOKENS, "normalize_advantage"): True,
    (FLOW, "normalize_advantage"): False,
}
"""Where it depends on the domain."""


@pytest.fixture(scope="module", autouse=True)
def _control_environment(toy: Any) -> None:
    """Episodes of three steps, whose time limit is reached within a rollout."""
    actions = spaces.Box(-1, 1, (2,))
    BASE[CONTROL]["env"] = toy(limit=3, pay=1.0, clock=True, actions=actions)


def other_value(domain: str, field: str) -> Any:
    return OTHER_IN[domain, field] if (domain, field) in OTHER_IN else OTHER[field]


def split(settings: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    static = {name: value for name, value in settings.items() if name in STATIC}
    return Config(**static), {name: x for name, x in settings.items() if name not in STATIC}


def make(config: Config, traced: dict[str, Any]) -> tuple[Any, HParams]:
    """A run and its traced settings."""
    return train.make_train(config), train.make_hparams(config, **traced)


def results(state: Any, metrics: Any) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves((state.learner.params, metrics))]


@functools.cache
def program(domain: str, *changed: tuple[str, Any]) -> str:
    """What is computed for parameters and metrics, as text."""
    run, hparams = make(*split(BASE[domain] | dict(changed)))

    def outputs(hparams: HParams) -> Any:
        state, metrics = run(hparams)
        return state.learner.params, metrics

    closed = jax.make_jaxpr(outputs)(hparams)
    used, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    read = {id(x) for equation in used.eqns for x in equation.invars}
    named = zip(closed.jaxpr.constvars, closed.consts, strict=True)
    constants = [np.asarray(x).tolist() for variable, x in named if id(variable) in read]
    return re.sub("0x[0-9a-f]+", "", f"{used} {constants}")  # addresses of functions


def same(one: list[np.ndarray], two: list[np.ndarray]) -> bool:
    return len(one) == len(two) and all(
        x.dtype == y.dtype and np.array_equal(x, y, equal_nan=True)
        for x, y in zip(one, two, strict=True)
    )


@functools.cache
def of_traced(domain: str, standardized: bool) -> dict[str, list[np.ndarray]]:
    """Results by the traced setting that is changed, of one program; "" is the base, twice."""
    base = BASE[domain] | ({} if standardized else {"normalize_advantage": False})
    config, traced = split(base)
    if domain == CONTROL:
        traced["env_params"] = {"bonus": 0.0}  # runs side by side vary the same parameters
    names = [n for n in FIELDS if n not in STATIC and domain in FIELDS[n].metadata["domains"]]
    if standardized and domain == FLOW:
        names.remove("reward_scale")
    rows = [traced, *(traced | {name: other_value(domain, name)} for name in names), traced]
    hparams = train.stack([train.make_hparams(config, **row) for row in rows])
    # One after another: side by side, XLA on a small busy CPU has stood still on token tasks.
    run = functools.partial(jax.lax.map, train.make_train(config))
    state, metrics = jax.jit(run)(hparams)
    found = [results(*train.select((state, metrics), index)) for index in range(len(rows))]
    assert same(found[0], found[-1])
    return dict(zip(["", *names], found, strict=False))


def test_the_tables_have_every_setting() -> None:
    assert set(OTHER) | {field for _, field in OTHER_IN} == set(FIELDS)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("domain", DOMAINS)
def test_a_setting_does_something_or_is_refused(domain: str, field: str) -> None:
    if domain not in FIELDS[field].metadata["domains"]:
        config, traced = split(BASE[domain] | {field: OTHER[field]})
        with pytest.raises(ConfigError, match=f"^{field}: "):
            make(config, traced)
        return
    if field not in STATIC:
        found = of_traced(domain, (domain, field) != (FLOW, "reward_scale"))
        assert not same(found[field], found[""])
        return
    needed = tuple(NEEDED.get(field, {}).items())
    assert program(domain, *needed, (field, other_value(domain, field))) != program(domain, *needed)


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_text_of_a_program_has_nothing_but_what_is_computed(domain: str) -> None:
    """Else every setting would seem to change it."""
    text = program(domain)
    program.cache_clear()
    assert program(domain) == text
