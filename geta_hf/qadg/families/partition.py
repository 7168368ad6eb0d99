"""Sort atoms into families: atoms that cut the same dims of the same tensors alike make a family.

After propagation every element of every parameter has atoms. All 3072 channels of an MLP look the same from here: each
cuts one row of `up.weight`, one entry of `up.bias` and one column of `down.weight`. What distinguishes them from the
channels of another layer, or from heads, is only *which* dims an atom cuts and how many elements of each. So atoms with
the same signature make one family, and each atom is one group of it: a minimally removable structure (paper Sec. 4).
"""

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
    """One dim of one tensor, with the atoms along it.

    `entry_atom` and `entry_index` list the pairs (atom, element) that occur, in the order of elements. An element that
    carries a product of two atoms has two entries.

    Attributes:
        position: of the tensor in `Graph.values`.
        value: the tensor.
        dim: which of its dims.
        ids: of each element, as they were made when the tensor was first read, shape (elements,).
        table: the atoms of each element, shape (elements, k), padded with 0.
        entry_atom: the atom of each entry, shape (entries,); none is pinned.
        entry_index: the element of each entry, shape (entries,).
        atoms: the distinct atoms, shape (atoms,), ascending.
        count: how many elements each of `atoms` has, shape (atoms,).
        column: the first column of `table` in which each of `atoms` occurs, shape (atoms,). Atoms that meet in one
            element are not two groups of one family, even if they cut alike: of a 4 x 4 grid, rows are one family and
            columns another.
    """

    position: int
    value: Value
    dim: int
    ids: Ids
    table: Ids
    entry_atom: Ids
    entry_index: Ids
    atoms: Ids
    count: Ids
    column: Ids


@dataclass
class Draft:
    """A family in the making.

    Attributes:
        atoms: one for each group, shape (groups,), ascending.
        members: every dim that the groups cut, with the indices of each group, shape (groups, elements).
    """

    atoms: Ids
    members: list[tuple[TensorDim, Ids]]

    @property
    def cut(self) -> int:
        """Return how many rows and columns all groups cut together."""
        return sum(index.size for _, index in self.members)


def find_tensor_dims(flow: Flow) -> list[TensorDim]:
    """Return every dim that can be cut of every parameter in use, and of every buffer that shares an atom with one."""
    tensor_dims: list[TensorDim] = []
    for position, value in enumerate(flow.graph.values):
        if value.role not in ("parameter", "buffer") or not flow.known(position):
            continue
        for dim, ids in enumerate(flow.dims(position)):
            if ids is None:
                continue
            tensor_dim = _tensor_dim(position, value, dim, ids, flow.ids.atoms(ids))
            if tensor_dim is not None:
                tensor_dims.append(tensor_dim)
    # A buffer alone is no reason to prune: removing its elements would save nothing and train nothing.
    in_parameter = np.zeros(flow.ids.count, np.bool_)
    for tensor_dim in tensor_dims:
        if tensor_dim.value.role == "parameter":
            in_parameter[tensor_dim.atoms] = True
    return [tensor_dim for tensor_dim in tensor_dims if in_parameter[tensor_dim.atoms].any()]


def _tensor_dim(position: int, value: Value, dim: int, ids: Ids, table: Ids) -> TensorDim | None:
    """Return a dim with its entries; None when all of it is pinned."""
    rows, columns = np.nonzero(table != PINNED)
    if not len(rows):
        return None
    index = rows.astype(np.int32)
    column = columns.astype(np.int32)
    entry_atom = table[index, column]
    atoms, count = _count(entry_atom)
    first_column = np.zeros(len(atoms), np.int32)
    if table.shape[1] > 1:
        # Start from a column that does not exist, so that any real one is smaller.
        first_column += table.shape[1]
        np.minimum.at(first_column, np.searchsorted(atoms, entry_atom), column)
    return TensorDim(position, value, dim, ids, table, entry_atom, index, atoms, count, first_column)


def _count(entry_atom: Ids) -> tuple[Ids, Ids]:
    """Return the distinct atoms and how often each occurs; without sorting where they lie close together."""
    if (np.diff(entry_atom) > 0).all():
        return entry_atom, np.ones(len(entry_atom), np.int32)
    low = int(entry_atom.min())
    high = int(entry_atom.max())
    if high - low > 8 * len(entry_atom):
        atoms, count = np.unique(entry_atom, return_counts=True)
        return atoms, count.astype(np.int32)
    # Atoms are mostly numbered in a row, where counting is several times faster than sorting.
    counts = np.bincount(entry_atom - low)
    present = np.flatnonzero(counts).astype(np.int32)
    return present + np.int32(low), counts[present].astype(np.int32)


def find_drafts(tensor_dims: Sequence[TensorDim], count: int) -> list[Draft]:
    """Sort atoms with the same signature into families.

    Args:
        tensor_dims: all dims that may be cut, in model order.
        count: the number of ids.

    Returns:
        The families in the order of the tensors that they cut first.
    """
    signature = _signatures(tensor_dims, count)
    drafts: dict[int, Draft] = {}
    for tensor_dim in tensor_dims:
        labels = signature[tensor_dim.entry_atom]
        for label, part in _parts(tensor_dim, labels):
            if label not in drafts:
                drafts[label] = Draft(np.unique(tensor_dim.entry_atom[part]), [])
            draft = drafts[label]
            # Entries are sorted by atom, and all atoms of a family have equally many: each row is one group.
            index = tensor_dim.entry_index[part].reshape(len(draft.atoms), -1)
            draft.members.append((tensor_dim, index))
    return list(drafts.values())


def _parts(tensor_dim: TensorDim, labels: Ids) -> list[tuple[int, NDArray[np.intp]]]:
    """Return the positions of the entries of each label, ordered by atom and then by index."""
    one_label = bool((labels == labels[0]).all())
    if one_label and (np.diff(tensor_dim.entry_atom) > 0).all():
        return [(int(labels[0]), np.arange(len(labels)))]
    order = np.lexsort((tensor_dim.entry_index, tensor_dim.entry_atom, labels))
    parts = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    return [(int(labels[part[0]]), part) for part in parts]


def _signatures(tensor_dims: Sequence[TensorDim], count: int) -> Ids:
    """Return a number for every atom, equal for atoms that cut the same dims with the same counts; shape (count,).

    This is partition refinement: all atoms start in one class, and each dim divides the classes of the atoms along it
    by how these cut it. Atoms that are not along it keep their class, so nothing is compared pairwise.
    """
    signature = np.zeros(count, np.int32)
    last = 1
    for tensor_dim in tensor_dims:
        known = signature[tensor_dim.atoms]
        # How an atom cuts this dim, as one number: its count of elements, and its column.
        shape = tensor_dim.count.astype(np.int64) * tensor_dim.table.shape[1] + tensor_dim.column
        if (known == known[0]).all() and (shape == shape[0]).all():
            # By far the most frequent case, for which there is no need to sort.
            signature[tensor_dim.atoms] = last
            last += 1
            continue
        keys, label = np.unique(known.astype(np.int64) * (int(shape.max()) + 1) + shape, return_inverse=True)
        # New numbers each time: a class of which only some atoms lie along this dim must not keep its number for both.
        signature[tensor_dim.atoms] = last + label.ravel()
        last += len(keys)
    return signature
