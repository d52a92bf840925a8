"""The decisive study: what it declares, its statistics, its rules, and its numbers once stored.

Statistics are computed here a second time, with pandas and closed forms.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from experiments import engine, metaworld, width
from experiments.store import Store
from experiments.studies import STUDIES
from experiments.tasks import GIPO, NO_CLIP, PPO
from gipo_jax import objectives, protocols
from scripts import reproduce

ROOT = Path(width.__file__).parents[1]
RESULTS = ROOT / "results"
NAMES = [study.name for study in width.ROWS]
JUDGED = [GIPO.label, PPO.label, width.WIDE_PPO.label, NO_CLIP.label]


def runs_of(name: str, preset: str = "committed") -> list[Any]:
    """What a Meta-World step trains."""
    study = STUDIES[name]
    assert study.sweeps is not None
    return [run for item in study.sweeps(study.presets[preset]) for run in item.runs]


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_wide_ppo_is_ppo_that_clips_where_abs_log_ratio_exceeds_1(advantage: float) -> None:
    x = np.array([-3, -1.01, -0.99, 0, 0.99, 1.01, 3], np.float32)
    found = objectives.gradient_weight(
        width.WIDE_PPO.objective, x, np.full_like(x, advantage), **width.WIDE_PPO.parameters
    )
    clipped = x > 1 if advantage > 0 else x < -1
    np.testing.assert_allclose(found, np.where(clipped, 0, np.exp(x)), rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_step_has_the_authors_training_but_for_what_it_varies(name: str) -> None:
    varied = {"width_buffer": {"kl_coef", "updates_per_iteration", "learning_rate"}}
    authors = protocols.settings("gipo-metaworld")
    for run in runs_of(name):
        for field in ("kl", "joint_grad_norm", "ratio_level", "hidden_sizes", "eval_episodes"):
            assert getattr(run.config, field) == authors[field], field
        for field in ("kl_coef", "adam_epsilon", "max_grad_norm", "value_learning_rate"):
            if field not in varied.get(name, set()):
                assert getattr(run.hparams, field) == authors[field], field


def test_no_seed_of_a_choice_is_reported() -> None:
    seeds = {name: {int(run.hparams.seed) for run in runs_of(name)} for name in NAMES}
    chosen_by = seeds["width_tasks"] | seeds["width_rates"]
    for name in set(NAMES) - {"width_tasks", "width_rates"}:
        assert not seeds[name] & chosen_by, name
    scale = STUDIES["width_sizes"].presets["committed"]
    assert not set(scale.seeds) & set(scale.tuning_seeds)


def test_no_clip_is_in_every_step_that_judges() -> None:
    for name in ("width", "width_fresh", "width_length"):
        found = {run.config.objective for run in runs_of(name)}
        assert {"gipo", "ppo_clip", "no_clip"} <= found, name


def test_interval_of_one_task_is_students() -> None:
    values = pd.DataFrame({"one": [0.1, 0.4, -0.2, 0.3, 0.6]})
    found = width.estimate(values)
    expected = scipy.stats.ttest_1samp(values["one"], 0)
    assert found.p == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_interval_over_tasks_leaves_out_how_far_they_are_apart() -> None:
    noise = np.array([-1.0, 0.0, 1.0])
    # Variance 1 a seed in both tasks: standard error sqrt(2 / 3) / 2, 4 degrees of freedom.
    found = width.estimate(pd.DataFrame({"low": noise, "high": noise + 100}))
    assert found.mean == 50
    assert found.high - 50 == pytest.approx(2.776445 * np.sqrt(2 / 3) / 2, rel=1e-6)
    # One task without noise: the other alone has 2 degrees of freedom.
    found = width.estimate(pd.DataFrame({"low": noise, "high": np.zeros(3)}))
    assert found.high == pytest.approx(4.302653 * np.sqrt(1 / 3) / 2, rel=1e-6)


def made_up(leads: dict[str, float], seeds: int = 5, tasks: int = 3) -> pd.DataFrame:
    """Runs of the judged methods, GIPO ahead of each by a lead on every task, with some noise."""
    rows = [
        (f"task {task}", method, seed, 0.5 - leads.get(method, 0) + noise)
        for task in range(tasks)
        for number, method in enumerate(JUDGED)
        for seed in range(seeds)
        for noise in [0.01 * np.sin(7 * seed + 3 * task + 5 * number)]
    ]
    return pd.DataFrame(rows, columns=["task", "method", "seed", "success"])


def verdict(runs: pd.DataFrame) -> tuple[str, str, str]:
    found = width.verdicts(width.compare(runs))
    claim, shape, reading = found.loc[found.without == "", ["claim", "shape", "reading"]].iloc[0]
    return str(claim), str(shape), str(reading)


WIDE, PLAIN, CLIP = width.WIDE_PPO.label, NO_CLIP.label, PPO.label


@pytest.mark.parametrize(
    ("leads", "expected"),
    [
        ({CLIP: 0.2, WIDE: 0.2, PLAIN: 0.2}, ("holds", "helps", "the shape helps")),
        ({CLIP: 0.2, WIDE: 0.2}, ("holds", "not shown", "the gain is the width")),
        ({CLIP: 0.2, PLAIN: 0.2}, ("holds", "not shown", "the gain is the width")),
        ({CLIP: 0.2, WIDE: -0.2}, ("holds", "harms", "the gain is the width")),
        ({}, ("open", "not shown", "no gain over PPO-Clip to explain")),
        ({CLIP: -0.2}, ("contradicted", "not shown", "no gain over PPO-Clip to explain")),
    ],
)
def test_verdicts_follow_the_plan(leads: dict[str, float], expected: tuple[str, str, str]) -> None:
    assert verdict(made_up(leads)) == expected


def test_two_seeds_or_one_task_leave_the_verdicts_open() -> None:
    leads = {CLIP: 0.2, WIDE: 0.2, PLAIN: 0.2}
    for runs in (made_up(leads, seeds=2), made_up(leads, tasks=1), made_up(leads, seeds=1)):
        assert verdict(runs) == (width.OPEN,) * 3


def test_without_no_clip_the_verdicts_are_open_and_holm_still_counts_it() -> None:
    runs = made_up({CLIP: 0.002, WIDE: 0.001})
    runs = runs[runs.method != PLAIN]
    assert verdict(runs) == (width.OPEN,) * 3
    found = width.compare(runs)
    judged = found[(found.without == "") & (found.question != "")].sort_values("p")
    assert judged.p_holm.iloc[0] == pytest.approx(min(1, 3 * judged.p.iloc[0]))


def test_a_verdict_that_one_task_decides_changes_without_it() -> None:
    runs = made_up({})
    runs.loc[(runs.task == "task 1") & (runs.method == CLIP), "success"] -= 0.4
    found = width.verdicts(width.compare(runs)).set_index("without").claim
    assert found[""] == "holds"
    assert found["task 1"] == "open"


def test_comparisons_are_those_that_pandas_alone_computes() -> None:
    runs = made_up({CLIP: 0.02, WIDE: 0.005, PLAIN: -0.01}, seeds=4)
    found = width.compare(runs)
    check_comparison(runs, found[found.without == ""])
    check_comparison(runs[runs.task != "task 2"], found[found.without == "task 2"])


def check_comparison(runs: pd.DataFrame, found: pd.DataFrame) -> None:
    """Differences, intervals and Holm's p of stored scores against those computed here."""
    table = runs.pivot(index=["task", "seed"], columns="method", values="success")
    raised: dict[str, float] = {}
    for row in found.itertuples():
        by_task = (table[row.ours] - table[row.method]).groupby("task")
        shares = by_task.var() / by_task.size()
        mean = by_task.mean().mean()
        error = shares.sum() ** 0.5 / len(shares)
        freedom = shares.sum() ** 2 / (shares**2 / (by_task.size() - 1)).sum()
        student = scipy.stats.t(freedom)
        assert row.difference == pytest.approx(mean, abs=1e-5)
        assert row.low == pytest.approx(mean - student.ppf(0.975) * error, abs=1e-5)
        assert row.high == pytest.approx(mean + student.ppf(0.975) * error, abs=1e-5)
        if row.question:
            raised[str(row.method)] = float(2 * student.sf(abs(mean) / error))
    highest = 0.0
    for rank, (method, p) in enumerate(sorted(raised.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, (len(width.RIVALS) - rank) * p))
        adjusted = found.set_index("method").loc[[method]]
        adjusted = adjusted[adjusted.ours == GIPO.label]
        assert float(adjusted.p_holm.iloc[0]) == pytest.approx(highest, rel=1e-4)


