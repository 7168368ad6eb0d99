"""Write the model card: README.md with the front matter that the Hub reads, and a description for people."""

from __future__ import annotations

import html
import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache

from geta_hf.errors import GETAError
from geta_hf.export.export import PICTURE_NAME
from geta_hf.reporting.comparison import Metrics, table_rows
from geta_hf.reporting.folder_summary import (
    CARD_NAME,
    LOCAL_BASE,
    METRICS_NAME,
    FolderSummary,
    check_metrics,
    read_front,
    read_metrics,
    read_summary,
)
from geta_hf.reporting.graph_page import gather
from geta_hf.reporting.results import (
    RESULTS_NAME,
    Results,
    TaskResult,
    as_json,
    merge_results,
    metrics_of,
    read_results,
    result_rows,
)
from geta_hf.reporting.structure_svg import BITS, Grid, Row, draw, layer_grid, printable
from geta_hf.utils.files import write_whole
from geta_hf.utils.tables import format_table

_BASE_KEYS = ("base_model", "base_model_relation", LOCAL_BASE)
_LICENSE_KEYS = ("license", "license_name", "license_link")
_UNKNOWN_LICENSE = "unknown"
"""The Hub's own word, which its check of the metadata accepts."""

_TAGS = ("geta", "pruned", "quantized")
_PAPER = "https://arxiv.org/abs/2502.16638"
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Way:
    """Hold one way to load a folder: its title, and the code in `language` (python or bash)."""

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
    results: Results | None = None,
    front: Mapping[str, Any] | None = None,
) -> Path:
    """Write the model card of an exported folder, its picture, and the metrics if they are given.

    A later call, for example with new metrics, takes the values of omitted arguments from the existing card and metrics
    and writes the rest of the card again.

    Args:
        folder: an exported folder.
        base_model: name on the Hub of the dense model. Of a local path, the card shows the last part without a link.
        task: the Hub's tag of a pipeline; by default that of the architecture.
        dataset: name of the data on which the metrics were measured.
        metrics: {"dense": {"em": …}, "compressed": {"em": …}}, and "latency_ms" of both; stored in geta_metrics.json.
        repo_id: name on the Hub that the examples load; by default the folder's name.
        results: {"dense": [TaskResult, …], "compressed": […]}: metrics with the data, split and number of samples that
            they were measured on, and standard errors; stored in geta_results.json. One block of the metadata each.
        front: further entries of the YAML front matter, such as {"license": "mit"}. The license is by default that of
            the base model's card, if it is in a local folder or in the Hub's cache, and otherwise `unknown`.

    Returns:
        The path of the card.

    Raises:
        GETAError: not an exported folder, or metrics that are not finite numbers.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from geta_hf import PruningSpace, attach_quantizers, export, write_card
        >>> _ = torch.manual_seed(0)
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))
        >>> _ = attach_quantizers(model, initial_bits=8, target_bits=8)
        >>> batch = {"input_ids": torch.arange(8).view(1, 8)}
        >>> home = tempfile.TemporaryDirectory()
        >>> small = export(model, Path(home.name) / "small", space=PruningSpace(()), batch=batch).path
        >>> card = write_card(small, task="text-generation", metrics={"compressed": {"perplexity": 15.8}})
        >>> card.name, "perplexity" in card.read_text()
        ('README.md', True)
        >>> home.cleanup()
    """
    path = Path(folder)
    known = read_metrics(path)
    # Checked before anything is written, since the file is read again by every later report.
    fresh = check_metrics(metrics or {}, "metrics")
    scores = merge_results(_updated(read_results(path), fresh), results or {})
    for side, entries in (results or {}).items():
        fresh[side] = {**fresh.get(side, {}), **metrics_of(entries)}
    merged = {side: {**known.get(side, {}), **fresh.get(side, {})} for side in (*known, *fresh)}
    summary = replace(read_summary(path), results=scores)
    if front:
        summary = replace(summary, front={**summary.front, **front})
    text = _card(summary, base_model, task, dataset, merged, repo_id)
    # Written last and in this order: what fails in reading or composing leaves the old card and its metrics as they
    # were.
    if fresh:
        write_whole(path / METRICS_NAME, json.dumps(merged, indent=2) + "\n")
    if scores:
        write_whole(path / RESULTS_NAME, as_json(scores))
    write_whole(path / PICTURE_NAME, draw(layer_grid(summary.structure), standalone=True))
    write_whole(path / CARD_NAME, text)
    return path / CARD_NAME


