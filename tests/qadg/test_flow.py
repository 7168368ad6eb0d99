"""Views: dims merge into products and split into factors."""

from __future__ import annotations

import numpy as np
import pytest

from geta_hf.qadg.propagation.flow import Flow
from geta_hf.qadg.tracing.graph import Graph


def atoms(flow: Flow, dim: np.ndarray | None) -> list[list[int]] | None:
    return None if dim is None else flow.ids.atoms(dim).tolist()


def test_a_split_binds_each_element_to_outer_and_inner():
    flow = Flow(Graph())
    hidden = flow.ids.fresh(6)
    outer, inner = flow.split(hidden, (2, 3))
    assert atoms(flow, hidden) == [[a, b] for a in outer for b in inner]


def test_merging_what_was_split_gives_the_same_elements():
    flow = Flow(Graph())
    hidden = flow.ids.fresh(24)
    parts = flow.split(hidden, (2, 3, 4))
    assert atoms(flow, flow.merge(parts, (2, 3, 4))) == atoms(flow, hidden)


def test_a_second_split_of_the_same_dim_finds_the_same_factors():
    flow = Flow(Graph())
    hidden = flow.ids.fresh(6)
    first, second = flow.split(hidden, (2, 3)), flow.split(hidden, (2, 3))
    assert [atoms(flow, dim) for dim in first] == [atoms(flow, dim) for dim in second]


def test_a_frozen_element_freezes_its_row_and_its_column():
    flow = Flow(Graph())
    hidden = flow.ids.fresh(6)
    flow.ids.pin(hidden[:1])
    outer, inner = flow.split(hidden, (2, 3))
    assert atoms(flow, outer)[0] == [0] and atoms(flow, inner)[0] == [0]
    assert atoms(flow, outer)[1] != [0]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, 6), (2, 2, 3)),
        ((2, 6), (2, 1, 2, 3)),
        ((2, 2, 3), (4, 3)),
        ((1, 6), (6,)),
        ((6, 1), (1, 6, 1)),
        ((4, 3), (12,)),
        ((4, 6), (2, 2, 3, 2)),
        ((), (1, 1)),
    ],
)
def test_a_view_and_its_inverse_keep_every_element(before, after):
    flow = Flow(Graph())
    dims = [None if n == 1 else flow.ids.fresh(n) for n in before]
    there = flow.view(dims, before, after)
    back = flow.view(there, after, before)
    assert len(there) == len(after)
    assert [None if d is None else len(d) for d in there] == [None if n == 1 else n for n in after]
    assert [atoms(flow, dim) for dim in back] == [atoms(flow, dim) for dim in dims]


def test_a_frozen_batch_dim_merges_away():
    flow = Flow(Graph())
    heads = flow.ids.fresh(3)
    (merged,) = flow.view([None, heads], (2, 3), (6,))
    assert merged.tolist() == [*heads, *heads]
    batch, again = flow.view([merged], (6,), (2, 3))
    assert batch is None or not flow.ids.find(batch).any()
    assert again.tolist() == heads.tolist()


def test_an_empty_tensor_freezes_what_it_touches():
    flow = Flow(Graph())
    dim = flow.ids.fresh(4)
    assert flow.view([None, dim], (0, 4), (0,)) == [None]
    assert not flow.ids.find(dim).any()
