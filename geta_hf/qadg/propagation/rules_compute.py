"""Operators that compute: ids are unified (pointwise, contractions), marked (sums, means) or frozen (choices)."""

from __future__ import annotations

import math

from geta_hf.qadg.propagation.flow import Dim, Flow
from geta_hf.qadg.propagation.rules_shape import Rule
from geta_hf.qadg.propagation.rules_zeros import where_removed
from geta_hf.qadg.tracing.graph import Node, Ref


def pointwise(flow: Flow, node: Node) -> None:
    """Elementwise: operands of the same element leave together."""
    flow.nonnegative.difference_update(node.outputs)  # what an operator in place makes of it is another matter
    if node.op in ("abs", "relu", "relu_", "square") or (node.op == "pow" and node.inputs["exponent"] == 2):
        flow.nonnegative.update(node.outputs)
    dims = flow.broadcast(node.refs(), flow.graph.values[node.outputs[0]].shape)
    if node.op in ("add", "add_", "sub") and sum(map(flow.stream, set(node.refs()))) > 1:
        for dim in dims:
            flow.mark("sum", dim)
    for value in node.outputs:
        flow.set_dims(value, dims)


def _contract(flow: Flow, left: Ref, right: Ref) -> list[Dim]:
    """The dims of `left @ right` for two or three dims each."""
    a, b = flow.dims(left), flow.dims(right)
    flow.unify(a[-1], b[-2])
    for ref, row, column in ((left, a[-2], a[-1]), (right, b[-1], b[-2])):
        if flow.value(ref).weight_like:
            flow.mark("row", row)
            flow.mark("column", column)
    macs = math.prod(flow.shape(left)) * flow.shape(right)[-1]
    if len(a) == 2:
        flow.count_macs(macs, (a[0], a[1], b[1]))
        return [a[0], b[1]]
    batch = flow.unify(a[0], b[0])
    if flow.value(left).from_input and flow.value(right).from_input:
        flow.mark("head", batch)
        for dim in (a[2], b[2]):
            flow.mark("attended", dim)
    flow.count_macs(macs, (batch, a[1], a[2], b[2]))
    return [batch, a[1], b[2]]


def _matmul(flow: Flow, node: Node) -> None:
    flow.set_dims(node.outputs[0], _contract(flow, node.inputs["self"], node.inputs["mat2"]))


def _matvec(flow: Flow, node: Node) -> None:
    matrix, vector = flow.dims(node.inputs["self"]), flow.dims(node.inputs["vec"])
    flow.unify(matrix[1], vector[0])
    flow.set_dims(node.outputs[0], matrix[:1])


def _dot(flow: Flow, node: Node) -> None:
    flow.unify(flow.dims(node.inputs["self"])[0], flow.dims(node.inputs["tensor"])[0])
    flow.set_dims(node.outputs[0], [])


def _solve(flow: Flow, node: Node) -> None:
    """Every unknown depends on every equation, so those stay; the right-hand sides pass."""
    matrix, right = flow.dims(node.inputs["self"]), flow.dims(node.inputs["B"])
    solved = right[-2] if node.inputs["left"] else right[-1]
    flow.pin_and_report(node, [*matrix[-2:], solved], "every unknown depends on every equation")
    batch = [flow.unify(a, b) for a, b in zip(matrix[:-2], right[:-2], strict=True)]
    flow.set_dims(node.outputs[0], [*batch, *right[-2:]])


def _add_matmul(flow: Flow, node: Node) -> None:
    left, right = ("mat1", "mat2") if node.op == "addmm" else ("batch1", "batch2")
    flow.set_dims(node.outputs[0], _contract(flow, node.inputs[left], node.inputs[right]))
    flow.broadcast((node.outputs[0], node.inputs["self"]), flow.graph.values[node.outputs[0]].shape)


def reduced(flow: Flow, node: Node) -> tuple[set[int], list[Dim]]:
    """Which dims a reduction runs over, and the dims it reads."""
    dims = flow.dims(node.inputs["self"])
    chosen = node.inputs.get("dim")
    if chosen is None or chosen == []:
        return set(range(len(dims))), dims
    return {dim % len(dims) for dim in ([chosen] if isinstance(chosen, int) else chosen) if dims}, dims


def _set_reduced(flow: Flow, node: Node, over: set[int], dims: list[Dim]) -> None:
    kept = [dim for position, dim in enumerate(dims) if position not in over]
    for value in node.outputs:
        same_rank = len(flow.graph.values[value].shape) == len(dims)
        flow.set_dims(value, [None if p in over else dim for p, dim in enumerate(dims)] if same_rank else kept)


def _sum(flow: Flow, node: Node) -> None:
    """Removal changes a sum or a mean unless what leaves is zero just there, so the dim counts as normalised."""
    if node.op not in _CORRECTED and (where_removed(flow, node.inputs["self"].value, node) or _smallest(node)):
        return _order(flow, node)
    over, dims = reduced(flow, node)
    for position in over:
        flow.mark("norm", dims[position])
    _set_reduced(flow, node, over, dims)


