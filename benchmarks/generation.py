"""Tokens a second of language models' folders that take turns in one process: greedy, with cache.

    python benchmarks/generation.py runs/dense runs/half/export [--batch 1] [--prompt 32] [--tokens 64]

Every folder is measured as it stands and, where it holds quantized weights, by integer products as well. The last
column is the median over turns of the ratio to the first folder.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from geta_hf.costs.model_costs import bytes_on_disk
from geta_hf.inference import load_for_inference
from geta_hf.utils.tables import format_table


def ways_of(folder: str, device: str) -> dict[str, Any]:
    """Return the models that a folder gives, by what to call them."""
    plain: Any = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    if getattr(plain.config, "quantization_config", None) is None:
        return {folder: plain}
    integers, _ = load_for_inference(AutoModelForCausalLM, folder, "int8")
    return {folder: plain, f"{folder}, int8": integers.to(device)}


def seconds(call: Callable[[], Tensor], tokens: int) -> float:
    """Time one generation. A model that stops early would be timed on less work."""
    start = time.perf_counter()
    if call().shape[1] != tokens:
        raise RuntimeError("generation stopped early")
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see this file's head."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="the first is what the others are compared with")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=32, help="tokens, drawn at random")
    parser.add_argument("--tokens", type=int, default=64, help="to generate")
    parser.add_argument("--repeats", type=int, default=10, help="times that all folders take their turn")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    chosen = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    models = {way: model for folder in chosen.folders for way, model in ways_of(folder, chosen.device).items()}
    smallest = min(model.config.vocab_size for model in models.values())
    prompt = torch.randint(3, smallest, (chosen.batch, chosen.prompt), device=chosen.device)
    fixed = {"max_new_tokens": chosen.tokens, "min_new_tokens": chosen.tokens, "do_sample": False, "pad_token_id": 0}
    calls = {way: partial(model.generate, prompt, **fixed) for way, model in models.items()}
    times: dict[str, list[float]] = {way: [] for way in calls}
    for turn in range(chosen.repeats + 1):
        for way, call in calls.items():
            spent = seconds(call, chosen.prompt + chosen.tokens)
            if turn:  # the first one warms up
                times[way].append(spent)
    first = next(iter(times.values()))
    rows = [
        (
            way,
            f"{bytes_on_disk(way.split(', ')[0]) / 1e6:,.2f}",
            f"{chosen.batch * chosen.tokens / statistics.median(values):,.1f}",
            f"{statistics.median(a / b for a, b in zip(first, values, strict=True)):.2f}",
        )
        for way, values in times.items()
    ]
    print(f"python benchmarks/generation.py {' '.join(argv or sys.argv[1:])}\n")
    print(format_table(("folder", "weights, MB", "tokens/s", "over the first"), rows))


if __name__ == "__main__":
    main()
