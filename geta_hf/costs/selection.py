"""Choose which groups are removed next: the lowest scores, up to an exact amount, and never a family's last group.

Groups are removed in chunks: single groups by default, several where the kept count has to be a multiple of something,
and one of every family of a kind where all layers have to keep equally many.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from geta_hf.config import CompressionConfig
from geta_hf.errors import GETAError
from geta_hf.qadg.group_labels import family_starts
from geta_hf.qadg.group_types import Family

TOLERANCE = 0.005
"""How far below the wanted amount a removal may end, as a share of it, before smaller chunks are tried."""

ATTEMPTS = 256
"""How many smaller chunks are tried then."""


@dataclass(frozen=True)
class Limits:
    """What every family keeps.

    Attributes:
        min_kept: a count, or below 1 a share; at least one group in any case.
        multiple_of: kept channels are a multiple of this.
        uniform: families of like kind and size lose equally many groups.
        uniform_kinds: the same for families of these kinds alone.
        counted: a family keeps one of its `counts`, where it has some, though layers may differ.
    """

    min_kept: float = 1
    multiple_of: int = 1
    uniform: bool = False
    uniform_kinds: tuple[str, ...] = ()
    counted: bool = False

    @classmethod
    def of(cls, config: CompressionConfig) -> Limits:
        """Return the limits that a config asks for."""
        # vLLM has one number of heads for all layers, and one of channels for each.
        kinds = ("heads", "query_heads") if config.serve == "vllm" else ()
        return cls(config.min_kept, config.multiple_of, config.uniform, kinds, config.serve is not None)

    def alike(self, family: Family) -> bool:
        """Return whether a family loses as many groups as all others of its kind and size."""
        return self.uniform or family.kind in self.uniform_kinds

    def least(self, family: Family) -> int:
        """Return the number of groups that a family keeps at least.

        Raises:
            GETAError: the family has fewer than that to begin with.
        """
        # Rounding: .07 of 100 is 7.000000000000001, and must not keep 8.
        count = math.ceil(self.min_kept * family.size - 1e-9) if self.min_kept < 1 else int(self.min_kept)
        step = self.multiple(family)
        least = -(-max(count, 1) // step) * step
        if count > family.size:
            raise GETAError(f"min_kept = {self.min_kept} is more than the {family.size} groups of {family.name}")
        # A family of fewer groups than one multiple keeps them all.
        return min((n for n in self._counts(family) if n >= least), default=family.size)

    def restricted(self, family: Family) -> bool:
        """Return whether a family may keep certain counts only, which need not be multiples of a number."""
        return (self.uniform or self.counted) and bool(family.counts)

    def _counts(self, family: Family) -> Sequence[int]:
        return family.counts if self.restricted(family) else range(1, family.size + 1)

    def multiple(self, family: Family) -> int:
        """Return the number of which the kept count of a family is a multiple."""
        return self.multiple_of if family.kind == "channels" else 1

    def chunks(self, family: Family, kept: int) -> list[int]:
        """Return the sizes of the chunks in which a family of `kept` groups can still lose some, in order."""
        step = self.multiple(family)
        least = self.least(family)
        if self.restricted(family):
            below = [n for n in self._counts(family) if least <= n < kept and n % step == 0]
            return [more - fewer for more, fewer in pairwise([kept, *reversed(below)])]
        sizes = []
        while kept > least:
            # First down to a multiple, which may be a smaller chunk, then by full ones: 30 under 8 gives 6, 8, 8.
            size = min(kept % step or step, kept - least)
            if kept - size < least:
                break
            sizes.append(size)
            kept -= size
        return sizes


@dataclass(frozen=True)
class Chunks:
    """Groups that are removed together, in the order of their removal: flat vectors, since there may be many.

    Attributes:
        groups: int64, shape (groups that may be removed,): their numbers, chunk by chunk.
        sizes: int64, shape (chunks,): groups of each chunk.
        scores: float64, shape (chunks,), ascending: mean scores.
        lists: int64, shape (chunks,): chunks of one number have to be removed in their order. Those of equal sizes have
            numbers of their own, since only the counts of groups are limited.
    """

    groups: Tensor
    sizes: Tensor
    scores: Tensor
    lists: Tensor

    def first(self, count: int) -> Tensor:
        """Return the numbers of the groups of the first `count` chunks."""
        return self.groups[: int(self.sizes[:count].sum())]

    def fitting(self, start: int, room: int) -> Iterator[Tensor]:
        """Yield the groups of chunks from the one numbered `start` on, in order, as far as `room` groups have place.

        What has to follow a chunk that is passed over is passed over as well.
        """
        passed: set[int] = set()
        numbers = self.groups[int(self.sizes[:start].sum()) :].split(self.sizes[start:].tolist())
        for own, groups in zip(self.lists[start:].tolist(), numbers, strict=True):
            if own in passed:
                continue
            if len(groups) <= room:
                room -= len(groups)
                yield groups
            else:
                passed.add(own)


def find_chunks(families: Sequence[Family], scores: Tensor, removed: Tensor, limits: Limits) -> Chunks:
    """Return all chunks that may be removed, by ascending score; those of one family in their only possible order.

    Args:
        families: those that may lose groups.
        scores: shape (groups,), finite.
        removed: bool, shape (groups,): groups that are removed already.
        limits: what families keep.
    """
    groups: list[Tensor] = [torch.zeros(0, dtype=torch.int64)]
    owner: list[Tensor] = [torch.zeros(0, dtype=torch.int64)]
    first = 0
    lists_of: list[int] = []
    for together in _alike(families, limits):
        lists = _chunk_sizes(together, removed, limits)
        count = len(lists[0])
        for (start, family), sizes in zip(together, lists, strict=True):
            used = torch.tensor(sizes, dtype=torch.int64)
            groups.append(_by_score(scores, removed, start, family)[: int(used.sum())])
            owner.append(torch.repeat_interleave(torch.arange(first, first + count), used))
        ordered = any(len(set(sizes)) > 1 for sizes in lists)
        lists_of += [first] * count if ordered else range(first, first + count)
        first += count
    return _in_order(torch.cat(groups), torch.cat(owner), scores, torch.tensor(lists_of, dtype=torch.int64))


def _chunk_sizes(together: Sequence[tuple[int, Family]], removed: Tensor, limits: Limits) -> list[list[int]]:
    """Return the sizes of the chunks that families can still lose, equally many of each, in order."""
    lists = []
    for start, family in together:
        remaining = int((~removed[start : start + family.size]).sum())
        lists.append(limits.chunks(family, remaining))
    # Families that lose equally many stop where the first of them has reached its least.
    count = min(len(sizes) for sizes in lists)
    return [sizes[:count] for sizes in lists]


def _by_score(scores: Tensor, removed: Tensor, start: int, family: Family) -> Tensor:
    """Return the numbers of a family's groups by ascending score, removed ones last."""
    own = slice(start, start + family.size)
    # Stable, so that equal scores give the same groups on every run.
    order = torch.sort(scores[own].double().masked_fill(removed[own], math.inf), stable=True).indices
    return order + start


