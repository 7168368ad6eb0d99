"""Weights of four levels at 2 bits in a folder and in every format: masked, reloaded and integer models agree."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from geta_hf.errors import GETAError
from geta_hf.export import export
from geta_hf.export.formats.vanilla import write_vanilla
from geta_hf.inference import prepare_for_inference
from geta_hf.quantization import quantized_layers
from geta_hf.serialization.bitpack import unpack
from geta_hf.serialization.encode import four_level_layers, layer_codes, pack
from geta_hf.serialization.loader import GETAQuantizationConfig
from geta_hf.serialization.packed_layers import packed_layers
from tests.export.formats.uniform import Batch, cut, logits, tiny
from tests.export.tiny_encoders import some_batch, tiny_model, train_by_hand
from tests.spaces import build_space

Made = tuple[PreTrainedModel, PreTrainedModel, Batch, Path]


@pytest.fixture(scope="module", params=["channel", "block32"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The masked model, its compressed copy, a batch and the folder; layers have 2, 4 and 2 bits by turns."""
    model, batch = tiny("llama")
    small = cut(model, batch, bits=(2, 4, 2), grid=request.param, four_levels=True)
    folder = tmp_path_factory.mktemp(request.param) / "out"
    small.save_pretrained(folder)
    return model, small, batch, folder


def test_masked_cut_and_reloaded_agree(made: Made, tmp_path: Path) -> None:
    model, small, batch, folder = made
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    assert (logits(small, batch) - logits(model, batch)).abs().max() <= 1e-5
    assert torch.equal(logits(reloaded, batch), logits(small, batch))
    reloaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert four_level_layers(reloaded) == four_level_layers(small)


def test_codes_take_two_bits_each_and_all_four_values(made: Made) -> None:
    _, small, _, folder = made
    stored = load_file(folder / "model.safetensors")
    named = json.loads((folder / "config.json").read_text())["quantization_config"]["four_levels"]
    layers = packed_layers(small)
    assert named == [name for name, layer in layers.items() if layer.bits == 2] and named
    for name in named:
        layer = layers[name]
        codes = layer_codes(name, layer)
        assert sorted(codes.unique().tolist()) == [-3, -1, 1, 3]
        stream = stored[f"{name}.weight"]
        assert len(stream) == -(-codes.numel() // 4)
        # By the format's own words, code by code.
        pairs = torch.stack([stream >> shift & 3 for shift in (0, 2, 4, 6)], dim=1).flatten()[: codes.numel()]
        assert torch.equal(2 * pairs.to(torch.int32) - 3, codes.flatten())
        assert torch.equal(stored[f"{name}.weight_scale"].half().float(), stored[f"{name}.weight_scale"].float())


def test_integer_products_compute_nearly_the_same(made: Made) -> None:
    _, small, batch, _ = made
    wanted = logits(small, batch)
    prepared = copy.deepcopy(small)
    prepare_for_inference(prepared, "int8")
    found = logits(prepared, batch)
    assert float((found - wanted).norm() / wanted.norm()) < 0.02
    assert four_level_layers(prepared) == four_level_layers(small)
    for name, layer in packed_layers(small).items():
        assert torch.equal(layer_codes(name, packed_layers(prepared)[name]), layer_codes(name, layer))


def test_other_formats_hold_the_same_weights(made: Made, tmp_path: Path) -> None:
    _, small, batch, _ = made
    (tmp_path / "vanilla").mkdir()
    write_vanilla(small, tmp_path / "vanilla", batch)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "vanilla")
    assert torch.equal(logits(plain, batch), logits(small, batch))
    pytest.importorskip("compressed_tensors")
    from geta_hf.export.formats.compressed_tensors import write_compressed_tensors

    (tmp_path / "packed").mkdir()
    write_compressed_tensors(small, tmp_path / "packed", batch)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    # The package unpacks weights in the first forward pass.
    assert (logits(packed, batch) - logits(small, batch)).abs().max() <= 1e-5
    for name, layer in packed_layers(small).items():
        assert torch.equal(packed.get_submodule(name).weight, layer.weight)


def test_weights_of_exactly_zero_are_stored_at_three_bits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    space = build_space(model, some_batch())
    train_by_hand(model, space)
    layers = quantized_layers(model)
    name = next(name for name, layer in layers.items() if layer.weight_quantizer.four_levels)
    with torch.no_grad():
        # In a row that remains.
        row = int(layers[name].weight.abs().sum(1).argmax())
        layers[name].weight[row, :2] = 0.0
    with torch.no_grad():
        wanted = model.eval()(**some_batch()).start_logits
    report = export(model, tmp_path / "out", space=space, batch=some_batch())
    assert f"{name} has" in caplog.text and "stored at 3 bits" in caplog.text
    assert report.bits[name] == 3
    small = type(model).from_pretrained(tmp_path / "out")
    assert 0 in layer_codes(name, packed_layers(small)[name])
    with torch.no_grad():
        assert (small(**some_batch()).start_logits - wanted).abs().max() <= 1e-5


def test_only_the_four_codes_are_packed() -> None:
    codes = torch.tensor([-3, -1, 1, 3, 3])
    stream = pack(codes, 2, four_levels=True)
    assert stream.tolist() == [0b11100100, 0b11]
    assert torch.equal(unpack(stream, 2, 5, four_levels=True).long(), codes)
    for wrong, message in ((0, "code 0 is none of"), (2, "code 2 is none of"), (5, "code 5 does not fit")):
        with pytest.raises(GETAError, match=message):
            pack(torch.tensor([1, wrong]), 2, four_levels=True)


@pytest.mark.parametrize("value", ["a", {"a": 1}, [1], ["b"], ["c"], 3, ["a", "c"]])
def test_a_damaged_key_is_refused(value: object) -> None:
    with pytest.raises(GETAError, match="four_levels"):
        GETAQuantizationConfig(bits={"a": 2, "b": 4}, four_levels=value)
