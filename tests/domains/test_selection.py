"""Selections: bias of pruning, the difficulty estimate, what they save, and what is refused."""

import dataclasses
import functools
import itertools
import re
import shlex
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import spearmanr

from gipo_jax import buffer, cli, losses, objectives, ratio_levels, sweep, train
from gipo_jax.config import LOSS_AGG_MODES, Config, ConfigError
from gipo_jax.domains.tokens import decoder, packing, selection, tasks
from gipo_jax.sweep import checkpoint
from tests.programs import ROOT

PROMPTS, ANSWERS = 2, 3
BATCH = PROMPTS * ANSWERS
TASK = tasks.reverse_mixed(1, 3)._replace(demonstration=None)  # which would be compiled each time
SMALL = Config(
    env=TASK,
    num_envs=PROMPTS,
    rollout_length=ANSWERS,
    batch_size=BATCH,
    total_steps=4 * BATCH,
    num_logs=4,
    max_buffer_size=BATCH,
    eval_episodes=4,
    decoder_layers=1,
    decoder_width=8,
    decoder_heads=2,
)
TOKENS = ("prompts_sampled", "tokens_generated", "tokens_trained")


def begins_alike(prompt: Any, answer: Any) -> Any:
    """Whether the answer begins with the token of the prompt."""
    return 1.0 * (answer[0] == prompt[0])


# Long answers to a short prompt: several have room in one row.
MANY = tasks.Task(
    lambda key: jax.random.randint(key, (2,), 0, 3), begins_alike, 3, 2, 10, end=2, name="many"
)


def settings(config: Config, **given: Any) -> Any:
    return train.make_hparams(config, **{"buffer_size": config.max_buffer_size} | given)


def run(config: Config, **given: Any) -> Any:
    return jax.jit(train.make_train(config))(settings(config, **given))


def everything(group: Any, state: Any, key: Any) -> Any:
    return jnp.ones_like(group.advantage)


@pytest.mark.slow
@pytest.mark.optimized
def test_weights_of_one_for_all_answers_equal_no_selection_bit_for_bit() -> None:
    results = []
    alone = dataclasses.replace(SMALL, env=tasks.reverse(3)._replace(demonstration=None))
    for config in (alone, dataclasses.replace(alone, selection=everything, packed_size=BATCH)):
        domain = train.make(config)
        hparams = settings(alone, kl_coef=0.1)

        def two_steps(domain: Any = domain, hparams: Any = hparams) -> Any:
            def step(i: Any, state: Any) -> Any:
                return train.train_step(domain, state, hparams, i)[0]

            state = jax.lax.fori_loop(0, 2, step, train.init(domain, hparams))
            return state.learner, state.totals

        results.append(jax.jit(two_steps)())
    for x, y in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(x, y)


# Packing and pruning.


class Case:
    """A batch of one iteration's answers under a policy that has moved since, in float64."""

    def __init__(self, task: tasks.Task = TASK, **changed: Any) -> None:
        config = dataclasses.replace(SMALL, env=task, **changed)
        self.domain: Any = train.make(config)
        self.hparams = settings(config, entropy_coef=0.1, kl_coef=0.2)
        state = train.init(self.domain, self.hparams)
        rows = jax.jit(lambda s: self.domain.collect(s, self.hparams, jax.random.key(1)).rows)(
            state
        )
        replay = buffer.add(state.replay, rows, 0)
        self.rows = in_float64(buffer.take_rows(replay, jnp.arange(BATCH), 0)[0])
        self.length = np.asarray(jnp.sum(decoder.answer_mask(self.rows.answer, task.end), axis=1))
        self.state = state
        self.params = in_float64(jax.tree.map(lambda x: x + 0.1, state.learner.params))

    def loss_and_gradient(self, batch: Any) -> Any:
        """Loss of a batch, and its gradient as one vector."""

        def loss(params: Any) -> Any:
            learner = self.state.learner
            return losses.loss(self.domain, self.state, learner, params, batch, self.hparams)[0]

        value, grads = jax.value_and_grad(loss)(self.params)
        return value, jnp.concatenate([x.ravel() for x in jax.tree.leaves(grads)])

    def full(self) -> Any:
        """Of all answers, each in a row of its own."""
        return self.loss_and_gradient(
            self.domain.batch(self.state, self.params, self.rows, jnp.zeros(BATCH), self.hparams)
        )

    def packed(self, weight: Any, noise: Any) -> Any:
        """Of packed rows."""
        rows = jax.tree.map(jnp.asarray, self.rows)._replace(weight=weight)
        return self.loss_and_gradient(self.domain.packed(rows, jnp.zeros(BATCH), noise))


