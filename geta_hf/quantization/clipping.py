"""Choose clipping values: the q_m from which a quantizer starts, or with which it is rounded after training.

The search works on a histogram of magnitudes, so its cost does not grow with the tensor. `search_clipping` is the only
one; who calls it decides what the bins count and which candidates are tried.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from geta_hf.errors import GETAError
from geta_hf.utils.process_state import full_precision

METHODS = ("mse", "max")

BINS = 4096
"""Bins of a histogram of magnitudes."""

# Candidates for q_m where a quantizer starts, as shares of the largest magnitude.
_SHARES = torch.linspace(0.1, 1.0, 91)
# Elements, or bins, handled at once: their positions and counts are int64, which takes twice to eight times the tensor.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Histogram:
    """How often the magnitudes of a tensor fall into bins of equal width; on CPU.

    Attributes:
        counts: fp32, shape (bins,).
        top: the end of the last bin, relative to the clipping value that was chosen.
    """

    counts: Tensor
    top: float


def check_clipping(method: str) -> None:
    """Check that `method` is one of `mse` and `max`.

    Raises:
        GETAError: it is not.
    """
    if method not in METHODS:
        raise GETAError(f"unknown clipping method {method!r}; choose 'mse' or 'max'")


def clipping_value(weight: Tensor, bits: int, method: str = "mse", name: str = "weight", channel_dim: int = 0) -> float:
    """Return the q_m from which a quantizer starts.

    A tensor that is all zero has no range yet, which is usual of a layer that is to learn a correction. It gets the
    range that torch initializes such a layer with: 1 / √n for n inputs of each output channel.

    Args:
        weight: the tensor to quantize, any shape.
        bits: the bit width for which q_m is chosen (used by `mse` only).
        method: `max` is the paper's max|W|; `mse`, the default, the clipping value of least squared error at `bits`.
        name: what to call the tensor in an error.
        channel_dim: the dim of `weight` that the output channels run along. Default 0.

    Raises:
        GETAError: an unknown method, or a tensor that is empty, subnormal or not finite.
    """
    inputs = weight.numel() // max(weight.shape[channel_dim], 1)
    return float(_clipping(weight.reshape(1, -1), bits, method, name, inputs))


def channel_clipping_values(
    weight: Tensor, bits: int, method: str = "mse", name: str = "weight", channel_dim: int = 0
) -> Tensor:
    """Return `clipping_value` of every channel: fp32, shape (channels,).

    A channel that is all zero, or next to it, has no range of its own and gets the value of the entire tensor.

    Args:
        weight: the tensor to quantize, at least two dims.
        bits, method, name: see `clipping_value`.
        channel_dim: the dim of `weight` that the channels run along. Default 0.

    Raises:
        GETAError: as `clipping_value`, for the entire tensor.
    """
    rows = weight.transpose(0, channel_dim).flatten(1)
    return _clipping(rows, bits, method, name, rows.shape[1])


def smallest_range(dtype: torch.dtype) -> float:
    """Return the least max|W| of a tensor that can be quantized: neither W nor a step size at 16 bits is subnormal."""
    return max(torch.finfo(dtype).tiny, torch.finfo(torch.float32).tiny * 2**16)


@torch.no_grad()
def _clipping(rows: Tensor, bits: int, method: str, name: str, inputs: int) -> Tensor:
    """Return q_m of every row, shape (rows,); `inputs` are those of an output channel."""
    check_clipping(method)
    if not rows.numel():
        raise GETAError(f"{name} has no elements to quantize; exclude the layer by a pattern")
    magnitude = rows.detach().float().abs()
    largest = magnitude.amax(dim=1)
    largest_of_all = float(largest.max())
    if not math.isfinite(largest_of_all):
        raise GETAError(
            f"{name}: max|W| is {largest_of_all}; a quantizer needs finite values. Load or initialize the tensor, or "
            f"exclude the layer by a pattern"
        )
    if largest_of_all == 0.0:
        return torch.full_like(largest, 1 / math.sqrt(inputs))
    least = smallest_range(rows.dtype)
    if largest_of_all < least:
        raise GETAError(
            f"{name}: max|W| is {largest_of_all:.3g}, and below {least:.3g} too few digits remain for a step size; "
            f"scale it up, initialize it again, or exclude the layer by a pattern"
        )
    largest = torch.where(largest < least, 0.0, largest)  # such a row has no range of its own
    values = largest
    if method == "mse":
        rows_at_once = max(1, _CHUNK // BINS)
        shares = []
        for part, top in zip(magnitude.split(rows_at_once), largest.split(rows_at_once), strict=True):
            shares.append(best_share(count_magnitudes(part, top), bits))
        values = largest * torch.cat(shares)
    # A channel of zeros gets the range of the tensor, since d > 0 must hold.
    empty = largest == 0
    return torch.where(empty, clipping_value(rows, bits, method, name), values) if bool(empty.any()) else values


def count_magnitudes(magnitude: Tensor, largest: Tensor) -> Tensor:
    """Return a histogram of every row from 0 to its `largest`.

    Args:
        magnitude: not negative, shape (rows, n).
        largest: shape (rows,), at least the row's maximum.

    Returns:
        The number of elements in each bin, fp32, shape (rows, bins).
    """
    rows = magnitude.shape[0]
    # A row of zeros counts into its first bin; dividing by its largest would give NaN.
    factor = (BINS / torch.where(largest > 0, largest, 1.0))[:, None]
    # Each row counts into bins of its own, so that one bincount serves all rows.
    first = torch.arange(rows, device=magnitude.device)[:, None] * BINS
    counts = torch.zeros(rows * BINS, dtype=torch.int64, device=magnitude.device)
    for part in magnitude.split(max(1, _CHUNK // rows), dim=1):
        positions = (part * factor).long().clamp_(max=BINS - 1).add_(first)
        counts += torch.bincount(positions.flatten(), minlength=rows * BINS)
    return counts.view(rows, BINS).float()


def best_share(counts: Tensor, bits: int) -> Tensor:
    """Return the clipping value of least squared error at `bits` bits, as a share of a histogram's range.

    Args:
        counts: histograms as `count_magnitudes` gives them, shape (rows, bins).
        bits: the bit width.

    Returns:
        A share between 0.1 and 1 for every row, fp32, shape (rows,).
    """
    bins = counts.shape[1]
    centers = (torch.arange(bins, device=counts.device) + 0.5) / bins
    return search_clipping(counts, centers, _SHARES.to(counts.device), bits)[1]


def search_clipping(counts: Tensor, centers: Tensor, candidates: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Find the clipping value under which a histogram of magnitudes is rounded with the least squared error, at t = 1.

    Args:
        counts: how much each bin weighs, fp32, shape (bins,), or (rows, bins) for a search in every row.
        centers: the magnitude that a bin stands for, shape (bins,).
        candidates: clipping values to try, shape (candidates,), in the unit of `centers`.
        bits: the bit width.

    Returns:
        The least error and the candidate that has it, each without the dim of the bins: shape () or (rows,).
    """
    # One product in place of a loop: what a bin costs under a candidate is the same for all rows. TF32 would round the
    # counts, and which of two candidates wins must not depend on it.
    with full_precision():
        errors = counts @ squared_errors(centers, candidates[:, None], bits).t()
    best = errors.argmin(dim=-1)
    return errors.gather(-1, best.unsqueeze(-1)).squeeze(-1), candidates[best]


def squared_errors(values: Tensor, clips: Tensor, bits: int) -> Tensor:
    """Return (x^Q - x)² of magnitudes at `bits` bits under clipping values, broadcast against each other, at t = 1."""
    step = clips / (2 ** (bits - 1) - 1)
    return (torch.round(torch.minimum(values, clips) / step) * step - values) ** 2
