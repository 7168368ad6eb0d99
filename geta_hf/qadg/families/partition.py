"""Sort atoms into families: atoms that cut the same dims of the same tensors alike make a family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geta_hf.qadg.propagation.element_ids import PINNED, Ids
from geta_hf.qadg.propagation.flow import Flow
from geta_hf.qadg.tracing.graph import Value


@dataclass
class TensorDim:
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
    """A family on its way: its atoms, ascending, and for every tensor_dim the index of shape (groups, width)."""

    atoms: Ids
    members: list[tuple[TensorDim, Ids]]

    @property
    def cut(self) -> int:
        """How many rows and columns all groups cut together."""
        return sum(index.size for _, index in self.members)


def find_tensor_dims(flow: Flow) -> list[TensorDim]:
    """Every cuttable dim of every parameter in use, and of every buffer that shares an atom with one."""
    tensor_dims: list[TensorDim] = []
    for position, value in enumerate(flow.graph.values):
        if value.role not in ("parameter", "buffer") or not flow.known(position):
            continue
        for dim, ids in enumerate(flow.dims(position)):
            tensor_dim = None if ids is None else _tensor_dim(position, value, dim, flow.ids.atoms(ids))
            if tensor_dim is not None:
                tensor_dims.append(tensor_dim)
    cut = np.zeros(flow.ids.count, np.bool_)
    for tensor_dim in tensor_dims:
        if tensor_dim.value.role == "parameter":
            cut[tensor_dim.atoms] = True
    return [tensor_dim for tensor_dim in tensor_dims if cut[tensor_dim.atoms].any()]


def _tensor_dim(position: int, value: Value, dim: int, table: Ids) -> TensorDim | None:
    index, column = (places.astype(np.int32) for places in np.nonzero(table != PINNED))
    if not len(index):
        return None
    atom = table[index, column]
    atoms, width = _count(atom)
    first = np.zeros(len(atoms), np.int32)
    if table.shape[1] > 1:
        first += table.shape[1]
        np.minimum.at(first, np.searchsorted(atoms, atom), column)
    return TensorDim(position, value, dim, table, atom, index, atoms, width, first)


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


def find_drafts(tensor_dims: Sequence[TensorDim], count: int) -> list[Draft]:
    """Atoms with the same signature form a family, in the order of the parameters that they cut first."""
    signature = _signatures(tensor_dims, count)
    drafts: dict[int, Draft] = {}
    for tensor_dim in tensor_dims:
        labels = signature[tensor_dim.atom]
        for label, part in _parts(tensor_dim, labels):
            atoms = np.sort(tensor_dim.atom[part]) if label not in drafts else drafts[label].atoms
            if label not in drafts:
                drafts[label] = Draft(atoms[np.append(True, np.diff(atoms) > 0)], [])
            drafts[label].members.append((tensor_dim, tensor_dim.index[part].reshape(len(drafts[label].atoms), -1)))
    return list(drafts.values())


def _parts(tensor_dim: TensorDim, labels: Ids) -> list[tuple[int, NDArray[np.intp]]]:
    """The places of each label in a tensor_dim, ordered by atom and then by index."""
    if (labels == labels[0]).all() and (np.diff(tensor_dim.atom) > 0).all():
        return [(int(labels[0]), np.arange(len(labels)))]
    order = np.lexsort((tensor_dim.index, tensor_dim.atom, labels))
    parts = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    return [(int(labels[part[0]]), part) for part in parts]


def _signatures(tensor_dims: Sequence[TensorDim], count: int) -> Ids:
    """For every atom a number, equal for atoms that cut the same dims with the same counts (partition refinement)."""
    signature = np.zeros(count, np.int32)
    last = 1
    for tensor_dim in tensor_dims:
        known = signature[tensor_dim.atoms]
        shape = tensor_dim.width.astype(np.int64) * tensor_dim.table.shape[1] + tensor_dim.column
        if (known == known[0]).all() and (shape == shape[0]).all():
            signature[tensor_dim.atoms] = last
            last += 1
            continue
        keys, label = np.unique(known.astype(np.int64) * (int(shape.max()) + 1) + shape, return_inverse=True)
        signature[tensor_dim.atoms] = last + label.ravel()
        last += len(keys)
    return signature
