"""Bring small tensors that were made on the CPU to where they are used, without waiting for a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return tensors on a device, in a single copy that the host does not wait for.

    Args:
        tensors: on the CPU and of one dtype, any shapes. They are not written to afterwards.
        device: where they go.
    """
    if device.type == "cpu":
        return list(tensors)
    # CUDA has read memory that is not pinned before it returns, so the joined copy may be freed at once.
    joined = torch.cat([tensor.flatten() for tensor in tensors]).to(device, non_blocking=True)
    parts = joined.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
