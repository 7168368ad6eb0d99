"""How fast a compressed model is beside the dense one it was made of, how close each path is, and what memory it takes.

    python benchmarks/inference.py [--device cpu|cuda] [--sizes NAME ...] [--batches 1 8] [--lengths 128 384]
        [--repeats 20] [--threads N] [--cpu-time] [--no-compile]
        [--no-memory]

Half of the groups of every model are removed, another number in every layer, and weights have 4 to 8 bits; its values
are random, since speed does not ask for them. All ways take turns in one process on the same batch, and the table
gives the median of the ratios over dense fp32 and dense bf16, so that a noisy machine disturbs all alike. Errors are
those of the outputs relative to the float path of the same model. Memory: each way runs alone in a process of its own,
loading its folder and running one batch of one row; its highest level counts, less that after imports, and less that
after a tiny model has run the same way, which takes the code and libraries that any model takes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, BertModel, PhiConfig, PhiForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.memory import peak_bytes
from geta_hf import attach_quantizers, build_space
from geta_hf.export.export import compress
from geta_hf.inference import load_for_inference, prepare_for_inference
from geta_hf.qadg import PruningSpace, zero_groups
from geta_hf.quantization import quantized_layers, step_size
from geta_hf.utils.tables import format_table

SIZES: dict[str, dict[str, Any]] = {
    "bert-smoke": {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 64},
    "phi-smoke": {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 64},
    "minilm": {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
    "bert-base": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
    "phi-1.3b": {"num_hidden_layers": 24, "hidden_size": 2048, "num_attention_heads": 32, "intermediate_size": 8192},
}
DEFAULT_SIZES = {"cpu": ["minilm", "bert-base"], "cuda": ["minilm", "bert-base", "phi-1.3b"]}
MEMORY_WAYS = ("dense", "float", "int8")
MEMORY_HEADER = ("model", "way", "above imports", "over dense", "above a tiny model's run", "over dense")
TINY = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 100}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=DEFAULT_SIZES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="default: those of the device")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 384])
    parser.add_argument("--repeats", type=int, default=20, help="times that all ways take their turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="of the process, for a machine others use too")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="eager alone")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="time alone")
    parser.add_argument("--alone", nargs="+", help=argparse.SUPPRESS)  # what a memory process is told: way and folders
    return parser.parse_args()


# --- models -----------------------------------------------------------------------------------------------------------


def make_dense(size: str, **changes: int) -> PreTrainedModel:
    torch.manual_seed(0)
    phi = size.startswith("phi")
    sizes: dict[str, Any] = {**SIZES[size], **changes}
    model: Any = PhiForCausalLM(PhiConfig(**sizes)) if phi else BertModel(BertConfig(**sizes))
    return model.to(torch.bfloat16 if phi else torch.float32).eval()


@torch.no_grad()
def make_small(dense: PreTrainedModel) -> PreTrainedModel:
    """Return the dense model (which is changed) without half of its groups, and with weights of 4 to 8 bits."""
    batch = {"input_ids": torch.randint(3, dense.config.vocab_size, (1, 16))}
    space = build_space(dense, batch)
    zero_half(dense, space)
    attach_quantizers(dense)
    for place, layer in enumerate(quantized_layers(dense).values()):
        quantizer = layer.weight_quantizer
        quantizer.d.copy_(step_size(4 + place % 5, quantizer.q_m, quantizer.t))
    zero = zero_groups(dense, space)
    return compress(dense, space, {family.name: zero[family.name] for family in space.prunable}, batch)


def zero_half(model: nn.Module, space: PruningSpace) -> None:
    """Set 40 to 60 % of the groups of each family to zero, half of all."""
    tensors = model.state_dict()
    for place, family in enumerate(space.prunable):
        share = 0.4 + 0.1 * (place // 2 % 3)
        chosen = torch.randperm(family.size)[: round(share * family.size)]
        for member in family.members:
            tensors[member.tensor].index_fill_(member.dim, member.index[chosen].flatten(), 0.0)


def make_folders(size: str, home: Path, **changes: int) -> None:
    dense = make_dense(size, **changes)
    dense.save_pretrained(home / "dense")
    make_small(dense).save_pretrained(home / "small")


def load(way: str, home: Path, device: str = "cpu") -> PreTrainedModel:
    """Load `dense`, or the small one by `float`, `auto` or `int8`; in bfloat16 where the way ends in `bf16`."""
    model_class: Any = PhiForCausalLM if "phi" in home.name else AutoModel
    kind, _, half = way.partition(" ")
    dtype: dict[str, Any] = {"dtype": torch.bfloat16 if half else "auto"}
    if kind == "dense":
        return model_class.from_pretrained(home / kind, **dtype).to(device).eval()
    if device == "cpu":
        return load_for_inference(model_class, home / "small", kind, **dtype)[0]
    model = model_class.from_pretrained(home / "small", **dtype).to(device).eval()
    prepare_for_inference(model, kind)
    return model


# --- time -------------------------------------------------------------------------------------------------------------


def seconds(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    call()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return clock() - start


def take_turns(calls: Mapping[str, Callable[[], Any]], chosen: argparse.Namespace) -> dict[str, list[float]]:
    for call in calls.values():
        for _ in range(2):
            call()
    times: dict[str, list[float]] = {way: [] for way in calls}
    clock = time.process_time if chosen.cpu_time else time.perf_counter
    for _ in range(chosen.repeats):
        for way, call in calls.items():
            times[way].append(seconds(call, clock))
    return times


def ratio(times: dict[str, list[float]], over: str, way: str) -> str:
    return f"{statistics.median(a / b for a, b in zip(times[over], times[way], strict=True)):.2f}"


def closeness(found: Tensor | None, expected: Tensor | None) -> tuple[str, str]:
    """Return the relative error and the cosine; nothing to say of a model of other weights."""
    if found is None or expected is None:
        return "", ""
    a, b = found.double().flatten(), expected.double().flatten()
    return f"{float((a - b).norm() / b.norm()):.1e}", f"{float(F.cosine_similarity(a, b, dim=0)):.6f}"


Row = tuple[str, ...]
HEADER = ("model", "batch", "way", "ms", "over fp32", "over bf16", "error", "cosine")


WAYS = {
    "cpu": ("dense", "dense bf16", "float", "float bf16", "int8", "int8 bf16"),
    "cuda": ("dense", "dense bf16", "float bf16", "auto bf16", "int8 bf16"),
}
SMALL = {"cpu": "float", "cuda": "float bf16"}
"""The way whose outputs the others' errors are taken from."""


