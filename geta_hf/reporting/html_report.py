"""One self-contained HTML page about an exported folder: what it is, what it cost, what is left, how to load it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from geta_hf.errors import GETAError
from geta_hf.reporting.comparison import Metrics, load_model, measure_latency, table_rows
from geta_hf.reporting.folder_summary import Facts, check_metrics, read_facts
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
        out: the file to write; its folder must exist. What stood there is replaced in one step.
        dense: the folder of the model before; then its size is measured, and the latency of both on this machine's CPU.
        metrics: {"dense": {"em": …}, "compressed": {"em": …}}; by default those of geta_metrics.json in the folder.

    Returns:
        `out`.

    Raises:
        GETAError: no exported folder, metrics that are no finite numbers, or no place to write to.
    """
    target = Path(out)
    if not target.parent.is_dir() or target.is_dir():
        raise GETAError(f"cannot write a report to {target}: name a file in a folder that exists")
    facts = read_facts(folder)
    found: Metrics = facts.metrics if metrics is None else check_metrics(metrics, "metrics")
    sizes = facts.sizes
    if dense is not None:
        sizes["dense"] = tensor_bytes(dense)
        found = {**found, **_latency(facts, dense)}
    write_whole(target, _filled(_parts(facts, sizes, found)))
    return target


def _latency(facts: Facts, dense: str | os.PathLike[str]) -> dict[str, dict[str, float]]:
    """Of both models on token ids, on as long a sequence as the MACs; nothing for a model that takes other inputs."""
    if not facts.costs or not facts.costs["dense"].macs:
        return {}
    models = {"dense": load_model(dense), "compressed": load_model(facts.folder)}
    return {"latency_ms": measure_latency(models, facts.costs["dense"].tokens)}


def _filled(parts: Mapping[str, str]) -> str:
    template = Path(__file__).with_name("html_report.html").read_text(encoding="utf-8")
    return re.sub(r"{{(\w+)}}", lambda hole: parts[hole[1]], template)


def _parts(facts: Facts, sizes: Mapping[str, int], metrics: Metrics) -> dict[str, str]:
    name = facts.folder.resolve().name
    grid = layer_grid(facts.structure)
    head, lines = table_of(grid)
    rows = table_rows(facts.structure, facts.costs, sizes, metrics, size_name="bytes of tensors")
    return {
        "title": printable(name),
        "facts": _facts(facts),
        "tiles": "".join(_tile(*tile) for tile in _tiles(facts, sizes)),
        "rows": _table(("", "dense", "compressed"), rows),
        "counted": printable(how_counted(facts)),
        "picture": draw(grid) if grid.rows else "<p>No layer was cut or quantized.</p>",
        "layers": _table(head, lines),
        "bytes": _bytes(facts.parts),
        "ways": "".join(_way(way) for way in ways_to_load(facts, name)),
        "config": _config(facts.config),
        "versions": _table(("", ""), list(facts.versions.items())),
    }


def _facts(facts: Facts) -> str:
    told = {
        "base model": facts.base_model,
        "task": facts.front.get("pipeline_tag") or facts.task,
        "class": facts.architecture,
        "data of the metrics": facts.dataset,
    }
    return "".join(f"<div><dt>{key}</dt><dd>{printable(value)}</dd></div>" for key, value in told.items() if value)


def _tiles(facts: Facts, sizes: Mapping[str, int]) -> list[tuple[str, str, str]]:
    """The few numbers that matter most: what, how much, compared with what."""
    tiles = []
    if "dense" in sizes:
        words = f"{short_bytes(sizes['compressed'])} of {short_bytes(sizes['dense'])}"
        tiles.append(("size", f"{sizes['compressed'] / max(sizes['dense'], 1):.1%}", words))
    else:
        tiles.append(("size", short_bytes(sizes["compressed"]), "of tensors"))
    if facts.costs:
        dense, small = facts.costs["dense"], facts.costs["compressed"]
        kept = f"{small.parameters:,} of {dense.parameters:,}"
        tiles.append(("parameters kept", f"{small.parameters / max(dense.parameters, 1):.1%}", kept))
        if facts.structure.bits:
            tiles.append(("mean bits", f"{small.mean_bits:.2f}", f"in {len(small.layers)} layers"))
        if dense.macs and dense.bops_linear:
            tiles.append(("relative BOPs", f"{small.bops_linear / dense.bops_linear:.2%}", "of quantized linears"))
    return tiles


def short_bytes(size: int) -> str:
    """Bytes in the unit that leaves one to four digits before the point, powers of 1000."""
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
        return "<p>It was not saved with the model.</p>"
    return _table(("", ""), [(name, json.dumps(value, ensure_ascii=False)) for name, value in config.items()])
