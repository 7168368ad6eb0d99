"""Decide in one currency which groups are removed and how many bits each remaining weight keeps.

Removing a group and rounding a weight both change weights, and both are expected to cost ½ E⟨g, change⟩². So they can
compete for one budget: removal is the width 0. Under a price λ for each unit of the budget

- each layer takes the widths with the least loss + λ · cost. What it then costs for each remaining element, loss and
  price together, does not depend on how many remain, as both shrink with them;
- a family loses groups, the least loss first, as long as removing one more costs less than what its elements cost.

The least price that meets the budget is found by bisection. What is optimal at a price is optimal among all that costs
no more, so only the last group or width is left to decide: a local search spends what remains of the budget.

Everything is plain data on CPU. Families that cut different dimensions of one tensor are decided in turns, since a
group's elements are fewer where the other dimension has lost some.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geta_hf.costs.ledger import BLOCK_BYTES, ROUNDING, Ledger
from geta_hf.costs.selection import Limits, find_ladders
from geta_hf.costs.targets import BOPS, BYTES, PARAMETERS
from geta_hf.errors import GETAError
from geta_hf.qadg.group_labels import family_of_group
from geta_hf.qadg.group_types import Family
from geta_hf.quantization.functional import FLOAT_BITS

_BISECTIONS = 80
_NEARBY = (0.5, 0.8, 1.25, 2.0)
"""Prices from which a local search starts as well, as shares of the best one."""

_FEW_STEPS = 300
"""Up to so many steps of all ladders together, a start may be walked to the budget by one change at a time."""

_TURNS = 20
"""How often families that share tensors are decided in turns, at most."""

_MOVES = 600
"""How many single changes a step of the local search considers in pairs."""

_VERIFIED = 40
"""How many of the most promising pairs are counted exactly."""

_ROUNDS = 60
"""Steps of a local search, at most."""


@dataclass(frozen=True)
class ExpectedLosses:
    """What removing and rounding are expected to cost, all in the unit of ½ E⟨g, change⟩².

    Attributes:
        removal: float64, shape (groups,): of removing each group alone.
        rounding: float64, shape (layers, widths): of rounding each quantized weight of the ledger, at its full size.
        widths: the integer widths, ascending.
        inputs: float64, shape (inputs, input widths): of rounding each quantized input; None where none is, or where
            their widths do not count.
        input_widths: the integer widths of inputs, ascending.
        input_of: for each layer the position of its input in `inputs`; -1 where it is float. Empty: all are.
    """

    removal: Tensor
    rounding: Tensor
    widths: Sequence[int]
    inputs: Tensor | None = None
    input_widths: Sequence[int] = ()
    input_of: Sequence[int] = ()


@dataclass(frozen=True)
class JointAllocation:
    """What was decided.

    Attributes:
        removed: bool, shape (groups,).
        weight_bits: integer width of each quantized weight.
        input_bits: integer width of each quantized input; empty where they were not decided.
        loss: what all of it is expected to cost.
        spent: of the budget, counted exactly.
    """

    removed: Tensor
    weight_bits: list[int]
    input_bits: list[int]
    loss: float
    spent: float


def allocate_jointly(
    families: Sequence[Family],
    limits: Limits,
    ledger: Ledger,
    losses: ExpectedLosses,
    unit: str,
    budget: float,
    removed: Tensor | None = None,
    quantized_inputs: bool = False,
) -> JointAllocation:
    """Choose the groups to remove and the widths that are expected to cost least within a budget.

    Args:
        families: those that may lose groups, in the order of the ledger's groups.
        limits: what families keep.
        ledger: sizes of the model.
        losses: of removing and of rounding.
        unit: BYTES of the exported file, relative BOPS, or PARAMETERS of prunable groups; under the last, widths cost
            nothing and are the highest.
        budget: how much of it may remain at most.
        removed: bool, shape (groups,): groups that are removed already, and remain so.
        quantized_inputs: whether each layer of the file stores the step size of its input.

    Raises:
        GETAError: a budget out of reach, which names the one that can be reached; losses that are not finite, or all 0.

    >>> import torch
    >>> from geta_hf.costs.ledger import LayerEntry, Ledger
    >>> from geta_hf.qadg.group_types import Member
    >>> rows = Family("rows", "channels", (Member("a.weight", 0, torch.arange(4)[:, None]),), prunable=True)
    >>> ledger = Ledger.of((rows,), {"a.weight": (4, 100)}, [LayerEntry("a.weight")])
    >>> removal = torch.tensor([9.0, 0.1, 9.0, 9.0])
    >>> losses = ExpectedLosses(removal, torch.tensor([[1.0, 0.1]]), [4, 8])
    >>> found = allocate_jointly((rows,), Limits(), ledger, losses, BOPS, 6 / 32)
    >>> found.removed.tolist(), found.weight_bits
    ([False, True, False, False], [8])
    """
    _check_losses(families, ledger, losses)
    problem = _Problem(families, limits, ledger, losses, unit, removed, quantized_inputs)
    return _solve(problem, budget)


def _check_losses(families: Sequence[Family], ledger: Ledger, losses: ExpectedLosses) -> None:
    """Raise GETAError for losses that cannot be compared."""
    bad = torch.nonzero(~torch.isfinite(losses.removal)).flatten().tolist()
    if bad:
        family = families[int(family_of_group(families)[bad[0]])]
        raise GETAError(f"the expected loss of removing a group of {family.name} is {losses.removal[bad[0]]}")
    rows = torch.nonzero(~torch.isfinite(losses.rounding).all(1)).flatten().tolist()
    if rows:
        name = ledger.layers[rows[0]].weight
        raise GETAError(f"the expected loss of rounding {name} is {losses.rounding[rows[0]].tolist()}")
    nothing = [
        what
        for what, values in (("removing any group", losses.removal), ("rounding any weight", losses.rounding[:, :1]))
        if values.numel() and not bool((values != 0).any())
    ]
    if nothing:
        raise GETAError(
            f"{' and '.join(nothing)} is expected to cost nothing: no gradient was seen; check that the loss depends "
            f"on the model's layers, or give pruning and mean_bits instead of a size alone"
        )


# --- the problem as flat vectors --------------------------------------------------------------------------------------


@dataclass
class _State:
    """One solution.

    Attributes:
        position: int64, shape (ladders,): how many steps of its ladder are taken.
        option: int64, shape (layers,): the pair of widths of each layer.
    """

    position: Tensor
    option: Tensor


class _Problem:
    """Sizes and losses as flat vectors.

    A slot is one dimension of one tensor that groups cut; a ladder is the order in which families that lose equally
    many groups lose them, usually one family. An option of a layer is a width of its weight and one of its input.
    """

    def __init__(
        self,
        families: Sequence[Family],
        limits: Limits,
        ledger: Ledger,
        losses: ExpectedLosses,
        unit: str,
        removed: Tensor | None,
        quantized_inputs: bool,
    ) -> None:
        self.families = families
        self.ledger = ledger
        self.losses = losses
        self.unit = unit
        self.quantized_inputs = quantized_inputs
        self.start = ledger.nothing if removed is None else removed.clone()
        self._set_ladders(limits)
        self._set_slots()
        self._set_options()
        self._set_costs()
        self.blocks = self._find_blocks()

    # --- what never changes -------------------------------------------------------------------------------------------

    def _set_ladders(self, limits: Limits) -> None:
        removal = self.losses.removal.double()
        self.ladders = find_ladders(self.families, removal, self.start, limits)
        steps = [ladder.sizes for ladder in self.ladders]
        self.lengths = torch.tensor([len(sizes) for sizes in steps], dtype=torch.int64)
        self.owner = torch.repeat_interleave(torch.arange(len(steps)), self.lengths)
        self.first = self.lengths.cumsum(0) - self.lengths
        empty = [torch.zeros(0, dtype=torch.int64)]
        self.step_groups = torch.cat([*steps, *empty]).double()  # of each family of the ladder
        lost = [_by_step(removal, ladder.groups, ladder.sizes) for ladder in self.ladders]
        self.step_loss = torch.cat([*lost, torch.zeros(0, dtype=torch.float64)])
        # Ascending in each ladder, but for a last digit.
        self.slope = self.step_loss / self.step_groups.clamp_min(1)
        self.ladder_of = torch.full((len(self.families),), -1, dtype=torch.int64)
        for number, ladder in enumerate(self.ladders):
            self.ladder_of[torch.tensor(ladder.families)] = number
        # One entry before the first step of each ladder: nothing is lost there.
        self.lost_groups = _running(self.step_groups, self.owner, self.first, self.lengths)
        self.lost = _running(self.step_loss, self.owner, self.first, self.lengths)
        self.base = torch.arange(len(steps)) + self.first

    def _set_slots(self) -> None:
        """Find what one group of each family takes from each cut dimension."""
        ledger = self.ledger
        family = torch.cat([family_of_group(self.families), torch.tensor([len(self.families)])])
        self.tensors = list(ledger.shapes)
        number = {name: position for position, name in enumerate(self.tensors)}
        slots: dict[int, list[int]] = {}
        size = []
        entry_slot = []
        entry_family = []
        entry_count = []
        self.slot_tensor_list: list[int] = []
        self.slot_of: dict[tuple[str, int], int] = {}
        for slot, cut in enumerate(ledger.labels):
            gone = torch.cat([self.start, torch.zeros(1, dtype=torch.bool)])[cut.label]
            size.append(float((~gone).sum()))
            slots.setdefault(number[cut.tensor], []).append(slot)
            self.slot_tensor_list.append(number[cut.tensor])
            self.slot_of[cut.tensor, cut.dim] = slot
            counts = torch.bincount(family[cut.label], minlength=len(self.families) + 1)[:-1]
            for own in torch.nonzero(counts).flatten().tolist():
                entry_slot.append(slot)
                entry_family.append(own)
                entry_count.append(float(counts[own]) / self.families[own].size)
        self.slot_size = torch.tensor(size, dtype=torch.float64)
        self.slot_tensor = torch.tensor(self.slot_tensor_list, dtype=torch.int64)
        self.entry_slot = torch.tensor(entry_slot, dtype=torch.int64)
        self.entry_family = torch.tensor(entry_family, dtype=torch.int64)
        self.entry_count = torch.tensor(entry_count, dtype=torch.float64)
        # The dimensions that nothing cuts, and a table of the others with a last column of ones as its filling.
        fixed = []
        for position, name in enumerate(self.tensors):
            cut_dims = {ledger.labels[slot].dim for slot in slots.get(position, ())}
            fixed.append(float(math.prod(n for dim, n in enumerate(ledger.shapes[name]) if dim not in cut_dims)))
        self.fixed = torch.tensor(fixed, dtype=torch.float64)
        width = max((len(own) for own in slots.values()), default=1)
        self.table = torch.full((len(self.tensors), width), len(size), dtype=torch.int64)
        for position, own in slots.items():
            self.table[position, : len(own)] = torch.tensor(own)
        self.is_cut = torch.tensor([position in slots for position in range(len(self.tensors))])

    def _set_options(self) -> None:
        """Pair the widths of each layer's weight and input."""
        losses = self.losses
        widths = torch.tensor(list(losses.widths), dtype=torch.float64)
        layers = len(self.ledger.layers)
        input_of = torch.tensor(list(losses.input_of) or [-1] * layers, dtype=torch.int64)
        with_inputs = self.unit == BOPS and losses.inputs is not None and len(losses.input_widths) > 0
        of_inputs = torch.tensor(list(losses.input_widths) if with_inputs else [FLOAT_BITS], dtype=torch.float64)
        self.input_of = input_of if with_inputs else torch.full_like(input_of, -1)
        added = torch.zeros(layers, len(of_inputs), dtype=torch.float64)
        side = of_inputs.expand(layers, -1).clone()
        known = self.input_of >= 0
        if with_inputs and losses.inputs is not None:
            added[known] = losses.inputs.double()[self.input_of[known]]
            side[~known] = FLOAT_BITS
        self.option_loss = (losses.rounding.double()[:, :, None] + added[:, None, :]).flatten(1)
        self.option_side = side[:, None, :].expand(-1, len(widths), -1).flatten(1)
        self.option_bits = widths[None, :, None].expand(layers, -1, len(of_inputs)).flatten(1)
        number = {name: position for position, name in enumerate(self.tensors)}
        names = [layer.weight for layer in self.ledger.layers]
        self.layer_tensor = torch.tensor([number[name] for name in names], dtype=torch.int64)
        full = [float(math.prod(self.ledger.shapes[name])) for name in names]
        # Losses are those of the full weight.
        self.option_loss_each = self.option_loss / torch.tensor(full, dtype=torch.float64)[:, None].clamp_min(1)

    def _set_costs(self) -> None:
        """Set what each element of each tensor costs, by option for layers, and each index of each slot."""
        ledger = self.ledger
        self.unit_cost = torch.zeros(len(self.tensors), dtype=torch.float64)
        self.slot_cost = torch.zeros(len(ledger.labels), dtype=torch.float64)
        if self.unit == BYTES:
            self.option_cost = self.option_bits / 8
            for position, name in enumerate(self.tensors):
                rows = ledger.rounded.get(name)
                self.unit_cost[position] = float(ledger.item_bytes[name]) if rows is None else rows.element_bytes
                if rows is not None and not rows.blocks:
                    self._add_scales(name, 0)
            for layer in ledger.layers:
                if layer.channel_dim is not None and not layer.blocks:
                    self._add_scales(layer.weight, layer.channel_dim)
            # Two bytes for each block of 32; that the last block of a row is full price is left to the exact count.
            block = torch.tensor([BLOCK_BYTES if layer.blocks else 0.0 for layer in ledger.layers], dtype=torch.float64)
            self.option_cost = self.option_cost + block[:, None]
        elif self.unit == BOPS:
            uses = torch.tensor([layer.uses for layer in ledger.layers], dtype=torch.float64)
            dense = float((ledger.weights(ledger.nothing) * uses).sum() + ledger.dropped) * FLOAT_BITS**2
            self.option_cost = self.option_bits * self.option_side * uses[:, None] / dense
        elif self.unit == PARAMETERS:
            counted = torch.tensor([name not in ledger.buffers for name in self.tensors])
            self.unit_cost[counted & self.is_cut] = 1.0
            self.option_cost = self.unit_cost[self.layer_tensor][:, None].expand_as(self.option_bits)
        else:
            raise GETAError(f"a budget in {self.unit} decides no widths; give bytes, bops or parameters")
        self.unit_cost[self.layer_tensor] = 0.0  # by option instead

    def _add_scales(self, name: str, dim: int) -> None:
        slot = self.slot_of.get((name, dim))
        if slot is not None:
            self.slot_cost[slot] += 4.0

    def _find_blocks(self) -> list[Tensor]:
        """Return bool (families,) masks; families of one of them cut no two dimensions of one tensor."""
        at: dict[int, list[set[int]]] = {}
        for slot, tensor in enumerate(self.slot_tensor_list):
            owners = set(self.entry_family[self.entry_slot == slot].tolist())
            at.setdefault(tensor, []).append(owners)
        others: dict[int, set[int]] = {}
        for owners_of in at.values():
            for position, owners in enumerate(owners_of):
                rest = set().union(*owners_of[:position], *owners_of[position + 1 :])
                for family in owners if rest else ():
                    others.setdefault(family, set()).update(rest)
        color: dict[int, int] = {}
        for ladder in self.ladders:
            taken = {color[other] for family in ladder.families for other in others.get(family, ()) if other in color}
            free = next(number for number in range(len(taken) + 1) if number not in taken)
            color.update(dict.fromkeys(ladder.families, free))
        of_family = torch.tensor([color.get(family, -1) for family in range(len(self.families))], dtype=torch.int64)
        return [of_family == number for number in range(int(of_family.max()) + 1)] if len(of_family) else []

    # --- counting -----------------------------------------------------------------------------------------------------

    def remaining(self, position: Tensor) -> Tensor:
        """Return what remains of each slot, shape (slots + 1,), with 1 at the end."""
        lost = torch.cat([self.lost_groups, torch.zeros(1, dtype=torch.float64)])
        # A family of no ladder loses nothing.
        place = torch.where(self.ladder_of >= 0, (self.base + position)[self.ladder_of.clamp_min(0)], len(lost) - 1)
        taken = lost[place][self.entry_family] * self.entry_count
        left = self.slot_size.index_add(0, self.entry_slot, -taken)
        return torch.cat([left, torch.ones(1, dtype=torch.float64)])

    def elements(self, left: Tensor) -> Tensor:
        """Return the remaining elements of each tensor."""
        return self.fixed * left[self.table].prod(1)

    def value(self, state: _State) -> tuple[float, float]:
        """Return the expected loss and the cost of a state, the latter without what does not change."""
        left = self.remaining(state.position)
        elements = self.elements(left)
        pick = state.option[:, None]
        own = elements[self.layer_tensor]
        loss = self.lost[self.base + state.position].sum() + (self._at(self.option_loss_each, pick) * own).sum()
        cost = (self.unit_cost * elements).sum() + (self._at(self.option_cost, pick) * own).sum()
        return float(loss), float(cost + (self.slot_cost * left[:-1]).sum())

    @staticmethod
    def _at(values: Tensor, pick: Tensor) -> Tensor:
        return values.gather(1, pick).squeeze(1)

    def worth(self, left: Tensor, density: Tensor, of_slots: Tensor) -> Tensor:
        """Return what one group of each ladder's every family takes with it, shape (ladders,).

        Args:
            left: of `remaining`.
            density: of each element of each tensor, shape (tensors,).
            of_slots: of each index of each slot, shape (slots,).
        """
        per_index = of_slots.clone()
        for column in range(self.table.shape[1]):
            own = self.table[:, column]
            rest = torch.cat([self.table[:, :column], self.table[:, column + 1 :]], 1)
            present = own < len(self.slot_size)
            each = density * self.fixed * left[rest].prod(1)
            per_index.index_add_(0, own[present], each[present])
        per_family = torch.zeros(len(self.families), dtype=torch.float64)
        per_family.index_add_(0, self.entry_family, self.entry_count * per_index[self.entry_slot])
        total = torch.zeros(len(self.ladders), dtype=torch.float64)
        held = self.ladder_of >= 0
        return total.index_add_(0, self.ladder_of[held], per_family[held])

    def densities(self, option: Tensor) -> tuple[Tensor, Tensor]:
        """Return loss and cost of each element of each tensor under these options, shape (tensors,) each."""
        pick = option[:, None]
        loss = torch.zeros(len(self.tensors), dtype=torch.float64)
        loss[self.layer_tensor] = self._at(self.option_loss_each, pick)
        cost = self.unit_cost.clone()
        cost[self.layer_tensor] = self._at(self.option_cost, pick)
        return loss, cost

    def exact(self, state: _State) -> float:
        """Return what a state costs, counted by the ledger."""
        removed = self.removed(state)
        if self.unit == PARAMETERS:
            return float(self.ledger.prunable_parameters(removed))
        pick = state.option[:, None]
        bits = self._at(self.option_bits, pick)
        if self.unit == BYTES:
            return float(self.ledger.stored_bytes(removed, bits, self.quantized_inputs))
        return self.ledger.relative_bops(removed, bits, self._at(self.option_side, pick))

    def removed(self, state: _State) -> Tensor:
        """Return bool (groups,)."""
        mask = self.start.clone()
        for ladder, taken in zip(self.ladders, state.position.tolist(), strict=True):
            count = int(ladder.sizes[:taken].sum())
            for groups in ladder.groups:
                mask[groups[:count]] = True
        return mask

    # --- at a price ---------------------------------------------------------------------------------------------------

    def cheapest(self, price: float, begin: Tensor, option: Tensor | None = None) -> _State:
        """Return what has the least loss + price · cost, families that share tensors in turns from `begin` on.

        Where `option` is given, widths are these, and groups alone are decided.
        """
        if option is None:
            option = (self.option_loss_each + price * self.option_cost).argmin(1)
        loss, cost = self.densities(option)
        density = loss + price * cost
        position = begin.clone()
        for _ in range(_TURNS):
            before = position
            for block in self.blocks:
                worth = self.worth(self.remaining(position), density, price * self.slot_cost)
                below = (self.slope < worth[self.owner]).long()
                wanted = torch.zeros_like(position).index_add_(0, self.owner, below)
                own = torch.zeros(len(self.ladders), dtype=torch.bool)
                own[self.ladder_of[block & (self.ladder_of >= 0)]] = True
                position = torch.where(own, wanted, position)
            if len(self.blocks) == 1 or torch.equal(before, position):
                break
        return _State(position, option)

    def smallest(self) -> _State:
        """Return the state of least cost: all that limits allow removed, at the cheapest widths."""
        return _State(self.lengths.clone(), self.option_cost.argmin(1))

    def result(self, state: _State) -> JointAllocation:
        """Return a state as it is reported."""
        pick = state.option[:, None]
        bits = [round(width) for width in self._at(self.option_bits, pick).tolist()]
        sides = self._at(self.option_side, pick).tolist()
        inputs: list[int] = []
        if self.losses.inputs is not None and bool((self.input_of >= 0).any()):
            inputs = [max(self.losses.input_widths)] * len(self.losses.inputs)
            for layer, position in enumerate(self.input_of.tolist()):
                if position >= 0:
                    inputs[position] = round(sides[layer])
        loss, _ = self.value(state)
        return JointAllocation(self.removed(state), bits, inputs, loss, self.exact(state))


