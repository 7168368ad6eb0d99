"""Decide which layers can be quantized: those that compute what one of a few plain layer types computes."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from geta_hf.utils.process_state import random_state_kept

PLAIN_TYPES: tuple[type[nn.Module], ...] = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d)
"""The layer types whose weights can be quantized. Conv1D is transformers' linear layer, nn.Conv1d a convolution."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


def base_type(layer: nn.Module) -> type[nn.Module] | None:
    """Return the plain type that a layer computes as; None if the forward of its class computes something else."""
    layer_type: Any = type(layer)
    for plain in PLAIN_TYPES:
        if isinstance(layer, plain):
            # isinstance alone would accept a subclass that does more in its forward, which the quantized class would
            # replace.
            if layer_type.forward is plain.forward:
                return plain
            return plain if plain is nn.Linear and _computes_a_linear(layer_type) else None
    return None


@cache
def _computes_a_linear(layer_type: Any) -> bool:
    """Return whether a subclass of nn.Linear with a forward of its own gives W x + b, tried on numbers of all sizes.

    Some classes write the forward again only to fix the order of roundings, which is all that may differ.
    """
    generator = torch.Generator().manual_seed(0)
    for bias in (True, False):
        # Without the subclass's constructor, whose arguments are unknown.
        probe = layer_type.__new__(layer_type)
        with random_state_kept():
            nn.Linear.__init__(probe, 6, 5, bias=bias, device="cpu", dtype=torch.float32)
        # Of several sizes, since a class may clip or scale its input only beyond some range.
        for size in (1e-3, 1.0, 1e3):
            x = size * torch.randn(2, 3, 6, generator=generator)
            try:
                found = layer_type.forward(probe, x)
            except Exception:  # it needs attributes that its own constructor sets
                return False
            expected = F.linear(x, probe.weight, probe.bias)
            if not isinstance(found, Tensor) or found.shape != expected.shape or not torch.allclose(found, expected):
                return False
    return True
