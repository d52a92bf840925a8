"""What trainers of language models ask of the loss: packed rows, micro-batches, three policies."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gipo_jax import losses, objectives, ratio_levels
from gipo_jax.config import LOSS_AGG_MODES, ConfigError
from gipo_jax.losses import policy_loss

LENGTHS = (3, 5, 1, 4, 2)
WIDTH = 9
ROWS = ((0, 1), (2, 3, 4))  # which responses share a packed row
PER_SAMPLE = [name for name in objectives.ALL if objectives.spec(name).kind != "pair"]


@pytest.fixture
def responses() -> list[dict[str, Any]]:
    """Responses of 1 to 5 tokens, one with a hole as an environment's turn leaves it."""
    generator = np.random.default_rng(3)
    made = []
    for length in LENGTHS:
        old = np.log(generator.uniform(0.1, 0.9, length))
        made.append(
            {
                "log_prob": np.minimum(old + generator.normal(scale=0.5, size=length), -0.01),
                "old_log_prob": old,
                "rollout_log_prob": np.minimum(old + generator.normal(scale=0.4, size=length), 0),
                "advantages": np.full(length, generator.normal()),
                "log_ratio_start": generator.normal(scale=0.2, size=length),
                "response_mask": np.ones(length, bool),
            }
        )
    made[1]["response_mask"][2] = False
    return made


def rows_of(responses: list[dict[str, Any]], rows: Any) -> dict[str, Any]:
    """Arrays whose rows hold these responses side by side, with segment ids as they come."""
    arrays = {
        name: np.zeros((len(rows), WIDTH), bool if name == "response_mask" else np.float32)
        for name in responses[0]
    }
    arrays["segment_ids"] = np.zeros((len(rows), WIDTH), np.int32)
    for row, members in enumerate(rows):
        start = 0
        for member in members:
            for name, values in responses[member].items():
                arrays[name][row, start : start + len(values)] = values
            arrays["segment_ids"][row, start : start + LENGTHS[member]] = 7 + member
            start += LENGTHS[member]
    return {name: jnp.array(values) for name, values in arrays.items()}


def evaluated(arrays: dict[str, Any], **given: Any) -> Any:
    """``(loss, metrics), gradient``."""

    def loss(log_prob: jax.Array) -> Any:
        return policy_loss(**arrays | {"log_prob": log_prob} | given)

    return jax.value_and_grad(loss, has_aux=True)(arrays["log_prob"])


def gradient_of_each(gradient: Any, rows: Any) -> list[np.ndarray]:
    """The gradient of each response, in their order."""
    found: dict[int, np.ndarray] = {}
    for row, members in enumerate(rows):
        start = 0
        for member in members:
            found[member] = np.asarray(gradient)[row, start : start + LENGTHS[member]]
            start += LENGTHS[member]
    return [found[member] for member in range(len(LENGTHS))]


def asked(arrays: dict[str, Any], name: str) -> dict[str, Any]:
    """The arrays that the objective takes; distributions follow from the log-probabilities."""
    spec = objectives.spec(name)
    given = {n: x for n, x in arrays.items() if n in spec.inputs or n != "log_ratio_start"}
    if spec.takes_distributions:
        for distribution, of in (("behavior", "old_log_prob"), ("policy", "log_prob")):
            logits = arrays[of][..., None] * jnp.array([1.0, -0.5, 0.3, 0.1], arrays[of].dtype)
            given[f"{distribution}_distribution"] = jax.nn.log_softmax(logits)
    return given


def fixed(mode: str) -> dict[str, Any]:
    return {"max_tokens": 6} if mode == "seq-mean-token-sum-norm" else {}


ALONE = tuple((member,) for member in range(len(LENGTHS)))
LEVELS_AND_OBJECTIVES = [
    *(("gipo", level) for level in ratio_levels.LEVELS),
    *((name, None) for name in PER_SAMPLE if not objectives.spec(name).whole_rows),
]


