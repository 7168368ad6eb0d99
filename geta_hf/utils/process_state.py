"""Let one thread at a time change what holds for the entire process: switches of torch, global hooks, random states.

Recording a forward pass turns fused kernels off, and torch has one switch for all threads. Two threads that each save
the switch, change it and restore it end with the changed value for good where they overlap. A lock rules that out for
everything that this package does. Other threads run on meanwhile, at most with slower kernels.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LOCK = threading.RLock()


@contextmanager
def exclusive() -> Iterator[None]:
    """Keep all other threads out of such contexts; the same thread may enter several. Also a decorator of functions."""
    with _LOCK:
        yield


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Turn off what would run as one fused operator: the fast path of transformer layers, and oneDNN's kernels.

    Must be entered under `exclusive`.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    fused = torch.backends.mkldnn.set_flags(_fp32_precision=None)[0]
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        # Not to be reset in passing: the precision that the user chose for oneDNN.
        torch.backends.mkldnn.set_flags(_enabled=False, _fp32_precision=None)
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=fused, _fp32_precision=None)
        torch.backends.mha.set_fastpath_enabled(fast)
