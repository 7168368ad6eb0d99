"""Under `uniform` the counts that a model's config class accepts are known before training, and no others are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    TrainingArguments,
)

from geta_hf import GETAConfig, GETATrainer, convert
from geta_hf.export import uniform_counts
from geta_hf.export.uniform_counts import choose_counts, with_accepted_counts
from geta_hf.qadg import PruningSpace
from geta_hf.surgery.build_space import prepare_space

IDS = torch.arange(3, 15).view(2, 6)


def llama(**sizes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    fields = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 24} | sizes
    config = LlamaConfig(vocab_size=50, num_hidden_layers=2, bos_token_id=1, eos_token_id=2, pad_token_id=0, **fields)
    return LlamaForCausalLM(config).eval()


def accepted(model: PreTrainedModel) -> tuple[PruningSpace, dict[str, tuple[int, ...]], str | None]:
    space, recordings = prepare_space(model, {"input_ids": IDS})
    assert recordings is not None
    found, problem = with_accepted_counts(space, model, recordings)
    return found, {family.kind: family.counts for family in found.trainable}, problem


def test_heads_that_a_config_refuses_are_left_out() -> None:
    """LlamaConfig wants a hidden size that is a multiple of the heads: of 64, not 6, which 3 of 4 KV heads would be."""
    _, counts, problem = accepted(llama())
    assert counts == {"heads": (1, 2, 4), "channels": ()} and problem is None


def test_a_config_that_takes_any_count_restricts_nothing() -> None:
    _, counts, problem = accepted(llama(hidden_size=48, num_attention_heads=4))
    assert counts == {"heads": (), "channels": ()} and problem is None
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 1}
    _, counts, problem = accepted(BertForSequenceClassification(BertConfig(vocab_size=30, **sizes)).eval())
    assert counts["channels"] == ()


def test_large_families_are_decided_by_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uniform_counts, "_ALL", 3)
    _, counts, _ = accepted(llama())
    assert counts == {"heads": (1, 2, 4), "channels": ()}


def test_what_no_number_stands_for_is_said() -> None:
    """GPT-2's config has no head size of its own, so with fewer heads it would compute with larger ones."""
    torch.manual_seed(0)
    _, _, problem = accepted(GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_head=4, n_layer=1)).eval())
    assert problem is not None and problem.startswith("heads: ")


def test_a_space_with_counts_can_be_saved(tmp_path: Path) -> None:
    space, counts, _ = accepted(llama())
    space.save(tmp_path / "space")
    again = PruningSpace.load(tmp_path / "space")
    assert {family.kind: family.counts for family in again.trainable} == counts


def test_the_plan_says_why_not() -> None:
    space, recordings = prepare_space(model := llama(num_attention_heads=4), {"input_ids": IDS})
    assert choose_counts(GETAConfig(uniform=True), space, model, recordings)[1] == ""
    assert "uniform=True" in str(choose_counts(GETAConfig(), space, model, recordings)[1])
    rounded = GETAConfig(uniform=True, activation_bits=(4, 8))
    assert "activations" in str(choose_counts(rounded, space, model, recordings)[1])
    assert choose_counts(GETAConfig(), space, model, None) == (space, None)


def test_a_run_keeps_such_counts_and_becomes_vanilla(tmp_path: Path) -> None:
    args = TrainingArguments(
        str(tmp_path / "run"), max_steps=8, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True
    )
    stages = {"warmup": 1, "projection": 2, "joint": 3, "projection_periods": 2, "pruning_periods": 2}
    config = GETAConfig(**stages, uniform=True, target_sparsity=0.25, keep=["channels"])
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 8
    trainer = GETATrainer(llama(), args, geta_config=config, train_dataset=rows)  # type: ignore[arg-type]
    assert "also vanilla" in str(trainer.plan) and trainer.plan.removed_groups == 4
    trainer.train()
    report = trainer.export_model(tmp_path / "small")
    assert report is not None and {kept for kept, _ in report.kept.values()} == {2}
    convert(tmp_path / "small", tmp_path / "plain", format="vanilla")
    assert LlamaForCausalLM.from_pretrained(tmp_path / "plain").config.num_attention_heads == 4
