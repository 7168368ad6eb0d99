"""What the recipes write in the end."""

from __future__ import annotations

from pathlib import Path

from transformers import Trainer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from geta_hf import GETATrainer


def export(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the small folder in place of an earlier run's; for a dense model the plain one."""
    if isinstance(trainer, GETATrainer):
        trainer.export_model(folder, overwrite=True)
    elif trainer.is_world_process_zero():
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