def _by_step(losses: Tensor, groups: Sequence[Tensor], sizes: Tensor) -> Tensor:
    """Return the loss of each step of a ladder, over all of its families."""
    total = torch.zeros(len(sizes), dtype=torch.float64)
    step = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    for own in groups:
        total.index_add_(0, step, losses[own])
    return total


def _running(steps: Tensor, owner: Tensor, first: Tensor, lengths: Tensor) -> Tensor:
    """Return sums from the start of each ladder, with a 0 before its first step, shape (steps + ladders,)."""
    found = torch.zeros(len(steps) + len(lengths), dtype=torch.float64)
    for number, (start, length) in enumerate(zip(first.tolist(), lengths.tolist(), strict=True)):
        found[start + number + 1 : start + number + 1 + length] = steps[start : start + length].cumsum(0)
    return found


# --- the search -------------------------------------------------------------------------------------------------------


def _solve(problem: _Problem, budget: float) -> JointAllocation:
    smallest = problem.smallest()
    reachable = problem.exact(smallest)
    if reachable > budget * (1 + ROUNDING):
        raise GETAError(
            f"a budget of {budget:,g} {problem.unit} can't be reached: with families at their least and the lowest "
            f"widths it is {reachable:,g}; raise it, or lower bits or min_kept"
        )
    none = torch.zeros_like(problem.lengths)
    room = budget * (1 + ROUNDING)
    best: _State | None = None
    # What is counted here is linear; rounding to bytes and the header of a file change it by a little.
    for _ in range(12):
        over = problem.exact(best or smallest) - problem.value(best or smallest)[1]
        allowed = room - over
        if best is None or problem.exact(best) > room:
            begin = _within(problem, allowed, none) if best is None else _descend(problem, best, allowed)
            best = _improve(problem, begin, allowed)
        else:
            again = _improve(problem, best, allowed)
            if problem.exact(again) > room or problem.value(again)[0] >= problem.value(best)[0] * (1 - 1e-12):
                break
            best = again
    assert best is not None
    while problem.exact(best) > room:
        best = _descend(problem, best, problem.value(best)[1] * (1 - 1e-12) - 1e-12)
    return problem.result(best)


