"""Turn what a search has learned into a choice that meets the targets: the likeliest one, moved as little as needed.

What a choice costs is how much less likely it is than the best one, in nats for each parameter. Under a size alone,
removal and widths compete for it in `costs.joint_allocation`; with a target for pruning, groups are removed by it first
and widths spend what remains. Both spend a budget to the last step, so a target is met and not merely kept.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from geta_hf.costs.bit_allocation import BitAllocation, BitChoices, LearnedBits, allocate_bits
from geta_hf.costs.joint_allocation import ExpectedLosses, allocate_jointly
from geta_hf.costs.ledger import Ledger
from geta_hf.costs.selection import Limits, find_chunks
from geta_hf.costs.sensitivity import RoundingErrors, allocate, by_sensitivity
from geta_hf.costs.targets import BOPS, BYTES, MEAN_BITS, Target, take_due
from geta_hf.methods.search.choices import WidthChoices
from geta_hf.methods.search.cost_target import CostTarget, Steps
from geta_hf.qadg.group_types import Family
from geta_hf.quantization.functional import FLOAT_BITS
from geta_hf.utils.shards import from_first_process

_PRICES = tuple(2.0**power for power in range(-6, 14))
"""How much more probable a group of average size may be than one of no size, and still be removed in place of it."""


_HEADER = 100
"""Bytes of a file's header for a tensor, its name not counted."""

_ROUNDS = 6


@dataclass(frozen=True)
class Learned:
    """What a search ended with; float64, on CPU.

    Attributes:
        widths: logits of the widths of each choice, shape (choices, widths); by default a choice is that of a layer.
        keep: the log-odds that each group remains, shape (groups,).
    """

    widths: Tensor
    keep: Tensor

    @classmethod
    def of(cls, widths: Tensor, keep: Tensor) -> Learned:
        """Return the logits of the first process on all of them: a last digit must not make them differ."""
        return cls(from_first_process(widths.detach()).cpu().double(), from_first_process(keep.detach()).cpu().double())


@dataclass(frozen=True)
class Rows:
    """What is known of choices for rows or columns.

    Attributes:
        choices: what each entry of the weights' quantizers follows, on CPU.
        spans: name of a weight -> its entries.
        sorted: the weights whose entries an export sorts by width.
    """

    choices: WidthChoices
    spans: Mapping[str, slice]
    sorted: Collection[str]

    def remaining(self, ledger: Ledger, removed: Tensor) -> Tensor:
        """Return the remaining elements of each entry, float64, shape (entries,)."""
        remains = torch.cat([~removed, torch.ones(1, dtype=torch.bool)])[self.choices.group].double()
        entries = torch.zeros(len(ledger.layers), dtype=torch.float64).index_add_(0, self.choices.layer, remains)
        return remains * (ledger.weights(removed) / entries.clamp_min(1))[self.choices.layer]

    def of_choices(self, ledger: Ledger, removed: Tensor) -> Tensor:
        """Return the remaining elements of each choice, float64, shape (choices,)."""
        total = torch.zeros(self.choices.count, dtype=torch.float64)
        return total.index_add_(0, self.choices.of_entry, self.remaining(ledger, removed))

    def overhead(self, ledger: Ledger, widths: int) -> int:
        """Return the most bytes that a file takes for widths of rows on top of those for widths of layers."""
        total = 0
        for layer in ledger.layers:
            entries = self.spans[layer.weight]
            total += widths
            if layer.weight not in self.sorted:
                # The table, its name in the header, and its type, shape and place.
                total += entries.stop - entries.start + len(layer.weight) + _HEADER
        return total

    def stored_bytes(self, ledger: Ledger, target: Target, removed: Tensor, bits: Tensor) -> int:
        """Return the bytes of a file with these widths of entries, int64, shape (entries,)."""
        layers = torch.zeros(len(ledger.layers), dtype=torch.float64)
        layers.scatter_reduce_(0, self.choices.layer, bits.double(), "amax")
        own = {weight: bits[span] for weight, span in self.spans.items() if span.stop - span.start > 1}
        quantized_inputs = target.input_bits < FLOAT_BITS
        return ledger.stored_bytes(removed, layers, quantized_inputs, own, self.sorted)


@dataclass(frozen=True)
class Assignment:
    """What was chosen.

    Attributes:
        removed: bool, shape (groups,), on CPU.
        bits: the widths, and the clipping values for them.
    """

    removed: Tensor
    bits: BitAllocation


