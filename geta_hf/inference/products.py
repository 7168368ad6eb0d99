"""Products of a linear layer on integer codes: what is fast, in operations that every device and the compiler know.

With a weight d_w · n_w and an input d_x · n_x the product is d_x · d_w · Σ n_x n_w, and the sum is exact in integers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from geta_hf.quantization.maths import TINY

LARGEST = 127
"""The largest |n| that a byte holds beside its own negative."""

MOST_INPUTS = (2**31 - 1) // LARGEST**2
"""The longest sum of products of bytes that never leaves 32 bits."""

_FEWEST_ROWS = 32  # of a product on a GPU, whose kernel wants more than 16


def on_gpu(tensor: Tensor) -> bool:
    """Whether a tensor's device has the kernels and the wishes of a GPU."""
    return tensor.is_cuda


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Every row as 8-bit integers with a step size of its own, so that no row has a part in another's result.

    Args:
        x: (rows, in), any floating point; rounded in fp32. NaN or infinity in a row makes all its results NaN.

    Returns:
        Codes n, int8 (rows, in), |n| <= 127, and step sizes, fp32 (rows, 1): x is about step size · n.
    """
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True).clamp_min_(TINY)
    return (x * (LARGEST / largest)).round_().to(torch.int8), largest / LARGEST


def integer_product(codes: Tensor, weight: Tensor, outputs: int) -> Tensor:
    """codes · weightᵀ, int32 (rows, outputs).

    Args:
        codes: int8 (rows, in).
        weight: int8 (out, in), or larger by zeros; on a GPU both sizes must be multiples of 8.
        outputs: how many of its rows are no such zeros.
    """
    rows, beyond = codes.shape[0], weight.shape[1] - codes.shape[1]
    missing = _FEWEST_ROWS - rows if on_gpu(codes) and rows < _FEWEST_ROWS else 0
    if beyond or missing:
        codes = F.pad(codes, (0, beyond, 0, missing))
    return torch._int_mm(codes, weight.t())[:rows, :outputs]


def scaled(sums: Tensor, input_step: Tensor, step: Tensor, bias: Tensor | None) -> Tensor:
    """d_x · d_w · sums + bias in fp32, (rows, out).

    Args:
        sums: int32 (rows, out).
        input_step: d_x, fp32 (rows, 1) or (1,).
        step: d_w, fp32 (1,) or (out,).
        bias: (out,) or None.
    """
    if step.numel() > 1:
        sums = sums * step
    else:
        input_step = input_step * step
    return sums * input_step if bias is None else torch.addcmul(bias.float(), sums, input_step)
