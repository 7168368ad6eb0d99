"""Widths of layers' inputs: what is estimated of them, and how budgets are spent on them, against brute force."""

from __future__ import annotations

import itertools
import logging
import math

import pytest
import torch

from geta_hf.config import CompressionConfig, GETAConfig
from geta_hf.costs.bit_allocation import BitChoices, LearnedBits, allocate_bits
from geta_hf.costs.input_sensitivity import InputErrors, error_shares, input_errors
from geta_hf.costs.ledger import LayerEntry, Ledger
from geta_hf.costs.sensitivity import RoundingErrors
from geta_hf.costs.targets import BOPS, BYTES, GROUPS, MEAN_BITS, Target, solve_target
from geta_hf.errors import GETAError
from geta_hf.qadg.group_types import Family, Member
from geta_hf.quantization.clipping import Histogram, count_magnitudes
from geta_hf.quantization.functional import quantize

SHAPES = {"a.weight": (10, 10), "b.weight": (10, 20), "c.weight": (20, 10)}
ROWS = Family("c", "channels", (Member("c.weight", 0, torch.arange(20)[:, None]),), prunable=True)
LEDGER = Ledger.of((ROWS,), SHAPES, [LayerEntry("a.weight"), LayerEntry("b.weight", 0.5), LayerEntry("c.weight")])
NONE = LEDGER.nothing
WIDTHS = [3, 4, 5]
INPUTS = [2, 3, 4, 5]
DTYPE = torch.float64
CURVATURE = torch.tensor([100.0, 900.0, 200.0], dtype=DTYPE)
ERRORS = torch.stack([scale * 4.0 ** -torch.arange(3.0, dtype=DTYPE) for scale in (3.0, 1.0, 2.0)])
PER_ELEMENT = [1.0, 4.5, 1.0]  # CURVATURE over the 100, 200 and 200 weights
OF_WEIGHTS = ERRORS.tolist()
ROUNDING = RoundingErrors(ERRORS, torch.ones(3, 3), torch.ones(3, dtype=torch.bool))


def losses(*scales: float) -> InputErrors:
    equal = (4.0 ** -torch.arange(4.0, dtype=DTYPE)).expand(len(scales), -1)
    clips = torch.tensor([0.4, 0.6, 0.8, 1.0]).expand(len(scales), -1)
    return InputErrors(torch.tensor(scales, dtype=DTYPE)[:, None] * equal, clips, equal)


def target(input_bits: float = 3.5, **budgets: float) -> Target:
    names = {"mean": MEAN_BITS, "bops": BOPS, "size": BYTES}
    return Target(GROUPS, 20, 4.0, {names[name]: amount for name, amount in budgets.items()}, input_bits)


def learned(count: int = 3) -> LearnedBits:
    input_of = [position if position < count else -1 for position in range(3)]
    return LearnedBits(torch.full((3,), 5.0, dtype=DTYPE), torch.full((count,), 5.0, dtype=DTYPE), input_of)


def allocate(wanted: Target, inputs: InputErrors | None, choices: BitChoices | None = None, removed=NONE):
    count = 3 if inputs is None else len(inputs.losses)
    choices = choices or BitChoices(WIDTHS, INPUTS)
    rounding = ROUNDING if len(choices.weights) > 1 else None
    return allocate_bits(learned(count), rounding, CURVATURE, LEDGER, wanted, removed, choices, inputs)


def expected_loss(weight_bits, input_bits, inputs: InputErrors) -> float:
    of_inputs = inputs.losses.tolist()
    total = sum(PER_ELEMENT[i] * OF_WEIGHTS[i][WIDTHS.index(b)] for i, b in enumerate(weight_bits))
    return total + sum(of_inputs[i][INPUTS.index(b)] for i, b in enumerate(input_bits))


def bops(weight_bits, input_bits) -> float:
    """The layers have 100, 200 and 200 weights, of which the second is used half as often."""
    sides = zip((100, 100, 200), weight_bits, input_bits, strict=True)
    return sum(macs * w * a for macs, w, a in sides) / (400 * 32 * 32)


