"""Decode the weight of a linear layer inside the product: a Triton kernel, registered as an operator of torch.

A program multiplies up to 16 rows by a tile of the weight. Codes of one byte or half a byte are exact in every type the
input may have, sums are fp32, and the step size is multiplied in once, at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, DEPTH = 16, 32, 128
"""The tile of a program, and how much of the sum it computes at once: the least that tensor cores accept, so that even
a small weight has enough programs for all processors."""


@triton.jit
def _kernel(
    x: tl.tensor,
    weight: tl.tensor,
    step: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    inputs: tl.tensor,
    outputs: tl.tensor,
    stored: tl.tensor,
    HALVED: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    BIASED: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
) -> None:
    i, j = tl.program_id(1) * R + tl.arange(0, R), tl.program_id(0) * C + tl.arange(0, C)
    total = tl.zeros((R, C), tl.float32)
    # 64-bit, since a weight may have more than 2^31 elements.
    of_row, of_column = x + i.to(tl.int64)[:, None] * inputs, weight + j.to(tl.int64)[None, :] * stored
    for start in range(0, stored, D):
        k = start + tl.arange(0, D)
        codes = tl.load(of_column + k[:, None], (k < stored)[:, None] & (j < outputs)[None, :], 0).to(tl.int32)
        here = tl.load(of_row + k[None, :], (i < rows)[:, None] & (k < inputs)[None, :], 0.0)
        if HALVED:
            above = (k < stored) & (k + stored < inputs)
            there = tl.load(of_row + (k + stored)[None, :], (i < rows)[:, None] & above[None, :], 0.0)
            # Codes beyond the weight are not 0 here, but meet inputs that are.
            here = tl.where((k < stored)[None, :], here, 0.0)
            total += tl.dot(there, (((codes >> 4) & 15) - 8).to(there.dtype), input_precision="ieee")
            codes = (codes & 15) - 8
        total += tl.dot(here, codes.to(here.dtype), input_precision="ieee")
    total *= tl.load(step + j, j < outputs, 1.0)[None, :] if BY_CHANNEL else tl.load(step)
    if BIASED:
        total += tl.load(bias + j, j < outputs, 0.0).to(tl.float32)[None, :]
    inside = (i < rows)[:, None] & (j < outputs)[None, :]
    tl.store(out + i.to(tl.int64)[:, None] * outputs + j[None, :], total.to(out.dtype.element_ty), inside)


@torch.library.custom_op(
    "geta_hf::weight_only_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor step, Tensor? bias, int outputs, bool halved) -> Tensor",
)
def fused_linear(x: Tensor, weight: Tensor, step: Tensor, bias: Tensor | None, outputs: int, halved: bool) -> Tensor:
    """Compute `weight_only.weight_only_linear` in one pass over the weight, which must be contiguous."""
    # The kernel computes addresses from the row's length; a slice of a batch has other strides.
    x = x.contiguous()
    rows, inputs = x.shape
    out = x.new_empty(rows, outputs)
    grid = (triton.cdiv(outputs, COLUMNS), triton.cdiv(rows, ROWS))
    with torch.cuda.device_of(x):
        _kernel[grid](
            # Triton needs some pointer; without a bias it is never read.
            *(x, weight, step, step if bias is None else bias, out, rows, inputs, outputs, weight.shape[1]),
            *(halved, step.numel() > 1, bias is not None, ROWS, COLUMNS, DEPTH),
            enable_fp_fusion=True,
        )
    return out


# For torch.compile, which has to know the shape without running the kernel.
@fused_linear.register_fake
def _(x: Tensor, weight: Tensor, step: Tensor, bias: Tensor | None, outputs: int, halved: bool) -> Tensor:
    return x.new_empty(x.shape[0], outputs)
