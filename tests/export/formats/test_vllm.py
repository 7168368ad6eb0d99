"""Folders for vLLM, loaded and run by its rules, which `vllm_rules` has written again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel

from geta_hf import convert, export
from geta_hf.errors import GETAError
from geta_hf.export.formats import writer
from geta_hf.export.formats.vllm import write as module
from geta_hf.export.formats.vllm import write_vllm
from geta_hf.quantization import attach_quantizers
from geta_hf.serialization.packed_layers import packed_layers
from tests.export.formats.gguf import tiny
from tests.export.formats.uniform import compressed, logits
from tests.export.formats.vllm_rules import Loaded
from tests.export.test_activations import rounding
from tests.spaces import build_space

pytest.importorskip("compressed_tensors")


def cut(
    dense: PreTrainedModel,
    alike: bool,
    bits: tuple[int, ...] = (4, 3, 8, 2, 6, 5, 7),
    keep: Sequence[str] = (),
    **options: Any,
) -> Any:
    """Half of the heads removed in every layer, and of the channels half, or another number in each."""
    space = build_space(dense, tiny.batch())
    removal = {}
    for family in space.prunable:
        if family.kind in keep:
            continue
        kept = family.size // 2
        if family.kind == "channels" and not alike and ".0." in family.name:
            kept = family.size * 2 // 3
        removal[family.name] = torch.arange(family.size) >= kept
    return compressed(dense, tiny.batch(), space, removal, bits, **options)


def write(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    write_vllm(model, folder, tiny.batch())
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path, dict[str, Any]]:
    small = cut(tiny.model("Llama", attention_bias=True), alike=False)
    folder = tmp_path_factory.mktemp("vllm")
    return small, folder, write(small, folder)


KINDS = {"Llama": {}, "Mistral": {"sliding_window": None}, "Qwen2": {}, "tied": {"tie_word_embeddings": True}}


@pytest.mark.parametrize(
    ("kind", "alike"),
    [
        ("Qwen2", True),
        ("tied", False),
        ("Llama", True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("Llama", False), ("Qwen2", False), ("tied", True))),
        *(pytest.param("Mistral", alike, marks=pytest.mark.slow) for alike in (True, False)),
    ],
)
def test_vllm_loads_and_computes_the_model(kind: str, alike: bool, tmp_path: Path) -> None:
    dense = tiny.model("Llama" if kind == "tied" else kind, **KINDS[kind])
    small = cut(dense, alike)
    config = write(small, tmp_path)
    loaded = Loaded(tmp_path)
    # Qwen2's class in vLLM derives the width of heads, so fewer heads need the other one.
    ordinary = alike and kind != "Qwen2"
    assert config["architectures"] == [type(small).__name__ if ordinary else "DeciLMForCausalLM"]
    assert (tmp_path / "configuration_decilm.py").exists() != ordinary
    assert ("--trust-remote-code" in config["exported_as"]["load"]) != ordinary
    ids = tiny.batch()["input_ids"]
    assert (loaded.logits(ids[0]) - logits(small, {"input_ids": ids})[0]).abs().max() <= 2e-4


def test_blocks_are_groups_and_scales_are_in_the_models_dtype(tmp_path: Path) -> None:
    small = cut(tiny.model("Llama", intermediate_size=192), alike=False, grid="block32").to(torch.bfloat16)
    config = write(small, tmp_path)
    groups = config["quantization_config"]["config_groups"].values()
    assert {(one["weights"]["strategy"], one["weights"]["group_size"]) for one in groups} == {("group", 32)}
    ids = tiny.batch()["input_ids"]
    exact = logits(small, {"input_ids": ids})[0].float()
    assert (Loaded(tmp_path).logits(ids[0]) - exact).abs().max() <= 0.1 * exact.abs().max()
    stored = load_file(tmp_path / "model.safetensors")
    assert {one.dtype for name, one in stored.items() if name.endswith("scale")} == {torch.bfloat16}
    assert 0 < config["exported_as"]["scale_error"]["float16"] < 2**-10


def test_an_uncut_model_and_one_without_quantizers(tmp_path: Path) -> None:
    plain = write(tiny.model("Qwen2"), tmp_path / "plain")
    assert plain["architectures"] == ["Qwen2ForCausalLM"] and "quantization_config" not in plain
    small = cut(tiny.model("Llama"), alike=False, bits=None)  # type: ignore[arg-type]
    assert "quantization_config" not in write(small, tmp_path / "cut")
    for name, model in (("plain", tiny.model("Qwen2")), ("cut", small)):
        ids = tiny.batch()["input_ids"]
        assert (Loaded(tmp_path / name).logits(ids[0]) - logits(model, {"input_ids": ids})[0]).abs().max() <= 1e-4


def test_joined_layers_have_one_width(uneven: tuple[PreTrainedModel, Path, dict[str, Any]]) -> None:
    small, folder, _ = uneven
    loaded = Loaded(folder)
    layers = packed_layers(small)
    for name, parts in loaded.parts.items():
        scheme = loaded.scheme(name)
        widest = max(layers[f"{name.rpartition('.')[0]}.{part}"].bits for part in parts)
        assert scheme is not None and scheme["num_bits"] == (4 if widest <= 4 else 8)
    widths = {loaded.scheme(name)["num_bits"] for name in loaded.parts}  # type: ignore[index]
    assert widths == {4, 8}


def test_of_joined_layers_all_or_none_are_packed(tmp_path: Path) -> None:
    small = cut(tiny.model("Llama"), alike=False, bits=(4, 9, 4, 4, 4, 4, 4))
    config = write(small, tmp_path)
    loaded = Loaded(tmp_path)
    assert loaded.scheme("model.layers.0.self_attn.qkv_proj") is None  # keys have 9 bits
    assert loaded.scheme("model.layers.0.self_attn.o_proj") is not None
    assert "dense, with their rounded values: model.layers.0.self_attn" in config["exported_as"]["notes"][0]


def test_the_configuration_is_read_as_vllm_does(uneven: tuple[PreTrainedModel, Path, dict[str, Any]]) -> None:
    small, folder, stored = uneven
    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.model_type == "nemotron-nas" and config.architectures == ["DeciLMForCausalLM"]
    assert [block.ffn.intermediate_size for block in config.block_configs] == [64, 48]
    assert config.to_dict()["block_configs"] == stored["block_configs"] and not hasattr(config, "qkv_bias")
    assert config.rope_parameters["rope_theta"] == small.config.rope_parameters["rope_theta"]
    with pytest.raises(AttributeError, match="ffn_mult"):
        _ = config.block_configs[0].ffn.ffn_mult
    card = (folder / "README.md").read_text()
    assert "Not run: vLLM." in card and "vllm serve . --trust-remote-code" in card


def test_by_export_and_by_convert(tmp_path: Path) -> None:
    dense = tiny.model("Llama")
    attach_quantizers(dense, initial_bits=8)
    export(dense, tmp_path / "direct", batch=tiny.batch(), format="vllm", processing_class=tiny.byte_level())
    export(dense, tmp_path / "geta", batch=tiny.batch(), processing_class=tiny.byte_level())
    convert(tmp_path / "geta", tmp_path / "later", format="vllm")
    first, second = (Loaded(tmp_path / name) for name in ("direct", "later"))
    assert all(torch.equal(first.parameters[name], second.parameters[name]) for name in first.parameters)
    assert (tmp_path / "later" / "tokenizer.json").exists() and (tmp_path / "direct" / "tokenizer.json").exists()


# --- what is refused --------------------------------------------------------------------------------------------------


def test_classes_without_a_name_in_vllm_are_refused_early() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32))
    with pytest.raises(GETAError, match="vLLM has no class known here for a GPT2LMHeadModel"):
        writer("vllm", gpt2)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("Qwen3", {"head_dim": 16}, "layers differ in what they kept, and a Qwen3Config has one number for all"),
        ("Mistral", {"sliding_window": 32}, "layers differ in what they kept, and a MistralConfig has one number"),
    ],
)
def test_layers_that_differ_without_deci_are_refused(
    kind: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    small = cut(tiny.model(kind, **changes), alike=False)
    with pytest.raises(GETAError, match=message):
        write(small, tmp_path)


def test_other_heads_in_every_layer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GETAError, match="layers kept 4, 2 heads, and vLLM's DeciLMForCausalLM has one number for all"):
        write(tiny.sliced(tiny.model("Llama"), layers=(1,)), tmp_path)


def test_heads_without_a_place_are_refused(tmp_path: Path) -> None:
    dense = tiny.model("Qwen2", use_sliding_window=True, sliding_window=32, max_window_layers=0)
    with pytest.raises(
        GETAError, match=r"vLLM's Qwen2ForCausalLM has no place for removed heads, and .* to the last 32"
    ):
        write(cut(dense, alike=True), tmp_path)


def test_rounded_activations_are_refused(tmp_path: Path) -> None:
    dense = tiny.model("Llama")
    attach_quantizers(dense, initial_bits=8)
    rounding(dense, tiny.batch())
    with pytest.raises(GETAError, match="the vllm format has no place for rounded activations"):
        export(dense, tmp_path / "new", batch=tiny.batch(), format="vllm")
    assert not (tmp_path / "new").exists()


SCALE = "model.layers.0.mlp.down_proj.weight_scale"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda all_: all_[SCALE].mul_(1.01), "down_proj.weight in the vllm folder is not the model"),
        (lambda all_: all_.pop("model.norm.weight"), "holds no model.norm.weight"),
        (lambda all_: all_.update(more=torch.zeros(1)), "holds more, which the model does not have"),
    ],
)
def test_a_folder_that_holds_something_else_is_refused(
    change: Callable[[dict[str, torch.Tensor]], object],
    message: str,
    uneven: tuple[PreTrainedModel, Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved = module.save_torch_state_dict

    def spoiled(state: dict[str, torch.Tensor], folder: Path) -> None:
        saved(state, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    monkeypatch.setattr(module, "save_torch_state_dict", spoiled)
    with pytest.raises(GETAError, match=message):
        write(uneven[0], tmp_path)