@dataclass(frozen=True)
class Ladder:
    """The order in which families lose groups that lose equally many; usually of one family alone.

    Attributes:
        families: their positions among all families.
        groups: of each of them, int64, the numbers of its groups in the order of their removal, the least score first.
        sizes: int64, shape (steps,): how many groups each family loses with each step.
    """

    families: list[int]
    groups: list[Tensor]
    sizes: Tensor


def find_ladders(families: Sequence[Family], scores: Tensor, removed: Tensor, limits: Limits) -> list[Ladder]:
    """Return every step that families can still take towards their least; arguments as in `find_chunks`."""
    number = {family.name: position for position, family in enumerate(families)}
    ladders = []
    for together in _alike(families, limits):
        sizes = torch.tensor(_chunk_sizes(together, removed, limits)[0], dtype=torch.int64)
        count = int(sizes.sum())
        groups = [_by_score(scores, removed, start, family)[:count] for start, family in together]
        ladders.append(Ladder([number[family.name] for _, family in together], groups, sizes))
    return ladders


def _alike(families: Sequence[Family], limits: Limits) -> list[list[tuple[int, Family]]]:
    """Return families with the number of their first group, those together that must lose equally many."""
    lists: dict[object, list[tuple[int, Family]]] = defaultdict(list)
    for start, family in zip(family_starts(families), families, strict=True):
        key = (family.kind, family.size, family.parameters) if limits.alike(family) else family.name
        lists[key].append((start, family))
    return list(lists.values())


