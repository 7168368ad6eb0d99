"""Compare ways to split a size between pruning and bit widths, and targets for pruning, on a small language model.

    python -m eval.currency run --model DIR --texts stories.txt --work W
    python -m eval.currency render --work W

Every cell starts from the same pretrained model and takes the same number of steps; the score is that of the exported
folder on held-out text, in nats per token. Two questions are asked:

- `targets`: half of the groups or half of the parameters, at the default widths, beside the paper's preset; and both
  again at the bytes at which the preset ended.
- `sizes`: a size alone, given as stored bits for each original weight of the quantized layers, split by each rule;
  beside uniform widths without pruning.

With `--rows` a third one: `searches`, at a mean width over all original weights of the quantized layers, in which
removed ones count as 0 bits, with a step size for each row: the differentiable search beside `early` and widths alone.

A finished cell is one line of `W/results.jsonl`; an interrupted command goes on where it stopped. Seeds are the outer
loop.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from eval.results_file import Line, read_results, read_under, run_missing
from eval.study_tasks import Lengths, Task, TextOptions, text_task
from eval.tables.cells import stored_bytes, train_cell
from geta_hf import GETAConfig, GETAError, SearchConfig
from geta_hf.config import CompressionConfig
from geta_hf.quantization import attach_quantizers, quantized_layers
from geta_hf.utils.tables import format_table

SIZED_BITS = (2, 8)
"""The widths among which the rows at a size choose."""

PAPER = "the paper's preset"


@dataclass(frozen=True)
class Row:
    """One way to reach a target.

    Attributes:
        name: as the table shows it.
        changes: fields of the config.
        preset: start from `GETAConfig.paper()`.
        at_paper: take `target_bytes` from the result of the preset with the same seed.
        sized: take `target_bytes` from a number of bits for each original weight.
        by_bops: take `target_bops` from this number, with removed weights at 0 bits.
        search: by a SearchConfig in place of a GETAConfig.
        uniform: all layers have the wanted width from the first step on, which has to be an integer.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    preset: bool = False
    at_paper: bool = False
    sized: bool = False
    by_bops: bool = False
    search: bool = False
    uniform: bool = False


TARGETS = (
    Row("dense, trained on"),
    Row(PAPER, {"target_sparsity": 0.5}, preset=True),
    Row("half of the groups", {"target_sparsity": 0.5}),
    Row("half of the parameters", {"target_parameters": 0.5}),
    Row("half of the groups, at the preset's bytes", {"target_sparsity": 0.5}, at_paper=True),
    Row("half of the parameters, at the preset's bytes", {"target_parameters": 0.5}, at_paper=True),
)

SIZES = (
    Row("no pruning", {"target_sparsity": 0.0}, sized=True),
    Row("even", {"split": "even"}, sized=True),
    Row("even, mask_fisher", {"split": "even", "saliency": "mask_fisher"}, sized=True),
    Row("early", {"split": "early"}, sized=True),
    Row("late", {"split": "late"}, sized=True),
)

_HELD_OUT = {"sampling": "gumbel", "architecture_data": 0.2}
_BY_ROW = {"per_channel": True}
_SEARCH = {**_BY_ROW, "warmup": 0, "search": 0.66, "bit_choices": [0, 2, 3, 4, 6]}
"""Two thirds of the steps are the search's, as in its prototype."""

_AT_ONCE = {"warmup": 0, "projection": 0, "joint": 0, "target_sparsity": 0.0}

_AT_START = {"warmup": 2, "projection": 0, "joint": 0.3}
"""Decided after as few steps as give an average of gradients."""

_THREE_LEVELS = {"four_levels": False}
"""At 2 bits."""

