"""Action heads against SciPy, and the networks' shapes, towers and gradients."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments import spaces
from scipy import special, stats

from gipo_jax import environments, networks
from gipo_jax.config import Config, ConfigError


def head_of(**settings: Any) -> networks.ActionHead:
    config = Config(**settings)
    return networks.make_head(config, environments.make(config))


# ------------------------------------------------------------------ heads


def test_discrete_actions_are_one_token() -> None:
    head = head_of(env="Acrobot-v1")
    assert (head.num_tokens, head.output_width, head.discrete) == (1, 3, True)
    assert np.array_equal(head.to_env(jnp.array([[2], [0]])), [2, 0])


@pytest.mark.parametrize("bins", [2, 11, 256])
@pytest.mark.parametrize(
    ("env", "low", "high", "dimensions"),
    [("Pendulum-v1", -2, 2, 1), ("PointRobot-misc", -0.1, 0.1, 2), ("Swimmer-misc", -1, 1, 2)],
)
def test_tokens_span_the_box(env: str, low: float, high: float, dimensions: int, bins: int) -> None:
    head = head_of(env=env, num_bins=bins)
    assert (head.num_tokens, head.output_width, head.discrete) == (dimensions, bins, True)
    tokens = jnp.tile(jnp.arange(bins)[:, None], (1, dimensions))
    actions = np.asarray(head.to_env(tokens))
    assert actions.shape == (bins, dimensions) and actions.dtype == np.float32
    np.testing.assert_allclose(actions[0], low, rtol=1e-6)
    np.testing.assert_allclose(actions[-1], high, rtol=1e-6)
    np.testing.assert_allclose(np.diff(actions, axis=0), (high - low) / (bins - 1), rtol=1e-3)


def test_gaussian_actions_are_scaled_and_clipped_to_the_box() -> None:
    head = head_of(env="Pendulum-v1", action_head="gaussian")
    assert (head.num_tokens, head.output_width, head.discrete) == (1, 2, False)
    actions = head.to_env(jnp.array([[0.0], [0.5], [1.0], [7.0], [-7.0]]))
    np.testing.assert_allclose(actions[:, 0], [0, 1, 2, 2, -2])


def test_actions_are_shaped_as_the_box(toy: Any) -> None:
    head = head_of(env=toy(actions=spaces.Box(-1, 1, (2, 3))), num_bins=3)
    assert head.num_tokens == 6
    action = head.to_env(jnp.zeros((5, 4, 6), jnp.int32))
    assert action.shape == (5, 4, 2, 3)


def test_heads_that_do_not_fit_are_refused(toy: Any) -> None:
    with pytest.raises(ConfigError, match=r"action_head: 'gaussian' .*discrete actions"):
        head_of(env="CartPole-v1", action_head="gaussian")
    free = toy(actions=spaces.Box(-np.inf, np.inf, (2,)))
    with pytest.raises(ConfigError, match=r"action_head: 'auto' .*'gaussian'.*unbounded"):
        head_of(env=free)
    head = head_of(env=free, action_head="gaussian")
    assert np.array_equal(head.to_env(jnp.array([[30.0, -2.0]])), [[30, -2]])


LOGITS = np.array([[0.3, -1.2, 2.0, 0.0], [5.0, 5.0, -5.0, -30.0]], np.float32)


def test_categorical_is_scipy() -> None:
    head = head_of(env="SpaceInvaders-MinAtar")
    logits = jnp.asarray(LOGITS)[:, None]
    log_probs = special.log_softmax(LOGITS.astype(float), axis=-1)
    for action in range(4):
        ours = head.log_prob(logits, jnp.full((2, 1), action))
        assert ours.shape == (2, 1)
        np.testing.assert_allclose(ours[:, 0], log_probs[:, action], rtol=1e-5, atol=1e-6)
    entropy = head.entropy(logits)
    assert entropy.shape == (2, 1)
    np.testing.assert_allclose(entropy[:, 0], stats.entropy(np.exp(log_probs), axis=-1), rtol=1e-5)
    assert np.array_equal(head.mode(logits), [[2], [0]])


def test_categorical_samples_have_their_probabilities() -> None:
    head = head_of(env="SpaceInvaders-MinAtar")
    number = 20_000
    noise = head.noise(jax.random.key(0), (number, 2))
    assert noise.shape == (number, 2, 1)
    action = np.asarray(head.sample(jnp.asarray(LOGITS)[:, None], noise))[..., 0]
    assert action.dtype == np.int32
    expected = special.softmax(LOGITS.astype(float), axis=-1) * number
    first = np.bincount(action[:, 0], minlength=4)
    assert stats.chisquare(first, expected[0]).pvalue > 1e-4
    second = np.bincount(action[:, 1], minlength=4)
    assert stats.binomtest(second[0], number, expected[1, 0] / number).pvalue > 1e-4
    assert second[3] == 0


def test_categorical_never_samples_what_has_no_probability() -> None:
    """Not even for the extreme random numbers, where the sum of probabilities rounds below 1."""
    head = head_of(env="Pendulum-v1", num_bins=256)
    logits = jax.random.normal(jax.random.key(0), (500, 1, 256)).at[:, :, -1].set(-200.0)
    logits = logits.at[:, :, 0].set(-200.0)
    largest = np.float32(1 - 2**-23)
    for extreme in (0.0, largest):
        action = head.sample(logits, jnp.full((500, 1), extreme))
        assert np.all((action > 0) & (action < 255))


def test_gaussian_is_scipy() -> None:
    head = head_of(env="Reacher-misc", action_head="gaussian")
    mean, log_std = np.array([0.3, -2.0], np.float32), np.array([-1.0, 0.4], np.float32)
    outputs = jnp.stack([jnp.asarray(mean), jnp.asarray(log_std)], axis=-1)
    normal: Any = stats.norm(mean, np.exp(log_std))
    action = jnp.array([[0.5, -3.0], [-0.2, 1.0], [4.0, 0.0]])
    np.testing.assert_allclose(
        head.log_prob(outputs, action), normal.logpdf(np.asarray(action)), rtol=1e-4
    )
    np.testing.assert_allclose(head.entropy(outputs), normal.entropy(), rtol=1e-5)
    np.testing.assert_allclose(head.mode(outputs), mean)
    samples = np.asarray(head.sample(outputs, head.noise(jax.random.key(0), (5000,))))
    assert samples.shape == (5000, 2)
    for i in range(2):
        assert (
            stats.kstest(samples[:, i], stats.norm(mean[i], np.exp(log_std[i])).cdf).pvalue > 1e-3
        )


@pytest.mark.parametrize("bins", [5, 11])
def test_kl_of_categories_is_scipys(bins: int) -> None:
    head = networks.categorical(3, bins)
    old, new = 2 * np.random.default_rng(bins).normal(size=(2, 4, 3, bins))
    expected = stats.entropy(special.softmax(old, -1), special.softmax(new, -1), axis=-1)
    found = head.kl(jnp.asarray(old, jnp.float32), jnp.asarray(new, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_kl_of_gaussians_is_the_closed_form() -> None:
    head = head_of(env="Reacher-misc", action_head="gaussian")
    old, new = np.random.default_rng(0).normal(size=(2, 20, 2, 2))
    spread, new_spread = np.exp(old[..., 1]), np.exp(new[..., 1])
    squares = spread**2 + (old[..., 0] - new[..., 0]) ** 2
    expected = np.log(new_spread / spread) + squares / (2 * new_spread**2) - 0.5
    found = head.kl(jnp.asarray(old, jnp.float32), jnp.asarray(new, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("action_head", ["tokens", "gaussian"])
def test_kl_is_least_and_zero_at_equal_outputs(action_head: str) -> None:
    head = head_of(env="Reacher-misc", action_head=action_head)
    shape = (50, head.num_tokens, head.output_width)
    old, way = (jax.random.normal(jax.random.key(i), shape) for i in range(2))

    def total(outputs: jax.Array) -> jax.Array:
        return jnp.sum(head.kl(old, outputs))

    gradient = quick(jax.grad(total))
    np.testing.assert_allclose(head.kl(old, old), 0, atol=1e-6)
    np.testing.assert_allclose(gradient(old), 0, atol=1e-6)
    assert np.all(head.kl(old, old + 0.1 * way) > 0)
    assert np.sum(way * gradient(old + 0.1 * way)) > 0


@pytest.mark.parametrize("env", ["Acrobot-v1", "Pendulum-v1"])
def test_log_prob_is_differentiable(env: str) -> None:
    """The gradient is one-hot minus probabilities, however the log-probability is computed."""
    head = head_of(env=env, num_bins=3)
    logits = jnp.array([[0.5, -0.3, 1.0]])
    gradient = jax.grad(lambda x: head.log_prob(x, jnp.array([1]))[0])(logits)
    expected = np.eye(3)[1] - special.softmax([0.5, -0.3, 1.0])
    np.testing.assert_allclose(gradient[0], expected, rtol=1e-4)


# ------------------------------------------------------------------ networks


# Compiling takes nearly all the time here, and half of that is optimisation.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
quick = partial(jax.jit, compiler_options=QUICK)


def network_of(obs_shape: tuple[int, ...], **settings: Any) -> networks.Network:
    config = Config(**({"hidden_sizes": (8, 6)} | settings))
    head = networks.make_head(config, environments.make(config))
    return networks.make(config, obs_shape, head)


def build(obs_shape: tuple[int, ...], **settings: Any) -> tuple[networks.Network, Any]:
    network = network_of(obs_shape, **settings)
    return network, quick(network.init)(jax.random.key(0))


def params_of(**settings: Any) -> Any:
    """Shapes of the parameters of a network for four numbers and two actions."""
    return jax.eval_shape(network_of((4,), **settings).init, jax.random.key(0))


def shapes(params: Any) -> list[tuple[int, ...]]:
    return sorted(x.shape for x in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("obs_shape", "shared"), [((4,), False), ((3, 5), True), ((5, 5, 2), False), ((5, 5, 2), True)]
)
def test_outputs_have_the_leading_shape_of_observations(
    obs_shape: tuple[int, ...], shared: bool
) -> None:
    network = network_of(obs_shape, shared_torso=shared, env="Reacher-misc", num_bins=7)

    @quick
    def run() -> Any:
        params = network.init(jax.random.key(0))
        obs = jax.random.normal(jax.random.key(1), (2, 3, *obs_shape))
        return {
            "both": network.policy_and_value(params, obs),
            "apart": (network.policy(params, obs), network.value(params, obs)),
            "one": network.policy_and_value(params, obs[1, 2]),
        }

    result = run()
    outputs, value = result["both"]
    assert outputs.shape == (2, 3, 2, 7) and value.shape == (2, 3)
    for ours, apart, one in zip(*result.values(), strict=True):
        np.testing.assert_allclose(ours, apart, atol=1e-6)
        # One by one as all together: no mixing across the batch.
        np.testing.assert_allclose(ours[1, 2], one, atol=1e-5)


def test_separate_towers_take_the_sizes_they_are_given() -> None:
    params = params_of(value_hidden_sizes=(5,))
    assert shapes(params["policy"]) == [(2,), (4, 8), (6,), (6, 2), (8,), (8, 6)]
    assert shapes(params["value"]) == [(1,), (4, 5), (5,), (5, 1)]
    assert shapes(params_of()["value"]) == [(1,), (4, 8), (6,), (6, 1), (8,), (8, 6)]


def test_a_shared_torso_is_in_the_policys_group() -> None:
    params = params_of(shared_torso=True)
    assert shapes(params["policy"]["torso"]) == [(4, 8), (8,)]
    assert shapes(params["policy"]["tower"]) == [(6,), (8, 6)]
    assert shapes(params["value"]) == [(1,), (6,), (6, 1), (8, 6)]


@pytest.mark.parametrize(
    ("shared", "detach", "reaches"),
    [(False, True, False), (True, True, False), (True, False, True)],
)
def test_the_value_trains_the_torso_only_if_attached(
    shared: bool, detach: bool, reaches: bool
) -> None:
    network, params = build((4,), shared_torso=shared, detach_value=detach)
    obs = jax.random.normal(jax.random.key(1), (3, 4))
    for value in (network.value, lambda p, x: network.policy_and_value(p, x)[1]):
        gradient = quick(jax.grad(lambda p, value=value: jnp.sum(value(p, obs))))(params)
        moved = any(bool(jnp.any(x != 0)) for x in jax.tree.leaves(gradient["policy"]))
        assert moved == reaches
        assert any(bool(jnp.any(x != 0)) for x in jax.tree.leaves(gradient["value"]))
    gradient = quick(jax.grad(lambda p: jnp.sum(network.policy(p, obs) ** 2)))(params)
    assert all(bool(jnp.all(x == 0)) for x in jax.tree.leaves(gradient["value"]))


def test_layer_norm_makes_outputs_blind_to_the_scale_of_hidden_layers() -> None:
    obs = jax.random.normal(jax.random.key(1), (3, 4))

    def doubled(params: Any) -> Any:
        """All hidden layers' outputs twice as large: ReLU is homogeneous."""
        towers = {k: {"tower": jax.tree.map(lambda x: 2 * x, params[k]["tower"])} for k in params}
        return {k: params[k] | towers[k] for k in params}

    for layer_norm in (False, True):
        network, params = build((4,), activation="relu", layer_norm=layer_norm, hidden_sizes=(16,))
        scaled = doubled(params)
        if layer_norm:
            for k in params:
                scaled[k]["tower"]["params"]["LayerNorm_0"] = params[k]["tower"]["params"][
                    "LayerNorm_0"
                ]
        value = quick(network.value)
        change = jnp.max(jnp.abs(value(scaled, obs) - value(params, obs)))
        assert (change < 1e-3) == layer_norm


