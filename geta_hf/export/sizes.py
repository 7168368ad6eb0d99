"""How many bytes the tensors of a folder take, from the heads of its files alone."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

from geta_hf.errors import GETAError
from geta_hf.export.stored import Header, read_headers


def tensor_sizes(file: str | os.PathLike[str]) -> dict[str, int]:
    """Tensor name -> bytes in one safetensors file. Raises GETAError for a damaged or cut one."""
    return {name: _bytes(header) for name, header in read_headers([os.fspath(file)], Path(file).parent).items()}


def _bytes(header: Header) -> int:
    """A type's name says its bits first (F32, BF16, F8_E4M3, U8), but for BOOL, which takes a byte."""
    bits = re.search(r"\d+", header.kind)
    return math.prod(header.shape) * (int(bits[0]) if bits else 8) // 8


def tensor_bytes(folder: str | os.PathLike[str]) -> int:
    """Bytes of all tensors in a folder's safetensors files. Raises GETAError when there is none, or a damaged one."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise GETAError(f"{folder} holds no .safetensors file; save the model with save_pretrained")
    return sum(sum(tensor_sizes(file).values()) for file in files)