def _updated(results: Results, metrics: Metrics) -> dict[str, list[TaskResult]]:
    """Return results in which a metric that is given again has its new value, whose error is not known."""
    found: dict[str, list[TaskResult]] = {}
    for side, entries in results.items():
        new = metrics.get(side, {})
        for one in entries:
            values = {name: new.get(name, value) for name, value in one.metrics.items()}
            errors = {name: error for name, error in one.stderr.items() if values.get(name) == one.metrics.get(name)}
            found.setdefault(side, []).append(replace(one, metrics=values, stderr=errors))
    return found


def model_card(
    folder: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    task: str | None = None,
    dataset: str | None = None,
    metrics: Metrics | None = None,
    repo_id: str | None = None,
) -> str:
    """Return the text of a model card: YAML front matter and Markdown. Nothing is written; see `write_card`.

    Args:
        folder: an exported folder.
        base_model: as in `write_card`.
        task: as in `write_card`.
        dataset: as in `write_card`.
        metrics: by default those of geta_metrics.json.
        repo_id: as in `write_card`.

    Raises:
        GETAError: not an exported folder, or metrics that are not finite numbers.
    """
    summary = read_summary(folder)
    found = summary.metrics if metrics is None else check_metrics(metrics, "metrics")
    return _card(summary, base_model, task, dataset, found, repo_id)


def _card(
    summary: FolderSummary,
    base_model: str | None,
    task: str | None,
    dataset: str | None,
    metrics: Metrics,
    repo_id: str | None,
) -> str:
    """Return the text; the folder's card, then its architecture, supply the arguments that are None."""
    base = _base(summary, base_model)
    dataset = dataset or summary.dataset
    task = task or summary.front.get("pipeline_tag") or summary.task
    # A folder's name may hold bytes that are not UTF-8, which no file of text can.
    name = (repo_id or summary.folder.resolve().name).encode(errors="replace").decode()
    license = _license(summary.front, base_model or base.get("base_model"))
    replaced = {*_BASE_KEYS, *_LICENSE_KEYS} - set(license)
    # What a user added to the card by hand remains.
    kept = {key: value for key, value in summary.front.items() if key not in replaced}
    own = _front(summary, task, _index(name, task, dataset or "unknown", metrics, summary.results))
    front = kept | {"library_name": "transformers"} | license | base | own
    shown = base.get("base_model") or base.get(LOCAL_BASE)
    body = _body(summary, shown, metrics, name, license)
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n{body}\n"


def card_under(folder: Path, repo_id: str) -> bytes:
    """Return the folder's card with the name of a repository wherever `write_card` put the folder's name.

    A card that a person wrote, whose examples do not load the name in its title, is returned as it is.
    """
    content = (folder / CARD_NAME).read_bytes()
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return content
    head, body = _split_front(text)
    title = re.search(r"^# (.*)$", body, re.MULTILINE)
    if title is None:
        return content
    name = html.unescape(re.sub(r"\\([\\`*_\[\]|])", r"\1", title[1]))
    renamed = re.sub(
        r"^```(?:python|bash)\n.*?^```$", lambda fence: _renamed(fence[0], name, repo_id), body, flags=re.M | re.S
    )
    if renamed == body:
        return content
    renamed = renamed.replace(title[0], f"# {_cell(repo_id)}", 1)
    before, after = (yaml.safe_dump([{"name": _leaf(each)}], allow_unicode=True) for each in (name, repo_id))
    return (head.replace(f"\n{before}", f"\n{after}", 1) + renamed).encode()


def _split_front(text: str) -> tuple[str, str]:
    found = re.match(r"---\r?\n.*?\r?\n---", text, re.DOTALL)
    end = 0 if found is None else found.end()
    return text[:end], text[end:]


