"""Keep the results of a study as one JSON line a cell, so that an interrupted study goes on where it stopped."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from geta_hf import GETAError

RESULTS = "results.jsonl"

Line = dict[str, Any]

Cell = TypeVar("Cell")


def read_results(work: Path, name: str = RESULTS) -> list[Line]:
    """Return all finished cells of a work folder, without a line that an interruption truncated.

    Args:
        work: the folder.
        name: of the file with the lines.
    """
    path = work / name
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def read_under(work: Path, settings: Line) -> tuple[Line, list[Line]]:
    """Return settings as a line holds them, and all finished cells of a work folder, which must have the same.

    Args:
        work: the folder.
        settings: of the cells that are to follow; plain data but for tuples.

    Raises:
        GETAError: results under other settings.
    """
    stored: Line = json.loads(json.dumps(settings))
    done = read_results(work)
    if any(line["settings"] != stored for line in done):
        raise GETAError(f"{work} holds results under other settings; give another --work")
    return stored, done


def append_result(work: Path, line: Line) -> None:
    """Add one finished cell, and return once it is on disk."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / RESULTS).open("a", encoding="utf-8") as file:
        # The newline first: it also ends a line that was cut off.
        file.write("\n" + json.dumps(line))
        file.flush()
        os.fsync(file.fileno())


def run_missing(
    work: Path,
    cells: Iterable[tuple[Any, Cell]],
    finished: dict[Any, Line],
    measure: Callable[[Cell], Line],
    hidden: Iterable[str] = ("settings",),
    prefix: str = "",
) -> list[Line]:
    """Measure the cells that are not finished, and append each as it ends.

    Args:
        work: the folder of the results.
        cells: keys and what is measured, in their order.
        finished: key -> line of what is done; completed in place, since a cell may take a figure from an earlier one.
        measure: returns the line of a cell.
        hidden: entries of a line that are not printed.
        prefix: of the message where a cell fails.

    Returns:
        The new lines. A cell that raises GETAError is reported, skipped, and tried again by the next run.
    """
    new = []
    for key, cell in cells:
        if key in finished:
            continue
        try:
            line = measure(cell)
        except GETAError as error:
            print(f"{prefix}{key}: {error}", file=sys.stderr, flush=True)
            continue
        append_result(work, line)
        finished[key] = line
        new.append(line)
        print(json.dumps({name: value for name, value in line.items() if name not in hidden}), flush=True)
    return new