@pytest.mark.parametrize(("name", "level"), LEVELS_AND_OBJECTIVES)
def test_a_packed_row_gives_what_its_responses_give_apart(
    name: str, level: str | None, responses: list[dict[str, Any]]
) -> None:
    packed, apart = (asked(rows_of(responses, rows), name) for rows in (ROWS, ALONE))
    del apart["segment_ids"]
    for mode in LOSS_AGG_MODES:
        given = {"objective": name, "ratio_level": level, "loss_agg_mode": mode} | fixed(mode)
        given["rollout_level"] = "sequence" if mode == "token-mean" else "mean"
        (loss, metrics), gradient = evaluated(packed, **given)
        (loss_apart, metrics_apart), gradient_apart = evaluated(apart, **given)
        assert loss != 0
        np.testing.assert_allclose(loss, loss_apart, rtol=2e-6, atol=1e-6)
        for one, other in zip(
            gradient_of_each(gradient, ROWS), gradient_of_each(gradient_apart, ALONE), strict=True
        ):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
        for key in metrics:
            np.testing.assert_allclose(
                metrics[key], metrics_apart[key], rtol=1e-5, atol=1e-6, err_msg=key
            )


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
@pytest.mark.parametrize("level", ["token", "sequence", "prefix_min"])
def test_micro_batches_add_up_to_the_step_of_their_denominator(
    level: str, mode: str, responses: list[dict[str, Any]]
) -> None:
    whole = rows_of(responses, ALONE)
    del whole["segment_ids"], whole["log_ratio_start"]
    given = {"ratio_level": level, "loss_agg_mode": mode} | fixed(mode)
    (loss, metrics), gradient = evaluated(whole, **given)
    tokens = sum(LENGTHS) - 1
    assert metrics["denominator"] == (tokens if mode == "token-mean" else len(LENGTHS))
    losses_of_parts, gradients = [], []
    for part in (slice(0, 2), slice(2, 3), slice(3, 5)):
        arrays = {name: x[part] for name, x in whole.items()}
        (partial, _), slope = evaluated(arrays, denominator=metrics["denominator"], **given)
        losses_of_parts.append(partial)
        gradients.append(slope)
    np.testing.assert_allclose(sum(losses_of_parts), loss, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(np.concatenate(gradients), gradient, rtol=1e-6, atol=1e-7)
    (summed, _), _ = evaluated(whole, denominator=1, **given)
    np.testing.assert_allclose(summed / metrics["denominator"], loss, rtol=1e-6)


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence", "mean"])
def test_a_rollout_policy_weights_the_surrogate_as_numpy_does(
    level: str, mode: str, responses: list[dict[str, Any]]
) -> None:
    low, high = (0.2, 2.0) if level == "sequence" else (0.8, 1.25)
    arrays = rows_of(responses, ALONE)
    del arrays["segment_ids"], arrays["log_ratio_start"]
    total, weights = 0.0, []
    for response in responses:
        counted = response["response_mask"]
        gap = (response["old_log_prob"] - response["rollout_log_prob"])[counted]
        x = (response["log_prob"] - response["old_log_prob"])[counted]
        log_weight = {"token": gap, "sequence": gap.sum(), "mean": gap.mean()}[level]
        weight = np.exp(np.broadcast_to(log_weight, gap.shape))
        kept = np.clip(weight, low, high)
        if mode == "mask":
            kept = np.where((weight < low) | (weight > high), 0, weight)
        weights += [(w, k) for w, k in zip(weight, kept, strict=True)]
        u = np.exp(x - x**2 / 2)
        total -= np.sum(kept * u * response["advantages"][counted])
    given = {"rollout_level": level, "rollout_mode": mode, "rollout_bounds": (low, high)}
    (loss, metrics), gradient = evaluated(arrays, **given)
    np.testing.assert_allclose(loss, total / len(weights), rtol=1e-5)
    outside = [not low <= weight <= high for weight, _ in weights]
    assert 0 < np.mean(outside) < 1
    np.testing.assert_allclose(metrics["rollout_out_of_bounds"], np.mean(outside), rtol=1e-6)
    np.testing.assert_allclose(
        metrics["rollout_mean_weight"], np.mean([kept for _, kept in weights]), rtol=1e-5
    )
    # It scales the gradient of each token, whatever the objective does with the ratio.
    _, plain = evaluated({n: x for n, x in arrays.items() if n != "rollout_log_prob"})
    each, each_plain = (
        np.concatenate(gradient_of_each(slope, ALONE))[
            np.concatenate([response["response_mask"] for response in responses])
        ]
        for slope in (gradient, plain)
    )
    kept_weights = [kept for _, kept in weights]
    np.testing.assert_allclose(each, each_plain * kept_weights, rtol=1e-5, atol=1e-7)


def weights_of_trl(gap: np.ndarray, mode: str, low: float | None, high: float | None) -> Any:
    """trl 1.9.0: ``vllm_importance_sampling_mode`` with its bounds, for one response."""
    level, _, rule = mode.partition("_")
    ratio = np.exp(gap) if level == "token" else np.full(len(gap), np.exp(gap.sum()))
    low, high = -np.inf if low is None else low, np.inf if high is None else high
    if rule == "truncate":
        return np.minimum(np.maximum(ratio, low), high)
    ratio[(ratio < low) | (ratio > high)] = 0
    return ratio


def weights_of_verl(gap: np.ndarray, level: str, threshold: str) -> Any:
    """verl 0.9.0: ``rollout_is`` with one threshold (TIS) or two (IcePop), for one response."""
    x = gap if level == "token" else np.repeat(gap.sum(), len(gap))
    ratio = np.exp(np.clip(x, -20, 20))
    low, _, high = threshold.rpartition("_")
    if not low:
        return np.minimum(ratio, float(high))
    return ratio * ((ratio >= float(low)) & (ratio <= float(high)))


def kept_by_verl(gap: np.ndarray, low: float, high: float) -> bool:
    """verl 0.9.0: ``rollout_rs`` ``seq_mean_k1``, the geometric level, for one response."""
    return bool(np.log(low) <= np.mean(-gap) <= np.log(high))


@pytest.mark.parametrize(
    ("rule", "level", "mode", "bounds"),
    [
        ((weights_of_trl, "token_truncate", None, 1.2), "token", "truncate", (0, 1.2)),
        ((weights_of_trl, "token_truncate", 0.8, 1.2), "token", "truncate", (0.8, 1.2)),
        ((weights_of_trl, "token_mask", 0.8, 1.2), "token", "mask", (0.8, 1.2)),
        ((weights_of_trl, "sequence_truncate", None, 1.2), "sequence", "truncate", (0, 1.2)),
        ((weights_of_trl, "sequence_mask", None, 1.2), "sequence", "mask", (0, 1.2)),
        ((weights_of_trl, "sequence_mask", 0.8, None), "sequence", "mask", (0.8, np.inf)),
        ((weights_of_verl, "token", "1.2"), "token", "truncate", (0, 1.2)),
        ((weights_of_verl, "token", "0.8_1.2"), "token", "mask", (0.8, 1.2)),
        ((weights_of_verl, "sequence", "1.2"), "sequence", "truncate", (0, 1.2)),
        ((weights_of_verl, "sequence", "0.5_2"), "sequence", "mask", (0.5, 2)),
    ],
)
def test_rollout_corrections_of_trl_and_verl_weight_ppo_as_theirs(
    rule: Any, level: str, mode: str, bounds: Any, responses: list[dict[str, Any]]
) -> None:
    function, *settings = rule
    total, tokens, moved = 0.0, 0, 0
    for response in responses:
        counted = response["response_mask"]
        gap = (response["old_log_prob"] - response["rollout_log_prob"])[counted]
        ratio = np.exp((response["log_prob"] - response["old_log_prob"])[counted])
        a = response["advantages"][counted]
        weight = function(gap, *settings)
        total -= np.sum(weight * np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a))
        tokens += len(gap)
        moved += np.sum(weight != np.exp(gap if level == "token" else gap.sum()))
    assert 0 < moved < tokens
    arrays = rows_of(responses, ALONE)
    del arrays["segment_ids"], arrays["log_ratio_start"]
    given = {"rollout_level": level, "rollout_mode": mode, "rollout_bounds": bounds}
    loss, _ = policy_loss(**arrays, objective="ppo_clip", metrics=False, **given)
    np.testing.assert_allclose(loss, total / tokens, rtol=1e-5)


