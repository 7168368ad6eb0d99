"""Quantize as training does: x^Q with straight-through gradients, by the fastest kernel available.

Notation and shapes are those of `geta_hf.quantization.maths`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from geta_hf.quantization.blocks import in_blocks
from geta_hf.quantization.kernels import Kernel, choose
from geta_hf.quantization.maths import (
    FLOAT_BITS,
    TINY,
    bit_width,
    clip_power,
    four_level_codes,
    four_level_step,
    integer_codes,
    nearest_odd,
    quantize,
    quantize_four_levels,
    step_size,
    straight_through,
)

__all__ = [
    "EAGER",
    "EAGER_FOUR_LEVELS",
    "FLOAT_BITS",
    "TINY",
    "bit_width",
    "clip_power",
    "fake_quantize",
    "four_level_codes",
    "four_level_gradients",
    "four_level_step",
    "gradients",
    "gradients_or_zeros",
    "integer_codes",
    "quantize",
    "quantize_four_levels",
    "step_size",
    "straight_through",
]


def gradients(
    grad: Tensor, x: Tensor, d: Tensor, q_m: Tensor, t: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the straight-through gradients of x^Q with respect to x, d, q_m and t (paper Sec. 3).

    With round(·) taken for the identity where it is differentiated, z = min(|x|, q_m)^t and inside = (|x| <= q_m):

    - ∂x^Q/∂x = 1 inside, 0 outside
    - ∂x^Q/∂d = sgn(x) (round(z / d) - z / d)
    - ∂x^Q/∂q_m = 0 inside, sgn(x) · t · q_m^(t-1) outside
    - ∂x^Q/∂t = sgn(x) · z · ln min(|x|, q_m), 0 at x = 0

    Args:
        grad: gradient with respect to x^Q, shape of x.
        x, d, q_m, t: as in `quantize`.

    Returns:
        Gradients of the shapes of x, d, q_m and t, summed over the dims that d and q_m are broadcast along; the last is
        None when t is None. NaN in x or `grad` makes that of d NaN, which is how a bad step is noticed.
    """
    return _gradients(grad, x, d, q_m, t, torch.round)


