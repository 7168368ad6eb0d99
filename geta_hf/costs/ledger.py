"""The sizes of a model's tensors and of what each group takes from them, so that any cost is counted without the model.

Everything here is plain data on CPU, and is read at period boundaries only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from geta_hf.qadg.group_labels import GroupLabels, find_group_labels, marked
from geta_hf.qadg.group_types import Family
from geta_hf.quantization.functional import FLOAT_BITS
from geta_hf.quantization.maths import BLOCK, block_count

ROUNDING = 1e-9
"""A difference up to this share of an amount counts as rounding."""

Entry = tuple[str, list[int], int]
"""A tensor in a file: its type, shape and bytes."""

_HALF_BYTES = 2
BLOCK_BYTES = _HALF_BYTES / BLOCK
"""Bytes that an element adds where each block of 32 has a step size, in fp16."""

_KINDS = ("F32", "F16", "I8", "U8")
"""Types of the tensors in a file in the order in which it holds them; unpacked ones count as F32."""


@dataclass(frozen=True)
class LayerEntry:
    """A quantized weight.

    Attributes:
        weight: its name.
        uses: how often each of its elements is multiplied in one forward pass, relative to the other layers.
        channel_dim: the dimension with a step size of its own for each index; None for one step size for all.
        blocks: whether every 32 of an index's inputs, along the other dimension, have a step size of their own.
    """

    weight: str
    uses: float = 1.0
    channel_dim: int | None = None
    blocks: bool = False

    def scales(self, shape: Sequence[int]) -> Entry:
        """Return how a file holds the step sizes of a weight of this shape."""
        if self.channel_dim is None:
            return "F32", [1], 4
        return _channel_scales(shape, self.channel_dim, self.blocks)


@dataclass(frozen=True)
class RoundedRows:
    """Say how an export rounds a tensor that no method quantizes, such as the vocabulary's embedding.

    Attributes:
        bits: width of its codes.
        blocks: whether every 32 elements of a row have a step size of their own, and not each row.
    """

    bits: int
    blocks: bool = False

    def scales(self, shape: Sequence[int]) -> Entry:
        """Return how a file holds the step sizes of a tensor of this shape."""
        return _channel_scales(shape, 0, self.blocks)

    @property
    def element_bytes(self) -> float:
        """The bytes of an element, with its share of a block's step size."""
        return self.bits / 8 + (BLOCK_BYTES if self.blocks else 0.0)


def _channel_scales(shape: Sequence[int], dim: int, in_blocks: bool) -> Entry:
    """Return how a file holds a step size for each index of a dimension, or for every 32 elements of each."""
    channels = shape[dim]
    if not in_blocks:
        return "F32", [channels], 4 * channels
    blocks = block_count(shape[1 - dim])
    return "F16", [channels, blocks], _HALF_BYTES * channels * blocks


