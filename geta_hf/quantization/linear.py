"""Compute a linear layer on its quantized weight without keeping the quantized weight for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from geta_hf.quantization.functional import choose_kernel, fake_quantize, gradients_or_zeros
from geta_hf.quantization.kernels import must_stay_plain
from geta_hf.quantization.lora import LowRank, merge


class _QuantizedLinear(torch.autograd.Function):
    """Save the weight and recompute x^Q in backward, where F.linear would keep x^Q: a copy of every weight.

    The weight is in memory anyway, so saving it costs nothing. W + scale · B A is recomputed in the same way where a
    and b are given.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        d: Tensor,
        q_m: Tensor,
        t: Tensor | None,
        frozen: bool,
        a: Tensor | None,
        b: Tensor | None,
        scale: float,
        blocks: bool,
        order: Tensor | None,
        four_levels: bool | Tensor,
    ) -> Tensor:
        # Chosen once, so that backward recomputes the very values of forward.
        kernel = choose_kernel(weight, blocks, order, four_levels)
        out = F.linear(x, kernel.quantize(_merged(weight, a, b, scale), d, q_m, t), bias)
        # Under autocast the product is taken in another dtype than x has; so are those of backward.
        ctx.save_for_backward(x.to(out.dtype), weight, d, q_m, t, a, b)
        ctx.kernel, ctx.frozen, ctx.scale = kernel, frozen, scale
        # F.linear returns a view here, and autograd lets nobody modify a view that a Function returns; a plain layer's
        # output may be modified (ReLU(inplace=True), `x += residual`). `data` is the same memory, but no view.
        return out.data

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, d, q_m, t, a, b = ctx.saved_tensors
        weight = _merged(weight, a, b, ctx.scale)
        grad_x = grad_bias = grad_a = grad_b = None
        of_quantizer: tuple[Tensor | None, ...] = (None, None, None, None)
        grad = grads[0].reshape(-1, weight.shape[0])
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ ctx.kernel.quantize(weight, d, q_m, t).to(grad.dtype)).view(x.shape)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        # Positions of weight, d, q_m, t, a and b: all of them follow from the gradient of x^Q.
        if any(ctx.needs_input_grad[position] for position in (1, 3, 4, 5, 7, 8)):
            # Straight through: the gradient of x^Q is that of the merged weight where it is not clipped, and A and B
            # follow by the product rule.
            grad_weight = grad.t() @ x.reshape(-1, weight.shape[1])
            of_quantizer = gradients_or_zeros(ctx.kernel, ctx.frozen, grad_weight, weight, d, q_m, t)
            if a is not None and b is not None and of_quantizer[0] is not None:
                of_weight = of_quantizer[0].float()
                grad_a = ctx.scale * (b.t() @ of_weight)
                grad_b = ctx.scale * (of_weight @ a.t())
        return grad_x, of_quantizer[0], grad_bias, *of_quantizer[1:], None, grad_a, grad_b, None, None, None, None


def _merged(weight: Tensor, a: Tensor | None, b: Tensor | None, scale: float) -> Tensor:
    return weight if a is None or b is None else merge(weight, a, b, scale)


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    d: Tensor,
    q_m: Tensor,
    t: Tensor | None = None,
    frozen: bool = False,
    low_rank: LowRank | None = None,
    *,
    blocks: bool = False,
    order: Tensor | None = None,
    four_levels: bool | Tensor = False,
) -> Tensor:
    """Return F.linear(x, fake_quantize(weight, d, q_m, t, frozen), bias), recomputing x^Q in backward.

    This saves the memory of a copy of every quantized weight, for one more pass over each.

    Args:
        x: (…, in).
        weight: (out, in); a transposed view is accepted.
        bias: (out,) or None.
        d, q_m, t, frozen, blocks, order, four_levels: as in `fake_quantize`.
        low_rank: added to the weight before it is quantized; recomputed in backward as well. Default None.

    Returns:
        (…, out).
    """
    if low_rank is None:
        a, b, scale = None, None, 1.0
    else:
        a, b, scale = low_rank.A, low_rank.B, low_rank.scale
    # What reads the operators (torch.compile, tracing) or stands in for data must see ordinary ones.
    if must_stay_plain(x, weight):
        merged = _merged(weight, a, b, scale)
        rounded = fake_quantize(merged, d, q_m, t, frozen, blocks=blocks, order=order, four_levels=four_levels)
        return F.linear(x, rounded, bias)
    return _QuantizedLinear.apply(x, weight, bias, d, q_m, t, frozen, a, b, scale, blocks, order, four_levels)
