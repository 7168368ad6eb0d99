"""Turn what a search has learned into a choice that meets the targets: the likeliest one, moved as little as needed.

What a choice costs is how much less likely it is than the best one, in nats for each parameter. Under a size alone,
removal and widths compete for it in `costs.joint_allocation`; with a target for pruning, groups are removed by it first
and widths spend what remains. Both spend a budget to the last step, so a target is met and not merely kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from geta_hf.costs.bit_allocation import BitAllocation, BitChoices, LearnedBits, allocate_bits
from geta_hf.costs.joint_allocation import ExpectedLosses, allocate_jointly
from geta_hf.costs.ledger import Ledger
from geta_hf.costs.selection import Limits, find_chunks
from geta_hf.costs.sensitivity import RoundingErrors
from geta_hf.costs.targets import BOPS, BYTES, MEAN_BITS, Target, take_due
from geta_hf.methods.search.cost_target import CostTarget, Steps
from geta_hf.qadg.group_types import Family
from geta_hf.utils.shards import from_first_process

_PRICES = tuple(2.0**power for power in range(-6, 14))
"""How much more probable a group of average size may be than one of no size, and still be removed in place of it."""


@dataclass(frozen=True)
class Learned:
    """What a search ended with; float64, on CPU.

    Attributes:
        widths: logits of the widths of each quantized weight, shape (layers, widths).
        keep: the log-odds that each group remains, shape (groups,).
    """

    widths: Tensor
    keep: Tensor

    @classmethod
    def of(cls, widths: Tensor, keep: Tensor) -> Learned:
        """Return the logits of the first process on all of them: a last digit must not make them differ."""
        return cls(from_first_process(widths.detach()).cpu().double(), from_first_process(keep.detach()).cpu().double())


@dataclass(frozen=True)
class Assignment:
    """What was chosen.

    Attributes:
        removed: bool, shape (groups,), on CPU.
        bits: the widths, and the clipping values for them.
    """

    removed: Tensor
    bits: BitAllocation


def assign(
    families: Sequence[Family],
    limits: Limits,
    ledger: Ledger,
    target: Target,
    learned: Learned,
    rounding: RoundingErrors,
    choices: BitChoices,
    present: LearnedBits,
    cost: CostTarget | None = None,
) -> Assignment:
    """Choose groups and widths by what was learned, exactly within the targets.

    Args:
        families: those that may lose groups.
        limits: what they keep.
        ledger: sizes of the model.
        target: of the run.
        learned: by the search.
        rounding: its clipping values at each of `choices.weights`; its errors have no part in the choice.
        choices: allowed widths.
        present: the present widths of weights and inputs.
        cost: what a hardware cost allows on top of the target; None where nothing limits it.
    """
    if cost is None:
        return _assign_sizes(families, limits, ledger, target, learned, rounding, choices, present)
    if target.budgets:
        sized = _assign_sizes(families, limits, ledger, target, learned, rounding, choices, present)
        steps = torch.tensor([list(choices.weights).index(bits) for bits in sized.bits.weight_bits])
        start = Steps(sized.removed, steps)
    else:
        chunks = find_chunks(families, learned.keep, ledger.nothing, limits)
        removed = ledger.nothing
        removed[chunks.first(int((chunks.scores < 0).sum()))] = True
        start = Steps(removed, learned.widths.argmax(1))
    elements = _of_groups(ledger, dict.fromkeys(ledger.shapes, 1.0))
    unlikely = _unlikeliness(learned.widths) * ledger.weights(start.removed)[:, None]
    found = cost.meet(start, unlikely, elements * learned.keep)
    bits = [int(choices.weights[step]) for step in found.steps.tolist()]
    inputs = [round(width) for width in present.inputs.tolist()]
    allocation = BitAllocation(bits, rounding.clips_at(found.steps.tolist()), inputs, torch.ones(len(inputs)))
    return Assignment(found.removed, allocation)


def _assign_sizes(
    families: Sequence[Family],
    limits: Limits,
    ledger: Ledger,
    target: Target,
    learned: Learned,
    rounding: RoundingErrors,
    choices: BitChoices,
    present: LearnedBits,
) -> Assignment:
    if target.unit in (BYTES, BOPS) and MEAN_BITS not in target.budgets:
        return _assign_jointly(families, limits, ledger, target, learned, rounding, choices, present)
    removed = _choose_groups(families, limits, ledger, target, learned.keep, float(choices.weights[0]))
    weights = ledger.weights(removed)
    unlikely = _unlikeliness(learned.widths) * weights[:, None]
    # Every element counts alike, so that the mean square of `allocate_bits` is 1.
    errors = replace(rounding, errors=unlikely, known=torch.ones(len(weights), dtype=torch.bool))
    own = errors if choices.needs_errors(target) else None
    bits = allocate_bits(present, own, weights, ledger, target, removed, choices)
    return Assignment(removed, bits)


def _unlikeliness(logits: Tensor) -> Tensor:
    """Return how much less likely each option is than the best one, in nats."""
    return logits.amax(-1, keepdim=True) - logits


def _choose_groups(
    families: Sequence[Family], limits: Limits, ledger: Ledger, target: Target, keep: Tensor, narrowest: float
) -> Tensor:
    """Return the groups to remove under a target for pruning, those that remain with the least probability first."""
    removed = ledger.nothing

    def taken(scores: Tensor) -> Tensor:
        mask = removed.clone()
        mask[take_due(target, ledger, find_chunks(families, scores, removed, limits), removed, 1, 1)] = True
        return mask

    sizes = {unit: budget for unit, budget in target.budgets.items() if unit != MEAN_BITS}
    elements = _of_groups(ledger, dict.fromkeys(ledger.shapes, 1.0))
    found = taken(keep)
    for price in _PRICES:
        if all(target.spent(unit, ledger, found, narrowest) <= budget for unit, budget in sizes.items()):
            break
        # The least probable groups are too small for the size that is wanted too, so larger ones are preferred.
        found = taken(keep - price * elements / elements.mean())
    return found


def _assign_jointly(
    families: Sequence[Family],
    limits: Limits,
    ledger: Ledger,
    target: Target,
    learned: Learned,
    rounding: RoundingErrors,
    choices: BitChoices,
    present: LearnedBits,
) -> Assignment:
    widths = torch.tensor(list(choices.weights), dtype=torch.float64)
    weights = ledger.weights(ledger.nothing)
    # The cost of a bit of an element of each layer, and of an element of any other tensor, in the target's unit.
    of_bit = torch.ones(len(ledger.layers), dtype=torch.float64)
    of_others = {name: 8.0 * size for name, size in ledger.item_bytes.items()}
    of_others |= {name: float(bits) for name, bits in ledger.row_bits.items()}
    if target.unit == BOPS:
        of_bit = torch.tensor([layer.uses for layer in ledger.layers], dtype=torch.float64)
        of_others = {}
    own = {layer.weight: float(cost * widths[-1]) for layer, cost in zip(ledger.layers, of_bit, strict=True)}
    worth = _worth_of_a_bit(learned, widths)
    # A price below what a bit is worth here spends the budget to the end, where the likeliest choice is below it.
    per_element = _unlikeliness(learned.widths) + worth * of_bit[:, None] * (widths[-1] - widths) + 1e-9
    removal = _of_groups(ledger, dict.fromkeys(ledger.shapes, 1.0)) * learned.keep
    losses = ExpectedLosses(
        removal + worth * _of_groups(ledger, {**of_others, **own}),
        per_element * weights[:, None],
        list(choices.weights),
    )
    # Widths of inputs are fixed, and are a factor of all BOPs.
    amount = target.amount if target.unit == BYTES else target.amount * 32 / target.input_bits
    quantized_inputs = len(present.inputs) > 0
    found = allocate_jointly(families, limits, ledger, losses, target.unit, amount, quantized_inputs=quantized_inputs)
    steps = [list(choices.weights).index(bits) for bits in found.weight_bits]
    inputs = [round(bits) for bits in present.inputs.tolist()]
    clips = rounding.clips_at(steps)
    return Assignment(found.removed, BitAllocation(found.weight_bits, clips, inputs, torch.ones(len(inputs))))


def _of_groups(ledger: Ledger, of_element: Mapping[str, float]) -> Tensor:
    """Return what the elements of each group are worth together, float64, shape (groups,).

    Args:
        ledger: sizes of the model.
        of_element: name of a tensor -> what one of its elements is worth; nothing where it is not named.
    """
    total = torch.zeros(ledger.groups + 1, dtype=torch.float64)
    for cut in ledger.labels:
        shape = ledger.shapes[cut.tensor]
        each = of_element.get(cut.tensor, 0.0) * math.prod(shape) / shape[cut.dim]
        total.index_add_(0, cut.label, torch.full((len(cut.label),), each, dtype=torch.float64))
    return total[:-1]


def _worth_of_a_bit(learned: Learned, widths: Tensor) -> float:
    """Return the least worth of a bit of an element, in nats, at which the widest model is the best of all."""
    worth = [0.0]
    for narrow in range(len(widths)):
        for wide in range(narrow + 1, len(widths)):
            lost = (learned.widths[:, narrow] - learned.widths[:, wide]) / float(widths[wide] - widths[narrow])
            worth.append(float(lost.max()) if len(lost) else 0.0)
    if len(learned.keep):
        worth.append(float((-learned.keep).max()) / float(widths[-1]))
    return 1.05 * max(worth) + 1e-3