def four_level_gradients(
    grad: Tensor, x: Tensor, d: Tensor, q_m: Tensor, t: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return what `gradients` does, of `quantize_four_levels`.

    Its ∂x^Q/∂d is (x^Q - sgn(x) z) / d, as that of the grid of whole steps; the others are the same.
    """
    of_x, of_step, of_q, of_t = _gradients(grad, x, four_level_step(d), q_m, t, nearest_odd)
    return of_x, of_step / 3, of_q, of_t


def _gradients(
    grad: Tensor, x: Tensor, d: Tensor, q_m: Tensor, t: Tensor | None, rounded: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients for one way to round z / d."""
    g = grad.float()
    signed_z = clip_power(x.float(), q_m, t)
    # sgn(x) (round(z/d) - z/d) is round(s) - s of the signed value, since rounding half to even is symmetric.
    scaled = signed_z / d
    grad_d = _sum_of_product(g, rounded(scaled).sub_(scaled), d)
    grad_x = straight_through(grad, x, q_m)
    # g - grad_x is g outside and 0 inside, where signed_z is ±q_m^t; no mask or sign has to be computed again.
    outside = _sum_of_product(g - grad_x, signed_z, q_m) / q_m
    if t is None:
        return grad_x, grad_d, outside, None
    log_clipped = torch.log(torch.minimum(x.float().abs(), q_m).clamp_min(TINY))
    return grad_x, grad_d, outside * t, _sum_of_product(g, signed_z * log_clipped, t)


def _sum_of_product(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """Return Σ a · b over all dims that `like` is broadcast along, in the shape of `like`."""
    if like.numel() == 1:  # a dot product needs no tensor of products
        return torch.dot(a.reshape(-1), b.reshape(-1)).reshape(like.shape)
    return (a * b).sum_to_size(like.shape)


def gradients_or_zeros(
    kernel: Kernel, frozen: bool, grad: Tensor, x: Tensor, d: Tensor, q_m: Tensor, t: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return what a backward pass gives x, d, q_m and t; where `frozen`, zeros for the last three."""
    if not frozen:
        return kernel.gradients(grad, x, d, q_m, t)
    # Zeros and not None: data parallel training waits for a gradient of every trained parameter.
    zeros = [None if value is None else torch.zeros_like(value) for value in (d, q_m, t)]
    return kernel.straight_through(grad, x, q_m), *zeros


EAGER = Kernel("eager", quantize, gradients, straight_through)
EAGER_FOUR_LEVELS = Kernel("eager", quantize_four_levels, four_level_gradients, straight_through, four_levels=True)


def choose_kernel(x: Tensor, blocks: bool, order: Tensor | None, four_levels: bool | Tensor = False) -> Kernel:
    """Return the fastest kernel for x; where `blocks` holds, for the grid `block32` with the inputs in this order."""
    if isinstance(four_levels, Tensor):
        return _by_channel(choose(x, EAGER_FOUR_LEVELS), choose(x, EAGER), four_levels)
    kernel = choose(x, EAGER_FOUR_LEVELS if four_levels else EAGER)
    return in_blocks(kernel, order) if blocks else kernel


def _by_channel(four: Kernel, whole: Kernel, four_levels: Tensor) -> Kernel:
    """Return the kernel of a grid that has four levels in some channels, and whole steps in the others.

    Args:
        four, whole: the kernels of the two.
        four_levels: which channels, bool, broadcastable against what is rounded.
    """

    def quantize_each(x: Tensor, d: Tensor, q_m: Tensor, t: Tensor | None) -> Tensor:
        return torch.where(four_levels, four.quantize(x, d, q_m, t), whole.quantize(x, d, q_m, t))

    def gradients_of_each(
        grad: Tensor, x: Tensor, d: Tensor, q_m: Tensor, t: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        of_four = four.gradients(torch.where(four_levels, grad, 0.0), x, d, q_m, t)
        of_whole = whole.gradients(torch.where(four_levels, 0.0, grad), x, d, q_m, t)
        first, second, third = (one + other for one, other in zip(of_four[:3], of_whole[:3], strict=True))
        return first, second, third, None if of_four[3] is None or of_whole[3] is None else of_four[3] + of_whole[3]

    return Kernel(whole.name, quantize_each, gradients_of_each, whole.straight_through)


class _FakeQuantize(torch.autograd.Function):
    """Save x alone: it is the parameter itself, so this costs no memory, and x^Q is recomputed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        d: Tensor,
        q_m: Tensor,
        t: Tensor | None,
        frozen: bool,
        blocks: bool,
        order: Tensor | None,
        four_levels: bool | Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, d, q_m, t)
        # Chosen once: backward must use the kernel of its forward, even after a `using` around the forward has ended.
        ctx.frozen, ctx.kernel = frozen, choose_kernel(x, blocks, order, four_levels)
        # `data` is a new tensor on the same memory. A kernel may return a view, which autograd would let nobody modify
        # in place, or what a cast without effect returned, the very tensor that it was given: torch 2.11 then loses
        # all gradients of this function under torch.compile.
        return ctx.kernel.quantize(x, d, q_m, t).data

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, d, q_m, t = ctx.saved_tensors
        return *gradients_or_zeros(ctx.kernel, ctx.frozen, grads[0], x, d, q_m, t), None, None, None, None


def fake_quantize(
    x: Tensor,
    d: Tensor,
    q_m: Tensor,
    t: Tensor | None = None,
    frozen: bool = False,
    *,
    blocks: bool = False,
    order: Tensor | None = None,
    four_levels: bool | Tensor = False,
) -> Tensor:
    """Return `quantize(x, d, q_m, t)` with the straight-through gradients of `gradients`.

    Args:
        x: any shape, floating point.
        d, q_m: step size and clipping value, (1,), or broadcastable against x for one per channel.
        t: exponent, shape (1,). Default None, which means t = 1.
        frozen: d, q_m and t get no update (cool-down): their gradients are zeros and cost nothing. Default False.
        blocks: x is a weight of shape (out, in) on the grid `block32`, and d and q_m are (out, blocks). Default False.
        order: of the inputs in these blocks, int64, shape (in,). Default None: the natural one.
        four_levels: round as `quantize_four_levels` does, at 2 bits; or for which channels, bool, broadcastable against
            x, without blocks. Default False.

    Returns:
        x^Q, shape and dtype of x.
    """
    return _FakeQuantize.apply(x, d, q_m, t, frozen, blocks, order, four_levels)
