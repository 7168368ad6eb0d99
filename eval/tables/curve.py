"""Draw joint training against pruning and then rounding: the loss against dense over relative BOPs and over bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from eval.results_file import Line
from eval.tables.render import SCORES, Score, losses
from eval.tables.rows import TABLES
from geta_hf import GETAError

AXES = (("relative_bops", "relative BOPs, %", 100.0), ("bytes", "MB of weights", 1e-6))
"""Key of a cost in a line, its name on the axis, and the factor to its unit."""


def draw_curve(lines: Sequence[Line], path: Path, table: str = "table5") -> None:
    """Draw one curve for each compressed row of a table: a point for each sparsity, the mean over seeds.

    Args:
        lines: results of one study.
        path: picture to write; its ending says the format.
        table: which table's lines to draw.

    Raises:
        GETAError: matplotlib is missing, there is no compressed result of the table, or several studies have some.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise GETAError("a curve is drawn by matplotlib, which is missing; run `pip install matplotlib`") from error
    own = [line for line in lines if line["table"] == table]
    cut = [line for line in own if line["sparsity"] is not None]
    if not cut:
        raise GETAError(f"there is no compressed result of {table} to draw yet")
    studies = sorted({line["study"] for line in cut})
    if len(studies) > 1:
        raise GETAError(f"{table} has results of {studies}, whose costs and scores can't share axes; name one study")
    score = next(score for score in SCORES if score.key in cut[0])
    plain = [line for line in own if line["sparsity"] is None]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, (key, name, unit) in zip(figure.subplots(1, 2, sharey=True), AXES, strict=True):
        for row in TABLES[table].rows:
            points = sorted(curve_points([line for line in cut if line["row"] == row.name], plain, score, key))
            if points:
                axes.plot([x * unit for x, _ in points], [y for _, y in points], marker="o", label=row.name)
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
    first = figure.axes[0]
    first.set_ylabel(f"{score.title} lost against dense, trained on")
    first.legend(fontsize="small")
    figure.savefig(path)


def curve_points(lines: Sequence[Line], plain: Sequence[Line], score: Score, key: str) -> list[tuple[float, float]]:
    """Return (cost, loss) for each sparsity among a row's results: means over its seeds."""
    points = []
    for sparsity in {line["sparsity"] for line in lines}:
        cell = [line for line in lines if line["sparsity"] == sparsity]
        found = losses(cell, plain, score)
        if found:
            points.append((fmean(line[key] for line in cell), fmean(found)))
    return points
