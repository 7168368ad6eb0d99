"""Compute metrics of predictions: accuracy by itself, every other one by the library `evaluate`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from geta_hf.errors import GETAError
from geta_hf.reporting.results import TaskResult

Scores = dict[str, float | int]
"""Name of a metric -> its value, `NAME_stderr` -> its standard error, and `samples`."""

_SHARES = ("accuracy", "f1", "precision", "recall", "exact_match", "matthews_correlation", "pearson", "spearmanr")
"""Metrics in [-1, 1] that are given in percent, as are all of ROUGE's."""


@dataclass(frozen=True)
class Metric:
    """Score predictions against references.

    Attributes:
        name: such as `accuracy`, or that of a metric of `evaluate`.
        module: of `evaluate`; None for accuracy.
    """

    name: str
    module: Any = None

    def compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> Scores:
        """Return every number that the metric gives, shares in percent, and the number of samples.

        Args:
            predictions: one for each sample.
            references: of the same length.

        Raises:
            GETAError: no sample, or the metric refuses the values.
        """
        if not len(references):
            raise GETAError(f"{self.name} has no sample to score; the data is empty")
        if self.module is None:
            share = sum(one == other for one, other in zip(predictions, references, strict=True)) / len(references)
            found: dict[str, Any] = {"accuracy": share}
        else:
            try:
                found = self.module.compute(predictions=predictions, references=references) or {}
            except (ValueError, TypeError) as error:
                raise GETAError(f"the metric {self.name} refuses these predictions: {error}") from error
        scores: Scores = {name: _percent(name, value) for name, value in found.items() if _is_number(value)}
        if not scores:
            raise GETAError(f"the metric {self.name} gives no single number, but {sorted(found)}; choose another")
        if "accuracy" in scores and len(references) > 1:
            share = scores["accuracy"] / 100
            # Of a mean of zeros and ones, with n - 1, as lm-eval has it.
            scores["accuracy_stderr"] = 100 * math.sqrt(share * (1 - share) / (len(references) - 1))
        return {**scores, "samples": len(references)}


def task_result(scores: Scores, data: str, split: str | None, total: int) -> TaskResult:
    """Return scores with the data that they are of, as the model card shows them.

    Args:
        scores: of `Metric.compute`.
        data: the name of the data: a task, a data set, or a file.
        split: of the data set; None for a file.
        total: number of rows of which a sample may have been drawn.
    """
    errors = {name.removesuffix("_stderr"): value for name, value in scores.items() if name.endswith("_stderr")}
    metrics = {name: scores[name] for name in metric_names(scores)}
    samples = int(scores["samples"])
    return TaskResult(data, metrics, errors, split=split, samples=samples, total=max(total, samples))


def metric_names(scores: Scores) -> list[str]:
    """Return the names of the metrics among scores, without standard errors and counts."""
    return [name for name in scores if name != "samples" and not name.endswith("_stderr")]


def load_metric(name: str, config: str | None = None) -> Metric:
    """Return a metric by name.

    Args:
        name: `accuracy`, which needs no library; or what `evaluate.load` takes, the name of a metric on the Hub or the
            path of a local script.
        config: its configuration, if it has several: `evaluate.load("glue", "mrpc")`.

    Raises:
        GETAError: `evaluate` is not installed, or does not find the metric, for which it needs a network.

    >>> load_metric("accuracy").compute([1, 0, 1, 1], [1, 0, 0, 1])["accuracy"]
    75.0
    """
    if name == "accuracy" and config is None:
        return Metric(name)
    shown = name if config is None else f"{name} ({config})"
    try:
        import evaluate
    except ImportError as error:
        raise GETAError(f"the metric {shown} needs `pip install evaluate`; metric: accuracy needs nothing") from error
    try:
        return Metric(shown, evaluate.load(name, config))
    # A missing dependency of the metric, no network, an unknown name: the message says which.
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise GETAError(
            f"the metric {shown} can't be loaded: {reason}. Without a network, give the path of its script, or metric: "
            f"accuracy"
        ) from error


def _is_number(value: Any) -> bool:
    # Some metrics give lists, one number for each class.
    return not isinstance(value, bool) and hasattr(value, "__float__") and math.isfinite(float(value))


def _percent(name: str, value: Any) -> float:
    return float(value) * (100 if name in _SHARES or name.startswith("rouge") else 1)
