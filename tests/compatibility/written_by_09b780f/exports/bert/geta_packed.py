"""Packed layers: the original layer whose weight is stored as b-bit codes and used as the dense d * n.

On disk `<module>.weight` is the uint8 bit stream and `<module>.weight_scale` the step size d, fp32: shape (1,), or
(channels,) with one for each output channel. A reader that does not know the format meets a one-dimensional weight and
fails on its size. In memory the weight is decoded once, so the forward pass is the original class's own. An embedding
keeps its codes as one byte each and decodes the rows that are looked up. A layer that rounds its input has
`<module>.input_scale` too: see `FixedQuantizer`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .geta_errors import GETAError
from .geta_packing import BYTE_BITS
from .geta_fixed import FixedQuantizer, InputQuantizedLayer, SinglePrecision, output_dim

WEIGHT_SCALE, INPUT_SCALE = "weight_scale", "input_scale"
LEAVES = ("weight", WEIGHT_SCALE, INPUT_SCALE)
"""What a file holds of a packed layer, beside its bias."""


class PackedLayer(InputQuantizedLayer):
    """Mixin of every packed layer.

    Attributes:
        bits: width of each code.
        step_size: d, fp32, shape (1,) or (channels,), on CPU and out of reach of any cast of the layer.
        input_quantizer: rounds the input as in training; None where the input stays float.
        plain_class: what the layer was before.
        stream: the packed codes, where they could not be read back from the weight to be saved; else None.
    """

    OWN: tuple[str, ...] = ("bits", "step_size", "stream", "plain_class")

    weight: Any  # each plain layer class declares its own type
    bits: int
    step_size: Tensor
    input_quantizer: FixedQuantizer | None
    plain_class: type[nn.Module]
    stream: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """The original layer's own forward, on the rounded input."""
        return super().forward(self.quantized_input(input))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}".removeprefix(", ")

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """Shape of the decoded weight."""
        return tuple(self.weight.shape)

    @property
    def float_dtype(self) -> torch.dtype:
        """Type of the decoded weight."""
        return self.weight.dtype

    def scale(self, device: torch.device) -> Tensor:
        """The step size on a device, as it is broadcast over the weight."""
        shape = [1] * len(self.dense_shape)
        shape[output_dim(self)] = -1
        return self.step_size.to(device).view(shape)

    def decoded(self, codes: Tensor) -> Tensor:
        """The fp32 weight d * n of codes in its shape, on their device."""
        return codes.to(torch.float32) * self.scale(codes.device)

    def stored(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """What the weight is in memory, of codes in its shape; `dtype` is what the layer computes in."""
        return self.decoded(codes).to(dtype)

    def settle(self) -> None:
        """What is left to do once the weight is where it belongs."""

    def read_back(self, weight: Tensor) -> Tensor:
        """The codes, int32, that such a weight in memory stands for, as near as its type tells."""
        return torch.round(weight.to(torch.float32) / self.scale(weight.device)).to(torch.int32)

    def holds(self, codes: Tensor, weight: Tensor) -> bool:
        """Whether the codes can be read back from the weight in memory, whatever type it is cast to later."""
        if not weight.is_floating_point():
            return True
        return self.bits <= BYTE_BITS and torch.equal(self.read_back(weight), codes.to(torch.int32))


class PackedLinear(PackedLayer, nn.Linear):
    """nn.Linear with a packed weight."""


class PackedConv1D(PackedLayer, Conv1D):
    """transformers' Conv1D with a packed weight."""


class PackedConv2d(PackedLayer, nn.Conv2d):
    """nn.Conv2d with a packed weight."""


class PackedEmbedding(PackedLayer, nn.Embedding):
    """nn.Embedding with a packed weight, decoded as a whole: for one that is tied to another layer."""


class _RowScale(SinglePrecision):
    """A step size for every row, on the device of the layer but never in its type."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value, persistent=False)


class PackedRows(PackedLayer, nn.Embedding):
    """An embedding whose weight is its codes, one byte each; the rows that are looked up are decoded.

    Its outputs are those of the decoded embedding in the type that the model was loaded or cast to.
    """

    row_scale: _RowScale
    like: Tensor  # empty; its type follows casts of the model

    @property
    def float_dtype(self) -> torch.dtype:
        return self.like.dtype

    def stored(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        self.__dict__["_dtype"] = dtype
        return codes.to(torch.int8)

    def settle(self) -> None:
        device = torch.device("cpu") if self.weight.is_meta else self.weight.device
        self.register_buffer("like", torch.empty(0, dtype=self.__dict__.pop("_dtype"), device=device), persistent=False)
        self.row_scale = _RowScale(self.step_size.to(device))

    def forward(self, input: Tensor) -> Tensor:
        """The rows of `input`, any shape of integers, in a new last dim."""
        scale = self.row_scale.value.to(self.weight.device)
        scale = scale[input].unsqueeze(-1) if scale.numel() > 1 else scale
        return (self.weight[input].to(torch.float32) * scale).to(self.like.dtype)

    def read_back(self, weight: Tensor) -> Tensor:
        return weight.to(torch.int32)


_PACKED: dict[type[nn.Module], type[PackedLayer]] = {
    nn.Linear: PackedLinear,
    Conv1D: PackedConv1D,
    nn.Conv2d: PackedConv2d,
    nn.Embedding: PackedEmbedding,
}


@cache
def _packed_class(original: Any, plain: Any) -> type[nn.Module]:
    """The packed kind of a plain class or of a subclass of one."""
    return _PACKED[plain] if original is plain else type(f"Packed{original.__name__}", (_PACKED[plain], original), {})


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """The packed layers of a model by name, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)}


def become_packed(name: str, layer: nn.Module, bits: int, tied: bool = False) -> PackedLayer:
    """Switch a layer to its packed kind, in place; it still lacks its step size and its codes.

    Args:
        name: path of the layer, for errors.
        layer: an nn.Linear, Conv1D, nn.Conv2d or nn.Embedding.
        bits: 2 to 16.
        tied: whether another layer has the same weight, so that an embedding must decode it as a whole.

    Raises:
        GETAError: the layer's class has no packed kind.
    """
    original: Any = type(layer)
    plain: Any = next((kind for kind in _PACKED if isinstance(layer, kind)), None)
    if isinstance(layer, PackedLayer) or plain is None:
        kinds = ", ".join(kind.__name__ for kind in _PACKED)
        raise GETAError(f"{name or 'the model'} is a {original.__name__}, but only {kinds} can be packed")
    rows = original is nn.Embedding and layer.max_norm is None and bits <= BYTE_BITS and not tied
    kind: Any = PackedRows if rows else _packed_class(original, plain)
    layer.__class__ = kind
    packed: PackedLayer = layer  # type: ignore[assignment]
    packed.__dict__["plain_class"] = original
    packed.bits, packed.input_quantizer, packed.stream = bits, None, None
    return packed
