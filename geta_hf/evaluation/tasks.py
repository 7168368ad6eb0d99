"""Resolve names of lm-eval's tasks, and write lm-eval's own tasks over local files.

A local task includes lm-eval's task of the same name from the installed package and changes only the source of rows, so
its prompts, metrics and version are lm-eval's.
"""

from __future__ import annotations

import difflib
import fnmatch
import gzip
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from geta_hf.errors import GETAError
from geta_hf.utils.files import write_whole

SUITE = "commonsense"
COMMONSENSE: Mapping[str, str] = {
    "boolq": "acc",
    "piqa": "acc_norm",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "arc_easy": "acc_norm",
    "arc_challenge": "acc_norm",
    "openbookqa": "acc_norm",
}
"""The seven tasks of `commonsense`, and the metric of each that enters their mean."""

BLIMP = "blimp"

# Task -> its YAML file in lm-eval, the split that it scores, and the fields of a row that it reads.
_LOCAL = {
    "boolq": ("super_glue/boolq/default.yaml", "validation", ("passage", "question", "label")),
    "piqa": ("piqa/piqa.yaml", "validation", ("goal", "sol1", "sol2", "label")),
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation", ("activity_label", "ctx_a", "ctx_b", "endings", "label")),
    "winogrande": ("winogrande/default.yaml", "validation", ("sentence", "option1", "option2", "answer")),
    "arc_easy": ("arc/arc_easy.yaml", "test", ("question", "choices", "answerKey")),
    "arc_challenge": ("arc/arc_challenge.yaml", "test", ("question", "choices", "answerKey")),
    "openbookqa": ("openbookqa/openbookqa.yaml", "test", ("question_stem", "choices", "answerKey")),
    "lambada_openai": ("lambada/lambada_openai.yaml", "test", ("text",)),
}
_PAIR = ("sentence_good", "sentence_bad")
_ENDINGS = (".jsonl.gz", ".jsonl")


def split_names(tasks: str | Sequence[str]) -> list[str]:
    """Return task names without repetition, `commonsense` as its seven. Raise GETAError if there are none.

    Args:
        tasks: "a,b" or ["a", "b"].
    """
    given = tasks.split(",") if isinstance(tasks, str) else [part for name in tasks for part in name.split(",")]
    names = [name.strip() for name in given if name.strip()]
    if not names:
        raise GETAError("no task is named; try tasks='commonsense', or any names of lm-eval's tasks")
    found: list[str] = []
    for name in names:
        if name == SUITE:
            found += COMMONSENSE
        else:
            found.append(name)
    return list(dict.fromkeys(found))


def stock_folder() -> Path:
    """Return the folder of the installed lm-eval's tasks. Raise GETAError if lm-eval is not installed."""
    # Found and not imported: the import takes seconds, and only the folder is needed.
    found = importlib.util.find_spec("lm_eval")
    if found is None or found.origin is None:
        raise GETAError("lm-eval is not installed; pip install 'geta_hf[eval]'")
    return Path(found.origin).parent / "tasks"


@cache
def stock_manager() -> Any:
    """Build lm-eval's index of all its tasks. It takes seconds, so all models of a process share it."""
    stock_folder()
    from lm_eval.tasks import TaskManager

    return TaskManager()


def blimp_size() -> int:
    """Return the number of paradigms of the installed lm-eval's BLiMP."""
    return len(yaml.safe_load((stock_folder() / "blimp/_blimp.yaml").read_text(encoding="utf-8"))["task"])


def stock_tasks(names: Sequence[str]) -> tuple[Any, list[str]]:
    """Return lm-eval's index and the names in it, with patterns such as `blimp_*` replaced by their matches.

    Raises:
        GETAError: lm-eval is not installed, or does not know a name.
    """
    manager = stock_manager()
    found: list[str] = []
    for name in names:
        matches = manager.match_tasks([name])
        if not matches:
            raise GETAError(f"lm-eval knows no task {name!r}{_close(name, [SUITE, *manager.all_tasks])}")
        found += matches
    return manager, list(dict.fromkeys(found))