def test_pilot_takes_the_two_usable_tasks_with_most_room() -> None:
    # early and late success of two methods, and their area
    tasks = {
        "never": (0, 0.1, 0.05, 0.02, 0.02),
        "at once": (0.9, 1, 1, 0.9, 0.8),
        "middle": (0, 0.9, 0, 0.6, 0.2),
        "late": (0, 0.3, 0, 0.1, 0),
        "early": (0.1, 1, 1, 0.8, 0.7),
    }
    rows = [
        (task, method, early, late, area, 0.0)
        for task, (early, late_1, late_2, area_1, area_2) in tasks.items()
        for method, late, area in (("a", late_1, area_1), ("b", late_2, area_2))
    ]
    names = ["task", "method", "early_success", "late_success", "success", "final_return"]
    found = width.choose_tasks(pd.DataFrame(rows, columns=names)).groupby("task").first()
    assert set(found.index[found.usable]) == {"middle", "late", "early"}
    assert set(found.index[found.chosen]) == {"middle", "early"}


def test_best_rate_wins_ties_go_to_the_smaller_and_edges_are_marked() -> None:
    areas = {("a", 1e-4): 0.5, ("a", 3e-4): 0.5, ("b", 1e-4): 0.1, ("b", 3e-4): 0.6}
    areas |= {("a", 1e-3): 0.2, ("b", 1e-3): 0.3}
    rows = [(*key, seed, area) for key, area in areas.items() for seed in range(2)]
    runs = pd.DataFrame(rows, columns=["method", "learning_rate", "seed", "success"])
    found = width.choose_rates(runs)
    chosen = found[found.chosen].set_index("method")
    assert chosen.learning_rate.to_dict() == {"a": 1e-4, "b": 3e-4}
    assert chosen.edge.to_dict() == {"a": True, "b": False}


