"""Quantizer branches become one vertex each (paper Alg. 1, lines 3-14).

A branch is found by its structure alone: elementwise operators with exactly one source of several elements, one sink of
the same shape, and quantizer parameters (step size, clipping value, exponent) among its other leaves: parameters or
buffers of a single element, or of one element for each channel of a weight. Attached to a weight when the source is
made of parameters, inserted into the activations otherwise.

A channel's own scales leave with it wherever it is cut, and are no members of a group: nobody may set a step size to
zero. So a branch with such scales stands for a copy of its source, which is all that it is to the groups.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch

from geta_hf.qadg.tracing.graph import Graph, Node, Ref

_COPIES = frozenset({"clone", "detach", "alias", "_to_copy", "ones_like", "zeros_like", "full_like"})
_VIEWS = frozenset({"view", "_unsafe_view", "_reshape_alias", "reshape", "unsqueeze", "squeeze", "expand"})
_CLIPS = frozenset({"clamp", "clamp_min", "clamp_max", "minimum", "maximum"})

Scales = Mapping[int, int]
"""Value -> the parameter or buffer of one element for each channel that it was made from alone."""


def merge_branches(graph: Graph) -> Graph:
    """The same graph with every quantizer branch as one node, `attached` or `inserted`, at its sink's place."""
    readers = graph.consumers()
    scales = _channel_scales(graph, readers)
    while True:
        branches = _regions(graph, readers, scales)
        merged, absorbed = _merge(graph, branches, readers, scales)
        loose = _unfit(graph, branches, scales) or _left_over(graph, absorbed, readers, scales)
        if not loose:
            break
        scales = {value: root for value, root in scales.items() if root not in loose}
    absorbed.update(position for position, node in enumerate(graph.nodes) if scales.keys() & set(node.outputs))
    nodes = [merged.get(position, node) for position, node in enumerate(graph.nodes)]
    kept = [node for position, node in enumerate(nodes) if position in merged or position not in absorbed]
    return Graph(graph.values, kept, graph.outputs)


def _merge(
    graph: Graph, branches: Iterable[list[int]], readers: dict[int, list[int]], scales: Scales
) -> tuple[dict[int, Node], set[int]]:
    """Place of its sink -> vertex, and the places of all nodes that the vertices stand for."""
    learned = _single_element_leaves(graph) | scales.keys()
    merged: dict[int, Node] = {}
    absorbed: set[int] = set()
    for branch in branches:
        node = _vertex(graph, branch, learned, scales, readers)
        if node is not None:
            merged[branch[-1]] = node
            absorbed.update(branch)
    return merged, absorbed


def _unfit(graph: Graph, branches: Iterable[list[int]], scales: Scales) -> set[int]:
    """The scales that are neither clipping values nor step sizes of a branch that they take part in."""
    found: set[int] = set()
    for branch in branches:
        nodes = [graph.nodes[position] for position in branch]
        roots = {scales[ref] for node in nodes for ref in node.refs() if ref in scales}
        found.update(root for root in roots if not _serves(root, nodes, scales))
    return found


def _serves(scale: int, nodes: Iterable[Node], scales: Scales) -> bool:
    """Whether a scale is a clipping value, or a step size: it takes part before the rounding and after."""
    rounded = False
    before: list[str] = []
    after: list[str] = []
    for node in nodes:
        rounded |= node.op == "round"
        if any(scales.get(ref) == scale for ref in node.refs()):
            (after if rounded else before).append(node.op)
    return bool(before) and rounded and (bool(after) or _CLIPS.issuperset(before))


def _left_over(graph: Graph, absorbed: set[int], readers: dict[int, list[int]], scales: Scales) -> set[int]:
    """The scales that are read outside of merged branches too."""
    found = set()
    for value, root in scales.items():
        if any(position not in absorbed for position in _users(value, graph, readers, scales)):
            found.add(root)
    return found


def _single_element_leaves(graph: Graph) -> set[int]:
    """Single-element parameters and buffers, and single-element values computed from them."""
    values = graph.values
    found = {p for p, v in enumerate(values) if v.elements == 1 and v.role in ("parameter", "buffer")}
    for node in graph.nodes:
        if any(ref in found for ref in node.refs()):
            found.update(value for value in node.outputs if values[value].elements == 1)
    return found


