"""Tiny models with the same number of groups cut from every layer, as compressed in memory."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedModel

from geta_hf.export.export import compress
from geta_hf.qadg import PruningSpace, kept_indices
from geta_hf.qadg.group_types import Family
from geta_hf.quantization import attach_quantizers, quantized_layers, step_size
from geta_hf.surgery.verify import mask_groups
from tests.architectures import build
from tests.export.tiny_encoders import form_all_blocks
from tests.spaces import build_space

Batch = dict[str, Tensor]


def cut(
    model: PreTrainedModel,
    batch: Batch,
    *,
    kinds: tuple[str, ...] = ("heads", "channels"),
    bits: tuple[int, ...] | None = (4, 3, 8, 2, 6, 5, 7),
    per_channel: bool = False,
    grid: str | None = None,
    four_levels: bool = False,
) -> PreTrainedModel:
    """Half the groups of these kinds set to zero in the model, and the compressed copy; `bits` by turns, or none.

    With `four_levels` the layers of 2 bits have four.
    """
    space = build_space(model, batch)
    families = [family for family in space.prunable if family.kind in kinds]
    return compressed(model, batch, space, {f.name: halved(f) for f in families}, bits, per_channel, grid, four_levels)


def halved(family: Family) -> Tensor:
    return torch.arange(family.size) < family.size // 2


@torch.no_grad()
def compressed(
    model: PreTrainedModel,
    batch: Batch,
    space: PruningSpace,
    removal: dict[str, Tensor],
    bits: tuple[int, ...] | None = (4,),
    per_channel: bool = False,
    grid: str | None = None,
    four_levels: bool = False,
) -> PreTrainedModel:
    mask_groups(model, space.families, removal)
    if bits is not None:
        attach_quantizers(model, per_channel=per_channel, grid=grid)
        form_all_blocks(model, kept_indices(space, removal))
        for place, layer in enumerate(quantized_layers(model).values()):
            quantizer = layer.weight_quantizer
            width = bits[place % len(bits)]
            quantizer.d.copy_(step_size(float(width), quantizer.q_m, quantizer.t))
            if four_levels and width == 2:
                # As a method does: the third that is stored is a number of fp16.
                quantizer.d.copy_((quantizer.d / 3).half().float() * 3)
                quantizer.q_m.copy_(quantizer.d)
                quantizer.set_four_levels()
    return compress(model, space, removal, batch)


def tiny(name: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Batch]:
    """A tiny model whose biases and norms are not trivial, and a batch."""
    model, batch = build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype), batch


@cache
def prepared(name: str) -> tuple[PreTrainedModel, PreTrainedModel, Batch]:
    """The masked model, its compressed copy and a batch; shared by tests, so not to be changed."""
    model, batch = tiny(name)
    return model, cut(model, batch), batch


def logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits
