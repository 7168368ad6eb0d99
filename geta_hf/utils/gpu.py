"""Say what a GPU can do, so that a kernel is chosen only where it runs."""

from __future__ import annotations

import os
import shutil
import sys
from functools import cache
from importlib.util import find_spec

import torch

_TRITON = (7, 0)
_BYTE_PRODUCTS = (7, 5)
_TENSOR_CORES = (8, 0)


@cache
def has_triton() -> bool:
    """Return whether Triton is installed and can launch a kernel, for which it compiles a few lines of C."""
    if find_spec("triton") is None:
        return False
    # Images that are made for running and not for building often have no compiler. Triton for Windows brings its own.
    return sys.platform == "win32" or any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a GPU; a ROCm GPU has numbers of its own, from 9 upwards."""
    return torch.cuda.get_device_capability(device)


def runs_triton(device: torch.device) -> bool:
    """Return whether Triton's kernels run on a GPU."""
    return has_triton() and capability(device) >= _TRITON


def multiplies_bytes(device: torch.device) -> bool:
    """Return whether a GPU multiplies matrices of int8; cuBLAS refuses it on those that came before Turing."""
    return capability(device) >= _BYTE_PRODUCTS


def has_triton_tensor_cores(device: torch.device) -> bool:
    """Return whether Triton multiplies halves on tensor cores of a GPU; on those before Ampere it no longer does."""
    return capability(device) >= _TENSOR_CORES
