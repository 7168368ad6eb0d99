"""A weight that stands still and a product of two small matrices that moves it: W + scale · B A."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from geta_hf.quantization.fixed import SinglePrecision


def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float, transposed: bool = False) -> Tensor:
    """W + scale · B A, summed in fp32 and rounded to the dtype of W; always by the same operations, so bit for bit.

    Args:
        weight: (out, in), or (in, out) where `transposed`.
        a: (r, in).
        b: (out, r).
        scale: of the product.
    """
    rows = weight.t() if transposed else weight
    with torch.autocast(weight.device.type, enabled=False):
        merged = torch.addmm(rows.float(), b.float(), a.float(), alpha=scale).to(weight.dtype)
    return merged.t() if transposed else merged


class LowRank(SinglePrecision):
    """The trained part of a layer whose weight is frozen; fp32 whatever the dtype of the weight.

    Attributes:
        A: (r, in).
        B: (out, r).

    Args:
        a, b: where A and B start; taken as they are where they are fp32.
        scale: of their product.
        transposed: whether the layer's weight is (in, out), as Conv1D's.
    """

    def __init__(self, a: Tensor, b: Tensor, scale: float, transposed: bool = False) -> None:
        super().__init__()
        self.A, self.B = (nn.Parameter(value.detach().float()) for value in (a, b))
        self.scale, self.transposed = scale, transposed

    def merged(self, weight: Tensor) -> Tensor:
        """The weight with what was learned, differentiable; shape and dtype of `weight`."""
        return merge(weight, self.A, self.B, self.scale, self.transposed)

    def extra_repr(self) -> str:
        return f"rank={self.A.shape[0]}, scale={self.scale:g}"
