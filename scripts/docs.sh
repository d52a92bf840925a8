#!/usr/bin/env bash
# Builds the documentation's site into build/site, with warnings as errors. Needs the extra docs in the
# environment of PYTHON (default: that of scripts/setup.sh with the extras dev and docs).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$(EXTRAS=${EXTRAS:-dev,docs} bash "$root/scripts/setup.sh")}
cd "$root"

# Pages and pictures keep their places, so that links are the same here and there.
rm -rf build/pages
find README.md RESULTS.md CHANGELOG.md CONTRIBUTING.md CITATION.cff LICENSE docs benchmarks experiments \
  results/figures gipo_jax -name '*.md' -o -name '*.png' -o -name LICENSE -o -name '*.cff' | while read -r page; do
  install -D -m 644 "$page" "build/pages/$page"
done
"$python" -m zensical build --clean --strict
