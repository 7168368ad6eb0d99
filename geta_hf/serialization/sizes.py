"""How many bytes the tensors of a folder take, from the heads of its files alone, and how many a file may take."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from geta_hf.errors import GETAError
from geta_hf.serialization.decode import Header, read_headers


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


def stored_names(
    model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """What a file calls the tensors that `save_pretrained` renames or splits, such as stacked experts.

    Args:
        model: only asked how its tensors are converted.
        shapes: of what a state dict holds, by name.

    Returns:
        name -> names and shapes of its pieces, for those tensors alone. Some that are merged are left out.
    """
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    names = {id(tensor): name for name, tensor in tensors.items()}
    saved = revert_weight_conversion(model, dict(tensors))
    renamed = {names[id(tensor)]: name for name, tensor in saved.items() if id(tensor) in names}
    found = {name: [(new, shapes[name])] for name, new in renamed.items() if new != name}
    for name in tensors.keys() - renamed.keys():
        with contextlib.suppress(Exception):  # what is merged of several can't be asked for alone
            pieces = revert_weight_conversion(model, {name: tensors[name]})
            found[name] = [(piece, tuple(tensor.shape)) for piece, tensor in pieces.items()]
    return found


def check_shards(size: int | str | None, format: str) -> None:
    """Raises GETAError for a `max_shard_size` that is none, or that the format has no use for."""
    if size is None:
        return
    if format != "geta":
        raise GETAError(f"max_shard_size is for the geta format alone, not for {format}; leave it out")
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=size)
        if isinstance(size, int) and size <= 0:
            raise ValueError("it has to be positive")
    except (ValueError, TypeError, AttributeError) as error:
        raise GETAError(f"max_shard_size is {size!r} ({error}); give bytes, or a size such as '2GB'") from error


def shard_options(size: int | str | None) -> dict[str, int | str]:
    """A `max_shard_size` as `save_pretrained` takes it."""
    return {} if size is None else {"max_shard_size": size}
