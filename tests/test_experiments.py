"""Experiments end to end at tiny sizes, drawing from stored data, and damaged data."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import experiments  # noqa: E402
from experiments import bounds, gridworld  # noqa: E402
from experiments.store import sha256  # noqa: E402
from scripts import reproduce  # noqa: E402


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
    assert listed == list(experiments.REGISTRY)


def test_unknown_experiment(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["nonsense"])
    assert stop.value.code == 2
    assert "'nonsense' is not valid" in capsys.readouterr().err


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


def test_damaged_data_without_a_manifest(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "data").mkdir()
    for content, message in ((b"", "not a readable table"), (b"a,b\n1,2\n", "lacks the column")):
        (tmp_path / "data" / "trust_weights.csv").write_bytes(content)
        assert run(tmp_path, "trust_weights", "--plot-only") == 2
        assert message in capsys.readouterr().err
    (tmp_path / "manifest.json").write_text("{")
    assert run(tmp_path, "trust_weights", "--plot-only") == 2
    assert "not a manifest" in capsys.readouterr().err
