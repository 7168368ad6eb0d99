from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig

from geta_hf.errors import GETAError
from geta_hf.surgery.fixes import no_fixes, read_fixes, shrink_attribute, shrink_buffer, shrink_tensor
from geta_hf.surgery.slice import slice_model
from tests.export.tiny_encoders import some_batch, tiny_model
from tests.spaces import build_space


def test_list_makes_a_fresh_model_as_small_as_the_sliced_one() -> None:
    model = tiny_model()
    with torch.device("meta"):
        fresh = type(model)(model.config)
    kept: dict[str, dict[int, torch.Tensor]] = {}
    for place, family in enumerate(build_space(model, some_batch()).prunable):
        for member in family.members:
            kept.setdefault(member.tensor, {})[member.dim] = member.index[1 + place % 2 :].flatten()
    fixes = json.loads(json.dumps(slice_model(model, kept)))
    read_fixes(fixes, "fixes")
    for name, shape in fixes["shapes"].items():
        shrink_tensor(fresh, name, shape)
    for path, attributes in fixes["attrs"].items():
        for attribute, value in attributes.items():
            shrink_attribute(path, fresh.get_submodule(path), attribute, value)
    assert str(fresh) == str(model)
    assert fresh.load_state_dict(model.state_dict(), assign=True).missing_keys == []


def test_empty_list_is_valid() -> None:
    read_fixes(no_fixes(), "fixes")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", 3, r"fixes.version is 3"),
        ("version", 1, r"fixes.version is 1"),
        ("version", None, r"fixes.version is None"),
        ("shapes", [], "fixes.shapes must be an object"),
        ("shapes", {"a": [4, -1]}, r"shapes\['a'\] is \[4, -1\]"),
        ("shapes", {"a": [4, 0]}, r"shapes\['a'\]"),
        ("shapes", {"a": [True]}, r"shapes\['a'\]"),
        ("shapes", {"a": [2.0]}, r"shapes\['a'\]"),
        ("shapes", {"a": "44"}, r"shapes\['a'\]"),
        ("shapes", {"a": []}, r"shapes\['a'\]"),
        ("keep", 3, "fixes.keep must be an object"),
        ("keep", {"a": [1]}, r"keep\['a'\] must be an object"),
        ("keep", {"a": {"x": [1]}}, r"keep\['a'\]\['x'\]"),
        ("keep", {"a": {"-1": [1]}}, r"keep\['a'\]\['-1'\]"),
        ("keep", {"a": {"0": []}}, r"keep\['a'\]\['0'\]"),
        ("keep", {"a": {"0": [1, 1]}}, r"keep\['a'\]\['0'\]"),
        ("keep", {"a": {"0": [-1, 1]}}, r"keep\['a'\]\['0'\]"),
        ("keep", {"a": {"0": [True]}}, r"keep\['a'\]\['0'\]"),
        ("attrs", {"a": 3}, r"attrs\['a'\] must be an object"),
        ("attrs", {"a": {"b": "c"}}, r"attrs\['a'\]\['b'\]"),
        ("attrs", {"a": {"b": -1}}, r"attrs\['a'\]\['b'\]"),
        ("more", {}, "exactly version, shapes, keep and attrs"),
    ],
)
def test_what_is_no_fix_list_is_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(GETAError, match=message):
        read_fixes({**no_fixes(), key: value}, "fixes")


@pytest.mark.parametrize("fixes", [None, [], {}, {"version": 1}])
def test_other_json_is_refused(fixes: Any) -> None:
    with pytest.raises(GETAError, match="exactly version, shapes, keep and attrs"):
        read_fixes(fixes, "fixes")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("0.weight", [10**12, 4], "no cut"),
        ("0.weight", [5, 4], "no cut"),
        ("0.weight", [4], "no cut"),
        ("0.absent", [4], "does not have"),
    ],
)
def test_tensors_only_shrink(name: str, shape: list[int], message: str) -> None:
    with pytest.raises(GETAError, match=message):
        shrink_tensor(nn.Sequential(nn.Linear(4, 4)), name, shape)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("out_features", 5, "does not shrink"),
        ("out_features", [4], "not such a size"),
        ("training", 1, "not such a size"),
        ("_parameters", 1, "not such a size"),
        ("forward", 1, "not such a size"),
        ("absent", 1, "not such a size"),
    ],
)
def test_attributes_only_shrink(attribute: str, value: Any, message: str) -> None:
    layer = nn.Linear(4, 4)
    before = copy.copy(vars(layer))
    with pytest.raises(GETAError, match=message):
        shrink_attribute("path", layer, attribute, value)
    assert vars(layer) == before


