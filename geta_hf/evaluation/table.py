"""Format the scores of several models side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from geta_hf.evaluation.scores import Evaluation, Score, difference
from geta_hf.evaluation.tasks import BLIMP, COMMONSENSE, SUITE, blimp_size
from geta_hf.evaluation.texts import TextScore
from geta_hf.utils.tables import format_table

SHARES = ("acc", "acc_norm", "mean", "mean_acc")  # from 0 to 1, shown in percent
_TEXT_UNITS = ("nats per token", "perplexity", "bits per byte")


def side_by_side(evaluations: Mapping[str, Evaluation]) -> str:
    """Return a Markdown table of scores and standard errors, and of the differences from the first model.

    Accuracies are in percent. The error of a difference is paired by question. For the commonsense tasks only the
    metric that enters their mean is shown; `Evaluation.scores` has all.

    Args:
        evaluations: head of the column -> scores of the model, all on the same tasks.
    """
    first, *others = evaluations.values()
    head = ("task", "metric", *evaluations, *(f"{name} - {next(iter(evaluations))}" for name in list(evaluations)[1:]))
    rows = []
    for task, metric in shown(first):
        cells = [_cell(one.scores[task][metric], metric) for one in evaluations.values()]
        changes = [_change(*difference(first, other, task, metric), metric) for other in others]
        rows.append((*_label(task, metric, first.scores[task][metric]), *cells, *changes))
    return format_table(head if others else head[:3], rows)


def shown(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Return (task, metric) of every row of a table; groups follow their members."""
    suite = SUITE in evaluation.scores
    return [
        (task, metric)
        for task, metrics in evaluation.scores.items()
        for metric in metrics
        if not suite or COMMONSENSE.get(task, metric) == metric
    ]


def _label(task: str, metric: str, score: Score) -> tuple[str, str]:
    return (task, f"{metric}, {len(score.members)} tasks" if score.members else metric)


def _cell(score: Score, metric: str) -> str:
    return _number(score.value, metric) + _error(score.stderr, metric)


def _change(value: float, stderr: float | None, metric: str) -> str:
    return _number(value, metric, sign="+") + _error(stderr, metric)


def _error(stderr: float | None, metric: str) -> str:
    return "" if stderr is None else f" ± {_number(stderr, metric)}"


def _number(value: float, metric: str, sign: str = "") -> str:
    return f"{100 * value:{sign}.2f}" if metric in SHARES else f"{value:{sign}.4g}"


def text_table(texts: Mapping[str, Mapping[str, TextScore]]) -> str:
    """Return a Markdown table of perplexities.

    Args:
        texts: head of the column -> name of the text -> score; the same texts in all columns.
    """
    columns = list(texts.values())
    rows = []
    for name in columns[0]:
        own = [(one[name].nats_per_token, one[name].perplexity, one[name].bits_per_byte) for one in columns]
        rows += [(name, unit, *(f"{values[place]:.4f}" for values in own)) for place, unit in enumerate(_TEXT_UNITS)]
    return format_table(("text", "unit", *texts), rows)


def remarks(evaluations: Mapping[str, Evaluation]) -> Sequence[str]:
    """Return the sentences that a reader of the table needs in addition."""
    found = []
    for limit in {one.limit for one in evaluations.values() if one.limit}:
        found.append(f"The scores are over the first {limit} questions of each task.")
    if any(SUITE in one.scores for one in evaluations.values()):
        found.append("mean is over the metrics shown, mean_acc over acc in all seven.")
    for count in {len(one.scores[BLIMP]["acc"].members) for one in evaluations.values() if BLIMP in one.scores}:
        found.append(f"{BLIMP} is the mean over {count} of its {blimp_size()} paradigms.")
    for name, one in evaluations.items():
        if one.truncated:
            cut = f"{one.truncated:,} of {one.requests:,} requests were longer than the model's positions"
            found.append(f"{name}: {cut} and were truncated on the left.")
    return found
