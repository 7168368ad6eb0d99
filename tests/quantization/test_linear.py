"""The linear layer without a kept x^Q equals F.linear on fake_quantize, in every dtype and mode, and keeps none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from geta_hf.quantization.functional import fake_quantize
from geta_hf.quantization.linear import quantized_linear
from tests.quantization.kernel_cases import make_case


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, *quantizer: object) -> Tensor:
    return F.linear(x, fake_quantize(weight, *quantizer), bias)  # type: ignore[arg-type]


def leaves(dtype: torch.dtype, batch: tuple[int, ...], per_channel: bool, nonlinear: bool) -> list[Tensor]:
    case = make_case(((9, 12), (9, 1) if per_channel else (1,), (1,)), dtype, nonlinear)
    values = [torch.randn(*batch, 12).to(dtype), case.x, torch.randn(9).to(dtype), case.d, case.q_m]
    return [value.clone().requires_grad_() for value in [*values, *([case.t] if nonlinear else [])]]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "per_channel", "nonlinear"), [((), False, False), ((4,), True, True), ((2, 3), 0, 1)]
)
def test_output_and_gradients_are_those_of_the_two_operators(
    batch: tuple[int, ...], per_channel: bool, nonlinear: bool, dtype: torch.dtype, autocast: bool
) -> None:
    ours, theirs = (leaves(dtype, batch, per_channel, nonlinear) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outs = quantized_linear(*ours), plain(*theirs)
    assert torch.equal(*outs) and outs[0].dtype == outs[1].dtype
    for out in outs:
        out.float().square().sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 and not autocast else 2e-2
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.grad.dtype == mine.dtype
        assert torch.allclose(mine.grad, other.grad, rtol=tolerance, atol=tolerance * float(other.grad.abs().max()))


def test_no_quantized_weight_is_kept() -> None:
    """Of the size of the weight only the weight itself."""
    values = leaves(torch.float32, (5,), False, False)

    def kept_by(function: object) -> list[int]:
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda value: saved.append(value) or value, lambda value: value):
            function(*values)  # type: ignore[operator]
        return [value.data_ptr() for value in saved if value.numel() == values[1].numel()]

    assert set(kept_by(quantized_linear)) == {values[1].data_ptr()}
    assert len(set(kept_by(plain))) == 2


def test_a_transposed_weight_and_no_bias() -> None:
    x, weight, _, d, q_m = leaves(torch.float32, (5,), False, False)
    turned = weight.detach().t().clone().requires_grad_()
    quantized_linear(x, turned.t(), None, d, q_m).square().sum().backward()
    first = turned.grad
    x.grad = d.grad = q_m.grad = None
    plain(x, weight, None, d, q_m).square().sum().backward()
    assert torch.allclose(first.t(), weight.grad, atol=1e-5)


def test_frozen_and_untrained_parts_get_zeros_or_nothing() -> None:
    x, weight, bias, d, q_m = leaves(torch.float32, (5,), False, False)
    quantized_linear(x, weight, bias, d, q_m, frozen=True).sum().backward()
    assert not d.grad.any() and not q_m.grad.any() and weight.grad.any()
    still = [value.detach() for value in (weight, bias, d, q_m)]
    x.grad = None
    quantized_linear(x, *still).sum().backward()
    assert x.grad.any() and all(value.grad is None for value in still)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile, inside torch
def test_a_compiled_caller_and_meta_tensors_see_plain_operators() -> None:
    ours, theirs = (leaves(torch.float32, (5,), True, True) for _ in range(2))
    torch.compile(quantized_linear, backend="aot_eager", fullgraph=True)(*ours).sum().backward()
    plain(*theirs).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine.grad, other.grad, rtol=1e-5, atol=1e-5)
    assert quantized_linear(*(value.to("meta") for value in ours)).shape == (5, 9)
