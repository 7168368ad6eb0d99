"""Format the tables of a study of rules: each cell as mean ± deviation over seeds, and its loss against dense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import Any

from geta_hf.utils.tables import format_table

DENSE, CONTROL, PAPER, OURS = "dense", "dense, trained on", "paper preset", "defaults"
ROUNDED, TAUGHT = "defaults, rounded only after training", "defaults, with a teacher"
MASKED = "defaults, scored where output is read"

Line = dict[str, Any]


def tables(lines: Sequence[Line]) -> str:
    """Return Markdown with one table for each study in `lines`, the records that `run_cell` makes.

    A cell's loss is its distance from the dense model that was trained on with the same seed and for as many steps, in
    the metric that decides; the last column is that loss over the loss of `GETAConfig.paper()`.
    """
    names = list(dict.fromkeys(line["study"] for line in lines))
    return "\n\n".join(_study([line for line in lines if line["study"] == name]) for name in names)


def _study(lines: Sequence[Line]) -> str:
    metrics: list[str] = lines[0]["metrics"]
    order = [DENSE, CONTROL, PAPER, OURS, ROUNDED, TAUGHT, MASKED]
    found = dict.fromkeys(line["cell"] for line in lines)
    names = sorted(found, key=lambda name: order.index(name) if name in order else len(order))
    by_cell = {name: [line for line in lines if line["cell"] == name] for name in names}
    losses = {name: _losses(cell, by_cell.get(CONTROL, [])) for name, cell in by_cell.items()}
    paper = fmean(losses[PAPER]) if losses.get(PAPER) else None
    header = ("cell", "saliency", "forgetting", "bits", *metrics, f"{metrics[0]} lost", "of the paper's loss")
    costs = ("relative BOPs", "mean bits", "kept parameters", "kept heads", "kept channels", "seeds")
    rows = [_row(name, cell, metrics, losses[name], paper) for name, cell in by_cell.items()]
    title = f"### {lines[0]['study']}\n\n"
    return title + format_table((*header, *costs), rows) + _verdict(losses, paper, metrics[0])


def _losses(cell: Sequence[Line], control: Sequence[Line]) -> list[float]:
    """Return the losses of a cell against the control of the same seed, for each seed that has both."""
    if not cell or cell[0]["cell"] in (DENSE, CONTROL):
        return []
    metric, sign = cell[0]["metrics"][0], 1 if cell[0]["larger_is_better"] else -1
    dense = {line["seed"]: line[metric] for line in control}
    return [sign * (dense[line["seed"]] - line[metric]) for line in cell if line["seed"] in dense]


def _row(
    name: str, cell: Sequence[Line], metrics: Sequence[str], losses: Sequence[float], paper: float | None
) -> tuple[str, ...]:
    first = cell[0]
    digits = 2 if first["larger_is_better"] else 4
    share = f"{fmean(losses) / paper:.2f}" if losses and paper else ""

    def column(key: str, show: Callable[[float], str]) -> str:
        values = [line[key] for line in cell if line.get(key) is not None]
        return show(fmean(values)) if values else ""

    return (
        name,
        *(first["rules"].get(rule, "") for rule in ("saliency", "forgetting", "bit_rule")),
        *(spread([line[metric] for line in cell], digits) for metric in metrics),
        spread(losses, digits) if losses else "",
        share,
        column("relative_bops", "{:.2%}".format),
        column("mean_bits", "{:.2f}".format),
        column("kept_parameters", "{:.1%}".format),
        column("kept_heads", "{:.0%}".format),
        column("kept_channels", "{:.0%}".format),
        str(len(cell)),
    )


def spread(values: Sequence[float], digits: int) -> str:
    """Format `mean ± sd`, with the sample's standard deviation; the mean alone for a single value."""
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {stdev(values):.{digits}f}"


def _verdict(losses: dict[str, list[float]], paper: float | None, metric: str) -> str:
    ours = losses.get(OURS)
    if not ours or not paper:
        return ""
    return f"\n\nOurs loses {fmean(ours) / paper:.2f} of what the paper's rules lose ({metric}, {len(ours)} seeds)."
