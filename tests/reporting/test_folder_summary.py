"""What is told of a folder without its weights is what its loaded model shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn
from transformers import T5Config, ViTConfig, Wav2Vec2Config

from geta_hf import export
from geta_hf.costs.model_costs import measure_costs
from geta_hf.errors import GETAError
from geta_hf.reporting.comparison import load_model
from geta_hf.reporting.folder_summary import EMBEDDINGS, PACKED, REST, SCALES, check_metrics, read_summary
from geta_hf.serialization.sizes import tensor_bytes, tensor_sizes
from tests.export.tiny_encoders import some_batch, tiny_model, train_by_hand
from tests.small_folders import exported, written
from tests.spaces import build_space


def test_costs_are_those_of_the_loaded_models(tmp_path: Path) -> None:
    dense, small = exported(tmp_path)
    facts = read_summary(small)
    names = list(facts.structure.bits)
    for side, folder in (("dense", dense), ("compressed", small)):
        found, expected = facts.costs[side], measure_costs(load_model(folder), 40, names)
        assert sorted(found.layers, key=str) == sorted(expected.layers, key=str)
        assert (found.parameters, found.macs, found.tokens) == (expected.parameters, expected.macs, 40)
        assert (found.bops_linear, found.bops_full) == (expected.bops_linear, expected.bops_full)
    assert {layer.input_bits for layer in facts.costs["compressed"].layers} == {6, 32}


def test_every_byte_of_a_tensor_has_one_part(tmp_path: Path) -> None:
    dense, small = exported(tmp_path)
    facts, model = read_summary(small), load_model(small)
    parts = facts.parts
    assert sum(parts.values()) == tensor_bytes(small) == facts.sizes["compressed"]
    assert facts.sizes["dense"] == tensor_bytes(dense)
    layers = [model.get_submodule(name) for name in facts.structure.bits]
    assert parts[PACKED] == sum((layer.weight.numel() * layer.bits + 7) // 8 for layer in layers)
    assert parts[EMBEDDINGS] == sum(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Embedding))
    assert parts[SCALES] == 4 * (12 + 2) and parts[REST] > 0


def test_a_rounded_embedding_is_stored_and_multiplies_nothing(tmp_path: Path) -> None:
    model, batch = tiny_model(), some_batch()
    space = build_space(model, batch)
    train_by_hand(model, space)
    facts = []
    for name, bits in (("plain", None), ("rounded", 8)):
        export(model, tmp_path / name, space=space, batch=batch, embedding_bits=bits)
        facts.append(read_summary(tmp_path / name))
    plain, rounded = facts
    assert rounded.costs == plain.costs and len(rounded.structure.bits) == len(plain.structure.bits) + 1
    saved = plain.parts[EMBEDDINGS] - rounded.parts[EMBEDDINGS]
    assert saved == 60 * 32 * 3 and rounded.parts[PACKED] == plain.parts[PACKED]
    assert rounded.parts[SCALES] == plain.parts[SCALES] + 60 * 4


def test_what_it_is_and_what_it_is_for(tmp_path: Path) -> None:
    facts = read_summary(exported(tmp_path)[1])
    assert (facts.architecture, facts.auto_class) == ("BertForQuestionAnswering", "AutoModelForQuestionAnswering")
    assert facts.task == "question-answering" and facts.base_model is None
    assert facts.config["bits"] == [2, 16] and facts.versions["folder format"] == "1"


@pytest.mark.parametrize(
    ("architecture", "auto", "task"),
    [
        ("LlamaForCausalLM", "AutoModelForCausalLM", "text-generation"),
        ("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM", "text2text-generation"),
        ("ViTForImageClassification", "AutoModelForImageClassification", "image-classification"),
        ("BertModel", "AutoModel", "feature-extraction"),
        ("UnheardOfModel", "AutoModel", None),
    ],
)
def test_the_auto_class_is_found_by_the_architecture(tmp_path: Path, architecture: str, auto: str, task: str) -> None:
    config = {"model_type": "unheard_of", "architectures": [architecture]}
    facts = read_summary(written(tmp_path / "m", {}, {"a": 4}, config=config))
    assert (facts.auto_class, facts.task) == (auto, task)


def test_an_unknown_architecture_is_loaded_as_its_own_code_says(tmp_path: Path) -> None:
    config = {
        "model_type": "x",
        "architectures": ["X"],
        "auto_map": {"AutoConfig": "a.C", "AutoModelForCausalLM": "a.X"},
    }
    facts = read_summary(written(tmp_path / "m", {}, {"a": 4}, config=config))
    assert (facts.auto_class, facts.task, facts.remote_code) == ("AutoModelForCausalLM", "text-generation", True)
    assert facts.costs == {} and facts.dense_bytes is None and facts.parts == {PACKED: 40, REST: 20}


SMALL = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2}
SOUND = Wav2Vec2Config(
    **SMALL,
    vocab_size=30,
    conv_dim=(8,),
    conv_stride=(5,),
    conv_kernel=(10,),
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
)


@pytest.mark.parametrize(
    ("config", "name", "layer", "counted"),
    [
        (ViTConfig(**SMALL), "ViTForImageClassification", "classifier", True),
        (
            T5Config(num_layers=1, d_model=16, d_ff=8, num_heads=2, d_kv=8, vocab_size=30),
            "T5ForConditionalGeneration",
            "lm_head",
            True,
        ),
        (SOUND, "Wav2Vec2ForCTC", "lm_head", False),
    ],
)
def test_models_of_other_inputs_have_parameters_and_pictures_and_pairs_of_texts_macs(
    tmp_path: Path, config, name: str, layer: str, counted: bool
) -> None:
    values = {**config.to_dict(), "architectures": [name]}
    codes = 32 if layer == "classifier" else 480
    costs = read_summary(written(tmp_path / "m", {}, {layer: 4}, config=values, codes=codes)).costs
    # One picture is measured, or a text that is read with one that is written; for sound there is no such unit.
    assert (costs["dense"].macs > 0) == counted
    assert costs["dense"].mean_bits == 32 and costs["compressed"].mean_bits == 4
    assert costs["dense"].parameters > 1000


def test_damaged_files_are_named(tmp_path: Path) -> None:
    small = exported(tmp_path)[1]
    weights = small / "model.safetensors"
    whole = weights.read_bytes()
    for spoiled in (whole[:-1], whole + b"x", whole[:40], b"", b"\xff" * 64):
        weights.write_bytes(spoiled)
        with pytest.raises(GETAError, match=r"model\.safetensors is damaged or cut short"):
            read_summary(small)
    weights.write_bytes(whole)
    assert len(tensor_sizes(weights)) > 10
    (small / "README.md").write_text("---\na: [\n---\n")
    with pytest.raises(GETAError, match=r"README\.md: the YAML"):
        read_summary(small)
    (small / "README.md").write_text("no front matter")
    assert read_summary(small).front == {}
    (small / "geta_config.json").write_text("[]")
    with pytest.raises(GETAError, match=r"geta_config\.json holds list"):
        read_summary(small)
    with pytest.raises(GETAError, match=r"holds no \.safetensors"):
        tensor_bytes(tmp_path)


def test_a_stranger_s_config_is_refused_before_it_is_used(tmp_path: Path) -> None:
    small = exported(tmp_path)[1]
    config = json.loads((small / "config.json").read_text())
    config["quantization_config"]["fixes"]["shapes"]["bert.embeddings.word_embeddings.weight"] = [10**12, 32]
    (small / "config.json").write_text(json.dumps(config))
    with pytest.raises(GETAError, match="word_embeddings"):
        read_summary(small)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "high", None, True])
def test_metrics_are_finite_numbers(value: object) -> None:
    with pytest.raises(GETAError, match=r"dense\['em'\]"):
        check_metrics({"dense": {"em": value}}, "metrics")
    with pytest.raises(GETAError, match="'small' is not a key"):
        check_metrics({"small": {}}, "metrics")
    assert check_metrics({"dense": {"em": 3}}, "metrics") == {"dense": {"em": 3.0}}
