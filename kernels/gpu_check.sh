#!/usr/bin/env bash
# Everything a GPU is wanted for, in one command and under nine minutes:
#
#     bash kernels/gpu_check.sh              tests, then the benchmark of the shapes that matter, tuning, the rest
#     bash kernels/gpu_check.sh --dry-run    the same plan on a CPU with the references: tiny shapes, no figures kept
#
# Needs Python with torch >= 2.11 and triton >= 3.6, and installs nothing. Results are written as they come, so a run that is
# cut off leaves the most valuable ones: correctness first, then the shapes the targets name, then tuning, then the long tail.
# PYTHON=... chooses the interpreter, BUDGET=... the seconds for everything (500), OUT=... the folder of the results.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-500}
OUT=${OUT:-kernels/results}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
start=$(date +%s)
dry=""
[ "${1:-}" = "--dry-run" ] && dry="--dry-run"
mkdir -p "$OUT"
failed=0

left() { echo $((BUDGET - $(date +%s) + start)); }

# stage NAME SECONDS COMMAND...: run it for at most SECONDS and at most what is left; go on whatever happens.
stage() {
    local name=$1 limit=$2 rest
    shift 2
    rest=$(left)
    if [ "$rest" -lt 5 ]; then
        echo "=== $name: skipped, no time left"
        failed=1
        return
    fi
    [ "$limit" -gt "$rest" ] && limit=$rest
    echo "=== $name (at most $limit s)"
    local began
    began=$(date +%s)
    timeout --signal=INT --kill-after=5 "$limit" "$@"
    local status=$?
    echo "=== $name: status $status after $(($(date +%s) - began)) s"
    [ "$status" -eq 0 ] || failed=1
}

"$PYTHON" - "$dry" <<'CHECK' || exit 1
import sys
import torch
print("torch", torch.__version__, "cuda", torch.version.cuda)
try:
    import triton
    print("triton", triton.__version__)
except ImportError:
    sys.exit("triton is missing: the kernels need it") if not sys.argv[1] else print("triton is missing")
if not torch.cuda.is_available():
    sys.exit("no CUDA device: use --dry-run to walk the plan") if not sys.argv[1] else print("no CUDA device: dry run")
else:
    print(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
CHECK

if [ -n "$dry" ]; then
    stage "1 smoke" 60 "$PYTHON" kernels/bench.py check --dry-run
    stage "2 targets" 120 "$PYTHON" kernels/bench.py run --set targets --out "$OUT" --dry-run
    stage "3 tune" 60 "$PYTHON" kernels/bench.py tune --seconds 20 --dry-run
    stage "4 all shapes" 120 "$PYTHON" kernels/bench.py run --set all --out "$OUT" --dry-run
    stage "5 table" 60 "$PYTHON" kernels/bench.py table --out "$OUT" --dry-run
else
    stage "1 smoke" 60 "$PYTHON" kernels/bench.py check
    stage "2 targets" 120 "$PYTHON" kernels/bench.py run --set targets --out "$OUT"
    stage "3 gpu tests" 120 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests/kernels/test_gpu.py -k "not matmul_and_dx"
    stage "4 tune" 80 "$PYTHON" kernels/bench.py tune --seconds 70
    stage "5 targets, tuned" 60 "$PYTHON" kernels/bench.py run --set targets --out "$OUT"
    stage "6 table" 20 "$PYTHON" kernels/bench.py table --out "$OUT"
    stage "7 gpu tests, every grid and shape" 150 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests/kernels/test_gpu.py -k matmul_and_dx
    stage "8 all shapes" 200 "$PYTHON" kernels/bench.py run --set all --out "$OUT"
    stage "9 table" 20 "$PYTHON" kernels/bench.py table --out "$OUT"
fi
echo "=== done in $(($(date +%s) - start)) s, results in $OUT"
exit $failed
