"""The code of docs/objectives.md runs as printed, block after block, in an empty folder."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

GUIDE = Path(__file__).parents[1] / "docs" / "objectives.md"
BLOCK = re.compile(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[tuple[str, str]]:
    """File name (or empty) and text of each block of the guide in one language, in order."""
    found = BLOCK.findall(GUIDE.read_text(encoding="utf-8"))
    return [(name, text) for kind, name, text in found if kind == language]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in that holds the files the guide says to save."""
    for name, text in blocks("python"):
        if name:
            (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.timeout(240)
def test_python_code_of_the_guide_runs_as_printed(folder: Path) -> None:
    names: dict[str, Any] = {"__name__": "guide"}
    ran = 0
    for name, text in blocks("python"):
        if not name:
            exec(compile(text, str(GUIDE), "exec"), names)
            ran += 1
    assert ran >= 3


@pytest.mark.timeout(240)
def test_commands_of_the_guide_run_as_printed(folder: Path) -> None:
    ran = 0
    for _, text in blocks("bash"):
        for line in text.replace("\\\n", " ").splitlines():
            program, *arguments = shlex.split(line)
            assert program == "gipo-jax"
            done = subprocess.run(
                [sys.executable, "-m", "gipo_jax", *arguments],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=200,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            ran += 1
    assert ran >= 2
    runs = (folder / "sweep" / "runs.csv").read_text()
    # tempered with two powers and gipo, each with two buffer sizes and two seeds.
    assert len(runs.splitlines()) == 1 + 3 * 2 * 2
    assert "tempered" in runs
    assert list((folder / "sweep" / "figures").glob("*.png"))
