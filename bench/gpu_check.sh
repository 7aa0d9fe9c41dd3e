#!/usr/bin/env bash
# Everything that needs a GPU, in one go and under nine minutes: the tests marked so, memory and
# race checks of small shapes, and the times of every schedule against PyTorch. Writes
# gpu_tests-*.xml and gpu.json into the folder given (default bench/results; `deqfusion plot` draws
# the last). Needs torch, triton and pytest beside this package; nothing is installed.
#
#     bash bench/gpu_check.sh [FOLDER]
#
# Compiling takes most of the time: WORKERS processes (default: three quarters of the cores) share
# the tests, and fill the compilers' caches for the measurement, which then has the machine alone.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-bench/results}
mkdir -p "$out"
unset TRITON_INTERPRET DEQFUSION_BACKEND
python=${PYTHON:-python3}
for package in torch triton pytest deqfusion.kernels deqfusion.bench; do
  "$python" -c "import $package" 2>/dev/null || {
    echo "error: $python cannot import $package, expected it installed (this package:" \
      "$python -m pip install --no-deps --no-build-isolation -e .)" >&2; exit 2; }
done
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "error: no GPU that torch can use, expected one" >&2; exit 2; }
workers=${WORKERS:-$(( ($(nproc) * 3 + 3) / 4 ))}
code=0
# Processes that share a GPU must not all reserve its memory.
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
pids=()
for ((i = 0; i < workers; i++)); do
  (
    DEQFUSION_SHARD=$i/$workers timeout 210 "$python" -m pytest -q tests/gpu tests/kernels/test_golden.py \
      -p no:cacheprovider \
      --junitxml="$out/gpu_tests-$i.xml" >"$out/gpu_tests-$i.log" 2>&1
    found=$?
    tail -n 15 "$out/gpu_tests-$i.log"
    rm "$out/gpu_tests-$i.log"
    # 5: more workers than tests.
    [ $found -eq 0 ] || [ $found -eq 5 ]
  ) &
  pids+=($!)
  timeout 210 "$python" -m deqfusion.bench --suite gpu --warm "$i/$workers" >/dev/null 2>&1 &
done
for pid in "${pids[@]}"; do wait "$pid" || code=1; done
wait
unset PYTORCH_CUDA_ALLOC_CONF
if command -v compute-sanitizer >/dev/null 2>&1; then
  for tool in memcheck racecheck; do
    timeout 45 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" -m pytest -q tests/gpu -k sanitizer || { echo "compute-sanitizer $tool failed" >&2; code=1; }
  done
else
  echo "compute-sanitizer is not installed: memory and race checks skipped" >&2
fi
timeout 220 "$python" -m deqfusion.bench --suite gpu --rounds 7 --no-pictures --out "$out" || code=1
exit "$code"
