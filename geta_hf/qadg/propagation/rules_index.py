"""Rules of the operators that address elements by position: the dims that they address are pinned, the others pass.

If element 3 of a dim is looked up by its position, removing element 1 would make it element 2, and every index into
the dim would be wrong. That is why vocabularies and places of tokens are never pruned. The exception is an index whose
content is known and depends on no input, such as a permutation of channels (`single_pick`).

Softmax, cumulative sums, sorting and Fourier transforms are here as well: what they give at one place depends on all
the others along the dim. A softmax over scores of which some are zero is not that over fewer scores, as exp(0) = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from geta_hf.qadg.propagation.flow import Dim, Flow
from geta_hf.qadg.propagation.rules_shape import Rule
from geta_hf.qadg.tracing.graph import Node, Ref

_MASKS = (torch.bool, torch.uint8)
"""Types of an index that selects by true and false, not by position; torch still takes bytes for such."""


def _embedding(flow: Flow, node: Node) -> None:
    rows, columns = flow.dims(node.inputs["weight"])
    # Token ids are given by the tokenizer: without row 5, every token after it would look up its neighbor's row.
    flow.pin([rows])
    flow.set_dims(node.outputs[0], [*flow.dims(node.inputs["indices"]), columns])


def _gather(flow: Flow, node: Node) -> None:
    """Pin the dim that is addressed; along the others, index and source are unified where they have equal sizes."""
    source = node.inputs["self"]
    index = node.inputs["index"]
    dim = node.inputs["dim"]
    ids = flow.dims(source)
    chosen = flow.dims(index)
    # A scalar has no dim that could be addressed.
    if not ids:
        return flow.set_dims(node.outputs[0], [])
    flow.pin([ids[dim]])
    for position, (size, index_size) in enumerate(zip(flow.shape(source), flow.shape(index), strict=True)):
        if position == dim % len(ids):
            continue
        if size == index_size:
            chosen[position] = flow.unify(ids[position], chosen[position])
        else:
            # The index is shorter, so only the first elements are read: which ones depends on their positions.
            flow.pin([ids[position], chosen[position]])
            chosen[position] = None
    flow.set_dims(node.outputs[0], chosen)


def _scatter(flow: Flow, node: Node) -> None:
    """Pin the dim that is addressed; along the others, unify what is written into with what is written."""
    target = node.inputs["self"]
    own = flow.dims(target)
    dim = node.inputs["dim"]
    if not own:
        return flow.set_dims(node.outputs[0], [])
    parts = [node.inputs[name] for name in ("index", "src", "source", "value") if name in node.inputs]
    # A value may be a number, or a tensor without dims.
    parts = [part for part in parts if isinstance(part, Ref) and len(flow.shape(part)) == len(own)]
    for position, (size, ids) in enumerate(zip(flow.shape(target), own, strict=True)):
        others = [flow.dims(part)[position] for part in parts]
        equal_sizes = all(flow.shape(part)[position] == size for part in parts)
        if position != dim % len(own) and equal_sizes:
            for other in others:
                own[position] = flow.unify(own[position], other)
        else:
            flow.pin([ids, *others])
            own[position] = None
    flow.set_dims(node.outputs[0], own)


def _index(flow: Flow, node: Node) -> None:
    """Pass the dims that are not indexed, and one that is indexed by known, distinct places; pin the others."""
    source = node.inputs["self"]
    used = _used_indices(node)
    dims = flow.dims(source)
    picked = single_pick(flow, node)
    if picked is not None:
        position, places = picked
        ids = dims[position]
        # Ids move with the elements: under places [2, 0], element 0 of the result carries the id of element 2.
        dims[position] = None if ids is None else _pinned_if_single(flow, ids[places])
        return flow.set_dims(node.outputs[0], dims)
    masks = any(flow.value(ref).dtype in _MASKS for ref in used.values())
    if masks and (len(used) > 1 or flow.value(next(iter(used.values()))).content is None):
        # How many elements a mask selects is then unknown, and with it the shape of the result.
        return flow.pin_unsupported(node, "selects by a mask that the parameters have a part in")
    rank = _pin_indexed(flow, dims, used)
    # A mask flattens the dims that it covers into one. Other indices are broadcast, and their dims take the place of
    # those that are indexed, or come first when these do not lie side by side, as in NumPy.
    chosen_rank = 1 if masks else max(len(flow.shape(ref)) for ref in used.values())
    chosen: list[Dim] = [None] * chosen_rank
    first = min(used)
    last = max(used)
    # x[i, j] of shape (4, 5, 6) with 3 indices each is (3, 6); x[i, :, j] is (3, 5).
    if masks or last - first + 1 == len(used):
        return flow.set_dims(node.outputs[0], dims[:first] + chosen + dims[first + rank :])
    rest = [ids for position, ids in enumerate(dims) if position not in used]
    flow.set_dims(node.outputs[0], chosen + rest)


def _used_indices(node: Node) -> dict[int, Ref]:
    """Return the indices by the dim that each addresses; torch writes None for a full slice."""
    return {position: ref for position, ref in enumerate(node.inputs["indices"]) if ref is not None}


def _pin_indexed(flow: Flow, dims: Sequence[Dim], used: dict[int, Ref]) -> int:
    """Pin the dims that are indexed, and the indices; return how many dims of the source are covered."""
    covered = 0
    for position, ref in used.items():
        # A mask covers as many dims as it has, an index of positions covers one.
        mask = flow.value(ref).dtype in _MASKS
        rank = len(flow.shape(ref)) if mask else 1
        flow.pin([*dims[position : position + rank], *flow.dims(ref)])
        covered += rank
    return covered


def single_pick(flow: Flow, node: Node) -> tuple[int, np.ndarray[Any, np.dtype[np.int64]]] | None:
    """Return the dim and the places that an index chooses, when it is one known list of distinct places along one dim.

    Args:
        flow: whose values hold the content of the index.
        node: a call of `index`.

    Returns:
        The position of the dim, and the places, int64, shape (chosen,), not negative. None when there are several
        indices or a mask, when the content depends on an input, or when a place occurs twice: then it is not a
        permutation or a part of one, and elements of the result would share an id.
    """
    used = _used_indices(node)
    if len(used) != 1:
        return None
    position, ref = next(iter(used.items()))
    value = flow.value(ref)
    content = value.content
    if content is None or value.from_input:
        return None
    if content.dtype in _MASKS or content.dim() != 1:
        return None
    size = flow.shape(node.inputs["self"])[position]
    # Negative places count from the end. A size of 0 has no places, and must not be divided by.
    places = content.numpy() % max(1, size)
    distinct = len(np.unique(places)) == len(places)
    return (position, places) if distinct else None


def _pinned_if_single(flow: Flow, ids: Dim) -> Dim:
    """Return `ids`, pinned if there is one: a dim of one element carries no ids, so nothing would tie it any more."""
    if ids is not None and len(ids) == 1:
        flow.pin([ids])
    return ids


def _index_put(flow: Flow, node: Node) -> None:
    """Pin the dims that are written by position; unify those behind them with the values' last dims."""
    target = node.inputs["self"]
    values = node.inputs["values"]
    dims = flow.dims(target)
    used = _used_indices(node)
    rank = _pin_indexed(flow, dims, used)
    first = min(used)
    # Index dims would come first in the values then, a layout that no rule here lines up.
    if max(used) - first + 1 != len(used):
        return flow.pin_unsupported(node, "writes at indices that are not side by side")
    own = flow.shape(target)
    theirs = flow.dims(values)
    # Values are broadcast to the shape that the index selects, so their dims line up on the right.
    rest = list(range(first + rank, len(dims)))
    aligned = dict(zip(reversed(rest), reversed(range(len(theirs))), strict=False))
    for position, ids in enumerate(dims):
        place = aligned.get(position)
        if place is not None and flow.shape(values)[place] == own[position]:
            dims[position] = flow.unify(ids, theirs[place])
        elif position < first:
            # The values have this dim as well, but behind a varying number of index dims.
            flow.pin([ids])
    flow.pin(ids for place, ids in enumerate(theirs) if place not in aligned.values())
    flow.set_dims(node.outputs[0], [None if position < first + rank else ids for position, ids in enumerate(dims)])


