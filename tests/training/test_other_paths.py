"""What the trainer finds out before the first step of paths that its batch does not take, and what it names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from geta_hf import GETAConfig, GETATrainer
from tests.surgery.test_other_paths import Slopes, reasons, slopes


def made(folder: Path) -> GETATrainer:
    rows = [{"input_ids": 3 + (torch.arange(12) + i) % 27, "labels": i % 2} for i in range(32)]
    args = TrainingArguments(str(folder), max_steps=24, use_cpu=True, report_to="none", disable_tqdm=True)
    return GETATrainer(slopes(), args, geta_config=GETAConfig(), train_dataset=rows)


def test_code_of_training_alone_is_found_with_the_labels_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Slopes, "anew_beyond", 1000)
    assert not reasons(made(tmp_path).space)
    monkeypatch.setattr(Slopes, "fixed_in_training", True)
    found = reasons(made(tmp_path).space)
    assert set(found) == {"heads"} and "in training mode, with labels" in found["heads"]


def test_the_plan_names_what_the_batch_does_not_read(tmp_path: Path) -> None:
    plan = made(tmp_path).plan
    assert plan.untouched == ("scale",)
    assert "not read by the batch's forward, so not pruned and not proved: scale" in str(plan)
