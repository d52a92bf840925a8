"""Experiments end to end at tiny sizes, drawing from stored data, and damaged data."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments import claims, engine, figures, metaworld, report, scores, studies
from experiments.exact import bounds, gridworld
from experiments.store import DataError, Store, sha256
from experiments.studies import STUDIES
from experiments.switch import any_of_them, compared, contenders, sequence_methods
from experiments.tasks import CATCH, GIPO, PPO, REACHER, Method, replay, windows
from gipo_jax import objectives
from gipo_jax.environments import envpool_env
from scripts import reproduce
from tests.programs import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: (key, values[::16]) for name, (key, values) in gridworld.CURVES.items()}
    monkeypatch.setattr(gridworld, "CURVES", few)
    monkeypatch.setattr(bounds, "REPEATS", {"quick": 400})
    monkeypatch.setattr(bounds, "DRAWS", {"quick": 40_000})


def run(out: Path, *arguments: str) -> int:
    return reproduce.main([*arguments, "--out", str(out)])


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with trust_weights in it; tests that change it take a copy."""
    out = tmp_path_factory.mktemp("drawn")
    assert run(out, "trust_weights") == 0
    return out


def numbers(out: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(out / "tables" / f"{name}.csv")


def test_list_names_every_experiment(capsys: Any) -> None:
    assert reproduce.main(["--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == list(STUDIES)


def test_unknown_experiment(capsys: Any) -> None:
    assert reproduce.main(["nonsense"]) == 2
    assert "'nonsense' is not valid" in capsys.readouterr().err


def test_an_experiment_that_cannot_run_here_is_left_out_of_all_and_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(envpool_env, "names", lambda: None)
    two = {name: STUDIES[name] for name in ("metaworld", "trust_weights")}
    monkeypatch.setattr("experiments.reproduce.STUDIES", two)
    assert run(tmp_path) == 0
    assert "left out: env: 'MetaWorld/ButtonPress-v3'" in capsys.readouterr().out
    assert (tmp_path / "figures" / "trust_weights.png").exists()
    assert run(tmp_path, "metaworld") == 2
    error = capsys.readouterr().err
    assert 'pip install "gipo_jax[envpool]"' in error and error.count("\n") == 1


def test_trust_weights(drawn: Path) -> None:
    u = numbers(drawn, "trust_weights").set_index(["objective", "sigma", "advantage", "log_ratio"])[
        "u"
    ]
    assert u[("gipo", 1.0, 1.0, 2.0)] == pytest.approx(1, abs=1e-5)
    assert u[("gipo", 1.0, 1.0, 8.0)] > 0
    assert (u["ppo_clip"].xs(1.0, level="advantage").iloc[-3:] == 0).all()


def test_gridworld(tmp_path: Path) -> None:
    assert run(tmp_path, "gridworld") == 0
    table = pd.read_csv(tmp_path / "data" / "gridworld.csv")
    columns = ["case", "objective", "sigma", "bias", "variance", "zero_gradient", "pareto"]
    assert list(table)[:7] == columns
    assert len(table) == 24
    zero = table[table.zero_gradient]
    assert list(zip(zero.case, zero.objective, strict=True)) == [
        ("A", "ppo_clip"),
        ("B", "ppo_clip"),
    ]
    assert not table[(table.case == "C") & (table.objective == "ppo_clip")].pareto.any()
    # For the whole gradient no method is all-zero: other states have samples left.
    assert not pd.read_csv(tmp_path / "data" / "gridworld_vector.csv").zero_gradient.any()


def test_bounds(tmp_path: Path) -> None:
    assert run(tmp_path, "bounds") == 0
    magnitude = pd.read_csv(tmp_path / "data" / "bounds_magnitude.csv")
    np.testing.assert_allclose(magnitude.measured, magnitude.bound, rtol=1e-5)
    np.testing.assert_allclose(magnitude.at_log_ratio, magnitude.sigma**2, atol=2e-2)
    ess = pd.read_csv(tmp_path / "data" / "bounds_ess.csv")
    near = ess[ess["shift"] <= 1]
    np.testing.assert_allclose(near.simulated, near.closed, atol=0.03)
    at_one = ess[ess["shift"] == 1].set_index("sigma").closed
    np.testing.assert_allclose(
        at_one.loc[[np.inf, 0.2, 0.5, 1.0, 2.0]], [0.368, 0.239, 0.491, 0.595, 0.499], atol=6e-4
    )
    error = pd.read_csv(tmp_path / "data" / "bounds_concentration.csv")
    assert (error.hoeffding_failures <= bounds.FAILURE).all()
    assert (error.bernstein_failures <= bounds.FAILURE).all()
    assert (error.error <= error.hoeffding).all()


def test_drawing_again_changes_nothing(drawn: Path) -> None:
    manifest = json.loads((drawn / "manifest.json").read_text())
    figure = manifest["figures"]["figures/trust_weights.png"]
    assert figure["sha256"] == sha256(drawn / "figures" / "trust_weights.png")
    data = figure["data"]["data/trust_weights.csv"]
    assert data["sha256"] == sha256(drawn / "data" / "trust_weights.csv")
    assert "trust_weights --preset quick" in data["command"]
    assert run(drawn, "trust_weights", "--plot-only") == 0
    assert json.loads((drawn / "manifest.json").read_text()) == manifest


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-300]), "checksum"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "checksum"),
    ],
)
def test_damaged_data(drawn: Path, tmp_path: Path, capsys: Any, damage: Any, message: str) -> None:
    shutil.copytree(drawn, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "data" / "trust_weights.csv")
    capsys.readouterr()
    assert run(tmp_path, "trust_weights", "--plot-only") == 2
    error = capsys.readouterr().err
    assert message in error and "trust_weights.csv" in error
    assert error.count("\n") == 1


