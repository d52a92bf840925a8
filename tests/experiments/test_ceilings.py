"""Beside every paired difference by its IQM: the mean, and the share of pairs at the ceiling."""

import zlib
from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments import evidence, metaworld, report, scores
from experiments.store import NotRunError, Store
from experiments.studies import STUDIES
from gipo_jax.analysis import stats
from tests.programs import ROOT

RESULTS = ROOT / "results"
BESIDE = {"mean", "mean_low", "mean_high", "both_at_ceiling"}

IQM, MEAN = 1e15, 2e15
"""Marks: what a pair's interquartile mean and its mean are replaced by, plus its own number."""


def marked(first: Any, second: Any, statistic: Any = stats.iqm, **_: Any) -> stats.Interval:
    """In place of ``paired_difference``: tells the pair and the statistic, not their value."""
    number = zlib.crc32(np.asarray(first, float).tobytes() + np.asarray(second, float).tobytes())
    value = {stats.iqm: IQM, stats.mean: MEAN}[statistic] + number % 10**5
    return stats.Interval(value, value, value)


@pytest.mark.slow
def test_every_table_has_mean_and_ceiling_share_beside_a_paired_iqm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stats, "paired_difference", marked)
    # Intervals are another test's.
    resample = stats._resample
    monkeypatch.setattr(
        stats, "_resample", lambda scores, _, generator: resample(scores, 2, generator)
    )
    elo = stats.elo_interval
    monkeypatch.setattr(stats, "elo_interval", lambda x, **kw: elo(x, **(kw | {"resamples": 2})))
    with_iqm: set[str] = set()
    bare: list[str] = []
    for name, study in STUDIES.items():
        try:
            tables = study.scores(Store(RESULTS, name, "--preset committed"))
        except NotRunError:
            continue
        for table, frame in tables.items():
            values = frame.select_dtypes("number")
            iqms = values.where((values >= IQM) & (values < MEAN)).max(axis=1)
            rows = iqms.notna()
            if not rows.any():
                continue
            with_iqm.add(table)
            beside = set(frame) >= BESIDE and (frame["mean"] - iqms)[rows].eq(MEAN - IQM).all()
            bare += [] if beside else [table]
    assert not bare, f"an IQM of pairs without their mean and ceiling share: {bare}"
    assert with_iqm == {
        *("replay_sizes_comparison", "stability", "tuned_sizes_comparison", "evidence_means"),
        *("metaworld_comparison", "metaworld_interaction_differences"),
        *("proposal", "proposal_by_unit", "proposal_without_dropping"),
    }


def test_every_block_of_the_report_shows_mean_and_ceiling_share_beside_a_paired_iqm() -> None:
    store = Store(RESULTS, "report", "")
    marks = {"difference": 7.75, "value": 7.75, "mean": 5.5, "both_at_ceiling": 0.37}

    def read(name: str) -> pd.DataFrame:
        table = store.read(name, []) if name == "bounds_magnitude" else store.scores(name)
        if "both_at_ceiling" not in table:
            return table
        paired = table["mean"].notna()
        return table.assign(
            **{key: table[key].where(~paired, mark) for key, mark in marks.items() if key in table}
        )

    shown = set()
    for name, block in report.BLOCKS.items():
        try:
            lines = block(read).splitlines()
        except NotRunError:
            continue
        for line in lines:
            counts = tuple(line.count(mark) for mark in ("7.75", "+5.5", "37%"))
            if counts[0]:
                assert len(set(counts)) == 1, f"{name}: {line}"
                shown.add(name)
    assert shown == {
        *("verdicts", "ceilings", "protocol_1", "stability", "protocol_2", "protocol_2_sizes"),
        *("metaworld_comparison", "proposal", "proposal_by_size", "proposal_missed"),
    }


def test_a_run_without_a_final_return_is_at_no_ceiling_and_a_task_may_have_none() -> None:
    rows = [
        ("gentle", env, method, 1, seed, value)
        for env, best in (("CartPole-v1", 475.0), ("Pendulum-v1", 0.0))
        for method, short in ((scores.OURS, np.nan), ("PPO-Clip", best))
        for seed, value in ((0, best), (1, short))
    ]
    columns = ["regime", "env", "method", "age", "seed", "final_return"]
    found = scores.scored(pd.DataFrame(rows, columns=columns), "gentle", "final_return")
    np.testing.assert_array_equal(found.at_ceiling(scores.OURS)[0], [[1, np.nan], [0, np.nan]])
    assert found.minus(scores.OURS, "PPO-Clip").both_at_ceiling == 0.5


def test_the_interaction_on_metaworld_is_at_the_ceiling_where_all_four_runs_are() -> None:
    rows = [
        (regime, "Task", method, seed, 1.0, 1.0, float(regime == "stale" or seed == 0))
        for regime in metaworld.REGIMES
        for method in (scores.OURS, "PPO-Clip")
        for seed in range(4)
    ]
    columns = ["regime", "task", "method", "seed", "final", "area", "top"]
    found = evidence.interactions(pd.DataFrame(rows, columns=columns))
    shares = found[found.score == "final"].groupby("effect").both_at_ceiling.max()
    assert shares.to_dict() == {"stale": 1, "fresh": 0.25, "gain": 0.25, "interaction": 0.25}
