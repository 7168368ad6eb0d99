"""Add the product of two small trained matrices to a frozen weight: W + scale · B A.

This is LoRA (https://arxiv.org/abs/2106.09685), except that the sum is formed before the weight is quantized, so that
what is trained is what is exported.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from geta_hf.quantization.fixed import SinglePrecision


def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float, transposed: bool = False) -> Tensor:
    """Return W + scale · B A in the shape and dtype of W, summed in fp32.

    It is always computed by the same operations, so a weight that is merged for export equals the one that the forward
    pass saw bit for bit.

    Args:
        weight: (out, in), or (in, out) where `transposed`.
        a: (r, in).
        b: (out, r).
        scale: factor of the product.
        transposed: whether the weight is (in, out), as Conv1D's. Default False.
    """
    rows = weight.t() if transposed else weight
    # Autocast would take the product in half precision.
    with torch.autocast(weight.device.type, enabled=False):
        merged = torch.addmm(rows.float(), b.float(), a.float(), alpha=scale).to(weight.dtype)
    return merged.t() if transposed else merged


class LowRank(SinglePrecision):
    """The trained part of a layer whose weight is frozen; fp32 whatever the dtype of the weight.

    Attributes:
        A: (r, in).
        B: (out, r).

    Args:
        a, b: start of A and B; used without a copy where they are fp32.
        scale: factor of their product.
        transposed: whether the layer's weight is (in, out), as Conv1D's. Default False.
    """

    def __init__(self, a: Tensor, b: Tensor, scale: float, transposed: bool = False) -> None:
        super().__init__()
        self.A = nn.Parameter(a.detach().float())
        self.B = nn.Parameter(b.detach().float())
        self.scale = scale
        self.transposed = transposed

    def merged(self, weight: Tensor) -> Tensor:
        """Return the weight with what was learned added, differentiable; shape and dtype of `weight`."""
        return merge(weight, self.A, self.B, self.scale, self.transposed)

    def extra_repr(self) -> str:
        return f"rank={self.A.shape[0]}, scale={self.scale:g}"
