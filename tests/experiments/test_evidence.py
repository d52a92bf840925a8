"""The key numbers of RESULTS.md, computed again from ``results/data`` with pandas alone.

Nothing of the package or of the experiments is imported: scores, differences and intervals are
written here a second time.
"""

import re

import numpy as np
import pandas as pd
import pytest

from tests.programs import ROOT

DATA = ROOT / "results" / "data"
RESULTS = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
METAWORLD = (ROOT / "docs" / "metaworld.md").read_text(encoding="utf-8")
OBJECTIVES = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")

INTERVAL = r"([+-]\d+\.\d\d) \[(-?\d+\.\d\d), (-?\d+\.\d\d)\]"
ROUNDING, RESAMPLING = 0.0051, 0.025
"""What two digits may hide, and by how much the ends of two bootstrap intervals may differ."""


def after(text: str, words: str) -> tuple[float, float, float]:
    """The first estimate with its interval that follows these words."""
    assert words in text, words
    found = re.search(INTERVAL, text[text.index(words) + len(words) :])
    assert found is not None, f"no interval follows {words!r}"
    estimate, low, high = map(float, found.groups())
    return estimate, low, high


def interval(differences: pd.DataFrame) -> tuple[float, float, float]:
    """Mean of a table seeds x strata and its bootstrap interval, seeds drawn in each stratum."""
    values = differences.to_numpy(float)
    generator = np.random.default_rng(7)
    rows = generator.integers(len(values), size=(4000, *values.shape))
    means = np.take_along_axis(values[None], rows, axis=1).mean(axis=(1, 2))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def assert_said(text: str, words: str, differences: pd.DataFrame) -> None:
    """The text says the mean of the differences and its interval after these words."""
    said, computed = after(text, words), interval(differences)
    assert said[0] == pytest.approx(computed[0], abs=ROUNDING)
    assert said[1:] == pytest.approx(computed[1:], abs=ROUNDING + RESAMPLING)


def iqm(values: pd.DataFrame) -> float:
    """Mean of the middle half."""
    flat = np.sort(values.to_numpy(float).ravel())
    cut = len(flat) // 4
    return float(flat[cut : len(flat) - cut].mean())


def normalised(runs: pd.DataFrame, cells: list[str]) -> pd.DataFrame:
    """Final returns of a regime, 0 at the worst and 1 at the best mean of a cell, per task."""
    runs = runs.copy()
    runs["final_return"] = runs.final_return.fillna(
        runs.groupby("env").final_return.transform("min")
    )
    means = runs.groupby(["env", *cells]).final_return.mean().groupby("env")
    low, high = runs.env.map(means.min()), runs.env.map(means.max())
    return runs.assign(score=(runs.final_return - low) / (high - low))


def difference(runs: pd.DataFrame, ours: str, other: str) -> pd.DataFrame:
    """Scores of one method minus another's, seeds x tasks, sizes averaged."""
    first, second = (
        runs[runs.method == name].pivot_table(index="seed", columns="env", values="score")
        for name in (ours, other)
    )
    return first - second


@pytest.fixture(scope="module")
def protocol_1() -> pd.DataFrame:
    """Runs of protocol 1 with a column ``method``; GIPO's names end in its width."""
    runs = pd.read_csv(DATA / "replay_sizes_runs.csv")
    width = runs.sigma.map(lambda sigma: f" {sigma:g}" if sigma == sigma else "")
    runs["method"] = runs.objective + width.where(runs.objective == "gipo", "")
    return runs


@pytest.fixture(scope="module")
def papers() -> pd.DataFrame:
    """Reported runs of protocol 2, the paper's widths, each at the rate that won in its cell."""
    tried = pd.read_csv(DATA / "tuned_sizes_tuning.csv")
    width = tried.objective.map({"gipo": 1.0, "ppo_clip": 0.2, "sapo": 1.0, "no_clip": 0.0})
    tried = tried[np.isclose(tried.width, width)]
    worst = tried.groupby(["regime", "env"]).auc.transform("min")
    cells = ["regime", "env", "objective", "age"]
    areas = tried.assign(auc=tried.auc.fillna(worst)).groupby([*cells, "learning_rate"]).auc.mean()
    best = areas.groupby(cells).idxmax().map(lambda key: key[-1]).rename("learning_rate")
    runs = pd.read_csv(DATA / "tuned_sizes_runs.csv")
    width = runs.objective.map({"gipo": 1.0, "ppo_clip": 0.2, "sapo": 1.0, "no_clip": 0.0})
    runs = runs[np.isclose(runs.width, width)]
    return runs.merge(best.reset_index(), on=[*cells, "learning_rate"]).rename(
        columns={"objective": "method"}
    )


