"""Which layers can be quantized: those that compute as one of a few plain kinds."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

PLAIN_TYPES: tuple[type[nn.Module], ...] = (nn.Linear, Conv1D, nn.Conv2d)
"""The layers whose weights can be quantized."""


def base_type(layer: nn.Module) -> type[nn.Module] | None:
    """The supported type that this layer computes as, or None when the forward of its class computes something else."""
    kind: Any = type(layer)
    for plain in PLAIN_TYPES:
        if isinstance(layer, plain):
            same = kind.forward is plain.forward
            return plain if same or (plain is nn.Linear and _computes_a_linear(kind)) else None
    return None


@cache
def _computes_a_linear(kind: Any) -> bool:
    """Whether a subclass of nn.Linear that writes its forward anew still gives W x + b, tried on numbers of all sizes.

    Some do so to fix the order of roundings, which is all that may differ.
    """
    generator = torch.Generator().manual_seed(0)
    for bias in (True, False):
        probe = kind.__new__(kind)
        with torch.random.fork_rng(devices=[]):
            nn.Linear.__init__(probe, 6, 5, bias=bias, device="cpu", dtype=torch.float32)
        for size in (1e-3, 1.0, 1e3):
            x = size * torch.randn(2, 3, 6, generator=generator)
            try:
                found = kind.forward(probe, x)
            except Exception:  # it needs what its own constructor sets
                return False
            expected = F.linear(x, probe.weight, probe.bias)
            if not isinstance(found, Tensor) or found.shape != expected.shape or not torch.allclose(found, expected):
                return False
    return True
