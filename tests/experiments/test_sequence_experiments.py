"""Studies of answers of several tokens: their scores by hand, and each at a tiny size."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from experiments import flow, mismatch, selection, sequences
from experiments.exact import sequence_bias
from experiments.store import Store
from gipo_jax import objectives, ratio_levels, train
from gipo_jax.analysis import plots, sequence_tree
from scripts import reproduce


def run(out: Path, *arguments: str) -> int:
    return reproduce.main([*arguments, "--out", str(out)])


def test_log_probabilities_of_a_tree_are_those_along_each_answer() -> None:
    policy = np.array([[0.25, 0.75], [0.5, 0.5], [0.1, 0.9]])
    expected = np.log([[0.25, 0.5], [0.25, 0.5], [0.75, 0.1], [0.75, 0.9]])
    np.testing.assert_allclose(sequence_tree.log_prob(policy), expected, rtol=1e-12)


def test_the_bias_study_has_every_objective_and_an_exact_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = sequence_bias.methods()
    assert len(planned) == len(set(planned)) > 150
    few = [method for method in planned if method.objective in ("no_clip", "gspo")]
    monkeypatch.setattr(sequence_bias, "methods", lambda: few)
    monkeypatch.setattr(sequence_bias, "SCALES", {"quick": sequence_bias.Scale(1, (0.5, 1.0))})
    assert run(tmp_path, "sequence_bias") == 0
    data = pd.read_csv(tmp_path / "data" / "sequence_bias.csv")
    assert data.groupby("distance").kl.mean().is_monotonic_increasing
    plain = data[data.objective == "no_clip"]
    largest = plain.groupby(["advantage", "level"]).bias.max().to_dict()
    assert largest["terminal", "joint"] < 1e-9
    assert largest["target", "prefix_product"] < 1e-9
    assert largest["terminal", "token"] > 0.01

    table = pd.read_csv(tmp_path / "tables" / "sequence_bias.csv")
    own = data[(data.objective == "gspo") & (data.distance == sequence_bias.SHOWN)]
    error = np.sqrt(own.bias**2 + own.noise**2 / sequence_bias.BATCH).mean()
    assert table[table.objective == "gspo"].error.item() == pytest.approx(error, rel=1e-4)


def test_token_minus_joint_of_the_bias_study_is_paired_on_trees() -> None:
    rows = [
        ("terminal", 1.0, "gipo", 1.0, level, tree, 10.0 * tree + gap)
        for level, gap in (("token", 0.5), ("joint", 0.0))
        for tree in (1, 0)
    ]
    frame = pd.DataFrame(rows, columns=[*sequence_bias.KEYS, "tree", "bias"])
    for score in sequence_bias.SCORES:
        frame[score] = frame["bias"]
    found = sequence_bias.token_minus_joint(frame)
    assert (found[["estimate", "low", "high"]] == 0.5).all(axis=None)


def runs_of(rows: list[tuple[Any, ...]]) -> pd.DataFrame:
    """Runs of the lag study from level, method, lag, seed and final reward."""
    frame = pd.DataFrame(rows, columns=["level", "method", "lag", "seed", "episode_return"])
    return frame.assign(
        status="done", learning_rate=1e-3, auc=frame.episode_return, success_rate=0.0, ess=1.0
    )


def test_a_method_survives_a_lag_where_it_keeps_nine_tenths_of_the_gain() -> None:
    finals = {"GIPO σ=1": (0.97, 0.99), "SAPO": (0.9, 0.92), "TIS": (0.99, 0.91)}
    rows: list[tuple[Any, ...]] = [("token", "GIPO σ=1", 0, seed, 1.0) for seed in (0, 1)]
    rows += [
        ("token", method, 16, seed, value)
        for method, values in finals.items()
        for seed, value in enumerate(values)
    ]
    table = sequences.score_lags(runs_of(rows)).set_index(["method", "lag"])
    kept, verdict = table["kept"].to_dict(), table["verdict"].to_dict()
    assert kept["SAPO", 16] == pytest.approx(0.82)
    assert kept["GIPO σ=1", 0] == 1
    assert verdict["GIPO σ=1", 16] == "survives"
    assert verdict["SAPO", 16] == "lost"
    assert verdict["TIS", 16] == "open"


def test_token_minus_joint_of_the_lag_study_is_paired_on_seeds() -> None:
    values = {"token": 0.3, "joint": 0.1}
    names = [m.label for m in (*sequences.AT_ALL_LEVELS, sequences.WIDE_GIPO)]
    rows = [
        (level, method, 16, seed, value + 0.5 * seed + 0.05 * ("3.2" in method))
        for level, value in values.items()
        for method in names
        for seed in (1, 0)
    ]
    found = sequences.token_minus_joint(runs_of(rows)).set_index(["token", "joint"])
    low, high = found["low"].to_dict(), found["high"].to_dict()
    assert low["TIS", "TIS"] == pytest.approx(0.2) and high["TIS", "TIS"] == pytest.approx(0.2)
    pair = sequences.GIPO.label, sequences.WIDE_GIPO.label
    assert found["estimate"].to_dict()[pair] == pytest.approx(0.15)


@pytest.mark.slow
@pytest.mark.long
def test_the_lag_study_trains_every_method_at_its_level_and_lag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rendering takes long, and other tests do it.
    monkeypatch.setattr(plots, "save", lambda figure, stem: [])
    presets = sequences.STALENESS.presets
    tiny = dataclasses.replace(presets["quick"], tasks=(sequences.TASK.lasting(16 * 64),))
    monkeypatch.setitem(presets, "quick", tiny)
    assert run(tmp_path, "sequence_staleness") == 0
    runs = pd.read_csv(tmp_path / "data" / "sequence_staleness_runs.csv")
    methods, levels = len(sequences.METHODS), len(sequences.AT_ALL_LEVELS) + 1
    counts = runs.groupby(["level", "lag"]).size().to_dict()
    assert counts == {("token", 0): 2, ("token", 4): 2 * methods, ("joint", 4): 2 * levels}
    assert (runs.status == "done").all()
    fresh, stale = runs[runs.lag == 0], runs[runs.lag == 4]
    # Measured after the update: the policy is one update from fresh answers, five from stale ones.
    assert fresh.log_ratio_abs_p95.mean() < stale.log_ratio_abs_p95.mean()
    # A method weighs the same stale answers in its own way.
    assert stale[(stale.seed == 3700) & (stale.level == "token")].ess.nunique() == methods
    tables = tmp_path / "tables"
    assert len(pd.read_csv(tables / "sequence_staleness_token_minus_joint.csv")) == levels + 1


def test_every_objective_for_responses_is_in_the_lag_study_at_a_level_it_can_have() -> None:
    parts = sequences.lag_parts(sequences.LAG, sequences.LAG.presets["committed"])
    levels: dict[str, set[str]] = {}
    for part in parts:
        for method in part.methods:
            level = part.settings["ratio_level"]
            levels.setdefault(method.objective, set()).add(level)
            assert ratio_levels.choose(level, objectives.spec(method.objective)) == level
    alone = {name: objectives.spec(name).ratio_level for name in ("gspo", "ctpo", "cppo", "minpro")}
    assert {name: levels[name] for name in alone} == {n: {level} for n, level in alone.items()}
    three = {"token", "sequence", "prefix_product"}
    for name in ("gipo", "ppo_clip", "sapo", "no_clip", "m2po", "r2vpo"):
        assert levels[name] == three


@pytest.mark.slow
@pytest.mark.long
def test_the_second_lag_study_trains_each_method_at_its_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "save", lambda figure, stem: [])
    chosen = {name: sequences.LAG_METHODS[name] for name in ("sequence", "prefix_min")}
    monkeypatch.setattr(sequences, "LAG_METHODS", chosen)
    monkeypatch.setattr(sequences, "AT_THREE_LEVELS", ())
    assert run(tmp_path, "sequence_lag") == 0
    table = pd.read_csv(tmp_path / "tables" / "sequence_lag.csv")
    found = table[["level", "method", "lag"]].to_numpy().tolist()
    expected = [["token", "GIPO σ=1", 0], ["sequence", "GSPO", 4], ["prefix_min", "MinPRO", 4]]
    assert found == expected and (table.seeds == 2).all()


def test_a_clip_masks_a_rare_token_whose_distribution_has_hardly_moved() -> None:
    mu = np.array([0.9, 0.06, 0.04])
    pi = np.array([0.88, 0.04, 0.08])  # total variation .04
    answer = jnp.array([[0, 1, 2]])
    log_mu, log_pi = (jnp.log(jnp.tile(x, (1, 3, 1))) for x in (mu, pi))
    found = mismatch.masks(answer, log_mu, log_pi)
    np.testing.assert_allclose(found["mu"][0], mu, rtol=1e-6)
    np.testing.assert_allclose(found["divergence"], 0.04, rtol=1e-5)
    masked = {name: x[0].tolist() for name, x in found["masked"].items()}
    assert masked["PPO-Clip"] == [0, 0.5, 0.5]  # for the advantage that leads away
    assert masked["DPPO TV, exact"] == masked["DPPO TV, binary"] == [0, 0, 0]
    far = mismatch.masks(answer, log_mu, jnp.log(jnp.tile(pi[::-1], (1, 3, 1))))
    assert far["masked"]["DPPO TV, exact"][0].tolist() == [0.5, 0.5, 0.5]
    assert far["masked"]["DPPO TV, binary"][0].tolist() == [0.5, 0, 0.5]


@pytest.mark.slow
@pytest.mark.long
def test_the_study_of_rare_tokens_compares_every_method_with_a_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "save", lambda figure, stem: [])
    assert run(tmp_path, "mismatch") == 0
    table = pd.read_csv(tmp_path / "tables" / "mismatch.csv")
    assert set(table.sampler) == set(mismatch.SAMPLERS)
    rare = table[(table.probability == "rare") & (table.sampler == "temperature 0.8")]
    masked = rare.set_index("method").estimate.to_dict()
    assert set(masked) == set(mismatch.METHODS)
    assert masked["PPO-Clip"] > 0.1 and masked["DPPO TV, exact"] == 0


def test_over_optimisation_is_a_fall_from_the_peak_of_the_mean_at_a_proxy_that_rises() -> None:
    gold = {"ppo_clip": ([0.4, 0.9, 0.7, 0.5, 0.5], [0.4, 0.7, 0.9, 0.5, 0.5])}
    gold["guard_0.2"] = ([0.4, 0.7, 0.8, 0.9, 0.9], [0.4, 0.7, 0.8, 0.9, 0.9])
    proxy = {"ppo_clip": [0.3, 0.8, 0.95, 1.0, 1.0], "guard_0.2": [0.3, 0.5, 0.6, 0.8, 0.8]}
    rows = [
        (3.0, method, seed, 64 * point, value, proxy[method][point])
        for method, seeds in gold.items()
        for seed in (1, 0)
        for point, value in enumerate(seeds[seed])
    ]
    columns = ["shift", "method", "seed", "samples", "gold", "proxy"]
    table = flow.summarize_proxy(pd.DataFrame(rows, columns=columns))
    found = table.pivot(index="method", columns="score", values="estimate").to_dict("index")
    # The mean peaks at both points with 0.8, and the first counts.
    expected = {"proxy": 1.0, "rise": 0.7, "gold": 0.5, "fall": 0.3, "at_level": 0.8, "reached": 1}
    assert found["ppo_clip"] == pytest.approx(expected)
    expected = {"proxy": 0.8, "rise": 0.5, "gold": 0.9, "fall": 0.0, "at_level": 0.9, "reached": 0}
    assert found["guard_0.2"] == pytest.approx(expected)
    ahead = table[(table.method == "guard_0.2") & (table.score == "gold")].minus_ppo_low
    assert ahead.item() == pytest.approx(0.4)


@pytest.mark.slow
@pytest.mark.long
def test_the_study_of_a_wrong_reward_model_stores_both_rewards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "save", lambda figure, stem: [])
    monkeypatch.setattr(flow, "METHODS", {"ppo_clip": flow.METHODS["ppo_clip"]})
    monkeypatch.setattr(flow, "SHIFTS", (3.0,))
    assert run(tmp_path, "flow_proxy") == 0
    curves = pd.read_csv(tmp_path / "data" / "flow_proxy_curves.csv")
    assert curves["shift"].tolist() == [3.0] * 8
    assert (curves.gold != curves.proxy).all()


def test_a_threshold_asks_for_the_mean_the_worst_seed_and_the_start() -> None:
    def reached(start: float, ends: tuple[float, ...]) -> bool:
        rows = [
            ("reverse, first attempt", "gipo", seed, steps, value, value)
            for seed, end in enumerate(ends)
            for steps, value in ((0, start), (100, end))
        ]
        curves = pd.DataFrame(rows, columns=sequences.CURVES)
        return bool(sequences.thresholds(curves)[0]["reached"])

    assert reached(0.005, (0.85, 1.0, 1.0, 1.0))
    assert not reached(0.005, (0.79, 1.0, 1.0, 1.0, 1.0))
    assert not reached(0.005, (0.85, 0.9))
    assert not reached(0.1, (0.85, 1.0, 1.0, 1.0))


@pytest.mark.slow
@pytest.mark.long
def test_gipo_and_ppo_clip_learn_to_reverse_ten_tokens() -> None:
    case = sequences.CASES["reverse, second attempt"]._replace(first_seed=5300)
    gipo, ppo = sequences.learning_runs(case, 1, total_steps=15_000, num_logs=1)
    train_all = jax.jit(train.make_train(gipo.config))
    for run in (gipo, ppo):
        _, metrics = train_all(jax.tree.map(jnp.asarray, run.hparams))
        assert metrics["eval_return_sampled"][-1] > 0.9


def test_costs_of_a_selection_count_up_to_the_threshold_and_are_paired_on_seeds() -> None:
    # keep_all gets there with the second point, depo with the first, prune never.
    reached = {"keep_all": (0.5, 0.95), "depo": (0.9, 0.8), "prune": (0.1, 0.2)}
    rows = [
        (method, seed, point, value, 100 * (point + 1), 10.0 * (point + 1), 1.0 * (point + 1))
        for method, values in reached.items()
        for seed in (0, 1)
        for point, value in enumerate(values)
    ]
    columns = ["method", "seed", "iteration", "eval_return", *selection.COSTS]
    found = selection.cost_ratios(pd.DataFrame(rows, columns=columns))
    answers = found[found.cost == "answers"].set_index("method")
    expected = {"keep_all": 1.0, "depo": 0.5, "prune": 1.0}
    assert answers["ratio_low"].to_dict() == pytest.approx(expected)
    assert answers["ratio_high"].to_dict() == pytest.approx(expected)
    assert answers["reached"].to_dict() == {"keep_all": 2, "depo": 2, "prune": 0}


def test_a_rise_is_from_the_warm_up_of_the_same_seed() -> None:
    start = pd.DataFrame({"seed": [1, 0], "eval_return": [0.4, 0.1]})
    rows = [("dpo", seed, point, 0.3 + 0.3 * seed + point) for seed in (0, 1) for point in (0, 1)]
    curves = pd.DataFrame(rows, columns=["method", "seed", "iteration", "eval_return"])
    found = selection.rise(curves, start).set_index("score")
    low, high = found["low"].to_dict()["rise"], found["high"].to_dict()["rise"]
    # Rises of 1.2 with seed 0 and 1.2 with seed 1: paired, the interval is a point.
    assert [low, high] == pytest.approx([1.2, 1.2])
    assert found["estimate"].to_dict()["warm_up"] == pytest.approx(0.25)


@pytest.mark.slow
@pytest.mark.long
def test_the_selection_study_trains_and_goes_on_from_what_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(selection.STUDY.presets, "quick", selection.Scale(2, 4, 3))
    monkeypatch.setattr(selection, "SELECTIONS", {"keep_all": {}, "prune": {"packed_size": 64}})
    monkeypatch.setattr(selection, "PREFERENCES", {"dpo": {"pair_sigma": np.inf}})
    assert run(tmp_path, "selection", "--part", "1/3") == 0
    assert run(tmp_path, "selection", "--part", "2/3") == 0
    assert run(tmp_path, "selection", "--part", "3/3") == 0
    curves = pd.read_csv(tmp_path / "data" / "selection_curves.csv")
    ends = curves.groupby(["method", "seed"])[["answers", "tokens_trained"]].max()
    assert ends.index.tolist() == [(m, s) for m in ("dpo", "keep_all", "prune") for s in (0, 1)]
    assert ends.answers.groupby("method").first().tolist() == [3 * 128, 4 * 128, 4 * 128]
    trained = ends.tokens_trained.groupby("method").mean().to_dict()
    assert 0.2 < trained["prune"] / trained["keep_all"] < 0.8
    table = pd.read_csv(tmp_path / "tables" / "selection_dpo.csv")
    assert set(table.method) == {"dpo"} and (table.seeds == 2).all()


def test_costs_of_packing_are_updates_times_those_of_the_program(tmp_path: Path) -> None:
    store = Store(tmp_path, "selection_costs", "")
    # keep_all gets there with 20 updates, packed with 30, of half the FLOPs and rows.
    reached = {"keep_all": (0.5, 0.95, 1.0), "packed": (0.2, 0.3, 0.9)}
    columns = ["case", "method", "seed", "iteration", "eval_return", *selection.COSTS]
    rows = [
        ("fresh", method, 0, 10 * point, value, 100 * point, 10.0 * point, 50.0 * point)
        for method, values in reached.items()
        for point, value in enumerate(values, start=1)
    ]
    store.write("selection_costs_curves", pd.DataFrame(rows, columns=columns))
    programs = [("fresh", "keep_all", 4, 40, 1e6, 0.2), ("fresh", "packed", 2, 20, 5e5, 0.1)]
    columns = ["case", "method", "rows", "tokens", "flops", "seconds"]
    store.write("selection_costs_programs", pd.DataFrame(programs, columns=columns))
    found = selection.costs_scores(store)
    ratios = found["selection_costs"].set_index(["method", "cost"]).ratio_estimate
    expected = {"answers": 1.5, "tokens_computed": 0.75, "flops": 0.75, "seconds": 0.75}
    assert ratios["packed"][list(expected)].to_dict() == pytest.approx(expected)
    filled = found["selection_costs_rows"].set_index("method").tokens_a_row
    assert filled.to_dict() == pytest.approx({"keep_all": 150 / 120, "packed": 150 / 60})


@pytest.mark.slow
@pytest.mark.long
def test_the_study_of_costs_trains_and_measures_its_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    presets = selection.COSTS_STUDY.presets
    monkeypatch.setitem(presets, "quick", selection.CostsScale(1, {"stale": 6}, 1))
    methods = {name: selection.PACKING[name] for name in ("keep_all", "mixed groups, packed")}
    stale = selection.CASES["stale"]._replace(methods=methods)
    monkeypatch.setitem(selection.CASES, "stale", stale)
    assert run(tmp_path, "selection_costs") == 0
    programs = pd.read_csv(tmp_path / "tables" / "selection_costs_rows.csv").set_index("method")
    plain, packed = programs.loc["keep_all"], programs.loc["mixed groups, packed"]
    assert 0.3 < packed.flops / plain.flops < 0.48
    assert packed.tokens_a_row > plain.tokens_a_row
    assert (programs.seconds > 0).all()
