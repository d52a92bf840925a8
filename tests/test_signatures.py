"""What an objective's signature says, and what is refused with one line."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gipo_jax import objectives, signatures, sweep, train
from gipo_jax.config import Config, ConfigError

NAMES = list(objectives.REGISTRY)


def test_every_objective_documents_its_weight_and_source() -> None:
    for name in NAMES:
        spec = objectives.spec(name)
        doc = spec.function.__doc__ or ""
        assert "weight" in doc or "direction" in doc or name == "dppo_kl"
        assert spec.kind in signatures.KINDS
        no_paper = name in ("no_clip", "proximal_gipo", "following_gipo")
        assert no_paper or (spec.source.startswith("arXiv:") and spec.source in doc)


def test_spec_reads_signature_and_declaration() -> None:
    spec = objectives.spec("gipo")
    assert spec.params == {"sigma": 1.0, "sigma_neg_ratio": 1.0, "weight_clamp": math.inf}
    assert spec.takes_kernel and spec.kind == "per-sample" and not spec.inputs
    assert objectives.spec("geppo").inputs == ("log_ratio_start",)
    assert objectives.spec("dppo_kl").inputs == ("behavior_log_prob",)
    assert [n for n in NAMES if objectives.spec(n).discrete_only] == ["dppo_tv", "dppo_kl"]
    assert [n for n in NAMES if objectives.spec(n).initial_state] == ["r2vpo"]
    kinds = {n: objectives.spec(n).kind for n in NAMES}
    batch = ["p3o_ess", "m2po", "m2po_mask", "r2vpo", "following_gipo"]
    assert [n for n in NAMES if kinds[n] == "batch"] == batch
    other_input = ["geppo", "decoupled_ppo", "proximal_gipo", "dppo_tv", "dppo_kl"]
    assert [n for n in NAMES if kinds[n] == "other-input"] == other_input


def test_a_plain_function_is_an_objective() -> None:
    def mine(log_ratio: jax.Array, advantage: jax.Array, power: float = 2) -> jax.Array:
        return jnp.exp(log_ratio * power) * advantage

    spec = objectives.spec(mine)
    assert spec.name == "mine" and spec.params == {"power": 2.0}
    assert spec.kind == "per-sample" and not spec.positive and spec.initial_state is None
    weight = objectives.gradient_weight(mine, jnp.array([0.0, 1.0]), 3.0, power=0.5)
    np.testing.assert_allclose(weight, 0.5 * np.exp([0.0, 0.5]), rtol=1e-6)


def test_a_partial_keeps_what_its_function_declares() -> None:
    spec = objectives.spec(partial(objectives.dppo_kl, delta=0.1))
    assert spec.name == "dppo_kl" and spec.discrete_only
    assert spec.params == {"delta": 0.1, "max_ratio": 20.0}


def no_advantage(log_ratio: jax.Array, weight: float = 1.0) -> jax.Array:
    return log_ratio


def unknown_input(log_ratio: jax.Array, advantage: jax.Array, reward: jax.Array) -> jax.Array:
    return log_ratio


def switch(log_ratio: jax.Array, advantage: jax.Array, flag: bool = True) -> jax.Array:
    return log_ratio


def stateless(log_ratio: jax.Array, advantage: jax.Array, state: jax.Array) -> jax.Array:
    return log_ratio


@objectives.declare(initial_state=lambda params: jnp.zeros(()))
def never_takes_state(log_ratio: jax.Array, advantage: jax.Array) -> jax.Array:
    return log_ratio


@objectives.declare(positive=("sigma",))
def misdeclared(log_ratio: jax.Array, advantage: jax.Array, width: float = 1.0) -> jax.Array:
    return log_ratio


def settings_as_parameters(
    log_ratio: jax.Array, advantage: jax.Array, gamma: float = 1.0, kl_coef: float = 0.5
) -> jax.Array:
    return log_ratio


def static_setting(
    log_ratio: jax.Array, advantage: jax.Array, batch_size: float = 1.0
) -> jax.Array:
    return log_ratio


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (settings_as_parameters, ["settings_as_parameters", "'gamma'", "another name", "setting"]),
        (static_setting, ["static_setting", "'batch_size'", "another name"]),
        (partial(settings_as_parameters, gamma=0.5), ["settings_as_parameters", "'gamma'"]),
        ("gippo", ["objective", "'gippo'", "ppo_clip", "dppo_kl"]),
        (no_advantage, ["no_advantage", "log_ratio and advantage"]),
        (print, ["print", "log_ratio and advantage"]),
        (unknown_input, ["unknown_input", "reward", "numeric default", "behavior_log_prob"]),
        (switch, ["switch", "flag", "numeric default"]),
        (stateless, ["stateless", "state", "initial_state"]),
        (never_takes_state, ["never_takes_state", "state"]),
        (misdeclared, ["misdeclared", "sigma", "width"]),
    ],
)
def test_spec_errors_name_what_is_wrong(objective: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        objectives.spec(objective)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted(signatures.SETTINGS - {"kernel"}))
def test_no_parameter_may_have_the_name_of_a_setting(name: str) -> None:
    names: dict[str, Any] = {}
    exec(f"def mine(log_ratio, advantage, {name}=1.0): return log_ratio", names)
    with pytest.raises(ConfigError, match=f"objective mine: '{name}'.*setting of every run"):
        objectives.spec(names["mine"])


def test_a_setting_reaches_the_run_and_never_the_objective() -> None:
    """With a parameter called gamma, the discount would stay at its default."""
    config = Config(objective=settings_as_parameters)
    with pytest.raises(ConfigError, match="gamma"):
        train.make_hparams(config, gamma=0.5)
    with pytest.raises(ConfigError, match="gamma"):
        sweep.expand(objective=settings_as_parameters, gamma=[0.5, 0.9])


def test_declare_refuses_an_unknown_kind() -> None:
    with pytest.raises(ConfigError, match="per-sample"):
        objectives.declare(kind="sequence")


def test_unknown_kernel_is_refused() -> None:
    with pytest.raises(ConfigError, match="laplacian"):
        objectives.gipo(jnp.zeros(1), jnp.ones(1), kernel="box")


@pytest.mark.parametrize(
    ("objective", "params", "words"),
    [
        ("gipo", {"sigma": 0.0}, ["sigma", "0.0", "> 0"]),
        ("gipo", {"sigma": -1}, ["sigma", "-1", "> 0"]),
        ("gipo", {"sigma": math.nan}, ["sigma", "nan"]),
        ("gipo", {"sigma": math.inf}, ["sigma", "inf"]),
        ("gipo", {"sigma": "wide"}, ["sigma", "'wide'", "number"]),
        ("gipo", {"sigma": True}, ["sigma", "True"]),
        ("gipo", {"weight_clamp": 0.0}, ["weight_clamp", "> 0"]),
        ("gipo", {"tau": 1.0}, ["gipo", "'tau'", "sigma_neg_ratio"]),
        ("no_clip", {"sigma": 1.0}, ["no_clip", "'sigma'", "no parameters"]),
        ("r2vpo", {"dual_rate": math.nan}, ["dual_rate", "finite"]),
    ],
)
def test_check_params_names_what_is_wrong(
    objective: str, params: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        signatures.check_params(objectives.spec(objective), params)
    assert all(word in str(error.value) for word in words)


def test_check_params_accepts_what_is_usable() -> None:
    for name in NAMES:
        signatures.check_params(objectives.spec(name), objectives.spec(name).params)
    for name, params in (
        ("gipo", {"sigma": 3, "weight_clamp": math.inf}),
        ("r2vpo", {"dual_rate": 0.0}),
        ("vespo", {"k_pos": 0}),
        ("biris", {"alpha": 0}),
    ):
        signatures.check_params(objectives.spec(name), params)


def test_effective_weight_at_zero_advantage_is_that_of_a_negative_one() -> None:
    x = jnp.linspace(-1, 1, 5)
    for name in ("gipo", "ppo_clip", "sapo"):
        np.testing.assert_array_equal(
            objectives.gradient_weight(name, x, 0.0), objectives.gradient_weight(name, x, -1.0)
        )


def test_first_state_has_definite_types() -> None:
    @objectives.declare(initial_state=lambda params: {"a": params["start"], "b": 1})
    def counting(log_ratio, advantage, state, start=2.0):  # type: ignore[no-untyped-def]
        return log_ratio * advantage, state

    state = signatures.first_state(objectives.spec(counting), {"start": 2.0})
    assert state["a"].dtype == jnp.float32 and state["b"].dtype == jnp.int32
    assert not state["a"].weak_type and not state["b"].weak_type
    assert signatures.first_state(objectives.spec("gipo"), {}) == ()


def test_gradient_weight_checks_what_an_objective_returns() -> None:
    @objectives.declare(initial_state=lambda params: jnp.zeros(2))
    def grows(log_ratio, advantage, state):  # type: ignore[no-untyped-def]
        return log_ratio * advantage, jnp.zeros(3)

    with pytest.raises(ConfigError, match=r"float32\[3\].*like the one before, float32\[2\]"):
        objectives.gradient_weight(grows, jnp.zeros(4), 1.0)
