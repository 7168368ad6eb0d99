"""What a compression achieved: one table, dense beside compressed, and a picture of what is left of every layer."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from geta_hf.config import CONFIG_NAME, GETAConfig
from geta_hf.costs.model_costs import Costs, bytes_on_disk, measure_costs
from geta_hf.errors import GETAError
from geta_hf.export.export import STRUCTURE_NAME
from geta_hf.quantization import select_layers
from geta_hf.serialization.hf_quantizer import QUANT_METHOD
from geta_hf.serialization.validate import check_readable, read_json
from geta_hf.utils.tables import format_table

Metrics = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Structure:
    """What an export left of a model.

    Attributes:
        kept: family -> (groups kept, groups before), in model order.
        bits: module path -> bits of its packed weight, in model order.
        activation_bits: module path -> bits of its input, for the layers that round it; in model order.
        dropped: paths that whole layers had in the dense model, which left before anything else.
    """

    kept: dict[str, tuple[int, int]]
    bits: dict[str, int]
    activation_bits: dict[str, int] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    def of_kind(self, kind: str) -> list[tuple[int, int]]:
        """(kept, before) of every family of a kind, such as `heads`, in model order."""
        return [counts for name, counts in self.kept.items() if name.rpartition(":")[2] == kind]


def read_structure(folder: str | os.PathLike[str]) -> Structure:
    """Read what `export` wrote beside the model. Raises GETAError for a folder without it."""
    path = Path(folder) / STRUCTURE_NAME
    if not path.is_file() and is_export(Path(folder)):
        raise GETAError(
            f"{folder} has no {STRUCTURE_NAME}, which save_pretrained leaves out; run `geta-hf export {folder} OUT`, "
            f"which makes it anew"
        )
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        kept = {name: (int(left), int(before)) for name, (left, before) in stored["kept"].items()}
        widths = (stored["bits"], stored.get("activation_bits", {}))  # a folder of before has no such key
        bits, inputs = ({name: int(bits) for name, bits in part.items()} for part in widths)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise GETAError(f"{path} can't be read ({error}); is {folder} an exported folder?") from error
    dropped = _run_config(folder).drop_layers
    return Structure(kept, bits, inputs, tuple(dropped) if isinstance(dropped, list) else ())


def is_export(folder: Path) -> bool:
    """Whether a folder's config.json says that it is in geta_hf's own format."""
    try:
        stored = read_json(folder / "config.json").get("quantization_config")
    except GETAError:
        return False
    return isinstance(stored, dict) and stored.get("quant_method") == QUANT_METHOD


def _run_config(folder: str | os.PathLike[str]) -> GETAConfig:
    """What the run was asked for; the defaults where that was not saved."""
    path = Path(folder) / CONFIG_NAME
    return GETAConfig.load(path) if path.is_file() else GETAConfig()


def load_model(folder: str | os.PathLike[str]) -> PreTrainedModel:
    """A dense or exported folder as the class that saved it."""
    check_readable(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    if not config.architectures:
        raise GETAError(f"{folder}/config.json names no architecture; save the model with save_pretrained")
    model_class: Any = getattr(transformers, config.architectures[0], None)
    if model_class is None:
        raise GETAError(f"{folder}: transformers has no class {config.architectures[0]}")
    return model_class.from_pretrained(folder).eval()


@torch.no_grad()
def measure_latency(models: Mapping[str, PreTrainedModel], tokens: int, repeats: int = 30) -> dict[str, float]:
    """Median milliseconds of a forward pass on one sequence on CPU, the models taking turns in this process."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + 3):  # the first three warm up
        for name, model in models.items():
            ids = torch.ones(1, tokens, dtype=torch.long, device=model.device)
            start = time.perf_counter()
            model(ids)
            if turn >= 3:
                seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(times) for name, times in seconds.items()}


