"""What a value holds where elements leave, once zeros stand in their parameters: one number, or unknown.

Operators that choose (the largest, whether any or all) act alike on slices and on zeros only where that number says
nothing to them. It depends on the operators before: a sigmoid makes a half of a zero.
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
_ZERO_PASSING = frozenset({"attached", "inserted", "native_dropout", "glu"})
_ELEMENTWISE = frozenset({"hardswish", "hardswish_", "masked_fill", "masked_fill_"})
_CONTRACTIONS = {"mm": ("self", "mat2", ""), "bmm": ("self", "mat2", ""), "addmm": ("mat1", "mat2", "self")}
_CONTRACTIONS |= {"baddbmm": ("batch1", "batch2", "self"), "convolution": ("input", "weight", "bias")}
_NORMS = frozenset({"native_layer_norm", "_fused_rms_norm", "native_batch_norm", "native_group_norm"})
_NORMS |= {"_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "_batch_norm_no_update"}
_PROBES = ((0.73, -1.38, 0.21), (-1.17, 0.59, 2.3), (1.9, 0.4, -0.8), (-0.3, -2.2, 1.1))
"""For what is unknown, by operand, in every combination of signs: a result that stays the same depends on none."""


def where_removed(flow: Flow, value: int, node: Node) -> Number:
    """What `value` holds, when `node` reads it, wherever an element leaves; None when that is not known."""
    return _Numbers(flow).before(node).get(value)


class _Numbers:
    """The numbers of a flow's values, found in the order of execution as far as they are asked for.

    The flow keeps them from one question to the next.
    """

    def __init__(self, flow: Flow) -> None:
        self._flow, self._graph, self._known = flow, flow.graph, flow.numbers

    def before(self, node: Node) -> dict[int, Number]:
        """The numbers when everything before `node` has run."""
        nodes, flow = self._graph.nodes, self._flow
        while nodes[flow.numbered] is not node:
            step = nodes[flow.numbered]
            self._known.update(dict.fromkeys(step.outputs, self._step(step)))
            flow.numbered += 1
        return self._known

    def _step(self, node: Node) -> Number:
        if node.op in _PASSING or (node.op == "expand" and not self._stretched(node)):
            return self._shared(node)
        if node.op in _ZERO_PASSING:
            return 0.0 if self._zero(next(node.refs())) else None
        if node.op in _CONTRACTIONS:
            return 0.0 if self._contracted(node) else None
        if node.op in _NORMS:
            return 0.0 if self._normalised(node) else None
        if node.pointwise or node.op in _ELEMENTWISE:
            return self._elementwise(node)
        return None

    def _stretched(self, node: Node) -> bool:
        """Whether copies are made, each of which may leave while the others stay."""
        source, made = self._graph.values[node.inputs["self"].value], self._graph.values[node.outputs[0]]
        return source.elements != made.elements

    def _zero(self, value: int) -> bool:
        return self._known.get(value) == 0

    def _live(self, dim: Dim) -> bool:
        return dim is not None and bool((self._flow.ids.atoms(dim) != PINNED).any())

    def _harmless(self, ref: Ref | None, dims: Iterable[Dim]) -> bool:
        """Whether an operand is zero wherever something leaves along those of its dims that the result keeps."""
        return ref is None or self._zero(ref.value) or not any(map(self._live, dims))

    def _shared(self, node: Node) -> Number:
        """What all operands along which something leaves have in common."""
        operands = {ref for ref in node.refs() if any(map(self._live, self._flow.dims(ref)))}
        numbers = {self._known.get(ref) for ref in operands}
        return numbers.pop() if len(numbers) == 1 else None

    def _contracted(self, node: Node) -> bool:
        left, right, added = _CONTRACTIONS[node.op]
        a, b, bias = node.inputs[left], node.inputs[right], node.inputs.get(added)
        zeros = [self._zero(a.value), self._zero(b.value)]
        if bias is not None and not self._harmless(bias, self._flow.dims(bias)):
            return False
        own, theirs = self._flow.dims(a), self._flow.dims(b)
        if node.op == "convolution":
            if node.inputs["groups"] > 1 and not all(zeros):
                return False
            made = theirs[1:2] if node.inputs["transposed"] else theirs[:1]
            return self._harmless(a, own[:1]) and self._harmless(b, made)
        # A batch dim belongs to both, and a zero in either is enough.
        batch = any(zeros) or not any(map(self._live, own[:-2]))
        return batch and self._harmless(a, own[-2:-1]) and self._harmless(b, theirs[-1:])

    def _normalised(self, node: Node) -> bool:
        """Zero where weight and bias are; along other dims where what comes in is zero and nothing is added."""
        weight, bias = node.inputs.get("weight"), node.inputs.get("bias")
        if weight is None or not self._zero(weight.value) or (bias is not None and not self._zero(bias.value)):
            return False
        dims, rank = self._flow.dims(node.inputs["input"]), len(self._flow.shape(weight))
        others = dims[:-rank] if node.op in ("native_layer_norm", "_fused_rms_norm") else [dims[0], *dims[2:]]
        return not any(map(self._live, others))

    def _elementwise(self, node: Node) -> Number:
        shape = self._graph.values[node.outputs[0]].shape
        live = [back for back, dim in enumerate(reversed(self._flow.dims(node.outputs[0])), start=1) if self._live(dim)]
        results = {self._probe(node, shape, live, unknown) for unknown in _PROBES} if live else {None}
        return results.pop() if len(results) == 1 else None

    def _probe(self, node: Node, shape: tuple[int, ...], live: list[int], unknown: Sequence[float]) -> Number:
        """The result for one element that leaves; an operand that does not reach along all of those dims is unknown."""

        probes = dict(zip(dict.fromkeys(node.refs()), unknown, strict=False))

        def resolve(item: object) -> object:
            if not isinstance(item, Ref):
                return item
            value, own = self._graph.values[item.value], self._flow.shape(item)
            if value.role == "constant" and value.elements == 1 and value.data is not None:
                return value.data.reshape(())
            number = self._known.get(item.value)
            if number is None or any(len(own) < back or own[-back] != shape[-back] for back in live):
                probe = probes[item.value]
                number = probe if value.dtype.is_floating_point else float(probe > 0)
            return torch.tensor(number).to(value.dtype)

        try:
            result = node.call({name: map_nested(resolve, argument) for name, argument in node.inputs.items()})
        except (RuntimeError, TypeError, KeyError):
            return None
        if not isinstance(result, torch.Tensor) or result.is_complex() or bool(result.isnan().any()):
            return None
        return float(result)
