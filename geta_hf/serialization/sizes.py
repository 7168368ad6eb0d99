"""Measure the tensors of a folder in bytes, from the headers of its files, and check the limit on a file's size."""

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
    """Return tensor name -> bytes in one safetensors file.

    Raises:
        GETAError: the file is damaged or cut short.
    """
    return {name: _bytes(header) for name, header in read_headers([os.fspath(file)], Path(file).parent).items()}


def _bytes(header: Header) -> int:
    """Return a tensor's bytes; its type's name says its bits first (F32, BF16, F8_E4M3, U8), except BOOL, one byte."""
    bits = re.search(r"\d+", header.kind)
    return math.prod(header.shape) * (int(bits[0]) if bits else 8) // 8


def tensor_bytes(folder: str | os.PathLike[str]) -> int:
    """Return the bytes of all tensors in a folder's safetensors files.

    Raises:
        GETAError: there is no such file, or a damaged one.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise GETAError(f"{folder} holds no .safetensors file; save the model with save_pretrained")
    return sum(sum(tensor_sizes(file).values()) for file in files)


def stored_names(
    model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Return under which names a file holds the tensors that `save_pretrained` renames or splits, such as experts.

    Args:
        model: asked only how its tensors are converted.
        shapes: shape of each tensor of the state dict, by name.

    Returns:
        name -> names and shapes of its pieces, for those tensors only. Some tensors that are merged are missing.
    """
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    names = {id(tensor): name for name, tensor in tensors.items()}
    # save_pretrained calls the same function. A tensor that it only renames is still the same object; one that it
    # splits or merges is not.
    saved = revert_weight_conversion(model, dict(tensors))
    renamed = {names[id(tensor)]: name for name, tensor in saved.items() if id(tensor) in names}
    found = {name: [(new, shapes[name])] for name, new in renamed.items() if new != name}
    for name in tensors.keys() - renamed.keys():
        with contextlib.suppress(Exception):  # a tensor that is merged with others cannot be converted alone
            pieces = revert_weight_conversion(model, {name: tensors[name]})
            found[name] = [(piece, tuple(tensor.shape)) for piece, tensor in pieces.items()]
    return found


def check_shards(size: int | str | None, format: str) -> None:
    """Check a `max_shard_size`.

    Args:
        size: bytes, a size such as `2GB`, or None for the default of `save_pretrained`.
        format: the format that is to be written.

    Raises:
        GETAError: it is not a size, or the format does not use it.
    """
    if size is None:
        return
    if format != "geta":
        raise GETAError(f"max_shard_size is for the geta format only, not for {format}; remove it")
    try:
        # The library that will split the files decides what a size is.
        split_torch_state_dict_into_shards({}, max_shard_size=size)
        if isinstance(size, int) and size <= 0:
            raise ValueError("it has to be positive")
    except (ValueError, TypeError, AttributeError) as error:
        raise GETAError(f"max_shard_size is {size!r} ({error}); give bytes, or a size such as '2GB'") from error


def shard_options(size: int | str | None) -> dict[str, int | str]:
    """Return a `max_shard_size` as keyword arguments of `save_pretrained`."""
    return {} if size is None else {"max_shard_size": size}
