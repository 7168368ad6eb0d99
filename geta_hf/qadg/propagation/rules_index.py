"""Operators that address elements by position: what they choose by stays, the other dims pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from geta_hf.qadg.propagation.flow import Dim, Flow
from geta_hf.qadg.propagation.rules_shape import Rule
from geta_hf.qadg.tracing.graph import Node, Ref


def _embedding(flow: Flow, node: Node) -> None:
    rows, columns = flow.dims(node.inputs["weight"])
    flow.pin([rows])
    flow.set_dims(node.outputs[0], [*flow.dims(node.inputs["indices"]), columns])


def _gather(flow: Flow, node: Node) -> None:
    source, index, dim = node.inputs["self"], node.inputs["index"], node.inputs["dim"]
    ids, chosen = flow.dims(source), flow.dims(index)
    if not ids:
        return flow.set_dims(node.outputs[0], [])
    flow.pin([ids[dim]])
    for position, (n, m) in enumerate(zip(flow.shape(source), flow.shape(index), strict=True)):
        if position == dim % len(ids):
            continue
        if n == m:
            chosen[position] = flow.unify(ids[position], chosen[position])
        else:
            flow.pin([ids[position], chosen[position]])
            chosen[position] = None
    flow.set_dims(node.outputs[0], chosen)


def _scatter(flow: Flow, node: Node) -> None:
    """Like a gather, written the other way: what is written into leaves with what is written."""
    own, dim = flow.dims(node.inputs["self"]), node.inputs["dim"]
    if not own:
        return flow.set_dims(node.outputs[0], [])
    parts = [node.inputs[name] for name in ("index", "src", "source", "value") if name in node.inputs]
    parts = [part for part in parts if isinstance(part, Ref) and len(flow.shape(part)) == len(own)]
    for position, (n, ids) in enumerate(zip(flow.shape(node.inputs["self"]), own, strict=True)):
        others = [flow.dims(part)[position] for part in parts]
        same = position != dim % len(own) and all(flow.shape(part)[position] == n for part in parts)
        if same:
            for other in others:
                own[position] = flow.unify(own[position], other)
        else:
            flow.pin([ids, *others])
            own[position] = None
    flow.set_dims(node.outputs[0], own)


def _index(flow: Flow, node: Node) -> None:
    source, indices = node.inputs["self"], node.inputs["indices"]
    used = {position: ref for position, ref in enumerate(indices) if ref is not None}
    dims = flow.dims(source)
    picked = single_pick(flow, node)
    if picked is not None:
        position, places = picked
        ids = dims[position]
        dims[position] = None if ids is None else _checked(flow, ids[places])
        return flow.set_dims(node.outputs[0], dims)
    masks = any(flow.value(ref).dtype in (torch.bool, torch.uint8) for ref in used.values())
    if masks and (len(used) > 1 or flow.value(next(iter(used.values()))).content is None):
        return flow.pin_unsupported(node, "selects by a mask that the parameters have a part in")
    rank = _pin_indexed(flow, dims, used)
    chosen: list[Dim] = [None] * (1 if masks else max(len(flow.shape(ref)) for ref in used.values()))
    first, last = min(used), max(used)
    if masks or last - first + 1 == len(used):
        return flow.set_dims(node.outputs[0], dims[:first] + chosen + dims[first + rank :])
    rest = [ids for position, ids in enumerate(dims) if position not in used]
    flow.set_dims(node.outputs[0], chosen + rest)


def _pin_indexed(flow: Flow, dims: Sequence[Dim], used: dict[int, Ref]) -> int:
    """Freeze the dims that are indexed, and the indices; how many dims that are, side by side."""
    covered = 0
    for position, ref in used.items():
        mask = flow.value(ref).dtype in (torch.bool, torch.uint8)
        rank = len(flow.shape(ref)) if mask else 1
        flow.pin([*dims[position : position + rank], *flow.dims(ref)])
        covered += rank
    return covered


def single_pick(flow: Flow, node: Node) -> tuple[int, np.ndarray[Any, np.dtype[np.int64]]] | None:
    """The dim and the places that an index chooses, when it is one known list of distinct places along one dim."""
    used = [(position, ref) for position, ref in enumerate(node.inputs["indices"]) if ref is not None]
    if len(used) != 1:
        return None
    position, ref = used[0]
    content = flow.value(ref).content
    if (
        content is None
        or content.dtype in (torch.bool, torch.uint8)
        or content.dim() != 1
        or flow.value(ref).from_input
    ):
        return None
    places = content.numpy() % max(1, flow.shape(node.inputs["self"])[position])
    return (position, places) if len(np.unique(places)) == len(places) else None


def _checked(flow: Flow, ids: Dim) -> Dim:
    """A dim of one element carries no ids, so what it held must stay."""
    if ids is not None and len(ids) == 1:
        flow.pin([ids])
    return ids


def _index_put(flow: Flow, node: Node) -> None:
    """Writes values at indexed places; the dims that are not indexed leave together with the values'."""
    dims, values = flow.dims(node.inputs["self"]), node.inputs["values"]
    used = {position: ref for position, ref in enumerate(node.inputs["indices"]) if ref is not None}
    rank = _pin_indexed(flow, dims, used)
    first = min(used)
    if max(used) - first + 1 != len(used):
        return flow.pin_unsupported(node, "writes at indices that are not side by side")
    own, theirs = flow.shape(node.inputs["self"]), flow.dims(values)
    rest = list(range(first + rank, len(dims)))
    aligned = dict(zip(reversed(rest), reversed(range(len(theirs))), strict=False))
    for position, ids in enumerate(dims):
        place = aligned.get(position)
        if place is not None and flow.shape(values)[place] == own[position]:
            dims[position] = flow.unify(ids, theirs[place])
        elif position < first:
            flow.pin([ids])
    flow.pin(ids for place, ids in enumerate(theirs) if place not in aligned.values())
    flow.set_dims(node.outputs[0], [None if position < first + rank else ids for position, ids in enumerate(dims)])