@dataclass(frozen=True)
class Ledger:
    """Sizes of all tensors of a model, and what each group takes from them.

    Attributes:
        shapes: shape of every tensor that is stored, by name; tied ones once.
        item_bytes: bytes of one element of each of them.
        labels: the group of each index of each dimension that groups cut.
        groups: number of groups.
        layers: the quantized weights.
        buffers: those of the tensors that are not parameters.
        rounded: how every other tensor that an export rounds is stored.
        stored_as: names in a file, of tensors that transformers renames or splits as it saves them: name -> the names
            and shapes of its equal pieces before anything is cut.
        dropped: elements times uses of the quantized weights in blocks that were dropped before; BOPs are relative to
            the model that still had them.
    """

    shapes: Mapping[str, tuple[int, ...]]
    labels: Sequence[GroupLabels]
    groups: int
    layers: Sequence[LayerEntry]
    item_bytes: Mapping[str, int] = field(default_factory=dict)
    buffers: Collection[str] = ()
    rounded: Mapping[str, RoundedRows] = field(default_factory=dict)
    stored_as: Mapping[str, Sequence[tuple[str, tuple[int, ...]]]] = field(default_factory=dict)
    dropped: float = 0.0

    @classmethod
    def of(
        cls,
        families: Sequence[Family],
        shapes: Mapping[str, tuple[int, ...]],
        layers: Sequence[LayerEntry],
        item_bytes: Mapping[str, int] | None = None,
        buffers: Collection[str] = (),
        rounded: Mapping[str, RoundedRows] | None = None,
    ) -> Ledger:
        """Count the groups of these families over these tensors."""
        groups = sum(family.size for family in families)
        return cls(
            shapes, find_group_labels(families, shapes), groups, layers, item_bytes or {}, buffers, rounded or {}
        )

    @classmethod
    def of_tensors(cls, families: Sequence[Family], named: Mapping[str, Tensor], weights: Sequence[str]) -> Ledger:
        """Count over these tensors and quantized weights alone, which is enough for all targets but bytes."""
        shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
        return cls.of(families, shapes, [LayerEntry(weight) for weight in weights])

    def remaining_shapes(self, removed: Tensor) -> dict[str, list[int]]:
        """Return the remaining shape of each tensor that groups cut, without those of `removed`, bool (groups,)."""
        shapes: dict[str, list[int]] = {}
        for cut in self.labels:
            shape = shapes.setdefault(cut.tensor, list(self.shapes[cut.tensor]))
            # Dims are cut independently, so two families that cut rows and columns of one tensor both count here.
            shape[cut.dim] -= int(marked(cut.label, removed).sum())
        return shapes

    def scale_bytes(self) -> int:
        """Return the bytes of all step sizes of quantized weights if no group is removed."""
        return sum(layer.scales(self.shapes[layer.weight])[2] for layer in self.layers)

    @property
    def nothing(self) -> Tensor:
        """The mask in which no group is removed, bool, shape (groups,)."""
        return torch.zeros(self.groups, dtype=torch.bool)

    def prunable_parameters(self, removed: Tensor) -> int:
        """Return the number of remaining elements that some group could still take away, buffers not counted."""
        # With all groups removed, what remains of the tensors belongs to none.
        fixed = self._cut_elements(torch.ones(self.groups, dtype=torch.bool))
        return self._cut_elements(removed) - fixed

    def _cut_elements(self, removed: Tensor) -> int:
        shapes = self.remaining_shapes(removed)
        return sum(math.prod(shape) for name, shape in shapes.items() if name not in self.buffers)

    def weights(self, removed: Tensor) -> Tensor:
        """Return the remaining elements of each quantized weight, float64, shape (layers,)."""
        shapes = self.remaining_shapes(removed)
        sizes = [math.prod(shapes.get(layer.weight, self.shapes[layer.weight])) for layer in self.layers]
        return torch.tensor(sizes, dtype=torch.float64)

    def relative_bops(self, removed: Tensor, bits: Tensor | float, input_bits: Tensor | float = FLOAT_BITS) -> float:
        """Return BOPs of the quantized layers relative to the dense model's: Σ MACs · b_w · b_a, dense 32 · 32.

        Args:
            removed: bool, shape (groups,).
            bits, input_bits: of each layer's weight and input, shape (layers,), or one number for all.
        """
        uses = torch.tensor([layer.uses for layer in self.layers], dtype=torch.float64)
        # Relative to the model before any block was dropped: otherwise dropping half of the blocks would lower nothing.
        dense = ((self.weights(self.nothing) * uses).sum() + self.dropped) * FLOAT_BITS**2
        return float((self.weights(removed) * uses * bits * input_bits).sum() / dense)

    def stored_bytes(
        self,
        removed: Tensor,
        bits: Tensor | float,
        quantized_inputs: bool = False,
        channel_bits: Mapping[str, Tensor] | None = None,
        sorted_weights: Collection[str] = (),
    ) -> int:
        """Return the bytes of an export's safetensors file: packed codes, scales, all other tensors, and its header.

        Args:
            removed: bool, shape (groups,).
            bits: integers for an exact count; a real mean width gives the size to be expected.
            quantized_inputs: whether each layer stores the step size of its input, too.
            channel_bits: name of a weight -> int64, the width of each index along its `channel_dim`, where they
                differ. Default None: nowhere.
            sorted_weights: those of them whose indices an export sorts by width; the others store a table of widths
                where these do not ascend. Default none.
        """
        remaining = self.remaining_shapes(removed)
        widths = torch.as_tensor(bits, dtype=torch.float64).expand(len(self.layers)).tolist()
        packed = {layer.weight: (layer, width) for layer, width in zip(self.layers, widths, strict=True)}
        sizes: dict[str, Entry] = {}
        for name, full in self.shapes.items():
            shape = remaining.get(name, list(full))
            if name in self.rounded:
                length = math.ceil(math.prod(shape) * self.rounded[name].bits / 8)
                sizes[name] = ("U8", [length], length)
                sizes[f"{name}_scale"] = self.rounded[name].scales(shape)
                continue
            if name not in packed:
                sizes[name] = ("F32", shape, math.prod(shape) * self.item_bytes[name])
                continue
            layer, width = packed[name]
            own = None if channel_bits is None else self._remaining_bits(name, channel_bits, removed)
            if own is not None:
                length = _blocks_length(own, math.prod(shape) // max(len(own), 1))
                if name not in sorted_weights and bool((own.diff() < 0).any()):
                    sizes[f"{name}_widths"] = ("I8", [len(own)], len(own))
                sizes[name] = ("U8", [length], length)
                sizes[f"{name}_scale"] = layer.scales(shape)
                if quantized_inputs:
                    sizes[f"{name.removesuffix('weight')}input_scale"] = ("F32", [1], 4)
                continue
            # A real mean width gives a real number of bits; an integer one makes this exact.
            length = math.ceil(math.prod(shape) * width / 8)
            # Codes are packed across rows, so that only a tensor's end is padded to a byte.
            sizes[name] = ("U8", [length], length)
            sizes[f"{name}_scale"] = layer.scales(shape)
            if quantized_inputs:
                sizes[f"{name.removesuffix('weight')}input_scale"] = ("F32", [1], 4)
        return sum(size for _, _, size in sizes.values()) + _header_bytes(self._as_stored(sizes))

    def _remaining_bits(self, name: str, bits: Mapping[str, Tensor], removed: Tensor) -> Tensor | None:
        """Return the widths of the indices of a weight that remain; None where all are the same."""
        own = bits.get(name)
        if own is None:
            return None
        dim = next(layer.channel_dim for layer in self.layers if layer.weight == name)
        for cut in self.labels:
            if cut.tensor == name and cut.dim == dim:
                own = own[~marked(cut.label, removed)]
        return own

    def _as_stored(self, sizes: Mapping[str, Entry]) -> dict[str, Entry]:
        """Return the entries of a file's header; of split tensors with their shapes before any cut."""
        found: dict[str, Entry] = {}
        for name, (kind, shape, size) in sizes.items():
            # Experts that live in one tensor are stored one by one: as many names in the header, for the same bytes.
            pieces = self.stored_as.get(name, [(name, ())])
            for piece, full in pieces:
                found[piece] = (kind, shape if len(pieces) == 1 else list(full), size // len(pieces))
        return found


def _blocks_length(bits: Tensor, others: int) -> int:
    """Return the bytes of a weight's stream whose indices have these widths, with so many elements each."""
    widths, counts = bits.unique(return_counts=True)
    return sum(
        math.ceil(count * others * width / 8) for width, count in zip(widths.tolist(), counts.tolist(), strict=True)
    )


def _header_bytes(sizes: Mapping[str, Entry]) -> int:
    """Return the size of a safetensors file's length word and JSON, padded to 8 bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # As safetensors lays them out: the widest types first.
    ordered = sorted(sizes.items(), key=lambda item: (_KINDS.index(item[1][0]), item[0]))
    for name, (kind, shape, size) in ordered:
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    # To the byte, since a target in bytes is compared with the size of the file.
    return 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8
