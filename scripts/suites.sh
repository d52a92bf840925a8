#!/usr/bin/env bash
# Makes an environment of its own with every suite (VENV, by default .venv-suites), and runs their
# tests in it; arguments go to pytest.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(VENV=${VENV:-$root/.venv-suites} EXTRAS=dev,brax,craftax,xminigrid bash "$root/scripts/setup.sh")
cd "$root"
"$python" -m pytest tests/environments/test_suites.py "$@"
