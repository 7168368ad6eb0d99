"""Text and instruction data for causal language models: read by `datasets`, tokenized, packed or masked."""

from __future__ import annotations

import math
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, default_data_collator
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from geta_hf import GETAError

IGNORED = -100
"""Hugging Face's label of a position that has no target."""

_BATCH = 1000  # rows that are packed together
_KINDS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass
class DataArguments:
    """Which rows to train and to evaluate on, and what becomes of them."""

    dataset_name: str | None = field(default=None, metadata={"help": "a Hub data set, or a folder that datasets saved"})
    dataset_config: str | None = field(default=None, metadata={"help": "its configuration, where it has several"})
    train_split: str = field(default="train", metadata={"help": "split to train on"})
    eval_split: str | None = field(default=None, metadata={"help": "split for held-out perplexity"})
    train_file: str | None = field(
        default=None, metadata={"help": ".txt, .json, .jsonl or .parquet, the first three also .gz; before a split"}
    )
    eval_file: str | None = field(default=None, metadata={"help": "of the same kinds; before a split"})
    text_column: str = field(default="text", metadata={"help": "column of plain text"})
    response_column: str | None = field(default=None, metadata={"help": "column to learn: instruction data"})
    prompt_column: str | None = field(default=None, metadata={"help": "column of what precedes it and is not learned"})
    template: str | None = field(
        default=None,
        metadata={"help": "instead of prompt_column, such as 'Instruct: {instruction}\\nOutput: {output}'"},
    )
    sample_by: str = field(
        default="paragraph", metadata={"help": "a document of a .txt file: paragraph (blank lines), line or document"}
    )
    block_size: int = field(default=1024, metadata={"help": "tokens a row"})
    packing: bool | None = field(default=None, metadata={"help": "several documents a row; default: plain text"})
    streaming: bool = field(default=False, metadata={"help": "read while training; needs max_steps"})
    max_train_rows: int | None = field(default=None, metadata={"help": "the first rows of the data alone"})
    max_eval_rows: int | None = field(default=None, metadata={"help": "the first rows of the data alone"})

    @property
    def packs(self) -> bool:
        """Whether rows are filled with several documents."""
        return self.response_column is None if self.packing is None else self.packing


# ------------------------------------------------------------------------------------------------------------- rows


def load_rows(data: DataArguments, file: str | None, split: str, limit: int | None) -> Any:
    """The rows of a local file, or else of a split: a Dataset, or with `streaming` an IterableDataset.

    Raises:
        GETAError: no data, an unknown kind of file, a missing split, or `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise GETAError("reading data needs `pip install datasets`") from error
    if file is None and data.dataset_name is None:
        raise GETAError("no data: give dataset_name (such as `yahma/alpaca-cleaned`), or train_file")
    try:
        rows = _file(datasets, data, file) if file is not None else _split(datasets, data, split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # An unknown split, no network, or a broken file.
        raise GETAError(f"{file or data.dataset_name} can't be read: {' '.join(str(error).split())[:500]}") from error
    if limit is None:
        return rows
    return rows.take(limit) if data.streaming else rows.select(range(min(limit, len(rows))))


def _file(datasets: Any, data: DataArguments, file: str) -> Any:
    path = Path(file)
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    if not path.is_file():
        raise GETAError(f"{path}: no such file")
    if plain.suffix not in _KINDS:
        raise GETAError(f"{path}: files are read as {', '.join(_KINDS)}, the text kinds also with .gz")
    kind = _KINDS[plain.suffix]
    options = {"sample_by": data.sample_by} if kind == "text" else {}
    return datasets.load_dataset(kind, data_files=str(path), split="train", streaming=data.streaming, **options)


def _split(datasets: Any, data: DataArguments, split: str) -> Any:
    folder = Path(str(data.dataset_name))
    if not (folder / "state.json").is_file() and not (folder / "dataset_dict.json").is_file():
        return datasets.load_dataset(str(folder), data.dataset_config, split=split, streaming=data.streaming)
    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise GETAError(f"{folder} has no split {split!r}, only {', '.join(saved)}")
        saved = saved[split]
    return saved.to_iterable_dataset() if data.streaming else saved


def check_columns(data: DataArguments, rows: Any) -> list[str]:
    """The columns of the rows, once all that are asked for are among them.

    Raises:
        GETAError: no row, a missing column, or a template that does not end with the response.
    """
    first = next(iter(rows), None)
    if first is None:
        raise GETAError("the data is empty")
    missing = [name for name in _asked(data) if name not in first]
    if missing:
        raise GETAError(f"the data has no column {', '.join(map(repr, missing))}, only {', '.join(map(repr, first))}")
    return list(first)


def _asked(data: DataArguments) -> list[str]:
    if data.response_column is None:
        if data.prompt_column or data.template:
            raise GETAError("prompt_column and template need response_column: the column that is to be learned")
        return [data.text_column]
    if data.template is None:
        return [name for name in (data.prompt_column, data.response_column) if name is not None]
    if not data.template.endswith(f"{{{data.response_column}}}"):
        raise GETAError(f"template {data.template!r} must end with {{{data.response_column}}}, the response_column")
    return [name for name in _fields(data.template) if name]


def _fields(template: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]


# ----------------------------------------------------------------------------------------------------------- tokens


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer without a padding token the end of text as one; labels never depend on it.

    Raises:
        GETAError: it has no end of text, which documents are parted by.
    """
    if tokenizer.eos_token_id is None:
        raise GETAError(f"{tokenizer.name_or_path}: the tokenizer has no end-of-text token; set its eos_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def prompt_and_response(data: DataArguments, row: Mapping[str, Any]) -> tuple[str, str]:
    """What is not learned and what is; spaces between them go to the response, as tokenizers write words.

    A line of the template whose columns are all empty is left out.
    """
    response = str(row[str(data.response_column)])
    if data.template is None:
        prompt = "" if data.prompt_column is None else f"{row[data.prompt_column]}\n"
    else:
        lines = data.template[: -len(str(data.response_column)) - 2].split("\n")
        kept = [line for line in lines if not _fields(line) or any(row[name] for name in _fields(line))]
        prompt = "\n".join(line.format(**row) for line in kept)
    stripped = prompt.rstrip(" ")
    return stripped, prompt[len(stripped) :] + response


def tokenize(
    data: DataArguments, tokenizer: PreTrainedTokenizerBase, batch: Mapping[str, Sequence[Any]]
) -> dict[str, list[list[int]]]:
    """Ids and labels of a batch of columns, a document each, ended by the end of text; prompts are not learned."""
    if data.response_column is None:
        texts = [str(text) for text in batch[data.text_column]]
        ids = [[*document, tokenizer.eos_token_id] for document in tokenizer(texts, verbose=False)["input_ids"]]
        return {"input_ids": ids, "labels": [list(document) for document in ids]}
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    pairs = [prompt_and_response(data, row) for row in rows]
    prompts = tokenizer([prompt for prompt, _ in pairs], verbose=False)["input_ids"]
    answers = tokenizer([answer for _, answer in pairs], add_special_tokens=False, verbose=False)["input_ids"]
    answers = [[*answer, tokenizer.eos_token_id] for answer in answers]
    return {
        "input_ids": [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)],
        "labels": [[IGNORED] * len(prompt) + answer for prompt, answer in zip(prompts, answers, strict=True)],
    }


