"""Walk a recorded graph from its inputs to its outputs, and let each operator's rule tie element ids together.

This takes the place of the dependency analysis in paper Alg. 1, line 15, which is that of OTOv2 (the paper's reference
[11]) and reasons about vertices, hence layers. Here the unit is the element: one pass over the operators, each with a
rule of a few lines, after which the paper's minimally removable structures (Sec. 4) are the elements that share an id.

Example, an MLP `down(relu(up(x)))`: `up.weight` has fresh atoms on its rows, which its product with x passes on to the
result, `relu` passes them too, and the product with `down.weight` unifies them with that weight's columns. So row i of
`up.weight`, entry i of `up.bias` and column i of `down.weight` carry the same atom: a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from geta_hf.qadg.propagation.flow import Flow
from geta_hf.qadg.propagation.rules_compute import COMPUTE_RULES, pointwise
from geta_hf.qadg.propagation.rules_conv import CONV_RULES
from geta_hf.qadg.propagation.rules_index import INDEX_RULES
from geta_hf.qadg.propagation.rules_shape import SHAPE_RULES, Rule
from geta_hf.qadg.tracing.graph import Graph, Node
from geta_hf.qadg.tracing.merge import merge_branches
from geta_hf.qadg.tracing.record_forward import record_forward

RULES: dict[str, Rule] = SHAPE_RULES | INDEX_RULES | COMPUTE_RULES | CONV_RULES
"""Operator name to rule. An operator with more than an elementwise effect on ids needs an entry here to pass them."""


def record_and_propagate(model: nn.Module, batch: Mapping[str, Any], times: int = 1) -> Flow:
    """Record a model on a batch, merge quantizer branches (paper Alg. 1, lines 3-14), and propagate ids (line 15).

    Args:
        model: see `record_forward`; it is as before afterwards.
        batch: the keyword arguments of its forward.
        times: how often to record, to see that the operators are the same every time.

    Returns:
        The ids of every value of the recorded forward pass.

    Raises:
        GETAError: the model cannot run the batch, returns no tensor, or took another path when recorded again.
    """
    graph = record_forward(model, batch, times)
    return propagate(merge_branches(graph))


def propagate(graph: Graph) -> Flow:
    """Walk the graph once, forwards.

    Args:
        graph: a recorded forward pass, with its quantizer branches merged.

    Returns:
        The ids of every value. Nothing that the model returns may change its shape, so the outputs are pinned.
    """
    flow = Flow(graph)
    for node in graph.nodes:
        _apply(flow, node)
    # After the walk, when outputs have their ids. The pin reaches back through all that was unified with them.
    for value in graph.outputs:
        flow.pin(flow.dims(value))
    return flow


def _apply(flow: Flow, node: Node) -> None:
    rule = RULES.get(node.op)
    if rule is not None:
        rule(flow, node)
    elif node.pointwise:
        # torch itself tags 260 operators as pointwise, so that most activations need no entry.
        pointwise(flow, node)
    elif not any(True for _ in node.refs()):
        # An operator that reads no tensor, such as `arange` or `zeros`, makes one like a factory does.
        SHAPE_RULES["new_zeros"](flow, node)
    else:
        # Gate 1: what is not understood is pinned and reported. A guess would be found by gates 2 and 3 at best.
        flow.pin_unsupported(node, "no rule for this operator")