def _convolved(params: Any, x: jax.Array, kernel: int, stride: int) -> jax.Array:
    """XLA's own convolution with the kernel of a dense layer over patches, and its ReLU."""
    steps = kernel // stride
    dense = params["kernel"].reshape(steps, steps, stride, stride, x.shape[-1], -1)
    filters = dense.transpose(0, 2, 1, 3, 4, 5).reshape(kernel, kernel, x.shape[-1], -1)
    numbers = ("NHWC", "HWIO", "NHWC")
    strides = (stride, stride)
    y = jax.lax.conv_general_dilated(x, filters, strides, "VALID", dimension_numbers=numbers)
    return jax.nn.relu(y + params["bias"])


@pytest.mark.parametrize(
    ("shape", "layers"),
    [((2, 6, 5, 3), [(3, 1)]), ((2, 45, 54, 4), [(8, 4), (4, 2), (3, 1)])],
    ids=["MinAtar", "Atari"],
)
def test_patches_are_a_convolution(shape: tuple[int, ...], layers: list[tuple[int, int]]) -> None:
    """Sides that the strides do not divide lose the same rows and columns at the end."""
    torso = networks.Torso(hidden_sizes=(), activation="relu", layer_norm=False, conv=True)
    obs = jax.random.normal(jax.random.key(0), shape)
    params = torso.init(jax.random.key(1), obs)
    expected = obs
    for number, (kernel, stride) in enumerate(layers):
        expected = _convolved(params["params"][f"Dense_{number}"], expected, kernel, stride)
    ours: Any = torso.apply(params, obs)
    np.testing.assert_allclose(ours, expected.reshape(len(obs), -1), atol=1e-4)


