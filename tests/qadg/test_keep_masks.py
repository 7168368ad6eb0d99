"""What stays follows from the atoms that leave, through products of dims too."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from geta_hf.qadg.propagation.flow import Flow
from geta_hf.qadg.propagation.keep_masks import KeepMasks
from geta_hf.qadg.propagation.propagate import record_and_propagate


class Grid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns = nn.Parameter(torch.ones(3, 1)), nn.Parameter(torch.ones(1, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum() + (self.rows + self.columns).flatten().sum()


def grid() -> tuple[Flow, dict[str, int], int]:
    flow = record_and_propagate(Grid(), {"x": torch.ones(2)})
    names = {value.names[0]: position for position, value in enumerate(flow.graph.values) if value.names}
    (flat,) = [position for position, value in enumerate(flow.graph.values) if value.shape == (6,)]
    return flow, names, flat


def without(flow: Flow, value: int, dim: int, element: int) -> KeepMasks:
    ids = flow.dims(value)[dim]
    assert ids is not None
    removed = np.zeros(flow.ids.count, np.bool_)
    removed[flow.ids.atoms(ids)[element]] = True
    return KeepMasks(flow, removed)


def test_an_element_of_a_product_leaves_with_any_of_its_factors() -> None:
    flow, names, flat = grid()
    staying = without(flow, names["rows"], 0, 1)
    assert staying.mask(names["rows"], 0).tolist() == [True, False, True]
    assert staying.mask(flat, 0).tolist() == [True, True, False, False, True, True]
    staying = without(flow, names["columns"], 1, 0)
    assert staying.mask(flat, 0).tolist() == [False, True] * 3


def test_none_says_that_everything_stays() -> None:
    flow, names, flat = grid()
    staying = without(flow, names["rows"], 0, 1)
    assert staying.mask(names["columns"], 1) is None
    assert staying.mask(names["x"], 0) is None
    assert KeepMasks(flow, None).mask(flat, 0) is None
