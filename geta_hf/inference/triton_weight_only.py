"""Decode the weight of a linear layer inside the product: two Triton kernels, registered as one operator of torch.

Codes of one byte or half a byte are exact in every type the input may have, sums are fp32, and the step size is
multiplied in once, at the end. A single row of input, as in generation, is bound by the bytes of the weight: its kernel
leaves tensor cores out and has a program for every few outputs, so that a small weight occupies every processor too.
More rows are multiplied on tensor cores. Neither splits a sum between programs, so results repeat bit for bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from geta_hf.utils.gpu import has_triton_tensor_cores

ONE_ROW_TILE = (4, 1024)
"""Outputs and bytes of a program of the kernel for one row: two loads of 16 bytes for each thread at once, so that the
512 programs of 2048 outputs keep 2 MB on the way, which an H100 needs to read at full speed."""

_VECTOR = 16  # bytes of the widest load; rows of the weight are padded to multiples of it


@triton.jit
def _one_row(
    x: tl.tensor,
    weight: tl.tensor,
    step: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    inputs: tl.tensor,
    outputs: tl.tensor,
    stored: tl.tensor,
    HALVED: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    BIASED: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
) -> None:
    j = tl.program_id(0) * C + tl.arange(0, C)
    # 64-bit, since a weight may have more than 2^31 elements.
    of_column = weight + j.to(tl.int64)[:, None] * stored
    # Up to here the compiler sees that a mask never divides 16 neighbors, without which it loads them one by one.
    even = inputs // 16 * 16
    total = tl.zeros((C, D), tl.float32)
    for start in range(0, stored, D):
        k = start + tl.arange(0, D)
        codes = tl.load(of_column + k[None, :], (j < outputs)[:, None] & (k < stored)[None, :], 0).to(tl.int32)
        here = tl.load(x + k, (k < stored) & (k < even), 0.0).to(tl.float32)
        if HALVED:
            there = tl.load(x + stored + k, (k < stored) & (k < even - stored), 0.0).to(tl.float32)
            total += there[None, :] * (((codes >> 4) & 15) - 8).to(tl.float32)
            codes = (codes & 15) - 8
        total += here[None, :] * codes.to(tl.float32)
    result = tl.sum(total, 1)
    if even < inputs:
        # These 16 lie in one half of the row, whose length is a multiple of 16.
        first = tl.where(even < stored, even, even - stored) if HALVED else even
        k = first + tl.arange(0, 16)
        codes = tl.load(of_column + k[None, :], (j < outputs)[:, None] & (k < stored)[None, :], 0).to(tl.int32)
        if HALVED:
            codes = (tl.where(even < stored, codes, codes >> 4) & 15) - 8
        k = even + tl.arange(0, 16)
        last = tl.load(x + k, k < inputs, 0.0).to(tl.float32)
        result += tl.sum(last[None, :] * codes.to(tl.float32), 1)
    result *= tl.load(step + j, j < outputs, 1.0) if BY_CHANNEL else tl.load(step)
    if BIASED:
        result += tl.load(bias + j, j < outputs, 0.0).to(tl.float32)
    tl.store(out + j, result.to(out.dtype.element_ty), j < outputs)


@triton.jit
def _many_rows(
    x: tl.tensor,
    weight: tl.tensor,
    step: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
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
    width = stored * 2 if HALVED else stored
    # 64-bit, since a weight may have more than 2^31 elements.
    of_row, of_column = x + i.to(tl.int64)[:, None] * width, weight + j.to(tl.int64)[None, :] * stored
    for start in range(0, stored, D):
        k = start + tl.arange(0, D)
        codes = tl.load(of_column + k[:, None], (k < stored)[:, None] & (j < outputs)[None, :], 0).to(tl.int32)
        inside = (i < rows)[:, None] & (k < stored)[None, :]
        here = tl.load(of_row + k[None, :], inside, 0.0)
        if HALVED:
            there = tl.load(of_row + stored + k[None, :], inside, 0.0)
            # Codes beyond the weight are not 0 here, but meet inputs that are.
            total += tl.dot(there, (((codes >> 4) & 15) - 8).to(there.dtype), input_precision="ieee")
            codes = (codes & 15) - 8
        total += tl.dot(here, codes.to(here.dtype), input_precision="ieee")
    total *= tl.load(step + j, j < outputs, 1.0)[None, :] if BY_CHANNEL else tl.load(step)
    if BIASED:
        total += tl.load(bias + j, j < outputs, 0.0).to(tl.float32)[None, :]
    inside = (i < rows)[:, None] & (j < outputs)[None, :]
    tl.store(out + i.to(tl.int64)[:, None] * outputs + j[None, :], total.to(out.dtype.element_ty), inside)


def many_rows_tile(x: Tensor) -> tuple[int, int, int]:
    """Return the rows, outputs and bytes of a tile of the kernel for many rows.

    The first two are the least that fills the tensor cores of four warps. Products without tensor cores hold a column
    of the tile in registers, which 128 bytes overflow.
    """
    return 16, 32, 128 if tensor_cores_take(x) else 32


def tensor_cores_take(x: Tensor) -> bool:
    """Return whether products of x are computed on tensor cores without loss."""
    return x.dtype != torch.float32 and (not x.is_cuda or has_triton_tensor_cores(x.device))


@torch.library.custom_op(
    "geta_hf::weight_only_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor step, Tensor? bias, int outputs, bool halved) -> Tensor",
)
def fused_linear(x: Tensor, weight: Tensor, step: Tensor, bias: Tensor | None, outputs: int, halved: bool) -> Tensor:
    """Compute `weight_only.weight_only_linear` in one pass over the weight; x is one of `FUSED_TYPES`."""
    launch(x, weight, step, bias, out := x.new_empty(x.shape[0], outputs), halved)
    return out


def launch(x: Tensor, weight: Tensor, step: Tensor, bias: Tensor | None, out: Tensor, halved: bool) -> None:
    """Fill `out`, (rows, outputs), as `weight_only.weight_only_linear`."""
    rows, inputs = x.shape
    outputs = out.shape[1]
    if not rows:
        return
    # The kernels compute addresses from the rows' lengths; a slice of a batch has other strides.
    x, weight = x.contiguous(), weight.contiguous()
    stored = weight.shape[1]
    # Triton needs some pointer; without a bias it is never read.
    tensors = (x, weight, step, step if bias is None else bias, out)
    flags = (halved, step.numel() > 1, bias is not None)
    with torch.cuda.device_of(x):
        if rows == 1 and not (halved and stored % _VECTOR):
            _one_row[(triton.cdiv(outputs, ONE_ROW_TILE[0]),)](*tensors, inputs, outputs, stored, *flags, *ONE_ROW_TILE)
            return
        width = 2 * stored if halved else stored
        if inputs != width:
            # Rows of an odd length would be read element by element.
            tensors = (F.pad(x, (0, width - inputs)), *tensors[1:])
        tile = many_rows_tile(x)
        grid = (triton.cdiv(outputs, tile[1]), triton.cdiv(rows, tile[0]))
        _many_rows[grid](*tensors, rows, outputs, stored, *flags, *tile)


# For torch.compile, which has to know the shape without running the kernel.
@fused_linear.register_fake
def _(x: Tensor, weight: Tensor, step: Tensor, bias: Tensor | None, outputs: int, halved: bool) -> Tensor:
    return x.new_empty(x.shape[0], outputs)