def test_a_mask_at_the_mean_rejects_the_responses_that_the_geometric_level_of_verl_rejects(
    responses: list[dict[str, Any]],
) -> None:
    arrays = rows_of(responses, ALONE)
    del arrays["segment_ids"], arrays["log_ratio_start"]
    kept = [
        kept_by_verl(
            (response["old_log_prob"] - response["rollout_log_prob"])[response["response_mask"]],
            1 / 1.2,
            1.2,
        )
        for response in responses
    ]
    assert 0 < sum(kept) < len(kept)
    given = {"rollout_level": "mean", "rollout_mode": "mask", "rollout_bounds": (1 / 1.2, 1.2)}
    _, gradient = evaluated(arrays, metrics=False, **given)
    assert [bool(row.any()) for row in gradient_of_each(gradient, ALONE)] == kept


@pytest.mark.parametrize("level", ["token", "sequence", "mean"])
def test_a_token_impossible_in_rollout_and_old_policy_is_left_out(
    level: str, responses: list[dict[str, Any]]
) -> None:
    arrays = rows_of(responses, ALONE)
    del arrays["segment_ids"], arrays["log_ratio_start"]
    impossible = arrays | {
        name: arrays[name].at[0, 0].set(-jnp.inf) for name in ("old_log_prob", "rollout_log_prob")
    }
    left_out = arrays | {"response_mask": arrays["response_mask"].at[0, 0].set(False)}
    (loss, metrics), gradient = evaluated(impossible, rollout_level=level)
    (expected, _), slope = evaluated(left_out, rollout_level=level)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, slope, rtol=1e-6, atol=1e-8)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(metrics))