def compare(
    dense_dir: str | os.PathLike[str],
    compressed_dir: str | os.PathLike[str],
    *,
    tokens: int = 384,
    metrics: Metrics | None = None,
) -> str:
    """A table, dense beside compressed.

    Args:
        dense_dir: a plain model folder.
        compressed_dir: what `export` wrote of the same architecture.
        tokens: sequence length of MACs, BOPs and latency.
        metrics: {"dense": {"em": …}, "compressed": {"em": …}}, the first rows of the table.
    """
    structure = read_structure(compressed_dir)
    models = {"dense": load_model(dense_dir), "compressed": load_model(compressed_dir)}
    layers = {"dense": _dense_layers(models["dense"], compressed_dir, structure), "compressed": list(structure.bits)}
    costs = {name: measure_costs(model, tokens, layers[name]) for name, model in models.items()}
    sizes = {"dense": bytes_on_disk(dense_dir), "compressed": bytes_on_disk(compressed_dir)}
    measured = {**(metrics or {}), "latency_ms": measure_latency(models, tokens)}
    return format_table(("", "dense", "compressed"), table_rows(structure, costs, sizes, measured, by_layer=True))


def _dense_layers(dense: PreTrainedModel, folder: str | os.PathLike[str], structure: Structure) -> list[str]:
    """The layers of the dense model that were quantized, or would have been had they not left with a whole layer."""
    if not structure.dropped:
        return list(structure.bits)
    config = _run_config(folder)
    return list(select_layers(dense, config.include, config.exclude))


def table_rows(
    structure: Structure,
    costs: Mapping[str, Costs],
    sizes: Mapping[str, int],
    metrics: Metrics,
    *,
    size_name: str = "bytes on disk",
    by_layer: bool = False,
) -> list[tuple[str, str, str]]:
    """The rows of a table, dense beside compressed: name, dense, compressed; what was not measured is left out.

    Args:
        structure: what was kept.
        costs: "dense" and "compressed", or nothing; without MACs, BOPs are left out too.
        sizes: bytes of "dense" and "compressed"; either may lack.
        metrics: "dense", "compressed" and "latency_ms".
        size_name: what `sizes` counts.
        by_layer: list what every layer keeps, instead of the sum.
    """
    rows = _metric_rows(metrics)
    rows += [("layers removed", "", ", ".join(structure.dropped))] if structure.dropped else []
    rows += _layer_rows(structure) if by_layer else _kind_rows(structure)
    rows += _group_rows(structure)
    rows += _cost_rows(costs["dense"], costs["compressed"]) if costs else []
    if "compressed" in sizes:
        rows.append(_share(size_name, sizes["compressed"], sizes.get("dense")))
    if times := metrics.get("latency_ms"):
        ratio = times["dense"] / times["compressed"]
        rows.append(("CPU latency, ms", f"{times['dense']:.2f}", f"{times['compressed']:.2f} ({ratio:.2f}x faster)"))
    return rows


def _metric_rows(metrics: Metrics) -> list[tuple[str, str, str]]:
    dense, compressed = metrics.get("dense", {}), metrics.get("compressed", {})
    names = [name for name in dict.fromkeys((*dense, *compressed)) if name in compressed]
    return [(name.upper(), f"{dense[name]:.2f}" if name in dense else "", f"{compressed[name]:.2f}") for name in names]


def _kinds(structure: Structure) -> list[str]:
    return list(dict.fromkeys(name.rpartition(":")[2] for name in structure.kept))


def _layer_rows(structure: Structure) -> list[tuple[str, str, str]]:
    counts = {kind: structure.of_kind(kind) for kind in _kinds(structure)}
    return [
        (f"{kind} a layer", " ".join(str(total) for _, total in own), " ".join(str(left) for left, _ in own))
        for kind, own in counts.items()
    ]


def _kind_rows(structure: Structure) -> list[tuple[str, str, str]]:
    sums = {kind: [sum(column) for column in zip(*structure.of_kind(kind), strict=True)] for kind in _kinds(structure)}
    return [_share(kind, left, before) for kind, (left, before) in sums.items()]