@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (9.0, 0.3, 1.0), (0.01, 50.0, 2.0)])
@pytest.mark.parametrize("mean", [2.0, 2.7, 3.5, 4.0, 5.0])
def test_without_bops_the_mean_is_met_with_the_least_loss(scales: tuple[float, ...], mean: float) -> None:
    inputs = losses(*scales)
    found = allocate(target(mean, mean=4), inputs)
    options = [bits for bits in itertools.product(INPUTS, repeat=3) if sum(bits) <= 3 * mean + 1e-9]
    least = min(sum(float(inputs.losses[i, INPUTS.index(b)]) for i, b in enumerate(bits)) for bits in options)
    mine = sum(float(inputs.losses[i, INPUTS.index(b)]) for i, b in enumerate(found.input_bits))
    assert sum(found.input_bits) <= 3 * mean + 1e-9 and mine == pytest.approx(least)
    assert sum(found.input_bits) == math.floor(3 * mean + 1e-9)
    chosen = [[0.4, 0.6, 0.8, 1.0][INPUTS.index(bits)] for bits in found.input_bits]
    assert found.input_clip_factors.tolist() == pytest.approx(chosen)


def test_more_sensitive_inputs_get_more_bits() -> None:
    found = allocate(target(3.5, mean=4), losses(0.01, 1.0, 40.0)).input_bits
    assert found[0] < found[1] < found[2]


@pytest.mark.parametrize("share", [0.25, 0.4, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (9.0, 0.3, 1.0), (0.01, 50.0, 2.0)])
def test_bops_are_spent_on_both_sides_nearly_as_well_as_by_brute_force(scales, share: float) -> None:
    inputs = losses(*scales)
    low, high = bops([3] * 3, [2] * 3), bops([5] * 3, [5] * 3)
    budget = low + share * (high - low)
    found = allocate(target(bops=budget), inputs)
    assert bops(found.weight_bits, found.input_bits) <= budget * (1 + 1e-6)
    pairs = itertools.product(itertools.product(WIDTHS, repeat=3), itertools.product(INPUTS, repeat=3))
    least = min(expected_loss(w, a, inputs) for w, a in pairs if bops(w, a) <= budget)
    mine = expected_loss(found.weight_bits, found.input_bits, inputs)
    assert least <= mine * (1 + 1e-9) and mine - least < 0.05 * (expected_loss([3] * 3, [2] * 3, inputs) - least)


def test_a_budget_of_everything_gives_everything_and_one_of_nothing_nothing(caplog) -> None:
    inputs = losses(1.0, 1.0, 1.0)
    found = allocate(target(bops=bops([5] * 3, [5] * 3)), inputs)
    assert found.weight_bits == [5] * 3 and found.input_bits == [5] * 3
    found = allocate(target(bops=bops([3] * 3, [2] * 3)), inputs)
    assert found.weight_bits == [3] * 3 and found.input_bits == [2] * 3
    with caplog.at_level(logging.WARNING):
        allocate(target(bops=0.9 * bops([3] * 3, [2] * 3)), inputs)
    assert "bops: the target is" in caplog.text


def test_bops_and_a_mean_of_weights_both_hold() -> None:
    budget = bops([4] * 3, [4] * 3)
    found = allocate(target(bops=budget, mean=3.5), losses(9.0, 0.3, 1.0))
    assert bops(found.weight_bits, found.input_bits) <= budget
    sizes = LEDGER.weights(NONE)
    mean = (sizes * torch.tensor(found.weight_bits, dtype=DTYPE)).sum() / sizes.sum()
    assert mean <= 3.5 and max(found.input_bits) > 4


def test_one_width_of_weights_leaves_all_bops_to_inputs() -> None:
    budget = bops([4] * 3, [3] * 3)
    found = allocate(target(bops=budget), losses(9.0, 0.3, 1.0), BitChoices([4], INPUTS))
    assert found.weight_bits == [4] * 3 and max(found.input_bits) > 3 > min(found.input_bits)
    assert bops(found.weight_bits, found.input_bits) <= budget


