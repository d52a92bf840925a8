"""Tasks whose responses have many tokens, as a domain of ``gipo_jax.train``.

One iteration answers ``num_envs`` prompts, each of them ``rollout_length`` times: a group of
responses. A response's advantage is its reward minus the mean of its group, stored with it in
replay. An update draws ``batch_size`` responses from replay. So buffer, batch and step counts are
in responses. A ``selection`` chooses what is answered and what is learned from; with an objective
of pairs, such as ``dpo``, a right and a wrong response are compared (``preference``).

Staleness comes in three ways: from old data in a large buffer (``buffer_size``), from a lag
(``min_age`` iterations held back) and from reuse (``updates_per_iteration``, ``reuse_per_batch``).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gipo_jax import loss_terms, networks, objectives, ratio_levels, segments
from gipo_jax.config import TOKENS, Config, ConfigError, HParams, check_applies, check_fields
from gipo_jax.domains.interface import Batch, Collected, Domain, Scores
from gipo_jax.domains.tokens import decoder, packing, preference, selection, tasks
from gipo_jax.learner import (
    INIT_STREAM,
    Learner,
    Metrics,
    TrainState,
    gradient_step,
    init_optimizer,
)

EVAL_PROMPTS = 128  # Fresh prompts that an evaluation answers by default

# What is counted: prompts drawn, tokens of responses, and tokens of responses in updates
TOTALS = ("prompts_sampled", "tokens_generated", "tokens_trained")

SELECTION_STREAM = INIT_STREAM - 2  # for the first state of a selection; see INIT_STREAM


class State(NamedTuple):
    """What token tasks carry from one iteration to the next."""

    selection: Any  # what a selection has learned
    reference: Any  # parameters of the reference policy in preference training, else ()


class Row(NamedTuple):
    """Responses as replay keeps them: ``[rollout_length, num_envs, ...]``, or ``[batch, ...]``."""

    prompt: Any  # [..., prompt_length]
    answer: Any  # [..., answer_length], end tokens from the first one on
    behavior_log_prob: Any  # log mu of each token, [..., answer_length]; 0 at padding
    advantage: Any  # [...]; in preference training 1 for a pair, 0 where there is none
    weight: Any = None  # [...], of a selection of responses; None without
    wrong: preference.Wrong | None = None  # of pairs, whose right response is answer
    # log mu of every token, [..., answer_length, vocab]; None where the objective does not ask
    distribution: Any = None


class Joined(NamedTuple):
    """Prompts and responses in dense rows, ``[rows, width]`` each; see ``packing``."""

    token: Array
    following: Array  # the token after it, which it predicts
    position: Array  # in its prompt and response
    response: Array  # number of its response from 1, 0 at padding


class Tokens(Domain):
    """Groups of responses to fresh prompts; see ``Domain``."""

    own_totals = TOTALS

    def __init__(self, config: Config, task: tasks.Task) -> None:
        self.config, self.env = config, task
        self.objective = objectives.spec(config.objective)
        self.preference = preference.is_preference(self.objective)
        if self.preference:
            preference.check(config, self.objective)
        self.selection = selection.make(config, task, self.objective)
        self.packed_rows = packing.rows_of(config, self.selection.stage == selection.GROUP)
        self.joins = self.packed_rows is not None and packing.joins(task, self.objective)
        self.decoder = decoder.make(
            task.vocab,
            task.prompt_length,
            task.answer_length,
            task.end,
            layers=config.decoder_layers,
            width=config.decoder_width,
            heads=config.decoder_heads,
            feed_forward=2 * config.decoder_width,
            precision=networks.precision(config),
        )
        self.ratio_level = ratio_levels.choose(config.ratio_level, self.objective)
        self.standardize = config.normalize_advantage is True
        time = task.prompt_length + task.answer_length
        # Of each token and layer: inputs of the products, and weights of the attention.
        numbers = 16 * config.decoder_width + 3 * config.decoder_heads * time
        self.activations = time * config.decoder_layers * numbers
        self.eval_episodes = EVAL_PROMPTS if config.eval_episodes is None else config.eval_episodes
        self.block = self._block()

    def init(self, hparams: HParams, key: Array) -> tuple[Any, State]:
        """``imitation_updates`` supervised updates come first, with an optimizer of their own."""
        key_params, key_imitation = jax.random.split(jax.random.fold_in(key, INIT_STREAM))
        params = {"policy": self.decoder.init(key_params)}
        if self.env.demonstration is not None:
            params = self._imitate(params, hparams, key_imitation)
        key_selection = jax.random.fold_in(key, SELECTION_STREAM)
        first = self.selection.initial_state(self.env, key_selection)
        return params, State(first, params["policy"] if self.preference else ())

    def _imitate(self, params: Any, hparams: HParams, key: Array) -> Any:
        """Parameters after updates on demonstrations of ``batch_size`` fresh prompts each."""
        task, demonstration = self.env, self.env.demonstration
        rates = {"policy": jnp.asarray(hparams.learning_rate)}

        def one_update(count: Array, learner: Learner) -> Learner:
            keys = jax.random.split(jax.random.fold_in(key, count), self.config.batch_size)
            prompt = jax.vmap(task.prompt)(keys)
            answer = jax.vmap(demonstration)(prompt)

            def loss(params: Any) -> Array:
                log_prob, _ = self.decoder.score(params["policy"], prompt, answer)
                return -jnp.mean(log_prob, where=self.decoder.mask(answer))

            grads = jax.grad(loss)(learner.params)
            return gradient_step(self.config, learner, grads, rates, hparams)[0]

        learner = Learner(params, {"policy": init_optimizer(params["policy"])}, ())
        updates = jnp.asarray(hparams.imitation_updates)
        return jax.lax.fori_loop(0, updates, one_update, learner).params

    def collect(self, state: TrainState, hparams: HParams, key: Array) -> Collected:
        config, task = self.config, self.env
        key_prompts, key_answers, key_select = jax.random.split(key, 3)
        prompts = selection.draw_prompts(
            self.selection, state.domain_state.selection, config, task, key_prompts
        )
        prompt = jnp.tile(prompts, (config.rollout_length, 1))
        answer, log_prob = self.decoder.sample(
            state.learner.params["policy"], prompt, key_answers, hparams.temperature
        )
        reward = jax.vmap(task.reward)(prompt, answer)
        exact = jax.vmap(functools.partial(tasks.is_exact, task))(prompt, answer)
        mask = self.decoder.mask(answer)

        def groups(x: Array) -> Array:
            return x.reshape(config.rollout_length, config.num_envs, *x.shape[1:])

        advantage = group_advantage(groups(reward), config.normalize_groups) * hparams.reward_scale
        rows = Row(groups(prompt), groups(answer), groups(log_prob), advantage)
        if self.objective.takes_distributions:
            policy = state.learner.params["policy"]
            every = self.decoder.score_all(policy, prompt, answer, hparams.temperature)[2]
            rows = rows._replace(distribution=groups(every))
        counts = {
            "returns": jnp.sum(reward),
            "episodes": reward.size,
            "solved": jnp.sum(exact),
            "prompts_sampled": selection.prompts_drawn(self.selection, config),
            "tokens_generated": jnp.sum(mask),
        }
        rows, learned = self._select(
            state, hparams, prompts, rows, groups(exact), groups(mask), key_select
        )
        return Collected(rows, state.domain_state._replace(selection=learned), counts)

    def _select(
        self,
        state: TrainState,
        hparams: HParams,
        prompts: Array,
        rows: Row,
        exact: Array,
        mask: Array,
        key: Array,
    ) -> tuple[Row, Any]:
        """Pairs the responses, where pairs are compared, and weighs them; the selection learns."""
        key_pair, key_weigh = jax.random.split(key)
        group = selection.Group(
            prompts, rows.answer, rows.behavior_log_prob, mask, exact, rows.advantage
        )
        if self.preference:
            rows, margin = self._pair(state, hparams, rows, exact, key_pair)
            group = group._replace(advantage=rows.advantage, margin=margin)
        weight = selection.weigh(self.selection, state.domain_state.selection, group, key_weigh)
        learned = self.selection.update(state.domain_state.selection, group)
        return rows._replace(weight=weight), learned

    def _pair(
        self, state: TrainState, hparams: HParams, rows: Row, exact: Array, key: Array
    ) -> tuple[Row, Array]:
        """Pairs in place of responses, and their margin when they were sampled."""
        pairs = preference.pair(exact, key)
        prompt, answer = (x.reshape(-1, x.shape[-1]) for x in (rows.prompt, rows.answer))
        log_prob, _ = self.decoder.score(
            state.domain_state.reference, prompt, answer, hparams.temperature
        )
        log_prob = jnp.where(self.decoder.mask(answer), log_prob, 0)
        reference = jnp.sum(log_prob, axis=1).reshape(exact.shape)
        behavior = jnp.sum(rows.behavior_log_prob, axis=2)

        def margin(x: Array) -> Array:
            return preference.take(x, pairs.right) - preference.take(x, pairs.wrong)

        wrong = preference.Wrong(
            preference.take(rows.answer, pairs.wrong),
            preference.take(rows.behavior_log_prob, pairs.wrong),
            margin(reference),
        )
        rows = rows._replace(
            answer=preference.take(rows.answer, pairs.right),
            behavior_log_prob=preference.take(rows.behavior_log_prob, pairs.right),
            advantage=pairs.exists.astype(jnp.float32),
            wrong=wrong,
        )
        return rows, margin(behavior - reference)

    def batch(
        self,
        state: TrainState,
        params: Any,
        rows: Row,
        age: Array,
        hparams: HParams,
        key: Array | None = None,
    ) -> Batch:
        """A batch, of which updates compute ``packed_rows`` where there are such."""
        if key is None or self.packed_rows is None:
            return self._of_rows(rows, age)
        return self.packed(rows, age, jax.random.uniform(key, rows.advantage.shape))

    def packed(self, rows: Row, age: Array, noise: Array) -> Batch:
        """A batch of responses with their weights in ``packed_rows``; noise as of ``packing``."""
        assert self.packed_rows is not None
        length = jnp.sum(self.decoder.mask(rows.answer), axis=1)
        weight = jnp.ones(length.shape) if rows.weight is None else rows.weight
        if self.joins:
            width = self.env.prompt_length + self.env.answer_length - 1
            joined = packing.join(
                weight, length, noise, self.packed_rows, width, self.env.prompt_length - 1
            )
            return self._joined(rows, age, joined)
        index, weights = packing.apart(weight, length, noise, self.packed_rows)
        rows, age = jax.tree.map(lambda x: x[index], (rows, age))
        batch = self._of_rows(rows, age, weights.answer > 0)
        of_rows = weights.answer if self.preference else self._factor(weights)[:, None]
        return batch._replace(surrogate_weight=of_rows, token_weight=weights.token[:, None])

    def _of_rows(self, rows: Row, age: Array, counted: Array | None = None) -> Batch:
        """A batch with a response, or a pair, in each row, of which some are counted."""
        masks = [self.decoder.mask(rows.answer)]
        if rows.wrong is not None:
            masks.append(self.decoder.mask(rows.wrong.answer))
        length = sum(jnp.sum(mask, axis=1) for mask in masks)
        counts = {"tokens_trained": jnp.sum(length, where=counted)}
        log_prob, advantage = rows.behavior_log_prob, rows.advantage
        return Batch(rows, log_prob, advantage, age, mask=masks[0], counts=counts)

    def _joined(self, rows: Row, age: Array, joined: packing.Joined) -> Batch:
        """A batch of dense rows."""
        tokens = jnp.concatenate([rows.prompt, rows.answer], axis=1)
        before = ((0, 0), (self.env.prompt_length - 1, 0))
        mask = joined.take(jnp.pad(self.decoder.mask(rows.answer), before)).astype(bool)
        response = joined.response
        counted = mask & joined.take(joined.weights.answer > 0).astype(bool)
        return Batch(
            Joined(
                joined.take(tokens[:, :-1]), joined.take(tokens[:, 1:]), joined.position, response
            ),
            joined.take(jnp.pad(rows.behavior_log_prob, before)),
            joined.take(rows.advantage),
            age,
            mask=mask,
            first=segments.starts(response),
            max_tokens=self.env.answer_length,
            surrogate_weight=joined.take(self._factor(joined.weights)),
            token_weight=joined.take(joined.weights.token),
            counts={"tokens_trained": jnp.sum(counted)},
        )

    def _factor(self, weights: packing.Weights) -> Array:
        """Weights of responses in the mean that their surrogate is in."""
        return weights.token if self.config.loss_agg_mode == "token-mean" else weights.answer

    def score(self, params: Any, batch: Batch, hparams: HParams) -> Scores:
        rows, temperature = batch.data, hparams.temperature
        if isinstance(rows, Joined):
            log_prob, entropy = self.decoder.score_joined(params["policy"], *rows, temperature)
            return Scores(log_prob - batch.behavior_log_prob, entropy)
        policy = functools.partial(self.decoder.score_all, params["policy"], rows.prompt)
        log_prob, entropy, every = policy(rows.answer, temperature)
        scores = Scores(log_prob - batch.behavior_log_prob, entropy)
        if rows.distribution is not None:
            scores = scores._replace(distributions=(rows.distribution, every))
        if rows.wrong is None:
            return scores
        other, *_ = policy(rows.wrong.answer, temperature)
        other_mask = self.decoder.mask(rows.wrong.answer)
        margin = preference.difference((log_prob, other), (batch.mask, other_mask))
        log_ratio = ratio_levels.transform(
            other - rows.wrong.behavior_log_prob, "joint", other_mask
        )
        return scores._replace(
            margin=margin - rows.wrong.reference_margin, other_log_ratio=log_ratio[:, 0]
        )

    def evaluate(self, acting: Any, hparams: HParams, key: Array, episodes: int) -> Metrics:
        """Share of fresh prompts with a right response: of likeliest tokens, of sampled ones."""
        key_prompts, key_answers = jax.random.split(key)
        prompt = jax.vmap(self.env.prompt)(jax.random.split(key_prompts, episodes))
        greedy = self.choose_action(acting, hparams, prompt)
        sampled = self.choose_action(acting, hparams, prompt, key_answers)
        exact = jax.vmap(functools.partial(tasks.is_exact, self.env))
        return {
            "eval_return": jnp.mean(exact(prompt, greedy)),
            "eval_return_sampled": jnp.mean(exact(prompt, sampled)),
        }

    def choose_action(
        self, acting: Any, hparams: HParams, obs: Array, key: Array | None = None
    ) -> Array:
        """Response ``[..., answer_length]`` to prompts, sampled with a key, else the likeliest."""
        obs, policy = jnp.asarray(obs), acting["params"]["policy"]
        prompt = obs.reshape(-1, self.env.prompt_length)
        if key is None:
            answer = self.decoder.greedy(policy, prompt)
        else:
            answer, _ = self.decoder.sample(policy, prompt, key, hparams.temperature)
        return answer.reshape(*obs.shape[:-1], self.env.answer_length)

    def metrics(self, state: TrainState, batch: Batch) -> Metrics:
        assert batch.mask is not None
        length = jnp.sum(batch.mask, axis=1).astype(jnp.float32)
        return {name: state.totals[name] for name in TOTALS} | {
            "success_rate": state.totals["solved"] / state.totals["episodes"],
            "answer_length": jnp.mean(length),
        }

    def _block(self) -> Row:
        """Shapes of an iteration's rows."""
        task, like = self.env, self.like
        prompt, answer = (
            like(n, dtype=jnp.int32) for n in (task.prompt_length, task.answer_length)
        )
        block = Row(prompt, answer, like(task.answer_length), like())
        if self.selection.stage == selection.GROUP:
            block = block._replace(weight=like())
        if self.objective.takes_distributions:
            block = block._replace(distribution=like(task.answer_length, task.vocab))
        if self.preference:
            wrong = preference.Wrong(block.answer, block.behavior_log_prob, block.advantage)
            block = block._replace(wrong=wrong)
        return block


