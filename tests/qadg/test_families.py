"""What families say of themselves: kinds, costs, couplings, coverage, on architectures of every structure."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import BertConfig, LlamaConfig

from geta_hf import attach_quantizers, build_space
from geta_hf.errors import GETAError
from geta_hf.qadg import PruningSpace
from geta_hf.qadg.group_types import COUPLINGS, KINDS, Family
from tests.architectures import build

from .models import CHANNELS, HEAD_DIM, HEADS, HIDDEN, make

STRUCTURES = ["bert", "gpt2", "llama", "phi3", "falcon", "qwen2_moe", "mamba", "t5", "swin", "resnet", "regnet"]


def family(space: PruningSpace, kind: str, part: str = "") -> Family:
    return next(f for f in space.families if f.kind == kind and part in f.name)


def test_parameters_and_macs_of_bert_are_counted_exactly(batch):
    space = build_space(make("bert-qa"), batch)
    rows, length = batch["input_ids"].shape
    tokens = rows * length
    heads, channels = family(space, "heads", "layer.0"), family(space, "channels", "layer.0")
    projections = 4 * HIDDEN * HEAD_DIM  # query, key, value and output
    assert heads.parameters == projections + 3 * HEAD_DIM
    assert heads.macs == projections * tokens + 2 * rows * length * length * HEAD_DIM  # scores and context
    assert channels.parameters == 2 * HIDDEN + 1
    assert channels.macs == 2 * HIDDEN * tokens


def test_parameters_and_macs_of_a_convolution_are_counted_exactly():
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 5, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x).relu()).exp().cumsum(1)

    (found,) = build_space(Net(), {"x": torch.rand(2, 3, 6, 6)}, prune=["channels"]).prunable
    assert found.size == 8 and found.parameters == 3 * 9 + 1 + 5
    assert found.macs == 2 * 6 * 6 * (3 * 9 + 5)


def test_grouped_queries_give_groups_query_heads_and_rope_pairs():
    model, batch = build("llama")
    space = build_space(model, batch)
    heads, queries = family(space, "heads", "layers.0"), family(space, "query_heads", "layers.0")
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    assert (heads.size, queries.size) == (2, 2) and queries.name in heads.excludes and not queries.prunable
    per_query = {m.tensor.split(".")[-2]: m.index.shape[1] for m in queries.members}
    assert per_query == {"q_proj": 2 * head_dim, "o_proj": 2 * head_dim}  # one query head of each of two KV heads
    pairs = family(space, "head_dim")
    rows = next(m.index for m in pairs.members if m.tensor.endswith("layers.0.self_attn.k_proj.weight"))
    assert pairs.size == head_dim // 2
    for group, row in enumerate(rows.tolist()):
        assert {r % head_dim for r in row} == {group, group + head_dim // 2}


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_family_is_consistent(name):
    space = build_space(*build(name))
    assert space.matrix_parameters > 0 and 0 < space.coverage(prunable_only=True) <= space.coverage() <= 1 + 1e-6
    by_name = {f.name: f for f in space.families}
    for found in space.families:
        assert found.kind in KINDS and set(found.couplings) <= set(COUPLINGS)
        assert found.prunable == (found.reason == "")
        assert found.parameters == sum(
            m.index.shape[1] * math.prod(space.shapes[m.tensor]) // space.shapes[m.tensor][m.dim]
            for m in found.members
            if m.tensor not in space.buffers
        )
        assert all(found.name in by_name[other].excludes for other in found.excludes)
        assert not (found.prunable and any(by_name[other].prunable for other in found.excludes))


@pytest.mark.parametrize("name", ["bert", "gpt2", "gptj", "llama", "phi3", "mamba", "t5", "swin", "wav2vec2"])
def test_our_quantizers_change_nothing_about_the_groups(name):
    model, batch = build(name)
    plain = build_space(model, batch)
    attach_quantizers(model)
    quantized = build_space(model, batch)
    assert [f.name for f in quantized.families] == [f.name for f in plain.families]
    for left, right in zip(quantized.families, plain.families, strict=True):
        assert left.prunable == right.prunable
        assert all(torch.equal(a.index, b.index) for a, b in zip(left.members, right.members, strict=True))


def test_the_cache_that_a_decoder_returns_by_default_does_not_pin_its_heads():
    model, batch = build("llama")
    model.config.use_cache = True
    assert [f.kind for f in build_space(model, batch).prunable].count("heads") == 2
    assert model.config.use_cache is True


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_configuration_is_enough(tmp_path, as_folder):
    sizes = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "intermediate_size": CHANNELS, "vocab_size": 60}
    sizes["max_position_embeddings"] = 24
    config = BertConfig(**sizes, num_hidden_layers=2, architectures=["BertForQuestionAnswering"])
    config.save_pretrained(tmp_path)
    space = PruningSpace.from_config(str(tmp_path) if as_folder else config, keep=["channels"])
    assert [(f.name, f.size) for f in space.prunable] == [
        (f"bert.encoder.layer.{layer}.attention:heads", HEADS) for layer in range(2)
    ]
    space.check(make("bert-qa"))


def test_a_configuration_of_billions_of_parameters_takes_no_weights():
    config = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=2, num_key_value_heads=8)
    space = PruningSpace.from_config(config)
    assert [(f.kind, f.size) for f in space.prunable] == [("heads", 8), ("channels", 14336)] * 2
    with pytest.raises(GETAError, match="no configuration for"):
        PruningSpace.from_config("no/such/folder/anywhere")


def test_verify_runs_all_gates_and_gives_up_what_the_models_code_cannot_follow():
    space = build_space(*build("bloom"), verify=True)  # its ALiBi slopes are computed from the number of heads
    (heads,) = [f for f in space.families if f.kind == "heads"]
    assert not heads.prunable and "arange" in heads.reason
    assert [f.kind for f in space.prunable] == ["channels"] * 2


def test_verify_on_meta_stops_before_the_model_itself():
    config = BertConfig(hidden_size=HIDDEN, num_attention_heads=HEADS, intermediate_size=CHANNELS, num_hidden_layers=1)
    from geta_hf.qadg.tracing.dummy_inputs import empty_model, make_dummy_inputs

    model = empty_model(config)
    assert len(build_space(model, make_dummy_inputs(model), verify=True).prunable) == 2


def test_factors_of_one_dim_are_two_families_however_alike_they_cut():
    """Four groups of four channels: removing groups and removing channels of every group cut as many places alike."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Conv2d(3, 16, 1), torch.nn.Conv2d(16, 5, 1)
            self.norm = torch.nn.GroupNorm(4, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.norm(self.first(x)))

    space = build_space(Net(), {"x": torch.rand(2, 3, 4, 4)}, prune=["channels"])
    cut = [f for f in space.families if f.members[0].tensor == "first.weight"]
    assert [f.size for f in cut] == [4, 4] and cut[0].excludes == (cut[1].name,)
    assert sum(f.prunable for f in cut) == 1
