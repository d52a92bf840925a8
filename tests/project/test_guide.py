"""The code of the pages in docs runs as printed, block after block, in an empty folder."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from gipo_jax import cli, objectives
from tests.programs import ROOT

DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves the files that a page says to save, then runs its other blocks in their order."""
    blocks = BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))
    assert blocks
    for _, name, text in blocks:
        if name:
            (folder / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    names: dict[str, Any] = {"__name__": "page"}
    for language, name, text in blocks:
        if language == "python" and not name:
            exec(compile(text, page, "exec"), names)
        if language == "bash":
            for line in text.replace("\\\n", " ").splitlines():
                program, *arguments = shlex.split(line)
                assert program == "gipo-jax"
                assert cli.main(arguments) == 0


@pytest.mark.slow
def test_code_of_the_page_on_objectives_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("objectives.md", tmp_path, monkeypatch)
    runs = (tmp_path / "sweep" / "runs.csv").read_text()
    # tempered with two powers and gipo, each with two buffer sizes and two seeds.
    assert len(runs.splitlines()) == 1 + 3 * 2 * 2
    assert "tempered" in runs
    assert list((tmp_path / "sweep" / "figures").glob("*.png"))


@pytest.mark.slow
def test_code_of_the_page_on_environments_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("environments.md", tmp_path, monkeypatch)
    runs = (tmp_path / "runs" / "masses" / "runs.csv").read_text()
    assert runs.splitlines()[0].count("env_params.m") == 1 and runs.count("done") == 3


@pytest.mark.slow
def test_code_of_the_page_on_sequences_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("sequences.md", tmp_path, monkeypatch)
    runs = (tmp_path / "sorted" / "runs.csv").read_text()
    # Two levels, two lags and two seeds.
    assert runs.count("sorting.py:SORT") == runs.count("done") == 2 * 2 * 2


@pytest.mark.slow
def test_code_of_the_page_on_flows_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("flow.md", tmp_path, monkeypatch)


def test_the_page_of_related_systems_names_every_objective() -> None:
    named = set(re.findall(r"`(\w+)`", (DOCS / "related.md").read_text(encoding="utf-8")))
    assert set(objectives.ALL) <= named
