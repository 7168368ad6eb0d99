"""What was learned becomes a choice within the targets: against all choices, on a network small enough to try them."""

from __future__ import annotations

import itertools

import pytest
import torch

from geta_hf import SearchConfig
from geta_hf.costs.bit_allocation import BitChoices, LearnedBits
from geta_hf.costs.ledger import LayerEntry, Ledger
from geta_hf.costs.selection import Limits
from geta_hf.costs.sensitivity import RoundingErrors
from geta_hf.costs.targets import solve_target
from geta_hf.methods.search.assign import Assignment, Learned, Problem, assign
from tests.methods.qasso.toy import Toy, toy_space

WIDTHS = [2, 3, 6]
FAMILIES = toy_space().trainable
SHAPES = {name: tuple(p.shape) for name, p in Toy().named_parameters()}
LEDGER = Ledger.of(FAMILIES, SHAPES, [LayerEntry(f"layers.{n}.weight") for n in range(4)], dict.fromkeys(SHAPES, 4))


def learned(seed: int) -> Learned:
    generator = torch.Generator().manual_seed(seed)
    return Learned(
        torch.randn(4, 3, generator=generator, dtype=torch.float64),
        2 * torch.randn(10, generator=generator, dtype=torch.float64),
    )


def choose(found: Learned, **targets: object) -> Assignment:
    config = SearchConfig(bits=(2, 6), bit_choices=WIDTHS, per_channel=False, **targets)
    target = solve_target(config, FAMILIES, LEDGER)
    rounding = RoundingErrors(torch.zeros(4, 3, dtype=torch.float64), torch.arange(12.0).view(4, 3), torch.ones(4) > 0)
    present = LearnedBits(torch.full((4,), 16.0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64), [-1] * 4)
    choices = BitChoices(WIDTHS, WIDTHS)
    problem = Problem(FAMILIES, Limits(), LEDGER, target, found, rounding, choices, present)
    return assign(problem, torch.ones(0))


def elements_of(removed: torch.Tensor) -> int:
    shapes = {**{name: list(shape) for name, shape in SHAPES.items()}, **LEDGER.remaining_shapes(removed)}
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def unlikeliness(found: Learned, removed: torch.Tensor, bits: list[int]) -> float:
    """Nats by which a choice is less likely than the best one of all, for each element."""
    each = found.widths.amax(1) - found.widths[torch.arange(4), torch.tensor([WIDTHS.index(b) for b in bits])]
    total = float((each * LEDGER.weights(removed)).sum())
    for group in range(10):
        alone = LEDGER.nothing
        alone[group] = True
        size = elements_of(LEDGER.nothing) - elements_of(alone)
        odds = float(found.keep[group]) * (1 if removed[group] else -1)
        total += size * max(odds, 0.0)
    return total


def all_choices() -> list[tuple[torch.Tensor, list[int]]]:
    masks = []
    for heads, rows in itertools.product(
        itertools.product([False, True], repeat=4), itertools.product([False, True], repeat=6)
    ):
        if not all(heads) and not all(rows):
            masks.append(torch.tensor([*heads, *rows]))
    return [(mask, list(bits)) for mask in masks for bits in itertools.product(WIDTHS, repeat=4)]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_a_size_is_spent_on_what_is_nearly_the_likeliest_choice(seed: int) -> None:
    found = learned(seed)
    chosen = choose(found, target_bops=0.07)
    spent = LEDGER.relative_bops(chosen.removed, torch.tensor(chosen.bits.weight_bits, dtype=torch.float64))
    assert 0.9 * 0.07 < spent <= 0.07
    # No choice that costs as much is much likelier.
    ours = unlikeliness(found, chosen.removed, chosen.bits.weight_bits)
    best = ours
    generator = torch.Generator().manual_seed(seed)
    everything = all_choices()
    for number in torch.randperm(len(everything), generator=generator)[:500].tolist():
        mask, bits = everything[number]
        if spent * 0.999 <= LEDGER.relative_bops(mask, torch.tensor(bits, dtype=torch.float64)) <= 0.07:
            best = min(best, unlikeliness(found, mask, bits))
    assert ours <= 1.1 * best + 1e-6


def test_the_least_likely_groups_and_the_likeliest_widths() -> None:
    found = learned(0)
    chosen = choose(found, target_sparsity=0.3, mean_bits=6)
    assert set(chosen.removed.nonzero().flatten().tolist()) == set(found.keep.argsort()[:3].tolist())
    assert chosen.bits.weight_bits == [6] * 4  # the budget is spent, whatever is the likeliest
    widths = torch.tensor([[9.0, 0, 0], [0, 9, 0], [0, 0, 9], [0, 0, 9]], dtype=torch.float64)
    weights = LEDGER.weights(chosen.removed)
    mean = float((weights * torch.tensor([2.0, 3, 6, 6])).sum() / weights.sum())
    again = choose(Learned(widths, found.keep), target_sparsity=0.3, mean_bits=mean)
    assert again.bits.weight_bits == [2, 3, 6, 6]
    assert again.bits.clip_factors.tolist() == [0.0, 4.0, 8.0, 11.0]  # those of the chosen widths


def test_groups_give_way_to_a_size_that_is_wanted_too() -> None:
    """By probability alone small groups would be removed, which leaves too much."""
    keep = torch.tensor([3.0, 3, 3, 3, -3, -3, -3, -3, -3, 3], dtype=torch.float64)
    targets = {"target_sparsity": 0.3, "target_bops": 0.0455}
    chosen = choose(Learned(torch.zeros(4, 3, dtype=torch.float64), keep), **targets)
    assert int(chosen.removed.sum()) == 3
    assert LEDGER.relative_bops(chosen.removed, torch.tensor(chosen.bits.weight_bits, dtype=torch.float64)) <= 0.0455
