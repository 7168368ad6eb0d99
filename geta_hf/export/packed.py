"""Packed layers: the original layer whose weight is stored as b-bit codes and used as the dense d * n.

On disk `<module>.weight` is the uint8 bit stream and `<module>.weight_scale` the step size d, fp32: shape (1,), or
(channels,) with one for each output channel. A reader that does not know the format meets a one-dimensional weight and
fails on its size. In memory the weight is decoded once, so the forward pass is the original class's own; the stream is
kept on the CPU and is what gets saved. A layer that rounds its input has `<module>.input_scale` too: see
`FixedQuantizer`.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from geta_hf.errors import GETAError
from geta_hf.export.packing import pack, stream_length, unpack
from geta_hf.quantization.layers import InputQuantizedLayer, base_type, output_dim
from geta_hf.quantization.quantizer import FixedQuantizer

WEIGHT_SCALE, INPUT_SCALE = "weight_scale", "input_scale"
LEAVES = ("weight", WEIGHT_SCALE, INPUT_SCALE)
"""What a file holds of a packed layer, beside its bias."""


class PackedLayer(InputQuantizedLayer):
    """Mixin of every packed layer.

    Attributes:
        bits: width of each code.
        dense_shape: shape of the decoded weight.
        stream: the codes as `packing.pack` gives them, on CPU whatever the device of the layer.
        step_size: d, fp32, shape (1,) or (channels,), on CPU and out of reach of any cast of the layer.
        input_quantizer: rounds the input as in training; None where the input stays float.
    """

    weight: Any  # each plain layer class declares its own type
    bits: int
    dense_shape: tuple[int, ...]
    stream: Tensor
    step_size: Tensor
    input_quantizer: FixedQuantizer | None

    def forward(self, input: Tensor) -> Tensor:
        """The original layer's own forward, on the rounded input."""
        return super().forward(self.quantized_input(input))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}".removeprefix(", ")

    def decoded(self) -> Tensor:
        """The fp32 weight d * n, of shape `dense_shape`, on CPU."""
        codes = unpack(self.stream, self.bits, math.prod(self.dense_shape))
        shape = [1] * len(self.dense_shape)
        shape[output_dim(self)] = -1
        return codes.view(self.dense_shape).to(torch.float32) * self.step_size.view(shape)

    def set_stream(self, stream: Tensor, step_size: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        """Take `stream` for the truth and make the dense weight from it, of the given dtype, on the given device."""
        self.stream, self.step_size = stream, step_size
        self.weight = nn.Parameter(self.decoded().to(device=device, dtype=dtype), requires_grad=False)

    def packed_tensors(self, name: str) -> dict[str, Tensor]:
        """What a file holds of this layer's weight, by tensor name.

        Args:
            name: path of this module in the model.

        Raises:
            GETAError: the dense weight is no longer what the codes say, so saving them would lose the change.
        """
        expected, weight = self.decoded(), self.weight.detach().cpu()
        casts = (torch.float32, torch.bfloat16, torch.float16)
        if not any(torch.equal(weight, expected.to(cast).to(weight.dtype)) for cast in casts):
            raise GETAError(
                f"{name}.weight was changed after it was decoded, and its codes no longer describe it; train the model "
                f"before the export, not after"
            )
        tensors = {"weight": self.stream, WEIGHT_SCALE: self.step_size}
        if self.input_quantizer is not None:
            tensors[INPUT_SCALE] = self.input_quantizer.scale
        return {f"{name}.{leaf}": tensor for leaf, tensor in tensors.items()}


class PackedLinear(PackedLayer, nn.Linear):
    """nn.Linear with a packed weight."""


class PackedConv1D(PackedLayer, Conv1D):
    """transformers' Conv1D with a packed weight."""


class PackedConv2d(PackedLayer, nn.Conv2d):
    """nn.Conv2d with a packed weight."""


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
) -> None:
    """Turn a plain layer into its packed kind, in place.

    Args:
        name: path of the layer, for errors.
        layer: an nn.Linear, Conv1D or nn.Conv2d.
        codes: integers n, the shape of the layer's weight.
        bits: 2 to 16.
        step_size: d, a number or of shape (1,) or (channels,).
        input_quantizer: rounds the layer's input; None leaves it float.

    Raises:
        GETAError: the layer's class has no packed kind, or a code does not fit.
    """
    try:
        stream = pack(codes, bits)
    except GETAError as error:
        raise GETAError(f"{name}: {error}; its clipping value, step size and bit width disagree") from error
    packed = _become_packed(name, layer, bits)
    packed.input_quantizer = input_quantizer
    scale = torch.as_tensor(step_size, dtype=torch.float32).detach().cpu().reshape(-1)
    packed.set_stream(stream, scale, packed.weight.dtype, packed.weight.device)