@pytest.fixture(scope="module")
def metaworld() -> pd.DataFrame:
    """Normalised final returns on Meta-World: 0 a task's first returns, 1 its best mean."""
    runs = pd.read_csv(DATA / "metaworld_runs.csv")
    curves = pd.concat(
        pd.read_csv(DATA / f"metaworld_curves_{regime}.csv") for regime in ("stale", "fresh")
    )
    first = curves.sort_values("env_steps").groupby("run").episode_return.first()
    low = runs.run.map(first).groupby(runs.env).transform("mean")
    means = runs.groupby(["env", "objective", "regime"]).final_return.mean()
    high = runs.env.map(means.groupby("env").max())
    return runs.assign(score=(runs.final_return - low) / (high - low), method=runs.objective)


def on_metaworld(runs: pd.DataFrame, regime: str, other: str) -> pd.DataFrame:
    return difference(runs[runs.regime == regime], "gipo", other)


def test_interaction_on_metaworld(metaworld: pd.DataFrame) -> None:
    for other, words in (("ppo_clip", "buffer, is "), ("sapo", "the interaction against it is ")):
        both = on_metaworld(metaworld, "stale", other) - on_metaworld(metaworld, "fresh", other)
        assert_said(RESULTS, words, both)
    both = on_metaworld(metaworld, "stale", "ppo_clip") - on_metaworld(
        metaworld, "fresh", "ppo_clip"
    )
    assert after(RESULTS, "(IQM ")[0] == pytest.approx(iqm(both), abs=ROUNDING)
    assert_said(README, "Stale minus two-episode buffer, GIPO minus PPO-Clip:", both)
    assert_said(METAWORLD, "minus the same with the two-episode buffer is", both)
    without = [both.drop(columns=env).to_numpy().mean() for env in both]
    assert f"it is {min(without):+.2f} to {max(without):+.2f}." in RESULTS


def test_differences_on_metaworld_by_replay(metaworld: pd.DataFrame) -> None:
    stale, small = (on_metaworld(metaworld, regime, "ppo_clip") for regime in ("stale", "fresh"))
    assert_said(README, "On stale data GIPO is ahead of PPO-Clip by", stale)
    assert_said(README, "with a buffer of two episodes it is behind,", small)
    table = RESULTS.split("Means beside the IQMs.", 1)[1]
    assert_said(table, "| stale | PPO-Clip |", stale)
    assert_said(table, "| two-episode buffer | PPO-Clip |", small)


def test_gain_from_replay_on_metaworld(metaworld: pd.DataFrame) -> None:
    for objective, label in (("gipo", "GIPO σ=1"), ("sapo", "SAPO"), ("ppo_clip", "PPO-Clip")):
        own = metaworld[metaworld.objective == objective]
        stale, small = (
            own[own.regime == regime].pivot_table(index="seed", columns="env", values="score")
            for regime in ("stale", "fresh")
        )
        gains = RESULTS.split("Gain from replay, stale minus two-episode:", 1)[1]
        assert_said(gains, label, stale - small)


def test_mean_beside_the_iqm_at_replay_16_with_high_reuse(papers: pd.DataFrame) -> None:
    regime = normalised(papers[papers.regime == "reuse-heavy"], ["method", "age"])
    at_16 = difference(regime[regime.age == 16], "gipo", "ppo_clip")
    sentence = RESULTS.split("At replay 16 with high reuse, paper's widths,", 1)[1]
    assert after(sentence, "GIPO minus PPO-Clip is")[0] == pytest.approx(iqm(at_16), abs=ROUNDING)
    assert_said(sentence, "by the IQM and", at_16)
    assert_said(README, "**behind at 16 with high reuse**,", at_16)
    assert after(README, "The interquartile mean hides that:")[0] == pytest.approx(
        iqm(at_16), abs=ROUNDING
    )

    ceiling = papers.env.map({"CartPole-v1": 475, "Acrobot-v1": -100, "Catch-bsuite": 0.9})
    tops = papers[papers.age == 16].assign(top=papers.final_return >= ceiling)
    for reuse, words in (("reuse-heavy", "high reuse"), ("gentle", "low reuse")):
        by_pair = tops[tops.regime == reuse].pivot(
            index=["env", "seed"], columns="method", values="top"
        )
        both = (by_pair.gipo & by_pair.ppo_clip).mean()
        start = f"| protocol 2, paper's widths | {words} | "
        row = next(line for line in sentence.splitlines() if line.startswith(start))
        assert f"] | {both:.0%} | " in row
    at = papers[(papers.age == 16) & (papers.regime == "reuse-heavy")]
    shares = (at.final_return >= ceiling[at.index]).groupby(at.method).mean()
    assert f"{shares['gipo']:.0%} of GIPO's runs end at the ceiling and " in sentence
    assert f"{shares['ppo_clip']:.0%} of PPO-Clip's" in sentence
    assert f"{100 * shares['gipo']:.0f} % of its runs end at the ceiling" in README


