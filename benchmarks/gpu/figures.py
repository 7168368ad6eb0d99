"""What a part measured: figures, with the targets that they are compared with, and the table of all parts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from geta_hf.utils.tables import format_table

HEADER = ("part", "figure", "value", "target", "")


@dataclass(frozen=True)
class Figure:
    """One number of a part.

    Args:
        name: what was measured.
        value: the number; None where it could not be measured.
        unit: printed behind it.
        most: the target where less is better.
        least: the target where more is better.
        note: why there is no value, or what else to know.
    """

    name: str
    value: float | None
    unit: str = ""
    most: float | None = None
    least: float | None = None
    note: str = ""

    def verdict(self) -> str:
        """Return "met" or "missed"; nothing where there is no target or no value."""
        if self.value is None or (self.most is None and self.least is None):
            return ""
        good = (self.most is None or self.value <= self.most) and (self.least is None or self.value >= self.least)
        return "met" if good else "missed"

    def row(self, part: str, verdicts: bool = True) -> tuple[str, ...]:
        """Return the figure as a row under `HEADER`, with or without what the target says of it."""
        value = "" if self.value is None else f"{self.value:,.4g} {self.unit}".rstrip()
        target = "" if self.most is None else f"at most {self.most:g}"
        target = target if self.least is None else f"at least {self.least:g}"
        return (part, self.name, value, target, "; ".join(filter(None, (self.verdict() * verdicts, self.note))))


def write(path: Path, part: str, machine: Mapping[str, Any], figures: Iterable[Figure]) -> None:
    """Write a part's JSON in one step, so that a file that exists is complete."""
    content = {"part": part, "machine": dict(machine), "figures": [asdict(figure) for figure in figures]}
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(content, indent=1), encoding="utf-8")
    draft.replace(path)


def read(path: Path) -> list[Figure]:
    """Return the figures of a part's JSON."""
    return [Figure(**figure) for figure in json.loads(path.read_text(encoding="utf-8"))["figures"]]


def table(folder: Path, parts: Iterable[str], verdicts: bool = True) -> str:
    """Return one table of all parts that have a JSON in a folder, in the order given; see `Figure.row`."""
    rows = [
        figure.row(part, verdicts)
        for part in parts
        if (folder / f"{part}.json").exists()
        for figure in read(folder / f"{part}.json")
    ]
    return format_table(HEADER, rows)
