"""Train one of the small architectures for a few steps, export it, and compare the reloaded folder with it."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from geta_hf import GETAConfig, GETAError, GETATrainer
from geta_hf.qadg.tracing.record_forward import main_tensors
from geta_hf.quantization import select_layers
from tests.architectures import ARCHITECTURES, build

STEPS = 8
_STAGES: dict[str, Any] = {"warmup": 1, "projection": 2, "joint": 3, "projection_periods": 2, "pruning_periods": 2}


def train_and_export(name: str) -> dict[str, Any]:
    """Return what became of an architecture as plain data.

    Its batch is trained on in every step, with the mean square of its outputs as the loss, since most of the small
    batches have no labels. The default policy is tried first; norm-coupled families are switched on where that leaves
    nothing to prune, and layers outside of blocks are quantized where there are none inside.

    Returns:
        `steps`, `removed` and `groups` (numbers of groups), `quantized` (number of layers), `left_float` (layers
        whose weight the model reads itself), `difference` (of the reloaded model's outputs) and `seconds`; with
        `failure` and the stage where it happened instead, if it failed.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        at = "setup"
        try:
            trainer = _make_trainer(name, folder)
            at = "training"
            trainer.train()
            at = "export"
            report = trainer.export_model(Path(folder) / "small")
            assert report is not None
            found = {
                "steps": STEPS,
                "removed": sum(before - kept for kept, before in report.kept.values()),
                "groups": sum(before for _, before in report.kept.values()),
                "quantized": len(report.bits),
                "left_float": list(trainer.plan.left_float),
                "difference": float(f"{report.difference:.3g}"),
            }
        except Exception as error:  # a survey goes on
            text = str(error) if isinstance(error, GETAError) else f"{type(error).__name__}: {error}"
            found = {"at": at, "failure": " ".join(text.split())}
    return {**found, "seconds": round(time.perf_counter() - start, 1)}


def _make_trainer(name: str, folder: str) -> GETATrainer:
    try:
        return _trainer(name, folder, prune=[])
    except GETAError as error:
        if "may be pruned" not in str(error):
            raise
        return _trainer(name, folder, prune=["norm"])


def _trainer(name: str, folder: str, prune: list[str]) -> GETATrainer:
    model, batch = build(name)
    labels = ARCHITECTURES[name].labels
    if labels is not None:
        batch = {**batch, **labels()}
    try:
        select_layers(model)
        include = None
    except GETAError:
        include = ["."]
    arguments = TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=2,  # batch norm refuses 1; each step sees the batch below
        learning_rate=1e-3,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    return GETATrainer(
        model,
        arguments,
        geta_config=GETAConfig(**_STAGES, prune=prune, include=include, target_sparsity=0.3),
        train_dataset=[{"row": row} for row in range(2 * STEPS)],  # type: ignore[arg-type]
        data_collator=lambda rows: {key: value.clone() for key, value in batch.items()},
        compute_loss_func=_mean_square,
    )


def _mean_square(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
    # Masked positions hold fillers such as the lowest float, whose square is infinite.
    tensors = [tensor for tensor in main_tensors(outputs) if tensor.is_floating_point() and tensor.requires_grad]
    return torch.stack([torch.where(tensor.abs() < 1e4, tensor, 0.0).square().mean() for tensor in tensors]).sum()
