"""Label every index of every cut dimension with its group: the pruning space as a few vectors.

Groups are numbered over all families, in their order. With two families of 2 and 3 groups, groups 0 and 1 belong to the
first and 2 to 4 to the second, and 5 labels an index that belongs to no group. One vector for each (tensor, dim) then
serves all families at once: a score for each group takes one operator, and no training step loops over groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from geta_hf.qadg.group_types import Family
from geta_hf.utils.label_sums import LabelSums


@dataclass(frozen=True)
class GroupLabels:
    """One dimension of one tensor that groups cut.

    Attributes:
        tensor: its name.
        dim: the dimension.
        label: int64, shape (size of the dimension,), on CPU: the group that an index is removed with; the number of
            all groups where it is removed with none.
    """

    tensor: str
    dim: int
    label: Tensor
    _sums: dict[tuple[torch.device, int, int], LabelSums] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def sums(self, device: torch.device, start: int = 0, stop: int | None = None) -> LabelSums:
        """Return what adds up values on a device by group, for indices from `start` to `stop`; by default for all."""
        end = len(self.label) if stop is None else stop
        if (device, start, end) not in self._sums:
            self._sums[device, start, end] = LabelSums(self.label[start:end], device)
        return self._sums[device, start, end]


def family_starts(families: Sequence[Family]) -> list[int]:
    """Return the number of each family's first group."""
    starts = []
    count = 0
    for family in families:
        starts.append(count)
        count += family.size
    return starts


def family_of_group(families: Sequence[Family]) -> Tensor:
    """Return the position of the family that each group belongs to; int64, shape (groups,)."""
    sizes = torch.tensor([family.size for family in families], dtype=torch.int64)
    return torch.repeat_interleave(torch.arange(len(families)), sizes)


def find_group_labels(families: Sequence[Family], shapes: Mapping[str, Sequence[int]]) -> tuple[GroupLabels, ...]:
    """Find every (tensor, dim) that families cut, each once, with the group of every index.

    Args:
        families: those that may lose groups; no two of them cut the same indices.
        shapes: full shapes of the tensors that they name.

    Returns:
        In the order in which the families name them.
    """
    groups = sum(family.size for family in families)
    labels: dict[tuple[str, int], Tensor] = {}
    for start, family in zip(family_starts(families), families, strict=True):
        for member in family.members:
            size = shapes[member.tensor][member.dim]
            # `groups` is no group's number: indices that keep it are removed with none.
            label = labels.setdefault((member.tensor, member.dim), torch.full((size,), groups))
            numbers = torch.arange(start, start + family.size)[:, None].expand_as(member.index)
            # Members of different families share one vector where they cut one dim, such as q, k and v of a fused
            # weight.
            label[member.index.flatten()] = numbers.flatten()
    return tuple(GroupLabels(tensor, dim, label) for (tensor, dim), label in labels.items())


def consumers(families: Sequence[Family]) -> tuple[Family, ...]:
    """Return the families with the slices alone that read a group's output; with all of them where none does."""
    found = []
    for family in families:
        reading = tuple(member for member in family.members if member.consumer)
        found.append(replace(family, members=reading or family.members))
    return tuple(found)


def marked(label: Tensor, mask: Tensor) -> Tensor:
    """Return which indices are removed with a group of `mask`; bool, shape of `label`, on CPU.

    Args:
        label: of a `GroupLabels`.
        mask: bool, shape (groups,), on CPU: True for removed groups.
    """
    # One entry more, for the label of indices that belong to no group.
    return torch.cat([mask, torch.zeros(1, dtype=torch.bool)])[label]
