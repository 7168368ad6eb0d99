"""Compress a language model without training at several budgets, and measure the loss on other blocks of text.

A budget is B: bits that are stored for each weight of the original blocks, step sizes counted as they are stored: fp32
for each output channel, fp16 for each block of 32 inputs. Everything else, such as the embedding, is not counted.
Results are lines of JSON; those that are there are not run again. Scores are measured once for all budgets, and kept.

    python -m eval.one_shot --model MODEL --text FILE --work runs/one_shot
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
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
from geta_hf.methods.one_shot import Calibration, Measured
from geta_hf.qadg import PruningSpace
from geta_hf.surgery.build_space import prepare_space
from geta_hf.training.plan import make_ledger
from geta_hf.training.preparation import empty_copy
from geta_hf.training.recovery import recover
from geta_hf.utils.tables import format_table

METHODS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, 100 steps": {"distill_logits": 1.0},
    "same, unpruned": {"target_sparsity": 0.0},
    "10 % + rest in bits": {"target_parameters": 0.1},
    "20 % + rest in bits": {"target_parameters": 0.2},
    "30 % + rest in bits": {"target_parameters": 0.3},
    "magnitude, to nearest": {"saliency": "magnitude", "compensation": False},
}

STEPS = {"ours, 100 steps": 100}
"""Optimizer steps of recovery that follow."""

_DEFAULT = ("ours", "same, unpruned", "magnitude, to nearest")


@dataclass
class Study:
    """A model, its texts and what was measured of it.

    Attributes:
        arguments: of the command.
        model: dense between two cells.
        blocks: of the calibration text, int64, shape (blocks, tokens).
        scored: name -> blocks on which losses are reported.
        dense: name -> loss of the dense model on each of these blocks.
        measured: what all budgets share, by the method's saliency and the number of the draw.
    """

    arguments: argparse.Namespace
    model: PreTrainedModel
    blocks: Tensor
    scored: dict[str, Tensor]
    dense: dict[str, Tensor]
    space: PruningSpace
    measured: dict[tuple[str, int], Measured] = field(default_factory=dict)

    def dense_model(self) -> PreTrainedModel:
        """Load the dense model once more."""
        return AutoModelForCausalLM.from_pretrained(self.arguments.model, dtype=torch.float32).eval()


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


def ledger_of(model: PreTrainedModel, space: PruningSpace, grid: str) -> Ledger:
    """Return the sizes of a dense model with quantizers on a grid."""
    empty = empty_copy(model)
    make_method(OneShotConfig(target_bytes=1, grid=grid)).attach(empty, None)
    return make_ledger(empty, space)


def bytes_for(ledger: Ledger, bits: float) -> int:
    """Return the size of a file that stores `bits` for each weight of the original blocks, step sizes counted."""
    weights = float(ledger.weights(ledger.nothing).sum())
    rest = ledger.stored_bytes(ledger.nothing, 0.0) - ledger.scale_bytes()
    return math.floor(rest + bits * weights / 8)


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
    parser.add_argument("--text", required=True, type=Path, help="calibration data; scored as well, but for --score")
    parser.add_argument("--score", nargs="+", default=[], metavar="NAME=FILE", help="texts to score in its place")
    parser.add_argument("--work", required=True, type=Path, help="folder that keeps the results")
    parser.add_argument("--separator", default="<|endoftext|>")
    parser.add_argument("--blocks", type=int, default=64, help="of calibration data")
    parser.add_argument("--scored", type=int, default=64, help="blocks of each text to score")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--grid", default="channel", choices=("channel", "block32"))
    parser.add_argument("--bits", type=float, nargs="+", default=[4.0, 3.2, 2.4])
    parser.add_argument("--methods", nargs="+", default=list(_DEFAULT), choices=list(METHODS))
    parser.add_argument("--draws", type=int, default=1, help="draws of calibration data")
    arguments = parser.parse_args()
    study = prepare(arguments)
    done = [row for row in read_results(arguments.work) if row["grid"] == arguments.grid]
    known = {(row["method"], row["bits"], row["draw"]) for row in done}
    for key in runs(arguments):
        if key in known:
            continue
        row = run(*key, study)
        done.append(row)
        append_result(arguments.work, row)
    print(table(done))


def prepare(arguments: argparse.Namespace) -> Study:
    """Load the model and the texts, and score the dense model."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)

    def read(path: Path) -> Tensor:
        return blocks_of(read_text(path), tokenizer, arguments.length, arguments.separator)

    blocks = read(arguments.text)
    scored = {}
    for entry in arguments.score:
        name, _, path = entry.partition("=")
        scored[name] = read(Path(path))[: arguments.scored]
    if not scored:
        scored["same text"], blocks = blocks[: arguments.scored], blocks[arguments.scored :]
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    dense = {name: loss_of_each(model, part) for name, part in scored.items()}
    space, _ = prepare_space(model, {"input_ids": blocks[:2, :32]})
    return Study(arguments, model, blocks, scored, dense, space)