def test_redrawing_everything_passes_over_what_never_ran(drawn: Path, capsys: Any) -> None:
    assert run(drawn, "--plot-only") == 0
    assert "nothing to draw" in capsys.readouterr().out
    assert run(drawn, "bounds", "--plot-only") == 2
    assert "run experiment 'bounds' first" in capsys.readouterr().err


def test_redrawing_everything_fails_where_stored_data_are_lost(
    drawn: Path, tmp_path: Path, capsys: Any
) -> None:
    shutil.copytree(drawn, tmp_path, dirs_exist_ok=True)
    (tmp_path / "data" / "trust_weights.csv").unlink()
    assert run(tmp_path, "--plot-only") == 2
    assert "trust_weights.csv: missing" in capsys.readouterr().err


def test_damaged_data_without_a_manifest(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "data").mkdir()
    for content, message in ((b"", "not a readable table"), (b"a,b\n1,2\n", "lacks the column")):
        (tmp_path / "data" / "trust_weights.csv").write_bytes(content)
        assert run(tmp_path, "trust_weights", "--plot-only") == 2
        assert message in capsys.readouterr().err
    (tmp_path / "manifest.json").write_text("{")
    assert run(tmp_path, "trust_weights", "--plot-only") == 2
    assert "not a manifest" in capsys.readouterr().err


TINY = dataclasses.replace(
    CATCH,
    settings=CATCH.settings | {"num_envs": 4, "total_steps": 4096},
    updates={"gentle": 1, "reuse-heavy": 8},
)


def resize(patch: pytest.MonkeyPatch, name: str, **changed: Any) -> None:
    """Gives the quick preset of a study other sizes."""
    presets = STUDIES[name].presets
    patch.setitem(presets, "quick", dataclasses.replace(presets["quick"], **changed))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the study of replay sizes at a tiny size, made in two shares."""
    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        assert run(out, "replay_sizes", "--part", "1/2") == 0
        one = pd.read_csv(out / "data" / "replay_sizes_runs.csv")
        assert set(one.regime) == {"reuse-heavy"}
        assert run(out, "replay_sizes", "--part", "2/2") == 0
    return out


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Makes every training study tiny."""
    patch.setattr(engine, "COMMON", engine.COMMON | {"num_logs": 4})
    resize(
        patch,
        "replay_sizes",
        tasks=(TINY,),
        cells=replay(1, 16),
        seeds=range(2),
        rates=(3e-3, 1e-2),
        steps=1.0,
    )
    few = {"tasks": (TINY,), "seeds": range(2), "steps": 0.5}
    resize(patch, "sigma", **few)  # the kernels share its presets
    resize(patch, "staleness", **few, methods=(PPO,))
    reacher = REACHER.lasting(4096)
    methods = (Method("gipo", {"sigma": 0.5}),)
    resize(patch, "token_vs_joint", tasks=(reacher,), seeds=range(2), steps=0.5, methods=methods)


