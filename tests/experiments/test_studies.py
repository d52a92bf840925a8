"""The table of studies declares the runs it declared before, and scores what is stored alike.

``studies.json`` holds, for every study and preset, a checksum of each sweep's runs as
config.json encodes them, and of each table made from them. Training is replaced by made-up
results, so that tuning, choosing and reporting follow one another as they do in earnest.
``python -m tests.experiments.test_studies`` stores the checksums anew.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments import engine, flow, selection, sequences
from experiments.store import Store
from experiments.studies import PRESETS, STUDIES
from gipo_jax import sweep
from gipo_jax.analysis import plots
from gipo_jax.config import Config, HParams
from gipo_jax.sweep import grid, results
from scripts import reproduce
from tests.programs import ROOT

FROZEN = Path(__file__).with_name("studies.json")
RESULTS = ROOT / "results"

TRAINED = (
    *("staleness", "replay_sizes", "tuned_sizes", "age_and_size", "sigma", "kernel"),
    *("token_vs_joint", "objective_family", "metaworld", "proposal_development", "proposal"),
    *("selection", "sequence_staleness", "sequence_lag", "sequence_learning"),
)
"""Studies that are sweeps."""

POINTS = 8
METRICS = (
    *("episode_return", "ess", "ess_new", "ess_old", "near_zero_fraction"),
    *("near_zero_fraction_new", "near_zero_fraction_old", "old_share", "log_ratio_abs_p95"),
    *("policy_age", "eval_return", "eval_return_sampled", "prompts_sampled", "tokens_generated"),
    "tokens_trained",
)


def encoded(runs: Sequence[Any], fields: Sequence[str]) -> list[dict[str, Any]]:
    """Runs as config.json has them, without names, places and checksums of files and values.

    Args:
        runs: of a sweep.
        fields: settings that are kept whatever they are; others only where a run has not their
            default, so that a new setting changes nothing here.
    """
    empty = dataclasses.replace(runs[0].hparams, **hparam_defaults())
    (default,) = json.loads(json.dumps(grid.encode([grid.Run("", Config(), empty)])))
    groups = json.loads(json.dumps(grid.encode(runs)))
    assert [run["run"] for group in groups for run in group["runs"]] == list(range(len(runs)))
    for group in groups:
        for name, value in group["config"].items():
            if isinstance(value, dict):  # of the study's own, by name alone
                own = {kind: value[kind] for kind in ("function", "object") if kind in value}
                group["config"][name] = own
        group["config"] = settled(group["config"], default["config"], fields)
        group["runs"] = [settled(run, default["runs"][0], fields) for run in group["runs"]]
    return groups


def declared(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Encoded runs in an order that does not depend on that of the sweep."""
    return sorted(
        ({**group, "runs": sorted(group["runs"], key=checksum)} for group in groups), key=checksum
    )


def hparam_defaults() -> dict[str, Any]:
    return {f.name: f.default for f in dataclasses.fields(HParams) if f.name != "objective_params"}


def settled(
    settings: dict[str, Any], default: dict[str, Any], fields: Sequence[str]
) -> dict[str, Any]:
    """Settings but names and numbers of runs, and new ones that have their default."""
    return {
        name: value
        for name, value in settings.items()
        if name not in ("run", "name") and (name in fields or value != default[name])
    }


