"""Note what compression left as it was, for the model card: families not pruned, operators and parameters unseen."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from geta_hf.qadg.space import PruningSpace
from geta_hf.serialization.validate import read_json
from geta_hf.utils.files import write_whole

UNTOUCHED_NAME = "geta_untouched.json"


@dataclass(frozen=True)
class Untouched:
    """Hold what was not compressed and why, as plain data.

    Attributes:
        not_pruned: family -> why none of its groups could be removed.
        unsupported: module and operator that the graph cannot follow -> why; nothing that they read is pruned.
        unseen: parameters that no recorded forward pass read, such as those of a path that the example inputs miss.
    """

    not_pruned: Mapping[str, str] = field(default_factory=dict)
    unsupported: Mapping[str, str] = field(default_factory=dict)
    unseen: Sequence[str] = ()


def untouched_of(space: PruningSpace) -> Untouched:
    """Return what a pruning space says about the parts that nothing is removed from."""
    return Untouched(
        {family.name: family.reason for family in space.families if not family.prunable},
        {f"{one.module or 'the model'}: {one.operator}": one.reason for one in space.unsupported},
        space.untouched,
    )


def write_untouched(folder: Path, untouched: Untouched) -> None:
    """Write `UNTOUCHED_NAME` into a folder."""
    write_whole(folder / UNTOUCHED_NAME, json.dumps(asdict(untouched), indent=2) + "\n")


def read_untouched(folder: Path) -> Untouched:
    """Read `UNTOUCHED_NAME`; return an empty `Untouched` for a folder of before. Raise GETAError for a damaged one."""
    path = folder / UNTOUCHED_NAME
    stored = read_json(path) if path.is_file() else {}
    unseen = stored.get("unseen")
    return Untouched(
        _texts(stored.get("not_pruned")),
        _texts(stored.get("unsupported")),
        tuple(map(str, unseen)) if isinstance(unseen, list) else (),
    )


def _texts(values: object) -> dict[str, str]:
    return {str(key): str(value) for key, value in values.items()} if isinstance(values, dict) else {}
