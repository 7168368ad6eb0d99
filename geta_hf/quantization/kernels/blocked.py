"""Run the pure functions on one block of rows after another.

On a large tensor each of their passes goes through main memory and each temporary causes page faults; on a block that
fits the cache both costs vanish.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from geta_hf.quantization.kernels.kernel import Gradients, Kernel

BLOCK = 2**16  # elements; 256 kB in fp32, so that a few temporaries stay in a core's L2


def blocked(eager: Kernel) -> Kernel:
    """Return the kernel that runs `eager` block by block."""

    def quantize(x: Tensor, d: Tensor, q_m: Tensor, t: Tensor | None) -> Tensor:
        out = torch.empty_like(x)
        for part, *block in _blocks(out, x, d, q_m, t):
            part.copy_(eager.quantize(*block))
        return out

    def gradients(grad: Tensor, x: Tensor, d: Tensor, q_m: Tensor, t: Tensor | None) -> Gradients:
        grad_x = torch.empty_like(x)
        sums = []
        for part, *block in _blocks(grad_x, grad, x, d, q_m, t):
            inner, *others = eager.gradients(*block)
            part.copy_(inner)
            sums.append(others)
        of_d, of_q, of_t = zip(*sums, strict=True)
        return grad_x, _join(of_d, d, x), _join(of_q, q_m, x), _join(of_t, t, x)

    def straight_through(grad: Tensor, x: Tensor, q_m: Tensor) -> Tensor:
        grad_x = torch.empty_like(x)
        for part, *block in _blocks(grad_x, grad, x, q_m):
            part.copy_(eager.straight_through(*block))
        return grad_x

    return Kernel("blocked", quantize, gradients, straight_through)


def _blocks(out: Tensor, *values: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Split (out, *values) along dim 0 into blocks; a value that is broadcast along it comes unsplit with each."""
    if out.dim() == 0:
        return iter([(out, *values)])
    rows = max(1, BLOCK * out.shape[0] // max(1, out.numel()))
    parts: list[Iterable[Tensor | None]] = []
    for value in values:
        parts.append(repeat(value) if value is None or not _has_rows(value, out) else value.split(rows))
    return zip(out.split(rows), *parts, strict=False)  # `repeat` never ends


def _has_rows(value: Tensor, x: Tensor) -> bool:
    return value.dim() == x.dim() and value.shape[0] == x.shape[0] > 1


def _join(parts: Sequence[Tensor], value: Tensor | None, x: Tensor) -> Any:
    """Join the gradients of the blocks: side by side where `value` was split, else as their sum."""
    if value is None:
        return None
    return torch.cat(list(parts)) if _has_rows(value, x) else torch.stack(list(parts)).sum(0)
