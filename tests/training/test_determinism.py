"""A run takes no operator that a GPU refuses under `full_determinism=True`, or computes otherwise in the next run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertForQuestionAnswering, TrainingArguments

from geta_hf import GETAConfig, GETATrainer
from tests.conftest import tiny_bert_config
from tests.deterministic_forms import DeterministicForms


def _rows() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(0, 60, (8,), generator=generator),
            "start_positions": torch.tensor(1),
            "end_positions": torch.tensor(2),
        }
        for _ in range(16)
    ]


_PAPER = {"forgetting": "paper", "bit_rule": "paper", "saliency": "hesso"}


@pytest.mark.parametrize(
    "rules", [{"per_channel": True}, pytest.param(_PAPER, marks=pytest.mark.slow)], ids=["default", "paper"]
)
@pytest.mark.usefixtures("shared_spaces")
def test_a_run_with_activations_and_a_teacher_is_deterministic(tmp_path: Path, rules: dict) -> None:
    torch.manual_seed(0)
    model, teacher = (BertForQuestionAnswering(tiny_bert_config(num_hidden_layers=1)) for _ in range(2))
    plain = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(str(tmp_path), max_steps=8, per_device_train_batch_size=2, **plain)
    stages = {"warmup": 1, "projection": 2, "joint": 4, "projection_periods": 1, "pruning_periods": 2}
    config = GETAConfig(target_sparsity=0.3, activation_bits=(4, 8), distill_logits=0.5, **stages, **rules)
    trainer = GETATrainer(model, arguments, geta_config=config, train_dataset=_rows(), teacher=teacher)
    with DeterministicForms() as mode:
        trainer.train()
    assert "index_add_" in mode.seen
