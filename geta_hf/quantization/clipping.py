"""Choose clipping values: the q_m of least squared error, for quantizers that start and for those that get their width.

There is one search, `search_clipping`, for weights and for inputs, before training and when bit widths are decided. It
works on histograms of magnitudes whose bins are equally wide in log space. There a clipping value q is a shift: what
rounding costs an element depends on |x| / q alone. So the errors under all candidates are one vector, what a bin costs
at each distance from q, seen through a window that slides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from geta_hf.errors import GETAError
from geta_hf.quantization.blocks import LARGEST_HALF, split_blocks
from geta_hf.quantization.maths import FOUR_LEVEL_BITS, four_level_step
from geta_hf.utils.process_state import full_precision

METHODS = ("mse", "max")

PER_OCTAVE = 512
"""Bins for each factor of two. At 8 bits a step next to the clipping value is six bins wide."""

BINS = 20 * PER_OCTAVE
"""Bins of a histogram; the last one also holds everything smaller, which any width rounds to zero."""

# Distances between two candidates, in bins: 9 % in the first pass, and 1.1 % around its best.
_COARSE = PER_OCTAVE // 8
_FINE = PER_OCTAVE // 64
# Elements, or bins, handled at once: their positions and counts are int64, which takes twice to eight times the tensor.
_CHUNK = 1 << 20
# Elements of short rows that are searched at once: a few temporaries in fp32 remain in the processor's cache.
_ELEMENTS = 1 << 16

Pair = tuple[Tensor, Tensor]
_ErrorsOf = Callable[[Tensor, Tensor], Tensor]
"""Magnitudes and a clipping value of every row -> the error of every row."""


@dataclass(frozen=True)
class Histogram:
    """How often the magnitudes of a tensor fall into bins that are equally wide in log space; on CPU.

    Attributes:
        counts: fp32, shape (BINS,), as `count_magnitudes` gives them.
        top: the upper end of the first bin, relative to the clipping value that was chosen.
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


# --- where a quantizer starts -----------------------------------------------------------------------------------------


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


def block_clipping_values(
    weight: Tensor, bits: int, method: str = "mse", name: str = "weight", channel_dim: int = 0
) -> Tensor:
    """Return `clipping_value` of every block of 32 inputs of every channel: fp32, shape (channels, blocks).

    A block that is all zero, or next to it, has no range of its own and gets the value of the entire tensor.

    Args:
        weight: the matrix to quantize.
        bits, method, name: see `clipping_value`.
        channel_dim: the dim of `weight` that the channels run along. Default 0.

    Raises:
        GETAError: as `clipping_value`, for the entire tensor; a block whose step size is beyond fp16.
    """
    rows = weight if channel_dim == 0 else weight.t()
    values = _clipping(split_blocks(rows), bits, method, name, rows.shape[1], search_elements)
    largest = float(values.max()) / (2 ** (bits - 1) - 1)
    if largest > LARGEST_HALF:
        raise GETAError(
            f"{name}: a step size of {largest:.3g} at {bits} bits is beyond {LARGEST_HALF:g}, the largest that a block "
            f"of 32 is stored with; scale the weight down, exclude the layer by a pattern, or choose grid='channel'"
        )
    return values.view(len(rows), -1)


def smallest_range(dtype: torch.dtype) -> float:
    """Return the least max|W| of a tensor that can be quantized: neither W nor a step size at 16 bits is subnormal."""
    return max(torch.finfo(dtype).tiny, torch.finfo(torch.float32).tiny * 2**16)


