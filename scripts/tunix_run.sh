#!/usr/bin/env bash
# Makes an environment of its own with google-tunix (VENV, by default .venv-tunix), and trains in it;
# arguments go to scripts/tunix_run.py.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(VENV=${VENV:-$root/.venv-tunix} EXTRAS=dev,tunix bash "$root/scripts/setup.sh")
"$python" "$root/scripts/tunix_run.py" "$@"
