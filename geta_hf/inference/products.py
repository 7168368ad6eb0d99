"""Products of a linear layer on integer codes: what is fast, in operations that every device and the compiler know.

With a weight d_w · n_w and an input d_x · (n_x + z) the product is d_x · d_w · (Σ n_x n_w + z Σ n_w), and both sums are
exact in integers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from geta_hf.quantization.maths import TINY

_LEVELS = 253  # one less than fit between -127 and 127 for each of the two ends that rounding may go beyond

MOST_INPUTS = (2**31 - 1) // (255 * 127)
"""The longest sum of products of an input and a weight that never leaves 32 bits."""

_FEWEST_ROWS = 32  # of a product on a GPU, whose kernel wants more than 16


def on_gpu(tensor: Tensor) -> bool:
    """Whether a tensor's device has the kernels and the wishes of a GPU."""
    return tensor.is_cuda


def round_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every row as 8-bit integers over its own range, so that no row has a part in another's result.

    Args:
        x: (rows, in), any floating point; rounded in fp32. NaN or infinity in a row leaves it no finite result.

    Returns:
        Codes n, int8 (rows, in); step sizes d, fp32 (rows, 1); zero points z, int32 (rows, 1). x is about d · (n + z),
        and 0 is 0 exactly.
    """
    x = x.float()
    low, high = x.amin(-1, keepdim=True).clamp_max_(0.0), x.amax(-1, keepdim=True).clamp_min_(0.0)
    step = high.sub_(low).div_(_LEVELS).clamp_min_(TINY)
    zero = low.div_(step).round_().add_(127.0)
    # Not addcmul: over broadcast columns torch has no vectorized one.
    codes = (x / step).sub_(zero).round_().to(torch.int8)
    return codes, step, zero.to(torch.int32)


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
    sums = torch._int_mm(codes, weight.t())
    return sums if sums.shape == (rows, outputs) else sums[:rows, :outputs]


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
