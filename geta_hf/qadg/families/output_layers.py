"""Which parameters make the model's outputs: the last linear layer before each of them."""

from __future__ import annotations

from collections.abc import Iterator

from geta_hf.qadg.propagation.rules_index import INDEX_RULES
from geta_hf.qadg.propagation.rules_shape import SHAPE_RULES
from geta_hf.qadg.tracing.graph import Graph, Node

_CONTRACTIONS = frozenset({"mm", "addmm", "bmm", "baddbmm", "convolution"})


def output_weights(graph: Graph) -> set[int]:
    """Weights whose product with an activation reaches an output with nothing but elementwise steps in between.

    A sum of two activations, as at the end of a residual block, ends the walk: what it adds is no task head.
    """
    made = graph.producers()
    weights: set[int] = set()
    pending, seen = list(graph.outputs), set(graph.outputs)
    while pending:
        position = made.get(pending.pop())
        if position is None:
            continue
        node = graph.nodes[position]
        activations = [ref for ref in node.refs() if _is_activation(graph, ref)]
        if node.op in _CONTRACTIONS:
            weights.update(_parameters(graph, made, node))
        elif len(set(activations)) == 1 and _passes(node) and activations[0] not in seen:
            seen.add(activations[0])
            pending.append(activations[0])
    return weights


def _is_activation(graph: Graph, value: int) -> bool:
    return graph.values[value].from_parameter and graph.values[value].from_input


def _passes(node: Node) -> bool:
    return node.pointwise or node.op in SHAPE_RULES or node.op in INDEX_RULES or node.op == "inserted"


def _parameters(graph: Graph, made: dict[int, int], node: Node) -> Iterator[int]:
    """The parameters that a contraction multiplies with, seen through transposes and attached quantizers."""
    pending = [ref for ref in node.refs() if graph.values[ref].weight_like]
    while pending:
        value = pending.pop()
        if graph.values[value].role == "parameter":
            yield value
        elif value in made:
            pending += [ref for ref in graph.nodes[made[value]].refs() if graph.values[ref].weight_like]
