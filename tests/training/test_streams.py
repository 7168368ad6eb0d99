"""A stream that can be read once loses nothing to what is looked at before training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import BertForQuestionAnswering

from geta_hf import GETAConfig, GETATrainer
from geta_hf.training.looked_at import keep_looked_at, looking_at
from tests.conftest import tiny_bert_config
from tests.training.test_trainer import SMALL, arguments, rows


class OneShot(IterableDataset):
    """Reads on where the last reader stopped."""

    def __init__(self, items: Any) -> None:
        self.items = iter(items)

    def __iter__(self) -> Iterator[Any]:
        return self.items


class OneShotInside(OneShot):
    """Makes a new iterator every time, over one that is read once."""

    def __iter__(self) -> Iterator[Any]:
        yield from self.items


class Again(IterableDataset):
    """Can be read from the start any number of times."""

    epoch = 0

    def __init__(self, items: Any) -> None:
        self.items = list(items)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        return iter([item + 100 * self.epoch for item in self.items])


@pytest.mark.parametrize("kind", [OneShot, OneShotInside, Again])
@pytest.mark.parametrize("looks", [[3], [3, 5, 1], [20], []])
def test_the_first_pass_begins_with_what_was_looked_at(kind: type[OneShot], looks: list[int]) -> None:
    data = keep_looked_at(kind(range(12)))
    assert isinstance(data, kind) and keep_looked_at(data) is data
    for count in looks:
        with looking_at(data):
            assert [item for item, _ in zip(data, range(count), strict=False)] == list(range(12))[:count]
    assert list(data) == list(range(12))
    data.epoch = 1
    assert list(data) == ([*range(100, 112)] if kind is Again else [])


def test_a_sample_that_a_collator_writes_to_comes_as_it_was() -> None:
    data = keep_looked_at(OneShot([{"labels": [1]} for _ in range(4)]))
    with looking_at(data):
        for item in data:
            item["labels"].append(0)
    assert list(data) == [{"labels": [1]}] * 4


def test_what_can_be_read_again_is_left_as_it_is() -> None:
    for data in ([1, 2], rows(2), DataLoader([1, 2])):
        assert keep_looked_at(data) is data
        with looking_at(data):
            pass


@pytest.mark.slow
def test_training_sees_every_row_of_a_generator_once(tmp_path: Path) -> None:
    seen: list[int] = []

    def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if trained:
            seen.extend(int(sample["place"]) for sample in samples)
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0] if name != "place"}

    trained: list[bool] = []
    stream = OneShotInside({**row, "place": place} for place, row in enumerate(rows(200)))
    config = GETAConfig(**{**SMALL, "joint": 6, "projection": 2}, activation_bits=(4, 8), calibration_batches=3)
    torch.manual_seed(0)
    changes = {"max_steps": 12, "save_strategy": "no", "remove_unused_columns": False, "logging_steps": 50}
    made = GETATrainer(
        BertForQuestionAnswering(tiny_bert_config()),
        arguments(tmp_path, **changes),
        geta_config=config,
        train_dataset=stream,
        data_collator=collate,
    )
    trained.append(True)
    made.train()
    assert seen[: 12 * 8] == list(range(12 * 8))
