"""Pack layers, write them into tensors of a file, and turn them into plain layers again.

Loading needs none of this, so folders do not carry it: the code that comes with a folder only reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geta_hf.errors import GETAError
from geta_hf.quantization.blocks import is_half
from geta_hf.quantization.fixed import FixedQuantizer
from geta_hf.quantization.maths import FOUR_LEVEL_BITS
from geta_hf.serialization.bitpack import MAX_BITS, MIN_BITS, ROWS_AT_ONCE, columns, largest_code, stream_length
from geta_hf.serialization.packed_layers import (
    BLOCKS,
    INPUT_SCALE,
    WEIGHT_SCALE,
    WEIGHT_WIDTHS,
    ChannelWidths,
    PackedLayer,
    PackedRows,
    become_packed,
    packed_layers,
)
from geta_hf.utils.accelerate_hooks import offload, offloaded, rebind_forward

_CASTS = (torch.float32, torch.bfloat16, torch.float16)


def pack(codes: Tensor, bits: int, four_levels: bool = False) -> Tensor:
    """Pack signed codes into the bit stream that `unpack` reads.

    Args:
        codes: integers of any shape, |n| <= 2^(bits-1) - 1; where there are four levels, -3, -1, 1 and 3.
        bits: 2 to 16.
        four_levels: see `unpack`. Default False.

    Returns:
        uint8 of shape (ceil(numel * bits / 8),), on CPU.

    Raises:
        GETAError: `bits` out of range, or a code that does not fit.
    """
    if not isinstance(bits, int) or isinstance(bits, bool) or not MIN_BITS <= bits <= MAX_BITS:
        raise GETAError(f"bits is {bits!r}; a packed weight has an integer bit width from {MIN_BITS} to {MAX_BITS}")
    flat = codes.detach().reshape(-1).cpu()
    if (largest := _largest(flat)) > largest_code(bits, four_levels):
        raise GETAError(f"code {largest} does not fit in {bits} bits, the largest is {largest_code(bits, four_levels)}")
    if four_levels:
        if (even := _first_even(flat)) is not None:
            raise GETAError(f"code {even} is none of four levels, which are -3, -1, 1 and 3")
        flat = (flat - 1).div(2, rounding_mode="floor")
    stream = torch.zeros(-(-flat.numel() // 8), bits, dtype=torch.uint8)
    for start in range(0, stream.shape[0], ROWS_AT_ONCE):
        part = flat[8 * start : 8 * (start + ROWS_AT_ONCE)].to(torch.int32) + 2 ** (bits - 1)
        # The last codes may be fewer than eight; the padding falls behind the end of the stream and is cut off below.
        rows = F.pad(part, (0, -part.numel() % 8)).view(-1, 8)
        stream[start : start + ROWS_AT_ONCE] = _to_bytes(rows, bits)
    return stream.view(-1)[: stream_length(flat.numel(), bits)].clone()


def _first_even(codes: Tensor) -> int | None:
    """Return an even code, which no grid of four levels has; None where there is none."""
    even = codes[codes % 2 == 0]
    return int(even[0]) if even.numel() else None


def _largest(codes: Tensor) -> int:
    # abs() would wrap around at the smallest integer.
    return max(-int(codes.min()), int(codes.max())) if codes.numel() else 0


def _to_bytes(rows: Tensor, bits: int) -> Tensor:
    """Turn unsigned int32 codes (n, 8) into bytes (n, bits)."""
    out = torch.zeros(rows.shape[0], bits, dtype=torch.uint8)
    for j, first, shift, touched in columns(bits):
        value = rows[:, j] << shift
        for k in range(touched):
            out[:, first + k] |= (value >> (8 * k) & 255).to(torch.uint8)
    return out


def pack_weight(codes: Tensor, bits: int, widths: ChannelWidths | None = None, four_levels: bool = False) -> Tensor:
    """Pack the codes of a weight: one stream, or one for each width, narrow ones first.

    Args:
        codes: integers in the weight's shape.
        bits: of each code, where `widths` is None.
        widths: of rows or columns. Default None.
        four_levels: see `unpack`. Default False.

    Returns:
        uint8, one-dimensional, on CPU.

    Raises:
        GETAError: as `pack`.
    """
    if widths is None:
        return pack(codes, bits, four_levels)
    parts = []
    for width in widths.counts:
        own = codes.index_select(widths.dim, widths.index(width).to(codes.device))
        parts.append(pack(own, width, four_levels and width == FOUR_LEVEL_BITS))
    return torch.cat(parts)


def _misfit(
    codes: Tensor, bits: int, widths: ChannelWidths | None, four_levels: bool = False
) -> tuple[int, int] | None:
    """Return a code that does not fit its width, with this width; None where all fit."""
    if widths is None:
        if four_levels and (even := _first_even(codes)) is not None:
            return even, bits
        largest = _largest(codes)
        return (largest, bits) if largest > largest_code(bits, four_levels) else None
    others = [dim for dim in range(codes.dim()) if dim != widths.dim]
    most = torch.maximum(-codes.amin(others).long(), codes.amax(others).long()).cpu()
    for width in widths.counts:
        four = four_levels and width == FOUR_LEVEL_BITS
        index = widths.index(width)
        if four and (even := _first_even(codes.index_select(widths.dim, index.to(codes.device)))) is not None:
            return even, width
        largest = int(most[index].max())
        if largest > largest_code(width, four):
            return largest, width
    return None


def pack_layer(
    name: str,
    layer: nn.Module,
    codes: Tensor,
    bits: int,
    step_size: float | Tensor,
    input_quantizer: FixedQuantizer | None = None,
    tied: bool = False,
    widths: ChannelWidths | None = None,
    four_levels: bool = False,
) -> None:
    """Turn a plain layer into a packed one, in place.

    Args:
        name, layer, bits, tied, widths, four_levels: see `become_packed`.
        codes: integers n, the shape of the layer's weight.
        step_size: what they are multiplied by, a number or of shape (1,), (channels,) or (channels, blocks).
        input_quantizer: rounds the layer's input. Default None: the input stays in floating point.

    Raises:
        GETAError: the layer's class has no packed counterpart, or a code does not fit. The layer is not changed then.
    """
    if (misfit := _misfit(codes, bits, widths, four_levels)) is not None:
        largest, width = misfit
        most = largest_code(width, four_levels and width == FOUR_LEVEL_BITS)
        raise GETAError(
            f"{name}: code {largest} does not fit in {width} bits, the largest is {most}; its clipping value, step "
            f"size and bit width disagree, so set the step size again or give it more bits"
        )
    before = layer.get_parameter("weight")
    packed = become_packed(name, layer, bits, tied, widths, four_levels)
    # Accelerate's hooks keep a bound forward, which would still be that of the plain class.
    rebind_forward(packed)
    packed.input_quantizer = input_quantizer
    packed.step_size = _as_stored(torch.as_tensor(step_size, dtype=torch.float32).detach().cpu())
    fill(packed, codes.to(before.device), before.dtype)
    # One that was on its grid already, as after compression without training, is not held twice.
    if packed.weight.dtype == before.dtype and torch.equal(packed.weight, before):
        packed.weight = nn.Parameter(before.detach(), requires_grad=False)


def _as_stored(step_size: Tensor) -> Tensor:
    """Return step sizes as a file holds them: those of blocks in half the bytes where that changes none."""
    if step_size.dim() < 2:
        return step_size.reshape(-1)
    return step_size.half() if is_half(step_size) else step_size.clone()


def fill(layer: PackedLayer, codes: Tensor, dtype: torch.dtype) -> None:
    """Set the weight of a packed layer from its codes.

    Args:
        layer: with its step size.
        codes: integers n, in the weight's shape, on the device that the weight is to be on.
        dtype: the type that the layer computes in.
    """
    weight = layer.stored(codes, dtype)
    # A weight in bf16 cannot hold codes of more than 8 bits exactly, so they are kept as they will be saved.
    layer.stream = (
        None if layer.holds(codes, weight) else pack_weight(codes, layer.bits, layer.widths, layer.four_levels)
    )
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.finish_loading()


def layer_codes(name: str, layer: PackedLayer, weight: Tensor | None = None) -> Tensor:
    """Return the integers n that a packed layer's weight stands for, int32, in its shape and on its device.

    Args:
        name: path of the layer, for the error.
        layer: a packed layer.
        weight: the weight, where the layer's own is offloaded. Default None: the layer's own.

    Raises:
        GETAError: the weight is no longer d · n, so that saving its codes would lose the change.
    """
    weight = (layer.weight if weight is None else weight).detach()
    if not weight.is_floating_point():
        return layer.read_back(weight)
    if layer.stream is None:
        codes = layer.read_back(weight)
    else:
        # The stream is the truth here. The weight is still compared below, since it may have been trained.
        codes = layer.unpacked(layer.stream).to(weight.device, torch.int32)
    # The model may have been cast to half precision and back since it was loaded: that is no change of its codes.
    same = any(_stands_for(layer, codes, weight, cast) for cast in _CASTS)
    if not same or _misfit(codes, layer.bits, layer.widths, layer.four_levels) is not None:
        raise GETAError(
            f"{name}.weight was changed after it was decoded, by a merged adapter or by training, and its codes no "
            f"longer describe it; call model.dequantize() and save it as plain weights, or train before the export"
        )
    return codes


def _stands_for(layer: PackedLayer, codes: Tensor, weight: Tensor, cast: torch.dtype) -> bool:
    """Return whether a weight is that of the codes after a cast, comparing piece by piece."""
    return all(
        torch.equal(weight[rows], layer.decoded_rows(codes, rows).to(cast).to(weight.dtype))
        for rows in layer.pieces(codes)
    )


def packed_tensors(name: str, layer: PackedLayer, weight: Tensor | None = None) -> dict[str, Tensor]:
    """Return the tensors that a file holds of a packed layer's weight and input, by name.

    Args:
        name, layer, weight: see `layer_codes`.

    Returns:
        `<name>.weight` (uint8 stream), `<name>.weight_scale` (fp32, or fp16 of blocks), where the input is rounded
        `<name>.input_scale` (fp32), and where widths do not ascend along the weight `<name>.weight_widths` (int8), on
        CPU.

    Raises:
        GETAError: as `layer_codes`.
    """
    stream = pack_weight(layer_codes(name, layer, weight), layer.bits, layer.widths, layer.four_levels)
    tensors = {"weight": stream, WEIGHT_SCALE: layer.step_size.cpu()}
    if layer.widths is not None and not layer.widths.is_sorted:
        tensors[WEIGHT_WIDTHS] = layer.widths.bits
    if layer.input_quantizer is not None:
        tensors[INPUT_SCALE] = layer.input_quantizer.scale
    return {f"{name}.{leaf}": tensor for leaf, tensor in tensors.items()}


def dense_weight(layer: PackedLayer) -> Tensor:
    """Return the decoded weight d · n, in the type that the layer computes in."""
    weight = layer.weight.detach()
    return weight if weight.is_floating_point() else layer.decoded(layer.read_back(weight)).to(layer.float_dtype)


def unpack_layer(layer: PackedLayer) -> None:
    """Turn a packed layer into the plain layer that it was, in place: decoded weight, input no longer rounded."""
    plain_class: Any = layer.plain_class
    if isinstance(layer, PackedRows) and layer.weight.is_meta:  # others are offloaded as they are used
        offload(layer, layer.decoded(layer.read_back(offloaded(layer))).to(layer.float_dtype))
    layer.weight = nn.Parameter(dense_weight(layer), requires_grad=True)
    if isinstance(layer, PackedRows):
        del layer.row_scale
    if "like" in layer._buffers:
        del layer.like
    for leaf in layer.OWN:
        vars(layer).pop(leaf, None)
    del layer.input_quantizer
    layer.__class__ = plain_class
    rebind_forward(layer)


def weight_holders(model: nn.Module, layers: Iterable[str]) -> dict[str, list[tuple[nn.Module, str]]]:
    """Return every (module, attribute) that holds the weight of each of these layers: several where it is tied."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        # _parameters and not named_parameters, which leaves out all but the first holder of a shared tensor.
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((module, leaf))
    return {name: found[id(model.get_submodule(name).weight)] for name in layers}


