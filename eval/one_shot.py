"""Compress a language model without training at several budgets, and measure the loss on other blocks of its text.

A budget is B: bits that are stored for each weight of the original blocks, step sizes counted as they are stored, in
fp32. Everything else, such as the embedding, is not counted. Results are lines of JSON; those that are there are not
run again.

    python -m eval.one_shot --model MODEL --text FILE --work runs/one_shot
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from eval.results_file import append_result, read_results
from geta_hf.costs.ledger import Ledger
from geta_hf.errors import GETAError
from geta_hf.evaluation.texts import read_text
from geta_hf.methods import OneShotConfig, make_method
from geta_hf.methods.one_shot import Calibration
from geta_hf.quantization import detach_quantizers
from geta_hf.surgery.build_space import prepare_space
from geta_hf.training.plan import make_ledger
from geta_hf.training.preparation import empty_copy
from geta_hf.utils.tables import format_table

METHODS: dict[str, dict[str, Any]] = {
    "ours": {},
    "same, unpruned": {"target_sparsity": 0.0},
    "magnitude, to nearest": {"saliency": "magnitude", "compensation": False},
}


def blocks_of(text: str, tokenizer: Any, length: int, separator: str) -> Tensor:
    """Return a text as blocks of tokens, int64, shape (blocks, length)."""
    ids: list[int] = []
    for part in text.split(separator):
        if part.strip():
            ids += tokenizer(part.strip())["input_ids"]
    count = len(ids) // length
    return torch.tensor(ids[: count * length]).view(count, length)


def batches_of(blocks: Tensor, rows: int = 4) -> list[dict[str, Tensor]]:
    """Return blocks as batches with labels."""
    return [{"input_ids": part, "labels": part} for part in blocks.split(rows)]


@torch.no_grad()
def loss_of_each(model: PreTrainedModel, blocks: Tensor) -> Tensor:
    """Return the mean loss of every block, float64, shape (blocks,)."""
    return torch.tensor(
        [float(model(input_ids=row[None], labels=row[None], use_cache=False).loss) for row in blocks]
    ).double()


def bytes_for(ledger: Ledger, bits: float) -> int:
    """Return the size of a file that stores `bits` for each weight of the original blocks, step sizes counted."""
    weights = float(ledger.weights(ledger.nothing).sum())
    scales = sum(4 * ledger.shapes[layer.weight][layer.channel_dim or 0] for layer in ledger.layers)
    return math.floor(ledger.stored_bytes(ledger.nothing, 0.0) - scales + bits * weights / 8)


def runs(arguments: argparse.Namespace) -> Iterator[tuple[str, float, int]]:
    """Yield (method, B, number of the draw)."""
    for draw in range(arguments.draws):
        for bits in arguments.bits:
            for name in arguments.methods:
                yield name, bits, draw


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--work", required=True, type=Path, help="folder that keeps the results")
    parser.add_argument("--separator", default="<|endoftext|>")
    parser.add_argument("--blocks", type=int, default=64, help="of calibration data, and as many others to score")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--bits", type=float, nargs="+", default=[4.0, 3.2, 2.4])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--draws", type=int, default=1, help="draws of calibration data")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    blocks = blocks_of(read_text(arguments.text), tokenizer, arguments.length, arguments.separator)
    scored = blocks[: arguments.blocks]
    done = read_results(arguments.work)
    known = {(row["method"], row["bits"], row["draw"]) for row in done}
    for key in runs(arguments):
        if key in known:
            continue
        row = run(*key, arguments, blocks, scored)
        done.append(row)
        append_result(arguments.work, row)
    print(table(done))


def run(
    name: str, bits: float, draw: int, arguments: argparse.Namespace, blocks: Tensor, scored: Tensor
) -> dict[str, Any]:
    """Compress a fresh model, and return what was measured."""
    others = blocks[arguments.blocks :]
    generator = torch.Generator().manual_seed(draw)
    chosen = others[torch.randperm(len(others), generator=generator)[: arguments.blocks]]
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    dense = loss_of_each(model, scored)
    start = time.perf_counter()
    space, _ = prepare_space(model, {"input_ids": chosen[:2]})
    config = OneShotConfig(target_bytes=1)
    empty = empty_copy(model)
    make_method(config).attach(empty, None)
    ledger = make_ledger(empty, space)
    config = OneShotConfig(target_bytes=bytes_for(ledger, bits), **METHODS[name])
    # The last quarter is held back, of the same blocks for every method.
    split = 3 * len(chosen) // 4
    data = Calibration(batches_of(chosen[:split]), batches_of(chosen[:split]), batches_of(chosen[split:]))
    key = {"method": name, "bits": bits, "draw": draw, "dense": float(dense.mean())}
    try:
        outcome = make_method(config).compress(model, data, space, ledger)  # type: ignore[attr-defined]
    except GETAError as error:
        # Rounding alone may not reach a budget, as step sizes take their part of it.
        return {**key, "above": None, "reason": str(error)}
    seconds = time.perf_counter() - start
    change = loss_of_each(model, scored) - dense
    detach_quantizers(model)
    trial = outcome.trials[outcome.chosen]
    return {
        **key,
        "above": float(change.mean()),
        "error": float(change.std() / len(change) ** 0.5),
        "share": trial.share,
        "mean_bits": trial.mean_bits,
        "trials": [(one.share, one.mean_bits, one.loss) for one in outcome.trials],
        "seconds": seconds,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results, means over draws, as a table."""
    keys = dict.fromkeys((row["bits"], row["method"]) for row in rows)
    lines = []
    for bits, name in keys:
        own = [row for row in rows if (row["bits"], row["method"]) == (bits, name)]
        if any(row["above"] is None for row in own):
            lines.append((f"{bits:g}", name, "out of reach", "", "", "", ""))
            continue
        above = torch.tensor([row["above"] for row in own])
        spread = f" ({above.min():.3f} to {above.max():.3f})" if len(own) > 1 else ""
        removed = sum(row["share"] for row in own) / len(own)
        mean_bits = sum(row["mean_bits"] for row in own) / len(own)
        seconds = sum(row["seconds"] for row in own) / len(own)
        error = max(row["error"] for row in own)
        lines.append(
            (
                f"{bits:g}",
                name,
                f"{above.mean():.3f}{spread}",
                f"{error:.3f}",
                f"{removed:.1%}",
                f"{mean_bits:.2f}",
                f"{seconds:.0f}",
            )
        )
    header = ("B", "method", "nats a token above dense", "standard error", "parameters removed", "mean bits", "seconds")
    return format_table(header, lines)


if __name__ == "__main__":
    main()
