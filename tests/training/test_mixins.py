"""GETATrainer as a mix-in: before another trainer in the list of bases, it compresses what that one trains."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from geta_hf import GETAConfig, GETATrainer
from tests.tiny_tasks import byte_tokenizer

CONFIG = GETAConfig(warmup=1, projection=2, joint=4, projection_periods=1, pruning_periods=2, distill_logits=0.5)
RUN: dict[str, Any] = {
    "max_steps": 9,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_steps": 50,
}


def llama(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, num_key_value_heads=1, pad_token_id=0, **sizes))


class GETASeq2SeqTrainer(GETATrainer, Seq2SeqTrainer):
    pass


@pytest.mark.slow
def test_seq2seq(tmp_path: Path) -> None:
    torch.manual_seed(0)
    halves = {f"{half}_{name}": size for half in ("encoder", "decoder") for name, size in (("layers", 1),)}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    model = BartForConditionalGeneration(
        BartConfig(vocab_size=60, d_model=16, max_position_embeddings=32, **halves, **heads)
    )
    rows = [{"input_ids": [3 + (n + i) % 50 for i in range(6)], "labels": [4 + n % 50, 5, 2]} for n in range(32)]
    made = GETASeq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(str(tmp_path / "run"), predict_with_generate=True, generation_max_length=4, **RUN),
        geta_config=CONFIG,
        train_dataset=rows,
        eval_dataset=rows[:4],
        data_collator=DataCollatorForSeq2Seq(byte_tokenizer(pad_token="<s>"), model=model),
    )
    made.train()
    assert made.distiller.terms.keys() == {"logits"}
    assert made.distiller is not None and made.distiller.terms.keys() == {"logits"}
    assert made.predict(rows[:4]).predictions.shape[0] == 4  # by generation
    report = made.export_model(tmp_path / "small")
    assert report is not None and sum(kept for kept, _ in report.kept.values()) == made.space.num_groups // 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # of trl's, about its own defaults
def test_supervised_fine_tuning_of_trl(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")

    class GETASFTTrainer(GETATrainer, trl.SFTTrainer):
        pass

    tokenizer = byte_tokenizer(pad_token="<s>", eos_token="<s>")
    prompts = [{"prompt": f"ink {n}", "completion": f" is {'wet' if n % 2 else 'dry'}"} for n in range(32)]
    made = GETASFTTrainer(
        llama(len(tokenizer)),
        trl.SFTConfig(str(tmp_path / "run"), max_length=32, **{**RUN, "bf16": False}),
        geta_config=dataclasses.replace(CONFIG, distill_logits=0.0),  # its fused loss makes no logits
        train_dataset=datasets.Dataset.from_list(prompts),
        processing_class=tokenizer,
    )
    made.train()
    report = made.export_model(tmp_path / "small")
    assert report is not None and sum(kept for kept, _ in report.kept.values()) == made.space.num_groups // 2