@torch.no_grad()
def encoder_rows(
    name: str, models: Mapping[str, Any], batch: int, length: int, chosen: argparse.Namespace
) -> list[Row]:
    torch._dynamo.reset()  # or one model after the other would count as another variant of the same code
    inputs = {"input_ids": torch.randint(3, 30000, (batch, length), device=chosen.device)}
    models = dict(models)
    if chosen.compile:
        models |= {f"{way}, compiled": torch.compile(model, dynamic=False) for way, model in models.items()}
    calls = {way: partial(model, **inputs) for way, model in models.items()}
    outputs = {way: call().last_hidden_state for way, call in calls.items()}
    times = take_turns(calls, chosen)
    rows: list[Row] = []
    for way, values in times.items():
        small = None if way.startswith("dense") else outputs[way]
        speed = (f"{1000 * statistics.median(values):.1f}", ratio(times, "dense", way), ratio(times, "dense bf16", way))
        rows.append((name, f"{batch}x{length}", way, *speed, *closeness(small, outputs[SMALL[chosen.device]])))
    return rows


@torch.no_grad()
def generation_rows(name: str, home: Path, batch: int, chosen: argparse.Namespace) -> list[Row]:
    """Measure tokens per second of greedy generation, 64 tokens after 64."""
    models: dict[str, Any] = {way: load(way, home, chosen.device) for way in ("dense", "float", "auto", "int8")}
    inputs = {"input_ids": torch.randint(3, 30000, (batch, 64), device=chosen.device)}
    logits = {way: model(**inputs).logits for way, model in models.items()}
    fixed = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    calls = {way: partial(model.generate, **inputs, **fixed) for way, model in models.items()}
    times = take_turns(calls, chosen)
    rows: list[Row] = []
    for way, values in times.items():
        speed = f"{1000 * statistics.median(values):.0f} ({64 * batch / statistics.median(values):.0f} tokens/s)"
        small = None if way == "dense" else logits[way]
        rows.append(
            (name, f"{batch}x64+64", way, speed, "", ratio(times, "dense", way), *closeness(small, logits["float"]))
        )
    return rows


# --- memory -----------------------------------------------------------------------------------------------------------


def run_alone(way: str, homes: Sequence[Path], device: str) -> int:
    """Return the peak bytes of loading the last model and running a batch in this process, above what preceded that."""
    import torch._dynamo

    for home in homes:
        before = peak_bytes(device)
        model = load(way, home, device)
        with torch.no_grad():
            model(input_ids=torch.ones(1, 128, dtype=torch.int64, device=device))
    return peak_bytes(device) - before


def memory_rows(size: str, home: Path, device: str, threads: int) -> list[Row]:
    """Measure memory above the imports, and above a tiny model's run, whose code and libraries every size takes."""
    tiny = home.with_name(f"{home.name}-tiny")
    make_folders(size, tiny, **TINY)
    peaks: dict[str, list[int]] = {}
    for way, homes in itertools.product(MEMORY_WAYS, ([home], [tiny, home])):
        command = [sys.executable, __file__, "--device", device, "--threads", str(threads), "--alone", way]
        done = subprocess.run([*command, *map(str, homes)], capture_output=True, text=True, check=True)
        peaks.setdefault(way, []).append(json.loads(done.stdout.splitlines()[-1]))
    cells = {way: zip(found, peaks["dense"], strict=True) for way, found in peaks.items()}
    shown = {way: [(f"{a / 2**20:.0f} MiB", f"{a / b:.2f}") for a, b in pairs] for way, pairs in cells.items()}
    return [(size, way, *whole, *own) for way, (whole, own) in shown.items()]


def main() -> None:
    chosen = options()
    warnings.simplefilter("ignore")  # deprecations inside torch's own compiler
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(chosen.threads)
    if chosen.alone:
        print(json.dumps(run_alone(chosen.alone[0], [Path(home) for home in chosen.alone[1:]], chosen.device)))
        return
    where = torch.cuda.get_device_name() if chosen.device == "cuda" else f"CPU, {chosen.threads} threads"
    print(f"python {' '.join(sys.argv)}\n\n{where}, torch {torch.__version__}\n", flush=True)
    speed: list[Row] = []
    memory: list[Row] = []
    for size in chosen.sizes or DEFAULT_SIZES[chosen.device]:
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder) / size
            make_folders(size, home)
            memory += memory_rows(size, home, chosen.device, chosen.threads) if chosen.memory else []
            if size.startswith("phi"):
                for batch in chosen.batches:
                    speed += generation_rows(size, home, batch, chosen)
                continue
            models = {way: load(way, home, chosen.device) for way in WAYS[chosen.device]}
            for length in chosen.lengths:
                for batch in chosen.batches:
                    speed += encoder_rows(size, models, batch, length, chosen)
    print(format_table(HEADER, speed))
    if memory:
        print("\n" + format_table(MEMORY_HEADER, memory))


if __name__ == "__main__":
    main()
