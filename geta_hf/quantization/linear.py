"""The linear layer on a quantized weight that keeps no quantized weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from geta_hf.quantization.functional import EAGER, fake_quantize, gradients_or_zeros
from geta_hf.quantization.kernels import choose, must_stay_plain


class _QuantizedLinear(torch.autograd.Function):
    """Saves the weight as it is and recomputes x^Q, where F.linear would keep x^Q: a copy of every weight."""

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
    ) -> Tensor:
        kernel = choose(weight, EAGER)
        out = F.linear(x, kernel.quantize(weight, d, q_m, t), bias)
        # Under autocast the product is taken in another dtype than x has; so are those of backward.
        ctx.save_for_backward(x.to(out.dtype), weight, d, q_m, t)
        ctx.kernel, ctx.frozen = kernel, frozen
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, d, q_m, t = ctx.saved_tensors
        grad_x = grad_bias = None
        of_quantizer: tuple[Tensor | None, ...] = (None, None, None, None)
        grad = grads[0].reshape(-1, weight.shape[0])
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ ctx.kernel.quantize(weight, d, q_m, t).to(grad.dtype)).view(x.shape)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        if any(ctx.needs_input_grad[position] for position in (1, 3, 4, 5)):
            grad_weight = grad.t() @ x.reshape(-1, weight.shape[1])
            of_quantizer = gradients_or_zeros(ctx.kernel, ctx.frozen, grad_weight, weight, d, q_m, t)
        return grad_x, of_quantizer[0], grad_bias, *of_quantizer[1:], None


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    d: Tensor,
    q_m: Tensor,
    t: Tensor | None = None,
    frozen: bool = False,
) -> Tensor:
    """F.linear(x, fake_quantize(weight, d, q_m, t, frozen), bias) that computes x^Q again in backward.

    Worth a copy of every quantized weight in memory, for one more pass over each.

    Args:
        x: (…, in).
        weight: (out, in); a transposed view will do.
        bias: (out,) or None.
        d, q_m, t, frozen: as in `fake_quantize`.

    Returns:
        (…, out).
    """
    if must_stay_plain(x, weight):
        return F.linear(x, fake_quantize(weight, d, q_m, t, frozen), bias)
    return _QuantizedLinear.apply(x, weight, bias, d, q_m, t, frozen)