def test_float_inputs_count_32_bits_beside_quantized_ones() -> None:
    mixed = torch.tensor([4.0, 4.0, 32.0], dtype=DTYPE)
    budget = LEDGER.relative_bops(NONE, torch.tensor([4.0, 4.0, 4.0], dtype=DTYPE), mixed)
    found = allocate(target(bops=budget), losses(1.0, 1.0))
    sides = (torch.tensor(found.weight_bits, dtype=DTYPE), torch.tensor([*found.input_bits, 32], dtype=DTYPE))
    assert LEDGER.relative_bops(NONE, *sides) <= budget and found.weight_bits[2] < 5


def test_learned_widths_are_rounded_or_moved_together_by_the_other_rule() -> None:
    rules = BitChoices(WIDTHS, INPUTS, by_sensitivity=False)
    bits = LearnedBits(torch.tensor([5.0, 5, 5]), torch.tensor([4.6, 2.2, 3.4], dtype=DTYPE), (0, 1, 2))
    given = (ROUNDING, CURVATURE, LEDGER)
    found = allocate_bits(bits, *given, target(mean=4), NONE, rules, losses(1.0, 1.0, 9.0))
    assert found.input_bits == [5, 2, 3] and found.input_clip_factors.tolist() == [1, 1, 1]
    bits = LearnedBits(torch.tensor([5.0, 5, 5], dtype=DTYPE), torch.tensor([5.0, 5, 5], dtype=DTYPE), (0, 1, 2))
    budget = bops([4] * 3, [4] * 3)
    found = allocate_bits(bits, *given, target(bops=budget), NONE, rules, losses(1.0, 1.0, 9.0))
    assert found.weight_bits == [4] * 3 and found.input_bits == [4] * 3


def test_decided_widths_are_kept_and_weights_take_what_remains() -> None:
    found = allocate(target(bops=bops([4] * 3, [5] * 3)), None)
    assert found.input_bits == [5] * 3 and bops(found.weight_bits, [5] * 3) <= bops([4] * 3, [5] * 3)
    assert sum(found.weight_bits) > 9


