"""Preference training: pairs, the DPO loss in closed form, pools of pairs, and learning."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gipo_jax import buffer, losses, objectives, train
from gipo_jax.config import Config, ConfigError, stack
from gipo_jax.domains.tokens import preference, selection, tasks

PROMPTS, ANSWERS = 8, 4
BLOCK = PROMPTS * ANSWERS
TASK = tasks.reverse_mixed(1, 1)._replace(
    demonstration=None,
    # So that an untrained policy is right often enough, in answers of either length.
    exact=lambda prompt, answer: answer[0] == prompt[0],
)
SMALL = Config(
    env=TASK,
    objective="dpo",
    num_envs=PROMPTS,
    rollout_length=ANSWERS,
    batch_size=BLOCK,
    total_steps=4 * BLOCK,
    num_logs=4,
    max_buffer_size=BLOCK,
    eval_episodes=4,
    decoder_layers=1,
    decoder_width=8,
    decoder_heads=2,
)


def settings(config: Config, **given: Any) -> Any:
    return train.make_hparams(config, **{"buffer_size": config.max_buffer_size} | given)


def test_a_pair_is_a_right_and_a_random_wrong_answer_of_one_group() -> None:
    exact = jnp.array([[1, 0, 1], [0, 0, 1], [0, 0, 1], [1, 0, 1]], bool)
    keys = jax.random.split(jax.random.key(0), 1000)
    right, wrong, exists = map(np.asarray, jax.vmap(lambda k: preference.pair(exact, k))(keys))
    np.testing.assert_array_equal(exists[0], [[True, False, False]] * 4)
    assert np.all(np.isin(right[..., 0], (0, 3))) and np.all(np.isin(wrong[..., 0], (1, 2)))
    # Each answer is in its own pair, with partners that are equally likely.
    assert np.all(right[:, 0, 0] == 0) and np.all(wrong[:, 1, 0] == 1)
    assert abs(np.mean(wrong[:, 0, 0] == 1) - 0.5) < 0.06
    assert abs(np.mean(right[:, 1, 0] == 0) - 0.5) < 0.06


def test_dpo_and_its_trust_weight_are_their_formula() -> None:
    rng = np.random.default_rng(1)
    x, y, margin = rng.normal(size=(3, 50))
    pair = 1.0 * (np.arange(50) % 3 > 0)
    given = [jnp.asarray(v, jnp.float32) for v in (x, pair, margin, y)]
    plain = objectives.dpo(*given, beta=0.7)
    np.testing.assert_allclose(plain, -pair * np.log1p(np.exp(-0.7 * margin)), atol=1e-6)
    weighted = objectives.dpo(*given, beta=0.7, pair_sigma=0.9)
    np.testing.assert_allclose(weighted, plain * np.exp(-(x**2 + y**2) / (2 * 0.9**2)), atol=1e-6)


def act(config: Config) -> Any:
    """Domain, state before, and one iteration's pairs of a policy unlike its reference."""
    domain = train.make(config)
    hparams = settings(config, entropy_coef=0.0, beta=0.5, pair_sigma=2.0, temperature=0.8)

    def first() -> Any:
        state = train.init(domain, hparams)
        moved = jax.tree.map(lambda x: x + 0.05, state.domain_state.reference)
        state = state._replace(domain_state=state.domain_state._replace(reference=moved))
        return state, domain.collect(state, hparams, jax.random.key(4)).rows

    return domain, hparams, *jax.jit(first)()


