from __future__ import annotations

import pytest
import torch
from torch import Tensor

from geta_hf.inference.products import MOST_INPUTS, integer_product, round_rows, scaled

SIZES = [(5, 13, 7), (1, 773, 24), (33, 224, 1), (17, 2, 3), (0, 8, 8)]


def codes(*shape: int, largest: int = 127) -> Tensor:
    return torch.randint(-largest, largest + 1, shape, generator=torch.Generator().manual_seed(sum(shape))).to(
        torch.int8
    )


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SIZES)
def test_sums_are_exact_for_any_size(rows: int, inputs: int, outputs: int) -> None:
    x, weight = codes(rows, inputs), codes(outputs, inputs)
    assert torch.equal(integer_product(x, weight, outputs).long(), x.long() @ weight.long().t())


def test_zeros_around_the_weight_are_left_out() -> None:
    x, weight = codes(5, 13), codes(7, 13)
    larger = torch.nn.functional.pad(weight, (0, 3, 0, 1))
    assert torch.equal(integer_product(x, larger, 7), integer_product(x, weight, 7))


def test_longest_sum_stays_within_32_bits() -> None:
    x = torch.full((1, MOST_INPUTS), 127, dtype=torch.int8)
    totals = x.sum(1, dtype=torch.int32)
    sums = integer_product(x, x, 1).addcmul_(torch.tensor([[128]], dtype=torch.int32), totals)
    assert sums.item() == MOST_INPUTS * 255 * 127 <= 2**31 - 1 < (MOST_INPUTS + 1) * 255 * 127


def rows_to_round() -> Tensor:
    """Rows of very different size, with zeros, of one sign, and with values at both ends of the range."""
    x = torch.randn(9, 50, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 9)[:, None]
    x[2], x[3], x[4], x[5, 0] = 0.0, x[3].abs(), -x[4].abs(), 1e3
    return x


def test_rows_are_rounded_to_half_a_step_each_by_itself() -> None:
    x = rows_to_round()
    n, step, zero = round_rows(x)
    assert ((step * (n + zero) - x).abs() <= step * (0.5 + 1e-4)).all()
    spread = x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0)
    torch.testing.assert_close(step.flatten() * 253, spread.clamp(min=253e-12))
    alone = [round_rows(row[None]) for row in x]
    for whole, parts in zip((n, step, zero), zip(*alone, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts))


def test_no_value_leaves_its_byte() -> None:
    """Where both ends of the range lie at ties, over many ranges."""
    ends = torch.rand(100_000, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([-1.0, 1.0])
    n, step, zero = round_rows(ends)
    assert ((step * (n + zero) - ends).abs() <= step * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row_and_is_seen(value: float) -> None:
    x, weight = torch.ones(3, 4), codes(2, 4)
    x[1, 2] = value
    n, step, zero = round_rows(x)
    sums = integer_product(n, weight, 2).addcmul_(zero, weight.sum(1, dtype=torch.int32))
    out = scaled(sums, step, torch.ones(1), None)
    assert not out[1].isfinite().any()
    assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("channels", [1, 7])
@pytest.mark.parametrize("biased", [False, True])
def test_scaled_sums_are_the_linear_layer(channels: int, biased: bool) -> None:
    x, weight = codes(5, 13), codes(7, 13)
    input_step, step = torch.rand(5, 1) + 0.1, torch.rand(channels) + 0.1
    bias = torch.randn(7).to(torch.bfloat16) if biased else None
    expected = (input_step * x).double() @ (step.view(-1, 1) * weight).double().t() + (bias if biased else 0.0)
    found = scaled(integer_product(x, weight, 7), input_step, step, bias)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-3)