def test_without_metrics_the_loss_is_the_same_and_nothing_is_measured(
    responses: list[dict[str, Any]],
) -> None:
    arrays = rows_of(responses, ROWS)
    del arrays["log_ratio_start"]
    (loss, metrics), gradient = evaluated(arrays)
    (alone, nothing), slope = evaluated(arrays, metrics=False)
    assert loss == alone and nothing == {} and len(metrics) > 10
    np.testing.assert_array_equal(slope, gradient)
    stateful = next(n for n in PER_SAMPLE if objectives.spec(n).initial_state is not None)
    assert evaluated(arrays, metrics=False, objective=stateful)[0][1].keys() == {"state"}


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_double_precision_is_kept(name: str, responses: list[dict[str, Any]]) -> None:
    with jax.enable_x64(True):
        arrays = {
            n: x.astype(jnp.float64) if x.dtype == jnp.float32 else x
            for n, x in rows_of(responses, ALONE).items()
        }
        del arrays["segment_ids"]
        arrays = asked(arrays, name)
        (loss, _), gradient = evaluated(arrays, objective=name)
        assert loss.dtype == gradient.dtype == jnp.float64
    single = {n: x.astype(jnp.float32) if x.dtype == np.float64 else x for n, x in arrays.items()}
    (expected, _), slope = evaluated(single, objective=name)
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_advantages_of_zero_leave_no_metric_undefined(
    name: str, responses: list[dict[str, Any]]
) -> None:
    arrays = asked(rows_of(responses, ALONE), name)
    del arrays["segment_ids"]
    (loss, metrics), gradient = evaluated(
        arrays | {"advantages": jnp.zeros((len(LENGTHS), WIDTH))}, objective=name
    )
    assert np.isfinite(loss) and np.isfinite(gradient).all()
    for key, value in metrics.items():
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(value)), key


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("segment_ids", {"segment_ids": jnp.ones((2, WIDTH + 1), int)}),
        ("segment_ids", {"objective": "cppo"}),
        ("advantages", {"advantages": jnp.ones(2)}),
        ("max_tokens", {"loss_agg_mode": "seq-mean-token-sum-norm"}),
        ("denominator", {"denominator": 0}),
        ("rollout_log_prob", {"rollout_log_prob": jnp.zeros(2)}),
        ("rollout_level", {"rollout_level": "joint"}),
        ("rollout_mode", {"rollout_mode": "clip"}),
        ("rollout_bounds", {"rollout_bounds": (2.0, 1.0)}),
        ("rollout_bounds", {"rollout_bounds": (2.0,)}),
        ("rollout_bounds", {"rollout_bounds": 2.0}),
        ("rollout_bounds", {"rollout_bounds": ("0", "2")}),
        ("segment_ids", {"segment_ids": jnp.ones((len(ROWS), WIDTH))}),
        ("log_prob", {"log_prob": jnp.ones((len(ROWS), WIDTH), complex)}),
        ("old_log_prob", {"old_log_prob": None}),
        ("advantages", {"advantages": "high"}),
        ("denominator", {"denominator": jnp.ones(2)}),
        ("max_tokens", {"loss_agg_mode": "seq-mean-token-sum-norm", "max_tokens": np.ones(3)}),
        ("ratio_level", {"ratio_level": ["token"]}),
        ("rollout_level", {"rollout_level": "sequence", "rollout_log_prob": None}),
        ("rollout_mode", {"rollout_mode": "mask", "rollout_log_prob": None}),
        ("rollout_bounds", {"rollout_bounds": (0.5, 2.0), "rollout_log_prob": None}),
        ("rollout_bounds", {"rollout_bounds": (0.0, jnp.ones(())), "rollout_log_prob": None}),
    ],
)
def test_what_a_trainer_gets_wrong_is_refused_by_name(
    field: str, change: dict[str, Any], responses: list[dict[str, Any]]
) -> None:
    arrays = rows_of(responses, ROWS)
    del arrays["log_ratio_start"]
    with pytest.raises(ConfigError, match=f"^{field}: "):
        losses.policy_loss(**arrays | change)