def pack(columns: Mapping[str, list[list[int]]], block_size: int) -> dict[str, list[list[int]]]:
    """Documents one after the other, cut into blocks; what is left at the end is dropped."""
    packed = {}
    for name, documents in columns.items():
        flat = list(chain.from_iterable(documents))
        whole = len(flat) // block_size * block_size
        packed[name] = [flat[start : start + block_size] for start in range(0, whole, block_size)]
    return packed


def cut(columns: Mapping[str, list[list[int]]], block_size: int) -> dict[str, list[list[int]]]:
    """Documents cut to `block_size`; those without anything left to predict are dropped."""
    rows = zip(*columns.values(), strict=True)
    short = [[part[:block_size] for part in row] for row in rows]
    left = [row for row in short if any(label != IGNORED for label in row[list(columns).index("labels")][1:])]
    return {name: [row[place] for row in left] for place, name in enumerate(columns)}


def features(data: DataArguments, tokenizer: PreTrainedTokenizerBase, rows: Any) -> Any:
    """Rows of `input_ids` and `labels`, ready for Trainer; of the kind that came in.

    Packing works on 1,000 rows at a time, and drops what does not fill a block at their end.

    Raises:
        GETAError: see `check_columns`; or no row is left.
    """
    columns = check_columns(data, rows)

    def convert(batch: Mapping[str, Sequence[Any]]) -> dict[str, list[list[int]]]:
        return (pack if data.packs else cut)(tokenize(data, tokenizer, batch), data.block_size)

    ready = rows.map(convert, batched=True, batch_size=_BATCH, remove_columns=columns)
    if next(iter(ready), None) is None:
        reason = "the text is shorter than one block" if data.packs else "no response is left within a row"
        raise GETAError(f"no row of {data.block_size} tokens can be made: {reason}; lower or raise block_size")
    return ready


def collator(data: DataArguments, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Packed rows are stacked; others are padded, their labels with -100."""
    if data.packs:
        return default_data_collator
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)


def largest_batch(data: DataArguments, rows: int) -> dict[str, torch.Tensor]:
    """A batch as large as training may see, for its shapes."""
    ids = torch.zeros(rows, data.block_size, dtype=torch.long)
    names = ("input_ids", "labels") if data.packs else ("input_ids", "labels", "attention_mask")
    return {name: ids.clone() for name in names}


# ------------------------------------------------------------------------------------------------------- perplexity


@torch.no_grad()
def perplexity(model: PreTrainedModel, rows: Any, collate: Any, batch_size: int, bf16: bool = False) -> dict[str, Any]:
    """exp of the mean loss over every label of the rows, each counted once.

    Returns:
        `perplexity`, `nats_per_token` and `tokens`, the labels that were predicted.
    """
    total, tokens, was_training = 0.0, 0, model.training
    model.eval()
    for batch in _batches(rows, collate, batch_size):
        inputs = {name: value.to(model.device) for name, value in batch.items()}
        count = int((inputs["labels"][:, 1:] != IGNORED).sum())
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            loss = model(**inputs, use_cache=False).loss
        total, tokens = total + float(loss) * count, tokens + count
    model.train(was_training)
    mean = total / max(tokens, 1)
    return {"perplexity": math.exp(min(mean, 700)), "nats_per_token": mean, "tokens": tokens}


def _batches(rows: Any, collate: Any, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    yield from DataLoader(rows, batch_size=batch_size, collate_fn=collate)
