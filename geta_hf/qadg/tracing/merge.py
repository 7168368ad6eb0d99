"""Merge quantizer branches into one vertex each (paper Alg. 1, lines 3-14).

Fake quantization of a weight is a dozen elementwise operators that share parameters (step size d, clipping value q_m,
exponent t). The paper calls them an attached branch: `w -> abs -> minimum -> pow -> div -> round -> mul -> w^Q`.
Between an activation and the layer that reads it, they are an inserted branch. One vertex takes the place of each, so
that nothing further on has to understand quantizers, and the groups are those of the model without them.

A branch is found by its structure alone, so foreign quantizers are found as well: elementwise operators with exactly
one source of several elements, one sink of the same shape, and among its other inputs quantizer parameters, which are
parameters or buffers of a single element, or of one element for each channel of a weight. It is attached when the
source is made of parameters alone (lines 3-8), inserted otherwise (lines 9-14).

A channel's own scales are removed with it wherever it is cut, but they are no members of a group: zeroing a group sets
all of its members to zero, and a step size must not be zero. So a branch with such scales counts as a copy of its
source, which is all that it means to the groups.
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
    """Merge every quantizer branch into one node, `attached` or `inserted`, at its sink's place.

    Args:
        graph: as recorded; not changed.

    Returns:
        A graph with the same values and outputs.
    """
    readers = graph.consumers()
    scales = _channel_scales(graph, readers)
    # What looks like a scale at first may turn out to be none: a bias of one element for each channel, say. Then it is
    # dropped and all branches are found again without it, as it may have been what held one together.
    while True:
        branches = _regions(graph, readers, scales)
        merged, absorbed = _merge(graph, branches, readers, scales)
        dropped = _unfit(graph, branches, scales) or _read_elsewhere(graph, absorbed, readers, scales)
        if not dropped:
            break
        scales = {value: root for value, root in scales.items() if root not in dropped}
    # Nodes that only make another form of a scale, such as a view of it, have no reader any more.
    absorbed.update(position for position, node in enumerate(graph.nodes) if scales.keys() & set(node.outputs))
    kept = []
    for position, node in enumerate(graph.nodes):
        if position in merged:
            kept.append(merged[position])
        elif position not in absorbed:
            kept.append(node)
    return Graph(graph.values, kept, graph.outputs)


def _merge(
    graph: Graph, branches: Iterable[list[int]], readers: dict[int, list[int]], scales: Scales
) -> tuple[dict[int, Node], set[int]]:
    """Return the vertex of each branch by its sink's place, and the places of all nodes that were merged."""
    # Without a parameter among its inputs, a run of elementwise operators is an activation function and no quantizer.
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
    """Return the scales that are neither clipping values nor step sizes of a branch that they take part in."""
    found: set[int] = set()
    for branch in branches:
        nodes = [graph.nodes[position] for position in branch]
        roots = {scales[ref] for node in nodes for ref in node.refs() if ref in scales}
        found.update(root for root in roots if not _serves(root, nodes, scales))
    return found


def _serves(scale: int, nodes: Iterable[Node], scales: Scales) -> bool:
    """Return whether a scale is a clipping value, or a step size: it takes part before the rounding and after.

    A norm's weight multiplies once, and must not be taken for a scale: its elements are members of groups.
    """
    rounded = False
    before: list[str] = []
    after: list[str] = []
    for node in nodes:
        # d divides before the rounding and multiplies after: x^Q = d · round(x / d) (Eq. 2).
        rounded |= node.op == "round"
        if any(scales.get(ref) == scale for ref in node.refs()):
            (after if rounded else before).append(node.op)
    is_clip = _CLIPS.issuperset(before)
    is_step_size = bool(after)
    return bool(before) and rounded and (is_step_size or is_clip)


def _read_elsewhere(graph: Graph, absorbed: set[int], readers: dict[int, list[int]], scales: Scales) -> set[int]:
    """Return the scales that are read outside of merged branches too."""
    found = set()
    for value, root in scales.items():
        if any(position not in absorbed for position in _users(value, graph, readers, scales)):
            found.add(root)
    return found


def _single_element_leaves(graph: Graph) -> set[int]:
    """Return single-element parameters and buffers, and single-element values computed from them."""
    values = graph.values
    found = set()
    for position, value in enumerate(values):
        if value.elements == 1 and value.role in ("parameter", "buffer"):
            found.add(position)
    for node in graph.nodes:
        # A quantizer first makes its parameters safe, by abs or softplus, or computes the step size from a bit width.
        if any(ref in found for ref in node.refs()):
            found.update(value for value in node.outputs if values[value].elements == 1)
    return found


