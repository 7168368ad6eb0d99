"""Turn rows of data into text in pieces, tokens, labels, and rows of a fixed length for a causal language model."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import jinja2
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from geta_hf.errors import GETAError
from geta_hf.evaluation.rows import SampleBy
from geta_hf.recipes.arguments import check_choices
from geta_hf.training.distillation import IGNORED

Piece = tuple[str, bool]
"""A part of a document, and whether the loss covers it."""


@dataclass
class DataArguments:
    """Choose the rows to train and to evaluate on, and how they are processed."""

    dataset_name: str | None = field(default=None, metadata={"help": "a Hub data set, or a folder saved by datasets"})
    dataset_config: str | None = field(default=None, metadata={"help": "its configuration, if it has several"})
    train_split: str = field(default="train", metadata={"help": "split to train on"})
    eval_split: str | None = field(default=None, metadata={"help": "split for held-out perplexity"})
    train_file: str | None = field(
        default=None,
        metadata={"help": ".txt, .json, .jsonl, .csv or .parquet, all but the last also .gz; instead of a split"},
    )
    eval_file: str | None = field(default=None, metadata={"help": "of the same kinds; instead of a split"})
    text_column: str = field(default="text", metadata={"help": "column of plain text"})
    messages_column: str | None = field(
        default=None, metadata={"help": "column of conversations, for the tokenizer's chat template: instruction data"}
    )
    response_column: str | None = field(default=None, metadata={"help": "instruction data: the column to learn"})
    prompt_column: str | None = field(default=None, metadata={"help": "instruction data: column of the prompt"})
    template: str | None = field(
        default=None,
        metadata={"help": "instead of prompt_column, such as 'Instruct: {instruction}\\nOutput: {output}'"},
    )
    sample_by: SampleBy = field(
        default="paragraph", metadata={"help": "a document of a .txt file: up to a blank line, a line, or all of it"}
    )
    block_size: int = field(default=1024, metadata={"help": "tokens of a row"})
    packing: bool | None = field(default=None, metadata={"help": "several documents in a row; default: for plain text"})
    streaming: bool = field(default=False, metadata={"help": "read the data during training; needs max_steps"})
    max_train_rows: int | None = field(default=None, metadata={"help": "use only the first rows"})
    max_eval_rows: int | None = field(default=None, metadata={"help": "use only the first rows"})

    def __post_init__(self) -> None:
        check_choices(self)
        if self.template is not None:
            self.template = self.template.replace("\\n", "\n")  # a shell passes the line break as two characters

    @property
    def evaluates(self) -> bool:
        """Return whether held-out rows are given."""
        return self.eval_file is not None or self.eval_split is not None

    @property
    def packs(self) -> bool:
        """Return whether a row has several documents."""
        plain = self.response_column is None and self.messages_column is None
        return plain if self.packing is None else self.packing


# ---------------------------------------------------------------------------------------------------------- columns


def asked_columns(data: DataArguments) -> list[str]:
    """Return the columns that a run needs.

    Raises:
        GETAError: options that exclude each other, or a template that does not end with the response.
    """
    if data.messages_column is not None:
        if data.response_column or data.prompt_column or data.template:
            raise GETAError("messages_column excludes response_column, prompt_column and template")
        return [data.messages_column]
    if data.response_column is None:
        if data.prompt_column or data.template:
            raise GETAError("prompt_column and template need response_column, the column that the loss covers")
        return [data.text_column]
    if data.template is None:
        return [name for name in (data.prompt_column, data.response_column) if name is not None]
    if not data.template.endswith(f"{{{data.response_column}}}"):
        raise GETAError(f"template {data.template!r} must end with {{{data.response_column}}}, the response_column")
    return template_fields(data.template)


def template_fields(template: str) -> list[str]:
    """Return the columns in a template's braces.

    Raises:
        GETAError: a brace that is not closed, or without a plain name in it.
    """
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise GETAError(f"template {template!r}: {error}") from error
    if not all(name.isidentifier() for name in names):
        raise GETAError(f"template {template!r}: braces hold a column's name, as {{instruction}}; write others twice")
    return names


def has_target(data: DataArguments, row: Mapping[str, Any]) -> bool:
    """Return whether a row has anything to learn: a text, a response, or an assistant's turn."""
    if data.messages_column is None:
        return bool(_text(row, data.response_column or data.text_column).strip())
    messages = _messages(row, data.messages_column)
    return any(message["role"] == "assistant" and message["content"].strip() for message in messages)


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row[name]
    if value is None:
        return ""
    if not isinstance(value, (str, int, float)):
        raise GETAError(
            f"column {name!r} holds {type(value).__name__}s, not text; conversations are read by messages_column"
        )
    return str(value)


