"""Multiply integer codes as a linear layer does, by operations that every device and torch.compile support.

With a weight d_w · n_w and an input d_x · (n_x + z) the product is d_x · d_w · (Σ n_x n_w + z Σ n_w), and both sums are
exact in integers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from geta_hf.quantization.maths import TINY

# Steps of a row's range: the 254 from -127 to 127, less one because zero points and values are rounded separately.
_LEVELS = 253

MOST_INPUTS = (2**31 - 1) // (255 * 127)
"""The largest number of inputs whose products with weights cannot overflow 32 bits when they are added up."""

_FEWEST_ROWS = 32  # rows of an integer product on a GPU, whose kernel needs more than 16

MULTIPLE = 8
"""What both sizes of a weight have to be multiples of in an integer product on a GPU."""


def on_gpu(tensor: Tensor) -> bool:
    """Return whether a tensor is on a GPU, with its kernels and its restrictions on sizes."""
    return tensor.is_cuda


def round_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round every row to 8-bit integers over its own range, so that no row affects another row's result.

    Args:
        x: (rows, in), any floating point; rounded in fp32. A row with NaN or infinity has no finite result.

    Returns:
        Codes n, int8 (rows, in); step sizes d, fp32 (rows, 1); zero points z, int32 (rows, 1). x is about d · (n + z),
        and 0 is 0 exactly.
    """
    x = x.float()
    # The range is extended to hold 0, so that 0 has a code of its own: padding must remain exactly 0.
    low, high = x.amin(-1, keepdim=True).clamp_max_(0.0), x.amax(-1, keepdim=True).clamp_min_(0.0)
    step = high.sub_(low).div_(_LEVELS).clamp_min_(TINY)
    # An integer, since only then are the sums of n and of z both exact.
    zero = low.div_(step).round_().add_(127.0)
    # Not addcmul, which torch does not vectorize over broadcast columns.
    codes = (x / step).sub_(zero).round_().to(torch.int8)
    return codes, step, zero.to(torch.int32)


def integer_product(codes: Tensor, weight: Tensor, outputs: int) -> Tensor:
    """Return codes · weightᵀ, int32 (rows, outputs).

    Args:
        codes: int8 (rows, in).
        weight: int8 (out, in), or padded with zeros. On a GPU sizes that are no multiples of 8 cost a copy.
        outputs: number of its rows without such padding.
    """
    rows = codes.shape[0]
    if on_gpu(codes):
        # Nothing to do where the weight was laid out for a GPU; a model that was prepared elsewhere and moved is not.
        weight = F.pad(weight, (0, -weight.shape[1] % MULTIPLE, 0, -weight.shape[0] % MULTIPLE))
    missing_inputs = weight.shape[1] - codes.shape[1]
    # The kernel refuses fewer rows. The added ones are cut off again below.
    missing_rows = _FEWEST_ROWS - rows if on_gpu(codes) and rows < _FEWEST_ROWS else 0
    if missing_inputs or missing_rows:
        codes = F.pad(codes, (0, missing_inputs, 0, missing_rows))
    # The kernel of a GPU takes rows times columns, both contiguous, and no other order.
    sums = torch._int_mm(codes.contiguous(), weight.contiguous().t())
    return sums if sums.shape == (rows, outputs) else sums[:rows, :outputs]


def scaled(sums: Tensor, input_step: Tensor, step: Tensor, bias: Tensor | None) -> Tensor:
    """Return d_x · d_w · sums + bias in fp32, (rows, out).

    Args:
        sums: int32 (rows, out).
        input_step: d_x, fp32 (rows, 1) or (1,).
        step: d_w, fp32 (1,) or (out,).
        bias: (out,) or None.
    """
    # Two scalars per row are multiplied with each other first: one pass over the sums instead of two.
    if step.numel() > 1:
        sums = sums * step
    else:
        input_step = input_step * step
    return sums * input_step if bias is None else torch.addcmul(bias.float(), sums, input_step)
