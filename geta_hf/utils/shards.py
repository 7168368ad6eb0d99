"""Find the part of a parameter that this process holds, and reduce small vectors over all processes.

Under FSDP2 a parameter is a DTensor of which each process has some rows. Methods work on these rows and add small
vectors up over the processes that share the parameter. A parameter that is no DTensor is complete in every process.
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
    """The indices of one dim that this process holds of a tensor.

    Attributes:
        dim: the dim along which the tensor is split.
        start, stop: the indices held here, stop not included; equal where this process holds none.
        group: the processes that hold the parts of the tensor.
    """

    dim: int
    start: int
    stop: int
    group: dist.ProcessGroup

    def part(self, vector: Tensor, dim: int) -> Tensor:
        """Return the part of a vector along dim `dim` of the full tensor that belongs to the indices held here."""
        return vector[self.start : self.stop] if dim == self.dim else vector


def local(tensor: Tensor) -> Tensor:
    """Return the values of a tensor that are held here; writing into them writes into the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_of(tensor: Tensor, name: str = "a parameter") -> Shard | None:
    """Return how a tensor is split over processes; None if this process has all of it.

    Args:
        tensor: a DTensor or any other tensor.
        name: what to call it in an error.

    Raises:
        GETAError: it is split along more than one dim, or holds partial sums, as under tensor parallelism.
    """
    if not isinstance(tensor, DTensor):
        return None
    split = [(axis, p) for axis, p in enumerate(tensor.placements) if not isinstance(p, Replicate)]
    if not split:
        return None
    axis, placement = split[0]
    if len(split) > 1 or not isinstance(placement, ShardPlacement):
        raise GETAError(f"{name} is split as {tensor.placements}; train with FSDP2, which splits along one dimension")
    mesh = tensor.device_mesh
    size = tensor.shape[placement.dim]
    # As torch.chunk splits: parts of the same size, rounded up, so the last ones may be shorter or empty.
    chunk = -(-size // mesh.size(axis))
    start = min(mesh.get_local_rank(axis) * chunk, size)
    return Shard(placement.dim, start, min(start + chunk, size), mesh.get_group(axis))


def add_up(vector: Tensor, shard: Shard | None) -> Tensor:
    """Sum a vector over the processes that share the tensor it was computed from, in place, and return it.

    The sum runs on the device; the host does not wait for it.

    Args:
        vector: of the same shape in each of these processes.
        shard: of that tensor; None leaves the vector unchanged.
    """
    if shard is not None:
        dist.all_reduce(vector, group=shard.group)
    return vector


def largest_of(value: Tensor, shard: Shard | None) -> Tensor:
    """Take the maximum of a value over the processes that share a tensor, in place, as `add_up` takes the sum."""
    if shard is not None:
        dist.all_reduce(value, dist.ReduceOp.MAX, group=shard.group)
    return value


def over_processes(vector: Tensor, largest: bool = False) -> Tensor:
    """Return the sum of a vector over all processes, or the largest of each element; itself where there is one process.

    All processes have to call this.

    Args:
        vector: of the same shape in every process, finite or infinite.
        largest: take the maximum in place of the sum. Default False.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return vector
    shared = _sendable(vector).clone()
    dist.all_reduce(shared, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return shared.to(vector.device)


def from_first_process(vector: Tensor) -> Tensor:
    """Return the first process's values in every process.

    Sums may differ in their last digit from process to process, and a choice that depends on such a digit, such as
    which group is removed, would make the processes disagree from then on.

    Args:
        vector: of the same shape in every process.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return vector
    shared = _sendable(vector)
    dist.broadcast(shared, src=0)
    return shared.to(vector.device)


def _sendable(vector: Tensor) -> Tensor:
    """Return a vector where processes exchange it from: NCCL sends from GPUs only, gloo from the CPU."""
    device = None if dist.get_backend() == "gloo" else torch.accelerator.current_accelerator()
    return vector.to(device or "cpu")
