"""The quantizer's maths against its formulas, against finite differences and at its edges."""

from __future__ import annotations

import pytest
import torch

from geta_hf.quantization import functional
from geta_hf.quantization.functional import bit_width, fake_quantize, integer_codes, quantize, step_size


def quantizer(bits: float = 4.0, q_m: float = 1.5, t: float = 1.2) -> tuple[torch.Tensor, ...]:
    q, e = torch.tensor([q_m]), torch.tensor([t])
    return step_size(bits, q, e), q, e


@pytest.mark.parametrize("bits", [2, 3, 4, 7.5, 8, 16])
@pytest.mark.parametrize("t", [0.7, 1.0, 1.4])
def test_step_size_is_the_inverse_of_bit_width(bits: float, t: float) -> None:
    d, q_m, e = quantizer(bits, 1.3, t)
    assert bit_width(d, q_m, e).item() == pytest.approx(bits, rel=1e-4)


@pytest.mark.parametrize("t", [None, 1.0, 1.3])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_are_d_times_codes_inside_the_width(bits: int, t: float | None) -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 40) * 2
    d, q_m, e = quantizer(bits, 1.5, 1.0 if t is None else t)
    exponent = None if t is None else e
    codes = integer_codes(x, d, q_m, exponent)
    assert codes.abs().max().item() == 2 ** (bits - 1) - 1
    assert torch.equal(quantize(x, d, q_m, exponent), d * codes)


def test_linear_path_equals_the_general_one_at_t_1() -> None:
    torch.manual_seed(0)
    x = torch.randn(1000)
    d, q_m, t = quantizer(5, 1.5, 1.0)
    assert torch.allclose(quantize(x, d, q_m), quantize(x, d, q_m, t), atol=1e-6)


def test_every_gradient_follows_its_formula() -> None:
    """The straight-through gradients of the paper, element by element, written out independently of the package."""
    torch.manual_seed(0)
    x = torch.randn(200)
    x[0] = 0.0
    d, q_m, t = quantizer(4, 1.1, 1.3)
    leaves = [value.clone().requires_grad_() for value in (x, d, q_m, t)]
    weights = torch.randn(200)
    (fake_quantize(*leaves) * weights).sum().backward()
    inside, sign = x.abs() <= q_m, x.sign()
    z = torch.minimum(x.abs(), q_m) ** t
    log_x = torch.where(x == 0, torch.ones_like(x), x.abs()).log()
    expected = (
        torch.where(inside, weights, 0.0),
        (weights * sign * ((z / d).round() - z / d)).sum(),
        (weights * torch.where(inside, 0.0, sign * t * q_m ** (t - 1))).sum(),
        (weights * torch.where(inside, sign * x.abs() ** t * log_x, sign * q_m**t * q_m.log())).sum(),
    )
    for leaf, value in zip(leaves, expected, strict=True):
        assert torch.allclose(leaf.grad, value.expand_as(leaf.grad), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", ["q_m", "t"])
def test_gradient_of_the_unrounded_map_by_finite_differences(which: str) -> None:
    """Straight-through means the rounding's slope is 1, so q_m and t have the slope of sgn(x)·min(|x|, q_m)^t."""
    torch.manual_seed(0)
    x = torch.randn(300)
    values = {"d": torch.tensor([1e-4]), "q_m": torch.tensor([0.9]), "t": torch.tensor([1.2])}
    weights = torch.randn(300)
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    (fake_quantize(x, **leaves) * weights).sum().backward()
    step = 1e-5

    def smooth(delta: float) -> torch.Tensor:
        moved = {name: value.double() + (delta if name == which else 0) for name, value in values.items()}
        return (weights * x.sign() * torch.minimum(x.double().abs(), moved["q_m"]) ** moved["t"]).sum()

    slope = (smooth(step) - smooth(-step)) / (2 * step)
    assert leaves[which].grad.item() == pytest.approx(slope.item(), rel=1e-3)


def test_gradient_of_d_by_finite_differences_between_roundings() -> None:
    """With the integers fixed, x^Q = d·n has slope n, and the straight-through path takes z/d away."""
    x = torch.tensor([0.3, -0.7, 1.0])
    d, q_m = torch.tensor([0.11]), torch.tensor([2.0])
    leaf = d.clone().requires_grad_()
    fake_quantize(x, leaf, q_m).sum().backward()
    step = 1e-3
    slope = (quantize(x, d + step, q_m).sum() - quantize(x, d - step, q_m).sum()) / (2 * step)
    assert leaf.grad.item() == pytest.approx((slope - (x / d).sum()).item(), abs=1e-3)


def test_dtype_is_kept_and_gradients_are_computed_in_fp32() -> None:
    x = torch.randn(64, dtype=torch.bfloat16, requires_grad=True)
    d, q_m, _ = quantizer(8, 1.5, 1.0)
    d.requires_grad_()
    out = fake_quantize(x, d, q_m)
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and x.grad.dtype == torch.bfloat16 and d.grad.dtype == torch.float32


def test_zero_stays_zero_and_nothing_is_nan() -> None:
    x = torch.zeros(5, requires_grad=True)
    d, q_m, t = (value.requires_grad_() for value in quantizer(4, 1.0, 1.5))
    out = fake_quantize(x, d, q_m, t)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(5))
    assert all(torch.isfinite(value.grad).all() for value in (x, d, q_m, t))