def test_lists_of_numbers_are_taken_as_the_arrays_that_they_are(
    responses: list[dict[str, Any]],
) -> None:
    arrays = rows_of(responses, ROWS)
    del arrays["log_ratio_start"]
    lists = {name: np.asarray(array).tolist() for name, array in arrays.items()}
    assert losses.policy_loss(**lists)[0] == losses.policy_loss(**arrays)[0]


@pytest.mark.parametrize("shape", [(8, 16_384), (512, 256), (1, 1)])
def test_shapes_that_trainers_send_have_the_loss_and_gradient_of_numpy(
    shape: tuple[int, int],
) -> None:
    rng = np.random.default_rng(5)
    old = np.log(rng.uniform(0.05, 1, shape))
    new = np.minimum(old + rng.normal(scale=0.5, size=shape), 0)
    advantage = rng.normal(size=shape[0])
    mask = np.arange(shape[1]) < rng.integers(1, shape[1] + 1, shape[0])[:, None]

    def loss(log_prob: jax.Array) -> jax.Array:
        given = (jnp.float32(old), jnp.float32(advantage), jnp.asarray(mask))
        return policy_loss(log_prob, *given, objective="gipo", sigma=1.0, metrics=False)[0]

    found, gradient = jax.jit(jax.value_and_grad(loss))(jnp.float32(new))
    x = new - old
    weighted = np.exp(x - x**2 / 2) * advantage[:, None] * mask / mask.sum()
    np.testing.assert_allclose(found, -weighted.sum(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gradient, -weighted, rtol=1e-4, atol=1e-9)
