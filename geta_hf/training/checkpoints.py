"""What a folder must hold before training goes on from it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from geta_hf.config import CONFIG_NAME, GETAConfig
from geta_hf.errors import GETAError
from geta_hf.methods.qasso.optimizer import QASSO
from geta_hf.serialization.decode import Header, read_headers
from geta_hf.training.lora import check_lora, save_lora
from geta_hf.utils.files import write_whole

if TYPE_CHECKING:
    from peft import LoraConfig

WORLD_NAME = "geta_world.json"
PROGRESS_NAME = "geta_progress.json"


@dataclass(frozen=True)
class Progress:
    """How far a checkpoint's compression had come.

    Attributes:
        step: optimizer steps done.
        finished: whether the joint stage was over, so that the model can be exported.
        removed_groups: groups that were zero for good.
        base_model: what the run began with: a name on the Hub or a path; None where that is not known.
    """

    step: int
    finished: bool
    removed_groups: int
    base_model: str | None = None


def write_notes(
    folder: Path,
    processes: int,
    sharded: bool,
    qasso: QASSO | None,
    lora: LoraConfig | None = None,
    base_model: str | None = None,
) -> None:
    """Note in a checkpoint who wrote it, and how far the compression had come.

    Args:
        folder: the checkpoint.
        processes: how many wrote it.
        sharded: whether each of them held a part of the model.
        qasso: the run's optimizer; None before training.
        lora: the run's LoraConfig, where it has one.
        base_model: what the run began with; see `base_name`.
    """
    if lora is not None:
        save_lora(folder, lora)
    write_whole(folder / WORLD_NAME, json.dumps({"processes": processes, "sharded": sharded}) + "\n")
    if qasso is not None:
        progress = Progress(qasso.step_count, qasso.finished, qasso.removed_groups, base_model)
        write_whole(folder / PROGRESS_NAME, json.dumps(dataclasses.asdict(progress)) + "\n")


def read_progress(folder: Path) -> Progress:
    """How far the run was that wrote a checkpoint. Raises GETAError where it is missing or damaged."""
    path = folder / PROGRESS_NAME
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        base = stored.get("base_model")
        found = (int(stored["step"]), bool(stored["finished"]), int(stored["removed_groups"]))
        return Progress(*found, base if isinstance(base, str) else None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise GETAError(f"{path} can't be read ({error}); resume the run and let it save a checkpoint") from error


def base_name(model: nn.Module) -> str | None:
    """What a model was trained from: what its checkpoint notes if it was loaded from one, else where it was loaded."""
    name = str(model.config.name_or_path or "") if isinstance(model, PreTrainedModel) else ""
    if not name or not (path := Path(name)).exists():
        return name or None
    return read_progress(path).base_model if (path / PROGRESS_NAME).is_file() else str(path.resolve())


def stored_headers(folder: Path) -> dict[str, Header]:
    """What the weights' files of a checkpoint say they hold.

    Raises:
        GETAError: a damaged file; the message names what else the run has left.
    """
    try:
        return read_headers([str(file) for file in sorted(folder.glob("*.safetensors"))], folder)
    except GETAError as error:
        others = [path for path in folder.parent.glob("checkpoint-*") if _step(path) < _step(folder)]
        others.sort(key=_step, reverse=True)
        done = next((path for path in others if _is_finished(path)), None)
        if done is not None:
            raise GETAError(f"{error}; or export {done}") from error
        raise GETAError(f"{error}; or train on from {others[0]}" if others else str(error)) from error


def _step(checkpoint: Path) -> int:
    """The number in a checkpoint's name; -1 where it has none."""
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _is_finished(checkpoint: Path) -> bool:
    try:
        return read_progress(checkpoint).finished
    except GETAError:
        return False


def check_checkpoint(
    folder: Path,
    config: GETAConfig,
    model: nn.Module,
    processes: int,
    sharded: bool,
    lora: LoraConfig | None = None,
) -> None:
    """Raises GETAError unless the folder is a whole checkpoint of this config and this model.

    Args:
        folder: what to resume from.
        config: the run's own.
        model: the run's own, with its quantizers.
        processes: how many train now.
        sharded: whether each of them holds a part of the model (FSDP2).
        lora: the run's LoraConfig, where it has one.
    """
    if not (folder / CONFIG_NAME).is_file():
        raise GETAError(f"{folder} has no {CONFIG_NAME}: it is not a checkpoint of GETATrainer")
    _check_world(folder, processes, sharded)
    for name in (SCHEDULER_NAME,) if sharded else (OPTIMIZER_NAME, SCHEDULER_NAME):
        if not (folder / name).is_file():
            raise GETAError(f"{folder} has no {name}, without which stages can't go on; turn save_only_model off")
    _check_config(folder, config)
    check_lora(folder, lora)
    if not sharded:
        _check_shapes(folder, model)


def _check_world(folder: Path, processes: int, sharded: bool) -> None:
    """DDP replicas are alike, so their number may change; under FSDP2 sums and data order change with it."""
    try:
        world = json.loads((folder / WORLD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        world = {"processes": processes, "sharded": sharded}  # written before this was noted
    if world["sharded"] != sharded:
        names = {True: "under FSDP", False: "without FSDP"}
        raise GETAError(
            f"{folder} was written {names[world['sharded']]}, this run trains {names[sharded]}; resume the same way"
        )
    if sharded and world["processes"] != processes:
        raise GETAError(
            f"{folder} was written by {world['processes']} processes under FSDP, this run has {processes}; shards and "
            f"the order of data would differ, so resume with {world['processes']}"
        )


def _check_config(folder: Path, config: GETAConfig) -> None:
    theirs, ours = GETAConfig.load(folder / CONFIG_NAME).to_dict(), config.to_dict()
    changed = {name: (theirs[name], ours[name]) for name in ours if theirs[name] != ours[name]}
    if changed:
        text = ", ".join(f"{name}: {old!r} there, {new!r} here" for name, (old, new) in changed.items())
        raise GETAError(f"{folder} was written under another GETAConfig ({text}); resume with the same")


def _check_shapes(folder: Path, model: nn.Module) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in _stored_shapes(folder).items():
        if shapes.get(name) != shape:
            raise GETAError(
                f"{folder} holds {name} of shape {shape}, this model has {shapes.get(name, 'no such tensor')}; "
                f"it is a checkpoint of another model"
            )


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes = {name: header.shape for name, header in stored_headers(folder).items()}
    if not shapes:
        raise GETAError(f"{folder} holds no .safetensors file to resume from")
    return shapes
