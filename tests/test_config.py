"""Bad settings are refused in one line that names field, value and what would be valid."""

import dataclasses
import re
from typing import Any

import jax
import numpy as np
import pytest

from gipo_jax import objectives, train
from gipo_jax.config import (
    CONTROL,
    DOMAINS,
    FLOW,
    TOKENS,
    Config,
    ConfigError,
    HParams,
    check_applies,
    check_fields,
    stack,
)

SETTINGS: dict[str, Any] = {
    "num_envs": 4,
    "rollout_length": 8,
    "batch_size": 256,
    "total_steps": 320,
}


def error_of(config: Config, **overrides: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        train.make_hparams(config, **overrides)
    assert "\n" not in str(caught.value)
    return caught.value


BAD_CONFIG: list[tuple[str, Any]] = [
    ("env", 3),
    ("objective", 3),
    ("kernel", "box"),
    ("total_steps", 0),
    ("total_steps", 1000.0),
    ("num_envs", True),
    ("rollout_length", -1),
    ("batch_size", 0),
    ("updates_per_iteration", 0),
    ("reuse_per_batch", 0),
    ("policy_delay", 0),
    ("max_buffer_size", 0),
    ("sampling", "prioritized"),
    ("advantage_mode", "mc"),
    ("normalize_advantage", 1),
    ("action_head", "beta"),
    ("num_bins", 1),
    ("hidden_sizes", ()),
    ("hidden_sizes", (64, 0)),
    ("hidden_sizes", 64),
    ("activation", "gelu"),
    ("max_episode_steps", 0),
    ("schedule", "step"),
    ("kl", "forward"),
    ("joint_grad_norm", 1),
    ("compute_dtype", "float16"),
    ("param_dtype", "float64"),
    ("num_logs", 0),
    ("eval_episodes", -1),
]


@pytest.mark.parametrize(("field", "value"), BAD_CONFIG)
def test_bad_static_settings(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        train.make(Config(**{field: value}))
    message = str(caught.value)
    assert caught.value.field == field
    assert message.startswith(f"{field}: {value!r} is not valid; expected ")
    assert "\n" not in message


NAN, INF = float("nan"), float("inf")
BAD_HPARAMS: list[tuple[str, Any]] = [
    ("seed", -1),
    ("seed", 2**31),
    ("seed", 1.0),
    ("buffer_size", 0),
    ("learning_rate", 0.0),
    ("learning_rate", INF),
    ("learning_rate", None),
    ("min_age", -1),
    ("min_age", 0.5),
    ("value_learning_rate", -1.0),
    ("gamma", 1.01),
    ("gamma", -0.01),
    ("gamma", NAN),
    ("gae_lambda", 2),
    ("entropy_coef", -0.1),
    ("kl_coef", NAN),
    ("value_coef", 0),
    ("max_grad_norm", 0),
    ("warmup_iterations", 1.5),
    ("adam_epsilon", 0.0),
    ("reward_scale", 0),
    ("recent_fraction", 1.1),
    ("ess_lr_power", -1),
    ("sigma", 0),
    ("sigma", -1),
    ("sigma", NAN),
    ("sigma", INF),
    ("sigma", "1"),
    ("sigma_neg_ratio", 0),
]


@pytest.mark.parametrize(("field", "value"), BAD_HPARAMS)
def test_bad_traced_settings(field: str, value: Any) -> None:
    error = error_of(Config(**SETTINGS), **{field: value})
    assert error.field == field
    assert str(error).startswith(f"{field}: {value!r} is not valid; expected ")


@pytest.mark.parametrize(
    ("settings", "overrides", "message"),
    [
        ({"total_steps": 100}, {}, "total_steps: 100 .*multiple of num_envs 4 x .* = 32, .* 96"),
        ({"total_steps": 16}, {}, "total_steps: 16 .*such as 32"),
        ({}, {"buffer_size": 500}, "buffer_size: 500 .*multiple of .* = 32, such as 480"),
        ({}, {"buffer_size": 16}, "buffer_size: 16 .*such as 32"),
        ({}, {"buffer_size": 128}, "buffer_size: 128 .*at least batch_size 256"),
        ({}, {"min_age": 16}, "min_age: 16 .*less than the 16 iterations that buffer_size 512"),
        ({}, {"min_age": 9}, "buffer_size: 512 .*at least batch_size 256 beside the 288 held back"),
        ({"max_buffer_size": 500}, {}, "max_buffer_size: 500 .*multiple"),
        ({"max_buffer_size": 256}, {}, "max_buffer_size: 256 .*at least the buffer size 512"),
        (
            {"advantage_mode": "vtrace", "batch_size": 100},
            {},
            "batch_size: 100 .*multiple of rollout_length 8.*'vtrace'",
        ),
        (
            {"policy_delay": 3, "reuse_per_batch": 2},
            {},
            "policy_delay: 3 .*divisor of reuse_per_batch 2,",
        ),
        ({}, {"learning_rat": 0.1}, "learning_rat: 0.1 .*learning_rate"),
        ({"objective": "ppo_clip"}, {"sigma": 1.0}, "sigma: 1.0 .*clip_eps"),
        ({}, {"objective_params": {"sigma": -1.0}}, "sigma: -1.0"),
        ({}, {"objective_params": {"tau": 1.0}}, "tau: 1.0 .*sigma"),
        ({"objective": "gippo"}, {}, "objective: 'gippo' .*gipo"),
    ],
)
def test_settings_that_do_not_fit_each_other(
    settings: dict[str, Any], overrides: dict[str, Any], message: str
) -> None:
    error = error_of(Config(**(SETTINGS | settings)), **({"buffer_size": 512} | overrides))
    assert re.match(message, str(error))


def test_the_default_buffer_size_follows_the_block_where_it_does_not_fit() -> None:
    for envs, length, expected in ((16, 8, 512), (64, 128, 8192), (6, 8, 528)):
        sizes: dict[str, Any] = {"num_envs": envs, "rollout_length": length, "batch_size": 128}
        config = Config(total_steps=envs * length, **sizes)
        assert train.make_hparams(config).buffer_size == config.allocated_size == expected
        hparams, _ = train.grid(config, seed=[0, 1])
        assert np.array_equal(hparams.buffer_size, [expected] * 2)


def weighs_by_rank(log_ratio: Any, advantage: Any) -> Any:
    return log_ratio * advantage**3


@pytest.mark.parametrize("objective", ["awr", weighs_by_rank])
def test_the_rate_follows_ess_only_where_fresh_samples_weigh_alike(objective: Any) -> None:
    error = error_of(Config(**SETTINGS, objective=objective), ess_lr_power=0.5)
    assert str(error).startswith("ess_lr_power: 0.5 is not valid; expected 0, because")
    train.make_hparams(Config(**SETTINGS, objective=objective))


@pytest.mark.parametrize("objective", ["gipo", "r2vpo", "p3o_ess", "geppo", "dppo_tv", "gipo+sapo"])
def test_the_rate_may_follow_ess_where_fresh_samples_weigh_alike(objective: str) -> None:
    hparams = train.make_hparams(Config(**SETTINGS, objective=objective), ess_lr_power=0.5)
    assert hparams.ess_lr_power == 0.5


def test_replacement_allows_batches_larger_than_the_buffer() -> None:
    config = Config(**SETTINGS, sampling="uniform")
    assert train.make_hparams(config, buffer_size=32).buffer_size == 32


def test_bad_settings_are_found_before_anything_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(jax, "jit", never)
    for bad in ({"total_steps": 100}, {"batch_size": 0}, {"max_buffer_size": 32}):
        with pytest.raises(ConfigError):
            train.make_train(Config(**(SETTINGS | bad)))


def test_defaults_are_valid_and_resolved() -> None:
    config = Config()
    check_fields(config)
    hparams = train.make_hparams(config)
    assert hparams.value_learning_rate == hparams.learning_rate == HParams().learning_rate
    assert hparams.objective_params == objectives.spec("gipo").params
    assert hparams.objective_params["sigma"] == 1


def test_the_values_learning_rate_follows_unless_given() -> None:
    config = Config(**SETTINGS)
    for unset in ({}, {"value_learning_rate": None}):
        hparams = train.make_hparams(config, learning_rate=0.02, **unset)
        assert hparams.value_learning_rate == 0.02
    hparams = train.make_hparams(config, learning_rate=0.02, value_learning_rate=0.1)
    assert (hparams.learning_rate, hparams.value_learning_rate) == (0.02, 0.1)


def test_an_objectives_parameters_may_be_given_either_way() -> None:
    config = Config(**SETTINGS)
    flat = train.make_hparams(config, sigma=0.5)
    nested = train.make_hparams(config, objective_params={"sigma": 0.5})
    assert flat == nested
    assert flat.objective_params["sigma"] == 0.5
    assert flat.objective_params["sigma_neg_ratio"] == 1
    # The registry's defaults are untouched.
    assert train.make_hparams(config).objective_params["sigma"] == 1


def test_config_is_hashable_and_hparams_is_a_tree_of_numbers() -> None:
    assert hash(Config()) == hash(Config()) and Config() == Config()
    hparams = train.make_hparams(Config(**SETTINGS))
    leaves = jax.tree.leaves(hparams)
    scalars = len(dataclasses.fields(HParams)) - 2  # those of objective and environment
    assert len(leaves) == scalars + len(hparams.objective_params)
    assert all(isinstance(x, int | float) for x in leaves)


def test_every_field_says_what_it_is() -> None:
    for settings in (Config, HParams):
        for field in dataclasses.fields(settings):
            if field.name != "objective_params":
                assert {"help", "valid", "check"} <= set(field.metadata)


FIELDS = {f.name: f for kind in (Config, HParams) for f in dataclasses.fields(kind)}
OTHER: dict[str, Any] = {
    "policy_delay": 2,
    "advantage_mode": "vtrace",
    "kl": "exact",
    "loss_agg_mode": "seq-mean-token-sum",
    "normalize_groups": True,
    "selection": "prune",
    "num_candidates": 8,
    "depo_range": (0.0, 0.5),
    "depo_start": 1,
    "depo_learning_rate": 0.1,
    "depo_updates": 2,
    "packed_size": 8,
    "decoder_layers": 1,
    "decoder_width": 8,
    "decoder_heads": 2,
    "timestep_shift": 3.0,
    "action_head": "tokens",
    "num_bins": 5,
    "hidden_sizes": (8,),
    "value_hidden_sizes": (8,),
    "activation": "relu",
    "layer_norm": True,
    "shared_torso": True,
    "detach_value": False,
    "mlp": "fused",
    "normalize_obs": True,
    "truncation_is_termination": True,
    "max_episode_steps": 9,
    "joint_grad_norm": True,
    "value_learning_rate": 0.1,
    "gamma": 0.5,
    "gae_lambda": 0.5,
    "entropy_coef": 0.5,
    "value_coef": 1.0,
    "temperature": 0.5,
    "imitation_updates": 3,
    "env_params": {"gravity": 1.0},
}
"""Another value of every setting that some domain lacks."""


def applies(domain: str, **changed: Any) -> None:
    static = {k: v for k, v in changed.items() if hasattr(Config(), k)}
    traced = {k: v for k, v in changed.items() if k not in static}
    config = Config(**static)
    needs = objectives.spec(config.objective)
    check_applies(config, HParams(**traced), domain=domain, objective=needs)


def test_the_table_above_has_every_setting_that_some_domain_lacks() -> None:
    assert set(OTHER) == {
        n for n, f in FIELDS.items() if len(f.metadata.get("domains", DOMAINS)) < 3
    }


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("field", OTHER)
def test_a_setting_of_another_domain_is_refused_unless_at_its_default(
    domain: str, field: str
) -> None:
    applies(domain, **{field: FIELDS[field].default})
    # A value head is detached from a shared torso.
    given: dict[str, Any] = (
        {"shared_torso": True} if domain == CONTROL and field == "detach_value" else {}
    )
    if field.startswith("depo_"):
        given = {"selection": "depo"}
    if domain in FIELDS[field].metadata["domains"]:
        applies(domain, **given, **{field: OTHER[field]})
        return
    with pytest.raises(ConfigError) as caught:
        applies(domain, **{field: OTHER[field]})
    assert str(caught.value) == (
        f"{field}: {OTHER[field]!r} is not valid; expected left at {FIELDS[field].default!r}:"
        f" {DOMAINS[domain]} do not use it"
    )


@pytest.mark.parametrize(
    ("domain", "settings", "message"),
    [
        (CONTROL, {"advantage_mode": "vtrace", "gae_lambda": 0.9}, "gae_lambda: 0.9 .*'vtrace'"),
        (CONTROL, {"detach_value": False}, "detach_value: False .*left at True: shared_torso"),
        (CONTROL, {"mlp": "fused", "layer_norm": True}, "mlp: 'fused' .*without layer_norm"),
        (CONTROL, {"mlp": "fused", "shared_torso": True}, "mlp: 'fused' .*and shared_torso"),
        (CONTROL, {"mlp": "fused", "compute_dtype": "bfloat16"}, "mlp: 'fused' .*float32"),
        (CONTROL, {"action_head": "gaussian", "num_bins": 5}, "num_bins: 5 .*gaussian head"),
        (CONTROL, {"objective": "no_clip", "kernel": "cauchy"}, "kernel: 'cauchy' .*no kernel"),
        (TOKENS, {"objective": "dpo", "loss_agg_mode": "seq-mean-token-sum"}, "loss_agg.*pairs"),
        (TOKENS, {"objective": "dpo", "normalize_advantage": False}, "normalize_advantage.*pairs"),
        (TOKENS, {"objective": "dpo", "reward_scale": 2.0}, "reward_scale: 2.0 .*no reward"),
        (
            TOKENS,
            {"normalize_advantage": True, "reward_scale": 2.0},
            "reward_scale: .*standardised",
        ),
        (TOKENS, {"normalize_groups": True, "reward_scale": 2.0}, "reward_scale: .*standardised"),
        (TOKENS, {"objective": "dpo", "normalize_groups": True}, "normalize_groups: .*no reward"),
        (FLOW, {"reward_scale": 2.0}, "reward_scale: 2.0 .*left at 1.0: standardised"),
    ],
)
def test_a_setting_that_another_one_switches_off_is_refused(
    domain: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        applies(domain, **settings)
    assert re.match(message, str(caught.value)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("domain", "settings"),
    [
        (CONTROL, {"advantage_mode": "recomputed", "gae_lambda": 0.9}),
        (CONTROL, {"shared_torso": True, "detach_value": False}),
        (CONTROL, {"objective": "gipo", "kernel": "cauchy"}),
        (CONTROL, {"reward_scale": 2.0}),
        (TOKENS, {"reward_scale": 2.0}),
        (TOKENS, {"normalize_advantage": False, "reward_scale": 2.0}),
        (FLOW, {"normalize_advantage": False, "reward_scale": 2.0}),
        # As a complete run has it.
        (TOKENS, {"learning_rate": 0.1, "value_learning_rate": 0.1}),
    ],
)
def test_a_setting_that_does_something_is_taken(domain: str, settings: dict[str, Any]) -> None:
    applies(domain, **settings)


def test_integers_stay_integers_when_runs_are_stacked() -> None:
    stacked = stack([HParams(objective_params={"sigma": 1})] * 2)
    integers = {n for n, v in vars(stacked).items() if getattr(v, "dtype", None) == np.int32}
    assert integers == {"seed", "buffer_size", "min_age", "warmup_iterations", "imitation_updates"}
    assert np.asarray(stacked.objective_params["sigma"]).dtype == np.float32


def test_sizes() -> None:
    config = Config(**SETTINGS)
    assert (config.block_size, config.num_iterations) == (32, 10)
    assert train.log_boundaries(dataclasses.replace(config, num_logs=3)) == [3, 6, 10]
    assert train.log_boundaries(dataclasses.replace(config, num_logs=99)) == list(range(1, 11))
