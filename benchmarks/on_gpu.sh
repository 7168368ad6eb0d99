#!/usr/bin/env bash
# Everything that only a GPU can show, in parts of at most 8 minutes each, one JSON a part, and one table.
#
#     bash benchmarks/on_gpu.sh [OUT] [PART ...]
#
# OUT (runs/gpu by default) receives PART.json and PART.log. A part whose JSON exists is not run again. DATA, MINILM and
# LM name folders of data and models; parts that lack theirs are left out. SMOKE=1, or a machine without a GPU, tries
# every part with tiny sizes. benchmarks/gpu/README.md says more. Wheels in ./wheels are installed first.
set -u
cd "$(dirname "$0")/.."
OUT=${1:-runs/gpu}
[ $# -gt 0 ] && shift
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
[ -d wheels ] && "$PYTHON" -m pip install --quiet --no-index --find-links wheels --no-deps wheels/*.whl
exec "$PYTHON" -m benchmarks.gpu --out "$OUT" ${SMOKE:+--smoke} "$@"
