"""Decide which layer gets one more bit: where it lowers the expected loss most.

The loss that quantizing a layer costs is estimated as v Σ (x - x^Q)², with v the mean squared gradient of its weights,
a stand-in for the diagonal of the Hessian. Widths start at the lowest and rise one step at a time, always where the
estimate falls most per unit of what is being spent, as long as the budget lasts.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geta_hf.costs.ledger import ROUNDING
from geta_hf.costs.quantizer_table import Quantizers, Values
from geta_hf.quantization.blocks import split_blocks
from geta_hf.quantization.clipping import (
    BINS,
    count_magnitudes,
    element_errors,
    largest_magnitudes,
    row_parts,
    search_elements,
    search_rows,
    smallest_range,
    squared_error,
)
from geta_hf.quantization.functional import clip_power
from geta_hf.quantization.maths import FOUR_LEVEL_BITS
from geta_hf.utils.process_state import full_precision
from geta_hf.utils.shards import Shard, add_up, largest_of, local, shard_of

_ROWS = 1 << 11
"""Blocks whose errors are computed at once: temporaries remain in the processor's cache."""


@dataclass(frozen=True)
class RoundingErrors:
    """What rounding each quantized weight to each of some widths costs; on CPU.

    Attributes:
        errors: float64, shape (layers, widths): Σ (x - x^Q)².
        clips: float32, shape (entries, widths): the clipping values of these errors, relative to the present ones; a
            layer has one, or one for each output channel or block.
        known: bool, shape (layers,): False for weights that are not trained; their errors are 0 and their clips 1.
        layer: int64, shape (entries,): the layer of each entry. Default None: every layer has one entry.
        four_levels: bool, shape (layers,): where 2 bits are those of four levels, since these cost less. Default None:
            nowhere.
    """

    errors: Tensor
    clips: Tensor
    known: Tensor
    layer: Tensor | None = None
    four_levels: Tensor | None = None

    def clips_at(self, steps: Sequence[int]) -> Tensor:
        """Return the clipping values at one width of each layer, by its place among the widths, shape (entries,)."""
        chosen = torch.tensor(steps, dtype=torch.int64)
        if self.layer is not None:
            chosen = chosen[self.layer]
        return self.clips[torch.arange(len(chosen)), chosen]


def measure_errors(
    quantizers: Quantizers,
    quantizer_values: Values,
    weight_of: Callable[[str], Tensor | None],
    widths: Sequence[int],
    search: bool,
    four_levels: bool = False,
) -> RoundingErrors:
    """Measure `rounding_errors` of every quantized weight; waits for the device.

    Args:
        quantizers: whose weights are measured.
        quantizer_values: flat (d, q_m, t) of all entries.
        weight_of: returns the weight of a name, or None where it is not trained. It is called for one weight after the
            other, so that a merged weight exists only for as long as it is measured.
        widths: integer widths, ascending.
        search: look for the best clipping values at each width; otherwise the present ones are kept.
        four_levels: whether 2 bits may have four levels. Those layers get them for which these cost less: where many
            weights are next to zero, three are better. Default False.
    """
    _, q_m, t = quantizer_values
    layer = quantizers.layer[quantizers.layer < quantizers.weight_layers].cpu()
    errors = torch.zeros(quantizers.weight_layers, len(widths), dtype=torch.float64)
    clips = torch.ones(len(layer), len(widths))
    known, four = torch.zeros(2, quantizers.weight_layers, dtype=torch.bool)
    for position, name in enumerate(quantizers.own_weights):
        weight = weight_of(name)
        if weight is None:
            continue
        prefix = quantizers.weights[name]
        span = quantizers.spans[prefix]
        errors[position], clips[span] = _errors_of(weight, quantizers, prefix, (q_m, t), widths, search)
        known[position] = True
        if four_levels and FOUR_LEVEL_BITS in widths and quantizers.may_have_four_levels(prefix):
            place = list(widths).index(FOUR_LEVEL_BITS)
            error, clip = _errors_of(weight, quantizers, prefix, (q_m, t), [FOUR_LEVEL_BITS], search, True)
            if float(error) < float(errors[position, place]):
                errors[position, place], clips[span, place] = error[0], clip[:, 0]
                four[position] = True
    return RoundingErrors(errors, clips, known, layer, four)