def run(name: str, bits: float, draw: int, study: Study) -> dict[str, Any]:
    """Compress the model, return what was measured, and make it dense again."""
    arguments, model = study.arguments, study.model
    generator = torch.Generator().manual_seed(draw)
    chosen = study.blocks[torch.randperm(len(study.blocks), generator=generator)[: arguments.blocks]]
    start = time.perf_counter()
    settings = {"grid": arguments.grid, **METHODS[name]}
    ledger = ledger_of(model, study.space, arguments.grid)
    config = OneShotConfig(target_bytes=bytes_for(ledger, bits), **settings)
    # The last quarter is held back, of the same blocks for every method; gradients take half of the others.
    split = 3 * len(chosen) // 4
    others = batches_of(chosen[:split])
    data = Calibration(others[::2] if len(others) > 8 else others, others, batches_of(chosen[split:]))
    path = arguments.work / f"{config.saliency}-{arguments.grid}-{draw}.safetensors"
    measured = study.measured.setdefault((config.saliency, draw), Measured(path=path, several=True))
    key = {"method": name, "bits": bits, "draw": draw, "grid": arguments.grid}
    key["dense"] = {text: float(loss.mean()) for text, loss in study.dense.items()}
    method = make_method(config)
    try:
        outcome = method.compress(model, data, study.space, ledger, measured=measured)  # type: ignore[attr-defined]
    except GETAError as error:
        # Rounding alone may not reach a budget, as step sizes take their part of it.
        return {**key, "above": None, "reason": str(error)}
    teacher = None
    if name in STEPS:
        teacher = study.dense_model()
        recover(model, teacher, method, config, study.space, others, STEPS[name], progress=False)
    seconds = time.perf_counter() - start
    change = {text: loss_of_each(model, blocks) - study.dense[text] for text, blocks in study.scored.items()}
    method.undo()  # type: ignore[attr-defined]
    if teacher is not None:
        model.load_state_dict(teacher.state_dict())
    trial = outcome.trials[outcome.chosen]
    return {
        **key,
        "above": {text: float(values.mean()) for text, values in change.items()},
        "error": {text: float(values.std() / len(values) ** 0.5) for text, values in change.items()},
        "share": trial.share,
        "mean_bits": trial.mean_bits,
        "trials": [(one.share, one.mean_bits, one.loss) for one in outcome.trials],
        "held_back": (outcome.dense_loss, outcome.loss),
        "seconds": seconds,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results, means over draws, as a table."""
    keys = dict.fromkeys((row["bits"], row["method"]) for row in rows)
    texts = list(rows[0]["dense"]) if rows else []
    lines = []
    for bits, name in keys:
        own = [row for row in rows if (row["bits"], row["method"]) == (bits, name)]
        if any(row["above"] is None for row in own):
            lines.append((f"{bits:g}", name, *("out of reach" for _ in texts), "", "", ""))
            continue
        removed = sum(row["share"] for row in own) / len(own)
        mean_bits = sum(row["mean_bits"] for row in own) / len(own)
        seconds = sum(row["seconds"] for row in own) / len(own)
        losses = [_loss(own, text) for text in texts]
        lines.append((f"{bits:g}", name, *losses, f"{removed:.1%}", f"{mean_bits:.2f}", f"{seconds:.0f}"))
    header = ("B", "method", *(f"{text}, above dense" for text in texts), "parameters removed", "mean bits", "seconds")
    return format_table(header, lines)


def _loss(rows: list[dict[str, Any]], text: str) -> str:
    """Return nats a token above dense, with the standard error over blocks, and the range over several draws."""
    above = torch.tensor([row["above"][text] for row in rows])
    error = max(row["error"][text] for row in rows)
    spread = f" ({above.min():.3f} to {above.max():.3f})" if len(rows) > 1 else ""
    return f"{above.mean():.3f} ± {error:.3f}{spread}"


if __name__ == "__main__":
    main()
