"""Calibration data comes from everywhere in what is given, not from its start alone."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
import torch

from geta_hf.evaluation.calibration_data import first_sequences, make_batches, spread
from tests.tiny_tasks import byte_tokenizer, tiny_llama


def ids_of(batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    return torch.cat([batch["input_ids"] for batch in batches])


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 100])
def test_any_first_part_lies_evenly(count: int):
    order = list(spread(count))
    assert sorted(order) == list(range(count))
    for most in range(1, count + 1):
        gaps = torch.tensor([0, *sorted(order[:most]), count]).diff()
        assert int(gaps.max()) <= 4 * count / most + 1


def test_a_long_text_is_read_in_all_of_its_parts():
    text = " ".join(f"{place:05d}" for place in range(1000))
    found = ids_of(make_batches([text], tiny_llama(), byte_tokenizer(), sequences=8, length=16))
    assert found.shape == (8, 16)
    gaps = torch.tensor([*sorted(number_in(row) for row in found), 1000]).diff()
    assert int(gaps.min()) >= 100 and int(gaps.max()) <= 150
    # Fewer are the first ones of these, and lie as evenly.
    four = ids_of(make_batches([text], tiny_llama(), byte_tokenizer(), sequences=4, length=16))
    assert torch.equal(found[:4], four)


def test_rows_are_taken_from_all_of_a_list():
    texts = [f" {place:05d}" * 8 for place in range(64)]
    found = ids_of(make_batches(texts, tiny_llama(), byte_tokenizer(), sequences=8, length=48))
    assert sorted(number_in(row) // 8 for row in found) == list(range(8))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.csv"])
def test_files_of_rows_give_their_texts_alone(name: str, tmp_path: Path):
    texts = [f" {place:05d}" * 8 for place in range(64)]
    path = tmp_path / name
    lines = ["text", *texts] if name.endswith(".csv") else [json.dumps({"text": text}) for text in texts]
    content = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    model, tokenizer = tiny_llama(), byte_tokenizer()
    expected = ids_of(make_batches(texts, model, tokenizer, sequences=8, length=48))
    assert torch.equal(ids_of(make_batches(str(path), model, tokenizer, sequences=8, length=48)), expected)


def number_in(row: torch.Tensor) -> int:
    """Return the first entire number of five digits in a sequence."""
    found = re.search(r"(?<!\d)\d{5}(?!\d)", byte_tokenizer().decode(row))
    assert found is not None
    return int(found.group())


def test_more_sequences_are_read_where_there_are_as_many():
    texts = ["some words of a text " * 20] * 4
    model, tokenizer = tiny_llama(), byte_tokenizer()
    batches = make_batches(texts, model, tokenizer, sequences=8, length=32, more=8)
    first, further = first_sequences(batches, 8)
    assert len(ids_of(first)) == 8 and len(ids_of(further)) == 8
    alone = make_batches(texts, model, tokenizer, sequences=8, length=32)
    assert torch.equal(ids_of(first), ids_of(alone))
    little = make_batches(texts[:1], model, tokenizer, sequences=8, length=32, more=100)
    assert 8 <= len(ids_of(little)) < 20