def pretend(study: Any, store: Any, item: Any) -> engine.Trained:
    """A finished sweep with made-up results; one in eight points was not logged."""
    generator = np.random.default_rng(len(item.name))
    rows, points = [], []
    for number, run in enumerate(item.runs):
        block = run.config.block_size
        first = {"run": number, "env": run.config.env, "seed": int(run.hparams.seed)}
        first |= {"status": "done", "auc": 0.0, "final_return": 1.0}
        first["learning_rate"] = float(run.hparams.learning_rate)
        rows.append(first | {"age": int(run.hparams.buffer_size) // block})
        for point in range(1, 9):
            drawn = dict.fromkeys([*engine.CURVES, "eval_return_sampled"], 0.0)
            drawn |= {name: float(generator.random()) for name in drawn}
            if point != 3:
                steps = run.config.total_steps * point // 8
                points.append({"run": number, "env_steps": steps} | drawn)
    runs = pd.DataFrame(rows).assign(**item.keys)
    metrics = pd.DataFrame(points)
    runs["auc"] = runs.run.map(metrics.groupby("run")[study.score].mean())
    return engine.Trained(item, runs, metrics)


@pytest.mark.parametrize("preset", ["quick", "committed"])
@pytest.mark.parametrize("name", [*NAMES, "width_sizes"])
def test_a_study_stores_and_scores_what_it_trained(
    name: str, preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "train", pretend)
    command = [name, "--preset", preset, "--out", str(tmp_path)]
    assert reproduce.main(command) == 0
    runs = pd.read_csv(tmp_path / "data" / f"{name}_runs.csv")
    if name != "width_sizes":
        assert len(runs) == runs.run.nunique() == len(runs_of(name, preset))
    tables = {path.stem for path in (tmp_path / "tables").glob("*.csv")}
    assert tables, name
    # What is stored is not trained again.
    monkeypatch.setattr(engine, "train", None)
    assert reproduce.main(command) == 0


def test_a_part_of_the_seeds_is_scored_where_all_tasks_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "train", pretend)
    study, store = STUDIES["width"], Store(tmp_path, "width", "--preset committed")
    assert study.sweeps is not None
    for item in study.sweeps(study.presets["committed"])[:10]:
        engine.write(study, store, engine._tables(study, pretend(study, store, item)))
    found = study.scores(store)["width_scores"]
    assert set(found.seeds) == {3} and set(found.tasks) == {3}


def test_success_counts_what_was_not_logged_as_failure(tmp_path: Path) -> None:
    study = STUDIES["width"]
    assert study.sweeps is not None
    item = study.sweeps(study.presets["quick"])[0]
    found = pretend(study, None, item)
    metrics = found.metrics[~((found.metrics.run == 1) & (found.metrics.env_steps > 5_000))]
    runs = width.with_success(found._replace(metrics=metrics)).set_index("run")
    whole, cut = (metrics[metrics.run == run] for run in (0, 1))
    assert runs.success[0] == pytest.approx(whole.success_rate.mean())
    assert runs.success[1] == pytest.approx(cut.success_rate.sum() / len(whole))
    assert runs.late_success[1] == 0


@pytest.mark.slow
@pytest.mark.long
def test_a_step_trains_on_metaworld(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("envpool")
    small = {"hidden_sizes": (8, 8), "value_hidden_sizes": (8,), "num_bins": 5, "batch_size": 64}
    monkeypatch.setattr(width, "PROTOCOL", width.PROTOCOL | small)
    assert reproduce.main(["width_rates", "--preset", "quick", "--out", str(tmp_path)]) == 0
    runs = pd.read_csv(tmp_path / "data" / "width_rates_runs.csv")
    assert sorted(runs.learning_rate) == [3e-4, 1e-3]
    assert runs.status.eq("done").all() and runs.success.between(0, 1).all()
    curves = pd.read_csv(tmp_path / "data" / "width_rates_curves.csv")
    assert (curves.groupby("run").success_rate.mean().to_numpy() == runs.success.to_numpy()).all()


@pytest.mark.slow
@pytest.mark.long
def test_gymnax_is_scored_by_fresh_episodes(tmp_path: Path) -> None:
    assert reproduce.main(["width_sizes", "--preset", "quick", "--out", str(tmp_path)]) == 0
    runs = pd.read_csv(tmp_path / "data" / "width_sizes_runs.csv")
    for regime in ("gentle", "reuse-heavy"):
        sweep = tmp_path / "sweeps" / f"width_report_{regime}_Catch-bsuite"
        fresh = pd.read_csv(sweep / "metrics.csv").groupby("run").eval_return_sampled.mean()
        np.testing.assert_allclose(runs.auc[runs.regime == regime], fresh, rtol=1e-5)
        config = json.loads((sweep / "config.json").read_text())["groups"][0]["config"]
        assert config["kl"] == "exact" and config["eval_episodes"] >= 32


def stored(table: str) -> pd.DataFrame:
    path = RESULTS / "data" / f"{table}.csv"
    if not path.exists():
        pytest.skip(f"{table} has not run")
    runs = pd.read_csv(path)
    return runs.assign(task=runs.env.str.extract(r"MetaWorld/(.*)-v3")[0])


@pytest.mark.parametrize("name", NAMES)
def test_stored_success_is_the_mean_of_the_stored_curve(name: str) -> None:
    runs = stored(f"{name}_runs")
    curves = pd.read_csv(RESULTS / "data" / f"{name}_curves.csv")
    points = curves.groupby("run").env_steps.count().max()
    area = curves.groupby("run").success_rate.sum() / points
    np.testing.assert_allclose(runs.success, runs.run.map(area), atol=2e-4)


@pytest.mark.parametrize("name", ["width", "width_fresh", "width_length"])
def test_stored_comparisons_are_those_that_pandas_alone_computes(name: str) -> None:
    runs = stored(f"{name}_runs")
    tasks = runs.groupby("seed").task.transform("nunique")
    runs = runs[tasks == runs.task.nunique()]
    found = pd.read_csv(RESULTS / "tables" / f"{name}_comparison.csv").fillna("")
    for without, part in found.groupby("without"):
        check_comparison(runs[runs.task != without], part)


def test_later_steps_take_the_tasks_that_the_pilot_chose() -> None:
    runs = stored("width_tasks_runs")
    early, late = (runs.groupby("task")[f"{part}_success"].max() for part in ("early", "late"))
    usable = late.index[(late > 0.2) & (early <= 0.8)]
    area = runs[runs.task.isin(usable)].groupby("task").success.mean()
    chosen = (area - 0.5).abs().sort_values().index[:2]
    expected = [*chosen, *width.FALLBACK][:2]
    assert set(width.TASKS) == {width.BUTTON, *expected}
    assert metaworld.EPISODE == 500
