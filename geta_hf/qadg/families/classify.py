"""What a family is: its kind, what it is coupled to, its name and its cost, from the structure alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from geta_hf.qadg.families.output_layers import output_weights
from geta_hf.qadg.families.partition import Draft, TensorDim
from geta_hf.qadg.propagation.element_ids import PINNED, Ids
from geta_hf.qadg.propagation.flow import Flow

Mask = NDArray[np.bool_]


def family_of_atoms(drafts: Sequence[Draft], count: int) -> Ids:
    """For every id the position of its family, -1 for none."""
    family = np.full(count, -1, np.int32)
    for position, draft in enumerate(drafts):
        family[draft.atoms] = position
    return family


def find_kinds(flow: Flow, drafts: Sequence[Draft], excludes: dict[int, set[int]]) -> list[str]:
    """The kind of every draft."""
    terms = flow.ids
    head = terms.marked("head") & terms.marked("split")
    added, linked = terms.marked("sum"), terms.marked("row") & terms.marked("column")
    flags = {"heads": head, "head_dim": terms.marked("attended"), "residual": added, "channels": linked}
    kinds = []
    for draft in drafts:
        found = [kind for kind, flag in flags.items() if flag[draft.atoms].any()]
        if "residual" in found and not _spans(draft):
            found.remove("residual")
        kinds.append(found[0] if found else "other")
    return [_query_heads(position, kinds, drafts, excludes) for position in range(len(drafts))]


def _spans(draft: Draft) -> bool:
    """Whether a family runs through more than one layer: its tensors lie in different entries of a list of modules."""
    paths = [tensor_dim.value.names[0].split(".")[:-1] for tensor_dim, _ in draft.members]
    common = _common(paths)
    following = {path[len(common)] for path in paths if len(path) > len(common)}
    return not any(part.isdigit() for part in common) or sum(part.isdigit() for part in following) > 1


def _query_heads(position: int, kinds: list[str], drafts: Sequence[Draft], excludes: dict[int, set[int]]) -> str:
    """Of heads within heads, those that cut less are the query heads within a group that shares keys and values."""
    if kinds[position] != "heads":
        return kinds[position]
    others = [other for other in excludes.get(position, ()) if kinds[other] == "heads"]
    larger = any((drafts[other].cut, -other) > (drafts[position].cut, -position) for other in others)
    return "query_heads" if larger else "heads"


def find_excludes(tensor_dims: Sequence[TensorDim], family: Ids) -> dict[int, set[int]]:
    """Families that meet in one element's term cut the same indices."""
    excludes: dict[int, set[int]] = {}
    for tensor_dim in tensor_dims:
        if tensor_dim.table.shape[1] == 1:
            continue
        met = np.where(tensor_dim.table == PINNED, -1, family[tensor_dim.table])
        for first in range(met.shape[1]):
            for second in range(first + 1, met.shape[1]):
                _note_pairs(met[:, first], met[:, second], excludes)
    return excludes


def _note_pairs(left: Ids, right: Ids, excludes: dict[int, set[int]]) -> None:
    both = (left >= 0) & (right >= 0) & (left != right)
    if not both.any():
        return
    base = int(max(left.max(), right.max())) + 1
    for code in np.unique(left[both].astype(np.int64) * base + right[both]).tolist():
        first, second = divmod(code, base)
        excludes.setdefault(first, set()).add(second)
        excludes.setdefault(second, set()).add(first)


def find_couplings(flow: Flow, drafts: Sequence[Draft]) -> list[tuple[str, ...]]:
    """What every draft is coupled to: a norm, a tied tensor, an output."""
    norm, facing = flow.ids.marked("norm"), output_weights(flow.graph)
    found = []
    for draft in drafts:
        cut = [tensor_dim for tensor_dim, _ in draft.members]
        flags = {
            "norm": bool(norm[draft.atoms].any()),
            "tied": any(len(tensor_dim.value.names) > 1 for tensor_dim in cut),
            "output": any(tensor_dim.position in facing for tensor_dim in cut),
        }
        found.append(tuple(name for name, flag in flags.items() if flag))
    return found


def find_names(drafts: Sequence[Draft], kinds: Sequence[str]) -> list[str]:
    """The longest module path that all members share, and the kind; unique."""
    names: list[str] = []
    for draft, kind in zip(drafts, kinds, strict=True):
        path = ".".join(_common([tensor_dim.value.names[0].split(".")[:-1] for tensor_dim, _ in draft.members]))
        name = f"{path}:{kind}" if path else kind
        taken = sum(other == name or other.startswith(f"{name}#") for other in names)
        names.append(f"{name}#{taken + 1}" if taken else name)
    return names


def _common(paths: Sequence[Sequence[str]]) -> list[str]:
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return common


def parameters_per_group(draft: Draft) -> int:
    """Elements of parameters that leave with one group."""
    counts = (
        index.shape[1] * tensor_dim.value.elements // tensor_dim.value.shape[tensor_dim.dim]
        for tensor_dim, index in draft.members
        if tensor_dim.value.role == "parameter"
    )
    return sum(counts)


def macs_per_group(flow: Flow, drafts: Sequence[Draft], family: Ids) -> list[int]:
    """Multiply-accumulates of the recorded batch that leave with one group, on average over the family."""
    total = np.zeros(len(drafts))
    for macs, dims in flow.contractions:
        for ids in dims:
            if ids is None:
                continue
            found = family[flow.ids.atoms(ids)]
            share = np.bincount(found[found >= 0].ravel(), minlength=len(drafts)) / len(ids)
            total += macs * share
    return [round(macs / len(draft.atoms)) for macs, draft in zip(total, drafts, strict=True)]
