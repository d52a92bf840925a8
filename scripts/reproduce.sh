#!/usr/bin/env bash
# Sets up the environment, then runs the main job: the quick replay-staleness sweep, its tables and
# figures, written to runs/staleness-quick. With arguments, runs scripts/reproduce.py with those.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(bash "$root/scripts/setup.sh")
if [[ $# -eq 0 ]]; then
  set -- staleness --preset quick --out "$root/runs/staleness-quick"
fi
exec "$python" "$root/scripts/reproduce.py" "$@"
