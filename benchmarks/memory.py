"""The highest memory that a process has held."""

from __future__ import annotations

from pathlib import Path

import torch


def peak_bytes(device: str) -> int:
    """Return the highest level of this process so far: of its memory on Linux, or of what torch allocated on a GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # Not getrusage: on Linux it starts with the highest level of the process that this one was started from.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])
