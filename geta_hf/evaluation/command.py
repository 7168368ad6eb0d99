"""The sub-command `geta-hf eval`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from geta_hf.card import write_card
from geta_hf.errors import GETAError
from geta_hf.evaluation.harness import check_numbers, evaluate, load, open_tasks
from geta_hf.evaluation.scores import Evaluation
from geta_hf.evaluation.table import SHARES, remarks, shown, side_by_side, text_table
from geta_hf.evaluation.tasks import SUITE
from geta_hf.evaluation.texts import TextScore, perplexity, read_text
from geta_hf.files import write_whole
from geta_hf.report import read_structure

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
    texts = {path: read_text(path) for path in arguments.text}
    _check(arguments)
    columns = _columns(arguments)
    scored = {}
    for name, folder in columns.items():
        scored[name] = _score(folder, texts, arguments)
        if arguments.output:
            target = _target(arguments.output, name, len(columns))
            write_whole(target, _as_json(scored[name]))
    evaluations = {name: one.evaluation for name, one in scored.items() if one.evaluation}
    tables = [side_by_side(evaluations), *remarks(evaluations)] if evaluations else []
    tables += [text_table({name: one.texts for name, one in scored.items()})] if texts else []
    print("\n\n".join(tables))
    if arguments.card:
        _write_cards(arguments, columns, scored)


def _check(arguments: argparse.Namespace) -> None:
    """What would be an error only after a model has been scored."""
    if not arguments.tasks and not arguments.text:
        raise GETAError("nothing to score; give --tasks (say, commonsense) or --text FILE")
    check_numbers(limit=arguments.limit, batch_size=arguments.batch_size, num_fewshot=arguments.num_fewshot)
    if arguments.tasks:
        with open_tasks(arguments.tasks, arguments.data_dir, fewshot=bool(arguments.num_fewshot)):
            pass
    if arguments.output and not arguments.output.resolve().parent.is_dir():
        raise GETAError(f"--output {arguments.output}: no such folder")
    for folder in arguments.folders if arguments.card else []:
        read_structure(folder)


def _columns(arguments: argparse.Namespace) -> dict[str, str]:
    """Head of the column -> folder: "dense" and the folders' names, with more of the path where they are alike."""
    names = [Path(folder).resolve().name for folder in arguments.folders]
    heads = [
        name if names.count(name) == 1 and name != "dense" else folder
        for name, folder in zip(names, arguments.folders, strict=True)
    ]
    dense = {"dense": arguments.dense} if arguments.dense else {}
    columns = [*dense.items(), *zip(heads, arguments.folders, strict=True)]
    if len({Path(folder).resolve() for _, folder in columns}) < len(columns):
        raise GETAError(f"a folder is named twice among {', '.join(folder for _, folder in columns)}")
    return dict(columns)


def _score(folder: str, texts: Mapping[str, str], arguments: argparse.Namespace) -> _Scored:
    options = {name: getattr(arguments, name) for name in _RUN_OPTIONS}
    model, tokenizer = load(folder, device=arguments.device, dtype=arguments.dtype)
    found = {
        Path(path).name: perplexity(model, tokenizer, text, block=arguments.block, stride=arguments.stride)
        for path, text in texts.items()
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
    """Scores under names for a card, accuracies in per cent; of a group such as BLiMP the mean alone."""
    found = {}
    if scored.evaluation:
        scores = scored.evaluation.scores
        inner = {task for name in scores if name != SUITE for one in scores[name].values() for task, _ in one.members}
        for task, metric in shown(scored.evaluation):
            if task not in inner:
                found[f"{task} {metric}"] = scores[task][metric].value * (100 if metric in SHARES else 1)
    for name, one in scored.texts.items():
        found[f"{name} bits per byte"] = one.bits_per_byte
    return found
