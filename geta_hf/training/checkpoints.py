"""Write what a checkpoint notes of its run, and check that training can go on from a folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from geta_hf.config import CONFIG_NAME, CompressionConfig, GETAConfig, read_config, read_mapping
from geta_hf.errors import GETAError
from geta_hf.serialization.atomic_folder import PROGRESS_NAME, WORLD_NAME
from geta_hf.serialization.decode import Header, read_headers
from geta_hf.training.complete import checkpoints_of, fault_of, step_of
from geta_hf.training.lora import check_lora, save_lora
from geta_hf.utils.files import write_whole

if TYPE_CHECKING:
    from peft import LoraConfig

_ONLY_ONES: Mapping[str, Any] = {"split": "even", "exchange_rate": 1.0}
"""Field of the config -> its value in checkpoints of before there was a choice."""


@dataclass(frozen=True)
class Progress:
    """The progress of the run that wrote a checkpoint.

    Attributes:
        step: optimizer steps done.
        finished: whether the model could be exported.
        removed_groups: groups that were permanently zero.
        base_model: the name on the Hub or the path of the model that the run started from; None where unknown.
    """

    step: int
    finished: bool
    removed_groups: int
    base_model: str | None = None


@contextmanager
def own_names(model: nn.Module) -> Iterator[None]:
    """Let `save_pretrained` write tensors under the model's own names for a while, without transformers' renaming.

    Trainer resumes by the names that are in the file, and would go on without those that it does not find.
    """
    before = vars(model).get("_weight_conversions")
    vars(model)["_weight_conversions"] = []
    try:
        yield
    finally:
        if before is None:
            del vars(model)["_weight_conversions"]
        else:
            vars(model)["_weight_conversions"] = before


def write_notes(
    folder: Path,
    processes: int,
    sharded: bool,
    progress: Progress | None,
    lora: LoraConfig | None = None,
) -> None:
    """Write into a checkpoint how it was launched and how far the compression was.

    Args:
        folder: the checkpoint.
        processes: how many wrote it.
        sharded: whether each of them held a part of the model.
        progress: how far the run is; None before training.
        lora: the run's LoraConfig, where it has one.
    """
    if lora is not None:
        save_lora(folder, lora)
    write_whole(folder / WORLD_NAME, json.dumps({"processes": processes, "sharded": sharded}) + "\n")
    if progress is not None:
        write_whole(folder / PROGRESS_NAME, json.dumps(dataclasses.asdict(progress)) + "\n")


def read_progress(folder: Path) -> Progress:
    """Return the progress of the run that wrote a checkpoint. Raise GETAError where it is missing or damaged."""
    path = folder / PROGRESS_NAME
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        base = stored.get("base_model")
        found = (int(stored["step"]), bool(stored["finished"]), int(stored["removed_groups"]))
        return Progress(*found, base if isinstance(base, str) else None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise GETAError(f"{path} can't be read ({error}); resume the run and let it save a checkpoint") from error


def base_name(model: nn.Module) -> str | None:
    """Return what a model was trained from: what its checkpoint notes, or else where it was loaded from."""
    name = str(model.config.name_or_path or "") if isinstance(model, PreTrainedModel) else ""
    # A resumed or exported run loads its model from a checkpoint, whose path would say nothing to a reader of the
    # card.
    if not name or not (path := Path(name)).exists():
        return name or None
    return read_progress(path).base_model if (path / PROGRESS_NAME).is_file() else str(path.resolve())


def stored_headers(folder: Path) -> dict[str, Header]:
    """Read the headers of a checkpoint's weight files.

    Raises:
        GETAError: a damaged file; the message names another checkpoint of the run that can be used.
    """
    try:
        return read_headers([str(file) for file in sorted(folder.glob("*.safetensors"))], folder)
    except GETAError as error:
        # Older ones only, from which training comes to this step again.
        others = [path for path in checkpoints_of(folder.parent) if step_of(path) < step_of(folder)]
        done = next((path for path in others if is_finished(path)), None)
        if done is not None:
            raise GETAError(f"{error}; or export {done}") from error
        raise GETAError(f"{error}; or train on from {others[0]}" if others else str(error)) from error


def is_finished(checkpoint: Path) -> bool:
    """Return whether a checkpoint says that its run had finished: groups were zero and widths final."""
    try:
        return read_progress(checkpoint).finished
    except GETAError:
        return False


def check_checkpoint(
    folder: Path,
    config: CompressionConfig,
    model: nn.Module,
    processes: int,
    sharded: bool,
    lora: LoraConfig | None = None,
) -> None:
    """Raise GETAError unless the folder is a complete checkpoint of this config and this model.

    Args:
        folder: what to resume from.
        config: the run's own.
        model: the run's own, with its quantizers.
        processes: how many train now.
        sharded: whether each of them holds a part of the model (FSDP2).
        lora: the run's LoraConfig, where it has one.
    """
    if not folder.is_dir():
        raise GETAError(f"{folder} is no folder to resume from; name a checkpoint, or leave it out to start afresh")
    if not (folder / CONFIG_NAME).is_file():
        raise GETAError(f"{folder} has no {CONFIG_NAME}: it is not a checkpoint of GETATrainer")
    _check_world(folder, processes, sharded)
    # Under FSDP Accelerate writes the optimizer's state in files of its own.
    needed = [SCHEDULER_NAME] if sharded else [OPTIMIZER_NAME, SCHEDULER_NAME]
    for name in needed:
        if not (folder / name).is_file():
            raise GETAError(f"{folder} has no {name}, without which stages can't go on; turn save_only_model off")
    _check_config(folder, config)
    check_lora(folder, lora)
    # After what has a message of its own.
    fault = fault_of(folder, training=True)
    if fault is not None:
        raise GETAError(
            f"{folder} is not complete: {fault}. Resume from another checkpoint; resume_from_checkpoint=True takes the "
            f"newest complete one"
        )
    if not sharded:
        _check_shapes(folder, model)


def _check_world(folder: Path, processes: int, sharded: bool) -> None:
    # DDP replicas are alike, so their number may change; under FSDP2 sums and the order of data change with it.
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


def _check_config(folder: Path, config: CompressionConfig) -> None:
    written = read_mapping(folder / CONFIG_NAME)
    theirs, ours = _comparable(read_config(written)), _comparable(config)
    theirs |= {name: value for name, value in _ONLY_ONES.items() if name in theirs and name not in written}
    # Another method has other settings by nature; its name says it all.
    names = ["method"] if theirs["method"] != ours["method"] else list(dict.fromkeys((*ours, *theirs)))
    if theirs.get("activation_bits") is None and ours.get("activation_bits") is None:
        # It says nothing where inputs are not quantized, and the paper's rules set it only since this version.
        names = [name for name in names if name != "learn_activation_exponent"]
    if theirs.get("split") == ours.get("split") == "even":
        # Nothing competes, whatever the rate.
        names = [name for name in names if name != "exchange_rate"]
    if "four_levels" not in written:
        # Written before there was a choice, so what this run says holds from now on.
        names = [name for name in names if name != "four_levels"]
    # Of both configs: an older checkpoint lacks settings that are new, and the other way round.
    changed = {name: (theirs.get(name), ours.get(name)) for name in names if theirs.get(name) != ours.get(name)}
    if changed:
        text = ", ".join(f"{name}: {old!r} there, {new!r} here" for name, (old, new) in changed.items())
        raise GETAError(f"{folder} was written under another {type(config).__name__} ({text}); resume with the same")


def _comparable(config: CompressionConfig) -> dict[str, Any]:
    """Return a config as plain data, with what a default amounts to where that depends on other settings."""
    values = config.to_dict()
    if isinstance(config, GETAConfig):
        values["split"] = config.split_rule
    return values


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
