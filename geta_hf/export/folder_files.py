"""Write what a folder holds next to its weights: the structure, the config of the run, a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel

from geta_hf.config import CONFIG_NAME
from geta_hf.export.untouched import UNTOUCHED_NAME
from geta_hf.serialization.atomic_folder import FILES_NAME
from geta_hf.serialization.encode import activation_bits, weight_bits, width_blocks

STRUCTURE_NAME = "geta_structure.json"
PICTURE_NAME = "geta_structure.svg"
STRUCTURE_VERSION = 1

_ORIGIN = ("is_local", "local_files_only")


class SupportsToDict(Protocol):
    """Describe what a config has to offer: its values as JSON-ready data."""

    def to_dict(self) -> dict[str, Any]: ...


class SupportsSave(Protocol):
    """Describe what a tokenizer or processor has to offer."""

    def save_pretrained(self, save_directory: str, /) -> Any: ...


def write_structure(folder: Path, model: PreTrainedModel, kept: Mapping[str, tuple[int, int]]) -> None:
    """Write `STRUCTURE_NAME` of a compressed model: family -> (groups kept, groups before), and the bits of layers."""
    structure = {"version": STRUCTURE_VERSION, "kept": kept, "bits": weight_bits(model)}
    structure |= {"activation_bits": activation_bits(model)}
    if blocks := width_blocks(model):
        structure["blocks"] = blocks
    _write_json(folder / STRUCTURE_NAME, structure)


def copy_beside(source: Path, target: Path, structure: bool) -> None:
    """Copy what lies next to the weights of an export, such as its tokenizer, where the target lacks it.

    Args:
        source: an exported folder.
        target: the new folder, with its model.
        structure: also copy what was kept, and what describes the folder in geta_hf's own format.
    """
    own = set() if structure else {STRUCTURE_NAME, PICTURE_NAME, UNTOUCHED_NAME, "README.md", "config.json"}
    for path in sorted(source.iterdir()):
        # The carried code (.py) reads the packed weights of this folder, so it is not copied to a new one.
        weights = path.suffix in (".safetensors", ".py") or path.name.endswith(".index.json")
        if weights or path.name in (*own, FILES_NAME):
            continue
        if path.is_file() and not (target / path.name).exists():
            (target / path.name).write_bytes(path.read_bytes())


def save_beside(folder: Path, config: SupportsToDict | None, processing_class: SupportsSave | None) -> None:
    """Save a run's config and its tokenizer or processor, where there are any."""
    if processing_class is not None:
        processing_class.save_pretrained(str(folder))
        _remove_origin(folder / "tokenizer_config.json")
    if config is not None:
        _write_json(folder / CONFIG_NAME, config.to_dict())


def _remove_origin(path: Path) -> None:
    """Remove what transformers notes in a tokenizer's file of where it was read from, which is of no use elsewhere."""
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = [name for name in _ORIGIN if name in stored]
    for name in found:
        del stored[name]
    if found:
        path.write_text(json.dumps(stored, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
