"""What a folder holds of packed layers: verified before anything is built from it, decoded as it is loaded."""

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

from .geta_errors import GETAError
from .geta_packed import INPUT_SCALE, WEIGHT_SCALE, PackedLayer
from .geta_packing import stream_length, unpack
from .geta_fixed import output_dim

logger = logging.get_logger(__name__)

_FLOATS = ("F64", "F32", "F16", "BF16")


class Header(NamedTuple):
    """What a file says of a tensor: its own name, the tensor's type as safetensors calls it, and its shape."""

    file: str
    kind: str
    shape: tuple[int, ...]


def read_headers(files: Iterable[str], folder: str | os.PathLike[str]) -> dict[str, Header]:
    """What the files of a folder hold, by tensor name, without reading any tensor.

    Args:
        files: paths that begin with the folder's, or lie in the cache of the Hub.
        folder: as it was asked for, which may lead over `..` itself.

    Raises:
        GETAError: a file that is missing, damaged or cut short, or that lies outside the folder.
    """
    found: dict[str, Header] = {}
    home: Path | None = None
    for file in files:
        home = home or Path(file).parent
        if Path(file).parent != home or not _is_inside(Path(file), Path(folder)):
            raise GETAError(
                f"{file} lies outside the folder, where model.safetensors.index.json leads; export it again"
            )
        if not file.endswith(".safetensors"):
            raise GETAError(f"{file} is no safetensors file; a folder of geta_hf holds no other weights")
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  safe_open is not a mapping
                    part = tensors.get_slice(name)
                    found[name] = Header(file, part.get_dtype(), tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            raise GETAError(f"{file} is damaged or cut short ({error}); copy or export the folder again") from error
    return found


def _is_inside(file: Path, folder: Path) -> bool:
    if file.is_relative_to(folder):
        return ".." not in file.relative_to(folder).parts
    return not folder.is_dir() and ".." not in file.parts  # a name on the Hub, whose files lie in a cache


def check_packed(name: str, layer: PackedLayer, headers: Mapping[str, Header]) -> None:
    """Raises GETAError where what the folder has of a layer called `name` is of a wrong type or size."""
    if (found := headers.get(f"{name}.weight")) is None:
        return
    numel = math.prod(layer.dense_shape)
    length = stream_length(numel, layer.bits)
    if found.kind != "U8" or found.shape != (length,):
        raise GETAError(
            f"{found.file}: {name}.weight: {numel} codes of {layer.bits} bits are a uint8 stream of {length} bytes, "
            f"not {found.kind} of shape {found.shape}; export the folder again"
        )
    for leaf in (WEIGHT_SCALE, INPUT_SCALE):  # which loading would cast in silence
        if (scale := headers.get(f"{name}.{leaf}")) is not None and scale.kind != "F32":
            raise GETAError(
                f"{scale.file}: {name}.{leaf} is {scale.kind} of shape {scale.shape}, not one float32, nor one for "
                f"several channels; export the folder again"
            )


def check_plain(name: str, tensor: Tensor, header: Header, strict: bool) -> bool:
    """Whether a plain tensor of the folder has another shape than the model's, which is an error if `strict`.

    Raises:
        GETAError: another shape, or a type that would be cast in silence.
    """
    file, kind, shape = header
    right = (kind in _FLOATS) == tensor.is_floating_point() and kind != "U8"
    same = shape == tuple(tensor.shape)
    if right and same:
        return False
    problem = (
        f"{file}: {name} is {kind} of shape {shape}, but config.json, or arguments of from_pretrained, make it "
        f"{tensor.dtype} of shape {tuple(tensor.shape)}"
    )
    if strict or not right:
        raise GETAError(f"{problem}; leave such arguments out, or copy or export the folder again")
    logger.warning("%s; with ignore_mismatched_sizes=True it is drawn anew", problem)
    return True


def check_scale(name: str, scale: Tensor, several: str, count: int) -> None:
    """Raises GETAError unless a scale is one positive finite number, or `count` of them for `several`."""
    if scale.dtype != torch.float32 or tuple(scale.shape) not in ((1,), (count,)):
        raise GETAError(
            f"{name} is {scale.dtype} of shape {tuple(scale.shape)}, not one float32, nor one for {several} "
            f"({count}); export the folder again"
        )
    smallest, largest = float(scale.min()), float(scale.max())
    if not (smallest > 0 and largest < math.inf):  # NaN is neither
        raise GETAError(f"{name} is {largest if smallest > 0 else smallest}; a step size is positive and finite")


class Decode(ConversionOps):
    """Makes the weight of one packed layer of its stream and scale, while transformers loads them.

    An error is kept in `problem` for the end of the loading, since transformers would turn it into one of its own.

    Args:
        hf_quantizer: marks this as a step that must get tensors as they are.
        name: what the model that was saved called the layer.
        places: what the folder may call it, as that is of a part of that model, or of one with another head.
        layer: what to decode into.
    """

    def __init__(self, hf_quantizer: Any, name: str, places: Iterable[str], layer: PackedLayer) -> None:
        self.hf_quantizer, self.name, self.layer = hf_quantizer, name, layer
        self.pattern = "|".join(map(re.escape, dict.fromkeys(places)))
        self.dtype: torch.dtype = layer.weight.dtype
        self.problem: str | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Decode:
        return self  # transformers copies a conversion for every tensor it meets

    def converter(self) -> WeightConverter:
        """This as a conversion of the two tensors that the folder has of the layer into its weight."""
        sources = [f"^(?:{self.pattern})\\.{leaf}$" for leaf in ("weight", WEIGHT_SCALE)]
        return WeightConverter(sources, f"{self.name}.weight", [self])

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The decoded weight under the name that the model has for it, `full_layer_name`."""
        tensors = [part[0] if isinstance(part, list) else part for part in input_dict.values()]
        found = {"scale" if tensor.is_floating_point() else "stream": tensor for tensor in tensors}
        try:
            weight = self._decoded(found)
        except GETAError as error:
            self.problem = str(error)
            weight = torch.zeros_like(self.layer.weight, device="cpu")
        return {kwargs["full_layer_name"]: weight}

    def _decoded(self, found: Mapping[str, Tensor]) -> Tensor:
        layer = self.layer
        if len(found) < 2:
            lacks = "weight" if "scale" in found else WEIGHT_SCALE
            raise GETAError(f"the folder has no tensor {self.name}.{lacks}; copy or export it again")
        stream, scale = found["stream"], found["scale"]
        channels = layer.dense_shape[output_dim(layer)]
        check_scale(f"{self.name}.{WEIGHT_SCALE}", scale, "each output channel", channels)
        try:
            codes = unpack(stream, layer.bits, math.prod(layer.dense_shape)).view(layer.dense_shape)
        except GETAError as error:
            raise GETAError(f"{self.name}.weight: {error}") from error
        layer.step_size = scale.cpu()
        weight = layer.stored(codes, self.dtype)
        layer.stream = None if layer.holds(codes, weight) else stream.cpu().clone()
        return weight
