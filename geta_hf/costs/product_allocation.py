"""Spend a budget of BOPs, which are products of two widths: that of a layer's weight and that of its input.

One more bit of a weight costs more where its input is wide, and the other way round, so costs change as widths rise.
They only rise, and the worth of a step only falls from one step to the next: a step that was the best when it was last
looked at, and still is at its present cost, is the best of all.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from geta_hf.costs.ledger import ROUNDING
from geta_hf.quantization.functional import FLOAT_BITS


@dataclass(frozen=True)
class ProductCosts:
    """What widths cost.

    Attributes:
        macs: for each layer, the share of the budget that one bit of weight times one bit of input costs.
        shares: for each layer, what one bit of its weight adds to the mean width.
        input_of: for each layer the position of its input; -1 where the input is float.
    """

    macs: Sequence[float]
    shares: Sequence[float]
    input_of: Sequence[int]


@dataclass
class _Climber:
    """A weight or an input whose width rises.

    Attributes:
        widths: that it may have, ascending.
        gains: what each step is worth for each bit, not rising.
        layer: the layer whose BOPs it changes; -1 for none.
        is_input: whether it is an input.
        step: its present width, as a position in `widths`.
    """

    widths: Sequence[int]
    gains: Sequence[float]
    layer: int
    is_input: bool
    step: int = 0

    @property
    def bits(self) -> int:
        """The present width."""
        return self.widths[self.step]

    @property
    def rise(self) -> int:
        """How many bits the next step adds."""
        return self.widths[self.step + 1] - self.widths[self.step]


def allocate_products(
    costs: ProductCosts,
    weight_widths: Sequence[Sequence[int]],
    input_widths: Sequence[int],
    weight_gains: Tensor,
    input_gains: Tensor,
    budgets: tuple[float, float],
    by_cost: bool = True,
) -> tuple[list[int], list[int]]:
    """Return how many steps every weight and every input climbs above its lowest width, greedily.

    Args:
        costs: of the widths.
        weight_widths: the integer widths of each weight, ascending.
        input_widths: the integer widths of inputs, ascending.
        weight_gains: what a step is worth for each bit, shape (layers, steps), not rising along a row.
        input_gains: the same of inputs, shape (inputs, steps).
        budgets: what all steps together may add to BOPs, and to the mean width of weights.
        by_cost: divide the worth of a step by what it costs at the present widths; otherwise the worth alone counts.

    Returns:
        Steps of each weight and of each input. A step that does not fit ends the climb of its weight or input.
    """
    layer_of = {position: layer for layer, position in enumerate(costs.input_of) if position >= 0}
    weights = [
        _Climber(widths, gains, layer, False)
        for layer, (widths, gains) in enumerate(zip(weight_widths, weight_gains.tolist(), strict=True))
    ]
    inputs = [
        _Climber(input_widths, gains, layer_of.get(position, -1), True)
        for position, gains in enumerate(input_gains.tolist())
    ]
    climbers = [*weights, *inputs]

    def bops(climber: _Climber) -> float:
        """Return what one more bit costs at the present width of the other side."""
        if climber.layer < 0:
            return 0.0
        if climber.is_input:
            return costs.macs[climber.layer] * weights[climber.layer].bits
        position = costs.input_of[climber.layer]
        return costs.macs[climber.layer] * (FLOAT_BITS if position < 0 else inputs[position].bits)

    def priority(climber: _Climber) -> float:
        gain = climber.gains[climber.step]
        if not by_cost:
            return gain
        cost = bops(climber)
        return gain / cost if cost > 0 else math.inf

    # A budget that comes out even is spent to the last step.
    remaining = [budget + abs(budget) * ROUNDING for budget in budgets]
    # heapq keeps the smallest on top; of equal priorities the first wins, on every process.
    heap = [(-priority(climber), number) for number, climber in enumerate(climbers) if climber.gains]
    heapq.heapify(heap)
    while heap:
        stored, number = heapq.heappop(heap)
        climber = climbers[number]
        present = -priority(climber)
        if present > stored:
            # It has become more expensive since it was put here.
            heapq.heappush(heap, (present, number))
            continue
        mean = 0.0 if climber.is_input else costs.shares[climber.layer] * climber.rise
        after = (remaining[0] - bops(climber) * climber.rise, remaining[1] - mean)
        # Not pushed back: costs only rise, and the budget only shrinks.
        if min(after) < 0:
            continue
        remaining = list(after)
        climber.step += 1
        if climber.step < len(climber.gains):
            heapq.heappush(heap, (-priority(climber), number))
    return [climber.step for climber in weights], [climber.step for climber in inputs]
