"""The maths of one quantizer (d, q_m, t): pure functions of tensors, without kernels or gradients.

Notation of the paper's Section 3: `d` is the step size, `q_m` the clipping value and `t` the exponent, all positive.
With z = min(|x|, q_m)^t the quantized value is x^Q = sgn(x) · d · round(z / d), so the stored integer is
n = sgn(x) · round(z / d) and the value used is exactly d · n: uniform and symmetric; t only shapes which n a value
gets.

`d` and `q_m` have a shape that broadcasts against x without enlarging it: (1,) for one quantizer of the whole tensor,
or (C, 1), (1, C), (C, 1, 1, 1) for one a channel. `t` is always of shape (1,). What is written here is the truth; the
kernels compute the same faster. Every exported folder carries a copy of this file, so it imports nothing but torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
