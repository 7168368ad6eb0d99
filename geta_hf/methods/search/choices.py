"""Which choice of a width each row or column of each quantized weight follows.

A search has one choice for a layer, for a group of the pruning space with all of its rows and columns, or for an output
row. All three are a table from the entries of the quantizers, one for each step size, to the choices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from geta_hf.costs.ledger import Ledger
from geta_hf.costs.quantizer_table import Quantizers
from geta_hf.qadg.group_labels import find_group_labels
from geta_hf.qadg.group_types import Family

Granularity = Literal["layer", "group", "row"]
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)


@dataclass
class WidthChoices:
    """The choices of widths, and what follows them.

    Attributes:
        count: number of choices.
        of_entry: int64, shape (entries,): the choice that each entry of the weights' quantizers follows.
        layer: int64, shape (entries,): the layer of each entry.
        group: int64, shape (entries,): the group that an entry's row or column is removed with, or the number of all
            groups where it is removed with none.
        by_layer: whether each layer has one choice, of its own number.
        by_group: whether all rows and columns of a group have one choice.
    """

    count: int
    of_entry: Tensor
    layer: Tensor
    group: Tensor
    by_layer: bool = False
    by_group: bool = False

    @classmethod
    def of(cls, granularity: Granularity, quantizers: Quantizers, ledger: Ledger) -> WidthChoices:
        """List the choices of a granularity, one of GRANULARITIES.

        A group's choice comes after those of the layers, which rows and columns of no group follow.
        """
        layer = quantizers.layer[quantizers.layer < quantizers.weight_layers].cpu()
        labels = {(cut.tensor, cut.dim): cut.label for cut in ledger.labels}
        group = torch.full_like(layer, ledger.groups)
        for prefix, weight in zip(quantizers.prefixes, quantizers.own_weights, strict=False):
            label = labels.get((weight, quantizers.channel_dims.get(prefix, -1)))
            if label is not None:
                group[quantizers.spans[prefix]] = label
        layers = quantizers.weight_layers
        if granularity == "row":
            return cls(len(layer), torch.arange(len(layer)), layer, group)
        if granularity == "group":
            chosen = torch.where(group < ledger.groups, layers + group, layer)
            return cls(layers + ledger.groups, chosen, layer, group, by_group=True)
        return cls(layers, layer.clone(), layer, group, by_layer=True)

    def to(self, device: torch.device) -> None:
        """Keep the tables where the choices are."""
        if self.of_entry.device != device:
            self.of_entry = self.of_entry.to(device)
            self.layer = self.layer.to(device)
            self.group = self.group.to(device)

    def by_weight(self, keep: Tensor, shares: Tensor) -> Tensor:
        """Return the share of each width among the elements that are expected to remain of each weight, differentiable.

        Args:
            keep: the probability that each group remains, shape (groups,).
            shares: the probability of each width of each choice, shape (choices, widths).

        Returns:
            Shape (layers, widths).
        """
        if self.by_layer:
            return shares
        remains = torch.cat([keep, keep.new_ones(1)])[self.group]
        # Nothing may be expected of a layer under hard samples; its widths then cost nothing.
        total = keep.new_zeros(self._layers).index_add(0, self.layer, remains).clamp_min(1e-6)
        sums = shares.new_zeros(self._layers, shares.shape[1])
        return sums.index_add(0, self.layer, remains[:, None] * shares[self.of_entry]) / total[:, None]

    def spread(self, keep: Tensor, of_layers: Tensor) -> Tensor:
        """Return what each choice has of an amount of each layer, by its share of what remains of them.

        Args:
            keep: the probability that each group remains, shape (groups,).
            of_layers: of each layer at each width, shape (layers, widths).

        Returns:
            Shape (choices, widths).
        """
        if self.by_layer:
            return of_layers
        remains = torch.cat([keep, keep.new_ones(1)])[self.group]
        total = keep.new_zeros(self._layers).index_add(0, self.layer, remains).clamp_min(1e-6)
        share = remains / total[self.layer]
        found = of_layers.new_zeros(self.count, of_layers.shape[1])
        return found.index_add(0, self.of_entry, share[:, None] * of_layers[self.layer])

    @property
    def _layers(self) -> int:
        # A weight has an entry at least, and layers are numbered in order.
        if not hasattr(self, "_counted"):
            self._counted = int(self.layer[-1]) + 1 if len(self.layer) else 0
        return self._counted


def find_by_input(
    families: Sequence[Family], shapes: Mapping[str, Sequence[int]], output_dims: Mapping[str, int]
) -> set[str]:
    """Return the weights whose columns belong to groups and whose rows do not: there a width belongs to a column.

    Args:
        families: those that may lose groups.
        shapes: of all tensors that they name.
        output_dims: name of each quantized weight -> the dim of its outputs.
    """
    cut: dict[str, set[int]] = {}
    for labels in find_group_labels(families, shapes):
        cut.setdefault(labels.tensor, set()).add(labels.dim)
    return {name for name, outputs in output_dims.items() if cut.get(name) == {1 - outputs}}


def sorted_weights(families: Collection[Family], choices: WidthChoices, quantizers: Quantizers) -> set[str]:
    """Return the weights whose rows or columns an export sorts by width, so that it needs no table of them.

    These are those whose entries are the channels of families, as `geta_hf.export.sorted_groups` has it: all tensors
    follow one order, so where each row has a choice, a family is sorted by one weight alone.
    """
    family_of: list[int] = []
    for position, family in enumerate(families):
        family_of += [position if family.kind == "channels" else -1] * family.size
    owner = torch.tensor([*family_of, -1])
    owners = {}
    ascending = {}
    for prefix, weight in zip(quantizers.prefixes, quantizers.own_weights, strict=False):
        groups = choices.group[quantizers.spans[prefix]].cpu()
        owners[weight] = set(owner[groups].tolist())
        # Gates and what they multiply may be rows of one weight, each half with all channels: then neither order helps.
        ascending[weight] = bool((groups.diff() >= 0).all())
    shared = Counter(position for found in owners.values() for position in found)
    return {
        weight
        for weight, found in owners.items()
        if len(found) == 1
        and -1 not in found
        and ascending[weight]
        and (choices.by_group or all(shared[position] == 1 for position in found))
    }
