#!/usr/bin/env bash
# One slot on a GPU: what is most worth knowing, most valuable first, in under 9.5 minutes on a bare machine.
#
#     bash benchmarks/gpu.sh             correctness (2 min), kernels' targets (3 min), training step (4 min)
#     bash benchmarks/gpu.sh --dry-run   the same walk on a CPU: tiny sizes, references, no figures kept
#     bash benchmarks/gpu.sh --tune      first tile sizes for this GPU, into ~/.cache (2 min more)
#     bash benchmarks/gpu.sh --profile   device time by kernel and the time to launch, per target (1 min more)
#     bash benchmarks/gpu.sh --long      then every shape, every method, the longest window (25 min more)
#
# Needs Python with torch >= 2.11, triton >= 3.6 and transformers 5, and installs nothing; the training step
# also needs what lowbit_ft needs. What is missing is a row that says so. A stage has a limit of its own, its
# rows are on disk as they come, and the script goes on whatever happens: its status says whether every stage
# went well. The result is one JSON and one table, OUT/gpu-<name of the GPU>.json and .md; after a real run
# the table is also in kernels/README.md.
# PYTHON=... chooses the interpreter, OUT=... the folder (benchmarks/results), BUDGET=... the seconds for the
# first three stages, TRAIN=... the stages of train_bench.py.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-550}
OUT=${OUT:-benchmarks/results}
TRAIN=${TRAIN:-correct speed memory more}
dry="" tune="" long="" profile=""
for option in "$@"; do
    case "$option" in
        --dry-run) dry="--dry-run" ;;
        --tune) tune=1 ;;
        --profile) profile=1 ;;
        --long) long=1 ;;
        *) echo "$option: options are --dry-run, --tune, --profile, --long" >&2; exit 2 ;;
    esac
done
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$([ -n "$dry" ] && echo 1 || echo 4)}
parts=$OUT/gpu-parts
mkdir -p "$parts" && rm -f "$parts"/*
start=$(date +%s)
failed=0

report() { "$PYTHON" -m benchmarks.gpu_report --parts "$parts" --out "$OUT" $dry "$@"; }

# stage NAME SECONDS COMMAND...: run it for at most SECONDS and at most what is left; go on whatever happens.
stage() {
    local name=$1 limit=$2 left began status row="{\"name\": \"$1\", "
    shift 2
    left=$((BUDGET - $(date +%s) + start))
    [ "$limit" -gt "$left" ] && limit=$left
    if [ "$limit" -lt 5 ]; then
        echo "$row\"status\": \"skipped, no time left\", \"seconds\": 0}" >>"$parts/stages.jsonl"
        failed=1
        return
    fi
    echo "=== $name (at most $limit s)"
    began=$(date +%s)
    timeout --signal=INT --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$parts/log.txt"
    status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || failed=1
    echo "$row\"status\": $status, \"seconds\": $(($(date +%s) - began))}" >>"$parts/stages.jsonl"
    echo "=== $name: status $status after $(($(date +%s) - began)) s"
    report >/dev/null || failed=1
}

# Where torch or the GPU is missing nothing can be measured; all else is a row of the result.
"$PYTHON" -m benchmarks.gpu_report --needs $dry --parts "$parts" --out "$OUT" || exit 1
can_train=1
[ -s "$parts/cannot_train" ] && can_train=""

stage "correctness of the kernels" 120 \
    "$PYTHON" -m benchmarks.gpu_smoke --rows "$parts/smoke.jsonl" --seconds 110 $dry
if [ -n "$tune" ]; then
    BUDGET=$((BUDGET + 130))
    stage "tile sizes" 130 "$PYTHON" kernels/bench.py tune --seconds 115 $dry --out "$parts/tuning.json"
fi
stage "targets of the kernels" 170 \
    "$PYTHON" kernels/bench.py run --set targets --quick --out "$parts/kernels.json" $dry
if [ -n "$profile" ]; then
    BUDGET=$((BUDGET + 60))
    stage "profile" 60 "$PYTHON" kernels/bench.py profile --set targets $dry
fi
if [ -n "$can_train" ]; then
    stage "training step" 240 "$PYTHON" -m benchmarks.train_bench --stages $TRAIN --rounds 3 \
        --budget 225 --out "$parts/training.json" $dry
else
    echo "=== training step: not run: $(cat "$parts/cannot_train")"
fi
if [ -n "$long" ]; then
    BUDGET=$((BUDGET + 1500))
    stage "every shape" 600 "$PYTHON" kernels/bench.py run --set all --out "$parts/kernels.json" $dry
    [ -n "$can_train" ] && stage "training, every stage" 900 \
        "$PYTHON" -m benchmarks.train_bench --budget 880 --out "$parts/training.json" $dry
fi
report --final || failed=1
[ -n "$dry" ] || "$PYTHON" kernels/bench.py table --out "$OUT" >/dev/null || failed=1
echo "=== done in $(($(date +%s) - start)) s"
exit $failed
