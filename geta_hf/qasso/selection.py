"""Which groups become redundant next: the lowest scores, up to an exact amount, and never a family's last group.

Groups leave in chunks: single groups by default, several where the kept count has to stay a multiple of something, and
one of every family of a kind where all layers have to keep equally many.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geta_hf.config import GETAConfig
from geta_hf.errors import GETAError
from geta_hf.qadg.groups import Family
from geta_hf.qasso.cuts import family_starts


@dataclass(frozen=True)
class Limits:
    """What every family keeps.

    Attributes:
        min_kept: a count, or below 1 a share; at least one group in any case.
        multiple_of: kept channels are a multiple of this.
        uniform: families of like kind and size lose equally many groups.
    """

    min_kept: float = 1
    multiple_of: int = 1
    uniform: bool = False

    @classmethod
    def of(cls, config: GETAConfig) -> Limits:
        """The limits that a config asks for."""
        return cls(config.min_kept, config.multiple_of, config.uniform)

    def least(self, family: Family) -> int:
        """How many groups a family keeps at least.

        Raises:
            GETAError: the family has fewer than that to begin with.
        """
        count = math.ceil(self.min_kept * family.size - 1e-9) if self.min_kept < 1 else int(self.min_kept)
        step = self.multiple(family)
        least = -(-max(count, 1) // step) * step
        if count > family.size:
            raise GETAError(f"min_kept = {self.min_kept} is more than the {family.size} groups of {family.name}")
        return min(least, family.size)  # a family of no whole multiple stays as it is

    def multiple(self, family: Family) -> int:
        """What the kept count of a family is a multiple of."""
        return self.multiple_of if family.kind == "channels" else 1

    def chunks(self, family: Family, kept: int) -> list[int]:
        """Sizes of the chunks in which a family of `kept` groups can still lose some, in order."""
        step, least, sizes = self.multiple(family), self.least(family), []
        while kept > least:
            size = min(kept % step or step, kept - least)
            if kept - size < least:
                break
            sizes.append(size)
            kept -= size
        return sizes


Chunk = tuple[float, list[int]]
"""Mean score, and the numbers of the groups."""


def find_chunks(families: Sequence[Family], scores: Tensor, gone: Tensor, limits: Limits) -> list[Chunk]:
    """All chunks that may leave, by ascending score; those of one family in the order in which they must leave.

    Args:
        scores: shape (groups,), finite.
        gone: bool, shape (groups,): groups that have left.
    """
    lists: dict[object, list[list[Chunk]]] = defaultdict(list)
    for start, family in zip(family_starts(families), families, strict=True):
        alike = (family.kind, family.size, family.parameters) if limits.uniform else family.name
        lists[alike].append(_chunks_of(start, family, scores, gone, limits))
    merged = [_side_by_side(together) for together in lists.values()]
    found = [chunk for chunks in merged for chunk in chunks]
    order = torch.sort(torch.tensor([score for score, _ in found], dtype=torch.float64), stable=True).indices
    return [found[position] for position in order.tolist()]


def _chunks_of(start: int, family: Family, scores: Tensor, gone: Tensor, limits: Limits) -> list[Chunk]:
    own = slice(start, start + family.size)
    order = torch.sort(scores[own].double().masked_fill(gone[own], math.inf), stable=True)
    sizes = limits.chunks(family, int((~gone[own]).sum()))
    used = sum(sizes)
    values, numbers = order.values[:used].split(sizes), (order.indices[:used] + start).split(sizes)
    if all(size == 1 for size in sizes):
        flat = zip(order.values[:used].tolist(), (order.indices[:used] + start).tolist(), strict=True)
        return [(score, [number]) for score, number in flat]
    return [(float(score.mean()), number.tolist()) for score, number in zip(values, numbers, strict=True)]


def _side_by_side(together: Sequence[list[Chunk]]) -> list[Chunk]:
    """The n-th chunks of all families as one; as many as the shortest family has."""
    if len(together) == 1:
        return together[0]
    rows = zip(*together, strict=False)
    return [(sum(s for s, _ in row) / len(row), [n for _, numbers in row for n in numbers]) for row in rows]


def take_count(chunks: Sequence[Chunk], count: int, exact: bool = True) -> list[int]:
    """The numbers of `count` groups, the lowest scores first.

    Args:
        exact: pass over chunks that are too large for what is missing; otherwise stop at the first one.

    Raises:
        GETAError: there are not so many.
    """
    if sum(len(numbers) for _, numbers in chunks) < count:
        raise GETAError(f"{count} more groups can't be removed, since every family keeps its least; lower the target")
    taken: list[int] = []
    for _, numbers in chunks:
        if len(taken) + len(numbers) <= count:
            taken += numbers
        elif not exact:
            break
    return taken


def take_until(chunks: Sequence[Chunk], gone: Tensor, amount: Callable[[Tensor], float], goal: float) -> list[int]:
    """The fewest lowest-scoring chunks after which `amount` is at most `goal`; all of them where it can't be.

    Args:
        gone: bool, shape (groups,): groups that have left.
        amount: what is left of the model under a mask of groups gone; falls with every group.
        goal: in the unit of `amount`.
    """

    def after(count: int) -> float:
        mask = gone.clone()
        mask[[number for _, numbers in chunks[:count] for number in numbers]] = True
        return amount(mask)

    low, high = 0, len(chunks)
    while low < high:
        middle = (low + high) // 2
        if after(middle) <= goal:
            high = middle
        else:
            low = middle + 1
    return [number for _, numbers in chunks[:low] for number in numbers]
