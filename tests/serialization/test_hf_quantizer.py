from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertModel,
    PreTrainedModel,
)

from geta_hf import attach_quantizers, export
from geta_hf.errors import GETAError
from geta_hf.export.formats import geta
from geta_hf.serialization import hf_quantizer
from geta_hf.serialization.hf_quantizer import GETAHfQuantizer, GETAQuantizationConfig, sharing_weights
from geta_hf.serialization.packed_layers import PackedLinear, packed_layers
from geta_hf.serialization.remote_code import save_compressed
from tests.architectures import build
from tests.elsewhere import run_code
from tests.export.test_use import IDS, exported_llama
from tests.export.tiny_encoders import some_batch, tiny_model, train_by_hand
from tests.spaces import build_space

QUERY = "bert.encoder.layer.0.attention.self.query"
NORM = "bert.encoder.layer.1.output.LayerNorm.weight"


def load(folder: Path, **kwargs: Any) -> BertForQuestionAnswering:
    return BertForQuestionAnswering.from_pretrained(folder, **kwargs)


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    edit(config["quantization_config"])
    file.write_text(json.dumps(config))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def places_of(model: PreTrainedModel) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def test_a_model_shares_the_weights_of_another_one_where_they_are_equal(exported: Path) -> None:
    first = load(exported)
    scale = f"{QUERY}.weight_scale"
    edit_config(exported, lambda config: config.pop("checksums"))
    edit_tensors(exported, lambda tensors: tensors.update({NORM: tensors[NORM] + 1, scale: tensors[scale] * 2}))
    with sharing_weights(first):
        second = load(exported)
    own, other = places_of(first), places_of(second)
    assert {name for name in own if own[name] != other[name]} == {NORM, f"{QUERY}.weight"}
    assert torch.equal(second.get_parameter(NORM), first.get_parameter(NORM) + 1)
    assert not set(own.values()) & set(places_of(load(exported)).values())


def test_an_export_holds_the_reloaded_weights_once(
    trained: tuple[PreTrainedModel, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = geta.prove_alike

    def note(first: PreTrainedModel, outputs: Any, second: PreTrainedModel, *args: Any, **kwargs: Any) -> float:
        seen.append(places_of(first) == places_of(second))
        return real(first, outputs, second, *args, **kwargs)

    monkeypatch.setattr(geta, "prove_alike", note)
    model, space = trained
    export(model, tmp_path / "out", space=space, batch=some_batch())
    assert seen == [True]


def test_auto_class_loads_a_smaller_model_with_dense_frozen_weights(exported: Path) -> None:
    model = AutoModelForQuestionAnswering.from_pretrained(exported)
    assert type(model) is BertForQuestionAnswering
    query = model.get_submodule(QUERY)
    assert isinstance(query, PackedLinear)
    assert query.weight.shape == (24, 32) == (query.out_features, query.in_features)
    assert query.weight.dtype == torch.float32
    assert not query.weight.requires_grad
    assert query.weight.unique().numel() <= 2**query.bits - 1
    assert model.config._is_quantized


def test_a_path_may_lead_over_the_folder_above(exported: Path) -> None:
    roundabout = exported / ".." / exported.name
    assert torch.equal(load(roundabout).get_submodule(QUERY).weight, load(exported).get_submodule(QUERY).weight)


def test_config_keeps_the_original_architecture(exported: Path) -> None:
    config = AutoConfig.from_pretrained(exported)
    assert (config.num_attention_heads, config.intermediate_size) == (4, 64)
    assert config.quantization_config["format_version"] == 1


def test_save_load_save_gives_the_same_bytes(exported: Path, tmp_path: Path) -> None:
    load(exported).save_pretrained(tmp_path / "again")
    load(tmp_path / "again").save_pretrained(tmp_path / "third")
    files = [folder / "model.safetensors" for folder in (exported, tmp_path / "again", tmp_path / "third")]
    assert len({file.read_bytes() for file in files}) == 1
    first, again = (json.loads((folder / "config.json").read_text()) for folder in (exported, tmp_path / "again"))
    assert again == {key: value for key, value in first.items() if key != "auto_map"}  # it holds no code


def test_copy_cast_and_save_keeps_every_code(exported: Path, tmp_path: Path) -> None:
    model = copy.deepcopy(load(exported)).to(torch.bfloat16)
    assert model.get_submodule(QUERY).weight.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "half")
    before, after = load_file(exported / "model.safetensors"), load_file(tmp_path / "half" / "model.safetensors")
    assert before.keys() == after.keys()
    for name in (f"{layer}.{leaf}" for layer in packed_layers(model) for leaf in ("weight", "weight_scale")):
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name], after[name])


