"""Change the state of a module within a context and restore it afterwards."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from geta_hf.utils.process_state import random_state_kept

HALVES = (torch.float16, torch.bfloat16)
"""16-bit types. Their rounding errors are large enough to change which token, or which expert, is chosen."""


def devices_of(model: nn.Module) -> set[torch.device]:
    """Return the devices that hold a parameter or a buffer of a model."""
    return {tensor.device for tensor in (*model.parameters(), *model.buffers())}


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without gradients; training flags and random state are restored afterwards.

    Args:
        model: any module. Each of its modules gets its own training flag back, which `model.train()` would not do.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), random_state_kept(devices_of(model)):
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def running(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute by another forward; one that is set on the module itself is restored afterwards.

    Args:
        module: any module. accelerate, for one, sets a forward on a module itself.
        forward: called in place of the module's own.
    """
    own = vars(module).pop("forward", None)
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if own is not None:
            vars(module)["forward"] = own


@contextmanager
def in_next_precision(module: nn.Module) -> Iterator[None]:
    """Convert what is in 16 bits to fp32, or where nothing is, what is in fp32 to fp64; it is restored afterwards.

    Takes twice the memory of what is converted.

    Args:
        module: any module; changes to its converted tensors are lost.
    """
    halves = any(tensor.dtype in HALVES for tensor in module.parameters())
    with _converted(module, HALVES, torch.float32) if halves else _converted(module, {torch.float32}, torch.float64):
        yield


@contextmanager
def _converted(module: nn.Module, dtypes: Collection[torch.dtype], to: torch.dtype) -> Iterator[None]:
    narrow = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.dtype in dtypes]
    before = [tensor.data for tensor in narrow]
    try:
        for tensor in narrow:
            # The data alone: the objects remain, so ties, hooks and an optimizer's references do too.
            tensor.data = tensor.data.to(to)
        yield
    finally:
        for tensor, data in zip(narrow, before, strict=True):
            tensor.data = data


@contextmanager
def kept_tensors(model: nn.Module) -> Iterator[None]:
    """Give a model its very parameters and buffers back at the end, whatever it is converted to in between.

    Takes the memory of a second copy where tensors are converted.

    Args:
        model: any module; changes to its converted tensors are lost.
    """
    parameters = [(parameter, parameter.data) for parameter in model.parameters()]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for module, before in buffers:
            module._buffers.update(before)
