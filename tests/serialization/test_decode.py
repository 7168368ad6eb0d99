"""What the reader refuses, one check at a time: headers, paths, types, scales, and what loading left out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from geta_hf.errors import GETAError
from geta_hf.serialization import loader
from geta_hf.serialization.decode import Header, check_packed, check_plain, check_scale, read_headers
from geta_hf.serialization.packed_layers import PackedLayer, become_packed
from tests.export.tiny_encoders import tiny_model

ONE = {"x": torch.zeros(2, 3)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file of one tensor, next to one below it and one outside of it."""
    home = tmp_path / "home"
    (home / "below").mkdir(parents=True)
    for file in (home / "a.safetensors", home / "below" / "b.safetensors", tmp_path / "c.safetensors"):
        save_file(ONE, file)
    return home


def test_headers_are_those_of_the_tensors(folder: Path) -> None:
    file = str(folder / "a.safetensors")
    assert read_headers([file], folder) == {"x": Header(file, "F32", (2, 3))}


@pytest.mark.parametrize(
    "files",
    [
        ["../c.safetensors"],  # all of them outside
        ["a.safetensors", "../c.safetensors"],
        ["a.safetensors", "below/b.safetensors"],  # inside, but not where the weights are
    ],
)
def test_files_outside_the_folder_are_refused(folder: Path, files: list[str]) -> None:
    with pytest.raises(GETAError, match="lies outside the folder"):
        read_headers([f"{folder}/{file}" for file in files], folder)


def test_a_local_folder_has_no_files_elsewhere(folder: Path) -> None:
    """Files of a name on the Hub lie in a cache, wherever it is; those of a local folder do not."""
    elsewhere = str(folder.parent / "c.safetensors")
    with pytest.raises(GETAError, match="lies outside the folder"):
        read_headers([elsewhere], folder)
    assert set(read_headers([elsewhere], "someone/model")) == {"x"}
    with pytest.raises(GETAError, match="lies outside the folder"):
        read_headers([f"{folder}/../c.safetensors"], "someone/model")


def test_a_folder_may_be_named_over_its_parent(folder: Path) -> None:
    named = folder / ".." / "home"
    assert set(read_headers([str(named / "a.safetensors")], named)) == {"x"}


def test_other_files_than_safetensors_are_refused(folder: Path) -> None:
    save_file(ONE, folder / "pytorch_model.bin")
    with pytest.raises(GETAError, match="is no safetensors file"):
        read_headers([str(folder / "pytorch_model.bin")], folder)


@pytest.mark.parametrize(("kind", "shape"), [("F32", (8,)), ("I8", (8,)), ("U8", (9,)), ("U8", (8, 1))])
def test_a_stream_is_bytes_of_one_length(kind: str, shape: tuple[int, ...]) -> None:
    layer = become_packed("layer", nn.Linear(4, 4), 4)
    check_packed("layer", layer, {"layer.weight": Header("file", "U8", (8,))})
    with pytest.raises(GETAError, match=r"file: layer\.weight: 16 codes of 4 bits are a uint8 stream of 8 bytes"):
        check_packed("layer", layer, {"layer.weight": Header("file", kind, shape)})


@pytest.mark.parametrize("leaf", ["weight_scale", "input_scale"])
def test_a_scale_of_another_type_is_refused_before_it_is_cast(leaf: str) -> None:
    layer = become_packed("layer", nn.Linear(4, 4), 4)
    stream = Header("file", "U8", (8,))
    check_packed("layer", layer, {"layer.weight": stream, f"layer.{leaf}": Header("file", "F32", (1,))})
    with pytest.raises(GETAError, match=rf"layer\.{leaf} is F16"):
        check_packed("layer", layer, {"layer.weight": stream, f"layer.{leaf}": Header("file", "F16", (1,))})


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, "I64"), (torch.int64, "F32"), (torch.uint8, "U8")])
def test_a_plain_tensor_keeps_its_kind_of_number(dtype: torch.dtype, kind: str) -> None:
    for strict in (True, False):
        with pytest.raises(GETAError, match=rf"file: name is {kind} of shape"):
            check_plain("name", torch.zeros(3, dtype=dtype), Header("file", kind, (3,)), strict)
    assert not check_plain("name", torch.zeros(3), Header("file", "BF16", (3,)), True)
    assert check_plain("name", torch.zeros(3), Header("file", "F32", (4,)), False)


@pytest.mark.parametrize(
    "scale",
    [
        torch.ones(1, dtype=torch.float64),
        torch.ones(2),
        torch.ones(1, 1),
        torch.tensor([0.0]),
        torch.tensor([1.0, math.inf, 1.0]),
        torch.tensor([1.0, math.nan, 1.0]),
    ],
)
def test_a_scale_is_positive_finite_and_of_its_size(scale: torch.Tensor) -> None:
    check_scale("name", torch.ones(1), "channels", 3)
    check_scale("name", torch.ones(3), "channels", 3)
    with pytest.raises(GETAError, match="name is"):
        check_scale("name", scale, "channels", 3)


def test_layers_are_counted_in_nested_configs_too() -> None:
    """As many as are named may be built, wherever the config says so."""
    config = {"text_config": {"num_hidden_layers": 2000}, "quantization_config": {"layers": 10**9}}
    loader._check_layers(config, 2000)
    loader._check_layers({"num_hidden_layers": 1000}, 0)
    with pytest.raises(GETAError, match="num_hidden_layers is 2000, but quantization_config names 1999"):
        loader._check_layers(config, 1999)


def test_a_module_of_the_base_model_must_be_there_in_any_class() -> None:
    model = tiny_model()
    model.config.architectures = ["BertForQuestionAnswering"]
    assert loader.find_module(model.bert, "bert.encoder") == "encoder"
    assert loader.find_module(model.bert, "qa_outputs") is None
    with pytest.raises(GETAError, match=r"the module 'bert\.nobody', absent in BertModel"):
        loader.find_module(model.bert, "bert.nobody")


def packed_without_weight() -> tuple[PreTrainedModel, PackedLayer]:
    """A model with a packed layer into which nothing was loaded; everything else was, and has a mark for it."""
    model = tiny_model()
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    layer = become_packed("qa_outputs", model.qa_outputs, 4)
    for tensor in layer.parameters():
        del tensor._is_hf_initialized
    return model, layer


def test_a_packed_layer_is_in_the_folder_whatever_the_class() -> None:
    """A plain layer may be new in another class, such as a head; a packed one is named by the folder."""
    model, layer = packed_without_weight()
    with pytest.raises(GETAError, match=r"the folder has no tensor qa_outputs\."):
        loader._check_complete(model, (), (), own=False)
    layer.__class__ = nn.Linear
    loader._check_complete(model, (), (), own=False)


def test_a_packed_layer_without_a_step_size_is_refused() -> None:
    model, _ = packed_without_weight()
    with pytest.raises(GETAError, match="tied to a weight that the folder lacks"):
        loader._share_step_sizes(model)


def test_a_plain_tensor_of_bytes_is_refused_after_loading_too() -> None:
    """Where transformers renames what it reads, the header could not be compared."""
    model = tiny_model()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    loader._check_shapes(model, shapes)
    model.qa_outputs.bias = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(GETAError, match=r"qa_outputs\.bias is torch\.uint8"):
        loader._check_shapes(model, shapes)