def test_replay_sizes(trained: Path) -> None:
    runs = pd.read_csv(trained / "data" / "replay_sizes_runs.csv")
    methods = len(STUDIES["replay_sizes"].presets["quick"].methods)
    assert len(runs) == 2 * methods * 2 * 2  # regimes, methods, ages, seeds
    assert set(runs.objective) == {"gipo", "ppo_clip", "sapo", "no_clip"}
    assert (runs.status == "done").all() and runs.final_return.notna().all()
    # The learning rate is the one that was best on the tuning seeds, which are others.
    tuning = pd.read_csv(trained / "data" / "replay_sizes_tuning.csv")
    assert not set(tuning.seed) & set(runs.seed)
    own = tuning[(tuning.regime == "gentle") & (tuning.objective == "ppo_clip")]
    best = own.groupby("learning_rate")["auc"].mean().idxmax()
    used = runs[(runs.regime == "gentle") & (runs.objective == "ppo_clip")].learning_rate
    assert set(used) == {best}
    # Each objective weighs the same stale data in its own way.
    stale = runs[(runs.age == 16) & (runs.seed == 0) & (runs.regime == "reuse-heavy")]
    curves = pd.read_csv(trained / "data" / "replay_sizes_curves_reuse_heavy.csv")
    assert curves[curves.run.isin(stale.run)].groupby("run").ess.mean().nunique() == methods
    headline = numbers(trained, "replay_sizes")
    assert (headline.low <= headline.iqm).all() and (headline.iqm <= headline.high).all()


def test_what_shares_the_runs_of_replay_sizes(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch)
    written = {p: p.stat().st_mtime_ns for p in (trained / "sweeps").glob("*/metrics.csv")}
    assert run(trained, "utilization", "sample_efficiency", "stability") == 0
    assert written == {p: p.stat().st_mtime_ns for p in (trained / "sweeps").glob("*/metrics.csv")}
    efficiency = numbers(trained, "sample_efficiency")
    assert efficiency.time.between(0, 1).all()
    drop = numbers(trained, "stability")
    assert (drop[drop.quantity == "drop"].value >= 0).all()
    assert (drop[drop.quantity == "diverged"].value == 0).all()
    groups = numbers(trained, "utilization_groups")
    ppo = groups[groups.of == "PPO-Clip"].set_index(["regime", "quantity"]).value
    assert ppo["reuse-heavy", "near_zero_fraction_old"] > 0


def test_another_scale_in_the_same_folder(
    trained: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch)
    resize(monkeypatch, "replay_sizes", seeds=range(1))
    monkeypatch.setitem(
        STUDIES["replay_sizes"].presets, "full", STUDIES["replay_sizes"].presets["quick"]
    )
    assert run(trained, "replay_sizes", "--preset", "full") == 2
    assert "another sweep" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        *("staleness", "token_vs_joint"),
        *(pytest.param(name, marks=pytest.mark.long) for name in ("sigma", "asymmetry", "kernel")),
    ],
)
def test_training_experiments(
    name: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch)
    out = tmp_path_factory.getbasetemp() / "ablations"
    assert run(out, name) == 0
    figures = json.loads((out / "manifest.json").read_text())["figures"]
    # Ablations that no figure shows have a table of scores.
    assert len(pd.read_csv(next((out / "tables").glob(f"{name}*.csv")))) > 1
    assert name not in ("staleness", "sigma") or any(name in path for path in figures)
    for path in figures:
        assert (out / path).stat().st_size > 5000


