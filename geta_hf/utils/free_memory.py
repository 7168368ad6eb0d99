"""Ask how much memory is left, and give back what a process no longer needs."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import torch


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on a device, or that the system can give without swapping; None if not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    try:
        return 1024 * int(Path("/proc/meminfo").read_text(encoding="utf-8").partition("MemAvailable:")[2].split()[0])
    except (OSError, ValueError, IndexError):
        return None


def give_back() -> None:
    """Return freed memory to the system, where the C library is glibc; elsewhere nothing happens.

    Tensors of less than 32 MB come from a heap that glibc keeps, with gaps: after many of them a process holds far more
    than it uses.
    """
    gc.collect()
    if not sys.platform.startswith("linux"):
        return
    # Other C libraries of Linux have no such function.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
