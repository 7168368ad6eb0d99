"""Block types against the decoder of the package gguf."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from geta_hf.export.formats.gguf.blocks import STEP_ERROR, Values, choose_type, encode

gguf = pytest.importorskip("gguf")


def some_values(bits: int, columns: int, step: float | torch.Tensor, rows: int = 3) -> Values:
    torch.manual_seed(bits)
    largest = 2 ** (bits - 1) - 1
    codes = torch.randint(-largest, largest + 1, (rows, columns), dtype=torch.int8)
    codes[0, :2] = torch.tensor([-largest, largest])
    size = torch.as_tensor(step, dtype=torch.float32).reshape(-1)
    return Values(codes.float() * size.view(-1, 1), codes, size, bits)


def decoded(values: Values, kind: str) -> torch.Tensor:
    found = gguf.quants.dequantize(encode(values, kind), gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(np.asarray(found, dtype=np.float32))


@pytest.mark.parametrize(
    ("bits", "columns", "kind"),
    [
        *[
            (bits, 64, kind)
            for bits, kind in zip(range(2, 9), ["Q4_0", "Q4_0", "Q4_0", "Q5_0", "Q8_0", "Q8_0", "Q8_0"], strict=True)
        ],
        *[
            (bits, 512, kind)
            for bits, kind in zip(range(2, 9), ["Q2_K", "Q3_K", "Q4_0", "Q5_0", "Q6_K", "Q8_0", "Q8_0"], strict=True)
        ],
    ],
)
def test_every_bit_width_has_a_type_that_holds_its_codes_exactly(bits: int, columns: int, kind: str) -> None:
    values = some_values(bits, columns, 0.0078125 * 1.25)
    assert choose_type(values) == kind
    assert torch.equal(decoded(values, kind), values.floats)


@pytest.mark.parametrize(("columns", "kind"), [(64, "Q4_0"), (512, "Q2_K"), (44, "F16")])
def test_four_levels_are_held_exactly_in_the_type_of_two_bits(columns: int, kind: str) -> None:
    torch.manual_seed(0)
    codes = 2 * torch.randint(-2, 2, (3, columns), dtype=torch.int8) + 1
    steps = torch.tensor([0.0123, 0.25, 3.0]).half().float()
    values = Values(codes.float() * steps[:, None], codes, steps, 2, four_levels=True)
    assert choose_type(values) == kind
    if kind != "F16":
        assert torch.equal(decoded(values, kind), values.floats)
        moved = values.rows(torch.tensor([2, 0, 1]))
        assert torch.equal(decoded(moved, kind), values.floats[[2, 0, 1]])


@pytest.mark.parametrize("step", [0.25, torch.tensor([0.5, 0.25, 3.0])])
def test_ternary_blocks_hold_two_bits_exactly(step: float | torch.Tensor) -> None:
    values = some_values(2, 512, step)
    assert (choose_type(values), choose_type(values, ternary=True)) == ("Q2_K", "TQ2_0")
    assert torch.equal(decoded(values, "TQ2_0"), values.floats)
    assert encode(values, "TQ2_0").nbytes < encode(values, "Q2_K").nbytes
    # Only 2 bits have three codes, and only 256 columns with one step size fill a block.
    others = (some_values(3, 512, 0.25), some_values(2, 64, 0.25))
    assert [choose_type(one, ternary=True) for one in others] == ["Q3_K", "Q4_0"]


@pytest.mark.parametrize(("bits", "columns"), [(4, 64), (2, 256), (3, 256), (6, 256), (8, 32)])
def test_every_row_can_have_a_step_size_of_its_own(bits: int, columns: int) -> None:
    values = some_values(bits, columns, torch.tensor([0.5, 0.25, 3.0]))
    assert torch.equal(decoded(values, choose_type(values)), values.floats)
    order = torch.tensor([2, 0, 1])
    moved = values.rows(order)
    assert torch.equal(decoded(moved, choose_type(moved)), values.floats[order])


@pytest.mark.parametrize("bits", range(2, 9))
def test_blocks_of_their_own_step_sizes_are_the_types_own(bits: int) -> None:
    torch.manual_seed(bits)
    codes = some_values(bits, 256, 1.0).codes
    steps = (torch.rand(3, 8) + 0.01).half().float()
    values = Values(codes.float() * steps.repeat_interleave(32, 1), codes, steps, bits)
    # Not a type with one step size for 256 columns.
    assert choose_type(values) in ("Q4_0", "Q5_0", "Q8_0")
    assert torch.equal(decoded(values, choose_type(values)), values.floats)
    moved = values.rows(torch.tensor([2, 0, 1]))
    assert torch.equal(decoded(moved, choose_type(moved)), values.floats[[2, 0, 1]])


def test_step_that_is_no_half_precision_number_is_rounded_once() -> None:
    values = some_values(4, 64, 0.0123456789)
    gap = (decoded(values, "Q4_0") - values.floats).abs().max()
    assert 0 < gap <= STEP_ERROR * values.floats.abs().max()


@pytest.mark.parametrize("step", [1e-7, 1e6])
def test_step_outside_half_precision_is_stored_as_float(step: float) -> None:
    values = some_values(4, 64, step)
    kind = choose_type(values)
    assert kind == "F32" and torch.equal(decoded(values, kind), values.floats)


def test_rows_that_no_block_divides_are_floats() -> None:
    values = some_values(4, 44, 0.25)
    assert choose_type(values) == "F16" and torch.equal(decoded(values, "F16"), values.floats)


def test_floats_keep_their_own_precision() -> None:
    torch.manual_seed(0)
    floats = torch.randn(4, 33)
    assert choose_type(Values(floats)) == "F16"
    assert choose_type(Values(floats.half().float())) == "F16"
    brain = floats.bfloat16().float() * 1e-6
    assert choose_type(Values(brain.bfloat16().float())) == "BF16"
    assert choose_type(Values(floats * 1e6)) == "F32"
    assert choose_type(Values(floats[0])) == "F32"  # a norm or a bias
    assert torch.equal(decoded(Values(floats), "F32"), floats)
