"""Write and read a pruning space: its tables as JSON, its indices as safetensors; no pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from geta_hf.errors import GETAError
from geta_hf.qadg.group_types import COUPLINGS, KINDS, Family, Member, UnsupportedOperator
from geta_hf.utils.files import write_whole

FORMAT_VERSION = 1
TABLES = "pruning_space.json"
INDICES = "pruning_space.safetensors"


Shapes = Mapping[str, tuple[int, ...]]


def write_space(
    folder: str | Path,
    *,
    families: Sequence[Family],
    shapes: Shapes,
    unsupported: Sequence[UnsupportedOperator],
    untouched: Sequence[str],
    buffers: Sequence[str],
    matrix_parameters: int,
) -> None:
    """Write `pruning_space.json` and `pruning_space.safetensors` into a folder, which is made if need be.

    Each file is written to a temporary name and then renamed; the tables hold a digest of the indices, so that two
    files of different spaces are never taken for one.

    Args:
        folder: where to write.
        families: as all of the following, a field of `PruningSpace`.
        shapes: see there.
        unsupported: see there; its key in the file is `frozen`.
        untouched: see there.
        buffers: see there.
        matrix_parameters: see there.
    """
    indices = {
        f"{position}.{place}": member.index.contiguous()
        for position, family in enumerate(families)
        for place, member in enumerate(family.members)
    }
    content = save(indices)
    tables = {
        "format_version": FORMAT_VERSION,
        "indices_sha256": hashlib.sha256(content).hexdigest(),
        "families": [_family_table(family) for family in families],
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "frozen": [asdict(operator) for operator in unsupported],
        "untouched": list(untouched),
        "buffers": list(buffers),
        "matrix_parameters": matrix_parameters,
    }
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    # Indices first: after a crash in between, the old tables' digest does not fit, and reading refuses the pair.
    write_whole(target / INDICES, content)
    write_whole(target / TABLES, json.dumps(tables, indent=1) + "\n")


def _family_table(family: Family) -> dict[str, Any]:
    """Return a family as JSON takes it, without its indices, which are in the other file."""
    table = {name: value for name, value in vars(family).items() if name != "members"}
    if not family.counts:
        del table["counts"]  # earlier releases read spaces without it
    members = []
    for member in family.members:
        entry = {"tensor": member.tensor, "dim": member.dim}
        # Only where it is true, so that a space of an earlier release is written as it was read.
        members.append({**entry, "consumer": True} if member.consumer else entry)
    return table | {"members": members}


def read_space(folder: str | Path) -> dict[str, Any]:
    """Read the fields of a `PruningSpace` that `write_space` wrote, and check that they fit together.

    Args:
        folder: where the two files are.

    Returns:
        The fields by name, as `PruningSpace` takes them.

    Raises:
        GETAError: a file is missing, damaged, of another space or of an unknown version, or its content is no pruning
            space; names the file and the key.
    """
    tables_file = Path(folder) / TABLES
    indices_file = Path(folder) / INDICES
    for file in (tables_file, indices_file):
        if not file.is_file():
            raise GETAError(f"{file} is missing; a pruning space is {TABLES} next to {INDICES}")
    with _naming(tables_file):
        tables = json.loads(tables_file.read_bytes())
        # Before anything else is read: a later version may have other keys.
        if tables["format_version"] != FORMAT_VERSION:
            raise GETAError(f"{tables_file} has format_version {tables['format_version']!r}; this is {FORMAT_VERSION}")
    content = indices_file.read_bytes()
    with _naming(tables_file):
        if hashlib.sha256(content).hexdigest() != tables["indices_sha256"]:
            raise GETAError(f"{indices_file} is damaged or belongs to another space than {tables_file}")
    with _naming(indices_file):
        indices = load(content)
    with _naming(tables_file):
        fields = _fields(tables, indices)
        _check_families(fields["families"], fields["shapes"])
    return fields


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Turn whatever a damaged file causes into an error that names the file."""
    try:
        yield
    except GETAError:
        # It says all already.
        raise
    # The content is anybody's, and each of these is what some damage raises: a missing key, null for a list, text that
    # is no JSON, brackets nested too deep.
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, SafetensorError) as error:
        raise GETAError(f"{file} is no pruning space: {type(error).__name__}: {error}; save the space again") from error


def _fields(tables: dict[str, Any], indices: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return the fields of a `PruningSpace` from the content of the two files."""
    families = []
    for position, table in enumerate(tables["families"]):
        members = tuple(
            Member(
                str(member["tensor"]),
                int(member["dim"]),
                indices[f"{position}.{place}"],
                bool(member.get("consumer", False)),
            )
            for place, member in enumerate(table["members"])
        )
        plain = {name: value for name, value in table.items() if name != "members"}
        # JSON has lists only, and a family is compared by its fields.
        plain |= {name: tuple(plain.get(name, ())) for name in ("counts", "excludes", "couplings")}
        families.append(Family(members=members, **plain))
    return {
        "families": tuple(families),
        "shapes": {name: tuple(int(n) for n in shape) for name, shape in tables["shapes"].items()},
        # The key keeps the attribute's former name, since folders that were written with it have to load.
        "unsupported": tuple(UnsupportedOperator(**operator) for operator in tables["frozen"]),
        "untouched": tuple(map(str, tables["untouched"])),
        "buffers": tuple(map(str, tables["buffers"])),
        "matrix_parameters": int(tables["matrix_parameters"]),
    }


def _check_families(families: Sequence[Family], shapes: Shapes) -> None:
    """Raise ValueError where families contradict each other, the shapes, or what a family may be."""
    names = {family.name for family in families}
    _expect(len(names) == len(families), "two families have one name")
    for family in families:
        _expect(family.kind in KINDS, f"{family.name} is of the unknown kind {family.kind!r}")
        _expect(set(family.couplings) <= set(COUPLINGS), f"{family.name} has unknown couplings {family.couplings}")
        _expect(set(family.excludes) <= names, f"{family.name} excludes families that are not there")
        _expect(isinstance(family.prunable, bool), f"prunable of {family.name} is {family.prunable!r}")
        _expect(len(family.members) > 0, f"{family.name} has no members")
        counts = list(family.counts)
        _expect(counts == sorted({n for n in counts if 0 < n <= family.size}), f"{family.name} has counts {counts}")
        for member in family.members:
            _check_member(family, member, shapes)


def _check_member(family: Family, member: Member, shapes: Shapes) -> None:
    """Raise ValueError where a member's indices do not fit its tensor or its family."""
    where = f"{family.name}, {member.tensor} dim {member.dim}"
    shape = shapes.get(member.tensor)
    index = member.index
    _expect(shape is not None and 0 <= member.dim < len(shape), f"{where}: no such dim of shape {shape}")
    assert shape is not None
    fits = index.dtype == torch.int64 and index.dim() == 2 and index.numel() > 0
    _expect(fits and index.shape[0] == family.size, f"{where}: index is {index.dtype} of shape {tuple(index.shape)}")
    flat = index.flatten()
    _expect(int(flat.min()) >= 0 and int(flat.max()) < shape[member.dim], f"{where}: indices beyond {shape}")
    # Removing one of the two groups would take a slice of the other with it.
    _expect(len(flat.unique()) == len(flat), f"{where}: an index is in two groups")


def _expect(holds: bool, complaint: str) -> None:
    """Raise ValueError with `complaint` unless something holds; the caller adds the file's name."""
    if not holds:
        raise ValueError(complaint)
