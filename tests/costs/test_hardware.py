"""Hardware costs: values computed by hand, brute force over channels, and gradients by finite differences."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

from geta_hf.costs.hardware import (
    Expected,
    LatencyTable,
    LayerShape,
    MeasuredShape,
    bit_operations,
    mpic_cycles,
    mpic_joules,
    size_bits,
)
from geta_hf.costs.hardware_ne16 import ne16_cycles
from geta_hf.errors import GETAError

CONV = LayerShape("conv", 16, 8, kernel=(3, 3), positions=(5, 7))


def hard(outputs: dict[int, int], inputs: int, grad: bool = False) -> Expected:
    counts = torch.tensor([float(n) for n in outputs.values()], dtype=torch.float64, requires_grad=grad)
    return Expected(counts, torch.tensor(float(inputs), dtype=torch.float64, requires_grad=grad), list(outputs))


def test_a_half_of_both_sides_is_a_quarter_of_the_weights_and_not_less() -> None:
    # 8 of 16 outputs at 8 bits read 4 of 8 inputs: 4 · 8 · 9 · 8 bits. Counting the lost outputs twice gives 1152.
    assert float(size_bits(CONV, hard({8: 8}, 4))) == 2304
    # A linear layer whose inputs were halved: 32 · 64 · 8, where inputs that never shrink give 32768.
    assert float(size_bits(LayerShape("linear", 64, 64), hard({8: 64}, 32))) == 16384


def test_sums_over_channels_are_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    widths = [2, 4, 8]
    theta = torch.rand(4, 16, generator=generator, dtype=torch.float64).softmax(0)  # 0 bits first
    keep = torch.rand(8, generator=generator, dtype=torch.float64)
    expected = Expected(theta[1:].sum(1), keep.sum(), widths)
    bits = cycles = 0.0
    speed = {2: 2.5, 4: 2.3, 8: 2.1}
    for row, column, number in itertools.product(range(16), range(8), range(3)):
        present = float(theta[number + 1, row] * keep[column]) * 9
        bits += present * widths[number]
        cycles += present * 35 / speed[widths[number]]
    assert float(size_bits(CONV, expected)) == pytest.approx(bits)
    assert float(bit_operations(CONV, expected, 8)) == pytest.approx(bits * 35 * 8)
    assert float(mpic_cycles(CONV, expected, {8: 1.0})) == pytest.approx(cycles)
    assert float(mpic_joules(CONV, expected, {8: 1.0})) == pytest.approx(cycles / 250e6 * 5.3825e-3)


def test_mpic_mixes_widths_of_inputs() -> None:
    layer = LayerShape("linear", 10, 21)
    found = float(mpic_cycles(layer, hard({2: 4, 8: 6}, 21), {8: 0.5, 4: 0.25, 2: 0.25}))
    narrow = 4 * 21 * (0.5 / 2.5 + 0.25 / 3.9 + 0.25 / 6.5)
    wide = 6 * 21 * (0.5 / 2.1 + 0.25 / 2.1 + 0.25 / 2.2)
    assert found == pytest.approx(narrow + wide)
    with pytest.raises(GETAError, match=r"linear: no speed of MPIC is known for weights of 3 bits and inputs of 8"):
        mpic_cycles(layer, hard({3: 4}, 21), {8: 1.0})


def by_hand(k_out: int, k_in: int, positions: tuple[int, int], width: int, three: bool, depthwise: bool = False) -> int:
    """Count tile after tile, as the specification has it."""
    size = 16 if depthwise else 32
    total = 0
    for start in range(0, k_out, size):
        k = min(size, k_out - start)
        load = 6 + 25 * 1 if three else 10 + 9 * 1
        offset = 6 + k if depthwise else 6
        matvec = 6 + (k * width if three else k)
        passes = 1 if depthwise else math.ceil(k_in / 16)
        total += passes * (load + offset + matvec + 2) + (9 + k) + (3 + 9 * 1 + 1)
    return math.ceil(positions[0] / 3) * math.ceil(positions[1] / 3) * total


def test_ne16_by_hand() -> None:
    # 4 input tiles of 19 + 6 + 38 + 2, then 41 + 13, for each of 2 output tiles.
    assert float(ne16_cycles(LayerShape("linear", 64, 64), hard({8: 64}, 64))) == 628 == 2 * (4 * 65 + 54)
    # 3x3 at 4 bits, 40 outputs: a tile of 32 (31 + 6 + 134 + 2 + 41 + 13) and one of 8, at 2 · 2 positions.
    three = LayerShape("conv", 40, 16, kernel=(3, 3), positions=(6, 6))
    assert float(ne16_cycles(three, hard({4: 40}, 16))) == 1336 == 4 * (227 + 107)


@pytest.mark.parametrize(("k_out", "k_in", "width"), [(1, 1, 2), (31, 17, 4), (32, 16, 8), (33, 40, 2), (96, 5, 4)])
@pytest.mark.parametrize("depthwise", [False, True])
def test_ne16_is_the_sum_over_tiles(k_out: int, k_in: int, width: int, depthwise: bool) -> None:
    inputs = 1 if depthwise else k_in
    for kernel, threes, ones in (((1, 1), 0, 1), ((3, 3), 1, 0), ((5, 5), 1, 16), ((7, 7), 4, 13)):
        shape = LayerShape("conv", k_out, inputs, kernel, (7, 4), depthwise)
        wanted = threes * by_hand(k_out, inputs, (7, 4), width, True, depthwise)
        wanted += ones * by_hand(k_out, inputs, (7, 4), width, False, depthwise)
        assert float(ne16_cycles(shape, hard({width: k_out}, inputs))) == wanted


def test_widths_are_passes_of_their_own_on_ne16() -> None:
    shape = LayerShape("conv", 40, 16, kernel=(3, 3))
    both = float(ne16_cycles(shape, hard({2: 10, 8: 30}, 16)))
    assert both == by_hand(10, 16, (1, 1), 2, True) + by_hand(30, 16, (1, 1), 8, True)


@pytest.mark.parametrize("cost", ["bits", "bitops", "mpic", "ne16", "table"])
def test_both_sides_of_a_cut_have_a_gradient(cost: str) -> None:
    expected = hard({2: 5, 8: 7}, 6, grad=True)
    times = {bits: torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=torch.float64) for bits in (2, 8)}
    table = LatencyTable({(16, 8): MeasuredShape((8, 16), (4, 8), times)})
    found = {
        "bits": lambda: size_bits(CONV, expected),
        "bitops": lambda: bit_operations(CONV, expected, 8),
        "mpic": lambda: mpic_cycles(CONV, expected, {8: 1.0}),
        "ne16": lambda: ne16_cycles(CONV, expected),
        "table": lambda: table.seconds(LayerShape("linear", 16, 8), expected),
    }[cost]()
    found.backward()
    assert bool((expected.outputs.grad > 0).all()) and float(expected.inputs.grad) > 0


@pytest.mark.parametrize("cost", [size_bits, lambda shape, e: mpic_cycles(shape, e, {8: 0.5, 4: 0.5})])
def test_gradients_are_those_of_finite_differences(cost) -> None:
    outputs = torch.tensor([5.3, 7.1], dtype=torch.float64, requires_grad=True)
    inputs = torch.tensor(6.2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda o, i: cost(CONV, Expected(o, i, [2, 8])), (outputs, inputs))


def test_a_table_is_interpolated_between_what_was_measured(tmp_path: Path) -> None:
    times = torch.tensor([[1.0, 2.0], [3.0, 5.0]], dtype=torch.float64)
    table = LatencyTable({(8, 20): MeasuredShape((4, 8), (10, 20), {4: times})})
    shape = LayerShape("up", 8, 20)
    table.save(tmp_path / "table.json")
    for one in (table, LatencyTable.load(tmp_path / "table.json")):
        assert float(one.seconds(shape, hard({4: 8}, 20))) == 5
        assert float(one.seconds(shape, hard({4: 6}, 15))) == pytest.approx((1 + 2 + 3 + 5) / 4)
        assert float(one.seconds(shape, hard({4: 2}, 10))) == pytest.approx(0.5)
        assert float(one.seconds(shape, hard({4: 0}, 20))) == 0


def test_what_a_table_lacks_is_refused(tmp_path: Path) -> None:
    table = LatencyTable({(8, 20): MeasuredShape((8,), (20,), {4: torch.ones(1, 1)})})
    with pytest.raises(GETAError, match="down: the latency table has no layer of 9 outputs and 20 inputs"):
        table.check([LayerShape("down", 9, 20)], [4])
    with pytest.raises(GETAError, match=r"up: the latency table has no times at 2 bits, only at \[4\]"):
        table.seconds(LayerShape("up", 8, 20), hard({2: 1}, 20))
    with pytest.raises(GETAError, match="must rise to the full shape"):
        LatencyTable({(8, 20): MeasuredShape((8, 4), (20,), {})})
    with pytest.raises(GETAError, match="there must be a finite one for each"):
        LatencyTable({(8, 20): MeasuredShape((8,), (20,), {4: torch.tensor([[math.nan]])})})
    (tmp_path / "broken.json").write_text("[]")
    with pytest.raises(GETAError, match="can't be read as a latency table"):
        LatencyTable.load(tmp_path / "broken.json")
