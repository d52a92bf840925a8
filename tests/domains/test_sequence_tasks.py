"""Tasks against plain Python, and what is refused of a user's own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gipo_jax.config import ConfigError
from gipo_jax.domains.tokens import tasks
from gipo_jax.domains.tokens.tasks import Task

NAMES = ("tokens/reverse", "tokens/reverse_mixed", "tokens/add", "tokens/count")


def draw(task: Task, count: int = 300) -> Any:
    """Prompts as lists of integers."""
    keys = jax.random.split(jax.random.key(0), count)
    return np.asarray(jax.jit(jax.vmap(task.prompt))(keys)).tolist()


def right_answer(name: str, prompt: list[int]) -> list[int]:
    """The answer that a person would write, with its end token and without padding."""
    if name == "tokens/reverse":
        return prompt[::-1]
    if name == "tokens/reverse_mixed":
        return [*(token for token in reversed(prompt) if token != 2), 2]
    if name == "tokens/count":
        return [*[0] * (prompt[0] - 1), 1]
    first, second = (int("".join(map(str, part))) for part in (prompt[:2], prompt[3:]))
    return [*(int(digit) for digit in str(first + second)), 11]


def padded(task: Task, answer: list[int]) -> Any:
    return jnp.array(answer + [task.end or 0] * (task.answer_length - len(answer)), jnp.int32)


def test_the_names_of_the_built_in_tasks() -> None:
    assert tuple(tasks.TASKS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_built_in_tasks_give_what_their_sizes_say(name: str) -> None:
    task = tasks.make(name)
    assert tasks.make(task) is task
    assert np.min(draw(task)) >= 0 and np.max(draw(task)) < task.vocab


@pytest.mark.parametrize("name", NAMES)
def test_demonstrations_are_the_right_answers(name: str) -> None:
    task = tasks.make(name)
    assert task.demonstration is not None
    demonstration = jax.jit(task.demonstration)
    for prompt in draw(task, 100):
        expected = padded(task, right_answer(name, prompt))
        np.testing.assert_array_equal(demonstration(jnp.array(prompt)), expected)


def fraction(task: Task, prompt: list[int], answer: list[int], wanted: list[int]) -> float:
    """Right tokens of the longer of two answers without padding."""
    same = [a == b for a, b in zip(answer, wanted, strict=False)]
    return sum(same) / max(len(answer), len(wanted))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kappa", [0.0, 0.3, 1.0])
def test_rewards_weigh_right_tokens_and_right_answers(name: str, kappa: float) -> None:
    factory: Any = getattr(tasks, name.removeprefix(tasks.PREFIX))
    task: Task = factory(kappa=kappa)
    generator = np.random.default_rng(0)
    reward, exact = jax.jit(task.reward), jax.jit(lambda p, a: tasks.is_exact(task, p, a))
    for prompt in draw(task, 40):
        wanted = right_answer(name, prompt)
        wrong = list(wanted)
        place = generator.integers(len(wanted))
        wrong[place] = (wrong[place] + 1) % 2
        answers = [wanted, wrong]
        if task.end is not None:
            early = [*wanted[:1], task.end]
            late = [*wanted[:-1], 0, task.end][: task.answer_length]
            answers += [early, late, [0] * task.answer_length]
        for answer in answers:
            given = padded(task, answer)
            tokens = given.tolist()
            ended = tokens[: tokens.index(task.end) + 1] if task.end in tokens else tokens
            correct = ended == wanted
            share = fraction(task, prompt, ended, wanted)
            expected = kappa * share + (1 - kappa) * correct
            assert float(reward(jnp.array(prompt), given)) == pytest.approx(expected, abs=1e-6)
            assert bool(exact(jnp.array(prompt), given)) == correct


def test_mixed_prompts_have_every_length_about_equally_often() -> None:
    lengths = [sum(token != 2 for token in p) for p in draw(tasks.reverse_mixed(), 3000)]
    counts = np.bincount(lengths, minlength=15)
    assert counts[:2].sum() == 0
    # 3000 / 13 = 231 expected, standard deviation 15.
    assert np.all(np.abs(counts[2:] - 3000 / 13) < 5 * 15)


def test_sums_have_two_or_three_digits() -> None:
    prompts = draw(tasks.add(), 500)
    assert {prompt[2] for prompt in prompts} == {10}
    assert min(min(p[0], p[3]) for p in prompts) == 1
    lengths = {len(right_answer("tokens/add", prompt)) for prompt in prompts}
    assert lengths == {3, 4}


def test_a_task_may_say_itself_which_answers_are_right() -> None:
    task = Task(
        lambda key: jnp.zeros(1, jnp.int32),
        lambda prompt, answer: jnp.float32(0.5),
        vocab=2,
        prompt_length=1,
        answer_length=2,
        exact=lambda prompt, answer: answer[0] == 1,
    )
    task = tasks.make(task)
    prompt = jnp.zeros(1, jnp.int32)
    assert tasks.is_exact(task, prompt, jnp.array([1, 0]))
    assert not tasks.is_exact(task, prompt, jnp.array([0, 1]))


GOOD: dict[str, Any] = {
    "prompt": lambda key: jax.random.randint(key, (3,), 0, 2),
    "reward": lambda prompt, answer: jnp.mean(answer == prompt),
    "vocab": 2,
    "prompt_length": 3,
    "answer_length": 3,
}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab", 1, "vocab: 1 is not valid; expected an integer >= 2"),
        ("answer_length", 0, "answer_length: 0"),
        ("end", 2, "end: 2 is not valid; expected a token from 0 to 1"),
        ("prompt", lambda key: jnp.zeros(4, jnp.int32), r"prompt: 'int32\[4\]' .* int32\[3\]"),
        ("reward", lambda prompt, answer: answer == prompt, r"reward: 'bool\[3\]' .* float32\[\]"),
        ("reward", lambda prompt: 1.0, "reward: 'TypeError"),
        ("demonstration", lambda prompt: 1.0 * prompt, r"demonstration: 'float32\[3\]'"),
        ("exact", lambda prompt, answer: 1, r"exact: .* bool\[\]"),
    ],
)
def test_a_task_that_does_not_fit_its_sizes_is_refused(
    field: str, value: Any, message: str
) -> None:
    assert tasks.make(Task(**GOOD))
    with pytest.raises(ConfigError, match=f"task task: {message}"):
        tasks.make(Task(**GOOD | {field: value}))


def test_an_unknown_name_and_a_wrong_kappa_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"env: 'tokens/sort' .* tokens/reverse"):
        tasks.make("tokens/sort")
    with pytest.raises(ConfigError, match="kappa: 2"):
        tasks.reverse(kappa=2.0)
