"""Run a table of the paper's evaluation, or render what has been measured.

    python -m eval.tables table5 --model M --train_file T --eval_file E --other_file O --work W
    python -m eval.tables table5 --model M --texts T --eval_texts E --other_texts O --work W
    python -m eval.tables images --architecture cifar_resnet --data idx_dir=fashion-mnist --work W
    python -m eval.tables table4 --model microsoft/resnet-50 --data dataset_name=ILSVRC/imagenet-1k --work W
    python -m eval.tables render --work W [--study NAME] [--curve F1.svg]

The first form asks questions about text (SQuAD), the second predicts the next token of plain text. `M` is a folder or a
Hub name, such as `bert-base-uncased`. The dense model is fine-tuned from it once and kept in `W`; every cell starts
from there and takes the same number of steps; `--dense_steps 0` starts from `M` itself. A finished cell is one line of
`W/results.jsonl`; an interrupted command goes on where it stopped. Once there is a dense model, several commands with
other rows or tables may share a folder, also at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.results_file import read_results
from eval.study_tasks import (
    ImageOptions,
    Lengths,
    QuestionOptions,
    Task,
    TextOptions,
    image_task,
    question_task,
    text_task,
)
from eval.tables.cells import cells_of, run_table
from eval.tables.curve import draw_curve
from eval.tables.render import render
from eval.tables.rows import IMAGES, TABLES
from geta_hf import GETAError
from geta_hf.recipes.arguments import apply_overrides


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.tables", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    printing = commands.add_parser("render", help="print the tables as Markdown")
    printing.add_argument("--work", type=Path, required=True)
    printing.add_argument("--study", help="the name of one alone; all by default")
    printing.add_argument("--curve", type=Path, help="write joint against sequential as a picture, .svg or .png")
    for table in TABLES.values():
        added = commands.add_parser(table.name, help=table.title)
        if table.name in IMAGES:
            _add_images(added)
        else:
            _add_table(added)
    return parser


def _add_images(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--work", type=Path, required=True, help="dense model and results.jsonl; a rerun continues there")
    add("--name", default="images", help="of the study, in the results")
    add("--model", help="folder or Hub name to train first")
    add("--architecture", nargs="+", metavar="KEY=VALUE", help="instead: model_type=T and fields of its config")
    add("--data", nargs="+", metavar="KEY=VALUE", required=True, help="fields of the recipe's DataArguments")
    add("--batch_norm_momentum", type=float, help="of all runs; by default the model's own")
    add("--training", nargs="+", metavar="KEY=VALUE", default=[], help="fields of TrainingArguments, for all runs")
    add("--steps", type=int, default=10000, help="of every cell")
    add("--batch_size", type=int, default=64)
    add("--learning_rate", type=float, default=1e-3)
    add("--dense_steps", type=int, default=50000, help="of the first training; 0 takes the model as it is")
    add("--dense_learning_rate", type=float, default=1e-3)
    _add_choice(parser)


def _add_table(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--work", type=Path, required=True, help="dense model and results.jsonl; a rerun continues there")
    add("--name", default="squad", help="of the study, in the results")
    add("--model", required=True, help="folder or Hub name to fine-tune first")
    add("--train_file", help="SQuAD v1.1, .json or .json.gz; with --eval_file")
    add("--eval_file")
    add("--other_file", help="questions about text of another kind, only scored")
    add("--texts", nargs="+", help="plain text to predict, in place of questions")
    add("--eval_texts", nargs="+", help="plain text to be scored; the end of --texts without")
    add("--other_texts", nargs="+", default=[], help="plain text of another kind, only scored")
    add("--block", type=int, default=128, help="tokens of a sequence of plain text")
    add("--eval_blocks", type=int, default=400, help="sequences of plain text to be scored")
    add("--train_questions", type=int, help="size of a random sample; all by default")
    add("--eval_questions", type=int, help="size of a random sample; all by default")
    add("--other_questions", type=int, help="size of a random sample; all by default")
    add("--max_length", type=int, default=384, help="tokens of a training window")
    add("--doc_stride", type=int, default=128)
    add("--bf16", action="store_true", help="run under bfloat16 autocast")
    add("--steps", type=int, default=5500, help="of every cell; about an epoch of SQuAD at 16 windows a step")
    add("--batch_size", type=int, default=16)
    add("--learning_rate", type=float, default=5e-5)
    add("--dense_steps", type=int, default=11000, help="of the first fine-tuning")
    add("--dense_learning_rate", type=float, default=5e-5)
    _add_choice(parser)


def _add_choice(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0])
    add("--sparsity", type=float, nargs="+", help="some of the table's; all by default")
    add("--rows", nargs="+", help="some of the table's; all by default")


def _image_options(args: argparse.Namespace) -> ImageOptions:
    if (args.model is None) == (args.architecture is None):
        raise GETAError("give one of --model and --architecture")
    model = args.model or pairs(args.architecture, "--architecture")
    return ImageOptions(
        model,
        pairs(args.data, "--data"),
        pairs(args.training, "--training"),
        batch_norm_momentum=args.batch_norm_momentum,
    )


def pairs(texts: Sequence[str], option: str) -> dict[str, Any]:
    """Return `key=value` texts as a dict, values read as YAML. Raise GETAError for a text without `=`."""
    values: dict[str, Any] = {}
    for text in texts:
        key, equals, _ = text.partition("=")
        if not equals or not key:
            raise GETAError(f"{option} {text!r}: expected key=value")
        apply_overrides(values, [f"--{text}"])
    return values


def _task(args: argparse.Namespace) -> Task:
    dense = Lengths(args.dense_steps, args.batch_size, args.dense_learning_rate)
    if args.command in IMAGES:
        return image_task(_image_options(args), dense, args.name)
    asked = args.train_file is not None and args.eval_file is not None
    if asked == (args.texts is not None):
        raise GETAError("give --train_file and --eval_file for questions, or --texts for plain text")
    if not asked:
        texts = TextOptions(
            texts=args.texts,
            eval_texts=args.eval_texts,
            other_texts=args.other_texts,
            model=args.model,
            block=args.block,
            eval_blocks=args.eval_blocks,
            bf16=args.bf16,
        )
        return text_task(texts, dense, args.name)
    questions = QuestionOptions(
        model=args.model,
        train_file=args.train_file,
        eval_file=args.eval_file,
        other_file=args.other_file,
        train_questions=args.train_questions,
        eval_questions=args.eval_questions,
        other_questions=args.other_questions,
        max_length=args.max_length,
        eval_max_length=384,
        doc_stride=args.doc_stride,
        bf16=args.bf16,
    )
    return question_task(questions, dense, args.name)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the module's docstring describes."""
    args = _parser().parse_args(argv)
    if args.command == "render":
        lines = [line for line in read_results(args.work) if args.study in (None, line["study"])]
        print(render(lines))
        if args.curve is not None:
            draw_curve(lines, args.curve)
        return
    table = TABLES[args.command]
    # Before the data is read and anything trained: a misspelled row costs nothing.
    cells = cells_of(table, args.seeds, args.sparsity, args.rows)
    task = _task(args)
    run_table(table, task, args.work, Lengths(args.steps, args.batch_size, args.learning_rate), cells)
    print(render([line for line in read_results(args.work) if line["table"] == table.name]))


if __name__ == "__main__":
    try:
        main()
    except GETAError as error:
        sys.exit(f"error: {error}")