def _group_rows(structure: Structure) -> list[tuple[str, str, str]]:
    total = sum(before for _, before in structure.kept.values())
    left = sum(kept for kept, _ in structure.kept.values())
    rows = [("groups", f"{total:,}", f"{left:,} ({left / max(total, 1):.1%})")]
    if rounded := structure.activation_bits:
        mean, share = statistics.mean(rounded.values()), f"{len(rounded)} of {len(structure.bits)} layers"
        rows.append(("mean bits of inputs", "32.00", f"{mean:.2f} ({share})"))
    return rows


def _share(name: str, new: float, old: float | None) -> tuple[str, str, str]:
    return (name, f"{old:,.0f}", f"{new:,.0f} ({new / old:.1%})") if old else (name, "", f"{new:,.0f}")


def _cost_rows(dense: Costs, small: Costs) -> list[tuple[str, str, str]]:
    rows = [_share("parameters", small.parameters, dense.parameters)]
    if dense.macs:
        rows.append(_share(f"MACs, {small.tokens} tokens", small.macs, dense.macs))
    rows.append(("mean bits", f"{dense.mean_bits:.2f}", f"{small.mean_bits:.2f}"))
    if dense.macs and dense.bops_linear:
        paper = f"{small.bops_linear / dense.bops_linear:.2%}"
        rows.append(("relative BOPs, paper (quantized linears)", "100.0%", paper))
    if dense.macs:
        full = f"{small.bops_full / dense.bops_full:.2%}"
        rows.append(("relative BOPs, full (+ attention, embeddings)", "100.0%", full))
    return rows


def plot_structure(compressed_dir: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """Draw what is kept of every family, and the bits of every layer, into a picture. Needs matplotlib.

    Args:
        compressed_dir: an exported folder.
        path: file to write, .png, .svg or .pdf.
    """
    from matplotlib.figure import Figure  # an extra, and not needed to load a model

    structure = read_structure(compressed_dir)
    kinds = _kinds(structure)
    widths = {"bits": structure.bits} | ({"bits of inputs": a} if (a := structure.activation_bits) else {})
    rows = len(kinds) + len(widths)
    figure = Figure(figsize=(max(6.0, 0.28 * len(structure.bits) + 3), 2.2 * rows), layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False)[:, 0]
    for axis, kind in zip(axes, kinds, strict=False):
        counts = structure.of_kind(kind)
        axis.bar(range(len(counts)), [before for _, before in counts], color="#dddddd", label="before")
        bars = axis.bar(range(len(counts)), [left for left, _ in counts], color="#3b6ea5", label="kept")
        axis.bar_label(bars, fontsize=7)
        axis.set(ylabel=kind, xlabel="layer", xticks=range(len(counts)))
        axis.legend(fontsize=7, loc="lower right")
    for axis, (label, bits) in zip(axes[len(kinds) :], widths.items(), strict=True):
        _plot_bits(axis, label, bits)
    beside = Path(path).with_name(f".{Path(path).name}")
    figure.savefig(beside, dpi=120, format=Path(path).suffix.removeprefix("."))
    return beside.replace(path)


def _plot_bits(axis: Any, label: str, bits: Mapping[str, int]) -> None:
    bars = axis.bar(range(len(bits)), list(bits.values()), color="#c9733b")
    axis.bar_label(bars, fontsize=6)
    axis.set(ylabel=label, ylim=(0, 1.15 * max(bits.values(), default=1)))
    axis.set_xticks(range(len(bits)), [_short(name) for name in bits], rotation=90, fontsize=6)


def _short(name: str) -> str:
    """The block's number and the last parts of a path: `3.self.query`."""
    parts = name.split(".")
    number = next((part for part in parts if part.isdigit()), "")
    tail = [part for part in parts[-2:] if not part.isdigit()]
    return ".".join([number, *tail]).lstrip(".")
