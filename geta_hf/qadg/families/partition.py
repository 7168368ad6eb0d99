"""Where every atom cuts: slots are dims of tensors, and atoms that cut the same slots alike make a family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geta_hf.qadg.propagation.element_ids import FROZEN, Ids
from geta_hf.qadg.propagation.flow import Flow
from geta_hf.qadg.tracing.graph import Value


@dataclass
class Slot:
    """One dim of one tensor.

    Attributes:
        position: of the tensor in `Graph.values`.
        table: the atoms of each of its elements, shape (elements, k), padded with 0.
        atom: the atoms that are not frozen, shape (n,), in the order of elements.
        index: the element that each of `atom` belongs to, shape (n,).
        atoms: the distinct atoms, ascending.
        width: how many elements each of `atoms` has.
        column: the first column of `table` that each of `atoms` stands in, since atoms that meet in one element are no
            two groups of one family, however alike they cut.
    """

    position: int
    value: Value
    dim: int
    table: Ids
    atom: Ids
    index: Ids
    atoms: Ids
    width: Ids
    column: Ids


@dataclass
class Draft:
    """A family on its way: its atoms, ascending, and for every slot the index of shape (groups, width)."""

    atoms: Ids
    members: list[tuple[Slot, Ids]]

    @property
    def cut(self) -> int:
        """How many rows and columns all groups cut together."""
        return sum(index.size for _, index in self.members)


def find_slots(flow: Flow) -> list[Slot]:
    """Every cuttable dim of every parameter in use, and of every buffer that shares an atom with one."""
    slots: list[Slot] = []
    for position, value in enumerate(flow.graph.values):
        if value.kind not in ("parameter", "buffer") or not flow.known(position):
            continue
        for dim, ids in enumerate(flow.dims(position)):
            slot = None if ids is None else _slot(position, value, dim, flow.terms.atoms(ids))
            if slot is not None:
                slots.append(slot)
    cut = np.zeros(flow.terms.count, np.bool_)
    for slot in slots:
        if slot.value.kind == "parameter":
            cut[slot.atoms] = True
    return [slot for slot in slots if cut[slot.atoms].any()]


def _slot(position: int, value: Value, dim: int, table: Ids) -> Slot | None:
    index, column = (places.astype(np.int32) for places in np.nonzero(table != FROZEN))
    if not len(index):
        return None
    atom = table[index, column]
    atoms, width = _count(atom)
    first = np.zeros(len(atoms), np.int32)
    if table.shape[1] > 1:
        first += table.shape[1]
        np.minimum.at(first, np.searchsorted(atoms, atom), column)
    return Slot(position, value, dim, table, atom, index, atoms, width, first)


def _count(atom: Ids) -> tuple[Ids, Ids]:
    """The distinct atoms and how often each occurs; without sorting where they lie close together."""
    if (np.diff(atom) > 0).all():
        return atom, np.ones(len(atom), np.int32)
    low, high = int(atom.min()), int(atom.max())
    if high - low > 8 * len(atom):
        atoms, width = np.unique(atom, return_counts=True)
        return atoms, width.astype(np.int32)
    count = np.bincount(atom - low)
    present = np.flatnonzero(count).astype(np.int32)
    return present + np.int32(low), count[present].astype(np.int32)


def find_drafts(slots: Sequence[Slot], count: int) -> list[Draft]:
    """Atoms with the same signature form a family, in the order of the parameters that they cut first."""
    signature = _signatures(slots, count)
    drafts: dict[int, Draft] = {}
    for slot in slots:
        labels = signature[slot.atom]
        for label, part in _parts(slot, labels):
            atoms = np.sort(slot.atom[part]) if label not in drafts else drafts[label].atoms
            if label not in drafts:
                drafts[label] = Draft(atoms[np.append(True, np.diff(atoms) > 0)], [])
            drafts[label].members.append((slot, slot.index[part].reshape(len(drafts[label].atoms), -1)))
    return list(drafts.values())


def _parts(slot: Slot, labels: Ids) -> list[tuple[int, NDArray[np.intp]]]:
    """The places of each label in a slot, ordered by atom and then by index."""
    if (labels == labels[0]).all() and (np.diff(slot.atom) > 0).all():
        return [(int(labels[0]), np.arange(len(labels)))]
    order = np.lexsort((slot.index, slot.atom, labels))
    parts = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    return [(int(labels[part[0]]), part) for part in parts]


def _signatures(slots: Sequence[Slot], count: int) -> Ids:
    """For every atom a number, equal for atoms that cut the same slots in the same widths (partition refinement)."""
    signature = np.zeros(count, np.int32)
    last = 1
    for slot in slots:
        known = signature[slot.atoms]
        shape = slot.width.astype(np.int64) * slot.table.shape[1] + slot.column
        if (known == known[0]).all() and (shape == shape[0]).all():
            signature[slot.atoms] = last
            last += 1
            continue
        keys, label = np.unique(known.astype(np.int64) * (int(shape.max()) + 1) + shape, return_inverse=True)
        signature[slot.atoms] = last + label.ravel()
        last += len(keys)
    return signature