def _renamed(code: str, name: str, repo_id: str) -> str:
    code = code.replace(_quoted(name), _quoted(repo_id))
    for remote_code in (True, False):
        before, after = (_model_args(each, remote_code) for each in (name, repo_id))
        code = code.replace(f" {before} ", f" {after} ")
    return code


def _leaf(name: str) -> str:
    return name.rpartition("/")[2]


def _license(front: Mapping[str, Any], base_model: str | None) -> dict[str, Any]:
    """Return the front matter's entries for the license: the card's own, then the base model's, then unknown."""
    for entries in (front, _front_of(base_model)):
        found = entries.get("license")
        if found and found != _UNKNOWN_LICENSE and (isinstance(found, str) or _strings(found) == found):
            return {key: entries[key] for key in _LICENSE_KEYS if key in entries}
    return {"license": _UNKNOWN_LICENSE}


def _front_of(model: str | None) -> dict[str, Any]:
    """Return the front matter of a model's card, if that is in a local folder or in the Hub's cache."""
    if not model:
        return {}
    folder = Path(model)
    if not folder.is_dir():
        cached = try_to_load_from_cache(model, CARD_NAME) if _REPO.fullmatch(model) else None
        if not isinstance(cached, str):
            return {}
        folder = Path(cached).parent
    try:
        return read_front(folder)
    except (GETAError, OSError):  # a damaged card of another model says nothing
        return {}


def _base(summary: FolderSummary, base_model: str | None) -> dict[str, Any]:
    """Return the front matter's entries for the base model; the Hub cannot link to a local path."""
    if not base_model:
        return {key: summary.front[key] for key in _BASE_KEYS if key in summary.front}
    # A relative path such as runs/dense looks like a name on the Hub.
    if _REPO.fullmatch(base_model) and not Path(base_model).exists():
        return {"base_model": base_model, "base_model_relation": "quantized"}
    return {LOCAL_BASE: Path(base_model).name}


