"""Layers that round their inputs, and weights with a step size for each channel: trained, cut, saved and reloaded."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, BertForQuestionAnswering, BertForTokenClassification, PreTrainedModel

from geta_hf.errors import GETAError
from geta_hf.export import export
from geta_hf.export.export import compress, integer_bits
from geta_hf.qadg import PruningSpace, zero_groups
from geta_hf.quantization import FixedQuantizer, attach_input_quantizers, quantized_layers, step_size
from geta_hf.serialization.packed_layers import packed_layers
from geta_hf.surgery.compare_outputs import attention_outputs
from tests.architectures import build
from tests.export.tiny_encoders import some_batch, tiny_model, train_by_hand
from tests.serialization.test_hf_quantizer import edit_config, edit_tensors
from tests.spaces import build_space

QUERY = "bert.encoder.layer.0.attention.self.query"


@torch.no_grad()
def rounding(model: PreTrainedModel, batch: dict[str, Tensor], learn_t: bool = False) -> dict[str, int]:
    """Let quantized layers round their inputs to different whole widths of 3 to 8 bits, as training leaves them."""
    layers = attach_input_quantizers(model, [batch], learn_t=learn_t, exclude=[r"value$"] if is_bert(model) else [])
    bits = {name: 3 + place % 6 for place, name in enumerate(layers)}
    for name, layer in layers.items():
        quantizer = layer.input_quantizer
        quantizer.t.fill_(1.2 if learn_t else 1.0)
        quantizer.d.copy_(step_size(bits[name], quantizer.q_m, quantizer.t))
    return bits


def is_bert(model: PreTrainedModel) -> bool:
    return model.config.model_type == "bert"


def trained(per_channel: bool = True, learn_t: bool = False) -> tuple[PreTrainedModel, PruningSpace, dict[str, int]]:
    model = tiny_model()
    space = build_space(model, some_batch())
    train_by_hand(model, space, per_channel=per_channel)
    return model, space, rounding(model, some_batch(), learn_t)


def exact(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Outputs in double precision, where the last bit of a sum decides no rounding of an activation."""
    wide = copy.deepcopy(model).double()
    batch = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
    outputs = attention_outputs(wide, batch)["eager"]
    return torch.cat([outputs[name].flatten() for name in ("logits", "start_logits") if name in outputs])