def _in_order(groups: Tensor, owner: Tensor, scores: Tensor, lists: Tensor) -> Chunks:
    """Sort chunks by their mean score; `owner` is the chunk of each of `groups`, `lists` the list of each chunk."""
    count = len(lists)
    sizes = torch.bincount(owner, minlength=count)
    total = torch.zeros(count, dtype=torch.float64).index_add_(0, owner, scores[groups].double())
    # The mean and not the sum: a chunk of 8 groups must not look 8 times as important.
    mean, order = torch.sort(total / sizes.clamp_min(1), stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(count))
    return Chunks(groups[torch.sort(rank[owner], stable=True).indices], sizes[order], mean, lists[order])


def take_count(chunks: Chunks, count: int, exact: bool = True) -> Tensor:
    """Return the numbers of `count` groups, the lowest scores first.

    Args:
        chunks: those that may be removed.
        count: how many groups.
        exact: pass over chunks that are too large for what is missing; otherwise stop at the first one.

    Raises:
        GETAError: there are not so many.
    """
    if len(chunks.groups) < count:
        raise GETAError(f"{count} more groups can't be removed, since every family keeps its least; lower the target")
    # Chunks are taken in order of score as long as they fit, and only the rest is filled from further on.
    fitting = int((chunks.sizes.cumsum(0) <= count).sum())
    taken = [chunks.first(fitting)]
    missing = count - len(taken[0])
    if exact and missing:
        taken += chunks.fitting(fitting, missing)
    return torch.cat(taken)


def take_until(chunks: Chunks, removed: Tensor, amount: Callable[[Tensor], float], wanted: float) -> Tensor:
    """Return the fewest lowest-scoring chunks after which `amount` is at most `wanted`; all if even they are too few.

    Where the last of them goes far beyond, smaller ones take its place.

    Args:
        chunks: those that may be removed.
        removed: bool, shape (groups,): groups that are removed already.
        amount: what remains of the model under a mask of removed groups; falls with every group.
        wanted: in the unit of `amount`.
    """

    def after(taken: Tensor) -> float:
        mask = removed.clone()
        mask[taken] = True
        return amount(mask)

    # By bisection, as counting what remains takes a pass over the ledger and it can only fall.
    low = 0
    high = len(chunks.sizes)
    while low < high:
        middle = (low + high) // 2
        if after(chunks.first(middle)) <= wanted:
            high = middle
        else:
            low = middle + 1
    taken = chunks.first(low)
    # A last chunk may be a head of a thousand times a channel's parameters, and go far beyond.
    if low and after(taken) < wanted * (1 - TOLERANCE):
        return _nearer(chunks, low - 1, after, wanted)
    return taken


def _nearer(chunks: Chunks, count: int, after: Callable[[Tensor], float], wanted: float) -> Tensor:
    """Return the first `count` chunks and those of the next ones that do not go far beyond `wanted`; else the least."""
    taken = chunks.first(count)
    nearest = chunks.first(count + 1)
    least = after(nearest)
    numbers = chunks.groups[len(nearest) :].split(chunks.sizes[count + 1 :].tolist())
    lists = chunks.lists[count:].tolist()
    passed = {lists[0]}  # what has to follow a chunk that is passed over is passed over as well
    for own, groups in list(zip(lists[1:], numbers, strict=True))[:ATTEMPTS]:
        if own in passed:
            continue
        more = torch.cat([taken, groups])
        remaining = after(more)
        if remaining > wanted:
            taken = more
            continue
        passed.add(own)
        if remaining > least:
            nearest, least = more, remaining
        if wanted * (1 - TOLERANCE) <= least:
            break
    return nearest
