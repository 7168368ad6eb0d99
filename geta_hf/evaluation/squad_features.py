"""Read SQuAD v1.1's questions from files or rows, split paragraphs into windows, and make training features."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers.tokenization_utils_base import BatchEncoding, PreTrainedTokenizerBase

from geta_hf.errors import GETAError

MAX_QUESTION_TOKENS = 64
CHUNK = 128  # questions per tokenizer call: large enough to be fast, small enough for a live progress bar


@dataclass(frozen=True)
class Question:
    """Hold one question with its paragraph and its reference answers.

    Attributes:
        id: unique in its file.
        question: the text of the question.
        context: the paragraph that holds the answer.
        answers: the reference answers, each of them correct.
        starts: the character offset of each answer in `context`.
    """

    id: str
    question: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]


@dataclass(frozen=True)
class Window:
    """Hold one piece of a paragraph together with its question, as the model reads it.

    Attributes:
        question: index of the question in the list that was tokenized.
        inputs: the model's inputs, each an array of shape (tokens,).
        offsets: int64, shape (tokens, 2): characters [start, end) in the paragraph; -1 outside the paragraph.
    """

    question: int
    inputs: dict[str, np.ndarray]
    offsets: np.ndarray


# ---------------------------------------------------------------------------------------------------------- reading


def load_questions(path: str | Path) -> list[Question]:
    """Read a file in SQuAD's nested format.

    Args:
        path: a `.json` or `.json.gz` file with `data > paragraphs > qas`.

    Raises:
        GETAError: the file is missing, is not JSON or has another format.
    """
    path = Path(path)
    if not path.is_file():
        raise GETAError(f"{path}: no such file; give a SQuAD file (.json or .json.gz)")
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            articles = json.load(file)["data"]
        questions = []
        for article in articles:
            for paragraph in article["paragraphs"]:
                questions += [_question(qa, paragraph["context"]) for qa in paragraph["qas"]]
    except (OSError, EOFError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise GETAError(f"{path}: not readable as JSON ({error}); give a SQuAD file (.json or .json.gz)") from error
    except (KeyError, TypeError) as error:
        raise GETAError(
            f"{path}: not in SQuAD's nested format (at {error}); expected "
            '{"data": [{"paragraphs": [{"context", "qas": [{"id", "question", "answers"}]}]}]}'
        ) from error
    if not questions:
        raise GETAError(f"{path}: contains no question")
    return questions


def _question(qa: Mapping[str, Any], context: str) -> Question:
    texts = tuple(answer["text"] for answer in qa["answers"])
    starts = tuple(int(answer["answer_start"]) for answer in qa["answers"])
    return Question(str(qa["id"]), qa["question"], context, texts, starts)


def question_from_row(row: Mapping[str, Any]) -> Question:
    """Make a question of one row of the Hub's `squad`.

    Args:
        row: id, question, context, and answers {text: [...], answer_start: [...]}.

    Raises:
        GETAError: a column is missing or has another form.
    """
    try:
        answers = row["answers"]
        texts = tuple(answers["text"])
        starts = tuple(int(start) for start in answers["answer_start"])
        return Question(str(row["id"]), row["question"], row["context"], texts, starts)
    except (KeyError, TypeError) as error:
        raise GETAError(f"dataset row is not in SQuAD's flat format (at {error}); columns: {sorted(row)}") from error


def sample(questions: Sequence[Question], limit: int | None, seed: int = 0) -> list[Question]:
    """Sample `limit` questions, the same ones for the same seed; return all if `limit` is None or larger."""
    if limit is not None and limit < 1:
        raise GETAError(f"a limit of {limit} questions is too small; give at least 1")
    if limit is None or limit >= len(questions):
        return list(questions)
    return random.Random(seed).sample(list(questions), limit)


# ---------------------------------------------------------------------------------------------------------- windows


def windows(
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    max_length: int = 384,
    doc_stride: int = 128,
    progress: bool = False,
) -> Iterator[Window]:
    """Split every paragraph into overlapping windows, each preceded by the question, in the order of the questions.

    Args:
        tokenizer: a fast tokenizer; only those give offsets.
        questions: the questions to tokenize; a question longer than 64 tokens is truncated.
        max_length: tokens of a window, with question and special tokens.
        doc_stride: tokens that neighboring windows share.
        progress: show a progress bar.

    Raises:
        GETAError: a slow tokenizer, or a length with no room for the stride.
    """
    _check_tokenizer(tokenizer, max_length, doc_stride)
    with tqdm(total=len(questions), desc="tokenize", unit="question", disable=not progress) as bar:
        for first in range(0, len(questions), CHUNK):
            chunk = questions[first : first + CHUNK]
            encoded = tokenizer(
                _short_questions(tokenizer, chunk),
                [question.context for question in chunk],
                truncation="only_second",
                max_length=max_length,
                stride=doc_stride,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
            yield from _split(encoded, first)
            bar.update(len(chunk))


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, max_length: int, doc_stride: int) -> None:
    if not tokenizer.is_fast:
        raise GETAError(f"{type(tokenizer).__name__} is a slow tokenizer without offsets; load it with use_fast=True")
    # For the longest question: the tokenizer would raise in the middle of the data, or never advance.
    room = max_length - MAX_QUESTION_TOKENS - tokenizer.num_special_tokens_to_add(pair=True)
    if not 0 <= doc_stride < room:
        raise GETAError(
            f"max_length={max_length} has room for {room} tokens of a paragraph next to a question of "
            f"{MAX_QUESTION_TOKENS}; doc_stride={doc_stride} must be from 0 to {room - 1}, or max_length larger"
        )


def _short_questions(tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> list[str]:
    # Some questions of SQuAD begin with many blanks, which `only_second` would keep while it cuts the paragraph.
    texts = [question.question.strip() for question in questions]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = [offsets[:MAX_QUESTION_TOKENS][-1][1] if offsets else 0 for offsets in encoded["offset_mapping"]]
    return [text[:end] for text, end in zip(texts, ends, strict=True)]


def _split(encoded: BatchEncoding, first: int) -> Iterator[Window]:
    owners = encoded.pop("overflow_to_sample_mapping")
    offsets = encoded.pop("offset_mapping")
    for row, owner in enumerate(owners):
        # Sequence 1 is the paragraph; the question's tokens have offsets too, but into the question.
        inside = np.array([sequence == 1 for sequence in encoded.sequence_ids(row)])
        spans = np.where(inside[:, None], np.array(offsets[row], dtype=np.int64), -1)
        inputs = {key: np.array(encoded[key][row], dtype=np.int32) for key in encoded}
        yield Window(first + owner, inputs, spans)


# --------------------------------------------------------------------------------------------------------- training


def locate(question: Question) -> int | None:
    """Return the character offset of the first reference answer, or None if its paragraph does not contain it.

    If the answer is not at the given offset, the occurrence nearest to it counts.
    """
    if not question.answers or not question.answers[0].strip():
        return None
    answer = question.answers[0]
    given = question.starts[0]
    # The lookahead also finds occurrences that overlap.
    found = [match.start() for match in re.finditer(f"(?={re.escape(answer)})", question.context)]
    return min(found, key=lambda start: abs(start - given), default=None)


def training_features(
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    max_length: int = 384,
    doc_stride: int = 128,
    progress: bool = False,
) -> tuple[list[dict[str, Any]], int]:
    """Make training features: windows with the positions of the first reference answer.

    Returns:
        The features: the model's inputs (arrays of shape (tokens,)), `start_positions` and `end_positions`. Both are
        those of the CLS token (or of the first token) where the window does not contain the complete answer. Also
        the number of questions that were dropped because their paragraph does not contain their answer.

    Raises:
        GETAError: as `windows`, or no question remains.
    """
    kept: list[tuple[Question, int]] = []
    for question in questions:
        start = locate(question)
        if start is not None:
            kept.append((question, start))
    if not kept:
        raise GETAError(f"none of {len(questions)} questions has an answer that occurs in its paragraph")
    features = []
    for window in windows(tokenizer, [question for question, _ in kept], max_length, doc_stride, progress):
        question, start = kept[window.question]
        first, last = _positions(window, start, start + len(question.answers[0]), tokenizer.cls_token_id)
        features.append({**window.inputs, "start_positions": first, "end_positions": last})
    return features, len(questions) - len(kept)


def _positions(window: Window, start: int, end: int, cls_token_id: int | None) -> tuple[int, int]:
    inside = np.flatnonzero(window.offsets[:, 0] >= 0)
    begins, ends = window.offsets[inside, 0], window.offsets[inside, 1]
    if len(inside) == 0 or start < begins[0] or end > ends[-1]:
        # By its id, since not every tokenizer puts it first (XLNet's is last).
        is_cls = np.flatnonzero(window.inputs["input_ids"] == cls_token_id)
        return (int(is_cls[0]),) * 2 if len(is_cls) else (0, 0)
    first = np.searchsorted(ends, start, side="right")  # the first token that ends after the answer's start
    last = np.searchsorted(begins, end, side="left") - 1  # the last token that begins before its end
    return int(inside[first]), int(inside[max(first, last)])