@torch.no_grad()
def _clipping(
    rows: Tensor, bits: int, method: str, name: str, inputs: int, search: Callable[..., Pair] | None = None
) -> Tensor:
    """Return q_m of every row, shape (rows,); `inputs` are those of an output channel."""
    check_clipping(method)
    if not rows.numel():
        raise GETAError(f"{name} has no elements to quantize; exclude the layer by a pattern")
    rows = rows.detach()
    largest = largest_magnitudes(rows)
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
        values = largest * (search or search_rows)(rows, largest, [bits])[1][:, 0]
    # A channel of zeros gets the range of the tensor, since d > 0 must hold.
    empty = largest == 0
    return torch.where(empty, clipping_value(rows, bits, method, name), values) if bool(empty.any()) else values


# --- histograms -------------------------------------------------------------------------------------------------------


def largest_magnitudes(rows: Tensor) -> Tensor:
    """Return max|x| of every row of a tensor of shape (rows, n): fp32, shape (rows,); 0 where n is 0."""
    if not rows.numel():
        return rows.new_zeros(len(rows), dtype=torch.float32)
    # Without |x|, which would be a copy of the tensor.
    low, high = torch.aminmax(rows, dim=1)
    return torch.maximum(-low, high).float().abs()  # of zeros, -0.0


