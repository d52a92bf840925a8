"""Bad settings are refused in one line that names field, value and what would be valid."""

import dataclasses
import re
from typing import Any

import jax
import pytest

from gipo_jax import objectives, train
from gipo_jax.config import Config, ConfigError, HParams, check_fields

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
    scalars = len(dataclasses.fields(HParams)) - 1
    assert len(leaves) == scalars + len(hparams.objective_params)
    assert all(isinstance(x, int | float) for x in leaves)


def test_every_field_says_what_it_is() -> None:
    for settings in (Config, HParams):
        for field in dataclasses.fields(settings):
            if field.name != "objective_params":
                assert {"help", "valid", "check"} <= set(field.metadata)


def test_sizes() -> None:
    config = Config(**SETTINGS)
    assert (config.block_size, config.num_iterations) == (32, 10)
    assert train.log_boundaries(dataclasses.replace(config, num_logs=3)) == [3, 6, 10]
    assert train.log_boundaries(dataclasses.replace(config, num_logs=99)) == list(range(1, 11))
