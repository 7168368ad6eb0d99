"""What rounding the vocabulary's embedding costs and saves: one table of bytes, memory and SQuAD scores.

    python -m benchmarks.embeddings --model DIR --data dev-v1.1.json --limit 1000

The model's layers are quantized after training, at `--bits` bits, so that nothing but the embedding differs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from geta_hf import attach_quantizers, export
from geta_hf.evaluation.squad import predict, score
from geta_hf.evaluation.squad_features import load_questions, sample
from geta_hf.qadg import PruningSpace
from geta_hf.utils.tables import format_table

NOTHING = PruningSpace(())


def resident_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of a loaded model's tensors, each once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see this file's head."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="a fine-tuned question answering model")
    parser.add_argument("--data", required=True, help="SQuAD v1.1 file, .json or .json.gz")
    parser.add_argument("--limit", type=int, default=1000, help="a random sample of so many questions")
    parser.add_argument("--bits", type=int, default=8, help="of all other quantized layers")
    parser.add_argument("--embedding_bits", type=int, nargs="+", default=[8, 6, 4, 3])
    args = parser.parse_args(argv)
    questions, tokenizer = sample(load_questions(args.data), args.limit), AutoTokenizer.from_pretrained(args.model)
    rows = []
    for bits in (None, *args.embedding_bits):
        model = AutoModelForQuestionAnswering.from_pretrained(args.model)
        attach_quantizers(model, initial_bits=args.bits, target_bits=args.bits)
        with tempfile.TemporaryDirectory() as home:
            batch = {"input_ids": torch.arange(5, 37).view(2, 16)}
            report = export(model, Path(home) / "out", space=NOTHING, batch=batch, embedding_bits=bits)
            small = AutoModelForQuestionAnswering.from_pretrained(report.path)
        found = score(predict(small, tokenizer, questions, 320, progress=False), questions)
        sizes = (f"{report.file_bytes / 1e6:.2f}", f"{resident_bytes(small) / 1e6:.2f}")
        rows.append((str(bits or "32, float"), *sizes, f"{found['f1']:.2f}", f"{found['em']:.2f}"))
        print(rows[-1], file=sys.stderr, flush=True)
    print(f"python -m benchmarks.embeddings {' '.join(argv or sys.argv[1:])}\n")
    print(format_table(("embedding bits", "file, MB", "in memory, MB", "F1", "EM"), rows))


if __name__ == "__main__":
    main()
