"""Keep some training rows back for a method that trains its choices on other rows than the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Subset

from geta_hf.errors import GETAError


def split_rows(dataset: Any, share: float, seed: int) -> tuple[Any, Any]:
    """Split a data set by index: the rows that weights are trained on, and those that are held out.

    Args:
        dataset: rows by index.
        share: of the rows that are held out; 0 holds out none.
        seed: of the permutation that chooses them, so that a resumed run holds out the same ones.

    Returns:
        The two parts, both of the dataset's own kind where it can select rows; the second is None for a share of 0.

    Raises:
        GETAError: a stream, or so few rows that a part would be empty.
    """
    if not share or dataset is None:
        return dataset, None
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise GETAError(
            f"architecture_data = {share} holds out rows by index, which a {type(dataset).__name__} lacks; set it to "
            f"0, or give train_dataset as rows by index"
        )
    count = len(dataset)
    held = round(share * count)
    if not 0 < held < count:
        raise GETAError(
            f"architecture_data = {share} holds out {held} of {count} rows; both parts need at least one: change the "
            f"share, or give more rows"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return _select(dataset, sorted(order[held:])), _select(dataset, sorted(order[:held]))


def _select(dataset: Any, rows: list[int]) -> Any:
    # `datasets` has columns, which Trainer looks at, and a method that keeps them.
    return dataset.select(rows) if hasattr(dataset, "column_names") else Subset(dataset, rows)


def held_out_batches(
    rows: Any, size: int, collate: Callable[[list[Any]], Any], seed: int, numbers: range
) -> Iterator[Any]:
    """Yield batches of held-out rows. Each depends on its number alone, so a resumed run sees the same ones.

    Args:
        rows: of `split_rows`.
        size: rows of a batch, at most.
        collate: makes a batch of rows.
        seed: of the run.
        numbers: of the batches; processes and micro-batches have numbers of their own.
    """
    for number in numbers:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        chosen = torch.randperm(len(rows), generator=generator)[:size].tolist()
        yield collate([rows[index] for index in chosen])
