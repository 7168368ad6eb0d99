"""Compare a compressed model with the dense one in a table, and read what an export kept."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from geta_hf.config import CONFIG_NAME, CompressionConfig, GETAConfig, read_config
from geta_hf.costs.model_costs import Costs, bytes_on_disk, measure_costs
from geta_hf.errors import GETAError
from geta_hf.export.export import STRUCTURE_NAME
from geta_hf.quantization import select_layers
from geta_hf.quantization.experts import apart_class
from geta_hf.reporting.latency import faster, measure_latency
from geta_hf.serialization.hf_quantizer import QUANT_METHOD
from geta_hf.serialization.loader import check_blocks, check_widths
from geta_hf.serialization.validate import check_readable, read_json
from geta_hf.utils.model_classes import find_model_class
from geta_hf.utils.tables import format_table

_MANY_GROUPS = 2**40

Metrics = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Structure:
    """Hold what an export kept of a model.

    Attributes:
        kept: family -> (groups kept, groups before), in model order.
        bits: module path -> bits of its packed weight, the widest of several, in model order.
        activation_bits: module path -> bits of its input, for the layers that round it; in model order.
        dropped: paths in the dense model of entire layers that were removed before anything else.
        blocks: module path -> `dim`, `widths` and `counts`, for the weights whose rows or columns have widths.
    """

    kept: dict[str, tuple[int, int]]
    bits: dict[str, int]
    activation_bits: dict[str, int] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    blocks: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def widths(self) -> dict[str, dict[int, int]]:
        """Module path -> each width of its packed weight, ascending, and how many rows or columns have it.

        A layer of one width has it once.
        """
        found = {name: {bits: 1} for name, bits in self.bits.items()}
        for name, block in self.blocks.items():
            found[name] = dict(zip(block["widths"], block["counts"], strict=True))
        return found

    def of_kind(self, kind: str) -> list[tuple[int, int]]:
        """Return (kept, before) of every family of a kind, such as `heads`, in model order."""
        return [counts for name, counts in self.kept.items() if name.rpartition(":")[2] == kind]


def read_structure(folder: str | os.PathLike[str]) -> Structure:
    """Read the structure that `export` wrote next to the model. Raise GETAError for a folder without it."""
    path = Path(folder) / STRUCTURE_NAME
    # The remedy depends on why it is missing.
    if not path.is_file() and is_export(Path(folder)):
        raise GETAError(
            f"{folder} has no {STRUCTURE_NAME}, because save_pretrained does not write it; run "
            f"`geta-hf export {folder} OUT`, which does"
        )
    if not path.is_file():
        inside = export_inside(Path(folder))
        remedy = f"is {folder} an exported folder?" if inside is None else f"give the export of this run, {inside}"
        raise GETAError(f"{path} can't be read (there is no such file); {remedy}")
    stored = read_json(path)
    kept = _read_counts(path, stored)
    bits = _read_widths(path, "bits", stored.get("bits"))
    # Folders of the first versions lack this key.
    inputs = _read_widths(path, "activation_bits", stored.get("activation_bits", {}))
    # A number says how many were asked for, a list which ones were dropped; only the run's own config has the list.
    dropped = _run_config(folder).drop_layers
    blocks = stored.get("blocks", {})
    check_blocks(blocks, bits, f"{path}:")
    return Structure(kept, bits, inputs, tuple(dropped) if isinstance(dropped, list) else (), blocks)


def export_inside(folder: Path) -> Path | None:
    """Return the export in the folder of a run, where the recipes write it; None if there is none."""
    export = folder / "export"
    return export if (export / STRUCTURE_NAME).is_file() and not (folder / "config.json").is_file() else None


def _read_counts(path: Path, stored: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    counts = stored.get("kept")
    if not isinstance(counts, dict):
        raise GETAError(f"{path} can't be read (kept is {str(counts)[:80]!r}, not an object); is it of an export?")
    for name, pair in counts.items():
        good = isinstance(pair, list) and len(pair) == 2 and all(map(_is_count, pair)) and pair[0] <= pair[1]
        if not good:
            raise GETAError(
                f"{path} can't be read (kept[{name!r}] is {str(pair)[:80]}, not the groups kept and those before); "
                f"export the folder again"
            )
    return {name: (kept, before) for name, (kept, before) in counts.items()}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MANY_GROUPS


def _read_widths(path: Path, key: str, widths: Any) -> dict[str, int]:
    check_widths(key, widths, f"{path}:")
    return dict(widths)


def is_export(folder: Path) -> bool:
    """Return whether a folder's config.json says that it is in geta_hf's own format."""
    try:
        stored = read_json(folder / "config.json").get("quantization_config")
    except GETAError:
        return False
    return isinstance(stored, dict) and stored.get("quant_method") == QUANT_METHOD


def _run_config(folder: str | os.PathLike[str]) -> CompressionConfig:
    """Return the config of the run; the defaults if it was not saved."""
    path = Path(folder) / CONFIG_NAME
    return read_config(path) if path.is_file() else GETAConfig()


def load_model(folder: str | os.PathLike[str]) -> PreTrainedModel:
    """Load a dense or exported folder as the class that saved it, in eval mode."""
    check_readable(folder)
    model_class = _model_class(Path(folder))
    try:
        # Without the answer False, transformers would ask whether code of the folder may run.
        model = apart_class(model_class).from_pretrained(folder, trust_remote_code=False)
    except GETAError:
        raise
    # A damaged config may fail anywhere in the code of the model's class.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise GETAError(
            f"{folder} can't be loaded ({type(error).__name__}: {reason}); copy or export it again"
        ) from error
    # Only its construction was another one.
    model.__class__ = model_class
    return model.eval()


def _model_class(folder: Path) -> Any:
    """Return the class of the model in a local folder or on the Hub, of those that need none of its code."""
    try:
        config, _ = PreTrainedConfig.get_config_dict(folder)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise GETAError(
            f"{folder} is neither the folder of a model nor the name of one that can be loaded ({reason}); check its "
            f"spelling"
        ) from error
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise GETAError(f"{folder}/config.json names no architecture; save the model with save_pretrained")
    # The class that saved it: an auto class of another task would drop the head, or make a new one.
    found = find_model_class(names[0])
    if found is not None:
        return found
    if "auto_map" in config:
        raise GETAError(
            f"{folder} is of a model with code of its own ({names[0]}), which geta-hf never runs; in Python, make its "
            f"trainer again, resume the run with train(resume_from_checkpoint=True), and call export_model"
        )
    raise GETAError(f"{folder}: transformers has no class {names[0]}")


def compare(
    dense_dir: str | os.PathLike[str],
    compressed_dir: str | os.PathLike[str],
    *,
    tokens: int = 384,
    metrics: Metrics | None = None,
    latency: bool = True,
) -> str:
    """Return a Markdown table that compares the compressed model with the dense one.

    Args:
        dense_dir: a plain model folder.
        compressed_dir: an exported folder of the same architecture.
        tokens: sequence length of MACs, BOPs and latency; a vision model is measured on one image instead.
        metrics: {"dense": {"em": …}, "compressed": {"em": …}}, the first rows of the table.
        latency: time both models on the CPU, which says something only where the machine is free. Default True.
    """
    structure = read_structure(compressed_dir)
    models = {"dense": load_model(dense_dir), "compressed": load_model(compressed_dir)}
    layers = {"dense": _dense_layers(models["dense"], compressed_dir, structure), "compressed": list(structure.bits)}
    costs = {name: measure_costs(model, tokens, layers[name]) for name, model in models.items()}
    sizes = {"dense": bytes_on_disk(dense_dir), "compressed": bytes_on_disk(compressed_dir)}
    measured = dict(metrics or {})
    if latency:
        measured["latency_ms"] = measure_latency(models, tokens, image=costs["dense"].image)
    return format_table(("", "dense", "compressed"), table_rows(structure, costs, sizes, measured, by_layer=True))


def _dense_layers(dense: PreTrainedModel, folder: str | os.PathLike[str], structure: Structure) -> list[str]:
    """Return the layers of the dense model that were quantized, or would have been had they not been removed."""
    if not structure.dropped:
        return list(structure.bits)
    config = _run_config(folder)
    # Dropped layers have no bits in the structure, and the paths behind them have moved up: so the dense side is
    # chosen by the run's own rule.
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
    """Return the rows of a table: name, dense, compressed. What was not measured has no row.

    Args:
        structure: of the compressed model.
        costs: "dense" and "compressed", or empty; without MACs there are no BOPs either.
        sizes: bytes of "dense" and "compressed"; either may be missing.
        metrics: "dense", "compressed" and "latency_ms".
        size_name: name of the row of sizes.
        by_layer: list what each layer keeps, instead of the sum.
    """
    rows = _metric_rows(metrics)
    rows += [("layers removed", "", ", ".join(structure.dropped))] if structure.dropped else []
    rows += _layer_rows(structure) if by_layer else _kind_rows(structure)
    rows += _group_rows(structure)
    rows += _cost_rows(costs["dense"], costs["compressed"]) if costs else []
    if "compressed" in sizes:
        rows.append(_share(size_name, sizes["compressed"], sizes.get("dense")))
    if times := metrics.get("latency_ms"):
        words = faster(times["dense"], times["compressed"])
        rows.append(("CPU latency, ms", f"{times['dense']:.2f}", f"{times['compressed']:.2f} ({words})"))
    return rows


def _metric_rows(metrics: Metrics) -> list[tuple[str, str, str]]:
    dense, compressed = metrics.get("dense", {}), metrics.get("compressed", {})
    names = [name for name in dict.fromkeys((*dense, *compressed)) if name in compressed]
    rows = []
    for name in names:
        found = [side[name] for side in (dense, compressed) if name in side]
        # Shares, such as an accuracy of 0.874, lose too much in two digits; a 0 beside a score in percent is no share.
        digits = 4 if max(map(abs, found)) < 1 else 2
        shown = [f"{value:.{digits}f}" for value in found]
        rows.append((spelled(name), shown[0] if name in dense else "", shown[-1]))
    return rows


_SPELLINGS = {"em": "EM", "f1": "F1"}


def spelled(metric: str) -> str:
    """Return how people write the name that a metric has in files. Most are shown as they are named."""
    return _SPELLINGS.get(metric, metric)


def _kinds(structure: Structure) -> list[str]:
    return list(dict.fromkeys(name.rpartition(":")[2] for name in structure.kept))


def _layer_rows(structure: Structure) -> list[tuple[str, str, str]]:
    counts = {kind: structure.of_kind(kind) for kind in _kinds(structure)}
    rows = []
    for kind, own in counts.items():
        before = " ".join(str(total) for _, total in own)
        kept = " ".join(str(count) for count, _ in own)
        rows.append((f"{kind} a layer", before, kept))
    return rows


def _kind_rows(structure: Structure) -> list[tuple[str, str, str]]:
    rows = []
    for kind in _kinds(structure):
        counts = structure.of_kind(kind)
        kept = sum(count for count, _ in counts)
        before = sum(total for _, total in counts)
        rows.append(_share(kind, kept, before))
    return rows


def _group_rows(structure: Structure) -> list[tuple[str, str, str]]:
    total = sum(before for _, before in structure.kept.values())
    kept = sum(count for count, _ in structure.kept.values())
    rows = [("groups", f"{total:,}", f"{kept:,} ({kept / max(total, 1):.1%})")]
    if rounded := structure.activation_bits:
        mean = statistics.mean(rounded.values())
        share = f"{len(rounded)} of {len(structure.bits)} layers"
        rows.append(("mean bits of inputs", "32.00", f"{mean:.2f} ({share})"))
    return rows


def _share(name: str, new: float, old: float | None) -> tuple[str, str, str]:
    return (name, f"{old:,.0f}", f"{new:,.0f} ({new / old:.1%})") if old else (name, "", f"{new:,.0f}")


def _cost_rows(dense: Costs, compressed: Costs) -> list[tuple[str, str, str]]:
    layers, others = ("linears", "attention, embeddings")
    if dense.image:
        layers, others = ("layers", "all other products")
    rows = [_share("parameters", compressed.parameters, dense.parameters)]
    if dense.macs:
        rows.append(_share(f"MACs, {compressed.sample}", compressed.macs, dense.macs))
    rows.append(("mean bits", f"{dense.mean_bits:.2f}", f"{compressed.mean_bits:.2f}"))
    if dense.macs and dense.bops_linear:
        # Two definitions that must not be mixed: the paper counts encoder linears only, by which its BERT baseline is
        # 13.57 T BOPs (84.9 M weights x 156 tokens x 32 x 32).
        paper = f"{compressed.bops_linear / dense.bops_linear:.2%}"
        rows.append((f"relative BOPs, paper (quantized {layers})", "100.0%", paper))
    if dense.macs:
        full = f"{compressed.bops_full / dense.bops_full:.2%}"
        rows.append((f"relative BOPs, full (+ {others})", "100.0%", full))
    return rows
