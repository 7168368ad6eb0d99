"""Union-find over element ids with product terms, vectorised over int32 arrays.

Every element of every dim carries an id. An id is *frozen* (0: it never leaves), an *atom* (what leaves as one), or a
*term*: a product of two ids, outer and inner, whose element leaves as soon as either does. An atom that turns out to be
a product, when a view splits it, is bound to one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]

PINNED = 0
_UNBOUND = -1


class ElementIds:
    """The ids of one graph."""

    def __init__(self) -> None:
        self.count = 1
        self._parent = np.zeros(1, np.int32)
        self._outer = np.full(1, _UNBOUND, np.int32)
        self._inner = np.full(1, _UNBOUND, np.int32)
        self._marks: dict[str, list[Ids]] = {}

    def fresh(self, n: int) -> Ids:
        """`n` new atoms."""
        ids: Ids = np.arange(self.count, self.count + n, dtype=np.int32)
        self.count += n
        if self.count > len(self._parent):
            grow = max(self.count, len(self._parent) * 3 // 2) - len(self._parent)
            self._parent = np.append(self._parent, np.zeros(grow, np.int32))
            self._outer = np.append(self._outer, np.full(grow, _UNBOUND, np.int32))
            self._inner = np.append(self._inner, np.full(grow, _UNBOUND, np.int32))
        self._parent[ids] = ids
        return ids

    def find(self, ids: Ids) -> Ids:
        """The representatives of `ids`."""
        root = self._parent[ids]
        while True:
            above = self._parent[root]
            if np.array_equal(above, root):
                break
            root = above
        self._parent[ids] = root
        return root

    def atoms(self, ids: Ids) -> Ids:
        """The atoms of each id, shape (len(ids), k): outer first, without repeats, padded with 0 on the right."""
        columns = self.find(ids)[:, None]
        if not (self._outer[columns] != _UNBOUND).any():
            return columns
        while True:
            bound = self._outer[columns] != _UNBOUND
            if not bound.any():
                return _compact(columns)
            inner = np.where(bound, self._inner[columns], PINNED)
            columns = np.where(bound, self._outer[columns], columns)
            columns = np.stack([columns, inner], axis=2).reshape(len(ids), -1)
            columns = self.find(columns[:, (columns != PINNED).any(axis=0)])

    def pair(self, outer: Ids, inner: Ids) -> Ids:
        """The terms (outer[i], inner[i]); where one is frozen, the other alone."""
        outer, inner = self.find(outer), self.find(inner)
        both = (outer != PINNED) & (inner != PINNED) & (outer != inner)
        result = np.where(outer != PINNED, outer, inner)
        if both.any():
            terms = self.fresh(int(both.sum()))
            self._outer[terms], self._inner[terms] = outer[both], inner[both]
            result[both] = terms
        return result

    def product(self, outer: Ids, inner: Ids) -> Ids:
        """The terms of a merged dim, shape (len(outer) * len(inner),), inner running fastest."""
        return self.pair(np.repeat(outer, len(inner)), np.tile(inner, len(outer)))

    def pin(self, ids: Ids) -> None:
        """Nothing of `ids` may leave, hence none of their atoms."""
        self._parent[self.atoms(ids)] = PINNED

    def mark(self, flag: str, ids: Ids) -> None:
        """Flag the atoms of `ids`, and whatever they are unified with or bound to later."""
        self._marks.setdefault(flag, []).append(ids)

    def marked(self, flag: str) -> NDArray[np.bool_]:
        """For every id, whether it is an atom with the flag; shape (count,)."""
        flags = np.zeros(self.count, np.bool_)
        for ids in self._marks.get(flag, []):
            flags[self.atoms(ids)] = True
        flags[PINNED] = False
        return flags

    def unify(self, left: Ids, right: Ids) -> None:
        """Let left[i] and right[i] leave together, for every i.

        Each round settles one kind of difference and expands anew, because what one row does changes the others.
        """
        while True:
            a, b = self._different(left, right)
            if not len(a):
                return
            many_a, many_b = (a != PINNED).sum(axis=1), (b != PINNED).sum(axis=1)
            dead = (many_a == 0) | (many_b == 0)
            same = many_a == many_b
            if dead.any():
                self._parent[a[dead]] = PINNED
                self._parent[b[dead]] = PINNED
            elif same.any():
                self._union(a[same].ravel(), b[same].ravel())
            else:
                self._settle_unequal(*np.where((many_a < many_b)[:, None], (a, b), (b, a)))

    def _settle_unequal(self, short: Ids, long: Ids) -> None:
        """Rows with fewer atoms on one side: bind a lone atom to the product, else join all atoms of the row."""
        lone = (short[:, 1:] == PINNED).all(axis=1) & ~(short[:, :1] == long).any(axis=1)
        if lone.any():
            if not self._pin_contradictions(short[lone, 0], long[lone]):
                self._bind(short[lone, 0], long[lone])
            return
        rows = np.concatenate([short, long], axis=1)
        first = np.repeat(rows[:, 0], rows.shape[1])
        present = rows.ravel() != PINNED
        self._union(first[present], rows.ravel()[present])

    def _pin_contradictions(self, atoms: Ids, terms: Ids) -> bool:
        """An atom that is to be several products at once is what they have in common; the rest stays. Whether any.

        So the factor of a stretched dim, merged with another before it met the frozen dim that it runs along, goes.
        """
        if len(np.unique(atoms)) == len(atoms):
            return False
        rows = np.unique(np.concatenate([atoms[:, None], np.sort(terms, axis=1)], axis=1), axis=0)
        owner, times = np.unique(rows[:, 0], return_counts=True)
        if (times == 1).all():
            return False
        pairs = np.stack([np.repeat(rows[:, 0], rows.shape[1] - 1), rows[:, 1:].ravel()])
        (x, atom), count = np.unique(pairs[:, pairs[1] != PINNED], axis=1, return_counts=True)
        common = count == times[np.searchsorted(owner, x)]
        doomed = ~common & np.isin(x, x[common])
        self._parent[atom[doomed]] = PINNED
        return bool(doomed.any())

    def _different(self, left: Ids, right: Ids) -> tuple[Ids, Ids]:
        """The atoms of the rows whose two sides are not the same set, both padded to one width."""
        a, b = self.atoms(left), self.atoms(right)
        if a.shape[1] == b.shape[1] == 1:
            rows = a[:, 0] != b[:, 0]
            return a[rows], b[rows]
        width = max(a.shape[1], b.shape[1])
        a, b = (np.hstack([x, np.zeros((len(x), width - x.shape[1]), np.int32)]) for x in (a, b))
        rows = (np.sort(a, axis=1) != np.sort(b, axis=1)).any(axis=1)
        return a[rows], b[rows]

    def _union(self, a: Ids, b: Ids) -> None:
        """Join atoms pairwise; the smaller id stays, so that 0 (frozen) wins."""
        while True:
            a, b = self.find(a), self.find(b)
            apart = a != b
            if not apart.any():
                return
            a, b = np.minimum(a, b)[apart], np.maximum(a, b)[apart]
            # Where several pairs share b one of them wins here, and the next round joins the others to it.
            self._parent[b] = a

    def _bind(self, atoms: Ids, terms: Ids) -> None:
        """Bind each atom to the product in its row, as long as no chain of bindings can close a circle."""
        atoms, first = np.unique(atoms, return_index=True)
        terms = terms[first]
        safe = ~np.isin(atoms, terms)
        if not safe.any():
            safe[0] = True
            safe[1:] = False
        atoms, terms = atoms[safe], terms[safe]
        inner = terms[:, -1]
        for column in range(terms.shape[1] - 2, 0, -1):
            inner = self.pair(terms[:, column], inner)
        self._outer[atoms], self._inner[atoms] = terms[:, 0], inner


def _compact(columns: Ids) -> Ids:
    """Drop repeats within each row and move the zeros to its right."""
    for column in range(1, columns.shape[1]):
        repeated = (columns[:, :column] == columns[:, column : column + 1]).any(axis=1)
        columns[repeated, column] = PINNED
    order = np.argsort(columns == PINNED, axis=1, kind="stable")
    columns = np.take_along_axis(columns, order, axis=1)
    return columns[:, : max(1, int((columns != PINNED).sum(axis=1).max(initial=0)))]