@pytest.mark.parametrize("learn_t", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_masked_cut_and_reloaded_agree(per_channel: bool, learn_t: bool, tmp_path: Path) -> None:
    model, space, bits = trained(per_channel, learn_t)
    batch = some_batch()
    report = export(model, tmp_path / "out", space=space, batch=batch)
    small = compress(model, space, zero_groups(model, space), batch)
    reloaded = BertForQuestionAnswering.from_pretrained(tmp_path / "out")
    masked = exact(model, batch)
    assert (exact(small, batch) - masked).abs().max() <= 1e-6
    assert (exact(reloaded, batch) - masked).abs().max() <= 1e-6
    assert report.activation_bits == bits and len(bits) == 10 and report.difference <= 1e-5
    for name, layer in packed_layers(reloaded).items():
        old = model.get_submodule(name)
        assert layer.step_size.shape == ((layer.weight.shape[0],) if per_channel else (1,))
        assert (layer.input_quantizer is None) == (name not in bits)
        if name in bits:
            assert isinstance(layer.input_quantizer, FixedQuantizer) and layer.input_quantizer.bits == bits[name]
            x = 3 * old.input_quantizer.q_m * torch.randn(500)
            assert torch.equal(layer.input_quantizer(x), old.input_quantizer(x))
    without = copy.deepcopy(model)
    for layer in quantized_layers(without).values():
        layer.input_quantizer = None
    assert (exact(without, batch) - masked).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2", "resnet"])
def test_other_kinds_of_layers(name: str, tmp_path: Path) -> None:
    """Grouped queries, Conv1D and Conv2d."""
    model, batch = build(name)
    space = build_space(model, batch)
    train_by_hand(model, space, per_channel=True, include=["."] if name == "resnet" else None)
    bits = rounding(model, batch)
    report = export(model, tmp_path / "out", space=space, batch=batch)
    reloaded = type(model).from_pretrained(tmp_path / "out")
    assert report.activation_bits == bits and len(bits) == len(quantized_layers(model))
    torch.testing.assert_close(exact(reloaded, batch), exact(model, batch), rtol=1e-5, atol=1e-6)
    smaller = [
        layer.weight.numel() < model.get_parameter(f"{n}.weight").numel()
        for n, layer in packed_layers(reloaded).items()
    ]
    assert any(smaller)


@pytest.fixture(scope="session")
def _rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, space, _ = trained()
    folder = tmp_path_factory.mktemp("rounded") / "model"
    export(model, folder, space=space, batch=some_batch())
    return folder


@pytest.fixture
def rounded(_rounded: Path, tmp_path: Path) -> Path:
    """A fresh copy of one good export, to be read or damaged."""
    return shutil.copytree(_rounded, tmp_path / "copy")


def load(folder: Path, **options: Any) -> PreTrainedModel:
    return BertForQuestionAnswering.from_pretrained(folder, **options)


def test_saved_again_and_again_it_is_the_same(rounded: Path, tmp_path: Path) -> None:
    first = load(rounded)
    copy.deepcopy(first).to(torch.bfloat16).save_pretrained(tmp_path / "again")
    load(rounded).save_pretrained(tmp_path / "plain")
    files = [folder / "model.safetensors" for folder in (tmp_path / "plain", rounded)]
    assert files[0].read_bytes() == files[1].read_bytes()
    before, after = load_file(rounded / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    scales = [name for name in before if name.endswith("_scale")]
    assert len(scales) == 22 and all(torch.equal(before[name], after[name]) for name in scales)
    assert before[f"{QUERY}.input_scale"].shape == (1,) and before[f"{QUERY}.weight_scale"].shape == (24,)


def test_the_parts_of_the_model_load_and_save_alone(rounded: Path, tmp_path: Path) -> None:
    whole, base = load(rounded).eval(), AutoModel.from_pretrained(rounded).eval()
    whole.bert.save_pretrained(tmp_path / "base")
    again = BertForTokenClassification.from_pretrained(tmp_path / "base").eval().bert
    with torch.no_grad():
        expected = whole.bert(**some_batch()).last_hidden_state
        for model in (base, again):
            assert model.encoder.layer[0].attention.self.query.input_quantizer is not None
            assert torch.equal(model(**some_batch()).last_hidden_state, expected)


def test_a_loaded_model_has_nothing_more_to_learn_or_to_name(rounded: Path) -> None:
    model, half = load(rounded), load(rounded, dtype=torch.bfloat16)
    assert not any("quantizer" in name or "scale" in name for name in model.state_dict())
    assert load(rounded).load_state_dict(model.state_dict()).unexpected_keys == []
    for name, layer in packed_layers(half).items():
        full = model.get_submodule(name)
        assert layer.weight.dtype == torch.bfloat16 and torch.equal(layer.step_size, full.step_size)
        assert layer.input_quantizer is None or torch.equal(layer.input_quantizer.scale, full.input_quantizer.scale)
    with torch.no_grad():
        assert half(**some_batch()).start_logits.dtype == torch.bfloat16


def put(leaf: str, value: Tensor | None) -> Any:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors.pop(f"{QUERY}.{leaf}")
        if value is not None:
            tensors[f"{QUERY}.{leaf}"] = value

    return edit


@pytest.mark.parametrize(
    ("leaf", "value", "message"),
    [
        ("input_scale", None, "no tensor .*input_scale"),
        ("input_scale", torch.ones(3), r"input_scale is .* not one float32, nor one for d and one for t \(2\)"),
        ("input_scale", torch.ones(1, 1), r"input_scale is .* not one float32"),
        ("input_scale", torch.ones(1).half(), r"input_scale is F16 of shape"),
        ("input_scale", torch.tensor([float("nan")]), "input_scale is nan; a step size is positive"),
        ("input_scale", torch.tensor([1.0, -2.0]), r"input_scale is -2\.0; a step size is positive"),
        ("weight_scale", None, "no tensor .*weight_scale"),
        ("weight_scale", torch.ones(23), r"weight_scale is .* nor one for each output channel \(24\)"),
        ("weight_scale", torch.ones(24).double(), r"weight_scale is F64 of shape"),
        ("weight_scale", torch.tensor([1.0] * 23 + [float("inf")]), "weight_scale is inf"),
    ],
)
def test_damaged_scales_are_named(rounded: Path, leaf: str, value: Tensor | None, message: str) -> None:
    edit_tensors(rounded, put(leaf, value))
    edit_config(rounded, lambda config: config.pop("checksums"))  # as of a tool that replaces tensors on purpose
    with pytest.raises(GETAError, match=message):
        load(rounded)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("activation_bits"), rf"activation_bits lacks {QUERY}|activation_bits lacks"),
        (lambda c: c["activation_bits"].pop(QUERY), rf"activation_bits lacks {QUERY}, but the folder has"),
        (lambda c: c["activation_bits"].update({QUERY: 17}), r"activation_bits\['.*query'\] is 17"),
        (lambda c: c["activation_bits"].update({QUERY: "4"}), r"activation_bits\['.*query'\] is '4'"),
        (lambda c: c["activation_bits"].update({"qa_outputs": 4}), "names 'qa_outputs', which is not in bits"),
        (lambda c: c["activation_bits"].update({QUERY.replace("query", "value"): 4}), "no tensor .*value.input_scale"),
        (lambda c: c.update(activation_bits=[4]), "activation_bits must be an object"),
    ],
)
def test_edited_config_is_refused_with_its_key(rounded: Path, edit: Any, message: str) -> None:
    edit_config(rounded, edit)
    with pytest.raises(GETAError, match=message):
        load(rounded)


