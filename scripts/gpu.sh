#!/usr/bin/env bash
# Times training on this machine's GPU in about a quarter of an hour, installation included: 1 to 1,024
# runs of this project, layer by layer and fused, and of rejax on the same work; memory against the
# plan; ratios on fresh data; the constants of the model in docs/speed.md. Arguments go to the
# benchmark (--quick). With PUREJAXRL, a checkout of github.com/luchris429/purejaxrl, it takes part.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
extras=dev
if command -v nvidia-smi >/dev/null; then
  extras=dev,cuda
else
  echo "gpu.sh: no NVIDIA GPU here, so the CPU is timed; --quick makes that bearable" >&2
fi
python=$(VENV=${VENV:-$root/.venv-gpu} EXTRAS=$extras bash "$root/scripts/setup.sh")
cd "$root"
peer=$("$python" -c 'from scripts import benchmark, peer_env
print(peer_env.interpreter(benchmark.PEER_VENV, benchmark.RESULTS / "peer-constraints.txt"))')
if [[ $extras == *cuda* ]]; then
  "$peer" -m pip install --quiet "jax[cuda12]" --constraint benchmarks/peer-constraints.txt
fi
PYTHONPATH=${PUREJAXRL:+$PUREJAXRL:$PUREJAXRL/purejaxrl} \
  "$python" scripts/benchmark.py accelerator --repeats 3 "$@"
