from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from geta_hf.errors import GETAError
from geta_hf.surgery.fixes import no_fixes
from geta_hf.surgery.slice import slice_model


def index(*places: int) -> torch.Tensor:
    return torch.tensor(places)


@pytest.mark.parametrize(
    ("layer", "kept", "attributes"),
    [
        (nn.Linear(6, 5), {"weight": {0: index(0, 2), 1: index(1, 3, 5)}}, {"out_features": 2, "in_features": 3}),
        (Conv1D(5, 6), {"weight": {1: index(0, 4)}}, {"nf": 2}),
        (nn.Conv2d(4, 6, 3), {"weight": {0: index(5), 1: index(0, 1)}}, {"out_channels": 1, "in_channels": 2}),
        (nn.LayerNorm(6), {"weight": {0: index(1, 2)}, "bias": {0: index(1, 2)}}, {"normalized_shape": [2]}),
        (nn.Embedding(9, 6), {"weight": {1: index(0, 5)}}, {"embedding_dim": 2}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_tensors_and_attributes_shrink_together(layer: nn.Module, kept: dict, attributes: dict) -> None:
    model = nn.Sequential(layer)
    full = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fixes = slice_model(model, {f"0.{name}": dims for name, dims in kept.items()})
    assert fixes["attrs"] == {"0": attributes}
    for attribute, value in attributes.items():
        assert getattr(layer, attribute) == (tuple(value) if isinstance(value, list) else value)
    for name, dims in kept.items():
        expected = full[f"0.{name}"]
        for dim, places in dims.items():
            expected = expected.index_select(dim, places)
        assert torch.equal(getattr(layer, name), expected)
        assert fixes["shapes"][f"0.{name}"] == list(expected.shape)


def test_requires_grad_and_type_stay() -> None:
    layer = nn.Linear(4, 4)
    layer.bias.requires_grad_(False)
    slice_model(layer, {"weight": {0: index(1)}, "bias": {0: index(1)}})
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.weight.requires_grad
    assert not layer.bias.requires_grad


def test_tied_tensor_is_cut_once_and_listed_under_both_names() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(7, 4), "b": nn.Linear(4, 7, bias=False)})
    model["b"].weight = model["a"].weight
    fixes = slice_model(model, {"b.weight": {1: index(0, 3)}})
    assert model["b"].weight is model["a"].weight
    assert fixes["shapes"] == {"a.weight": [7, 2], "b.weight": [7, 2]}
    assert fixes["attrs"] == {"a": {"embedding_dim": 2}, "b": {"in_features": 2}}


def test_tied_names_that_disagree_are_refused() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    with pytest.raises(GETAError, match="cut at other indices"):
        slice_model(model, {"a.weight": {0: index(0, 1)}, "b.weight": {0: index(1, 2)}})


def test_shared_module_is_cut_once() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, layer)
    fixes = slice_model(model, {"0.weight": {0: index(0, 1)}})
    assert layer.out_features == 2
    assert fixes["shapes"] == {"0.weight": [2, 4], "1.weight": [2, 4]}


def test_buffer_is_cut() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(6.0))

    model = Positions()
    slice_model(model, {"table": {0: index(1, 4)}})
    assert model.table.tolist() == [1.0, 4.0]
    assert not isinstance(model.table, nn.Parameter)


def test_keeping_everything_changes_nothing() -> None:
    model = nn.Linear(3, 3)
    weight = model.weight
    fixes = slice_model(model, {"weight": {0: index(0, 1, 2)}})
    assert fixes == no_fixes()
    assert model.weight is weight


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"absent": {0: index(0)}}, "names absent"),
        ({"weight": {2: index(0)}}, "dim 2 cannot be cut"),
        ({"weight": {0: index(0, 3)}}, "not within"),
        ({"weight": {0: index(-1)}}, "not within"),
        ({"weight": {0: torch.empty(0, dtype=torch.int64)}}, "none"),
    ],
)
def test_impossible_cut_is_refused(kept: dict, message: str) -> None:
    with pytest.raises(GETAError, match=message):
        slice_model(nn.Linear(3, 3), kept)


def test_module_that_cannot_follow_is_refused() -> None:
    layer = nn.MultiheadAttention(8, 2)
    with pytest.raises(GETAError, match="0 is a MultiheadAttention"):
        slice_model(nn.Sequential(layer), {"0.in_proj_weight": {0: index(*range(12))}})
