"""Networks that compute, or keep their parameters, in bfloat16, in every domain."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments import spaces
from jax.flatten_util import ravel_pytree

from gipo_jax import losses, train
from gipo_jax.config import Config
from gipo_jax.domains.flow import tasks as densities
from gipo_jax.domains.tokens import tasks
from tests import programs

SMALL: dict[str, Any] = {
    "num_envs": 4,
    "rollout_length": 8,
    "batch_size": 32,
    "total_steps": 4 * 32,
    "max_buffer_size": 64,
    "num_logs": 1,
    "eval_episodes": 4,
}


def in_control(toy: Any) -> tuple[Config, Any]:
    """Every part of the network: shared torso, LayerNorm, tokens, and an exact KL."""
    env = toy(pay=1.0, clock=True, actions=spaces.Box(-1, 1, (2,)))
    own: dict[str, Any] = {
        "hidden_sizes": (16, 8),
        "shared_torso": True,
        "layer_norm": True,
        "kl": "exact",
    }
    return Config(env=env, num_bins=5, **own, **SMALL), None


def with_gaussian_actions(toy: Any) -> tuple[Config, Any]:
    env = toy(pay=1.0, clock=True, actions=spaces.Box(-1, 1, (2,)))
    return Config(env=env, action_head="gaussian", hidden_sizes=(16,), **SMALL), None


def on_tokens(toy: Any) -> tuple[Config, Any]:
    own: dict[str, Any] = {"decoder_layers": 1, "decoder_width": 16, "decoder_heads": 2}
    return Config(env=tasks.reverse(length=4), **own, **SMALL), None


def of_flows(toy: Any) -> tuple[Config, Any]:
    task = densities.make("flow/ring")._replace(pretrain_steps=3, pretrain_batch=16)
    return Config(env="flow/ring", hidden_sizes=(16,), **SMALL), task


DOMAINS = [in_control, with_gaussian_actions, on_tokens, of_flows]


def types(tree: Any) -> set[str]:
    """Types of the floating-point numbers of a tree."""
    leaves = jax.tree.leaves(tree)
    return {str(x.dtype) for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "domain_of",
    [
        in_control,
        on_tokens,
        *(pytest.param(d, marks=pytest.mark.long) for d in (with_gaussian_actions, of_flows)),
    ],
)
def test_parameters_and_optimizer_are_bfloat16_and_the_rest_is_float32(
    toy: Any, domain_of: Any
) -> None:
    config, env = domain_of(toy)
    config = dataclasses.replace(config, compute_dtype="bfloat16", param_dtype="bfloat16")
    hparams = train.make_hparams(config, buffer_size=64, learning_rate=0.01, kl_coef=0.1)
    domain = train.make(config, env)
    first = jax.eval_shape(lambda: train.init(domain, hparams))
    state, metrics = jax.jit(train.make_train(config, env))(hparams)
    for at in (first, state):
        assert types((at.learner.params, at.learner.opt_state)) == {"bfloat16"}
        assert types((at.replay, at.domain_state, at.totals)) == {"float32"}
    assert {name: x.dtype for name, x in metrics.items() if x.dtype != jnp.float32} == {}
    finite = {name for name, x in metrics.items() if np.all(np.isfinite(x))}
    learned = {"policy_loss", "kl", "grad_norm", "ess", "log_ratio_abs_p95", "eval_return"}
    assert learned <= finite and state.diverged_at == -1
    assert metrics["grad_norm"] > 0
    start = jax.jit(lambda: train.init(domain, hparams))()
    moved = jax.tree.map(lambda x, y: jnp.any(x != y), start.learner.params, state.learner.params)
    assert any(jax.tree.leaves(moved))


@pytest.mark.parametrize("domain_of", DOMAINS)
def test_gradients_computed_in_bfloat16_point_the_way_of_float32(toy: Any, domain_of: Any) -> None:
    """Of the same float32 parameters and data, moved apart from the policy that acted."""
    config, env = domain_of(toy)
    hparams = train.make_hparams(config, buffer_size=64, kl_coef=0.1)
    full = train.make(config, env)
    half = train.make(dataclasses.replace(config, compute_dtype="bfloat16"), env)

    @jax.jit
    def gradients() -> Any:
        state = train.init(full, hparams)
        rows = full.collect(state, hparams, jax.random.key(1)).rows
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
        advantage = jax.random.normal(jax.random.key(2), rows.advantage.shape)
        rows = rows._replace(advantage=advantage)
        vector, unravel = ravel_pytree(state.learner.params)
        params = unravel(vector + 0.05 * jax.random.normal(jax.random.key(3), vector.shape))

        def of(domain: Any) -> Any:
            batch = domain.batch(state, params, rows, jnp.zeros(len(advantage), int), hparams)

            def loss(params: Any) -> Any:
                return losses.loss(domain, state, state.learner, params, batch, hparams)[0]

            return jax.grad(loss)(params), domain.score(params, batch, hparams)

        return of(full), of(half)

    (expected, _), (found, scores) = gradients()
    assert types(found) == types(scores) == {"float32"}
    for group in expected:
        a, b = (ravel_pytree(tree[group])[0] for tree in (expected, found))
        cosine = jnp.vdot(a, b) / jnp.linalg.norm(a) / jnp.linalg.norm(b)
        assert cosine > 0.95, group
        assert np.any(a != b)


# In a program of its own, since the setting counts for all of a process.
DOUBLE = """
import jax
import jax.numpy as jnp
import numpy as np
from gipo_jax import losses, train
from gipo_jax.config import Config