def _index_select(flow: Flow, node: Node) -> None:
    dims = flow.dims(node.inputs["self"])
    dim = node.inputs["dim"]
    flow.pin([dims[dim], *flow.dims(node.inputs["index"])])
    dims[dim] = None
    flow.set_dims(node.outputs[0], dims)


def _index_add(flow: Flow, node: Node) -> None:
    """Pin the dim that is addressed, in both tensors; unify the others."""
    dims = flow.dims(node.inputs["self"])
    dim = node.inputs["dim"]
    source = flow.dims(node.inputs["source"])
    # The index says at which place of `self` an element of `source` is added, so neither may be renumbered.
    flow.pin([dims[dim], source[dim], *flow.dims(node.inputs["index"])])
    merged: list[Dim] = []
    for position, (own, other) in enumerate(zip(dims, source, strict=True)):
        merged.append(None if position == dim % len(dims) else flow.unify(own, other))
    flow.set_dims(node.outputs[0], merged)


def _masked_scatter(flow: Flow, node: Node) -> None:
    """Pass the last dims along which the mask is constant; pin the others, whose places are filled in order.

    So pictures are put among the words of a multimodal model: the mask says which tokens are image tokens, and repeats
    the same answer along the hidden dim.
    """
    own = node.inputs["self"]
    source = node.inputs["source"]
    mask = flow.value(node.inputs["mask"]).content
    shape = flow.shape(own)
    given = flow.shape(source)
    dims = flow.dims(own)
    theirs = flow.dims(source)
    passed = 0
    while mask is not None and passed < min(len(shape), len(given)) - 1 and shape[-1 - passed] == given[-1 - passed]:
        # Constant along the dim: then a row is taken entirely or not at all, and column k is column k as before.
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
        if passed <= len(ids):
            flow.pin(ids[: len(ids) - passed])
    result = [ids if position >= len(shape) - passed else None for position, ids in enumerate(dims)]
    flow.set_dims(node.outputs[0], result)


