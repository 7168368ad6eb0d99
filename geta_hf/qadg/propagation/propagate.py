"""From a recorded graph to the ids of every element: which leave together."""

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
    """Record the model on the batch, merge quantizer branches, and propagate ids (paper Alg. 1, lines 1-14).

    With `times` above one the recording is repeated, and an error tells when it is not the same every time.
    """
    return propagate(merge_branches(record_forward(model, batch, times)))


def propagate(graph: Graph) -> Flow:
    """Walk the graph once, forwards; then nothing that the model returns may change its shape."""
    flow = Flow(graph)
    for node in graph.nodes:
        _apply(flow, node)
    for value in graph.outputs:
        flow.pin(flow.dims(value))
    return flow


def _apply(flow: Flow, node: Node) -> None:
    rule = RULES.get(node.op)
    if rule is not None:
        rule(flow, node)
    elif node.pointwise:
        pointwise(flow, node)
    elif not any(True for _ in node.refs()):
        SHAPE_RULES["new_zeros"](flow, node)
    else:
        flow.pin_unsupported(node, "no rule for this operator")
