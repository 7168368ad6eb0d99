"""Define the sub-command `geta-hf eval`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from geta_hf.errors import GETAError
from geta_hf.evaluation.harness import check_folder, check_numbers, evaluate, load, open_tasks
from geta_hf.evaluation.scores import Evaluation
from geta_hf.evaluation.table import SHARES, remarks, shown, side_by_side, text_table
from geta_hf.evaluation.tasks import SUITE
from geta_hf.evaluation.texts import TextScore, perplexity, read_text, window
from geta_hf.reporting.comparison import read_structure
from geta_hf.reporting.model_card import write_card
from geta_hf.reporting.results import TaskResult
from geta_hf.utils.files import write_whole
from geta_hf.utils.former_options import add_renamed

_RUN_OPTIONS = ("data_dir", "num_fewshot", "limit", "batch_size")


@dataclass(frozen=True)
class _Scored:
    evaluation: Evaluation | None
    texts: dict[str, TextScore]


def add_command(commands: Any) -> None:
    """Add `eval` to the sub-parsers of `geta-hf`."""
    command = commands.add_parser("eval", help="score language models on lm-eval's tasks or texts")
    command.add_argument("folders", nargs="+", metavar="DIR", help="exported or plain folders, or names on the Hub")
    command.add_argument("--dense", metavar="DIR", help="the dense model, for the first column")
    tasks = "commonsense, blimp, lambada_openai or any of lm-eval's, separated by commas"
    command.add_argument("--tasks", metavar="NAMES", help=tasks)
    add_renamed(
        command,
        "--data-dir",
        metavar="DIR",
        help="folder with the tasks' rows; no network is used then",
    )
    command.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="FILE",
        help="text file (or .gz) of which to compute the perplexity",
    )
    command.add_argument("--block", type=int, metavar="N", help="tokens of a window over the text; default: 1,024")
    command.add_argument(
        "--stride", type=int, metavar="N", help="tokens by which the window advances; default: half a window"
    )
    add_renamed(
        command,
        "--num-fewshot",
        type=int,
        metavar="N",
        help="examples in the prompt",
    )
    command.add_argument("--limit", type=int, metavar="N", help="score only the first N questions of each task")
    add_renamed(
        command,
        "--batch-size",
        default="auto",
        metavar="N",
        help="rows of a batch; default: auto",
    )
    command.add_argument("--device", help="default: an accelerator if there is one, otherwise cpu")
    command.add_argument("--dtype", default="auto", help="dtype of the weights, such as bfloat16; default: auto")
    command.add_argument(
        "--output", type=Path, metavar="FILE.json", help="write lm-eval's results, one file for each model"
    )
    command.add_argument(
        "--card", action="store_true", help="write the scores into the model card of each exported DIR"
    )
    command.set_defaults(run=run_eval)


def run_eval(arguments: argparse.Namespace) -> None:
    """Score models and print them side by side.

    Args:
        arguments: as `add_command` defines them.

    Raises:
        GETAError: nothing to score, or as `evaluate`, `perplexity` and `write_card` do.
    """
    columns = _columns(arguments)
    texts = _texts(arguments.text)
    _check(arguments, columns, texts)
    scored: dict[str, _Scored] = {}
    try:
        for name, folder in columns.items():
            scored[name] = _score(folder, texts, arguments)
            if arguments.output:
                write_whole(_target(arguments.output, name, len(columns)), _as_json(scored[name]))
    finally:  # scores that took hours are shown even if a later model fails
        print(_tables(scored), end="", flush=True)
    if arguments.card:
        _write_cards(arguments, columns, scored)


def _check(arguments: argparse.Namespace, columns: Mapping[str, str], texts: Mapping[str, str]) -> None:
    """Raise GETAError for what would otherwise fail only after a model has been scored."""
    if not arguments.tasks and not arguments.text:
        raise GETAError("nothing to score; give --tasks (say, commonsense) or --text FILE")
    check_numbers(limit=arguments.limit, batch_size=arguments.batch_size, num_fewshot=arguments.num_fewshot)
    if arguments.tasks:
        with open_tasks(arguments.tasks, arguments.data_dir, fewshot=bool(arguments.num_fewshot)):
            pass
    for name in columns:
        if arguments.output:
            _check_target(arguments.output, _target(arguments.output, name, len(columns)))
    if arguments.card:
        for folder in arguments.folders:
            read_structure(folder)
    for folder in columns.values():
        config = check_folder(folder)
        if texts:
            _check_window(folder, config, arguments)


def _check_target(output: Path, target: Path) -> None:
    if not target.resolve().parent.is_dir():
        raise GETAError(f"--output {output}: no such folder as {target.parent}")
    if output.is_dir() or target.is_dir():
        raise GETAError(f"--output {output}: a folder exists there; give the name of a file, such as scores.json")


def _check_window(folder: str, config: PreTrainedConfig, arguments: argparse.Namespace) -> None:
    try:
        window(config, arguments.block, arguments.stride)
    except GETAError as error:
        raise GETAError(f"{folder}: {error}") from error


def _tables(scored: Mapping[str, _Scored]) -> str:
    """Return everything to print, with an empty line between tables."""
    evaluations = {name: one.evaluation for name, one in scored.items() if one.evaluation}
    tables = [side_by_side(evaluations), *remarks(evaluations)] if evaluations else []
    texts = {name: one.texts for name, one in scored.items() if one.texts}
    tables += [text_table(texts)] if texts else []
    return "\n\n".join(tables) + "\n" if tables else ""


def _columns(arguments: argparse.Namespace) -> dict[str, str]:
    """Return head of the column -> folder: "dense" and the folders' names, or full paths where names are equal."""
    dense = {"dense": arguments.dense} if arguments.dense else {}
    columns = [*dense.items(), *zip(_short(arguments.folders), arguments.folders, strict=True)]
    if len({Path(folder).resolve() for _, folder in columns}) < len(columns):
        raise GETAError(f"a folder is given twice among {', '.join(folder for _, folder in columns)}")
    return dict(columns)


