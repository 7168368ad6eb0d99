"""Run the pure functions through torch.compile: one pass over memory forward, one backward.

Compiling takes seconds to tens of seconds in a process's first step, less where inductor's cache on disk has it. Where
there is no C++ compiler, or torch.compile fails for another reason, the blocked kernel takes over.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from geta_hf.quantization.kernels.kernel import Gradients, Kernel

logger = logging.getLogger(__name__)


def compiled(eager: Kernel, otherwise: Kernel) -> Kernel:
    """Return the kernel that runs `eager` compiled, or `otherwise` once compiling has failed."""
    run_quantize = Attempt(eager.quantize, otherwise.quantize)
    run_gradients = Attempt(eager.gradients, otherwise.gradients)
    run_straight_through = Attempt(eager.straight_through, otherwise.straight_through)

    def quantize(x: Tensor, d: Tensor, q_m: Tensor, t: Tensor | None) -> Tensor:
        return run_quantize(_flat(x, d, q_m), d, q_m, t).view(x.shape)

    def gradients(grad: Tensor, x: Tensor, d: Tensor, q_m: Tensor, t: Tensor | None) -> Gradients:
        grad_x, *others = run_gradients(_flat(grad, d, q_m), _flat(x, d, q_m), d, q_m, t)
        return grad_x.view(x.shape), *others

    def straight_through(grad: Tensor, x: Tensor, q_m: Tensor) -> Tensor:
        return run_straight_through(_flat(grad, q_m), _flat(x, q_m), q_m).view(x.shape)

    return Kernel("compiled", quantize, gradients, straight_through)


def _flat(x: Tensor, *scales: Tensor) -> Tensor:
    """Return x contiguous, and as a vector where one quantizer serves it all: one compilation then fits all shapes."""
    x = x.detach().contiguous()
    return x.view(-1) if all(scale.numel() == 1 for scale in scales) else x


class Attempt:
    """A compiled function, or another one from the moment that it turns out not to compile."""

    broken = False  # of the class: where one function does not compile, no other will

    def __init__(self, function: Callable[..., Any], otherwise: Callable[..., Any]) -> None:
        self.function, self.otherwise = function, otherwise
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Tensor | None) -> Any:
        # The backward pass is written by hand, so the compiler must not trace one.
        args = tuple(value if value is None else value.detach() for value in args)
        if self.compiled is not None:
            return self.compiled(*args)
        return self.otherwise(*args) if self.broken else self._try(args)

    def _try(self, args: tuple[Tensor | None, ...]) -> Any:
        # Run first, so that an error in the arguments is raised as such and not taken for a failure to compile.
        expected = self.otherwise(*args)
        logger.info("compiling the quantizer's kernels; GETA_KERNEL=blocked avoids it")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecations inside torch's own compiler
                # dynamic, since a model has many sizes of weights, and each would be compiled by itself otherwise.
                function = torch.compile(self.function, dynamic=True)
                result = function(*args)
        except Exception as error:  # a broken toolchain can raise anything
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            warnings.warn(f"torch.compile failed ({reason}); quantizers take a slower path", stacklevel=2)
            Attempt.broken = True
            return expected
        self.compiled = function
        return result
