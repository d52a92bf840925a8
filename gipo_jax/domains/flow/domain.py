"""Policy gradients on the denoising steps of a flow, as a domain of ``gipo_jax.train``.

A transition is a chain: one sample with all its steps, which are its tokens, ``[batch, steps]``. An
iteration makes ``num_envs`` times ``rollout_length`` of them; ``batch_size`` and ``buffer_size``
count chains. Advantages are relative to the chains of one iteration: GRPO's, (R - mean) / std.
There is no value function, and the KL penalty is exact.

| method | setting |
|---|---|
| Flow-GRPO (arXiv:2505.05470) | ``objective ppo_clip``, ``ratio_level token`` |
| GRPO-Guard (arXiv:2510.22319) | ``objective ppo_clip``, ``ratio_level ratio_norm`` |
| GIPO (arXiv:2603.03955) | ``objective gipo``, ``ratio_level token`` |
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gipo_jax import loss_terms, objectives, ratio_levels, signatures
from gipo_jax.config import FLOW, Config, ConfigError, HParams, check_applies, check_fields
from gipo_jax.domains.flow import sampler, tasks
from gipo_jax.domains.flow.tasks import Task
from gipo_jax.domains.interface import Batch, Collected, Domain, Scores
from gipo_jax.learner import INIT_STREAM, Metrics, TrainState

RATIO_NORM = "ratio_norm"  # The ratio level of GRPO-Guard
EVAL_POINTS = 128  # End points that an evaluation draws unless the configuration says how many


class Row(NamedTuple):
    """A chain as replay keeps it; leading axes are those of replay or of a batch."""

    points: Any  # x before, between and after the steps, [..., steps + 1, 2]
    behavior_mean: Any  # mu of the flow that made the steps, [..., steps, 2]
    behavior_log_prob: Any  # log-density of the steps under it, [..., steps]
    advantage: Any  # of the chain, [...]


class Flow(Domain):
    """Chains of denoising steps; see ``Domain``."""

    def __init__(self, config: Config, task: Task) -> None:
        if config.timestep_shift is not None:
            task = task._replace(shift=config.timestep_shift)
        self.config, self.env = config, task
        self.field, self.steps = sampler.velocity_field(config), sampler.schedule(task)
        self.objective = objectives.spec(config.objective)
        # Log-ratios of this level come out of ``score``.
        self.ratio_norm = config.ratio_level == RATIO_NORM
        level = "token" if self.ratio_norm else config.ratio_level
        self.ratio_level = ratio_levels.choose(level, self.objective)
        self.standardize = False
        self.activations = 6 * sum(config.hidden_sizes) * task.steps
        self.eval_episodes = EVAL_POINTS if config.eval_episodes is None else config.eval_episodes
        self.block = self._block()

    def init(self, hparams: HParams, key: Array) -> tuple[Any, Any]:
        return {"policy": self.pretrain(key)}, ()

    def pretrain(self, key: Array) -> Any:
        """Parameters of the flow that the run of a key begins with."""
        return sampler.pretrain(self.field, self.env, jax.random.fold_in(key, INIT_STREAM))[0]

    def collect(self, state: TrainState, hparams: HParams, key: Array) -> Collected:
        """Chains of the current flow, with advantages relative to the mean of the group.

        With ``normalize_advantage`` they are divided by the group's standard deviation, as in GRPO.
        """
        key_noise, key_steps = jax.random.split(key)
        noise = jax.random.normal(key_noise, (*self.block.advantage.shape, 2))
        chain = sampler.sample(self.flow(state.learner.params), self.env, key_steps, noise)
        reward = tasks.training_reward(self.env, chain.points[..., -1, :])
        counts = {"returns": jnp.sum(reward), "episodes": jnp.float32(reward.size)}
        scaled = reward * hparams.reward_scale
        standard = self.config.normalize_advantage is not False
        advantage = loss_terms.standardize(scaled) if standard else scaled - jnp.mean(scaled)
        rows = Row(chain.points, chain.mean, chain.log_prob, advantage)
        return Collected(rows, (), counts)

    def batch(
        self,
        state: TrainState,
        params: Any,
        rows: Row,
        age: Array,
        hparams: HParams,
        key: Array | None = None,
    ) -> Batch:
        # GRPO-Guard divides by dt, since D has a factor dt, so that all steps count alike.
        weight = jnp.asarray(1 / self.steps.dt)[None] if self.ratio_norm else None
        return Batch(rows, rows.behavior_log_prob, rows.advantage, age, surrogate_weight=weight)

    def score(self, params: Any, batch: Batch, hparams: HParams) -> Scores:
        """Log-ratios and exact KL(mu || pi) of the steps, abs(mu_theta - mu_old)^2 / (2 s^2)."""
        rows, steps = batch.data, self.steps
        mean = sampler.chain_means(self.flow(params), steps, rows.points)
        log_ratio = sampler.log_density(rows.points[..., 1:, :], mean, steps.std)
        log_ratio = log_ratio - batch.behavior_log_prob
        kl = jnp.sum((mean - rows.behavior_mean) ** 2, axis=-1) / (2 * steps.std**2)
        if self.ratio_norm:
            log_ratio = ratio_norm(log_ratio, kl, steps.std)
        return Scores(log_ratio, kl=kl)

    def flow(self, params: Any) -> sampler.Velocity:
        """The flow of a learner's parameters."""
        return sampler.bind(self.field, params["policy"])

    def evaluate(self, acting: Any, hparams: HParams, key: Array, episodes: int) -> Metrics:
        """Mean rewards of end points of the ODE and of the SDE from the same noise, and diversity
        of the latter; of a task with a proxy also the mean of that over them."""
        key_noise, key_steps = jax.random.split(key)
        noise = jax.random.normal(key_noise, (episodes, 2))
        ends = self.choose_action(acting, hparams, noise)
        sampled = self.choose_action(acting, hparams, noise, key_steps)
        proxy = {} if self.env.proxy is None else {"eval_proxy": jnp.mean(self.env.proxy(sampled))}
        return proxy | {
            "eval_return": jnp.mean(tasks.reward(self.env, ends)),
            "eval_return_sampled": jnp.mean(tasks.reward(self.env, sampled)),
            "modes_covered": tasks.modes_covered(self.env, sampled),
            "pairwise_distance": tasks.pairwise_distance(sampled),
        }

    def choose_action(
        self, acting: Any, hparams: HParams, obs: Array, key: Array | None = None
    ) -> Array:
        """End points for noise ``[..., 2]``: of the SDE with a key, else of the ODE."""
        flow, noise = self.flow(acting["params"]), jnp.asarray(obs)
        if key is None:
            return sampler.solve(flow, self.env, noise)
        return sampler.sample(flow, self.env, key, noise).points[..., -1, :]

    def _block(self) -> Row:
        """Shapes of an iteration's rows."""
        steps, like = self.env.steps, self.like
        return Row(like(steps + 1, 2), like(steps, 2), like(steps), like())


def ratio_norm(log_ratio: Array, kl: Array, std: Any) -> Array:
    """GRPO-Guard's log-ratio, (x + b) s, with b the KL of the step (arXiv:2510.22319).

    Under the flow that made the step, x = D eps / s - abs(D)^2 / (2 s^2) with D = mu_theta - mu_old
    and eps standard normal. The mean -abs(D)^2 / (2 s^2) and the spread abs(D) / s depend on the
    step. Here (x + b) s = D eps: mean 0 and spread abs(D).
    """
    return (log_ratio + kl) * std


def make(config: Config, task: Task | None = None) -> Flow:
    """Flows of a configuration; see ``domains.make``."""
    check_fields(config)
    objective = objectives.spec(config.objective)
    check_applies(config, domain=FLOW, objective=objective)
    if config.eval_episodes == 1:
        raise ConfigError("eval_episodes", 1, "0, or at least 2 points to measure distances")
    signatures.check_single(objective)
    if objective.discrete_only:
        valid = "an objective that takes densities, which the steps of a flow have"
        raise ConfigError("objective", objective.name, valid)
    return Flow(config, tasks.make(config.env) if task is None else task)
