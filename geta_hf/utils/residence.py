"""Let models take turns on a GPU: what does not run there just now lies in the CPU's memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from geta_hf.utils.module_state import kept_tensors

_CPU = torch.device("cpu")


@contextmanager
def parked(model: nn.Module) -> Iterator[None]:
    """Move a model from its GPU to the CPU for a while; afterwards it lies where it was.

    Parameters and buffers are the same objects in between and afterwards, so that optimizers and ties keep them. A
    model on the CPU, on several devices, or with hooks that move its tensors, is not moved.

    Args:
        model: any module; what is written to its tensors in between remains.
    """
    tensors = _tensors(model)
    devices = {tensor.device for tensor in tensors}
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
    if len(devices) != 1 or hooked or devices <= {_CPU, torch.device("meta")}:
        yield
        return
    try:
        _move(tensors, _CPU)
        yield
    finally:
        # A forward in between may have replaced buffers, by ones on the CPU.
        _move([*tensors, *_tensors(model)], devices.pop())


@contextmanager
def visiting(model: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Let a model run on a device for a while; its tensors on the CPU are kept and take their place again afterwards.

    Args:
        model: any module; what is written to its tensors on the device is lost. One that is there already, or not on
            the CPU, is not moved.
        device: None to run where the model is.
    """
    tensors = _tensors(model)
    if device is None or device == _CPU or any(tensor.device != _CPU for tensor in tensors):
        yield
        return
    before = [tensor.data for tensor in tensors]
    # A forward may replace buffers, by ones on the device.
    with kept_tensors(model):
        try:
            _move(tensors, device)
            yield
        finally:
            for tensor, data in zip(tensors, before, strict=True):
                tensor.data = data


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _move(tensors: list[Tensor], device: torch.device) -> None:
    for tensor in tensors:
        # The data alone, one tensor after another: each frees its memory before the next one takes any.
        tensor.data = tensor.data.to(device)