def test_large_images_go_through_strided_convolutions() -> None:
    """84 x 84 x 4 frames become 7 x 7 x 64 features, as in DQN."""
    torso = networks.Torso(hidden_sizes=(5,), activation="relu", layer_norm=False, conv=True)
    frames = jax.random.uniform(jax.random.key(0), (2, 3, 84, 84, 4))
    params = jax.eval_shape(torso.init, jax.random.key(1), frames)
    found = sorted(x.shape for x in jax.tree.leaves(params) if len(x.shape) > 1)
    assert found == [(8 * 8 * 4, 32), (4 * 4 * 32, 64), (3 * 3 * 64, 64), (7 * 7 * 64, 5)]
    assert jax.eval_shape(torso.apply, params, frames).shape == (2, 3, 5)


def test_a_gaussian_policy_starts_centred_with_a_spread_of_its_own() -> None:
    network, params = build((4,), env="Reacher-misc", action_head="gaussian")
    outputs = network.policy(params, jax.random.normal(jax.random.key(1), (50, 4)))
    assert np.abs(outputs[..., 0]).max() < 0.1
    assert np.all(outputs[..., 1] == outputs[0, :, 1])


def test_seeds_give_different_parameters() -> None:
    network, params = build((4,))
    other = quick(network.init)(jax.random.key(1))
    kernels = [
        (a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True)
        if a.ndim == 2
    ]  # fmt: skip
    assert kernels and all(bool(jnp.any(a != b)) for a, b in kernels)
