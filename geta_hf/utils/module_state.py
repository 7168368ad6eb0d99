"""What is done to a module for a while, and undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

HALVES = (torch.float16, torch.bfloat16)
"""Types whose rounding is coarse enough to choose between tokens, and between the experts that a token is sent to."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; training flags and random state are then as before."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=sorted(devices, key=str)):
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def running(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute by another forward; what it has of its own, such as accelerate's, then comes back."""
    own = vars(module).pop("forward", None)
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if own is not None:
            vars(module)["forward"] = own


@contextmanager
def in_single_precision(module: nn.Module) -> Iterator[None]:
    """Weights and buffers of 16 bits in single precision, twice the memory for a while; then the very tensors again."""
    halves = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.dtype in HALVES]
    before = [tensor.data for tensor in halves]
    try:
        for tensor in halves:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, data in zip(halves, before, strict=True):
            tensor.data = data
