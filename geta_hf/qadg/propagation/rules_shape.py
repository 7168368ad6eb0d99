"""Rules of the operators that rearrange entire dims: ids pass unchanged, or multiply in views.

None of these operators computes, so none of them ties two tensors to each other except `cat`, `stack` and `glu`, which
put tensors, or halves of one, at the same place.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from geta_hf.qadg.propagation.flow import Dim, Flow
from geta_hf.qadg.tracing.graph import Node

Rule = Callable[[Flow, Node], None]
"""Reads the ids of a node's inputs from the flow, and sets those of its outputs."""


def _view(flow: Flow, node: Node) -> None:
    """Merge and split dims: where heads come from."""
    source = node.inputs["self"]
    after = flow.graph.values[node.outputs[0]].shape
    # (2, 8, 768) seen as (2, 8, 12, 64): the first two dims pass, and 768 ids become heads times head dims.
    flow.set_dims(node.outputs[0], flow.view(flow.dims(source), flow.shape(source), after))


def _same(flow: Flow, node: Node) -> None:
    """Pass the dims of the only tensor."""
    source = next(node.refs())
    flow.set_dims(node.outputs[0], flow.dims(source))


def _transpose(flow: Flow, node: Node) -> None:
    dims = flow.dims(node.inputs["self"])
    if len(dims) > 1:
        # `t` of a vector is the vector itself, and `t` of a matrix names no dims.
        first = 0 if node.op == "t" else node.inputs["dim0"]
        second = 1 if node.op == "t" else node.inputs["dim1"]
        dims[first], dims[second] = dims[second], dims[first]
    flow.set_dims(node.outputs[0], dims)


def _permute(flow: Flow, node: Node) -> None:
    dims = flow.dims(node.inputs["self"])
    flow.set_dims(node.outputs[0], [dims[position] for position in node.inputs["dims"]])


def _unsqueeze(flow: Flow, node: Node) -> None:
    dims = flow.dims(node.inputs["self"])
    # A negative position counts in the result, which has one dim more than the source.
    dims.insert(node.inputs["dim"] % (len(dims) + 1), None)
    flow.set_dims(node.outputs[0], dims)


def _squeeze(flow: Flow, node: Node) -> None:
    shape = flow.shape(node.inputs["self"])
    chosen = node.inputs.get("dim", list(range(len(shape))))
    if isinstance(chosen, int):
        chosen = [chosen]
    # torch keeps a chosen dim unless it has one element.
    squeezed = {dim % len(shape) for dim in chosen if shape[dim] == 1}
    dims = flow.dims(node.inputs["self"])
    flow.set_dims(node.outputs[0], [ids for position, ids in enumerate(dims) if position not in squeezed])


def _expand(flow: Flow, node: Node) -> None:
    """Pass dims of full size; a stretched one gets new atoms.

    It repeats a single element, which is there no matter how many copies are read. So each copy may be removed alone,
    as in grouped-query attention, where a key is stretched over the query heads of its group.
    """
    source = flow.shape(node.inputs["self"])
    target = flow.graph.values[node.outputs[0]].shape
    new = len(target) - len(source)
    dims = [None] * new + flow.dims(node.inputs["self"])
    result: list[Dim] = []
    for position, size in enumerate(target):
        stretched = position < new or source[position - new] != size
        # For example (2, 4 key-value heads, 1, 8, 64) expanded to 3 query heads each: the 3 copies get atoms, which are
        # unified with those of the query heads where the two are multiplied.
        result.append(flow.ids.fresh(size) if stretched else dims[position])
    flow.set_dims(node.outputs[0], result)


def _repeat(flow: Flow, node: Node) -> None:
    """Repeat the ids with the elements: all copies are removed together."""
    repeats = node.inputs["repeats"]
    new = len(repeats) - len(flow.shape(node.inputs["self"]))
    dims = [None] * new + flow.dims(node.inputs["self"])
    # Tiled: torch repeats the dim and not its elements, so [a, b] twice is [a, b, a, b].
    repeated = [None if ids is None else np.tile(ids, count) for ids, count in zip(dims, repeats, strict=True)]
    flow.set_dims(node.outputs[0], repeated)


def _slice(flow: Flow, node: Node) -> None:
    dims = flow.dims(node.inputs["self"])
    dim = node.inputs["dim"]
    ids = dims[dim]
    if ids is not None:
        # Ends beyond the dim are cut off as in Python; a slice up to the end has 2**63 - 1 there.
        dims[dim] = ids[slice(node.inputs["start"], node.inputs["end"], node.inputs["step"])]
        _pin_single(flow, dims[dim])
    flow.set_dims(node.outputs[0], dims)


