"""Choose what of a training batch the model is recorded, calibrated and proved on: all but the labels."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from geta_hf.utils.model_io import float_tensors, loss_of, to_device
from geta_hf.utils.module_state import eval_mode


def find_left_out(model: nn.Module, batch: Mapping[str, Any], label_names: Collection[str]) -> frozenset[str]:
    """Return the entries of a batch that the model's outputs do not need.

    These are labels, and what the forward does not take. Where the model does not run without its labels, they are no
    more left out; nor is what a forward with `**kwargs` takes without naming it.

    Args:
        model: as it is before anything is attached to it.
        batch: one that training will see, on the model's device.
        label_names: Trainer's own.
    """
    arguments = inspect.signature(model.forward).parameters
    takes_any = any(argument.kind is argument.VAR_KEYWORD for argument in arguments.values())
    labels = {name for name in batch if name in label_names or "label" in name}
    unnamed = {name for name in batch if name not in arguments}
    choices = [labels | unnamed, unnamed]
    if takes_any:
        choices = [labels, labels | unnamed, set(), unnamed]
    if all(choice == choices[0] for choice in choices):
        return frozenset(choices[0])
    chosen = next((choice for choice in choices if _runs(model, inputs_of(model, batch, choice))), None)
    if chosen is None:
        return frozenset(choices[0])  # recording it says what is wrong
    for name in sorted(unnamed & chosen) if takes_any else ():
        # Some of what is not named may be for the loss alone, and the rest for the model.
        if name not in labels and _runs(model, inputs_of(model, batch, chosen - {name})):
            chosen = chosen - {name}
    return frozenset(chosen)


def inputs_of(model: nn.Module, batch: Mapping[str, Any], left_out: Collection[str]) -> dict[str, Any]:
    """Return the entries of a batch that are not left out; of an encoder-decoder with inputs for its decoder."""
    inputs = {name: item for name, item in batch.items() if name not in left_out}
    known = inspect.signature(model.forward).parameters
    labels = batch.get("labels")
    if "decoder_input_ids" in known and "decoder_input_ids" not in batch and isinstance(labels, Tensor):
        # Given labels alone the model would make them itself, but the graph is recorded without a loss.
        inputs["decoder_input_ids"] = labels.clamp(min=0)
    return inputs


def labels_of(model: nn.Module, batch: Mapping[str, Any], left_out: Collection[str]) -> dict[str, Any]:
    """Return the entries of a batch that are left out and that the forward takes: what training alone passes."""
    known = inspect.signature(model.forward).parameters
    return {name: item for name, item in batch.items() if name in left_out and name in known}


def divides_by_count(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Return whether a model's loss is a sum divided by `num_items_in_batch`, as Trainer takes for granted.

    Trainer believes it of every forward with `**kwargs`. But classifiers return the mean over their rows, whatever the
    count, and Trainer then multiplies it by the number of processes and does not divide it by that of micro-batches.

    Args:
        model: as it is before anything is attached to it.
        batch: with labels.

    Returns:
        True also where it can't be found out.
    """
    device = next(model.parameters()).device
    losses = []
    for count in (1, 2):
        try:
            with eval_mode(model):
                items = torch.tensor(count, device=device)
                losses.append(loss_of(model(**to_device(batch, device), num_items_in_batch=items)))
        except Exception:  # each model has its own way to refuse a batch
            return True
    first, second = losses
    return first is None or second is None or not torch.equal(first, second)


def _runs(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Return whether the model makes an output of these inputs."""
    tensors = next(model.parameters())
    try:
        with eval_mode(model):
            return bool(float_tensors(model(**to_device(inputs, tensors.device))))
    except Exception:  # each model has its own way to refuse what is missing
        return False