def test_inputs_without_any_gradient_count_alike_and_that_is_said(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        found = allocate(target(3.0, mean=4), losses(0.0, 0.0, 0.0))
    assert found.input_bits == [3] * 3 and "the gradients of all inputs were zero" in caplog.text


def test_weights_without_any_gradient_are_rounded_by_their_errors_and_that_is_said(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        nothing = torch.zeros(3, dtype=DTYPE)
        found = allocate_bits(learned(0), ROUNDING, nothing, LEDGER, target(mean=4), NONE, BitChoices(WIDTHS, []))
    assert "the gradients of all weights were zero" in caplog.text
    assert found.weight_bits[0] >= found.weight_bits[2] >= found.weight_bits[1]


# --- the estimate -----------------------------------------------------------------------------------------------------


def histogram_of(x: torch.Tensor, clip: float) -> Histogram:
    top = x.abs().max()
    return Histogram(count_magnitudes(x[None], top[None])[0], float(top) / clip)


@pytest.mark.parametrize("kind", ["normal", "rectified", "uniform"])
def test_shares_are_the_errors_of_the_values_themselves(kind: str) -> None:
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    x = {"normal": x, "rectified": x.relu(), "uniform": x.erf()}[kind]
    clip = float(x.abs().max())
    widths = [2, 3, 4, 6, 8]
    found, clips = error_shares(histogram_of(x, clip), widths, search=False)

    def error(bits: int) -> float:
        d = clip / (2 ** (bits - 1) - 1)
        return float(((quantize(x, torch.tensor([d]), torch.tensor([clip])) - x) ** 2).sum())

    exact = torch.tensor([error(bits) / error(8) / 127**2 for bits in widths], dtype=DTYPE)
    assert clips.tolist() == [1] * 5
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0)


def test_a_search_finds_a_narrower_range_for_few_bits() -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    histogram = histogram_of(x, float(x.abs().max()))
    kept, _ = error_shares(histogram, [2, 4, 8], search=False)
    found, clips = error_shares(histogram, [2, 4, 8], search=True)
    assert found[0] < 0.5 * kept[0] and clips[0] < clips[1] < clips[2] == 1


def test_wide_widths_fall_by_four_with_every_bit() -> None:
    x = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    shares, _ = error_shares(histogram_of(x, 1.0), list(range(8, 17)), search=True)
    assert ((shares[:-1] / shares[1:]).sqrt() - 2).abs().max() < 0.05


def test_losses_start_from_the_present_width() -> None:
    square = torch.tensor([1e-4, 4e-4])
    found = input_errors(square, torch.tensor([8.0, 5.0]), [4, 8], [None, None], True)
    wanted = [[1e-4 * (127 / 7) ** 2, 1e-4], [4e-4 * (15 / 7) ** 2, 4e-4 * (15 / 127) ** 2]]
    torch.testing.assert_close(found.losses, torch.tensor(wanted, dtype=DTYPE))


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "bits", "input_bits"),
    [
        ({"mean_bits": 5}, 5, 6),
        ({"mean_bits": 5, "activation_bits": None}, 5, 32),
        ({"bit_rule": "ppsg"}, 8, 8),
        ({"target_bops": 6 * 7 / 32**2, "bits": (4, 8), "activation_bits": (6, 8)}, 6, 7),
        ({"target_bops": 6 * 5 / 32**2, "bits": (6, 6)}, 6, 5),
        ({"target_bytes": 1500}, None, 6),
    ],
)
def test_the_plan_has_a_width_for_inputs(changes: dict, bits: float | None, input_bits: float) -> None:
    config = GETAConfig(**{"activation_bits": (4, 8), "target_sparsity": 0.0, **changes})
    ledger = Ledger.of((ROWS,), SHAPES, LEDGER.layers, dict.fromkeys(SHAPES, 4))
    found = solve_target(config, (ROWS,), ledger)
    assert found.input_bits == pytest.approx(input_bits, abs=0.05)
    assert bits is None or found.bits == pytest.approx(bits, abs=0.05)


def test_bops_that_only_narrow_inputs_reach_are_reached() -> None:
    """4 bits of weights and 8 of inputs are too many; before, inputs were always planned with 8."""
    config = GETAConfig(target_sparsity=0.0, target_bops=4 * 5 / 32**2, activation_bits=(4, 8))
    planned = solve_target(config, (ROWS,), LEDGER)
    assert planned.spent(BOPS, LEDGER, NONE, planned.bits) <= 4 * 5 / 32**2
    with pytest.raises(GETAError, match="can't be reached"):
        solve_target(GETAConfig(target_sparsity=0.0, target_bops=15 / 32**2, activation_bits=(4, 8)), (ROWS,), LEDGER)


def test_a_size_alone_plans_both_sides_in_the_middle_at_most() -> None:
    config = GETAConfig(target_bops=0.03, activation_bits=(4, 8))
    found = solve_target(config, (ROWS,), LEDGER)
    assert (found.bits, found.input_bits) == (6, 6)
    tight = solve_target(GETAConfig(target_bops=0.02, activation_bits=(4, 8)), (ROWS,), LEDGER)
    assert 4 < tight.bits < 6 and tight.bits == pytest.approx(tight.input_bits)


def test_what_a_config_says_of_inputs() -> None:
    limits = CompressionConfig(activation_bits=(5, 8))
    assert limits.input_widths == [5, 6, 7, 8] and limits.wanted_mean_input_bits == 6.5
    assert CompressionConfig().input_widths == [] and CompressionConfig().wanted_mean_input_bits is None
    assert CompressionConfig(target_bops=0.1, activation_bits=(5, 8)).wanted_mean_input_bits is None
    assert GETAConfig(bit_rule="paper", activation_bits=(5, 8)).wanted_mean_input_bits == 8