def _errors_of(
    weight: Tensor,
    quantizers: Quantizers,
    prefix: str,
    present: tuple[Tensor, Tensor],
    widths: Sequence[int],
    search: bool,
    four_levels: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return what `rounding_errors` does, of one weight on its own grid; arguments as in `_errors_of_blocks`."""
    if prefix in quantizers.blocks:
        return _errors_of_blocks(weight, quantizers, prefix, present, widths, search, four_levels)
    clip, power = (quantizers.along(prefix, value, weight.dim()) for value in present)
    return rounding_errors(local(weight), clip, power, widths, search, shard_of(weight), four_levels)


def _errors_of_blocks(
    weight: Tensor,
    quantizers: Quantizers,
    prefix: str,
    present: tuple[Tensor, Tensor],
    widths: Sequence[int],
    search: bool,
    four_levels: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return what `rounding_errors` does, of a weight whose every 32 inputs have a clipping value.

    Args:
        weight: as the model computes with it.
        quantizers: all of the model.
        prefix: of the weight's quantizer.
        present: flat (q_m, t) of all entries.
        widths: integer widths, ascending.
        search: look for the best clipping values at each width.
        four_levels: whether 2 bits have four levels. Default False.
    """
    own = quantizers.blocks[prefix]
    clip = quantizers.block_table(prefix, present[0])[0]
    shard = shard_of(weight)
    values = local(weight.detach())
    outputs = slice(None)
    if shard is not None and shard.dim == own.channel_dim:
        outputs = slice(shard.start, shard.stop)
    elif shard is not None:
        # Blocks may be split between processes, so each takes all of the weight.
        full = values.new_zeros(weight.shape)
        full.narrow(shard.dim, shard.start, shard.stop - shard.start).copy_(values)
        values, shard = add_up(full, shard), None
    rows = split_blocks(values.t() if own.channel_dim else values, own.block_order)
    q_m = clip[outputs].reshape(-1)
    factors = torch.zeros(*clip.shape, len(widths), device=rows.device)
    if search:
        largest = largest_magnitudes(rows)
        # What is zero has no range, and keeps the clipping value that it has.
        empty = largest < smallest_range(rows.dtype)
        largest = torch.where(empty, 0.0, largest)
        relative, shares = search_elements(rows, largest, widths, four_levels=four_levels)
        found = torch.where(empty[:, None], 1.0, shares * (largest / q_m)[:, None])
        unit = largest
    else:
        power = quantizers.block_table(prefix, present[1])[0][outputs].reshape(-1)
        relative = _block_errors(rows, q_m, power, widths, four_levels)
        found = torch.ones_like(relative)
        unit = q_m**power
    # In double precision, which holds the squares of 1e-20 and 1e20.
    total = (relative.cpu().double() * unit.cpu().double()[:, None] ** 2).sum(0)
    factors[outputs] = found.view(-1, clip.shape[1], len(widths))
    if shard is not None:
        total = add_up(total.to(rows.device), shard).cpu()
        factors = add_up(factors, shard)
    return total, factors.flatten(0, 1).cpu()


def _block_errors(rows: Tensor, q_m: Tensor, power: Tensor, widths: Sequence[int], four_levels: bool) -> Tensor:
    """Return the errors of rounding rows on their present grids, relative to q_m^t squared, shape (rows, widths)."""
    errors = torch.zeros(len(rows), len(widths), device=rows.device)
    for start in range(0, len(rows), _ROWS):
        part = slice(start, start + _ROWS)
        magnitude = rows[part].float().abs() / q_m[part, None]
        # (|x| / q_m)^t on a grid that ends at 1 is |x|^t on one that ends at q_m^t.
        magnitude = magnitude ** power[part, None]
        for column, bits in enumerate(widths):
            one = torch.ones_like(magnitude[:, :1])
            errors[part, column] = element_errors(magnitude, one, bits, four_levels=four_levels)
    return errors


def rounding_errors(
    values: Tensor,
    clip: Tensor,
    power: Tensor,
    widths: Sequence[int],
    search: bool,
    shard: Shard | None = None,
    four_levels: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the squared rounding error of a layer at every width, and the clipping values that give it.

    Args:
        values: the weight, or what this process holds of it.
        clip: present clipping values of the full weight: one, or one for each index along one dim, shaped to multiply
            the full weight.
        power: the exponent t, in the shape of `clip` or one for all.
        widths: integer widths, ascending.
        search: look for the best clipping values, at t = 1; otherwise the present ones are kept.
        shard: how the layer is split over processes.
        four_levels: whether 2 bits have four levels. Default False.

    Returns:
        The sum of errors, float64, shape (widths,), and the clipping values relative to the present ones, float32,
        shape (entries, widths); both on CPU.
    """
    values = values.detach()
    if search:
        return _errors_of_best(values, clip, widths, shard, four_levels)
    return _errors_of_present(values, clip, power, widths, shard, four_levels), torch.ones(clip.numel(), len(widths))


def _errors_of_best(
    values: Tensor, clip: Tensor, widths: Sequence[int], shard: Shard | None, four_levels: bool
) -> tuple[Tensor, Tensor]:
    """Return what `rounding_errors` does, of a search in every entry."""
    rows, held, within = _rows_of_entries(values, clip, shard)
    largest = largest_of(largest_magnitudes(rows), within)
    # What is zero has no range, and keeps the clipping value that it has.
    empty = largest < smallest_range(rows.dtype)
    largest = torch.where(empty, 0.0, largest)
    errors, shares = search_rows(rows, largest, widths, lambda counts: add_up(counts, within), four_levels)
    # In double precision, which holds the squares of 1e-20 and 1e20.
    total = (errors.cpu().double() * largest.cpu().double()[:, None] ** 2).sum(0)
    present = clip.flatten()[held]
    factors = torch.zeros(clip.numel(), len(widths), device=rows.device)
    factors[held] = torch.where(empty[:, None], 1.0, shares * (largest / present)[:, None])
    if within is None:  # each process has channels of its own, and zeros for the others
        total = add_up(total.to(rows.device), shard).cpu()
        factors = add_up(factors, shard)
    return total, factors.cpu()


def _errors_of_present(
    values: Tensor, clip: Tensor, power: Tensor, widths: Sequence[int], shard: Shard | None, four_levels: bool
) -> Tensor:
    """Return the errors that `rounding_errors` does, under the present clipping values."""
    rows, held, _ = _rows_of_entries(values, clip, shard)
    # What is rounded is min(|x|, q_m)^t, on a grid that ends at q_m^t. What lies beyond costs the same at every width.
    present = clip.flatten()
    power = power.flatten().expand(len(present))
    if bool((power != 1).any()):
        rows = clip_power(rows.float(), present.new_tensor(torch.inf), power[held][:, None])
        present = present**power
    of_rows = present[held]
    # In the unit of each entry's own grid, so that one histogram serves all of them.
    unit = float(present.max())
    relative = largest_magnitudes(rows) / of_rows
    top = largest_of(relative.max() if len(relative) else relative.new_zeros(()), shard)
    counts = torch.zeros(BINS, device=rows.device)
    for part in row_parts(len(rows)):
        # TF32 would round the counts.
        with full_precision():
            counts += (of_rows[part] / unit) ** 2 @ count_magnitudes(rows[part], of_rows[part] * top)
    counts = add_up(counts, shard)
    end = float(top)
    if end == 0:  # zeros alone
        return torch.zeros(len(widths), dtype=torch.float64)
    errors = [float(squared_error(counts, 1 / end, bits, four_levels=four_levels)) for bits in widths]
    return torch.tensor(errors, dtype=torch.float64) * (end * unit) ** 2


def _rows_of_entries(values: Tensor, clip: Tensor, shard: Shard | None) -> tuple[Tensor, slice, Shard | None]:
    """Return a weight with a row for each clipping value, shape (rows, n).

    Returns:
        The rows that this process has a part of, which entries these are, and how the rows themselves are split; None
        where each row is complete in one process.
    """
    if clip.numel() == 1:
        return values.reshape(1, -1), slice(None), shard
    dim = max(range(clip.dim()), key=lambda place: clip.shape[place])
    rows = values.transpose(0, dim)
    rows = rows.flatten(1) if rows.dim() > 1 else rows[:, None]
    if shard is not None and shard.dim == dim:
        return rows, slice(shard.start, shard.stop), None
    return rows, slice(None), shard


def allocate(priority: Tensor, costs: Tensor, budgets: Sequence[float]) -> list[int]:
    """Return how many steps every layer climbs above its lowest width, greedily.

    Args:
        priority: shape (layers, steps); what a step is worth per unit of cost, not rising along a row.
        costs: what a step takes of each budget, shape (budgets, layers, steps), above 0.
        budgets: what all steps together may cost.

    Returns:
        Steps of each layer. A step that does not fit ends its layer's climb, and the budget is spent on others.
    """
    rows = priority.double().tolist()
    prices = costs.double().permute(1, 2, 0).tolist()
    remaining = [budget * (1 + ROUNDING) for budget in budgets]  # one that comes out even is spent to the last step
    climbed = [0] * len(rows)
    # heapq keeps the smallest on top; of equal priorities the first layer wins, on every process.
    heap = [(-row[0], layer) for layer, row in enumerate(rows) if row]
    heapq.heapify(heap)
    while heap:
        _, layer = heapq.heappop(heap)
        after = [budget - price for budget, price in zip(remaining, prices[layer][climbed[layer]], strict=True)]
        # Not pushed back: later steps of the layer need this one first, and the budget only shrinks.
        if min(after) < 0:
            continue
        remaining = after
        climbed[layer] += 1
        if climbed[layer] < len(rows[layer]):
            heapq.heappush(heap, (-rows[layer][climbed[layer]], layer))
    return climbed


def by_sensitivity(errors: Tensor, curvature: Tensor, cost: Tensor) -> Tensor:
    """Return priorities for `allocate`: how much the expected loss falls per unit of cost, shape (layers, steps).

    Args:
        errors: of `rounding_errors`, shape (layers, widths).
        curvature: mean squared gradient of a remaining element, shape (layers,).
        cost: shape (layers, steps).
    """
    # A step can't be worth more than one below it, which has to be taken first; greedy choice relies on that.
    gain = curvature[:, None] * (errors[:, :-1] - errors[:, 1:]) / cost
    return torch.cummin(gain, dim=1).values if gain.shape[1] else gain


def by_learned_width(bits: Tensor, widths: Sequence[int]) -> Tensor:
    """Return priorities for `allocate` that move learned widths together, shape (layers, steps).

    A step counts by how far it is below the layer's own learned width.
    """
    return bits[:, None] - torch.tensor(widths[:-1], dtype=bits.dtype)


def nearest(bits: Tensor, widths: Sequence[int]) -> list[int]:
    """Return the allowed width nearest to each learned one; the larger of two that are equally near."""
    choices = torch.tensor(widths, dtype=torch.float64)
    # Flipped, as `argmin` returns the first of equals and the larger width is to win.
    distance = (bits.double()[:, None] - choices).abs().flip(1)
    return [widths[len(widths) - 1 - position] for position in distance.argmin(1).tolist()]


def mean_square(total: Tensor, count: Tensor) -> Tensor:
    """Return the mean over the remaining elements of a layer; 0 where there are none."""
    return torch.where(count > 0, total / count.clamp_min(1), torch.zeros_like(total))
