"""Read text and instruction data with `datasets`, and tokenize, pack or mask it for causal language models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import PartialState
from transformers import DataCollatorForSeq2Seq, default_data_collator
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from geta_hf.errors import GETAError
from geta_hf.evaluation.rows import read_rows
from geta_hf.recipes.documents import DataArguments, asked_columns, cut, has_target, pack, tokenize
from geta_hf.training.distillation import IGNORED

_BATCH = 1000  # rows that are packed together


# ------------------------------------------------------------------------------------------------------------- rows


def load_rows(data: DataArguments, file: str | None, split: str, limit: int | None) -> Any:
    """Return the rows of a local file, otherwise of a split: a Dataset, or with `streaming` an IterableDataset.

    Raises:
        GETAError: no data, an unknown kind of file, a missing split, or `datasets` is not installed.
    """
    rows = read_rows(
        file, data.dataset_name, data.dataset_config, split, streaming=data.streaming, sample_by=data.sample_by
    )
    return first_rows(data, rows, limit)


def first_rows(data: DataArguments, rows: Any, limit: int | None) -> Any:
    """Return the first `limit` rows; all where it is None."""
    if limit is None:
        return rows
    return rows.take(limit) if data.streaming else rows.select(range(min(limit, len(rows))))


# -------------------------------------------------------------------------------------------------------- features


def check_columns(data: DataArguments, rows: Any) -> list[str]:
    """Return the columns of the rows, after a check that the needed ones exist.

    Raises:
        GETAError: no row, a missing column, or see `asked_columns`.
    """
    first = next(iter(rows), None)
    if first is None:
        raise GETAError("the data is empty")
    missing = [name for name in asked_columns(data) if name not in first]
    if missing:
        raise GETAError(f"the data has no column {', '.join(map(repr, missing))}, only {', '.join(map(repr, first))}")
    return list(first)


def rows_with_target(data: DataArguments, rows: Any) -> Any:
    """Return the rows with something to learn; for a Dataset, print how many have nothing."""
    kept = rows.filter(lambda row: has_target(data, row))
    if not data.streaming and len(kept) < len(rows) and PartialState().is_main_process:
        column = data.messages_column or data.response_column or data.text_column
        print(f"{len(rows) - len(kept):,} of {len(rows):,} rows have nothing in {column!r} to learn and are skipped")
    return kept


def features(data: DataArguments, tokenizer: PreTrainedTokenizerBase, rows: Any) -> Any:
    """Return rows of `input_ids` and `labels` for Trainer, as the same kind of data set.

    Packing works on 1,000 rows at a time, and drops an incomplete last block of each.

    Raises:
        GETAError: see `check_columns`; or no row remains.
    """
    columns = check_columns(data, rows)

    def convert(batch: Mapping[str, Sequence[Any]]) -> dict[str, list[list[int]]]:
        return (pack if data.packs else cut)(tokenize(data, tokenizer, batch), data.block_size)

    ready = rows_with_target(data, rows).map(convert, batched=True, batch_size=_BATCH, remove_columns=columns)
    if next(iter(ready), None) is None:
        reason = "the text is shorter than one block" if data.packs else "no response fits into a row"
        raise GETAError(f"no row of {data.block_size} tokens can be made: {reason}; lower or raise block_size")
    return ready


def collator(data: DataArguments, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the collator: packed rows are stacked, others are padded, their labels with -100."""
    if data.packs:
        return default_data_collator
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)


def largest_batch(data: DataArguments, rows: int) -> dict[str, torch.Tensor]:
    """Return a batch of the largest shapes that training can see."""
    ids = torch.zeros(rows, data.block_size, dtype=torch.long)
    names = ("input_ids", "labels") if data.packs else ("input_ids", "labels", "attention_mask")
    return {name: ids.clone() for name in names}
