"""Define the mathematics of one quantizer (d, q_m, t) as pure functions of tensors, without kernels or gradients.

The notation is that of Section 3 of the paper (GETA, https://arxiv.org/abs/2502.16638): `d` is the step size, `q_m` the
clipping value and `t` the exponent, all positive. With z = min(|x|, q_m)^t the quantized value is

    x^Q = sgn(x) · d · round(z / d),

so the stored integer is n = sgn(x) · round(z / d) and the value used is exactly d · n. The grid is uniform and
symmetric; t only decides which n a value gets.

At 2 bits that grid has three levels, -d, 0 and d, where 2 bits can tell four apart. Once the width of a weight is
final, its grid may be that of four levels instead, as in SEQ (ParetoQ, https://arxiv.org/abs/2502.02631):

    x^Q = (d / 3) · c with c in -3, -1, 1, 3, the odd number nearest to z / (d / 3) with the sign of x,

where d = q_m^t, so that the width is still 2. Only an exact zero remains zero: removed groups consist of these.

`d` and `q_m` have a shape that broadcasts against x without enlarging it: (1,) for one quantizer of the entire tensor,
or (C, 1), (1, C), (C, 1, 1, 1) for one per channel. `t` always has shape (1,).

These functions are the reference; the kernels compute the same values faster. Every exported folder carries a copy of
this file, so it imports nothing but torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Lower bound of d, q_m and t: the safeguard that keeps every logarithm and quotient below finite.
TINY = 1e-12

FLOAT_BITS = 32
"""The bit width that a float value counts with wherever bits are counted."""

FOUR_LEVEL_BITS = 2
"""The bit width at which a weight may have four levels."""

BLOCK = 32
"""Neighboring inputs of an output channel that share a step size on the grid `block32`; the last ones may be fewer."""


def block_count(inputs: int) -> int:
    """Return into how many blocks the inputs of an output channel fall on the grid `block32`."""
    return -(-inputs // BLOCK)


def clip_power(x: Tensor, q_m: Tensor, t: Tensor | None = None) -> Tensor:
    """Return sgn(x) · min(|x|, q_m)^t, the value before rounding, in the shape of x.

    Args:
        x: any shape, floating point.
        q_m: clipping value, broadcastable against x.
        t: exponent, shape (1,). Default None, which means t = 1.
    """
    if t is None:
        return torch.clamp(x, -q_m, q_m)
    # The power is taken through a logarithm, whose argument must not be 0; sgn(x) makes 0 of it again afterwards.
    z = torch.exp(t * torch.log(torch.minimum(x.abs(), q_m).clamp_min(TINY)))
    return torch.sign(x) * z


def integer_codes(x: Tensor, d: Tensor, q_m: Tensor, t: Tensor | None = None) -> Tensor:
    """Return the stored integers n = sgn(x) · round(min(|x|, q_m)^t / d), int32, in the shape of x.

    Args:
        x: any shape, floating point; computed in fp32.
        d, q_m: step size and clipping value, broadcastable against x.
        t: exponent, shape (1,). Default None, which means t = 1.
    """
    return torch.round(clip_power(x.float(), q_m, t) / d).to(torch.int32)


def nearest_odd(value: Tensor) -> Tensor:
    """Return the nearest of -3, -1, 1 and 3, the code of a grid of four levels; 0 for exactly 0 and NaN for NaN."""
    # By arithmetic alone, which distributed tensors have as well. To torch the sign of NaN is 0, so NaN is added.
    return torch.sign(value) * (1.0 + 2.0 * (value.abs() >= 2)) + 0.0 * value


def leave_zero(weight: Tensor) -> None:
    """Set what is exactly zero to a positive number next to it, in place, since four levels have no zero."""
    # Far above where a processor takes numbers for zero, and far below every level.
    weight.masked_fill_(weight == 0, max(torch.finfo(weight.dtype).tiny, 1e-20))


def four_level_step(d: Tensor) -> Tensor:
    """Return what the codes -3, -1, 1 and 3 of a grid of four levels are multiplied by, d / 3."""
    return d / 3


def four_level_codes(x: Tensor, d: Tensor, q_m: Tensor, t: Tensor | None = None) -> Tensor:
    """Return the codes -3, -1, 1 and 3 of a grid of four levels, int32, in the shape of x; 0 where x is exactly 0.

    Args:
        x, d, q_m, t: as in `integer_codes`.
    """
    return nearest_odd(clip_power(x.float(), q_m, t) / four_level_step(d)).to(torch.int32)


def quantize_four_levels(x: Tensor, d: Tensor, q_m: Tensor, t: Tensor | None = None) -> Tensor:
    """Return x^Q on a grid of four levels, -d, -d/3, d/3 and d, in the shape and dtype of x.

    Args:
        x, d, q_m, t: as in `quantize`.
    """
    step = four_level_step(d)
    return (nearest_odd(clip_power(x.float(), q_m, t) / step) * step).to(x.dtype)


def quantize(x: Tensor, d: Tensor, q_m: Tensor, t: Tensor | None = None) -> Tensor:
    """Return x^Q = d · n in the shape and dtype of x, without gradients through the rounding (paper Sec. 3).

    Args:
        x: any shape, floating point; computed in fp32.
        d, q_m: step size and clipping value, broadcastable against x.
        t: exponent, shape (1,). Default None, which means t = 1 and takes a faster path.
    """
    return (torch.round(clip_power(x.float(), q_m, t) / d) * d).to(x.dtype)


def bit_width(d: Tensor, q_m: Tensor, t: Tensor) -> Tensor:
    """Return b = log2(q_m^t / d + 1) + 1, a real number, in the shape of d and q_m (paper Sec. 3)."""
    return torch.log2(q_m**t / d + 1) + 1


def step_size(bits: Tensor | float, q_m: Tensor, t: Tensor) -> Tensor:
    """Return the d at which the bit width is `bits`: q_m^t / (2^(bits-1) - 1), the inverse of `bit_width`."""
    return q_m**t / (2.0 ** (bits - 1) - 1)


def straight_through(grad: Tensor, x: Tensor, q_m: Tensor) -> Tensor:
    """Return the gradient with respect to x alone: `grad` where |x| <= q_m, else 0; shape and dtype of `grad`.

    Rounding has a derivative of 0 almost everywhere, so nothing would be learned through it. The straight-through
    estimator takes it for the identity instead; clipping keeps its true derivative, 0 beyond q_m.
    """
    return torch.where(x.float().abs() <= q_m, grad, 0.0)
