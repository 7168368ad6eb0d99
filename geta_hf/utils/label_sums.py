"""Add up the entries of a vector that have the same label, in the same order every time.

`index_add_` adds them on a GPU in whatever order they arrive, so that the last digit of a sum differs from run to run,
and with it what the sums decide.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from geta_hf.utils.upload import upload


class LabelSums:
    """The places of every label in a vector.

    Args:
        label: int64, shape (entries,). On the CPU, so that nothing waits for a GPU.
        device: where the values to add up are. Default: where `label` is.
    """

    def __init__(self, label: Tensor, device: torch.device | None = None) -> None:
        # On the CPU, where the sizes of what is made are known without a copy each.
        on_host = label.cpu()
        order = torch.argsort(on_host, stable=True)
        labels, counts = torch.unique_consecutive(on_host[order], return_counts=True)
        starts = counts.cumsum(0) - counts
        # Labels with the same number of entries make one table, so nothing is padded. Most vectors have one number.
        self._tables: list[tuple[Tensor, Tensor | None, int]] = []
        for count in counts.unique().tolist():
            same = counts == count
            places = order[starts[same][:, None] + torch.arange(count)]
            in_order = torch.equal(places.flatten(), torch.arange(len(on_host)))
            needed = [labels[same]] if in_order else [labels[same], places]
            own, *table = upload(needed, device or label.device)
            self._tables.append((own, table[0] if table else None, count))

    def of(self, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield labels, each once in all, shape (labels,), and their sums, shape (..., labels).

        Args:
            values: shape (..., entries).
        """
        for labels, places, count in self._tables:
            table = values.unflatten(-1, (len(labels), count)) if places is None else values[..., places]
            yield labels, table.squeeze(-1) if count == 1 else table.sum(-1)

    def add_to(self, total: Tensor, values: Tensor) -> None:
        """Add the sums to those of all labels, in place.

        Args:
            total: shape (..., more than the largest label).
            values: shape (..., entries).
        """
        for labels, sums in self.of(values):
            # Each label comes once, so the order in which a GPU adds does not matter.
            total.index_add_(-1, labels, sums)
