"""The plan: what a ledger made of a model counts, and what the plan says before training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import BertForQuestionAnswering, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from geta_hf import GETAConfig
from geta_hf.costs.ledger import RoundedRows
from geta_hf.errors import GETAError
from geta_hf.methods.qasso.method import _channel_dims as channel_dims
from geta_hf.qadg.group_labels import family_starts
from geta_hf.qadg.group_types import Member
from geta_hf.quantization import attach_quantizers
from geta_hf.training.plan import layer_uses, make_ledger, make_plan
from tests.architectures import build
from tests.conftest import tiny_bert_config
from tests.spaces import build_space

HIDDEN = 32


@pytest.fixture
def made(bert, batch):
    space = build_space(bert, batch)
    attach_quantizers(bert)
    return bert, space, make_ledger(bert, space)


def test_removed_groups_take_rows_and_columns_out_of_the_count(made) -> None:
    _, space, ledger = made
    gone = ledger.nothing.clone()
    for start, family in zip(family_starts(space.prunable), space.prunable, strict=True):
        if "layer.0" in family.name:
            gone[start : start + {"heads": 3, "channels": 10}[family.kind]] = True
    lost = ledger.weights(ledger.nothing).sum() - ledger.weights(gone).sum()
    assert lost == 4 * (3 * 8) * HIDDEN + 2 * 10 * HIDDEN
    biases = 3 * (3 * 8) + 10
    assert ledger.prunable_parameters(ledger.nothing) - ledger.prunable_parameters(gone) == lost + biases


def test_a_float_model_is_counted_to_the_byte(bert, batch, tmp_path) -> None:
    """Without a quantizer the ledger is the safetensors file that transformers writes."""
    space = build_space(bert, batch)
    ledger = make_ledger(bert, space)
    bert.save_pretrained(tmp_path)
    assert ledger.stored_bytes(ledger.nothing, 32.0) == (tmp_path / "model.safetensors").stat().st_size


def test_a_buffer_that_no_file_holds_is_cut_for_nothing(made) -> None:
    """Such as the multipliers of Falcon-H1's channels, which its constructor makes."""
    bert, space, ledger = made
    first, *rest = space.families
    unstored = Member("multipliers", 0, first.members[0].index)
    wider = replace(space, families=(replace(first, members=(*first.members, unstored)), *rest))
    found = make_ledger(bert, wider)
    assert found.shapes == ledger.shapes and len(found.labels) == len(ledger.labels)
    assert found.stored_bytes(found.nothing, 8.0) == ledger.stored_bytes(ledger.nothing, 8.0)


def test_tied_tensors_are_stored_once(tmp_path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=60, tie_word_embeddings=True, **sizes))
    ledger = make_ledger(model, build_space(model, {"input_ids": torch.arange(8)[None]}))
    model.save_pretrained(tmp_path)
    assert ledger.stored_bytes(ledger.nothing, 32.0) == (tmp_path / "model.safetensors").stat().st_size


def test_uses_are_relative_to_the_layer_that_runs_most(made, batch) -> None:
    bert, _, _ = made
    assert set(layer_uses(bert, batch).values()) == {1.0}


def test_channels_of_a_quantizer_follow_the_weights_layout(batch) -> None:
    model = BertForQuestionAnswering(tiny_bert_config())
    attach_quantizers(model, per_channel=True)
    assert set(channel_dims(model).values()) == {0} and len(channel_dims(model)) == 12
    ledger = make_ledger(model, build_space(model, batch))
    assert {layer.channel_dim for layer in ledger.layers} == {0}


def test_the_plan_says_what_would_go_and_what_is_left(made) -> None:
    _, space, ledger = made
    plan = make_plan(GETAConfig(target_sparsity=0.5), space, ledger)
    assert [(row.kind, row.families, row.groups, row.removed) for row in plan.rows] == [
        ("heads", 2, 4, 2),
        ("channels", 2, 48, 24),
    ]
    assert plan.removed_groups == 52 and plan.exact and plan.kept_parameters == 0.5 and plan.mean_bits == 6
    assert plan.relative_bops == pytest.approx(0.5 * 6 / 32)
    for part in ("| heads ", "52 of 104", "50.0%", "mean bits: 6.00", "9.38%", "MB"):
        assert part in str(plan)


def test_a_count_that_chunks_may_miss_is_not_promised(made) -> None:
    _, space, ledger = made
    plan = make_plan(GETAConfig(target_sparsity=0.5, multiple_of=16), space, ledger)
    assert not plan.exact and "about 52 of 104" in str(plan)


def test_a_plan_for_bytes_is_that_size(made) -> None:
    _, space, ledger = made
    plan = make_plan(GETAConfig(target_bytes=24_000), space, ledger)
    assert 0.95 * 24_000 < plan.bytes <= 24_000