def write_tasks(
    data_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    tasks: str | Sequence[str] | None = None,
    *,
    fewshot: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> list[str]:
    """Write lm-eval's tasks over local files: one YAML file each, which includes the installed lm-eval's own.

    Args:
        data_dir: holds `<task>/<split>.jsonl.gz` (or `.jsonl`), rows in the fields of the task's data set on the Hub,
            and `blimp/<paradigm>.jsonl.gz`. The split is test for ARC, OpenBookQA and LAMBADA, validation for the
            others; `train`, if present, supplies examples in the prompt.
        out_dir: where to write, for `lm_eval run --include_path`; created if it does not exist.
        tasks: names, or patterns such as `blimp_*`, which match tasks that have files; by default all that have files.
            `blimp` is the mean over the paradigms that have files.
        fewshot: whether the commonsense tasks need their `train` file.
        cache_dir: where `datasets` stores its tables; by default in its own cache.

    Returns:
        The names to give to lm-eval: those of `tasks`, or all, with the paradigms of BLiMP as `blimp`.

    Raises:
        GETAError: lm-eval is not installed, a task can't be read from local files, or a file is missing or has no rows.
    """
    stock = stock_folder()
    source = Path(data_dir)
    target = Path(out_dir)
    if not source.is_dir():
        raise GETAError(f"{source}: no such folder; data_dir holds a folder for every task")
    names = _opened(split_names(tasks), source) if tasks else _present(source)
    files: dict[str, dict[str, Any]] = {}
    for name in names:
        if name == BLIMP:
            files |= _blimp(source, stock)
        else:
            files[name] = _local(name, source, stock, fewshot)
    target.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if cache_dir is not None and "dataset_kwargs" in content:
            content["dataset_kwargs"]["cache_dir"] = os.fspath(cache_dir)
        write_whole(target / f"{name}.yaml", yaml.safe_dump(content, sort_keys=False))
    return names


def _present(source: Path) -> list[str]:
    found = [name for name, (_, split, _) in _LOCAL.items() if _file(source / name, split)]
    found += [BLIMP] if (source / BLIMP).is_dir() else []
    if not found:
        raise GETAError(f"{source} has no files for any of {', '.join((*_LOCAL, BLIMP))}")
    return found


def _opened(names: Sequence[str], source: Path) -> list[str]:
    """Return the names, with patterns replaced by their matches among the tasks that have files."""
    found: list[str] = []
    for name in names:
        # Matched here and not by lm-eval, which finds only the tasks that have been written.
        if any(sign in name for sign in "*?["):
            there = [*_present(source), *(f"{BLIMP}_{paradigm}" for paradigm in _paradigms(source))]
            matches = fnmatch.filter(there, name)
            if not matches:
                raise GETAError(f"{source} has no file for a task {name!r}; there are {', '.join(there)}")
            found += matches
        else:
            found.append(name)
    if BLIMP in found:  # the group contains its paradigms, and lm-eval refuses to run one twice
        found = [name for name in found if not name.startswith(f"{BLIMP}_")]
    return list(dict.fromkeys(found))


def _paradigms(source: Path) -> list[str]:
    """Return the paradigms of BLiMP that have a file."""
    ends = [(path, ending) for path in sorted((source / BLIMP).glob("*.jsonl*")) for ending in _ENDINGS]
    return list(dict.fromkeys(path.name.removesuffix(ending) for path, ending in ends if path.name.endswith(ending)))


def _local(name: str, source: Path, stock: Path, fewshot: bool) -> dict[str, Any]:
    """Define a task over its files, and disable the other splits that lm-eval's own would load."""
    if name.startswith(f"{BLIMP}_"):
        return _paradigm(name.removeprefix(f"{BLIMP}_"), source, stock)
    if name not in _LOCAL:
        known = [SUITE, *_LOCAL, BLIMP]
        raise GETAError(f"no task {name!r} from local files{_close(name, known)}; there are {', '.join(known)}")
    path, split, fields = _LOCAL[name]
    data = {split: _needed(source / name, split, fields)}
    if (fewshot and name in COMMONSENSE) or _file(source / name, "train"):
        data["train"] = _needed(source / name, "train", fields)
    # An included task names all its splits. Those without a file here have to be None, or lm-eval looks for them.
    splits = {f"{part}_split": part if part in data else None for part in ("validation", "test")}
    training = {"training_split": "train" if "train" in data else None}
    return _task(name, stock / path, data) | training | splits


def _blimp(source: Path, stock: Path) -> dict[str, dict[str, Any]]:
    """Define BLiMP as the group of the paradigms that have a file."""
    paradigms = _paradigms(source)
    if not paradigms:
        raise GETAError(f"{source / BLIMP} holds no <paradigm>{_ENDINGS[0]}")
    tasks = {f"{BLIMP}_{name}": _paradigm(name, source, stock) for name in paradigms}
    group = {"include": os.fspath(_included(stock / "blimp/_blimp.yaml")), "group": BLIMP, "task": list(tasks)}
    return {**tasks, BLIMP: group}


def _paradigm(name: str, source: Path, stock: Path) -> dict[str, Any]:
    # On the Hub the split of the pairs is called `train`, although lm-eval scores it.
    return _task(f"{BLIMP}_{name}", stock / f"blimp/{name}.yaml", {"train": _needed(source / BLIMP, name, _PAIR)})


def _task(name: str, stock: Path, data: dict[str, str]) -> dict[str, Any]:
    # None overwrites the name of a subset on the Hub, which the included task may have.
    rows = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": data}}
    return {"include": os.fspath(_included(stock)), "task": name, **rows}


def _included(path: Path) -> Path:
    if not path.is_file():
        raise GETAError(f"the installed lm-eval has no {path}; is the task's name right, and lm-eval 0.4.8 or later?")
    return path


def _file(folder: Path, stem: str) -> str | None:
    return next((str(path.resolve()) for end in _ENDINGS if (path := folder / f"{stem}{end}").is_file()), None)


def _needed(folder: Path, stem: str, fields: Sequence[str]) -> str:
    """Return the path of a file, after a check that its first row has the task's fields."""
    found = _file(folder, stem)
    if found is None:
        raise GETAError(f"{folder / (stem + _ENDINGS[0])} is missing (.jsonl works as well)")
    try:
        with (
            gzip.open(found, "rt", encoding="utf-8") if found.endswith(".gz") else open(found, encoding="utf-8") as rows
        ):
            # One row only: it shows the fields, and files may be large.
            first = json.loads(next(rows, ""))
    except (OSError, EOFError, ValueError) as error:
        raise GETAError(f"{found}: its first line is not JSON ({error}); each line is one row") from error
    if missing := [name for name in fields if not isinstance(first, dict) or name not in first]:
        raise GETAError(f"{found}: its first row lacks {', '.join(missing)}")
    return found


def _close(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""
