#!/usr/bin/env bash
# Everything that needs a GPU, in one go and under nine minutes: the tests marked so, memory and
# race checks of small shapes, and the times of every schedule against PyTorch. Writes
# gpu_tests-*.xml and gpu.json into the folder given (default bench/results; `deqfusion plot` draws
# the last). Needs torch, triton and pytest beside this package; nothing is installed.
#
#     bash bench/gpu_check.sh [FOLDER]
#
# Compiling takes most of the time: WORKERS processes (default: three quarters of the cores) share
# the tests, and as many fill the compilers' caches for the measurement, which then has the machine
# alone. Seconds at most: 200 for both, 80 for the sanitizers, 230 to measure. Tests for which there
# is no time are skipped and contenders left out; both are in the results, with this reason.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-bench/results}
mkdir -p "$out"
unset TRITON_INTERPRET DEQFUSION_BACKEND
python=${PYTHON:-python3}
missing=$("$python" -c '
import importlib
for name in ("torch", "triton", "pytest", "deqfusion.kernels", "deqfusion.bench"):
    try:
        importlib.import_module(name)
    except Exception:
        print(name)
        break
else:
    import torch
    print("" if torch.cuda.is_available() else "GPU")')
[ "$missing" != GPU ] || { echo "error: no GPU that torch can use, expected one" >&2; exit 2; }
[ -z "$missing" ] || {
  echo "error: $python cannot import $missing, expected it installed (this package:" \
    "$python -m pip install --no-deps --no-build-isolation -e .)" >&2; exit 2; }
workers=${WORKERS:-$(( ($(nproc) * 3 + 3) / 4 ))}
code=0
# Processes that share a GPU must not all reserve its memory.
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
pids=()
rm -f "$out"/gpu_tests-*.xml "$out"/gpu_tests-*.log
for ((i = 0; i < workers; i++)); do
  (
    DEQFUSION_SHARD=$i/$workers DEQFUSION_SECONDS=170 timeout -k 5 195 \
      "$python" -m pytest -v tests/gpu/test_programs.py tests/kernels/test_golden.py \
      tests/gpu/test_autotune.py -p no:cacheprovider \
      --junitxml="$out/gpu_tests-$i.xml" >"$out/gpu_tests-$i.log" 2>&1
    found=$?
    tail -n 15 "$out/gpu_tests-$i.log"
    # A test that could not be interrupted leaves no more than the log.
    [ ! -s "$out/gpu_tests-$i.xml" ] || rm "$out/gpu_tests-$i.log"
    # 5: more workers than tests.
    [ $found -eq 0 ] || [ $found -eq 5 ]
  ) &
  pids+=($!)
  timeout -k 5 195 "$python" -m deqfusion.bench --suite gpu --warm "$i/$workers" >/dev/null 2>&1 &
done
for pid in "${pids[@]}"; do wait "$pid" || code=1; done
wait
unset PYTORCH_CUDA_ALLOC_CONF
if command -v compute-sanitizer >/dev/null 2>&1; then
  pids=()
  for tool in memcheck racecheck; do
    (
      timeout -k 5 75 compute-sanitizer --tool "$tool" --error-exitcode 9 \
        "$python" -m pytest -q tests/gpu -k sanitizer -p no:cacheprovider ||
        { echo "compute-sanitizer $tool failed" >&2; exit 1; }
    ) &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || code=1; done
else
  echo "compute-sanitizer is not installed: memory and race checks skipped" >&2
fi
timeout -k 5 225 "$python" -m deqfusion.bench --suite gpu --rounds 7 --budget 200 --no-pictures \
  --out "$out" || code=1
exit "$code"
