"""Give every element of every dimension an id; ids that operators tie to each other are removed together.

An id is one of three things:

- *pinned*: id 0. The element can never be removed.
- an *atom*: removed as one. All elements that carry it are removed at once.
- a *product* of two ids, outer and inner. Its element is removed as soon as either factor is.

The ids live in a union-find forest. Take a matrix product `x @ w.T` of an activation x of shape (3, 4), with atoms
1..3 and 4..7 along its dims, and a weight w of shape (2, 4) with atoms 8..9 and 10..13. Its rule unifies the inner
dims, 4..7 with 10..13: input feature 0 of x can only be removed together with column 0 of w. The result carries 1..3
and 8..9.

A view that merges dims of 2 and 3 elements, with atoms [1, 2] and [3, 4, 5], makes six products:
(1,3) (1,4) (1,5) (2,3) (2,4) (2,5), inner running fastest, as in memory. Where atom 1 is removed, so are the first
three elements. This is how removing a head removes the rows of all its head dims. A view in the other direction, of six
atoms 1..6 seen as 2 x 3, makes new atoms [7, 8] and [9, 10, 11] and *binds* each old atom to a product: 1 = (7, 9),
2 = (7, 10), ... From then on atom 1 is only another name for a product, and what is removed is 7..11.

All of it works on int32 arrays without loops over elements, since a large model has millions of them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]

PINNED = 0
_UNBOUND = -1


class ElementIds:
    """The ids of one graph: a union-find forest of which some nodes are products of two others.

    Attributes:
        count: how many ids there are, including the pinned one; ids are 0 to count - 1.
    """

    def __init__(self) -> None:
        self.count = 1
        self._parent = np.zeros(1, np.int32)
        # Both are _UNBOUND for an atom, and the two factors for a product.
        self._outer = np.full(1, _UNBOUND, np.int32)
        self._inner = np.full(1, _UNBOUND, np.int32)
        self._marks: dict[str, list[Ids]] = {}

    def fresh(self, n: int) -> Ids:
        """Make `n` new atoms."""
        ids: Ids = np.arange(self.count, self.count + n, dtype=np.int32)
        self.count += n
        if self.count > len(self._parent):
            # Growing by half each time keeps the cost of all appends linear in the number of ids.
            grow = max(self.count, len(self._parent) * 3 // 2) - len(self._parent)
            self._parent = np.append(self._parent, np.zeros(grow, np.int32))
            self._outer = np.append(self._outer, np.full(grow, _UNBOUND, np.int32))
            self._inner = np.append(self._inner, np.full(grow, _UNBOUND, np.int32))
        self._parent[ids] = ids
        return ids

    def find(self, ids: Ids) -> Ids:
        """Return the representatives of `ids`, of the same shape."""
        root = self._parent[ids]
        while True:
            above = self._parent[root]
            if np.array_equal(above, root):
                break
            root = above
        # Path compression: the next search for these ids ends after one step.
        self._parent[ids] = root
        return root

    def atoms(self, ids: Ids) -> Ids:
        """Return the atoms of each id: what has to remain for its element to remain.

        Args:
            ids: shape (n,).

        Returns:
            Shape (n, k), with k the largest number of atoms of any id: outer factors first, without repeats, padded
            with 0 on the right. A pinned id has zeros alone.
        """
        columns = self.find(ids)[:, None]
        if not (self._outer[columns] != _UNBOUND).any():
            return columns
        # Every round replaces the products in the table by their two factors, side by side, until only atoms remain.
        while True:
            bound = self._outer[columns] != _UNBOUND
            if not bound.any():
                return _compact(columns)
            inner = np.where(bound, self._inner[columns], PINNED)
            columns = np.where(bound, self._outer[columns], columns)
            columns = np.stack([columns, inner], axis=2).reshape(len(ids), -1)
            # A factor may have been unified or pinned since its product was made, hence `find` again in every round.
            columns = self.find(columns[:, (columns != PINNED).any(axis=0)])

    def pair(self, outer: Ids, inner: Ids) -> Ids:
        """Make the products (outer[i], inner[i]), shape (n,).

        Where one factor is pinned the product is the other alone, and where both are the same it is that one.
        """
        outer = self.find(outer)
        inner = self.find(inner)
        both = (outer != PINNED) & (inner != PINNED) & (outer != inner)
        result = np.where(outer != PINNED, outer, inner)
        if both.any():
            # The same pair made twice gets two ids. Nothing is lost by that, since ids are compared by their atoms.
            products = self.fresh(int(both.sum()))
            self._outer[products] = outer[both]
            self._inner[products] = inner[both]
            result[both] = products
        return result

    def product(self, outer: Ids, inner: Ids) -> Ids:
        """Make the ids of a merged dim, shape (len(outer) * len(inner),), inner running fastest."""
        return self.pair(np.repeat(outer, len(inner)), np.tile(inner, len(outer)))

    def pin(self, ids: Ids) -> None:
        """Let nothing of `ids` be removed.

        All their atoms are pinned: if either factor of a product could be removed, its element would be.
        """
        # `atoms` pads with 0, which is PINNED itself: its own parent already.
        self._parent[self.atoms(ids)] = PINNED

    def mark(self, flag: str, ids: Ids) -> None:
        """Flag the atoms of `ids`, and whatever they are unified with or bound to later."""
        # Only the ids are kept. Their atoms are looked up in `marked`, when all bindings are known.
        self._marks.setdefault(flag, []).append(ids)

    def marked(self, flag: str) -> NDArray[np.bool_]:
        """Return for every id whether it is an atom with the flag; shape (count,)."""
        flags = np.zeros(self.count, np.bool_)
        for ids in self._marks.get(flag, []):
            flags[self.atoms(ids)] = True
        flags[PINNED] = False
        return flags

    def made_with(self, flag: str) -> NDArray[np.bool_]:
        """Return for every id whether it has the flag itself, not through what it was unified with; shape (count,)."""
        flags = np.zeros(self.count, np.bool_)
        for ids in self._marks.get(flag, []):
            flags[ids] = True
        return flags

    def unify(self, left: Ids, right: Ids) -> None:
        """Let left[i] and right[i] be removed together, for every i; both of shape (n,).

        Afterwards both sides of every row have the same set of atoms. Rows differ in three ways, and each round
        resolves one kind and then expands all rows again, because what one row does changes the others:

        1. One side is pinned: pin the other.
        2. Both have as many atoms: join them pairwise, outer with outer and inner with inner.
        3. One has fewer: see `_unify_unequal`.
        """
        while True:
            a, b = self._different(left, right)
            if not len(a):
                return
            atoms_in_a = (a != PINNED).sum(axis=1)
            atoms_in_b = (b != PINNED).sum(axis=1)
            pinned = (atoms_in_a == 0) | (atoms_in_b == 0)
            same = atoms_in_a == atoms_in_b
            # Pins come first: they take atoms away, after which two sides may agree. Joining atoms can't be undone.
            if pinned.any():
                self._parent[a[pinned]] = PINNED
                self._parent[b[pinned]] = PINNED
            elif same.any():
                self._union(a[same].ravel(), b[same].ravel())
            else:
                a_is_short = (atoms_in_a < atoms_in_b)[:, None]
                self._unify_unequal(np.where(a_is_short, a, b), np.where(a_is_short, b, a))

    def _unify_unequal(self, short: Ids, long: Ids) -> None:
        """Unify rows with fewer atoms on one side: bind a single atom to the product, else join all atoms of the row.

        A single atom that is itself a factor of the other side cannot be bound, as it would contain itself.
        """
        single = (short[:, 1:] == PINNED).all(axis=1)
        single &= ~(short[:, :1] == long).any(axis=1)
        if single.any():
            if not self._pin_contradictions(short[single, 0], long[single]):
                self._bind(short[single, 0], long[single])
            return
        # Two atoms against three, say, cannot be matched one to one. Joining them all is coarser than necessary,
        # so groups become larger, but it is never wrong.
        rows = np.concatenate([short, long], axis=1)
        first = np.repeat(rows[:, 0], rows.shape[1])
        present = rows.ravel() != PINNED
        self._union(first[present], rows.ravel()[present])

    def _pin_contradictions(self, atoms: Ids, products: Ids) -> bool:
        """Reduce an atom that would be several products at once to what they share, by pinning their other factors.

        Such an atom is a factor of a stretched dim: it was merged with another dim before it met the pinned dim that
        it runs along. With x = (1, 3) and x = (1, 4), removing 3 would remove x, although neither 1 nor 4 is removed.
        So x is what both share, 1, and 3 and 4 are pinned.

        Args:
            atoms: shape (n,).
            products: the atoms of the product that each is unified with, shape (n, k), padded with 0.

        Returns:
            Whether anything was pinned.
        """
        if len(np.unique(atoms)) == len(atoms):
            return False
        rows = np.concatenate([atoms[:, None], np.sort(products, axis=1)], axis=1)
        rows = np.unique(rows, axis=0)
        owners, products_of_owner = np.unique(rows[:, 0], return_counts=True)
        if (products_of_owner == 1).all():
            return False
        owner = np.repeat(rows[:, 0], rows.shape[1] - 1)
        factor = rows[:, 1:].ravel()
        pairs = np.stack([owner, factor])[:, factor != PINNED]
        (owner, factor), count = np.unique(pairs, axis=1, return_counts=True)
        shared = count == products_of_owner[np.searchsorted(owners, owner)]
        # Where nothing is shared there is no contradiction to resolve here: `_bind` takes the first product, and the
        # next round unifies it with the others.
        superfluous = ~shared & np.isin(owner, owner[shared])
        self._parent[factor[superfluous]] = PINNED
        return bool(superfluous.any())

    def _different(self, left: Ids, right: Ids) -> tuple[Ids, Ids]:
        """Return the atoms of the rows whose two sides are not the same set, both padded to the same number."""
        a = self.atoms(left)
        b = self.atoms(right)
        if a.shape[1] == b.shape[1] == 1:
            rows = a[:, 0] != b[:, 0]
            return a[rows], b[rows]
        columns = max(a.shape[1], b.shape[1])
        a = _pad(a, columns)
        b = _pad(b, columns)
        rows = (np.sort(a, axis=1) != np.sort(b, axis=1)).any(axis=1)
        return a[rows], b[rows]

    def _union(self, a: Ids, b: Ids) -> None:
        """Join atoms pairwise; the smaller id becomes the representative, so that 0 (pinned) wins."""
        while True:
            a = self.find(a)
            b = self.find(b)
            apart = a != b
            if not apart.any():
                return
            smaller = np.minimum(a, b)[apart]
            larger = np.maximum(a, b)[apart]
            # Where several pairs share the larger atom one of them wins, and the next round joins the others to it.
            self._parent[larger] = smaller
            a = smaller
            b = larger

    def _bind(self, atoms: Ids, products: Ids) -> None:
        """Bind each atom to the product in its row, as long as no chain of bindings can close a circle.

        An atom that occurs in any of the products waits for the next round of `unify`: with x = (y, 1) and y = (x, 2)
        both bound, expanding x would never end. If that excludes all rows, the first is bound alone.
        """
        atoms, first = np.unique(atoms, return_index=True)
        products = products[first]
        safe = ~np.isin(atoms, products)
        if not safe.any():
            safe[0] = True
        atoms = atoms[safe]
        products = products[safe]
        # A product has two factors, so three atoms and more nest: (a, (b, c)). Pairing with 0 changes nothing, which
        # makes the padding on the right harmless.
        inner = products[:, -1]
        for column in range(products.shape[1] - 2, 0, -1):
            inner = self.pair(products[:, column], inner)
        self._outer[atoms] = products[:, 0]
        self._inner[atoms] = inner


def _pad(rows: Ids, columns: int) -> Ids:
    """Append zeros on the right up to a number of columns."""
    return np.hstack([rows, np.zeros((len(rows), columns - rows.shape[1]), np.int32)])


def _compact(columns: Ids) -> Ids:
    """Drop repeats within each row and move the zeros to its right."""
    for column in range(1, columns.shape[1]):
        repeated = (columns[:, :column] == columns[:, column : column + 1]).any(axis=1)
        columns[repeated, column] = PINNED
    order = np.argsort(columns == PINNED, axis=1, kind="stable")
    columns = np.take_along_axis(columns, order, axis=1)
    most = int((columns != PINNED).sum(axis=1).max(initial=0))
    return columns[:, : max(1, most)]
