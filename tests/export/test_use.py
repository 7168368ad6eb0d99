"""What a user does with an exported folder: other types, shards, offloading, adapters, a plain model again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    BertForSequenceClassification,
    BertTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    pipeline,
)

from geta_hf import GETAError, export
from geta_hf.quantization import attach_quantizers
from geta_hf.serialization.packed_layers import PackedEmbedding, PackedRows, packed_layers
from tests.export.tiny_encoders import some_batch, tiny_model, train_by_hand
from tests.spaces import build_space

IDS = torch.arange(24).view(2, 12) % 60


def tiny_llama(tied: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=60, num_hidden_layers=2, tie_word_embeddings=tied, **sizes)
    return LlamaForCausalLM(config).eval()


def exported_llama(folder: Path, tied: bool, include: list[str] | None = None, **kwargs: Any) -> None:
    model = tiny_llama(tied)
    batch = {"input_ids": IDS}
    space = build_space(model, batch)
    train_by_hand(model, space, include=include)
    export(model, folder, space=space, batch=batch, **kwargs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert") / "out"
    model = tiny_model()
    space = build_space(model, some_batch())
    train_by_hand(model, space)
    export(model, folder, space=space, batch=some_batch(), embedding_bits=8)
    return folder


def outputs(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**some_batch()).start_logits


def test_embedding_is_small_in_the_folder_and_in_memory(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "bert.embeddings.word_embeddings"
    assert tensors[f"{name}.weight"].dtype == torch.uint8
    assert tensors[f"{name}.weight"].numel() == 60 * 32
    assert tensors[f"{name}.weight_scale"].shape == (60,)
    layer = AutoModelForQuestionAnswering.from_pretrained(folder).get_submodule(name)
    assert isinstance(layer, PackedRows)
    assert layer.weight.dtype == torch.int8
    dense = tiny_model().get_submodule(name).weight
    assert (layer(torch.arange(60)) - dense).abs().max() <= dense.abs().max() / 127


@pytest.mark.parametrize("embedding_bits", [None, 8])
def test_the_file_is_hardly_larger_than_its_bits(tmp_path: Path, embedding_bits: int | None) -> None:
    model = tiny_model(hidden=256)
    space = build_space(model, some_batch())
    train_by_hand(model, space)
    report = export(model, tmp_path / "out", space=space, batch=some_batch(), embedding_bits=embedding_bits)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    plain = [t.nbytes for name, t in tensors.items() if f"{name}_scale" not in tensors and "_scale" not in name]
    assert report.file_bytes <= 1.02 * (report.packed_bits / 8 + sum(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_type_saves_the_same_codes(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model = AutoModelForQuestionAnswering.from_pretrained(folder, dtype=dtype)
    assert model.get_input_embeddings()(IDS).dtype == dtype
    model.save_pretrained(tmp_path / "again")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    packed = [name for name, tensor in before.items() if tensor.dtype == torch.uint8]
    assert packed
    assert set(before) == set(after)
    for name in packed:
        assert torch.equal(before[name], after[name])
        assert torch.equal(before[f"{name}_scale"], after[f"{name}_scale"])
    again = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "again", dtype=dtype)
    assert torch.equal(outputs(again), outputs(model))


def test_shards_load_to_the_same_model_and_a_missing_one_is_named(folder: Path, tmp_path: Path) -> None:
    whole = AutoModelForQuestionAnswering.from_pretrained(folder)
    whole.save_pretrained(tmp_path, max_shard_size="8KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert torch.equal(outputs(AutoModelForQuestionAnswering.from_pretrained(tmp_path)), outputs(whole))
    shards[1].unlink()
    with pytest.raises((GETAError, OSError), match=shards[1].name):
        AutoModelForQuestionAnswering.from_pretrained(tmp_path)


def test_offloaded_to_disk_it_computes_and_saves_the_same(folder: Path, tmp_path: Path) -> None:
    whole = AutoModelForQuestionAnswering.from_pretrained(folder)
    places = {"bert.embeddings": "cpu", "bert.encoder": "disk", "qa_outputs": "cpu"}
    part = AutoModelForQuestionAnswering.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "disk")
    assert any(parameter.is_meta for parameter in part.parameters())
    assert torch.equal(outputs(part), outputs(whole))
    with pytest.warns(UserWarning, match="offloaded"):
        part.save_pretrained(tmp_path / "again")
    saved, first = load_file(tmp_path / "again" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert set(saved) == set(first)
    assert all(torch.equal(saved[name], first[name]) for name in first)


def test_device_map_auto(folder: Path) -> None:
    model = AutoModelForQuestionAnswering.from_pretrained(folder, device_map="auto")
    assert torch.equal(outputs(model), outputs(AutoModelForQuestionAnswering.from_pretrained(folder)))


def test_dequantized_it_is_a_plain_model_that_trains_and_saves(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForQuestionAnswering.from_pretrained(folder)
    expected = outputs(model)
    plain = copy.deepcopy(model).dequantize()
    assert not packed_layers(plain)
    assert type(plain.get_submodule("bert.encoder.layer.0.attention.self.query")) is torch.nn.Linear
    assert type(plain.get_input_embeddings()) is torch.nn.Embedding
    assert not plain.is_quantized
    assert torch.equal(outputs(plain), expected)
    plain.train()(**some_batch()).start_logits.sum().backward()
    assert all(parameter.requires_grad for parameter in plain.parameters())
    plain.eval().save_pretrained(tmp_path / "plain")
    again = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "plain")
    assert torch.equal(outputs(again), expected)
    assert torch.equal(outputs(model), expected)


@pytest.mark.parametrize(
    "places",
    [
        {"bert.embeddings": "cpu", "bert.encoder.layer.0": "cpu", "bert.encoder.layer.1": "disk", "qa_outputs": "cpu"},
        {"bert.embeddings": "disk", "bert.encoder": "cpu", "qa_outputs": "disk"},
        {"": "disk"},
    ],
)
def test_offloaded_it_is_dequantized_where_it_lies(folder: Path, tmp_path: Path, places: dict[str, str]) -> None:
    expected = outputs(AutoModelForQuestionAnswering.from_pretrained(folder).dequantize())
    part = AutoModelForQuestionAnswering.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "disk")
    plain = part.dequantize()
    assert any(parameter.is_meta for parameter in plain.parameters())
    assert not packed_layers(plain)
    for _ in range(2):
        assert torch.equal(outputs(plain), expected)
    with pytest.warns(UserWarning, match="offloaded"):
        plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(outputs(AutoModelForQuestionAnswering.from_pretrained(tmp_path / "plain")), expected)


def test_tied_embeddings_are_dequantized_beside_offloaded_layers(tmp_path: Path) -> None:
    exported_llama(tmp_path / "out", True, embedding_bits=8)
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places["model.layers"] = "disk"
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out").dequantize()(IDS).logits
        kwargs = {"device_map": places, "offload_folder": tmp_path / "disk"}
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **kwargs).dequantize()
        assert torch.equal(plain(IDS).logits, expected)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # of peft
def test_an_adapter_trains_on_top(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForQuestionAnswering.from_pretrained(folder)
    before = outputs(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "value"], r=2))
    assert torch.equal(outputs(adapted), before)
    adapted.train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        adapted(**some_batch()).start_logits.square().sum().backward()
        optimizer.step()
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert not torch.equal(outputs(adapted.eval()), before)
    assert torch.equal(outputs(adapted.unload()), before)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embedding_is_saved_once(tmp_path: Path, tied: bool) -> None:
    exported_llama(tmp_path / "out", tied, embedding_bits=8)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in tensors) != tied
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    layer = model.get_input_embeddings()
    assert type(layer) is (PackedEmbedding if tied else PackedRows)
    assert (model.lm_head.weight is layer.weight) == tied
    tokens = model.generate(IDS[:1, :4], max_new_tokens=5, do_sample=False)
    uncached = model.generate(IDS[:1, :4], max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(tokens, uncached)
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert set(again) == set(tensors)
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    plain = model.dequantize()
    assert (plain.lm_head.weight is plain.get_input_embeddings().weight) == tied
    assert torch.equal(plain.generate(IDS[:1, :4], max_new_tokens=5, do_sample=False), tokens)


def test_the_base_model_alone(folder: Path) -> None:
    base, whole = AutoModel.from_pretrained(folder), AutoModelForQuestionAnswering.from_pretrained(folder)
    with torch.no_grad():
        expected = whole.bert(**some_batch()).last_hidden_state
        assert torch.equal(base(**some_batch()).last_hidden_state, expected)


@pytest.mark.parametrize("bits", [1, 9, True, 4.0])
def test_other_widths_of_an_embedding_are_refused(tmp_path: Path, bits: Any) -> None:
    model = tiny_model()
    attach_quantizers(model)
    with pytest.raises(GETAError, match="embedding_bits"):
        export(model, tmp_path / "out", batch=some_batch(), embedding_bits=bits)


def test_a_pipeline(tmp_path: Path) -> None:
    model = BertForSequenceClassification(tiny_model().config).eval()
    space = build_space(model, some_batch())
    train_by_hand(model, space)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    tokenizer = BertTokenizer(vocab={word: place for place, word in enumerate(words)})
    export(model, tmp_path / "out", space=space, batch=some_batch(), processing_class=tokenizer, embedding_bits=8)
    classify = pipeline("text-classification", model=str(tmp_path / "out"), device="cpu")
    (found,) = classify("good film")
    small = BertForSequenceClassification.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        expected = small(**tokenizer("good film", return_tensors="pt")).logits.softmax(-1)
    assert found["score"] == pytest.approx(float(expected.max()), abs=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_compiled_it_gives_the_same(folder: Path) -> None:
    model = AutoModelForQuestionAnswering.from_pretrained(folder)
    torch.testing.assert_close(outputs(torch.compile(model, fullgraph=True)), outputs(model), rtol=0, atol=1e-5)
