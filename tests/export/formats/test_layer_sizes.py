"""What config.json says of every layer's sizes, as transformers' own `per_layer_config`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, StaticCache

from geta_hf import convert
from geta_hf.export.formats.geta import write_geta
from geta_hf.export.formats.layer_sizes import write_layer_sizes
from tests.export.formats.gguf import tiny
from tests.export.formats.test_vllm import cut


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    small = tiny.cut(tiny.model("Llama"), alike=False)
    folder = tmp_path_factory.mktemp("sizes") / "geta"
    folder.mkdir()
    write_geta(small, folder, tiny.batch())
    return small, folder


def sizes(model: PreTrainedModel) -> list[tuple[int, int, int]]:
    return [
        (
            layer.self_attn.q_proj.out_features // 16,
            layer.self_attn.k_proj.out_features // 16,
            layer.mlp.down_proj.in_features,
        )
        for layer in model.model.layers
    ]


def test_other_readers_see_the_real_shapes(made: tuple[PreTrainedModel, Path]) -> None:
    small, folder = made
    config: Any = AutoConfig.from_pretrained(folder)
    found = [
        (one.num_attention_heads, one.num_key_value_heads, one.intermediate_size) for one in config.per_layer_config
    ]
    assert found == sizes(small) and found[0] != found[1]
    # The numbers before the cut, from which the class builds its layers, can still be read.
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (4, 2, 96)


def test_caches_are_sized_by_them(made: tuple[PreTrainedModel, Path]) -> None:
    small, folder = made
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert [shared for _, shared, _ in sizes(model)] == [shared for _, shared, _ in sizes(small)]
    shape = type(model)._get_static_cache_init_shape(model)  # transformers' own, without geta_hf's
    assert shape == ([shared for _, shared, _ in sizes(small)], 16)
    cache = StaticCache(config=model.config, max_cache_len=24)
    ids = tiny.batch()["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids, past_key_values=cache).logits, model(ids).logits)
    expected = small.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, cache_implementation="static"), expected)


def test_saved_again_and_written_in_other_formats(made: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    small, folder = made
    before = json.loads((folder / "config.json").read_text())["per_layer_config"]
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    again = AutoConfig.from_pretrained(tmp_path / "again")
    assert [one.intermediate_size for one in again.per_layer_config] == [one[2] for one in sizes(small)]
    assert before.keys() == {"0", "1"}
    alike = cut(tiny.model("Llama"), alike=True)
    (tmp_path / "alike").mkdir()
    write_geta(alike, tmp_path / "alike", tiny.batch())
    convert(tmp_path / "alike", tmp_path / "plain", format="vanilla")
    plain = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "per_layer_config" not in plain and "allow_global_per_layer_attribute_access" not in plain
    assert (plain["num_attention_heads"], plain["intermediate_size"]) == (2, 48)


def test_a_model_that_was_not_cut_has_none(tmp_path: Path) -> None:
    write_geta(cut(tiny.model("Llama"), alike=True, keep=["heads", "channels"]), tmp_path, tiny.batch())
    assert "per_layer_config" not in json.loads((tmp_path / "config.json").read_text())


def test_narrower_heads_are_told_as_well(tmp_path: Path) -> None:
    """What the export of heads that lost dims writes; the proof of such a folder is in tests/export/test_reload.py."""
    small = cut(tiny.model("Llama"), alike=True, keep=["heads", "channels"])
    small.save_pretrained(tmp_path)
    small.model.layers[1].self_attn.head_dim = 8
    write_layer_sizes(small, tmp_path)
    config: Any = AutoConfig.from_pretrained(tmp_path)
    assert [one.head_dim for one in config.per_layer_config] == [16, 8]
