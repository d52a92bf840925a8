"""Forms for accelerators, run on CPU: they compute what the forms for CPU do."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gipo_jax import buffer, networks, packed, rollout, train
from gipo_jax.config import Config
from gipo_jax.environments import make as make_env
from gipo_jax.networks import categorical


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a program for another platform than CPU would compute."""

    def default_form(*operands: Any, default: Any, **_: Any) -> Any:
        return default(*operands)

    monkeypatch.setattr(jax.lax, "platform_dependent", default_form)


@pytest.mark.optimized
@pytest.mark.parametrize(
    "env",
    ["CartPole-v1", pytest.param("Breakout-MinAtar", marks=pytest.mark.long), "tokens/reverse"],
)
def test_an_iteration_in_the_form_for_accelerators_agrees(
    env: str, request: pytest.FixtureRequest
) -> None:
    # Replay of 24 rows in the first iteration: no power of two, so that the permutation walks.
    small: dict[str, Any] = (
        {"decoder_width": 16, "decoder_layers": 1} if env.startswith("tokens/") else {}
    )
    config = Config(
        env=env, num_envs=3, rollout_length=8, batch_size=12, updates_per_iteration=3,
        total_steps=24, num_logs=1, eval_episodes=0, max_buffer_size=48, **small,
    )  # fmt: skip
    hparams = train.make_hparams(config, seed=1, buffer_size=48)

    def trained() -> Any:
        state, metrics = jax.jit(train.make_train(config))(hparams)
        return jax.tree.map(np.asarray, (state.learner, metrics))

    expected = trained()
    request.getfixturevalue("elsewhere")
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), trained(), expected
    )


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("size", [1, 3, 129, 1000, 4096])
def test_the_permutation_of_a_fixed_walk_is_that_of_one_until_all_are_inside(size: int) -> None:
    words = jax.random.bits(jax.random.key(size), (4, 2), jnp.uint32)
    image = np.asarray(jax.jit(buffer.permute)(words, jnp.arange(size), size))
    assert np.array_equal(np.sort(image), np.arange(size))


def test_few_categories_and_many_give_the_same_distribution(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    logits, old = jax.random.normal(keys[0], (2, 50, 3, 5))
    action = jax.random.randint(keys[1], (50, 3), 0, 5)
    uniform = jax.random.uniform(keys[2], (50, 3))

    def everything() -> Any:
        head = categorical(3, 5)

        def values(logits: Any) -> Any:
            kl = head.kl(old, logits)
            return head.log_prob(logits, action), head.entropy(logits), kl

        gradients = jax.jacrev(lambda x: [jnp.sum(y) for y in values(x)])(logits)
        return head.sample(logits, uniform), values(logits), gradients

    few = everything()
    monkeypatch.setattr(networks, "FEW_CATEGORIES", 0)
    many = everything()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), few, many)


def test_packed_scan_gives_the_bits_of_scan() -> None:
    """Negative zeros, NaN of any kind, flags, bytes, halves and integers pass unchanged."""

    def step(carry: Any, x: Any) -> tuple[Any, Any]:
        bits = jax.lax.bitcast_convert_type(x, jnp.float32)
        results = {
            "float": bits, "pair": jnp.stack([bits, -bits]), "flag": x % 2 == 0, "none": None,
            "int": x.astype(jnp.int32), "byte": x.astype(jnp.uint8), "half": x.astype(jnp.bfloat16),
        }  # fmt: skip
        return carry + 1, results

    inputs = jax.random.bits(jax.random.key(0), (100,), jnp.uint32).at[0].set(0x7FC00001)
    ours, plain = (scan(step, 0, inputs) for scan in (packed.scan, jax.lax.scan))
    structures: list[Any] = [jax.tree.structure(tree) for tree in (ours, plain)]
    assert structures[0] == structures[1]
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_packing_leaves_keys_alone() -> None:
    tree = {"key": jax.random.key(3), "x": jnp.arange(3), "flag": jnp.array(True)}
    vectors, unpack = packed.pack(tree)
    found = unpack(vectors)
    assert jnp.all(jax.random.key_data(found["key"]) == jax.random.key_data(tree["key"]))
    assert jnp.array_equal(found["x"], tree["x"]) and found["flag"] == tree["flag"]


@pytest.mark.parametrize(("limit", "once"), [(12, True), (5, False)])
def test_values_after_steps_are_those_of_the_observations_that_steps_led_to(
    limit: int, once: bool
) -> None:
    """With a time limit that cuts episodes once in a rollout, and more often."""
    config = Config(
        env="Pendulum-v1",
        num_envs=4,
        rollout_length=12,
        max_episode_steps=limit,
        total_steps=48,
    )
    domain: Any = train.make(config)
    assert domain.cut_once == once
    envs = rollout.reset(make_env(config), jax.random.key(0), 4)
    params = domain.network.init(jax.random.key(1))
    moments = domain.init(train.make_hparams(config, buffer_size=480), jax.random.key(2))[
        1
    ].normalizer

    def acted(envs: Any, key: Any, length: int) -> Any:
        policy = lambda obs: domain.network.policy(params, obs)  # noqa: E731
        return rollout.collect(domain.env, domain.head, policy, envs, key, length)

    envs = acted(envs, jax.random.key(3), 7)[0]
    rows = acted(envs, jax.random.key(4), 12)[1]
    assert rows.truncated.any() and not rows.truncated[-1].any()
    found = domain._values(params, moments, rows)
    expected = tuple(domain.network.value(params, x) for x in (rows.obs, rows.final_obs))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, expected
    )
