"""Python environments of other projects' programs, which need other versions than this project."""

import subprocess
import sys
from pathlib import Path


def interpreter(venv: Path, *requirements: Path) -> Path:
    """Interpreter of an environment, which is made where it is missing or of other requirements.

    Args:
        venv: folder of the environment.
        requirements: files for pip.
    """
    python, stamp = venv / "bin" / "python", venv / "complete"
    wanted = "".join(path.read_text() for path in requirements)
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"installing {', '.join(path.stem for path in requirements)} into {venv}",
              file=sys.stderr)  # fmt: skip
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet"]
        files = [part for path in requirements for part in ("--requirement", str(path))]
        subprocess.run([*install, *files], check=True)
        stamp.write_text(wanted)
    return python
