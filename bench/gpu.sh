#!/usr/bin/env bash
# Everything there is to learn on a GPU machine, in one go: does the extension load, do the gpu tests pass, is the
# self-test clean under compute-sanitizer, how fast are the kernels, beside the peers' where those are installed
# (pip install torchattacks foolbox cleverhans adversarial-robustness-toolbox). JSON goes to bench/results/ (or to $1),
# Nsight Compute's report, where ncu is there, to build/. Then give docs/results.md the marks of the tables targets_gpu,
# attack_step_gpu, compat_gpu, train_step_gpu, ops_gpu, peers_gpu and ensemble_linear_cuda, and run bench/report.py.
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
step build/cmake/cuda/selftest
for tool in memcheck racecheck initcheck synccheck; do
    step compute-sanitizer --tool "$tool" --error-exitcode 1 build/cmake/cuda/selftest
done
step "$python" -m ensadv_fast bench --device cuda --seconds 0.1 --out "$results/ops_gpu.json"
step "$python" -m pytest -q bench/test_ops.py -k "imagenet and float32-contiguous" --benchmark-max-time 0.2 \
    --benchmark-json "$results/peers_gpu.json"
step "$python" bench/attack_step.py --device cuda --out "$results/attack_step_gpu.json"
step "$python" bench/compat.py --device cuda --out "$results/compat_gpu.json"
step "$python" bench/train_step.py --device cuda --out "$results/train_step_gpu.json"
step "$python" bench/ensemble_linear.py --device cuda --out "$results/ensemble_linear_cuda.json"
if command -v ncu > /dev/null; then
    step ncu --set full --force-overwrite --export build/ncu --kernel-name regex:ensadv --kernel-name-base demangled \
        --launch-count 20 "$python" -m ensadv_fast bench --device cuda --sizes imagenet --dtypes float32 --compile \
        --cases sign_step-ball random_step-rademacher model_entry-bfloat16 --seconds 0.001
fi
exit $status
