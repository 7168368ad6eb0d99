"""Answer SQuAD's questions by the best span over windows of long paragraphs, and score answers by EM and F1.

Metric: Rajpurkar et al. 2016 (https://arxiv.org/abs/1606.05250) and their evaluate-v1.1.py. Windows and n-best spans:
Devlin et al. 2019 (https://arxiv.org/abs/1810.04805).
"""

from __future__ import annotations

import math
import re
import statistics
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from geta_hf.errors import GETAError
from geta_hf.evaluation.squad_features import Question, Window, windows

# ----------------------------------------------------------------------------------------------------------- metric


def normalize_answer(text: str) -> str:
    """Return a text in lower case, without punctuation and articles, with single spaces (evaluate-v1.1.py)."""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, answer: str) -> float:
    """Return 1.0 if both are equal after normalization, otherwise 0.0."""
    return float(normalize_answer(prediction) == normalize_answer(answer))


def f1(prediction: str, answer: str) -> float:
    """Return the harmonic mean of precision and recall over normalized words; 0.0 without a common word."""
    predicted = normalize_answer(prediction).split()
    expected = normalize_answer(answer).split()
    common = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * common / (len(predicted) + len(expected)) if common else 0.0


def score(predictions: Mapping[str, str], questions: Iterable[Question]) -> dict[str, float | int]:
    """Return EM and F1 in percent, with each question scored by its best reference answer.

    A question without a prediction scores 0, as in the official script. A question without a reference answer does not
    belong to SQuAD v1.1; it is excluded and counted.

    Args:
        predictions: question id -> answer text.
        questions: with their reference answers.

    Returns:
        `em`, `f1` (percent), `questions`, `missing` (without prediction), `unanswerable` (excluded).

    Raises:
        GETAError: no question has a reference answer.
    """
    # Counted twice, so an iterator must not be used up.
    asked = list(questions)
    answerable = [question for question in asked if question.answers]
    if not answerable:
        raise GETAError("no question has a reference answer, so there is nothing to score")
    em = total_f1 = 0.0
    for exact, overlap in _scores(predictions, answerable):
        em += exact
        total_f1 += overlap
    return {
        "em": 100 * em / len(answerable),
        "f1": 100 * total_f1 / len(answerable),
        "questions": len(answerable),
        "missing": sum(question.id not in predictions for question in answerable),
        "unanswerable": len(asked) - len(answerable),
    }


def standard_errors(predictions: Mapping[str, str], questions: Iterable[Question]) -> dict[str, float]:
    """Return the standard errors of `score`'s EM and F1 over the questions, in percent; none for fewer than two.

    Args:
        predictions: question id -> answer text.
        questions: as for `score`.
    """
    scores = _scores(predictions, [question for question in questions if question.answers])
    if len(scores) < 2:
        return {}
    columns = zip(*scores, strict=True)
    errors = [100 * statistics.stdev(column) / math.sqrt(len(scores)) for column in columns]
    return dict(zip(("em", "f1"), errors, strict=True))


def _scores(predictions: Mapping[str, str], answerable: Iterable[Question]) -> list[tuple[float, float]]:
    """Return (exact match, F1) of each question by its best reference answer; 0 without a prediction."""
    found = []
    for question in answerable:
        answer = predictions.get(question.id)
        if answer is None:
            found.append((0.0, 0.0))
            continue
        exact = max(exact_match(answer, reference) for reference in question.answers)
        found.append((exact, max(f1(answer, reference) for reference in question.answers)))
    return found


# ------------------------------------------------------------------------------------------------------- prediction


