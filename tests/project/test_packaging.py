"""The package installs what it imports, runs from anywhere, and the README's code works."""

import ast
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gipo_jax import cli, objectives
from tests import programs
from tests.programs import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Declared though nothing here imports them; pyproject.toml says why.
NOT_IMPORTED = {"jaxlib", "six"}
# Extras whose imports are inside functions, or in a module of their own.
OPTIONAL = ("tensorboard", "trackio", "envpool", "tunix", "brax", "craftax", "xminigrid")

# Names of distributions that need not be installed, where they are not that of the import
DISTRIBUTIONS = {"tunix": ["google-tunix"], "mujoco_playground": ["playground"]}


def _names(requirements: Iterable[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements}


def _imported(folder: str) -> dict[str, str]:
    """Distributions that the folder's files import, each with one of the files."""
    distributions = importlib.metadata.packages_distributions()
    local = {path.stem for path in ROOT.glob("*/*.py")} | {path.name for path in ROOT.iterdir()}
    found: dict[str, str] = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            modules: list[str] = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            for top in {module.partition(".")[0] for module in modules}:
                if top in sys.stdlib_module_names or top in local:
                    continue
                # Several distributions may share a top name, as plugins do; the shortest owns it.
                owner = min(distributions.get(top, DISTRIBUTIONS.get(top, [top])), key=len)
                found.setdefault(canonicalize_name(owner), f"{path.relative_to(ROOT)}")
    return found


def test_dependencies_are_the_imports() -> None:
    declared = _names(PROJECT["dependencies"])
    optional = _names(x for name in OPTIONAL for x in PROJECT["optional-dependencies"][name])
    imported = _imported("gipo_jax")
    undeclared = {name: path for name, path in imported.items() if name not in declared | optional}
    assert not undeclared, "imported but not declared"
    used = imported.keys() | _imported("experiments").keys() | _imported("scripts").keys()
    assert declared - used == NOT_IMPORTED, "declared but not imported"


@pytest.mark.parametrize("folder", ["scripts", "experiments", "tests"])
def test_tools_need_only_the_dev_extra(folder: str) -> None:
    extras = PROJECT["optional-dependencies"]
    known = _names(
        [*PROJECT["dependencies"], *extras["dev"], *(x for name in OPTIONAL for x in extras[name])]
    )
    # packaging comes with pytest, which declares it.
    undeclared = {k: v for k, v in _imported(folder).items() if k not in known | {"packaging"}}
    assert not undeclared


def test_every_requirement_is_pinned_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {
        canonicalize_name(name): version
        for name, _, version in (line.partition("==") for line in lines if "==" in line)
    }
    extras = PROJECT["optional-dependencies"].values()
    for line in [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name == "gipo-jax":
            continue
        assert name in pins, f"{name} is not pinned"
        assert requirement.specifier.contains(pins[name]), f"{line} leaves out {pins[name]}"


def test_environment_holds_the_pinned_versions() -> None:
    """What an installed requirement needs in turn is pinned too, at the version installed."""
    text = Path(os.environ.get("CONSTRAINTS", ROOT / "constraints.txt")).read_text()
    pins = {canonicalize_name(n): v for n, v in re.findall(r"^([\w.-]+)==(\S+)$", text, re.M)}
    seen: set[str] = set()
    pending = [canonicalize_name(name) for name in _names(PROJECT["dependencies"])]
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        distribution = importlib.metadata.distribution(name)
        assert pins.get(name) == distribution.version, name
        for line in distribution.requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                pending.append(canonicalize_name(requirement.name))


def run_outside(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in a folder where only what is installed is found."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=programs.SECONDS,
    )


def test_the_command_runs_outside_the_checkout(tmp_path: Path) -> None:
    done = run_outside(tmp_path, str(Path(sys.executable).parent / "gipo-jax"), "--help")
    assert done.returncode == 0, done.stderr
    assert "sweep" in done.stdout


def test_the_module_is_a_command_and_runs_outside_the_checkout(tmp_path: Path) -> None:
    words = ["sweep", "--gamma", "2", "--out", "/nowhere/x"]
    done = run_outside(tmp_path, sys.executable, "-m", "gipo_jax", *words)
    assert done.returncode == 2
    assert "gamma: 2 is not valid" in done.stderr and "Traceback" not in done.stderr


def test_every_package_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {
        path.parent for top in ("gipo_jax", "experiments") for path in ROOT.glob(f"{top}/**/*.py")
    }
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(listed) == {re.sub("^experiments", "gipo_jax_experiments", name) for name in names}


@pytest.mark.slow
def test_a_study_is_reproduced_from_the_wheel_in_an_empty_folder(tmp_path: Path) -> None:
    source, site, folder = (tmp_path / name for name in ("source", "site", "empty"))
    folder.mkdir()
    for top in ("gipo_jax", "experiments"):
        shutil.copytree(ROOT / top, source / top, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    unbuilt = ["--no-deps", "--no-index", "--no-build-isolation", "--target", str(site)]
    done = run_outside(folder, *pip, "install", *unbuilt, str(source))
    assert done.returncode == 0, done.stderr
    assert {path.name for path in site.iterdir() if path.suffix != ".dist-info"} == {
        *("bin", "gipo_jax", "gipo_jax_experiments")
    }
    shutil.rmtree(source)
    # What is in the wheel comes before what this environment has; its dependencies are shared.
    words = ["reproduce", "trust_weights", "--preset", "quick", "--out", "made"]
    code = f"import sys; sys.path.insert(0, {str(site)!r})\nfrom gipo_jax import cli; cli.main()"
    done = run_outside(folder, sys.executable, "-P", "-c", code, *words)
    assert done.returncode == 0, done.stderr
    assert (folder / "made" / "figures" / "trust_weights.png").exists()
    manifest = json.loads((folder / "made" / "manifest.json").read_text())
    command = "gipo-jax reproduce trust_weights --preset quick --out made"
    assert manifest["data"]["data/trust_weights.csv"]["command"] == command


def test_setup_says_what_is_missing(tmp_path: Path) -> None:
    """A machine whose only Python is too old gets one clear line and no half-made environment."""
    tools = tmp_path / "bin"
    tools.mkdir()
    old = tools / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for tool in ("bash", "dirname"):
        path = subprocess.run(["which", tool], capture_output=True, text=True, check=True).stdout
        (tools / tool).symlink_to(path.strip())
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "setup.sh")],
        env={"PATH": str(tools), "VENV": str(tmp_path / "venv")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=programs.SECONDS,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("setup: needs Python 3.11")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "venv").exists()


README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("code", _blocks("python"), ids=["many runs", "fork"])
def test_readme_code_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As printed, for a twentieth of the steps."""
    monkeypatch.chdir(tmp_path)
    assert "total_steps=64_000" in code
    code = code.replace("total_steps=64_000", "total_steps=3_200")
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_forked_objective_of_the_readme_is_short() -> None:
    function = re.search(r"^def .*?(?=\n\n\n)", _blocks("python")[1], re.MULTILINE | re.DOTALL)
    assert function is not None
    assert function[0].count("\n") < 10


def test_python_examples_of_the_readme_have_at_most_twelve_lines_of_code() -> None:
    lines = [line for line in _blocks("python")[0].splitlines() if line.strip()]
    assert len(lines) <= 12


def test_the_readme_lists_every_objective_with_its_weight_paper_and_kind() -> None:
    pattern = r"^\| ((?:`\w+`(?:, )?)+) \| (.*?) \| .*\|$"
    page = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
    weights = {
        name: weight.replace("`", "")
        for names, weight in re.findall(pattern, page, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", names)
    }
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \| ([\w-]+) \|$", README, re.MULTILINE)
    assert [name for name, *_ in rows] == list(objectives.KNOWN)
    for name, weight, paper, kind in rows:
        spec = objectives.spec(name)
        assert spec.kind == kind and paper.startswith(f"[{spec.source}]" if spec.source else "none")
        plain = re.sub(r"\[(section 8)\]\(.*?\)", r"\1", weight.replace("`", ""))
        assert plain == weights.get(name, plain)
        assert name in weights or "](docs/" in weight
    assert f"**{len(objectives.KNOWN)} objectives in one file**" in README


def test_readme_commands_parse() -> None:
    """Every option and name in the README's commands exists."""
    commands = "".join(_blocks("bash")).replace("\\\n", " ").splitlines()
    for command in commands:
        words = shlex.split(command, comments=True)
        if words[0] == "gipo-jax":
            cli._parser().parse_args(words[1:])
        elif "bash" in words:
            assert (ROOT / words[words.index("bash") + 1]).is_file(), command
