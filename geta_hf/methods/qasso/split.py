"""Split a size between pruning and bit widths in training, by what both are expected to cost.

`costs.joint_allocation` decides and touches nothing; here is what it is given of a run: the averages of warm-up and
projection in one unit. Half of E⟨g, x⟩² over the slices that read a group's output is the loss that removing the group
costs, and half of v Σ (x - x^Q)² that of rounding a weight, both with the Hessian taken as E[g gᵀ].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from geta_hf.costs.bit_allocation import BitAllocation, BitChoices
from geta_hf.costs.input_sensitivity import InputErrors
from geta_hf.costs.joint_allocation import ExpectedLosses, allocate_jointly
from geta_hf.costs.ledger import Ledger
from geta_hf.costs.selection import Limits
from geta_hf.costs.sensitivity import RoundingErrors, mean_square
from geta_hf.costs.targets import Target
from geta_hf.qadg.group_types import Family
from geta_hf.utils.shards import from_first_process


@dataclass(frozen=True)
class Averages:
    """Moving averages over the same steps, so that what they lack of their limit is the same share.

    Attributes:
        groups: of ⟨g, x⟩², shape (groups,).
        layers: of ‖g‖², shape (layers,).
    """

    groups: Tensor
    layers: Tensor


@dataclass(frozen=True)
class Split:
    """What was decided, the same on every process.

    Attributes:
        removed: bool, shape (groups,), on CPU: groups that are removed by the end, including those that are already.
        bits: the widths, and the clipping values for them.
    """

    removed: Tensor
    bits: BitAllocation


def rounding_losses(rounding: RoundingErrors, curvature: Tensor, weights: Tensor) -> Tensor:
    """Return the expected loss of rounding each weight at each width, ½ v Σ (x - x^Q)², shape (layers, widths).

    Args:
        rounding: squared errors.
        curvature: ‖g‖² of each weight, float64, shape (layers,).
        weights: elements of each weight, float64, shape (layers,).
    """
    losses = 0.5 * mean_square(curvature, weights)[:, None] * rounding.errors
    known = rounding.known
    if bool(known.any()) and not bool(known.all()):
        # No gradient of an untrained weight is known, so an element of it is taken for an average one.
        each = losses[known].sum(0) / weights[known].sum()
        losses[~known] = weights[~known, None] * each
    return losses


def decide_split(
    families: Sequence[Family],
    limits: Limits,
    ledger: Ledger,
    target: Target,
    averages: Averages,
    rounding: RoundingErrors,
    choices: BitChoices,
    inputs: InputErrors | None,
    input_of: Sequence[int],
    removed: Tensor,
    exchange_rate: float,
) -> Split:
    """Decide which groups are removed and the width of every weight, and of every input under a budget of BOPs.

    Args:
        families: those that may lose groups.
        limits: what they keep.
        ledger: sizes of the model.
        target: a size alone, in BYTES or BOPS.
        averages: of gradients.
        rounding: squared errors at each of `choices.weights`.
        choices: allowed widths.
        inputs: expected losses at each of `choices.inputs`; None where inputs are float.
        input_of: for each layer the position of its input; -1 where it is float.
        removed: bool, shape (groups,): groups that are removed already.
        exchange_rate: what the expected loss of a removal is multiplied by.

    Raises:
        GETAError: no gradient was seen, or the size can no longer be reached.
    """
    # One process decides for all: a last digit must not make them differ.
    groups = from_first_process(averages.groups).cpu().double()
    layers = from_first_process(averages.layers).cpu().double()
    errors = from_first_process(rounding.errors)
    same = replace(rounding, errors=errors)
    count = 0 if inputs is None else len(inputs.losses)
    of_inputs = None
    if inputs is not None and count:
        of_inputs = 0.5 * from_first_process(inputs.losses)
    losses = ExpectedLosses(
        0.5 * exchange_rate * groups,
        rounding_losses(same, layers, ledger.weights(ledger.nothing)),
        choices.weights,
        of_inputs,
        choices.inputs if count else (),
        input_of,
    )
    found = allocate_jointly(families, limits, ledger, losses, target.unit, target.amount, removed, bool(count))
    steps = [choices.weights.index(bits) for bits in found.weight_bits]
    clips = rounding.clips_at(steps)
    input_bits, input_clips = found.input_bits, torch.ones(count)
    if inputs is not None and input_bits:
        places = [choices.inputs.index(bits) for bits in input_bits]
        input_clips = inputs.clips[torch.arange(count), torch.tensor(places)]
    return Split(found.removed, BitAllocation(found.weight_bits, clips, input_bits, input_clips))
