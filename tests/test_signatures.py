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
from gipo_jax.sweep import grid

NAMES = list(objectives.REGISTRY)


def test_every_objective_documents_its_weight_and_source() -> None:
    for name in NAMES:
        spec = objectives.spec(name)
        doc = spec.function.__doc__ or ""
        assert "weight" in doc or "direction" in doc or name == "dppo_kl"
        assert spec.kind in signatures.KINDS
        no_paper = name in ("no_clip", "proximal_gipo", "adaptive_gipo")
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
    batch = ["p3o_ess", "m2po", "m2po_mask", "r2vpo", "adaptive_gipo"]
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
    spec = objectives.spec(partial(objectives.dppo_kl, delta_low=0.1))
    assert spec.name == "dppo_kl" and spec.discrete_only
    assert spec.params == {"delta_low": 0.1, "delta_high": 0.05, "max_ratio": 20.0}


def no_advantage(log_ratio: jax.Array, weight: float = 1.0) -> jax.Array:
    return log_ratio


def unknown_input(log_ratio: jax.Array, advantage: jax.Array, reward: jax.Array) -> jax.Array:
    return log_ratio


def flagged(log_ratio: jax.Array, advantage: jax.Array, flag: bool = True) -> jax.Array:
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
        (flagged, ["flagged", "flag", "numeric default"]),
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


SWITCHED = ["gipo", "maspo", "ppo_clip", "geppo", "p3o_ess", "r2vpo", "dppo_tv", "tis"]


def test_a_switch_has_the_parameters_on_whose_default_its_objectives_agree() -> None:
    spec = objectives.spec(objectives.switch(SWITCHED))
    assert spec.name == "+".join(SWITCHED) and spec.choices == tuple(SWITCHED)
    assert (
        spec.params["which"] == 0 and spec.params["sigma"] == 1 and spec.params["clip_eps"] == 0.2
    )
    assert "max_ratio" not in spec.params  # 2 for tis, 20 for dppo_tv
    assert spec.inputs == ("log_ratio_start", "behavior_log_prob")
    assert spec.takes_kernel and spec.takes_mask and spec.discrete_only and spec.kind == "batch"
    assert {"sigma", "clip_eps", "max_log_ratio"} <= set(spec.positive)
    state = signatures.first_state(spec, spec.params | {"dual_init": 0.5})
    assert state == {"r2vpo": 0.5}


@pytest.mark.parametrize("name", SWITCHED)
def test_a_switch_is_the_objective_of_its_index(name: str) -> None:
    x, start, behavior = (jax.random.normal(jax.random.key(i), (6, 3)) for i in range(3))
    advantage = jnp.where(x + start > 0, 1.0, -0.5)
    mask = jnp.arange(3) < 2
    given = {
        "log_ratio_start": start,
        "behavior_log_prob": -jnp.abs(behavior) - 0.1,
        "mask": jnp.broadcast_to(mask, x.shape),
        "kernel": "cauchy",
        "sigma": 0.7,
        "clip_eps": 0.4,
        "dual_rate": 0.5,
    }
    one = objectives.spec(name)
    takes = {*one.inputs, *one.params, *("kernel",) * one.takes_kernel, *("mask",) * one.takes_mask}
    own = {key: value for key, value in given.items() if key in takes}
    of_all = objectives.spec(objectives.switch(SWITCHED))
    first = {"state": {"r2vpo": jnp.float32(0.2)}}
    own |= {"state": jnp.float32(0.2)} if one.initial_state is not None else {}

    def surrogate(spec: signatures.Spec, given: dict[str, Any], x: jax.Array) -> Any:
        value, state = signatures.evaluate(spec, x, advantage, **given)
        return jnp.sum(value), (value, state)

    gradient = jax.grad(surrogate, argnums=2, has_aux=True)
    wanted, (value, state) = gradient(one, own, x)
    which = {"which": jnp.float32(SWITCHED.index(name))}
    got, (same_value, states) = gradient(of_all, given | first | which, x)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    np.testing.assert_allclose(same_value, value, rtol=1e-6)
    assert states["r2vpo"] == (state if name == "r2vpo" else jnp.float32(0.2))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["gipo", "gippo"], ["objective", "'gippo'", "ppo_clip"]),
        (["gipo", "gspo"], ["gipo+gspo", "one ratio level", "sequence", "token"]),
        (["dpo", "dpo"], ["dpo", "pairs"]),
    ],
)
def test_a_switch_of_objectives_that_share_no_program_is_refused(
    names: list[str], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        objectives.switch(names)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("which", [-1, 2, 0.5, math.nan, "gipo"])
def test_an_index_beyond_the_objectives_of_a_switch_is_refused(which: Any) -> None:
    with pytest.raises(ConfigError, match=r"which: .* expected 0 for gipo, 1 for ppo_clip$"):
        train.make_hparams(Config(objective="gipo+ppo_clip"), which=which)


def test_a_sweep_over_a_switch_is_one_program_and_survives_json() -> None:
    runs = sweep.expand(objective="gipo+ppo_clip", which=[0, 1], sigma=0.5)
    assert len({run.config for run in runs}) == 1
    assert [run.hparams.objective_params["which"] for run in runs] == [0, 1]
    assert grid.decode(grid.encode(runs)) == runs


def test_a_preset_is_an_objective_a_ratio_level_and_parameters() -> None:
    x, advantage = jnp.linspace(-2, 2, 9), jnp.where(jnp.arange(9) % 2, 1.0, -1.0)
    presets = {"minpro": ("cispo", "prefix_min"), "topr_joint": ("topr", "joint")}
    for name, (of, level) in (presets | {"vespo_joint": ("vespo", "joint")}).items():
        alone, preset = objectives.spec(of), objectives.spec(name)
        assert (preset.name, preset.ratio_level, preset.params) == (name, level, alone.params)
        np.testing.assert_array_equal(preset.function(x, advantage), alone.function(x, advantage))
    gspo = objectives.spec("gspo")
    assert (gspo.ratio_level, gspo.source) == ("sequence", "arXiv:2507.18071")
    assert gspo.params == {"eps_low": 3e-4, "eps_high": 4e-4} and set(gspo.positive) == {
        *gspo.params
    }
    alike = gspo.function(x, advantage, eps_low=0.3, eps_high=0.3)
    np.testing.assert_array_equal(alike, objectives.ppo_clip(x, advantage, 0.3))
    assert objectives.spec("minpro").source == "arXiv:2601.22718"
    assert objectives.vespo_joint is objectives.KNOWN["vespo_joint"]


def test_an_old_name_works_and_says_the_new_one() -> None:
    words = "objective following_gipo is called adaptive_gipo now"
    with pytest.warns(DeprecationWarning, match=words):
        assert objectives.spec("following_gipo").name == "adaptive_gipo"
    with pytest.warns(DeprecationWarning, match=words):
        assert objectives.following_gipo is objectives.adaptive_gipo
    with pytest.warns(DeprecationWarning, match=words):
        runs = sweep.expand(objective="following_gipo", mean_weight=0.6)
    stored = grid.encode(runs)
    assert stored[0]["config"]["objective"] == "following_gipo"
    assert grid.settings_of_runs(stored)[0]["objective"] == "adaptive_gipo"
    with pytest.raises(AttributeError, match="no_such_name"):
        objectives.no_such_name  # type: ignore[attr-defined]  # noqa: B018
