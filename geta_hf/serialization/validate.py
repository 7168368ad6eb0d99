"""Check that a folder can be opened at all: its config and its index of shards, which transformers does not check."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from geta_hf.errors import GETAError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def check_readable(folder: str | os.PathLike[str]) -> None:
    """Check that a folder's config and index of shards are what they should be, before `from_pretrained` reads them.

    transformers fails on such damage before the quantizer is asked, with errors that name neither file nor key.

    Args:
        folder: a local folder; anything else, such as a name on the Hub, is not checked.

    Raises:
        GETAError: a file or a key is damaged; the message names both.
    """
    path = Path(folder)
    if (path / "config.json").is_file():
        stored = read_json(path / "config.json").get("quantization_config")
        if stored is not None and not isinstance(stored, dict):
            raise _wrong(path / "config.json", "quantization_config", stored)
    if path.is_dir():
        weight_files(path)


def weight_files(folder: Path) -> set[str]:
    """Return the names of the files that hold a folder's weights: one, or the shards that its index names.

    Raises:
        GETAError: the index is damaged.
    """
    index = folder / INDEX
    if not index.is_file():
        return {WEIGHTS}
    stored = read_json(index)
    # transformers adds keys to it without looking.
    if not isinstance(stored.get("metadata"), dict):
        raise _wrong(index, "metadata", stored.get("metadata"))
    shards = stored.get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise _wrong(index, "weight_map", shards)
    return set(shards.values())


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        GETAError: the file cannot be read or holds anything else; the message names it.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: a hostile depth of nesting
        raise GETAError(f"{path} can't be read ({error}); copy or export the folder again") from error
    if not isinstance(values, dict):
        raise GETAError(f"{path} holds {type(values).__name__}, not a JSON object; copy or export the folder again")
    return values


def _wrong(file: Path, key: str, value: Any) -> GETAError:
    what = "an object of file names" if key == "weight_map" else "an object"
    return GETAError(f"{file}: {key} is {str(value)[:80]!r}, not {what}; copy or export the folder again")
