"""Write one self-contained HTML page about an exported folder: what it is, its size and costs, how to load it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from geta_hf.errors import GETAError
from geta_hf.reporting.comparison import Metrics, load_model, table_rows
from geta_hf.reporting.folder_summary import FolderSummary, check_metrics, read_summary
from geta_hf.reporting.latency import measure_latency
from geta_hf.reporting.model_card import Way, how_counted, table_of, ways_to_load
from geta_hf.reporting.structure_svg import draw, layer_grid, printable
from geta_hf.serialization.sizes import tensor_bytes
from geta_hf.utils.files import write_whole

Lines = Sequence[Sequence[str]]


def write_report(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    dense: str | os.PathLike[str] | None = None,
    metrics: Metrics | None = None,
) -> Path:
    """Write one HTML page about an exported folder. It needs no network and runs no script.

    Args:
        folder: an exported folder.
        out: the file to write; its folder must exist. An existing file is replaced in one step.
        dense: folder of the dense model. If given, its size is measured, and the latency of both models on the CPU.
        metrics: {"dense": {"em": …}, "compressed": {"em": …}}; by default those of geta_metrics.json in the folder.

    Returns:
        `out`.

    Raises:
        GETAError: not an exported folder, metrics that are not finite numbers, or `out` cannot be written.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from geta_hf import PruningSpace, attach_quantizers, export, write_report
        >>> _ = torch.manual_seed(0)
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))
        >>> _ = attach_quantizers(model, initial_bits=8, target_bits=8)
        >>> batch = {"input_ids": torch.arange(8).view(1, 8)}
        >>> home = tempfile.TemporaryDirectory()
        >>> small = export(model, Path(home.name) / "small", space=PruningSpace(()), batch=batch).path
        >>> write_report(small, Path(home.name) / "report.html").name
        'report.html'
        >>> home.cleanup()
    """
    target = Path(out)
    # Before the summary and the latency, which take minutes for a large model.
    if not target.parent.is_dir() or target.is_dir():
        raise GETAError(f"cannot write a report to {target}: name a file in a folder that exists")
    summary = read_summary(folder)
    found: Metrics = summary.metrics if metrics is None else check_metrics(metrics, "metrics")
    sizes = summary.sizes
    if dense is not None:
        sizes["dense"] = tensor_bytes(dense)
        found = {**found, **_latency(summary, dense)}
    write_whole(target, _filled(_parts(summary, sizes, found)))
    return target


def _latency(summary: FolderSummary, dense: str | os.PathLike[str]) -> dict[str, dict[str, float]]:
    """Measure both models on what the MACs are of; return nothing for a model that needs other inputs."""
    # MACs are 0 for a model that neither token ids nor an image alone can run, which can't be timed like that either.
    if not summary.costs or not summary.costs["dense"].macs:
        return {}
    models = {"dense": load_model(dense), "compressed": load_model(summary.folder)}
    costs = summary.costs["dense"]
    return {"latency_ms": measure_latency(models, costs.tokens, image=costs.image)}


def _filled(parts: Mapping[str, str]) -> str:
    template = Path(__file__).with_name("html_report.html").read_text(encoding="utf-8")
    # By a function, since backslashes in a replacement text would be read as escapes. In one pass, so that a model's
    # name that looks like a hole is not filled.
    return re.sub(r"{{(\w+)}}", lambda hole: parts[hole[1]], template)


def _parts(summary: FolderSummary, sizes: Mapping[str, int], metrics: Metrics) -> dict[str, str]:
    name = summary.folder.resolve().name
    grid = layer_grid(summary.structure)
    head, lines = table_of(grid)
    rows = table_rows(summary.structure, summary.costs, sizes, metrics, size_name="bytes of tensors")
    return {
        "title": printable(name),
        "facts": _facts(summary),
        "tiles": "".join(_tile(*tile) for tile in _tiles(summary, sizes)),
        "rows": _table(("", "dense", "compressed"), rows),
        "counted": printable(how_counted(summary)),
        "picture": draw(grid) if grid.rows else "<p>No layer was cut or quantized.</p>",
        "layers": _table(head, lines),
        "bytes": _bytes(summary.parts),
        "ways": "".join(_way(way) for way in ways_to_load(summary, name)),
        "config": _config(summary.config),
        "versions": _table(("", ""), list(summary.versions.items())),
    }


def _facts(summary: FolderSummary) -> str:
    entries = {
        "base model": summary.base_model,
        "task": summary.front.get("pipeline_tag") or summary.task,
        "class": summary.architecture,
        "data of the metrics": ", ".join(summary.datasets),
    }
    return "".join(f"<div><dt>{key}</dt><dd>{printable(value)}</dd></div>" for key, value in entries.items() if value)


def _tiles(summary: FolderSummary, sizes: Mapping[str, int]) -> list[tuple[str, str, str]]:
    """Return the most important numbers, each as label, value and what it is compared with."""
    tiles = []
    if "dense" in sizes:
        words = f"{short_bytes(sizes['compressed'])} of {short_bytes(sizes['dense'])}"
        tiles.append(("size", f"{sizes['compressed'] / max(sizes['dense'], 1):.1%}", words))
    else:
        tiles.append(("size", short_bytes(sizes["compressed"]), "of tensors"))
    if summary.costs:
        dense = summary.costs["dense"]
        compressed = summary.costs["compressed"]
        kept = f"{compressed.parameters:,} of {dense.parameters:,}"
        tiles.append(("parameters kept", f"{compressed.parameters / max(dense.parameters, 1):.1%}", kept))
        if summary.structure.bits:
            words = f"in {len(compressed.layers)} layers, a step size for each {summary.grid}"
            tiles.append(("mean bits", f"{compressed.mean_bits:.2f}", words))
        if dense.macs and dense.bops_linear:
            tiles.append(("relative BOPs", f"{compressed.bops_linear / dense.bops_linear:.2%}", "of quantized linears"))
    return tiles


def short_bytes(size: int) -> str:
    """Format bytes in GB, MB or kB (powers of 1000), with one decimal."""
    for unit, letters in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {letters}"
    return f"{size} bytes"


def _tile(label: str, value: str, words: str) -> str:
    return f"<div class='tile'><b>{printable(value)}</b><span>{label}</span><small>{printable(words)}</small></div>"


def _table(head: Sequence[str], lines: Lines) -> str:
    top = "".join(f"<th scope='col'>{printable(cell)}</th>" for cell in head) if any(head) else ""
    return (
        f"<table>{f'<thead><tr>{top}</tr></thead>' if top else ''}<tbody>{''.join(map(_line, lines))}</tbody></table>"
    )


def _line(cells: Sequence[str]) -> str:
    rest = "".join(f"<td>{printable(cell)}</td>" for cell in cells[1:])
    return f"<tr><th scope='row'>{printable(cells[0])}</th>{rest}</tr>"


def _bytes(parts: Mapping[str, int]) -> str:
    # A part of a few bytes still gets a visible strip.
    total = max(sum(parts.values()), 1)
    bars = "".join(
        f"<i class='part{place}' style='flex-grow:{max(size / total, 0.002):.4f}' title='{printable(name)}'></i>"
        for place, (name, size) in enumerate(parts.items())
    )
    lines = "".join(
        f"<tr><th scope='row'><i class='chip part{place}'></i>{printable(name)}</th><td>{size:,}</td>"
        f"<td>{size / total:.1%}</td></tr>"
        for place, (name, size) in enumerate(parts.items())
    )
    return f"<div class='stack'>{bars}</div><table><tbody>{lines}</tbody></table>"


def _way(way: Way) -> str:
    return f"<h3>{printable(way.title)}</h3><pre><code>{printable(way.code)}</code></pre>"


def _config(config: Mapping[str, Any]) -> str:
    if not config:
        return "<p>The config was not saved with the model.</p>"
    return _table(("", ""), [(name, json.dumps(value, ensure_ascii=False)) for name, value in config.items()])
