"""Check that a folder can be opened at all: its config and its index of shards, which transformers does not check."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from geta_hf.errors import GETAError

_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
"""The name of a blob in the Hub's cache: a hash of its content."""

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


def check_links(folder: str | os.PathLike[str]) -> None:
    """Check that no link in a folder leads out of it, before its files are uploaded or copied.

    A link to a file next to the folder would publish a secret under a harmless name. Links of the Hub's cache, whose
    snapshots consist of links to the blobs of the same repository, are allowed. Hidden entries are not looked at.

    Args:
        folder: a local folder, which may itself be a link.

    Raises:
        GETAError: naming the link and where it leads.
    """
    home = Path(os.path.realpath(folder))
    for place, folders, files in os.walk(home):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in (*folders, *files):
            path = Path(place) / name
            if name.startswith(".") or not path.is_symlink():
                continue
            end = Path(os.path.realpath(path))
            if not end.is_relative_to(home) and not _is_blob(end, home):
                raise GETAError(
                    f"{path.relative_to(home)} in {folder} is a link to {end}, outside of the folder; replace it by a "
                    f"copy if the file belongs there, otherwise delete it"
                )


def _is_blob(file: Path, snapshot: Path) -> bool:
    """Return whether a file is the content of a file of this snapshot in the Hub's cache."""
    blobs = Path(os.path.realpath(snapshot.parent.parent / "blobs"))
    return snapshot.parent.name == "snapshots" and file.parent == blobs and bool(_DIGEST.fullmatch(file.name))


def _wrong(file: Path, key: str, value: Any) -> GETAError:
    what = "an object of file names" if key == "weight_map" else "an object"
    return GETAError(f"{file}: {key} is {str(value)[:80]!r}, not {what}; copy or export the folder again")
