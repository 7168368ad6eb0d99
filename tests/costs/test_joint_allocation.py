"""Pruning and widths in one currency, against every subset of groups with every pair of widths."""

from __future__ import annotations

import math
from itertools import accumulate, product

import pytest
import torch

from geta_hf.costs import joint_allocation
from geta_hf.costs.joint_allocation import ExpectedLosses, JointAllocation, allocate_jointly
from geta_hf.costs.ledger import LayerEntry, Ledger
from geta_hf.costs.selection import Limits
from geta_hf.costs.targets import BOPS, BYTES, PARAMETERS, most_removed
from geta_hf.errors import GETAError
from geta_hf.qadg.group_types import Family, Member

WIDTHS = [2, 3, 4, 6, 8]
FALLING = torch.tensor([4.0 ** -(bits - 2) for bits in WIDTHS], dtype=torch.float64)


class Problem:
    """Two families of 5 and 3 groups that cut three tensors; one tensor by both, another with a scale a row."""

    def __init__(self, seed: int, per_channel: bool = False, blocks: bool = False) -> None:
        draw = torch.Generator().manual_seed(seed)
        rows = torch.arange(10).view(5, 2)
        self.shapes = {"a.weight": (10, 12), "a.bias": (10,), "b.weight": (3, 10), "c.weight": (9, 3)}
        first = (Member("a.weight", 0, rows), Member("a.bias", 0, rows), Member("b.weight", 1, rows))
        others = torch.arange(3)[:, None]
        second = (Member("b.weight", 0, others), Member("c.weight", 1, others))
        self.families = (Family("one", "channels", first, True), Family("two", "heads", second, True))
        channel_dim = 0 if per_channel or blocks else None
        layers = [LayerEntry("a.weight", 1.0, channel_dim, blocks), LayerEntry("b.weight", 2.0)]
        self.ledger = Ledger.of(self.families, self.shapes, layers, dict.fromkeys(self.shapes, 4))
        self.removal = torch.rand(8, generator=draw, dtype=torch.float64) ** 3
        scale = torch.rand(2, 1, generator=draw, dtype=torch.float64) * 5
        self.losses = ExpectedLosses(self.removal, scale * FALLING, WIDTHS)

    def spent(self, unit: str, removed: torch.Tensor, bits: torch.Tensor | float) -> float:
        if unit == BYTES:
            return self.ledger.stored_bytes(removed, bits)
        return self.ledger.relative_bops(removed, bits)

    def budget(self, unit: str, share: float, limits: Limits) -> float:
        low = self.spent(unit, most_removed(self.families, limits), 2.0)
        budget = low + (self.spent(unit, self.ledger.nothing, 8.0) - low) * share
        return math.floor(budget) if unit == BYTES else budget

    def solve(self, unit: str, budget: float, limits: Limits) -> JointAllocation:
        return allocate_jointly(self.families, limits, self.ledger, self.losses, unit, budget)

    def solutions(self, limits: Limits) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
        """Every allowed set of removed groups with every pair of widths, and its loss."""
        found = []
        full = self.ledger.weights(self.ledger.nothing)
        counts = [{0, *accumulate(limits.chunks(family, family.size))} for family in self.families]
        for mask in product([False, True], repeat=8):
            if sum(mask[:5]) not in counts[0] or sum(mask[5:]) not in counts[1]:
                continue
            removed = torch.tensor(mask)
            share = self.ledger.weights(removed) / full
            base = float(self.removal[removed].sum())
            for pair in product(range(len(WIDTHS)), repeat=2):
                rounding = self.losses.rounding[torch.arange(2), torch.tensor(pair)]
                bits = torch.tensor([float(WIDTHS[step]) for step in pair], dtype=torch.float64)
                found.append((removed, bits, base + float((rounding * share).sum())))
        return sorted(found, key=lambda solution: solution[2])


