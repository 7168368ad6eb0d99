"""Handle what models take and return in whatever form they have it.

A batch holds tensors of any shape, numbers, and nested lists or dicts of them. Outputs come as a `ModelOutput`, a dict,
a tuple or a single tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import recursively_apply, send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

Batch = Mapping[str, Any]


def to_device(batch: Batch, device: torch.device | str) -> dict[str, Any]:
    """Move all tensors of a batch, nested ones too; everything else is kept as it is."""
    return {name: send_to_device(item, device) for name, item in batch.items()}


def cast_floats(batch: Batch, dtype: torch.dtype) -> dict[str, Any]:
    """Convert all floating-point tensors of a batch, nested ones too."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return {name: map_tensors(cast, item) for name, item in batch.items()}


def map_tensors(change: Callable[[Tensor], Any], item: Any) -> Any:
    """Apply a function to a tensor, or to all tensors of nested lists, tuples and dicts; return the results alike."""
    return recursively_apply(change, item)


@contextmanager
def outputs_by_name(model: nn.Module) -> Iterator[None]:
    """Let a Hugging Face model return its outputs by name for a while, where its class can.

    This is set in the configuration, as a forward need not take `return_dict`.
    """
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    with config_value(configs, "return_dict", True):
        yield


@contextmanager
def config_value(configs: Iterable[Any], name: str, value: Any) -> Iterator[None]:
    """Set one value for a while in those configs that have it.

    Args:
        configs: of a model and its parts; one may occur several times.
        name: of the value.
        value: what it is set to.
    """
    before = [(config, getattr(config, name)) for config in configs if hasattr(config, name)]
    try:
        for config, _ in before:
            setattr(config, name, value)
        yield
    finally:
        for config, old in before:
            setattr(config, name, old)


def named_outputs(outputs: Any) -> dict[str, Any]:
    """Return a model's outputs by name; those of a tuple are named by their place, a single tensor is `output`."""
    if isinstance(outputs, Mapping):
        return dict(outputs)
    if isinstance(outputs, list | tuple):
        return {f"output {place}": item for place, item in enumerate(outputs)}
    return {"output": outputs}


def float_tensors(outputs: Any) -> dict[str, Tensor]:
    """Return the floating-point tensors among a model's outputs by name.

    Args:
        outputs: as the model returned them. Nested ones count where there are no others.
    """
    named = named_outputs(outputs)
    found = {name: item for name, item in named.items() if isinstance(item, Tensor) and item.is_floating_point()}
    if found:
        return found
    for name, item in named.items():
        if isinstance(item, Mapping | list | tuple):
            found |= {f"{name}.{inner}": tensor for inner, tensor in float_tensors(item).items()}
    return found


def loss_of(outputs: Any) -> Tensor | None:
    """Return the loss among a model's outputs, as Trainer finds it: by its name, or first in a tuple; else None."""
    if isinstance(outputs, Mapping):
        return outputs.get("loss")
    first = outputs[0] if isinstance(outputs, list | tuple) and outputs else None
    return first if isinstance(first, Tensor) and not first.dim() else None
