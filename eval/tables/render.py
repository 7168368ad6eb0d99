"""Render the results of tables as Markdown: each row as mean ± deviation over seeds, and its loss against dense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from eval.results_file import Line
from eval.study_table import spread
from eval.tables.rows import CONTROL, TABLES, Table
from geta_hf.utils.tables import format_table


@dataclass(frozen=True)
class Score:
    """How a score is shown.

    Attributes:
        key: in a line of results; on text of another kind the key is `other_` and this.
        title: at the head of its column.
        digits: after the point.
        lost: shown as a loss against dense too, in domain and on other text.
        larger_is_better: what a loss is.
        elsewhere: whether text of another kind may be scored as well.
    """

    key: str
    title: str
    digits: int
    lost: bool = True
    larger_is_better: bool = True
    elsewhere: bool = True


SCORES = (
    Score("f1", "F1", 2),
    Score("em", "EM", 2, lost=False),
    Score("nats", "nats", 3, larger_is_better=False),
    Score("accuracy", "accuracy", 2, elsewhere=False),
)


@dataclass(frozen=True)
class Cost:
    """A column of costs: its title, the key in a line of results, and how the mean over seeds is shown."""

    title: str
    key: str
    show: Callable[[float], str]


COSTS = (
    Cost("relative BOPs", "relative_bops", "{:.2%}".format),
    Cost("MB", "bytes", lambda value: f"{value / 1e6:.3g}" if value < 1e6 else f"{value / 1e6:.2f}"),
    Cost("mean bits", "mean_bits", "{:.2f}".format),
    Cost("CPU ms an image", "ms", "{:.1f}".format),
    Cost("dense, beside it", "dense_ms", "{:.1f}".format),
    Cost("M tokens", "tokens", lambda value: f"{value / 1e6:.1f}"),
)


def render(lines: Sequence[Line]) -> str:
    """Return one section for each table and study in `lines`, the records that `run_table` makes."""
    studies = dict.fromkeys((line["table"], line["study"]) for line in lines)
    sections = []
    for name, study in studies:
        own = [line for line in lines if (line["table"], line["study"]) == (name, study)]
        sections.append(_section(TABLES[name], study, own))
    return "\n\n".join(sections)


def _section(table: Table, study: str, lines: Sequence[Line]) -> str:
    settings = lines[0]["settings"]
    parts = [f"### {table.title} ({study})", _settings(settings)]
    plain = [line for line in lines if line["sparsity"] is None]
    scores = [score for score in SCORES if score.key in lines[0]]
    header = ("row", *(score.title for score in scores), *(f"{title} lost" for title, _ in _lost(scores)))
    costs = [cost for cost in COSTS if any(line.get(cost.key) for line in lines)]
    header += (*(cost.title for cost in costs), "seeds")
    parts.append(format_table(header, _rows(table, plain, plain, scores, costs)))
    for sparsity in sorted({line["sparsity"] for line in lines if line["sparsity"] is not None}):
        cut = [line for line in lines if line["sparsity"] == sparsity]
        unit = "groups" if table.target == "target_sparsity" else "parameters"
        parts.append(f"**{sparsity:.0%} of the prunable {unit} removed**")
        parts.append(format_table(header, _rows(table, cut, plain, scores, costs)))
    return "\n\n".join(parts)


def _lost(scores: Sequence[Score]) -> list[tuple[str, Score]]:
    """Return title and score of each column of losses: in domain, then on text of another kind."""
    own = [score for score in scores if score.lost]
    return [(score.title, score) for score in own] + [
        (f"{score.title}, other text,", replace(score, key=f"other_{score.key}")) for score in own if score.elsewhere
    ]


def _settings(settings: Line) -> str:
    scored, dense = settings["scored"], settings["dense"]
    if "images" in scored:
        return (
            f"{settings['steps']:,} steps of {settings['batch_size']} images, of {dense['images']:,}, at a "
            f"peak learning rate of {settings['learning_rate']:g}; accuracy in percent on {scored['images']:,} images. "
            f"The dense model was trained for {dense['steps']:,} steps."
        )
    asked = "questions" in scored
    things, other = ("questions", "other_questions") if asked else ("blocks", "other_blocks")
    text = (
        f"{settings['steps']:,} steps of {settings['batch_size']} {'windows' if asked else 'blocks'} at a peak "
        f"learning rate of {settings['learning_rate']:g}; scored on {scored[things]:,} {things}"
    )
    if other in scored:
        text += f" and on {scored[other]:,} {'about' if asked else 'of'} text of another kind"
    if not dense["steps"]:
        return f"{text}. The dense model is the pretrained one as it is."
    return f"{text}. The dense model was fine-tuned for {dense['steps']:,} steps."


def _rows(
    table: Table, lines: Sequence[Line], plain: Sequence[Line], scores: Sequence[Score], costs: Sequence[Cost]
) -> list[tuple[str, ...]]:
    found = []
    for row in table.rows:
        cell = [line for line in lines if line["row"] == row.name]
        if cell:
            found.append(_row(row.name, cell, plain, scores, costs))
    return found


def _row(
    name: str, cell: Sequence[Line], plain: Sequence[Line], scores: Sequence[Score], costs: Sequence[Cost]
) -> tuple[str, ...]:
    return (
        name,
        *(spread([line[score.key] for line in cell], score.digits) for score in scores),
        *(_loss(cell, plain, score) for _, score in _lost(scores)),
        *(_mean(cell, cost.key, cost.show) for cost in costs),
        str(len(cell)),
    )


def losses(cell: Sequence[Line], plain: Sequence[Line], score: Score) -> list[float]:
    """Return how far each line is behind the dense model trained on for as many steps with the same seed.

    Lines without such a model are left out, and so is that model itself.
    """
    metric, sign = score.key, 1 if score.larger_is_better else -1
    dense = {
        (line["seed"], line["steps"]): line for line in plain if line["row"].startswith(CONTROL) and metric in line
    }
    found = []
    for line in cell:
        control = dense.get((line["seed"], line.get("steps")))
        if control is not None and control is not line and metric in line:
            found.append(sign * (control[metric] - line[metric]))
    return found


def _loss(cell: Sequence[Line], plain: Sequence[Line], score: Score) -> str:
    found = losses(cell, plain, score)
    return spread(found, score.digits) if found else ""


def _mean(cell: Sequence[Line], key: str, show: Callable[[float], str]) -> str:
    values = [line[key] for line in cell if line.get(key) is not None]
    return show(fmean(values)) if values else ""
