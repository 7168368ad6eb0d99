"""Measure the peak memory of `geta_hf.compress(..., gradients=False)` against what it is meant to take.

    python benchmarks/compress_memory.py [--model 0.3B 1B] [--target 50%] [--sequences 16] [--length 256]
    python benchmarks/compress_memory.py --model 7B      # needs about 24 GB of memory, and as much disk as the weights

Models are Llamas in bf16 with random weights, data are random tokens, and each model has a process of its own. What is
meant is: the dense weights, the covariances and the workspace of one block, the activations of the calibration data,
and 0.8 GB for everything else, with the interpreter and torch. That is what `compress` foresees, see
`geta_hf.methods.one_shot.memory`.

What counts is what the system cannot take back: the highest `RssAnon` while `compress` runs, sampled every 10 ms (Linux
only). `VmHWM` has the pages of mapped files too, such as those of the folder while it is proved, and stands beside it.
Disk holds a copy of the dense weights, in the folder for temporary files (TMPDIR), which must not be in memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.append(str(Path(__file__).resolve().parent.parent))
from geta_hf import compress
from geta_hf.methods.one_shot import method
from geta_hf.methods.one_shot.memory import MemoryPlan
from geta_hf.utils.tables import format_table

SHAPES = {
    # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "0.1B": (768, 2048, 12, 12, 4, 16000),
    "0.3B": (1024, 2816, 24, 16, 8, 32000),
    "1B": (2048, 5632, 22, 32, 4, 32000),
    "7B": (4096, 11008, 32, 32, 32, 32000),
}
PAUSE = 0.01


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=SHAPES, default=["0.3B", "1B"])
    parser.add_argument("--target", default="50%", help="target_bytes; from 25%% on nothing is removed, as a rule")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # one measurement in this process
    return parser.parse_args()


def make_model(name: str) -> Any:
    """Return a Llama of random bf16 weights, which are never held in fp32."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def status_bytes(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


@contextmanager
def peak_of(field: str) -> Iterator[list[int]]:
    """Sample a field in a thread; the list has its highest value, in bytes, once the context has ended."""
    highest = [status_bytes(field)]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(PAUSE):
            highest[0] = max(highest[0], status_bytes(field))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield highest
    finally:
        done.set()
        thread.join()


@contextmanager
def plans_noted() -> Iterator[list[MemoryPlan]]:
    """Note what `compress` foresees."""
    plans: list[MemoryPlan] = []
    foresee = method.foresee_memory

    def note(*args: Any) -> MemoryPlan:
        plans.append(foresee(*args))
        return plans[-1]

    with mock.patch.object(method, "foresee_memory", note):
        yield plans


def run_once(name: str, target: str, sequences: int, length: int) -> dict[str, Any]:
    """Compress one model in this process; return bytes foreseen and measured, and what was done."""
    model = make_model(name)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    ids = torch.randint(0, model.config.vocab_size, (sequences, length))
    batches = [{"input_ids": rows, "labels": rows} for rows in ids.split(1)]
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is now the present size
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as home, plans_noted() as plans, peak_of("RssAnon") as highest:
        report = compress(model, batches, out=f"{home}/small", target_bytes=target, gradients=False, progress=False)
    return {
        "model": name,
        "parameters": parameters,
        "target": target,
        "tokens": ids.numel(),
        "removed_groups": report.removed_groups,
        "mean_bits": report.mean_bits,
        "seconds": time.perf_counter() - start,
        "meant": plans[0].total,
        "measured": highest[0],
        "with_mapped_files": status_bytes("VmHWM"),
        **dataclasses.asdict(plans[0]),
    }


def run_alone(name: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Run `run_once` in a fresh process."""
    command = [sys.executable, __file__, "--alone", "--model", name]
    for option in ("target", "sequences", "length", "threads"):
        command += [f"--{option}", str(getattr(chosen, option))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def row(record: dict[str, Any]) -> tuple[str, ...]:
    """Return a record's row of the table, in GB."""
    parts = ("weights", "covariances", "workspace", "activations", "other", "meant", "measured", "with_mapped_files")
    return (record["model"], str(record["removed_groups"]), *(f"{record[part] / 1e9:.2f}" for part in parts))


def main() -> None:
    chosen = options()
    torch.set_num_threads(chosen.threads)
    if chosen.alone:
        print(json.dumps(run_once(chosen.model[0], chosen.target, chosen.sequences, chosen.length)))
        return
    records = []
    for name in chosen.model:
        records.append(run_alone(name, chosen))
        print(json.dumps(records[-1]), flush=True)
    header = ("GB", "groups removed", "weights", "covariances", "workspace", "activations", "other", "meant")
    print()
    print(format_table((*header, "measured", "with mapped files"), [row(record) for record in records]))


if __name__ == "__main__":
    main()
