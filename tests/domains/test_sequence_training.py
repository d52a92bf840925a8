"""The algorithm of token tasks: groups, replay, lag, evaluation, and what it refuses."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gipo_jax
from gipo_jax import buffer, cli, losses, objectives, train
from gipo_jax.config import Config, ConfigError, stack
from gipo_jax.domains.tokens import tasks

PROMPTS, GROUP = 3, 4
BLOCK = PROMPTS * GROUP
SMALL = Config(
    env=tasks.reverse(length=4),
    num_envs=PROMPTS,
    rollout_length=GROUP,
    batch_size=BLOCK,
    total_steps=6 * BLOCK,
    num_logs=6,
    max_buffer_size=4 * BLOCK,
    eval_episodes=5,
    decoder_layers=1,
    decoder_width=8,
    decoder_heads=2,
)
STALENESS = (
    {"buffer_size": BLOCK, "min_age": 0},
    {"buffer_size": 4 * BLOCK, "min_age": 0},
    {"buffer_size": 4 * BLOCK, "min_age": 3},
    {"buffer_size": 3 * BLOCK, "min_age": 2, "learning_rate": 1e-3},
)


def settings(config: Config, **given: Any) -> Any:
    """Traced settings, with the largest buffer that the configuration allocates."""
    return train.make_hparams(config, **{"buffer_size": config.max_buffer_size} | given)


def hparams_of(config: Config, rows: Any = STALENESS) -> Any:
    return stack([train.make_hparams(config, **row) for row in rows])


@pytest.fixture(scope="module")
def runs() -> Any:
    """State and metrics of four runs of different staleness in one program."""
    program = jax.jit(lambda h: jax.lax.map(train.make_train(SMALL), h))
    return program(hparams_of(SMALL))


def test_the_age_of_data_follows_from_buffer_size_and_lag(runs: Any) -> None:
    age, oldest = runs[1]["policy_age"], runs[1]["policy_age_max"]
    np.testing.assert_array_equal(age[0], np.zeros(6))
    np.testing.assert_array_equal(oldest[1], [0, 1, 2, 3, 3, 3])
    # A lag draws the oldest block until one is as old as that.
    np.testing.assert_array_equal(age[2], [0, 1, 2, 3, 3, 3])
    np.testing.assert_array_equal(oldest[2], age[2])
    np.testing.assert_array_equal(age[3], [0, 1, 2, 2, 2, 2])


def test_lag_zero_of_a_large_buffer_equals_the_on_policy_run_bit_for_bit(runs: Any) -> None:
    alone = dataclasses.replace(SMALL, max_buffer_size=BLOCK)
    program = jax.jit(lambda h: jax.lax.map(train.make_train(alone), h))
    state, metrics = program(hparams_of(alone, STALENESS[:1]))
    for one, several in zip(
        jax.tree.leaves((state.learner, metrics)),
        jax.tree.leaves((runs[0].learner, runs[1])),
        strict=True,
    ):
        np.testing.assert_array_equal(one[0], several[0])


def test_on_policy_data_has_ratio_one(runs: Any) -> None:
    metrics = runs[1]
    assert np.all(metrics["kl"][0] < 1e-6) and np.any(metrics["kl"][2] > 1e-6)


def test_metrics_of_training_are_complete_and_finite(runs: Any) -> None:
    state, metrics = runs
    assert np.all(state.diverged_at == -1)
    for name in ("eval_return", "eval_return_sampled", "success_rate", "episode_return"):
        assert np.all((metrics[name] >= 0) & (metrics[name] <= 1))
    assert np.all(metrics["episodes"] == BLOCK)
    assert np.all(metrics["answer_length"] == 4)
    for name in ("entropy", "grad_norm", "policy_loss", "ess", "log_ratio_p05"):
        assert np.all(np.isfinite(metrics[name]))


@pytest.mark.parametrize("standardized", [False, True])
def test_replay_holds_the_answers_with_their_advantage_within_the_group(standardized: bool) -> None:
    domain: Any = train.make(dataclasses.replace(SMALL, normalize_groups=standardized))
    hparams = settings(SMALL)
    state = jax.jit(lambda: train.init(domain, hparams))()
    collected = jax.jit(lambda s: domain.collect(s, hparams, jax.random.key(1)))(state)
    answers, counted = collected.rows, collected.counts
    assert answers.prompt.shape == (GROUP, PROMPTS, 4)
    np.testing.assert_array_equal(answers.prompt[0], answers.prompt[-1])
    reward = np.mean(answers.answer == answers.prompt[:, :, ::-1], axis=-1)
    assert len(np.unique(reward)) > 1
    advantage = reward - reward.mean(axis=0)
    if standardized:
        advantage = np.where(advantage == 0, 0, advantage / np.maximum(reward.std(axis=0), 1e-8))
    np.testing.assert_allclose(answers.advantage, advantage, atol=1e-5)
    np.testing.assert_allclose(counted["returns"], reward.sum(), rtol=1e-6)
    np.testing.assert_array_equal(counted["solved"], np.sum(reward == 1))

    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), answers)
    batch = domain.batch(state, state.learner.params, flat, jnp.zeros(BLOCK), hparams)
    log_ratio = domain.score(state.learner.params, batch, hparams).log_ratio
    np.testing.assert_allclose(log_ratio, 0, rtol=0, atol=1e-5)


@pytest.mark.parametrize("task", [tasks.reverse(length=4), tasks.reverse_mixed(1, 3)])
def test_an_update_follows_the_gradient_of_the_public_loss(task: Any) -> None:
    config = dataclasses.replace(
        SMALL, env=task, objective="sapo", ratio_level="prefix_product", normalize_advantage=True
    )
    domain: Any = train.make(config)
    hparams = settings(config, entropy_coef=0.0, max_grad_norm=1e6)
    state = jax.jit(lambda: train.init(domain, hparams))()

    def norms(state: Any) -> Any:
        answers = domain.collect(state, hparams, jax.random.key(1)).rows
        rows, age = buffer.take_rows(buffer.add(state.replay, answers, 0), jnp.arange(BLOCK), 0)
        moved = jax.tree.map(lambda x: x + 0.1, state.learner.params)
        learner = state.learner._replace(params=moved)
        batch = domain.batch(state, moved, rows, age, hparams)
        _, (metrics, _) = train.update(domain, state, learner, batch, hparams, 0, jnp.float32(1.0))

        def loss(params: Any) -> Any:
            log_prob, _ = domain.decoder.score(params["policy"], rows.prompt, rows.answer)
            advantage = (batch.advantage - batch.advantage.mean()) / batch.advantage.std()
            return losses.policy_loss(
                log_prob,
                batch.behavior_log_prob,
                advantage,
                domain.decoder.mask(rows.answer),
                objective="sapo",
                ratio_level="prefix_product",
            )[0]

        value, grads = jax.value_and_grad(loss)(moved)
        squares = sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))
        return metrics["grad_norm"], jnp.sqrt(squares), metrics["policy_loss"], value

    norm, expected, loss, value = jax.jit(norms)(state)
    assert norm > 1e-3
    np.testing.assert_allclose(norm, expected, rtol=1e-4)
    np.testing.assert_allclose(loss, value, rtol=1e-4)


@pytest.mark.parametrize("name", objectives.ALL)
def test_every_objective_trains_on_padded_answers(name: str) -> None:
    config = dataclasses.replace(SMALL, env=tasks.reverse_mixed(1, 3), objective=name)
    domain, hparams = train.make(config), settings(config)
    state = jax.eval_shape(lambda: train.init(domain, hparams))
    step = functools.partial(train.train_step, domain)
    after, metrics = jax.eval_shape(step, state, hparams, 0)
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (state, after)]
    assert shapes[0] == shapes[1]
    assert {"policy_loss", "entropy", "kl", "grad_norm"} == metrics.keys()


def test_imitation_learns_the_task_before_training() -> None:
    config = dataclasses.replace(SMALL, batch_size=64, sampling="uniform", decoder_width=16)
    domain = train.make(config)

    @jax.jit
    def greedy(hparams: Any) -> Any:
        acting = domain.acting(train.init(domain, hparams))
        return domain.evaluate(acting, hparams, jax.random.key(0), 200)["eval_return"]

    exact = [
        greedy(settings(config, imitation_updates=updates, learning_rate=3e-3))
        for updates in (0, 400)
    ]
    assert exact[0] < 0.3 and exact[1] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["gipo", pytest.param("ppo_clip", marks=pytest.mark.long)])
def test_reversing_four_tokens_is_learned_from_rewards_alone(objective: str) -> None:
    config = dataclasses.replace(
        SMALL,
        objective=objective,
        num_envs=8,
        rollout_length=8,
        batch_size=64,
        max_buffer_size=64,
        total_steps=64 * 300,
        num_logs=1,
        eval_episodes=200,
        decoder_layers=2,
        decoder_width=32,
    )
    rows = [
        {"buffer_size": 64, "learning_rate": 1e-3, "entropy_coef": 0.01, "seed": i}
        for i in range(2)
    ]
    program = jax.jit(lambda h: jax.lax.map(train.make_train(config), h))
    _, metrics = program(hparams_of(config, rows))
    assert np.all(metrics["eval_return"] > 0.95)


def test_a_policy_answers_prompts_of_any_leading_shape(runs: Any) -> None:
    domain, hparams = train.make(SMALL), settings(SMALL)
    acting = domain.acting(train.select(runs[0], 0))
    prompt = jnp.zeros((2, 3, 4), jnp.int32)
    assert domain.choose_action(acting, hparams, prompt).shape == (2, 3, 4)
    one = domain.choose_action(acting, hparams, prompt[0, 0], jax.random.key(0))
    assert one.shape == (4,)


def test_replay_keeps_the_distribution_that_the_answers_came_from() -> None:
    config = dataclasses.replace(SMALL, objective="dppo_exact_tv", env="tokens/add")
    domain: Any = train.make(config)
    hparams = settings(config, temperature=0.7, buffer_size=BLOCK)
    state = jax.jit(functools.partial(train.init, domain))(hparams)
    rows = jax.jit(domain.collect)(state, hparams, jax.random.key(0)).rows
    assert rows.distribution.shape == (GROUP, PROMPTS, 4, 12)
    np.testing.assert_allclose(np.exp(rows.distribution).sum(axis=-1), 1, rtol=1e-5)
    taken = np.take_along_axis(rows.distribution, rows.answer[..., None], axis=-1)[..., 0]
    mask = domain.decoder.mask(rows.answer)
    np.testing.assert_allclose(taken[mask], rows.behavior_log_prob[mask], rtol=1e-5)
    others = dataclasses.replace(config, objective="dppo_tv")
    assert train.make(others).block.distribution is None

    batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
    batch = domain.batch(state, state.learner.params, batch, jnp.zeros(BLOCK), hparams)
    scores = domain.score(state.learner.params, batch, hparams)
    stored, current = scores.distributions
    np.testing.assert_allclose(stored, current, rtol=1e-5)  # of one policy
    moved = jax.tree.map(lambda x: 1.1 * x, state.learner.params)
    assert not np.allclose(*domain.score(moved, batch, hparams).distributions)


@objectives.declare(kind="batch")
def without_mask(log_ratio: Any, advantage: Any) -> Any:
    return log_ratio * advantage / jnp.mean(advantage)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("env", {"env": "tokens/sort"}),
        ("env", {"env": "missing.py:TASK"}),
        ("rollout_length", {"rollout_length": 1, "batch_size": 3}),
        ("ratio_level", {"ratio_level": "word"}),
        ("ratio_level", {"ratio_level": "prefix_min", "objective": "dppo_kl"}),
        ("objective", {"objective": without_mask, "env": "tokens/add"}),
        ("loss_agg_mode", {"loss_agg_mode": "mean"}),
        ("hidden_sizes", {"hidden_sizes": (32,)}),
        ("advantage_mode", {"advantage_mode": "vtrace"}),
        ("decoder_width", {"decoder_width": 9}),
        ("min_age", {"min_age": 4}),
        ("gamma", {"gamma": 0.9}),
        ("value_learning_rate", {"value_learning_rate": 1e-5}),
        ("temperature", {"temperature": 0.0}),
        ("imitation_updates", {"imitation_updates": 2, "env": "without demonstrations"}),
        # What only token tasks have, on a control task.
        ("decoder_width", {"env": "CartPole-v1", "decoder_width": 32}),
        ("loss_agg_mode", {"env": "CartPole-v1", "loss_agg_mode": "seq-mean-token-sum"}),
        ("ratio_level", {"env": "CartPole-v1", "ratio_level": "sequence"}),
        ("ratio_level", {"env": "CartPole-v1", "objective": "gspo"}),
        ("objective", {"env": "CartPole-v1", "objective": "ctpo", "ratio_level": "joint"}),
        ("temperature", {"env": "CartPole-v1", "temperature": 0.5}),
        ("objective", {"env": "CartPole-v1", "objective": "dppo_exact_tv"}),
        ("ratio_level", {"objective": "dppo_exact_tv", "ratio_level": "sequence"}),
    ],
)
def test_settings_that_do_not_fit_the_task_are_refused(field: str, change: dict[str, Any]) -> None:
    if change.get("env") == "without demonstrations":
        change = change | {"env": tasks.reverse(4)._replace(demonstration=None)}
    if change.get("env") == "CartPole-v1":
        change = {"decoder_layers": 3, "decoder_width": 64, "decoder_heads": 4} | change
    static = {name: x for name, x in change.items() if hasattr(SMALL, name)}
    traced = {name: x for name, x in change.items() if name not in static}
    config = dataclasses.replace(SMALL, **static)

    def everything() -> None:
        train.make(config)
        settings(config, **traced)

    with pytest.raises(ConfigError, match=f"^{field}: "):
        everything()


MY_TASKS = """
import jax
import jax.numpy as jnp
from gipo_jax.domains.tokens import tasks

