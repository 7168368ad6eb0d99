"""Foreseen memory beside measured memory: a short training of a Phi-shaped model through every stage.

    python benchmarks/memory_plan.py [--device cpu|cuda] [--hidden 1024] [--layers 4] [--rows 4] [--length 256]
        [--setting NAME ...]

Every setting runs in a process of its own. What counts is the highest level of `trainer.train()` above what the process
held before the model was made, where one layer of it has gone the same way already, so that libraries are loaded and
kernels compiled. On CPU that is resident memory, with an allocator told to give every large block back at once
(MALLOC_MMAP_THRESHOLD_), without which it keeps some; on CUDA what torch allocated. The same is given for the time
before, while GETATrainer is made; the last column is the highest level of the export, which no plan foresees.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PhiConfig, PhiForCausalLM, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.memory import peak_bytes
from geta_hf import GETAConfig, GETATrainer, dry_run
from geta_hf.utils.tables import format_table

SETTINGS: dict[str, dict[str, Any]] = {
    "fp32-adamw": {"optim": "adamw_torch"},
    "fp32-adamw-checkpointing": {"optim": "adamw_torch", "checkpointing": True},
    "bf16-adamw": {"optim": "adamw_torch", "bf16": True},
    "bf16-adafactor": {"optim": "adafactor", "bf16": True},
    "bf16-adafactor-checkpointing": {"optim": "adafactor", "bf16": True, "checkpointing": True},
    "bf16-sgd-distilled": {"optim": "sgd", "bf16": True, "distill": 1.0},
    "bf16-weights-adafactor": {"optim": "adafactor", "bf16": True, "dtype": "bfloat16"},
    "fp32-adafactor-accumulated": {"optim": "adafactor", "accumulate": 2},
}
HEADER = ("setting", "training, MB", "foreseen", "ratio", "before, MB", "foreseen", "ratio", "export, MB")


def model_config(hidden: int, layers: int, vocabulary: int, dtype: str) -> PhiConfig:
    """Return Phi's proportions at another size."""
    return PhiConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        dtype=dtype,
    )


def make_trainer(config: PhiConfig, rows: int, length: int, setting: dict[str, Any], out: str) -> GETATrainer:
    """Prepare a run of one step each of warm-up, projection and cool-down, and four of the joint stage."""
    torch.manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (7 * setting.get("accumulate", 1) * rows, length))
    checkpointing = {name: setting.get("checkpointing", False) for name in (checkpointing_field(),)}
    args = TrainingArguments(
        out,
        max_steps=7,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=setting.get("accumulate", 1),
        optim=setting["optim"],
        bf16=setting.get("bf16", False),
        use_cpu=setting["device"] == "cpu",
        report_to="none",
        save_strategy="no",
        logging_steps=100,
        disable_tqdm=True,
        **checkpointing,
    )
    limits = GETAConfig(
        target_sparsity=0.3,
        bits=(4, 16),
        mean_bits=8,
        warmup=1,
        projection=1,
        joint=4,
        projection_periods=1,
        pruning_periods=2,
        distill_logits=setting.get("distill", 0.0),
    )
    dataset = [{"input_ids": row, "labels": row} for row in ids]
    model = PhiForCausalLM._from_config(config, dtype=getattr(torch, setting.get("dtype", "float32")))
    return GETATrainer(model, args, geta_config=limits, train_dataset=dataset)


def checkpointing_field() -> str:
    """Return Trainer's name for activation checkpointing, which has changed."""
    known = TrainingArguments.__dataclass_fields__
    return "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"


def measure(options: argparse.Namespace, setting: dict[str, Any]) -> dict[str, int]:
    """Run one setting in this process; bytes foreseen, measured, and measured while the trainer was made."""
    setting = {**setting, "device": options.device}
    with tempfile.TemporaryDirectory() as out:
        dtype = setting.get("dtype", "float32")
        make_trainer(model_config(options.hidden, 1, 1024, dtype), 2, 32, setting, out).train()
        before = level(options.device)
        config = model_config(options.hidden, options.layers, options.vocabulary, dtype)
        restart_peak(options.device)
        trainer = make_trainer(config, options.rows, options.length, setting, out)
        made = peak_bytes(options.device) - before
        restart_peak(options.device)
        trainer.train()
        trained = peak_bytes(options.device) - before
        restart_peak(options.device)
        trainer.export_model(Path(out) / "export")
        exported = peak_bytes(options.device) - before
    ids = torch.zeros(options.rows, options.length, dtype=torch.long)
    plain = PhiForCausalLM._from_config(config, dtype=getattr(torch, dtype))
    foreseen = dry_run(plain, {"input_ids": ids, "labels": ids}, trainer.args, trainer.geta_config)
    print(foreseen.memory, file=sys.stderr)
    step = max(foreseen.memory.backward.total, foreseen.memory.step.total)
    levels = {"made": made, "trained": trained, "exported": exported}
    return {**levels, "training": step, "before": foreseen.memory.preparation.total}


def level(device: str) -> int:
    """Return the bytes that this process holds now, once all that is free was given back."""
    gc.collect()
    if device == "cuda":
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition("VmRSS:")[2].split()[0])


def restart_peak(device: str) -> None:
    """Let the highest level start from the present one."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def in_child(options: argparse.Namespace, name: str) -> dict[str, int]:
    """Run `measure` in a process of its own."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": str(1 << 16)}
    sizes = ("device", "hidden", "layers", "vocabulary", "rows", "length")
    arguments = [word for size in sizes for word in (f"--{size}", str(getattr(options, size)))]
    command = [sys.executable, __file__, *arguments, "--child", name]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def beside(found: dict[str, int], measured: str, foreseen: str) -> tuple[str, ...]:
    """Return the cells: measured, foreseen, and their ratio."""
    sizes = found[measured], found[foreseen]
    return (*(f"{size / 1e6:,.0f}" for size in sizes), f"{sizes[1] / sizes[0]:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    for name, default in (("hidden", 1024), ("layers", 4), ("vocabulary", 16384), ("rows", 4), ("length", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options, SETTINGS[options.child])))
        return
    rows: list[tuple[str, ...]] = []
    for name in options.setting:
        found = in_child(options, name)
        rows.append((name, *beside(found, "trained", "training"), *beside(found, "made", "before")))
        rows[-1] += (f"{found['exported'] / 1e6:,.0f}",)
        print(rows[-1], file=sys.stderr, flush=True)
    print(format_table(HEADER, rows))


if __name__ == "__main__":
    main()
