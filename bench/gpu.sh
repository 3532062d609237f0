#!/usr/bin/env bash
# Everything there is to learn on a GPU machine, in one go: does the extension load, do the gpu tests pass, is the
# self-test clean under compute-sanitizer, how fast are the kernels. JSON goes to bench/results/ (or to $1).
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:-bench/results}
python=${PYTHON:-python3}
mkdir -p "$results"
status=0
step() { echo "== $*"; "$@" || { echo "FAILED: $*"; status=1; }; }

[ -e ensadv_fast/_C.abi3.so ] || step "$python" setup.py build_ext --inplace
step "$python" -m ensadv_fast info
step "$python" -m pytest -q -m gpu tests
step cmake --preset cuda
step cmake --build --preset cuda
for tool in memcheck racecheck initcheck synccheck; do
    step compute-sanitizer --tool "$tool" --error-exitcode 1 build/cuda/selftest --quick
done
step build/cuda/selftest
step "$python" -m ensadv_fast bench --device cuda --dtypes float32 bfloat16 float16 --seconds 0.3 \
    --out "$results/ops_gpu.json"
exit $status