@pytest.mark.parametrize(
    ("seed", "limits"),
    [
        (0, Limits()),
        pytest.param(1, Limits(multiple_of=2), marks=pytest.mark.slow),
        pytest.param(2, Limits(min_kept=2), marks=pytest.mark.slow),
        pytest.param(5, Limits(), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("unit", [BYTES, BOPS])
def test_no_set_of_groups_and_widths_is_much_better(unit: str, seed: int, limits: Limits) -> None:
    problem = Problem(seed, per_channel=seed == 2, blocks=seed == 5)
    solutions = problem.solutions(limits)
    last = math.inf
    for share in (0.1, 0.3, 0.6):
        budget = problem.budget(unit, share, limits)
        found = problem.solve(unit, budget, limits)
        # In the order of their losses, so that the first that fits is the best.
        best = next(loss for removed, bits, loss in solutions if problem.spent(unit, removed, bits) <= budget)
        assert best - 1e-9 <= found.loss <= best * 1.02
        bits = torch.tensor(found.weight_bits, dtype=torch.float64)
        assert found.spent == problem.spent(unit, found.removed, bits) <= budget
        assert found.loss <= last
        last = found.loss


def test_parameters_decide_groups_alone() -> None:
    problem = Problem(3)
    dense = problem.ledger.prunable_parameters(problem.ledger.nothing)
    found = problem.solve(PARAMETERS, dense // 2, Limits())
    assert found.weight_bits == [8, 8] and found.spent <= dense // 2
    assert found.spent == problem.ledger.prunable_parameters(found.removed)
    best = min(
        loss
        for removed, bits, loss in problem.solutions(Limits())
        if bits.tolist() == [8, 8] and problem.ledger.prunable_parameters(removed) <= dense // 2
    )
    assert found.loss <= best * 1.02


def test_a_budget_that_all_fits_into_changes_nothing() -> None:
    problem = Problem(4)
    found = problem.solve(BYTES, problem.ledger.stored_bytes(problem.ledger.nothing, 8), Limits())
    assert not bool(found.removed.any()) and found.weight_bits == [8, 8]


def test_what_is_removed_already_remains_removed() -> None:
    problem = Problem(5)
    removed = torch.arange(8) == int(problem.removal.argmax())
    budget = problem.budget(BYTES, 0.3, Limits())
    found = allocate_jointly(problem.families, Limits(), problem.ledger, problem.losses, BYTES, budget, removed)
    assert bool(found.removed[removed].all()) and found.spent <= budget


def test_families_of_a_kind_lose_equally_many() -> None:
    cut = torch.arange(6)[:, None]
    names = [f"{letter}.weight" for letter in "abc"]
    families = [Family(name, "channels", (Member(name, 0, cut),), True, parameters=8) for name in names]
    ledger = Ledger.of(families, dict.fromkeys(names, (6, 8)), [LayerEntry(name) for name in names])
    removal = torch.rand(18, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    removal[:6] *= 100
    losses = ExpectedLosses(removal, torch.ones(3, 1, dtype=torch.float64), [8])
    found = allocate_jointly(families, Limits(uniform=True), ledger, losses, BOPS, 8 / 32 * 0.6)
    assert found.removed.view(3, 6).sum(1).tolist() == [3, 3, 3]
    free = allocate_jointly(families, Limits(), ledger, losses, BOPS, 8 / 32 * 0.6)
    assert free.removed.view(3, 6).sum(1)[0] == 0 and free.loss < found.loss


def test_widths_of_inputs_share_a_budget_of_bops() -> None:
    """One layer: the product of two widths, so that every pair can be tried."""
    shapes = {"a.weight": (4, 4)}
    ledger = Ledger.of((), shapes, [LayerEntry("a.weight")])
    inputs = torch.tensor([[3.0, 1.0, 0.1]], dtype=torch.float64)
    rounding = torch.tensor([[2.0, 0.9, 0.3]], dtype=torch.float64)
    losses = ExpectedLosses(torch.zeros(0), rounding, [2, 4, 8], inputs, [2, 4, 8], [0])
    for budget in (4, 8, 16, 32, 64):
        found = allocate_jointly((), Limits(), ledger, losses, BOPS, budget / 1024)
        pairs = product(enumerate([2, 4, 8]), repeat=2)
        best = min(float(rounding[0, i] + inputs[0, j]) for (i, w), (j, a) in pairs if w * a <= budget)
        assert found.loss == pytest.approx(best) and found.weight_bits[0] * found.input_bits[0] <= budget


def test_a_budget_out_of_reach_names_the_one_that_is_not() -> None:
    problem = Problem(6)
    least = problem.spent(BYTES, most_removed(problem.families, Limits()), 2.0)
    with pytest.raises(GETAError, match=f"it is {least:g}"):
        problem.solve(BYTES, least - 1, Limits())
    assert problem.solve(BYTES, least, Limits()).spent == least


@pytest.mark.parametrize(
    ("removal", "rounding", "message"),
    [
        (torch.zeros(8), FALLING.expand(2, 5), "removing any group is expected to cost nothing"),
        (torch.ones(8), torch.zeros(2, 5), "rounding any weight is expected to cost nothing"),
        (torch.full((8,), math.nan), FALLING.expand(2, 5), "removing a group of one is nan"),
        (torch.ones(8), torch.full((2, 5), math.inf), "rounding a.weight is"),
    ],
)
def test_losses_that_cannot_be_compared_are_refused(
    removal: torch.Tensor, rounding: torch.Tensor, message: str
) -> None:
    problem = Problem(7)
    losses = ExpectedLosses(removal, rounding, WIDTHS)
    with pytest.raises(GETAError, match=message):
        allocate_jointly(problem.families, Limits(), problem.ledger, losses, BYTES, 10**6)


def test_a_large_model_takes_few_changes_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts far from the best state were walked to it group by group: minutes for 3 billion parameters."""
    counted = []
    moves = joint_allocation._moves
    monkeypatch.setattr(joint_allocation, "_moves", lambda *given: counted.append(1) or moves(*given))
    rows = torch.arange(20_000)[:, None]
    family = Family("rows", "channels", (Member("a.weight", 0, rows),), True)
    ledger = Ledger.of([family], {"a.weight": (20_000, 8)}, [LayerEntry("a.weight")], {"a.weight": 4})
    removal = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    losses = ExpectedLosses(removal, 500 * FALLING[None], WIDTHS)
    size = ledger.stored_bytes(ledger.nothing, 8.0) // 3
    found = allocate_jointly([family], Limits(), ledger, losses, BYTES, size)
    assert size * 0.999 < found.spent <= size
    # Walking took 5,548.
    assert len(counted) < 300
    # No group that remains is worth less than one that is removed.
    assert float(removal[found.removed].max()) <= float(removal[~found.removed].min())
