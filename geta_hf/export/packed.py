"""Packed layers: the original layer whose weight is stored as b-bit codes and used as the dense d * n.

On disk `<module>.weight` is the uint8 bit stream and `<module>.weight_scale` the step size d, fp32: shape (1,), or
(channels,) with one for each output channel. A reader that does not know the format meets a one-dimensional weight and
fails on its size. In memory the weight is decoded once, so the forward pass is the original class's own; when it is
saved, the codes are read back from it. An embedding keeps its codes as one byte each and decodes the rows that are
looked up. A layer that rounds its input has `<module>.input_scale` too: see `FixedQuantizer`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from geta_hf.errors import GETAError
from geta_hf.export.packing import largest_code, pack, unpack
from geta_hf.quantization.fixed import FixedQuantizer, InputQuantizedLayer, SinglePrecision, base_type, output_dim

WEIGHT_SCALE, INPUT_SCALE = "weight_scale", "input_scale"
LEAVES = ("weight", WEIGHT_SCALE, INPUT_SCALE)
"""What a file holds of a packed layer, beside its bias."""

BYTE_BITS = 8
"""Codes up to this width fit a byte, and can be read back from a weight in any floating-point type."""

_CASTS = (torch.float32, torch.bfloat16, torch.float16)


class PackedLayer(InputQuantizedLayer):
    """Mixin of every packed layer.

    Attributes:
        bits: width of each code.
        step_size: d, fp32, shape (1,) or (channels,), on CPU and out of reach of any cast of the layer.
        input_quantizer: rounds the input as in training; None where the input stays float.
        plain_class: what the layer was before.
    """

    weight: Any  # each plain layer class declares its own type
    bits: int
    step_size: Tensor
    input_quantizer: FixedQuantizer | None
    plain_class: type[nn.Module]
    _stream: Tensor | None  # of codes that cannot be read back from the weight

    def forward(self, input: Tensor) -> Tensor:
        """The original layer's own forward, on the rounded input."""
        return super().forward(self.quantized_input(input))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}".removeprefix(", ")

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """Shape of the decoded weight."""
        return tuple(self.weight.shape)

    def scale(self, device: torch.device) -> Tensor:
        """The step size on a device, as it is broadcast over the weight."""
        shape = [1] * self.weight.dim()
        shape[output_dim(self)] = -1
        return self.step_size.to(device).view(shape)

    def decoded(self, codes: Tensor) -> Tensor:
        """The fp32 weight d * n of codes in its shape, on their device."""
        return codes.to(torch.float32) * self.scale(codes.device)

    def fill(self, codes: Tensor, dtype: torch.dtype) -> None:
        """Make the dense weight of these codes, in their shape and on their device, and in the given type."""
        self.weight = nn.Parameter(self.stored(codes, dtype), requires_grad=False)
        self.settle()

    def settle(self) -> None:
        """What is left to do once the weight is where it belongs."""

    def stored(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """What the weight is in memory; codes that could not be read back from that are kept beside."""
        weight = self.decoded(codes).to(dtype)
        found = torch.equal(self._read_back(weight), codes) if self.bits <= BYTE_BITS else False
        self._stream = None if found else pack(codes, self.bits)
        return weight

    def _read_back(self, weight: Tensor) -> Tensor:
        return torch.round(weight.to(torch.float32) / self.scale(weight.device)).to(torch.int32)

    def codes(self, name: str = "the layer", weight: Tensor | None = None) -> Tensor:
        """The integers n that the weight stands for, int32, of its shape and on its device.

        Args:
            name: path of this module, for the error.
            weight: the weight where this layer's own is offloaded.

        Raises:
            GETAError: the weight is no longer what codes can say, so that saving them would lose the change.
        """
        weight = (self.weight if weight is None else weight).detach()
        if self._stream is None:
            codes = self._read_back(weight)
        else:
            codes = unpack(self._stream, self.bits, weight.numel()).view(weight.shape).to(weight.device)
        expected = self.decoded(codes)
        within = not codes.numel() or int(codes.abs().max()) <= largest_code(self.bits)
        if not within or not any(torch.equal(weight, expected.to(cast).to(weight.dtype)) for cast in _CASTS):
            raise GETAError(
                f"{name}.weight was changed after it was decoded, and its codes no longer describe it; train the model "
                f"before the export, not after"
            )
        return codes

    def packed_tensors(self, name: str, weight: Tensor | None = None) -> dict[str, Tensor]:
        """What a file holds of this layer's weight, by tensor name; arguments and errors are those of `codes`."""
        tensors = {"weight": pack(self.codes(name, weight), self.bits), WEIGHT_SCALE: self.step_size}
        if self.input_quantizer is not None:
            tensors[INPUT_SCALE] = self.input_quantizer.scale
        return {f"{name}.{leaf}": tensor for leaf, tensor in tensors.items()}

    def unpacked(self) -> Tensor:
        """The dense weight, in the type that the layer computes in."""
        return self.weight.detach()


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

    def stored(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """The codes as bytes; rows are decoded to `dtype`."""
        self._stream, self.__dict__["_dtype"] = None, dtype
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

    def _read_back(self, weight: Tensor) -> Tensor:
        return weight.to(torch.int32)

    def codes(self, name: str = "the layer", weight: Tensor | None = None) -> Tensor:
        return self._read_back((self.weight if weight is None else weight).detach())

    def unpacked(self) -> Tensor:
        return self.decoded(self.weight.detach()).to(self.like.dtype)


_PACKED: dict[type[nn.Module], type[PackedLayer]] = {
    nn.Linear: PackedLinear,
    Conv1D: PackedConv1D,
    nn.Conv2d: PackedConv2d,
}


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """The packed layers of a model by name, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)}


def weight_bits(model: nn.Module) -> dict[str, int]:
    """Module path -> bits of its packed weight."""
    return {name: layer.bits for name, layer in packed_layers(model).items()}


def activation_bits(model: nn.Module) -> dict[str, int]:
    """Module path -> bits of its input, for the packed layers that round it."""
    inputs = {name: layer.input_quantizer for name, layer in packed_layers(model).items()}
    return {name: quantizer.bits for name, quantizer in inputs.items() if quantizer is not None}


def pack_layer(
    name: str,
    layer: nn.Module,
    codes: Tensor,
    bits: int,
    step_size: float | Tensor,
    input_quantizer: FixedQuantizer | None = None,
    tied: bool = False,
) -> None:
    """Turn a plain layer into its packed kind, in place.

    Args:
        name: path of the layer, for errors.
        layer: an nn.Linear, Conv1D, nn.Conv2d or nn.Embedding.
        codes: integers n, the shape of the layer's weight.
        bits: 2 to 16.
        step_size: d, a number or of shape (1,) or (channels,).
        input_quantizer: rounds the layer's input; None leaves it float.
        tied: whether another layer has the same weight, so that an embedding must decode it as a whole.

    Raises:
        GETAError: the layer's class has no packed kind, or a code does not fit.
    """
    largest = int(codes.abs().max()) if codes.numel() else 0
    if largest > largest_code(bits):
        raise GETAError(
            f"{name}: code {largest} does not fit in {bits} bits, the largest is {largest_code(bits)}; its clipping "
            f"value, step size and bit width disagree"
        )
    dtype, device = layer.get_parameter("weight").dtype, layer.get_parameter("weight").device
    packed = become_packed(name, layer, bits, tied)
    packed.input_quantizer = input_quantizer
    packed.step_size = torch.as_tensor(step_size, dtype=torch.float32).detach().cpu().reshape(-1)
    packed.fill(codes.to(device), dtype)


def become_packed(name: str, layer: nn.Module, bits: int, tied: bool = False) -> PackedLayer:
    """Switch a layer to its packed kind, which still lacks its step size and its codes. Arguments as `pack_layer`."""
    plain: Any = base_type(layer)
    if isinstance(layer, PackedLayer) or (plain is None and not isinstance(layer, nn.Embedding)):
        kinds = ", ".join(kind.__name__ for kind in (*_PACKED, nn.Embedding))
        raise GETAError(f"{name or 'the model'} is a {type(layer).__name__}, but only {kinds} can be packed")
    original: Any = type(layer)
    rows = plain is None and original is nn.Embedding and layer.max_norm is None and bits <= BYTE_BITS and not tied
    kind: Any = PackedRows if rows else _packed_class(original, plain or nn.Embedding)
    layer.__class__ = kind
    packed: PackedLayer = layer  # type: ignore[assignment]
    packed.__dict__["plain_class"] = original
    packed.bits, packed.input_quantizer, packed._stream = bits, None, None
    return packed


def unpack_layer(layer: PackedLayer) -> None:
    """Turn a packed layer into what it was before, with its decoded weight and without rounding of its input."""
    layer.weight = nn.Parameter(layer.unpacked(), requires_grad=True)
    if isinstance(layer, PackedRows):
        del layer.like, layer.row_scale
    for leaf in ("bits", "step_size", "_stream"):
        del layer.__dict__[leaf]
    del layer.input_quantizer
    layer.__class__ = layer.__dict__.pop("plain_class")


def weight_holders(model: nn.Module, layers: Iterable[str]) -> dict[str, list[tuple[nn.Module, str]]]:
    """For each of these layers every (module, attribute) that holds its weight: one, or more where it is tied."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((module, leaf))
    return {name: found[id(model.get_submodule(name).weight)] for name in layers}


def take_input_scale(name: str, layer: PackedLayer, bits: int) -> None:
    """Make the quantizer of a layer's input from what was loaded into its buffer.

    Raises:
        GETAError: not one or two positive finite numbers.
    """
    scale = layer.get_buffer(INPUT_SCALE).detach()
    check_scale(f"{name}.{INPUT_SCALE}", scale, "d and one for t", 2)
    del layer._buffers[INPUT_SCALE]
    layer.input_quantizer = FixedQuantizer(scale, bits)


def check_scale(name: str, scale: Tensor, several: str, count: int) -> None:
    """Raises GETAError unless a scale is one positive finite number, or `count` of them for `several`."""
    if scale.dtype != torch.float32 or tuple(scale.shape) not in ((1,), (count,)):
        raise GETAError(
            f"{name} is {scale.dtype} of shape {tuple(scale.shape)}, not one float32, nor one for {several} "
            f"({count}); export the folder again"
        )
    wrong = scale[~((scale > 0) & (scale < math.inf))]
    if wrong.numel():
        raise GETAError(f"{name} is {float(wrong[0])}; a step size is positive and finite")


@cache
def _packed_class(original: Any, plain: Any) -> type[nn.Module]:
    """The packed kind of a plain class or of a subclass that keeps its forward."""
    packed = PackedEmbedding if plain is nn.Embedding else _PACKED[plain]
    return packed if original is plain else type(f"Packed{original.__name__}", (packed, original), {})
