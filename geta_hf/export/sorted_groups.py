"""Sort the channels of a cut model by their widths, so that a file holds each width in one piece.

The channels of an MLP or a convolution may stand in any order, as long as all tensors have the same: a permutation
changes no output. Heads remain where they are, since attention maps and caches show their order.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from geta_hf.errors import GETAError
from geta_hf.qadg.group_types import Family, Member
from geta_hf.quantization import quantized_layers, without_quantizers
from geta_hf.surgery.compare_outputs import attention_outputs, prove_alike
from geta_hf.surgery.slice import reorder_model
from geta_hf.utils.model_io import Batch

logger = logging.getLogger(__name__)

Order = dict[str, dict[int, Tensor]]
"""Tensor name -> dim -> its present indices in their new order."""


def sort_channels(
    model: PreTrainedModel,
    families: Sequence[Family],
    removed: Mapping[str, Tensor],
    kept: Mapping[str, Mapping[int, Tensor]],
    batch: Batch,
    device: torch.device,
) -> None:
    """Sort the channels of a cut model by the widths of their quantizers, in place; narrow ones first.

    Where the order of channels matters after all, as to a norm over some of them, the model remains as it is.

    Args:
        model: cut, with its quantizers.
        families: that may lose groups, in the indices of the trained model.
        removed: family name -> bool, shape (groups,).
        kept: tensor name -> dim -> int64 indices of the trained model that remain.
        batch: on which the outputs are compared.
        device: where they are computed.
    """
    order = find_order(model, families, removed, kept)
    if not order:
        return
    inverse = {name: {dim: index.argsort() for dim, index in dims.items()} for name, dims in order.items()}
    with without_quantizers(model):
        before = attention_outputs(model, batch, device=device)
    reorder_model(model, order)
    _reorder_quantizers(model, order)
    try:
        with without_quantizers(model):
            prove_alike(model, before, model, batch, "reordered", device=device)
    except GETAError as error:
        logger.info("channels are not sorted by width: %s", error)
        reorder_model(model, inverse)
        _reorder_quantizers(model, inverse)


def find_order(
    model: PreTrainedModel,
    families: Sequence[Family],
    removed: Mapping[str, Tensor],
    kept: Mapping[str, Mapping[int, Tensor]],
) -> Order:
    """Return the order of every dim that sorting changes; arguments as in `sort_channels`."""
    bits = {
        (f"{name}.weight", layer.weight_quantizer.channel_dim): layer.weight_quantizer.bits().round().cpu()
        for name, layer in quantized_layers(model).items()
        if layer.weight_quantizer.channel_dim is not None and layer.weight_quantizer.order is None
    }
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **model.state_dict()}
    found: Order = {}
    for family in families:
        # A buffer that no file holds is made by the model's code, in its own order.
        if family.kind != "channels" or any(member.tensor not in tensors for member in family.members):
            continue
        mask = removed.get(family.name, torch.zeros(family.size, dtype=torch.bool))
        places = {
            (member.tensor, member.dim): _in_cut(member, mask, kept.get(member.tensor, {}).get(member.dim))
            for member in family.members
        }
        widths = [bits[place][index] for place, index in places.items() if place in bits]
        own = _agreed(widths)
        if own is None or bool((own.diff() >= 0).all()):
            continue
        new = own.argsort(stable=True)
        for (name, dim), index in places.items():
            full = found.setdefault(name, {}).setdefault(dim, torch.arange(tensors[name].shape[dim]))
            full[index.flatten()] = index[new].flatten()
    return found


def _in_cut(member: Member, removed: Tensor, kept: Tensor | None) -> Tensor:
    """Return the indices of the remaining groups in the cut tensor, int64, shape (groups, elements)."""
    index = member.index[~removed]
    return index if kept is None else torch.searchsorted(kept, index)


def _agreed(widths: Sequence[Tensor]) -> Tensor | None:
    """Return the width of each group, where all of its rows and columns have the same; else None.

    Args:
        widths: of each tensor, shape (groups, elements).
    """
    if not widths:
        return None
    all_of_group = torch.cat(list(widths), 1)
    first = all_of_group[:, 0]
    return first if bool((all_of_group == first[:, None]).all()) else None


def _reorder_quantizers(model: PreTrainedModel, order: Order) -> None:
    done: set[int] = set()
    for name, layer in quantized_layers(model).items():
        quantizer = layer.weight_quantizer
        index = order.get(f"{name}.weight", {}).get(-1 if quantizer.channel_dim is None else quantizer.channel_dim)
        if index is not None and id(quantizer) not in done:
            done.add(id(quantizer))
            quantizer.keep_channels(index)