def _channel_scales(graph: Graph, readers: dict[int, list[int]]) -> dict[int, int]:
    """Return what may be scales of the channels of weights: read by nothing but elementwise operators on weights."""
    values = graph.values
    scales: dict[int, int] = {}
    for position, value in enumerate(values):
        one_long_dim = value.elements > 1 and value.elements in value.shape
        if one_long_dim and value.role in ("parameter", "buffer"):
            scales[position] = position
    # What is made of a scale alone, with as many elements, is another form of it: its view, its absolute value.
    for node in graph.nodes:
        roots = {scales.get(ref) for ref in node.refs() if values[ref].elements > 1}
        if len(roots) != 1 or node.writes:
            continue
        (root,) = roots
        if root is None or not (node.pointwise or node.op in _COPIES | _VIEWS):
            continue
        if values[node.outputs[0]].elements == values[root].elements:
            scales[node.outputs[0]] = root

    def used_otherwise(value: int) -> bool:
        if value in graph.outputs:
            return True
        users = [graph.nodes[position] for position in _users(value, graph, readers, scales)]
        return not all(_elementwise(graph, user) and _of_weights(graph, user) for user in users)

    others = {root for value, root in scales.items() if used_otherwise(value)}
    return {value: root for value, root in scales.items() if root not in others}


def _users(value: int, graph: Graph, readers: dict[int, list[int]], scales: Scales) -> list[int]:
    """Return the nodes that read a scale for more than to make another form of it."""
    return [position for position in readers.get(value, []) if not scales.keys() & set(graph.nodes[position].outputs)]


def _of_weights(graph: Graph, node: Node) -> bool:
    return graph.values[node.outputs[0]].weight_like


def _wide(graph: Graph, node: Node, scales: Scales) -> list[int]:
    """Return the values of several elements that a node reads, other than scales: what it may quantize."""
    return [ref for ref in dict.fromkeys(node.refs()) if graph.values[ref].elements > 1 and ref not in scales]


def _elementwise(graph: Graph, node: Node) -> bool:
    if len(node.outputs) != 1 or node.writes:
        return False
    return graph.values[node.outputs[0]].elements > 1 and (node.pointwise or node.op in _COPIES)


def _regions(graph: Graph, readers: dict[int, list[int]], scales: Scales) -> list[list[int]]:
    """Return maximal runs of elementwise nodes with one common source, whose nodes all reach the same sinks.

    A source may fan out into several branches: the quantizers of query, key and value read the same hidden states.
    Their nodes have the same source but different sinks, which keeps them apart.
    """
    source_of: dict[int, int] = {}
    inside: dict[int, int] = {}
    for position, node in enumerate(graph.nodes):
        if not _elementwise(graph, node):
            continue
        sources = {source_of.get(value, value) for value in _wide(graph, node, scales)}
        # Two sources, such as a sum of activations: elementwise too, but what it makes is a quantized form of neither.
        if len(sources) != 1:
            continue
        (source,) = sources
        if graph.values[source].shape == graph.values[node.outputs[0]].shape:
            source_of[node.outputs[0]] = source
            inside[position] = source
    sinks = _reached_sinks(graph, inside, readers)
    regions: dict[tuple[int, frozenset[int]], list[int]] = defaultdict(list)
    for position, source in inside.items():
        # By the sinks as well: query, key and value quantize the same hidden states in three branches.
        regions[source, sinks[position]].append(position)
    return list(regions.values())


def _reached_sinks(graph: Graph, inside: dict[int, int], readers: dict[int, list[int]]) -> dict[int, frozenset[int]]:
    """Return for every node of a region the values used outside the region that it has a part in."""
    outputs = set(graph.outputs)
    reached: dict[int, frozenset[int]] = {}
    # Backwards, so that the readers of a node's result are done before it.
    for position in sorted(inside, reverse=True):
        value = graph.nodes[position].outputs[0]
        readers_of = readers.get(value, [])
        own: set[int] = set()
        beyond: list[frozenset[int]] = []
        for reader in readers_of:
            if inside.get(reader) == inside[position]:
                beyond.append(reached[reader])
            else:
                own.add(value)
        if value in outputs:
            own.add(value)
        reached[position] = frozenset(own).union(*beyond)
    return reached


def _vertex(
    graph: Graph, branch: list[int], learned: set[int], scales: Scales, readers: dict[int, list[int]]
) -> Node | None:
    """Return one node for the branch (lines 6 and 11), or None when it has not the structure of a quantizer."""
    nodes = [graph.nodes[position] for position in branch]
    made = {value for node in nodes for value in node.outputs}
    leaves = {ref for node in nodes for ref in node.refs()} - made
    sources = [leaf for leaf in leaves if graph.values[leaf].elements > 1 and leaf not in scales]
    own = set(branch)
    sinks = []
    for value in made:
        if value in graph.outputs or any(reader not in own for reader in readers.get(value, [])):
            sinks.append(value)
    # A branch has one way in and one way out. If a value inside is read elsewhere, one vertex cannot replace it.
    if len(sources) != 1 or sinks != list(nodes[-1].outputs) or not leaves & learned:
        return None
    (source,) = sources
    by_channel = leaves & scales.keys()
    op = "attached" if graph.values[source].weight_like else "inserted"
    parameters = [Ref(leaf) for leaf in sorted(leaves - by_channel - {source})]
    inputs = {"source": Ref(source), "quantizer": parameters}
    body = _copy(source, nodes[-1]) if by_channel else tuple(nodes)
    return Node(op, None, inputs, nodes[-1].outputs, nodes[-1].module, body)


def _copy(source: int, sink: Node) -> tuple[Node, ...]:
    """Return a body that copies the source to the sink, for a branch with scales of its own for each channel."""
    func = torch.ops.aten.alias.default
    return (Node("alias", func, {"self": Ref(source)}, sink.outputs, sink.module),)