def _smallest(node: Node) -> bool:
    """Whether it is a norm to which zeros add something, such as the one of minus infinity."""
    return node.op == "linalg_vector_norm" and node.inputs["ord"] < 0


def _order(flow: Flow, node: Node) -> None:
    """Reductions that choose: what they run over stays."""
    over, dims = reduced(flow, node)
    flow.pin_and_report(node, [dims[position] for position in over], "it chooses among the elements along the dim")
    _set_reduced(flow, node, over, dims)


def _extreme(flow: Flow, node: Node) -> None:
    """The largest or smallest element: zeros that leave change nothing where zero is within the range for sure.

    So it is for the largest of what is never negative, for the range of a weight, and for one that is widened to zero
    before it serves, as a quantizer's is. But operators before may have made other numbers of the zeros.
    """
    source = node.inputs["self"].value
    number, positive = where_removed(flow, source, node), source in flow.nonnegative
    largest = number == 0 and positive and node.op in ("amax", "max")
    outside = bool(number) or (positive and node.op in ("amin", "min"))
    within = largest or (not outside and (flow.graph.values[source].weight_like or flow.reaches_zero(node)))
    if (len(node.outputs) > 1 and node.op != "aminmax") or not within:
        return _order(flow, node)
    over, dims = reduced(flow, node)
    _set_reduced(flow, node, over, dims)


def _check(flow: Flow, node: Node) -> None:
    """Asks whether something holds of any or of every element; it passes where what leaves has no say in that."""
    if where_removed(flow, node.inputs["self"].value, node) != float(node.op in ("all", "_is_all_true")):
        return _order(flow, node)
    over, dims = reduced(flow, node)
    _set_reduced(flow, node, over, dims)


def _distance(flow: Flow, node: Node) -> None:
    """Between the rows of two matrices: a slice of zeros in both adds nothing."""
    left, right = flow.dims(node.inputs["x1"]), flow.dims(node.inputs["x2"])
    flow.unify(left[-1], right[-1])
    batch = [flow.unify(a, b) for a, b in zip(left[:-2], right[:-2], strict=True)]
    flow.set_dims(node.outputs[0], [*batch, left[-2], right[-2]])


def _fake_quantize(flow: Flow, node: Node) -> None:
    """Elementwise in what is quantized; with a scale per channel, along that axis in the scale as well."""
    dims = flow.dims(node.inputs["self"])
    for name in ("scale", "zero_point") if "axis" in node.inputs else ():
        axis: int = node.inputs["axis"]
        dims[axis] = flow.unify(dims[axis], flow.dims(node.inputs[name])[0])
    for value in node.outputs:
        flow.set_dims(value, dims)


def _loss(flow: Flow, node: Node) -> None:
    """A loss of logits and labels: the classes stay, and nothing that leaves passes through it."""
    for value in node.refs():
        flow.pin(flow.dims(value))
    for value in node.outputs:
        flow.set_dims(value, [None] * len(flow.graph.values[value].shape))


FAKE_QUANTIZERS = (
    "fake_quantize_per_tensor_affine_cachemask",
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
    "_fake_quantize_learnable_per_tensor_affine",
    "fake_quantize_per_channel_affine_cachemask",
    "_fake_quantize_learnable_per_channel_affine",
)
_CORRECTED = frozenset({"mean", "var", "std", "var_mean", "std_mean"})
"""Their divisors can be corrected, so that they run over what stays whatever stands in the rest."""
_EXTREMES = ("amax", "amin", "aminmax", "max", "min")
_ORDERS = ("argmax", "argmin", "median", "nanmedian", "mode", "kthvalue", "prod", "logsumexp")

_ELEMENTWISE = (
    *("attached", "inserted", "copy", "copy_", "fill", "fill_", "native_dropout", "polar", "complex"),
    *("masked_fill", "masked_fill_", "log_sigmoid_forward", "hardswish", "hardswish_", "_prelu_kernel"),
)

COMPUTE_RULES: dict[str, Rule] = {
    **dict.fromkeys(("mm", "bmm"), _matmul),
    "mv": _matvec,
    "dot": _dot,
    "linalg_solve_triangular": _solve,
    **dict.fromkeys(("addmm", "baddbmm"), _add_matmul),
    **dict.fromkeys(("sum", "nansum", "mean", "var", "std", "var_mean", "std_mean", "linalg_vector_norm"), _sum),
    **dict.fromkeys(_EXTREMES, _extreme),
    **dict.fromkeys(_ORDERS, _order),
    **dict.fromkeys(("any", "all", "_is_all_true", "_is_any_true"), _check),
    **dict.fromkeys(("_euclidean_dist", "_cdist_forward"), _distance),
    **dict.fromkeys(FAKE_QUANTIZERS, _fake_quantize),
    **dict.fromkeys(("nll_loss_forward", "nll_loss2d_forward", "mse_loss"), _loss),
    # Elementwise by what they do, though torch does not tag them so; a merged quantizer branch is elementwise too.
    **dict.fromkeys(_ELEMENTWISE, pointwise),
}
