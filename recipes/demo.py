"""Train a small BERT on generated questions, compress it, and compare both: `make demo`.

    python recipes/demo.py [folder, default runs/demo]

The same recipe as for SQuAD, `recipes/question_answering.py`, runs twice: dense from scratch, then from that with GETA
to half of all groups and 4 to 8 bits. Everything is written to the folder. The picture that belongs to the compressed
model's card shows what remains of every layer, and `report.html` all that is known of that model.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from geta_hf import write_card, write_report
from geta_hf.export.export import PICTURE_NAME
from geta_hf.recipes import CONFIGS, demo_data, question_answering
from geta_hf.reporting.comparison import compare
from geta_hf.utils.quiet import quiet

CONFIG = CONFIGS / "demo.yaml"
COMPRESSED_EPOCHS = 3
TOKENS = 64  # about one question with its paragraph


def run(folder: Path, model: Path, output: str, *overrides: str) -> dict[str, Any]:
    """Run the recipe on the demo's data."""
    files = ["--train_file", str(folder / "train.json"), "--eval_file", str(folder / "dev.json")]
    paths = ["--model_name_or_path", str(model), "--output_dir", str(folder / output)]
    return question_answering.main([str(CONFIG), *files, *paths, *overrides])


def main(folder: Path) -> None:
    """Write the data, train dense and compressed, print the table, and write card, picture and report."""
    torch.set_num_threads(1)  # more gain little for a model as small as this, and cost much on shared cores
    demo_data.write(folder)
    dense = run(folder, folder / "model", "dense")
    compressed = run(
        folder,
        folder / "dense" / "export",
        "compressed",
        *("--num_train_epochs", str(COMPRESSED_EPOCHS), "--learning_rate", "1e-3"),
        *("--geta.target_sparsity", "0.5", "--geta.bits", "[4, 8]"),
    )
    metrics = {
        "dense": {"em": dense["em"], "f1": dense["f1"]},
        "compressed": {"em": compressed["em"], "f1": compressed["f1"]},
    }
    exported = folder / "compressed" / "export"
    print("\n" + compare(folder / "dense" / "export", exported, tokens=TOKENS, metrics=metrics))
    write_card(exported, task="question-answering", metrics=metrics)  # the recipe has named the data
    print(f"\npicture: {exported / PICTURE_NAME}")
    print(f"report:  {write_report(exported, folder / 'report.html', folder / 'dense' / 'export')}")


if __name__ == "__main__":
    with quiet():
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))
