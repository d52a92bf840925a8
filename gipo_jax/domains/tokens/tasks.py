"""Tasks: what a prompt is and what an answer to it is worth, as pure functions.

A task of your own is two functions in your own file, and a ``Task`` that says their sizes::

    def prompt(key):
        return jax.random.randint(key, (8,), 0, 2)

    def reward(prompt, answer):
        return jnp.mean(answer == jnp.sort(prompt))

    SORT = tasks.Task(prompt, reward, vocab=2, prompt_length=8, answer_length=8)

Train it as ``--env my_tasks.py:SORT``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gipo_jax import user_files
from gipo_jax.config import ConfigError
from gipo_jax.domains.tokens.decoder import answer_mask

PREFIX = "tokens/"  # What the name of a built-in task begins with in the setting env


class Task(NamedTuple):
    """A task for one prompt and one answer; batch its functions with ``jax.vmap``.

    Tokens are int32 in [0, vocab).
    """

    prompt: Callable[[Array], Array]  # key -> tokens [prompt_length]
    # prompt, answer [answer_length] -> scalar in [0, 1], 1 only for a right answer. After an
    # answer's first end token come further end tokens
    reward: Callable[[Array, Array], Array]
    vocab: int  # number of tokens, the end token included, >= 2
    prompt_length: int  # tokens of a prompt
    answer_length: int  # most tokens of an answer, the end token included
    end: int | None = None  # ends an answer; None where all have answer_length tokens
    # prompt, answer -> bool, whether the answer is right; None for a reward of 1
    exact: Callable[[Array, Array], Array] | None = None
    # prompt -> answer, a right answer to imitate before reinforcement learning; None where there is
    # none
    demonstration: Callable[[Array], Array] | None = None
    name: str = "task"  # for tables and figures


def is_task(env: Any) -> bool:
    """Whether the setting ``env`` means a task of this kind, and not an environment."""
    if isinstance(env, str) and env.startswith(PREFIX):
        return True
    return isinstance(user_files.resolve("env", env), Task)


def make(task: str | Task) -> Task:
    """The task of a name (in ``TASKS``, or FILE.py:TASK), or a given one, checked by shapes."""
    if isinstance(task, str) and not user_files.is_reference(task):
        if task not in TASKS:
            raise ConfigError("env", task, f"one of {', '.join(TASKS)}, or FILE.py:TASK")
        return TASKS[task]
    found: Task = user_files.resolve("env", task)
    task = found._replace(name=task) if isinstance(task, str) else found
    _check(task)
    return task


def is_exact(task: Task, prompt: Array, answer: Array) -> Array:
    """Whether an answer is right, a bool scalar."""
    if task.exact is not None:
        return task.exact(prompt, answer)
    # Short of 1, for a mean of ones may round.
    return task.reward(prompt, answer) > 1 - 1e-6


def reverse(length: int = 10, vocab: int = 2, kappa: float = 1.0) -> Task:
    """The prompt backwards. All answers have the same length.

    Args:
        length: tokens of prompt and answer, >= 1.
        vocab: number of tokens, >= 2.
        kappa: part of the reward that is the fraction of right tokens, in [0, 1]; the rest is for
            an answer that is all right.
    """

    def prompt(key: Array) -> Array:
        return jax.random.randint(key, (length,), 0, vocab)

    def demonstration(prompt: Array) -> Array:
        return prompt[::-1]

    reward = _graded(demonstration, None, kappa)
    return Task(
        prompt, reward, vocab, length, length, demonstration=demonstration, name="reverse"
    )  # fmt: skip


def reverse_mixed(shortest: int = 2, longest: int = 14, kappa: float = 1.0) -> Task:
    """Strings of 0 and 1 of mixed length backwards, then the end token: mixed difficulty.

    The length is uniform from ``shortest`` (>= 1) to ``longest``; end tokens pad the prompt.
    """
    end, places = 2, jnp.arange(longest)

    def prompt(key: Array) -> Array:
        key_length, key_tokens = jax.random.split(key)
        length = jax.random.randint(key_length, (), shortest, longest + 1)
        return jnp.where(places < length, jax.random.randint(key_tokens, (longest,), 0, 2), end)

    def demonstration(prompt: Array) -> Array:
        length = jnp.sum(prompt != end)
        backwards = prompt[jnp.clip(length - 1 - places, 0)]
        return jnp.append(jnp.where(places < length, backwards, end), end)

    reward = _graded(demonstration, end, kappa)
    return Task(
        prompt, reward, 3, longest, longest + 1, end, None, demonstration, "reverse_mixed"
    )  # fmt: skip


def add(digits: int = 2, kappa: float = 1.0) -> Task:
    """The sum of two numbers of 1 to 8 digits, most significant digit first, then the end token 11.

    The prompt is the digits of the one, a plus sign (token 10), and those of the other; neither
    starts with 0.
    """
    plus, end = 10, 11
    powers = 10 ** jnp.arange(digits, -1, -1)

    def prompt(key: Array) -> Array:
        numbers = jax.random.randint(key, (2,), 10 ** (digits - 1), 10**digits)
        first, second = numbers[:, None] // powers[1:] % 10
        return jnp.concatenate([first, jnp.array([plus]), second]).astype(jnp.int32)

    def demonstration(prompt: Array) -> Array:
        total = jnp.sum((prompt[:digits] + prompt[digits + 1 :]) * powers[1:])
        written = jnp.append(total // powers % 10, end)
        shifted = jnp.append(written[1:], end)
        return jnp.where(written[0] == 0, shifted, written).astype(jnp.int32)

    reward = _graded(demonstration, end, kappa)
    return Task(
        prompt, reward, 12, 2 * digits + 1, digits + 2, end, None, demonstration, "add"
    )  # fmt: skip


def count(longest: int = 15, kappa: float = 1.0) -> Task:
    """As many tokens 0 as the prompt says, then the end token 1: long answers to a short prompt.

    The prompt is one token, n + 1 for a number n that is uniform from 1 to ``longest``.
    """
    end, places = 1, jnp.arange(longest + 1)

    def prompt(key: Array) -> Array:
        return jax.random.randint(key, (1,), 2, longest + 2)

    def demonstration(prompt: Array) -> Array:
        return (places >= prompt[0] - 1).astype(jnp.int32)

    reward = _graded(demonstration, end, kappa)
    return Task(
        prompt, reward, longest + 2, 1, longest + 1, end, None, demonstration, "count"
    )  # fmt: skip


def _graded(
    demonstration: Callable[[Array], Array], end: int | None, kappa: float
) -> Callable[[Array, Array], Array]:
    """kappa * fraction of right tokens + (1 - kappa) * whether all are right.

    The fraction is of the longer of the two answers, so that neither an early nor a late end pays.
    """
    if not 0 <= kappa <= 1:
        raise ConfigError("kappa", kappa, "a number in [0, 1]")

    def reward(prompt: Array, answer: Array) -> Array:
        wanted = demonstration(prompt)
        asked, given = answer_mask(wanted, end), answer_mask(answer, end)
        right = asked & given & (answer == wanted)
        fraction = jnp.sum(right) / jnp.sum(asked | given)
        return kappa * fraction + (1 - kappa) * (fraction == 1)

    return reward


# Built-in tasks by the name that the setting env takes
TASKS = {f"{PREFIX}{task.name}": task for task in (reverse(), reverse_mixed(), add(), count())}


def _check(task: Task) -> None:
    for field, lowest in (("vocab", 2), ("prompt_length", 1), ("answer_length", 1)):
        value = getattr(task, field)
        if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
            raise ConfigError(f"task {task.name}: {field}", value, f"an integer >= {lowest}")
    if task.end is not None and task.end not in range(task.vocab):
        valid = f"a token from 0 to {task.vocab - 1}, or None"
        raise ConfigError(f"task {task.name}: end", task.end, valid)
    key = jax.eval_shape(lambda: jax.random.key(0))
    prompt = jax.ShapeDtypeStruct((task.prompt_length,), jnp.int32)
    answer = jax.ShapeDtypeStruct((task.answer_length,), jnp.int32)
    _check_result(task, "prompt", (key,), prompt)
    _check_result(task, "reward", (prompt, answer), jax.ShapeDtypeStruct((), jnp.float32))
    if task.exact is not None:
        _check_result(task, "exact", (prompt, answer), jax.ShapeDtypeStruct((), jnp.bool_))
    if task.demonstration is not None:
        _check_result(task, "demonstration", (prompt,), answer)


def _check_result(task: Task, field: str, arguments: tuple[Any, ...], wanted: Any) -> None:
    """Refuses a function of a task that fails or gives something else than ``wanted``."""
    where, valid = f"task {task.name}: {field}", f"{wanted.dtype}{list(wanted.shape)}"
    function = getattr(task, field)
    if not callable(function):
        raise ConfigError(where, function, f"a function whose result is {valid}")
    try:
        result = jax.eval_shape(function, *arguments)
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(where, f"{type(error).__name__}: {text}", f"a result {valid}") from error
    shape, dtype = getattr(result, "shape", None), getattr(result, "dtype", None)
    if shape != wanted.shape or dtype != wanted.dtype:
        given = type(result).__name__ if shape is None else f"{dtype}{list(shape)}"
        raise ConfigError(where, given, f"a result {valid}")
