"""Render a comparison as Markdown: a table for each budget, and the loss over bytes and over tokens.

python -m eval.compare.table --work runs/compare --curve curve.svg
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev

from eval.compare.curve import draw_curves
from eval.results_file import Line, read_results
from geta_hf.utils.tables import format_table

DENSE = "dense"
REFERENCES = ("ours, one width", "ours")
"""What every other method is compared with, question by question and block by block: the first that a budget has."""


def render(lines: Sequence[Line]) -> str:
    """Return a section for each budget, from the lines of `eval.compare.run`."""
    lines = _latest(lines)
    parts = [_settings(lines)]
    dense = next((line for line in lines if line["method"] == DENSE), None)
    for budget, grid in dict.fromkeys((line["budget"], line["grid"]) for line in lines if line["method"] != DENSE):
        own = [line for line in lines if (line["budget"], line["grid"]) == (budget, grid)]
        parts.append(f"**{budget}, a step size for each {grid}**")
        parts += [_table(own, dense), _by_task(own, dense)]
        skipped = {line["method"]: line["skipped"] for line in own if "skipped" in line}
        parts += [f"Skipped: {name} ({why})." for name, why in skipped.items()]
    parts += [_over_bytes(lines), _over_tokens(lines)]
    return "\n\n".join(part for part in parts if part)


def _latest(lines: Sequence[Line]) -> list[Line]:
    """Return one line for each cell: a method that was skipped may have been run since."""
    found: dict[tuple[object, ...], Line] = {}
    for line in lines:
        key = tuple(line[name] for name in ("method", "budget", "steps", "draw", "grid"))
        if key not in found or "skipped" in found[key]:
            found[key] = line
    return list(found.values())


def texts_of(lines: Sequence[Line]) -> list[str]:
    """Return the names of the scored texts."""
    return list(
        dict.fromkeys(
            name for line in lines for name, value in line.items() if isinstance(value, dict) and "above" in value
        )
    )


def _settings(lines: Sequence[Line]) -> str:
    own = next((line["settings"] for line in lines if "settings" in line), None)
    if own is None:
        return ""
    dense = next(line for line in lines if texts_of([line]))
    losses = ", ".join(f"{dense[name]['dense']:.3f} on {name}" for name in texts_of([dense]))
    text = (
        f"Nats a token above the dense model ({losses}), on {own['scored_blocks']} blocks of {own['length']} tokens of "
        f"each text; calibrated on {own['blocks']} blocks of {', '.join(own['text'])}, a quarter of them held back to "
        f"choose by. ± is the standard error over blocks of the paired difference."
    )
    if own["tasks"]:
        limit = f"the first {own['limit']} questions" if own["limit"] else "all questions"
        text += f" Accuracy: the mean over tasks in percent, on {limit} of each; ± is paired with the dense model."
    return text


def _table(lines: Sequence[Line], dense: Line | None) -> str:
    texts = texts_of(lines)
    with_tasks = any("answers" in line for line in lines)
    reference = _reference(lines)
    header = ["method", "steps", *texts, *(f"{name}, behind {reference}" for name in texts[:1])]
    if with_tasks:
        header += ["accuracy", "against dense"]
    header += ["MB", "removed", "mean bits", "k tokens", "needs", "seconds"]
    rows = []
    for method, steps in dict.fromkeys((line["method"], line["steps"]) for line in lines if "skipped" not in line):
        cell = [line for line in lines if (line["method"], line["steps"]) == (method, steps)]
        if any("reason" in line for line in cell):
            rows.append((method, str(steps), "out of reach", *[""] * (len(header) - 3)))
            continue
        others = [line for line in lines if (line["method"], line["steps"]) == (reference, steps)]
        row = [method + _marks(cell), str(steps), *(_loss(cell, name) for name in texts)]
        row += [_behind(cell, others, name) if method != reference else "" for name in texts[:1]]
        if with_tasks:
            row += [_accuracy(cell), _accuracy_lost(cell, dense)]
        row += [
            _mean(cell, "bytes", lambda value: f"{value / 1e6:.2f}"),
            _mean(cell, "share", "{:.1%}".format),
            _mean(cell, "mean_bits", "{:.2f}".format),
            _mean(cell, "tokens", lambda value: f"{value / 1e3:.0f}"),
            cell[0]["needs"],
            _mean(cell, "seconds", "{:.0f}".format),
        ]
        rows.append(tuple(row))
    return format_table(tuple(header), rows)


def _reference(lines: Sequence[Line]) -> str:
    """Return the name of the method that the others of a budget are compared with."""
    measured = {line["method"] for line in lines if texts_of([line])}
    return next((name for name in REFERENCES if name in measured), REFERENCES[-1])


def _by_task(lines: Sequence[Line], dense: Line | None) -> str:
    """Return the accuracy on every task in percent, the dense model's first; nothing where no task was asked."""
    answered = [line for line in lines if "answers" in line]
    if not answered:
        return ""
    tasks = list(answered[0]["answers"])
    rows = []
    for line in [*([dense] if dense is not None and "answers" in dense else []), *answered]:
        right = [100 * _right(line["answers"][task]) for task in tasks]
        draw = f", draw {line['draw']}" if line["draw"] else ""
        rows.append((line["method"] + draw, str(line["steps"]), *(f"{value:.1f}" for value in (*right, fmean(right)))))
    return f"Accuracy by task, in percent:\n\n{format_table(('method', 'steps', *tasks, 'mean'), rows)}"


