"""The algorithm for tasks whose answers have many tokens; ``gipo_jax.train`` is that for control.

One iteration answers ``num_envs`` prompts, each of them ``rollout_length`` times: a group of
answers. An answer's advantage is its reward minus the mean of its group, stored with it in replay.
An update draws ``batch_size`` answers from replay. So buffer, batch and step counts are in answers,
and everything around the algorithm is that of control: sweeps, resume, plots, loading.

A ``selection`` chooses what is answered and what is learned from. With an objective of pairs, such
as ``dpo``, what replay keeps and an update compares is a right and a wrong answer (``preference``).

Staleness comes in three ways: from old data in a large buffer (``buffer_size``), from a lag
(``min_age`` iterations held back) and from reuse (``updates_per_iteration``, ``reuse_per_batch``).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array

from gipo_jax import buffer, diagnostics, losses, objectives, ratio_levels, signatures, train
from gipo_jax.config import Config, ConfigError, HParams, check_fields
from gipo_jax.sequences import decoder, preference, selection, tasks
from gipo_jax.train import Algorithm, Learner, Metrics, TrainState

EVAL_PROMPTS = 128
"""Fresh prompts that an evaluation answers by default."""


class Answers(NamedTuple):
    """Answers as replay keeps them: ``[rollout_length, num_envs, ...]``, or ``[batch, ...]``.

    Attributes:
        prompt: ``[..., prompt_length]``.
        answer: ``[..., answer_length]``, end tokens from the first one on.
        behavior_log_prob: log mu of each token, ``[..., answer_length]``; 0 at padding.
        advantage: ``[...]``; in preference training 1 for a pair, 0 where there is none.
        weight: ``[...]``, of a selection of answers; None without.
        wrong: in preference training the wrong answer of a pair, where ``answer`` is the right one;
            else None.
    """

    prompt: Array
    answer: Array
    behavior_log_prob: Array
    advantage: Array
    weight: selection.Weights | None = None
    wrong: preference.Wrong | None = None


class Parts(NamedTuple):
    """What a static configuration consists of."""

    config: Config
    task: tasks.Task
    decoder: decoder.Decoder
    objective: signatures.Spec
    ratio_level: str
    selection: selection.Selection
    preference: bool


# One iteration, from top to bottom.


def train_step(
    parts: Parts, state: TrainState, hparams: HParams, iteration: int | Array
) -> tuple[TrainState, Metrics]:
    """One iteration: answer, store, learn; arguments and results as in ``gipo_jax.train``."""
    key = jax.random.fold_in(state.key, iteration)
    key_act, key_learn, key_pack = jax.random.split(key, 3)

    state, answers = act(parts, state, hparams, key_act)
    state = state._replace(replay=buffer.add(state.replay, answers, iteration))
    learner, metrics = learn(parts, state, hparams, iteration, key_learn, key_pack)

    state = count(state, tokens_trained=metrics.pop("tokens_trained"))
    return train.keep_finite(state, learner, iteration), metrics


def act(
    parts: Parts, state: TrainState, hparams: HParams, key: Array
) -> tuple[TrainState, Answers]:
    """Groups of answers to fresh prompts, ``[rollout_length, num_envs, ...]``."""
    config, task = parts.config, parts.task
    key_prompts, key_answers, key_select = jax.random.split(key, 3)
    prompts = selection.draw_prompts(parts.selection, state.selection, config, task, key_prompts)
    prompt = jnp.tile(prompts, (config.rollout_length, 1))
    answer, log_prob = parts.decoder.sample(
        state.learner.params["policy"], prompt, key_answers, hparams.temperature
    )
    reward = jax.vmap(task.reward)(prompt, answer)
    solved = jax.vmap(functools.partial(tasks.is_exact, task))(prompt, answer)

    def groups(x: Array) -> Array:
        return x.reshape(config.rollout_length, config.num_envs, *x.shape[1:])

    advantage = group_advantage(groups(reward)) * hparams.reward_scale
    rows = Answers(groups(prompt), groups(answer), groups(log_prob), advantage)
    mask = parts.decoder.mask(answer)
    state = count(
        state,
        prompts_sampled=selection.prompts_drawn(parts.selection, config),
        tokens_generated=jnp.sum(mask),
    )._replace(
        return_sum=state.return_sum + jnp.sum(reward),
        episodes=state.episodes + reward.size,
        solved=state.solved + jnp.sum(solved),
    )
    return select(parts, state, hparams, prompts, rows, groups(solved), groups(mask), key_select)


def select(
    parts: Parts,
    state: TrainState,
    hparams: HParams,
    prompts: Array,
    rows: Answers,
    exact: Array,
    mask: Array,
    key: Array,
) -> tuple[TrainState, Answers]:
    """Pairs the answers, where pairs are compared, and weighs them; the selection learns from them.

    Args:
        parts: of the configuration.
        state: with the policy that gave the answers.
        hparams: traced settings of the run.
        prompts: ``[num_envs, prompt_length]``.
        rows: answers and advantages.
        exact: whether an answer is right, bool ``[rollout_length, num_envs]``.
        mask: of the answers, ``[rollout_length, num_envs, answer_length]``.
        key: PRNG key.
    """
    key_pair, key_weigh = jax.random.split(key)
    group = selection.Group(
        prompts, rows.answer, rows.behavior_log_prob, mask, exact, rows.advantage
    )
    if parts.preference:
        rows, margin = make_pairs(parts, state, hparams, rows, exact, key_pair)
        group = group._replace(advantage=rows.advantage, margin=margin)
    weight = selection.weigh(parts.selection, state.selection, group, key_weigh)
    state = state._replace(selection=parts.selection.update(state.selection, group))
    return state, rows._replace(weight=weight)


def make_pairs(
    parts: Parts, state: TrainState, hparams: HParams, rows: Answers, exact: Array, key: Array
) -> tuple[Answers, Array]:
    """Pairs in place of answers, and their margin when they were sampled; see ``preference``."""
    pairs = preference.pair(exact, key)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
    log_prob, _ = score(parts, {"policy": state.reference}, flat, hparams)
    log_prob = jnp.where(parts.decoder.mask(flat.answer), log_prob, 0)
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


def count(state: TrainState, **numbers: Any) -> TrainState:
    """Adds to the counts of what has been spent since the last logged point."""
    sums = {name: state.counts[name] + number for name, number in numbers.items()}
    return state._replace(counts=state.counts | sums)


def group_advantage(reward: Array) -> Array:
    """Reward ``[answers, prompts]`` minus the mean over the answers to the same prompt."""
    return reward - jnp.mean(reward, axis=0)


def learn(
    parts: Parts,
    state: TrainState,
    hparams: HParams,
    iteration: int | Array,
    key: Array,
    key_pack: Array,
) -> tuple[Learner, Metrics]:
    """The update phase. Updates wait until replay holds a batch drawn without replacement.

    Metrics are means over the updates, and ``tokens_trained`` their sum.
    """
    config = parts.config
    updates = config.updates_per_iteration * config.reuse_per_batch
    indices = train.sample_indices(config, hparams, iteration, key, config.updates_per_iteration)

    def one_update(learner: Learner, count: Array) -> tuple[Learner, Metrics]:
        index = indices[count // config.reuse_per_batch]
        batch, _ = buffer.take_rows(state.replay, index, iteration)
        batch = pack(parts, batch, jax.random.fold_in(key_pack, count))
        policy_scale = train.reuse_scale(config, count)
        return update(parts, state, learner, batch, hparams, iteration, policy_scale)

    def all_updates(learner: Learner) -> tuple[Learner, Metrics]:
        learner, metrics = jax.lax.scan(one_update, learner, jnp.arange(updates))
        trained = jnp.sum(metrics.pop("tokens_trained"))
        return learner, jax.tree.map(jnp.mean, metrics) | {"tokens_trained": trained}

    return train.once_filled(config, iteration, all_updates, state.learner)


def pack(parts: Parts, batch: Answers, key: Array) -> Answers:
    """The rows of a batch that an update learns from: all, unless a selection weighs answers."""
    if batch.weight is None:
        return batch
    length = jnp.sum(parts.decoder.mask(batch.answer), axis=1)
    noise = jax.random.uniform(key, length.shape)
    rows = selection.packed_rows(parts.config)
    index, weight = selection.pack(batch.weight, length, rows, noise)
    return jax.tree.map(lambda x: x[index], batch)._replace(weight=weight)


def update(
    parts: Parts,
    state: TrainState,
    learner: Learner,
    batch: Answers,
    hparams: HParams,
    iteration: int | Array,
    policy_scale: Array,
) -> tuple[Learner, Metrics]:
    """One update of the policy on the rows of ``pack``."""
    mask = parts.decoder.mask(batch.answer)
    advantage = advantage_of(parts.config, batch, mask)
    objective = bind_objective(parts, state, learner, hparams, batch, mask)
    gradient = jax.grad(loss, has_aux=True)
    grads, terms = gradient(learner.params, parts, batch, objective, hparams, policy_scale)
    if parts.preference:
        weight = jnp.broadcast_to(terms.pair_weight[:, None], mask.shape)
    else:
        weight = losses.objective_weight(objective, terms.log_ratio, advantage)
    ess = diagnostics.effective_sample_size(weight, mask & (advantage != 0))
    ess = jnp.where(jnp.isnan(ess), 1.0, ess)  # all answers worth the same
    rate = hparams.learning_rate * ess**hparams.ess_lr_power
    rate = rate * train.learning_rate_factor(parts.config, hparams, iteration)
    policy, opt_state, norm = train.apply_gradient(learner, "policy", grads, hparams, rate)
    learner = Learner({"policy": policy}, {"policy": opt_state}, terms.objective_state)
    spent = {"grad_norm": norm, "tokens_trained": tokens_trained(parts, batch)}
    return learner, terms.metrics | spent


class Terms(NamedTuple):
    """What a loss gives beside its value.

    Attributes:
        metrics: scalars by name.
        log_ratio: of the ratio level, ``[batch, answer_length]``.
        pair_weight: in preference training the surrogate's derivative with respect to the margin,
            ``[batch]``; else None.
        objective_state: next state of the objective.
    """

    metrics: Metrics
    log_ratio: Array
    pair_weight: Array | None
    objective_state: Any


def loss(
    params: Any,
    parts: Parts,
    batch: Answers,
    objective: Callable[..., Any],
    hparams: HParams,
    policy_scale: Array | float = 1.0,
) -> tuple[Array, Terms]:
    """The loss of a batch, and its terms.

    loss = policy_scale * policy's loss - entropy_coef * mean entropy
           + kl_coef * mean KL(mu || pi), the last two means over the tokens of the batch.

    The policy's loss is ``losses.policy_loss``, or minus the mean surrogate over the pairs. The
    weights of a selection make all three what they would be over the batch before ``pack``.
    """
    mask, config = parts.decoder.mask(batch.answer), parts.config
    log_prob, entropy = score(parts, params, batch, hparams)
    token_log_ratio = jnp.where(mask, log_prob - batch.behavior_log_prob, 0)
    pair_weight = None
    if parts.preference:
        surrogate, pair_weight, objective_state = pair_surrogate(
            parts, params, batch, log_prob, mask, objective, hparams
        )
        policy_loss = -jnp.mean(surrogate)
        log_ratio = ratio_levels.transform(token_log_ratio, parts.ratio_level, mask)
    else:
        policy_loss, log_ratio, objective_state = losses.masked_policy_loss(
            log_prob,
            batch.behavior_log_prob,
            advantage_of(config, batch, mask),
            mask,
            objective,
            parts.ratio_level,
            config.loss_agg_mode,
            parts.task.answer_length,
        )
    factor = 1.0 if batch.weight is None else batch.weight.token[:, None]
    mean_entropy = jnp.mean(entropy * factor, where=mask)
    kl = jnp.mean(losses.kl_penalty(token_log_ratio) * factor, where=mask)
    total = policy_scale * policy_loss - hparams.entropy_coef * mean_entropy + hparams.kl_coef * kl
    metrics = {
        "policy_loss": policy_loss,
        "entropy": mean_entropy,
        "kl": jnp.mean(losses.kl_estimate(token_log_ratio) * factor, where=mask),
    }
    return total, Terms(metrics, log_ratio, pair_weight, objective_state)


def pair_surrogate(
    parts: Parts,
    params: Any,
    batch: Answers,
    log_prob: Array,
    mask: Array,
    objective: Callable[..., Any],
    hparams: HParams,
) -> tuple[Array, Array, Any]:
    """Surrogate and weight of each pair ``[batch]``, and next state.

    ``log_prob`` and ``mask`` are of the right answers; the rest as in ``loss``.
    """
    assert batch.wrong is not None
    wrong = batch._replace(answer=batch.wrong.answer)
    return objective(
        log_prob=(log_prob, score(parts, params, wrong, hparams)[0]),
        behavior_log_prob=(batch.behavior_log_prob, batch.wrong.behavior_log_prob),
        mask=(mask, parts.decoder.mask(wrong.answer)),
        reference_margin=batch.wrong.reference_margin,
        is_pair=batch.advantage,
    )


# What an iteration is made of.


def score(parts: Parts, params: Any, batch: Answers, hparams: HParams) -> tuple[Array, Array]:
    """Log-probability and entropy of each token of a batch, ``[batch, answer_length]``."""
    return parts.decoder.score(params["policy"], batch.prompt, batch.answer, hparams.temperature)


def advantage_of(config: Config, batch: Answers, mask: Array) -> Array:
    """Advantages as the objective sees them, ``[batch, answer_length]``; 0 at padding.

    They are standardised over answers, not tokens, so that a long answer counts once.
    """
    standard = config.normalize_advantage is True
    advantage = losses.standardize(batch.advantage) if standard else batch.advantage
    return jnp.where(mask, advantage[:, None], 0)


def bind_objective(
    parts: Parts,
    state: TrainState,
    learner: Learner,
    hparams: HParams,
    batch: Answers,
    mask: Array,
) -> Callable[..., Any]:
    """The objective with its parameters, inputs, state, and the weights of a selection.

    It is a ``losses.BoundObjective``, or takes what ``pair_surrogate`` gives it.
    """
    spec, behavior = parts.objective, batch.behavior_log_prob
    given = train.objective_settings(parts.config, spec, hparams, learner)
    weight = batch.weight
    if parts.preference:
        of_pairs = functools.partial(preference.objective_values, spec, given)
        return of_pairs if weight is None else _weighted(of_pairs, weight.answer)
    start = None
    if "log_ratio_start" in spec.inputs:
        start = score(parts, state.learner.params, batch, hparams)[0] - behavior
    bound = losses.bind(spec, parts.ratio_level, given, behavior, start, mask)
    if weight is None:
        return bound
    of_tokens = parts.config.loss_agg_mode == "token-mean"
    return _weighted(bound, (weight.token if of_tokens else weight.answer)[:, None])


def _weighted(objective: Callable[..., Any], weight: Array) -> Callable[..., Any]:
    """The same objective with its surrogate times a weight."""

    def weighted(*arguments: Any, **named: Any) -> Any:
        surrogate, *others = objective(*arguments, **named)
        return surrogate * weight, *others

    return weighted


def tokens_trained(parts: Parts, batch: Answers) -> Array:
    """Tokens of a packed batch that count."""
    counted = jnp.sum(parts.decoder.mask(batch.answer), axis=1)
    if batch.wrong is not None:
        counted += jnp.sum(parts.decoder.mask(batch.wrong.answer), axis=1)
    if batch.weight is not None:
        counted = jnp.where(batch.weight.answer > 0, counted, 0)
    return jnp.sum(counted)


# The start of a run, and what is reported of it.


def init(parts: Parts, hparams: HParams) -> TrainState:
    """First state of a run; its key is ``fold_in(key(0), seed)``.

    ``imitation_updates`` supervised updates come first, with an optimizer of their own.
    """
    key, key_params, key_imitation = train.start_keys(hparams.seed)
    params = {"policy": parts.decoder.init(key_params)}
    fresh = train.optimizer(hparams).init(params["policy"])
    objective_state = signatures.first_state(parts.objective, hparams.objective_params)
    learner = Learner(params, {"policy": fresh}, objective_state)
    if parts.task.demonstration is not None:
        params = imitate(parts, learner, hparams, key_imitation).params
    zero, nothing = jnp.zeros(()), cast(Any, ())
    return TrainState(
        learner=learner._replace(params=params),
        normalizer=nothing,
        envs=nothing,
        replay=empty_replay(parts),
        return_sum=zero,
        episodes=zero,
        solved=zero,
        key=key,
        diverged_at=jnp.int32(-1),
        counts=dict.fromkeys(COUNTS, zero),
        selection=parts.selection.initial_state(
            parts.task, jax.random.fold_in(key, SELECTION_STREAM)
        ),
        reference=params["policy"] if parts.preference else (),
    )


COUNTS = ("prompts_sampled", "tokens_generated", "tokens_trained")
"""What is counted: prompts drawn, tokens of answers, and tokens of answers in updates."""

SELECTION_STREAM = train.INIT_STREAM - 2
"""Folded into a run's key for the first state of a selection; beyond any iteration's index."""


def imitate(parts: Parts, learner: Learner, hparams: HParams, key: Array) -> Learner:
    """``imitation_updates`` updates on demonstrations of fresh prompts, ``batch_size`` each."""
    task, demonstration = parts.task, parts.task.demonstration
    assert demonstration is not None

    def one_update(count: Array, learner: Learner) -> Learner:
        keys = jax.random.split(jax.random.fold_in(key, count), parts.config.batch_size)
        prompt = jax.vmap(task.prompt)(keys)
        answer = jax.vmap(demonstration)(prompt)

        def loss(params: Any) -> Array:
            log_prob, _ = parts.decoder.score(params["policy"], prompt, answer)
            return -jnp.mean(log_prob, where=parts.decoder.mask(answer))

        grads = jax.grad(loss)(learner.params)
        rate = jnp.asarray(hparams.learning_rate)
        policy, opt_state, _ = train.apply_gradient(learner, "policy", grads, hparams, rate)
        return learner._replace(params={"policy": policy}, opt_state={"policy": opt_state})

    return jax.lax.fori_loop(0, jnp.asarray(hparams.imitation_updates), one_update, learner)


def empty_replay(parts: Parts) -> Any:
    """Replay with nothing in it, arrays ``[blocks, rollout_length, num_envs, ...]``."""
    config, task = parts.config, parts.task

    def like(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((config.rollout_length, config.num_envs, *shape), dtype)

    block = Answers(
        like((task.prompt_length,), jnp.int32),
        like((task.answer_length,), jnp.int32),
        like((task.answer_length,), jnp.float32),
        like((), jnp.float32),
    )
    if parts.selection.stage == selection.GROUP:
        weight = like((), jnp.float32)
        block = block._replace(weight=selection.Weights(weight, weight))
    if parts.preference:
        wrong = preference.Wrong(block.answer, block.behavior_log_prob, block.advantage)
        block = block._replace(wrong=wrong)
    return buffer.init(block, config.allocated_size // config.block_size)


def report(
    parts: Parts, state: TrainState, hparams: HParams, iteration: int | Array, key: Array
) -> Metrics:
    """Diagnostics of a fresh sample of replay under the policy as it now is, and evaluation."""
    key_evaluate, key_diagnose = jax.random.split(key)
    config, params = parts.config, state.learner.params
    index = train.sample_indices(config, hparams, iteration, key_diagnose, 1)[0]
    batch, age = buffer.take_rows(state.replay, index, iteration)
    batch = batch._replace(weight=None)
    mask = parts.decoder.mask(batch.answer)
    advantage = advantage_of(config, batch, mask)
    log_prob, _ = score(parts, params, batch, hparams)
    log_ratio = ratio_levels.transform(log_prob - batch.behavior_log_prob, parts.ratio_level, mask)
    objective = bind_objective(parts, state, state.learner, hparams, batch, mask)
    if parts.preference:
        _, pair_weight, _ = pair_surrogate(parts, params, batch, log_prob, mask, objective, hparams)
        weight = jnp.broadcast_to(pair_weight[:, None], mask.shape)
    else:
        weight = losses.objective_weight(objective, log_ratio, advantage)
    metrics = diagnostics.utilization(log_ratio, advantage, weight, age[:, None], mask)
    metrics |= state.counts
    metrics["success_rate"] = state.solved / state.episodes
    metrics["answer_length"] = jnp.mean(jnp.sum(mask, axis=1).astype(jnp.float32))
    prompts = EVAL_PROMPTS if config.eval_episodes is None else config.eval_episodes
    if prompts:
        metrics["eval_return"], metrics["eval_return_sampled"] = evaluate(
            parts, params, state.normalizer, key_evaluate, prompts, hparams.temperature
        )
    return metrics


def evaluate(
    parts: Parts,
    params: Any,
    moments: Any,
    key: Array,
    episodes: int,
    temperature: Any = 1.0,
) -> tuple[Array, Array]:
    """Share of fresh prompts with the right answer: of most likely tokens, and of sampled ones."""
    key_prompts, key_answers = jax.random.split(key)
    prompt = jax.vmap(parts.task.prompt)(jax.random.split(key_prompts, episodes))
    greedy = parts.decoder.greedy(params["policy"], prompt)
    sampled, _ = parts.decoder.sample(params["policy"], prompt, key_answers, temperature)
    exact = jax.vmap(functools.partial(tasks.is_exact, parts.task))
    return jnp.mean(exact(prompt, greedy)), jnp.mean(exact(prompt, sampled))


def choose_action(
    parts: Parts, params: Any, moments: Any, obs: Array, key: Array | None = None
) -> Array:
    """Answer ``[..., answer_length]`` to prompts, sampled with a key, else the most likely one."""
    obs = jnp.asarray(obs)
    prompt = obs.reshape(-1, parts.task.prompt_length)
    if key is None:
        answer = parts.decoder.greedy(params["policy"], prompt)
    else:
        answer, _ = parts.decoder.sample(params["policy"], prompt, key)
    return answer.reshape(*obs.shape[:-1], parts.task.answer_length)


# Static settings.


def make(config: Config) -> Algorithm:
    """Builds the training program of a static configuration, without compiling anything.

    Raises:
        ConfigError: a setting is not usable; see the message.
    """
    parts = make_parts(config)
    time = parts.task.prompt_length + parts.task.answer_length
    # Of each token and layer: inputs of the products, and weights of the attention.
    numbers = 16 * config.decoder_width + 3 * config.decoder_heads * time
    return Algorithm(
        config=config,
        env=parts.task,
        objective=parts.objective,
        init=functools.partial(init, parts),
        train_step=functools.partial(train_step, parts),
        report=functools.partial(report, parts),
        evaluate=functools.partial(evaluate, parts),
        choose_action=functools.partial(choose_action, parts),
        first_update=train.first_update(config),
        activations=time * config.decoder_layers * numbers,
    )


def make_parts(config: Config) -> Parts:
    """Task, decoder and objective of a configuration.

    Raises:
        ConfigError: a setting is not usable; see the message.
    """
    check_fields(config)
    train.check_unused(config, CONTROL_ONLY, "token tasks do not use it")
    task = tasks.make(config.env)
    if config.rollout_length < 2:
        valid = "an integer >= 2, because an answer is compared with others to the same prompt"
        raise ConfigError("rollout_length", config.rollout_length, valid)
    objective = objectives.spec(config.objective)
    if objective.kind == "batch" and task.end is not None and not objective.takes_mask:
        valid = f"one that takes mask, because answers of {task.name} are padded"
        raise ConfigError("objective", objective.name, valid)
    pairs = preference.is_preference(objective)
    if pairs:
        preference.check(config, objective)
    chosen = selection.make(config, task, objective)
    network = decoder.make(
        task.vocab,
        task.prompt_length,
        task.answer_length,
        task.end,
        layers=config.decoder_layers,
        width=config.decoder_width,
        heads=config.decoder_heads,
        feed_forward=2 * config.decoder_width,
    )
    level = ratio_levels.choose(config.ratio_level, objective)
    return Parts(config, task, network, objective, level, chosen, pairs)


def check_hparams(config: Config, hparams: HParams) -> None:
    """Refuses traced settings that these tasks do not have.

    Raises:
        ConfigError: one that is not at its default, or imitation without demonstrations.
    """
    train.check_unused(hparams, ("gamma", "gae_lambda", "value_coef"), "token tasks do not use it")
    if preference.is_preference(objectives.spec(config.objective)):
        train.check_unused(hparams, ("reward_scale",), "pairs have no reward")
    if hparams.value_learning_rate not in (None, hparams.learning_rate):
        valid = "left out, because token tasks have no value function"
        raise ConfigError("value_learning_rate", hparams.value_learning_rate, valid)
    task = tasks.make(config.env)
    if hparams.imitation_updates and task.demonstration is None:
        valid = f"0, because the task {task.name} has no demonstrations"
        raise ConfigError("imitation_updates", hparams.imitation_updates, valid)


CONTROL_ONLY = (
    "policy_delay",
    "advantage_mode",
    "action_head",
    "num_bins",
    "hidden_sizes",
    "value_hidden_sizes",
    "activation",
    "layer_norm",
    "shared_torso",
    "detach_value",
    "normalize_obs",
    "truncation_is_termination",
    "max_episode_steps",
)
"""Static settings of control tasks alone."""
