#!/usr/bin/env bash
# Sets up the environment, then runs every check. --fast leaves out the slow tests, --long adds larger
# cases of others; other arguments go to pytest (bash scripts/test.sh tests/test_objectives.py -k sigma).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(bash "$root/scripts/setup.sh")
cd "$root"

arguments=()
marked="not long"
for argument in "$@"; do
  case $argument in
    --fast) marked="not slow and not long" ;;
    --long) marked="" ;;
    *) arguments+=("$argument") ;;
  esac
done

failed=0
"$python" -m ruff check || failed=1
"$python" -m ruff format --check || failed=1
"$python" -m mypy || failed=1
# Two processes: each takes half of the tests, in their order, and then half of what the other has
# left, so that nearly every fixture that trains is made once. (With --dist=loadfile pytest-xdist
# 3.8 waits for ever after it has lost a process: pytest-xdist issues 1323, 1327 and 1378.)
"$python" -m pytest --numprocesses=2 --dist=worksteal --durations=20 -m "$marked" ${arguments[@]+"${arguments[@]}"} || failed=1
exit $failed
