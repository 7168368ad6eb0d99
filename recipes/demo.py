"""`make demo`: trains a small BERT on generated questions, compresses it, and shows both side by side.

    python recipes/demo.py [folder, default runs/demo]

The same recipe as for SQuAD, `recipes/question_answering.py`, runs twice: dense from scratch, then from that with GETA
to half of all groups and 4 to 8 bits. Everything lands in the folder; `structure.png` shows what is left of every
layer, and `report.html` all that is known of the compressed model.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from geta_hf import write_card, write_report
from geta_hf.reporting import comparison as report
from recipes import demo_data
from recipes import question_answering as bert_squad

CONFIG = Path(__file__).parent / "configs" / "demo.yaml"
COMPRESSED_EPOCHS = 3
TOKENS = 64  # about one question with its paragraph


def run(folder: Path, model: Path, output: str, *overrides: str) -> dict[str, Any]:
    """One run of the recipe on the demo's data."""
    files = ["--train_file", str(folder / "train.json"), "--eval_file", str(folder / "dev.json")]
    paths = ["--model_name_or_path", str(model), "--output_dir", str(folder / output)]
    return bert_squad.main([str(CONFIG), *files, *paths, *overrides])


def main(folder: Path) -> None:
    """Writes the data, trains dense and compressed, prints the table and saves the picture."""
    torch.set_num_threads(1)  # so small a model gains little from more, and loses much where others use the cores
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
        name: {"em": results["em"], "f1": results["f1"]}
        for name, results in (("dense", dense), ("compressed", compressed))
    }
    exported = folder / "compressed" / "export"
    print("\n" + report.compare(folder / "dense" / "export", exported, tokens=TOKENS, metrics=metrics))
    write_card(exported, task="question-answering", dataset="generated questions", metrics=metrics)
    print(f"\npicture: {report.plot_structure(exported, folder / 'structure.png')}")
    print(f"report:  {write_report(exported, folder / 'report.html', folder / 'dense' / 'export')}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))