MINI = TINY.lasting(1024)
MINI_SIZES: dict[str, Any] = {"tasks": (MINI,), "cells": replay(1, 8), "rates": (1e-3, 1e-2)}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with protocol 2 at a tiny size, one regime of one task."""
    out = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        resize(patch, "tuned_sizes", **MINI_SIZES)
        assert run(out, "tuned_sizes", "--part", "1/2") == 0
    return out


@pytest.mark.long
def test_protocol_2_reports_the_settings_that_won_on_the_tuning_seeds(tuned: Path) -> None:
    tuning_runs = pd.read_csv(tuned / "data" / "tuned_sizes_tuning.csv")
    settings = sum(len(widths) for widths in scores.WIDTHS.values())
    assert len(tuning_runs) == settings * 2 * 2  # replay sizes, learning rates
    runs = pd.read_csv(tuned / "data" / "tuned_sizes_runs.csv")
    assert not set(tuning_runs.seed) & set(runs.seed)

    choices = numbers(tuned, "tuned_sizes_choices")
    at_eight = choices[(choices.objective == "ppo_clip") & (choices.age == 8)].set_index("case")
    own = tuning_runs[(tuning_runs.objective == "ppo_clip") & (tuning_runs.age == 8)]
    widest = own.groupby(["width", "learning_rate"]).auc.mean().idxmax()
    assert (at_eight.width["tuned"], at_eight.learning_rate["tuned"]) == widest
    papers = own[own.width == 0.2]
    rate = papers.groupby("learning_rate").auc.mean().idxmax()
    assert at_eight.learning_rate["papers"] == rate
    for _, row in choices.iterrows():
        same = runs[(runs.objective == row.objective) & (runs.age == row.age)]
        chosen = (same.width == row.width) & (same.learning_rate == row.learning_rate)
        assert chosen.sum() == 2  # a run a reported seed


@pytest.mark.long
def test_a_unit_whose_tables_are_stored_is_not_trained_again(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resize(monkeypatch, "tuned_sizes", **MINI_SIZES)
    for name in ("data", "manifest.json"):
        copy = shutil.copytree if (tuned / name).is_dir() else shutil.copy
        copy(tuned / name, tmp_path / name)
    assert run(tmp_path, "tuned_sizes", "--part", "1/2") == 0
    assert not (tmp_path / "sweeps").exists()
    for path in (tuned / "data").iterdir():
        assert (tmp_path / "data" / path.name).read_bytes() == path.read_bytes()


def test_tables_of_new_units_join_those_of_stored_ones(tmp_path: Path) -> None:
    def unit(env: str, score: float) -> tuple[pd.DataFrame, pd.DataFrame]:
        runs = pd.DataFrame({"run": [0, 1], "env": env, "score": score})
        return runs, pd.DataFrame({"run": [0, 0, 1, 1], "score": score})

    study = dataclasses.replace(STUDIES["tuned_sizes"], by=("env",), table="runs")

    def write(runs: pd.DataFrame, curves: pd.DataFrame) -> None:
        store = Store(tmp_path, "tuned_sizes", "--preset quick --out anywhere")
        engine.write(study, store, {"runs": runs, "curves": curves})

    write(*unit("a", 1.0))
    write(*unit("b", 2.0))
    write(*unit("b", 3.0))  # trained again: replaces what was stored
    runs = pd.read_csv(tmp_path / "data" / "runs.csv")
    curves = pd.read_csv(tmp_path / "data" / "curves.csv")
    assert runs["env"].tolist() == ["a", "a", "b", "b"] and runs["run"].is_unique
    assert len(curves) == 8
    joined = curves.merge(runs, on="run", suffixes=("", "_of_run"))
    assert len(joined) == 8 and (joined["score"] == joined["score_of_run"]).all()
    assert sorted(set(runs["score"])) == [1.0, 3.0]

    other = Store(tmp_path, "tuned_sizes", "--preset full --out anywhere")
    assert not engine.is_stored(study, other, [("a",)])  # a study of its own


@pytest.mark.long
def test_protocol_2_says_which_units_are_missing(tuned: Path) -> None:
    units = numbers(tuned, "tuned_sizes_units")
    assert units.finished.tolist() == [True, False]
    assert set(pd.read_csv(tuned / "data" / "tuned_sizes_runs.csv").regime) == {"reuse-heavy"}
    comparisons = numbers(tuned, "tuned_sizes_comparison")
    judged = comparisons[comparisons.judged]
    # Claims 4, 6 and 7, two cases and two baselines each; the gentle regime is missing.
    assert judged.groupby("claim").size().to_dict() == {4: 4, 6: 4, 7: 4}
    assert (judged.p_holm >= judged.p).all()


def test_one_rate_for_all_sizes_is_the_best_on_average() -> None:
    rows = [
        ("gentle", "E", "ppo_clip", width, age, rate, seed, "done", area)
        for seed in (0, 1)
        for width, age, rate, area in [
            (0.2, 1, 1e-3, 5.0),
            (0.2, 1, 1e-2, 4.0),
            (0.2, 8, 1e-3, 0.0),
            (0.2, 8, 1e-2, 3.0),
            (0.4, 8, 1e-3, 6.0),
        ]
    ]
    table = pd.DataFrame(rows, columns=[*studies.WIDTH_KEYS, "auc"])
    found = scores.choose(table).set_index(["case", "age"])
    pairs = {key: (row.width, row.learning_rate) for key, row in found.iterrows()}
    assert pairs == {
        ("papers", 1): (0.2, 1e-3),
        ("papers", 8): (0.2, 1e-2),
        ("tuned", 1): (0.2, 1e-3),
        ("tuned", 8): (0.4, 1e-3),
        ("one rate", 1): (0.2, 1e-2),
        ("one rate", 8): (0.2, 1e-2),
    }


@pytest.mark.long
def test_age_and_size_holds_back_what_its_cells_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resize(monkeypatch, "age_and_size", tasks=(MINI,), cells=windows((1, 4), (0, 4)))
    assert run(tmp_path, "age_and_size") == 0
    runs = pd.read_csv(tmp_path / "data" / "age_and_size_runs.csv")
    assert len(runs) == 5 * 4 * 3  # methods, cells, seeds
    ages = runs.groupby(["age", "min_age"]).policy_age.mean()
    assert ages[(1, 0)] == 0 and ages[(5, 4)] == 4
    assert 0 < ages[(4, 0)] < 3.1 and 4 < ages[(8, 4)] < 7.1


def test_effects_of_age_and_size_by_hand() -> None:
    rows = [
        ("GIPO", "E", min_age, width, seed, 1.0 - 0.5 * (min_age == 4) + 0.2 * (width == 8))
        for min_age in (0, 4)
        for width in (1, 8)
        for seed in (0, 1)
    ]
    columns = ["method", "env", "min_age", "width", "seed", "score"]
    effects = scores.slopes(pd.DataFrame(rows, columns=columns)).set_index("effect")
    assert effects.difference["older"] == pytest.approx(-0.5)
    assert effects.difference["wider"] == pytest.approx(0.2)


@pytest.mark.long
def test_the_proposal_is_compared_with_every_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = studies.FOLLOWING[:2]
    sizes = {"tasks": (MINI,), "cells": replay(1, 8), "rates": (1e-2,)}
    resize(monkeypatch, "proposal_development", **sizes, seeds=range(4000, 4002), methods=few)
    resize(monkeypatch, "proposal", **sizes)
    assert run(tmp_path, "proposal_development") == 0
    assert len(numbers(tmp_path, "proposal_development_rank")) == 2
    assert run(tmp_path, "proposal", "--part", "1/2") == 0
    table = numbers(tmp_path, "proposal")
    assert table.groupby("age").size().to_dict() == {0: 11, 1: 11, 8: 11}
    assert table.groupby("age").best.sum().tolist() == [1, 1, 1]
    runs = pd.read_csv(tmp_path / "data" / "proposal_runs.csv")
    stale = runs[(runs.age == 8) & (runs.seed == 3400)]
    assert stale.auc.nunique() >= 8
    assert set(numbers(tmp_path, "proposal_by_unit").age) == {1, 8}


def test_the_best_other_method_is_found_in_each_unit_apart() -> None:
    """Every method gains the same by a seed, so that differences are exact."""
    level = {scores.PROPOSAL: 2.0, "GIPO σ=1": 1.0, "PPO-Clip": 0.0}
    columns = ["regime", "env", "method", "age", "seed", "final_return", "auc"]
    rows = [
        # On the second task the order is turned round.
        ("gentle", env, method, 1, seed, 0.0, sign * value + 0.1 * seed)
        for env, sign in (("first", 1), ("second", -1))
        for method, value in level.items()
        for seed in range(2)
    ]
    found = scores.proposal_by_unit(pd.DataFrame(rows, columns=columns)).set_index("env")
    assert found.best.to_dict() == {"first": "GIPO σ=1", "second": "PPO-Clip"}
    np.testing.assert_allclose(found.difference[["first", "second"]], [0.5, -1.0])


def test_metaworld_trains_both_regimes_and_draws_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("envpool")
    small = {"hidden_sizes": (8, 8), "value_hidden_sizes": (8,), "num_bins": 5, "batch_size": 64}
    # So fast that the two widths part within a few iterations.
    fast = {"learning_rate": 0.03, "warmup_iterations": 0}
    monkeypatch.setattr(metaworld, "PROTOCOL", metaworld.PROTOCOL | small | fast)
    iterations = 14
    methods = (GIPO, Method("gipo", {"sigma": 0.1}))
    regimes = ("stale", "fresh")
    resize(monkeypatch, "metaworld", methods=methods, regimes=regimes, iterations=iterations)
    assert run(tmp_path, "metaworld", "--part", "1/2") == 0
    one = pd.read_csv(tmp_path / "data" / "metaworld_runs.csv")
    assert set(one.regime) == {"stale"}
    assert run(tmp_path, "metaworld", "--part", "2/2") == 0

    runs = pd.read_csv(tmp_path / "data" / "metaworld_runs.csv")
    cells = sorted(zip(runs.regime, runs.sigma, strict=True))
    assert cells == [("fresh", 0.1), ("fresh", 1.0), ("stale", 0.1), ("stale", 1.0)]
    assert (runs.status == "done").all() and set(runs.env) == {"MetaWorld/ButtonPress-v3"}
    tables = sorted((tmp_path / "data").glob("metaworld_curves_*.csv"))
    curves = pd.concat([pd.read_csv(table) for table in tables])
    assert (curves.groupby("run").env_steps.max() == iterations * 500).all()
    assert (curves.episode_return > 0).all() and curves.success_rate.notna().all()
    # A fresh buffer holds this iteration and the one before, a stale one here everything so far.
    last = curves.groupby("run").policy_age.last()
    ages = {regime: last[part.run].to_numpy() for regime, part in runs.groupby("regime")}
    assert np.all(np.abs(ages["fresh"] - 0.5) < 0.3)
    assert np.all(np.abs(ages["stale"] - (iterations - 1) / 2) < 2)

    found = numbers(tmp_path, "metaworld_scores")
    # The best final mean is 1. It is no maximum where training has made the returns worse.
    assert np.isclose(found.iqm, 1).sum() == 1 and found.iqm.nunique() == 4
    used = numbers(tmp_path, "metaworld_utilization")
    assert used["mean"].notna().all() and len(used) == 2 * 4
    assert (tmp_path / "figures" / "metaworld.png").stat().st_size > 5000


def _metaworld_tables(gain_of_gipo: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Three seeds, two tasks whose returns rise from 10 to 30 or so; sigma 1 ends higher."""
    runs, curves = [], []
    methods = ("GIPO σ=1", "PPO-Clip", "SAPO")
    cells = itertools.product(("stale", "fresh"), ("A", "B"), methods, range(3))
    for run, (regime, task, method, seed) in enumerate(cells):
        end = 30.0 + (gain_of_gipo if method == "GIPO σ=1" else 0) + 0.1 * seed
        runs.append((run, regime, task, method, seed, end))
        for step, value in ((10, 10.0), (20, 34.0), (100, end)):
            curves.append((run, step, value, 0.5))
    names = ["run", "regime", "task", "method", "seed", "final_return"]
    columns = ["run", "env_steps", "episode_return", "success_rate"]
    return pd.DataFrame(runs, columns=names), pd.DataFrame(curves, columns=columns)