SEARCHES = (
    Row("uniform, by row", {**_BY_ROW, **_AT_ONCE}, uniform=True),
    Row("widths alone, by row", {**_BY_ROW, "target_sparsity": 0.0}, by_bops=True),
    Row("early, by row", {**_BY_ROW, "split": "early"}, by_bops=True),
    *(
        Row(f"early, by row, rate {rate:g}", {**_BY_ROW, "split": "early", "exchange_rate": rate}, by_bops=True)
        for rate in (1.0, 4.0, 8.0)
    ),
    Row("at the start, by row", {**_BY_ROW, **_AT_START, "split": "early"}, by_bops=True),
    Row("uniform, three levels, by row", {**_BY_ROW, **_AT_ONCE, **_THREE_LEVELS}, uniform=True),
    Row("widths alone, three levels, by row", {**_BY_ROW, **_THREE_LEVELS, "target_sparsity": 0.0}, by_bops=True),
    Row("early, three levels, by row", {**_BY_ROW, **_THREE_LEVELS, "split": "early"}, by_bops=True),
    Row("search", _SEARCH, by_bops=True, search=True),
    Row("search, group", {**_SEARCH, "granularity": "group"}, by_bops=True, search=True),
    Row("search, row", {**_SEARCH, "granularity": "row"}, by_bops=True, search=True),
    Row("search, a third of the steps", {**_SEARCH, "search": 0.33}, by_bops=True, search=True),
    Row("search, a third, group", {**_SEARCH, "granularity": "group", "search": 0.33}, by_bops=True, search=True),
    Row("search, a third, row", {**_SEARCH, "granularity": "row", "search": 0.33}, by_bops=True, search=True),
    Row("search, three levels", {**_SEARCH, **_THREE_LEVELS}, by_bops=True, search=True),
    Row("search, a third, three levels", {**_SEARCH, **_THREE_LEVELS, "search": 0.33}, by_bops=True, search=True),
    Row("search, a sixth, three levels", {**_SEARCH, **_THREE_LEVELS, "search": 0.16}, by_bops=True, search=True),
    Row("search, hard, three levels", {**_SEARCH, **_THREE_LEVELS, "sampling": "hard"}, by_bops=True, search=True),
    Row("search, widths 0 3 4", {**_SEARCH, "bit_choices": [0, 3, 4]}, by_bops=True, search=True),
    Row("search, widths 0 2 4 8", {**_SEARCH, "bit_choices": [0, 2, 4, 8]}, by_bops=True, search=True),
    Row(
        "search, gumbel, held-out rows",
        {**_SEARCH, **_HELD_OUT},
        by_bops=True,
        search=True,
    ),
)


@dataclass(frozen=True)
class Cell:
    """One figure: a row, at a number of bits for each original weight where it is sized, and a seed."""

    row: Row
    bits: float | None
    seed: int

    @property
    def key(self) -> tuple[str, float | None, int]:
        """What names the cell in the results."""
        return (self.row.name, self.bits, self.seed)


def cells_of(seeds: Sequence[int], sizes: Sequence[float], names: Sequence[str] | None = None) -> list[Cell]:
    """Return all cells in the order in which they are run.

    Raises:
        GETAError: an unknown row.
    """
    known = [row.name for row in (*TARGETS, *SIZES, *SEARCHES)]
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise GETAError(f"there are no rows {unknown}; there are {known}")
    cells = []
    for seed in seeds:
        cells += [Cell(row, None, seed) for row in TARGETS if names is None or row.name in names]
        for bits in sizes:
            cells += [Cell(row, bits, seed) for row in SIZES if names is None or row.name in names]
            cells += [Cell(row, bits, seed) for row in SEARCHES if row.name in (names or ())]
    return cells


def bytes_at(model: PreTrainedModel, folder: Path, bits: float) -> int:
    """Return the bytes of a file in which each weight of the quantized layers takes this many bits.

    Args:
        model: dense; quantizers are attached to it.
        folder: with the model's own file.
        bits: for each original weight.
    """
    attach_quantizers(model)
    weights = [layer.weight for layer in quantized_layers(model).values()]
    dense = sum(weight.numel() * weight.element_size() for weight in weights)
    return int(stored_bytes(folder) - dense + sum(weight.numel() for weight in weights) * bits / 8)


def config_of(cell: Cell, size: int | None) -> CompressionConfig | None:
    """Return the config of a cell; None for a model that is trained without compression."""
    if not cell.row.changes:
        return None
    values = dict(cell.row.changes)
    if size is not None:
        values["target_bytes"] = size
    if cell.row.sized or cell.row.by_bops:
        values["bits"] = SIZED_BITS
    if cell.row.by_bops and cell.bits is not None:
        values["target_bops"] = cell.bits / 32  # inputs have 32 bits here and in the dense model
    if cell.row.uniform and cell.bits is not None:
        width = round(cell.bits)
        values |= {"bits": (width, width), "initial_bits": width}
    if cell.row.search:
        return SearchConfig(**values)
    return GETAConfig.paper(**values) if cell.row.preset else GETAConfig(**values)


def bytes_of_preset(finished: Mapping[tuple[Any, ...], Line], cell: Cell) -> int:
    """Return the bytes at which the preset ended with the seed of a cell.

    Raises:
        GETAError: the preset's row is missing, since it failed or is not among the rows.
    """
    line = finished.get((PAPER, None, cell.seed))
    if line is None:
        raise GETAError(
            f"{cell.row.name!r} takes the size of {PAPER!r}, which has no result with seed {cell.seed}: it failed, or "
            f"is not among --rows; run it first"
        )
    return int(line["bytes"])


