"""Keep the results of a study as one JSON line a cell, so that an interrupted study goes on where it stopped."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RESULTS = "results.jsonl"

Line = dict[str, Any]


def read_results(work: Path) -> list[Line]:
    """Return all finished cells of a work folder, without a line that an interruption truncated."""
    path = work / RESULTS
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def append_result(work: Path, line: Line) -> None:
    """Add one finished cell, and return once it is on disk."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / RESULTS).open("a", encoding="utf-8") as file:
        # The newline first: it also ends a line that was cut off.
        file.write("\n" + json.dumps(line))
        file.flush()
        os.fsync(file.fileno())
