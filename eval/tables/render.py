"""Render the results of tables as Markdown: each row as mean ± deviation over seeds, and its loss against dense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from eval.results_file import Line
from eval.study_table import spread
from eval.tables.rows import CONTROL, TABLES, Table
from geta_hf.utils.tables import format_table

HEADER = ("row", "F1", "EM", "F1 lost", "F1 lost, other text", "relative BOPs", "MB", "mean bits", "M tokens", "seeds")
IMAGE_HEADER = ("row", "accuracy", "accuracy lost", "relative BOPs", "MB", "mean bits", "seconds", "seeds")


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
    header = HEADER if "f1" in lines[0] else IMAGE_HEADER
    parts.append(format_table(header, _rows(table, plain, plain)))
    for sparsity in sorted({line["sparsity"] for line in lines if line["sparsity"] is not None}):
        cut = [line for line in lines if line["sparsity"] == sparsity]
        unit = "groups" if table.target == "target_sparsity" else "parameters"
        parts.append(f"**{sparsity:.0%} of the prunable {unit} removed**")
        parts.append(format_table(header, _rows(table, cut, plain)))
    return "\n\n".join(parts)


def _settings(settings: Line) -> str:
    scored = settings["scored"]
    if "images" in scored:
        return (
            f"{settings['steps']:,} steps of {settings['batch_size']} images, of {settings['dense']['images']:,}, at a "
            f"peak learning rate of {settings['learning_rate']:g}; accuracy in percent on {scored['images']:,} images. "
            f"The dense model was trained for {settings['dense']['steps']:,} steps."
        )
    text = (
        f"{settings['steps']:,} steps of {settings['batch_size']} windows at a peak learning rate of "
        f"{settings['learning_rate']:g}; scored on {scored['questions']:,} questions"
    )
    if "other_questions" in scored:
        text += f" and on {scored['other_questions']:,} about text of another kind"
    return f"{text}. The dense model was fine-tuned for {settings['dense']['steps']:,} steps."


def _rows(table: Table, lines: Sequence[Line], plain: Sequence[Line]) -> list[tuple[str, ...]]:
    found = []
    for row in table.rows:
        cell = [line for line in lines if line["row"] == row.name]
        if cell:
            found.append(_row(row.name, cell, plain))
    return found


def _row(name: str, cell: Sequence[Line], plain: Sequence[Line]) -> tuple[str, ...]:
    if "accuracy" in cell[0]:
        return (
            name,
            spread([line["accuracy"] for line in cell], 2),
            _loss(cell, plain, "accuracy"),
            _mean(cell, "relative_bops", "{:.2%}".format),
            _mean(cell, "bytes", lambda value: f"{value / 1e6:.3f}"),
            _mean(cell, "mean_bits", "{:.2f}".format),
            _mean(cell, "seconds", "{:.0f}".format),
            str(len(cell)),
        )
    return (
        name,
        spread([line["f1"] for line in cell], 2),
        spread([line["em"] for line in cell], 2),
        _loss(cell, plain, "f1"),
        _loss(cell, plain, "other_f1"),
        _mean(cell, "relative_bops", "{:.2%}".format),
        _mean(cell, "bytes", lambda value: f"{value / 1e6:.2f}"),
        _mean(cell, "mean_bits", "{:.2f}".format),
        _mean(cell, "tokens", lambda value: f"{value / 1e6:.1f}"),
        str(len(cell)),
    )


def losses(cell: Sequence[Line], plain: Sequence[Line], metric: str) -> list[float]:
    """Return how far each line is below the dense model trained on for as many steps with the same seed.

    Lines without such a model are left out, and so is that model itself.
    """
    dense = {
        (line["seed"], line["steps"]): line for line in plain if line["row"].startswith(CONTROL) and metric in line
    }
    found = []
    for line in cell:
        control = dense.get((line["seed"], line.get("steps")))
        if control is not None and control is not line and metric in line:
            found.append(control[metric] - line[metric])
    return found


def _loss(cell: Sequence[Line], plain: Sequence[Line], metric: str) -> str:
    found = losses(cell, plain, metric)
    return spread(found, 2) if found else ""


def _mean(cell: Sequence[Line], key: str, show: Callable[[float], str]) -> str:
    values = [line[key] for line in cell if line.get(key) is not None]
    return show(fmean(values)) if values else ""
