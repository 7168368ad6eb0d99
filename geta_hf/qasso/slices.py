"""The slices of redundant groups, gathered once a step: one index_select and one index_copy a (tensor, dim).

Indices are listed at a period's start; between period boundaries nothing here waits for the device. All of them are
positions in what this process holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geta_hf.qasso.cuts import Cut, marked
from geta_hf.qasso.shards import Shard, local, shard_of

Named = Mapping[str, Tensor]


@dataclass
class Slice:
    """The part of one cut that belongs to some groups: where it is, and what is remembered of it.

    Attributes:
        tensor, dim: what is cut.
        index: int64, positions along `dim` of what this process holds.
        family: int64, shape of index: the family that each position belongs to.
        families: all families that cut here, on every process alike.
        shard: how the tensor is split over processes.
        x, grad: the values and gradients before the base step.
    """

    tensor: str
    dim: int
    index: Tensor
    family: Tensor
    families: list[int]
    shard: Shard | None = None
    x: Tensor | None = None
    grad: Tensor | None = None

    def sums(self, value: Tensor) -> Tensor:
        """Σ of a value of the slice's shape over all but the cut dimension."""
        others = [other for other in range(value.dim()) if other != self.dim]
        return value.sum(others) if others else value

    def along(self, vector: Tensor, dims: int) -> Tensor:
        """A vector over `index`, shaped to multiply the slice."""
        shape = [1] * dims
        shape[self.dim] = -1
        return vector.view(shape)

    def inside(self, value: Tensor) -> Tensor:
        """What of a value that multiplies the whole tensor multiplies the slice."""
        if self.shard is not None and value.dim() > 1 and value.shape[self.shard.dim] > 1:
            value = value.narrow(self.shard.dim, self.shard.start, self.shard.stop - self.shard.start)
        if value.dim() > 1 and value.shape[self.dim] > 1:
            value = value.index_select(self.dim, self.index)
        return value


def build_slices(cuts: Sequence[Cut], mask: Tensor, family: Tensor, named: Named) -> list[Slice]:
    """The slices of the masked groups, one a cut that loses any.

    Args:
        cuts: labels may be on any device.
        mask: bool, shape (groups,), on CPU.
        family: int64, shape (groups,), on CPU: each group's family.
    """
    found = []
    for cut in cuts:
        parameter = named[cut.tensor]
        shard, label = shard_of(parameter, cut.tensor), cut.label.cpu()
        hit = marked(label, mask)
        if not bool(hit.any()):
            continue
        families = family[label[hit]].unique().tolist()
        if shard is not None:
            hit, label = shard.part(hit, cut.dim), shard.part(label, cut.dim)
        index, device = torch.nonzero(hit).flatten(), local(parameter).device
        owner = family[label[index]].to(device)
        found.append(Slice(cut.tensor, cut.dim, index.to(device), owner, families, shard))
    return found


def zero_slices(slices: Sequence[Slice], named: Named) -> None:
    """Set the slices of parameters to zero, in place."""
    for piece in slices:
        local(named[piece.tensor].detach()).index_fill_(piece.dim, piece.index, 0)


def remember(slices: Sequence[Slice], named: Named) -> None:
    """Keep x and g of every slice as they are before the base step."""
    for piece in slices:
        parameter = named[piece.tensor]
        piece.x = local(parameter.detach()).index_select(piece.dim, piece.index)
        grad = parameter.grad
        piece.grad = torch.zeros_like(piece.x) if grad is None else local(grad).index_select(piece.dim, piece.index)
