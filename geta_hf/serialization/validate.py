"""Check that a folder can be opened at all, before anything is built from it.

A folder may be damaged, or come from a stranger. transformers builds a model of any size that config.json asks for, and
finds out later that no file holds its weights. So the headers of the files are read first: they are small, and say how
many layers and elements there can be.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from geta_hf.errors import GETAError
from geta_hf.serialization.decode import Header, read_headers
from geta_hf.serialization.loader import QUANT_METHOD, GETALoader, GETAQuantizationConfig
from geta_hf.utils.config_limits import check_counts

_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
"""The name of a blob in the Hub's cache: a hash of its content."""

_LARGEST_JSON, _LARGEST_INDEX = 16 * 2**20, 64 * 2**20
"""Bytes. The parsed values take up to twenty times as much."""

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def check_readable(folder: str | os.PathLike[str]) -> None:
    """Check that a folder's config, index and headers agree, before `from_pretrained` reads them.

    transformers fails on such damage before the quantizer is asked, with errors that name neither file nor key.

    Args:
        folder: a local folder; anything else, such as a name on the Hub, is not checked.

    Raises:
        GETAError: a file or a key is damaged, config.json asks for more layers than the files can hold, or a tensor is
            not in the shard that the index names; the message names file and key.
    """
    path = Path(folder)
    if not path.is_dir():
        return
    config = read_json(path / "config.json") if (path / "config.json").exists() else {}
    stored = config.get("quantization_config")
    if stored is not None and not isinstance(stored, dict):
        raise _wrong(path / "config.json", "quantization_config", stored)
    if stored is not None and stored.get("quant_method") == QUANT_METHOD:
        GETAQuantizationConfig(**stored)
    tensors = folder_headers(path)
    check_counts(config, len(tensors) or None, str(path / "config.json"))


def check_headers(model: PreTrainedModel, folder: Path) -> None:
    """Compare a model without weights with the headers of its folder, as loading it does.

    Args:
        model: dense, of the folder's config.json, on meta; unchanged afterwards.
        folder: exported or dense.

    Raises:
        GETAError: a tensor of another type or size than the model's, or a fix list that is not of this model.
    """
    files = sorted({header.file for header in folder_headers(folder).values()})
    stored = read_json(folder / "config.json").get("quantization_config") or {}
    own = stored.get("quant_method") == QUANT_METHOD
    if not files or (stored and not own):  # another method's tensors are its own affair
        return
    config = GETAQuantizationConfig(**stored) if own else GETAQuantizationConfig()
    copied = copy.deepcopy(model)
    vars(copied.config)["_name_or_path"] = str(folder)
    GETALoader(config, pre_quantized=True).prepare(copied, files)


def folder_headers(folder: Path) -> dict[str, Header]:
    """Return the header of every tensor of a folder; of a folder without safetensors files, none.

    Raises:
        GETAError: a file or the index is damaged, a file that the index names is missing, or the two disagree.
    """
    names = weight_files(folder)
    if names == {WEIGHTS} and not os.path.lexists(folder / WEIGHTS):
        return {}
    if missing := sorted(name for name in names if not os.path.lexists(folder / name)):
        raise GETAError(f"{folder} lacks {', '.join(missing)}, which {INDEX} names; copy or export the folder again")
    headers = read_headers([str(folder / name) for name in sorted(names)], folder)
    if (folder / INDEX).is_file():
        _check_places(folder / INDEX, read_json(folder / INDEX)["weight_map"], headers)
    return headers


def _check_places(index: Path, weight_map: Mapping[str, str], headers: Mapping[str, Header]) -> None:
    """Check that every tensor is in the shard that the index names."""
    for name, shard in weight_map.items():
        if name not in headers:
            raise GETAError(f"{index}: {shard} has no tensor {name}; copy or export the folder again")
        found = Path(headers[name].file).name
        if found != shard:
            raise GETAError(f"{index}: {name} is in {found}, not in {shard}; copy or export the folder again")


def weight_files(folder: Path) -> set[str]:
    """Return the names of the files that hold a folder's weights: one, or the shards that its index names.

    Raises:
        GETAError: the index is damaged, or names a file outside of the folder.
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
    for name, shard in shards.items():
        if not _FILE.fullmatch(shard):
            raise GETAError(f"{index}: {name} is in {shard[:80]!r}, which is no file of the folder; export it again")
    return set(shards.values())


_FILE = re.compile(r"[^/\\\x00]+\.safetensors")


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        GETAError: the file cannot be read, is far too large, or holds anything else; the message names it.
    """
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait forever
            raise ValueError("no ordinary file")
        limit = _LARGEST_INDEX if path.name == INDEX else _LARGEST_JSON
        if path.stat().st_size > limit:
            raise ValueError(f"{path.stat().st_size} bytes, more than {limit}")
        values = json.loads(path.read_text(encoding="utf-8"))
    except PermissionError as error:
        raise GETAError(f"{path} may not be read ({error.strerror}); ask its owner for the right to read it") from error
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
