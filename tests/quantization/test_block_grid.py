"""The grid `block32` against block quantization written out in numpy, element by element."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from geta_hf.errors import GETAError
from geta_hf.quantization import attach_quantizers, cut_quantizers
from geta_hf.quantization.blocks import form_blocks, half_steps, is_half, remaining_first, split_blocks
from geta_hf.quantization.clipping import block_clipping_values, largest_magnitudes, search_elements, search_rows
from geta_hf.quantization.functional import fake_quantize
from geta_hf.quantization.kernels import using
from geta_hf.quantization.quantizer import Quantizer

SHAPES = [(3, 64), (4, 70), (2, 5)]


def block_of(inputs: int, order: list[int] | None) -> list[int]:
    """The block of each input: 32 neighbors in the order."""
    order = list(range(inputs)) if order is None else order
    return [order.index(i) // 32 for i in range(inputs)]


def oracle(x: np.ndarray, d: np.ndarray, q_m: np.ndarray, t: float, order: list[int] | None) -> np.ndarray:
    block = block_of(x.shape[1], order)
    found = np.zeros_like(x)
    for row in range(x.shape[0]):
        for column in range(x.shape[1]):
            step, clip = d[row, block[column]], q_m[row, block[column]]
            z = min(abs(x[row, column]), clip) ** t
            found[row, column] = np.sign(x[row, column]) * step * np.round(z / step)
    return found


def case(shape: tuple[int, int], shuffled: bool, learn_t: bool = False) -> tuple[Tensor, Quantizer, list[int] | None]:
    torch.manual_seed(shape[1])
    x = torch.randn(shape)
    q_m = 0.5 + torch.rand(shape[0], -(-shape[1] // 32))
    quantizer = Quantizer(q_m, 4, learn_t, channel_dim=0, inputs=shape[1])
    if learn_t:
        quantizer.t.data.fill_(1.2)
    order = None
    if shuffled:
        quantizer.set_order(torch.randperm(shape[1]))
        order = quantizer.order.tolist()
    return x, quantizer, order


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_kernel_rounds_each_block_on_its_own_grid(shape: tuple[int, int], shuffled: bool) -> None:
    x, quantizer, order = case(shape, shuffled)
    assert (quantizer.grid, quantizer.d.shape) == ("block32", (shape[0], -(-shape[1] // 32)))
    d, q_m = (value.detach().numpy() for value in (quantizer.d, quantizer.q_m))
    wanted = torch.from_numpy(oracle(x.numpy(), d, q_m, 1.0, order))
    for kernel in ("eager", "blocked"):
        with using(kernel), torch.no_grad():
            torch.testing.assert_close(quantizer(x), wanted, rtol=1e-6, atol=1e-6)
    step, _ = (value.detach() for value in quantizer.broadcast_over(x))
    torch.testing.assert_close(quantizer.codes(x) * step, wanted, rtol=1e-6, atol=1e-6)
    layers = nn.Linear(shape[1], shape[0], bias=False), Conv1D(shape[0], shape[1])
    for layer in layers:
        attach_quantizers(nn.ModuleList([layer]), grid="block32")
        rows = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
        rows.data.copy_(x)
        own = layer.weight_quantizer
        own.d.data.copy_(quantizer.d)
        own.q_m.data.copy_(quantizer.q_m)
        own.set_order(quantizer.order)
        inputs = torch.randn(2, shape[1])
        bias = 0.0 if layer.bias is None else layer.bias
        torch.testing.assert_close(layer(inputs), inputs @ wanted.t() + bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("learn_t", [False, True])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_the_formulas_of_each_block(shape: tuple[int, int], shuffled: bool, learn_t: bool) -> None:
    x, quantizer, order = case(shape, shuffled, learn_t)
    x.requires_grad_()
    grad = torch.randn(shape)
    quantizer(x).backward(grad)
    block = block_of(shape[1], order)
    t = float(quantizer.t.detach())
    values, steps, clips = (value.detach() for value in (x, quantizer.d, quantizer.q_m))
    of_x, of_d, of_q = np.zeros(shape), np.zeros(quantizer.d.shape), np.zeros(quantizer.d.shape)
    for row in range(shape[0]):
        for column in range(shape[1]):
            value, g, own = float(values[row, column]), float(grad[row, column]), (row, block[column])
            d, q_m = float(steps[own]), float(clips[own])
            z = min(abs(value), q_m) ** t
            of_d[own] += g * np.sign(value) * (np.round(z / d) - z / d)
            if abs(value) <= q_m:
                of_x[row, column] = g
            else:
                of_q[own] += g * np.sign(value) * t * q_m ** (t - 1)
    for found, wanted in ((x.grad, of_x), (quantizer.d.grad, of_d), (quantizer.q_m.grad, of_q)):
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-3, atol=1e-4)
    # The product on the quantized weight gives the very same gradients.
    layer = nn.Linear(shape[1], shape[0], bias=False)
    layer.weight.data.copy_(x.detach())
    before = [parameter.grad.clone() for parameter in (quantizer.d, quantizer.q_m)]
    quantizer.zero_grad()
    quantizer.linear(torch.eye(shape[1]), layer.weight, None).backward(grad.t().contiguous())
    for found, wanted in zip((layer.weight.grad, quantizer.d.grad, quantizer.q_m.grad), (x.grad, *before), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_frozen_blocks_get_no_gradient() -> None:
    x, quantizer, _ = case((4, 70), True)
    x.requires_grad_()
    quantizer.frozen = True
    quantizer(x).sum().backward()
    assert torch.equal(x.grad, (x.detach().abs() <= quantizer.broadcast_over(x)[1]).float())
    assert not quantizer.d.grad.any() and quantizer.d.grad.shape == quantizer.d.shape


def test_blocks_are_formed_over_what_remains() -> None:
    torch.manual_seed(0)
    d, q_m = torch.rand(3, 3) + 0.1, torch.rand(3, 3) + 1
    removed = torch.rand(70) < 0.4
    order = remaining_first(removed)
    kept = [i for i in range(70) if not removed[i]]
    assert order[: len(kept)].tolist() == kept and sorted(order.tolist()) == list(range(70))
    new_d, new_q = form_blocks(d, q_m, None, order, len(kept))
    for row in range(3):
        for block in range(-(-len(kept) // 32)):
            of = [kept[place] // 32 for place in range(32 * block, min(32 * block + 32, len(kept)))]
            best = max(of, key=lambda old: float(q_m[row, old]))
            assert (new_d[row, block], new_q[row, block]) == (d[row, best], q_m[row, best])
    again = form_blocks(new_d, new_q, order, order, len(kept))
    used = -(-len(kept) // 32)
    assert torch.equal(again[0][:, :used], new_d[:, :used])


def test_the_search_finds_the_best_of_many_clipping_values() -> None:
    torch.manual_seed(0)
    rows = torch.randn(40, 32) * torch.logspace(-3, 2, 40)[:, None]
    rows[3, 5:] = 0.0
    importance = torch.rand(1, 32) ** 4
    largest = largest_magnitudes(rows)
    clips = torch.logspace(-3, 0, 4000)
    for weights in (None, importance):
        errors, shares = search_elements(rows, largest, [2, 4, 8], weights)
        for column, bits in enumerate((2, 4, 8)):
            scaled = rows[:, :, None] / largest[:, None, None]
            step = clips / (2 ** (bits - 1) - 1)
            change = (scaled.clamp(-clips, clips) / step).round() * step - scaled
            every = ((change**2) * (1.0 if weights is None else weights[..., None])).sum(1)
            # Candidates lie 1.1 % apart around the best of those 9 % apart, and what few values cost is rugged.
            assert bits == 8 or (errors[:, column] <= every.amin(1) * 1.5 + 1e-9).all()
            assert errors[:, column].mean() <= every.amin(1).mean() * 1.25
            own = shares[:, column, None] / (2 ** (bits - 1) - 1)
            clipped = (rows / largest[:, None]).abs().minimum(shares[:, column, None])
            found = (((clipped / own).round() * own - (rows / largest[:, None]).abs()) ** 2) * (
                1.0 if weights is None else weights
            )
            torch.testing.assert_close(errors[:, column], found.sum(1), rtol=1e-3, atol=1e-7)
    long = torch.randn(2, 3000)
    most = largest_magnitudes(long)
    for mine, theirs in zip(search_elements(long, most, [3]), search_rows(long, most, [3]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.03, atol=1e-4)


def test_steps_are_numbers_of_fp16() -> None:
    d = torch.tensor([0.1, 1 / 3, 2.0**-14, 3e-5, 1e-9, 7e4])
    plain, small = half_steps(d, small=False), half_steps(d, small=True)
    half = np.float16([0.1, 1 / 3, 2.0**-14]).astype(np.float32)
    assert plain[:3].tolist() == small[:3].tolist() == half.tolist()
    assert torch.equal(plain[3:], d[3:]) and not is_half(plain)
    # Up, so that nothing is clipped; too large for fp16 remains as it is.
    assert is_half(small[:5]) and (small[3:5] >= d[3:5]).all() and small[4] == 2.0**-24 and small[5] == d[5]


def test_layers_that_hold_no_blocks_and_values_beyond_fp16() -> None:
    model = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Linear(40, 4), Conv1D(4, 40)])
    attach_quantizers(model, grid="block32", initial_bits=4)
    assert [layer.weight_quantizer.grid for layer in model] == ["channel", "block32", "block32"]
    assert [tuple(layer.weight_quantizer.d.shape) for layer in model] == [(4,), (4, 2), (4, 2)]
    assert torch.equal(split_blocks(model[1].weight)[1, 8:], torch.zeros(24))
    weight = model[1].weight.detach()
    torch.testing.assert_close(block_clipping_values(weight, 4, "max")[0, 1], weight[0, 32:].abs().max())
    with pytest.raises(GETAError, match=r"unknown grid 'block64'; choose one of layer, channel, block32"):
        attach_quantizers(nn.ModuleList([nn.Linear(2, 2)]), grid="block64")
    large = nn.Linear(40, 4)
    large.weight.data.mul_(1e9)
    with pytest.raises(GETAError, match=r"0.weight: a step size of .* at 8 bits is beyond 65504"):
        attach_quantizers(nn.ModuleList([large]), grid="block32")


def test_a_cut_needs_formed_blocks() -> None:
    model = nn.ModuleList([nn.Linear(70, 4)])
    attach_quantizers(model, grid="block32", initial_bits=4)
    layer, own = model[0], model[0].weight_quantizer
    removed = torch.zeros(70, dtype=torch.bool)
    removed[torch.arange(3, 60, 2)] = True
    layer.weight.data[:, removed] = 0.0
    kept = torch.nonzero(~removed).flatten()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    layer.weight = nn.Parameter(layer.weight.detach()[:, kept])
    with pytest.raises(GETAError, match=r"0: 41 of 70 inputs remain, but the blocks of 32 are those of all inputs"):
        cut_quantizers(model, {"0.weight": {1: kept}})
    order = remaining_first(removed)
    formed = form_blocks(own.d.detach(), own.q_m.detach(), None, order, len(kept))
    own.d.data.copy_(formed[0])
    own.q_m.data.copy_(formed[1])
    own.set_order(order)
    other = nn.ModuleList([nn.Linear(70, 4)])
    attach_quantizers(other, grid="block32")
    state["0.weight_quantizer.order"] = order
    other.load_state_dict(state)
    # A checkpoint brings the order of its blocks.
    assert torch.equal(other[0].weight_quantizer.block_order, order)
    full = own(state["0.weight"])
    cut_quantizers(model, {"0.weight": {1: kept}})
    assert own.d.shape == (4, 2) and own.block_order is None
    assert torch.equal(own(layer.weight), full[:, kept])


def test_low_rank_and_half_precision() -> None:
    torch.manual_seed(0)
    x, quantizer, _ = case((4, 70), True)
    a, b = torch.randn(2, 70), torch.randn(4, 2)
    low_rank = SimpleNamespace(A=a, B=b, scale=0.5)
    inputs = torch.randn(3, 70)
    found = quantizer.linear(inputs, x, None, low_rank)  # type: ignore[arg-type]
    torch.testing.assert_close(found, inputs @ quantizer(x + 0.5 * b @ a).t())
    half = fake_quantize(x.bfloat16(), quantizer.d, quantizer.q_m, blocks=True, order=quantizer.block_order)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, quantizer(x.bfloat16().float()).bfloat16())
