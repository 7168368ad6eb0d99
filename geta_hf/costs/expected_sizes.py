"""Count what a model is expected to cost under probabilities: a differentiable twin of the `Ledger`.

A group remains with a probability, and a weight has each width with one. Sizes multiply expectations, so they are exact
once all probabilities are 0 or 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from geta_hf.costs.hardware import Expected
from geta_hf.costs.ledger import Ledger
from geta_hf.costs.targets import BOPS, BYTES, GROUPS, MEAN_BITS, PARAMETERS
from geta_hf.qadg.group_labels import family_of_group
from geta_hf.qadg.group_types import Family
from geta_hf.quantization.functional import FLOAT_BITS

_WHOLE = 1e-2
"""How far from an integer a number of rows may be, and still count as it: its product with a share is rounded."""


class ExpectedSizes:
    """The ledger's sizes as a few matrices, so that one step of a search takes a few operators.

    Args:
        families: those that may lose groups, in the order of the ledger's groups.
        ledger: sizes of the model.
        quantized_inputs: whether each layer of the file stores the step size of its input.
    """

    def __init__(self, families: Sequence[Family], ledger: Ledger, quantized_inputs: bool = False) -> None:
        self.ledger = ledger
        self._family = family_of_group(families)
        self._families = len(families)
        owner = torch.cat([self._family, torch.tensor([len(families)])])
        tensors = list(ledger.shapes)
        number = {name: position for position, name in enumerate(tensors)}
        slots: dict[str, list[int]] = {}
        self.slot_of: dict[tuple[str, int], int] = {}
        per_group = torch.zeros(len(ledger.labels), len(families))
        fixed = torch.zeros(len(ledger.labels))
        for slot, cut in enumerate(ledger.labels):
            counts = torch.bincount(owner[cut.label], minlength=len(families) + 1)
            fixed[slot] = float(counts[-1])
            for own in torch.nonzero(counts[:-1]).flatten().tolist():
                per_group[slot, own] = float(counts[own]) / families[own].size
            slots.setdefault(cut.tensor, []).append(slot)
            self.slot_of[cut.tensor, cut.dim] = slot
        self._per_group, self._fixed = per_group, fixed
        # Dims that nothing cuts, and a table of the others, filled up with a last slot that is always 1.
        width = max((len(own) for own in slots.values()), default=1)
        self._table = torch.full((len(tensors), width), len(ledger.labels))
        self._uncut = torch.ones(len(tensors))
        for name, position in number.items():
            own = slots.get(name, [])
            self._table[position, : len(own)] = torch.tensor(own, dtype=torch.int64)
            dims = {ledger.labels[slot].dim for slot in own}
            self._uncut[position] = float(math.prod(n for dim, n in enumerate(ledger.shapes[name]) if dim not in dims))
        self._layer = torch.tensor([number[layer.weight] for layer in ledger.layers], dtype=torch.int64)
        self._uses = torch.tensor([layer.uses for layer in ledger.layers])
        counted = [name in slots and name not in ledger.buffers for name in tensors]
        self._counted = torch.tensor(counted, dtype=torch.float32)
        self._set_bytes(tensors, quantized_inputs)
        nothing = torch.ones(ledger.groups)
        self._dense_macs = float((self.weights(nothing) * self._uses).sum()) + ledger.dropped
        everything = self.elements(torch.zeros(ledger.groups))
        self._unprunable = float((everything * self._counted).sum())

    def _set_bytes(self, tensors: Sequence[str], quantized_inputs: bool) -> None:
        """Set what an element of each tensor takes, and an index of each slot with a step size of its own."""
        ledger = self.ledger
        packed = {layer.weight for layer in ledger.layers}
        item = torch.zeros(len(tensors))
        scales = torch.zeros(len(ledger.labels))
        scaled = [(layer.weight, layer.channel_dim) for layer in ledger.layers if layer.channel_dim is not None]
        for name, dim in (*scaled, *((name, 0) for name, rows in ledger.rounded.items() if not rows.blocks)):
            slot = self.slot_of.get((name, dim))
            if slot is not None:
                scales[slot] += 4.0
        for position, name in enumerate(tensors):
            if name in ledger.rounded:
                item[position] = ledger.rounded[name].element_bytes
            elif name not in packed:
                item[position] = float(ledger.item_bytes.get(name, 0))
        self._item, self._scales = item, scales
        self._constant_bytes = 0.0
        if ledger.item_bytes:
            # The rest, such as the header, and step sizes along dims that nothing cuts, hardly depends on choices.
            bits = 8.0
            everyone = torch.full((len(ledger.layers),), bits)
            full = ledger.stored_bytes(ledger.nothing, bits, quantized_inputs)
            self._constant_bytes = full - float(self._bytes(torch.ones(ledger.groups), everyone))

    def to(self, device: torch.device) -> None:
        """Bring everything to where the probabilities are."""
        if self._fixed.device == device:
            return
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))

    # --- sizes --------------------------------------------------------------------------------------------------------

    def remaining(self, keep: Tensor) -> Tensor:
        """Return the expected size of every dim that groups cut, shape (slots,).

        Args:
            keep: the probability that each group remains, shape (groups,).
        """
        by_family = keep.new_zeros(self._families).index_add(0, self._family, keep)
        return self._fixed.to(keep.dtype) + self._per_group.to(keep.dtype) @ by_family

    def elements(self, keep: Tensor) -> Tensor:
        """Return the expected elements of every tensor of the ledger, shape (tensors,)."""
        sizes = torch.cat([self.remaining(keep), keep.new_ones(1)])
        return self._uncut * sizes[self._table].prod(1)

    def weights(self, keep: Tensor) -> Tensor:
        """Return the expected elements of every quantized weight, shape (layers,)."""
        return self.elements(keep)[self._layer]

    def amount(self, unit: str, keep: Tensor, bits: Tensor, input_bits: Tensor | float = FLOAT_BITS) -> Tensor:
        """Return how much of a unit of `costs.targets` is expected to remain, 0-d.

        Args:
            unit: GROUPS, PARAMETERS, BOPS, BYTES or MEAN_BITS.
            keep: the probability that each group remains, shape (groups,).
            bits: the expected width of every quantized weight, shape (layers,).
            input_bits: the width of the layers' inputs, or of each one's, shape (layers,). Default: float.
        """
        if unit == GROUPS:
            return keep.sum()
        if unit == PARAMETERS:
            return (self.elements(keep) * self._counted).sum() - self._unprunable
        if unit == BYTES:
            return self._bytes(keep, bits) + self._constant_bytes
        weights = self.weights(keep)
        if unit == BOPS:
            return (weights * self._uses * bits * input_bits).sum() / (self._dense_macs * FLOAT_BITS**2)
        assert unit == MEAN_BITS
        return (weights * bits).sum() / weights.sum()

    def _bytes(self, keep: Tensor, bits: Tensor) -> Tensor:
        elements = self.elements(keep)
        packed = (elements[self._layer] * bits).sum() / 8
        return packed + (elements * self._item).sum() + (self.remaining(keep) * self._scales).sum()

    def of_layers(
        self, keep: Tensor, shares: Tensor, widths: Sequence[int], output_dims: Mapping[str, int]
    ) -> list[Expected]:
        """Return what is expected of each quantized weight, as hardware costs take it.

        Widths share the outputs of a weight, or its inputs where these have the step sizes.

        Args:
            keep: the probability that each group remains, shape (groups,).
            shares: the probability of each width, shape (layers, widths).
            widths: the widths.
            output_dims: weight name -> the dim of its outputs; 0 where it is not named. Inputs are the dim 1, or 0.
        """
        remaining = self.remaining(keep)
        parted, others = [], []
        by_input = []
        for layer in self.ledger.layers:
            outputs = output_dims.get(layer.weight, 0)
            by_input.append(layer.channel_dim == 1 - outputs)
            dim = 1 - outputs if by_input[-1] else outputs
            parted.append(self._side(layer.weight, dim, remaining))
            others.append(self._side(layer.weight, 1 - dim, remaining))
        if not parted:
            return []
        at_width = _whole(torch.stack(parted)[:, None] * shares)
        at_all = _whole(torch.stack(others))
        return [
            Expected(rest.expand(len(widths)), own, widths) if columns else Expected(own, rest, widths)
            for own, rest, columns in zip(at_width, at_all, by_input, strict=True)
        ]

    def _side(self, weight: str, dim: int, remaining: Tensor) -> Tensor:
        """Return the expected size of a dim of a weight, 0-d."""
        slot = self.slot_of.get((weight, dim))
        if slot is None:
            return remaining.new_full((), float(self.ledger.shapes[weight][dim]))
        return remaining[slot]


def _whole(numbers: Tensor) -> Tensor:
    """Return numbers that are next to an integer as that integer, with the gradient of the numbers themselves.

    Tiles are counted in full, so a rounding error above 32 outputs would be one more of them.
    """
    exact = numbers.detach()
    missing = exact.round() - exact
    return numbers + torch.where(missing.abs() < _WHOLE, missing, 0.0)