def group_advantage(reward: Array, standardize: bool = False) -> Array:
    """Reward ``[responses, prompts]`` minus the mean over the responses to the same prompt.

    Where standardised, over their population standard deviation too (floor 1e-8), as in GRPO
    (arXiv:2402.03300).
    """
    if standardize:
        return jax.vmap(loss_terms.standardize, in_axes=1, out_axes=1)(reward)
    return reward - jnp.mean(reward, axis=0)


def make(config: Config, task: tasks.Task | None = None) -> Tokens:
    """Token tasks of a configuration; see ``domains.make``."""
    check_fields(config)
    objective = objectives.spec(config.objective)
    check_applies(config, domain=TOKENS, objective=objective)
    task = tasks.make(config.env) if task is None else task
    if config.rollout_length < 2:
        valid = "an integer >= 2, because an answer is compared with others to the same prompt"
        raise ConfigError("rollout_length", config.rollout_length, valid)
    if objective.kind == "batch" and task.end is not None and not objective.takes_mask:
        valid = f"one that takes mask, because answers of {task.name} are padded"
        raise ConfigError("objective", objective.name, valid)
    return Tokens(config, task)


def check_hparams(config: Config, hparams: HParams) -> None:
    """Refuses imitation of a task that shows none. Raises ConfigError."""
    task = tasks.make(config.env)
    if hparams.imitation_updates and task.demonstration is None:
        valid = f"0, because the task {task.name} has no demonstrations"
        raise ConfigError("imitation_updates", hparams.imitation_updates, valid)
