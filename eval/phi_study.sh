#!/usr/bin/env bash
# Language models that were really trained, compressed and scored beside their dense selves: the record behind
# docs/results.md.
#
#     bash eval/phi_study.sh DATA WORK
#
# DATA holds squad/train-v1.1.json.gz, lm/gutenberg/*.txt.gz, lm/tinystories/*.txt.gz, lmeval/ (lm-eval's rows as local
# files) and models/stories260K. WORK receives everything; what is there already is not made again. PYTHON, STEPS (of
# every compression), LIMIT (questions of each commonsense task) may be set. Takes hours on two cores.
set -euo pipefail
DATA=$(realpath "$1") WORK=$(realpath -m "$2")
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$PWD/.venv/bin/python} STEPS=${STEPS:-600} LIMIT=${LIMIT:-500} PAIRS=${PAIRS:-1000}
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1

TEXT=(--dataset_name null --template null --response_column null --block_size 256)
TRAINING=(--per_device_train_batch_size 8 --gradient_accumulation_steps 1 --gradient_checkpointing false
    --optim adamw_torch_fused --learning_rate 1e-3 --save_strategy no --disable_tqdm true)

# run HOME NAME OPTION ...: trains HOME/model on HOME/train.txt into HOME/NAME.
run() {
    local home=$1 name=$2
    shift 2
    [ -d "$home/$name/export" ] || "$PYTHON" recipes/language_modeling.py recipes/configs/phi2.yaml \
        --model_name_or_path "$home/model" --train_file "$home/train.txt" --eval_file "$home/held_out.txt" \
        --max_steps "$STEPS" --output_dir "$home/$name" "${TEXT[@]}" "${TRAINING[@]}" "$@" 2>&1 | tee "$home/$name.log"
}

# The vocabulary's matrices are most of models as small as these, so they are quantized too.
# compress HOME OPTION_OF_GETA ...: as many steps without compression, then 30 and 50 % with and without a teacher.
compress() {
    local home=$1
    shift
    run "$home" control --geta null
    for share in 30 50; do
        run "$home" "pruned$share" --geta.target_sparsity "0.$share" --geta.embedding_bits 8 "$@"
        run "$home" "pruned${share}_taught" --geta.target_sparsity "0.$share" --geta.embedding_bits 8 \
            --geta.distill_logits 1 "$@"
    done
}

# score HOME OPTION ...: all folders of HOME beside its dense model.
score() {
    local home=$1
    shift
    (cd "$home" && "$PYTHON" -m geta_hf eval --dense model control/export pruned*/export "$@")
}

# --- a small Phi ------------------------------------------------------------------------------------------------------
PHI=$WORK/phi
mkdir -p "$PHI"
[ -d "$PHI/model" ] || "$PYTHON" -m eval.train_phi "$PHI" --epochs 1.5 --batch_size 8 --learning_rate 2.5e-3 --compile \
    --texts "$DATA"/squad/train-v1.1.json.gz "$DATA"/lm/gutenberg/*.txt.gz "$DATA"/lm/tinystories/*.txt.gz
compress "$PHI" --geta.include "['layers\\.', 'lm_head']"
score "$PHI" --text "$PHI/held_out.txt" --block 256 | tee "$PHI/text.md"
score "$PHI" --tasks blimp --data-dir "$DATA/lmeval" --limit "$PAIRS" --output "$PHI/blimp.json" | tee "$PHI/blimp.md"
score "$PHI" --tasks commonsense --data-dir "$DATA/lmeval" --limit "$LIMIT" --output "$PHI/commonsense.json" \
    | tee "$PHI/commonsense.md"
"$PYTHON" benchmarks/generation.py "$PHI"/{model,pruned{30,50}/export} | tee "$PHI/generation.md"

# --- a real small Llama that tells stories ----------------------------------------------------------------------------
STORIES=$WORK/stories
mkdir -p "$STORIES"
[ -d "$STORIES/model" ] || cp -r "$DATA/models/stories260K" "$STORIES/model"
[ -f "$STORIES/train.txt" ] || "$PYTHON" -c "
from pathlib import Path
from eval.train_phi import split_texts
split_texts(sorted(Path('$DATA/lm/tinystories').glob('*.txt.gz')), Path('$STORIES'), 0.1)"
compress "$STORIES"
# Each of its parameters counts, and its texts are few: gentler, and longer with a teacher.
run "$STORIES" pruned10_taught --geta.target_sparsity 0.1 --geta.embedding_bits 8 --geta.distill_logits 1
STEPS=$((4 * STEPS)) run "$STORIES" pruned30_long --geta.target_sparsity 0.3 --geta.embedding_bits 8 --geta.distill_logits 1
score "$STORIES" --text "$STORIES/held_out.txt" --block 256 | tee "$STORIES/text.md"
"$PYTHON" benchmarks/generation.py "$STORIES"/{model,pruned{30,50}/export} | tee "$STORIES/generation.md"
for name in model control/export pruned{10_taught,30,30_long,50,50_taught}/export; do
    echo "== $name"
    "$PYTHON" -c "
import geta_hf
from transformers import pipeline
tell = pipeline('text-generation', '$STORIES/$name')
print(tell('Once upon a time', max_new_tokens=120, do_sample=False)[0]['generated_text'])"
done | tee "$STORIES/stories.txt"
