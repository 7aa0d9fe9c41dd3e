#!/usr/bin/env bash
# Everything that needs a GPU, in one go and under nine minutes: the tests marked so, memory and
# race checks of small shapes, and the times of every schedule against PyTorch. Writes
# gpu_tests.xml and gpu.json into the folder given (default bench/results). Needs torch, triton and
# pytest beside this package; nothing is installed.
#
#     bash bench/gpu_check.sh [FOLDER]
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-bench/results}
mkdir -p "$out"
unset TRITON_INTERPRET DEQFUSION_BACKEND
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "error: no GPU that torch can use, expected one" >&2; exit 2; }
code=0
timeout 180 python -m pytest -q tests/gpu --junitxml="$out/gpu_tests.xml" || code=1
if command -v compute-sanitizer >/dev/null 2>&1; then
  for tool in memcheck racecheck; do
    timeout 60 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      python -m pytest -q tests/gpu -k sanitizer || { echo "compute-sanitizer $tool failed" >&2; code=1; }
  done
else
  echo "compute-sanitizer is not installed: memory and race checks skipped" >&2
fi
timeout 240 python -m deqfusion.bench.device --out "$out/gpu.json" || code=1
exit "$code"
