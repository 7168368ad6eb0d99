"""Read labeled texts, let a classifier predict their labels, and score it. The tasks of GLUE are known by name.

GLUE: Wang et al. 2019 (https://arxiv.org/abs/1804.07461).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from geta_hf.errors import GETAError
from geta_hf.evaluation.metrics import Metric, Scores
from geta_hf.evaluation.rows import text_column


class GlueTask(NamedTuple):
    """The columns of a task's texts, and its split for evaluation; the labels of GLUE's test splits are secret."""

    text: str
    pair: str | None = None
    split: str = "validation"


GLUE_DATASET = "nyu-mll/glue"

GLUE = {
    "cola": GlueTask("sentence"),
    "mnli": GlueTask("premise", "hypothesis", "validation_matched"),
    "mrpc": GlueTask("sentence1", "sentence2"),
    "qnli": GlueTask("question", "sentence"),
    "qqp": GlueTask("question1", "question2"),
    "rte": GlueTask("sentence1", "sentence2"),
    "sst2": GlueTask("sentence"),
    "stsb": GlueTask("sentence1", "sentence2"),
    "wnli": GlueTask("sentence1", "sentence2"),
}
"""GLUE's tasks by the name of their configuration."""


def glue_task(name: str) -> GlueTask:
    """Return a task of GLUE. Raise GETAError for a name that is none."""
    if name not in GLUE:
        raise GETAError(f"task = {name!r} must be one of GLUE's: {', '.join(GLUE)}; for other data give dataset_name")
    return GLUE[name]


@dataclass(frozen=True)
class LabeledTexts:
    """Hold texts with what a classifier is to say of them.

    Attributes:
        texts: one for each sample.
        pairs: the second texts; None if there is only one each.
        labels: class numbers, or numbers to predict where `names` is empty.
        names: of the classes, in the order of their numbers; empty for regression.
    """

    texts: list[str]
    pairs: list[str] | None
    labels: list[Any]
    names: list[str]

    @property
    def regression(self) -> bool:
        """Return whether numbers are to be predicted."""
        return not self.names

    def tokenize(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict[str, Any]]:
        """Return `input_ids` (of at most `max_length` tokens) and what else the tokenizer gives, for each sample."""
        encoded = tokenizer(self.texts, self.pairs, truncation=True, max_length=max_length)
        return [{name: values[place] for name, values in encoded.items()} for place in range(len(self.texts))]


def read_labeled(
    rows: Any, text: str, pair: str | None, label: str, names: Sequence[str] | None = None
) -> LabeledTexts:
    """Return the labeled texts of a Dataset.

    Labels may be class numbers, names of classes, or numbers with a fraction, which means regression.

    Args:
        rows: a `datasets.Dataset`.
        text: the column of texts.
        pair: the column of second texts, or None.
        label: the column of labels.
        names: of the classes, which the labels must be among: those of the training data, [] for regression. By default
            they are found: those that the data set declares, otherwise the names in alphabetical order, or the numbers.

    Raises:
        GETAError: a missing column, labels of several kinds, a label that `names` does not have, or only one class.
    """
    texts = text_column(rows, text)
    pairs = None if pair is None else text_column(rows, pair)
    if label not in rows.column_names:
        raise GETAError(f"the data has no column {label!r}, only {', '.join(map(repr, rows.column_names))}")
    values = list(rows[label])
    declared = getattr(rows.features[label], "names", None)
    kinds = {type(value) for value in values}
    if not values:
        raise GETAError("the data is empty")
    if not (kinds in ({str}, {int}, {bool}) or kinds <= {float, int}):
        shown = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise GETAError(f"column {label!r} holds {shown}; labels are class numbers, names, or numbers with a fraction")
    if names is None:
        names = [] if float in kinds else declared or _names(values)
    if not names:
        if kinds == {str}:
            raise GETAError(f"column {label!r} holds text, but the model predicts numbers")
        return LabeledTexts(texts, pairs, [float(value) for value in values], [])
    return LabeledTexts(texts, pairs, _numbers(values, declared, list(names), label), list(names))


def _names(values: Sequence[Any]) -> list[str]:
    if isinstance(values[0], str):
        return sorted(set(values))
    # Classes are numbered from 0, so that one that no row has keeps its place.
    return [str(number) for number in range(max(values) + 1)]


def _numbers(values: Sequence[Any], declared: Sequence[str] | None, names: list[str], label: str) -> list[int]:
    if len(names) < 2:
        raise GETAError(f"column {label!r} has a single class, {names[0]!r}; a classifier needs two")
    # Numbers mean the names that the data declares, which a model may have in another order.
    if isinstance(values[0], str):
        wanted = values
    elif declared and set(declared) == set(names):
        wanted = [declared[value] if 0 <= value < len(declared) else value for value in values]
    else:
        wanted = [names[value] if 0 <= value < len(names) else value for value in values]
    place = {name: number for number, name in enumerate(names)}
    for row, value in enumerate(wanted):
        if value not in place:
            raise GETAError(
                f"column {label!r} holds {value!r} in row {row}, which is none of the {len(names)} classes "
                f"{', '.join(names[:8])}{', …' if len(names) > 8 else ''}"
            )
    return [place[value] for value in wanted]


def classes_of(config: PreTrainedConfig) -> list[str]:
    """Return the names of a classifier's classes in their order; an empty list for regression."""
    known: Any = config.id2label
    return [] if config.num_labels == 1 else [str(known[number]) for number in range(len(known))]


def same_classes(config: PreTrainedConfig, names: Sequence[str]) -> list[str]:
    """Return the names in the order of a model that has been trained on these classes; as they are for any other."""
    known = classes_of(config)
    return known if sorted(known) == sorted(names) else list(names)


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: LabeledTexts,
    *,
    max_length: int = 128,
    batch_size: int = 32,
    bf16: bool = False,
    progress: bool = True,
) -> list[Any]:
    """Return the class number that a model gives each sample, or the number that it predicts.

    Args:
        model: a classifier with `logits` of shape (rows, classes); its mode and device do not change.
        tokenizer: of the model.
        data: what to classify; the labels are not read.
        max_length: tokens of a sample. Default 128.
        batch_size: samples of a batch. Samples of similar length share a batch. Default 32.
        bf16: run under bfloat16 autocast. Default False.
        progress: show a progress bar. Default True.
    """
    features = data.tokenize(tokenizer, max_length)
    # The longest first, so that too large a batch fails at once and not after minutes.
    order = sorted(range(len(features)), key=lambda place: -len(features[place]["input_ids"]))
    logits: dict[int, np.ndarray] = {}
    device = model.device
    training = model.training
    model.eval()
    with torch.no_grad(), tqdm(total=len(order), desc="classify", unit="text", disable=not progress) as bar:
        for first in range(0, len(order), batch_size):
            places = order[first : first + batch_size]
            batch: Any = [features[place] for place in places]
            padded = tokenizer.pad(batch, return_tensors="pt").to(device)
            with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
                output = model(**padded).logits.float().cpu().numpy()
            logits.update(zip(places, output, strict=True))
            bar.update(len(places))
    model.train(training)
    found = [logits[place] for place in range(len(order))]
    return [float(one.squeeze()) if data.regression else int(one.argmax()) for one in found]


def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: LabeledTexts, metric: Metric, **options: Any
) -> Scores:
    """Return a metric of a model's predictions.

    Args:
        model: the classifier.
        tokenizer: of the model.
        data: with its labels.
        metric: what to compute.
        options: as for `predict`.
    """
    return metric.compute(predict(model, tokenizer, data, **options), data.labels)
