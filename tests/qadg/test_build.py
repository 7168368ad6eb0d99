"""`build_space` on BERT-like encoders: exact families, groups and index rows, and the model left as it was."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForQuestionAnswering, LlamaConfig, LlamaForCausalLM

from geta_hf.errors import GETAError
from geta_hf.qadg import Family, Member, PruningSpace, build_space

from .models import CHANNELS, HEAD_DIM, HEADS, HIDDEN, LAYERS, MODELS, Block, make


def members_of(family: Family) -> dict[tuple[str, int], torch.Tensor]:
    return {(member.tensor, member.dim): member.index for member in family.members}


def by_name(space: PruningSpace) -> dict[str, Family]:
    return {family.name: family for family in space.families}


HEAD_ROWS = torch.arange(HIDDEN).reshape(HEADS, HEAD_DIM)
CHANNEL_ROWS = torch.arange(CHANNELS).reshape(CHANNELS, 1)

LAYER_PATHS = {
    "bert-qa": "bert.encoder.layer",
    "bert-sequence": "bert.encoder.layer",
    "bert-token": "bert.encoder.layer",
    "bert-lm-eager": "bert.encoder.layer",
    "bert-headless": "encoder.layer",
    "roberta-sequence": "roberta.encoder.layer",
    "roberta-lm": "roberta.encoder.layer",
    "electra-token": "electra.encoder.layer",
    "electra-pretraining": "electra.encoder.layer",
    "distilbert-qa": "distilbert.transformer.layer",
    "distilbert-sequence": "distilbert.transformer.layer",
}


@pytest.mark.parametrize("name", LAYER_PATHS)
def test_every_layer_has_its_heads_and_its_channels_and_nothing_else_is_prunable(name, batch):
    space = build_space(make(name), batch)
    mlp = ".ffn" if name.startswith("distilbert") else ""
    layers = [f"{LAYER_PATHS[name]}.{layer}" for layer in range(LAYERS)]
    expected = {f"{layer}.attention:heads" for layer in layers} | {f"{layer}{mlp}:channels" for layer in layers}
    assert {family.name for family in space.prunable} == expected
    assert space.num_groups == LAYERS * (HEADS + CHANNELS)
    assert space.unsupported == ()
    for family in space.prunable:
        assert len(family.members) == (7 if family.kind == "heads" else 3)


FAMILIES = {
    "bert-qa": ["channels"] * 2 + ["head_dim"] * 4 + ["heads"] * 2 + ["residual"],
    "bert-sequence": ["channels"] * 3 + ["head_dim"] * 4 + ["heads"] * 2 + ["residual"],
    "bert-lm-eager": ["channels"] * 2 + ["head_dim"] * 4 + ["heads"] * 2 + ["residual"],
    "roberta-sequence": ["channels"] * 3 + ["head_dim"] * 4 + ["heads"] * 2 + ["residual"],
    "electra-token": ["channels"] * 2 + ["head_dim"] * 4 + ["heads"] * 2 + ["residual"] * 2,
    "distilbert-sequence": ["channels"] * 3 + ["head_dim"] * 4 + ["heads"] * 2 + ["residual"],
    "albert-qa": ["channels", "head_dim", "head_dim", "heads", "residual", "residual"],
    "mpnet-qa": ["channels"] * 2 + ["head_dim"] * 4 + ["heads", "residual"],
}


@pytest.mark.parametrize("name", FAMILIES)
def test_all_families_are_found_by_kind(name, batch):
    assert sorted(family.kind for family in build_space(make(name), batch).families) == FAMILIES[name]


def test_bert_heads_cut_rows_of_query_key_value_and_columns_of_the_output(batch):
    families = by_name(build_space(make("bert-qa"), batch))
    for layer in range(LAYERS):
        path = f"bert.encoder.layer.{layer}.attention"
        expected = {
            (f"{path}.self.{part}.{kind}", 0) for part in ("query", "key", "value") for kind in ("weight", "bias")
        }
        found = members_of(families[f"{path}:heads"])
        assert set(found) == expected | {(f"{path}.output.dense.weight", 1)}
        for index in found.values():
            assert index.dtype == torch.int64
            assert torch.equal(index, HEAD_ROWS)


def test_bert_channels_cut_rows_of_the_first_and_columns_of_the_second_layer(batch):
    families = by_name(build_space(make("bert-qa"), batch))
    for layer in range(LAYERS):
        path = f"bert.encoder.layer.{layer}"
        found = members_of(families[f"{path}:channels"])
        first = f"{path}.intermediate.dense"
        assert set(found) == {(f"{first}.weight", 0), (f"{first}.bias", 0), (f"{path}.output.dense.weight", 1)}
        for index in found.values():
            assert torch.equal(index, CHANNEL_ROWS)


def test_head_dims_are_seen_unprunable_and_exclude_their_heads(batch):
    families = by_name(build_space(make("bert-qa"), batch))
    path = "bert.encoder.layer.0.attention"
    heads, keys, values = (families[name] for name in (f"{path}:heads", f"{path}.self:head_dim", f"{path}:head_dim"))
    assert not keys.prunable and not values.prunable and "whole heads" in keys.reason
    assert heads.excludes == (keys.name, values.name)
    assert keys.excludes == values.excludes == (heads.name,)
    index = members_of(keys)[f"{path}.self.query.weight", 0]
    assert torch.equal(index, HEAD_ROWS.T)


def test_the_residual_stream_is_one_unprunable_family(batch):
    space = build_space(make("bert-qa"), batch)
    (residual,) = [family for family in space.families if family.kind == "residual"]
    assert residual.size == HIDDEN and not residual.prunable and "residual stream" in residual.reason
    assert ("bert.embeddings.word_embeddings.weight", 1) in members_of(residual)
    assert ("qa_outputs.weight", 1) in members_of(residual)


@pytest.mark.parametrize("name", ["bert-sequence", "roberta-sequence", "distilbert-sequence"])
def test_what_feeds_the_task_head_is_found_and_unprunable(name, batch):
    facing = [family for family in build_space(make(name), batch).families if "output of the model" in family.reason]
    assert [(family.kind, family.size) for family in facing] == [("channels", HIDDEN)]


def test_albert_shares_one_family_of_each_kind_over_its_layers(batch):
    path = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    for name in ("albert-qa", "albert-lm"):
        space = build_space(make(name), batch)
        assert [family.name for family in space.prunable] == [f"{path}.attention:heads", f"{path}:channels"]
        assert space.num_groups == HEADS + CHANNELS


def test_relative_position_bias_ties_the_heads_of_all_layers_and_loses_its_columns(batch):
    space = build_space(make("mpnet-qa"), batch)
    (heads,) = [family for family in space.prunable if family.kind == "heads"]
    assert heads.name == "mpnet.encoder:heads" and len(heads.members) == 7 * LAYERS + 1
    found = members_of(heads)
    assert torch.equal(found["mpnet.encoder.relative_attention_bias.weight", 1], torch.arange(HEADS)[:, None])
    assert torch.equal(found["mpnet.encoder.layer.1.attention.attn.o.weight", 1], HEAD_ROWS)


def test_grouped_queries_leave_with_their_keys_and_not_alone_besides(batch):
    """Query heads within a key-value head overlap with the key-value heads, and only these are prunable."""
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, intermediate_size=CHANNELS, vocab_size=60)
    space = build_space(LlamaForCausalLM(config), batch | {"use_cache": False})
    (heads,) = [family for family in space.families if family.kind == "heads"]
    (within,) = [family for family in space.families if family.kind == "query_heads"]
    assert heads.prunable and len(heads.members) == 4
    assert members_of(heads)["model.layers.0.self_attn.q_proj.weight", 0].shape == (2, 2 * HEAD_DIM)
    assert not within.prunable and heads.name in within.excludes and "share keys and values" in within.reason


def test_tied_embeddings_appear_under_one_name(batch):
    space = build_space(make("bert-lm-eager"), batch)
    (residual,) = [family for family in space.families if family.kind == "residual"]
    assert ("bert.embeddings.word_embeddings.weight", 1) in members_of(residual)
    assert "cls.predictions.decoder.weight" not in space.shapes


@pytest.mark.parametrize("name", MODELS)
def test_spaces_are_consistent(name, batch):
    model = make(name)
    space = build_space(model, batch)
    state = model.state_dict()
    names = [family.name for family in space.families]
    assert len(set(names)) == len(names)
    assert set(space.shapes) == {member.tensor for family in space.families for member in family.members}
    for family in space.families:
        assert family.prunable == (not family.reason)
        assert (family.members[0].index[1:, 0] > family.members[0].index[:-1, 0]).all()
        for member in family.members:
            _check_member(member, family, state[member.tensor], space)
        for other in family.excludes:
            assert family.name in by_name(space)[other].excludes


def _check_member(member: Member, family: Family, tensor: torch.Tensor, space: PruningSpace) -> None:
    assert space.shapes[member.tensor] == tuple(tensor.shape)
    assert member.index.dtype == torch.int64 and member.index.shape[0] == family.size
    flat = member.index.flatten()
    assert len(flat.unique()) == len(flat) and flat.min() >= 0 and flat.max() < tensor.shape[member.dim]


def test_labels_in_the_batch_change_nothing(bert, batch):
    positions = torch.tensor([1, 2])
    labelled = batch | {"start_positions": positions, "end_positions": positions}
    plain, with_loss = build_space(bert, batch), build_space(bert, labelled)
    assert [family.name for family in plain.families] == [family.name for family in with_loss.families]
    assert with_loss.unsupported == ()


def test_a_model_on_meta_gives_the_same_space(bert, batch):
    with torch.device("meta"):
        empty = BertForQuestionAnswering(BertConfig(**bert.config.to_dict()))
    assert [f.name for f in build_space(empty, batch).families] == [f.name for f in build_space(bert, batch).families]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_unchanged(training, batch):
    model = make("bert-lm-eager").train(training)
    model.bert.encoder.layer[0].eval()
    state = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    flags = [module.training for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    random = torch.get_rng_state()
    build_space(model, batch)
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is state[name][0] and torch.equal(tensor, state[name][1])
    assert [module.training for module in model.modules()] == flags
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert torch.equal(torch.get_rng_state(), random)


def test_an_unknown_operator_freezes_its_inputs_and_is_reported():
    model = nn.Sequential(Block(torch.relu), Block(lambda x: torch.linalg.qr(x)[1]))
    x = torch.randn(2, 3, 6)
    space = build_space(model, {"input": x})
    assert [family.name for family in space.prunable] == ["0:channels"]
    (frozen,) = space.unsupported
    assert (frozen.operator, frozen.module, frozen.count) == ("linalg_qr", "1", 1)
    assert not any(member.tensor.startswith("1.up") for family in space.families for member in family.members)


def test_what_an_operator_holds_is_reported():
    model = nn.Sequential(Block(torch.relu), Block(lambda x: torch.cumprod(x, dim=-1)))
    space = build_space(model, {"input": torch.randn(2, 3, 6)})
    assert [family.name for family in space.prunable] == ["0:channels"]
    assert [(f.operator, f.module) for f in space.unsupported] == [("cumprod", "1")] and "place" in space.unsupported[
        0
    ].reason


def test_an_error_says_that_nothing_may_be_pruned_and_what_was_frozen():
    model = Block(lambda x: torch.linalg.qr(x)[1])
    with pytest.raises(GETAError, match=r"nothing in Block may be pruned.*linalg_qr in Block \(no rule"):
        build_space(model, {"x": torch.randn(2, 3, 6)})


def test_a_tied_layer_is_not_prunable():
    first, second = Block(torch.relu), Block(torch.relu)
    second.up = first.up
    space = build_space(nn.Sequential(first, second, Block(torch.relu)), {"input": torch.randn(2, 6)})
    assert [family.name for family in space.prunable] == ["2:channels"]
    assert any(family.couplings == ("tied",) and "tied across" in family.reason for family in space.families)


def test_a_buffer_that_is_cut_is_a_member_under_its_name():
    class Scaled(Block):
        def __init__(self) -> None:
            super().__init__(lambda x: x * self.scale.reshape(1, -1))
            self.register_buffer("scale", torch.rand(10))

    (family,) = build_space(Scaled(), {"x": torch.randn(2, 6)}).prunable
    assert torch.equal(members_of(family)["scale", 0], torch.arange(10)[:, None])


def test_a_batch_that_the_model_cannot_run_is_named(bert, batch):
    with pytest.raises(GETAError, match=r"cannot run the batch with inputs wrong \(2, 12\)"):
        build_space(bert, {"wrong": batch["input_ids"]})
    with pytest.raises(GETAError, match=r"input_ids \(1, 50\): RuntimeError: .*expand"):
        build_space(bert, {"input_ids": torch.ones(1, 50, dtype=torch.long)})
    with pytest.raises(GETAError, match="batch is a Tensor; pass a dict"):
        build_space(bert, batch["input_ids"])


def test_a_model_is_unchanged_after_an_error(bert, batch):
    before = {name: id(tensor) for name, tensor in bert.state_dict(keep_vars=True).items()}
    with pytest.raises(GETAError):
        build_space(bert, {"wrong": batch["input_ids"]})
    assert {name: id(tensor) for name, tensor in bert.state_dict(keep_vars=True).items()} == before
    assert bert(**batch).start_logits.shape == batch["input_ids"].shape


def test_an_output_without_a_tensor_is_an_error():
    class Silent(nn.Linear):
        def forward(self, x: torch.Tensor) -> str:
            super().forward(x)
            return "nothing"

    with pytest.raises(GETAError, match=re.escape("Silent returned a str without a tensor")):
        build_space(Silent(3, 3), {"x": torch.randn(2, 3)})


def test_returned_attentions_pin_the_heads(bert, batch):
    bert.set_attn_implementation("eager")
    space = build_space(bert, batch | {"output_attentions": True})
    assert {family.kind for family in space.prunable} == {"channels"}