def _index_select(flow: Flow, node: Node) -> None:
    dims, dim = flow.dims(node.inputs["self"]), node.inputs["dim"]
    flow.pin([dims[dim], *flow.dims(node.inputs["index"])])
    dims[dim] = None
    flow.set_dims(node.outputs[0], dims)


def _index_add(flow: Flow, node: Node) -> None:
    dims, dim = flow.dims(node.inputs["self"]), node.inputs["dim"]
    source = flow.dims(node.inputs["source"])
    flow.pin([dims[dim], source[dim], *flow.dims(node.inputs["index"])])
    merged = [
        None if p == dim % len(dims) else flow.unify(a, b) for p, (a, b) in enumerate(zip(dims, source, strict=True))
    ]
    flow.set_dims(node.outputs[0], merged)


def _masked_scatter(flow: Flow, node: Node) -> None:
    """Fills places in order; with a mask that is constant along the last dims, those pass."""
    own, source = node.inputs["self"], node.inputs["source"]
    mask = flow.value(node.inputs["mask"]).content
    shape, given = flow.shape(own), flow.shape(source)
    dims, theirs = flow.dims(own), flow.dims(source)
    passed = 0
    while mask is not None and passed < min(len(shape), len(given)) - 1 and shape[-1 - passed] == given[-1 - passed]:
        full = mask.expand(shape)
        if not bool((full == full.narrow(len(shape) - 1 - passed, 0, 1)).all()):
            break
        passed += 1
    chosen = flow.dims(node.inputs["mask"])
    for back in range(1, passed + 1):
        dims[-back] = flow.unify(dims[-back], theirs[-back])
        if back <= len(chosen) and flow.shape(node.inputs["mask"])[-back] == shape[-back]:
            flow.unify(dims[-back], chosen[-back])
    for ids in (dims, theirs, chosen):
        flow.pin(ids[: len(ids) - passed] if passed <= len(ids) else [])
    flow.set_dims(node.outputs[0], [None if p < len(shape) - passed else ids for p, ids in enumerate(dims)])


def _pad(flow: Flow, node: Node) -> None:
    dims, pad = flow.dims(node.inputs["self"]), node.inputs["pad" if "pad" in node.inputs else "padding"]
    for back in range(len(pad) // 2):
        if pad[2 * back] or pad[2 * back + 1]:
            flow.pin([dims[-1 - back]])
            dims[-1 - back] = None
    flow.set_dims(node.outputs[0], dims)


def _along(flow: Flow, node: Node) -> None:
    """What happens along the dims that it names depends on every element there, or on their places; they stay."""
    dims = flow.dims(next(node.refs()))
    named = node.inputs.get("dim", node.inputs.get("dims"))
    for dim in ([named] if isinstance(named, int) else named) or range(len(dims)):
        if dims:
            flow.pin_and_report(
                node, [dims[dim]], "every element along the dim, or its place, decides about the result"
            )
            dims[dim] = None
    for value in node.outputs:
        flow.set_dims(value, dims)


def _last_two(flow: Flow, node: Node) -> None:
    """A triangle or a diagonal: the places in the last two dims matter."""
    dims = flow.dims(node.inputs["self"])
    flow.pin_and_report(node, dims[-2:], "the place in the last two dims decides about the result")
    flow.set_dims(node.outputs[0], [*dims[:-2], None, None])


def _unfold(flow: Flow, node: Node) -> None:
    """Overlapping windows along a dim, whose places get a dim of their own at the end."""
    dims, dim = flow.dims(node.inputs["self"]), node.inputs["dimension"]
    flow.pin_and_report(node, [dims[dim]], "the place along the dim decides about the result")
    dims[dim] = None
    flow.set_dims(node.outputs[0], [*dims, None])


def _look_up(flow: Flow, node: Node) -> None:
    """The boundaries stay; the values that are looked up pass."""
    names = ("sorted_sequence", "self") if node.op == "searchsorted" else ("boundaries", "self")
    flow.pin(flow.dims(node.inputs[names[0]]))
    own = node.inputs[names[1]]
    flow.set_dims(node.outputs[0], flow.dims(own) if isinstance(own, Ref) else [])


INDEX_RULES: dict[str, Rule] = {
    "embedding": _embedding,
    "gather": _gather,
    **dict.fromkeys(
        ("scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_"), _scatter
    ),
    **dict.fromkeys(("index", "_unsafe_index"), _index),
    **dict.fromkeys(("index_put", "index_put_", "_index_put_impl_"), _index_put),
    "index_select": _index_select,
    **dict.fromkeys(("index_add", "index_add_", "index_copy", "index_copy_"), _index_add),
    **dict.fromkeys(("masked_scatter", "masked_scatter_"), _masked_scatter),
    **dict.fromkeys(
        ("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d"), _pad
    ),
    **dict.fromkeys(("_softmax", "_safe_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp"), _along),
    **dict.fromkeys(("cummax", "cummin"), _along),
    **dict.fromkeys(("flip", "roll", "sort", "topk", "argsort", "_fft_r2c", "_fft_c2c", "_fft_c2r"), _along),
    **dict.fromkeys(("triu", "tril"), _last_two),
    "unfold": _unfold,
    **dict.fromkeys(("searchsorted", "bucketize"), _look_up),
}