def _within(problem: _Problem, allowed: float, none: Tensor) -> _State:
    """Return the best state found within an amount."""
    free = problem.cheapest(0.0, none)
    if problem.value(free)[1] <= allowed:
        return free
    state, over, price = _bisect(problem, allowed, free, none)
    if problem.value(state)[1] > allowed:
        state = problem.smallest()
    # In a small model the last group is a large part of the budget, so that other starts end elsewhere.
    others = [over, problem.smallest(), *(problem.cheapest(price * factor, none) for factor in _NEARBY)]
    if int(problem.lengths.sum()) > _FEW_STEPS:
        # In a large model only other widths lead elsewhere, and the walk would be long.
        others = _with_other_widths(problem, others, state, allowed, none)
    starts = [state, *others]
    improved = [_improve(problem, _descend(problem, one, allowed), allowed) for one in starts]
    return min(improved, key=lambda one: problem.value(one)[0])


def _bisect(
    problem: _Problem, allowed: float, free: _State, none: Tensor, option: Tensor | None = None
) -> tuple[_State, _State, float]:
    """Find the least price at which the cheapest state is within an amount.

    Args:
        problem: what is decided.
        allowed: the amount.
        free: the cheapest state at no price, which is not within it.
        none: positions at which nothing is removed.
        option: the widths, where groups alone are decided.

    Returns:
        The state at that price, the one just below it, which is not within the amount, and the price. Where no price
        leads there, the first is not within it either.
    """
    low, high = 0.0, _start_price(problem)
    state = problem.cheapest(high, none, option)
    for _ in range(200):
        if problem.value(state)[1] <= allowed:
            break
        low, high = high, high * 8
        state = problem.cheapest(high, none, option)
    over = free
    for _ in range(_BISECTIONS):
        # In log space once it is known which power of ten it is.
        middle = math.sqrt(low * high) if low > 0 else high / 64
        found = problem.cheapest(middle, none, option)
        if problem.value(found)[1] <= allowed:
            high, state = middle, found
        else:
            low, over = middle, found
        if high <= low * (1 + 1e-9) or (low == 0.0 and high < 1e-300):
            break
    return state, over, high


