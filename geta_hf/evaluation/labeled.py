"""Score models on labeled data: answers to SQuAD's questions, classes of texts, or texts that are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from geta_hf.errors import GETAError
from geta_hf.evaluation import classification, squad, squad_features
from geta_hf.evaluation.classification import GLUE_DATASET, classes_of, glue_task, read_labeled
from geta_hf.evaluation.metrics import Metric, Scores, load_metric, task_result
from geta_hf.evaluation.rows import random_rows, read_rows, text_column
from geta_hf.evaluation.summaries import write_texts
from geta_hf.reporting.results import TaskResult
from geta_hf.utils.loading import one_line_errors

QUESTIONS, CLASSES, TEXTS = "question answering", "text classification", "text to text"

_HEADS = {"ForQuestionAnswering": QUESTIONS, "ForSequenceClassification": CLASSES, "ForConditionalGeneration": TEXTS}
_AUTO: dict[str, Any] = {
    QUESTIONS: AutoModelForQuestionAnswering,
    CLASSES: AutoModelForSequenceClassification,
    TEXTS: AutoModelForSeq2SeqLM,
}


@dataclass(frozen=True)
class LabeledData:
    """Choose the data, and how it is read and scored.

    Attributes:
        data: a local file, or the name of a data set; None with `glue`.
        glue: a task of GLUE, which sets everything that is None.
        split: of a data set. Default None: `validation`, or the task's.
        config: of a data set that has several.
        text, pair, label: columns of texts, second texts and labels; by default `text`, none and `label`. Where texts
            are written, `label` is the column of references.
        metric: `accuracy`, or a name or script for `evaluate.load`. By default `accuracy` for classes and `rouge` for
            written texts; SQuAD has its own.
        metric_config: of a metric that has several.
        limit: size of a random sample. Default None: all rows.
        max_length: tokens of a text, or of a window in SQuAD. Default None: 128, for SQuAD 384, for texts to read 512.
        batch_size: Default 32.
    """

    data: str | None = None
    glue: str | None = None
    split: str | None = None
    config: str | None = None
    text: str | None = None
    pair: str | None = None
    label: str = "label"
    metric: str | None = None
    metric_config: str | None = None
    limit: int | None = None
    max_length: int | None = None
    batch_size: int = 32


def kind_of(folder: str) -> str:
    """Return what a model does, by its architecture.

    Raises:
        GETAError: the folder can't be read, or the model has another head.
    """
    if Path(folder).exists() and not (Path(folder) / "config.json").is_file():
        raise GETAError(f"{folder}: no config.json in this folder; give the folder of an exported or saved model")
    with one_line_errors(f"{folder}: no model could be loaded"):
        config = AutoConfig.from_pretrained(folder)
    names = config.architectures or ["an unknown architecture"]
    for ending, kind in _HEADS.items():
        if names[0].endswith(ending):
            return kind
    raise GETAError(
        f"{folder}: {names[0]} can't be scored on labeled data, only models that end with {', '.join(_HEADS)}; for "
        f"language models give --tasks or --text"
    )


class Scorer:
    """Score models of one kind on the same rows, which are read once.

    Args:
        choice: the data.
        kind: of `kind_of`.

    Raises:
        GETAError: no such data, column or metric.
    """

    def __init__(self, choice: LabeledData, kind: str) -> None:
        if choice.glue is not None and kind != CLASSES:
            raise GETAError(f"GLUE is for text classification, and the model is for {kind}; give --data")
        if choice.limit is not None and choice.limit < 1:
            raise GETAError(f"limit is {choice.limit}; give 1 or more, or leave it out")
        self.choice, self.kind = choice, kind
        task = None if choice.glue is None else glue_task(choice.glue)
        self.split = choice.split or (task.split if task is not None else "validation")
        local = choice.data is not None and Path(choice.data).is_file()
        self._file = choice.data if local else None
        self._name, self._config = choice.data, choice.config
        if task is not None and choice.data is None:
            self._name, self._config = GLUE_DATASET, choice.glue
        self.shown = Path(str(choice.data)).name if local else str(choice.glue or choice.data)
        self._columns = (choice.text or (task.text if task else "text"), choice.pair or (task.pair if task else None))
        self._metric: Metric | None = None
        if kind != QUESTIONS:
            usual = ("glue", choice.glue) if task is not None else (("accuracy" if kind == CLASSES else "rouge"), None)
            name, config = usual if choice.metric is None else (choice.metric, choice.metric_config)
            self._metric = load_metric(name, config)
        self._rows, self.total = self._read()

    def _read(self) -> tuple[Any, int]:
        limit = self.choice.limit
        if self.kind == QUESTIONS and self._file is not None:
            every = squad_features.load_questions(self._file)
            return squad_features.sample(every, limit, 0), len(every)
        rows = read_rows(self._file, self._name, self._config, self.split)
        chosen = random_rows(rows, limit)
        if self.kind == QUESTIONS:
            chosen = [squad_features.question_from_row(row) for row in chosen]
        return chosen, len(rows)

    def score(self, folder: str, *, device: str | None = None, progress: bool = True) -> Scores:
        """Return the scores of a model.

        Args:
            folder: plain or exported, or a name on the Hub.
            device: by default an accelerator if there is one, otherwise the CPU.
            progress: show a bar. Default True.
        """
        with one_line_errors(f"{folder}: the model can't be loaded"):
            model = _AUTO[self.kind].from_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        place = device or torch.accelerator.current_accelerator() or "cpu"
        nn.Module.to(model, place).eval()
        return self._scores(model, tokenizer, progress)

    def _scores(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: bool) -> Scores:
        choice, metric = self.choice, self._metric
        options: dict[str, Any] = {"batch_size": choice.batch_size, "progress": progress}
        if metric is None:
            found = squad.predict(model, tokenizer, self._rows, max_length=choice.max_length or 384, **options)
            errors = {f"{name}_stderr": one for name, one in squad.standard_errors(found, self._rows).items()}
            scores = squad.score(found, self._rows)
            return {"em": scores["em"], "f1": scores["f1"], **errors, "samples": int(scores["questions"])}
        if self.kind == TEXTS:
            sources = text_column(self._rows, self._columns[0])
            length = choice.max_length or 512
            written = write_texts(model, tokenizer, sources, max_source_length=length, **options)
            return metric.compute(written, text_column(self._rows, choice.label))
        data = read_labeled(self._rows, *self._columns, choice.label, classes_of(model.config))
        return classification.score(model, tokenizer, data, metric, max_length=choice.max_length or 128, **options)

    def result(self, scores: Scores) -> TaskResult:
        """Return scores with their data and sample size, for the model card."""
        return task_result(scores, self.shown, None if self._file is not None else self.split, self.total)


def table_rows(scores: Sequence[Scores]) -> list[tuple[str, ...]]:
    """Return a row for each metric: its name, and each model's value with its standard error."""
    rows = []
    for name in scores[0]:
        if name != "samples" and not name.endswith("_stderr"):
            errors = [f" ± {one[f'{name}_stderr']:.2f}" if f"{name}_stderr" in one else "" for one in scores]
            rows.append((name, *(f"{one[name]:.2f}{error}" for one, error in zip(scores, errors, strict=True))))
    return rows
