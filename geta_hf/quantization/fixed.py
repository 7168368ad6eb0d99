"""Hold what remains of quantization after training: quantizers of fixed bit width and layers that round their input.

Every exported folder carries a copy of this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from geta_hf.quantization.maths import quantize, straight_through


def output_dim(layer: nn.Module) -> int:
    """Return the dim of a layer's weight that its output channels run along."""
    return 1 if isinstance(layer, Conv1D) else 0


class SinglePrecision(nn.Module):
    """Keep parameters and buffers in fp32 when the surrounding model is cast; moves to another device still apply.

    A step size in half precision would be wrong by up to 2^-9 of its value, and with it every quantized value.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # `to`, `half`, `cuda` and the like all come through here. nn.Module has no hook that sees the dtype alone.
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


class _StraightThrough(torch.autograd.Function):
    """Compute x^Q, whose gradient for x is 1 within the clipping value and 0 beyond it (paper Sec. 3)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, d: Tensor, q_m: Tensor, t: Tensor | None) -> Tensor:
        # Only where x was clipped is needed: d is not learned any more.
        ctx.save_for_backward(x, q_m)
        # `data`, as in `functional._FakeQuantize`: a cast to x's own type returns the very tensor it was given, whose
        # gradient torch 2.11 loses under torch.compile.
        return quantize(x, d, q_m, t).data

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, q_m = ctx.saved_tensors
        return straight_through(grads[0], x, q_m), None, None, None


class FixedQuantizer(SinglePrecision):
    """A quantizer after training: an integer bit width, nothing to learn and nothing to save in a state dict.

    It computes the values of the `Quantizer` that it was made from. Only d, the exponent and the largest integer,
    2^(bits-1) - 1, have a part in those, so q_m is derived from them and need not be stored.

    Args:
        scale: as a file stores it: d, fp32, shape (1,), or d and a learned t, shape (2,).
        bits: bit width, 2 to 16.
        unsigned: whether there are no negative codes, but twice as many others; what is negative becomes 0. Default
            False.
    """

    d: Tensor
    q_m: Tensor
    t: Tensor | None

    def __init__(self, scale: Tensor, bits: int, unsigned: bool = False) -> None:
        super().__init__()
        self.bits = bits
        self.unsigned = unsigned
        scale = scale.detach()
        d = scale[:1].clone()
        t = scale[1:].clone() if scale.numel() > 1 else None
        # From b = log2(q_m^t / d + 1) + 1, solved for q_m^t.
        q_m = d * float(self.largest_code)
        if t is not None:
            q_m = q_m ** (1 / t)
        for name, value in {"d": d, "q_m": q_m, "t": t}.items():
            self.register_buffer(name, value, persistent=False)

    @property
    def largest_code(self) -> int:
        """The largest integer n of the grid."""
        return int(2**self.bits - 1 if self.unsigned else 2 ** (self.bits - 1) - 1)

    def entering(self, x: Tensor) -> Tensor:
        """Return what is rounded of x: all of it, or what is not negative."""
        return F.relu(x) if self.unsigned else x

    @property
    def scale(self) -> Tensor:
        """The tensor that a file stores of it, fp32, shape (1,) or (2,), on CPU."""
        return (self.d if self.t is None else torch.cat((self.d, self.t))).cpu()

    def forward(self, x: Tensor) -> Tensor:
        """Return x^Q with a straight-through gradient for x; shape and dtype of x."""
        return _StraightThrough.apply(self.entering(x), self.d, self.q_m, self.t)

    def extra_repr(self) -> str:
        return f"bits={self.bits}{', unsigned' if self.unsigned else ''}"


class InputQuantizedLayer(nn.Module):
    """Mixin of a layer that may quantize its input; `input_quantizer` is a module, or None where it does not."""

    input_quantizer: Any

    def quantized_input(self, x: Tensor) -> Tensor:
        """Return x^Q of the input, differentiable; x itself where activations stay in floating point."""
        return x if self.input_quantizer is None else self.input_quantizer(x)