def _with_other_widths(
    problem: _Problem, starts: Sequence[_State], best: _State, allowed: float, none: Tensor
) -> list[_State]:
    """Return for the widths of each start, if they differ from the best state's, the best groups within an amount."""
    found = []
    known = [best.option]
    for start in starts:
        if any(torch.equal(start.option, option) for option in known):
            continue
        known.append(start.option)
        most = _State(problem.lengths.clone(), start.option)
        if problem.value(most)[1] <= allowed:
            free = problem.cheapest(0.0, none, start.option)
            within = problem.value(free)[1] <= allowed
            found.append(free if within else _bisect(problem, allowed, free, none, start.option)[0])
    return found


def _start_price(problem: _Problem) -> float:
    """Return a price of the right order: all losses over all costs."""
    loss = float(problem.lost_groups.numel() and problem.step_loss.sum()) + float(problem.option_loss.sum())
    cost = problem.value(_State(torch.zeros_like(problem.lengths), problem.option_cost.argmax(1)))[1]
    return max(loss, 1e-30) / max(cost, 1e-30)


@dataclass
class _Moves:
    """Single changes of a state, as flat vectors.

    Attributes:
        ladder: whose position changes, or -1.
        layer: whose option changes, or -1.
        to: the new position or option.
        loss, cost: by how much they change, each change taken alone.
    """

    ladder: Tensor
    layer: Tensor
    to: Tensor
    loss: Tensor
    cost: Tensor

    def keep(self, chosen: Tensor) -> _Moves:
        return _Moves(*(getattr(self, name)[chosen] for name in ("ladder", "layer", "to", "loss", "cost")))

    def apply(self, state: _State, number: int) -> _State:
        """Return a state with one of the changes."""
        position, option = state.position.clone(), state.option.clone()
        if int(self.ladder[number]) >= 0:
            position[self.ladder[number]] = self.to[number]
        else:
            option[self.layer[number]] = self.to[number]
        return _State(position, option)


