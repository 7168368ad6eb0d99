"""Rules of the operators that compute: they unify ids (pointwise, contractions), mark them, or pin them.

All rules answer one question: is the result the same whether a group is removed or its parameters are zero? That is how
a group is removed in training (QASSO drives it to zero, paper Sec. 5) and what gate 3 checks.

- A pointwise operator and a contraction always comply, once their operands' ids are unified: 0 times anything adds 0.
- A sum complies where the removed elements are zero at that point. After a sigmoid, for example, they are one half.
- A mean complies if its divisor is corrected, which a model's own code does not do: the dim is marked "norm".
- A maximum, a softmax, an argmax does not comply: exp(0) = 1 takes part in the sum, while a removed element does not.
  The dim is pinned.
"""

from __future__ import annotations

import math

from geta_hf.qadg.propagation.flow import Dim, Flow
from geta_hf.qadg.propagation.rules_shape import Rule
from geta_hf.qadg.propagation.rules_zeros import where_removed
from geta_hf.qadg.tracing.graph import Node, Ref


def pointwise(flow: Flow, node: Node) -> None:
    """Unify the operands' dims, and pass them: what is computed from an element is removed with it."""
    # An operator in place writes to a value that may have been nonnegative before.
    flow.nonnegative.difference_update(node.outputs)
    if node.op in ("abs", "relu", "relu_", "square") or (node.op == "pow" and node.inputs["exponent"] == 2):
        flow.nonnegative.update(node.outputs)
    dims = flow.broadcast(node.refs(), flow.graph.values[node.outputs[0]].shape)
    if node.op in ("add", "add_", "sub"):
        # Two different values: a sum with itself is no residual connection.
        streams = [value for value in set(node.refs()) if flow.stream(value)]
        if len(streams) > 1:
            for dim in dims:
                flow.mark("sum", dim)
    for value in node.outputs:
        flow.set_dims(value, dims)


def _contract(flow: Flow, left: Ref, right: Ref) -> list[Dim]:
    """Unify the inner dims of `left @ right`, for two or three dims each, and return the dims of the result.

    Shapes (n, k) and (k, m), or (batch, n, k) and (batch, k, m). Column k of one is only ever multiplied with row k of
    the other, so the two are removed together and the sum over k loses a zero. Rows n and columns m pass.
    """
    a = flow.dims(left)
    b = flow.dims(right)
    flow.unify(a[-1], b[-2])
    for ref, row, column in ((left, a[-2], a[-1]), (right, b[-1], b[-2])):
        if flow.value(ref).weight_like:
            # What links the outputs of one weight with the inputs of another has both marks: that makes channels.
            flow.mark("row", row)
            flow.mark("column", column)
    macs = math.prod(flow.shape(left)) * flow.shape(right)[-1]
    if len(a) == 2:
        flow.count_macs(macs, (a[0], a[1], b[1]))
        return [a[0], b[1]]
    batch = flow.unify(a[0], b[0])
    if flow.value(left).from_input and flow.value(right).from_input:
        # Two activations are multiplied with each other: attention. Its batch dim holds the heads (merged with the
        # samples, which are pinned), and what it contracts are dims within heads, or the attended places.
        flow.mark("head", batch)
        flow.mark("attended", a[2])
        flow.mark("attended", b[2])
    flow.count_macs(macs, (batch, a[1], a[2], b[2]))
    return [batch, a[1], b[2]]


def _matmul(flow: Flow, node: Node) -> None:
    flow.set_dims(node.outputs[0], _contract(flow, node.inputs["self"], node.inputs["mat2"]))


def _matvec(flow: Flow, node: Node) -> None:
    matrix = flow.dims(node.inputs["self"])
    vector = flow.dims(node.inputs["vec"])
    flow.unify(matrix[1], vector[0])
    flow.set_dims(node.outputs[0], matrix[:1])


def _dot(flow: Flow, node: Node) -> None:
    flow.unify(flow.dims(node.inputs["self"])[0], flow.dims(node.inputs["tensor"])[0])
    flow.set_dims(node.outputs[0], [])


def _solve(flow: Flow, node: Node) -> None:
    """Pin the matrix, as every unknown depends on every equation; pass the right-hand sides."""
    matrix = flow.dims(node.inputs["self"])
    right = flow.dims(node.inputs["B"])
    solved = right[-2] if node.inputs["left"] else right[-1]
    flow.pin_and_report(node, [*matrix[-2:], solved], "every unknown depends on every equation")
    batch = [flow.unify(a, b) for a, b in zip(matrix[:-2], right[:-2], strict=True)]
    flow.set_dims(node.outputs[0], [*batch, *right[-2:]])


def _add_matmul(flow: Flow, node: Node) -> None:
    """Contract, and unify the result with what is added to it: a bias, of which row i goes with row i of the weight."""
    left = "mat1" if node.op == "addmm" else "batch1"
    right = "mat2" if node.op == "addmm" else "batch2"
    flow.set_dims(node.outputs[0], _contract(flow, node.inputs[left], node.inputs[right]))
    flow.broadcast((node.outputs[0], node.inputs["self"]), flow.graph.values[node.outputs[0]].shape)


def reduced(flow: Flow, node: Node) -> tuple[set[int], list[Dim]]:
    """Return the positions of the dims that a reduction runs over, and the ids of all dims that it reads."""
    dims = flow.dims(node.inputs["self"])
    chosen = node.inputs.get("dim")
    if chosen is None or chosen == []:
        # torch reduces over everything then.
        return set(range(len(dims))), dims
    if isinstance(chosen, int):
        chosen = [chosen]
    if not dims:
        # A scalar has no dims, and torch accepts dim=0 and dim=-1 for it.
        return set(), dims
    return {dim % len(dims) for dim in chosen}, dims


