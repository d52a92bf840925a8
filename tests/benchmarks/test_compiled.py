"""The benchmark of compiled programs: options, table, and a program that it counts on CPU."""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from rich.console import Console

from benchmarks import compiled_worker
from scripts import compiled
from tests.programs import ROOT

pytestmark = pytest.mark.optimized

COUNTED: dict[str, Any] = {
    "planned": 2e9,
    "held": 1e9,
    "temporaries": 5e8,
    "results": 1e8,
    "iteration": 4894.0,
    "iteration_bytes": 81.2e9,
    "env_step": 26.0,
    "gae_step": 0.3125,
    "gae_steps": 128,
    "update": None,
    "rest": 110.0,
    "collectives": 0,
    "read_backs": [
        {"kind": "loop", "name": "while.1", "where": "buffer.py:1 permute", "in_iteration": True},
        {"kind": "loop", "name": "while.2", "where": "train.py:1 train", "in_iteration": False},
    ],
}


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    compiled.add_options(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peer", "rejaxx"], "--peer: 'rejaxx' is not usable, give rejax, or purejaxrl=CHECKOUT"),
        (["--peer", "purejaxrl"], "--peer: 'purejaxrl' is not usable"),
        (["--checkout", "/nowhere"], "--checkout: '/nowhere' is no checkout of this project"),
    ],
)
def test_options_that_do_not_fit_are_named(arguments: list[str], message: str) -> None:
    assert message in (compiled.misfit(options(*arguments)) or "")


def test_a_clone_of_purejaxrl_is_taken(tmp_path: Path) -> None:
    (tmp_path / "purejaxrl").mkdir()
    (tmp_path / "purejaxrl" / "ppo.py").touch()
    assert compiled.misfit(options("--peer", f"purejaxrl={tmp_path}", "rejax")) is None


def test_one_device_compiles_all_programs_and_several_that_of_a_sweep() -> None:
    given = options("--device", "h100", "v5e:16x16", "--peer", "rejax")
    jobs = [(device, name, by.split()[0], work) for device, name, by, work in compiled.jobs(given)]
    programs = [name for device, name, by, _ in jobs if device == "h100" and by == "gipo_jax"]
    assert programs == list(compiled.PROGRAMS)
    assert [name for _, name, by, _ in jobs if by == "rejax"] == ["ppo"]
    device, name, _, work = jobs[-1]
    assert (device, name, work["runs"]) == ("v5e:16x16", "sweep", 1024)


@pytest.mark.parametrize(
    ("device", "count"), [("h100", 1), ("h100:1x4x8", 32), ("v5e:2x2", 4), ("v5e:16x16", 256)]
)
def test_devices_of_a_topology(device: str, count: int) -> None:
    assert compiled.number_of_devices(device) == count


def test_modelled_time_is_launches_and_bytes_by_the_two_constants() -> None:
    work = {"iteration": 1000.0, "iteration_bytes": 33.5e9}
    assert compiled.modelled(work, "h100")["modelled_s"] == pytest.approx(2.5e-3 + 10e-3)
    assert compiled.modelled(work, "v5e:2x2") == work


def test_the_table_shows_counts_and_what_did_not_compile() -> None:
    console = Console(width=200, record=True, file=sys.stderr)
    case = {"program": "ppo", "device": "h100", "by": "gipo_jax", "runs": 256}
    rows: list[dict[str, Any]] = [
        {"case": case} | compiled.modelled(COUNTED, "h100"),
        {"case": case | {"program": "flow"}, "error": "XlaRuntimeError: no such thing"},
    ]
    compiled.show(rows, console)
    text = console.export_text()
    line = next(line for line in text.splitlines() if " ppo " in line)
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    # Half of the plan, one of two read-backs inside, 12.2 ms of launches and 24.2 of bytes.
    expected = "ppo, gipo_jax, 26, 0.31 x 128, in rest, 110, 4,894, 81.2, 0.50, 0.50, 0, 1, 36.5"
    assert ", ".join(cells) == expected
    assert "no such thing" in text and "Modelled, not timed: h100 with 2.5 us" in text


def test_a_call_goes_on_behind_the_programs_that_the_same_counter_has_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(compiled, "revision", lambda checkout: "1234567")
    monkeypatch.setattr(compiled, "compile_one", lambda *job: {"error": "compiled again"})
    given = options("--program", "flow", "tokens", "sweep", "--cache", str(tmp_path))
    flow, tokens, sweep = (
        {"program": name, "device": device, "by": by, "runs": work["runs"]}
        for device, name, by, work in compiled.jobs(given)
    )
    stored: list[dict[str, Any]] = [
        {"case": flow, "counter": compiled.counter(), "update": 1},
        {"case": tokens, "counter": compiled.counter(), "error": "killed"},
        {"case": sweep, "counter": "of another day", "update": 1},
    ]
    found = list(compiled.rows(given, stored, Console(quiet=True)))
    assert found[0] == stored[0]
    assert [row["error"] for row in found[1:]] == ["compiled again"] * 2


@pytest.mark.slow
def test_parts_of_an_iteration_are_found_in_a_program_of_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = {
        "env": "CartPole-v1",
        "objective": "ppo_clip",
        "num_envs": 2,
        "rollout_length": 24,
        "batch_size": 48,
        "updates_per_iteration": 5,
        "hidden_sizes": [8],
        "eval_episodes": 0,
    }
    work = compiled.program(config, 48)
    work |= {"device": "cpu", "by": "gipo_jax", "checkout": str(ROOT), "runs": 2}
    here = jax.devices("cpu")[:1]
    monkeypatch.setattr(compiled_worker, "describe", lambda name: (here, "cpu"))

    found = compiled_worker.compile_and_count(work)

    assert found["env_step"] >= 1 and found["update"] >= 1
    scans = found["gae_step"] * found["gae_steps"] if found["gae_steps"] else 0
    parts = 24 * found["env_step"] + 5 * found["update"] + scans + found["rest"]
    assert parts == pytest.approx(found["iteration"])
    assert found["collectives"] == 0
    assert 0 < found["temporaries"] < found["held"] and found["planned"] > 0