def _moves(problem: _Problem, state: _State) -> _Moves:
    """Return all changes of one layer's widths, and of one ladder by up to three steps."""
    left = problem.remaining(state.position)
    loss_density, cost_density = problem.densities(state.option)
    worth_loss = problem.worth(left, loss_density, torch.zeros_like(problem.slot_cost))
    worth_cost = problem.worth(left, cost_density, problem.slot_cost)
    parts = []
    everyone = torch.arange(len(problem.ladders))
    for change in (-3, -2, -1, 1, 2, 3):
        to = state.position + change
        fits = (to >= 0) & (to <= problem.lengths)
        own, to = everyone[fits], to[fits]
        now, then = (problem.base + state.position)[fits], problem.base[fits] + to
        groups = problem.lost_groups[then] - problem.lost_groups[now]
        loss = problem.lost[then] - problem.lost[now] - groups * worth_loss[fits]
        parts.append(_Moves(own, torch.full_like(own, -1), to, loss, -groups * worth_cost[fits]))
    own = problem.elements(left)[problem.layer_tensor][:, None]
    pick = state.option[:, None]
    loss = (problem.option_loss_each - problem.option_loss_each.gather(1, pick)) * own
    cost = (problem.option_cost - problem.option_cost.gather(1, pick)) * own
    options = torch.arange(loss.shape[1]).expand_as(loss)
    other = options != pick
    layer = torch.arange(len(loss))[:, None].expand_as(loss)[other]
    parts.append(_Moves(torch.full_like(layer, -1), layer, options[other], loss[other], cost[other]))
    return _Moves(*(torch.cat([getattr(p, n) for p in parts]) for n in ("ladder", "layer", "to", "loss", "cost")))


