"""Exported folders for tests that only read them: a real one, made once, and some written by hand."""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from geta_hf import GETAConfig, export
from geta_hf.quantization import attach_input_quantizers, step_size
from tests.export.tiny_encoders import some_batch, tiny_model, train_by_hand
from tests.spaces import build_space

_UNKNOWN = {"model_type": "unheard_of", "architectures": ["UnheardOfModel"]}


@cache
def _made() -> tempfile.TemporaryDirectory[str]:
    home = tempfile.TemporaryDirectory()
    model, batch = tiny_model(), some_batch()
    model.save_pretrained(Path(home.name) / "dense")
    space = build_space(model, batch)
    train_by_hand(model, space)
    for layer in attach_input_quantizers(model, [batch], include=["query"]).values():
        quantizer = layer.input_quantizer
        quantizer.d.data.copy_(step_size(6, quantizer.q_m, quantizer.t).detach())
    export(model, Path(home.name) / "small", space=space, batch=batch, config=GETAConfig(bits=(2, 16)))
    return home


def exported(home: Path) -> tuple[Path, Path]:
    """A tiny BERT before, and as it was exported with its GETAConfig: copies below `home` that a test may spoil."""
    for name in ("dense", "small"):
        shutil.copytree(Path(_made().name) / name, home / name)
    return home / "dense", home / "small"


def written(
    folder: Path,
    kept: dict[str, tuple[int, int]],
    bits: dict[str, int],
    inputs: dict[str, int] | None = None,
    config: dict[str, Any] | None = None,
    codes: int = 80,
) -> Path:
    """A folder with the files of an export of any structure; by default of a model that transformers does not know.

    Each packed layer has so many codes.
    """
    folder.mkdir(parents=True)
    values = {
        **(config or _UNKNOWN),
        "quantization_config": {"quant_method": "geta", "format_version": 1, "bits": bits},
    }
    (folder / "config.json").write_text(json.dumps(values))
    structure = {"version": 1, "kept": kept, "bits": bits, "activation_bits": inputs or {}}
    (folder / "geta_structure.json").write_text(json.dumps(structure))
    streams = {
        f"{name.encode(errors='replace').decode()}.weight": torch.zeros(codes * width // 8, dtype=torch.uint8)
        for name, width in bits.items()
    }
    save_file({**streams, "plain": torch.zeros(5)}, folder / "model.safetensors")
    return folder
