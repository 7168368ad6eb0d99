"""What is left of quantization after training: fixed widths, and the layers that round what comes in.

Every exported folder carries a copy of this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .geta_maths import quantize, straight_through


def output_dim(layer: nn.Module) -> int:
    """The dim of a layer's weight that its output channels run along."""
    return 1 if isinstance(layer, Conv1D) else 0


class SinglePrecision(nn.Module):
    """Stays fp32 when the model around it is cast: half precision would round a step size by bits."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep, recurse)


class _StraightThrough(torch.autograd.Function):
    """x^Q, whose gradient for x is 1 within the clipping value and 0 beyond (paper Sec. 3)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, d: Tensor, q_m: Tensor, t: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, q_m)
        return quantize(x, d, q_m, t)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, q_m = ctx.saved_tensors
        return straight_through(grads[0], x, q_m), None, None, None


class FixedQuantizer(SinglePrecision):
    """A quantizer after training: whole bits, and nothing to learn or to save in a state dict.

    It gives what the `Quantizer` gave that it was made from, since only d, the exponent and the largest integer,
    2^(bits-1) - 1, have a part in that.

    Args:
        scale: what a file holds of it: d, fp32, shape (1,), or d and a learned t, shape (2,).
        bits: bit width, 2 to 16.
    """

    d: Tensor
    q_m: Tensor
    t: Tensor | None

    def __init__(self, scale: Tensor, bits: int) -> None:
        super().__init__()
        self.bits = bits
        d, t = scale.detach()[:1].clone(), scale.detach()[1:].clone() if scale.numel() > 1 else None
        q_m = d * float(2 ** (bits - 1) - 1)
        for name, value in {"d": d, "q_m": q_m if t is None else q_m ** (1 / t), "t": t}.items():
            self.register_buffer(name, value, persistent=False)

    @property
    def scale(self) -> Tensor:
        """What a file holds of it, on CPU."""
        return (self.d if self.t is None else torch.cat((self.d, self.t))).cpu()

    def forward(self, x: Tensor) -> Tensor:
        """x^Q, with a straight-through gradient for x; shape and dtype of x."""
        return _StraightThrough.apply(x, self.d, self.q_m, self.t)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class InputQuantizedLayer(nn.Module):
    """Mixin of a layer that may quantize what comes in; `input_quantizer` is a module, or None where it does not."""

    input_quantizer: Any

    def quantized_input(self, x: Tensor) -> Tensor:
        """x^Q of the input, differentiable; x itself where activations stay float."""
        return x if self.input_quantizer is None else self.input_quantizer(x)