def weight_bits(model: nn.Module) -> dict[str, int]:
    """Return module path -> bit width of its packed weight; the widest of several."""
    return {name: layer.bits for name, layer in packed_layers(model).items()}


def four_level_layers(model: nn.Module) -> list[str]:
    """Return the paths of the packed layers whose weight has four levels."""
    return [name for name, layer in packed_layers(model).items() if layer.four_levels]


def unsigned_inputs(model: nn.Module) -> list[str]:
    """Return the paths of the packed layers whose inputs are rounded to codes without a sign."""
    inputs = {name: layer.input_quantizer for name, layer in packed_layers(model).items()}
    return [name for name, quantizer in inputs.items() if quantizer is not None and quantizer.unsigned]


def width_blocks(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return module path -> dim, widths and counts, for the packed layers whose rows or columns have widths."""
    layers = packed_layers(model).items()
    return {name: layer.widths.entry() for name, layer in layers if layer.widths is not None}


def grid_of(model: nn.Module) -> str | None:
    """Return `block32` where any packed layer has step sizes for blocks of 32 inputs; otherwise None."""
    return BLOCKS if any(layer.in_blocks for layer in packed_layers(model).values()) else None


def activation_bits(model: nn.Module) -> dict[str, int]:
    """Return module path -> bit width of its input, for the packed layers that round it."""
    inputs = {name: layer.input_quantizer for name, layer in packed_layers(model).items()}
    return {name: quantizer.bits for name, quantizer in inputs.items() if quantizer is not None}
