#!/usr/bin/env bash
# What there is to see on a GPU, in under ten minutes: the laws of the Triton kernels, the decay operator beside the copy
# bandwidth and flash-linear-attention, training steps at 25 and 350 million parameters. JSON goes into the folder OUT.
#
#     bash benchmarks/gpu.sh OUT
set -u
out=${1:?give a folder for the JSON}
mkdir -p "$out"
failed=0
run() {
  echo "== $*"
  timeout "$limit" "$@" || { echo "== failed ($?): $*"; failed=1; }
}
limit=150 run python -m pytest -q tests/ops/decay
limit=120 run python benchmarks/decay_gpu.py --json "$out/decay.json"
limit=270 run python benchmarks/training_gpu.py --json "$out/training.json"
exit $failed
