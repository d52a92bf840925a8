#!/usr/bin/env bash
# Makes an environment of its own with PyTorch (VENV, by default .venv-torch), and compares the code of
# docs/torch.md with policy_loss in it; arguments go to pytest.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(VENV=${VENV:-$root/.venv-torch} bash "$root/scripts/setup.sh")
"$python" -m pip install --disable-pip-version-check --quiet torch==2.13.0 >&2
cd "$root"
"$python" -m pytest tests/test_torch_page.py "$@"