def test_dtype_at_load_decodes_from_the_fp32_scale(exported: Path) -> None:
    half, full = load(exported, dtype=torch.bfloat16), load(exported)
    assert half.dtype == torch.bfloat16
    for name, layer in packed_layers(half).items():
        assert torch.equal(layer.weight, full.get_submodule(name).weight.bfloat16())
        assert layer.step_size == full.get_submodule(name).step_size


def test_state_dict_is_the_decoded_model(exported: Path) -> None:
    model, other = load(exported), load(exported)
    assert other.load_state_dict(model.state_dict()).unexpected_keys == []


@pytest.mark.parametrize("model_class", [AutoModel, BertModel])
def test_base_model_loads_from_the_folder_of_a_task_model(exported: Path, model_class: Any) -> None:
    whole, base = load(exported), model_class.from_pretrained(exported)
    with torch.no_grad():
        expected = whole.bert(**some_batch()).last_hidden_state
        assert torch.equal(base(**some_batch()).last_hidden_state, expected)


def test_base_model_saves_alone_and_loads_back_under_a_head(exported: Path, tmp_path: Path) -> None:
    whole = load(exported)
    whole.bert.save_pretrained(tmp_path / "base")
    again = BertForTokenClassification.from_pretrained(tmp_path / "base").eval()
    with torch.no_grad():
        expected = whole.bert(**some_batch()).last_hidden_state
        assert torch.equal(again.bert(**some_batch()).last_hidden_state, expected)


@pytest.mark.parametrize("of_a_head", [False, True])
def test_base_model_saved_alone_is_its_own_folder(exported: Path, tmp_path: Path, of_a_head: bool) -> None:
    base = load(exported).bert if of_a_head else AutoModel.from_pretrained(exported)
    base.save_pretrained(tmp_path / "base")
    again = AutoModel.from_pretrained(tmp_path / "base")
    assert type(again) is BertModel
    with torch.no_grad():
        assert torch.equal(again(**some_batch()).last_hidden_state, base(**some_batch()).last_hidden_state)
    stored = json.loads((tmp_path / "base" / "config.json").read_text())["quantization_config"]
    assert not [name for part in (stored["bits"], stored["fixes"]["shapes"]) for name in part if "bert." in name]
    assert set(stored["bits"]) == set(packed_layers(again))
    again.save_pretrained(tmp_path / "again")
    AutoModel.from_pretrained(tmp_path / "again").save_pretrained(tmp_path / "third")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("base", "again", "third")]
    assert all(torch.equal(file[name], files[0][name]) for file in files for name in files[0])
    # What answers questions has no pooler, which is drawn anew for the model that stands alone.
    assert set(files[1]) - set(files[0]) == ({"pooler.dense.weight", "pooler.dense.bias"} if of_a_head else set())
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "third" / name).read_bytes()


def test_a_head_is_what_it_was_after_its_base_was_saved(exported: Path, tmp_path: Path) -> None:
    whole = load(exported)
    whole.bert.save_pretrained(tmp_path / "base")
    whole.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()
    first, again = (json.loads((folder / "config.json").read_text()) for folder in (exported, tmp_path / "again"))
    assert again == {key: value for key, value in first.items() if key != "auto_map"}


def test_a_packed_head_stays_behind(tmp_path: Path) -> None:
    """Its module and its cut are named in the head's folder alone."""
    exported_llama(tmp_path / "out", tied=False, include=[".*"])
    assert "lm_head" in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["bits"]
    base = AutoModel.from_pretrained(tmp_path / "out")
    base.save_pretrained(tmp_path / "base")
    again = AutoModel.from_pretrained(tmp_path / "base")
    under = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        expected = base(IDS).last_hidden_state
        assert torch.equal(again(IDS).last_hidden_state, expected)
        assert torch.equal(under.model(IDS).last_hidden_state, expected)
    assert type(under.lm_head) is torch.nn.Linear
    under.save_pretrained(tmp_path / "under")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "under").lm_head.weight, under.lm_head.weight)


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_every_model_inside_saves_alone(tmp_path: Path, name: str) -> None:
    model, batch = build(name)
    space = build_space(model, batch)
    train_by_hand(model, space)
    export(model, tmp_path / "out", space=space, batch=batch)
    whole = type(model).from_pretrained(tmp_path / "out")
    inner = {path: part for path, part in whole.named_modules() if path and isinstance(part, PreTrainedModel)}
    assert inner
    for path, part in inner.items():
        part.save_pretrained(tmp_path / path)
        again = type(part).from_pretrained(tmp_path / path)
        found, expected = again.state_dict(), part.state_dict()
        assert set(found) == set(expected)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    whole.save_pretrained(tmp_path / "again")
    first, again = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("out", "again"))
    assert again["quantization_config"] == first["quantization_config"]
    assert all("quantization_config" not in part for part in again.values() if isinstance(part, dict))