def test_only_the_input_is_saved_for_backward() -> None:
    x = torch.randn(100, requires_grad=True)
    d, q_m, _ = quantizer()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: saved.append(value.data_ptr()) or value, lambda v: v):
        functional.fake_quantize(x, d, q_m)
    assert [pointer for pointer in saved if pointer not in (d.data_ptr(), q_m.data_ptr())] == [x.data_ptr()]


def test_a_quantizer_a_channel_is_each_channel_by_itself() -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(4, 30), torch.randn(4, 30)
    q_m, t = torch.rand(4, 1) + 0.7, torch.tensor([1.2])
    d = step_size(4, q_m, t)
    leaves = [value.clone().requires_grad_() for value in (x, d, q_m, t)]
    (fake_quantize(*leaves) * weights).sum().backward()
    for channel in range(4):
        rows = slice(channel, channel + 1)
        alone = [value.clone().requires_grad_() for value in (x[rows], d[rows, 0], q_m[rows, 0])]
        (fake_quantize(*alone, t) * weights[rows]).sum().backward()
        for leaf, single in zip(leaves, alone, strict=False):
            assert torch.allclose(leaf.grad[rows].view(-1), single.grad.view(-1), rtol=1e-5, atol=1e-6)


def test_a_step_a_channel_under_one_clipping_value() -> None:
    """d and q_m may have different shapes; each gradient is summed over what its own is broadcast along."""
    torch.manual_seed(0)
    x = torch.randn(4, 30)
    d, q_m = torch.rand(4, 1) * 0.1 + 0.05, torch.tensor([1.0])
    leaves = [value.clone().requires_grad_() for value in (x, d, q_m)]
    wide = [value.clone().requires_grad_() for value in (x, d, q_m.expand(4, 1))]
    for values in (leaves, wide):
        fake_quantize(*values).sum().backward()
    assert torch.allclose(leaves[1].grad, wide[1].grad) and leaves[2].grad.shape == (1,)
    assert torch.allclose(leaves[2].grad, wide[2].grad.sum().view(1))


@pytest.mark.parametrize("shape", [(1,), (10, 1)])
def test_frozen_quantizers_get_zeros_and_the_weight_its_gradient(shape: tuple[int, ...]) -> None:
    """Zeros, since data parallel training waits for every parameter's gradient."""
    torch.manual_seed(0)
    x, q_m, t = torch.randn(10, 7), torch.full(shape, 0.9), torch.tensor([1.2])
    d = step_size(4, q_m, t)
    free, still = ([value.clone().requires_grad_() for value in (x, d, q_m, t)] for _ in range(2))
    outs = fake_quantize(*free), fake_quantize(*still, frozen=True)
    assert torch.equal(*outs)
    for out in outs:
        out.square().sum().backward()
    assert torch.equal(free[0].grad, still[0].grad)
    assert all(leaf.grad.shape == leaf.shape and not leaf.grad.any() for leaf in still[1:])
    assert all(leaf.grad.any() for leaf in free[1:])


@pytest.mark.parametrize("t", [None, 1.2])
def test_nan_in_a_weight_or_a_gradient_reaches_the_gradient_of_d(t: float | None) -> None:
    d, q_m, e = quantizer(4, 1.0, 1.2)
    x, grad = torch.linspace(-2, 2, 9), torch.ones(9)
    for poisoned in (x, grad):
        kept = poisoned.clone()
        poisoned[2] = float("nan")
        assert torch.isnan(functional.gradients(grad, x, d, q_m, None if t is None else e)[1]).all()
        poisoned.copy_(kept)
