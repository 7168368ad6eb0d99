"""Make other batches of one: another number of rows, another length, padding.

A model's code may take another path for another shape, and a size may agree with another by chance: a batch of 4 rows
hides a mix-up with 4 heads.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Any]


def variants(model: nn.Module, batch: Mapping[str, Any]) -> list[Batch]:
    """Make batches of other shapes than `batch`, with padding where the model takes an attention mask.

    Not every model runs every one: pictures may have to come with so many tokens, tables may be of fixed length.

    Args:
        model: tells by its forward's signature whether there is an attention mask.
        batch: what the model runs.

    Returns:
        One with another number of rows, and, where there is text, one that is shorter, with the last row padded.
    """
    found = [_other_rows(batch)]
    main = batch.get(getattr(model, "main_input_name", "input_ids"))
    # Of the same shape as the tokens: the edges of a graph and the grids of pictures are integers in two dims as well.
    shape = main.shape if isinstance(main, Tensor) and _is_text(main) else None
    text = {name: item for name, item in batch.items() if _is_text(item) and shape in (None, item.shape)}
    if text:
        found.append(_shorter(batch, text, "attention_mask" in inspect.signature(model.forward).parameters))
    return found


def _is_text(item: Any) -> bool:
    return isinstance(item, Tensor) and item.dim() == 2 and not item.is_floating_point() and item.shape[1] > 2


def _other_rows(batch: Mapping[str, Any]) -> Batch:
    """Return its first row alone, or twice when that is all."""
    # Tensors of different lengths, such as patches of all pictures in one, can't be cut to one row by index.
    rows = {item.shape[0] for item in batch.values() if isinstance(item, Tensor) and item.dim()}
    if len(rows) != 1:
        return dict(batch)
    index = torch.tensor([0, 0] if rows == {1} else [0])
    return {
        name: item.index_select(0, index.to(item.device)) if isinstance(item, Tensor) and item.dim() else item
        for name, item in batch.items()
    }


def _shorter(batch: Mapping[str, Any], text: Mapping[str, Tensor], masked: bool) -> Batch:
    """Return all text without its last third, and the last row padded."""
    short = {}
    for name, item in text.items():
        length = max(2, item.shape[1] - item.shape[1] // 3)
        short[name] = item[:, :length].clone()
    first = next(iter(short.values()))
    if masked and ("attention_mask" not in batch or "attention_mask" in short):
        # Only one row, so that padded and full rows occur in the same batch.
        mask = short.get("attention_mask", torch.ones_like(first))
        mask[-1, -max(1, mask.shape[1] // 3) :] = 0
        short["attention_mask"] = mask
    return dict(batch) | short