@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_embedding_is_resized_once_it_is_plain(tmp_path: Path, tied: bool) -> None:
    exported_llama(tmp_path / "out", tied, embedding_bits=8)
    model = pickle.loads(pickle.dumps(copy.deepcopy(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))))
    assert model.resize_token_embeddings(60) is model.get_input_embeddings()
    for part in (model, model.model):
        with pytest.raises(GETAError, match=r"call model\.dequantize\(\) first"):
            part.resize_token_embeddings(70)
        with pytest.raises(GETAError, match=r"call model\.dequantize\(\) first"):
            part.resize_token_embeddings(pad_to_multiple_of=64)
    plain = model.dequantize()
    assert plain.resize_token_embeddings(70).weight.shape == (70, 32)
    plain.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(again.lm_head.weight, plain.lm_head.weight)


def test_saving_alone_says_once_what_it_leaves_out(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(hf_quantizer.logger, "warning_once", lambda message, *args: said.append(message))
    model = load(exported)
    save_compressed(model, tmp_path / "ours")
    assert said == []
    model.save_pretrained(tmp_path / "again")
    assert len(said) == 1
    assert "geta-hf export" in said[0]


def test_dense_model_cannot_be_loaded_into_the_format(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pre-quantized"):
        load(tmp_path, quantization_config=GETAQuantizationConfig())


def test_quantizer_says_what_it_can(exported: Path) -> None:
    quantizer = load(exported).hf_quantizer
    assert isinstance(quantizer, GETAHfQuantizer)
    assert quantizer.is_serializable()
    assert quantizer.is_compileable
    assert quantizer.is_trainable  # of adapters


def drop(*names: str) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: [tensors.pop(name) for name in names]


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop(f"{QUERY}.weight"), rf"no tensor {QUERY}\.weight;"),
        (drop(f"{QUERY}.weight_scale"), rf"no tensor {QUERY}\.weight_scale;"),
        (drop(f"{QUERY}.bias"), rf"no tensor {QUERY}\.bias,"),
        (drop(NORM), f"no tensor {NORM},"),
        (drop("qa_outputs.weight", "qa_outputs.bias"), r"no tensor qa_outputs\.weight,"),
        (put(f"{QUERY}.weight", lambda t: t[:-1].clone()), rf"{QUERY}\.weight: .* are a uint8 stream of"),
        (put(f"{QUERY}.weight", lambda t: torch.cat([t, t[:1]])), rf"{QUERY}\.weight: .* are a uint8 stream of"),
        (put(f"{QUERY}.weight", lambda t: t.float()), rf"{QUERY}\.weight: .* uint8 stream of .* not F32"),
        (put(f"{QUERY}.weight", torch.zeros_like), rf"{QUERY}\.weight: .* damaged"),
        (put(f"{QUERY}.weight_scale", lambda t: t * float("nan")), rf"{QUERY}\.weight_scale is nan"),
        (put(f"{QUERY}.weight_scale", lambda t: -t), rf"{QUERY}\.weight_scale is -"),
        (put(f"{QUERY}.weight_scale", lambda t: t.repeat(2)), rf"{QUERY}\.weight_scale .* not one float32"),
    ],
)
def test_damaged_tensors_are_named(exported: Path, edit: Callable[[dict[str, Any]], Any], message: str) -> None:
    edit_tensors(exported, edit)
    with pytest.raises(GETAError, match=message):
        load(exported)


@pytest.mark.parametrize("name", [f"{QUERY}.weight", f"{QUERY}.bias", NORM])
def test_base_model_needs_its_tensors_too(exported: Path, name: str) -> None:
    edit_tensors(exported, drop(name))
    with pytest.raises(GETAError, match=f"no tensor (bert.)?{name.removeprefix('bert.')}[;,]"):
        AutoModel.from_pretrained(exported)


@pytest.mark.parametrize("name", [f"{QUERY}.weight", f"{QUERY}.bias", NORM])
def test_ignoring_mismatched_sizes_does_not_let_random_weights_in(exported: Path, name: str) -> None:
    edit_tensors(exported, put(name, lambda t: t[:-1].clone()))
    with pytest.raises(GETAError, match=name):
        load(exported, ignore_mismatched_sizes=True)


def test_other_tensor_of_wrong_size_is_refused(exported: Path) -> None:
    edit_tensors(exported, put(NORM, lambda t: t[:-1].clone()))
    with pytest.raises((GETAError, RuntimeError), match=r"ignore_mismatched_sizes|shape \(31,\)"):
        load(exported)


@pytest.mark.parametrize("keep", [4, 2000, -100])
def test_file_cut_short_is_named(exported: Path, keep: int) -> None:
    file = exported / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(GETAError, match=r"model\.safetensors is damaged or cut short"):
        load(exported)


