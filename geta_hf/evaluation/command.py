"""The sub-command `geta-hf eval`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
from geta_hf.utils.files import write_whole

_RUN_OPTIONS = ("data_dir", "num_fewshot", "limit", "batch_size")


@dataclass(frozen=True)
class _Scored:
    evaluation: Evaluation | None
    texts: dict[str, TextScore]


def add_command(commands: Any) -> None:
    """Add `eval` to the sub-parsers of `geta-hf`."""
    command = commands.add_parser("eval", help="score language models: lm-eval's tasks, perplexity of a text")
    command.add_argument("folders", nargs="+", metavar="DIR", help="exported or plain folders, or names on the Hub")
    command.add_argument("--dense", metavar="DIR", help="the dense model, to put before the others")
    tasks = "commonsense, blimp, lambada_openai or any of lm-eval's, with commas between them"
    command.add_argument("--tasks", metavar="NAMES", help=tasks)
    command.add_argument("--data_dir", metavar="DIR", help="the tasks' rows, in local files; no network is used then")
    command.add_argument("--text", action="append", default=[], metavar="FILE", help="perplexity of a text (or .gz)")
    command.add_argument("--block", type=int, metavar="N", help="tokens of a window over the text; 1,024 by default")
    command.add_argument("--stride", type=int, metavar="N", help="tokens by which it moves on; half of it by default")
    command.add_argument("--num_fewshot", type=int, metavar="N", help="examples in the prompt")
    command.add_argument("--limit", type=int, metavar="N", help="score the first N questions of every task")
    command.add_argument("--batch_size", default="auto", metavar="N", help="rows of a batch; auto by default")
    command.add_argument("--device", help="an accelerator if there is one, else cpu")
    command.add_argument("--dtype", default="auto", help="of the weights: float32, bfloat16; auto by default")
    command.add_argument("--output", type=Path, metavar="FILE.json", help="lm-eval's own results; one file a model")
    command.add_argument("--card", action="store_true", help="write the scores into the card of every exported DIR")
    command.set_defaults(run=run_eval)


def run_eval(arguments: argparse.Namespace) -> None:
    """Score models and print them side by side.

    Args:
        arguments: as `add_command` defines them.

    Raises:
        GETAError: nothing to score, or as `evaluate`, `perplexity` and `write_card` do.
    """
    columns, texts = _columns(arguments), _texts(arguments.text)
    _check(arguments, columns, texts)
    scored: dict[str, _Scored] = {}
    try:
        for name, folder in columns.items():
            scored[name] = _score(folder, texts, arguments)
            if arguments.output:
                write_whole(_target(arguments.output, name, len(columns)), _as_json(scored[name]))
    finally:  # what took hours is shown, whatever became of the models after it
        print(_tables(scored), end="", flush=True)
    if arguments.card:
        _write_cards(arguments, columns, scored)


def _check(arguments: argparse.Namespace, columns: Mapping[str, str], texts: Mapping[str, str]) -> None:
    """What would be an error only after a model has been scored."""
    if not arguments.tasks and not arguments.text:
        raise GETAError("nothing to score; give --tasks (say, commonsense) or --text FILE")
    check_numbers(limit=arguments.limit, batch_size=arguments.batch_size, num_fewshot=arguments.num_fewshot)
    if arguments.tasks:
        with open_tasks(arguments.tasks, arguments.data_dir, fewshot=bool(arguments.num_fewshot)):
            pass
    for name in columns if arguments.output else ():
        _check_target(arguments.output, _target(arguments.output, name, len(columns)))
    for folder in arguments.folders if arguments.card else []:
        read_structure(folder)
    for folder in columns.values():
        config = check_folder(folder)
        if texts:
            _check_window(folder, config, arguments)


def _check_target(output: Path, target: Path) -> None:
    if not target.resolve().parent.is_dir():
        raise GETAError(f"--output {output}: no such folder as {target.parent}")
    if output.is_dir() or target.is_dir():
        raise GETAError(f"--output {output}: a folder is there; give the name of a file, such as scores.json")


def _check_window(folder: str, config: PreTrainedConfig, arguments: argparse.Namespace) -> None:
    try:
        window(config, arguments.block, arguments.stride)
    except GETAError as error:
        raise GETAError(f"{folder}: {error}") from error


def _tables(scored: Mapping[str, _Scored]) -> str:
    """All that there is to print of some models, with an empty line between tables."""
    evaluations = {name: one.evaluation for name, one in scored.items() if one.evaluation}
    tables = [side_by_side(evaluations), *remarks(evaluations)] if evaluations else []
    texts = {name: one.texts for name, one in scored.items() if one.texts}
    tables += [text_table(texts)] if texts else []
    return "\n\n".join(tables) + "\n" if tables else ""


def _columns(arguments: argparse.Namespace) -> dict[str, str]:
    """Head of the column -> folder: "dense" and the folders' names, with more of the path where they are alike."""
    dense = {"dense": arguments.dense} if arguments.dense else {}
    columns = [*dense.items(), *zip(_short(arguments.folders), arguments.folders, strict=True)]
    if len({Path(folder).resolve() for _, folder in columns}) < len(columns):
        raise GETAError(f"a folder is named twice among {', '.join(folder for _, folder in columns)}")
    return dict(columns)


