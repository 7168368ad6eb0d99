"""Find the parameters that make the model's outputs: the last linear layer before each of them.

A family that feeds such a layer gets the coupling "output", and is not pruned by default.
"""

from __future__ import annotations

from collections.abc import Iterator

from geta_hf.qadg.propagation.rules_index import INDEX_RULES
from geta_hf.qadg.propagation.rules_shape import SHAPE_RULES
from geta_hf.qadg.tracing.graph import Graph, Node

_CONTRACTIONS = frozenset({"mm", "addmm", "bmm", "baddbmm", "convolution"})


def output_weights(graph: Graph) -> set[int]:
    """Return the weights whose product with an activation reaches an output, with only elementwise steps in between.

    The walk goes backwards from the outputs. A sum of two activations, as at the end of a residual block, ends it: a
    weight that writes to the residual stream is no task head.

    Args:
        graph: with its quantizer branches merged.

    Returns:
        Positions of parameters in `Graph.values`.
    """
    made_by = graph.producers()
    weights: set[int] = set()
    pending = list(graph.outputs)
    seen = set(graph.outputs)
    while pending:
        position = made_by.get(pending.pop())
        if position is None:
            continue
        node = graph.nodes[position]
        if node.op in _CONTRACTIONS:
            weights.update(_parameters(graph, made_by, node))
            continue
        activations = {ref for ref in node.refs() if _is_activation(graph, ref)}
        # A sum of two activations has two, so a residual connection ends the walk here.
        if len(activations) == 1 and _passes(node):
            (activation,) = activations
            if activation not in seen:
                seen.add(activation)
                pending.append(activation)
    return weights


def _is_activation(graph: Graph, value: int) -> bool:
    return graph.values[value].from_parameter and graph.values[value].from_input


def _passes(node: Node) -> bool:
    # A merged activation quantizer ("inserted") is between a layer and its output as well.
    return node.pointwise or node.op in SHAPE_RULES or node.op in INDEX_RULES or node.op == "inserted"


def _parameters(graph: Graph, made_by: dict[int, int], node: Node) -> Iterator[int]:
    """Yield the parameters that a contraction multiplies with, seen through transposes and attached quantizers."""
    # From an activation the walk would go on through the entire model.
    pending = [ref for ref in node.refs() if graph.values[ref].weight_like]
    while pending:
        value = pending.pop()
        if graph.values[value].role == "parameter":
            yield value
        elif value in made_by:
            source = graph.nodes[made_by[value]]
            pending += [ref for ref in source.refs() if graph.values[ref].weight_like]
