"""The formats of an export: each is written, and proved by reading it back, by a module of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from geta_hf.errors import GETAError
from geta_hf.export.formats.compressed_tensors import write_compressed_tensors
from geta_hf.export.formats.experimental.executorch import write_executorch
from geta_hf.export.formats.experimental.openvino import write_openvino
from geta_hf.export.formats.geta import write_geta
from geta_hf.export.formats.gguf import check_gguf, write_gguf
from geta_hf.export.formats.mlx import check_mlx, write_mlx
from geta_hf.export.formats.onnx import write_onnx
from geta_hf.export.formats.vanilla import write_vanilla
from geta_hf.export.formats.vllm import check_vllm, write_vllm

Writer = Callable[..., float | None]
"""Takes a compressed model, an empty folder and a batch to prove on; returns the largest difference, if it is absolute.

Options of a format's own are keyword arguments.
"""

OWN = "geta"
"""The format that geta_hf itself reads."""

# Listed here although their packages are optional: each writer imports them when it is called, and names the extra.
FORMATS: dict[str, Writer] = {
    OWN: write_geta,
    "vanilla": write_vanilla,
    "compressed-tensors": write_compressed_tensors,
    "onnx": write_onnx,
    "gguf": write_gguf,
    "vllm": write_vllm,
    "mlx": write_mlx,
    "openvino": write_openvino,
    "executorch": write_executorch,
}
"""The writer of each format."""


WITH_TOKENIZER = {"gguf": check_gguf}
"""Formats whose file holds the tokenizer, each with what finds early why a model cannot be written."""

CHECKS = {"vllm": check_vllm, "mlx": check_mlx}
"""The same of other formats."""


def writer(name: str, model: PreTrainedModel | None = None, processing_class: Any = None) -> Writer:
    """Return the writer of a format.

    Args:
        name: of the format.
        model: trained or compressed, to find early what keeps it from being written. Default None: only the name is
            checked.
        processing_class: the tokenizer or processor, for formats whose file holds it.

    Raises:
        GETAError: an unknown format, or a model or tokenizer that it has no place for.
    """
    if name not in FORMATS:
        raise GETAError(f"there is no format {name!r}; choose {', '.join(FORMATS)}")
    if name in CHECKS and model is not None:
        CHECKS[name](model)
    if name not in WITH_TOKENIZER or model is None:
        return FORMATS[name]
    WITH_TOKENIZER[name](model, processing_class)
    return partial(FORMATS[name], processing_class=processing_class)