def _marks(cell: Sequence[Line]) -> str:
    notes = list(dict.fromkeys(line["note"] for line in cell if line.get("note")))
    return f" ({'; '.join(notes)})" if notes else ""


def _mean(cell: Sequence[Line], name: str, shown: Callable[[float], str]) -> str:
    values = [line[name] for line in cell if line.get(name) is not None]
    return shown(fmean(values)) if values else ""


def _with_error(values: Sequence[float], digits: int = 3) -> str:
    if len(values) < 2:
        return f"{fmean(values):.{digits}f}"
    return f"{fmean(values):.{digits}f} ± {stdev(values) / math.sqrt(len(values)):.{digits}f}"


def _loss(cell: Sequence[Line], name: str) -> str:
    """Return the mean over draws, with its spread where there are several, else with the error over blocks."""
    if len(cell) > 1:
        means = [fmean(line[name]["above"]) for line in cell]
        return f"{fmean(means):.3f} ({min(means):.3f} to {max(means):.3f})"
    return _with_error(cell[0][name]["above"])


def _behind(cell: Sequence[Line], others: Sequence[Line], name: str) -> str:
    """Return how much more than ours a method loses, paired by block, over the draws that both have."""
    ours = {line["draw"]: line for line in others if name in line}
    differences = [
        [one - other for one, other in zip(line[name]["above"], ours[line["draw"]][name]["above"], strict=True)]
        for line in cell
        if line["draw"] in ours
    ]
    if not differences:
        return ""
    # Draws share their blocks, so their mean is taken first.
    return _with_error([fmean(values) for values in zip(*differences, strict=True)])


def _accuracy(cell: Sequence[Line]) -> str:
    means = [fmean(100 * _right(answers) for answers in line["answers"].values()) for line in cell]
    return _with_error(means, 2)


def _right(answers: str) -> float:
    return answers.count("1") / len(answers)


def _accuracy_lost(cell: Sequence[Line], dense: Line | None) -> str:
    """Return the mean difference over tasks in percent, with the error over questions: variances of tasks add up."""
    if dense is None or "answers" not in dense:
        return ""
    tasks = dense["answers"]
    means, variance = [], 0.0
    for task, before in tasks.items():
        changes = [
            fmean(int(line["answers"][task][place]) - int(before[place]) for line in cell)
            for place in range(len(before))
        ]
        means.append(100 * fmean(changes))
        variance += (100 * stdev(changes)) ** 2 / len(changes) if len(changes) > 1 else 0.0
    return f"{fmean(means):+.2f} ± {math.sqrt(variance) / len(tasks):.2f}"


def _over_bytes(lines: Sequence[Line]) -> str:
    """Return the loss on the first text of every method over the budgets, the largest first."""
    done = [line for line in lines if "above" in line.get(next(iter(texts_of(lines)), ""), {}) and line["budget"]]
    budgets = sorted({(line["target_bytes"], line["budget"], line["grid"]) for line in done}, reverse=True)
    if len(budgets) < 2:
        return ""
    text = texts_of(lines)[0]
    header = ("method", "steps", *(f"{size / 1e6:.2f} MB ({name}, {grid})" for size, name, grid in budgets))
    rows = []
    for method, steps in dict.fromkeys((line["method"], line["steps"]) for line in done):
        row = [method, str(steps)]
        for size, name, grid in budgets:
            key = (method, steps, name, grid, size)
            names = ("method", "steps", "budget", "grid", "target_bytes")
            cell = [line for line in done if tuple(line[field] for field in names) == key]
            row.append(f"{fmean(fmean(line[text]['above']) for line in cell):.3f}" if cell else "")
        rows.append(tuple(row))
    return f"Nats above dense on {text}, over bytes of the folder:\n\n{format_table(header, rows)}"


def _over_tokens(lines: Sequence[Line]) -> str:
    """Return the loss on the first text of every method over the tokens that it used, within each budget."""
    done = [line for line in lines if "above" in line.get(next(iter(texts_of(lines)), ""), {}) and line["budget"]]
    columns = sorted({round(line["tokens"] / 1e3) for line in done if line.get("tokens") is not None})
    if len(columns) < 2:
        return ""
    text = texts_of(lines)[0]
    rows = []
    for budget, grid, method in dict.fromkeys((line["budget"], line["grid"], line["method"]) for line in done):
        own = [line for line in done if (line["budget"], line["grid"], line["method"]) == (budget, grid, method)]
        row = [budget, grid, method]
        for column in columns:
            cell = [fmean(line[text]["above"]) for line in own if _thousands(line) == column]
            row.append(f"{fmean(cell):.3f}" if cell else "")
        rows.append(tuple(row))
    header = ("budget", "grid", "method", *(f"{column} k tokens" for column in columns))
    return f"Nats above dense on {text}, over tokens used:\n\n{format_table(header, rows)}"


def _thousands(line: Line) -> int | None:
    return None if line.get("tokens") is None else round(line["tokens"] / 1e3)


def main() -> None:
    """Print the tables of a folder of results."""
    made = argparse.ArgumentParser("python -m eval.compare.table", description="tables of a comparison, as Markdown")
    made.add_argument("--work", required=True, type=Path, nargs="+", help="folders of results, rendered together")
    made.add_argument("--curve", type=Path, help="draw losses over bytes and over tokens into this picture")
    arguments = made.parse_args()
    lines = [line for folder in arguments.work for line in read_results(folder)]
    print(render(lines))
    if arguments.curve is not None:
        found = _latest(lines)
        draw_curves(found, arguments.curve, next(iter(texts_of(found)), ""))


if __name__ == "__main__":
    main()
