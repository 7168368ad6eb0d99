"""The pure functions on one block of rows after the other.

On the whole of a large tensor every one of their passes goes through main memory and every temporary is a fresh page
fault; on a block that fits the cache both costs vanish.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from geta_hf.quantization.kernels.kernel import Gradients, Kernel

BLOCK = 2**16  # elements; 256 kB in fp32, so that a few temporaries stay in a core's L2


def blocked(eager: Kernel) -> Kernel:
    """The kernel that runs `eager` block by block."""

    def quantize(x: Tensor, d: Tensor, q_m: Tensor, t: Tensor | None) -> Tensor:
        out = torch.empty_like(x)
        for part, *block in _blocks(out, x, d, q_m, t):
            part.copy_(eager.quantize(*block))
        return out

    def gradients(grad: Tensor, x: Tensor, d: Tensor, q_m: Tensor, t: Tensor | None) -> Gradients:
        grad_x, sums = torch.empty_like(x), []
        for part, *block in _blocks(grad_x, grad, x, d, q_m, t):
            inner, *others = eager.gradients(*block)
            part.copy_(inner)
            sums.append(others)
        grad_d, grad_q, grad_t = (
            _join(parts, value, x) for parts, value in zip(zip(*sums, strict=True), (d, q_m, t), strict=True)
        )
        return grad_x, grad_d, grad_q, None if t is None else grad_t

    def straight_through(grad: Tensor, x: Tensor, q_m: Tensor) -> Tensor:
        grad_x = torch.empty_like(x)
        for part, *block in _blocks(grad_x, grad, x, q_m):
            part.copy_(eager.straight_through(*block))
        return grad_x

    return Kernel("blocked", quantize, gradients, straight_through)


def _blocks(out: Tensor, *values: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """(out, *values) cut along dim 0 into blocks; what is broadcast along it comes whole with each."""
    if out.dim() == 0:
        return iter([(out, *values)])
    rows = max(1, BLOCK * out.shape[0] // max(1, out.numel()))
    cuts = (repeat(value) if value is None or not _has_rows(value, out) else value.split(rows) for value in values)
    return zip(out.split(rows), *cuts, strict=False)


def _has_rows(value: Tensor, x: Tensor) -> bool:
    return value.dim() == x.dim() and value.shape[0] == x.shape[0] > 1


def _join(parts: Sequence[Tensor], value: Tensor | None, x: Tensor) -> Any:
    """Gradients of the blocks, side by side where `value` was cut, else summed."""
    if value is None:
        return None
    return torch.cat(list(parts)) if _has_rows(value, x) else torch.stack(list(parts)).sum(0)