def run(task: Task, folder: Path, work: Path, lengths: Lengths, cells: Sequence[Cell]) -> None:
    """Run the cells that `work/results.jsonl` lacks, and append each as it ends.

    Args:
        task: the data and the score.
        folder: the pretrained model.
        work: holds the results.
        lengths: of every cell.
        cells: those to run.

    Raises:
        GETAError: results under other settings.
    """
    settings, done = read_under(work, {**vars(lengths), **task.settings, "scored": task.scored})
    finished = {(line["row"], line["bits"], line["seed"]): line for line in done}

    def measure(cell: Cell) -> Line:
        size = None
        if cell.row.at_paper:
            size = bytes_of_preset(finished, cell)
        if cell.row.sized and cell.bits is not None:
            size = bytes_at(task.load(folder), folder, cell.bits)
        set_seed(cell.seed)
        begin = time.perf_counter()
        measured = train_cell(task, config_of(cell, size), task.load(folder), work, lengths, cell.seed)
        line = {"row": cell.row.name, "bits": cell.bits, "seed": cell.seed, "target_bytes": size}
        return line | {"settings": settings, "seconds": round(time.perf_counter() - begin, 1), **measured}

    run_missing(work, [(cell.key, cell) for cell in cells], finished, measure)


def render(lines: Sequence[Line]) -> str:
    """Return the results as two tables of text, means over seeds with their standard deviation."""
    parts = []
    for title, rows in (("targets", TARGETS), ("sizes", SIZES), ("searches", SEARCHES)):
        found = [line for line in lines if line["row"] in {row.name for row in rows}]
        sizes = sorted({line["bits"] or 0.0 for line in found}, reverse=True)
        table = []
        for bits in sizes:
            for row in rows:
                own = [line for line in found if line["row"] == row.name and (line["bits"] or 0.0) == bits]
                if own:
                    table.append((f"{bits:g}" if bits else "", row.name, *_figures(own)))
        if table:
            header = ("bits a weight", "row", "seeds", "nats", "bytes", "mean bits", "parameters", "heads", "channels")
            parts.append(f"{title}\n{format_table(header, table)}")
    return "\n\n".join(parts)


def _figures(lines: Sequence[Line]) -> tuple[str, ...]:
    nats = [line["nats"] for line in lines]
    spread = f" ± {stdev(nats):.3f}" if len(nats) > 1 else ""
    texts = [str(len(lines)), f"{mean(nats):.3f}{spread}", f"{mean(line['bytes'] for line in lines):,.0f}"]
    for name, form in (
        ("mean_bits", ".2f"),
        ("kept_parameters", ".1%"),
        ("kept_heads", ".0%"),
        ("kept_channels", ".0%"),
    ):
        values = [line[name] for line in lines if name in line]
        texts.append(f"{mean(values):{form}}" if values else "")
    return tuple(texts)


def _task(args: argparse.Namespace) -> Task:
    options = TextOptions(args.texts, tokenizer=str(args.model), block=args.block, eval_blocks=args.eval_blocks)
    task = text_task(options, Lengths(0, 0, 0.0), "currency")
    return replace(task, start=lambda: AutoModelForCausalLM.from_pretrained(args.model))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the module's docstring describes."""
    parser = argparse.ArgumentParser(prog="python -m eval.currency", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("render").add_argument("--work", type=Path, required=True)
    add = commands.add_parser("run").add_argument
    add("--model", type=Path, required=True, help="folder of a pretrained causal language model")
    add("--texts", nargs="+", required=True, help="plain text; the end is held out for the score")
    add("--work", type=Path, required=True)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--sizes", type=float, nargs="+", default=[4.0, 3.2, 2.4], help="stored bits for each original weight")
    add("--rows", nargs="+", help="some of the rows; all by default")
    add("--steps", type=int, default=300)
    add("--batch_size", type=int, default=16)
    add("--learning_rate", type=float, default=1e-3)
    add("--block", type=int, default=128)
    add("--eval_blocks", type=int, default=200)
    args = parser.parse_args(argv)
    if args.command == "run":
        lengths = Lengths(args.steps, args.batch_size, args.learning_rate)
        run(_task(args), args.model, args.work, lengths, cells_of(args.seeds, args.sizes, args.rows))
    print(render(read_results(args.work)))


if __name__ == "__main__":
    try:
        main()
    except GETAError as error:
        sys.exit(f"error: {error}")
