"""Which tasks there are, and lm-eval's own tasks on local files.

A local task is lm-eval's task of the same name, included from the installed package, with another source of rows: so
its prompts, its metrics and its version are lm-eval's.
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

# Where lm-eval keeps the task, the split that it scores, and the fields of a row that it reads.
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
    """Task names without repetition: "a,b" or ["a", "b"], `commonsense` as its seven. Raises GETAError for none."""
    given = tasks.split(",") if isinstance(tasks, str) else [part for name in tasks for part in name.split(",")]
    names = [name.strip() for name in given if name.strip()]
    if not names:
        raise GETAError("no task is named; try tasks='commonsense', or any names of lm-eval's tasks")
    return list(dict.fromkeys(one for name in names for one in (COMMONSENSE if name == SUITE else (name,))))


def stock_folder() -> Path:
    """Where the installed lm-eval keeps its tasks. Raises GETAError when it is not installed."""
    found = importlib.util.find_spec("lm_eval")
    if found is None or found.origin is None:
        raise GETAError("lm-eval is not installed; pip install 'geta_hf[eval]'")
    return Path(found.origin).parent / "tasks"


@cache
def stock_manager() -> Any:
    """lm-eval's index of all its tasks: some seconds, so one for all models of a process."""
    stock_folder()
    from lm_eval.tasks import TaskManager

    return TaskManager()


def blimp_size() -> int:
    """How many paradigms the installed lm-eval's BLiMP has."""
    return len(yaml.safe_load((stock_folder() / "blimp/_blimp.yaml").read_text(encoding="utf-8"))["task"])


def stock_tasks(names: Sequence[str]) -> tuple[Any, list[str]]:
    """lm-eval's index, and the names in it; patterns such as `blimp_*` as what they match.

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
            others; `train`, where it is there, is for examples in the prompt.
        out_dir: where to write, for `lm_eval run --include_path`; it is made if need be.
        tasks: names, or patterns such as `blimp_*` for all that they match of what has files; by default all that has.
            `blimp` is the mean over the paradigms there.
        fewshot: whether `train` must be there, for the commonsense tasks.
        cache_dir: where `datasets` may keep its tables; by default where it always does.

    Returns:
        The names to give to lm-eval: as they were asked for, or all tasks, with the paradigms of BLiMP as `blimp`.

    Raises:
        GETAError: lm-eval is not installed, a task can't be had from local files, or a file is missing or no rows.
    """
    stock, source, target = stock_folder(), Path(data_dir), Path(out_dir)
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
        raise GETAError(f"{source} has files for none of {', '.join((*_LOCAL, BLIMP))}")
    return found


def _opened(names: Sequence[str], source: Path) -> list[str]:
    """Names, and patterns as what they match of all that has a file."""
    found: list[str] = []
    for name in names:
        if any(sign in name for sign in "*?["):
            there = [*_present(source), *(f"{BLIMP}_{paradigm}" for paradigm in _paradigms(source))]
            matches = fnmatch.filter(there, name)
            if not matches:
                raise GETAError(f"{source} has no file for a task {name!r}; there are {', '.join(there)}")
            found += matches
        else:
            found.append(name)
    if BLIMP in found:  # which holds its paradigms, and lm-eval takes none twice
        found = [name for name in found if not name.startswith(f"{BLIMP}_")]
    return list(dict.fromkeys(found))


def _paradigms(source: Path) -> list[str]:
    """Those of BLiMP that have a file."""
    ends = [(path, ending) for path in sorted((source / BLIMP).glob("*.jsonl*")) for ending in _ENDINGS]
    return list(dict.fromkeys(path.name.removesuffix(ending) for path, ending in ends if path.name.endswith(ending)))


def _local(name: str, source: Path, stock: Path, fewshot: bool) -> dict[str, Any]:
    """The task over its files; what else lm-eval's own would load is switched off."""
    if name.startswith(f"{BLIMP}_"):
        return _paradigm(name.removeprefix(f"{BLIMP}_"), source, stock)
    if name not in _LOCAL:
        known = [SUITE, *_LOCAL, BLIMP]
        raise GETAError(f"no task {name!r} from local files{_close(name, known)}; there are {', '.join(known)}")
    path, split, fields = _LOCAL[name]
    data = {split: _needed(source / name, split, fields)}
    if (fewshot and name in COMMONSENSE) or _file(source / name, "train"):
        data["train"] = _needed(source / name, "train", fields)
    splits = {f"{part}_split": part if part in data else None for part in ("validation", "test")}
    training = {"training_split": "train" if "train" in data else None}
    return _task(name, stock / path, data) | training | splits


def _blimp(source: Path, stock: Path) -> dict[str, dict[str, Any]]:
    """BLiMP as the group of those paradigms that have a file."""
    paradigms = _paradigms(source)
    if not paradigms:
        raise GETAError(f"{source / BLIMP} holds no <paradigm>{_ENDINGS[0]}")
    tasks = {f"{BLIMP}_{name}": _paradigm(name, source, stock) for name in paradigms}
    group = {"include": os.fspath(_included(stock / "blimp/_blimp.yaml")), "group": BLIMP, "task": list(tasks)}
    return {**tasks, BLIMP: group}


def _paradigm(name: str, source: Path, stock: Path) -> dict[str, Any]:
    # On the Hub the pairs are called `train`, although lm-eval scores them.
    return _task(f"{BLIMP}_{name}", stock / f"blimp/{name}.yaml", {"train": _needed(source / BLIMP, name, _PAIR)})


def _task(name: str, stock: Path, data: dict[str, str]) -> dict[str, Any]:
    rows = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": data}}
    return {"include": os.fspath(_included(stock)), "task": name, **rows}


def _included(path: Path) -> Path:
    if not path.is_file():
        raise GETAError(f"the installed lm-eval has no {path}; is the task's name right, and lm-eval 0.4.8 or later?")
    return path


def _file(folder: Path, stem: str) -> str | None:
    return next((str(path.resolve()) for end in _ENDINGS if (path := folder / f"{stem}{end}").is_file()), None)


def _needed(folder: Path, stem: str, fields: Sequence[str]) -> str:
    """The file, whose first row is seen to be one of the task."""
    found = _file(folder, stem)
    if found is None:
        raise GETAError(f"{folder / (stem + _ENDINGS[0])} is missing (.jsonl will do as well)")
    try:
        with (
            gzip.open(found, "rt", encoding="utf-8") if found.endswith(".gz") else open(found, encoding="utf-8") as rows
        ):
            first = json.loads(next(rows, ""))
    except (OSError, EOFError, ValueError) as error:
        raise GETAError(f"{found}: its first line is no JSON ({error}); each line is one row") from error
    if missing := [name for name in fields if not isinstance(first, dict) or name not in first]:
        raise GETAError(f"{found}: its first row lacks {', '.join(missing)}")
    return found


def _close(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""
