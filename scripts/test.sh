#!/usr/bin/env bash
# Sets up the environment, then runs every check. --fast leaves out the slow tests; other arguments
# go to pytest (bash scripts/test.sh tests/test_objectives.py -k sigma).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(bash "$root/scripts/setup.sh")
cd "$root"

arguments=()
for argument in "$@"; do
  if [[ $argument == --fast ]]; then
    arguments+=(-m "not slow")
  else
    arguments+=("$argument")
  fi
done

failed=0
"$python" -m ruff check || failed=1
"$python" -m ruff format --check || failed=1
"$python" -m mypy || failed=1
# Two processes, a file at a time each: fixtures that train are made once.
"$python" -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder --durations=20 ${arguments[@]+"${arguments[@]}"} || failed=1
exit $failed
