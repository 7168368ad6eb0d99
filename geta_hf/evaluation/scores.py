"""Hold scores as plain data, and compute the difference between two models with its standard error."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from geta_hf.evaluation.tasks import COMMONSENSE, SUITE


@dataclass(frozen=True)
class Score:
    """Hold one metric of one task.

    Attributes:
        value: as lm-eval gives it; accuracies are from 0 to 1.
        stderr: its standard error over the questions; None if lm-eval gives none.
        questions: score of each question in order, if the value is their mean; otherwise empty.
        members: for a group of tasks, the (task, metric) pairs whose plain mean the value is; otherwise empty.
    """

    value: float
    stderr: float | None
    questions: tuple[float, ...] = ()
    members: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """Hold the scores of a model.

    Attributes:
        model: its name or folder.
        scores: task or group -> metric -> score, in lm-eval's order; for `commonsense`, "mean" is over the metrics of
            `COMMONSENSE` and "mean_acc" over acc.
        results: lm-eval's own results, in the form of the file that its command line writes; without the samples.
        truncated: number of requests longer than the model's positions, which were truncated on the left.
        requests: number of all requests.
        limit: number of questions of each task that were scored, from the first on; None for all.

    Example:
        >>> from geta_hf.evaluation import Evaluation, Score, side_by_side
        >>> dense = Evaluation("dense", {"piqa": {"acc": Score(0.75, 0.25, (1.0, 1.0, 0.0, 1.0))}})
        >>> small = Evaluation("small", {"piqa": {"acc": Score(0.5, 0.29, (1.0, 0.0, 0.0, 1.0))}})
        >>> print(side_by_side({"dense": dense, "small": small}).splitlines()[-1])
        | piqa | acc    | 75.00 ± 25.00 | 50.00 ± 29.00 | -25.00 ± 25.00 |
    """

    model: str
    scores: Mapping[str, Mapping[str, Score]]
    results: Mapping[str, Any] = field(repr=False, default_factory=dict)
    truncated: int = 0
    requests: int = 0
    limit: int | None = None


def read_scores(results: Mapping[str, Any]) -> dict[str, dict[str, Score]]:
    """Read the scores from lm-eval's results, and add the mean of the commonsense tasks if all seven are present.

    Args:
        results: the return value of `lm_eval.simple_evaluate`, with samples.
    """
    scores: dict[str, dict[str, Score]] = {}
    groups = results.get("groups", {})
    for name, values in results["results"].items():
        if name not in groups:
            scores[name] = _task_scores(values, results["samples"][name])
    for name, values in groups.items():
        scores[name] = _group_scores(values, results["group_subtasks"].get(name, []), scores)
    if set(COMMONSENSE) <= set(scores):
        chosen = {"mean": tuple(COMMONSENSE.items()), "mean_acc": tuple((name, "acc") for name in COMMONSENSE)}
        scores[SUITE] = {metric: _mean(members, scores) for metric, members in chosen.items()}
    return scores


def _task_scores(values: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, Score]:
    found = {}
    for metric, filtered, value, stderr in _metrics(values):
        # With filters, such as one that extracts an answer, each question has a sample for every filter.
        own = [one.get(metric) for one in samples if one["filter"] == filtered]
        numbers = tuple(float(one) for one in own if isinstance(one, int | float))
        # Checked, since not every metric is a mean over its questions: for a perplexity or an F1 the paired error
        # below would be wrong.
        is_mean = len(numbers) == len(own) > 0 and math.isclose(statistics.fmean(numbers), value, abs_tol=1e-9)
        found[_shown(metric, filtered)] = Score(value, stderr, numbers if is_mean else ())
    return found


def _group_scores(
    values: Mapping[str, Any], members: Sequence[str], scores: Mapping[str, Mapping[str, Score]]
) -> dict[str, Score]:
    """Return a group's scores, with members if their mean equals lm-eval's value."""
    found = {}
    for metric, filtered, value, stderr in _metrics(values):
        name = _shown(metric, filtered)
        pairs = tuple((member, name) for member in members)
        # lm-eval weights some groups by the number of questions. Only where the plain mean gives its value does the
        # group have members.
        complete = bool(pairs) and all(name in scores.get(member, {}) for member in members)
        is_mean = complete and math.isclose(_mean(pairs, scores).value, value, abs_tol=1e-9)
        found[name] = Score(value, stderr, members=pairs if is_mean else ())
    return found


def _metrics(values: Mapping[str, Any]) -> list[tuple[str, str, float, float | None]]:
    """Return (metric, filter, value, standard error) of lm-eval's keys such as "acc,none" and "acc_stderr,none"."""
    found = []
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            stderr = values.get(f"{metric}_stderr,{filtered}")
            found.append((metric, filtered, float(value), _number(stderr)))
    return found


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _shown(metric: str, filtered: str) -> str:
    return metric if filtered == "none" else f"{metric} ({filtered})"


def _mean(members: Sequence[tuple[str, str]], scores: Mapping[str, Mapping[str, Score]]) -> Score:
    own = [scores[task][metric] for task, metric in members]
    errors = [score.stderr for score in own if score.stderr is not None]
    # The tasks are independent, so variances add up: the error of a mean of n is the root of their sum over n.
    stderr = math.hypot(*errors) / len(own) if len(errors) == len(own) else None
    return Score(statistics.fmean(score.value for score in own), stderr, members=tuple(members))


def difference(first: Evaluation, second: Evaluation, task: str, metric: str) -> tuple[float, float | None]:
    """Return second minus first, and the standard error of that difference, paired by question.

    If both models fail on the same questions, the paired error is smaller than the errors of the two scores suggest. It
    is None if the score is not a mean over questions, there is only one question, or the questions differ.
    """
    one, other = first.scores[task][metric], second.scores[task][metric]
    if one.members and one.members == other.members:
        errors = [difference(first, second, *member)[1] for member in one.members]
        known = [error for error in errors if error is not None]
        # As in `_mean`, with the paired error of each task.
        stderr = math.hypot(*known) / len(errors) if len(known) == len(errors) else None
    else:
        stderr = _paired(one.questions, other.questions)
    return other.value - one.value, stderr


def _paired(one: Sequence[float], other: Sequence[float]) -> float | None:
    if len(one) != len(other) or len(one) < 2:
        return None
    return statistics.stdev(b - a for a, b in zip(one, other, strict=True)) / math.sqrt(len(one))