def test_metaworld_scores_are_parts_of_what_a_task_has_to_gain() -> None:
    runs, curves = _metaworld_tables(4.0)
    runs = pd.concat([runs, runs[(runs.task == "A") & (runs.seed == 0)].assign(seed=9)])
    scored = metaworld.score_runs(runs, curves)
    # The best mean end is 34.1, so a task has 24.1 to gain; seed 9 lacks task B.
    assert set(scored.seed) == {0, 1, 2}
    ppo = scored[(scored.method == "PPO-Clip") & (scored.seed == 0)].iloc[0]
    assert np.isclose(ppo.final, 20 / 24.1) and np.isclose(ppo["drop"], 4 / 24.1)
    assert np.isclose(ppo.area, (74 / 3 - 10) / 24.1) and ppo.success == 0.5


@pytest.mark.parametrize(
    ("gain", "expected"),
    [(4.0, [claims.REPRODUCED] * 3), (0.0, [claims.NOT] * 3), (-2.0, [claims.NOT] * 3)],
)
def test_metaworld_verdicts_follow_the_sign_of_the_difference(
    gain: float, expected: list[str]
) -> None:
    compared = metaworld.compare(metaworld.score_runs(*_metaworld_tables(gain)))
    assert len(compared) == 2 * 2 + 2 + 2 and compared.judged.all()
    assert list(claims.on_metaworld(compared).values()) == expected
    assert set(claims.on_metaworld(compared.assign(seeds=2)).values()) == {claims.OPEN}
    alone = compared[compared.method == "SAPO"].assign(judged=False)
    assert set(claims.on_metaworld(alone).values()) == {claims.OPEN}


