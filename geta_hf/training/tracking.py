"""Give trackers of experiments the picture of what a run ended with; numbers reach them by Trainer's logs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.utils import logging

from geta_hf.errors import GETAError
from geta_hf.methods import Method
from geta_hf.qadg import PruningSpace
from geta_hf.reporting.comparison import Structure
from geta_hf.reporting.structure_image import structure_image
from geta_hf.reporting.structure_svg import layer_grid

logger = logging.get_logger(__name__)

PICTURE_TAG = "structure"
"""The name of the picture in every tracker."""


def decided_structure(method: Method, space: PruningSpace, dropped: Sequence[str] = ()) -> Structure | None:
    """Return what an export would keep; None before the method has finished. Every process has to call it."""
    if not method.finished:
        return None
    result = method.result()
    kept = {}
    for family in space.prunable:
        removed = result.removed.get(family.name)
        gone = 0 if removed is None else int(removed.sum())
        kept[family.name] = (family.size - gone, family.size)
    return Structure(kept, dict(result.weight_bits), dict(result.input_bits), tuple(dropped))


class StructurePicture(TrainerCallback):
    """Send the picture of the structure to TensorBoard, Weights & Biases and trackio when training ends.

    It must come before their own callbacks, which close the run.

    Args:
        callbacks: of the trainer's `callback_handler`, among which trackers are looked for.
        structure: see `decided_structure`.
    """

    def __init__(self, callbacks: list[TrainerCallback], structure: Callable[[], Structure | None]) -> None:
        self.callbacks = callbacks
        self.structure = structure

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the picture and send it."""
        kinds = (TensorBoardCallback, WandbCallback, TrackioCallback)
        trackers = [callback for callback in self.callbacks if isinstance(callback, kinds)]
        # All processes have the same callbacks and take part in what follows; the first alone has open trackers.
        structure = self.structure() if trackers else None
        if structure is None or not state.is_world_process_zero:
            return
        try:
            picture = structure_image(layer_grid(structure))
        except GETAError as error:
            logger.info("no picture of the structure is sent to %d trackers: %s", len(trackers), error)
            return
        for tracker in trackers:
            _send(tracker, picture, state.global_step)


def _send(tracker: Any, picture: Any, step: int) -> None:
    if isinstance(tracker, TensorBoardCallback):
        if tracker.tb_writer is not None:
            tracker.tb_writer.add_image(PICTURE_TAG, picture, step, dataformats="HWC")
            tracker.tb_writer.flush()
        return
    # Both have the same interface, and `_initialized` once the first log has opened the run.
    writer = tracker._wandb if isinstance(tracker, WandbCallback) else tracker._trackio
    if writer is not None and tracker._initialized:
        writer.log({PICTURE_TAG: writer.Image(picture), "train/global_step": step})
