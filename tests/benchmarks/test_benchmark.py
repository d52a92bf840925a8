"""Benchmarks that need an accelerator, at a size that a CPU manages."""

import json
from typing import Any

import pytest

from tests import programs

SCRIPT = "scripts/benchmark.py"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of both benchmarks, by one call."""
    out = tmp_path_factory.mktemp("benchmark") / "rows.json"
    done = programs.run(
        *(SCRIPT, "accelerator", "revision", "--quick", "--repeats", "1", "--out", out),
        *("--against", programs.ROOT),
        JAX_DISABLE_MOST_OPTIMIZATIONS="true",
    )
    assert done.returncode == 0, done.stderr
    measured: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
    return measured


@pytest.mark.slow
@pytest.mark.long
def test_the_accelerator_benchmark_measures_rates_and_memory(rows: list[dict[str, Any]]) -> None:
    ours = [row for row in rows if row["case"]["by"] in ("gipo_jax", "gipo_jax, fused")]
    assert [row["case"]["runs"] for row in ours] == [1, 1, 4, 4]
    for row in ours:
        # Policies acted in other shapes than they learn in: rounding alone tells them apart.
        assert 0 <= row["fresh_d95"] < 1e-5
        assert row["benchmark"] == "accelerator"
        assert row["unit"] == "env-steps/s" and row["median"] > 0
        # 16 updates for each 64 x 128 steps.
        assert row["updates_per_s"] == pytest.approx(row["median"] * 16 / 8192)
        assert row["planned"] > 0 and row["measured"] > 0


@pytest.mark.slow
@pytest.mark.long
def test_the_revision_benchmark_compares_two_checkouts(rows: list[dict[str, Any]]) -> None:
    this, before, ratio = (row for row in rows if row["benchmark"] == "revision")
    assert [row["case"]["by"] for row in (this, before, ratio)] == ["this", "before", "ratio"]
    assert ratio["median"] == pytest.approx(this["median"] / before["median"])


def test_the_revision_benchmark_asks_for_a_checkout() -> None:
    done = programs.run(SCRIPT, "revision")
    assert done.returncode == 2
    assert "--against CHECKOUT" in done.stderr.splitlines()[-1]
