"""Expected sizes are the ledger's where all probabilities are 0 or 1, and have gradients for both sides of a cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from geta_hf.costs.expected_sizes import ExpectedSizes
from geta_hf.costs.hardware import LayerShape, size_bits
from geta_hf.costs.ledger import LayerEntry, Ledger, RoundedRows
from geta_hf.costs.targets import BOPS, BYTES, GROUPS, MEAN_BITS, PARAMETERS, Target
from geta_hf.qadg.group_types import Family, Member

WIDTHS = [2, 4, 8]


def channels(name: str, first: str, second: str, count: int, each: int = 1) -> Family:
    index = torch.arange(count * each).view(count, each)
    members = (
        Member(f"{first}.weight", 0, index),
        Member(f"{first}.bias", 0, index),
        Member(f"{second}.weight", 1, index),
    )
    return Family(name, "channels", members, prunable=True)


@pytest.fixture(params=[False, True])
def sizes(request: pytest.FixtureRequest) -> ExpectedSizes:
    """A chain in which two families cut one tensor: a (12, 8), b (6, 12), c (8, 6)."""
    shapes = {
        "a.weight": (12, 8),
        "a.bias": (12,),
        "b.weight": (6, 12),
        "b.bias": (6,),
        "c.weight": (8, 6),
        "e": (5, 7),
    }
    families = (channels("heads", "a", "b", 4, 3), channels("inner", "b", "c", 6))
    dim = 0 if request.param else None
    layers = [LayerEntry(f"{name}.weight", uses, dim) for name, uses in (("a", 1.0), ("b", 0.5), ("c", 1.0))]
    ledger = Ledger.of(families, shapes, layers, dict.fromkeys(shapes, 4), rounded={"e": RoundedRows(4)})
    return ExpectedSizes(families, replace(ledger, dropped=100.0))


@pytest.mark.parametrize("seed", range(4))
def test_hard_choices_cost_what_the_ledger_counts(sizes: ExpectedSizes, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    removed = torch.rand(10, generator=generator) < 0.4
    bits = torch.tensor(WIDTHS, dtype=torch.float32)[torch.randperm(3, generator=generator)]
    keep, ledger = (~removed).float(), sizes.ledger
    target = Target(GROUPS, 5, 4.0, input_bits=8)
    torch.testing.assert_close(sizes.weights(keep).double(), ledger.weights(removed))
    assert float(sizes.amount(GROUPS, keep, bits)) == int((~removed).sum())
    assert float(sizes.amount(PARAMETERS, keep, bits)) == ledger.prunable_parameters(removed)
    for unit in (BOPS, MEAN_BITS):
        found = float(sizes.amount(unit, keep, bits, input_bits=8))
        assert found == pytest.approx(target.spent(unit, ledger, removed, bits.double()), rel=1e-5)
    # But for digits of the header, and what is rounded up to bytes.
    assert float(sizes.amount(BYTES, keep, bits)) == pytest.approx(ledger.stored_bytes(removed, bits), abs=32)


def test_layers_are_charged_for_inputs_that_others_make(sizes: ExpectedSizes) -> None:
    keep = torch.full((10,), 0.5, requires_grad=True)
    shares = torch.full((3, 3), 1 / 3)
    expected = sizes.of_layers(keep, shares, WIDTHS, {})
    bits = [
        size_bits(LayerShape(name, *shape), one)
        for name, shape, one in zip("abc", ((12, 8), (6, 12), (8, 6)), expected, strict=True)
    ]
    mean = sum(WIDTHS) / 3
    assert [float(value.detach()) for value in bits] == pytest.approx([6 * 8 * mean, 3 * 6 * mean, 8 * 3 * mean])
    (grad,) = torch.autograd.grad(bits[1], keep)
    # Of b's rows one a group, each with 6 inputs; of its columns three a group, each with 3 outputs.
    assert grad[:4].tolist() == pytest.approx([3 * 3 * mean] * 4) and grad[4:].tolist() == pytest.approx([6 * mean] * 6)


def test_products_of_expectations_are_means_over_choices(sizes: ExpectedSizes) -> None:
    """Groups are removed independently, so sampled models cost on average what is expected."""
    keep = torch.linspace(0.2, 0.9, 10)
    everyone = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 10)
    chance = torch.where(everyone > 0, keep, 1 - keep).prod(1)
    weights = torch.stack([sizes.weights(one) for one in everyone])
    torch.testing.assert_close(sizes.weights(keep), chance @ weights)