def test_tuple_attribute_stays_a_tuple() -> None:
    norm = nn.LayerNorm(6)
    shrink_attribute("norm", norm, "normalized_shape", [4])
    assert norm.normalized_shape == (4,)
    with pytest.raises(GETAError, match="not such a size"):
        shrink_attribute("norm", norm, "normalized_shape", 4)


class Frequencies(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(6.0), persistent=False)
        self.register_buffer("saved", torch.arange(6.0))


def test_unsaved_buffer_is_cut_to_its_indices() -> None:
    model = nn.Sequential(Frequencies())
    shrink_buffer(model, "0.table", {"0": [1, 4]})
    assert model[0].table.tolist() == [1.0, 4.0]


@pytest.mark.parametrize(
    ("name", "dims", "message"),
    [
        ("0.saved", {"0": [1]}, "no unsaved buffer"),
        ("0.absent", {"0": [1]}, "no unsaved buffer"),
        ("0.table", {"1": [1]}, "beyond its shape"),
        ("0.table", {"0": [1, 6]}, "beyond its shape"),
    ],
)
def test_only_unsaved_buffers_are_cut_within_their_shape(name: str, dims: dict, message: str) -> None:
    with pytest.raises(GETAError, match=message):
        shrink_buffer(nn.Sequential(Frequencies()), name, dims)


def test_list_of_version_1_is_read() -> None:
    old = {"version": 1, "shapes": {"a": [2]}, "attrs": {"b": {"c": 3}}}
    assert read_fixes(old, "fixes") == {"version": 2, "shapes": {"a": [2]}, "keep": {}, "attrs": {"b": {"c": 3}}}


def layer_with_config() -> nn.Module:
    layer = nn.Identity()
    layer.config, layer.split, layer.sizes = BertConfig(num_attention_heads=4), (8, 8), [3, 5]
    return layer


@pytest.mark.parametrize(
    ("attribute", "value", "read"),
    [
        ("config.num_attention_heads", 3, lambda layer: layer.config.num_attention_heads),
        ("split[1]", 5, lambda layer: layer.split[1]),
        ("sizes[0]", 2, lambda layer: layer.sizes[0]),
        ("split", [5, 6], lambda layer: list(layer.split)),
    ],
)
def test_dotted_and_indexed_attributes_shrink(attribute: str, value: Any, read: Any) -> None:
    layer = layer_with_config()
    config = layer.config
    shrink_attribute("layer", layer, attribute, value)
    assert read(layer) == value
    assert config.num_attention_heads == 4
    assert type(layer.split) is tuple
    assert type(layer.sizes) is list


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("config.num_attention_heads", 5, "does not shrink"),
        ("config.absent", 1, "not such a size"),
        ("config._name_or_path", 1, "not such a size"),
        ("config.to_dict", 1, "not such a size"),
        ("config.num_attention_heads.real", 1, "not such a size"),
        ("config[0]", 1, "not such a size"),
        ("forward.__self__.training", 1, "not such a size"),
        ("split[2]", 1, "not such a size"),
        ("split[1]", 9, "does not shrink"),
        ("split[-1]", 1, "not such a size"),
        ("split[1]", [4], "not such a size"),
        ("sizes", [3, 4], "not such a size"),
    ],
)
def test_dotted_and_indexed_attributes_only_shrink(attribute: str, value: Any, message: str) -> None:
    layer = layer_with_config()
    before = copy.copy(vars(layer))
    with pytest.raises(GETAError, match=message):
        shrink_attribute("path", layer, attribute, value)
    assert vars(layer) == before
