#!/usr/bin/env bash
# Run a choice of the tests in an environment of its own, with other versions than those of constraints.txt:
#     tests/versions/run.sh "torch==2.11.*" "transformers==5.17.*"
# Without versions, the newest that pyproject.toml allows. The environment takes several GB and is removed at the end.
set -euo pipefail
cd "$(dirname "$0")/../.."
mkdir -p runs
environment=$(mktemp -d runs/versions.XXXXXX)
trap 'rm -rf "$environment"' EXIT
"${PYTHON:-python3}" -m venv "$environment"
python="$environment/bin/python"
"$python" -m pip install --quiet --no-cache-dir --editable ".[peft]" pytest pillow "$@"
"$python" -c "import torch, transformers as t; print('torch', torch.__version__, 'transformers', t.__version__)"
export OMP_NUM_THREADS=1
# What a version warns of is for the tests of `make test`, at the versions in constraints.txt.
test=("$python" -m pytest -q -p no:cacheprovider -W default)
"${test[@]}" tests/quantization tests/methods/qasso/test_silent_gradients.py tests/methods/qasso/test_stages.py \
    tests/training/test_trainer.py tests/export/test_reload.py tests/inference
# Compiled models, which `make test-slow` runs too.
"${test[@]}" -m slow -k compiled tests/quantization/test_compiled_gradients.py tests/training/test_trainer_options.py