def count_magnitudes(rows: Tensor, largest: Tensor) -> Tensor:
    """Return a histogram of the magnitudes of every row, downwards from its `largest`.

    Bin k holds what lies within (largest · 2^(-(k+1) / PER_OCTAVE), largest · 2^(-k / PER_OCTAVE)].

    Args:
        rows: of either sign, shape (rows, n).
        largest: shape (rows,), at least the row's max|x|.

    Returns:
        The number of elements in each bin, fp32, shape (rows, BINS).
    """
    count = rows.shape[0]
    # Each row counts into bins of its own, so that one bincount serves all rows.
    first = torch.arange(count, device=rows.device)[:, None] * BINS
    counts = torch.zeros(count * BINS, dtype=torch.int64, device=rows.device)
    for part in rows.split(max(1, _CHUNK // count), dim=1):
        positions = bin_positions(part.float().abs(), largest[:, None]).add_(first)
        counts += torch.bincount(positions.flatten(), minlength=count * BINS)
    return counts.view(count, BINS).float()


def row_parts(count: int) -> Iterator[slice]:
    """Yield the rows, of `count` rows, whose histograms fit into memory at once."""
    at_once = max(1, _CHUNK // BINS)
    for start in range(0, count, at_once):
        yield slice(start, start + at_once)


def bin_positions(magnitude: Tensor, largest: Tensor) -> Tensor:
    """Return the bin of every magnitude, int64, in its shape; `largest` is fp32 and broadcasts against it."""
    # Where all is zero, any number will do that is not: zeros are infinitely far below it, hence in the last bin.
    top = torch.where(largest > 0, largest, 1.0).log2()
    # A difference of logarithms, since a quotient of extreme values could overflow.
    return (top - magnitude.log2()).mul_(PER_OCTAVE).clamp_(0, BINS - 1).long()


# --- the search -------------------------------------------------------------------------------------------------------


def search_rows(
    rows: Tensor,
    largest: Tensor,
    widths: Sequence[int],
    combine: Callable[[Tensor], Tensor] | None = None,
    four_levels: bool = False,
) -> tuple[Tensor, Tensor]:
    """Find the clipping value of least squared error of every row, at every width; see `search_clipping`.

    Args:
        rows: of either sign, shape (rows, n).
        largest: shape (rows,), at least the row's max|x|; 0 where a row has no range.
        widths: bit widths.
        combine: adds up histograms over processes that hold parts of the same rows. Default None.
        four_levels: whether 2 bits have four levels. Default False.

    Returns:
        Errors relative to largest², and clipping values relative to largest: fp32, shape (rows, widths) each.
    """
    errors = torch.zeros(len(rows), len(widths), device=rows.device)
    shares = torch.ones(len(rows), len(widths), device=rows.device)
    for part in row_parts(len(rows)):
        counts = count_magnitudes(rows[part], largest[part])
        if combine is not None:
            counts = combine(counts)
        errors[part], shares[part] = search_clipping(counts, widths, four_levels)
    return errors, shares


def search_elements(
    rows: Tensor,
    largest: Tensor,
    widths: Sequence[int],
    importance: Tensor | None = None,
    four_levels: bool = False,
) -> tuple[Tensor, Tensor]:
    """Find what `search_rows` finds, from the elements themselves in place of histograms.

    The candidates are the same. It serves rows that are far shorter than a histogram, such as blocks of 32, and errors
    that do not all count alike.

    Args:
        rows: of either sign, shape (rows, n).
        largest: shape (rows,), at least the row's max|x|; 0 where a row has no range.
        widths: bit widths.
        importance: how much the error of each element counts, not negative, broadcastable against `rows`. Default None:
            all alike.
        four_levels: whether 2 bits have four levels. Default False.

    Returns:
        Errors relative to largest², and clipping values relative to largest: fp32, shape (rows, widths) each.
    """
    errors = torch.zeros(len(rows), len(widths), device=rows.device)
    shares = torch.ones(len(rows), len(widths), device=rows.device)
    at_once = max(1, _ELEMENTS // max(rows.shape[1], 1))
    for start in range(0, len(rows), at_once):
        part = slice(start, start + at_once)
        ends = largest[part, None]
        magnitude = rows[part].float().abs() / torch.where(ends > 0, ends, 1.0)
        weights = None
        if importance is not None:
            weights = importance[part] if len(importance) == len(rows) else importance
        for column, bits in enumerate(widths):
            errors_of = partial(element_errors, bits=bits, weights=weights, four_levels=four_levels)
            errors[part, column], shares[part, column] = _search_elements(magnitude, weights, errors_of)
    return errors, shares


def _search_elements(magnitude: Tensor, weights: Tensor | None, errors_of: _ErrorsOf) -> tuple[Tensor, Tensor]:
    """Return the least error of every row and its clipping value, shape (rows,) each; magnitudes are at most 1."""
    best = errors_of(magnitude, torch.ones_like(magnitude[:, :1]))
    shift = torch.zeros_like(best)
    for candidate in range(_COARSE, BINS, _COARSE):
        clip = torch.full_like(shift, 2.0 ** (-candidate / PER_OCTAVE))[:, None]
        # What clipping alone costs only rises from here on.
        if bool((_sum_squares(magnitude.sub(clip).clamp_min_(0.0), weights) >= best).all()):
            break
        best, shift = _better(magnitude, clip, candidate, errors_of, best, shift)
    first = shift
    for offset in range(-_COARSE + _FINE, _COARSE, _FINE):
        if offset:
            around = (first + offset).clamp_min(0)
            clip = torch.exp2(-around / PER_OCTAVE)[:, None]
            best, shift = _better(magnitude, clip, around, errors_of, best, shift)
    return best, torch.exp2(-shift / PER_OCTAVE)


def _better(
    magnitude: Tensor, clip: Tensor, candidate: Tensor | int, errors_of: _ErrorsOf, best: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the least error and its shift in every row, after one more candidate."""
    error = errors_of(magnitude, clip)
    wins = error < best
    return torch.where(wins, error, best), torch.where(wins, candidate, shift)


def element_errors(
    magnitude: Tensor, clip: Tensor, bits: int, weights: Tensor | None = None, four_levels: bool = False
) -> Tensor:
    """Return the squared error of rounding every row, shape (rows,).

    Args:
        magnitude: |x|, fp32, shape (rows, n).
        clip: the clipping value of every row, shape (rows, 1).
        bits: the bit width.
        weights: how much each element counts, broadcastable against `magnitude`. Default None: all alike.
        four_levels: whether 2 bits have four levels, of which an exact zero has none and costs nothing. Default False.
    """
    if four_levels and bits == FOUR_LEVEL_BITS:
        step = four_level_step(clip)
        # By arithmetic on magnitudes, which have two levels: comparisons take a processor ten times as long.
        upper = torch.minimum(magnitude, clip).div_(2 * step).floor_()
        change = upper.mul_(2 * step).add_(step).sub_(magnitude)
        return _sum_squares(change.mul_(magnitude.sign()), weights)
    step = clip / (2.0 ** (bits - 1) - 1)
    rounded = torch.minimum(magnitude, clip).div_(step).round_().mul_(step)
    return _sum_squares(rounded.sub_(magnitude), weights)


def _sum_squares(values: Tensor, weights: Tensor | None) -> Tensor:
    """Return the weighted sum of squares of every row; changes the values."""
    squares = values.square_()
    return (squares if weights is None else squares.mul_(weights)).sum(1)


def search_clipping(counts: Tensor, widths: Sequence[int], four_levels: bool = False) -> tuple[Tensor, Tensor]:
    """Find the clipping values under which magnitudes are rounded with the least squared error, at t = 1.

    Candidates reach from the end of the histogram down to where none can be the best any more, so no share of the
    largest magnitude is a floor. They lie 9 % apart, then 1.1 % around the best of these.

    Args:
        counts: how much each bin weighs, fp32, shape (..., BINS), as `count_magnitudes` gives it.
        widths: bit widths.
        four_levels: whether 2 bits have four levels, of which zeros have none and cost nothing. Default False.

    Returns:
        The least error of each width, in the unit of the squared end of the histogram, and its clipping value, in the
        unit of the end: fp32, shape (..., widths) each.
    """
    rows = counts.reshape(-1, BINS)
    lowest = _lowest_shift(rows)
    found = [_search(rows, bits, lowest, four_levels and bits == FOUR_LEVEL_BITS) for bits in widths]
    shape = (*counts.shape[:-1], len(widths))
    errors = torch.stack([error for error, _ in found], dim=1)
    clips = torch.exp2(-torch.stack([shift for _, shift in found], dim=1) / PER_OCTAVE)
    return errors.view(shape), clips.view(shape)


def _search(rows: Tensor, bits: int, lowest: int, four_levels: bool) -> tuple[Tensor, Tensor]:
    """Return the least error of every row and how many bins below the end its clipping value is, shape (rows,) each."""
    # Bins at every distance from a candidate that either pass can ask for.
    costs = _mean_errors(_edges(-lowest - _COARSE, BINS), bits, four_levels=four_levels).float().to(rows.device)
    if four_levels:
        rows = _without_zeros(rows)
    error, first = _best_shift(rows, costs, range(0, lowest + 1, _COARSE))
    shift = first.clone()
    for coarse in first.unique().tolist():
        around = range(max(0, coarse - _COARSE), coarse + _COARSE + 1, _FINE)
        # All rows whose first best is the same, at once.
        mine = first == coarse
        error[mine], shift[mine] = _best_shift(rows[mine], costs, around)
    return error, shift


def squared_error(counts: Tensor, clip: float, bits: int, clipped: bool = True, four_levels: bool = False) -> Tensor:
    """Return the squared error of a histogram under one clipping value, fp32, shape (...).

    Args:
        counts: see `search_clipping`.
        clip: in the unit of the end of the histogram, above 0.
        bits: the bit width.
        clipped: count what lies beyond the clipping value; False counts rounding alone.
        four_levels: as in `search_clipping`. Default False.
    """
    four_levels = four_levels and bits == FOUR_LEVEL_BITS
    errors = _mean_errors(_edges(0, BINS) / clip, bits, clipped, four_levels) * clip**2
    if four_levels:
        counts = _without_zeros(counts)
    with full_precision():
        return counts @ errors.float().to(counts.device)


def _without_zeros(counts: Tensor) -> Tensor:
    """Return histograms without their last bin, which holds the zeros."""
    counts = counts.clone()
    counts[..., -1] = 0.0
    return counts


def _best_shift(rows: Tensor, costs: Tensor, shifts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the least error of every row and the shift that has it, shape (rows,) each.

    Args:
        rows: histograms, shape (rows, BINS).
        costs: of `_bin_costs`.
        shifts: candidates, as numbers of bins below the end of the histogram, evenly spaced and ascending.
    """
    step = shifts[1] - shifts[0] if len(shifts) > 1 else 1
    # The window of a shift begins where the bin of the histogram's end has its distance from the candidate.
    begin = len(costs) - BINS - shifts[-1]
    windows = costs[begin : begin + BINS + shifts[-1] - shifts[0]].unfold(0, BINS, step).flip(0)
    candidates = torch.arange(shifts[0], shifts[-1] + 1, step, device=rows.device)
    # TF32 would round the counts, and which of two candidates wins must not depend on it.
    with full_precision():
        errors = rows @ windows.t() * torch.exp2(-2.0 * candidates / PER_OCTAVE)
    best = errors.argmin(dim=1)
    return errors.gather(1, best[:, None])[:, 0], candidates[best]


def _lowest_shift(rows: Tensor) -> int:
    """Return how many bins below the end the best clipping value of any row can be, a multiple of `_COARSE`.

    Set to zero, an element costs x². Clipping at q saves at least q² for each of the N(q) elements beyond q, and at
    most 2 q |x| for any element. So if any q saves N(q) q², the best one is at least max_q N(q) q² / (2 Σ |x|).
    """
    # Without the last bin, which holds the zeros; what else is in it is below a millionth of the largest.
    ends = _edges(0, BINS - 1).float().to(rows.device)
    # Counted in integers, since `cumsum` of floats has no deterministic form on a GPU. What is rounded down here only
    # makes the bound lower.
    beyond = rows[:, :-1].long().cumsum(dim=1)
    saved = (beyond * ends[1:].square()).amax(dim=1)
    with full_precision():
        bound = saved / (2 * (rows[:, :-1] @ ends[:-1]))
    # A row of zeros gives 0 / 0, and may have any clipping value.
    octaves = -math.log2(float(bound.nan_to_num(1.0).min().clamp(2.0**-16, 1.0)))
    return math.ceil(octaves * PER_OCTAVE / _COARSE) * _COARSE


def _edges(first: int, last: int) -> Tensor:
    """Return 2^(-k / PER_OCTAVE) for k from `first` to `last`, float64, on CPU."""
    return torch.exp2(-torch.arange(first, last + 1, dtype=torch.float64) / PER_OCTAVE)


def _mean_errors(edges: Tensor, bits: int, clipped: bool = True, four_levels: bool = False) -> Tensor:
    """Return the mean of (x^Q - x)² over each bin, for a clipping value of 1; float64, shape (bins,).

    With x spread evenly within a bin, so that widths whose steps are narrower than a bin get their error too.

    Args:
        edges: of the bins, descending, float64, shape (bins + 1,).
        bits: the bit width.
        clipped: see `squared_error`.
        four_levels: whether the levels are a third and 1.
    """
    inside = edges.clamp(max=1.0)
    # The integral of (x^Q - x)² from 0 to each edge.
    if four_levels:
        # Two thirds of 1/3³ up to 2/3, where the level changes, and a cubic around the present one.
        upper = inside >= 2 / 3
        level = torch.where(upper, 1.0, 1 / 3)
        rounding = torch.where(upper, 3.0, 1.0) / 81 + (inside - level) ** 3 / 3
    else:
        # A twelfth of step³ for each step, and a cubic within the present one.
        step = 1.0 / (2.0 ** (bits - 1) - 1)
        inside = inside / step
        nearest = inside.round()
        rounding = step**3 * (nearest / 12 + (inside - nearest) ** 3 / 3)
    integral = rounding + (edges - 1.0).clamp_min(0) ** 3 / 3 if clipped else rounding
    return (integral[:-1] - integral[1:]) / (edges[:-1] - edges[1:])
