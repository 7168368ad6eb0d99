"""`serve`: what a program can hold limits a run before it starts, under every method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, PreTrainedModel, TrainingArguments

from geta_hf import GETAConfig, GETATrainer, SearchConfig, compress, dry_run
from geta_hf.config import CompressionConfig, read_config
from geta_hf.costs.selection import Limits
from geta_hf.errors import GETAError
from geta_hf.export.formats import exported
from geta_hf.export.serving import find_limits, limit_config, limit_families, serving_notes
from geta_hf.methods import OneShotConfig
from geta_hf.qadg.group_types import Family
from tests.export.formats.gguf import tiny
from tests.spaces import build_space

pytest.importorskip("gguf")

STAGES: dict[str, Any] = {"target_sparsity": 0.4}


def rows() -> list[dict[str, torch.Tensor]]:
    ids = tiny.batch()["input_ids"][0]
    return [{"input_ids": ids.roll(place), "labels": ids.roll(place)} for place in range(16)]


def trained(model: PreTrainedModel, config: CompressionConfig, folder: Path) -> PreTrainedModel:
    args = TrainingArguments(
        str(folder / "run"),
        max_steps=20,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = GETATrainer(
        model, args, geta_config=config, train_dataset=rows(), processing_class=tiny.byte_level(), data_collator=stacked
    )
    assert f"served by {config.serve}" in trainer.plan.serving[0].lower() and not trainer.plan.exact
    assert trainer.plan.serving[0] in str(trainer.plan)
    trainer.train()
    trainer.export_model(folder / "small")
    return type(model).from_pretrained(folder / "small")


def stacked(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def compressed(model: PreTrainedModel, config: CompressionConfig, folder: Path) -> PreTrainedModel:
    ids = tiny.batch()["input_ids"]
    batches = [{"input_ids": ids.roll(place, 1)} for place in range(4)]
    report = compress(model, batches, tiny.byte_level(), out=folder / "small", config=config, progress=False)
    assert f"served by {config.serve}" in report.serving[0].lower() and report.serving[0] in str(report)
    return type(model).from_pretrained(folder / "small")


METHODS: dict[str, tuple[type[CompressionConfig], Callable[..., PreTrainedModel]]] = {
    "qasso": (GETAConfig, trained),
    "search": (SearchConfig, trained),
    "one-shot": (OneShotConfig, compressed),
}


def counts(model: PreTrainedModel) -> tuple[list[int], list[int]]:
    """Widths of heads together, and channels, of every layer."""
    layers = model.model.layers
    return [one.self_attn.o_proj.in_features for one in layers], [one.mlp.down_proj.in_features for one in layers]


@pytest.mark.parametrize(
    ("method", "serve"),
    [
        ("qasso", "llama.cpp"),
        ("search", "vllm"),
        pytest.param("search", "llama.cpp", marks=pytest.mark.slow),
        pytest.param("qasso", "vllm", marks=pytest.mark.slow),
        ("one-shot", "llama.cpp"),
        pytest.param("one-shot", "vllm", marks=pytest.mark.slow),
    ],
)
def test_every_method_ends_with_what_can_be_served(method: str, serve: str, tmp_path: Path) -> None:
    kind, run = METHODS[method]
    dense = tiny.model("Llama", intermediate_size=160)
    heads, channels = counts(run(dense, kind(serve=serve, bits=(4, 8), **STAGES), tmp_path))
    multiple = 32 if serve == "llama.cpp" else 64
    assert all(count == 160 or count % multiple == 0 for count in channels) and sum(channels) < 320
    assert all(count % 32 == 0 for count in heads)
    assert serve == "llama.cpp" or len(set(heads)) == 1


def test_heads_are_kept_in_widths_of_blocks() -> None:
    dense = tiny.model("Llama", num_attention_heads=8, num_key_value_heads=8, head_dim=8)
    config = limit_config(GETAConfig(serve="llama.cpp"), dense, tiny.byte_level())
    space = limit_families(config, build_space(dense, tiny.batch()), dense)
    families = {family.kind: family for family in space.prunable}
    assert families["heads"].counts == (4, 8) and families["channels"].counts == ()
    limits = Limits.of(config)
    assert limits.chunks(families["heads"], 8) == [4] and limits.chunks(families["channels"], 96) == [32, 32]
    # Without `serve` the counts say nothing, unless all layers are cut alike.
    assert Limits.of(GETAConfig()).chunks(families["heads"], 8) == [1] * 7


def test_vllm_takes_as_many_heads_in_every_layer() -> None:
    limits = Limits.of(GETAConfig(serve="vllm"))
    one = family("a")
    assert limits.alike(one) and not limits.alike(replace(one, kind="channels"))
    assert not Limits.of(GETAConfig(serve="llama.cpp")).alike(one) and not Limits.of(GETAConfig()).alike(one)


def family(name: str) -> Family:
    return Family(name, "heads", (), True)


UNIFORM = {"Qwen3": {"head_dim": 16}, "Phi3": {"pad_token_id": 0}, "Phi": {}, "Gemma3": {"head_dim": 16}}


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", *UNIFORM])
def test_architectures_with_one_number_for_all_layers_are_cut_alike(kind: str) -> None:
    changes = UNIFORM.get(kind, {})
    if kind == "Gemma3":
        changes = {**changes, "query_pre_attn_scalar": 16, "sliding_window": 64}
    dense = tiny.model(kind, **changes)
    config = limit_config(GETAConfig(serve="llama.cpp", multiple_of=3), dense)
    assert (config.uniform, config.multiple_of) == (kind in UNIFORM, 96)
    space = build_space(dense, tiny.batch())
    limited = limit_families(config, space, dense)
    kinds = {one.kind for one in limited.prunable}
    assert kinds == ({"channels"} if kind in ("Phi", "Phi3") else {"heads", "channels"})
    notes = serving_notes(config, dense, limited)
    assert any("no place for removed heads" in note for note in notes) == (kind in ("Phi", "Phi3"))
    assert ("equally many" in notes[0]) == (kind in UNIFORM)


def test_other_families_are_kept() -> None:
    dense = tiny.model("Llama")
    space = build_space(dense, tiny.batch(), prune=["residual"])
    config = limit_config(GETAConfig(serve="vllm"), dense)
    limited = limit_families(config, space, dense)
    assert {one.kind for one in space.prunable} - {one.kind for one in limited.prunable} == {"residual"}
    assert any("vllm reads no number of residual" in note for note in serving_notes(config, dense, limited))
    only = build_space(dense, tiny.batch(), prune=["residual"], keep=["heads", "channels"])
    with pytest.raises(GETAError, match="vllm can hold no family that may be pruned: vllm reads no number of residual"):
        limit_families(config, only, dense)


def test_rows_without_blocks_are_named_before_training() -> None:
    dense = tiny.model("Llama", hidden_size=48, head_dim=16)
    config = limit_config(GETAConfig(serve="llama.cpp"), dense)
    notes = serving_notes(config, dense, build_space(dense, tiny.batch()))
    assert "stored as F16" in notes[-1] and "model.layers.0.self_attn.q_proj (48 long)" in notes[-1]
    assert find_limits("vllm", dense).multiple == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"serve": "ollama"}, "serve = 'ollama' must be one of llama.cpp, vllm"),
        ({"serve": "vllm", "activation_bits": (8, 8)}, "vllm does not read how inputs are rounded"),
        ({"serve": "llama.cpp", "bits": (4, 10)}, "llama.cpp has no integers of more than 8 bits"),
        ({"serve": "vllm", "bits": (4, 16), "bit_choices": [4, 9]}, "bit_choices = .4, 9.: vllm has no integers"),
    ],
)
def test_settings_without_a_place_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GETAError, match=message):
        GETAConfig(**changes)


def test_models_that_cannot_be_served_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32))
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32, "num_hidden_layers": 1}
    bert = BertForSequenceClassification(BertConfig(vocab_size=30, **sizes))
    for model in (gpt2, bert):
        with pytest.raises(GETAError, match=r"vLLM has no class known here for a .*; known are LlamaForCausalLM"):
            limit_config(GETAConfig(serve="vllm"), model)
        with pytest.raises(GETAError, match="GGUF has no architecture for"):
            limit_config(GETAConfig(serve="llama.cpp"), model)
    with pytest.raises(GETAError, match="is for transformers models, not a Linear"):
        limit_config(GETAConfig(serve="vllm"), nn.Linear(2, 2))
    with pytest.raises(GETAError, match="GGUF has no architecture for GPT2LMHeadModel"):
        GETATrainer(gpt2, None, geta_config=GETAConfig(serve="llama.cpp"))
    monkeypatch.setattr(exported, "find_spec", lambda name: None)
    with pytest.raises(GETAError, match="the gguf format needs gguf"):
        limit_config(GETAConfig(serve="llama.cpp"), tiny.model("Llama"))


def test_a_tokenizer_without_a_gguf_model_is_refused() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]")))
    with pytest.raises(GETAError, match="is a WordLevel tokenizer without a GGUF model"):
        limit_config(GETAConfig(serve="llama.cpp"), tiny.model("Llama"), words)
    limit_config(GETAConfig(serve="vllm"), tiny.model("Llama"), words)  # which runs the tokenizer itself


@pytest.mark.parametrize(
    ("kind", "changes", "problem"),
    [
        ("Qwen3", {"head_dim": 16}, "is a Llama, and Qwen3ForCausalLM none"),
        ("Llama", {"hidden_act": "gelu"}, "computes silu, LlamaForCausalLM gelu"),
        ("Mistral", {"sliding_window": 32}, "to the last 32"),
        ("Llama", {"rope_parameters": {**tiny.ROPE, "partial_rotary_factor": 0.5}}, "rotates all dims of a head"),
    ],
)
def test_where_deci_computes_something_else_all_layers_are_cut_alike(
    kind: str, changes: dict[str, Any], problem: str
) -> None:
    limits = find_limits("vllm", tiny.model(kind, **changes))
    assert limits.uniform and problem in limits.notes[0] and not limits.heads


def test_heads_that_vllm_derives_from_the_width_are_kept() -> None:
    dense = tiny.model("Qwen2", use_sliding_window=True, sliding_window=32, max_window_layers=0)
    assert "no place for removed heads" in find_limits("vllm", dense).heads
    assert not find_limits("vllm", tiny.model("Qwen2")).heads


def test_a_dry_run_has_the_same_limits() -> None:
    dense = tiny.model("Llama", intermediate_size=160)
    config, batch = (
        GETAConfig(serve="llama.cpp", target_parameters=0.4),
        {**tiny.batch(), "labels": tiny.batch()["input_ids"]},
    )
    plan = dry_run(dense, batch, TrainingArguments("run", use_cpu=True), config).plan
    assert plan is not None and "served by llama.cpp as deci: channels in multiples of 32" in plan.serving[0]
    row = next(row for row in plan.rows if row.kind == "channels")
    assert row.removed and (row.groups - row.removed) % 32 == 0


def test_files_of_runs_without_it_are_as_before(tmp_path: Path) -> None:
    assert "serve" not in GETAConfig().to_dict() and GETAConfig(serve="vllm").to_dict()["serve"] == "vllm"
    GETAConfig(serve="vllm").save(tmp_path / "geta_config.json")
    assert read_config(tmp_path / "geta_config.json").serve == "vllm"


@pytest.mark.parametrize(
    ("hidden", "grid", "expected"),
    [(64, "channel", [4, 5, 8]), (256, "block32", [4, 5, 8]), (256, "channel", [2, 3, 4, 5, 6, 8])],
)
def test_widths_without_blocks_of_their_own_are_left_out(hidden: int, grid: str, expected: list[int]):
    """In a GGUF file they would take as much as the next larger one, and round more."""
    model = tiny.model("Llama", hidden_size=hidden)
    config = limit_config(OneShotConfig(serve="llama.cpp", grid=grid, target_bytes=10_000_000), model)
    assert config.widths == expected
    assert f"widths: {', '.join(map(str, expected))} bits" in serving_notes(
        config, model, build_space(model, tiny.batch())
    )
    chosen = OneShotConfig(serve="llama.cpp", grid=grid, target_bytes=10_000_000, bit_choices=[3, 7])
    assert limit_config(chosen, model).widths == [3, 7]
    assert limit_config(replace(chosen, serve="vllm"), model).widths == [3, 7]


def test_a_mean_width_without_a_place_is_refused():
    config = OneShotConfig(serve="llama.cpp", grid="block32", mean_bits=3)
    with pytest.raises(GETAError, match=r"has places for 4, 5, 8 bits; choose a mean between them, or set bit_choices"):
        limit_config(config, tiny.model("Llama"))
