"""Choose the kernel for each tensor.

| kernel | where | what |
|---|---|---|
| eager | anywhere | the pure functions; torch.compile, tracing and tensor subclasses see these |
| blocked | CPU | the pure functions on one block after another, so that temporaries fit the cache |
| compiled | CPU, large tensors | the pure functions through torch.compile; needs a C++ compiler |
| triton | CUDA and ROCm | one pass forward, one pass backward |
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from geta_hf.errors import GETAError
from geta_hf.quantization.kernels.blocked import BLOCK, blocked
from geta_hf.quantization.kernels.compiled import compiled
from geta_hf.quantization.kernels.kernel import Kernel
from geta_hf.utils.gpu import runs_triton

NAMES = ("eager", "blocked", "compiled", "triton")
_VARIABLE = "GETA_KERNEL"
# Compiling takes about 10 s where nothing is cached, which pays only where the tensors, and so the steps, are large.
COMPILE_FROM = 2**17
_forced: list[str] = []
_outlines: list[Kernel] = []


def choose(x: Tensor, eager: Kernel) -> Kernel:
    """Return the kernel for x.

    Args:
        x: the tensor to quantize.
        eager: the pure functions, from which the other kernels are made.

    Raises:
        GETAError: the environment variable GETA_KERNEL names no kernel.
    """
    if _outlines:
        return _outlines[-1]
    if must_stay_plain(x):
        return eager
    return _make(_wanted() or _fastest(x), eager)


@contextmanager
def using(name: str) -> Iterator[None]:
    """Force one of `NAMES` for every forward inside, and for their backwards.

    It takes precedence over the environment variable GETA_KERNEL, which does the same.

    Raises:
        GETAError: there is no such kernel.
    """
    _forced.append(_known(name))
    try:
        yield
    finally:
        _forced.pop()


@contextmanager
def outlined(kernel: Kernel) -> Iterator[None]:
    """Force `kernel` for every forward inside, even on tensors without data, as is needed to count memory."""
    _outlines.append(kernel)
    try:
        yield
    finally:
        _outlines.pop()


def must_stay_plain(*tensors: Tensor) -> bool:
    """Return whether only ordinary operators will do, because something reads them or a tensor is no plain data.

    Readers are torch.compile and every dispatch mode, such as tracing. Not plain data are meta and fake tensors,
    distributed ones and every other subclass.
    """
    if _outlines:
        return False
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return True
    # By exact type: a DTensor's rows are read through its own operators only.
    return any(type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta for x in tensors)


def _wanted() -> str | None:
    if _forced:
        return _forced[-1]
    return _known(os.environ[_VARIABLE]) if os.environ.get(_VARIABLE) else None


def _known(name: str) -> str:
    if name not in NAMES:
        raise GETAError(f"there is no kernel {name!r} (using() or {_VARIABLE}); choose one of {', '.join(NAMES)}")
    return name


def _fastest(x: Tensor) -> str:
    if x.is_cuda:
        return "triton" if runs_triton(x.device) else "eager"
    # One block gains nothing from being a block.
    if x.device.type != "cpu" or x.numel() <= BLOCK:
        return "eager"
    return "compiled" if x.numel() >= COMPILE_FROM else "blocked"


@cache
def _make(name: str, eager: Kernel) -> Kernel:
    if name == "blocked":
        return blocked(eager)
    if name == "compiled":
        return compiled(eager, otherwise=blocked(eager))
    if name == "triton":
        # Imported only here, since triton is an optional dependency.
        from geta_hf.quantization.kernels.triton_quantizer import triton_kernel

        return triton_kernel(eager)
    return eager
