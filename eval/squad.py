"""Print the EM and F1 of a question answering model, compressed or not, on a local SQuAD v1.1 file.

    python eval/squad.py DIR --data dev-v1.1.json.gz

Predictions and scores are those of `geta_hf.evaluation.squad`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from geta_hf import GETAError  # importing geta_hf lets AutoModel load compressed folders
from geta_hf.evaluation.squad import load_folder, predict, score
from geta_hf.evaluation.squad_features import load_questions, sample


def main(argv: Sequence[str] | None = None) -> dict[str, float | int]:
    """Run the command: print EM, F1 and counts as JSON, and return them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", help="folder with a question answering model and its fast tokenizer")
    parser.add_argument("--data", required=True, help="SQuAD v1.1 file, .json or .json.gz")
    parser.add_argument("--limit", type=int, help="number of questions to sample at random (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--max_length", type=int, default=384, help="tokens of a window")
    parser.add_argument("--doc_stride", type=int, default=128, help="tokens that neighboring windows share")
    parser.add_argument("--bf16", action="store_true", help="run under bfloat16 autocast")
    parser.add_argument("--output", type=Path, help="write the predictions to this JSON file")
    args = parser.parse_args(argv)

    questions = sample(load_questions(args.data), args.limit, args.seed)
    model, tokenizer = load_folder(args.folder)
    predictions = predict(
        model, tokenizer, questions, args.max_length, args.doc_stride, args.batch_size, bf16=args.bf16
    )
    if args.output:
        args.output.write_text(json.dumps(predictions, ensure_ascii=False, indent=1), encoding="utf-8")
    scores = score(predictions, questions)
    print(json.dumps(scores))
    return scores


if __name__ == "__main__":
    try:
        main()
    except GETAError as error:
        sys.exit(f"error: {error}")
