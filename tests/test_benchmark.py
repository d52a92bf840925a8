"""Benchmarks that need an accelerator, at a size that a CPU manages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_accelerator_benchmark_measures_rates_and_memory(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    command = [sys.executable, "scripts/benchmark.py", "accelerator", "--quick", "--repeats", "1"]
    done = subprocess.run(
        [*command, "--out", str(out)], capture_output=True, text=True, timeout=110, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    rows = [row for row in json.loads(out.read_text())["rows"] if row["case"]["by"] == "gipo_jax"]
    assert [row["case"]["runs"] for row in rows] == [1, 4]
    for row in rows:
        assert row["unit"] == "env-steps/s" and row["median"] > 0
        # 16 updates for each 64 x 128 steps.
        assert row["updates_per_s"] == pytest.approx(row["median"] * 16 / 8192)
        assert row["planned"] > 0 and row["measured"] > 0


@pytest.mark.slow
def test_the_revision_benchmark_compares_two_checkouts(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    command = [sys.executable, "scripts/benchmark.py", "revision", "--quick", "--repeats", "1"]
    done = subprocess.run(
        [*command, "--against", str(ROOT), "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=110,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    this, before, ratio = json.loads(out.read_text())["rows"]
    assert [row["case"]["by"] for row in (this, before, ratio)] == ["this", "before", "ratio"]
    assert ratio["median"] == pytest.approx(this["median"] / before["median"])


def test_the_revision_benchmark_asks_for_a_checkout() -> None:
    command = [sys.executable, "scripts/benchmark.py", "revision"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 2
    assert "--against CHECKOUT" in done.stderr.splitlines()[-1]