def _front(summary: FolderSummary, task: str | None, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the front matter's entries for the task, the tags and the metrics of the compressed model."""
    own: dict[str, Any] = {"pipeline_tag": task} if task else {}
    own["tags"] = list(dict.fromkeys((*_strings(summary.front.get("tags")), *_TAGS)))
    return {**own, "model-index": results} if results else own


def _strings(values: object) -> list[str]:
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []


def _index(model: str, task: str | None, dataset: str, metrics: Metrics, results: Results) -> list[dict[str, Any]]:
    """Return the front matter's `model-index`: one block for each data set on which something was measured."""
    scored = results.get("compressed", ())
    known = metrics_of(scored)
    rest = {name: value for name, value in metrics.get("compressed", {}).items() if name not in known}
    blocks = [TaskResult(dataset, rest)] if rest else []
    entries = [_block(task, one) for one in (*blocks, *scored) if one.metrics]
    # An entry of the Hub's model-index has to have a task and metrics.
    return [{"name": _leaf(model), "results": entries}] if task and entries else []


def _block(task: str | None, one: TaskResult) -> dict[str, Any]:
    data: dict[str, Any] = {"type": one.data, "name": one.data}
    if one.split:
        data["split"] = one.split
    counts = {name: count for name, count in (("samples", one.samples), ("total", one.total)) if count is not None}
    if counts:
        data["args"] = counts
    values = []
    for name, value in one.metrics.items():
        entry: dict[str, Any] = {"type": name, "value": float(value), "name": name}
        if name in one.stderr:
            entry["args"] = {"stderr": float(one.stderr[name])}
        values.append(entry)
    return {"task": {"type": task}, "dataset": data, "metrics": values}


def _body(
    summary: FolderSummary, base_model: str | None, metrics: Metrics, name: str, license: Mapping[str, Any]
) -> str:
    rows = table_rows(summary.structure, summary.costs, summary.sizes, metrics, size_name="bytes of tensors")
    parts = format_table(("part", "bytes"), [(part, f"{size:,}") for part, size in summary.parts.items()])
    sections = [
        f"# {_cell(name)}",
        describe_folder(summary, base_model),
        f"{_license_line(license, base_model)}\nMethod: [GETA]({_PAPER}), CVPR 2025. Library: {_library()}.",
        "## Before and after\n\n"
        + format_table(("", "dense", "compressed"), [_cells(row) for row in rows])
        + "\n\n"
        + how_counted(summary),
    ]
    if scored := result_rows(summary.results):
        head = ("data", "split", "samples", "metric", "dense", "compressed")
        table = format_table(head, [_cells(row) for row in scored])
        sections.append(f"## Results\n\n{table}\n\nValues are followed by their standard error, if it is known.")
    sections += [
        f"## Layer by layer\n\n![What is kept of every layer, and at how many bits]({PICTURE_NAME})\n\n"
        + _details("As a table", _layer_table(layer_grid(summary.structure))),
        f"## Bytes\n\n{parts}",
    ]
    if untouched := _untouched(summary):
        sections.append("## What was left as it was\n\n" + untouched)
    sections.append("## How to load it\n\n" + "\n\n".join(_way(way) for way in ways_to_load(summary, name)))
    if summary.config:
        sections.append("## GETAConfig\n\n" + _fenced(json.dumps(summary.config, indent=2), "json"))
    versions = "; ".join(f"{name} {version}" for name, version in summary.versions.items())
    return "\n\n".join((*sections, f"## Versions\n\n{_cell(versions)}"))


def _library() -> str:
    """Return the library's name, as a link where its package says an address."""
    try:
        addresses = metadata("geta_hf").get_all("Project-URL") or []
    except PackageNotFoundError:
        addresses = []
    address = next((entry.partition(", ")[2] for entry in addresses), "")
    return f"[geta_hf]({address})" if address.startswith("https://") else "geta_hf"


def _license_line(license: Mapping[str, Any], base_model: str | None) -> str:
    found = license["license"]
    if found == _UNKNOWN_LICENSE:
        source = f"the base model, {_cell(base_model)}" if base_model else "the base model"
        return f"License: unknown; it is inherited from {source}."
    names = found if isinstance(found, list) else [license.get("license_name") or found]
    return f"License: {_cell(', '.join(map(str, names)))}."


def _untouched(summary: FolderSummary) -> str:
    """List what was neither pruned nor quantized, and why; layers that differ only in a number share a line."""
    reasons: dict[str, list[str]] = {}
    for family, reason in summary.untouched.not_pruned.items():
        reasons.setdefault(reason, []).append(family)
    lines = [f"- not pruned, {_cell(reason)}: {_listed(names)}" for reason, names in reasons.items()]
    for place, reason in summary.untouched.unsupported.items():
        lines.append(f"- not followed, {_cell(reason)}: {_cell(place)}")
    if summary.untouched.unseen:
        lines.append(f"- never read by the recorded inputs, so not pruned: {_listed(summary.untouched.unseen)}")
    if summary.float_layers:
        lines.append(f"- not quantized: {_listed(summary.float_layers)}")
    return _details("Families not pruned, layers not quantized", "\n".join(lines)) if lines else ""


def _listed(names: Sequence[str]) -> str:
    return ", ".join(_cells(gather(names)))


_COUNTED = (
    "A dense size is that of the same architecture before compression, in the same dtype. BOPs are MACs · bits of the "
    "weight · bits of the input, with 32 bits for floats. The paper's count covers only the quantized linear layers, "
    "the full count every matrix product and embedding."
)

_IMAGES = "quantized layers, the full count every convolution and matrix product"


def how_counted(summary: FolderSummary) -> str:
    """Explain the figures of the table in a few sentences."""
    counted = _COUNTED
    costs = summary.costs.get("dense")
    if costs is not None and costs.image is not None:
        counted = _COUNTED.replace(
            "quantized linear layers, the full count every matrix product and embedding", _IMAGES
        )
    dropped = len(summary.structure.dropped)
    if not dropped:
        return counted
    layers = "one layer that was" if dropped == 1 else f"{dropped} layers that were"
    return f"{counted} Parameters, MACs and BOPs of the dense model exclude the {layers} removed entirely."


_STEPS = {
    "layer": "",
    "channel": " with a step size for each output channel",
    "block32": " with a step size for every 32 inputs of an output channel",
}
"""What the sentence about a folder says of its grid; one step size for a layer goes without saying."""


def describe_folder(summary: FolderSummary, base_model: str | None) -> str:
    """Describe a model in one sentence of Markdown: what it is, and how it was made."""
    kept = sum(count for count, _ in summary.structure.kept.values())
    before = sum(total for _, total in summary.structure.kept.values())
    source = f" from {_cell(base_model)}" if base_model else ""
    pruned = f"{kept:,} of {before:,} groups of weights remain" if kept < before else "no group was removed"
    layers = f"{len(summary.structure.dropped)} layers were removed entirely, " if summary.structure.dropped else ""
    widths = sorted({bits for found in summary.structure.widths.values() for bits in found})
    packed = ""
    if widths:
        bits = str(widths[0]) if len(widths) == 1 else f"{widths[0]} to {widths[-1]}"
        packed = f", and {len(summary.structure.bits)} layers are stored at {bits} bits{_STEPS[summary.grid]}"
        if several := sum(len(found) > 1 for found in summary.structure.widths.values()):
            packed += f", {several} of them with a width for each row or column"
    return (
        f"A {_cell(summary.architecture)}{source}, compressed with GETA (joint structured pruning and quantization "
        f"during fine-tuning): {layers}{pruned}{packed}."
    )


def ways_to_load(summary: FolderSummary, name: str) -> list[Way]:
    """Return code that loads a folder: with geta_hf, without it if the folder carries its own code, and for use.

    Args:
        summary: of the folder.
        name: the folder's, or the repository's on the Hub.
    """
    from transformers.pipelines import SUPPORTED_TASKS  # slow to import

    quoted = _quoted(name)
    auto = summary.auto_class
    flag = ", trust_remote_code=True" if summary.remote_code else ""
    load = f"from transformers import {auto}\n\nmodel = {auto}.from_pretrained({quoted}"
    ways = [Way("With geta_hf", f"import geta_hf  # registers the format\n{load})", "python")]
    if summary.remote_code:
        ways.append(Way("Without geta_hf: the folder carries the code that reads it", f"{load}{flag})", "python"))
    if auto in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM"):
        # lm-eval does not import geta_hf, so it needs the carried code.
        command = f"lm_eval --model hf --model_args {_model_args(name, summary.remote_code)} --tasks lambada_openai"
        ways.append(Way("In lm-evaluation-harness", command, "bash"))
    elif summary.task in SUPPORTED_TASKS:
        # A pipeline loads by name: either the folder carries its code or the format is registered before.
        first = "" if summary.remote_code else "import geta_hf\n"
        call = f"pipe = pipeline({json.dumps(summary.task)}, model={quoted}{flag})"
        ways.append(Way("As a pipeline", f"{first}from transformers import pipeline\n\n{call}", "python"))
    else:
        call = f"model, report = load_for_inference({auto}, {quoted})"
        code = f"from geta_hf.inference import load_for_inference\nfrom transformers import {auto}\n\n{call}"
        ways.append(Way("For inference, every layer on its fastest exact path", code, "python"))
    return ways


def _quoted(name: str) -> str:
    """Return a name as a string of Python."""
    return json.dumps(name, ensure_ascii=False)


def _model_args(name: str, remote_code: bool = False) -> str:
    """Return lm-eval's argument that loads a folder, quoted for a shell."""
    if "," in name or "=" in name:  # which separate lm-eval's arguments
        values = {"pretrained": name} | ({"trust_remote_code": True} if remote_code else {})
        return shlex.quote(json.dumps(values, ensure_ascii=False))
    return shlex.quote(f"pretrained={name}{',trust_remote_code=True' if remote_code else ''}")


def table_of(grid: Grid) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return a grid as head and lines of a table: one line for each layer, or one for each row if those are many."""
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
    """Escape text for Markdown and for its tables."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", printable(" ".join(text.split())))


def _details(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def _way(way: Way) -> str:
    return f"{way.title}:\n\n{_fenced(way.code, way.language)}"


def _fenced(text: str, language: str) -> str:
    return f"```{language}\n{text}\n```"
