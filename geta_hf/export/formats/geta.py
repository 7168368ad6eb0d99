"""geta_hf's own format: cut tensors, packed weights, and the list of what a freshly built model needs to fit them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from geta_hf.export.folder_files import write_structure
from geta_hf.export.formats.layer_sizes import write_layer_sizes
from geta_hf.serialization.hf_quantizer import sharing_weights
from geta_hf.serialization.remote_code import save_compressed
from geta_hf.serialization.sizes import shard_options
from geta_hf.surgery.compare_outputs import Outputs, attention_outputs, prove_alike


def write_geta(
    model: PreTrainedModel,
    folder: Path,
    batch: Mapping[str, Tensor],
    *,
    kept: Mapping[str, tuple[int, int]] | None = None,
    outputs: Outputs | None = None,
    device: torch.device | None = None,
    max_shard_size: int | str | None = None,
) -> float:
    """Write a compressed model, reload it as anyone would, and prove that it computes the same.

    Args:
        model: compressed; unchanged afterwards.
        folder: an existing empty folder.
        batch: what the proof runs on.
        kept: family -> (groups kept, groups before), saved as geta_structure.json; None writes no such file.
        outputs: of `model` on the batch, where they are at hand.
        device: where the reloaded model runs; by default where `model` is.
        max_shard_size: bytes, or a size such as `2GB`, beyond which weights are split into several files.

    Returns:
        The largest absolute difference of any output.

    Raises:
        GETAError: the model cannot run the batch, or outputs differ once reloaded.
    """
    expected = attention_outputs(model, batch, device=device) if outputs is None else outputs
    save_compressed(model, folder, **shard_options(max_shard_size))
    write_layer_sizes(model, folder)
    if kept is not None:
        write_structure(folder, model, kept)
    # In the same dtype and on the same device: other ones round differently, which is no fault of the folder.
    # What is equal bit by bit is held once, so that a proof takes no second model's memory.
    with sharing_weights(model):
        reloaded = type(model).from_pretrained(folder, dtype=model.dtype)
    reloaded.to(model.device)  # type: ignore[arg-type]
    return prove_alike(model, expected, reloaded, batch, "reloaded", device=device)