def prompt(key):
    return jax.random.randint(key, (3,), 0, 2)

def reward(prompt, answer):
    return jnp.mean(answer == jnp.sort(prompt))

SORT = tasks.Task(prompt, reward, vocab=2, prompt_length=3, answer_length=3)
NUMBER = 3
"""
IMPORT = "from gipo_jax.domains.tokens import tasks\n"
SIZES = "vocab=2, prompt_length=3, answer_length=3"


@pytest.mark.slow
def test_a_sweep_over_a_task_of_the_user_is_trained_resumed_plotted_and_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_tasks.py").write_text(MY_TASKS)
    arguments = (
        "sweep --env my_tasks.py:SORT --objective gspo --ratio-level joint --num-envs 2"
        " --rollout-length 4 --batch-size 8 --buffer-size 8 16 --min-age 0 --total-steps 64"
        " --num-logs 2 --eval-episodes 4 --decoder-layers 1 --decoder-width 8 --decoder-heads 2"
        " --out out --quiet"
    )
    assert cli.main(arguments.split()) == 0
    runs = Path("out/runs.csv").read_text()
    assert runs.count("my_tasks.py:SORT") == 2 and runs.count("done") == 2
    assert list(Path("out/figures").glob("*.png"))
    agent = gipo_jax.load("out", run=1)
    assert agent.policy(jnp.zeros(3, jnp.int32)).shape == (3,)
    greedy, sampled = agent.evaluate(jax.random.key(0), 8)
    assert 0 <= greedy <= 1 and 0 <= sampled <= 1

    assert cli.main(["sweep", "--resume", "--out", "out"]) == 0
    Path("my_tasks.py").write_text(MY_TASKS + "\n# another\n")
    capsys.readouterr()
    assert cli.main(["sweep", "--resume", "--out", "out"]) == 2
    assert "it has changed since" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ("my_tasks.py:NUMBER", "an environment or a task, not int"),
        ("my_tasks.py:NOTHING", "has no NOTHING"),
        ("other.py:SORT", "there is no file other.py"),
        ("broken.py:SORT", "ZeroDivisionError"),
        ("half.py:NO_REWARD", "half.py:2, in <module>: TypeError: "),
        ("half.py:NO_REWARD", "'reward'"),
        ("none.py:TASK", "none.py:TASK: reward: None is not valid; expected a function"),
        ("failing.py:TASK", "failing.py:TASK: reward: \"NameError: name 'nothing' is not defined"),
    ],
)
def test_a_file_without_the_task_is_refused_in_one_line(
    env: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_tasks.py").write_text(MY_TASKS)
    Path("broken.py").write_text("SORT = 1 / 0\n")
    Path("half.py").write_text(f"{IMPORT}NO_REWARD = tasks.Task(len, {SIZES})\n")
    Path("none.py").write_text(f"{MY_TASKS}TASK = SORT._replace(reward=None)\n")
    Path("failing.py").write_text(f"{MY_TASKS}TASK = SORT._replace(reward=lambda p, a: nothing)\n")
    assert cli.main(["sweep", "--env", env, "--out", "out"]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--env tokens/sort", "env: 'tokens/sort' is not valid; expected one of tokens/reverse, "),
        ("--ratio-level word", "ratio_level: 'word' is not valid; expected one of token, joint"),
        ("--ratio-level prefix_min --objective cppo", "ratio_level: 'prefix_min'"),
        ("--ratio-level ratio_norm", "ratio_level: 'ratio_norm'"),
        ("--ratio-level sequence --env CartPole-v1", "ratio_level: 'sequence'"),
        ("--loss-agg-mode mean", "loss_agg_mode: 'mean' is not valid; expected one of token-mean"),
        ("--min-age 0 16", "min_age: 16 is not valid; expected less than the 16 iterations"),
        ("--min-age 15 --batch-size 64", "buffer_size: 512 is not valid; expected at least batch"),
        ("--imitation-updates -1", "imitation_updates: -1"),
        ("--rollout-length 1", "rollout_length: 1 is not valid; expected an integer >= 2"),
    ],
)
def test_a_mistake_in_a_sweep_of_token_tasks_is_one_line_and_writes_nothing(
    arguments: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = "sweep --num-envs 4 --rollout-length 8 --buffer-size 512 --batch-size 32"
    usual += " --total-steps 640" + (" --env tokens/reverse" if "--env" not in arguments else "")
    out = tmp_path / "out"
    assert cli.main([*usual.split(), *arguments.split(), "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"gipo-jax: {words}") and message.count("\n") == 1
    assert not out.exists()
