"""Bit allocation as a pure function: a few numbers in, integer widths out, and no model in sight."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

import pytest
import torch

from geta_hf.config import GETAConfig
from geta_hf.costs.bit_allocation import BitChoices, LearnedBits, allocate_bits
from geta_hf.costs.ledger import LayerEntry, Ledger
from geta_hf.costs.quantizer_table import Quantizers
from geta_hf.costs.sensitivity import RoundingErrors, measure_errors, rounding_errors
from geta_hf.costs.targets import BOPS, BYTES, GROUPS, MEAN_BITS, Target
from geta_hf.qadg.group_types import Family, Member

WIDTHS = [4, 5, 6, 7, 8]
SHAPES = {"a.weight": (10, 10), "b.weight": (10, 10), "c.weight": (20, 10)}
ROWS = Family("c", "channels", (Member("c.weight", 0, torch.arange(20)[:, None]),), prunable=True)
LEDGER = Ledger.of((ROWS,), SHAPES, [LayerEntry(name) for name in SHAPES], dict.fromkeys(SHAPES, 4))
NONE = LEDGER.nothing
ERRORS = (4.0 ** -torch.arange(5.0, dtype=torch.float64)).expand(3, 5)
CLIPS = torch.tensor([[0.5, 0.6, 0.7, 0.8, 0.9]]).expand(3, 5)
ROUNDING = RoundingErrors(ERRORS, CLIPS, torch.ones(3, dtype=torch.bool))
EQUAL = torch.tensor([100.0, 100, 200], dtype=torch.float64)


def learned(*bits: float, inputs: tuple[float, ...] = (), input_of: tuple[int, ...] = (-1, -1, -1)) -> LearnedBits:
    return LearnedBits(torch.tensor(bits, dtype=torch.float64), torch.tensor(inputs, dtype=torch.float64), input_of)


def target(**budgets: float) -> Target:
    names = {"mean": MEAN_BITS, "bops": BOPS, "size": BYTES}
    return Target(GROUPS, 20, 6.0, {names[name]: amount for name, amount in budgets.items()})


SIX = target(mean=6)


def allocate(curvature: torch.Tensor = EQUAL, rounding=ROUNDING, wanted=SIX, removed=NONE):
    return allocate_bits(learned(8, 8, 8), rounding, curvature, LEDGER, wanted, removed, BitChoices(WIDTHS, [4, 5, 6]))


def test_without_errors_learned_widths_are_rounded_and_clipping_values_stay() -> None:
    bits = learned(4.2, 5.6, 9.0, inputs=(5.7, 3.0), input_of=(1, 0, -1))
    found = allocate_bits(bits, None, EQUAL, LEDGER, target(), NONE, BitChoices(WIDTHS, [4, 5, 6]))
    assert found.weight_bits == [4, 6, 8] and found.input_bits == [6, 4]
    assert found.clip_factors.tolist() == [1, 1, 1]


@pytest.mark.parametrize(("wanted", "needed"), [(target(), False), (target(mean=5), True)])
def test_errors_are_needed_where_there_is_a_budget_and_a_choice(wanted: Target, needed: bool) -> None:
    assert BitChoices(WIDTHS, []).needs_errors(wanted) == needed
    assert not BitChoices([4], []).needs_errors(wanted)


def test_layers_that_matter_alike_get_the_same_width_and_the_clipping_value_for_it() -> None:
    found = allocate()
    assert found.weight_bits == [6, 6, 6] and found.clip_factors.tolist() == pytest.approx([0.7] * 3)


def test_bits_go_to_the_layer_whose_errors_cost_most() -> None:
    found = allocate(torch.tensor([100.0, 1e6, 200]))
    assert found.weight_bits[1] == 8 and found.weight_bits[0] < 8
    assert (100 * found.weight_bits[0] + 800 + 200 * found.weight_bits[2]) / 400 <= 6


def test_a_weight_of_which_no_gradient_is_known_counts_as_an_average_one() -> None:
    rounding = replace(ROUNDING, errors=ERRORS.clone(), known=torch.tensor([True, False, True]))
    rounding.errors[1] = 0
    assert allocate(rounding=rounding).weight_bits == [6, 6, 6]
    nothing = replace(ROUNDING, known=torch.zeros(3, dtype=torch.bool))
    assert sum(allocate(rounding=nothing).weight_bits) > 12


def test_learned_widths_are_moved_together_by_the_other_rule() -> None:
    rules = BitChoices(WIDTHS, [4], by_sensitivity=False)
    found = allocate_bits(learned(8, 5, 7), ROUNDING, EQUAL, LEDGER, target(mean=5.75), NONE, rules)
    assert found.weight_bits == [7, 4, 6]


def test_removed_groups_cost_nothing_any_more() -> None:
    curvature = torch.tensor([100.0, 100, 1e6])
    assert allocate(curvature).weight_bits == [4, 4, 8]
    removed = torch.arange(20) < 15  # c.weight keeps 50 of 200 elements
    assert sorted(allocate(curvature, removed=removed).weight_bits) == [5, 6, 8]


def test_bops_count_the_width_of_each_layers_input() -> None:
    """b.weight has a float input, so that each of its bits costs eight times as much, and an error falls by four."""
    bits = learned(8, 8, 8, inputs=(4.0,), input_of=(0, -1, 0))
    wanted = target(bops=(100 * 4 * 7 + 100 * 32 * 5 + 200 * 4 * 7) / (400 * 32 * 32))
    found = allocate_bits(bits, ROUNDING, EQUAL, LEDGER, wanted, NONE, BitChoices(WIDTHS, [4, 5]))
    assert found.input_bits == [4] and found.weight_bits == [7, 5, 7]


def test_all_budgets_hold() -> None:
    size = LEDGER.stored_bytes(NONE, 7)
    found = allocate(wanted=target(mean=7, size=size))
    bits = torch.tensor(found.weight_bits, dtype=torch.float64)
    assert LEDGER.stored_bytes(NONE, bits) <= size and found.weight_bits[0] > 4


def test_a_budget_that_the_lowest_widths_exceed_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert allocate(wanted=target(mean=3)).weight_bits == [4, 4, 4]
    assert "the target is 3, but with all layers at 4 bits it is 4" in caplog.text


def test_nothing_that_is_given_changes() -> None:
    given = (learned(8, 8, 8), ROUNDING, EQUAL.clone(), NONE.clone())
    before = copy.deepcopy(given)
    bits, rounding, curvature, removed = given
    allocate_bits(bits, rounding, curvature, LEDGER, target(mean=5), removed, BitChoices(WIDTHS, [4]))
    assert torch.equal(bits.weights, before[0].weights)
    assert torch.equal(curvature, before[2]) and torch.equal(removed, before[3])
    assert torch.equal(rounding.errors, before[1].errors) and torch.equal(rounding.clips, before[1].clips)


def test_choices_of_a_config() -> None:
    choices = BitChoices.of(GETAConfig(bits=(4, 8), bit_reduction=2.3))  # 16 - 4 · 2.3 = 6.8
    assert choices.weights == [4, 5, 6] and choices.inputs == [4, 5, 6, 7, 8]
    choices = BitChoices.of(GETAConfig(bits=(3, 8), bit_choices=[4, 8], activation_bits=(5, 6)))
    assert choices.weights == [4, 8] and choices.inputs == [5, 6]


def test_errors_are_measured_of_trained_weights_alone() -> None:
    torch.manual_seed(0)
    weights = {"a.weight": torch.randn(6, 6), "b.weight": torch.randn(6, 6)}
    names = {name: name.replace("weight", "weight_quantizer") for name in weights}
    named = {f"{prefix}.{leaf}": torch.tensor([2.5]) for prefix in names.values() for leaf in ("d", "q_m")}
    table = Quantizers(names, [], named)
    found = measure_errors(table, table.read(named), {"b.weight": weights["b.weight"]}.get, WIDTHS, search=True)
    assert found.known.tolist() == [False, True]
    assert found.errors[0].tolist() == [0] * 5 and found.clips[0].tolist() == [1] * 5
    errors, clips = rounding_errors(weights["b.weight"], torch.tensor([2.5]), torch.ones(1), WIDTHS, search=True)
    assert torch.equal(found.errors[1], errors) and torch.equal(found.clips[1], clips[0])
