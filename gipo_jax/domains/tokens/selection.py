"""Selection: which prompts are answered, and which answers are learned from.

A selection is one pure function of static shape, by name or in your own file. The name of its first
parameter says what it weighs, and so when it is called::

    def short_first(prompts, state, key):    # tokens [candidates, prompt_length]
        return 1.0 * (prompts[:, 8] == 2)    # weights [candidates]; 2 is this task's end token

    def only_better(group, state, key):      # a Group: answers to prompts, with their rewards
        return 1.0 * (group.advantage > 0)   # weights [answers, prompts]

Weights are >= 0. What they mean:

- Of ``prompts``, before they are answered: ``num_envs`` of ``num_candidates`` prompts are drawn
  without replacement in proportion to their weights, one of weight 0 only where the others are too
  few. It saves rollouts.
- Of a ``group``, once it is answered: an answer of weight 0 is never learned from, any other counts
  as often as its weight says. Batches are packed into ``packed_size`` rows (``packing``), which
  saves back-propagation. Answers of weight 0 keep their place in replay.

``declare`` gives a selection a state, which learns from every group. ``SELECTIONS`` are:

- ``keep_all``: no selection, the default.
- ``depo``: of prompts, by a learnt estimate of their difficulty (arXiv:2602.06375).
- ``prune``: of answers, at random without bias (arXiv:2603.04135).
- ``low_margin``: of preference pairs, those of lowest margin, from pools by difficulty.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

from gipo_jax import user_files
from gipo_jax.config import Config, ConfigError
from gipo_jax.domains.tokens import packing
from gipo_jax.domains.tokens.tasks import Task
from gipo_jax.signatures import Spec

PROMPTS, GROUP = "prompts", "group"


class Group(NamedTuple):
    """What an iteration has sampled: some answers to each of its prompts."""

    prompt: Array  # [prompts, prompt_length]
    answer: Array  # [answers, prompts, answer_length], end tokens from the first one on
    log_prob: Array  # of each token when it was sampled, same shape; 0 at padding
    mask: Array  # false at padding, same shape
    exact: Array  # whether an answer is right, bool [answers, prompts]
    # as learning takes it, [answers, prompts]; in preference training 1 where the answer has a
    # partner to make a pair with, else 0
    advantage: Array
    # in preference training, log-probability of the right minus that of the wrong answer of the
    # pair, less the same under the reference policy, [answers, prompts]; else None
    margin: Array | None = None


State = Any


class Selection(NamedTuple):
    """A selection with its settings filled in."""

    name: str  # for tables
    stage: str | None  # PROMPTS or GROUP, what it weighs; None for keep_all
    select: Callable[[Any, State, Array], Array]  # prompts or group, state, key -> weights
    # task, key -> state, and state, group -> state, called once an iteration; by default no state
    initial_state: Callable[[Task, Array], State] = lambda task, key: ()
    update: Callable[[State, Group], State] = lambda state, group: state


def declare(
    *,
    initial_state: Callable[[Task, Array], State],
    update: Callable[[State, Group], State],
) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    """Gives a selection a state, a pytree of arrays, which is updated after every iteration's
    answers.
    """

    def attach(function: Callable[..., Array]) -> Callable[..., Array]:
        function.state_functions = (initial_state, update)  # type: ignore[attr-defined]
        return function

    return attach


# Where the algorithm calls a selection.


def draw_prompts(
    selection: Selection, state: State, config: Config, task: Task, key: Array
) -> Array:
    """The prompts of an iteration, ``[num_envs, prompt_length]``."""
    if selection.stage != PROMPTS:
        return jax.vmap(task.prompt)(jax.random.split(key, config.num_envs))
    key_prompts, key_select, key_draw = jax.random.split(key, 3)
    count = prompts_drawn(selection, config)
    prompts = jax.vmap(task.prompt)(jax.random.split(key_prompts, count))
    weight = _checked(selection, (count,), prompts, state, key_select)
    # The largest of log weight + Gumbel noise are a weighted draw without replacement.
    noise = jax.random.gumbel(key_draw, (count,))
    last = jnp.where(weight > 0, jnp.log(jnp.where(weight > 0, weight, 1)), -1e6)
    return prompts[jax.lax.top_k(last + noise, config.num_envs)[1]]


def weigh(selection: Selection, state: State, group: Group, key: Array) -> Array | None:
    """Weights ``[answers, prompts]`` to store with answers; None where all count alike."""
    if selection.stage != GROUP:
        return None
    return _checked(selection, group.advantage.shape, group, state, key)


def prompts_drawn(selection: Selection, config: Config) -> int:
    """Prompts drawn an iteration, of which ``num_envs`` are answered."""
    if selection.stage != PROMPTS:
        return config.num_envs
    return config.num_candidates or 4 * config.num_envs


# The built-in ones.


MAX_PRUNED = 0.7  # highest probability with which prune leaves out a prompt, or an answer


def keep_probability(advantage: Array, size: Array, part: float) -> tuple[Array, Array]:
    """Probabilities with which ``prune`` keeps prompts ``[prompts]``, and answers of kept prompts.

    A prompt, and likewise an answer of it, is kept in proportion to its abs(A) over the mean, a
    prompt's being the mean of its answers', within [1 - MAX_PRUNED, 1]. The proportion is the one
    with which the answers that stay have ``part`` rows for each answer in the mean, ``size`` being
    the rows that each takes ``[answers, prompts]``; or it is as near as these bounds allow.
    """
    of_answer = jnp.abs(advantage) / jnp.maximum(jnp.mean(jnp.abs(advantage)), 1e-8)
    of_prompt = jnp.mean(of_answer, axis=0)

    def probabilities(scale: Array) -> tuple[Array, Array]:
        prompt, answer = (
            jnp.clip(scale * share, 1 - MAX_PRUNED, 1) for share in (of_prompt, of_answer)
        )
        return prompt, answer

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        prompt, answer = probabilities(middle)
        enough = jnp.mean(prompt * answer * size) >= part
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    most = jnp.float32(advantage.size)
    return probabilities(jax.lax.fori_loop(0, 24, halve, (jnp.zeros(()), most))[1])


def prune(part: float, size: Callable[[Array], Array]) -> Selection:
    """Unbiased dynamic pruning (arXiv:2603.04135) down to ``part`` rows for each answer.

    A prompt with its whole group, and an answer of it, is left out with probability P each, and
    what stays has the weight 1 / (1 - P): the expected gradient is that of all answers, for any
    objective that is a sum over answers. It saves back-propagation, not rollouts. ``size`` gives
    the rows that answers of so many tokens take.

    Unverified: the paper was read second-hand. Its scores are unknown, and it scores a prompt by
    its history; prompts here are fresh, so ``keep_probability`` scores their groups. A reader of
    the paper reports that its appendix leaves out a fixed fraction instead, which is biased.
    """

    def select(group: Group, state: State, key: Array) -> Array:
        key_prompt, key_answer = jax.random.split(key)
        length = jnp.sum(group.mask, axis=2)
        of_prompt, of_answer = keep_probability(group.advantage, size(length), part)
        keep_prompt = jax.random.bernoulli(key_prompt, of_prompt)
        keep_answer = jax.random.bernoulli(key_answer, of_answer)
        return (keep_prompt & keep_answer) / (of_prompt * of_answer)

    return Selection("prune", GROUP, select)


class DepoState(NamedTuple):
    """The difficulty estimate of ``depo``, and how many groups it has learned from."""

    params: Any
    opt_state: Any
    updates: Array


class Estimator(nn.Module):
    """Two logits for each prompt ``[..., prompt_length]``: of success, and of confidence."""

    vocab: int

    @nn.compact
    def __call__(self, prompts: Array) -> Array:
        tokens = jax.nn.one_hot(prompts, self.vocab)
        x = nn.Dense(64)(tokens.reshape(*prompts.shape[:-1], -1))
        return nn.Dense(2)(nn.silu(x))


def depo(vocab: int, config: Config) -> Selection:
    """Difficulty-estimated selection (DEPO, arXiv:2602.06375).

    A small network estimates the share of right answers to a prompt. Candidates with an estimate
    in ``depo_range`` have weight 1, the others 0; in the first ``depo_start`` iterations all have
    weight 1. It saves rollouts: answers that are all right or all wrong teach nothing.

    Verified from the authors' code (github.com/AIDC-AI/Marco-o1): range, start and loss. Theirs is
    a pre-trained text encoder with learning rate 2e-4; here it is one hidden layer on tokens.
    """
    network, optimizer = Estimator(vocab), optax.adam(config.depo_learning_rate)
    low, high = config.depo_range

    def initial_state(task: Task, key: Array) -> DepoState:
        params = network.init(key, jnp.zeros((task.prompt_length,), jnp.int32))
        return DepoState(params, optimizer.init(params), jnp.int32(0))

    def select(prompts: Array, state: DepoState, key: Array) -> Array:
        logits: Any = network.apply(state.params, prompts)
        success = jax.nn.sigmoid(logits[:, 0])
        fits = (success >= low) & (success <= high)
        return jnp.where(state.updates < config.depo_start, 1.0, fits.astype(jnp.float32))

    def update(state: DepoState, group: Group) -> DepoState:
        success = jnp.mean(group.exact.astype(jnp.float32), axis=0)
        confidence = jnp.mean(jnp.exp(jnp.mean(group.log_prob, axis=2, where=group.mask)), axis=0)

        def loss(params: Any) -> Array:
            logits: Any = network.apply(params, group.prompt)
            return depo_loss(logits, success, confidence)

        def one_update(_: Any, learner: tuple[Any, Any]) -> tuple[Any, Any]:
            params, opt_state = learner
            updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
            return optax.apply_updates(params, updates), opt_state

        params, opt_state = jax.lax.fori_loop(
            0, config.depo_updates, one_update, (state.params, state.opt_state)
        )
        return DepoState(params, opt_state, state.updates + 1)

    return Selection("depo", PROMPTS, select, initial_state, update)


def depo_loss(logits: Array, success: Array, confidence: Array) -> Array:
    """Loss of DEPO's estimate (arXiv:2602.06375): BCE + 0.5 BCE + 3 mean hinge.

    ``success`` is the share of right answers to each prompt, ``confidence`` the mean over answers
    of exp(mean log-probability of a token), and ``logits`` ``[prompts, 2]`` estimate the two. The
    hinge max(0, 0.5 - (z_i - z_j)) is of all pairs of prompts whose success differs by more than
    0.05, z_i the logit of the one with more success.
    """
    entropy = optax.sigmoid_binary_cross_entropy
    z = logits[:, 0]
    apart = success[:, None] - success > 0.05
    hinge = jax.nn.relu(0.5 - (z[:, None] - z))
    ranking = jnp.sum(jnp.where(apart, hinge, 0)) / jnp.maximum(jnp.sum(apart), 1)
    return (
        jnp.mean(entropy(z, success))
        + 0.5 * jnp.mean(entropy(logits[:, 1], confidence))
        + 3 * ranking
    )


POOLS = 3  # of low_margin, by difficulty


def low_margin(part: float) -> Selection:
    """A ``part`` of the preference pairs: those of the lowest margin of each pool by difficulty.

    The pairs of an iteration go into ``POOLS`` pools by the share of right answers in their group:
    up to a third, up to two thirds, above. Each pool gives the same number of pairs, those with the
    lowest margin z of DPO, or all where it has fewer.

    It takes from SAGE (arXiv:2602.01207) that pairs come from pools by difficulty and are ranked by
    signal to noise: e^-z = s(-z)^2 / (s(z) s(-z)), s the logistic function, is the squared gradient
    of DPO over its curvature. It is not SAGE, whose pools persist and are refreshed as the policy
    becomes more competent, and whose score, not found, also weighs stability.
    """

    def select(group: Group, state: State, key: Array) -> Array:
        assert group.margin is not None
        shape, is_pair = group.margin.shape, (group.advantage > 0).reshape(-1)
        success = jnp.mean(group.exact.astype(jnp.float32), axis=0)
        pool = jnp.broadcast_to(jnp.ceil(POOLS * success), shape).reshape(-1)
        # Pairs whose score is the same are in random order.
        order = jnp.lexsort((jax.random.uniform(key, pool.shape), group.margin.reshape(-1)))
        place = jnp.argsort(order)
        before = (pool[:, None] == pool) & (place < place[:, None]) & is_pair
        quota = max(round(part * pool.size / POOLS), 1)
        chosen = is_pair & (jnp.sum(before, axis=1) < quota)
        return chosen.astype(jnp.float32).reshape(shape)

    return Selection("low_margin", GROUP, select)


# What the built-in selections weigh, by name
SELECTIONS = {"keep_all": None, "depo": PROMPTS, "prune": GROUP, "low_margin": GROUP}
RENAMED = {"sage": "low_margin"}  # names of today by the old ones


def make(config: Config, task: Task, objective: Spec) -> Selection:
    """The selection that a configuration means; raises ConfigError where it does not fit."""
    chosen, pairs = _of_today(config.selection), "margin" in objective.inputs
    rows = packing.rows_of(config, stage_of(chosen) == GROUP) or config.batch_size
    part, joined = rows / config.batch_size, packing.joins(task, objective)
    if callable(chosen) or user_files.is_reference(chosen):
        selection = _own(chosen)
    elif chosen not in SELECTIONS:
        valid = f"one of {', '.join(SELECTIONS)}, FILE.py:FUNCTION or a function"
        raise ConfigError("selection", chosen, valid)
    elif chosen == "low_margin" and not pairs:
        raise ConfigError("selection", chosen, "one for single answers, or objective dpo")
    else:
        selection = {
            "keep_all": lambda: Selection("keep_all", None, lambda *_: jnp.ones(())),
            "depo": lambda: depo(task.vocab, config),
            "prune": lambda: prune(part, lambda length: packing.size(task, length, joined)),
            "low_margin": lambda: low_margin(part),
        }[chosen]()
    packed, candidates = config.packed_size, config.num_candidates
    if candidates is not None and selection.stage != PROMPTS:
        valid = f"left out, because selection {selection.name} does not use it"
        raise ConfigError("num_candidates", candidates, valid)
    if candidates is not None and candidates < config.num_envs:
        raise ConfigError("num_candidates", candidates, f"an integer >= num_envs {config.num_envs}")
    if packed is not None and packed > config.batch_size:
        valid = f"an integer from 1 to batch_size {config.batch_size}"
        raise ConfigError("packed_size", packed, valid)
    if selection.stage == GROUP:
        _check_additive(config, objective, f"selection {selection.name} leaves")
    if packed is not None:
        _check_additive(config, objective, "packed_size may leave")
    if selection.name not in SELECTIONS:
        _try_out(selection, config, task, pairs)
    return selection


def _check_additive(config: Config, objective: Spec, leaves: str) -> None:
    """Refuses statistics of the batch where part of it is left out. Raises ConfigError."""
    because = f"because {leaves} out part of the batch"
    if config.normalize_advantage is True:
        raise ConfigError("normalize_advantage", True, f"false, {because}")
    if objective.kind == "batch" or objective.initial_state is not None:
        valid = f"one without a statistic of the batch or a state, {because}"
        raise ConfigError("objective", objective.name, valid)


def stage_of(chosen: Any) -> str | None:
    """What the selection of a name, reference or function weighs; errors as of ``make``."""
    if callable(chosen) or user_files.is_reference(chosen):
        return _own(chosen).stage
    return SELECTIONS.get(RENAMED.get(str(chosen), str(chosen)))


def own_settings(settings: Mapping[str, Any], beside: Sequence[Any]) -> dict[str, Any]:
    """Fields of ``Config`` without those that only other selections of the sweep use."""
    chosen = settings["selection"]
    others: list[str] = []
    if stage_of(chosen) != PROMPTS and PROMPTS in map(stage_of, beside):
        others.append("num_candidates")
    if chosen != "depo" and "depo" in beside:
        others += [name for name in settings if name.startswith("depo_")]
    return {name: value for name, value in settings.items() if name not in others}


def _of_today(chosen: Any) -> Any:
    """The selection that a name means today, with a warning for an old one."""
    if not isinstance(chosen, str) or chosen not in RENAMED:
        return chosen
    message = f"selection {chosen} is called {RENAMED[chosen]} now; the old name goes with the next"
    warnings.warn(f"{message} release", DeprecationWarning, stacklevel=2)
    return RENAMED[chosen]


def name_of(selection: Any) -> str:
    """How a selection, by name or function, is called in tables."""
    return selection if isinstance(selection, str) else getattr(selection, "__name__", "selection")


def _own(chosen: Any) -> Selection:
    """A selection of the user's own."""
    name = name_of(chosen)
    if isinstance(chosen, str):
        chosen = user_files.load("selection", chosen, "FUNCTION")
    try:
        first = list(inspect.signature(chosen).parameters)
    except (TypeError, ValueError):
        first = []
    if len(first) != 3 or first[0] not in (PROMPTS, GROUP) or first[1:] != ["state", "key"]:
        valid = f"a function of ({PROMPTS}, state, key) or ({GROUP}, state, key)"
        raise ConfigError("selection", name, valid)
    return Selection(name, first[0], chosen, *getattr(chosen, "state_functions", ()))


