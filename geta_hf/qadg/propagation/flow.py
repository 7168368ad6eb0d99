"""Hold the ids of every dim of every value, and the few moves that the operators' rules are made of.

A rule reads the ids of its operator's inputs with `dims`, ties them to each other with `unify` or `broadcast`, and sets
those of its outputs with `set_dims`. Views go through `view`, which is made of `merge` (several dims into one: product
ids) and `split` (one dim into several: ids are bound to products). What must not be removed gets pinned:

- `pin` for what can never be removed by design, such as rows that an embedding is indexed by;
- `pin_and_report` for what an operator does with a dim, such as a softmax along it;
- `pin_unsupported` for all that an operator without a rule reads. It is reported, and never guessed.

`mark` sets flags on ids, from which families get their kind and their couplings later (`families.classify`):

- "row", "column": output and input features of a weight;
- "head", "attended": batch and inner dims of a product of two activations, as attention has it;
- "split": the outer dim of a view that splits;
- "sum": a sum of two activations, as in the residual stream;
- "norm": a norm or a mean runs along the dim. Removing a zero element would change the divisor, so the remaining
  elements would change. Such a family is correct to cut only with a corrected divisor, so it is not pruned by default.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from geta_hf.qadg.group_types import UnsupportedOperator
from geta_hf.qadg.propagation.element_ids import PINNED, ElementIds, Ids
from geta_hf.qadg.tracing.graph import Graph, Node, Ref, Value

Dim = Ids | None
"""The ids along one dim, shape (size,); None when it has one element or all of it is pinned."""


class Flow:
    """The ids of all values of a graph, while propagation walks it and after.

    Args:
        graph: a recorded forward pass.

    Attributes:
        graph: the recorded forward pass.
        ids: the union-find forest that says what the ids mean.
        readers: for every value, the positions of the nodes that read it.
        nonnegative: values without an element below zero.
        contractions: multiply-accumulates of the operators, with the dims in proportion to which they shrink.
        numbers: what values hold where elements are removed, for the first `numbered` nodes; see `rules_zeros`.
        numbered: for how many nodes that has been computed.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.ids = ElementIds()
        self.readers = graph.consumers()
        self.nonnegative: set[int] = set()
        self.contractions: list[tuple[int, tuple[Dim, ...]]] = []
        # A removed element of a parameter is a zero, which is where the numbers start.
        parameters = (position for position, value in enumerate(graph.values) if value.role == "parameter")
        self.numbers: dict[int, float | None] = dict.fromkeys(parameters, 0.0)
        self.numbered = 0
        self._dims: dict[int, list[Dim]] = {}
        self._unsupported: Counter[tuple[str, str, str]] = Counter()

    def value(self, ref: Ref) -> Value:
        """Return the value behind a reference."""
        return self.graph.values[ref.value]

    def shape(self, ref: Ref) -> tuple[int, ...]:
        """Return the shape of a referenced tensor."""
        return self.value(ref).shape

    def stream(self, value: int) -> bool:
        """Return whether a value may be part of a residual stream: an activation or an embedding, but no bias.

        Parameters had a part in it, and it has two dims or more (of a parameter, those with one element do not count).
        """
        known = self.graph.values[value]
        if not known.from_parameter:
            return False
        rank = len(known.shape) if known.from_input else sum(size > 1 for size in known.shape)
        return rank > 1

    def reaches_zero(self, node: Node) -> bool:
        """Return whether everything that reads a node's results widens them to include zero, as quantizers do."""
        readers = [self.graph.nodes[position] for value in node.outputs for position in self.readers.get(value, [])]
        # `all` of nothing is true, but a range that nobody reads was widened by nobody.
        return bool(readers) and all(self._includes_zero(reader) for reader in readers)

    def _includes_zero(self, node: Node) -> bool:
        if node.op in ("minimum", "maximum"):
            return any(not self.graph.values[ref].from_parameter for ref in node.refs())
        if node.op in ("clamp", "clamp_min", "clamp_max"):
            return 0 in (node.inputs.get("min"), node.inputs.get("max"))
        return False

    def count_macs(self, macs: int, dims: tuple[Dim, ...]) -> None:
        """Note the multiply-accumulates of an operator, and the dims in proportion to which they shrink."""
        self.contractions.append((macs, dims))

    def known(self, value: int) -> bool:
        """Return whether any operator has touched the value."""
        return value in self._dims

    def dims(self, value: int | Ref) -> list[Dim]:
        """Return the ids of every dim of a value, as a new list.

        A tensor that no operator made gets new atoms when it is first read, except an input, which is pinned: its
        shape is the caller's.
        """
        position = value.value if isinstance(value, Ref) else value
        if position not in self._dims:
            known = self.graph.values[position]
            pinned = known.role == "input"
            self._dims[position] = [None if pinned or size <= 1 else self.ids.fresh(size) for size in known.shape]
        # A copy, since rules assign to its entries (`dims[1] = ...`), which must not change the value that they read.
        return list(self._dims[position])

    def set_dims(self, value: int, dims: Sequence[Dim]) -> None:
        """Set the ids of a result; dims of one element get none."""
        shape = self.graph.values[value].shape
        # A rule that is wrong for some shape has to fail here: shifted by one dim, ids would tie elements at random.
        assert len(dims) == len(shape), (shape, len(dims))
        assert all(ids is None or size <= 1 or len(ids) == size for ids, size in zip(dims, shape, strict=True)), shape
        self._dims[value] = [None if size <= 1 else ids for ids, size in zip(dims, shape, strict=True)]

    def pin(self, dims: Iterable[Dim]) -> None:
        """Let no element of `dims` be removed."""
        for dim in dims:
            if dim is not None:
                self.ids.pin(dim)

    def pin_and_report(self, node: Node, dims: Iterable[Dim], reason: str) -> None:
        """Pin dims for what an operator does with them, and report it where something could have been removed."""
        # A softmax over token positions is in every model, and its dim is pinned by the inputs: nothing to report.
        removable = [dim for dim in dims if dim is not None and (self.ids.atoms(dim) != PINNED).any()]
        self.pin(removable)
        if removable:
            self._report(node, reason)

    def pin_unsupported(self, node: Node, reason: str) -> None:
        """Pin all that an operator without a rule reads and makes, and report it (gate 1)."""
        for value in node.refs():
            self.pin(self.dims(value))
        for value in node.outputs:
            # None is pinned. What comes out depends in an unknown way on all that goes in, so it is as fixed as that.
            self.set_dims(value, [None] * len(self.graph.values[value].shape))
        self._report(node, reason)

    def _report(self, node: Node, reason: str) -> None:
        # What is computed without parameters, such as a table of positions, has nothing to prune in any case.
        if any(self.graph.values[value].from_parameter for value in node.refs()):
            self._unsupported[node.op, node.module, reason] += 1

    @property
    def unsupported(self) -> tuple[UnsupportedOperator, ...]:
        """Return the operators that were reported, with how often each occurred."""
        return tuple(UnsupportedOperator(*key, count) for key, count in self._unsupported.items())

    def mark(self, flag: str, dim: Dim) -> None:
        """Flag the atoms of a dim."""
        if dim is not None:
            self.ids.mark(flag, dim)

    def unify(self, left: Dim, right: Dim) -> Dim:
        """Let the elements of two dims of the same size be removed together; if either is pinned, both are."""
        if left is None or right is None:
            self.pin((left, right))
            return None
        # A shortcut for values that share their ids already, as everything along a residual stream does.
        if left is not right and not np.array_equal(left, right):
            self.ids.unify(left, right)
        return left

    def broadcast(self, values: Iterable[int | Ref], shape: Sequence[int]) -> list[Dim]:
        """Return the dims of an elementwise result, aligned on the right as in NumPy.

        Operands of full size along a dim are unified. One that is stretched repeats a single element, which does not
        become more or less when elements of the others are removed, so it imposes nothing.
        """
        result: list[Dim] = [None] * len(shape)
        seen = [False] * len(shape)
        for value in values:
            position = value.value if isinstance(value, Ref) else value
            own = self.graph.values[position].shape
            for back, dim in enumerate(reversed(self.dims(position)), start=1):
                if own[-back] != shape[-back] or own[-back] <= 1:
                    continue
                # None in `result` can mean "pinned" as well as "no operand so far", hence `seen`.
                result[-back] = self.unify(result[-back], dim) if seen[-back] else dim
                seen[-back] = True
        return result

    def merge(self, dims: Sequence[Dim], sizes: Sequence[int]) -> Dim:
        """Return the ids of several dims viewed as one of size prod(sizes): products, the last dim running fastest."""
        if all(dim is None for dim in dims):
            return None
        # Pinned is the neutral element of a product: 4 heads merged with a pinned dim of 2 give each head's id twice.
        merged = np.zeros(1, np.int32)
        for dim, size in zip(dims, sizes, strict=True):
            factor = np.zeros(size, np.int32) if dim is None else dim
            merged = self.ids.product(merged, factor)
        return merged

    def split(self, dim: Dim, sizes: Sequence[int]) -> list[Dim]:
        """Return the ids of one dim of size prod(sizes) viewed as several."""
        if dim is None or len(sizes) == 1:
            return [dim] + [None] * (len(sizes) - 1)
        # From the outside in: 768 seen as (12, 8, 8) is first 12 x 64, and then 64 is 8 x 8.
        n = sizes[0]
        rest = math.prod(sizes[1:])
        # A dim of one element carries no ids, so it takes no part in the factorisation.
        if n == 1:
            return [None, *self.split(dim, sizes[1:])]
        if rest == 1:
            return [dim] + [None] * (len(sizes) - 1)
        outer, inner = self._factor(dim, n, rest)
        # The outer dim of a split is a candidate for heads; see `families.classify.find_kinds`.
        self.mark("split", outer)
        return [outer, *self.split(inner, sizes[1:])]

    def _factor(self, dim: Ids, n: int, m: int) -> tuple[Dim, Dim]:
        """Write a dim of n * m elements as a product of an outer dim of n and an inner one of m elements.

        Where its ids are products already, as after a merge, their factors are recognised: an atom column that is the
        same along m belongs to the outer dim, one that is the same along n to the inner dim. So merging and splitting
        again gives the ids that were there before, and no new ones. Only what is neither is bound to new atoms.
        """
        table = self.ids.atoms(dim).reshape(n, m, -1)
        by_outer = (table == table[:, :1]).all(axis=(0, 1))
        by_inner = (table == table[:1]).all(axis=(0, 1)) & ~by_outer
        outer = [table[:, 0, column] for column in np.flatnonzero(by_outer)]
        inner = [table[0, :, column] for column in np.flatnonzero(by_inner)]
        mixed = np.flatnonzero(~by_outer & ~by_inner)
        if len(mixed):
            # For example a weight's 768 row atoms, seen as 12 heads of 64: from here on row 70 is the product of head 1
            # and head dim 6, and both heads and head dims can be removed.
            new_outer = self.ids.fresh(n)
            new_inner = self.ids.fresh(m)
            products = self.ids.product(new_outer, new_inner)
            for column in mixed:
                self.ids.unify(products, table[:, :, column].ravel())
            outer.append(new_outer)
            inner.append(new_inner)
        return self._join(outer), self._join(inner)

    def _join(self, factors: list[Ids]) -> Dim:
        """Return the product of several ids for each element; None for no factor at all, which is pinned."""
        joined: Dim = None
        for factor in factors:
            # Several where more dims were merged than are split off: (a, b, c) as one dim, seen as (a · b, c).
            joined = factor if joined is None else self.ids.pair(joined, factor)
        return joined

    def view(self, dims: Sequence[Dim], before: Sequence[int], after: Sequence[int]) -> list[Dim]:
        """Return the dims of a tensor of shape `before` seen with shape `after`.

        Both shapes are cut into the shortest stretches with equal numbers of elements: (2, 4, 6) seen as (8, 2, 3) is
        (2, 4) as (8) and (6) as (2, 3). Each stretch is merged into one dim and split again, independent of the others.
        """
        if math.prod(before) == 0:
            # Every stretch of an empty tensor has no elements, so nothing tells which dims belong together.
            self.pin(dims)
            return [None] * len(after)
        result: list[Dim] = []
        i = 0
        j = 0
        while i < len(before) or j < len(after):
            start_i = i
            start_j = j
            size_i = 1
            size_j = 1
            while size_i != size_j or (i == start_i and j == start_j):
                # Whichever side covers fewer elements so far takes its next dim; `before` begins.
                behind = size_i < size_j or j == len(after) or (size_i == size_j and i == start_i)
                if i < len(before) and behind:
                    size_i *= before[i]
                    i += 1
                else:
                    size_j *= after[j]
                    j += 1
            # Without dims after, the stretch is dims of one element that the view dropped; these have no ids.
            if j > start_j:
                merged = self.merge(dims[start_i:i], before[start_i:i])
                result += self.split(merged, after[start_j:j])
        return result
