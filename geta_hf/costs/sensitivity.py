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
from geta_hf.quantization.clipping import BINS, count_magnitudes, search_clipping
from geta_hf.quantization.functional import clip_power
from geta_hf.utils.shards import Shard, add_up, largest_of, local, shard_of

_COUNTS = 1 << 20
"""Counts of bins that are held at once."""


@dataclass(frozen=True)
class RoundingErrors:
    """What rounding each quantized weight to each of some widths costs; on CPU.

    Attributes:
        errors: float64, shape (layers, widths): Σ (x - x^Q)².
        clips: float32, shape (layers, widths): the clipping value of this error, relative to the present one.
        known: bool, shape (layers,): False for weights that are not trained; their errors are 0 and their clips 1.
    """

    errors: Tensor
    clips: Tensor
    known: Tensor


def measure_errors(
    quantizers: Quantizers,
    quantizer_values: Values,
    weight_of: Callable[[str], Tensor | None],
    widths: Sequence[int],
    search: bool,
) -> RoundingErrors:
    """Measure `rounding_errors` of every quantized weight; waits for the device.

    Args:
        quantizers: whose weights are measured.
        quantizer_values: flat (d, q_m, t) of all entries.
        weight_of: returns the weight of a name, or None where it is not trained. It is called for one weight after the
            other, so that a merged weight exists only for as long as it is measured.
        widths: integer widths, ascending.
        search: look for a better clipping value at each width; otherwise the present one is kept.
    """
    _, q_m, t = quantizer_values
    shape = (quantizers.weight_layers, len(widths))
    errors = torch.zeros(shape, dtype=torch.float64)
    clips = torch.ones(shape)
    known = torch.zeros(quantizers.weight_layers, dtype=torch.bool)
    for layer, name in enumerate(quantizers.own_weights):
        weight = weight_of(name)
        if weight is None:
            continue
        of_layer, clips_of_layer = _errors_of_layer(quantizers, name, weight, q_m, t, widths, search)
        errors[layer] = of_layer.cpu()
        clips[layer] = clips_of_layer.cpu()
        known[layer] = True
    return RoundingErrors(errors, clips, known)


def _errors_of_layer(
    quantizers: Quantizers, name: str, weight: Tensor, q_m: Tensor, t: Tensor, widths: Sequence[int], search: bool
) -> tuple[Tensor, Tensor]:
    """Return `rounding_errors` of one weight under its own entries of the flat q_m and t."""
    prefix = quantizers.weights[name]
    shard = shard_of(weight)
    values = local(weight).float()
    clip = quantizers.along(prefix, q_m, weight.dim())
    power = quantizers.along(prefix, t, weight.dim())
    if shard is not None and clip.dim() > 1 and clip.shape[shard.dim] > 1:
        # The table has every channel, this process's part of the weight only some of them.
        clip = clip.narrow(shard.dim, shard.start, shard.stop - shard.start)
    if not search:
        # What is rounded is min(|x|, q_m)^t, on a grid that ends at q_m^t. A search looks for q_m itself, at t = 1.
        values = clip_power(values, clip, power)
        clip = clip**power
    return rounding_errors(values.abs() / clip, clip**2, widths, search, shard)


def rounding_errors(
    magnitude: Tensor, weight: Tensor, widths: Sequence[int], search: bool, shard: Shard | None = None
) -> tuple[Tensor, Tensor]:
    """Return the squared rounding error of a layer at every width, each at its best clipping value.

    Args:
        magnitude: |x| relative to the present clipping value, any shape.
        weight: squared clipping value: one, or one for each index along one dim of `magnitude`, broadcastable to it.
        widths: integer widths, ascending.
        search: look for a better clipping value; otherwise the present one is kept.
        shard: how the layer is split over processes.

    Returns:
        Errors and the clipping values relative to the present one, shape (widths,) each.
    """
    # On a histogram, so that 97 candidates at each width cost the same for every size of layer.
    largest = magnitude.max() if magnitude.numel() else magnitude.new_zeros(())
    # A weight that was zero from the start may still be: a range of zero would make positions of NaN.
    largest = largest_of(largest, shard).clamp_min(BINS * torch.finfo(torch.float32).tiny)
    counts = add_up(_weighted_counts(magnitude, weight.float(), largest), shard)
    centres = (torch.arange(BINS, device=counts.device) + 0.5) * (largest / BINS)
    candidates = torch.ones(1, device=counts.device)
    if search:
        candidates = torch.cat([candidates, torch.linspace(0.05, 1.0, 96, device=counts.device) * largest])
    errors = []
    clips = []
    for bits in widths:
        error, clip = search_clipping(counts, centres, candidates, bits)
        errors.append(error)
        clips.append(clip)
    return torch.stack(errors), torch.stack(clips)


def _weighted_counts(magnitude: Tensor, weight: Tensor, largest: Tensor) -> Tensor:
    """Return what the magnitudes in each of `BINS` bins from 0 to `largest` weigh, fp32, shape (bins,)."""
    # Elements of the same weight are counted first, in integers. A sum of the weights themselves, by `index_add_` or a
    # weighted `bincount`, would be taken in any order on a GPU, or be refused where a deterministic one is asked for.
    rows = magnitude.reshape(1, -1)
    if weight.numel() > 1:
        dim = max(range(weight.dim()), key=weight.size)
        rows = magnitude.movedim(dim, 0).reshape(weight.numel(), -1)
    weights = weight.flatten()
    at_once = max(1, _COUNTS // BINS)
    total = torch.zeros(BINS, device=magnitude.device)
    for part, own in zip(rows.split(at_once), weights.split(at_once), strict=True):
        total += (count_magnitudes(part, largest.expand(len(part))) * own[:, None]).sum(0)
    return total


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
