"""Keep expected losses in a file, so that a run which was interrupted, or has another budget, need not measure again.

A file says what it was measured on. One of another model, of other data or settings, or that cannot be read, counts as
none.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from geta_hf.methods.one_shot.choice import Losses
from geta_hf.quantization.by_block import Batch
from geta_hf.utils.files import write_whole

logger = logging.getLogger(__name__)

_LAYOUT = "1"
"""Raised whenever scores of the same name are computed in another way."""


def fingerprint(model: nn.Module, batches: Iterable[Batch], settings: Any, layers: Iterable[str], groups: int) -> str:
    """Return what identifies expected losses, 64 hexadecimal digits.

    Args:
        model: dense; every value of it counts.
        batches: those that scores are measured on.
        settings: plain data.
        layers: paths of the layers to round, in their order.
        groups: number of groups.
    """
    digest = hashlib.sha256()

    def add(*parts: Any) -> None:
        digest.update(json.dumps(parts, default=str).encode())

    add(_LAYOUT, type(model).__name__, settings, list(layers), groups)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        add(name, str(tensor.dtype), list(tensor.shape))
        digest.update(_bytes_of(tensor))
    for batch in batches:
        for name, item in sorted(batch.items()):
            add(name, *_described(item))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> Any:
    """Return what a tensor holds, as hashlib takes it."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _described(item: Any) -> tuple[Any, ...]:
    if isinstance(item, Tensor):
        return str(item.dtype), list(item.shape), hashlib.sha256(_bytes_of(item)).hexdigest()
    if isinstance(item, Mapping):
        return tuple((name, *_described(value)) for name, value in sorted(item.items()))
    return (repr(item),)


def write_scores(path: Path, key: str, losses: Losses) -> None:
    """Write expected losses; the file appears complete or not at all.

    Args:
        path: in a folder that is made where it is missing.
        key: of `fingerprint`.
        losses: to keep.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"removal": losses.removal.contiguous(), "rounding": losses.rounding.contiguous()}
    write_whole(path, save(tensors, {"key": key, "widths": json.dumps(list(losses.widths))}))


def read_scores(path: Path, key: str) -> Losses | None:
    """Return the losses in a file; None where there is no file, or it was measured on something else.

    Args:
        path: of `write_scores`.
        key: of what is asked for.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            notes = file.metadata() or {}
            if notes.get("key") != key:
                logger.info("%s is of another model, data or settings, so scores are measured anew", path)
                return None
            widths = json.loads(notes["widths"])
            removal, rounding = file.get_tensor("removal"), file.get_tensor("rounding")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        logger.info("%s cannot be read (%s), so scores are measured anew", path, error)
        return None
    if not bool(torch.isfinite(removal).all() & torch.isfinite(rounding).all()):
        return None
    return Losses(removal, rounding, widths)
