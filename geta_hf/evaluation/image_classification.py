"""Score image classification models: accuracy over labelled rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from geta_hf.errors import GETAError
from geta_hf.utils.module_state import eval_mode

TOP = 5
"""Labels among which `accuracy_top5` looks for the right one."""


@torch.no_grad()
def predict_classes(
    model: nn.Module,
    rows: Dataset[Any],
    collate: Callable[[list[Any]], dict[str, Tensor]],
    *,
    batch_size: int = 32,
    bf16: bool = False,
    workers: int = 0,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the most probable classes of every row and its label.

    Args:
        model: an image classification model; it runs in evaluation mode where it is.
        rows: with `labels`, an integer class each, and the model's inputs.
        collate: turns a list of rows into a batch of tensors.
        batch_size: rows of a batch. Default 32.
        bf16: run under bfloat16 autocast. Default False.
        workers: processes that read rows. Default 0: this one.
        progress: show a bar. Default False.

    Returns:
        Classes by falling probability, int64, shape (rows, at most 5), and labels, int64, shape (rows,); on CPU.
    """
    device = next(model.parameters()).device
    loader: DataLoader[Any] = DataLoader(rows, batch_size=batch_size, collate_fn=collate, num_workers=workers)
    found, labels = [], []
    with eval_mode(model), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for batch in tqdm(loader, desc="images", disable=not progress):
            labels.append(batch["labels"])
            inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
            logits = model(**inputs).logits
            found.append(logits.float().topk(min(TOP, logits.shape[-1]), dim=-1).indices.cpu())
    if not found:
        raise GETAError("there is no image to score; give at least one")
    return torch.cat(found), torch.cat(labels)


def accuracies(found: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the shares of right answers in percent, with standard errors.

    Args:
        found: classes by falling probability, int64, shape (rows, at most 5).
        labels: int64, shape (rows,).

    >>> accuracies(torch.tensor([[1, 0], [0, 1]]), torch.tensor([1, 1]))["accuracy"]
    50.0
    """
    right = found == labels[:, None]
    scores = {"accuracy": right[:, 0]}
    # Among as many labels as are asked for, one is always right.
    if found.shape[1] == TOP:
        scores["accuracy_top5"] = right.any(1)
    result = {}
    for name, hits in scores.items():
        share = float(hits.double().mean())
        result[name] = 100 * share
        result[f"{name}_stderr"] = 100 * math.sqrt(share * (1 - share) / len(labels))
    return result


def collate_images(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Return one batch of rows: `pixel_values` (rows, channels, height, width) and `labels`.

    Labels are int64, shape (rows,), or float, shape (rows, classes), as the rows have them.

    Raises:
        GETAError: images of different sizes, which make no batch.
    """
    pixels = [row["pixel_values"] for row in rows]
    sizes = {tuple(image.shape[-2:]) for image in pixels}
    if len(sizes) > 1:
        raise GETAError(
            f"images of different sizes {sorted(sizes)[:3]} make no batch: the processor must give all of them one "
            f"size, by image_size or its own `size` with height and width"
        )
    labels = [row["labels"] for row in rows]
    joined = torch.stack(labels) if isinstance(labels[0], Tensor) else torch.tensor(labels)
    return {"pixel_values": torch.stack(pixels), "labels": joined}
