"""Find what number a value holds where elements are removed, once their parameters are zero; or that it is unknown.

Removing a group and zeroing its parameters must give the same outputs. For operators that sum, choose or ask (the
largest, whether any or all), that depends on the number that the removed elements hold when the operator reads them,
and this depends on the operators before: `linear` gives 0, then `sigmoid` gives 0.5, then `x > 0` gives true.

The number is found by running each elementwise operator on it. Operands that are not known are replaced by several
probes: if the result is the same for all of them, it depends on none of them, as in 0 * unknown = 0. Where an operator
is not understood, the number is None, and the rules in `rules_compute` pin the dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from geta_hf.qadg.propagation.element_ids import PINNED
from geta_hf.qadg.propagation.flow import Dim, Flow
from geta_hf.qadg.tracing.graph import Node, Ref, map_nested

Number = float | None

_VIEWS = {"view", "_unsafe_view", "reshape", "_reshape_alias", "t", "transpose", "transpose_", "permute", "unsqueeze"}
_VIEWS |= {"unsqueeze_", "squeeze", "squeeze_", "repeat", "slice", "select", "split", "split_with_sizes", "unbind"}
_COPIES = {"clone", "detach", "alias", "contiguous", "_to_copy", "lift_fresh", "cat", "stack", "embedding"}
_POOLS = {"index_select", "max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d"}
_PASSING = frozenset(_VIEWS | _COPIES | _POOLS)
"""Give the number that they read. Pools do, too: they run over places, all of which hold the same number."""
_ZERO_PASSING = frozenset({"attached", "inserted", "native_dropout", "glu"})
"""Give zero where they read zero. A quantizer rounds zero to zero; of other numbers nothing is claimed."""
_ELEMENTWISE = frozenset({"hardswish", "hardswish_", "masked_fill", "masked_fill_"})
_CONTRACTIONS = {"mm": ("self", "mat2", ""), "bmm": ("self", "mat2", ""), "addmm": ("mat1", "mat2", "self")}
_CONTRACTIONS |= {"baddbmm": ("batch1", "batch2", "self"), "convolution": ("input", "weight", "bias")}
_NORMS = frozenset({"native_layer_norm", "_fused_rms_norm", "native_batch_norm", "native_group_norm"})
_NORMS |= {"_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "_batch_norm_no_update"}
_PROBES = ((0.73, -1.38, 0.21), (-1.17, 0.59, 2.3), (1.9, 0.4, -0.8), (-0.3, -2.2, 1.1))
"""For what is unknown, by operand, in every combination of signs: a result that is always the same depends on none."""


def where_removed(flow: Flow, value: int, node: Node) -> Number:
    """Return what `value` holds, when `node` reads it, wherever an element is removed; None when that is not known."""
    return _Numbers(flow).before(node).get(value)


class _Numbers:
    """The numbers of a flow's values, found in the order of execution as far as they are asked for.

    The flow keeps them from one question to the next.
    """

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._graph = flow.graph
        self._known = flow.numbers

    def before(self, node: Node) -> dict[int, Number]:
        """Return the numbers when everything before `node` has run.

        Not later ones: an operator in place may change a value after `node` has read it.
        """
        while self._graph.nodes[self._flow.numbered] is not node:
            # Each node is computed once, with the pins known by then. Later ones can only shrink what may be removed,
            # so what was found still holds.
            step = self._graph.nodes[self._flow.numbered]
            number = self._step(step)
            for value in step.outputs:
                self._known[value] = number
            self._flow.numbered += 1
        return self._known

    def _step(self, node: Node) -> Number:
        """Return the number that the results of one operator hold."""
        if node.op in _PASSING or (node.op == "expand" and not self._stretched(node)):
            return self._shared(node)
        if node.op in _ZERO_PASSING:
            # The first tensor is the data; the others are scales and clipping values.
            return 0.0 if self._zero(next(node.refs())) else None
        if node.op in _CONTRACTIONS:
            return 0.0 if self._contracted(node) else None
        if node.op in _NORMS:
            return 0.0 if self._normalised(node) else None
        if node.pointwise or node.op in _ELEMENTWISE:
            return self._elementwise(node)
        return None

    def _stretched(self, node: Node) -> bool:
        """Return whether copies are made: each may be removed while its source, and so its number, is arbitrary."""
        source = self._graph.values[node.inputs["self"].value]
        made = self._graph.values[node.outputs[0]]
        return source.elements != made.elements

    def _zero(self, value: int) -> bool:
        return self._known.get(value) == 0

    def _removable(self, dim: Dim) -> bool:
        """Return whether any element of a dim is not pinned (so far)."""
        return dim is not None and bool((self._flow.ids.atoms(dim) != PINNED).any())

    def _harmless(self, ref: Ref | None, dims: Iterable[Dim]) -> bool:
        """Return whether an operand is zero wherever something is removed along `dims`, those that the result keeps."""
        return ref is None or self._zero(ref.value) or not any(map(self._removable, dims))

    def _shared(self, node: Node) -> Number:
        """Return the number that all operands along which something may be removed have in common."""
        operands = {ref for ref in node.refs() if any(map(self._removable, self._flow.dims(ref)))}
        # Of `cat`, both parts have to hold the same number, as the result has room for one. Indices have no say.
        numbers = {self._known.get(ref) for ref in operands}
        return numbers.pop() if len(numbers) == 1 else None

    def _contracted(self, node: Node) -> bool:
        """Return whether a matrix product or convolution gives zero wherever something is removed.

        Row i of the result is zero where row i of the left operand is, column j where column j of the right one is. The
        inner dim does not occur in the result.
        """
        left, right, added = _CONTRACTIONS[node.op]
        a = node.inputs[left]
        b = node.inputs[right]
        bias = node.inputs.get(added)
        zeros = [self._zero(a.value), self._zero(b.value)]
        # 0 · x + bias is the bias, which has to be zero as well wherever it can be removed.
        if bias is not None and not self._harmless(bias, self._flow.dims(bias)):
            return False
        own = self._flow.dims(a)
        theirs = self._flow.dims(b)
        if node.op == "convolution":
            if node.inputs["groups"] > 1 and not all(zeros):
                # Which input channels make an output channel depends on the groups; both zero is always enough.
                return False
            made = theirs[1:2] if node.inputs["transposed"] else theirs[:1]
            return self._harmless(a, own[:1]) and self._harmless(b, made)
        # A batch dim belongs to both, and a zero in either is enough.
        batch = any(zeros) or not any(map(self._removable, own[:-2]))
        return batch and self._harmless(a, own[-2:-1]) and self._harmless(b, theirs[-1:])

    def _normalised(self, node: Node) -> bool:
        """Return whether a norm gives zero wherever something is removed.

        Along the dims that its weight and bias have it does if both are zero there. Along other dims an entire slice of
        zeros is normalised, to which the bias is added, so there nothing is claimed.
        """
        weight = node.inputs.get("weight")
        bias = node.inputs.get("bias")
        if weight is None or not self._zero(weight.value):
            return False
        if bias is not None and not self._zero(bias.value):
            return False
        dims = self._flow.dims(node.inputs["input"])
        rank = len(self._flow.shape(weight))
        by_last_dims = node.op in ("native_layer_norm", "_fused_rms_norm")
        # Batch and group norms have channels second: (batch, channels, places...).
        others = dims[:-rank] if by_last_dims else [dims[0], *dims[2:]]
        return not any(map(self._removable, others))

    def _elementwise(self, node: Node) -> Number:
        """Return the result for a removed element if it is the same whatever the unknown operands hold."""
        made = node.outputs[0]
        shape = self._graph.values[made].shape
        # Dims are counted from the right, 1 for the last, since that is where operands line up.
        dims = enumerate(reversed(self._flow.dims(made)), start=1)
        removable = [back for back, dim in dims if self._removable(dim)]
        # Nothing of the result can be removed, so there is nothing to know a number of.
        if not removable:
            return None
        results = {self._probe(node, shape, removable, unknown) for unknown in _PROBES}
        return results.pop() if len(results) == 1 else None

    def _probe(self, node: Node, shape: tuple[int, ...], removable: list[int], unknown: Sequence[float]) -> Number:
        """Return the result for one removed element, with `unknown` for the operands that are not known there.

        Args:
            node: an elementwise operator.
            shape: of its result.
            removable: dims along which elements may be removed, counted from the right.
            unknown: a number for each operand.
        """
        probes = dict(zip(dict.fromkeys(node.refs()), unknown, strict=False))

        def resolve(item: object) -> object:
            if not isinstance(item, Ref):
                return item
            value = self._graph.values[item.value]
            own = self._flow.shape(item)
            if value.role == "constant" and value.elements == 1 and value.data is not None:
                return value.data.reshape(())
            number = self._known.get(item.value)
            # An operand that is stretched along one of the dims holds something of its own there, removed or not.
            stretched = any(len(own) < back or own[-back] != shape[-back] for back in removable)
            # An unknown operand may hold anything, so it is one of the probes rather than a number of our choice.
            if number is None or stretched:
                probe = probes[item.value]
                # A mask is true or false, and `where` insists on bool: 0.73 becomes true, -1.38 false.
                number = probe if value.dtype.is_floating_point else float(probe > 0)
            return torch.tensor(number).to(value.dtype)

        try:
            result = node.call({name: map_nested(resolve, argument) for name, argument in node.inputs.items()})
        except (RuntimeError, TypeError, KeyError):
            # An operator that insists on dims, or has more operands than there are probes: nothing is known.
            return None
        if not isinstance(result, torch.Tensor) or result.is_complex() or bool(result.isnan().any()):
            return None
        return float(result)
