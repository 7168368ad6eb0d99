"""What the rules act on: the ids of every dim of every value, and the moves that rules are made of."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from geta_hf.qadg.groups import UnsupportedOperator
from geta_hf.qadg.propagation.element_ids import PINNED, ElementIds, Ids
from geta_hf.qadg.tracing.graph import Graph, Node, Ref, Value

Dim = Ids | None
"""The ids along one dim; None when it has one element or all of it is frozen."""


class Flow:
    """Ids on the way through a graph.

    Attributes:
        graph: the recorded forward pass.
        terms: what the ids stand for.
        readers: for every value, the positions of the nodes that read it.
        nonnegative: values without an element below zero.
        contractions: multiply-accumulates of the operators, with the dims that they shrink with.
        numbers: what values hold where elements leave, for the first `numbered` nodes; see `rules_zeros`.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.ids = ElementIds()
        self._dims: dict[int, list[Dim]] = {}
        self.readers = graph.consumers()
        self.nonnegative: set[int] = set()
        self.contractions: list[tuple[int, tuple[Dim, ...]]] = []
        parameters = (position for position, value in enumerate(graph.values) if value.role == "parameter")
        self.numbers: dict[int, float | None] = dict.fromkeys(parameters, 0.0)
        self.numbered = 0
        self._unknown: Counter[tuple[str, str, str]] = Counter()

    def value(self, ref: Ref) -> Value:
        """The value behind a reference."""
        return self.graph.values[ref.value]

    def shape(self, ref: Ref) -> tuple[int, ...]:
        """The shape of a referenced tensor."""
        return self.value(ref).shape

    def stream(self, value: int) -> bool:
        """Whether parameters made a value that is more than a vector: an activation or an embedding, not a bias."""
        known = self.graph.values[value]
        wide = len(known.shape) if known.from_input else sum(n > 1 for n in known.shape)
        return known.from_parameter and wide > 1

    def reaches_zero(self, node: Node) -> bool:
        """Whether what a node draws from a tensor is widened to zero by all that read it, as a quantizer's range is."""
        readers = [self.graph.nodes[position] for value in node.outputs for position in self.readers.get(value, [])]
        return bool(readers) and all(self._at_zero(reader) for reader in readers)

    def _at_zero(self, node: Node) -> bool:
        if node.op in ("minimum", "maximum"):
            return any(not self.graph.values[ref].from_parameter for ref in node.refs())
        return node.op in ("clamp", "clamp_min", "clamp_max") and 0 in (node.inputs.get("min"), node.inputs.get("max"))

    def count_macs(self, macs: int, dims: tuple[Dim, ...]) -> None:
        """Note the multiply-accumulates of an operator, and the dims that they shrink with."""
        self.contractions.append((macs, dims))

    def known(self, value: int) -> bool:
        """Whether any operator has touched the value."""
        return value in self._dims

    def dims(self, value: int | Ref) -> list[Dim]:
        """The ids of every dim of a value; a tensor that nothing made gets new atoms, an input is frozen."""
        position = value.value if isinstance(value, Ref) else value
        if position not in self._dims:
            known = self.graph.values[position]
            frozen = known.role == "input"
            self._dims[position] = [None if frozen or n <= 1 else self.ids.fresh(n) for n in known.shape]
        return list(self._dims[position])

    def set_dims(self, value: int, dims: Sequence[Dim]) -> None:
        """Set the ids of a result."""
        shape = self.graph.values[value].shape
        assert len(dims) == len(shape), (shape, len(dims))
        assert all(d is None or n <= 1 or len(d) == n for d, n in zip(dims, shape, strict=True)), shape
        self._dims[value] = [None if n <= 1 else d for d, n in zip(dims, shape, strict=True)]

    def pin(self, dims: Iterable[Dim]) -> None:
        """No element of `dims` may leave."""
        for dim in dims:
            if dim is not None:
                self.ids.pin(dim)

    def pin_and_report(self, node: Node, dims: Iterable[Dim], reason: str) -> None:
        """Freeze dims for what an operator does with them, and report it where something could have left."""
        live = [dim for dim in dims if dim is not None and (self.ids.atoms(dim) != PINNED).any()]
        self.pin(live)
        if live and any(self.graph.values[value].from_parameter for value in node.refs()):
            self._unknown[node.op, node.module, reason] += 1

    def mark(self, flag: str, dim: Dim) -> None:
        """Flag the atoms of a dim."""
        if dim is not None:
            self.ids.mark(flag, dim)

    def unify(self, left: Dim, right: Dim) -> Dim:
        """Let two dims leave element by element together; frozen when either is."""
        if left is None or right is None:
            self.pin((left, right))
            return None
        if left is not right and not np.array_equal(left, right):
            self.ids.unify(left, right)
        return left

    def pin_unsupported(self, node: Node, reason: str) -> None:
        """Freeze all that an operator reads, and report it when a parameter had a part in that."""
        for value in node.refs():
            self.pin(self.dims(value))
        for value in node.outputs:
            self.set_dims(value, [None] * len(self.graph.values[value].shape))
        if any(self.graph.values[value].from_parameter for value in node.refs()):
            self._unknown[node.op, node.module, reason] += 1

    @property
    def unsupported(self) -> tuple[UnsupportedOperator, ...]:
        """What no rule covered."""
        return tuple(UnsupportedOperator(*key, count) for key, count in self._unknown.items())

    def broadcast(self, values: Iterable[int | Ref], shape: Sequence[int]) -> list[Dim]:
        """The dims of an elementwise result: operands of full size leave together, stretched ones have no say."""
        result: list[Dim] = [None] * len(shape)
        seen = [False] * len(shape)
        for value in values:
            position = value.value if isinstance(value, Ref) else value
            own = self.graph.values[position].shape
            for back, dim in enumerate(reversed(self.dims(position)), start=1):
                if own[-back] != shape[-back] or own[-back] <= 1:
                    continue
                result[-back] = self.unify(result[-back], dim) if seen[-back] else dim
                seen[-back] = True
        return result

    def merge(self, dims: Sequence[Dim], sizes: Sequence[int]) -> Dim:
        """The ids of several dims viewed as one."""
        if all(dim is None for dim in dims):
            return None
        merged = np.zeros(1, np.int32)
        for dim, size in zip(dims, sizes, strict=True):
            merged = self.ids.product(merged, np.zeros(size, np.int32) if dim is None else dim)
        return merged

    def split(self, dim: Dim, sizes: Sequence[int]) -> list[Dim]:
        """The ids of one dim viewed as several."""
        if dim is None or len(sizes) == 1:
            return [dim] + [None] * (len(sizes) - 1)
        n, rest = sizes[0], math.prod(sizes[1:])
        if n == 1:
            return [None, *self.split(dim, sizes[1:])]
        if rest == 1:
            return [dim] + [None] * (len(sizes) - 1)
        outer, inner = self._factor(dim, n, rest)
        self.mark("split", outer)
        return [outer, *self.split(inner, sizes[1:])]

    def _factor(self, dim: Ids, n: int, m: int) -> tuple[Dim, Dim]:
        """Write dim as a product of an outer dim of n and an inner one of m elements, binding atoms where needed."""
        table = self.ids.atoms(dim).reshape(n, m, -1)
        by_outer = (table == table[:, :1]).all(axis=(0, 1))
        by_inner = (table == table[:1]).all(axis=(0, 1)) & ~by_outer
        outer = [table[:, 0, column] for column in np.flatnonzero(by_outer)]
        inner = [table[0, :, column] for column in np.flatnonzero(by_inner)]
        mixed = np.flatnonzero(~by_outer & ~by_inner)
        if len(mixed):
            new_outer, new_inner = self.ids.fresh(n), self.ids.fresh(m)
            terms = self.ids.product(new_outer, new_inner)
            for column in mixed:
                self.ids.unify(terms, table[:, :, column].ravel())
            outer.append(new_outer)
            inner.append(new_inner)
        return self._join(outer), self._join(inner)

    def _join(self, factors: list[Ids]) -> Dim:
        joined: Dim = None
        for factor in factors:
            joined = factor if joined is None else self.ids.pair(joined, factor)
        return joined

    def view(self, dims: Sequence[Dim], before: Sequence[int], after: Sequence[int]) -> list[Dim]:
        """The dims of a tensor of shape `before` seen with shape `after`, stretch by stretch of equal size."""
        if math.prod(before) == 0:
            self.pin(dims)
            return [None] * len(after)
        result: list[Dim] = []
        i = j = 0
        while i < len(before) or j < len(after):
            start_i, start_j = i, j
            size_i = size_j = 1
            while size_i != size_j or (i == start_i and j == start_j):
                if i < len(before) and (size_i < size_j or j == len(after) or (size_i == size_j and i == start_i)):
                    size_i *= before[i]
                    i += 1
                else:
                    size_j *= after[j]
                    j += 1
            if j > start_j:
                result += self.split(self.merge(dims[start_i:i], before[start_i:i]), after[start_j:j])
        return result