def _pin_single(flow: Flow, ids: Dim) -> None:
    """Pin what a dim of one element held: such a dim carries no ids, so nothing would tie its element any more."""
    if ids is not None and len(ids) == 1:
        flow.pin([ids])


def _select(flow: Flow, node: Node) -> None:
    """Drop a dim, and pin the element that is read: the result has no dim that could carry its id."""
    dims = flow.dims(node.inputs["self"])
    ids = dims.pop(node.inputs["dim"])
    if ids is not None:
        index = node.inputs["index"]
        # Only the one that is read. The others may be removed, unless an operator elsewhere forbids it.
        flow.pin([ids[[index]]])
    flow.set_dims(node.outputs[0], dims)


def _split(flow: Flow, node: Node) -> None:
    """Cut the ids along a dim: a fused qkv projection becomes query, key and value, each with its own rows."""
    dims = flow.dims(node.inputs["self"])
    dim = node.inputs["dim"]
    ids = dims[dim]
    start = 0
    for value in node.outputs:
        size = flow.graph.values[value].shape[dim]
        part = list(dims)
        if ids is not None:
            # The ids of rows are passed on, not made: row i of a part is removed with its row of the fused weight.
            part[dim] = ids[start : start + size]
            _pin_single(flow, part[dim])
        start += size
        flow.set_dims(value, part)


def _unbind(flow: Flow, node: Node) -> None:
    """Drop a dim, of which every element becomes a tensor of its own: a fixed number of results, so none is removed."""
    dims = flow.dims(node.inputs["self"])
    flow.pin([dims.pop(node.inputs["dim"])])
    for value in node.outputs:
        flow.set_dims(value, dims)


def _cat(flow: Flow, node: Node) -> None:
    """Concatenate the ids along the dim, and unify the others."""
    # torch lets an empty 1-D tensor be concatenated to anything.
    parts = [ref for ref in node.inputs["tensors"] if flow.shape(ref) != (0,)]
    rank = len(flow.graph.values[node.outputs[0]].shape)
    dim = node.inputs["dim"] % rank
    dims = [flow.dims(ref) for ref in parts]
    result: list[Dim] = []
    # Along `dim` all elements keep ids of their own, so that each part can lose other ones.
    for position in range(rank):
        column = [own[position] for own in dims]
        if position == dim:
            sizes = [flow.shape(ref)[dim] for ref in parts]
            result.append(_concatenated(column, sizes))
            continue
        merged = column[0]
        for other in column[1:]:
            merged = flow.unify(merged, other)
        result.append(merged)
    flow.set_dims(node.outputs[0], result)


def _concatenated(column: list[Dim], sizes: list[int]) -> Dim:
    """Join the ids of several parts along one dim, with zeros for those that are pinned."""
    if all(ids is None for ids in column):
        return None
    # A pinned dim is None, and has to be written out next to ids: [0, 0, 0, 7, 8].
    filled = [np.zeros(size, np.int32) if ids is None else ids for ids, size in zip(column, sizes, strict=True)]
    return np.concatenate(filled)


def _stack(flow: Flow, node: Node) -> None:
    """Unify all dims, and add one for the tensors, whose number is fixed."""
    parts = node.inputs["tensors"]
    dims = flow.broadcast(parts, flow.shape(parts[0]))
    dims.insert(node.inputs["dim"] % (len(dims) + 1), None)
    flow.set_dims(node.outputs[0], dims)


def _view_as_complex(flow: Flow, node: Node) -> None:
    """Drop the last dim, which holds a real and an imaginary part, and pin it: there is no half of a number."""
    dims = flow.dims(node.inputs["self"])
    flow.pin([dims.pop()])
    flow.set_dims(node.outputs[0], dims)


def _view_as_real(flow: Flow, node: Node) -> None:
    flow.set_dims(node.outputs[0], [*flow.dims(node.inputs["self"]), None])


def _glu(flow: Flow, node: Node) -> None:
    """Unify the two halves of the dim: element i of the first is multiplied with element i of the second."""
    dims = flow.dims(node.inputs["self"])
    dim = node.inputs["dim"]
    ids = dims[dim]
    if ids is not None:
        first, second = np.split(ids, 2)
        flow.unify(first, second)
        dims[dim] = first
        # A result of one element has no ids, so removing either half could no longer be seen.
        _pin_single(flow, first)
    flow.set_dims(node.outputs[0], dims)


def _factory(flow: Flow, node: Node) -> None:
    """Give new atoms to content that depends on no tensor: it can be made in any size."""
    for value in node.outputs:
        # Atoms, not None: pinned zeros would pin all that they are added to. A size in the model's code that has to
        # change is the concern of surgery.
        flow.set_dims(value, [flow.ids.fresh(size) for size in flow.graph.values[value].shape])


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
"""Operator name to rule."""
