"""What leaves a causal language model: key-value heads with their query heads, channels of MLPs and of experts; and
with equal counts in every layer an ordinary checkpoint is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from geta_hf.export.formats.vanilla import write_vanilla
from tests.architectures import build
from tests.architectures.base import CHANNELS, HEADS, KV_HEADS
from tests.export.formats.uniform import cut, logits, tiny
from tests.spaces import build_space

HEAD_DIM = 8
DENSE = {"llama": KV_HEADS, "mistral": KV_HEADS, "qwen2": KV_HEADS, "qwen3": KV_HEADS, "gemma": KV_HEADS, "phi": HEADS}
EXPERTS = {
    "mixtral": ["mlp.experts"],
    "qwen3_moe": ["mlp.experts"],
    "qwen2_moe": ["mlp.experts", "mlp.shared_expert"],
}


@pytest.mark.parametrize("name", [*DENSE, *EXPERTS])
def test_a_group_of_heads_is_a_key_value_head_with_its_query_heads(name: str) -> None:
    space = build_space(*build(name))
    for layer in range(2):
        prefix = f"model.layers.{layer}.self_attn"
        family = next(family for family in space.prunable if family.name == f"{prefix}:heads")
        shared = DENSE.get(name, KV_HEADS)
        widths = {(m.tensor.removeprefix(f"{prefix}."), m.dim): m.index.shape[1] for m in family.members}
        output = "dense" if name == "phi" else "o_proj"
        assert family.size == shared
        assert widths["k_proj.weight", 0] == widths["v_proj.weight", 0] == HEAD_DIM
        assert widths["q_proj.weight", 0] == widths[f"{output}.weight", 1] == HEAD_DIM * HEADS // shared


@pytest.mark.parametrize("name", [*DENSE, *EXPERTS])
def test_channels_leave_every_matrix_of_an_mlp_at_once(name: str) -> None:
    space = build_space(*build(name))
    places = EXPERTS.get(name, ["mlp"])
    found = {family.name: family for family in space.prunable if family.kind == "channels"}
    assert found.keys() == {f"model.layers.{layer}.{place}:channels" for layer in range(2) for place in places}
    for family in found.values():
        assert family.size == (24 if name.endswith("moe") else CHANNELS)
        assert len(family.members) == (2 if "experts" in family.name else 3)


@pytest.mark.parametrize("name", ["gemma3", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_equal_counts_leave_an_ordinary_checkpoint(name: str, tmp_path: Path) -> None:
    model, batch = tiny(name)
    write_vanilla(cut(model, batch), tmp_path, batch)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (logits(reloaded, batch) - logits(model, batch)).abs().max() <= 1e-5
    saved, before = json.loads((tmp_path / "config.json").read_text()), model.config.to_dict()
    halved = {key for key, value in saved.items() if type(value) is int and 2 * value == before.get(key)}
    assert {"num_attention_heads", "num_key_value_heads"} < halved and any("intermediate" in key for key in halved)
    assert torch.equal(*(reloaded.generate(batch["input_ids"], max_new_tokens=3, use_cache=c) for c in (True, False)))