def in_float64(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x, float if x.dtype == np.float32 else None), tree)


LEVELS = [{"ratio_level": level} for level in ratio_levels.LEVELS]
MODES = [{"loss_agg_mode": mode, "ratio_level": "sequence"} for mode in LOSS_AGG_MODES]
OBJECTIVES: list[dict[str, Any]] = [{"objective": "ctpo"}, {"objective": "decoupled_ppo"}]


@pytest.mark.slow
def test_packed_rows_have_the_loss_and_gradient_of_a_row_for_each_answer() -> None:
    cases = [Case(MANY, packed_size=BATCH - 1, **own) for own in LEVELS + MODES + OBJECTIVES]
    domain = cases[0].domain
    assert domain.joins and len(set(cases[0].length)) > 2
    noise = np.linspace(0.9, 0.1, BATCH)

    @jax.jit
    def both() -> Any:
        packed = domain.packed(jax.tree.map(jnp.asarray, cases[0].rows), jnp.zeros(BATCH), noise)
        of_cases = [(case.full(), case.packed(None, jnp.asarray(noise))) for case in cases]
        return packed.data.response, of_cases

    with jax.enable_x64(True):
        response, of_cases = both()
    assert response.shape == (BATCH - 1, 11)
    assert set(np.unique(response)) == set(range(BATCH + 1)), "every answer is in a row"
    values = [full[0] for full, _ in of_cases]
    assert len(np.unique(np.round(values, 9))) >= len(cases) - 2, "levels and modes differ"
    for full, packed in of_cases:
        for wanted, found in zip(full, packed, strict=True):
            assert np.abs(wanted).max() > 1e-3
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)


def longest_first(sizes: Any, rows: int, width: int) -> tuple[int, list[int]]:
    """How many of some answers are placed before the first without room, and tokens by row."""
    used = [0] * rows
    for count, size in enumerate(sorted(sizes, reverse=True)):
        row = next((row for row in range(rows) if used[row] + size <= width), None)
        if row is None:
            return count, used
        used[row] += size
    return len(sizes), used


def test_dense_rows_hold_whole_answers_longest_first_and_leave_out_a_random_part() -> None:
    rng = np.random.default_rng(0)
    join = jax.jit(functools.partial(packing.join, rows=5, width=12, before=2))
    crowded = 0
    for _ in range(200):
        length, noise = rng.integers(1, 11, 9), rng.random(9)
        weight = rng.random(9) * (rng.random(9) < 0.8)
        weight[0] = 1.0
        found = join(jnp.asarray(weight), jnp.asarray(length), jnp.asarray(noise))
        response, position = np.asarray(found.response), np.asarray(found.position)
        kept = np.flatnonzero(weight)
        count, used = longest_first(length[kept] + 2, 5, 12)
        crowded += count < len(kept)
        taken = kept[np.argsort(noise[kept])[:count]]
        assert sorted(np.unique(response[response > 0]) - 1) == sorted(taken)
        for i in taken:
            rows, tokens = np.nonzero(response == i + 1)
            assert len(set(rows)) == 1 and np.all(np.diff(tokens) == 1)
            np.testing.assert_array_equal(position[rows, tokens], np.arange(length[i] + 2))
        if count == len(kept):
            assert list(np.sum(response > 0, axis=1)) == used
        share = len(kept) / count * np.isin(np.arange(9), taken) * weight
        np.testing.assert_allclose(found.weights.answer, share * count / 9, rtol=1e-5)
        tokens_in_rows = length[taken].sum() / length.sum()
        np.testing.assert_allclose(found.weights.token, share * tokens_in_rows, rtol=1e-5)
    assert 20 < crowded < 180


def test_weights_that_are_all_zero_leave_no_gradient_and_no_nan() -> None:
    case = Case(MANY, selection=everything, packed_size=3)
    value, gradient = jax.jit(case.packed)(jnp.zeros(BATCH), jnp.linspace(0, 0.9, BATCH))
    assert value == 0 and np.all(gradient == 0)


