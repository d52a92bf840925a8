"""What the loop asks of a domain: where data comes from, and what a policy says of it."""

import abc
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gipo_jax.config import Config, HParams
from gipo_jax.learner import Metrics, TrainState
from gipo_jax.signatures import Spec


class Batch(NamedTuple):
    """A sample of replay with its targets. Tokens of control are the dimensions of an action."""

    data: Any  # what Domain.score reads
    behavior_log_prob: Array  # log mu of each token, [batch, tokens]
    advantage: Array  # [batch], or of each token where rows hold several responses
    age: Array  # iterations since collection, [batch]
    value_target: Any = None  # [batch]; None without a value function
    mask: Any = None  # false at padding, [batch, tokens]; None where every token counts
    # true where a response begins, for rows that hold several, [batch, tokens]; see segments
    first: Any = None
    max_tokens: int | None = None  # of a response; None for those of a row
    # factor on the surrogate, of tokens or broadcast to them, or of pairs [batch]; None for 1
    surrogate_weight: Any = None
    token_weight: Any = None  # factor on entropy and KL, likewise; None for 1
    # added to TrainState.totals by an update that uses the batch, by name
    counts: Metrics = {}  # noqa: RUF012


class Scores(NamedTuple):
    """A batch under some parameters: log-ratios, entropy, KL and value."""

    log_ratio: Array  # log pi - log mu of each token, [batch, tokens]; anything at padding
    entropy: Array | None = None  # of each token in nats, same shape; None if not used
    kl: Array | None = None  # exact KL(mu || pi) of each token; None if estimated
    value: Array | None = None  # V, [batch]; None without a value function
    # log mu and log pi of every token, [batch, tokens, vocab]; None where not asked for
    distributions: tuple[Array, Array] | None = None
    margin: Array | None = None  # of pairs of responses, see signatures.INPUTS, [batch]
    other_log_ratio: Array | None = None  # of pairs, of the wrong response, [batch]


class Collected(NamedTuple):
    """What an iteration collects."""

    rows: Any  # for replay, arrays [rollout_length, num_envs, ...]
    domain_state: Any  # the domain's state from the next iteration on
    counts: Metrics  # added to TrainState.totals, by name


class Domain(abc.ABC):
    """One kind of training data under the loop of ``gipo_jax.train``; every method is pure."""

    config: Config
    env: Any  # environment, or task
    objective: Spec  # what the objective needs
    ratio_level: str  # see ratio_levels
    block: Any  # shapes and types of an iteration's rows, [rollout_length, num_envs, ...]
    standardize: bool  # whether advantages are standardised in each batch
    eval_episodes: int  # episodes of an evaluation, 0 for none
    activations: int  # about how many numbers an update keeps for each sample, to plan memory
    host = False  # whether environments are simulated outside JAX, and so cannot be vmapped
    resume_gap: str | None = None  # why a stopped run would not go on exactly; None where it does
    gather_once = True  # whether all batches of an iteration are small enough to gather at once
    ordered = True  # whether tokens have an order, and so a position
    own_totals: tuple[str, ...] = ()  # names that it adds to TrainState.totals

    def like(self, *shape: int, dtype: Any = jnp.float32) -> Any:
        """A shape in ``block``."""
        full = (self.config.rollout_length, self.config.num_envs, *shape)
        return jax.ShapeDtypeStruct(full, dtype)

    @abc.abstractmethod
    def init(self, hparams: HParams, key: Array) -> tuple[Any, Any]:
        """First parameters, ``{"policy": ...}`` and ``"value"``, and first state of the domain."""

    def env_of(self, hparams: HParams) -> Any:
        """The environment of a run, with its parameters, or the task."""
        return self.env

    def open(self, seeds: Iterable[int], devices: int = 1) -> "Domain":
        """The domain with the simulators of runs of these seeds made, each as often as there are
        such runs, for devices that share them evenly; without simulators the domain itself."""
        return self

    def close(self) -> None:  # noqa: B027
        """Ends the simulators of ``open``; programs compiled with them must not run again."""

    def restore(self, state: TrainState) -> tuple[TrainState, int]:
        """Brings simulators to states ``[runs, ...]`` on the host; also how many began anew."""
        return state, 0

    @abc.abstractmethod
    def collect(self, state: TrainState, hparams: HParams, key: Array) -> Collected:
        """Data of the current policy, with what replay keeps of it."""

    @abc.abstractmethod
    def batch(
        self,
        state: TrainState,
        params: Any,
        rows: Any,
        age: Array,
        hparams: HParams,
        key: Array | None = None,
    ) -> Batch:
        """A batch of rows of replay as an update takes it.

        Args:
            state: at the start of the update phase.
            params: current parameters.
            rows: ``[batch, ...]``, or segments ``[rollout_length, segments, ...]``.
            age: of each row or segment, in iterations.
            hparams: traced settings of the run.
            key: PRNG key of a training batch; None for one that is only looked at.
        """

    @abc.abstractmethod
    def score(self, params: Any, batch: Batch, hparams: HParams) -> Scores:
        """Log-ratios, entropy, KL and value of a batch under ``params``."""

    def acting(self, state: TrainState) -> Any:
        """The part of a state that acting takes, and that is kept of a finished run."""
        return {"params": state.learner.params, "normalizer": ()}

    @abc.abstractmethod
    def evaluate(self, acting: Any, hparams: HParams, key: Array, episodes: int) -> Metrics:
        """``eval_return`` of fresh episodes with the most likely actions, ``eval_return_sampled``
        with sampled ones, and what else the domain measures on them."""

    @abc.abstractmethod
    def choose_action(
        self, acting: Any, hparams: HParams, obs: Array, key: Array | None = None
    ) -> Array:
        """Actions for observations ``[..., *obs_shape]``, the most likely ones without a key."""

    def metrics(self, state: TrainState, batch: Batch) -> Metrics:
        """What the domain reports at a logged point beside what all do."""
        return {}
