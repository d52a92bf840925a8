#!/usr/bin/env bash
# Builds the wheel and the source distribution into dist, checks them, and tries the wheel as a user who
# has only pip does: in a new environment, from an empty folder.
#
#   PYTHON  interpreter that makes the environments  (default: python3)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
unset PYTHONPATH
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT

"$python" -m venv "$temporary/tools"
"$temporary/tools/bin/python" -m pip install --quiet --disable-pip-version-check build twine
rm -rf "$root/dist"
"$temporary/tools/bin/python" -m build --outdir "$root/dist" "$root"
"$temporary/tools/bin/python" -m twine check --strict "$root"/dist/*

"$python" -m venv "$temporary/user"
"$temporary/user/bin/python" -m pip install --quiet --disable-pip-version-check \
  --constraint "$root/constraints.txt" "$root"/dist/*.whl
mkdir "$temporary/empty"
cd "$temporary/empty"
"$temporary/user/bin/gipo-jax" reproduce --list
"$temporary/user/bin/gipo-jax" reproduce trust_weights --preset quick --out made
ls made/figures
