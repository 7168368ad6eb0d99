"""Models without weights, and batches made from what a model says of itself."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    CLIPConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    PreTrainedModel,
    ResNetConfig,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
)

from geta_hf.errors import GETAError
from geta_hf.qadg.tracing.dummy_inputs import empty_model, example_batch
from tests.architectures import ARCHITECTURES, build
from tests.architectures.base import ENCODER, GQA, T5
from tests.conftest import tiny_bert_config


def same_shapes(left: PreTrainedModel, right: PreTrainedModel) -> bool:
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (left, right)]
    return shapes[0] == shapes[1]


def test_parameters_are_on_meta_and_buffers_are_real_and_right() -> None:
    config = LlamaConfig(**GQA)
    empty, full = empty_model(config), LlamaForCausalLM(config)
    assert type(empty) is LlamaForCausalLM and not empty.training
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert same_shapes(empty, full)
    buffers = dict(empty.named_buffers())
    assert buffers
    for name, buffer in full.named_buffers():
        torch.testing.assert_close(buffers[name], buffer)


def test_tied_weights_are_tied() -> None:
    empty = empty_model(T5Config(**T5))
    assert isinstance(empty, T5ForConditionalGeneration)
    assert empty.lm_head.weight is empty.shared.weight
    assert empty.encoder.embed_tokens.weight is empty.shared.weight


def test_the_configuration_is_left_alone() -> None:
    config = LlamaConfig(**GQA, dtype="bfloat16")
    before = config.to_dict()
    assert empty_model(config).dtype == torch.bfloat16
    assert config.to_dict() == before


def test_eight_billion_parameters_take_no_time_and_no_memory() -> None:
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
    )
    start = time.perf_counter()
    model = empty_model(config)
    assert time.perf_counter() - start < 2
    assert sum(parameter.numel() for parameter in model.parameters()) > 8e9


def test_experts_that_no_memory_would_hold() -> None:
    config = MixtralConfig(num_hidden_layers=1, num_local_experts=100_000)
    model = empty_model(config)
    assert max(parameter.numel() for parameter in model.parameters()) > 1e13
    assert example_batch(model).keys() == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("part", ["", "config.json"])
def test_a_folder_or_file_gives_the_class_that_was_saved(tmp_path: Path, part: str) -> None:
    config = tiny_bert_config(architectures=["BertForTokenClassification"])
    config.save_pretrained(tmp_path)
    assert type(empty_model(str(tmp_path / part))) is BertForTokenClassification


def test_the_first_known_class_wins() -> None:
    config = tiny_bert_config(architectures=["MyOwnBert", "BertForSequenceClassification"])
    assert type(empty_model(config)) is BertForSequenceClassification


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (BertConfig(**ENCODER), "BertForMaskedLM"),
        (LlamaConfig(**GQA), "LlamaForCausalLM"),
        (T5Config(**T5), "T5ForConditionalGeneration"),
        (ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]), "ResNetForImageClassification"),
        (CLIPConfig(), "CLIPModel"),
    ],
)
def test_without_a_class_the_task_decides(config: BertConfig, expected: str) -> None:
    assert type(empty_model(config)).__name__ == expected


def test_what_cannot_be_found_is_said(tmp_path: Path) -> None:
    with pytest.raises(GETAError, match=r"no configuration for 'no/such-model'.*local folder"):
        empty_model("no/such-model")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "of-the-future"}))
    with pytest.raises(GETAError, match="of-the-future"):
        empty_model(str(tmp_path))


def test_what_cannot_be_built_is_said() -> None:
    config = tiny_bert_config(hidden_size=30)
    with pytest.raises(GETAError, match=r"BertForMaskedLM cannot be built from its BertConfig: .*hidden size"):
        empty_model(config)


def test_text_is_ordinary_tokens_with_padding_at_the_end() -> None:
    config = tiny_bert_config(vocab_size=12, pad_token_id=7, eos_token_id=[3, 4], image_token_id=5)
    batch = example_batch(BertForTokenClassification(config), rows=3, length=16)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids.shape == mask.shape == (3, 16)
    assert mask.sum(1).tolist() == [16, 16, 12]
    assert set(ids[mask == 1].tolist()) <= set(range(12)) - {3, 4, 5, 7}
    assert set(ids[mask == 0].tolist()) == {7}


def test_the_same_batch_every_time(bert: PreTrainedModel) -> None:
    state = torch.get_rng_state()
    first, second = example_batch(bert), example_batch(bert)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), state)


def test_pictures_have_the_dtype_of_the_model() -> None:
    model = empty_model(ViTConfig(image_size=(16, 32), num_channels=1, dtype="bfloat16"))
    pixels = example_batch(model)["pixel_values"]
    assert pixels.shape == (2, 1, 16, 32) and pixels.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("bart", {"input_ids": (2, 8), "attention_mask": (2, 8), "decoder_input_ids": (2, 8)}),
        ("resnet", {"pixel_values": (2, 3, 64, 64)}),
        ("videomae", {"pixel_values": (2, 4, 3, 32, 32)}),
        ("vjepa2", {"pixel_values_videos": (2, 4, 3, 32, 32)}),
        ("clip", {"input_ids": (2, 8), "attention_mask": (2, 8), "pixel_values": (2, 3, 32, 32)}),
        ("whisper", {"input_features": (2, 8, 32), "decoder_input_ids": (2, 8)}),
        ("wav2vec2", {"input_values": (2, 4000)}),
        ("audio-spectrogram-transformer", {"input_values": (2, 32, 16)}),
        ("wav2vec2-bert", {"input_features": (2, 64, 16)}),
        ("patchtst", {"past_values": (2, 16, 3)}),
        (
            "layoutlmv3",
            {"input_ids": (2, 8), "attention_mask": (2, 8), "bbox": (2, 8, 4), "pixel_values": (2, 3, 32, 32)},
        ),
    ],
)
def test_inputs_by_kind_of_model(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
    assert ARCHITECTURES[name].inputs is None
    model, batch = build(name)
    assert {key: tuple(tensor.shape) for key, tensor in batch.items()} == shapes
    with torch.no_grad():
        model(**batch)


@pytest.mark.parametrize("name", ["paligemma", "qwen2_vl", "idefics2", "blip-2"])
def test_the_text_has_room_for_every_picture(name: str) -> None:
    model, batch = build(name)
    pictures = (batch["input_ids"] == 90).sum(1)
    assert "pixel_values" in batch and pictures[0] == pictures[1] > 0
    assert batch["attention_mask"].shape == batch["input_ids"].shape
    with torch.no_grad():
        model(**batch)


def test_an_empty_model_gets_the_same_batch_as_a_full_one() -> None:
    model, batch = build("blip-2")
    same = example_batch(empty_model(model.config))
    assert batch.keys() == same.keys()
    assert all(torch.equal(batch[name], same[name]) for name in batch)


def test_what_cannot_be_made_is_said() -> None:
    model, _ = build("informer")
    with pytest.raises(GETAError, match=r"past_time_features.*pass a batch of your own"):
        example_batch(model)


def test_a_decoder_input_comes_only_where_it_is_taken() -> None:
    config = T5Config(**T5, architectures=["T5EncoderModel"])
    assert "decoder_input_ids" not in example_batch(empty_model(config))