def _pad(flow: Flow, node: Node) -> None:
    """Pin dims that are padded, and pass the others.

    The amounts come in pairs, before and after, for the last dim first.
    """
    dims = flow.dims(node.inputs["self"])
    pad = node.inputs["pad" if "pad" in node.inputs else "padding"]
    for back in range(len(pad) // 2):
        if pad[2 * back] or pad[2 * back + 1]:
            # The new elements belong to no parameter, and where they are inserted is counted in the full size.
            flow.pin([dims[-1 - back]])
            dims[-1 - back] = None
    flow.set_dims(node.outputs[0], dims)


def _along(flow: Flow, node: Node) -> None:
    """Pin the dims that are named, or all when none is: what happens there depends on every element or its place."""
    dims = flow.dims(next(node.refs()))
    named = node.inputs.get("dim", node.inputs.get("dims"))
    # `_softmax` names one dim, `flip` a list of them, `roll` a list that may be empty.
    if isinstance(named, int):
        named = [named]
    if not dims:
        # A scalar: torch accepts dim=0 for it.
        named = []
    elif not named:
        named = range(len(dims))
    for dim in named:
        flow.pin_and_report(node, [dims[dim]], "every element along the dim, or its place, decides about the result")
        dims[dim] = None
    for value in node.outputs:
        flow.set_dims(value, dims)


def _last_two(flow: Flow, node: Node) -> None:
    """Pin the last two dims, in which a triangle or a diagonal is taken by position."""
    dims = flow.dims(node.inputs["self"])
    flow.pin_and_report(node, dims[-2:], "the place in the last two dims decides about the result")
    flow.set_dims(node.outputs[0], [*dims[:-2], None, None])


def _unfold(flow: Flow, node: Node) -> None:
    """Pin a dim of which overlapping windows are taken; the places in a window get a dim of their own at the end."""
    dims = flow.dims(node.inputs["self"])
    dim = node.inputs["dimension"]
    flow.pin_and_report(node, [dims[dim]], "the place along the dim decides about the result")
    dims[dim] = None
    flow.set_dims(node.outputs[0], [*dims, None])


def _look_up(flow: Flow, node: Node) -> None:
    """Pin the boundaries; pass the values that are looked up among them."""
    boundaries = "sorted_sequence" if node.op == "searchsorted" else "boundaries"
    flow.pin(flow.dims(node.inputs[boundaries]))
    own = node.inputs["self"]
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
"""Operator name to rule."""