def _texts(paths: Sequence[str]) -> dict[str, str]:
    """Return short name -> text. Raise GETAError for one that is empty or can't be read."""
    # By short name, a repeated file would look like two of the same name.
    paths = list(dict.fromkeys(paths))
    texts = dict(zip(_short(paths), map(read_text, paths), strict=True))
    for name, text in texts.items():
        if not text.strip():
            raise GETAError(f"{name} contains no text; give a file that is not empty")
    return texts


def _short(paths: Sequence[str]) -> list[str]:
    """Return the last part of every path, or the full path where the last parts are equal."""
    names = [Path(path).resolve().name for path in paths]
    return [
        name if names.count(name) == 1 and name != "dense" else path for name, path in zip(names, paths, strict=True)
    ]


def _score(folder: str, texts: Mapping[str, str], arguments: argparse.Namespace) -> _Scored:
    options = {name: getattr(arguments, name) for name in _RUN_OPTIONS}
    # Loaded once for texts and tasks.
    model, tokenizer = load(folder, device=arguments.device, dtype=arguments.dtype)
    found = {
        name: perplexity(model, tokenizer, text, block=arguments.block, stride=arguments.stride)
        for name, text in texts.items()
    }
    evaluation = evaluate(model, arguments.tasks, tokenizer=tokenizer, **options) if arguments.tasks else None
    return _Scored(evaluation, found)


def _target(output: Path, name: str, columns: int) -> Path:
    """Return the output file; for several models, with the model's name in it."""
    shown = name.strip("./").replace("/", "__")
    return output if columns == 1 else output.with_name(f"{output.stem}_{shown}{output.suffix}")


def _as_json(scored: _Scored) -> str:
    results: dict[str, Any] = dict(scored.evaluation.results) if scored.evaluation else {"results": {}}
    if scored.texts:
        results["texts"] = {
            name: {**asdict(one), "perplexity": one.perplexity, "bits_per_byte": one.bits_per_byte}
            for name, one in scored.texts.items()
        }
    # lm-eval's results hold functions and dtypes, for which JSON has no form.
    return json.dumps(results, indent=2, default=str, ensure_ascii=False) + "\n"


def _write_cards(arguments: argparse.Namespace, columns: Mapping[str, str], scored: Mapping[str, _Scored]) -> None:
    local = arguments.data_dir is not None
    dense = {"dense": _card_results(scored["dense"], local)} if arguments.dense else {}
    for name, folder in columns.items():
        if folder in arguments.folders:
            results = {**dense, "compressed": _card_results(scored[name], local)}
            print(f"wrote {write_card(folder, results=results)}")


def _card_results(scored: _Scored, local: bool) -> list[TaskResult]:
    """Return one result for each task or text: accuracies in percent, and only the mean of a group such as BLiMP.

    A score over the first questions is not a score of the task, so its name gives their number.

    Args:
        scored: of one model.
        local: whether the rows came from local files instead of the task's own data set.
    """
    found: dict[str, TaskResult] = {}
    if scored.evaluation:
        scores = scored.evaluation.scores
        limit = scored.evaluation.limit
        # The 67 paradigms of BLiMP would fill a card. The commonsense tasks are shown by themselves.
        inner = {task for name in scores if name != SUITE for one in scores[name].values() for task, _ in one.members}
        for task, metric in shown(scored.evaluation):
            if task not in inner:
                score = scores[task][metric]
                part = ""
                if limit:
                    each = " of each task" if score.members else ""
                    part = f", first {limit} questions{each}"
                scale = 100 if metric in SHARES else 1
                known = found.get(task) or _measured(scored.evaluation, task, local)
                label = f"{task} {metric}{part}"
                errors = {} if score.stderr is None else {label: scale * score.stderr}
                metrics = {**known.metrics, label: scale * score.value}
                found[task] = replace(known, metrics=metrics, stderr={**known.stderr, **errors})
    texts = [TaskResult(name, {f"{name} bits per byte": one.bits_per_byte}) for name, one in scored.texts.items()]
    return [*found.values(), *texts]


def _measured(evaluation: Evaluation, task: str, local: bool) -> TaskResult:
    """Return on what a task, or a group of tasks, was measured, still without scores."""
    members = {member for one in evaluation.scores[task].values() for member, _ in one.members} or {task}
    configs, counts = evaluation.results.get("configs", {}), evaluation.results.get("n-samples", {})
    own = [configs.get(member, {}) for member in members]
    splits = {one.get("test_split") or one.get("validation_split") for one in own} - {None}
    sizes = [counts[member] for member in members if member in counts]
    return TaskResult(
        f"{task}, local files" if local else task,
        {},
        split=", ".join(sorted(map(str, splits))) or None,
        samples=sum(int(size["effective"]) for size in sizes) or None,
        total=sum(int(size["original"]) for size in sizes) or None,
    )