def _channel_scales(graph: Graph, readers: dict[int, list[int]]) -> dict[int, int]:
    """What may be scales of the channels of weights: read by nothing but elementwise operators on weights."""
    values = graph.values
    scales = {
        position: position
        for position, value in enumerate(values)
        if value.role in ("parameter", "buffer") and value.elements > 1 and value.elements in value.shape
    }
    for node in graph.nodes:
        roots = {scales.get(ref) for ref in node.refs() if values[ref].elements > 1}
        same = len(roots) == 1 and (node.pointwise or node.op in _COPIES | _VIEWS) and not node.writes
        if same and (root := roots.pop()) is not None and values[node.outputs[0]].elements == values[root].elements:
            scales[node.outputs[0]] = root

    def elsewhere(value: int) -> bool:
        users = [graph.nodes[position] for position in _users(value, graph, readers, scales)]
        return value in graph.outputs or not all(_elementwise(graph, u) and _of_weights(graph, u) for u in users)

    others = {root for value, root in scales.items() if elsewhere(value)}
    return {value: root for value, root in scales.items() if root not in others}


def _users(value: int, graph: Graph, readers: dict[int, list[int]], scales: Scales) -> list[int]:
    """The nodes that read a scale for more than to make another form of it."""
    return [position for position in readers.get(value, []) if not scales.keys() & set(graph.nodes[position].outputs)]


def _of_weights(graph: Graph, node: Node) -> bool:
    return graph.values[node.outputs[0]].weight_like


def _wide(graph: Graph, node: Node, scales: Scales) -> list[int]:
    return [ref for ref in dict.fromkeys(node.refs()) if graph.values[ref].elements > 1 and ref not in scales]


def _elementwise(graph: Graph, node: Node) -> bool:
    one = len(node.outputs) == 1 and not node.writes and graph.values[node.outputs[0]].elements > 1
    return one and (node.pointwise or node.op in _COPIES)


def _regions(graph: Graph, readers: dict[int, list[int]], scales: Scales) -> list[list[int]]:
    """Maximal runs of elementwise nodes with one common source, cut so that all nodes of a run reach the same sinks."""
    root: dict[int, int] = {}
    inside: dict[int, int] = {}
    for position, node in enumerate(graph.nodes):
        wide = _wide(graph, node, scales)
        roots = {root.get(value, value) for value in wide}
        if not _elementwise(graph, node) or not wide:
            continue
        source = roots.pop() if len(roots) == 1 else None
        if source is not None and graph.values[source].shape == graph.values[node.outputs[0]].shape:
            root[node.outputs[0]] = source
            inside[position] = source
    sinks = _reached_sinks(graph, inside, readers)
    regions: dict[tuple[int, frozenset[int]], list[int]] = defaultdict(list)
    for position, source in inside.items():
        regions[source, sinks[position]].append(position)
    return list(regions.values())


def _reached_sinks(graph: Graph, inside: dict[int, int], readers: dict[int, list[int]]) -> dict[int, frozenset[int]]:
    """For every node of a region, the values used outside the region that it has a part in."""
    outputs = set(graph.outputs)
    reached: dict[int, frozenset[int]] = {}
    for position in sorted(inside, reverse=True):
        value = graph.nodes[position].outputs[0]
        readers_of = readers.get(value, [])
        own = {value} if value in outputs or any(inside.get(r) != inside[position] for r in readers_of) else set()
        beyond = [reached[r] for r in readers_of if inside.get(r) == inside[position]]
        reached[position] = frozenset(own).union(*beyond)
    return reached


def _vertex(
    graph: Graph, branch: list[int], learned: set[int], scales: Scales, readers: dict[int, list[int]]
) -> Node | None:
    """One node for the branch, or None when it has not the structure of a quantizer."""
    nodes = [graph.nodes[position] for position in branch]
    made = {value for node in nodes for value in node.outputs}
    leaves = {ref for node in nodes for ref in node.refs()} - made
    sources = [leaf for leaf in leaves if graph.values[leaf].elements > 1 and leaf not in scales]
    own = set(branch)
    sinks = [v for v in made if v in graph.outputs or any(r not in own for r in readers.get(v, []))]
    if len(sources) != 1 or sinks != list(nodes[-1].outputs) or not leaves & learned:
        return None
    by_channel = leaves & scales.keys()
    op = "attached" if graph.values[sources[0]].weight_like else "inserted"
    inputs = {"source": Ref(sources[0]), "quantizer": [Ref(leaf) for leaf in sorted(leaves - by_channel - {*sources})]}
    body = _copy(sources[0], nodes[-1]) if by_channel else tuple(nodes)
    return Node(op, None, inputs, nodes[-1].outputs, nodes[-1].module, body)


def _copy(source: int, sink: Node) -> tuple[Node, ...]:
    func = torch.ops.aten.alias.default
    return (Node("alias", func, {"self": Ref(source)}, sink.outputs, sink.module),)
