"""Draw a comparison: the loss of every method over the bytes of its folder, and over the tokens that it used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from eval.results_file import Line
from geta_hf import GETAError

Point = tuple[float, float]


def points_over(lines: Sequence[Line], text: str, key: str) -> list[Point]:
    """Return (cost, nats above dense) for each cell of one curve, means over its draws, by ascending cost.

    Args:
        lines: of one method, which differ in budget or in steps.
        text: name of the scored text.
        key: of the cost in a line, `bytes` or `tokens`.
    """
    cells: dict[tuple[object, ...], list[Line]] = {}
    for line in lines:
        if text in line and line.get(key) is not None:
            cells.setdefault((line["budget"], line["grid"], line["steps"]), []).append(line)
    found = [
        (fmean(line[key] for line in cell), fmean(fmean(line[text]["above"]) for line in cell))
        for cell in cells.values()
    ]
    return sorted(found)


def draw_curves(lines: Sequence[Line], path: Path, text: str) -> None:
    """Draw one panel over bytes, of each method's longest training, and one over tokens for each budget.

    Args:
        lines: one for each cell, without those that were skipped.
        path: picture to write; its ending says the format.
        text: name of the scored text.

    Raises:
        GETAError: matplotlib is missing, or no method has a score.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise GETAError("a curve is drawn by matplotlib, which is missing; run `pip install matplotlib`") from error
    scored = [line for line in lines if text in line and line["budget"]]
    if not scored:
        raise GETAError(f"no method has a score on {text} to draw yet")
    methods = list(dict.fromkeys(line["method"] for line in scored))
    budgets = list(dict.fromkeys((line["budget"], line["grid"]) for line in scored))
    figure = Figure(figsize=(5.5 * (1 + len(budgets)), 4.5), layout="constrained")
    panels = figure.subplots(1, 1 + len(budgets), sharey=True)
    for place, method in enumerate(methods):
        own = [line for line in scored if line["method"] == method]
        longest = [line for line in own if line["steps"] == max(other["steps"] for other in own)]
        style = {"marker": "o", "color": f"C{place % 10}", "linestyle": "-" if place < 10 else "--"}
        _plot(panels[0], points_over(longest, text, "bytes"), 1e-6, method, style)
        for axes, (budget, grid) in zip(panels[1:], budgets, strict=True):
            cell = [line for line in own if (line["budget"], line["grid"]) == (budget, grid)]
            _plot(axes, points_over(cell, text, "tokens"), 1e-3, method, style)
    panels[0].set_xlabel("MB of the folder")
    panels[0].set_ylabel(f"nats a token above dense, {text}")
    panels[0].legend(fontsize="small")
    for axes, (budget, grid) in zip(panels[1:], budgets, strict=True):
        axes.set_xlabel(f"thousand tokens used ({budget}, {grid})")
    for axes in panels:
        axes.grid(alpha=0.3)
    figure.savefig(path)


def _plot(axes: object, points: Sequence[Point], unit: float, label: str, style: dict[str, str]) -> None:
    if points:
        axes.plot([x * unit for x, _ in points], [y for _, y in points], label=label, **style)  # type: ignore[attr-defined]
