"""Which group every index of every cut dimension leaves with: the pruning space as a few vectors.

Groups are numbered over all families, in their order. One vector an entry of `find_cuts` then serves all families at
once, so that nothing in a step loops over groups or families.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geta_hf.qadg.space import Family


@dataclass(frozen=True)
class Cut:
    """One dimension of one tensor that groups cut.

    Attributes:
        tensor: its name.
        dim: the dimension.
        label: int64, shape (size of the dimension,), on CPU: the group that an index leaves with; the number of all
            groups where it leaves with none.
    """

    tensor: str
    dim: int
    label: Tensor


def family_starts(families: Sequence[Family]) -> list[int]:
    """The number of each family's first group."""
    starts, count = [], 0
    for family in families:
        starts.append(count)
        count += family.size
    return starts


def family_of_group(families: Sequence[Family]) -> Tensor:
    """int64, shape (groups,): the family that each group belongs to."""
    sizes = torch.tensor([family.size for family in families], dtype=torch.int64)
    return torch.repeat_interleave(torch.arange(len(families)), sizes)


def find_cuts(families: Sequence[Family], shapes: Mapping[str, Sequence[int]]) -> tuple[Cut, ...]:
    """Every (tensor, dim) that a family cuts, once.

    Args:
        families: those that may lose groups; no two of them cut the same indices.
        shapes: full shapes of the tensors that they name.
    """
    groups = sum(family.size for family in families)
    labels: dict[tuple[str, int], Tensor] = {}
    for start, family in zip(family_starts(families), families, strict=True):
        for member in family.members:
            size = shapes[member.tensor][member.dim]
            label = labels.setdefault((member.tensor, member.dim), torch.full((size,), groups))
            numbers = torch.arange(start, start + family.size)[:, None].expand_as(member.index)
            label[member.index.flatten()] = numbers.flatten()
    return tuple(Cut(tensor, dim, label) for (tensor, dim), label in labels.items())


def marked(label: Tensor, mask: Tensor) -> Tensor:
    """bool, shape of `label`: which indices leave with a group of `mask`, bool (groups,), both on CPU."""
    return torch.cat([mask, torch.zeros(1, dtype=torch.bool)])[label]