def _try_out(selection: Selection, config: Config, task: Task, pairs: bool) -> None:
    """Runs a user's selection on shapes alone. Raises ConfigError where it fails."""
    answers = (config.rollout_length, config.num_envs)

    def run() -> None:
        key = jax.random.key(0)
        state = selection.initial_state(task, key)
        group = Group(
            prompt=jnp.zeros((config.num_envs, task.prompt_length), jnp.int32),
            answer=jnp.zeros((*answers, task.answer_length), jnp.int32),
            log_prob=jnp.zeros((*answers, task.answer_length)),
            mask=jnp.ones((*answers, task.answer_length), bool),
            exact=jnp.ones(answers, bool),
            advantage=jnp.zeros(answers),
            margin=jnp.zeros(answers) if pairs else None,
        )
        drawn = prompts_drawn(selection, config)
        prompts = jnp.zeros((drawn, task.prompt_length), jnp.int32)
        of_prompts = selection.stage == PROMPTS
        shape = (drawn,) if of_prompts else answers
        _checked(selection, shape, prompts if of_prompts else group, state, key)
        before, after = (
            jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), s)
            for s in (state, selection.update(state, group))
        )
        if before != after:
            valid = f"a state like the one before, {before}"
            raise ConfigError(f"selection {selection.name}", after, valid)

    try:
        jax.eval_shape(run)
    except ConfigError:
        raise
    except Exception as error:
        file = user_files.source_file(selection.select)
        place = user_files.located(error, file) if file else None
        text = place or f"code that runs; {type(error).__name__}: {str(error).splitlines()[0]}"
        raise ConfigError("selection", selection.name, text) from error


def _checked(
    selection: Selection, shape: tuple[int, ...], given: Any, state: State, key: Array
) -> Array:
    """The weights that a selection gives, of the shape that they must have."""
    weight = selection.select(given, state, key)
    if jnp.shape(weight) != shape:
        form = list(jnp.shape(weight)) if hasattr(weight, "shape") else type(weight).__name__
        raise ConfigError(f"selection {selection.name}", form, f"weights {list(shape)}")
    return jnp.asarray(weight, jnp.float32)
