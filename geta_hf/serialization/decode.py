"""Verify what a folder holds of packed layers before anything is built from it, and decode it while it is loaded.

A folder may come from a stranger. The headers of its files say the type and size of every tensor, so they are compared
with the model before a tensor is read: a damaged or hostile folder then costs neither memory nor time, and the error
names the file and the tensor, where transformers would cast, skip or draw at random.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.utils import logging

from geta_hf.errors import GETAError
from geta_hf.quantization.fixed import output_dim
from geta_hf.quantization.maths import block_count
from geta_hf.serialization.packed_layers import INPUT_SCALE, WEIGHT_SCALE, WEIGHT_WIDTHS, ChannelWidths, PackedLayer

logger = logging.get_logger(__name__)

_FLOATS = ("F64", "F32", "F16", "BF16")


class Header(NamedTuple):
    """The header of one tensor in a file.

    Attributes:
        file: path of the file.
        kind: the tensor's type by safetensors' name, such as `F32` or `U8`.
        shape: the tensor's shape.
    """

    file: str
    kind: str
    shape: tuple[int, ...]


def read_headers(files: Iterable[str], folder: str | os.PathLike[str]) -> dict[str, Header]:
    """Read the headers of a folder's files, without reading any tensor.

    Args:
        files: paths that begin with the folder's, or lie in the cache of the Hub.
        folder: as the caller wrote it, so it may contain `..` itself.

    Returns:
        The header of every tensor by the tensor's name.

    Raises:
        GETAError: a file is missing, not readable, damaged, cut short or no safetensors file, or lies outside the
            folder; or two files hold the same tensor.
    """
    found: dict[str, Header] = {}
    home: Path | None = None
    for file in files:
        # An index may name any path. Only files next to each other, below the folder, belong to it.
        home = home or Path(file).parent
        if Path(file).parent != home or not _is_inside(Path(file), Path(folder)):
            raise GETAError(
                f"{file} lies outside the folder, but model.safetensors.index.json names it; export the folder again"
            )
        if not file.endswith(".safetensors"):
            raise GETAError(
                f"{file} is no safetensors file; a folder of geta_hf holds no other weights, so export it again"
            )
        _check_open(file)
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  safe_open is not a mapping
                    if name in found:
                        raise GETAError(f"{file} and {found[name].file} both hold {name}; export the folder again")
                    # A slice knows type and shape, and reads no data until it is indexed.
                    part = tensors.get_slice(name)
                    found[name] = Header(file, part.get_dtype(), tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            raise GETAError(f"{file} is damaged or cut short ({error}); copy or export the folder again") from error
    return found


def _check_open(file: str) -> None:
    """Check that a file is an ordinary one that may be read, since safetensors calls others missing, or waits."""
    try:
        if Path(file).exists() and not Path(file).is_file():
            raise GETAError(f"{file} is no ordinary file; export the folder again")
        with Path(file).open("rb"):
            pass
    except PermissionError as error:
        raise GETAError(f"{file} may not be read ({error.strerror}); ask its owner for the right to read it") from error
    except OSError as error:
        raise GETAError(f"{file} is damaged or cut short ({error}); copy or export the folder again") from error


def _is_inside(file: Path, folder: Path) -> bool:
    if file.is_relative_to(folder):
        return ".." not in file.relative_to(folder).parts
    # A name on the Hub is no folder here; its files lie in the Hub's cache.
    return not folder.is_dir() and ".." not in file.parts


def check_packed(name: str, layer: PackedLayer, headers: Mapping[str, Header], blocks: bool = False) -> None:
    """Check the types and sizes of what the folder holds of one packed layer; what it lacks is found later.

    Args:
        name: path of the layer in the folder.
        layer: the layer, of the size and bit width that config.json gives it.
        headers: of the folder's tensors, by name.
        blocks: whether the folder says that it has step sizes for blocks of 32 inputs. Default False.

    Raises:
        GETAError: a stream or a scale of another type or size.
    """
    if (found := headers.get(f"{name}.weight")) is None:
        return
    numel = math.prod(layer.dense_shape)
    length = layer.stream_length()
    if found.kind != "U8" or found.shape != (length,):
        raise GETAError(
            f"{found.file}: {name}.weight: {numel} codes of {_named_widths(layer)} bits are a uint8 stream of {length} "
            f"bytes, not {found.kind} of shape {found.shape}; export the folder again"
        )
    _check_widths(name, layer, headers.get(f"{name}.{WEIGHT_WIDTHS}"))
    # The sizes of scales are checked once they are loaded; another type would be cast without a word by then.
    for leaf in (WEIGHT_SCALE, INPUT_SCALE):
        if (scale := headers.get(f"{name}.{leaf}")) is not None and scale.kind not in _scale_kinds(leaf, blocks, scale):
            raise GETAError(
                f"{scale.file}: {name}.{leaf} is {scale.kind} of shape {scale.shape}, not one float32, nor one for "
                f"several channels; export the folder again"
            )


def _check_widths(name: str, layer: PackedLayer, found: Header | None) -> None:
    """Check the type and size of a tensor of widths, which only a layer of several widths may have."""
    if found is None:
        return
    own = layer.widths
    if own is None or found.kind != "I8" or found.shape != tuple(own.bits.shape):
        channels = "none" if own is None else f"int8 of shape ({len(own.bits)},)"
        raise GETAError(
            f"{found.file}: {name}.{WEIGHT_WIDTHS} is {found.kind} of shape {found.shape}, not {channels}; export the "
            f"folder again"
        )


def _named_widths(layer: PackedLayer) -> str:
    return str(layer.bits) if layer.widths is None else " and ".join(map(str, layer.widths.counts))


def _scale_kinds(leaf: str, blocks: bool, header: Header) -> tuple[str, ...]:
    """Return the types that a scale may have: that of blocks of a weight's inputs is fp16 where that is exact."""
    return ("F16", "F32") if leaf == WEIGHT_SCALE and blocks and len(header.shape) == 2 else ("F32",)