@pytest.mark.parametrize(("regime", "words"), [("gentle", "low"), ("reuse-heavy", "high")])
def test_no_clip_in_protocol_1(protocol_1: pd.DataFrame, regime: str, words: str) -> None:
    runs = normalised(protocol_1[protocol_1.regime == regime], ["method", "age"])
    overall = difference(runs, "gipo 1", "no_clip")
    row = next(line for line in RESULTS.splitlines() if line.startswith("| protocol 1 | +"))
    cells = re.findall(INTERVAL, row)
    said = [float(number) for number in cells[0 if words == "low" else 1]]
    computed = interval(overall)
    assert said[0] == pytest.approx(computed[0], abs=ROUNDING)
    assert said[1:] == pytest.approx(computed[1:], abs=ROUNDING + RESAMPLING)
    low, high = computed[1:]
    assert low < 0 < high
    text = f"{said[0]:+.2f} [{said[1]:.2f}, {said[2]:.2f}] with {words} reuse"
    assert text in README and text in RESULTS


@pytest.mark.parametrize(("regime", "column"), [("gentle", 0), ("reuse-heavy", 1)])
def test_no_clip_in_protocol_2(papers: pd.DataFrame, regime: str, column: int) -> None:
    runs = normalised(papers[papers.regime == regime], ["method", "age"])
    start = "| protocol 2, paper's widths | +"
    row = next(line for line in RESULTS.splitlines() if line.startswith(start))
    said = [float(number) for number in re.findall(INTERVAL, row)[column]]
    computed = interval(difference(runs, "gipo", "no_clip"))
    assert said[0] == pytest.approx(computed[0], abs=ROUNDING)
    assert said[1:] == pytest.approx(computed[1:], abs=ROUNDING + RESAMPLING)


def test_protocol_1_against_ppo_clip(protocol_1: pd.DataFrame) -> None:
    for regime, age, words in (
        ("gentle", 128, "ahead of PPO-Clip at replay 128 with low reuse,"),
        ("gentle", 16, "**behind at 16**:"),
        ("reuse-heavy", 16, "**behind at 16**: -0.45 [-0.65, -0.24] with low and"),
    ):
        runs = normalised(protocol_1[protocol_1.regime == regime], ["method", "age"])
        assert_said(README, words, difference(runs[runs.age == age], "gipo 1", "ppo_clip"))


def test_time_to_threshold_comes_from_ppo_clip_at_replay_128(papers: pd.DataFrame) -> None:
    curves = pd.concat(
        pd.read_csv(DATA / f"tuned_sizes_curves_{name}.csv") for name in ("gentle", "reuse_heavy")
    )
    curves["progress"] = curves.env_steps / curves.groupby("run").env_steps.transform("max")
    curves = curves.merge(papers[["run", "env"]], on="run")
    threshold = curves.env.map({"CartPole-v1": 300, "Acrobot-v1": -150, "Catch-bsuite": 0.5})
    first = curves[curves.episode_return >= threshold].groupby("run").progress.min()
    runs = papers.assign(score=papers.run.map(first).fillna(1.0))
    sentence = RESULTS.split("GIPO (sigma 1) minus PPO-Clip (eps 0.2):", 1)[1]
    against_ppo, against_no_clip = sentence.split("Minus No-Clip:", 1)
    assert_said(against_ppo, "", difference(runs, "gipo", "ppo_clip"))
    assert_said(against_no_clip, "", difference(runs, "gipo", "no_clip"))
    for age in (1, 16, 128):
        part = runs[runs.age == age]
        for text, other in ((against_ppo, "ppo_clip"), (against_no_clip, "no_clip")):
            said = re.search(rf"{INTERVAL} at {age}\b", text)
            assert said is not None
            computed = difference(part, "gipo", other).to_numpy().mean()
            assert float(said[1]) == pytest.approx(computed, abs=ROUNDING)