@dataclass(frozen=True)
class Problem:
    """What is to be chosen, from what, and within what.

    Attributes:
        families: those that may lose groups.
        limits: what they keep.
        ledger: sizes of the model.
        target: of the run.
        learned: by the search.
        rounding: its clipping values at each of `choices.weights`; its errors have no part in the choice.
        choices: allowed widths.
        present: the present widths of weights, and the chosen ones of inputs.
        rows: where a choice is that of a group or a row. Default None: it is that of a layer.
    """

    families: Sequence[Family]
    limits: Limits
    ledger: Ledger
    target: Target
    learned: Learned
    rounding: RoundingErrors
    choices: BitChoices
    present: LearnedBits
    rows: Rows | None = None

    @property
    def widths(self) -> Tensor:
        """The allowed widths of weights, float64, ascending."""
        return torch.tensor([float(width) for width in self.choices.weights], dtype=torch.float64)

    def with_inputs(self) -> Problem:
        """Return the problem as of float inputs, in which a layer counts for less where its input is narrow."""
        ledger, target = _with_inputs(self.ledger, self.target, self.present)
        no_inputs = torch.zeros(0, dtype=torch.float64)
        present = LearnedBits(self.present.weights, no_inputs, [-1] * len(ledger.layers))
        return replace(self, ledger=ledger, target=target, present=present)


def assign(problem: Problem, input_factors: Tensor, cost: CostTarget | None = None) -> Assignment:
    """Choose groups and widths by what was learned, exactly within the targets.

    Args:
        problem: what is to be chosen.
        input_factors: what each input's q_m is to be multiplied by, shape (inputs,).
        cost: what a hardware cost allows on top of the target. Default None: nothing limits it.
    """
    target = problem.target
    own = problem.with_inputs() if BOPS in (target.unit, *target.budgets) else problem
    if cost is not None:
        found = _assign_cost(own, cost)
    elif own.rows is not None:
        found = _with_rows(own, own.rows, _steps_of_rows(own, own.rows))
    else:
        found = _assign_sizes(own)
    inputs = [round(width) for width in problem.present.inputs.tolist()]
    return replace(found, bits=replace(found.bits, input_bits=inputs, input_clip_factors=input_factors))


def _with_inputs(ledger: Ledger, target: Target, present: LearnedBits) -> tuple[Ledger, Target]:
    """Return sizes and a target as of float inputs, in which a layer counts for less where its input is narrow."""
    # Rounded, as widths that are computed from step sizes are integers up to their precision only.
    of_inputs = torch.cat([present.inputs.double().round(), torch.tensor([float(FLOAT_BITS)], dtype=torch.float64)])
    shares = of_inputs[torch.tensor(present.input_of, dtype=torch.int64)] / FLOAT_BITS
    layers = [
        replace(layer, uses=layer.uses * share) for layer, share in zip(ledger.layers, shares.tolist(), strict=True)
    ]
    narrower = replace(ledger, layers=layers)
    # BOPs are relative to the dense model's, whose uses are those of before.
    factor = _dense_work(ledger) / _dense_work(narrower)
    budgets = {unit: budget * (factor if unit == BOPS else 1.0) for unit, budget in target.budgets.items()}
    amount = target.amount * (factor if target.unit == BOPS else 1.0)
    return narrower, replace(target, amount=amount, budgets=budgets, input_bits=float(FLOAT_BITS))


def _dense_work(ledger: Ledger) -> float:
    uses = torch.tensor([layer.uses for layer in ledger.layers], dtype=torch.float64)
    return float((ledger.weights(ledger.nothing) * uses).sum()) + ledger.dropped


def likeliest_inputs(logits: Tensor, widths: Sequence[int], mean: float) -> Tensor:
    """Return the likeliest widths of inputs whose plain mean is at most `mean`, and spends it; float64, (inputs,).

    Args:
        logits: float64, shape (inputs, widths).
        widths: ascending.
        mean: bits.

    >>> likeliest_inputs(torch.tensor([[0.0, 9.0], [5.0, 0.0]]).double(), [4, 8], 6.0).tolist()
    [8.0, 4.0]
    """
    values = torch.tensor([float(width) for width in widths], dtype=torch.float64)
    worth = _worth_of_a_bit(Learned(logits, logits.new_zeros(0)), values)
    losses = _unlikeliness(logits) + worth * (values[-1] - values)
    costs = values.diff().expand(len(logits), -1)
    priority = by_sensitivity(losses, torch.ones(len(logits), dtype=torch.float64), costs)
    steps = allocate(priority, costs[None], [(mean - float(values[0])) * len(logits)])
    return values[torch.tensor(steps, dtype=torch.int64)]


