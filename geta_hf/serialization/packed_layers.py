"""Define packed layers: original layers whose weight is stored as b-bit codes n and used as the dense d · n.

On disk `<module>.weight` is the bit stream, uint8 and one-dimensional, and `<module>.weight_scale` the step size d,
fp32: shape (1,), or (channels,) with one for each output channel; or (channels, blocks) with one for each 32 inputs of
an output channel, fp16 where that holds them exactly. A layer whose rows or columns differ in width has one for each of
these, and its stream is that of one width after the other; see `ChannelWidths`. The name `weight` is chosen on
purpose: a reader that does not know the format finds a weight of the wrong size and fails, where under another name it
would find none and load random weights without a word.

In memory the weight is decoded once, because unpacking in every forward pass takes many times as long as the product
itself; the forward pass is then the original class's own. An embedding is different, since few of its rows are used at
a time: it keeps one byte per code and decodes the rows that are looked up. A layer that rounds its input has
`<module>.input_scale` too, see `FixedQuantizer`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from geta_hf.errors import GETAError
from geta_hf.quantization.fixed import FixedQuantizer, InputQuantizedLayer, SinglePrecision, output_dim
from geta_hf.quantization.maths import BLOCK, FOUR_LEVEL_BITS
from geta_hf.serialization.bitpack import BYTE_BITS, stream_length, unpack

WEIGHT_SCALE, INPUT_SCALE, WEIGHT_WIDTHS = "weight_scale", "input_scale", "weight_widths"
LEAVES = ("weight", WEIGHT_SCALE, INPUT_SCALE, WEIGHT_WIDTHS)
"""The tensors that a file holds of a packed layer, apart from its bias."""

BLOCKS = "block32"
"""What the key `grid` of a folder's `quantization_config` says where layers have step sizes for blocks of inputs."""

PIECE = 1 << 22
"""Elements that are decoded or compared at once: temporaries in fp32 are small next to the model, on a GPU as well."""


@dataclass(frozen=True)
class ChannelWidths:
    """The width of each index along one dim of a weight, which has a step size of its own as well.

    A file holds the codes of one width after the other, narrow ones first: of each width all indices in their order,
    row-major, and padded to a byte.

    Attributes:
        dim: of the weight; that of its outputs or of its inputs.
        bits: int8, shape (channels,), on CPU: the width of each index.
    """

    dim: int
    bits: Tensor

    @classmethod
    def contiguous(cls, dim: int, widths: Sequence[int], counts: Sequence[int]) -> ChannelWidths:
        """Return so many indices of each width, one width after the other."""
        # On the CPU by name: a model is built where all new tensors are on meta.
        values = torch.tensor(widths, dtype=torch.int8, device="cpu")
        return cls(dim, torch.repeat_interleave(values, torch.tensor(counts, device="cpu")))

    @property
    def counts(self) -> dict[int, int]:
        """How many indices have each width, ascending."""
        widths, counts = self.bits.unique(return_counts=True)
        return dict(zip(widths.tolist(), counts.tolist(), strict=True))

    @property
    def is_sorted(self) -> bool:
        """Whether widths ascend along the dim, so that counts say all."""
        return bool((self.bits.diff() >= 0).all())

    @property
    def mean(self) -> float:
        """The mean width of an element."""
        return float(self.bits.double().mean())

    def index(self, width: int) -> Tensor:
        """Return the indices of one width, int64, ascending."""
        return torch.nonzero(self.bits == width).flatten()

    def length(self, shape: Sequence[int]) -> int:
        """Return the bytes of the stream of a weight of a shape."""
        others = math.prod(shape) // max(shape[self.dim], 1)
        return sum(stream_length(count * others, width) for width, count in self.counts.items())

    def unpack(self, stream: Tensor, shape: Sequence[int], four_levels: bool = False) -> Tensor:
        """Decode a stream into codes, int8 or int16, of a shape; raise GETAError as `bitpack.unpack` does.

        Args:
            stream: uint8, one-dimensional.
            shape: of the weight.
            four_levels: whether what has 2 bits has four levels. Default False.
        """
        if stream.dtype != torch.uint8 or tuple(stream.shape) != (self.length(shape),):
            raise GETAError(
                f"codes of {', '.join(map(str, self.counts))} bits in a weight of shape {tuple(shape)} are a uint8 "
                f"stream of {self.length(shape)} bytes, not {stream.dtype} of shape {tuple(stream.shape)}"
            )
        wide = max(self.counts, default=0) > BYTE_BITS
        codes = torch.zeros(*shape, dtype=torch.int16 if wide else torch.int8, device=stream.device)
        start = 0
        for width, count in self.counts.items():
            part = [count if dim == self.dim else size for dim, size in enumerate(shape)]
            end = start + stream_length(math.prod(part), width)
            four = four_levels and width == FOUR_LEVEL_BITS
            block = unpack(stream[start:end], width, math.prod(part), four).view(part).to(codes.dtype)
            codes.index_copy_(self.dim, self.index(width).to(stream.device), block)
            start = end
        return codes

    def entry(self) -> dict[str, Any]:
        """Return what a folder's configuration says of it; where it is not sorted, a tensor says the rest."""
        return {"dim": self.dim, "widths": list(self.counts), "counts": list(self.counts.values())}


