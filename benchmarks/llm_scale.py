"""How long every part of a run takes for a Phi-shaped model of 1.3 or 2.8 billion random weights, and how much memory.

    python benchmarks/llm_scale.py [--size 1.3b|2.8b] [--layers N] [--dtype bf16|fp32] [--device cpu|cuda]
        [--optim sgd|adafactor|adamw_torch] [--gradient_checkpointing] [--batch 1] [--length 128] [--steps 10]
        [--drop_layers N] [--uniform] [--cpu_time] [--out FOLDER]

The whole way in one process: the dependency graph, all that a trainer does before its first step, some steps of every
stage, the export with its proofs, the reload, and 20 new tokens. Peak memory is the highest level within each part: of
the process on a CPU, of what torch allocated on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PhiConfig, PhiForCausalLM, TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.memory import peak_bytes
from geta_hf import GETAConfig, GETATrainer, build_space
from geta_hf.methods.qasso.schedule import STAGES
from geta_hf.utils.tables import format_table

SIZES = {
    "smoke": {
        "num_hidden_layers": 1,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "vocab_size": 1000,
    },
    "1.3b": {"num_hidden_layers": 24, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32},
    "2.8b": {"num_hidden_layers": 32, "hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 32},
}
VOCABULARY, NEW_TOKENS = 51200, 20
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="2.8b")
    parser.add_argument("--layers", type=int, help="fewer than the size has")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--optim", default="sgd", help="any of Trainer's")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10, help="of every stage")
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--uniform", action="store_true")
    parser.add_argument("--drop_layers", type=int, default=0)
    parser.add_argument("--cpu_time", action="store_true", help="of the process, for a machine others use too")
    parser.add_argument("--out", type=Path, help="where the export shall stay; nowhere by default")
    return parser.parse_args()


@dataclass
class Meter:
    """Seconds and peak memory of parts."""

    device: str
    cpu_time: bool = False
    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def reset(self) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the highest level starts anew

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if self.cpu_time else time.perf_counter()

    def note(self, name: str, seconds: float, peak: int | None = None) -> None:
        peak = peak_bytes(self.device) if peak is None else peak
        self.rows.append((name, f"{seconds:.1f}", f"{peak / 2**30:.2f} GiB"))
        print(*self.rows[-1], sep="  ", flush=True)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.reset()
        start = self.now()
        yield
        self.note(name, self.now() - start)


class StageClock(TrainerCallback):
    """Seconds and peak memory of the steps of every stage."""

    def __init__(self, meter: Meter) -> None:
        self.meter, self.start, self.stage = meter, 0.0, ""
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.peaks: dict[str, int] = {}
        self.trainer: Any = None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.stage = self.trainer.qasso.phase.stage
        if self.stage not in self.peaks:
            self.meter.reset()
        self.start = self.meter.now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds[self.stage].append(self.meter.now() - self.start)
        self.peaks[self.stage] = peak_bytes(self.meter.device)


def make_model(chosen: argparse.Namespace) -> PhiForCausalLM:
    shape = {"vocab_size": VOCABULARY, **SIZES[chosen.size], "use_cache": False}
    if chosen.layers:
        shape["num_hidden_layers"] = chosen.layers
    config = PhiConfig(**shape, pad_token_id=0)
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPES[chosen.dtype])
    try:
        with torch.device(chosen.device):
            return PhiForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)


def make_trainer(model: PhiForCausalLM, chosen: argparse.Namespace, folder: str) -> GETATrainer:
    stages = {"warmup": chosen.steps, "projection": chosen.steps, "joint": chosen.steps}
    config = GETAConfig(
        target_sparsity=chosen.sparsity, uniform=chosen.uniform, drop_layers=chosen.drop_layers, **stages
    )
    ids = torch.randint(4, model.config.vocab_size, (chosen.batch * 8, chosen.length))
    arguments = TrainingArguments(
        folder,
        max_steps=4 * chosen.steps,
        per_device_train_batch_size=chosen.batch,
        optim=chosen.optim,
        learning_rate=1e-5,
        **{"gradient_checkpointing": True} if chosen.gradient_checkpointing else {},
        use_cpu=chosen.device == "cpu",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=chosen.steps,
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    return GETATrainer(model, arguments, geta_config=config, train_dataset=rows)


def run(chosen: argparse.Namespace, meter: Meter, folder: str) -> None:
    with meter.part("random weights"):
        model = make_model(chosen)
    print(f"{sum(parameter.numel() for parameter in model.parameters()) / 1e9:.2f} billion parameters")
    ids = torch.randint(4, model.config.vocab_size, (1, 16), device=chosen.device)
    with meter.part("dependency graph alone"):
        build_space(model, {"input_ids": ids})
    with meter.part("trainer made: graph, trial cuts, quantizers, plan"):
        trainer = make_trainer(model, chosen, folder)
    clock = StageClock(meter)
    clock.trainer = trainer
    trainer.add_callback(clock)
    trainer.train()
    for stage in STAGES:
        times = clock.seconds[stage]
        meter.note(f"{len(times)} steps of {stage}", sum(times), clock.peaks[stage])
    trainer.optimizer.zero_grad()
    small = chosen.out or Path(folder) / "small"
    with meter.part("export, with its proofs"):
        report = trainer.export_model(small)
    assert report is not None
    print(f"{report.file_bytes / 2**20:.0f} MiB")
    del model, trainer, clock
    with meter.part("reload"):
        reloaded = AutoModelForCausalLM.from_pretrained(small, dtype=DTYPES[chosen.dtype]).to(chosen.device)
    with meter.part(f"{NEW_TOKENS} new tokens"):
        made = reloaded.generate(ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    assert made.shape[1] == ids.shape[1] + NEW_TOKENS


def main() -> None:
    chosen = options()
    transformers.utils.logging.disable_progress_bar()
    where = torch.cuda.get_device_name() if chosen.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    layers = chosen.layers or SIZES[chosen.size]["num_hidden_layers"]
    print(
        f"Phi of the {chosen.size} width, {layers} layers, {chosen.dtype}, batch {chosen.batch}x{chosen.length}, "
        f"{chosen.optim}, {where}",
        flush=True,
    )
    meter = Meter(chosen.device, chosen.cpu_time)
    with tempfile.TemporaryDirectory() as folder:
        run(chosen, meter, folder)
    print(format_table(("part", "CPU seconds" if chosen.cpu_time else "seconds", "peak memory"), meter.rows))


if __name__ == "__main__":
    main()
