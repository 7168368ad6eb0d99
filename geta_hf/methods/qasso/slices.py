"""The slices of groups inside tensors: sums over them, and the redundant ones gathered and written once a step.

A group's vector [x]_g is every slice that is removed with it, in all tensors. Nothing here loops over groups: there is
one gather and one sum for each (tensor, dim). Indices are listed at a period's start; between period boundaries
nothing waits for the device. All of them are positions in what this process holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geta_hf.qadg.group_labels import GroupLabels, marked
from geta_hf.utils.label_sums import LabelSums
from geta_hf.utils.shards import Shard, add_up, local, shard_of
from geta_hf.utils.upload import upload

Named = Mapping[str, Tensor]
Product = Callable[[Tensor, Tensor], Tensor]

# --- sums over all groups ---------------------------------------------------------------------------------------------


def group_sums(labels: Sequence[GroupLabels], named: Named, groups: int, product: Product) -> Tensor:
    """Return Σ of product(x, g) over each group's slices, fp32, shape (groups,).

    Args:
        labels: the group of each index of each cut dimension.
        named: parameters by name. A parameter without a gradient counts as g = 0.
        groups: number of groups.
        product: elementwise, of a parameter and its gradient.
    """
    device = local(next(iter(named.values()))).device
    # One entry more than there are groups takes what belongs to none. Sums over shards are exchanged in one go.
    whole, split = torch.zeros(2, groups + 1, device=device)
    held: Shard | None = None
    for cut in labels:
        parameter = named[cut.tensor]
        x = local(parameter.detach())
        g = torch.zeros_like(x) if parameter.grad is None else local(parameter.grad)
        per_slice = sum_others(product(x, g).float(), cut.dim)
        shard = shard_of(parameter, cut.tensor)
        if shard is None:
            cut.sums(device).add_to(whole, per_slice)
        else:
            held_here = (shard.start, shard.stop) if cut.dim == shard.dim else (0, None)
            cut.sums(device, *held_here).add_to(split, per_slice)
            held = shard
    return (whole + add_up(split, held))[:groups]


def sum_others(values: Tensor, dim: int) -> Tensor:
    """Return Σ over all dimensions but one, shape (size of it,)."""
    # A vector has no other dimension, and `sum([])` would run over all of it.
    others = [other for other in range(values.dim()) if other != dim]
    return values.sum(others) if others else values


# --- the slices of some groups ----------------------------------------------------------------------------------------


@dataclass
class Slice:
    """The part of one (tensor, dim) that belongs to some groups: where it is, and what is remembered of it.

    Attributes:
        tensor, dim: the tensor, and the dimension along which it is cut.
        index: int64, shape (indices,): positions along `dim` of what this process holds.
        family: int64, shape (indices,): the family that each position belongs to.
        families: all families that cut here, on every process alike.
        by_family: adds up values along `index` by family.
        shard: how the tensor is split over processes.
        x, grad: the values and gradients before the base step.
        keep: 0 at `index` and 1 elsewhere along `dim`; made when it is first needed.
    """

    tensor: str
    dim: int
    index: Tensor
    family: Tensor
    families: list[int]
    by_family: LabelSums
    shard: Shard | None = None
    x: Tensor | None = None
    grad: Tensor | None = None
    keep: Tensor | None = None

    def read(self, tensor: Tensor) -> Tensor:
        """Return a copy of the slice of a tensor that is split as the parameter is."""
        if self.dim == 0:
            return tensor.index_select(0, self.index)
        return tensor.gather(self.dim, self._expanded_index(tensor))  # several times faster than index_select there

    def write(self, tensor: Tensor, value: Tensor) -> None:
        """Write the slice of such a tensor, in place."""
        if self.dim == 0:
            tensor.index_copy_(0, self.index, value)
        else:
            tensor.scatter_(self.dim, self._expanded_index(tensor), value)

    def clear(self, tensor: Tensor) -> None:
        """Set the slice of such a tensor to zero, in place."""
        if self.dim == 0:
            tensor.index_fill_(0, self.index, 0)
            return
        # This runs at every step until the end of training, and one multiplication is faster than a scatter of columns.
        if self.keep is None or self.keep.dtype != tensor.dtype:
            ones = torch.ones(tensor.shape[self.dim], dtype=tensor.dtype, device=tensor.device)
            self.keep = ones.index_fill_(0, self.index, 0)
        tensor.mul_(self.along(self.keep, tensor.dim()))

    def multiply(self, tensor: Tensor, factor: float) -> None:
        """Multiply the slice of such a tensor, in place; all else keeps its bits."""
        if self.dim == 0:
            tensor.index_copy_(0, self.index, tensor.index_select(0, self.index) * factor)
            return
        ones = torch.ones(tensor.shape[self.dim], dtype=tensor.dtype, device=tensor.device)
        tensor.mul_(self.along(ones.index_fill_(0, self.index, factor), tensor.dim()))

    def _expanded_index(self, tensor: Tensor) -> Tensor:
        """Return the index, repeated along all other dimensions without a copy."""
        shape = list(tensor.shape)
        shape[self.dim] = len(self.index)
        return self.along(self.index, tensor.dim()).expand(shape)

    def along(self, vector: Tensor, dims: int) -> Tensor:
        """Return a vector over `index`, shaped to multiply the slice of a tensor with `dims` dimensions."""
        shape = [1] * dims
        shape[self.dim] = -1
        return vector.view(shape)

    def inside(self, value: Tensor) -> Tensor:
        """Return the part of a factor of the full tensor that is a factor of the slice."""
        # A factor of one entry serves the entire weight; one with an entry for each channel runs along a dimension.
        if self.shard is not None and value.dim() > 1 and value.shape[self.shard.dim] > 1:
            value = value.narrow(self.shard.dim, self.shard.start, self.shard.stop - self.shard.start)
        if value.dim() > 1 and value.shape[self.dim] > 1:
            value = value.index_select(self.dim, self.index)
        return value

    def inside_blocks(self, table: Tensor, block: Tensor, out: int) -> Tensor:
        """Return a factor of the slice of a matrix, from what each block of an output's inputs is multiplied by.

        Args:
            table: shape (outputs, blocks) of the full tensor.
            block: int64, shape (inputs,): the block of each input.
            out: the dim of the tensor that outputs run along.
        """
        # Cut before values are spread over the inputs, which makes them as many as the elements.
        values = self._positions(table, out)[:, self._positions(block, 1 - out)]
        return values.t() if out else values

    def _positions(self, values: Tensor, dim: int) -> Tensor:
        """Return those of the values along dimension `dim` of the full tensor that belong to the slice."""
        if self.shard is not None:
            values = self.shard.part(values, dim)
        return values.index_select(0, self.index) if dim == self.dim else values


def build_slices(labels: Sequence[GroupLabels], mask: Tensor, family: Tensor, named: Named) -> list[Slice]:
    """Return the slices of the masked groups, one for each (tensor, dim) that has any.

    Args:
        labels: the group of each index of each cut dimension.
        mask: bool, shape (groups,), on CPU.
        family: int64, shape (groups,), on CPU: each group's family.
        named: parameters by name.
    """
    found = []
    for cut in labels:
        parameter = named[cut.tensor]
        shard = shard_of(parameter, cut.tensor)
        # All of this is counted on the CPU, which is why slices are listed at period boundaries and not in every step.
        label = cut.label
        hit = marked(label, mask)
        if not bool(hit.any()):
            continue
        # Taken before the shard's part, since all processes have to agree on what they add up.
        families = family[label[hit]].unique().tolist()
        if shard is not None:
            hit = shard.part(hit, cut.dim)
            label = shard.part(label, cut.dim)
        index = torch.nonzero(hit).flatten()
        owner = family[label[index]]
        device = local(parameter).device
        sums = LabelSums(owner, device)
        index, owner = upload([index, owner], device)
        found.append(Slice(cut.tensor, cut.dim, index, owner, families, sums, shard))
    return found


def remember(slices: Sequence[Slice], named: Named, gradients: bool) -> None:
    """Keep x, and where asked for g, of every slice as they are before the base step."""
    for piece in slices:
        parameter = named[piece.tensor]
        piece.x = piece.read(local(parameter.detach()))
        if gradients:
            grad = parameter.grad
            # A parameter that this batch did not use, such as an expert's, has no gradient; it is forgotten all the
            # same.
            piece.grad = torch.zeros_like(piece.x) if grad is None else piece.read(local(grad))


def zero_slices(slices: Sequence[Slice], named: Named) -> None:
    """Set the slices of parameters to zero, in place."""
    for piece in slices:
        piece.clear(local(named[piece.tensor].detach()))


def zero_moments(slices: Sequence[Slice], named: Named, state: Mapping[Tensor, Mapping[str, Any]]) -> None:
    """Set what a base optimizer remembers of the slices to zero, in place.

    Moments in 8 or 4 bits fade by themselves and are not touched: they are codes of which 0 need not mean zero, or
    tensors of a class of their own without single elements to write to.

    Args:
        slices: of groups that have just been removed.
        named: parameters by name.
        state: of the base optimizer, by parameter.
    """
    for piece in slices:
        parameter = named[piece.tensor]
        for value in state.get(parameter, {}).values():
            # Of another shape are step counters, and Adafactor's row and column averages, which mix all groups.
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                held = local(value)
                if type(held) is Tensor and held.is_floating_point():
                    piece.clear(held)
