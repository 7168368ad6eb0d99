"""What a folder holds of packed layers: verified before anything is built from it, decoded as it is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from geta_hf.errors import GETAError
from geta_hf.export.packed import INPUT_SCALE, WEIGHT_SCALE, PackedLayer, check_scale
from geta_hf.export.packing import stream_length, unpack
from geta_hf.quantization.fixed import output_dim

_CHANNELS = "each output channel"

Headers = Mapping[str, tuple[str, str, tuple[int, ...]]]
"""Tensor name -> file, type as safetensors calls it, and shape."""


def read_headers(files: Iterable[str]) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """What the files of a folder hold, without reading any tensor.

    Raises:
        GETAError: a file that is missing, damaged or cut short, or that lies outside the folder.
    """
    found = {}
    home: Path | None = None
    for file in files:
        home = home or Path(file).absolute().parent
        if Path(file).absolute().parent != home or ".." in Path(file).parts:
            raise GETAError(
                f"{file} lies outside the folder, where model.safetensors.index.json leads; export it again"
            )
        if not file.endswith(".safetensors"):
            raise GETAError(f"{file} is no safetensors file; a folder of geta_hf holds no other weights")
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  safe_open is not a mapping
                    part = tensors.get_slice(name)
                    found[name] = (file, part.get_dtype(), tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            raise GETAError(f"{file} is damaged or cut short ({error}); copy or export the folder again") from error
    return found


def check_packed(name: str, layer: PackedLayer, headers: Headers) -> None:
    """Refuse packed data of a wrong type or size before it is read.

    Args:
        name: what the folder calls the layer.
        layer: as it is to be loaded into.
        headers: see `read_headers`; a layer that they do not name is left to the check after loading.

    Raises:
        GETAError: naming the file and the tensor.
    """
    if (found := headers.get(f"{name}.weight")) is None:
        return
    file, kind, shape = found
    numel = math.prod(layer.dense_shape)
    length = stream_length(numel, layer.bits)
    if kind != "U8" or shape != (length,):
        raise GETAError(
            f"{file}: {name}.weight: {numel} codes of {layer.bits} bits are a uint8 stream of {length} bytes, "
            f"not {kind} of shape {shape}; export the folder again"
        )
    channels = layer.dense_shape[output_dim(layer)]
    for leaf, several, count in ((WEIGHT_SCALE, _CHANNELS, channels), (INPUT_SCALE, "d and one for t", 2)):
        if leaf == INPUT_SCALE and leaf not in layer._buffers:
            continue
        if (scale := headers.get(f"{name}.{leaf}")) is None:
            raise GETAError(f"{file} has no tensor {name}.{leaf}; copy or export the folder again")
        if scale[1] != "F32" or scale[2] not in ((1,), (count,)):
            raise GETAError(
                f"{scale[0]}: {name}.{leaf} is {scale[1]} of shape {scale[2]}, not one float32, nor one for {several} "
                f"({count}); export the folder again"
            )


def check_plain(tensors: Mapping[str, Tensor], headers: Headers, packed: Iterable[str]) -> None:
    """Refuse a plain tensor of another shape than the model's before anything is read.

    Raises:
        GETAError: naming the file and the tensor.
    """
    weights = {f"{name}.weight" for name in packed}
    for name, tensor in tensors.items():
        if name not in headers or name in weights or name.endswith(f".{INPUT_SCALE}"):
            continue
        file, kind, shape = headers[name]
        if shape != tuple(tensor.shape) or kind == "U8":
            raise GETAError(
                f"{file}: {name} is {kind} of shape {shape}, but config.json makes it {tuple(tensor.shape)}; copy or "
                f"export the folder again"
            )


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
        check_scale(f"{self.name}.{WEIGHT_SCALE}", scale, _CHANNELS, layer.dense_shape[output_dim(layer)])
        try:
            codes = unpack(stream, layer.bits, math.prod(layer.dense_shape)).view(layer.dense_shape)
        except GETAError as error:
            raise GETAError(f"{self.name}.weight: {error}") from error
        layer.step_size = scale.cpu()
        return layer.stored(codes, self.dtype)
