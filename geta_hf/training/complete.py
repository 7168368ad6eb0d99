"""Tell a complete checkpoint from one whose writing was cut off.

Trainer writes a checkpoint file by file, over minutes for a large model. So a mark is written first, which says that
the checkpoint is unfinished, and again last, with the names and sizes of all files. A folder without a mark was written
by an earlier version, or by `save_model`, and counts by what it holds.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import logging

from geta_hf.config import CONFIG_NAME
from geta_hf.errors import GETAError
from geta_hf.serialization.atomic_folder import PROGRESS_NAME, WORLD_NAME
from geta_hf.serialization.decode import read_headers
from geta_hf.utils.files import write_whole

logger = logging.get_logger(__name__)

MARK_NAME = "geta_checkpoint.json"
"""The mark of a checkpoint, which is written first and last."""


def mark_unfinished(folder: Path) -> None:
    """Note, before anything else is written, that a checkpoint is not complete. The folder is created."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / MARK_NAME, json.dumps({"complete": False}) + "\n")


def mark_complete(folder: Path) -> None:
    """Note, once everything is written, that a checkpoint is complete, and which files belong to it."""
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in _files(folder)}
    write_whole(folder / MARK_NAME, json.dumps({"complete": True, "files": files}, indent=1) + "\n")


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MARK_NAME:
            yield path


def fault_of(folder: Path, training: bool) -> str | None:
    """Return what a checkpoint lacks, in words; None where it is complete.

    Args:
        folder: of the checkpoint.
        training: whether training is to go on from it. An export needs no more than the model and the notes, of which
            a folder without a mark may consist.
    """
    mark = _read(folder / MARK_NAME)
    # A file can have its full size and yet hold zeros, where the machine stopped before the disk had its content.
    fault = (None if mark is None else _fault_by_mark(folder, mark)) or fault_of_model(folder)
    return fault or (_fault_of_training(folder) if training else None)


def _fault_by_mark(folder: Path, mark: dict[str, Any]) -> str | None:
    files = mark.get("files")
    if not mark.get("complete") or not isinstance(files, dict):
        return "its writing was cut off"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if not isinstance(size, int) or path.stat().st_size < size:
            return f"{name} is cut short"
    return None


def fault_of_model(folder: Path) -> str | None:
    """Return which file of the model or of the notes is missing or unreadable; None where an export is possible."""
    for name in ("config.json", CONFIG_NAME, PROGRESS_NAME):
        if _read(folder / name) is None:
            return f"{name} is missing or damaged"
    weights = sorted(folder.glob("*.safetensors"))
    index = _read(folder / "model.safetensors.index.json")
    names = {str(name) for name in (index or {}).get("weight_map", {}).values()}
    for name in sorted(names - {path.name for path in weights}):
        return f"{name} is missing"
    if not weights and not _is_sharded(folder):
        return "model.safetensors is missing"
    try:
        read_headers([str(path) for path in weights], folder)
    except GETAError:
        return "its weights are damaged or cut short"
    return None


def _is_sharded(folder: Path) -> bool:
    return bool((_read(folder / WORLD_NAME) or {}).get("sharded"))


def _fault_of_training(folder: Path) -> str | None:
    """Return which part of the training's state is missing or cut short; None where training can go on."""
    needed = [SCHEDULER_NAME] if _is_sharded(folder) else [OPTIMIZER_NAME, SCHEDULER_NAME]
    states = [*(folder / name for name in needed), *sorted(folder.glob("rng_state*.pth"))]
    if len(states) == len(needed):
        return "rng_state.pth is missing"
    for path in states:
        if not path.is_file():
            return f"{path.name} is missing"
        if not zipfile.is_zipfile(path):  # torch writes zip files, whose directory is at the end
            return f"{path.name} is cut short"
    if _read(folder / TRAINER_STATE_NAME) is None:
        return f"{TRAINER_STATE_NAME} is missing or damaged"
    return None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        # A mark that can't be read is no mark of a complete checkpoint; other files are damaged.
        return {} if path.name == MARK_NAME else None
    return found if isinstance(found, dict) else {}


# --- the newest one of a run ----------------------------------------------------------------------------------------


def step_of(checkpoint: Path) -> int:
    """Return the number in a checkpoint's name; -1 where it has none."""
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def checkpoints_of(run: Path) -> list[Path]:
    """Return the checkpoints in the folder of a run, complete or not, the newest first."""
    found = [path for path in run.glob("checkpoint-*") if path.is_dir() and step_of(path) >= 0]
    return sorted(found, key=step_of, reverse=True)


def newest_to_resume(run: Path) -> Path:
    """Return the newest checkpoint of a run from which training can go on, and say which newer ones can't be used.

    Raises:
        GETAError: there is none.
    """
    faults: dict[Path, str] = {}
    for checkpoint in checkpoints_of(run):
        fault = fault_of(checkpoint, training=True)
        if fault is None:
            _say_passed_over(faults, checkpoint)
            return checkpoint
        faults[checkpoint] = fault
    if not faults:
        raise GETAError(f"{run} has no checkpoint to resume from; leave resume_from_checkpoint out to start afresh")
    reasons = ", ".join(f"{path.name}: {fault}" for path, fault in faults.items())
    raise GETAError(
        f"{run} has no complete checkpoint to resume from ({reasons}); leave resume_from_checkpoint out to start afresh"
    )


def newest_to_export(run: Path, finished: Callable[[Path], bool]) -> Path | None:
    """Return the newest complete checkpoint of a finished run, and say which newer ones can't be used.

    Where none is complete, one whose model is complete will do; and where there is none either, the newest, so that
    loading it says what is wrong with it.

    Args:
        run: its folder.
        finished: tells whether the run had finished at a checkpoint.

    Returns:
        None for a folder without checkpoints.
    """
    found = checkpoints_of(run)
    passed_over: dict[Path, str] = {}
    for fault_in in (lambda path: fault_of(path, training=False), fault_of_model):
        faults: dict[Path, str] = {}
        for checkpoint in found:
            fault = fault_in(checkpoint)
            if fault is not None:
                faults[checkpoint] = fault
            elif finished(checkpoint):
                _say_passed_over(faults, checkpoint)
                if checkpoint in passed_over:
                    logger.warning(
                        "%s is not complete (%s), but an export needs no more than its model",
                        checkpoint,
                        passed_over[checkpoint],
                    )
                return checkpoint
        passed_over = passed_over or faults
    return found[0] if found else None


def _say_passed_over(faults: dict[Path, str], taken: Path) -> None:
    for path, fault in faults.items():
        logger.warning("%s is not complete (%s), so %s is taken", path, fault, taken)