def test_missing_file_is_refused(exported: Path) -> None:
    (exported / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load(exported)


def shape_of(value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config["fixes"]["shapes"].update({f"{QUERY}.weight": value})


def attribute_of(value: Any, path: str = QUERY, name: str = "out_features") -> Callable[[dict[str, Any]], Any]:
    return lambda config: config["fixes"]["attrs"].update({path: {name: value}})


def bits_of(value: Any, name: str = QUERY) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config["bits"].update({name: value})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda config: config.update(format_version=3), "format_version is 3"),
        (lambda config: config.update(format_version="1"), "format_version is '1'"),
        (lambda config: config.update(partial=1), "partial is 1"),
        (lambda config: config.update(more=1), r"unknown keys \['more'\]"),
        (lambda config: config.update(bits=[1]), "bits must be an object"),
        (bits_of(1), rf"bits\['{QUERY}'\] is 1"),
        (bits_of(17), rf"bits\['{QUERY}'\] is 17"),
        (bits_of(-4), "is -4"),
        (bits_of(4.0), "is 4.0"),
        (bits_of(True), "is True"),
        (bits_of("4"), "is '4'"),
        (bits_of(9), rf"{QUERY}\.weight: .* of 9 bits"),
        (bits_of(4, "bert.encoder.layer.7.output.dense"), r"'bert\.encoder\.layer\.7\.output\.dense', absent in Bert"),
        (bits_of(4, "bert.encoder"), r"bert\.encoder is a BertEncoder"),
        (bits_of(4, ""), "the model is a BertForQuestionAnswering"),
        (shape_of([-24, 32]), "not a list of positive integers"),
        (shape_of([0, 32]), "not a list of positive integers"),
        (shape_of([10**15, 32]), "no cut of"),
        (shape_of([24]), "no cut of"),
        (attribute_of(10**9), "does not shrink"),
        (attribute_of("x" * 500), "not a positive integer"),
        (attribute_of(1, "bert.absent"), r"'bert\.absent', absent in Bert"),
        (attribute_of(1, QUERY, "forward"), "not such a size"),
        (attribute_of(1, QUERY, "__class__"), "not such a size"),
        (lambda config: config["fixes"].update(version=9), "version is 9"),
        (lambda config: config.update(fixes=[]), "exactly version, shapes, keep and attrs"),
    ],
)
def test_edited_config_is_refused_with_its_key(
    exported: Path, edit: Callable[[dict[str, Any]], Any], message: str
) -> None:
    edit_config(exported, edit)
    with pytest.raises(GETAError, match=message):
        load(exported)


@pytest.mark.parametrize(
    "edit",
    [
        lambda config: config["fixes"].update(shapes={}),
        lambda config: config["fixes"].update(attrs={}),
        lambda config: config["fixes"]["attrs"].pop(QUERY),
        lambda config: config["bits"].pop(QUERY),
        attribute_of(23),
    ],
)
def test_config_that_lacks_an_entry_never_loads_in_silence(
    exported: Path, edit: Callable[[dict[str, Any]], Any]
) -> None:
    edit_config(exported, edit)
    with pytest.raises((GETAError, RuntimeError)):
        load(exported)


def test_folder_without_quantization_config_is_refused(exported: Path) -> None:
    file = exported / "config.json"
    config = json.loads(file.read_text())
    del config["quantization_config"]
    file.write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(exported)


def test_reader_without_the_plug_in_fails(exported: Path) -> None:
    code = (
        "import sys\n"
        "from transformers import BertForQuestionAnswering\n"
        f"BertForQuestionAnswering.from_pretrained({str(exported)!r})\n"
        "print('loaded', 'geta_hf' in sys.modules)\n"
    )
    result = run_code(code, exported)
    assert result.returncode != 0
    assert "loaded" not in result.stdout
    assert "MISMATCH" in result.stderr
    assert "ignore_mismatched_sizes" in result.stderr


@pytest.mark.parametrize("name", ["nomic_bert", "gte"])
def test_layers_that_files_hold_as_one_are_packed_one_by_one(name: str, tmp_path: Path) -> None:
    """Q, K and V of these models are one tensor in plain folders, but three bit streams are not one."""
    model, batch = build(name)
    attach_quantizers(model, initial_bits=4)
    export(model, tmp_path / "small", batch=batch)
    small = type(model).from_pretrained(tmp_path / "small")
    small.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again")
    names = [layer for layer in packed_layers(small) if layer.endswith(("q_proj", "k_proj", "v_proj"))]
    assert len(names) == 6 and packed_layers(again).keys() == packed_layers(small).keys()
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch)[0], small.eval()(**batch)[0])