def test_a_folder_on_float_activations_is_as_before(exported: Path) -> None:
    """What was written before inputs could be rounded has neither the key nor the tensors."""
    config = json.loads((exported / "config.json").read_text())["quantization_config"]
    assert set(config) - {"four_levels"} == {"bits", "checksums", "fixes", "format_version", "quant_method"}
    tensors = load_file(exported / "model.safetensors")
    assert {tuple(tensors[name].shape) for name in tensors if name.endswith("weight_scale")} == {(1,)}
    assert not any(name.endswith("input_scale") for name in tensors)
    assert all(layer.input_quantizer is None for layer in packed_layers(load(exported)).values())


def test_widths_are_integers(tmp_path: Path) -> None:
    assert integer_bits("layer", torch.tensor([4.0, 3.9995, 4.0004])) == 4
    # Channels may differ; the layer's own width is the widest.
    assert integer_bits("layer", torch.tensor([4.0, 5.0, 4.0])) == 5
    with pytest.raises(GETAError, match=r"layer has 4\.5000 bits, which is not an integer"):
        integer_bits("layer", torch.tensor([4.0, 4.5, 4.0]))
    model, space, _ = trained()
    quantizer = quantized_layers(model)[QUERY].input_quantizer
    with torch.no_grad():
        quantizer.d.copy_(step_size(5.5, quantizer.q_m, quantizer.t))
    with pytest.raises(GETAError, match=rf"the input of {QUERY} has 5\.5000 bits"):
        export(model, tmp_path / "out", space=space, batch=some_batch())
    assert not (tmp_path / "out").exists()


def test_wrong_scales_in_the_folder_are_caught_before_it_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mutation: the step size of one input is saved wrong."""
    model, space, _ = trained()
    whole = FixedQuantizer.scale.fget

    def wrong(quantizer: FixedQuantizer) -> Tensor:
        return whole(quantizer) * (1.3 if quantizer.bits == 5 else 1.0)

    monkeypatch.setattr(FixedQuantizer, "scale", property(wrong))
    with pytest.raises(GETAError, match=r"the reloaded model's start_logits .* differs by"):
        export(model, tmp_path / "out", space=space, batch=some_batch())
    assert not (tmp_path / "out").exists()
