"""Operators that move whole dims about: ids pass or multiply (views)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from geta_hf.qadg.propagation.flow import Dim, Flow
from geta_hf.qadg.tracing.graph import Node

Rule = Callable[[Flow, Node], None]


def _view(flow: Flow, node: Node) -> None:
    source = node.inputs["self"]
    after = flow.graph.values[node.outputs[0]].shape
    flow.set_dims(node.outputs[0], flow.view(flow.dims(source), flow.shape(source), after))


def _same(flow: Flow, node: Node) -> None:
    """One tensor in, the same dims out."""
    flow.set_dims(node.outputs[0], flow.dims(next(node.refs())))


def _transpose(flow: Flow, node: Node) -> None:
    dims = flow.dims(node.inputs["self"])
    if len(dims) > 1:
        first, second = (0, 1) if node.op == "t" else (node.inputs["dim0"], node.inputs["dim1"])
        dims[first], dims[second] = dims[second], dims[first]
    flow.set_dims(node.outputs[0], dims)


def _permute(flow: Flow, node: Node) -> None:
    dims = flow.dims(node.inputs["self"])
    flow.set_dims(node.outputs[0], [dims[position] for position in node.inputs["dims"]])


def _unsqueeze(flow: Flow, node: Node) -> None:
    dims = flow.dims(node.inputs["self"])
    dims.insert(node.inputs["dim"] % (len(dims) + 1), None)
    flow.set_dims(node.outputs[0], dims)


def _squeeze(flow: Flow, node: Node) -> None:
    shape = flow.shape(node.inputs["self"])
    chosen = node.inputs.get("dim", list(range(len(shape))))
    gone = {dim % len(shape) for dim in ([chosen] if isinstance(chosen, int) else chosen) if shape[dim] == 1}
    dims = flow.dims(node.inputs["self"])
    flow.set_dims(node.outputs[0], [dim for position, dim in enumerate(dims) if position not in gone])


def _expand(flow: Flow, node: Node) -> None:
    """A stretched dim repeats one element, so each of its elements may leave alone."""
    source, target = flow.shape(node.inputs["self"]), flow.graph.values[node.outputs[0]].shape
    new = len(target) - len(source)
    dims = [None] * new + flow.dims(node.inputs["self"])
    stretched = [position < new or source[position - new] != size for position, size in enumerate(target)]
    fresh: list[Dim] = [flow.ids.fresh(n) if s else d for n, s, d in zip(target, stretched, dims, strict=True)]
    flow.set_dims(node.outputs[0], fresh)


def _repeat(flow: Flow, node: Node) -> None:
    repeats = node.inputs["repeats"]
    dims = [None] * (len(repeats) - len(flow.shape(node.inputs["self"]))) + flow.dims(node.inputs["self"])
    flow.set_dims(node.outputs[0], [None if d is None else np.tile(d, n) for d, n in zip(dims, repeats, strict=True)])


def _slice(flow: Flow, node: Node) -> None:
    dims, dim = flow.dims(node.inputs["self"]), node.inputs["dim"]
    ids = dims[dim]
    if ids is not None:
        dims[dim] = ids[slice(node.inputs["start"], node.inputs["end"], node.inputs["step"])]
        _pin_single(flow, dims[dim])
    flow.set_dims(node.outputs[0], dims)


def _pin_single(flow: Flow, ids: Dim) -> None:
    """A dim of one element carries no ids, so what it held must stay."""
    if ids is not None and len(ids) == 1:
        flow.pin([ids])


def _select(flow: Flow, node: Node) -> None:
    dims = flow.dims(node.inputs["self"])
    ids = dims.pop(node.inputs["dim"])
    if ids is not None:
        index = node.inputs["index"]
        flow.pin([ids[[index]]])
    flow.set_dims(node.outputs[0], dims)


def _split(flow: Flow, node: Node) -> None:
    dims, dim = flow.dims(node.inputs["self"]), node.inputs["dim"]
    ids, start = dims[dim], 0
    for value in node.outputs:
        size = flow.graph.values[value].shape[dim]
        part = list(dims)
        if ids is not None:
            part[dim] = ids[start : start + size]
            _pin_single(flow, part[dim])
        start += size
        flow.set_dims(value, part)


def _unbind(flow: Flow, node: Node) -> None:
    dims = flow.dims(node.inputs["self"])
    flow.pin([dims.pop(node.inputs["dim"])])
    for value in node.outputs:
        flow.set_dims(value, dims)


def _cat(flow: Flow, node: Node) -> None:
    # torch lets an empty 1-D tensor be concatenated to anything.
    parts = [ref for ref in node.inputs["tensors"] if flow.shape(ref) != (0,)]
    rank = len(flow.graph.values[node.outputs[0]].shape)
    dim = node.inputs["dim"] % rank
    dims = [flow.dims(ref) for ref in parts]
    result: list[Dim] = []
    for position in range(rank):
        column = [own[position] for own in dims]
        if position != dim:
            merged = column[0]
            for other in column[1:]:
                merged = flow.unify(merged, other)
            result.append(merged)
        elif all(ids is None for ids in column):
            result.append(None)
        else:
            sizes = [flow.shape(ref)[dim] for ref in parts]
            filled = [np.zeros(n, np.int32) if i is None else i for i, n in zip(column, sizes, strict=True)]
            result.append(np.concatenate(filled))
    flow.set_dims(node.outputs[0], result)


def _stack(flow: Flow, node: Node) -> None:
    parts = node.inputs["tensors"]
    dims = flow.broadcast(parts, flow.shape(parts[0]))
    dims.insert(node.inputs["dim"] % (len(dims) + 1), None)
    flow.set_dims(node.outputs[0], dims)


def _view_as_complex(flow: Flow, node: Node) -> None:
    """The last dim, real and imaginary part, stays."""
    dims = flow.dims(node.inputs["self"])
    flow.pin([dims.pop()])
    flow.set_dims(node.outputs[0], dims)


def _view_as_real(flow: Flow, node: Node) -> None:
    flow.set_dims(node.outputs[0], [*flow.dims(node.inputs["self"]), None])


def _glu(flow: Flow, node: Node) -> None:
    """One half of the dim gates the other."""
    dims, dim = flow.dims(node.inputs["self"]), node.inputs["dim"]
    ids = dims[dim]
    if ids is not None:
        first, second = np.split(ids, 2)
        flow.unify(first, second)
        dims[dim] = first
        _pin_single(flow, first)
    flow.set_dims(node.outputs[0], dims)


def _factory(flow: Flow, node: Node) -> None:
    """New content that depends on no tensor: each element may leave."""
    for value in node.outputs:
        flow.set_dims(value, [flow.ids.fresh(n) for n in flow.graph.values[value].shape])


FACTORIES = frozenset({"new_zeros", "new_ones", "new_empty", "new_full"})
"""Factories that read a tensor, for its dtype and device alone; the others read none."""

SHAPE_RULES: dict[str, Rule] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), _view),
    **dict.fromkeys(
        ("clone", "detach", "alias", "lift_fresh", "lift_fresh_copy", "contiguous", "_to_copy", "_conj", "_neg_view"),
        _same,
    ),
    **dict.fromkeys(("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"), _same),
    **dict.fromkeys(("bernoulli_", "uniform_", "normal_", "exponential_"), _same),
    **dict.fromkeys(("t", "transpose", "transpose_"), _transpose),
    **dict.fromkeys(FACTORIES, _factory),
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes"), _split),
    "permute": _permute,
    **dict.fromkeys(("unsqueeze", "unsqueeze_"), _unsqueeze),
    **dict.fromkeys(("squeeze", "squeeze_"), _squeeze),
    "view_as_complex": _view_as_complex,
    "view_as_real": _view_as_real,
    "glu": _glu,
    "expand": _expand,
    "repeat": _repeat,
    "slice": _slice,
    "select": _select,
    "unbind": _unbind,
    "cat": _cat,
    "stack": _stack,
}
