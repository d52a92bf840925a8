"""Properties of what users combine: settings and kills, objectives and extreme numbers."""

import contextlib
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gipo_jax import losses, objectives, ratio_levels, signatures, sweep
from gipo_jax.config import Config, HParams
from gipo_jax.domains import Batch, Scores
from gipo_jax.learner import Learner
from gipo_jax.sweep import audit, checkpoint, folder, results

pytestmark = pytest.mark.slow

BATCH, TOKENS = 3, 4

# Losses: finite, with finite gradients, whatever the numbers.


@st.composite
def combinations(draw: st.DrawFn) -> tuple[str, str]:
    """An objective of single responses and a ratio level that it may have."""
    names = [name for name in objectives.ALL if not objectives.spec(name).takes_distributions]
    name, level = draw(st.sampled_from(names)), draw(st.sampled_from(list(ratio_levels.LEVELS)))
    if level == "prefix_min" and "behavior_log_prob" in objectives.spec(name).inputs:
        level = "prefix_product"
    return name, level


def grids(values: st.SearchStrategy[Any]) -> st.SearchStrategy[np.ndarray]:
    rows = st.lists(values, min_size=BATCH * TOKENS, max_size=BATCH * TOKENS)
    return rows.map(lambda x: np.reshape(x, (BATCH, TOKENS)))


log_probs = grids(st.sampled_from([0.0, -1e-6, -0.7, -3.0, -40.0, -90.0, -1e3, -1e6, -np.inf]))
masks = grids(st.booleans())
signed = st.sampled_from([0.0, 1.0, -1.0, 1e-6, -1e-6, 10.0, -10.0])


def padded(x: np.ndarray, mask: np.ndarray) -> jax.Array:
    """The numbers, with NaN at padding."""
    return jnp.array(np.where(mask, x, np.nan), jnp.float32)


@functools.cache
def loss_of(name: str, level: str) -> Callable[..., Any]:
    takes_start = "log_ratio_start" in objectives.spec(name).inputs

    @jax.jit
    def loss(log_prob: Any, old: Any, advantages: Any, mask: Any, start: Any) -> Any:
        extra = {"log_ratio_start": start} if takes_start else {}
        chosen: dict[str, Any] = {"objective": name, "ratio_level": level, **extra}
        return jax.value_and_grad(
            lambda x: losses.policy_loss(x, old, advantages, mask, **chosen)[0]
        )(log_prob)

    return loss


@given(combinations(), log_probs, log_probs, log_probs, grids(signed), masks)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_the_loss_for_other_trainers_is_finite_whatever_the_numbers(
    chosen: tuple[str, str],
    log_prob: np.ndarray,
    old: np.ndarray,
    start: np.ndarray,
    advantages: np.ndarray,
    mask: np.ndarray,
) -> None:
    start = np.maximum(start, -1e6)
    arrays = [padded(x, mask) for x in (log_prob, old, advantages)]
    loss, gradient = loss_of(*chosen)(*arrays, jnp.array(mask), padded(start, mask))
    assert np.isfinite(loss), chosen
    assert np.all(np.isfinite(gradient)), chosen
    assert not np.any(gradient[~mask])


@functools.cache
def training_loss_of(name: str, level: str) -> Callable[..., Any]:
    spec, config = objectives.spec(name), Config(objective=name, eval_episodes=0)

    def score(params: Any, batch: Batch, hparams: HParams) -> Scores:
        return Scores(params["policy"] - batch.behavior_log_prob)

    domain: Any = SimpleNamespace(
        config=config, objective=spec, ratio_level=level, ordered=True, standardize=False
    )
    domain.score = score
    hparams = HParams(objective_params=dict(spec.params), kl_coef=0.1)
    state = signatures.first_state(spec, spec.params)

    @jax.jit
    def loss(log_prob: Any, old: Any, advantage: Any, mask: Any, start: Any) -> Any:
        batch = Batch(None, old, advantage, jnp.zeros(BATCH), mask=mask)
        learner = Learner({"policy": start}, {}, state)
        begun: Any = SimpleNamespace(learner=learner)
        return jax.value_and_grad(
            lambda x: losses.loss(domain, begun, learner, {"policy": x}, batch, hparams)[0]
        )(log_prob)

    return loss


