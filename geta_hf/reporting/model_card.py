"""The model card: README.md with what the Hub reads at its head, and below it what a person wants to know."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from geta_hf.export.export import PICTURE_NAME
from geta_hf.reporting.comparison import Metrics, table_rows
from geta_hf.reporting.folder_summary import (
    CARD_NAME,
    LOCAL_BASE,
    METRICS_NAME,
    Facts,
    check_metrics,
    read_facts,
    read_metrics,
)
from geta_hf.reporting.structure_svg import BITS, Grid, Row, draw, layer_grid, printable
from geta_hf.utils.files import write_whole
from geta_hf.utils.tables import format_table

_BASE_KEYS = ("base_model", "base_model_relation", LOCAL_BASE)
_TAGS = ("geta", "pruned", "quantized")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Way:
    """One way to load a folder: what it is for, and the code, Python or a command line as `language` says."""

    title: str
    code: str
    language: str


def write_card(
    folder: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    task: str | None = None,
    dataset: str | None = None,
    metrics: Metrics | None = None,
    repo_id: str | None = None,
) -> Path:
    """Write the model card of an exported folder, the picture that it shows, and the metrics where they are given.

    May be called again, say with metrics that were not known before: what an argument leaves open is taken from the
    folder's card and metrics, and the rest of the card is written anew.

    Args:
        folder: an exported folder.
        base_model: name on the Hub of what was compressed; a local path is shown, but not claimed to be on the Hub.
        task: the Hub's tag of a pipeline; by default the one that the architecture is made for.
        dataset: what the metrics were measured on.
        metrics: {"dense": {"em": …}, "compressed": {"em": …}}, and "latency_ms" of both; kept in geta_metrics.json.
        repo_id: name on the Hub that the examples load; by default the folder's name.

    Returns:
        The card.

    Raises:
        GETAError: no exported folder, or metrics that are no finite numbers.
    """
    path = Path(folder)
    known, fresh = read_metrics(path), check_metrics(metrics or {}, "metrics")
    merged = {side: {**known.get(side, {}), **fresh.get(side, {})} for side in (*known, *fresh)}
    facts = read_facts(path)
    text = _card(facts, base_model, task, dataset, merged, repo_id)
    if fresh:
        write_whole(path / METRICS_NAME, json.dumps(merged, indent=2) + "\n")
    write_whole(path / PICTURE_NAME, draw(layer_grid(facts.structure), standalone=True))
    write_whole(path / CARD_NAME, text)
    return path / CARD_NAME


def model_card(
    folder: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    task: str | None = None,
    dataset: str | None = None,
    metrics: Metrics | None = None,
    repo_id: str | None = None,
) -> str:
    """The text of a model card: YAML front matter and Markdown. Nothing is written; see `write_card`.

    Args:
        folder: an exported folder.
        base_model: as in `write_card`.
        task: as in `write_card`.
        dataset: as in `write_card`.
        metrics: by default those of geta_metrics.json.
        repo_id: as in `write_card`.

    Raises:
        GETAError: no exported folder, or metrics that are no finite numbers.
    """
    facts = read_facts(folder)
    found = facts.metrics if metrics is None else check_metrics(metrics, "metrics")
    return _card(facts, base_model, task, dataset, found, repo_id)


def _card(
    facts: Facts,
    base_model: str | None,
    task: str | None,
    dataset: str | None,
    metrics: Metrics,
    repo_id: str | None,
) -> str:
    """What is None is as the folder's own card says, or as its architecture does."""
    base, dataset = _base(facts, base_model), dataset or facts.dataset
    task = task or facts.front.get("pipeline_tag") or facts.task
    name = repo_id or facts.folder.resolve().name
    kept = {key: value for key, value in facts.front.items() if key not in _BASE_KEYS}
    own = _front(facts, task, _result(name, task, dataset or "unknown", metrics))
    front = kept | {"library_name": "transformers"} | base | own
    shown = base.get("base_model") or base.get(LOCAL_BASE)
    body = _body(facts, shown, metrics, name)
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n{body}\n"


def _base(facts: Facts, base_model: str | None) -> dict[str, Any]:
    """What the head of a card says of the base model; a local path is nothing that the Hub could link to."""
    if not base_model:
        return {key: facts.front[key] for key in _BASE_KEYS if key in facts.front}
    if _REPO.fullmatch(base_model) and not Path(base_model).exists():
        return {"base_model": base_model, "base_model_relation": "quantized"}
    return {LOCAL_BASE: Path(base_model).name}


def _front(facts: Facts, task: str | None, results: list[dict[str, Any]]) -> dict[str, Any]:
    """What the Hub reads of the task, the tags and the metrics of the compressed model."""
    own: dict[str, Any] = {"pipeline_tag": task} if task else {}
    own["tags"] = list(dict.fromkeys((*_strings(facts.front.get("tags")), *_TAGS)))
    return {**own, "model-index": results} if results else own


def _strings(values: object) -> list[str]:
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []


def _result(model: str, task: str | None, dataset: str, metrics: Metrics) -> list[dict[str, Any]]:
    values = [{"type": name, "value": value, "name": name} for name, value in metrics.get("compressed", {}).items()]
    if not task or not values:
        return []
    result = {"task": {"type": task}, "dataset": {"type": dataset, "name": dataset}, "metrics": values}
    return [{"name": model.rpartition("/")[2], "results": [result]}]