def _set_reduced(flow: Flow, node: Node, over: set[int], dims: list[Dim]) -> None:
    """Set the dims of a reduction's results, with or without `keepdim`."""
    kept = [dim for position, dim in enumerate(dims) if position not in over]
    in_place = [None if position in over else dim for position, dim in enumerate(dims)]
    for value in node.outputs:
        keeps_rank = len(flow.graph.values[value].shape) == len(dims)
        flow.set_dims(value, in_place if keeps_rank else kept)


def _sum(flow: Flow, node: Node) -> None:
    """Mark what a sum, a mean or a norm runs over as "norm"; pin it where removed elements are known not to be zero.

    A sum over removed elements differs from one over their values unless these are zero just there. With a divisor, as
    a mean has, it differs even then, but a replay can correct the divisor (`_CORRECTED`), whatever the values are.
    """
    if node.op not in _CORRECTED:
        number = where_removed(flow, node.inputs["self"].value, node)
        known_not_to_be_zero = bool(number)
        if known_not_to_be_zero or _smallest(node):
            return _order(flow, node)
    over, dims = reduced(flow, node)
    for position in over:
        flow.mark("norm", dims[position])
    _set_reduced(flow, node, over, dims)


def _smallest(node: Node) -> bool:
    """Return whether it is a norm that zeros change, such as that of order minus infinity, the smallest element."""
    return node.op == "linalg_vector_norm" and node.inputs["ord"] < 0


def _order(flow: Flow, node: Node) -> None:
    """Pin what a reduction runs over, since it chooses among the elements or multiplies them."""
    over, dims = reduced(flow, node)
    flow.pin_and_report(node, [dims[position] for position in over], "it chooses among the elements along the dim")
    _set_reduced(flow, node, over, dims)


def _extreme(flow: Flow, node: Node) -> None:
    """Pass the largest or smallest element where removing zeros cannot change it; pin the dim elsewhere.

    Zero is certain to be no extreme, or to change nothing, in three cases: the largest of what is never negative; the
    range of a weight; and a range that is widened to include zero before it is used, as an activation quantizer's is.
    But operators in between may have made other numbers of the zeros (`where_removed`), in which case none applies.
    """
    source = node.inputs["self"].value
    number = where_removed(flow, source, node)
    nonnegative = source in flow.nonnegative
    largest_of_nonnegative = number == 0 and nonnegative and node.op in ("amax", "max")
    # `number` is None where nothing is known; a known number other than zero, or zero as the smallest of what is never
    # negative, would be the extreme.
    becomes_extreme = bool(number) or (nonnegative and node.op in ("amin", "min"))
    is_range = flow.graph.values[source].weight_like or flow.reaches_zero(node)
    unchanged = largest_of_nonnegative or (not becomes_extreme and is_range)
    # `max` along a dim also returns positions, which change with every removal.
    returns_positions = len(node.outputs) > 1 and node.op != "aminmax"
    if returns_positions or not unchanged:
        return _order(flow, node)
    over, dims = reduced(flow, node)
    _set_reduced(flow, node, over, dims)


def _check(flow: Flow, node: Node) -> None:
    """Pass `any` and `all` where the removed elements have no say: false in the first, true in the second."""
    neutral = 1.0 if node.op in ("all", "_is_all_true") else 0.0
    if where_removed(flow, node.inputs["self"].value, node) != neutral:
        return _order(flow, node)
    over, dims = reduced(flow, node)
    _set_reduced(flow, node, over, dims)


def _distance(flow: Flow, node: Node) -> None:
    """Unify the columns of two matrices of which rows are compared: a slice of zeros in both adds nothing."""
    left = flow.dims(node.inputs["x1"])
    right = flow.dims(node.inputs["x2"])
    flow.unify(left[-1], right[-1])
    batch = [flow.unify(a, b) for a, b in zip(left[:-2], right[:-2], strict=True)]
    flow.set_dims(node.outputs[0], [*batch, left[-2], right[-2]])


def _fake_quantize(flow: Flow, node: Node) -> None:
    """Pass all dims; a scale for each channel is unified with the axis that it belongs to."""
    dims = flow.dims(node.inputs["self"])
    if "axis" in node.inputs:
        axis: int = node.inputs["axis"]
        for name in ("scale", "zero_point"):
            dims[axis] = flow.unify(dims[axis], flow.dims(node.inputs[name])[0])
    for value in node.outputs:
        flow.set_dims(value, dims)


def _loss(flow: Flow, node: Node) -> None:
    """Pin the logits and labels: their classes are what the model is trained on."""
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
"""torch's own fake quantizers: one vertex already, where others are branches that `tracing.merge` has to find."""
_CORRECTED = frozenset({"mean", "var", "std", "var_mean", "std_mean"})
"""Reductions with a divisor that a replay corrects: they then run over what remains, whatever the rest contains."""
_EXTREMES = ("amax", "amin", "aminmax", "max", "min")
_ORDERS = ("argmax", "argmin", "median", "nanmedian", "mode", "kthvalue", "prod", "logsumexp")

# Elementwise by what they do, though torch does not tag them so. A merged quantizer branch ("attached", "inserted") is
# elementwise as well, which is all that the ids need to know about it.
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
    **dict.fromkeys(_ELEMENTWISE, pointwise),
}
"""Operator name to rule."""
