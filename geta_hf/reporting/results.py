"""Hold what was measured on which data: one entry for each data set, as the model card shows it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from geta_hf.errors import GETAError
from geta_hf.serialization.validate import read_json

RESULTS_NAME = "geta_results.json"
"""{"dense": [one object for each `TaskResult`], "compressed": […]}, or a part."""

SIDES = ("dense", "compressed")


@dataclass(frozen=True)
class TaskResult:
    """Hold how a model scored on one data set.

    Attributes:
        data: name of the data that was really used: a data set, a task of lm-eval, or a local file.
        metrics: name -> value.
        stderr: name of a metric -> its standard error over the samples, in the same unit. Default: none.
        split: such as `validation`. Default None: unknown, or the data has no splits.
        samples: number of rows that were scored. Default None: unknown.
        total: number of rows that the split has; more than `samples` where only a sample was scored. Default None.

    Raises:
        GETAError: a value that is not a finite number, or a number of samples below 1.

    Example:
        >>> from geta_hf.reporting.results import TaskResult
        >>> TaskResult("piqa", {"acc": 71.0}, {"acc": 4.5}, split="validation", samples=100, total=1838).size
        'sample of 100 of 1,838'
    """

    data: str
    metrics: Mapping[str, float]
    stderr: Mapping[str, float] = field(default_factory=dict)
    split: str | None = None
    samples: int | None = None
    total: int | None = None

    def __post_init__(self) -> None:
        for values in (self.metrics, self.stderr):
            for name, value in values.items():
                if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
                    raise GETAError(f"result of {self.data}: {name} is {value!r}, not a finite number; remove it")
        for count in (self.samples, self.total):
            if count is not None and (not isinstance(count, int) or count < 1):
                raise GETAError(f"result of {self.data}: {count!r} is not a number of samples; give 1 or more")

    @property
    def size(self) -> str:
        """Return how many rows were scored, and of how many if it was a sample; empty if unknown."""
        if self.samples is None:
            return ""
        if self.total is not None and self.total > self.samples:
            return f"sample of {self.samples:,} of {self.total:,}"
        return f"{self.samples:,}"


Results = Mapping[str, Sequence[TaskResult]]


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def read_results(folder: Path) -> dict[str, list[TaskResult]]:
    """Read the results of a folder; return an empty dict if there are none. Raise GETAError for a damaged file."""
    path = folder / RESULTS_NAME
    if not path.is_file():
        return {}
    known = {one.name for one in fields(TaskResult)}
    found: dict[str, list[TaskResult]] = {}
    for side, entries in read_json(path).items():
        if side not in SIDES or not isinstance(entries, list):
            raise GETAError(f"{path}: {side!r} is not a list of results; delete the file")
        for entry in entries:
            mappings = isinstance(entry, dict) and all(
                isinstance(entry.get(name, {}), dict) for name in ("metrics", "stderr")
            )
            if not mappings or not isinstance(entry.get("data"), str) or not set(entry) <= known:
                raise GETAError(f"{path}: {str(entry)[:80]!r} is not a result; delete the file")
            found.setdefault(side, []).append(TaskResult(**{"metrics": {}, **entry}))
    return found


def merge_results(known: Results, new: Results) -> dict[str, list[TaskResult]]:
    """Return the known results with new ones added; one on the same data, split and size replaces the known one."""
    merged = {}
    for side in SIDES:
        entries = {_key(one): one for one in (*known.get(side, ()), *new.get(side, ()))}
        if entries:
            merged[side] = list(entries.values())
    return merged


def _key(one: TaskResult) -> tuple[object, ...]:
    return one.data, one.split, one.samples


def as_json(results: Results) -> str:
    """Return the content of `RESULTS_NAME`."""
    stored = {side: [_compact(one) for one in entries] for side, entries in results.items()}
    return json.dumps(stored, indent=2) + "\n"


def _compact(one: TaskResult) -> dict[str, Any]:
    return {name: value for name, value in asdict(one).items() if value not in (None, {})}


def metrics_of(entries: Iterable[TaskResult]) -> dict[str, float]:
    """Return all metrics of several results by name."""
    return {name: float(value) for one in entries for name, value in one.metrics.items()}


def result_rows(results: Results) -> list[tuple[str, ...]]:
    """Return the rows of a table: data, split, samples, metric, dense, compressed; values with standard errors."""
    sides = {side: {_key(one): one for one in results.get(side, ())} for side in SIDES}
    rows = []
    for key in dict.fromkeys(key for entries in sides.values() for key in entries):
        pair = [sides[side].get(key) for side in SIDES]
        one = next(entry for entry in pair if entry is not None)
        names = dict.fromkeys(name for entry in pair if entry is not None for name in entry.metrics)
        for name in names:
            cells = [_value(entry, name) for entry in pair]
            rows.append((one.data, one.split or "", one.size, name, *cells))
    return rows


def _value(one: TaskResult | None, name: str) -> str:
    if one is None or name not in one.metrics:
        return ""
    error = f" ± {one.stderr[name]:.2f}" if name in one.stderr else ""
    return f"{one.metrics[name]:.2f}{error}"