def reserve_packed(name: str, layer: nn.Module, bits: int, activation_bits: int | None = None) -> None:
    """Turn a plain layer into its packed kind with empty storage for a stream and scales, to be loaded into.

    The dtype the weight is declared in is the one it will be decoded to. Follow with `decode_loaded`.

    Args:
        name: path of the layer, for errors.
        layer: an nn.Linear, Conv1D or nn.Conv2d.
        bits: of the weight.
        activation_bits: of the input, None where it stays float.

    Raises:
        GETAError: the layer's class has no packed kind.
    """
    packed = _become_packed(name, layer, bits)
    dtype, device = packed.weight.dtype, packed.weight.device
    length = stream_length(math.prod(packed.dense_shape), bits)
    packed.weight = nn.Parameter(torch.empty(length, dtype=torch.uint8, device=device), requires_grad=False)
    for leaf in (WEIGHT_SCALE,) if activation_bits is None else (WEIGHT_SCALE, INPUT_SCALE):
        packed.register_buffer(leaf, torch.empty(1, dtype=torch.float32, device=device))
    packed.__dict__["_compute_dtype"], packed.__dict__["_activation_bits"] = dtype, activation_bits
    # Or transformers would draw a random stream where the file has none, before the gap can be reported.
    packed.__dict__["_is_hf_initialized"] = True


def decode_loaded(name: str, layer: PackedLayer) -> None:
    """Verify what was loaded into the storage of `reserve_packed` and decode it to the dense weight, in place.

    Raises:
        GETAError: wrong type or length of the stream, a scale that is not as many positive finite numbers as it should
            be, a damaged code.
    """
    stream = layer.weight.detach()
    step_size = _taken_scale(name, layer, WEIGHT_SCALE, "each output channel", layer.dense_shape[output_dim(layer)])
    activation_bits = layer.__dict__.pop("_activation_bits")
    if activation_bits is not None:
        scale = _taken_scale(name, layer, INPUT_SCALE, "d and one for t", 2)
        layer.input_quantizer = FixedQuantizer(scale, activation_bits).to(stream.device)
    try:
        layer.set_stream(stream.cpu(), step_size, layer.__dict__.pop("_compute_dtype"), stream.device)
    except GETAError as error:
        raise GETAError(f"{name}.weight: {error}") from error


def _taken_scale(name: str, layer: PackedLayer, leaf: str, several: str, count: int) -> Tensor:
    """A scale taken out of its buffer: one number, or `count` for `several`."""
    scale = layer.get_buffer(leaf).detach().cpu()
    if scale.dtype != torch.float32 or tuple(scale.shape) not in ((1,), (count,)):
        raise GETAError(
            f"{name}.{leaf} is {scale.dtype} of shape {tuple(scale.shape)}, not one float32, nor one for {several} "
            f"({count}); export the folder again"
        )
    wrong = scale[~((scale > 0) & (scale < math.inf))]
    if wrong.numel():
        raise GETAError(f"{name}.{leaf} is {float(wrong[0])}; a step size is positive and finite")
    del layer._buffers[leaf]
    return scale


def _become_packed(name: str, layer: nn.Module, bits: int) -> PackedLayer:
    plain = base_type(layer)
    if plain is None or isinstance(layer, PackedLayer):
        kinds = ", ".join(kind.__name__ for kind in _PACKED)
        raise GETAError(f"{name or 'the model'} is a {type(layer).__name__}, but only {kinds} can be packed")
    layer.__class__ = _packed_class(type(layer), plain)  # type: ignore[arg-type]
    packed: PackedLayer = layer  # type: ignore[assignment]
    packed.bits, packed.dense_shape, packed.input_quantizer = bits, tuple(packed.weight.shape), None
    return packed


@cache
def _packed_class(original: Any, plain: Any) -> type[nn.Module]:
    """The packed kind of a plain class or of a subclass that keeps its forward."""
    packed = _PACKED[plain]
    return packed if original is plain else type(f"Packed{original.__name__}", (packed, original), {})
