"""Trace a score over the size of a small network: uniform widths, searches, and QASSO.

    python -m eval.searches images --data idx_dir=fashion-mnist --work W
    python -m eval.searches questions --model M --train_file T --eval_file E --work W
    python -m eval.searches text --model M --texts T --work W
    python -m eval.searches render --work W [--curve F.svg]

Of images the network is ResNet-8 (16, 32 and 64 channels, one block each) unless `--architecture` names another; of
questions (SQuAD v1.1) and text it is `M`, a folder or a Hub name. It is trained dense once and kept in `W`; every cell
starts from there and takes the same number of steps. The score is that of the exported folder. On images, weights of
all layers but the last and 8-bit inputs are quantized, elsewhere weights alone. There are three kinds of rows:

- `w8a8`, `w4a8`, `w3a8`, `w2a8`, or `w8` to `w2`: one width for all weights from the first step on, nothing removed.
- `search, λ`: the search with widths of rows out of 0, 2, 4 and 8 and λ times its relative size in the loss, as in the
  paper (arXiv 2407.01054): whatever size comes out.
- `at the bytes of` a uniform row: the search with widths of layers, groups and rows, and QASSO, to that stated size.

A finished cell is one line of `W/results.jsonl`; an interrupted command goes on where it stopped, and commands with
other `--rows` share a folder one after another. Seeds are the outer loop.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from transformers import set_seed

from eval.results_file import Line, read_results, read_under, run_missing
from eval.study_rules import add_options, pick_options
from eval.study_table import spread
from eval.study_tasks import (
    ImageOptions,
    Lengths,
    QuestionOptions,
    Task,
    TextOptions,
    dense_model,
    image_task,
    question_task,
    text_task,
)
from eval.tables.__main__ import pairs
from eval.tables.cells import stored_bytes, train_cell
from geta_hf import GETAConfig, GETAError, SearchConfig
from geta_hf.config import CompressionConfig
from geta_hf.utils.tables import format_table

RESNET_8: Mapping[str, Any] = {"model_type": "cifar_resnet", "depths": [1, 1, 1], "num_channels": 1, "image_size": 28}

_AT_ONCE: Mapping[str, Any] = {"warmup": 0, "projection": 0, "joint": 0, "target_sparsity": 0.0}
_COUNTED = ("images", "questions", "blocks")
_DIGITS = {"nats": 3}
_WIDTHS = [0, 2, 3, 4, 6, 8]
_PAPER_WIDTHS = [0, 2, 4, 8]

DENSE, CONTROL = "dense", "dense, trained on"
BY_WEIGHT, QASSO = "search, λ", "QASSO"
RATES: Mapping[str, float] = {f"{QASSO}, rate {rate:g}": rate for rate in (1.0, 2.0, 4.0)}
"""Row -> `exchange_rate`; run where they are named."""

SEARCHES = {f"search, {granularity}": granularity for granularity in ("layer", "group", "row")}


@dataclass(frozen=True)
class Kind:
    """What all cells of a kind of task have in common.

    Attributes:
        shared: fields of every compressed cell's config.
        uniform: a width -> the name of the row in which all weights have it.
        search: share of the steps in which a search is open; fine-tuning takes the others.
    """

    shared: Mapping[str, Any]
    uniform: Mapping[int, str]
    search: float = 0.33

    @property
    def rows(self) -> tuple[str, ...]:
        """The names of all rows."""
        return (DENSE, CONTROL, *self.uniform.values(), BY_WEIGHT, *SEARCHES, QASSO, *RATES)


IMAGES = Kind(
    {"per_channel": True, "include": ["."], "exclude": ["classifier"], "activation_bits": (8, 8)},
    {8: "w8a8", 4: "w4a8", 3: "w3a8", 2: "w2a8"},
)
"""As in the paper, the last layer is not quantized, and inputs have 8 bits."""

WEIGHTS = Kind({"per_channel": True}, {8: "w8", 4: "w4", 3: "w3", 2: "w2"})
"""Weights alone, of the layers that are quantized by default."""


@dataclass(frozen=True)
class Cell:
    """One figure.

    Attributes:
        row: one of `Kind.rows`.
        weight: λ of a row that has no stated size; None otherwise.
        width: of the uniform row whose bytes are the target; None where none is stated.
        seed: of the order of the data and of the search's noise.
    """

    row: str
    weight: float | None
    width: int | None
    seed: int

    @property
    def key(self) -> tuple[str, float | None, int | None, int]:
        """What names the cell in the results."""
        return (self.row, self.weight, self.width, self.seed)


def cells_of(
    kind: Kind,
    seeds: Sequence[int],
    weights: Sequence[float],
    widths: Sequence[int],
    names: Sequence[str] | None = None,
) -> list[Cell]:
    """Return all cells in the order in which they are run.

    Args:
        kind: of the task.
        seeds: one run of every cell for each.
        weights: each λ of the sweep.
        widths: of uniform rows whose bytes the others are to meet.
        names: some of the rows; None for all.

    Raises:
        GETAError: an unknown row, or a width that no uniform row has.
    """
    unknown = sorted(set(names or ()) - set(kind.rows))
    if unknown:
        raise GETAError(f"there are no rows {unknown}; there are {list(kind.rows)}")
    if unknown_widths := sorted(set(widths) - set(kind.uniform)):
        raise GETAError(f"no uniform row has {unknown_widths[0]} bits; sizes are those of {list(kind.uniform)} bits")
    found = []
    for seed in seeds:
        if seed == seeds[0]:
            # No seed changes the model that everything starts from.
            found.append(Cell(DENSE, None, None, seed))
        found += [Cell(row, None, None, seed) for row in (CONTROL, *kind.uniform.values())]
        found += [Cell(BY_WEIGHT, weight, None, seed) for weight in weights]
        for width in widths:
            found += [Cell(row, None, width, seed) for row in (*SEARCHES, QASSO)]
            found += [Cell(row, None, width, seed) for row in RATES if row in (names or ())]
    return [cell for cell in found if names is None or cell.row in names]


def config_of(kind: Kind, cell: Cell, size: int | None = None) -> CompressionConfig | None:
    """Return the config of a cell; None for a model that is trained without compression.

    Args:
        kind: of the task.
        cell: one that is trained.
        size: the bytes of its file where it has a stated size.
    """
    if cell.row in (DENSE, CONTROL):
        return None
    for width, name in kind.uniform.items():
        if cell.row == name:
            return GETAConfig(**kind.shared, **_AT_ONCE, bits=(width, width), initial_bits=8)
    if cell.row in (QASSO, *RATES):
        rate = RATES.get(cell.row, GETAConfig.exchange_rate)
        return GETAConfig(**kind.shared, bits=(2, 8), split="early", exchange_rate=rate, target_bytes=size)
    stages = {"warmup": 0, "search": kind.search}
    if cell.row == BY_WEIGHT:
        # λ alone decides: the limit is that of nearly the full model.
        limits: dict[str, Any] = {"cost": "size", "cost_weight": cell.weight, "target_cost": 0.999}
        return SearchConfig(**kind.shared, **stages, **limits, granularity="row", bit_choices=_PAPER_WIDTHS)
    granularity = SEARCHES[cell.row]
    return SearchConfig(**kind.shared, **stages, granularity=granularity, bit_choices=_WIDTHS, target_bytes=size)


def bytes_at(kind: Kind, finished: Mapping[tuple[Any, ...], Line], cell: Cell) -> int | None:
    """Return the bytes that a cell is to meet; None where it has no stated size.

    Raises:
        GETAError: the uniform row is missing, since it failed or is not among the rows.
    """
    if cell.width is None:
        return None
    other = kind.uniform[cell.width]
    line = finished.get((other, None, None, cell.seed))
    if line is None:
        raise GETAError(
            f"{cell.row!r} takes the size of {other!r}, which has no result with seed {cell.seed}: it failed, or is "
            f"not among --rows; run it first"
        )
    return int(line["bytes"])


def run(task: Task, kind: Kind, work: Path, lengths: Lengths, cells: Sequence[Cell]) -> None:
    """Run the cells that `work/results.jsonl` lacks, and append each as it ends.

    Args:
        task: the network, its data and the score.
        kind: of the task.
        work: holds the dense model and the results.
        lengths: of every cell.
        cells: those to run.

    Raises:
        GETAError: results under other settings.
    """
    dense = {**task.settings, **vars(task.dense)}
    own = {**vars(lengths), "search": kind.search, "metric": task.metrics[0]}
    settings, done = read_under(work, {**own, "dense": dense, "scored": task.scored})
    finished = {(line["row"], line["weight"], line["width"], line["seed"]): line for line in done}
    folder = dense_model(task, work)

    def measure(cell: Cell) -> Line:
        line: Line = {"study": task.name, "row": cell.row, "weight": cell.weight, "width": cell.width}
        line |= {"seed": cell.seed, "settings": settings}
        set_seed(cell.seed)
        if cell.row == DENSE:
            return line | {**task.score(task.load(folder)), "bytes": stored_bytes(folder), "relative_bops": 1.0}
        size = bytes_at(kind, finished, cell)
        begin = time.perf_counter()
        measured = train_cell(task, config_of(kind, cell, size), task.load(folder), folder.parent, lengths, cell.seed)
        return line | {"target_bytes": size, "seconds": round(time.perf_counter() - begin, 1), **measured}

    run_missing(work, [(cell.key, cell) for cell in cells], finished, measure)


def render(lines: Sequence[Line]) -> str:
    """Return the results as a Markdown table, the largest file first: means over seeds with their deviation."""
    if not lines:
        return "no results"
    settings = lines[0]["settings"]
    metric = settings["metric"]
    amounts = " and ".join(f"{value:,} {name}" for name, value in settings["scored"].items() if name in _COUNTED)
    length = f"{settings['steps']:,} steps of batches of {settings['batch_size']}"
    dense = f"The dense model was trained for {settings['dense']['steps']:,} steps."
    head = f"{length}, of which a search takes {settings['search']:.0%}; {metric} on {amounts}. {dense}"
    other = f"other_{metric}"
    scores = [metric] if any(other not in line for line in lines) else [metric, other]
    named = (metric, f"{metric}, other text")[: len(scores)]
    header = ("row", "at the bytes of", "seeds", *named, "kB", "mean bits", "parameters kept", "relative BOPs")
    keys = dict.fromkeys((line["row"], line["weight"], line["width"]) for line in lines)
    own = {key: [line for line in lines if (line["row"], line["weight"], line["width"]) == key] for key in keys}
    ordered = sorted(own.items(), key=lambda item: -mean(line["bytes"] for line in item[1]))
    return f"{head}\n\n{format_table(header, [_figures(key, cell, scores) for key, cell in ordered])}"


def _figures(
    key: tuple[str, float | None, int | None], lines: Sequence[Line], scores: Sequence[str]
) -> tuple[str, ...]:
    row, weight, width = key
    texts = [row if weight is None else f"{row} = {weight:g}", "" if width is None else f"{width} bits"]
    texts.append(str(len(lines)))
    texts += [spread([line[score] for line in lines], _DIGITS.get(scores[0], 2)) for score in scores]
    texts.append(f"{mean(line['bytes'] for line in lines) / 1000:.1f}")
    for name, form in (("mean_bits", ".2f"), ("kept_parameters", ".1%"), ("relative_bops", ".2%")):
        values = [line[name] for line in lines if name in line]
        texts.append(f"{mean(values):{form}}" if values else "")
    return tuple(texts)


def draw_curve(lines: Sequence[Line], path: Path, reference: Sequence[Line] = ()) -> None:
    """Draw the score over the size of the file: one curve for each kind of row, means over seeds.

    Args:
        lines: results of one work folder.
        path: picture to write; its ending says the format.
        reference: results of `benchmarks/plinio_search.py`. Default none.

    Raises:
        GETAError: matplotlib is missing, or there is nothing to draw.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, ScalarFormatter
    except ImportError as error:
        raise GETAError("a curve is drawn by matplotlib, which is missing; run `pip install matplotlib`") from error
    curves = curve_points(lines)
    if not curves:
        raise GETAError("there is no compressed result to draw yet")
    if reference:
        metric = lines[0]["settings"]["metric"]
        by_strength: dict[float, list[Line]] = {}
        for line in reference:
            by_strength.setdefault(line["strength"], []).append(line)
        curves["PLiNIO, λ"] = sorted(
            (mean(line["bytes"] for line in own) / 1000, mean(line[metric] for line in own))
            for own in by_strength.values()
        )
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        axes.plot([size for size, _ in points], [score for _, score in points], marker="o", label=name)
    axes.set_xlabel("kB of weights")
    axes.set_ylabel(lines[0]["settings"]["metric"])
    axes.set_xscale("log")
    # Sizes lie within one or two factors of two, where powers of ten say little.
    axes.xaxis.set_major_locator(MaxNLocator(8))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(MaxNLocator(1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path)


def curve_points(lines: Sequence[Line]) -> dict[str, list[tuple[float, float]]]:
    """Return (kB, score) of each point of each curve by ascending size: means over seeds."""
    points: dict[str, dict[Any, list[Line]]] = {}
    for line in lines:
        if line["row"] in (DENSE, CONTROL):
            continue
        uniform = line["row"] in (*IMAGES.uniform.values(), *WEIGHTS.uniform.values())
        place = line["row"] if uniform else (line["weight"], line["width"])
        points.setdefault("uniform" if uniform else line["row"], {}).setdefault(place, []).append(line)
    return {
        name: sorted(
            (mean(line["bytes"] for line in cell) / 1000, mean(line[line["settings"]["metric"]] for line in cell))
            for cell in cells.values()
        )
        for name, cells in points.items()
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.searches", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    printing = commands.add_parser("render", help="print the table as Markdown")
    printing.add_argument("--work", type=Path, required=True)
    printing.add_argument("--curve", type=Path, help="write the score over size as a picture, .svg or .png")
    images = commands.add_parser("images", help="measure what is missing, on images")
    images.add_argument("--data", nargs="+", metavar="KEY=VALUE", required=True, help="of the recipe's DataArguments")
    images.add_argument("--architecture", nargs="+", metavar="KEY=VALUE", help="model_type=T and fields of its config")
    _add_run(images, IMAGES, Lengths(4000, 64, 1e-3), 8000)
    questions = commands.add_parser("questions", help="measure what is missing, on SQuAD v1.1")
    add_options(questions, QuestionOptions)
    _add_run(questions, WEIGHTS, Lengths(240, 16, 2e-4), 1500)
    text = commands.add_parser("text", help="measure what is missing, on plain text")
    add_options(text, TextOptions)
    _add_run(text, WEIGHTS, Lengths(300, 16, 1e-3), 0)
    return parser


def _add_run(parser: argparse.ArgumentParser, kind: Kind, lengths: Lengths, dense_steps: int) -> None:
    add = parser.add_argument
    add("--work", type=Path, required=True, help="dense model and results.jsonl; a rerun continues there")
    add("--name", default=parser.prog.split()[-1], help="of the study, in the results")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--weights", type=float, nargs="*", default=[0.1, 0.3, 1.0, 3.0, 10.0], help="each λ of the sweep")
    add("--widths", type=int, nargs="+", default=[4, 3, 2], help="sizes: the bytes of these uniform rows")
    add("--rows", nargs="+", help=f"some of {', '.join(kind.rows)}; all by default")
    add("--search", type=float, default=kind.search, help="share of the steps in which a search is open")
    add("--steps", type=int, default=lengths.steps, help="of every cell")
    add("--batch_size", type=int, default=lengths.batch_size)
    add("--learning_rate", type=float, default=lengths.learning_rate)
    add("--dense_steps", type=int, default=dense_steps, help="of the first training; 0 takes the model as it is")
    parser.set_defaults(kind=kind)


def _task(args: argparse.Namespace) -> Task:
    dense = Lengths(args.dense_steps, args.batch_size, args.learning_rate)
    if args.command == "images":
        model = RESNET_8 if args.architecture is None else pairs(args.architecture, "--architecture")
        return image_task(ImageOptions(model, pairs(args.data, "--data")), dense, args.name)
    if args.command == "questions":
        return question_task(pick_options(QuestionOptions, vars(args)), dense, args.name)
    return text_task(pick_options(TextOptions, vars(args)), dense, args.name)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the module's docstring describes."""
    args = _parser().parse_args(argv)
    if args.command != "render":
        kind = replace(args.kind, search=args.search)
        # Before the data is read and anything trained: a misspelled row costs nothing.
        cells = cells_of(kind, args.seeds, args.weights, args.widths, args.rows)
        run(_task(args), kind, args.work, Lengths(args.steps, args.batch_size, args.learning_rate), cells)
    lines = read_results(args.work)
    print(render(lines))
    if args.command == "render" and args.curve is not None:
        draw_curve(lines, args.curve, read_results(args.work, "plinio.jsonl"))


if __name__ == "__main__":
    try:
        main()
    except GETAError as error:
        sys.exit(f"error: {error}")
