"""A protocol is complete, valid, and builds what the publication describes."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gipo_jax import environments, networks, objectives, protocols, sweep, train
from gipo_jax.config import CONTROL, Config, ConfigError, HParams, check_applies

CONFIG_FIELDS = {field.name for field in dataclasses.fields(Config)}
HPARAM_FIELDS = {field.name for field in dataclasses.fields(HParams)}


@pytest.mark.parametrize("name", protocols.PROTOCOLS)
def test_a_protocol_sets_everything_but_what_an_experiment_varies(name: str) -> None:
    given = set(protocols.settings(name))
    varied = {"env", "objective", "kernel", "seed", "objective_params"}
    # What is switched off by default and not of these papers.
    off = {"max_buffer_size", "max_episode_steps", "env_params", "recent_fraction", "ess_lr_power"}
    off |= {"mlp"}  # the same network
    assert given <= CONFIG_FIELDS | HPARAM_FIELDS
    assert (CONFIG_FIELDS | HPARAM_FIELDS) - given >= varied
    # Settings of other domains are refused in control, so there is nothing to choose.
    fields = [*dataclasses.fields(Config), *dataclasses.fields(HParams)]
    others = {f.name for f in fields if CONTROL not in f.metadata.get("domains", ())}
    missing = (CONFIG_FIELDS | HPARAM_FIELDS) - given - varied - off - others
    assert not missing, "each is a choice that the protocol has to make"
    protocol = protocols.PROTOCOLS[name]
    for setting in (protocol.settings | protocol.objective_params).values():
        assert setting.source and "\n" not in setting.source


@pytest.mark.parametrize("name", protocols.PROTOCOLS)
def test_a_protocol_has_nothing_that_would_do_nothing(name: str) -> None:
    values = protocols.settings(name)
    config = Config(**{k: v for k, v in values.items() if k in CONFIG_FIELDS})
    hparams = train.make_hparams(config, **{k: v for k, v in values.items() if k in HPARAM_FIELDS})
    check_applies(config, hparams, domain=CONTROL, objective=objectives.spec("gipo"))


@pytest.mark.parametrize(
    ("name", "different"),
    [
        (
            "gipo-metaworld",
            {
                "total_steps": 5_000_000,
                "updates_per_iteration": 5,
                "reuse_per_batch": 2,
                "policy_delay": 2,
                "sigma_neg_ratio": 1.0,
            },
        ),
        (
            "gipo-metaworld-head",
            {
                "total_steps": 500_000,
                "updates_per_iteration": 10,
                "reuse_per_batch": 10,
                "policy_delay": 10,
                "sigma_neg_ratio": 0.5,
            },
        ),
    ],
)
def test_gipo_metaworld_trains_as_the_authors_do(name: str, different: dict[str, Any]) -> None:
    shared = {
        "kl": "exact",
        "kl_coef": 0.1,
        "joint_grad_norm": True,
        "max_grad_norm": 1.0,
        "adam_epsilon": 1e-8,
        "compute_dtype": "float32",
        "param_dtype": "float32",
        "warmup_iterations": 10,
        "buffer_size": 20_000,
    }
    values = protocols.settings(name) | protocols.objective_params(name, {"sigma_neg_ratio"})
    assert values | shared | different == values


def test_a_protocols_parameter_goes_to_the_objectives_that_have_it() -> None:
    small: dict[str, Any] = {"total_steps": 1000, "env": "Pendulum-v1", "num_logs": 2}
    both = sweep.expand(protocol="gipo-metaworld-head", objective=["gipo", "ppo_clip"], **small)
    assert both[0].hparams.objective_params["sigma_neg_ratio"] == 0.5
    assert "sigma_neg_ratio" not in both[1].hparams.objective_params
    alone = sweep.expand(protocol="gipo-metaworld-head", objective="ppo_clip", **small)
    assert alone == both[1:]
    given = sweep.expand(protocol="gipo-metaworld-head", sigma_neg_ratio=2.0, **small)
    assert given[0].hparams.objective_params["sigma_neg_ratio"] == 2.0


def meta_world() -> environments.Environment:
    """Spaces of a Meta-World task, which need no simulator."""
    env = environments.make(Config(env="Pendulum-v1"))
    bound = np.ones(4, np.float32)
    return dataclasses.replace(
        env, obs_shape=(39,), action_shape=(4,), action_low=-bound, action_high=bound
    )  # fmt: skip


def test_gipo_metaworld_is_valid_and_its_network_is_the_authors() -> None:
    values = protocols.settings("gipo-metaworld")
    config = Config(**{k: v for k, v in values.items() if k in CONFIG_FIELDS})
    hparams = {k: v for k, v in values.items() if k in HPARAM_FIELDS}
    made = train.make_hparams(config, seed=22, **hparams)
    assert made.value_learning_rate == 3e-3 and made.buffer_size == 20_000
    assert config.num_iterations == 10_000

    head = networks.make_head(config, meta_world())
    assert (head.num_tokens, head.output_width) == (4, 256)
    tokens = jnp.array([[0, 255, 128, 51]])
    np.testing.assert_allclose(head.to_env(tokens), -1 + 2 * np.asarray(tokens) / 255, atol=1e-6)

    network = networks.make(config, (39,), head)
    params = jax.eval_shape(network.init, jax.random.key(0))
    kernels = {
        group: sorted(x.shape for x in jax.tree.leaves(params[group]) if x.ndim == 2)
        for group in params
    }
    assert kernels["policy"] == sorted([(39, 512), (512, 512), (512, 4 * 256)])
    assert kernels["value"] == sorted([(512, 256), (256, 1)])
    # Weights, biases, and scale and shift of a LayerNorm after each hidden layer.
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    layers = [(39, 512), (512, 512), (512, 1024), (512, 256), (256, 1)]
    assert count == sum(a * b + b for a, b in layers) + 2 * (512 + 512 + 256)


@pytest.mark.slow
def test_the_value_loss_of_gipo_metaworld_leaves_the_encoder_alone() -> None:
    values = protocols.settings("gipo-metaworld") | {"hidden_sizes": (8, 8)}
    config = Config(**{k: v for k, v in values.items() if k in CONFIG_FIELDS})
    network = networks.make(config, (39,), networks.make_head(config, meta_world()))
    params = network.init(jax.random.key(0))
    obs = jax.random.normal(jax.random.key(1), (3, 39))
    grads = jax.grad(lambda params: network.value(params, obs).sum())(params)
    assert not any(np.any(x) for x in jax.tree.leaves(grads["policy"]))
    assert any(np.any(x) for x in jax.tree.leaves(grads["value"]))


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^protocol: 'ppo' .*one of gipo-metaworld, gipo-meta"):
        protocols.settings("ppo")
