"""Compute a linear layer on float inputs whose weight is int8, or two 4-bit codes per byte, until it is multiplied.

An eighth to a half of a bf16 or fp32 weight is read from memory, and on a GPU the time for few rows of input is the
time to read the weight. Every product is that of the decoded weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from geta_hf.utils.gpu import has_triton

HALF_BITS = 4
"""Codes up to this bit width fit half a byte."""

HAS_TRITON = has_triton()

FUSED_TYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Types of input that the Triton kernels take; fp64 is none that a GPU is fast in."""


def pack_halves(codes: Tensor) -> Tensor:
    """Pack two codes into a byte: column j has code j in its low half and code j + in/2 in its high half, as n + 8.

    Halves of a row and not neighbors share a byte, so that a kernel which unpacks a tile gets two contiguous tiles.

    Args:
        codes: integers (out, in), |n| <= 7, `in` even.

    Returns:
        int8 (out, in/2).
    """
    low, high = (codes.to(torch.uint8) + 8).chunk(2, dim=1)
    return (low | high << 4).view(torch.int8)


def unpack_halves(packed: Tensor) -> Tensor:
    """Undo `pack_halves`: int8 (out, in/2) to int8 (out, in)."""
    return torch.cat((packed & 15, (packed >> 4) & 15), dim=1) - 8


def weight_only_linear(
    x: Tensor, weight: Tensor, step: Tensor, bias: Tensor | None, outputs: int, halved: bool, fused: bool
) -> Tensor:
    """Return x · (step · weight)ᵀ + bias, in the type of x, (rows, outputs).

    Args:
        x: (rows, in), floating point.
        weight: codes, int8 (out, in), or (out, in/2) where `halved`; may be padded with zeros along both dims.
        step: fp32 (1,) or (outputs,).
        bias: (outputs,) or None.
        outputs: number of rows of the weight without such padding.
        halved: whether a byte holds two codes, as `pack_halves` packs them.
        fused: decode within the product, by a Triton kernel, if x is one of `FUSED_TYPES`. Otherwise it is done
            before, in another pass.
    """
    if fused and x.dtype in FUSED_TYPES:
        return torch.ops.geta_hf.weight_only_linear(x, weight, step, bias, outputs, halved)
    # Without the padding: on this way nothing needs it, and the input has none.
    codes = (unpack_halves(weight) if halved else weight)[:outputs, : x.shape[1]]
    # In fp32 and then cast, as a decoded weight is, so that the values are those of the float path.
    dense = codes.float() * step.view(-1, 1)
    return F.linear(x, dense.to(x.dtype), None if bias is None else bias.to(x.dtype))


if HAS_TRITON:
    import geta_hf.inference.triton_weight_only  # noqa: F401  registers the operator