def _body(facts: Facts, base_model: str | None, metrics: Metrics, name: str) -> str:
    rows = table_rows(facts.structure, facts.costs, facts.sizes, metrics, size_name="bytes of tensors")
    parts = format_table(("part", "bytes"), [(part, f"{size:,}") for part, size in facts.parts.items()])
    sections = [
        f"# {_cell(name)}",
        summary(facts, base_model),
        "## Before and after\n\n" + format_table(("", "dense", "compressed"), rows) + "\n\n" + how_counted(facts),
        f"## Layer by layer\n\n![What is kept of every layer, and at how many bits]({PICTURE_NAME})\n\n"
        + _details("As a table", _layer_table(layer_grid(facts.structure))),
        f"## Bytes\n\n{parts}",
        "## How to load it\n\n" + "\n\n".join(_way(way) for way in ways_to_load(facts, name)),
    ]
    if facts.config:
        sections.append("## GETAConfig\n\n" + _fenced(json.dumps(facts.config, indent=2), "json"))
    versions = "; ".join(f"{name} {version}" for name, version in facts.versions.items())
    return "\n\n".join((*sections, f"## Versions\n\n{_cell(versions)}"))


_COUNTED = (
    "Where a dense size is given, it is that of the same architecture before anything was cut, in the same dtype. BOPs "
    "are MACs · bits of the weight · bits of the input, 32 for a float side: the paper counts the quantized linears "
    "alone, the full count every matmul and embedding."
)


def how_counted(facts: Facts) -> str:
    """What the figures of the table mean, in a sentence or two."""
    if not (dropped := len(facts.structure.dropped)):
        return _COUNTED
    layers = "one layer that was" if dropped == 1 else f"{dropped} layers that were"
    return f"{_COUNTED} Parameters, MACs and BOPs of the dense model leave out the {layers} removed whole."


def summary(facts: Facts, base_model: str | None) -> str:
    """Two sentences: what this is, and how it was made; Markdown that HTML shows as it is."""
    kept = sum(left for left, _ in facts.structure.kept.values())
    before = sum(total for _, total in facts.structure.kept.values())
    source = f" from {_cell(base_model)}" if base_model else ""
    pruned = f"{kept:,} of {before:,} groups of weights are left" if kept < before else "no group was cut away"
    layers = f"{len(facts.structure.dropped)} layers were removed whole, " if facts.structure.dropped else ""
    widths = sorted(set(facts.structure.bits.values()))
    between = f"{widths[0]} bits" if len(widths) == 1 else f"{widths[0]} to {widths[-1]} bits" if widths else ""
    packed = f", and {len(facts.structure.bits)} layers are stored at {between}" if widths else ""
    return (
        f"A {_cell(facts.architecture)}{source}, compressed with GETA (joint structured pruning and quantization while "
        f"it is fine-tuned): {layers}{pruned}{packed}."
    )


def ways_to_load(facts: Facts, name: str) -> list[Way]:
    """Code that loads a folder: with geta_hf, without it where the folder carries its own code, and for use.

    Args:
        facts: of the folder.
        name: of the folder, or on the Hub.
    """
    from transformers.pipelines import SUPPORTED_TASKS  # slow to import

    quoted, auto = json.dumps(name), facts.auto_class
    flag = ", trust_remote_code=True" if facts.remote_code else ""
    load = f"from transformers import {auto}\n\nmodel = {auto}.from_pretrained({quoted}"
    ways = [Way("With geta_hf", f"import geta_hf  # registers the format\n{load})", "python")]
    if facts.remote_code:
        ways.append(Way("Without geta_hf: the folder carries the code that reads it", f"{load}{flag})", "python"))
    if auto in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM"):
        tail = ",trust_remote_code=True" if facts.remote_code else ""
        command = f"lm_eval --model hf --model_args pretrained={name}{tail} --tasks lambada_openai"
        ways.append(Way("In lm-evaluation-harness", command, "bash"))
    elif facts.task in SUPPORTED_TASKS:
        first = "" if facts.remote_code else "import geta_hf\n"
        call = f"pipe = pipeline({json.dumps(facts.task)}, model={quoted}{flag})"
        ways.append(Way("As a pipeline", f"{first}from transformers import pipeline\n\n{call}", "python"))
    else:
        call = f"model, report = load_for_inference({auto}, {quoted})"
        code = f"from geta_hf.inference import load_for_inference\nfrom transformers import {auto}\n\n{call}"
        ways.append(Way("For inference, every layer on its fastest exact path", code, "python"))
    return ways


def table_of(grid: Grid) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A grid as head and lines of a table, the longer side downwards: one line a layer as long as rows are few."""
    head = [f"{row.label}, bits" if row.section == BITS else f"{row.label}, {row.section}" for row in grid.rows]
    if len(grid.rows) <= max(len(grid.columns), 8):
        lines = [(column, *(_entry(row, column) for row in grid.rows)) for column in grid.columns]
        return ("layer", *head), lines
    lines = [
        (name, *(_entry(row, column) for column in grid.columns)) for name, row in zip(head, grid.rows, strict=True)
    ]
    return ("", *grid.columns), lines


def _entry(row: Row, column: str) -> str:
    return row.cells[column].text if column in row.cells else ""


def _layer_table(grid: Grid) -> str:
    head, lines = table_of(grid)
    return format_table(_cells(head), [_cells(line) for line in lines])


def _cells(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(_cell(text) for text in texts)


def _cell(text: str) -> str:
    """Text that stands in Markdown and in a table of it as it is."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", printable(" ".join(text.split())))


def _details(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def _way(way: Way) -> str:
    return f"{way.title}:\n\n{_fenced(way.code, way.language)}"


def _fenced(text: str, language: str) -> str:
    return f"```{language}\n{text}\n```"