def _descend(problem: _Problem, state: _State, allowed: float) -> _State:
    """Return a state within an amount: the changes that cost the least loss for each unit saved."""
    while problem.value(state)[1] > allowed:
        moves = _moves(problem, state)
        saving = moves.keep(moves.cost < 0)
        if not len(saving.cost):
            return problem.smallest()
        over = problem.value(state)[1] - allowed
        # What saves more than is needed is worth no more than what is needed.
        rate = saving.loss / torch.minimum(-saving.cost, torch.tensor(over, dtype=torch.float64))
        state = saving.apply(state, int(rate.argmin()))
    return state


def _improve(problem: _Problem, state: _State, allowed: float) -> _State:
    """Return a state of less loss within the same amount, by single changes and by pairs of them."""
    for _ in range(_ROUNDS):
        better = _best_change(problem, state, allowed)
        if better is None:
            break
        state = better
    return state


def _best_change(problem: _Problem, state: _State, allowed: float) -> _State | None:
    loss, cost = problem.value(state)
    moves = _moves(problem, state)
    # At an optimal price every change costs at least as much as it is worth; the nearest to it are worth pairing.
    gains = (moves.loss < 0) & (moves.cost > 0)
    price = float((-moves.loss[gains] / moves.cost[gains]).median()) if bool(gains.any()) else 0.0
    reduced = moves.loss + price * moves.cost
    if len(reduced) > _MOVES:
        moves = moves.keep(torch.topk(reduced, _MOVES, largest=False).indices)
    count = len(moves.loss)
    total_loss = moves.loss[:, None] + moves.loss[None, :]
    total_cost = moves.cost[:, None] + moves.cost[None, :]
    # A change with itself stands for that change alone.
    total_loss.diagonal().copy_(moves.loss)
    total_cost.diagonal().copy_(moves.cost)
    hopeful = (total_loss < -1e-12 * abs(loss)) & (total_cost <= (allowed - cost) + 1e-9 * abs(allowed))
    hopeful &= torch.ones_like(hopeful).triu()
    numbers = torch.nonzero(hopeful.flatten()).flatten()
    if not len(numbers):
        return None
    order = torch.sort(total_loss.flatten()[numbers], stable=True).indices[:_VERIFIED]
    best: _State | None = None
    for number in numbers[order].tolist():
        first, second = divmod(number, count)
        changed = moves.apply(state, first)
        if first != second:
            changed = moves.apply(changed, second)
        found, spent = problem.value(changed)
        if spent <= allowed and found < loss * (1 - 1e-12) - 1e-300:
            loss, best = found, changed
    return best