@pytest.mark.slow
def test_the_gradient_of_a_batch_of_stale_pairs_is_that_of_dpo_in_closed_form() -> None:
    domain, hparams, state, rows = act(SMALL)
    batch, _ = buffer.take_rows(buffer.add(state.replay, rows, 0), jnp.arange(BLOCK), 0)
    is_pair = np.asarray(batch.advantage)
    assert 0 < is_pair.sum() < BLOCK, "rows with and without a pair"
    params = jax.tree.map(lambda x: x + 0.03, state.learner.params)
    exact = jax.vmap(lambda p, a: tasks.is_exact(domain.env, p, a))
    pairs = is_pair > 0
    assert np.all(exact(batch.prompt, batch.answer)[pairs])
    assert not np.any(exact(batch.prompt, batch.wrong.answer)[pairs])

    def total(params: Any, answer: Any) -> Any:
        log_prob, _ = domain.decoder.score(params, batch.prompt, answer, 0.8)
        return jnp.sum(jnp.where(domain.decoder.mask(answer), log_prob, 0), axis=1)

    @jax.jit
    def measured() -> Any:
        def bound(params: Any) -> Any:
            made = domain.batch(state, params, batch, jnp.zeros(BLOCK), hparams)
            return losses.loss(domain, state, state.learner, params, made, hparams)[0]

        both = [batch.answer, batch.wrong.answer]
        policy = params["policy"]
        return (
            jax.grad(bound)(params)["policy"],
            [total(policy, answer) for answer in both],
            [total(state.domain_state.reference, answer) for answer in both],
            [jax.jacrev(total)(policy, answer) for answer in both],
        )

    found, now, reference, jacobian = jax.device_get(measured())
    right, wrong = (np.asarray(x, float) for x in now)
    margin = right - wrong - (reference[0] - reference[1])
    np.testing.assert_allclose(batch.wrong.reference_margin, reference[0] - reference[1], atol=1e-5)
    x, y = (
        v - np.asarray(b).sum(axis=1)
        for v, b in ((right, batch.behavior_log_prob), (wrong, batch.wrong.behavior_log_prob))
    )
    assert np.abs(x).max() > 0.1
    trust_weight = np.exp(-(x**2 + y**2) / (2 * 2.0**2))
    factor = is_pair * trust_weight * 0.5 / (1 + np.exp(0.5 * margin)) / BLOCK

    def expected(for_right: Any, for_wrong: Any) -> Any:
        return -np.tensordot(factor, np.asarray(for_right, float) - for_wrong, axes=1)

    for got, want in zip(
        jax.tree.leaves(found), jax.tree.leaves(jax.tree.map(expected, *jacobian)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(found))
    assert largest > 1e-2


def test_low_margin_takes_the_lowest_margins_of_each_pool_alike() -> None:
    chosen = selection.low_margin(0.5)
    # Groups with 1, 2 and 3 right answers of 4, and one without a wrong answer.
    exact = jnp.arange(4)[:, None] < jnp.array([1, 2, 3, 4])
    is_pair = jnp.broadcast_to(jnp.array([1.0, 1, 1, 0]), (4, 4))
    margin = jax.random.normal(jax.random.key(0), (4, 4))
    nothing = jnp.zeros(())
    group = selection.Group(nothing, nothing, nothing, nothing, exact, is_pair, margin)
    weight = np.asarray(chosen.select(group, (), jax.random.key(1)))
    assert np.all(weight[:, 3] == 0)
    for prompt in range(3):
        # Half of 16 pairs in three pools: 3 each, the lowest margins of the group.
        kept = weight[:, prompt] > 0
        assert kept.sum() == 3
        assert margin[:, prompt][kept].max() < margin[:, prompt][~kept].min()


def test_the_old_name_of_low_margin_works_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="selection sage is called low_margin now"):
        domain: Any = train.make(dataclasses.replace(SMALL, selection="sage"))
    assert domain.selection.name == "low_margin"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chosen", "parameters"),
    [
        pytest.param("keep_all", {}, marks=pytest.mark.long),
        ("low_margin", {"pair_sigma": 3.0, "beta": 0.3}),
    ],
)
def test_dpo_raises_exact_match_from_a_warm_up(chosen: str, parameters: dict[str, float]) -> None:
    config = dataclasses.replace(
        SMALL, env=tasks.reverse(length=4), selection=chosen, num_envs=16, rollout_length=8,
        batch_size=128, max_buffer_size=256, total_steps=128 * 60, num_logs=1,
        eval_episodes=200, decoder_width=16,
    )  # fmt: skip
    rows = [
        settings(
            config, seed=seed, learning_rate=3e-3, imitation_updates=10, entropy_coef=0.0,
            objective_params=parameters,
        )
        for seed in (0, 1)
    ]  # fmt: skip
    domain = train.make(config)

    def before_and_after(hparams: Any) -> Any:
        warm = domain.acting(train.init(domain, hparams))
        before = domain.evaluate(warm, hparams, jax.random.key(1), 200)["eval_return_sampled"]
        state, metrics = train.whole_run(domain)(hparams)
        return before, metrics["eval_return_sampled"][-1], state.diverged_at

    program = jax.jit(lambda h: jax.lax.map(before_and_after, h))
    before, after, diverged_at = program(stack(rows))
    assert np.all((before > 0.1) & (before < 0.5))
    assert np.all(after > 0.85)
    assert np.all(diverged_at == -1)


@pytest.mark.parametrize(
    ("field", "changed"),
    [
        ("ratio_level", {"ratio_level": "token"}),
        ("loss_agg_mode", {"loss_agg_mode": "seq-mean-token-sum"}),
        ("normalize_advantage", {"normalize_advantage": True}),
        ("reward_scale", {"reward_scale": 2.0}),
        ("beta", {"beta": 0.0}),
        ("objective", {"env": "CartPole-v1"}),
        ("objective", {"env": "flow/ring"}),
    ],
)
def test_settings_that_do_not_fit_pairs_are_refused(field: str, changed: dict[str, Any]) -> None:
    fields = {name: x for name, x in changed.items() if hasattr(SMALL, name)}
    others = {name: x for name, x in changed.items() if name not in fields}
    config = dataclasses.replace(SMALL, **fields)
    if "env" in changed:
        config = Config(env=changed["env"], objective="dpo")

    def everything() -> None:
        train.make(config)
        settings(config, **others)

    with pytest.raises(ConfigError, match=f"^{field}: "):
        everything()


def test_an_objective_of_pairs_is_refused_where_answers_are_single() -> None:
    log_prob = jnp.zeros((2, 3))
    with pytest.raises(ConfigError, match=r"^objective: 'dpo' .*pairs of answers"):
        losses.policy_loss(log_prob, log_prob, jnp.ones(2), objective="dpo")