def _texts(paths: Sequence[str]) -> dict[str, str]:
    """Short name -> text. Raises GETAError for one that is empty, or can't be read."""
    paths = list(dict.fromkeys(paths))
    texts = dict(zip(_short(paths), map(read_text, paths), strict=True))
    for name, text in texts.items():
        if not text.strip():
            raise GETAError(f"{name} holds no text; give a file that is not empty")
    return texts


def _short(paths: Sequence[str]) -> list[str]:
    """The last part of every path, or the whole of it where that would not tell it from another."""
    names = [Path(path).resolve().name for path in paths]
    return [
        name if names.count(name) == 1 and name != "dense" else path for name, path in zip(names, paths, strict=True)
    ]


def _score(folder: str, texts: Mapping[str, str], arguments: argparse.Namespace) -> _Scored:
    options = {name: getattr(arguments, name) for name in _RUN_OPTIONS}
    model, tokenizer = load(folder, device=arguments.device, dtype=arguments.dtype)
    found = {
        name: perplexity(model, tokenizer, text, block=arguments.block, stride=arguments.stride)
        for name, text in texts.items()
    }
    evaluation = evaluate(model, arguments.tasks, tokenizer=tokenizer, **options) if arguments.tasks else None
    return _Scored(evaluation, found)


def _target(output: Path, name: str, columns: int) -> Path:
    """The file itself for one model, with the model's name in it for more."""
    shown = name.strip("./").replace("/", "__")
    return output if columns == 1 else output.with_name(f"{output.stem}_{shown}{output.suffix}")


def _as_json(scored: _Scored) -> str:
    results: dict[str, Any] = dict(scored.evaluation.results) if scored.evaluation else {"results": {}}
    if scored.texts:
        results["texts"] = {
            name: {**asdict(one), "perplexity": one.perplexity, "bits_per_byte": one.bits_per_byte}
            for name, one in scored.texts.items()
        }
    return json.dumps(results, indent=2, default=str, ensure_ascii=False) + "\n"


def _write_cards(arguments: argparse.Namespace, columns: Mapping[str, str], scored: Mapping[str, _Scored]) -> None:
    dense = {"dense": _card_metrics(scored["dense"])} if arguments.dense else {}
    for name, folder in columns.items():
        if folder in arguments.folders:
            print(f"wrote {write_card(folder, metrics={**dense, 'compressed': _card_metrics(scored[name])})}")


def _card_metrics(scored: _Scored) -> dict[str, float]:
    """Scores under names for a card, accuracies in per cent; of a group such as BLiMP the mean alone.

    The score of the first questions is no score of the task, so its name says how many there were.
    """
    found = {}
    if scored.evaluation:
        scores, limit = scored.evaluation.scores, scored.evaluation.limit
        inner = {task for name in scores if name != SUITE for one in scores[name].values() for task, _ in one.members}
        for task, metric in shown(scored.evaluation):
            if task not in inner:
                score = scores[task][metric]
                part = f", first {limit} questions{' of each task' if score.members else ''}" if limit else ""
                found[f"{task} {metric}{part}"] = score.value * (100 if metric in SHARES else 1)
    for name, one in scored.texts.items():
        found[f"{name} bits per byte"] = one.bits_per_byte
    return found