def _assign_cost(problem: Problem, cost: CostTarget) -> Assignment:
    """Move the likeliest choice that other targets allow to one that a hardware cost allows."""
    ledger, target, rows, learned = problem.ledger, problem.target, problem.rows, problem.learned
    if target.budgets and rows is not None:
        start = _steps_of_rows(problem, rows)
        if BYTES in target.budgets and not cost.allows(start):
            # Narrower rows of a weight that has one width so far bring a table of widths with them.
            start = _steps_of_rows(problem, rows, reserve=rows.overhead(ledger, len(problem.widths)))
    elif target.budgets:
        start = _steps_of(problem, _assign_sizes(problem))
    else:
        chunks = find_chunks(problem.families, learned.keep, ledger.nothing, problem.limits)
        removed = ledger.nothing
        removed[chunks.first(int((chunks.scores < 0).sum()))] = True
        start = Steps(removed, learned.widths.argmax(1))
    elements = _of_groups(ledger, dict.fromkeys(ledger.shapes, 1.0))
    weights = ledger.weights(start.removed) if rows is None else rows.of_choices(ledger, start.removed)
    unlikely = _unlikeliness(learned.widths) * weights[:, None]
    found = cost.meet(start, unlikely, elements * learned.keep, narrower=bool(target.budgets))
    return _with_layers(problem, found) if rows is None else _with_rows(problem, rows, found)


def _steps_of(problem: Problem, found: Assignment) -> Steps:
    """Return a choice of widths of layers as positions among the allowed ones."""
    steps = [list(problem.choices.weights).index(bits) for bits in found.bits.weight_bits]
    return Steps(found.removed, torch.tensor(steps))


def _with_layers(problem: Problem, found: Steps) -> Assignment:
    """Return what a choice of groups and of widths of layers says."""
    steps = found.steps.tolist()
    bits = [int(problem.choices.weights[step]) for step in steps]
    return Assignment(found.removed, BitAllocation(bits, problem.rounding.clips_at(steps), [], torch.ones(0)))


def _assign_sizes(problem: Problem) -> Assignment:
    """Choose groups, and a width for each layer."""
    ledger, target, choices = problem.ledger, problem.target, problem.choices
    if target.unit in (BYTES, BOPS) and MEAN_BITS not in target.budgets:
        return _assign_jointly(problem)
    removed = _choose_groups(problem)
    weights = ledger.weights(removed)
    unlikely = _unlikeliness(problem.learned.widths) * weights[:, None]
    # Every element counts alike, so that the mean square of `allocate_bits` is 1.
    errors = replace(problem.rounding, errors=unlikely, known=torch.ones(len(weights), dtype=torch.bool))
    own = errors if choices.needs_errors(target) else None
    bits = allocate_bits(problem.present, own, weights, ledger, target, removed, choices)
    return Assignment(removed, bits)


def _steps_of_rows(problem: Problem, rows: Rows, reserve: int = 0) -> Steps:
    """Choose groups as if each layer had the mean choice of its rows, then a width for each choice.

    Args:
        problem: what is to be chosen.
        rows: those of the problem.
        reserve: bytes of a budget that widths must not spend. Default 0.
    """
    table = rows.choices
    layers = len(problem.ledger.layers)
    unlikely = _unlikeliness(problem.learned.widths)
    counts = torch.bincount(table.layer, minlength=layers).double()
    sums = torch.zeros(layers, unlikely.shape[1], dtype=torch.float64)
    of_layers = sums.index_add_(0, table.layer, unlikely[table.of_entry]) / counts[:, None]
    by_layer = replace(problem, learned=Learned(-of_layers, problem.learned.keep))
    removed = _assign_sizes(by_layer).removed
    return Steps(removed, _spend(problem, rows, removed, reserve))


def _with_rows(problem: Problem, rows: Rows, found: Steps) -> Assignment:
    """Return what a choice of groups and rows says of each entry."""
    table = rows.choices
    removed = found.removed
    of_entry = found.steps[table.of_entry]
    # What is removed is zero at every width.
    of_entry[rows.remaining(problem.ledger, removed) == 0] = 0
    bits = problem.widths.long()[of_entry]
    widest = torch.zeros(len(problem.ledger.layers), dtype=torch.int64)
    widest.scatter_reduce_(0, table.layer, bits, "amax")
    clips = problem.rounding.clips[torch.arange(len(of_entry)), of_entry]
    return Assignment(removed, BitAllocation(widest.tolist(), clips, [], torch.ones(0), bits))


