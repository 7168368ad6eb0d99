"""What LoRA saves in memory and costs in quality beside the full-parameter run: one table.

    python benchmarks/lora.py [--model FOLDER --texts TRAIN.txt [--held_out HELD_OUT.txt]] [--steps 200] [--rank 8]
        [--learning_rate 1e-4 --lora_learning_rate 1e-3] [--target_sparsity 0.3] [--distill 1.0] [--device cpu|cuda]

Each run is alone in a process of its own: the whole compression through GETATrainer, then the loss on held-out blocks.
Memory is the highest level above the one after imports; optimizer state is counted. Without a folder a small Phi with
random weights learns a synthetic language, which says nothing about quality. What is held out is a file, or else the
last tenth of the texts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PhiConfig, PhiForCausalLM, TrainingArguments, set_seed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.memory import peak_bytes
from geta_hf import GETAConfig, GETATrainer
from geta_hf.utils.tables import format_table

METHODS = ("full", "lora")
VOCABULARY = 512
Rows = list[dict[str, torch.Tensor]]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a causal LM with its tokenizer; default: a random Phi")
    parser.add_argument("--texts", type=Path, nargs="+", help="plain text to train on; needs --model for its tokenizer")
    parser.add_argument("--held_out", type=Path, nargs="+", help="plain text to measure the loss on")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="of the full-parameter run")
    parser.add_argument("--lora_learning_rate", type=float, default=1e-3)
    parser.add_argument("--target_sparsity", type=float, default=0.3)
    parser.add_argument("--bits", type=int, nargs=2, default=(4, 8))
    parser.add_argument("--distill", type=float, default=0.0, help="weight of the dense model's logits in the loss")
    parser.add_argument("--layers", type=int, default=8, help="of the random Phi")
    parser.add_argument("--hidden", type=int, default=512, help="of the random Phi")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--alone", choices=METHODS, help=argparse.SUPPRESS)  # what a process is told
    return parser.parse_args()


def make_model(chosen: argparse.Namespace) -> Any:
    if chosen.model is not None:
        return AutoModelForCausalLM.from_pretrained(chosen.model)
    set_seed(0)
    size = {"num_hidden_layers": chosen.layers, "hidden_size": chosen.hidden, "intermediate_size": 4 * chosen.hidden}
    return PhiForCausalLM(PhiConfig(vocab_size=VOCABULARY, num_attention_heads=chosen.hidden // 64, **size))


def tokens_of(chosen: argparse.Namespace, paths: list[Path]) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    return torch.tensor(tokenizer(text, return_attention_mask=False)["input_ids"])


def synthetic_tokens(count: int) -> torch.Tensor:
    """Make tokens each of which is followed by one of four, so that there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    next_tokens = torch.randint(0, VOCABULARY, (VOCABULARY, 4), generator=generator)
    choice, token, found = torch.randint(0, 4, (count,), generator=generator).tolist(), 0, []
    for which in choice:
        found.append(token)
        token = int(next_tokens[token, which])
    return torch.tensor(found)


def make_rows(chosen: argparse.Namespace) -> tuple[Rows, Rows]:
    """Return blocks to train on, as many as are used, and up to 256 that are held out."""
    ids = synthetic_tokens(chosen.length * 2000) if chosen.texts is None else tokens_of(chosen, chosen.texts)
    end = len(ids) if chosen.held_out else len(ids) * 9 // 10
    held_out = tokens_of(chosen, chosen.held_out) if chosen.held_out else ids[end:]
    blocks, others = (part[: len(part) // chosen.length * chosen.length] for part in (ids[:end], held_out))
    rows = [[{"input_ids": ids, "labels": ids} for ids in part.view(-1, chosen.length)] for part in (blocks, others)]
    return rows[0], rows[1][:256]


def run_alone(chosen: argparse.Namespace, folder: str) -> dict[str, float]:
    """Run one compression in this process."""
    before, lora = peak_bytes(chosen.device), chosen.alone == "lora"
    model, (rows, held_out) = make_model(chosen), make_rows(chosen)
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=chosen.steps,
        per_device_train_batch_size=chosen.batch,
        per_device_eval_batch_size=chosen.batch,
        learning_rate=chosen.lora_learning_rate if lora else chosen.learning_rate,
        save_strategy="no",
        logging_steps=max(chosen.steps // 10, 1),
        report_to="none",
        disable_tqdm=True,
        use_cpu=chosen.device == "cpu",
        seed=1,
    )
    config = GETAConfig(target_sparsity=chosen.target_sparsity, bits=tuple(chosen.bits), distill_logits=chosen.distill)
    trainer = GETATrainer(model, arguments, geta_config=config, train_dataset=rows, peft_config=_lora(chosen, lora))
    dense = trainer.evaluate(held_out)["eval_loss"]
    seconds = trainer.train().metrics["train_runtime"]
    peak = peak_bytes(chosen.device) - before
    assert trainer.qasso is not None
    state = [value for kept in trainer.qasso.state.values() for value in kept.values()]
    return {
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "state": sum(value.nbytes for value in state if isinstance(value, torch.Tensor)),
        "peak": peak,
        "seconds": seconds / chosen.steps,
        "before": dense,
        "loss": trainer.evaluate(held_out)["eval_loss"],
        "groups": trainer.qasso.removed_groups,
    }


def _lora(chosen: argparse.Namespace, wanted: bool) -> Any:
    from peft import LoraConfig  # in both runs, so that both have imported the same

    if not wanted:
        return None
    return LoraConfig(r=chosen.rank, lora_alpha=2 * chosen.rank, target_modules="all-linear", task_type="CAUSAL_LM")


def main() -> None:
    chosen = options()
    if chosen.texts is not None and chosen.model is None:
        sys.exit("--texts needs --model, whose tokenizer reads them")
    if chosen.alone:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(run_alone(chosen, folder)))
        return
    rows = []
    for method in chosen.methods:
        command = [sys.executable, __file__, *sys.argv[1:], "--alone", method]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        sizes = [f"{found[name] / 2**20:,.0f} MiB" for name in ("state", "peak")]
        losses = [f"{found[name]:.4f}" for name in ("before", "loss")]
        label = f"LoRA, rank {chosen.rank}" if method == "lora" else "all parameters"
        rows.append((label, f"{found['parameters']:,}", *sizes, f"{found['seconds']:.2f} s", *losses))
    header = ("trained", "parameters", "optimizer state", "peak memory", "step", "loss at 16 bits", "loss compressed")
    print(format_table(header, rows))


if __name__ == "__main__":
    main()