def test_development_is_scored_on_seeds_that_did_not_choose_the_rate() -> None:
    rows = [
        ("reuse-heavy", "E", "A", 1, 0, rate, seed, "done", area)
        for rate, areas in ((1e-3, (1.0, 0.0)), (1e-2, (0.0, 3.0)))
        for seed, area in enumerate(areas)
    ] + [("reuse-heavy", "E", "B", 1, 0, 1e-3, seed, "done", 5.0) for seed in (0, 1)]
    runs = pd.DataFrame(rows, columns=[*engine.KEYS, "learning_rate", "seed", "status", "auc"])
    found = scores.crossed_scores(runs).set_index(["method", "seed"]).score
    # Each seed of A is scored at the rate that the other seed liked, where it has 0.
    assert found["A", 0] == found["A", 1] == 0
    assert found["B", 0] == 1


def test_ranking_takes_the_best_worst_size_among_close_variants() -> None:
    rows = [
        (method, age, seed, score + 0.2 * seed)
        for method, scores in {"high": (1.0, 0.4), "even": (0.65, 0.7), "low": (0.1, 0.3)}.items()
        for age, score in zip((1, 8), scores, strict=True)
        for seed in (0, 1)
    ]
    ranked = scores.rank(pd.DataFrame(rows, columns=["method", "age", "seed", "score"]))
    assert ranked.method.tolist() == ["even", "high", "low"]
    assert ranked.close.tolist() == [True, True, False]