def checksum(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def pretend(runs: Sequence[Any], directory: Path, of_each: Sequence[dict[str, Any]]) -> None:
    """A finished sweep whose returns come from nowhere; sums of them are exact in float64."""
    rows, points = [], []
    drawn_from = (
        zlib.crc32((directory.name + checksum([{**group, "runs": [run]}])).encode())
        for group in of_each
        for run in group["runs"]
    )
    for group in grid.encode(runs):
        for run in group["runs"]:
            own = group["config"] | {k: v for k, v in run.items() if k not in ("run", "name")}
            own |= own.pop("objective_params")
            for name in ("objective", "env", "selection"):
                if isinstance(own[name], dict):
                    own[name] = next(iter(own[name].values()))
            steps = own.pop("total_steps")
            del own["max_buffer_size"]
            generator = np.random.default_rng(next(drawn_from))
            drawn = generator.integers(0, 640, (POINTS, len(METRICS) + 1)) / 64
            ends = {"final_return": drawn[-1, 0], "eval_return": drawn[-1, 1]}
            rows.append({"run": run["run"]} | own | {"status": "done", "env_steps": steps} | ends)
            for point, values in enumerate(drawn):
                at = {"run": run["run"], "iteration": point, "env_steps": steps * (point + 1) // 8}
                points.append(at | dict(zip((*METRICS, "success_rate"), values, strict=True)))
    table = pd.DataFrame(rows).sort_values("run")
    always = ("env", "objective", "sigma", "sigma_neg_ratio", "buffer_size", "seed")
    fixed = [
        name
        for name in table
        if name not in (*always, "status", "run", "env_steps", "final_return", "eval_return")
        and table[name].dropna().astype(str).nunique() <= 1
    ]
    metrics = pd.DataFrame(points).sort_values(["run", "iteration"])
    if not table.env.str.startswith(("MetaWorld/", "tokens/")).all():
        metrics = metrics.drop(columns="success_rate")
    directory.mkdir(parents=True)
    config = {"format": results.FORMAT, "command": "", "options": {}, "metrics": [], "groups": []}
    (directory / results.CONFIG).write_text(json.dumps(config))
    table.reindex(columns=[*dict.fromkeys([*table, *always])]).drop(columns=fixed).to_csv(
        directory / results.RUNS, index=False
    )
    metrics.to_csv(directory / results.METRICS, index=False)


@contextlib.contextmanager
def pretending(fields: Sequence[str]) -> Iterator[dict[str, dict[str, Any]]]:
    """Within it sweeps are made up; gives what was asked for, by folder."""
    asked: dict[str, dict[str, Any]] = {}

    def run(runs: Any, directory: Any, options: Any = None, resume: bool = False) -> None:
        groups = encoded(runs, fields)
        asked[Path(directory).name] = {"runs": len(runs), "sha256": checksum(declared(groups))}
        pretend(runs, Path(directory), groups)

    def no_starts(item: Any, done: pd.DataFrame) -> pd.DataFrame:
        first = done[["run", "objective", "seed"]]
        return first.assign(env_steps=0, eval_return=0.0, eval_return_sampled=0.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "run", run, raising=False)
        patch.setattr(sequences, "_starts", no_starts)
        warm = pd.DataFrame({"seed": [0], "eval_return": [0.5]})
        patch.setattr(selection, "_warm_up", lambda of_dpo: warm)
        yield asked


def asked_for(name: str, preset: str, out: Path, fields: Sequence[str]) -> dict[str, Any]:
    """Sweeps of a study and the tables it makes of them."""
    with pretending(fields) as sweeps, contextlib.redirect_stdout(io.StringIO()):
        engine.run(STUDIES[name], Store(out, name, f"--preset {preset}"), preset)
    tables = {}
    for path in sorted((out / "data").glob("*.csv")):
        frame = pd.read_csv(path, dtype=str).drop(columns="run", errors="ignore")
        rows = frame[sorted(map(str, frame))].to_csv(index=False).splitlines()
        tables[path.stem] = checksum("\n".join([rows[0], *sorted(rows[1:])]))
    return {"sweeps": dict(sorted(sweeps.items())), "tables": tables}


@pytest.mark.parametrize(
    "preset",
    [pytest.param(name, marks=() if name == "committed" else pytest.mark.long) for name in PRESETS],
)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.optimized if name == "objective_family" else ())
        for name in TRAINED
    ],
)
def test_a_study_declares_the_frozen_runs_and_makes_the_same_tables_of_them(
    name: str, preset: str, tmp_path: Path
) -> None:
    frozen = json.loads(FROZEN.read_text())
    found = asked_for(name, preset, tmp_path, frozen["fields"].split())
    assert found["sweeps"] == frozen["studies"][preset][name]["sweeps"]
    assert found["tables"] == frozen["studies"][preset][name]["tables"]


def flow_runs(fields: Sequence[str]) -> str:
    """Checksum of what the study of flows trains."""
    runs = []
    for method in flow.METHODS.values():
        config = flow.configure(method, 60)
        for regime in flow.REGIMES:
            runs.append(grid.Run("", config, flow.settings(method, config, regime, 3)))
    return checksum([encoded([run], fields) for run in runs])


def test_the_study_of_flows_declares_the_frozen_runs() -> None:
    frozen = json.loads(FROZEN.read_text())
    assert flow_runs(frozen["fields"].split()) == frozen["flow"]


@pytest.mark.slow
def test_committed_data_give_the_committed_scores_to_six_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_nothing(figure: Any, stem: Path) -> list[Path]:
        stem.parent.mkdir(exist_ok=True)
        stem.with_suffix(".png").touch()
        return [stem.with_suffix(".png")]

    # Rendering takes most of the time, and other tests do it.
    monkeypatch.setattr(plots, "save", save_nothing)
    shutil.copytree(RESULTS / "data", tmp_path / "data")
    shutil.copy(RESULTS / "manifest.json", tmp_path / "manifest.json")
    assert reproduce.main(["--plot-only", "--out", str(tmp_path)]) == 0
    tables = sorted((RESULTS / "tables").glob("*.csv"))
    assert len(tables) > 20
    for committed in tables:
        found = pd.read_csv(tmp_path / "tables" / committed.name)
        # Six digits are stored: the last may round either way.
        pd.testing.assert_frame_equal(
            found, pd.read_csv(committed), rtol=1e-5, atol=1e-12, obj=committed.stem
        )


def freeze() -> None:
    fields = [f.name for kind in (Config, HParams) for f in dataclasses.fields(kind)]
    studies: dict[str, Any] = {}
    for preset in PRESETS:
        studies[preset] = {}
        for name in TRAINED:
            with tempfile.TemporaryDirectory() as folder:
                studies[preset][name] = asked_for(name, preset, Path(folder), fields)
                print(
                    preset, name, {k: v["runs"] for k, v in studies[preset][name]["sweeps"].items()}
                )
    frozen = {"fields": " ".join(fields), "flow": flow_runs(fields), "studies": studies}
    FROZEN.write_text(json.dumps(frozen, indent=1) + "\n")


if __name__ == "__main__":
    freeze()