assert jnp.zeros(()).dtype == jnp.float64
small = dict(total_steps=64, batch_size=32, eval_episodes=0, num_logs=2, hidden_sizes=(4,))
config = Config(objective="r2vpo", normalize_obs=True, **small)
state, metrics = jax.jit(train.make_train(config))(train.make_hparams(config))
assert {x.dtype for x in jax.tree.leaves(state.learner.params)} == {jnp.dtype("float32")}
assert int(state.diverged_at) == -1 and np.isfinite(metrics["policy_loss"][-1])

for given in (jnp.float32, jnp.float64):
    x = jnp.array([[0.3, -0.4]], given)
    loss, metrics = losses.policy_loss(x, x * 0, jnp.array([1.0]), objective="r2vpo")
    ratio = np.exp(np.asarray(x, float))
    expected = -np.mean(ratio - 0.04 * ((ratio - 1) ** 2 - 0.04))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert loss.dtype == given and metrics["state"].dtype == jnp.float32
    given = {"objective": "r2vpo", "state": metrics["state"]}
    again = losses.policy_loss(x, x * 0, jnp.array([1.0]), **given)
    assert again[1]["state"].dtype == jnp.float32
print("done")
"""


@pytest.mark.slow
def test_double_precision_trains_and_gives_losses() -> None:
    done = programs.run("-c", DOUBLE, JAX_ENABLE_X64="1")
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr


@pytest.mark.parametrize("domain_of", DOMAINS)
def test_products_behind_log_ratios_keep_all_bits_of_float32_on_any_device(
    toy: Any, domain_of: Any
) -> None:
    """On GPUs and TPUs the default is fewer: ratios on fresh data would not be 1."""
    domain = train.make(*domain_of(toy))
    hparams = train.make_hparams(domain.config, buffer_size=64)

    def gradient(state: Any, rows: Any) -> Any:
        batch = domain.batch(
            state, state.learner.params, rows, jnp.zeros(len(rows[0]), int), hparams
        )

        def log_ratio(params: Any) -> Any:
            return jnp.sum(domain.score(state.learner.params | params, batch, hparams).log_ratio)

        return jax.grad(log_ratio)({"policy": state.learner.params["policy"]})

    state = jax.eval_shape(lambda: train.init(domain, hparams))
    one_batch = lambda x: jax.ShapeDtypeStruct((16, *x.shape[2:]), x.dtype)  # noqa: E731
    rows = jax.tree.map(one_batch, domain.block)
    products = [
        line
        for line in jax.jit(gradient).lower(state, rows).as_text().splitlines()
        if "stablehlo.dot_general" in line
    ]
    assert len(products) > 2
    assert [line for line in products if "precision = [HIGHEST, HIGHEST]" not in line] == []
