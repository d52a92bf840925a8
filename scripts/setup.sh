#!/usr/bin/env bash
# The one owner of environment set-up: makes a virtual environment with the pinned versions and this
# checkout installed in it, and prints its interpreter's path on stdout. Does nothing when up to date.
#
#   VENV    where the environment goes           (default: .venv in the checkout)
#   PYTHON  interpreter that makes it            (default: the first Python 3.11 to 3.14 found)
#   EXTRAS  extras of pyproject.toml to install  (default: dev; on a GPU machine dev,cuda)
#   CONSTRAINTS  file with the exact versions    (default: constraints.txt in the checkout)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}
extras=${EXTRAS:-dev}
constraints=${CONSTRAINTS:-$root/constraints.txt}

usable() { # a shim may exist for a Python that is not there, so run it
  "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' \
    >/dev/null 2>&1
}

find_python() {
  local candidate directory
  if [[ -n ${PYTHON:-} ]]; then
    if usable "$PYTHON"; then
      echo "$PYTHON"
      return
    fi
    echo "setup: PYTHON=$PYTHON is no Python 3.11 to 3.14 with the modules venv and ensurepip" >&2
    return 1
  fi
  for candidate in python3 python3.13 python3.12 python3.11 python3.14 python; do
    # Every match on PATH, not only the first.
    while read -r directory; do
      if usable "$directory"; then
        echo "$directory"
        return
      fi
    done < <(type -ap "$candidate")
  done
  echo "setup: needs Python 3.11 to 3.14 with the modules venv and ensurepip (on Debian and Ubuntu" \
    "apt-get install python3-venv); none found on PATH. PYTHON=/path/to/python3 names one." >&2
  return 1
}

stamp=$venv/.gipo-jax-stamp
if [[ -x $venv/bin/python ]]; then
  python=$venv/bin/python
else
  python=$(find_python)
fi
wanted=$(cd "$root" && "$python" -c '
import hashlib, sys
digest = hashlib.sha256("\0".join(sys.argv[1:]).encode())
for name in ("pyproject.toml", sys.argv[3], "scripts/setup.sh"):
    digest.update(open(name, "rb").read())
print(digest.hexdigest())' "$root" "$extras" "$constraints")

if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
  echo "setup: installing into $venv (a few minutes the first time)" >&2
  rm -f "$stamp"
  [[ -x $venv/bin/python ]] || "$python" -m venv "$venv" >&2
  python=$venv/bin/python
  log=$venv/setup.log
  install=("$python" -m pip install --disable-pip-version-check --constraint "$constraints")
  # The build back end is pinned too, so it comes from the environment and not from an isolated one.
  if ! {
    "${install[@]}" pip setuptools &&
      "${install[@]}" --no-build-isolation --editable "$root[$extras]"
  } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "setup: pip failed; the whole log is $log" >&2
    exit 1
  fi
  echo "$wanted" >"$stamp"
fi
echo "$python"
