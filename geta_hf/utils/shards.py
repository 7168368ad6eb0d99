"""The part of a parameter that this process holds, and sums over all processes.

Under FSDP2 a parameter is a DTensor of which each process has some rows; everything in `qasso` works on these rows and
adds small vectors up over the processes that share them. A parameter that is no DTensor is whole everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as ShardPlacement

from geta_hf.errors import GETAError


@dataclass(frozen=True)
class Shard:
    """Which indices of which dimension this process holds, and who holds the others."""

    dim: int
    start: int
    stop: int
    group: dist.ProcessGroup

    def part(self, vector: Tensor, dim: int) -> Tensor:
        """What of a vector along dimension `dim` of the whole tensor belongs to the rows held here."""
        return vector[self.start : self.stop] if dim == self.dim else vector


def local(tensor: Tensor) -> Tensor:
    """The values held here; writing into them writes into the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_of(tensor: Tensor, name: str = "a parameter") -> Shard | None:
    """How a tensor is split over processes; None when it is whole here.

    Raises:
        GETAError: it is split along more than one dimension, or holds partial sums, as under tensor parallelism.
    """
    if not isinstance(tensor, DTensor):
        return None
    split = [(axis, p) for axis, p in enumerate(tensor.placements) if not isinstance(p, Replicate)]
    if not split:
        return None
    axis, placement = split[0]
    if len(split) > 1 or not isinstance(placement, ShardPlacement):
        raise GETAError(f"{name} is split as {tensor.placements}; only FSDP2's split along one dimension is supported")
    mesh, size = tensor.device_mesh, tensor.shape[placement.dim]
    chunk = -(-size // mesh.size(axis))
    start = min(mesh.get_local_rank(axis) * chunk, size)
    return Shard(placement.dim, start, min(start + chunk, size), mesh.get_group(axis))


def add_up(vector: Tensor, shard: Shard | None) -> Tensor:
    """Sum a vector over the processes that share what it was computed of, in place; nothing waits on the host."""
    if shard is not None:
        dist.all_reduce(vector, group=shard.group)
    return vector


def largest_of(value: Tensor, shard: Shard | None) -> Tensor:
    """The largest of a value over the processes that share what it was computed of, in place."""
    if shard is not None:
        dist.all_reduce(value, dist.ReduceOp.MAX, group=shard.group)
    return value


def agree(vector: Tensor) -> Tensor:
    """The first process's values on all of them, so that a last digit can't make their choices differ."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return vector
    device = None if dist.get_backend() == "gloo" else torch.accelerator.current_accelerator()
    shared = vector.to(device or "cpu")
    dist.broadcast(shared, src=0)
    return shared.to(vector.device)