@pytest.mark.parametrize("program", [compared, contenders, sequence_methods, any_of_them])
def test_every_branch_of_a_shared_program_is_the_objective_it_is_called(program: Any) -> None:
    x = np.random.default_rng(0).normal(0, 0.5, (64, 1)).astype(np.float32)
    advantage = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    start = (0.7 * x).astype(np.float32)
    given = {"sigma": 0.4, "clip_eps": 0.3, "tau_pos": 1.5, "tau_neg": 2.5, "sigma_prox": 0.7}
    whole = objectives.spec(program)
    shared: dict[str, Any] = {key: value for key, value in given.items() if key in whole.params}
    shared |= dict.fromkeys(whole.inputs, start)
    if whole.initial_state is not None:
        shared["state"] = whole.initial_state(whole.params)
    for index, name in enumerate(program.names):
        spec = objectives.spec(name)
        own: dict[str, Any] = {k: v for k, v in shared.items() if k in spec.params}
        own |= dict.fromkeys(spec.inputs, start)
        if spec.initial_state is not None:
            own["state"] = spec.initial_state(spec.params)
        found, expected = program(x, advantage, which=float(index), **shared), None
        expected = spec.function(x, advantage, **own)
        found = found[0] if whole.initial_state is not None else found
        expected = expected[0] if spec.initial_state is not None else expected
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_stability_by_hand() -> None:
    found = np.array([[0.0, 4.0], [2.0, 4.0]])  # two seeds, two tasks
    assert scores.spread(found) == 0.5
    assert scores.worst(found) == 2.0