def patterns(case: Case, probabilities: Any) -> Any:
    """Every pattern of kept prompts, kept answers and answers that fit.

    Gives their probabilities, weights and noise. Written with loops in float64, apart from the
    code it is compared with.
    """
    of_prompt, of_answer = (np.asarray(p, float) for p in probabilities)
    found: dict[Any, float] = {}
    for kept_prompts in itertools.product((0, 1), repeat=PROMPTS):
        for kept_answers in itertools.product((0, 1), repeat=BATCH):
            chance, kept = 1.0, []
            for prompt, keep in enumerate(kept_prompts):
                chance *= of_prompt[prompt] if keep else 1 - of_prompt[prompt]
            for row, keep in enumerate(kept_answers):
                p = of_answer[row // PROMPTS, row % PROMPTS]
                chance *= p if keep else 1 - p
                if keep and kept_prompts[row % PROMPTS]:
                    kept.append(row)
            key = tuple(kept)
            found[key] = found.get(key, 0.0) + chance
    chances, weights, noises, crowded = [], [], [], 0
    rows, task = case.domain.packed_rows, case.domain.env
    for rows_kept, chance in found.items():
        weight = np.zeros(BATCH)
        for row in rows_kept:
            weight[row] = 1 / (of_prompt[row % PROMPTS] * of_answer[row // PROMPTS, row % PROMPTS])
        fit = min(rows, len(rows_kept))
        if case.domain.joins:
            sizes = [case.length[row] + task.prompt_length - 1 for row in rows_kept]
            fit, _ = longest_first(sizes, rows, task.prompt_length + task.answer_length - 1)
        crowded += fit < len(rows_kept)
        fitting = list(itertools.combinations(rows_kept, fit))
        for chosen in fitting:
            chances.append(chance / len(fitting))
            weights.append(weight)
            noises.append([0.1 if row in chosen else 0.9 for row in range(BATCH)])
    assert crowded, "some patterns must not fit"
    return np.array(chances), np.array(weights), np.array(noises)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "rows", "mode"),
    [
        (tasks.reverse(3)._replace(demonstration=None), 4, "token-mean"),
        (MANY, 2, "token-mean"),
        (MANY, 2, "seq-mean-token-mean"),
    ],
    ids=["apart", "joined", "joined-means"],
)
def test_pruning_has_the_full_gradient_in_expectation_over_all_patterns(
    task: tasks.Task, rows: int, mode: str
) -> None:
    case = Case(task, selection="prune", packed_size=rows, loss_agg_mode=mode)
    assert case.domain.joins == (task is MANY)
    advantage = case.rows.advantage.reshape(ANSWERS, PROMPTS)
    size = packing.size(task, jnp.asarray(case.length), case.domain.joins)
    probabilities = selection.keep_probability(
        jnp.asarray(advantage), size.reshape(advantage.shape), rows / BATCH
    )
    chance, weight, noise = patterns(case, probabilities)
    np.testing.assert_allclose(chance.sum(), 1, rtol=1e-12)

    # The answers of largest abs(A) besides, a fixed half, with the inverse of it as weight.
    kept = np.zeros(BATCH)
    kept[np.argsort(-np.abs(advantage.reshape(-1)))[: BATCH // 2]] = 2
    weight, noise = np.vstack([weight, kept]), np.vstack([noise, np.full(BATCH, 0.5)])
    with jax.enable_x64(True):
        given = jnp.asarray(weight), jnp.asarray(noise)
        run = jax.jit(
            lambda c: (case.full(), jax.lax.map(lambda x: case.packed(*x), c, batch_size=64))
        )
        (_, full), (_, gradients) = jax.tree.map(np.asarray, run(given))
    assert np.abs(full).max() > 1e-2
    assert full.dtype == np.float64
    # The probabilities of the patterns are of float32.
    np.testing.assert_allclose(chance @ gradients[:-1], full, rtol=0, atol=1e-6)
    assert np.abs(gradients[-1] - full).max() > 1e-3


def test_pruning_keeps_as_many_tokens_as_there_are_rows_for() -> None:
    rng = np.random.default_rng(1)
    advantage = rng.normal(size=(8, 16)) * (rng.random(16) < 0.6)
    size = rng.uniform(0.3, 1, (8, 16))
    for part in (0.15, 0.3):
        prompt, answer = selection.keep_probability(jnp.asarray(advantage), jnp.asarray(size), part)
        np.testing.assert_allclose(np.mean(prompt * answer * size), part, rtol=1e-4)
    # Bounds come first: with all kept there is no more to keep, and never is less than .09 kept.
    for part, kept in ((0.01, 0.09), (2.0, 1.0)):
        prompt, answer = selection.keep_probability(jnp.ones((8, 16)), jnp.asarray(size), part)
        np.testing.assert_allclose(prompt * answer, kept, rtol=1e-5)


def test_pruning_keeps_answers_with_the_probability_that_its_weights_say() -> None:
    pruned = selection.prune(0.5, lambda length: length / 2)
    advantage = jnp.array([[0.5, 0.1, 0.0], [-0.4, 0.0, 0.0], [-0.1, -0.1, 0.0]])
    nothing, mask = jnp.zeros(()), jnp.ones((3, 3, 2), bool)
    group = selection.Group(nothing, nothing, nothing, mask, nothing, advantage)
    keys = jax.random.split(jax.random.key(0), 20_000)
    weights = np.asarray(jax.vmap(lambda k: pruned.select(group, (), k))(keys), float)
    of_prompt, of_answer = selection.keep_probability(advantage, jnp.ones((3, 3)), 0.5)
    keep = np.asarray(of_prompt * of_answer, float)
    assert keep.min() >= (1 - selection.MAX_PRUNED) ** 2 - 1e-6 and keep.max() <= 1
    assert keep[0, 0] > keep[2, 0] > keep[2, 2]
    np.testing.assert_allclose(np.mean(weights > 0, axis=0), keep, atol=0.015)
    error = weights.std(axis=0) / np.sqrt(len(weights))
    assert np.all(np.abs(weights.mean(axis=0) - 1) < 4 * error + 1e-6)


def test_pruning_saves_arithmetic_and_counts_fewer_tokens() -> None:
    config = dataclasses.replace(
        SMALL, rollout_length=16, num_envs=4, batch_size=64, max_buffer_size=64, total_steps=64,
        updates_per_iteration=4,
    )  # fmt: skip
    operations, trained = {}, {}
    for name, packed in (("keep_all", None), ("prune", 16)):
        changed = dataclasses.replace(config, selection=name, packed_size=packed)
        domain, hparams = train.make(changed), settings(changed)
        state = train.init(domain, hparams)
        traced = jax.jit(functools.partial(train.train_step, domain))
        step = traced.lower(state, hparams, 0).compile()
        analysis: Any = step.cost_analysis()
        operations[name] = analysis["flops"]
        trained[name] = float(step(state, hparams, 0)[0].totals["tokens_trained"])
    assert operations["prune"] < 0.6 * operations["keep_all"]
    assert 0 < trained["prune"] < 0.35 * trained["keep_all"]


# Selection of prompts.


def ends_early(prompts: Any, state: Any, key: Any) -> Any:
    return 1.0 * (prompts[:, 1] == 2)


@pytest.mark.parametrize("candidates", [40, 4])
def test_prompts_with_weight_are_answered_before_those_without(candidates: int) -> None:
    domain: Any = train.make(
        dataclasses.replace(SMALL, num_envs=4, selection=ends_early, num_candidates=candidates)
    )
    draw = jax.jit(
        lambda key: selection.draw_prompts(domain.selection, (), domain.config, TASK, key)
    )  # fmt: skip
    prompts = np.concatenate([draw(key) for key in jax.random.split(jax.random.key(0), 5)])
    assert selection.prompts_drawn(domain.selection, domain.config) == candidates
    assert prompts.shape == (20, 3)
    # A third of the prompts end there: four candidates are too few, and others fill the places.
    assert np.all(prompts[:, 1] == 2) == (candidates == 40)


def test_prompts_are_drawn_in_proportion_to_their_weights() -> None:
    def weights(prompts: Any, state: Any, key: Any) -> Any:
        return jnp.array([3.0, 1.0])

    task = tasks.reverse(length=8)
    chosen = selection.Selection("own", selection.PROMPTS, weights, lambda *_: (), lambda s, _: s)
    config = dataclasses.replace(SMALL, num_envs=1, num_candidates=2)
    keys = jax.random.split(jax.random.key(0), 4000)

    def first(key: Any) -> Any:
        key_prompts = jax.random.split(key, 3)[0]
        candidates = jax.vmap(task.prompt)(jax.random.split(key_prompts, 2))
        drawn = selection.draw_prompts(chosen, (), config, task, key)[0]
        differ = jnp.any(candidates[0] != candidates[1])
        return jnp.all(drawn == candidates[0]), differ

    is_first, differ = jax.jit(jax.vmap(first))(keys)
    assert abs(np.mean(is_first[differ]) - 0.75) < 0.03


def test_the_loss_of_the_difficulty_estimate_is_its_formula() -> None:
    rng = np.random.default_rng(0)
    z, success, confidence = rng.normal(size=(4, 2)), np.array([0, 0.03, 0.5, 1]), rng.random(4)

    def entropy(z: Any, p: Any) -> Any:
        s = 1 / (1 + np.exp(-z))
        return -p * np.log(s) - (1 - p) * np.log(1 - s)

    hinges = [
        max(0, 0.5 - (z[i, 0] - z[j, 0]))
        for i, j in itertools.permutations(range(4), 2)
        if success[i] - success[j] > 0.05
    ]
    assert len(hinges) == 5
    expected = (
        np.mean(entropy(z[:, 0], success))
        + 0.5 * np.mean(entropy(z[:, 1], confidence))
        + 3 * np.mean(hinges)
    )
    given = [jnp.asarray(x, jnp.float32) for x in (z, success, confidence)]
    np.testing.assert_allclose(selection.depo_loss(*given), expected, rtol=1e-5)


@pytest.mark.long
@pytest.mark.slow
def test_the_difficulty_estimate_ranks_fresh_prompts_as_their_measured_success() -> None:
    task = tasks.reverse_mixed(2, 14)
    config = dataclasses.replace(
        SMALL, env=task, selection="depo", num_envs=16, rollout_length=8, batch_size=128,
        max_buffer_size=128, total_steps=128 * 150, num_logs=1, eval_episodes=0,
        decoder_layers=2, decoder_width=32,
    )  # fmt: skip
    domain: Any = train.make(config)
    chosen = domain.selection
    state, metrics = run(config, imitation_updates=300, learning_rate=1e-3, seed=3)
    assert metrics["prompts_sampled"][0] == 4 * 16 * 150

    @jax.jit
    def measure(key: Any) -> Any:
        key_prompts, key_answers = jax.random.split(key)
        prompts = jax.vmap(task.prompt)(jax.random.split(key_prompts, 200))
        many = jnp.tile(prompts, (32, 1))
        answers, _ = domain.decoder.sample(state.learner.params["policy"], many, key_answers)
        exact = jax.vmap(lambda p, a: tasks.is_exact(task, p, a))(many, answers)
        logits: Any = selection.Estimator(3).apply(state.domain_state.selection.params, prompts)
        return logits[:, 0], jnp.mean(exact.reshape(32, 200), axis=0), prompts

    estimate, success, prompts = measure(jax.random.key(9))
    assert np.std(success) > 0.1
    assert spearmanr(estimate, success).statistic >= 0.7
    # And so the prompts it chooses are less often hopeless or done than the others.
    weight = np.asarray(chosen.select(prompts, state.domain_state.selection, jax.random.key(0)))
    mixed = (success > 0.1) & (success < 0.9)
    assert 0 < weight.sum() < 200
    assert mixed[weight > 0].mean() > mixed[weight == 0].mean() + 0.2


# Sweeps, and what is refused.


MINE = """
import jax
import jax.numpy as jnp
from gipo_jax.domains.tokens import selection, tasks

TASK = tasks.reverse_mixed(1, 3)._replace(demonstration=None)

@selection.declare(
    initial_state=lambda task, key: jnp.zeros(()),
    update=lambda state, group: state + jnp.sum(group.exact),
)
def only_better(group, state, key):
    return 1.0 * (group.advantage > 0)

def wrong_shape(prompts, state, key):
    return jnp.ones(3)

def failing(group, state, key):
    return group.rewards

def other_arguments(answers, key):
    return answers
"""
OPTIONS = (
    "sweep --env tokens/reverse_mixed --num-envs 2 --rollout-length 4 --batch-size 8"
    " --buffer-size 16 --total-steps 64 --num-logs 4 --eval-episodes 4 --decoder-layers 1"
    " --decoder-width 8 --decoder-heads 2 --no-figures --quiet"
)


def test_the_code_and_the_commands_of_the_guide_are_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = (ROOT / "docs" / "selection.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python file=my_selection.py\n(.*?)^```$", guide, re.M | re.S)
    Path("my_selection.py").write_text(code)
    commands = "".join(re.findall(r"^```bash\n(.*?)^```$", guide, re.M | re.S))
    trained: list[int] = []

    # What a command asks for is settled and checked, but not trained.
    def run(runs: Any, *_: Any, **__: Any) -> Any:
        trained.append(len(runs))
        return types.SimpleNamespace(diverged=[])

    monkeypatch.setattr(sweep, "run", run)
    monkeypatch.setattr(cli, "_draw", lambda *_: None)
    for line in commands.replace("\\\n", " ").splitlines():
        assert cli.main(shlex.split(line)[1:]) == 0
    assert trained == [3, 1, 4, 2]


@pytest.mark.slow
@pytest.mark.long
def test_a_sweep_over_selections_is_trained_interrupted_and_resumed_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)
    short = OPTIONS.replace("tokens/reverse_mixed", "mine.py:TASK").replace(
        "episodes 4", "episodes 0"
    )
    command = f"{short} --selection depo mine.py:only_better --packed-size 4 --num-candidates 6"
    command += " --depo-start 2 --depo-range 0.01 0.9"
    assert cli.main(f"{command} --out whole".split()) == 0

    save = checkpoint.save

    def dies(*arguments: Any) -> Any:
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", dies)
    assert cli.main(f"{command} --checkpoint-seconds 0 --out cut".split()) == 130
    monkeypatch.setattr(checkpoint, "save", save)
    assert cli.main(["sweep", "--resume", "--no-figures", "--quiet", "--out", "cut"]) == 0
    tables = [Path(folder, "metrics.csv").read_text() for folder in ("whole", "cut")]
    assert sorted(tables[0].splitlines()) == sorted(tables[1].splitlines())
    assert all(name in tables[0] for name in TOKENS)
    assert "mine.py:only_better" in Path("whole/runs.csv").read_text()

    Path("mine.py").write_text(MINE + "\n# another\n")
    capsys.readouterr()
    assert cli.main(["sweep", "--resume", "--out", "cut"]) == 2
    assert "changed since" in (error := capsys.readouterr().err) and error.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--selection keep_some", ("selection", "keep_some", "prune")),
        ("--selection low_margin", ("selection", "low_margin", "dpo")),
        ("--selection depo --depo-range 0.9 0.1", ("depo_range", "low < high")),
        ("--selection depo --depo-range 0.5", ("depo_range", "two numbers")),
        ("--selection prune --depo-start 3", ("depo_start", "3", "depo")),
        ("--packed-size 9", ("packed_size", "9", "batch_size 8")),
        ("--selection prune --packed-size 0", ("packed_size", "0")),
        ("--selection depo --num-candidates 1", ("num_candidates", "1", "num_envs 2")),
        ("--selection keep_all prune --num-candidates 4", ("num_candidates", "4")),
        ("--packed-size 4 --normalize-advantage", ("normalize_advantage", "packed_size")),
        ("--packed-size 4 --objective r2vpo", ("objective", "r2vpo", "packed_size")),
        ("--selection prune --normalize-advantage", ("normalize_advantage", "prune")),
        ("--selection prune --objective m2po", ("objective", "m2po", "prune")),
        ("--selection mine.py:wrong_shape", ("selection", "[3]", "[8]")),
        ("--selection mine.py:failing", ("selection", "mine.py:", "rewards")),
        ("--selection mine.py:other_arguments", ("selection", "other_arguments", "group")),
        ("--selection mine.py:nothing", ("selection", "has no nothing")),
        ("--env CartPole-v1 --selection prune", ("selection", "control tasks")),
        ("--env flow/ring --selection prune", ("selection", "flow")),
    ],
)
def test_a_selection_that_cannot_work_is_refused_in_one_line(
    given: str,
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)
    small = OPTIONS
    if "--env" in given:
        small = "sweep --num-envs 2 --rollout-length 4 --batch-size 8 --buffer-size 16"
        small += " --total-steps 64 --quiet"
    assert cli.main(f"{small} {given} --out out".split()) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for word in words:
        assert word in message
    assert not Path("out").exists()


def test_a_function_of_the_users_is_refused_where_its_state_changes_shape() -> None:
    @selection.declare(initial_state=lambda task, key: jnp.zeros(2), update=lambda s, g: s[:1])
    def shrinking(group: Any, state: Any, key: Any) -> Any:
        return jnp.ones_like(group.advantage)

    with pytest.raises(ConfigError, match=r"^selection shrinking: .*a state like the one before"):
        train.make(dataclasses.replace(SMALL, selection=shrinking))


@pytest.mark.parametrize(
    ("objective", "joined"),
    [("gipo", True), ("gspo", True), ("cppo", False), ("dppo_topk_tv", False), ("dpo", False)],
)
def test_responses_that_need_a_row_of_their_own_are_not_joined(
    objective: str, joined: bool
) -> None:
    assert packing.joins(tasks.make("tokens/count"), objectives.spec(objective)) == joined
