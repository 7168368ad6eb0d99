"""Compare rules at equal BOPs on trained models: saliency x forgetting x bits over several seeds.

In addition: the defaults with a teacher, and the defaults with weights that are rounded only after training.

    python eval/study_rules.py questions --model DIR --train_file train-v1.1.json --eval_file dev-v1.1.json --work W
    python eval/study_rules.py text --texts wiki.txt --work W
    python eval/study_rules.py table --work W

Every cell starts from the same dense model, which is trained once and kept in the work folder, takes the same steps and
ends at the same share of parameters and the same mean width. `dense, trained on` takes those steps without
compression, so that further training is not counted in anyone's favour. A finished cell is one line of
`W/results.jsonl`; an interrupted study continues there. Seeds are the outer loop, the most telling cells first.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, set_seed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from eval.results_file import read_results, run_missing
from eval.study_table import CONTROL, DENSE, MASKED, OURS, PAPER, ROUNDED, TAUGHT, Line, tables
from eval.study_tasks import (
    Lengths,
    QuestionOptions,
    Task,
    TextOptions,
    dense_model,
    question_task,
    text_task,
    training_arguments,
)
from geta_hf import GETAConfig, GETAError, GETATrainer, PruningSpace
from geta_hf.methods import PostTrainingConfig
from geta_hf.qadg import kept_indices, zero_groups

RULES = {
    "saliency": ("fisher", "taylor", "hesso"),
    "forgetting": ("uniform", "paper"),
    "bit_rule": ("sensitivity", "ppsg", "paper"),
}
"""The choices that are crossed, our default first."""


@dataclass(frozen=True)
class Cell:
    """One combination of rules; without rules, a dense model. `rounded` ones are rounded only in the end."""

    name: str
    rules: dict[str, Any] = field(default_factory=dict)
    rounded: bool = False


@dataclass(frozen=True)
class Limits:
    """Hold what every cell must reach.

    Attributes:
        target_parameters: share of the prunable parameters to remove.
        bits: (b_l, b_u).
        mean_bits: mean bit width of the remaining weights.
        changes: further fields of GETAConfig, the same for all cells.
    """

    target_parameters: float = 0.5
    bits: tuple[int, int] = (3, 8)
    mean_bits: float = 4.0
    changes: dict[str, Any] = field(default_factory=dict)


def all_cells() -> list[Cell]:
    """List all cells: paper, defaults, both dense models, other rules by distance, two that change no rule, a score."""
    crossed = [dict(zip(RULES, values, strict=True)) for values in product(*RULES.values())]
    defaults, *rest = sorted(crossed, key=_changed)  # stable
    paper = GETAConfig.paper()
    preset = {
        rule: getattr(paper, rule) for rule in (*RULES, "clipping", "learn_exponent", "learn_activation_exponent")
    }
    others = [Cell(" / ".join(rules.values()), rules) for rules in rest]
    beside = [Cell(ROUNDED, defaults, rounded=True), Cell(TAUGHT, {**defaults, "distill_logits": 1.0})]
    beside.append(Cell(MASKED, {**defaults, "saliency": "mask_fisher"}))
    return [Cell(PAPER, preset), Cell(OURS, defaults), Cell(CONTROL), Cell(DENSE), *others, *beside]


def _changed(rules: dict[str, str]) -> int:
    return sum(rules[rule] != choices[0] for rule, choices in RULES.items())


# ----------------------------------------------------------------------------------------------------------- a cell


def run_cell(task: Task, cell: Cell, seed: int, folder: Path, lengths: Lengths, limits: Limits) -> Line:
    """Train and score one cell.

    Args:
        task: what to train.
        cell: under which rules.
        seed: of the order of the data and of dropout.
        folder: the dense model to start from; Trainer writes to a folder next to it.
        lengths: of the training.
        limits: what a compressed cell must reach.

    Returns:
        The task's metrics, `seconds`, and for a compressed cell `relative_bops`, `mean_bits`, `kept_parameters` (share
        of the prunable ones), `kept_heads` and `kept_channels` (share of each), and `bits` by layer where known.
    """
    set_seed(seed)
    seconds = time.perf_counter()
    model = task.load(folder)
    found: Line = {}
    if cell.name != DENSE:
        trainer = _trainer(task, cell, seed, model, folder.parent, lengths, limits)
        trainer.train()
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        if isinstance(trainer, GETATrainer):
            state = trainer.compression_state()
            found = {"relative_bops": state["relative_bops"], "mean_bits": state["mean_bits"]}
            found |= kept_shares(model, trainer.space)
    scores = task.score(model)
    return {**scores, **found, "seconds": round(time.perf_counter() - seconds, 1)}


def _trainer(
    task: Task, cell: Cell, seed: int, model: PreTrainedModel, work: Path, lengths: Lengths, limits: Limits
) -> Trainer:
    common: dict[str, Any] = {
        "model": model,
        "args": training_arguments(task, work / "cell", lengths, seed),
        "train_dataset": task.features,
        "data_collator": task.collator,
    }
    if not cell.rules:
        return Trainer(**common)
    return GETATrainer(geta_config=_config(cell, limits), **common)


def _config(cell: Cell, limits: Limits) -> GETAConfig:
    values = {name: getattr(limits, name) for name in ("target_parameters", "bits", "mean_bits")}
    kind = PostTrainingConfig if cell.rounded else GETAConfig
    return kind(**{**values, **limits.changes, **cell.rules})


def kept_shares(model: PreTrainedModel, space: PruningSpace) -> dict[str, float]:
    """Return the shares of prunable parameters, heads and channels that remain."""
    removed = zero_groups(model, space)
    kept = kept_indices(space, removed)
    lost = 0
    for name, cuts in kept.items():
        shape = space.shapes[name]
        left = math.prod(len(cuts[dim]) if dim in cuts else size for dim, size in enumerate(shape))
        lost += 0 if name in space.buffers else math.prod(shape) - left
    shares = {"kept_parameters": 1 - lost / sum(family.size * family.parameters for family in space.prunable)}
    for kind in ("heads", "channels"):
        masks = [removed[family.name] for family in space.prunable if family.kind == kind]
        if masks:
            shares[f"kept_{kind}"] = float((~torch.cat(masks)).float().mean())
    return shares


# ---------------------------------------------------------------------------------------------------------- a study


def run_study(
    task: Task, work: Path, lengths: Lengths, limits: Limits, seeds: Sequence[int], names: Sequence[str] | None = None
) -> list[Line]:
    """Run all cells that `work/results.jsonl` lacks, and appends each as it ends.

    Args:
        task: what to train.
        work: holds the dense models and the results.
        lengths: of every cell.
        limits: what every compressed cell must reach.
        seeds: one run of every cell for each; the outer loop.
        names: the cells to run; None for all.

    Returns:
        The new lines. A cell that raises GETAError is reported, skipped, and tried again by the next run.

    Raises:
        GETAError: an unknown name, or results of this study under other settings.
    """
    dense = {**task.settings, **vars(task.dense)}
    settings = json.loads(json.dumps({**vars(lengths), **vars(limits), "dense": dense, "scored": task.scored}))
    done = [line for line in read_results(work) if line["study"] == task.name]
    if any(line["settings"] != settings for line in done):
        raise GETAError(f"{work} holds results of {task.name} under other settings; give another --work or --name")
    finished = {(line["cell"], line["seed"]): line for line in done}
    folder = dense_model(task, work)

    def measure(named: tuple[Cell, int]) -> Line:
        cell, seed = named
        measured = run_cell(task, cell, seed, folder, lengths, limits)
        line = {"study": task.name, "cell": cell.name, "seed": seed, "rules": cell.rules, "settings": settings}
        return {**line, "metrics": task.metrics, "larger_is_better": task.larger_is_better, **measured}

    cells = [((cell.name, seed), (cell, seed)) for cell, seed in _order(seeds, names)]
    hidden = ("study", "rules", "settings", "metrics", "larger_is_better")
    return run_missing(work, cells, finished, measure, hidden, f"{task.name}, ")


def _order(seeds: Sequence[int], names: Sequence[str] | None) -> Iterator[tuple[Cell, int]]:
    """Yield cells with seeds outermost; the dense model, which no seed changes, once."""
    known = {cell.name: cell for cell in all_cells()}
    unknown = sorted(set(names or ()) - known.keys())
    if unknown:
        raise GETAError(f"there is no cell {unknown}; there are {list(known)}")
    for seed, cell in product(seeds, known.values()):
        if cell.name == DENSE and seed != seeds[0]:
            continue
        if names is None or cell.name in names:
            yield cell, seed


# ---------------------------------------------------------------------------------------------------------- command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    defaults = {"questions": (Lengths(1500, 16, 2e-4), Lengths(240, 16, 2e-4))}
    defaults["text"] = (Lengths(4000, 16, 2e-3), Lengths(300, 16, 1e-3))
    for command, options in (("questions", QuestionOptions), ("text", TextOptions)):
        sub = commands.add_parser(command)
        add_options(sub, options)
        _add_study(sub, command, *defaults[command])
    commands.add_parser("table").add_argument("--work", type=Path, required=True)
    return parser


def add_options(parser: argparse.ArgumentParser, options: type) -> None:
    """Add an argument for each field of a dataclass of options."""
    for option in fields(options):
        text = str(option.type)
        kind: Any = int if text.startswith("int") else str
        required = option.default is MISSING
        value = None if required else option.default
        if text == "bool":
            parser.add_argument(f"--{option.name}", action="store_true")
        else:
            several = "+" if text.startswith("Sequence") else None
            parser.add_argument(f"--{option.name}", type=kind, nargs=several, required=required, default=value)


def _add_study(parser: argparse.ArgumentParser, name: str, dense: Lengths, cell: Lengths) -> None:
    add = parser.add_argument
    add("--work", type=Path, required=True, help="dense models and results.jsonl; a rerun continues there")
    add("--name", default=name, help="of the study, in the results")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--cells", nargs="+", help=f"some of: {', '.join(cell.name for cell in all_cells())}")
    for prefix, lengths in (("dense_", dense), ("", cell)):
        for item in fields(Lengths):
            value = getattr(lengths, item.name)
            add(f"--{prefix}{item.name}", type=type(value), default=value)
    limits = Limits()
    add("--target_parameters", type=float, default=limits.target_parameters, help="share of the prunable to remove")
    add("--bits", type=int, nargs=2, default=limits.bits, metavar=("LOW", "HIGH"))
    add("--mean_bits", type=float, default=limits.mean_bits)
    add("--changes", type=json.loads, default={}, help="further fields of GETAConfig for all cells, as JSON")


def pick_options(kind: type, values: dict[str, Any], prefix: str = "") -> Any:
    """Make options of the parsed arguments that bear the names of their fields, with a prefix."""
    return kind(**{item.name: values[prefix + item.name] for item in fields(kind)})


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the module's docstring describes."""
    args = _parser().parse_args(argv)
    if args.command == "table":
        print(tables(read_results(args.work)))
        return
    values = {**vars(args), "bits": tuple(args.bits)}
    dense = pick_options(Lengths, values, "dense_")
    if args.command == "questions":
        task = question_task(pick_options(QuestionOptions, values), dense, args.name)
    else:
        task = text_task(pick_options(TextOptions, values), dense, args.name)
    run_study(task, args.work, pick_options(Lengths, values), pick_options(Limits, values), args.seeds, args.cells)
    print(tables([line for line in read_results(args.work) if line["study"] == args.name]))


if __name__ == "__main__":
    try:
        main()
    except GETAError as error:
        sys.exit(f"error: {error}")
