"""Tensors of every layout with their quantizers, and the comparison of one kernel with the pure functions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from geta_hf.quantization.functional import EAGER, step_size
from geta_hf.quantization.kernels import Kernel

# (shape of x, shape of d, shape of q_m): one quantizer, one a row, one a column, a mixture, odd sizes and edges
LAYOUTS = [
    ((7,), (1,), (1,)),
    ((33, 65), (1,), (1,)),
    ((33, 65), (33, 1), (33, 1)),
    ((33, 65), (33, 1), (1,)),
    ((33, 65), (1, 65), (1, 65)),
    ((5, 2100), (5, 1), (5, 1)),
    ((4, 3, 3, 5), (4, 1, 1, 1), (4, 1, 1, 1)),
    ((3, 4, 5), (1, 4, 1), (1, 4, 1)),
    ((1, 5), (1, 5), (1, 5)),
    ((0, 4), (1,), (1,)),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass
class Case:
    """Input of one fake quantization; `t` is None for the linear quantizer."""

    x: Tensor
    grad: Tensor
    d: Tensor
    q_m: Tensor
    t: Tensor | None


def make_case(
    layout: tuple = LAYOUTS[1], dtype: torch.dtype = torch.float32, nonlinear: bool = False, bits: float = 5
) -> Case:
    torch.manual_seed(0)
    shape, d_shape, q_shape = layout
    x, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    if x.numel() > 1:
        x.view(-1)[1] = 0.0
    q_m, t = torch.rand(q_shape) + 0.8, torch.tensor([1.2])
    d = (step_size(bits, q_m, t) * torch.ones(d_shape)).expand(d_shape).clone()
    return Case(x, grad, d, q_m, t if nonlinear else None)


def assert_kernel_is_exact(kernel: Kernel, case: Case, bf16_is_rounded: bool = True, eager: Kernel = EAGER) -> None:
    """x^Q and grad_x equal the pure functions' bit for bit, sums to the tolerance of adding in another order.

    With t, exp and log may differ in their last place: x^Q may then be one step off, in 1 of 1000 values at most.
    """
    out, want = (k.quantize(case.x, case.d, case.q_m, case.t) for k in (kernel, eager))
    assert out.shape == want.shape and out.dtype == want.dtype
    if case.t is None and bf16_is_rounded:
        assert torch.equal(out, want)
    elif out.numel():
        off = (out.float() - want.float()).abs()
        assert float((off > 0.01 * want.float().abs()).float().mean()) <= 1e-3
        assert float((off - case.d - 0.01 * want.float().abs()).max()) <= 0
    inner = kernel.straight_through(case.grad, case.x, case.q_m)
    assert torch.equal(inner, eager.straight_through(case.grad, case.x, case.q_m)) and inner.dtype == case.grad.dtype
    grads, wants = (k.gradients(case.grad, case.x, case.d, case.q_m, case.t) for k in (kernel, eager))
    assert torch.equal(grads[0], wants[0]) and grads[0].dtype == wants[0].dtype
    assert (grads[3] is None) == (case.t is None)
    for value, expected in zip(grads[1:], wants[1:], strict=True):
        if value is not None and expected is not None:
            assert value.shape == expected.shape and value.dtype == torch.float32
            scale = case.x.numel() ** 0.5
            assert torch.allclose(value, expected, rtol=1e-5, atol=1e-6 * max(scale, 1.0) * 10)


def assert_nan_is_noticed(kernel: Kernel, case: Case) -> None:
    """NaN in one weight or one gradient makes the gradient of d NaN (where it belongs to that d)."""
    for poisoned in ("x", "grad"):
        values = {"x": case.x.clone(), "grad": case.grad.clone()}
        values[poisoned].view(-1)[0] = float("nan")
        _, grad_d, _, _ = kernel.gradients(values["grad"], values["x"], case.d, case.q_m, case.t)
        assert torch.isnan(grad_d.view(-1)[0]) and (grad_d.numel() == 1 or not torch.isnan(grad_d.view(-1)[1]))
