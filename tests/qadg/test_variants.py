"""Other shapes of a batch: rows, length and padding change, and what is no text stays."""

from __future__ import annotations

import torch

from geta_hf.qadg.variants import variants

from .models import make


def test_rows_and_length_and_padding_change(bert, batch):
    rows, short = variants(bert, batch)
    assert {name: tuple(item.shape) for name, item in rows.items()} == {"input_ids": (1, 12), "attention_mask": (1, 12)}
    assert torch.equal(rows["input_ids"], batch["input_ids"][:1])
    assert {name: tuple(item.shape) for name, item in short.items()} == {"input_ids": (2, 8), "attention_mask": (2, 8)}
    assert torch.equal(short["input_ids"], batch["input_ids"][:, :8])
    assert short["attention_mask"].tolist() == [[1] * 8, [1] * 6 + [0] * 2]


def test_a_mask_is_made_where_the_model_takes_one(bert):
    ids = torch.ones(1, 9, dtype=torch.long)
    rows, short = variants(bert, {"input_ids": ids})
    assert rows["input_ids"].shape == (2, 9) and short["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0]]


def test_the_batch_itself_is_left_alone(batch):
    before = {name: item.clone() for name, item in batch.items()}
    variants(make("bert-qa"), batch)
    assert all(torch.equal(item, before[name]) for name, item in batch.items())


def test_pictures_change_their_rows_alone(bert):
    (rows,) = variants(bert, {"pixel_values": torch.zeros(3, 3, 8, 8), "flag": True})
    assert rows["pixel_values"].shape == (1, 3, 8, 8) and rows["flag"] is True