def check_plain(name: str, tensor: Tensor, header: Header, strict: bool) -> bool:
    """Compare a plain tensor of the folder with the model's.

    Args:
        name: of the tensor in the folder.
        tensor: the model's own, still without values.
        header: what the folder says of it.
        strict: whether another shape is an error. Otherwise it is a warning.

    Returns:
        True where the shapes differ, so that the tensor will not be loaded.

    Raises:
        GETAError: a type that would be cast without a word or, if `strict`, another shape.
    """
    file, kind, shape = header
    # Floats may be cast to other floats, as transformers does by `dtype`. Bytes are packed weights and nothing else.
    same_kind = (kind in _FLOATS) == tensor.is_floating_point() and kind != "U8"
    same_shape = shape == tuple(tensor.shape)
    if same_kind and same_shape:
        return False
    problem = (
        f"{file}: {name} is {kind} of shape {shape}, but config.json, or arguments of from_pretrained, make it "
        f"{tensor.dtype} of shape {tuple(tensor.shape)}"
    )
    if strict or not same_kind:
        raise GETAError(f"{problem}; remove such arguments, or copy or export the folder again")
    logger.warning("%s; with ignore_mismatched_sizes=True it is initialized at random", problem)
    return True


def check_scale(name: str, scale: Tensor, several: str, count: int, blocks: tuple[int, int] | None = None) -> None:
    """Check that a scale is one positive finite number, or `count` of them, or one for each block.

    Args:
        name: of the tensor, for the error.
        scale: as it was loaded.
        several: what `count` numbers would be for, for the error.
        count: the other length that is allowed.
        blocks: the shape of one for each block of 32 inputs, in fp32 or fp16, where that is allowed. Default None.

    Raises:
        GETAError: another type or shape, or a number that is not positive and finite.
    """
    plain = scale.dtype == torch.float32 and tuple(scale.shape) in ((1,), (count,))
    in_blocks = scale.dtype in (torch.float32, torch.float16) and tuple(scale.shape) == blocks
    if not plain and not in_blocks:
        raise GETAError(
            f"{name} is {scale.dtype} of shape {tuple(scale.shape)}, not one float32, nor one for {several} "
            f"({count}); export the folder again"
        )
    smallest = float(scale.min())
    largest = float(scale.max())
    if not (smallest > 0 and largest < math.inf):  # NaN is neither
        wrong = largest if smallest > 0 else smallest
        raise GETAError(f"{name} is {wrong}; a step size is positive and finite, so copy or export the folder again")


