"""Share a step size among 32 neighboring inputs of each output channel: the grid `block32`, which is ggml's own.

With its inputs cut into pieces of 32, a weight is a matrix of 32 columns in which every row has a quantizer of its own.
All that knows of rows then serves blocks as well: kernels, and the search for clipping values.

Neighbors are those in an order of the inputs, at first their own. Once some inputs are removed for good, the order
lists the remaining ones first, so that after a cut every block has 32 neighbors again. It is None where it is natural.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from geta_hf.quantization.kernels.kernel import Gradients, Kernel
from geta_hf.quantization.maths import BLOCK, block_count


def split_blocks(weight: Tensor, order: Tensor | None = None) -> Tensor:
    """Return a weight with a row for each block, shape (out · blocks, 32), the last blocks filled up with zeros.

    No data is copied where the order is natural and the number of inputs a multiple of 32.

    Args:
        weight: shape (out, in).
        order: int64, shape (in,), the inputs in the order of their blocks. Default None: the natural one.
    """
    if order is not None:
        weight = weight.index_select(1, order)
    missing = -weight.shape[1] % BLOCK
    if missing:
        weight = F.pad(weight, (0, missing))
    return weight.reshape(-1, BLOCK)


def join_blocks(rows: Tensor, inputs: int, order: Tensor | None = None) -> Tensor:
    """Undo `split_blocks`: return the weight of shape (out, inputs) whose blocks are rows."""
    weight = rows.reshape(-1, block_count(inputs) * BLOCK)[:, :inputs]
    if order is None:
        return weight
    return torch.empty_like(weight).index_copy_(1, order, weight)


def block_of_input(inputs: int, order: Tensor | None, device: torch.device) -> Tensor:
    """Return the block that each input belongs to, int64, shape (inputs,)."""
    places = torch.arange(inputs, device=device)
    if order is not None:
        places = torch.empty_like(places).index_copy_(0, order.to(device), places)
    return places // BLOCK


def remaining_first(removed: Tensor) -> Tensor:
    """Return the order of inputs in which those that remain come first, int64, shape (in,).

    Args:
        removed: bool, shape (in,).
    """
    return torch.cat([torch.nonzero(~removed).flatten(), torch.nonzero(removed).flatten()])


def in_blocks(kernel: Kernel, order: Tensor | None) -> Kernel:
    """Return a kernel that runs `kernel` on a weight of shape (out, in), with d and q_m of shape (out, blocks)."""

    def quantize(x: Tensor, d: Tensor, q_m: Tensor, t: Tensor | None) -> Tensor:
        rows = kernel.quantize(split_blocks(x, order), d.reshape(-1, 1), q_m.reshape(-1, 1), t)
        return join_blocks(rows, x.shape[1], order)

    def gradients(grad: Tensor, x: Tensor, d: Tensor, q_m: Tensor, t: Tensor | None) -> Gradients:
        rows, of_d, of_q, of_t = kernel.gradients(
            split_blocks(grad, order), split_blocks(x, order), d.reshape(-1, 1), q_m.reshape(-1, 1), t
        )
        return join_blocks(rows, x.shape[1], order), of_d.view(d.shape), of_q.view(q_m.shape), of_t

    def straight_through(grad: Tensor, x: Tensor, q_m: Tensor) -> Tensor:
        rows = kernel.straight_through(split_blocks(grad, order), split_blocks(x, order), q_m.reshape(-1, 1))
        return join_blocks(rows, x.shape[1], order)

    return Kernel(kernel.name, quantize, gradients, straight_through)


def form_blocks(d: Tensor, q_m: Tensor, before: Tensor | None, after: Tensor, remaining: int) -> tuple[Tensor, Tensor]:
    """Return (d, q_m) of blocks that are formed anew, shape (out, blocks) each.

    A block takes them from the one of its remaining inputs that was in the block of the largest q_m, so that nothing is
    clipped that was not clipped before, at the same bit width.

    Args:
        d, q_m: of the blocks before, shape (out, blocks).
        before: the order of the inputs before; None where it is natural.
        after: int64, shape (in,): the new order, the remaining inputs first.
        remaining: how many inputs remain.
    """
    inputs = len(after)
    old = block_of_input(inputs, before, d.device)[after.to(d.device)]
    values = q_m[:, old]
    # Blocks in which nothing remains keep some positive values, which nothing reads.
    values[:, remaining:] = 0.0
    best = split_blocks(values).argmax(1).view(len(d), -1)
    first = torch.arange(best.shape[1], device=d.device) * BLOCK
    source = old[best + first]
    return d.gather(1, source), q_m.gather(1, source)


SMALLEST_HALF, NORMAL_HALF, LARGEST_HALF = 2.0**-24, 2.0**-14, 65504.0
"""The smallest positive number of fp16, the smallest one with all its digits, and the largest."""


def half_steps(d: Tensor, small: bool) -> Tensor:
    """Return step sizes on the grid of fp16, fp32, so that a format with such scales holds the very same values.

    Args:
        d: step sizes, fp32, positive.
        small: take the small numbers of fp16 as well, which have fewer digits. Steps among these are rounded up, so
            that nothing is clipped. Otherwise a step that is too small, or too large, remains as it is.
    """
    half = d.half().float()
    fits = (d >= NORMAL_HALF) & (d <= LARGEST_HALF)
    if not small:
        return torch.where(fits, half, d)
    up = (d / SMALLEST_HALF).ceil() * SMALLEST_HALF
    return torch.where(fits, half, torch.where(d < NORMAL_HALF, up, d))


def is_half(d: Tensor) -> bool:
    """Return whether all step sizes are numbers of fp16 exactly."""
    return torch.equal(d.half().float(), d.float())
