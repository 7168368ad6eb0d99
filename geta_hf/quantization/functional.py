"""How a number becomes b bits: the maths of one quantizer (d, q_m, t), pure functions of tensors.

Notation of the paper's Section 3: `d` is the step size, `q_m` the clipping value and `t` the exponent, all positive.
With z = min(|x|, q_m)^t the quantized value is x^Q = sgn(x) · d · round(z / d), so the stored integer is
n = sgn(x) · round(z / d) and the value used is exactly d · n: uniform and symmetric; t only shapes which n a value
gets.

`d` and `q_m` have a shape that broadcasts against x without enlarging it: (1,) for one quantizer of the whole tensor,
or (C, 1), (1, C), (C, 1, 1, 1) for one a channel. `t` is always of shape (1,). What is written here is the truth; the
kernels compute the same faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geta_hf.quantization.kernels import Kernel, choose

# Lower bounds of d, q_m and t: the safeguard that keeps every logarithm and quotient below finite.
TINY = 1e-12

FLOAT_BITS = 32
"""The width that a float value counts with wherever bits are counted."""


def clip_power(x: Tensor, q_m: Tensor, t: Tensor | None = None) -> Tensor:
    """sgn(x) · min(|x|, q_m)^t, the value before rounding. Shape of x; `t=None` means t = 1."""
    if t is None:
        return torch.clamp(x, -q_m, q_m)
    z = torch.exp(t * torch.log(torch.minimum(x.abs(), q_m).clamp_min(TINY)))
    return torch.sign(x) * z


def integer_codes(x: Tensor, d: Tensor, q_m: Tensor, t: Tensor | None = None) -> Tensor:
    """The stored integers n = sgn(x) · round(min(|x|, q_m)^t / d), int32, shape of x."""
    return torch.round(clip_power(x.float(), q_m, t) / d).to(torch.int32)


def quantize(x: Tensor, d: Tensor, q_m: Tensor, t: Tensor | None = None) -> Tensor:
    """x^Q = d · n, in the dtype of x, without gradients through the rounding (paper Sec. 3).

    Args:
        x: any shape, floating point; computed in fp32.
        d, q_m: step size and clipping value, broadcastable against x.
        t: exponent, shape (1,); None means t = 1, which takes a faster path.
    """
    return (torch.round(clip_power(x.float(), q_m, t) / d) * d).to(x.dtype)


def bit_width(d: Tensor, q_m: Tensor, t: Tensor) -> Tensor:
    """b = log2(q_m^t / d + 1) + 1, a real number of the shape of d and q_m (paper Sec. 3)."""
    return torch.log2(q_m**t / d + 1) + 1


def step_size(bits: Tensor | float, q_m: Tensor, t: Tensor) -> Tensor:
    """The d at which the bit width is `bits`: q_m^t / (2^(bits-1) - 1), the inverse of `bit_width`."""
    return q_m**t / (2.0 ** (bits - 1) - 1)


def straight_through(grad: Tensor, x: Tensor, q_m: Tensor) -> Tensor:
    """Gradient with respect to x alone: `grad` where |x| <= q_m, else 0. Shape and dtype of `grad`."""
    return torch.where(x.float().abs() <= q_m, grad, 0.0)


def gradients(
    grad: Tensor, x: Tensor, d: Tensor, q_m: Tensor, t: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Straight-through gradients of x^Q with respect to x, d, q_m and t (paper Sec. 3).

    Args:
        grad: gradient with respect to x^Q, shape of x.
        x, d, q_m, t: as in `quantize`.

    Returns:
        Gradients of the shapes of x, d, q_m and t, summed over what d and q_m are broadcast along; the last is None
        when t is None. NaN in x or `grad` makes that of d NaN, which is how a bad step is noticed.
    """
    g = grad.float()
    signed_z = clip_power(x.float(), q_m, t)
    scaled = signed_z / d
    grad_d = _sum_of_product(g, torch.round(scaled).sub_(scaled), d)
    grad_x = straight_through(grad, x, q_m)
    # g - grad_x is g outside and 0 inside, where signed_z is ±q_m^t; no mask or sign is needed again.
    outside = _sum_of_product(g - grad_x, signed_z, q_m) / q_m
    if t is None:
        return grad_x, grad_d, outside, None
    log_clipped = torch.log(torch.minimum(x.float().abs(), q_m).clamp_min(TINY))
    return grad_x, grad_d, outside * t, _sum_of_product(g, signed_z * log_clipped, t)


def _sum_of_product(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """Σ a · b over all that `like` is broadcast along, in the shape of `like`."""
    if like.numel() == 1:  # without a product tensor
        return torch.dot(a.reshape(-1), b.reshape(-1)).reshape(like.shape)
    return (a * b).sum_to_size(like.shape)


def gradients_or_zeros(
    kernel: Kernel, frozen: bool, grad: Tensor, x: Tensor, d: Tensor, q_m: Tensor, t: Tensor | None
) -> tuple[Tensor | None, ...]:
    """What a backward pass returns for x, d, q_m and t: where `frozen`, zeros for the last three."""
    if not frozen:
        return kernel.gradients(grad, x, d, q_m, t)
    # Zeros and not None: data parallel training waits for a gradient of every trained parameter.
    zeros = [None if value is None else torch.zeros_like(value) for value in (d, q_m, t)]
    return kernel.straight_through(grad, x, q_m), *zeros


EAGER = Kernel("eager", quantize, gradients, straight_through)


class _FakeQuantize(torch.autograd.Function):
    """Saves x alone: it is the parameter itself, so this costs no memory, and x^Q is recomputed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, d: Tensor, q_m: Tensor, t: Tensor | None, frozen: bool) -> Tensor:
        ctx.save_for_backward(x, d, q_m, t)
        ctx.frozen, ctx.kernel = frozen, choose(x, EAGER)
        return ctx.kernel.quantize(x, d, q_m, t)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, d, q_m, t = ctx.saved_tensors
        return *gradients_or_zeros(ctx.kernel, ctx.frozen, grads[0], x, d, q_m, t), None


def fake_quantize(x: Tensor, d: Tensor, q_m: Tensor, t: Tensor | None = None, frozen: bool = False) -> Tensor:
    """`quantize` with the straight-through gradients of `gradients`, by the fastest kernel at hand.

    Args:
        x: any shape, floating point.
        d, q_m: step size and clipping value, (1,) or broadcastable against x for one a channel.
        t: exponent, shape (1,); None means t = 1.
        frozen: d, q_m and t stand still (cool-down): their gradients are zeros and cost nothing. Default False.

    Returns:
        x^Q, shape and dtype of x.
    """
    return _FakeQuantize.apply(x, d, q_m, t, frozen)
