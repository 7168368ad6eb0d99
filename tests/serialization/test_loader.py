"""What the plug-in does beyond reading: training on top, tied weights on the disk, other classes, other arguments."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging as hf_logging

from geta_hf import GETAError, export
from geta_hf.serialization import loader
from geta_hf.serialization.loader import find_module
from tests.export.test_use import IDS, exported_llama
from tests.export.tiny_encoders import some_batch, tiny_model, train_by_hand
from tests.spaces import build_space

NORM = "bert.encoder.layer.1.output.LayerNorm.weight"
ROWS = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder with a packed embedding that is its head too."""
    folder = tmp_path_factory.mktemp("tied") / "out"
    exported_llama(folder, True, embedding_bits=4)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = tiny_model().config
    config.num_labels = 3
    model = BertForSequenceClassification(config).eval()
    space = build_space(model, some_batch())
    train_by_hand(model, space, include=["bert.encoder.*"])
    folder = tmp_path_factory.mktemp("classifier") / "out"
    export(model, folder, space=space, batch=some_batch())
    return folder


def change(folder: Path, name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = value(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].pop("checksums", None)  # as of a tool that replaces tensors on purpose
    (folder / "config.json").write_text(json.dumps(config))


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def arguments(folder: Path) -> TrainingArguments:
    return TrainingArguments(str(folder), max_steps=2, use_cpu=True, report_to="none", learning_rate=0.1)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # of peft
def test_trainer_trains_an_adapter_on_top_and_no_packed_weight(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(tied)
    told: list[str] = []
    monkeypatch.setattr(loader.logger, "warning_once", told.append)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=ROWS, eval_dataset=ROWS)
    assert len(told) == 1 and "trains no packed weight" in told[0] and "model.dequantize()" in told[0]
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    trainer.train()
    model.save_pretrained(tmp_path / "trained")  # which checks that the codes still describe the weights
    after, first = load_file(tmp_path / "trained/model.safetensors"), load_file(tied / "model.safetensors")
    packed = [name for name, tensor in first.items() if tensor.dtype == torch.uint8]
    assert packed and all(torch.equal(after[name], first[name]) for name in packed)
    model = AutoModelForCausalLM.from_pretrained(tied)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    before = {name: parameter.clone() for name, parameter in adapted.named_parameters()}
    Trainer(adapted, arguments(tmp_path), train_dataset=ROWS).train()
    changed = {name for name, parameter in adapted.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed and all("lora_" in name for name in changed)
    merged = adapted.merge_and_unload()
    expected = merged(IDS).logits
    with pytest.raises(GETAError, match=r"by a merged adapter .* call model\.dequantize\(\)"):
        merged.save_pretrained(tmp_path / "merged")
    merged.dequantize().save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (again(IDS).logits - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("places", [{"": "disk"}, {"model": "disk", "lm_head": "disk"}])
def test_a_tied_packed_embedding_on_the_disk(tied: Path, tmp_path: Path, places: dict[str, str]) -> None:
    whole = AutoModelForCausalLM.from_pretrained(tied)
    part = AutoModelForCausalLM.from_pretrained(tied, device_map=places, offload_folder=tmp_path / "disk")
    assert part.lm_head.weight.is_meta
    with torch.no_grad():
        assert torch.equal(part(IDS).logits, whole(IDS).logits)
    with pytest.warns(UserWarning, match="offloaded"):
        part.save_pretrained(tmp_path / "again")
    saved, first = load_file(tmp_path / "again" / "model.safetensors"), load_file(tied / "model.safetensors")
    assert set(saved) == set(first)
    assert all(torch.equal(saved[name], first[name]) for name in first)


@pytest.mark.parametrize("kind", [torch.int32, torch.int8, torch.bool, torch.float8_e4m3fn, torch.uint8])
@pytest.mark.parametrize("model_class", [AutoModelForQuestionAnswering, AutoModel])
def test_a_plain_tensor_of_another_type_is_refused(exported: Path, kind: torch.dtype, model_class: Any) -> None:
    change(exported, NORM, lambda tensor: torch.ones(tensor.shape).to(kind))
    with pytest.raises(GETAError, match=rf"model\.safetensors: {NORM} is \w+ of shape"):
        model_class.from_pretrained(exported)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_a_plain_tensor_of_another_float_type_is_read(exported: Path, kind: torch.dtype) -> None:
    change(exported, NORM, lambda tensor: tensor.to(kind))
    expected = load_file(exported / "model.safetensors")[NORM].float()
    assert torch.equal(AutoModelForQuestionAnswering.from_pretrained(exported).state_dict()[NORM], expected)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="older releases load a quantized model's tensors anyhow"
)
def test_a_head_of_another_size_is_drawn_anew_when_asked(classifier: Path, tmp_path: Path) -> None:
    load = BertForSequenceClassification.from_pretrained
    model, first = load(classifier, num_labels=7, ignore_mismatched_sizes=True), load(classifier)
    assert model.classifier.weight.shape == (7, 32)
    assert model.classifier.weight.std() > 0
    with torch.no_grad():
        expected = first.bert(**some_batch()).last_hidden_state
        assert torch.equal(model.bert(**some_batch()).last_hidden_state, expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path).classifier.weight, model.classifier.weight)


def test_a_head_of_another_size_is_an_error_that_names_the_arguments(
    classifier: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hf_logging.set_verbosity_warning()
    hf_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING), pytest.raises((GETAError, RuntimeError), match="ignore_mismatched"):
            BertForSequenceClassification.from_pretrained(classifier, num_labels=7)
    finally:
        hf_logging.disable_propagation()
    assert "classifier.weight is F32 of shape (3, 32)" in caplog.text
    assert "arguments of from_pretrained" in caplog.text


def test_the_base_model_is_never_drawn_anew(classifier: Path) -> None:
    with pytest.raises(GETAError, match=r"word_embeddings.* config\.json, or arguments of from_pretrained"):
        BertForSequenceClassification.from_pretrained(classifier, vocab_size=70, ignore_mismatched_sizes=True)


def test_nor_is_it_under_another_head(tied: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tied).save_pretrained(tmp_path)
    change(tmp_path, "model.norm.weight", lambda tensor: tensor[:-1].clone())
    with pytest.raises(GETAError, match=r"model\.norm\.weight is F32 of shape \(31,\)"):
        LlamaForSequenceClassification.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


@pytest.mark.parametrize(
    ("saved", "in_a_head", "in_the_base"),
    [("BertModel", "bert", ""), ("BertForQuestionAnswering", "", None), ("BertForTokenClassification", None, None)],
)
def test_what_a_folder_says_of_the_whole_model(saved: str, in_a_head: str | None, in_the_base: str | None) -> None:
    model = tiny_model()
    model.config.architectures = [saved]
    assert find_module(model, "") == in_a_head
    assert find_module(model.bert, "") == in_the_base


@pytest.mark.filterwarnings("ignore:You are using a model of type")
@pytest.mark.parametrize("model_class", [BertModel, BertForSequenceClassification, GPT2LMHeadModel])
def test_another_architecture_is_refused(tied: Path, model_class: Any) -> None:
    with pytest.raises(GETAError, match=f"holds nothing of a {model_class.__name__}.*LlamaForCausalLM"):
        model_class.from_pretrained(tied)


def test_another_architecture_in_the_config_is_refused(tied: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tied).save_pretrained(tmp_path)
    change_config(tmp_path, model_type="bert", pad_token_id=0)
    with pytest.raises(GETAError, match="holds nothing of"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer"])
def test_layers_without_end_are_refused_before_they_are_built(exported: Path, key: str) -> None:
    change_config(exported, **{key: 10**7})
    start = time.monotonic()
    with pytest.raises(GETAError, match=f"{key} is 10000000, but quantization_config names"):
        AutoModelForQuestionAnswering.from_pretrained(exported)
    assert time.monotonic() - start < 5
