"""The grid of four levels: values and gradients against independent formulas, and its state in checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from geta_hf.quantization import attach_quantizers
from geta_hf.quantization.functional import (
    EAGER_FOUR_LEVELS,
    four_level_gradients,
    quantize_four_levels,
    step_size,
)
from geta_hf.quantization.kernels import choose, using
from geta_hf.quantization.quantizer import Quantizer
from tests.quantization.kernel_cases import DTYPES, LAYOUTS, make_case

GRIDS = ["layer", "channel", "block32"]


def nearest_level(x: Tensor, q_m: Tensor) -> Tensor:
    """Return the nearest of -q, -q/3, q/3 and q by trying all; 0 for 0."""
    levels = torch.stack([level * q_m.expand_as(x) for level in (-1.0, -1 / 3, 1 / 3, 1.0)])
    nearest = levels.gather(0, (levels - x).abs().argmin(0)[None])[0]
    return torch.where(x == 0, 0.0, nearest)


def weight(rows: int = 6, columns: int = 70) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(rows, columns)


def quantizer_of(grid: str, w: Tensor, q: float = 1.2) -> Quantizer:
    shape = {"layer": (1,), "channel": (len(w),), "block32": (len(w), -(-w.shape[1] // 32))}[grid]
    q_m = q + torch.rand(shape)
    own = Quantizer(q_m, 2, channel_dim=None if grid == "layer" else 0, inputs=70 if grid == "block32" else None)
    own.set_four_levels()
    return own


@pytest.mark.parametrize("grid", GRIDS)
def test_values_are_the_nearest_of_four_levels(grid: str) -> None:
    w = weight()
    w[0, 3] = 0.0
    own = quantizer_of(grid, w)
    _, q_m = own.broadcast_over(w)
    assert torch.allclose(own(w), nearest_level(w, q_m), atol=1e-6)
    assert torch.allclose(own.bits(), torch.full_like(own.d, 2.0))
    codes = own.codes(w)
    assert sorted(codes.unique().tolist()) == [-3, -1, 0, 1, 3] and int((codes == 0).sum()) == 1
    step, _ = own.broadcast_over(w)
    assert torch.equal(codes * (step / 3), own(w))
    assert torch.equal(own.step, own.d / 3)


def test_an_exponent_decides_which_level_a_value_gets() -> None:
    x, q_m, t = torch.tensor([0.8, 0.4, -1.5, 0.0]), torch.tensor([1.0]), torch.tensor([3.0])
    # 0.8³ = 0.512 is below two thirds, which 0.8 is not.
    assert torch.allclose(quantize_four_levels(x, q_m**t, q_m, t), torch.tensor([1 / 3, 1 / 3, -1.0, 0.0]))
    assert torch.allclose(quantize_four_levels(x, q_m, q_m), torch.tensor([1.0, 1 / 3, -1.0, 0.0]))


@pytest.mark.parametrize("learn_t", [False, True])
def test_gradients_are_those_of_autograd_with_rounding_as_the_identity(learn_t: bool) -> None:
    w = weight().double().float()
    d, q_m = torch.full((6, 1), 1.1, requires_grad=True), torch.full((6, 1), 1.2, requires_grad=True)
    t = torch.tensor([1.3], requires_grad=True) if learn_t else None
    x = w.clone().requires_grad_()
    grad = torch.randn_like(w)
    power = 1.0 if t is None else t
    z = torch.sign(x) * torch.minimum(x.abs(), q_m) ** power
    scaled = 3 * z / d
    odd = 2 * (scaled.detach().abs() / 2).floor().clamp_max(1) + 1
    rounded = scaled + (torch.sign(scaled.detach()) * odd - scaled).detach()
    (rounded * d / 3).backward(grad)
    found = four_level_gradients(grad, w, d.detach(), q_m.detach(), None if t is None else t.detach())
    # That of x is straight through the power as well.
    wanted = [torch.where(w.abs() <= q_m, grad, 0.0), d.grad, q_m.grad, None if t is None else t.grad]
    for own, expected in zip(found, wanted, strict=True):
        if own is not None and expected is not None:
            assert torch.allclose(own, expected, rtol=1e-4, atol=1e-4)


def test_nan_comes_through() -> None:
    x = torch.tensor([float("nan"), 1.0])
    one = torch.ones(1)
    assert bool(quantize_four_levels(x, one, one)[0].isnan())
    assert bool(four_level_gradients(torch.ones(2), x, one, one)[1].isnan())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_blocked_kernel_is_exact(layout: tuple, dtype: torch.dtype) -> None:
    case = make_case(layout, dtype, bits=2)
    with using("blocked"):
        kernel = choose(case.x, EAGER_FOUR_LEVELS)
    values = (case.x, case.d, case.q_m, case.t)
    assert torch.equal(kernel.quantize(*values), EAGER_FOUR_LEVELS.quantize(*values))
    for own, expected in zip(
        kernel.gradients(case.grad, *values), EAGER_FOUR_LEVELS.gradients(case.grad, *values), strict=True
    ):
        if own is not None and expected is not None:
            assert torch.allclose(own, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_linear_layer_computes_on_four_levels(grid: str) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(70, 6))
    attach_quantizers(model, include=[""], initial_bits=2, grid=grid)
    own = model[0].weight_quantizer
    own.set_four_levels()
    x = torch.randn(3, 70)
    rounded = own(model[0].weight)
    assert torch.equal(model(x), nn.functional.linear(x, rounded, model[0].bias))
    rounded.sum().backward()
    wanted = [p.grad.clone() for p in (model[0].weight, own.d, own.q_m)]
    model.zero_grad()
    model(torch.eye(70)).sub(model[0].bias).sum().backward()  # the same gradient of every weight
    for p, expected in zip((model[0].weight, own.d, own.q_m), wanted, strict=True):
        assert torch.allclose(p.grad, expected, atol=1e-4)


def test_the_state_is_in_checkpoints_and_copies() -> None:
    model = nn.Sequential(nn.Linear(70, 6))
    attach_quantizers(model, include=[""], initial_bits=2)
    fresh = copy.deepcopy(model)
    model[0].weight_quantizer.set_four_levels()
    assert copy.deepcopy(model)[0].weight_quantizer.four_levels
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(3, 70)
    assert fresh[0].weight_quantizer.four_levels and torch.equal(fresh(x), model(x))
    # One of before there were four levels is complete without a word of them.
    former = {name: value for name, value in fresh.state_dict().items() if not name.endswith("levels")}
    fresh.load_state_dict(former)
    assert not fresh[0].weight_quantizer.four_levels
    assert not torch.equal(fresh(x), model(x))


MIXED = torch.tensor([True, False, False, True, False, True])


@pytest.mark.parametrize("by_input", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_some_channels_have_four_levels(by_input: bool, transposed: bool) -> None:
    """Each channel computes, learns and is stored as one of a quantizer whose channels are all of its kind."""
    torch.manual_seed(2)
    model = nn.Sequential(Conv1D(6, 6) if transposed else nn.Linear(6, 6))
    attach_quantizers(model, include=[""], initial_bits=2, grid="channel")
    layer = model[0]
    along = int(transposed) ^ int(by_input)
    bits = torch.where(MIXED, 2.0, 4.0)
    own = Quantizer(1.2 + torch.rand(6), 2, channel_dim=along, by_input=by_input)
    with torch.no_grad():
        own.d.copy_(step_size(bits, own.q_m, own.t))
    own.set_four_levels(MIXED)
    assert own.some_four_levels and not own.four_levels
    alike = {four: copy.deepcopy(own) for four in (True, False)}
    for four, quantizer in alike.items():
        quantizer.set_four_levels(four)
        assert quantizer.four_levels is four and not quantizer.some_four_levels and len(quantizer.levels) == 1
    with torch.no_grad():
        layer.weight.normal_(0, 1.5)
    w = layer.weight.detach()
    mask = own.over(w, MIXED).expand_as(w)
    assert torch.equal(own(w), torch.where(mask, alike[True](w), alike[False](w)))
    assert torch.equal(own.codes(w) * own.over(w, own.step), own(w))
    assert own.codes(w)[mask].abs().max() == 3 and own.codes(w)[~mask].abs().max() > 3
    # The layer, and the gradients of all that learns.
    layer.weight_quantizer = own
    x, grad = torch.randn(5, 6), torch.randn(5, 6)
    out = layer(x)
    rounded = own(w)
    assert torch.allclose(out, x @ (rounded if transposed else rounded.t()) + layer.bias)
    out.backward(grad)
    of_weight = x.t() @ grad if transposed else grad.t() @ x
    for four, quantizer in alike.items():
        own_weight = w.clone().requires_grad_()
        quantizer(own_weight).backward(of_weight)
        kind = MIXED if four else ~MIXED
        assert torch.allclose(layer.weight.grad[mask == four], own_weight.grad[mask == four])
        for leaf in ("d", "q_m"):
            found, wanted = (getattr(one, leaf).grad[kind] for one in (own, quantizer))
            assert torch.allclose(found, wanted, atol=1e-5)


def test_channels_of_two_kinds_are_loaded_and_cut() -> None:
    own = Quantizer(torch.rand(6) + 1, 2, channel_dim=0)
    own.set_four_levels(MIXED)
    fresh = Quantizer(torch.rand(6) + 1, 2, channel_dim=0)
    fresh.load_state_dict(own.state_dict())
    w = torch.randn(6, 4)
    assert fresh.some_four_levels and torch.equal(fresh(w), own(w))
    # And back, where one grid is that of all.
    fresh.load_state_dict(Quantizer(torch.rand(6) + 1, 2, channel_dim=0).state_dict())
    assert not fresh.some_four_levels and not fresh.four_levels and len(fresh.levels) == 1
    for index, some, four in (([0, 1], True, False), ([0, 3, 5], False, True), ([1, 2], False, False)):
        cut = copy.deepcopy(own)
        cut.keep_channels(torch.tensor(index))
        assert (cut.some_four_levels, cut.four_levels) == (some, four)
        assert torch.equal(cut(w[index]), own(w)[index])
    with pytest.raises(RuntimeError, match="size mismatch for levels"):
        fresh.load_state_dict({**own.state_dict(), "levels": torch.ones(3, dtype=torch.uint8)})
