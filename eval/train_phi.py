"""Train a small Phi from scratch, to measure the cost of compressing a language model without a network.

    python -m eval.train_phi runs/phi --texts squad/train-v1.1.json.gz gutenberg/*.txt.gz tinystories/*.txt.gz

Texts are plain files, SQuAD files (their paragraphs), or either of them gzipped. The folder receives `train.txt` and
`held_out.txt` (documents with a blank line between them), `model` (with a tokenizer trained on the same text), and
`checkpoints`, from which an interrupted run continues.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from eval.study_tasks import Blocks
from geta_hf.evaluation import read_text

END = "<|endoftext|>"
HEAD_DIM = 32


def documents(path: Path) -> Iterator[str]:
    """Yield the paragraphs of a SQuAD file, or of a text, whose lines are joined; stories end at `<|endoftext|>`."""
    text = read_text(path)
    if ".json" in path.suffixes:
        pieces = [p["context"] for article in json.loads(text)["data"] for p in article["paragraphs"]]
    elif END in text:
        pieces = text.split(END)
    else:
        pieces = re.split(r"\n\s*\n", text)
    for piece in pieces:
        plain = " ".join(piece.split())
        if len(plain) > 20:  # headings and page numbers teach nothing
            yield plain


def split_texts(paths: Sequence[Path], folder: Path, held_out: float) -> tuple[Path, Path]:
    """Write `train.txt` and `held_out.txt`: the last `held_out` (a share) of every source is never trained on."""
    parts: tuple[list[str], list[str]] = ([], [])
    for path in paths:
        found = list(documents(path))
        border = round(len(found) * (1 - held_out))
        parts[0].extend(found[:border])
        parts[1].extend(found[border:])
    random.Random(0).shuffle(parts[0])
    files = folder / "train.txt", folder / "held_out.txt"
    for file, part in zip(files, parts, strict=True):
        file.write_text("\n\n".join(part) + "\n", encoding="utf-8")
    return files


def train_tokenizer(text: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE without a padding token, like Phi's own tokenizer."""
    learner = ByteLevelBPETokenizer()
    learner.train([str(text)], vocab_size=vocabulary, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=learner._tokenizer, bos_token=END, eos_token=END, unk_token=END)


def read_blocks(text: Path, tokenizer: PreTrainedTokenizerFast, block: int) -> torch.Tensor:
    """Read all documents, each after an end-of-text token, split into sequences: int64, shape (sequences, block)."""
    pieces = text.read_text(encoding="utf-8").strip().split("\n\n")
    ids = [token for encoded in tokenizer(pieces)["input_ids"] for token in (tokenizer.eos_token_id, *encoded)]
    return torch.tensor(ids[: len(ids) // block * block]).view(-1, block)


def phi_config(tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int, positions: int) -> PhiConfig:
    """Configure a small Phi-2: heads of 32, four times as many MLP channels, nothing tied, no dropout."""
    return PhiConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD_DIM,
        max_position_embeddings=positions,
        resid_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def training_arguments(options: argparse.Namespace) -> TrainingArguments:
    """Return arguments with cosine decay to a tenth, bf16 autocast, a checkpoint every few minutes."""
    return TrainingArguments(
        output_dir=str(options.folder / "checkpoints"),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=100,
        weight_decay=0.1,
        adam_beta2=0.95,
        optim="adamw_torch_fused",
        bf16=True,
        torch_compile=options.compile,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_drop_last=True,
        save_steps=200,
        save_total_limit=1,
        logging_steps=50,
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write; an interrupted run continues there")
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="files to learn from")
    parser.add_argument("--held_out", type=float, default=0.02, help="share of every file to hold out")
    parser.add_argument("--vocabulary", type=int, default=8192, help="tokens of the tokenizer")
    parser.add_argument("--hidden", type=int, default=256, help=f"width, a multiple of {HEAD_DIM}")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--block", type=int, default=256, help="tokens a sequence")
    parser.add_argument("--batch_size", type=int, default=16, help="sequences a step")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    options = parser.parse_args(argv)

    options.folder.mkdir(parents=True, exist_ok=True)
    set_seed(0)
    text, _ = split_texts(options.texts, options.folder, options.held_out)
    tokenizer = train_tokenizer(text, options.vocabulary)
    tokens = read_blocks(text, tokenizer, options.block)
    model = PhiForCausalLM(phi_config(tokenizer, options.hidden, options.layers, 2 * options.block))
    arguments = training_arguments(options)
    print(f"{model.num_parameters():,} parameters, {tokens.numel():,} tokens an epoch", flush=True)

    trainer = Trainer(model, arguments, train_dataset=Blocks(tokens), data_collator=default_data_collator)
    checkpoints = Path(str(arguments.output_dir))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None)
    unfinished = options.folder / "model_unfinished"  # renamed when complete, so that no reader gets half a model
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    shutil.rmtree(options.folder / "model", ignore_errors=True)
    unfinished.rename(options.folder / "model")


if __name__ == "__main__":
    main()