def _spend(problem: Problem, rows: Rows, removed: Tensor, reserve: int) -> Tensor:
    """Return the position of the width of each choice, int64, shape (choices,), which together spend the budgets.

    Args:
        problem, rows, reserve: as in `_steps_of_rows`.
        removed: bool, shape (groups,).
    """
    ledger, target, table, widths = problem.ledger, problem.target, rows.choices, problem.widths
    # So high that the widest model would be the best of all.
    worth = _worth_of_a_bit(problem.learned, widths)
    elements = rows.remaining(ledger, removed)
    weights = ledger.weights(removed)
    uses = torch.tensor([layer.uses for layer in ledger.layers], dtype=torch.float64)
    of_choice = rows.of_choices(ledger, removed)
    used = torch.nonzero(of_choice > 0).flatten()
    narrowest = float(widths[0])
    per_bit = []
    room = []
    for unit, budget in target.budgets.items():
        if unit == BYTES:
            of_layer = torch.full_like(weights, 1 / 8)
            lowest = float(rows.stored_bytes(ledger, target, removed, torch.full_like(table.layer, round(narrowest))))
        else:
            of_layer = uses if unit == BOPS else torch.ones_like(weights)
            lowest = target.spent(unit, ledger, removed, narrowest)
            of_layer = of_layer * lowest / (narrowest * (weights * of_layer).sum())
        cost = torch.zeros(table.count, dtype=torch.float64)
        per_bit.append(cost.index_add_(0, table.of_entry, elements * of_layer[table.layer])[used])
        room.append(budget - lowest)
    costs = torch.stack(per_bit)[..., None] * widths.diff()
    unlikely = _unlikeliness(problem.learned.widths)
    losses = (unlikely[used] + worth * (widths[-1] - widths)) * of_choice[used, None]
    priority = by_sensitivity(losses, torch.ones(len(used), dtype=torch.float64), costs[0])

    def at(budgets: Sequence[float]) -> Tensor:
        found = torch.zeros(table.count, dtype=torch.int64)
        found[used] = torch.tensor(allocate(priority, costs, budgets), dtype=torch.int64)
        return found

    if BYTES not in target.budgets:
        return at(room)
    number = list(target.budgets).index(BYTES)
    budget = target.budgets[BYTES] - reserve
    room[number] -= reserve
    room[number] = max(room[number] - rows.overhead(ledger, len(widths)), 0.0)
    found = torch.zeros(table.count, dtype=torch.int64)
    # Bytes of blocks, tables and headers are known only of a choice, so what remains is spent once they are.
    for _ in range(_ROUNDS):
        tried = at(room)
        bits = widths.long()[tried[table.of_entry]]
        bits[elements == 0] = round(narrowest)
        spare = budget - rows.stored_bytes(ledger, target, removed, bits)
        if spare >= 0:
            found = tried
        climbed = widths[tried[used]] - narrowest
        room[number] = float((climbed * per_bit[number]).sum()) + spare
    return found


def _unlikeliness(logits: Tensor) -> Tensor:
    """Return how much less likely each option is than the best one, in nats."""
    return logits.amax(-1, keepdim=True) - logits


def _choose_groups(problem: Problem) -> Tensor:
    """Return the groups to remove under a target for pruning, those that remain with the least probability first."""
    ledger, target, keep = problem.ledger, problem.target, problem.learned.keep
    narrowest = float(problem.widths[0])
    removed = ledger.nothing

    def taken(scores: Tensor) -> Tensor:
        mask = removed.clone()
        chunks = find_chunks(problem.families, scores, removed, problem.limits)
        mask[take_due(target, ledger, chunks, removed, 1, 1)] = True
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


def _assign_jointly(problem: Problem) -> Assignment:
    """Let removal and widths compete for a size, or for BOPs."""
    ledger, target, learned, widths = problem.ledger, problem.target, problem.learned, problem.widths
    weights = ledger.weights(ledger.nothing)
    # The cost of a bit of an element of each layer, and of an element of any other tensor, in the target's unit.
    of_bit = torch.ones(len(ledger.layers), dtype=torch.float64)
    of_others = {name: 8.0 * size for name, size in ledger.item_bytes.items()}
    of_others |= {name: 8 * rows.element_bytes for name, rows in ledger.rounded.items()}
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
        list(problem.choices.weights),
    )
    # Widths of inputs are fixed, and are a factor of all BOPs.
    amount = target.amount if target.unit == BYTES else target.amount * 32 / target.input_bits
    quantized_inputs = len(problem.present.inputs) > 0
    found = allocate_jointly(
        problem.families, problem.limits, ledger, losses, target.unit, amount, quantized_inputs=quantized_inputs
    )
    clips = problem.rounding.clips_at([list(problem.choices.weights).index(bits) for bits in found.weight_bits])
    return Assignment(found.removed, BitAllocation(found.weight_bits, clips, [], torch.ones(0)))


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
