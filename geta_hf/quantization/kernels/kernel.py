"""Define a kernel: the three functions that one fake quantization needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Kernel:
    """One way to compute x^Q and its gradients; the arguments are those of `quantization.functional`.

    Attributes:
        name: one of `kernels.NAMES`.
        quantize: (x, d, q_m, t) -> x^Q.
        gradients: (grad, x, d, q_m, t) -> gradients of x, d, q_m and t.
        straight_through: (grad, x, q_m) -> gradient of x.
        four_levels: whether these are those of the grid of four levels. Default False.
    """

    name: str
    quantize: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    gradients: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Gradients]
    straight_through: Callable[[Tensor, Tensor, Tensor], Tensor]
    four_levels: bool = False