@given(
    combinations(),
    log_probs,
    log_probs,
    log_probs,
    st.lists(signed, min_size=BATCH, max_size=BATCH),
    masks,
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_the_loss_of_training_is_finite_whatever_the_numbers(
    chosen: tuple[str, str],
    log_prob: np.ndarray,
    old: np.ndarray,
    start: np.ndarray,
    advantage: list[float],
    mask: np.ndarray,
) -> None:
    mask[0, 0] = True  # a batch has a token
    # What a policy has sampled is not impossible under it.
    old = np.maximum(old, -1e6)
    arrays = [padded(x, mask) for x in (log_prob, old)]
    loss, gradient = training_loss_of(*chosen)(
        *arrays, jnp.array(advantage), jnp.array(mask), padded(start, mask)
    )
    assert np.isfinite(loss), chosen
    assert np.all(np.isfinite(gradient)), chosen
    assert not np.any(gradient[~mask])


# Sweeps: the same tables, whatever the settings and wherever a kill comes.


class StopError(Exception):
    """Raised in the middle of a sweep, as a kill would come."""


MOMENTS: dict[str, tuple[Any, str, bool]] = {
    "before a checkpoint": (checkpoint, "save", False),
    "after a checkpoint": (checkpoint, "save", True),
    "before rows": (folder.Folder, "add", False),
    "after rows": (folder.Folder, "add", True),
    "before parameters": (folder.Folder, "finish", False),
    "after parameters": (folder.Folder, "finish", True),
    "while parameters are sealed": (checkpoint, "seal", False),
}
kills = st.lists(st.tuples(st.sampled_from(list(MOMENTS)), st.integers(1, 4)), max_size=2)

grid_of_settings = st.fixed_dictionaries(
    {
        "buffer_size": st.sampled_from([[16], [16, 64]]),
        "sigma": st.sampled_from([[0.5], [0.5, 2.0]]),
        "normalize_obs": st.booleans(),
        "num_logs": st.sampled_from([2, 3]),
    }
)


def stopped(patch: pytest.MonkeyPatch, moment: str, count: int) -> None:
    """Ends what runs at that moment of its kind."""
    owner, name, after = MOMENTS[moment]
    function, left = getattr(owner, name), [count]

    def counted(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == 0 and not after:
            raise StopError
        result = function(*arguments)
        if left[0] == 0:
            raise StopError
        return result

    patch.setattr(owner, name, counted)


@given(grid_of_settings, kills, st.sampled_from(["map", "vmap", "loop"]), st.sampled_from([0, 60]))
@settings(max_examples=5, deadline=None, derandomize=True)
def test_any_sweep_killed_anywhere_ends_in_the_tables_of_one_left_alone(
    grid: dict[str, Any], kills: list[tuple[str, int]], mode: str, seconds: float
) -> None:
    sizes: dict[str, Any] = {"num_envs": 2, "rollout_length": 4, "batch_size": 8}
    own: dict[str, Any] = {"hidden_sizes": (4,), "eval_episodes": 0, "total_steps": 48}
    # The same allocation for all, so that they share compiled programs.
    runs = sweep.expand(env="Catch-bsuite", max_buffer_size=64, **sizes, **own, **grid)
    options = sweep.Options(quiet=True, checkpoint_seconds=seconds, batch_mode=mode, devices=1)
    with tempfile.TemporaryDirectory() as place:
        alone, killed = Path(place) / "alone", Path(place) / "killed"
        sweep.run(runs, alone, options)
        for moment, count in kills:
            resume = (killed / results.CONFIG).exists()
            with pytest.MonkeyPatch.context() as patch:
                stopped(patch, moment, count)
                with contextlib.suppress(StopError):
                    sweep.run(runs, killed, options, resume=resume)
            assert [str(x) for x in audit.check(killed) if not x.whole] == []
        sweep.run(runs, killed, options, resume=(killed / results.CONFIG).exists())
        for name in (results.RUNS, results.METRICS):
            assert (killed / name).read_bytes() == (alone / name).read_bytes()
        assert [str(x) for x in audit.check(killed) if not x.whole] == []
