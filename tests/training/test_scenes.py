"""A detector and a segmentation model, each trained by its own loss on boxes or maps, exported, and loaded again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DetrForObjectDetection, SegformerForSemanticSegmentation, TrainingArguments

from geta_hf import GETAConfig, GETATrainer
from tests.architectures import build

SIDE, IMAGES = 32, 16
SMALL: dict[str, Any] = {"warmup": 2, "projection": 2, "joint": 6, "projection_periods": 2, "pruning_periods": 2}

Row = dict[str, Any]


def squares() -> list[Row]:
    """Noise with one bright square each; a label map of two classes, and the square as a box."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(IMAGES):
        top, left = torch.randint(0, SIDE // 2, (2,), generator=generator).tolist()
        pixels = 0.1 * torch.randn(3, SIDE, SIDE, generator=generator)
        pixels[:, top : top + SIDE // 2, left : left + SIDE // 2] += 1
        center = [(left + SIDE // 4) / SIDE, (top + SIDE // 4) / SIDE]
        boxes = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[*center, 0.5, 0.5]])}
        rows.append({"pixel_values": pixels, "map": (pixels[0] > 0.5).long(), "boxes": boxes})
    return rows


def with_maps(rows: list[Row]) -> Row:
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.stack([row["map"] for row in rows]),
    }


def with_boxes(rows: list[Row]) -> Row:
    """Labels are a list with a dict for each image, as DETR's own examples pass them."""
    pixels = torch.stack([row["pixel_values"] for row in rows])
    mask = torch.ones(len(rows), SIDE, SIDE, dtype=torch.long)
    return {"pixel_values": pixels, "pixel_mask": mask, "labels": [row["boxes"] for row in rows]}


def outputs(model: Any, name: str, batch: Row) -> tuple[Tensor, ...]:
    with torch.no_grad():
        found = model.eval()(**{key: value for key, value in batch.items() if key != "labels"})
    return (found.logits,) if name == "segformer" else (found.logits, found.pred_boxes)


@pytest.mark.parametrize(
    ("name", "model_class", "collate"),
    [
        ("segformer", SegformerForSemanticSegmentation, with_maps),
        ("detr", DetrForObjectDetection, with_boxes),
    ],
)
def test_a_model_of_scenes_learns_is_cut_and_loads_again(
    name: str, model_class: Any, collate: Callable[[list[Row]], Row], tmp_path: Path
) -> None:
    if name == "detr":
        pytest.importorskip("scipy")  # of the matcher in its loss
    model, _ = build(name)
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=16,
        per_device_train_batch_size=4,
        learning_rate=2e-3,
        logging_steps=1,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = GETATrainer(
        model,
        arguments,
        geta_config=GETAConfig(**SMALL, target_sparsity=0.3, bits=(4, 8)),
        train_dataset=squares(),  # type: ignore[arg-type]
        data_collator=collate,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) < sum(losses[:4])
    report = trainer.export_model(tmp_path / "small")
    assert report is not None and any(kept < before for kept, before in report.kept.values())
    batch = collate(squares()[:3])
    small = model_class.from_pretrained(tmp_path / "small")
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    for mine, theirs in zip(outputs(trainer.model, name, batch), outputs(small, name, batch), strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-4)