def test_verdicts_by_hand() -> None:
    assert claims.verdict([(0.1, 0.2), (0.1, 0.3)], 1) == claims.REPRODUCED
    assert claims.verdict([(0.1, 0.2), (-0.1, 0.3)], 1) == claims.PARTLY
    assert claims.verdict([(0.1, 0.2), (-0.3, -0.1)], 1) == claims.NOT
    assert claims.verdict([(-0.1, 0.2), (-0.1, 0.3)], 1) == claims.NOT
    assert claims.verdict([(-0.2, -0.1)], -1) == claims.REPRODUCED


def test_dominated_by_hand() -> None:
    curves = pd.DataFrame(
        {
            "case": "A",
            "objective": ["gipo", "gipo", "sapo", "sapo", "sapo", "ppo_clip"],
            "variance": [0.0, 1.0, 0.5, 0.5, 2.0, 0.0],
            "bias": [1.0, 0.0, 0.6, 0.4, 0.1, 1.0],
            "zero_gradient": [False, False, False, False, False, True],
        }
    )
    rows = {row[1]: row[2:] for row in gridworld.dominated(curves)}
    # At variance 0.5 GIPO has bias 0.5; the third setting's variance is beyond its curve.
    assert rows["sapo"] == (2, 0.5)
    assert rows["ppo_clip"][0] == 0


def test_scores_are_normalised_within_a_unit_and_lost_runs_are_its_worst() -> None:
    frame = pd.DataFrame(
        {
            "env": ["a"] * 4,
            "method": ["x", "x", "y", "y"],
            "seed": [0, 1, 0, 1],
            "final_return": [1.0, np.nan, 5.0, 9.0],
        }
    )
    found = scores.normalized(frame, "final_return", ["env"], ["method"])
    # Means 1 and 7 are the ends of the scale.
    np.testing.assert_allclose(found.score, [0, 0, 4 / 6, 8 / 6])
    assert (found.span == 6).all()
    twice = pd.concat([frame, frame])
    with pytest.raises(DataError, match="a run twice"):
        scores.normalized(twice, "final_return", ["env"], ["method"])
    with pytest.raises(DataError, match="not the same for all tasks"):
        scores.normalized(frame[:3], "final_return", ["env"], ["method"])


def test_a_report_keeps_its_prose_and_fills_its_tables(drawn: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    marks = "<!-- table: {} -->\nold\n<!-- end -->\n"
    path.write_text(f"By hand.\n{marks.format('weights')}Between.\n{marks.format('flow')}")
    report.write(drawn, path)
    text = path.read_text()
    assert "By hand.\n" in text and "Between.\n" in text and "old" not in text
    assert "| 1 | 2.5e-08 | 0.00055 |" in text
    assert "Not run:" in text.split("Between.")[1]
    report.write(drawn, path)
    assert path.read_text() == text

    report.write(drawn, tmp_path / "new.md")
    assert (
        "| 1. Non-zero gradients at extreme ratios | **reproduced** |"
        in (tmp_path / "new.md").read_text()
    )


def test_the_committed_report_has_the_tables_of_the_committed_scores(tmp_path: Path) -> None:
    committed = (ROOT / "RESULTS.md").read_text()
    (tmp_path / "RESULTS.md").write_text(committed)
    report.write(ROOT / "results", tmp_path / "RESULTS.md")
    assert (tmp_path / "RESULTS.md").read_text() == committed
    marks = [match[2] for match in report.BLOCK.finditer(committed)]
    assert marks == [*report.BLOCKS, "sources"]


def test_every_committed_figure_is_declared_and_every_declared_one_committed() -> None:
    stored = json.loads((ROOT / "results" / "manifest.json").read_text())
    manifest, planned = stored["figures"], {"width_tasks", "width", "sequence_lag"}
    planned = {name for name in planned if f"data/{name}_runs.csv" not in stored["data"]}
    drawn = {figure.name for figure in figures.FIGURES if figure.study not in planned}
    assert {Path(path).stem for path in manifest} == drawn
    files = (ROOT / "results" / "figures").iterdir()
    assert {path.stem for path in files} == drawn
    for path, entry in manifest.items():
        assert sha256(ROOT / "results" / path) == entry["sha256"], path
        assert (ROOT / "results" / entry["numbers"]).is_file() or "gridworld" in path
