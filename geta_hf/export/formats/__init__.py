"""Ways out: a compressed model in formats of other programs, each written by a module of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from geta_hf.errors import GETAError
from geta_hf.export.formats.compressed_tensors import write_compressed_tensors
from geta_hf.export.formats.executorch import write_executorch
from geta_hf.export.formats.onnx import write_onnx
from geta_hf.export.formats.openvino import write_openvino
from geta_hf.export.formats.vanilla import write_vanilla

Writer = Callable[[PreTrainedModel, Path, Mapping[str, Tensor]], Any]

FORMATS: dict[str, Writer] = {
    "vanilla": write_vanilla,
    "compressed-tensors": write_compressed_tensors,
    "onnx": write_onnx,
    "openvino": write_openvino,
    "executorch": write_executorch,
}
"""What writes each format but our own: a compressed model, an empty folder, a batch to prove it on."""


def writer(name: str) -> Writer:
    """What writes a format. Raises GETAError for an unknown one."""
    if name not in FORMATS:
        raise GETAError(f"there is no format {name!r}; choose geta, {', '.join(FORMATS)}")
    return FORMATS[name]