class Decode(ConversionOps):
    """Decode the stream and scale of one packed layer into its weight, while transformers loads them.

    An error is stored in `problem` until loading ends, since transformers would turn it into one of its own.

    Args:
        hf_quantizer: marks this as a step that must receive tensors uncast.
        name: what the saved model called the layer.
        places: names that the folder may use, since it may hold a part of that model, or one with another head.
        layer: the layer to decode into.
        blocks: whether the layer may have step sizes for blocks of 32 inputs. Default False.
    """

    def __init__(
        self, hf_quantizer: Any, name: str, places: Iterable[str], layer: PackedLayer, blocks: bool = False
    ) -> None:
        self.blocks = blocks
        self.hf_quantizer = hf_quantizer
        self.name = name
        self.layer = layer
        self.pattern = "|".join(map(re.escape, dict.fromkeys(places)))
        self.dtype: torch.dtype = layer.weight.dtype
        self.problem: str | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Decode:
        return self  # transformers copies a conversion for every tensor; a copy's `problem` would be lost

    def converter(self) -> WeightConverter:
        """Return the conversion of the layer's tensors in the folder into its weight, in transformers' terms."""
        leaves = ("weight", WEIGHT_SCALE) if self.layer.widths is None else ("weight", WEIGHT_SCALE, WEIGHT_WIDTHS)
        sources = [f"^(?:{self.pattern})\\.{leaf}$" for leaf in leaves]
        return WeightConverter(sources, f"{self.name}.weight", [self])

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the decoded weight under the model's name for it, `full_layer_name`; transformers calls this."""
        tensors = [part[0] if isinstance(part, list) else part for part in input_dict.values()]
        # By type, since transformers does not tell which tensor matched which pattern.
        found = {_part_of(tensor): tensor for tensor in tensors}
        try:
            weight = self._decoded(found)
        except GETAError as error:
            # Zeros let loading go on to its end, where the problem is raised as what it is.
            self.problem = str(error)
            weight = torch.zeros_like(self.layer.weight, device="cpu")
        return {kwargs["full_layer_name"]: weight}

    def _decoded(self, found: Mapping[str, Tensor]) -> Tensor:
        layer = self.layer
        if "scale" not in found or "stream" not in found:
            lacks = "weight" if "scale" in found else WEIGHT_SCALE
            raise GETAError(f"the folder has no tensor {self.name}.{lacks}; copy or export it again")
        stream = found["stream"]
        scale = found["scale"]
        if layer.widths is not None and "widths" in found:
            layer.widths = self._widths(layer.widths, found["widths"])
        channels = layer.dense_shape[layer.scale_dim]
        blocks = None
        if self.blocks and len(layer.dense_shape) == 2:
            blocks = (channels, block_count(layer.dense_shape[1 - output_dim(layer)]))
        several = "each input channel" if layer.scales_inputs else "each output channel"
        check_scale(f"{self.name}.{WEIGHT_SCALE}", scale, several, channels, blocks)
        try:
            codes = layer.unpacked(stream)
        except GETAError as error:
            raise GETAError(f"{self.name}.weight: {error}") from error
        # Only for a stream that was decoded: `_share_step_sizes` takes its presence as the mark of that.
        layer.step_size = scale.cpu()
        weight = layer.stored(codes, self.dtype)
        # Where codes cannot be read back from the weight, the stream itself has to be kept for saving.
        layer.stream = None if layer.holds(codes, weight) else stream.cpu().clone()
        return weight

    def _widths(self, stated: ChannelWidths, bits: Tensor) -> ChannelWidths:
        """Return the widths that a tensor gives to each index, which are as many as config.json states."""
        found = ChannelWidths(stated.dim, bits.cpu().clone())
        if bits.shape != stated.bits.shape or found.counts != stated.counts:
            raise GETAError(
                f"{self.name}.{WEIGHT_WIDTHS} has counts of widths {found.counts}, but config.json {stated.counts}; "
                f"copy or export the folder again"
            )
        return found


def _part_of(tensor: Tensor) -> str:
    if tensor.is_floating_point():
        return "scale"
    return "widths" if tensor.dtype == torch.int8 else "stream"