def _messages(row: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    messages = row[name] or []
    for message in messages if isinstance(messages, list) else [messages]:
        if not (isinstance(message, dict) and isinstance(message.get("role"), str)):
            raise GETAError(f"column {name!r} must hold lists of messages with `role` and `content`, not {message!r}")
    return [{**message, "content": _text(message, "content") if "content" in message else ""} for message in messages]


# ----------------------------------------------------------------------------------------------------------- pieces


def pieces(data: DataArguments, tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> list[Piece]:
    """Return the parts of a row's text, and whether the loss covers each: all, the response, or assistant turns."""
    if data.messages_column is not None:
        return conversation(tokenizer, _messages(row, data.messages_column))
    if data.response_column is None:
        return [(_text(row, data.text_column), True)]
    prompt, response = prompt_and_response(data, row)
    return [(prompt, False), (response, True)]


def prompt_and_response(data: DataArguments, row: Mapping[str, Any]) -> tuple[str, str]:
    """Return the prompt and the response. Spaces between them belong to the response, as tokenizers join words.

    A line of the template whose columns are all empty is omitted.
    """
    response = _text(row, str(data.response_column))
    if data.template is None:
        prompt = "" if data.prompt_column is None else f"{_text(row, data.prompt_column)}\n"
    else:
        texts = {name: _text(row, name) for name in template_fields(data.template)}
        lines = data.template[: -len(str(data.response_column)) - 2].split("\n")
        kept = [line for line in lines if not template_fields(line) or any(map(texts.get, template_fields(line)))]
        prompt = "\n".join(line.format(**texts) for line in kept)
    stripped = prompt.rstrip(" ")
    return stripped, prompt[len(stripped) :] + response


def conversation(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> list[Piece]:
    """Return a conversation as the tokenizer's chat template writes it; the loss covers the assistant's turns.

    A learned turn includes its end. A turn that the template writes differently once others follow (some drop earlier
    thoughts) is not learned, and neither is one that answers nothing.

    Raises:
        GETAError: the tokenizer has no chat template, or its template refuses the messages.
    """

    def written(count: int, asking: bool) -> str:
        return str(
            tokenizer.apply_chat_template(
                [dict(one) for one in messages[:count]], tokenize=False, add_generation_prompt=asking
            )
        )

    found: list[Piece] = []
    done = 0
    try:
        whole = written(len(messages), False)
        for place in range(1, len(messages)):
            if messages[place]["role"] != "assistant":
                continue
            before, after = written(place, True), written(place + 1, False)
            if after.startswith(before) and whole.startswith(after):
                found += [(whole[done : len(before)], False), (after[len(before) :], True)]
                done = len(after)
    except (ValueError, TypeError, jinja2.TemplateError) as error:
        raise GETAError(
            f"messages_column: the tokenizer's chat template can't write a conversation: {error}"
        ) from error
    return [*found, (whole[done:], False)]


# ----------------------------------------------------------------------------------------------------------- tokens


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer without a padding token the end of text as one; labels never depend on it.

    Raises:
        GETAError: it has no end of text, which separates documents.
    """
    if tokenizer.eos_token_id is None:
        raise GETAError(f"{tokenizer.name_or_path}: the tokenizer has no end-of-text token; set its eos_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def tokenize(
    data: DataArguments, tokenizer: PreTrainedTokenizerBase, batch: Mapping[str, Sequence[Any]]
) -> dict[str, list[list[int]]]:
    """Return ids and labels of a batch of columns, one document for each row, closed by the end-of-text token.

    A document is tokenized at once, as it will be read later: tokenized separately, prompt and response may give other
    tokens. A conversation ends as its template says.
    """
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    documents = [pieces(data, tokenizer, row) for row in rows]
    chat = data.messages_column is not None
    starts = [_starts(document) for document in documents]
    texts = ["".join(text for text, _ in document) for document in documents]
    whole = _ids(tokenizer, texts, chat)
    parts = iter(
        _ids(tokenizer, [text[:at] for text, places in zip(texts, starts, strict=True) for at in places], chat)
    )
    labels = [
        _labels(ids, document, [_common(next(parts), ids) for _ in places])
        for ids, document, places in zip(whole, documents, starts, strict=True)
    ]
    end = tokenizer.eos_token_id
    for ids, own in zip(whole, labels, strict=True):
        if not chat and ids[-1:] != [end]:
            ids.append(end)
            own.append(end)
    return {"input_ids": whole, "labels": labels}


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], chat: bool) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=not chat, verbose=False)["input_ids"]  # templates write their own


def _starts(document: list[Piece]) -> list[int]:
    """Return the offset in the text of each piece but the first."""
    lengths = [len(text) for text, _ in document]
    return [sum(lengths[:place]) for place in range(1, len(lengths))]


def _common(part: list[int], whole: list[int]) -> int:
    """Count the first tokens that both share; a token that crosses the border belongs to what follows."""
    return next((place for place, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), len(part))


def _labels(ids: list[int], document: list[Piece], starts: list[int]) -> list[int]:
    labels = [IGNORED] * len(ids)
    for (_, learned), start, stop in zip(document, [0, *starts], [*starts, len(ids)], strict=True):
        if learned:
            labels[start:stop] = ids[start:stop]
    return labels


# ------------------------------------------------------------------------------------------------------------- rows


def pack(columns: Mapping[str, list[list[int]]], block_size: int) -> dict[str, list[list[int]]]:
    """Concatenate documents and split them into blocks; an incomplete last block is dropped."""
    packed = {}
    for name, documents in columns.items():
        flat = list(chain.from_iterable(documents))
        whole = len(flat) // block_size * block_size
        packed[name] = [flat[start : start + block_size] for start in range(0, whole, block_size)]
    return predicting(packed)


def cut(columns: Mapping[str, list[list[int]]], block_size: int) -> dict[str, list[list[int]]]:
    """Truncate documents to `block_size`."""
    return predicting({name: [row[:block_size] for row in rows] for name, rows in columns.items()})


def predicting(columns: Mapping[str, list[list[int]]]) -> dict[str, list[list[int]]]:
    """Keep the rows with anything to predict; the mean loss of others is not a number."""
    kept = [any(label != IGNORED for label in labels[1:]) for labels in columns["labels"]]
    return {name: [row for row, keep in zip(rows, kept, strict=True) if keep] for name, rows in columns.items()}