def best_span(
    start_logits: np.ndarray, end_logits: np.ndarray, inside: np.ndarray, n_best: int = 20, max_answer_length: int = 30
) -> tuple[float, int, int]:
    """Return the best span of one window among its `n_best` starts and ends.

    Args:
        start_logits: float, shape (tokens,).
        end_logits: float, shape (tokens,).
        inside: bool, shape (tokens,): true for tokens of the paragraph.
        n_best: number of starts and number of ends to combine.
        max_answer_length: in tokens.

    Returns:
        The sum of both logits, the first and the last token; (-inf, 0, 0) if no pair is valid.
    """
    # Not all pairs: n_best squared instead of tokens squared, as in BERT's own script.
    starts = _largest(start_logits, inside, n_best)
    ends = _largest(end_logits, inside, n_best)
    length = ends[None, :] - starts[:, None] + 1
    total = start_logits[starts][:, None] + end_logits[ends][None, :]
    total = np.where((length >= 1) & (length <= max_answer_length), total, -np.inf)
    if not np.isfinite(total).any():
        return -np.inf, 0, 0
    row, column = np.unravel_index(np.argmax(total), total.shape)
    return float(total[row, column]), int(starts[row]), int(ends[column])


def _largest(logits: np.ndarray, inside: np.ndarray, count: int) -> np.ndarray:
    tokens = np.flatnonzero(inside)
    return tokens[np.argsort(-logits[tokens], kind="stable")[:count]]


@torch.no_grad()
def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    max_length: int = 384,
    doc_stride: int = 128,
    batch_size: int = 32,
    n_best: int = 20,
    max_answer_length: int = 30,
    bf16: bool = False,
    progress: bool = True,
) -> dict[str, str]:
    """Answer each question with the best span over all windows of its paragraph.

    Args:
        model: a question answering model with `start_logits` and `end_logits`; its mode and device do not change.
        tokenizer: its fast tokenizer.
        questions: the questions to answer.
        max_length: tokens of a window.
        doc_stride: tokens that neighboring windows share.
        batch_size: windows of a batch. Windows of similar length share a batch.
        n_best: number of starts and number of ends to combine in a window.
        max_answer_length: in tokens.
        bf16: run under bfloat16 autocast.
        progress: show progress bars.

    Returns:
        Question id -> answer text; an empty text where no valid span exists.
    """
    pieces = list(windows(tokenizer, questions, max_length, doc_stride, progress))
    # The longest first, so that too large a batch fails at once and not after minutes.
    pieces.sort(key=lambda window: len(window.offsets), reverse=True)
    best: dict[int, tuple[float, str]] = {}
    training = model.training
    model.eval()
    with tqdm(total=len(pieces), desc="predict", unit="window", disable=not progress) as bar:
        for first in range(0, len(pieces), batch_size):
            batch = pieces[first : first + batch_size]
            starts, ends = _logits(model, tokenizer, batch, bf16)
            for window, start_logits, end_logits in zip(batch, starts, ends, strict=True):
                size = len(window.offsets)
                context = questions[window.question].context
                inside = window.offsets[:, 0] >= 0
                total, start, end = best_span(start_logits[:size], end_logits[:size], inside, n_best, max_answer_length)
                if total > best.get(window.question, (-np.inf, ""))[0]:
                    best[window.question] = total, context[window.offsets[start, 0] : window.offsets[end, 1]]
            bar.update(len(batch))
    model.train(training)
    return {question.id: best.get(position, (-np.inf, ""))[1] for position, question in enumerate(questions)}


def _logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Sequence[Window], bf16: bool
) -> tuple[np.ndarray, np.ndarray]:
    # Padded on the right, whatever the tokenizer's default, so that the first `len(offsets)` logits are the window's.
    inputs: Any = [window.inputs for window in batch]
    padded = tokenizer.pad(inputs, padding_side="right", return_tensors="pt")
    device = model.device
    with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
        output = model(**padded.to(device))
    return output.start_logits.float().cpu().numpy(), output.end_logits.float().cpu().numpy()


# ---------------------------------------------------------------------------------------------------------- loading


def load_folder(
    folder: str | Path, device: torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the question answering model and the tokenizer of a local folder or of a name on the Hub.

    Args:
        folder: plain or exported.
        device: to move the model to; by default an accelerator if there is one, otherwise the CPU.

    Raises:
        GETAError: a local folder without config.json.
    """
    if Path(folder).is_dir() and not (Path(folder) / "config.json").is_file():
        raise GETAError(f"{folder}: no config.json in this folder; give the folder of an exported or saved model")
    model = AutoModelForQuestionAnswering.from_pretrained(folder)
    device = device or torch.accelerator.current_accelerator() or torch.device("cpu")
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder)