def test_a_size_that_training_splits_is_planned_by_its_bounds(made) -> None:
    _, space, ledger = made
    plan = make_plan(GETAConfig(target_bytes=24_000, bits=(2, 8), split="early"), space, ledger)
    even = make_plan(GETAConfig(target_bytes=24_000, bits=(2, 8), split="even"), space, ledger)
    ends = plan.bounds
    assert ends is not None and even.bounds is None and plan.removed_groups == even.removed_groups
    assert ends.fewest <= plan.removed_groups <= ends.most == plan.most_removed_groups and ends.fewest < ends.most
    assert 2 <= ends.narrowest < ends.widest == 8
    assert f"from about {ends.fewest} groups removed at" in str(plan) and "by expected loss" not in str(even)
    loose = make_plan(GETAConfig(target_bytes=10**9, split="late"), space, ledger).bounds
    assert loose is not None and (loose.fewest, loose.most, loose.widest) == (0, 0, 8)


def test_weights_in_layers_that_no_quantizer_covers_are_said(batch) -> None:
    """Experts whose weights are stacked, and the router that is no linear layer; embeddings and norms do not count."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=60, num_key_value_heads=2, num_local_experts=4, **sizes))
    space = build_space(model, {"input_ids": torch.arange(8)[None]})
    attach_quantizers(model)
    plan = make_plan(GETAConfig(), space, make_ledger(model, space), model)
    bare, covered = 4 * 3 * 32 * 48 + 4 * 32, 2 * 32 * 32 + 2 * 32 * 16
    assert plan.unquantized == ("model.layers.*.mlp.experts", "model.layers.*.mlp.gate")
    assert plan.unquantized_share == pytest.approx(bare / (bare + covered))
    said = "not quantized: 85.8% of the layers' matrix weights (model.layers.*.mlp.experts, model.layers.*.mlp.gate)"
    assert said in str(plan).splitlines()


def test_nothing_is_said_where_quantizers_cover_all(made) -> None:
    bert, space, ledger = made
    plan = make_plan(GETAConfig(), space, ledger, bert)
    assert plan.unquantized == () and "not quantized" not in str(plan)


def test_layers_left_out_by_the_user_are_not_quantized_either(bert, batch) -> None:
    space = build_space(bert, batch)
    attach_quantizers(bert, exclude=["intermediate"])
    plan = make_plan(GETAConfig(), space, make_ledger(bert, space), bert)
    assert plan.unquantized == ("bert.encoder.layer.*.intermediate.dense",)
    assert plan.unquantized_share == pytest.approx(48 * 32 / (4 * 32 * 32 + 2 * 48 * 32))


@pytest.mark.parametrize("name", ["t5", "swin", "cohere"])
def test_tables_of_positions_and_norms_are_no_matrix_weights(name: str) -> None:
    model, batch = build(name)
    space = build_space(model, batch)
    attach_quantizers(model)
    plan = make_plan(GETAConfig(), space, make_ledger(model, space), model)
    assert plan.unquantized == (), plan


def test_learned_widths_are_not_promised(made) -> None:
    _, space, ledger = made
    plan = make_plan(GETAConfig.paper(), space, ledger)
    assert plan.mean_bits is None and "mean bits: learned" in str(plan)


def test_a_size_out_of_reach_names_the_reachable_one(made) -> None:
    _, space, ledger = made
    with pytest.raises(GETAError, match=r"target_bytes = 9,000 can't be reached: .* it is ([\d,]+);") as caught:
        make_plan(GETAConfig(target_bytes=9000), space, ledger)
    reachable = int(str(caught.value).split(" it is ")[1].split(";")[0].replace(",", ""))
    assert make_plan(GETAConfig(target_bytes=reachable), space, ledger).target.amount == reachable
    with pytest.raises(GETAError, match="can't be reached"):
        make_plan(GETAConfig(target_bytes=reachable - 1), space, ledger)


def test_the_plan_says_what_the_embedding_would_save(bert, batch, tmp_path) -> None:
    """Counted in the export: 4 bytes a value, or 1 and a step size for each row."""
    space = build_space(bert, batch)
    attach_quantizers(bert)
    rows, columns = bert.get_input_embeddings().weight.shape
    made = make_plan(GETAConfig(), space, make_ledger(bert, space), bert)
    assert made.embedding == (4 * rows * columns, rows * (columns + 4))
    assert f"{4 * rows * columns / 1e6:,.2f} MB are the vocabulary's embedding; embedding_bits=8 stores" in str(made)
    rounded = make_plan(GETAConfig(embedding_bits=8), space, make_ledger(bert, space, embedding=RoundedRows(8)), bert)
    assert rounded.embedding is None and "embedding_bits" not in str(rounded)
    saved = made.embedding[0] - made.embedding[1]
    # The file's header names the step sizes and differs by a few bytes.
    assert made.bytes - rounded.bytes == pytest.approx(saved, abs=300)


def test_nothing_is_said_of_an_embedding_that_saves_little(bert, batch) -> None:
    space = build_space(bert, batch)
    attach_quantizers(bert)
    small = nn.Embedding(2, 32)
    bert.set_input_embeddings(small)
    assert make_plan(GETAConfig(), space, make_ledger(bert, space), bert).embedding is None