def test_best_rates_at_the_edge_of_the_grid() -> None:
    tried = pd.read_csv(DATA / "proposal_tuning.csv")
    tried = tried[tried.env != "FourRooms-misc"]
    cells = ["regime", "env", "method", "age"]
    areas = tried.groupby([*cells, "learning_rate"]).auc.mean().unstack()
    best = areas.idxmax(axis=1).reset_index(name="rate")
    for age in (1, 16, 128):
        own = best[best.age == age]
        largest = int(np.isclose(own.rate, tried.learning_rate.max()).sum())
        assert f"{largest} of {len(own)} at replay {age}" in RESULTS
    at_16 = best[best.age == 16]
    largest = int(np.isclose(at_16.rate, tried.learning_rate.max()).sum())
    assert f"in {largest} of {len(at_16)} cells" in README
    assert f"in {largest} of the {len(at_16)} cells" in OBJECTIVES


def test_following_gipo_leads_at_the_middle_rate_of_its_worst_loss() -> None:
    tried = pd.read_csv(DATA / "proposal_tuning.csv")
    part = tried[(tried.age == 16) & (tried.env == "Breakout-MinAtar") & (tried.regime == "gentle")]
    areas = part.groupby(["method", "learning_rate"]).auc.mean().unstack()
    middle, largest = areas[0.001], areas[0.003]
    assert middle.idxmax() == "following GIPO"
    assert (areas.drop("following GIPO").idxmax(axis=1) == 0.003).all()
    second = middle.drop("following GIPO").max()
    assert f"({middle['following GIPO']:.2f}, next PPO-Clip {second:.2f})" in RESULTS
    assert f"it falls to {largest['following GIPO']:.2f}, while PPO-Clip rises" in RESULTS
    runs = pd.read_csv(DATA / "proposal_runs.csv")
    runs = runs[(runs.age == 16) & (runs.env == "Breakout-MinAtar") & (runs.regime == "gentle")]
    means = runs.groupby("method").auc.mean()
    others = means.drop("following GIPO")
    said = f"{means['following GIPO']:.2f} against {others.min():.2f} ({others.idxmin()}) to "
    assert said + f"{others.max():.2f} ({others.idxmax()})" in RESULTS


def test_policy_lag_on_metaworld() -> None:
    runs = pd.read_csv(DATA / "metaworld_runs.csv")[["run", "regime", "objective"]]
    curves = pd.concat(
        pd.read_csv(DATA / f"metaworld_curves_{regime}.csv") for regime in ("stale", "fresh")
    ).merge(runs, on="run")
    lag = curves.groupby(["regime", "objective"]).log_ratio_abs_p95.mean()
    gipo, ppo, sapo = (lag["stale", name] for name in ("gipo", "ppo_clip", "sapo"))
    assert f"is {gipo:.2f} for GIPO, {sapo:.2f} for SAPO and {ppo:.2f} for PPO-Clip" in RESULTS
    assert f"That is {gipo / ppo:.1f} times as much" in RESULTS
    assert f"{gipo / ppo:.1f} times as far from the data" in README
    early = curves[curves.env_steps <= curves.env_steps.max() / 10]
    first = early.groupby(["regime", "objective"]).log_ratio_abs_p95.mean()
    ratio = first["stale", "gipo"] / first["stale", "ppo_clip"]
    assert f"({ratio:.1f} over the first tenth" in RESULTS
    said = f"is {lag['fresh', 'gipo']:.2f} for GIPO over the whole of training and "
    assert said + f"{first['fresh', 'gipo']:.2f} in the first tenth" in METAWORLD
    near = curves.groupby(["regime", "objective"]).near_zero_fraction.mean()
    assert f"PPO-Clip has {near['stale', 'ppo_clip']:.3f} of its weights below 0.001" in RESULTS


def test_the_widest_clip_is_the_best_on_stale_data() -> None:
    tried = pd.read_csv(DATA / "tuned_sizes_tuning.csv")
    worst = tried.groupby(["regime", "env"]).auc.transform("min")
    tried = tried.assign(auc=tried.auc.fillna(worst))[tried.objective == "ppo_clip"]
    cells = ["regime", "env", "age"]
    areas = tried.groupby([*cells, "width", "learning_rate"]).auc.mean().groupby(cells)
    widths = areas.idxmax().map(lambda key: key[3])
    counts = [int((widths.xs(age, level="age") == 0.4).sum()) for age in (1, 16, 128)]
    said = (
        "has the best tuning area in {} at replay 1, {} at replay 16, {} at replay 128 of 6 units"
    )
    assert said.format(*counts) in RESULTS


def test_a_fluctuating_cartpole_policy_scores_the_harmonic_mean_of_its_lengths() -> None:
    steps = 500_000
    episodes = [500] * (steps // 500) + [10] * (steps // 10)
    score = pd.Series(episodes).mean()
    assert f"for the other scores {score:.0f}, not {(500 + 10) / 2:.0f}" in RESULTS