class PackedLayer(InputQuantizedLayer):
    """Mixin of every packed layer.

    Attributes:
        bits: bit width of each code, or the widest of several.
        widths: where rows or columns have a width and a step size each; None where the layer has one width.
        four_levels: whether codes of 2 bits are -3, -1, 1 and 3.
        step_size: what codes are multiplied by, fp32, shape (1,) or (channels,), or as stored, shape (channels,
            blocks); on CPU. A plain attribute and no buffer, so that no cast of the layer reaches it.
        input_quantizer: rounds the input as in training; None where the input stays in floating point.
        plain_class: class of the layer before it was packed.
        stream: the bit stream, where its codes could not be read back from the weight when it is saved; else None.
    """

    OWN: tuple[str, ...] = ("bits", "widths", "four_levels", "step_size", "stream", "plain_class")

    weight: Any  # each plain layer class declares its own type
    bits: int
    widths: ChannelWidths | None
    four_levels: bool = False
    step_size: Tensor
    input_quantizer: FixedQuantizer | None
    plain_class: type[nn.Module]
    stream: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """Return the original class's forward of the rounded input."""
        return super().forward(self.quantized_input(input))

    def extra_repr(self) -> str:
        bits = self.bits if self.widths is None else self.widths.counts
        levels = ", four levels" if self.four_levels else ""
        return f"{super().extra_repr()}, bits={bits}{levels}".removeprefix(", ")

    @property
    def integer_bits(self) -> int:
        """Bit width of the smallest symmetric integer that holds the codes: `bits`, or 3 for four levels throughout."""
        return self.bits + 1 if self.four_levels and self.bits == FOUR_LEVEL_BITS else self.bits

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """Shape of the decoded weight."""
        return tuple(self.weight.shape)

    @property
    def float_dtype(self) -> torch.dtype:
        """Type of the decoded weight."""
        return self.weight.dtype

    @property
    def in_blocks(self) -> bool:
        """Whether each 32 inputs of an output channel have a step size of their own."""
        return self.step_size.dim() == 2

    @property
    def scale_dim(self) -> int:
        """The dim of the weight that step sizes run along, where there are several and no blocks of 32 inputs."""
        return output_dim(self) if self.widths is None else self.widths.dim

    @property
    def scales_inputs(self) -> bool:
        """Whether each input, and not each output, has a step size of its own."""
        return self.widths is not None and self.widths.dim != output_dim(self)

    @property
    def mean_bits(self) -> float:
        """The mean width of a code."""
        return float(self.bits) if self.widths is None else self.widths.mean

    def stream_length(self) -> int:
        """Return the bytes of the weight's stream."""
        if self.widths is not None:
            return self.widths.length(self.dense_shape)
        return stream_length(math.prod(self.dense_shape), self.bits)

    def unpacked(self, stream: Tensor) -> Tensor:
        """Decode the weight's stream into codes of its shape; raise GETAError as `bitpack.unpack` does."""
        if self.widths is not None:
            return self.widths.unpack(stream, self.dense_shape, self.four_levels)
        return unpack(stream, self.bits, math.prod(self.dense_shape), self.four_levels).view(self.dense_shape)

    def scale(self, device: torch.device) -> Tensor:
        """Return the step size on a device, in the shape that broadcasts over the weight; not of blocks."""
        shape = [1] * len(self.dense_shape)
        shape[self.scale_dim] = -1
        return self.step_size.to(device).view(shape)

    def decoded(self, codes: Tensor) -> Tensor:
        """Return the weight d · n, fp32, of codes in the weight's shape, on their device."""
        return self._in_pieces(codes, torch.float32)

    def _in_pieces(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Return d · n in a dtype, whose temporaries, in fp32, are those of a piece."""
        weight = torch.empty_like(codes, dtype=dtype)
        for rows in self.pieces(codes):
            # Multiplied in fp32, so that each value is rounded to the dtype once.
            weight[rows] = self.decoded_rows(codes, rows)
        return weight

    def decoded_rows(self, codes: Tensor, rows: slice) -> Tensor:
        """Return some rows of the weight d · n, fp32, of all codes."""
        return codes[rows].to(torch.float32) * self._scale_of(rows, codes.device)

    def _scale_of(self, rows: slice, device: torch.device) -> Tensor:
        """Return the step sizes of some rows of the weight, fp32, broadcastable over these."""
        if self.in_blocks:
            return self._scale_of_blocks(rows, device)
        scale = self.scale(device)
        return scale if scale.shape[0] == 1 else scale[rows]

    def _scale_of_blocks(self, rows: slice, device: torch.device) -> Tensor:
        """Return a step size for each element of some rows: those of a piece alone take no memory to speak of."""
        if output_dim(self) == 0:
            return spread_blocks(self.step_size[rows].to(device), self.dense_shape[1])
        # Rows of the weight are inputs here, each in one block of all output channels.
        inputs = torch.arange(self.dense_shape[0], device=device)[rows]
        return self.step_size.to(device).float().t().index_select(0, inputs // BLOCK)

    @staticmethod
    def pieces(weight: Tensor) -> Iterator[slice]:
        """Yield slices of a weight's first dim, of `PIECE` elements or a row each."""
        rows = max(1, PIECE * weight.shape[0] // max(1, weight.numel()))
        for start in range(0, weight.shape[0], rows):
            yield slice(start, start + rows)

    def stored(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weight as this layer holds it in memory.

        Args:
            codes: integers n, in the weight's shape.
            dtype: the type that the layer computes in.
        """
        return self._in_pieces(codes, dtype)

    def finish_loading(self) -> None:
        """Finish what has to wait until the weight is assigned; called once after `stored`. Nothing by default."""

    def read_back(self, weight: Tensor) -> Tensor:
        """Return the codes, int32, of a weight as `stored` gives it, as precisely as its type allows."""
        codes = torch.empty_like(weight, dtype=torch.int32)
        for rows in self.pieces(weight):
            codes[rows] = self._rows_back(weight, rows)
        return codes

    def _rows_back(self, weight: Tensor, rows: slice) -> Tensor:
        return torch.round(weight[rows].to(torch.float32) / self._scale_of(rows, weight.device)).to(torch.int32)

    def holds(self, codes: Tensor, weight: Tensor) -> bool:
        """Return whether the codes can be read back from the weight in memory, whatever type it is cast to later.

        That holds for codes of up to 8 bits: bf16, the coarsest type, has 8 significant bits.
        """
        if not weight.is_floating_point():
            return True
        return self.bits <= BYTE_BITS and all(
            torch.equal(self._rows_back(weight, rows), codes[rows].to(torch.int32)) for rows in self.pieces(codes)
        )


def spread_blocks(step_size: Tensor, inputs: int) -> Tensor:
    """Return the step size of each weight, fp32, shape (..., inputs), from those of its blocks of 32 inputs."""
    return step_size.float().repeat_interleave(BLOCK, dim=-1)[..., :inputs]


class PackedLinear(PackedLayer, nn.Linear):
    """nn.Linear with a packed weight."""


class PackedConv1D(PackedLayer, Conv1D):
    """transformers' Conv1D with a packed weight."""


class PackedConv1d(PackedLayer, nn.Conv1d):
    """nn.Conv1d with a packed weight."""


class PackedConv2d(PackedLayer, nn.Conv2d):
    """nn.Conv2d with a packed weight."""


class PackedEmbedding(PackedLayer, nn.Embedding):
    """nn.Embedding with a packed weight that is fully decoded, as a layer that is tied to it needs."""


class _RowScale(SinglePrecision):
    """The step sizes of an embedding, on the device of the layer but always fp32."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value, persistent=False)


class PackedRows(PackedLayer, nn.Embedding):
    """nn.Embedding whose weight is its codes, int8; only the rows that are looked up are decoded.

    Its outputs are those of the decoded embedding in the type that the model was loaded or cast to.
    """

    row_scale: _RowScale
    like: Tensor  # empty; its type follows casts of the model

    @property
    def float_dtype(self) -> torch.dtype:
        return self.like.dtype

    def stored(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        # The int8 weight has no room for the type; `finish_loading` turns it into the type of a buffer.
        self.__dict__["_dtype"] = dtype
        return codes.to(torch.int8)

    def finish_loading(self) -> None:
        device = torch.device("cpu") if self.weight.is_meta else self.weight.device
        self.register_buffer("like", torch.empty(0, dtype=self.__dict__.pop("_dtype"), device=device), persistent=False)
        self.row_scale = _RowScale(self.step_size.to(device, torch.float32))

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows that `input`, integers of any shape, names; they make a new last dim."""
        scale = self.row_scale.value.to(self.weight.device)
        if self.in_blocks:
            scale = spread_blocks(scale[input], self.dense_shape[1])
        else:
            scale = scale[input].unsqueeze(-1) if scale.numel() > 1 else scale
        # Multiplied in fp32 and then cast, as in a decoded embedding, so that both give the same bits.
        return (self.weight[input].to(torch.float32) * scale).to(self.like.dtype)

    def read_back(self, weight: Tensor) -> Tensor:
        return weight.to(torch.int32)


_PACKED: dict[type[nn.Module], type[PackedLayer]] = {
    nn.Linear: PackedLinear,
    Conv1D: PackedConv1D,
    nn.Conv1d: PackedConv1d,
    nn.Conv2d: PackedConv2d,
    nn.Embedding: PackedEmbedding,
}


@cache
def _packed_class(original: Any, plain: Any) -> type[nn.Module]:
    """Return the packed class of a plain class or of a subclass of one."""
    # Cached, since two classes made for one original would not be equal.
    return _PACKED[plain] if original is plain else type(f"Packed{original.__name__}", (_PACKED[plain], original), {})


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """Return the packed layers of a model by name, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)}


def become_packed(
    name: str,
    layer: nn.Module,
    bits: int,
    tied: bool = False,
    widths: ChannelWidths | None = None,
    four_levels: bool = False,
) -> PackedLayer:
    """Switch a layer to its packed class, in place; its step size and its weight are still missing afterwards.

    Only the class changes, so the parameters keep their names and tying, and hooks remain.

    Args:
        name: path of the layer, for errors.
        layer: an nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d or nn.Embedding.
        bits: 2 to 16.
        tied: whether another layer has the same weight, so that an embedding must decode all of it. Default False.
        widths: where rows or columns differ in width; `bits` is then the widest. Default None.
        four_levels: whether its codes of 2 bits are -3, -1, 1 and 3. Default False.

    Raises:
        GETAError: the layer's class has no packed counterpart.
    """
    assert not four_levels or widths is not None or bits == FOUR_LEVEL_BITS
    original: Any = type(layer)
    plain: Any = next((plain for plain in _PACKED if isinstance(layer, plain)), None)
    if isinstance(layer, PackedLayer) or plain is None:
        names = ", ".join(plain.__name__ for plain in _PACKED)
        raise GETAError(f"{name or 'the model'} is a {original.__name__}, but only {names} can be packed")
    # A subclass may look its weight up in its own way, and max_norm writes into it.
    by_row = original is nn.Embedding and layer.max_norm is None and bits <= BYTE_BITS and not tied
    packed_class: Any = PackedRows if by_row else _packed_class(original, plain)
    layer.__class__ = packed_class
    packed: PackedLayer = layer  # type: ignore[assignment]
    packed.__dict__["plain_class"] = original
    packed.bits = bits
    packed.widths = widths
    packed.four_levels = four_levels
    packed.input_quantizer = None
    packed.stream = None
    return packed
