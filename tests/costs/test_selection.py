"""Which groups leave: exact counts, the lowest scores, chunks, and never a family's least."""

from __future__ import annotations

import pytest
import torch

from geta_hf.costs.selection import Limits, find_chunks, take_count, take_until
from geta_hf.errors import GETAError
from geta_hf.qadg.group_types import Family, Member


def family(name: str, size: int, kind: str = "channels") -> Family:
    return Family(name, kind, (Member(name, 0, torch.arange(size)[:, None]),), prunable=True)


SMALL = (family("a", 3), family("b", 4))
SCORES = torch.tensor([0.1, 0.2, 0.3, 5.0, 6.0, 7.0, 8.0])
NONE = torch.zeros(7, dtype=torch.bool)


def test_exact_counts_of_the_lowest_and_no_family_loses_its_last_group() -> None:
    chunks = find_chunks(SMALL, SCORES, NONE, Limits())
    assert take_count(chunks, 4).tolist() == [0, 1, 3, 4]
    gone = NONE.clone()
    gone[[0, 1, 3, 4]] = True
    chunks = find_chunks(SMALL, SCORES, gone, Limits())
    assert take_count(chunks, 1).tolist() == [5]
    with pytest.raises(GETAError, match="2 more groups can't be removed"):
        take_count(chunks, 2)


def test_ties_go_to_the_earlier_family_and_group() -> None:
    assert take_count(find_chunks(SMALL, torch.ones(7), NONE, Limits()), 3).tolist() == [0, 1, 3]


@pytest.mark.parametrize(("least", "removable"), [(1, 5), (2, 3), (0.5, 3), (0.7, 1)])
def test_every_family_keeps_its_least(least: float, removable: int) -> None:
    chunks = find_chunks(SMALL, SCORES, NONE, Limits(min_kept=least))
    assert len(chunks.sizes) == removable


def test_a_least_beyond_the_family_is_refused() -> None:
    with pytest.raises(GETAError, match="min_kept = 4 is more than the 3 groups of a"):
        find_chunks(SMALL, SCORES, NONE, Limits(min_kept=4))


def test_kept_channels_are_multiples_and_heads_are_not() -> None:
    families = (family("wide", 21), family("heads", 4, "heads"))
    scores = torch.cat([torch.arange(21.0), torch.tensor([0.5, 30.0, 31.0, 32.0])])
    limits = Limits(multiple_of=8)
    chunks = find_chunks(families, scores, torch.zeros(25, dtype=torch.bool), limits)
    assert [numbers.tolist() for numbers in chunks.groups.split(chunks.sizes.tolist())] == [
        [21],
        list(range(5)),
        list(range(5, 13)),
        [22],
        [23],
    ]
    assert take_count(chunks, 7).tolist() == [21, *range(5), 22]  # the chunk of 8 does not fit any more, a head does
    assert take_count(chunks, 7, exact=False).tolist() == [21, *range(5)]


def test_a_family_that_has_no_multiple_left_stays_whole() -> None:
    assert Limits(multiple_of=8).chunks(family("narrow", 6), 6) == []
    assert Limits(multiple_of=8, min_kept=20).chunks(family("wide", 21), 21) == []  # 16 would be too few
    assert Limits(multiple_of=8, min_kept=16).chunks(family("wide", 21), 21) == [5]


def test_uniform_families_lose_equally_many() -> None:
    families = (family("a", 4), family("b", 4), family("heads", 3, "heads"))
    scores = torch.tensor([1.0, 2, 3, 4, 40, 30, 20, 10, 0, 7, 8])
    chunks = find_chunks(families, scores, torch.zeros(11, dtype=torch.bool), Limits(uniform=True))
    assert [numbers.tolist() for numbers in chunks.groups.split(chunks.sizes.tolist())] == [
        [8],
        [0, 7],
        [9],
        [1, 6],
        [2, 5],
    ]
    assert chunks.scores.tolist() == [0, 5.5, 7, 11, 16.5]


def test_the_fewest_that_meet_an_amount() -> None:
    sizes = torch.tensor([4.0, 1, 1, 2, 2, 2, 2])
    chunks = find_chunks(SMALL, SCORES, NONE, Limits())

    def left(gone: torch.Tensor) -> float:
        return float(sizes[~gone].sum())

    assert take_until(chunks, NONE, left, 14.0).tolist() == []
    assert take_until(chunks, NONE, left, 10.0).tolist() == [0]
    assert take_until(chunks, NONE, left, 8.5).tolist() == [0, 1, 3]
    assert take_until(chunks, NONE, left, 0.0).tolist() == [0, 1, 3, 4, 5]  # all that may leave


def test_a_chunk_that_goes_far_beyond_gives_way_to_smaller_ones() -> None:
    sizes = torch.tensor([50.0, 3, 1, 2, 2, 2, 2])
    scores = torch.tensor([0.5, 0.6, 9, 0.1, 0.7, 0.8, 9])

    def left(gone: torch.Tensor) -> float:
        return 1000 + float(sizes[~gone].sum())

    chunks = find_chunks(SMALL, scores, NONE, Limits())
    whole = left(NONE)
    assert take_until(chunks, NONE, left, whole - 7).tolist() == [3, 1, 4]  # not group 0 and its 50
    assert take_until(chunks, NONE, left, whole - 40).tolist() == [3, 0]  # the others would not be enough


def test_where_all_chunks_go_far_beyond_the_smallest_that_is_enough_goes() -> None:
    sizes = torch.tensor([80.0, 60, 1, 20, 30, 40, 1])
    scores = torch.tensor([0.1, 0.5, 9, 0.2, 0.3, 0.4, 9])

    def left(gone: torch.Tensor) -> float:
        return 100 + float(sizes[~gone].sum())

    chunks = find_chunks(SMALL, scores, NONE, Limits())
    assert take_until(chunks, NONE, left, left(NONE) - 15).tolist() == [3]


def test_counts_that_a_config_accepts_are_the_only_ones_kept() -> None:
    members = (Member("w", 0, torch.arange(8)[:, None]),)
    families = [Family(f"{layer}:heads", "heads", members, True, counts=(1, 2, 4, 8)) for layer in range(2)]
    limits = Limits(min_kept=2, uniform=True)
    assert limits.chunks(families[0], 8) == [4, 2] and limits.least(families[0]) == 2
    assert Limits(min_kept=3, uniform=True).least(families[0]) == 4
    assert Limits().chunks(families[0], 8) == [1] * 7  # layers that may differ are no matter of a config
    chunks = find_chunks(families, torch.rand(16), torch.zeros(16, dtype=torch.bool), limits)
    assert chunks.sizes.tolist() == [8, 4]
    # The smaller chunk cannot go first: 6 of 8 is no count that is accepted.
    assert len(take_count(chunks, 7)) == 0 and len(take_count(chunks, 8)) == 8 and len(take_count(chunks, 12)) == 12
    left = take_until(chunks, torch.zeros(16, dtype=torch.bool), lambda mask: float((~mask).sum()), 12)
    assert len(left) == 8
