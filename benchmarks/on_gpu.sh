#!/usr/bin/env bash
# Everything that only a GPU can show: the tests of its kernels, then every benchmark, one log each.
#
#     bash benchmarks/on_gpu.sh [OUT] [PART ...]
#
# OUT (runs/gpu by default) receives PART.log; PART is one or more of the names below, all by default. A part that fails
# or outlasts its limit does not stop the others; the last lines say which did. Needs torch, transformers, accelerate,
# pytest and this clone; wheels in ./wheels, where there are any, are installed first.
set -u
cd "$(dirname "$0")/.."
OUT=${1:-runs/gpu}
[ $# -gt 0 ] && shift
PARTS=${*:-tests train_step inference memory scale}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
mkdir -p "$OUT"
[ -d wheels ] && python3 -m pip install --quiet --no-index --find-links wheels --no-deps wheels/*.whl

run_part() {
    case $1 in
        tests) timeout 300 python3 -m pytest -q -p no:cacheprovider tests/quantization tests/inference tests/qasso ;;
        train_step) timeout 400 python3 benchmarks/train_step.py ;;
        inference) timeout 500 python3 benchmarks/inference.py ;;
        memory) timeout 300 python3 benchmarks/memory_plan.py ;;
        scale) timeout 500 python3 benchmarks/llm_scale.py ;;
        *) echo "unknown part $1" >&2; return 2 ;;
    esac
}

failed=""
for part in $PARTS; do
    echo "== $part"
    run_part "$part" >"$OUT/$part.log" 2>&1 || failed="$failed $part"
    tail -n 25 "$OUT/$part.log"
done
nvidia-smi --query-gpu=name,memory.total --format=csv,noheader 2>/dev/null
echo "failed:${failed:- none}"
[ -z "$failed" ]
