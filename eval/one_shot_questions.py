"""Compress a model that answers questions without training at several budgets, and measure F1 in and out of its domain.

    python -m eval.one_shot_questions --model FINE_TUNED --train_file T --eval_file E --other_file O --work W

The model is one that `python -m eval.searches questions` or the recipe has fine-tuned on SQuAD v1.1; `T`, `E` and `O`
are files of its format. It is calibrated on windows of training questions, with their answers as labels. A budget is B,
bits that are stored for each weight of the original layers, step sizes counted; the scores are those of the exported
folder. A finished cell is one line of `W/results.jsonl`; an interrupted command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForQuestionAnswering

from eval.one_shot import METHODS, STEPS, bytes_for, ledger_of
from eval.results_file import Line, read_results, read_under, run_missing
from eval.study_tasks import Lengths, QuestionOptions, Task, question_task
from eval.tables.cells import stored_bytes
from geta_hf import GETAError, OneShotConfig, compress
from geta_hf.surgery.build_space import prepare_space
from geta_hf.utils.tables import format_table

DENSE = "dense"

ROWS = 8
"""Windows of a calibration batch."""

Key = tuple[str, float | None, int]
"""Method, B and number of the draw."""


def keys_of(methods: Sequence[str], budgets: Sequence[float], draws: int) -> list[Key]:
    """Return all cells in the order in which they are run: the dense model, then draw by draw."""
    cells = [(method, bits, draw) for draw in range(draws) for bits in budgets for method in methods]
    return [(DENSE, None, 0), *cells]


def batches_of(task: Task, windows: int, draw: int) -> list[dict[str, Any]]:
    """Return a draw of training windows as batches."""
    generator = torch.Generator().manual_seed(draw)
    chosen = torch.randperm(len(task.features), generator=generator)[:windows].tolist()
    return [task.collator([task.features[place] for place in chosen[at : at + ROWS]]) for at in range(0, windows, ROWS)]


def run(task: Task, args: argparse.Namespace) -> None:
    """Run the cells that the results lack."""
    own = {"windows": args.windows, "grid": args.grid, "scored": task.scored}
    settings, done = read_under(args.work, own)
    finished: dict[Any, Line] = {(line["method"], line["bits"], line["draw"]): line for line in done}
    dense = AutoModelForQuestionAnswering.from_pretrained(args.model)
    space, _ = prepare_space(dense, batches_of(task, ROWS, 0)[0])
    ledger = ledger_of(dense, space, args.grid)
    written = args.work / "cell_exported"

    def measure(key: Key) -> Line:
        method, bits, draw = key
        line: Line = {"method": method, "bits": bits, "draw": draw, "settings": settings}
        if bits is None:
            return {**line, **task.score(dense), "bytes": stored_bytes(Path(args.model))}
        begin = time.perf_counter()
        steps = STEPS.get(method, 0)
        # Recovery takes further windows of the same draw.
        batches = batches_of(task, args.windows * (2 if steps else 1), draw)
        config = OneShotConfig(target_bytes=bytes_for(ledger, bits), grid=args.grid, **METHODS[method])
        model = AutoModelForQuestionAnswering.from_pretrained(args.model)
        options: dict[str, Any] = {"sequences": args.windows, "recover_steps": steps, "overwrite": True}
        try:
            report = compress(model, batches, out=written, config=config, progress=False, **options)
        except GETAError as error:
            # Rounding alone may not reach a budget, as step sizes take their part of it.
            return {**line, "reason": str(error)}
        outcome = report.outcome
        trial = outcome.trials[outcome.chosen]
        line |= {"share": trial.share, "mean_bits": trial.mean_bits, "bytes": stored_bytes(written)}
        line |= {"trials": [(one.share, one.mean_bits, one.loss, one.loss_in_full) for one in outcome.trials]}
        line["seconds"] = round(time.perf_counter() - begin, 1)
        return {**line, **task.score(AutoModelForQuestionAnswering.from_pretrained(written))}

    run_missing(args.work, [(key, key) for key in keys_of(args.methods, args.budgets, args.draws)], finished, measure)
    shutil.rmtree(written, ignore_errors=True)


def render(lines: Sequence[Line]) -> str:
    """Return the results as a Markdown table: means over draws."""
    dense = next((line for line in lines if line["method"] == DENSE), None)
    if dense is None:
        return "no results"
    metrics = [name for name in ("f1", "other_f1") if name in dense]
    header = ("B", "method", "draws", *(f"{name} lost" for name in metrics), "parameters removed", "mean bits", "kB")
    rows = [("", DENSE, "", *(f"{dense[name]:.2f} {name}" for name in metrics), "", "", f"{dense['bytes'] / 1000:.0f}")]
    for bits, method in dict.fromkeys((line["bits"], line["method"]) for line in lines if line["bits"] is not None):
        own = [line for line in lines if (line["bits"], line["method"]) == (bits, method)]
        if any("reason" in line for line in own):
            rows.append((f"{bits:g}", method, str(len(own)), *("out of reach" for _ in metrics), "", "", ""))
            continue

        def mean(name: str, own: Sequence[Line] = own) -> float:
            return sum(float(line[name]) for line in own) / len(own)

        lost = [f"{dense[name] - mean(name):.2f}" for name in metrics]
        size = f"{mean('bytes') / 1000:.0f}"
        rows.append(
            (f"{bits:g}", method, str(len(own)), *lost, f"{mean('share'):.1%}", f"{mean('mean_bits'):.2f}", size)
        )
    return format_table(header, rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.one_shot_questions", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, help="folder of the fine-tuned model")
    add("--train_file", required=True, help="SQuAD v1.1, .json or .json.gz, to calibrate on")
    add("--eval_file", required=True, help="to be scored on")
    add("--other_file", help="questions about text of another kind, scored as well")
    add("--work", required=True, type=Path, help="results.jsonl; a rerun continues there")
    add("--methods", nargs="+", default=["ours", "same, unpruned", "magnitude, to nearest"], choices=list(METHODS))
    add("--budgets", type=float, nargs="+", default=[4.0, 3.2, 2.4], help="each B")
    add("--draws", type=int, default=1, help="draws of calibration windows")
    add("--windows", type=int, default=128, help="of calibration")
    add("--grid", default="channel", choices=("channel", "block32"))
    add("--questions", type=int, default=1000, help="of each file to score")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the module's docstring describes."""
    args = _parser().parse_args(argv)
    options = QuestionOptions(
        args.model,
        args.train_file,
        args.eval_file,
        args.other_file,
        eval_questions=args.questions,
        other_questions=args.questions,
    )
    run(question_task(options, Lengths(0, ROWS, 0.0), "questions"), args)
    print(render(read_results(args.work)))


if __name__ == "__main__":
    try:
        main()
    except GETAError as error:
        sys.exit(f"error: {error}")
