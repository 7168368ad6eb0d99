"""Rules of convolutions, normalisations and pooling: channels pass, places in the image are pinned.

Places (height, width, time) are pinned since a kernel mixes neighbors: without one of them, others would meet.
"""

from __future__ import annotations

import math
import re

from geta_hf.qadg.propagation.flow import Dim, Flow
from geta_hf.qadg.propagation.rules_shape import Rule
from geta_hf.qadg.tracing.graph import Node


def _convolution(flow: Flow, node: Node) -> None:
    """Unify the input's channels with the kernel's, and pass the kernel's output channels.

    The input has shape (batch, channels, places...), the kernel (out, in / groups, ...), and when transposed
    (in, out / groups, ...).
    """
    source = node.inputs["input"]
    weight = node.inputs["weight"]
    bias = node.inputs["bias"]
    dims = flow.dims(source)
    kernel = flow.dims(weight)
    flow.pin([*dims[2:], *kernel[2:]])
    transposed = node.inputs.get("transposed", False)
    groups = node.inputs["groups"]
    if groups == 1:
        incoming = kernel[0] if transposed else kernel[1]
        made = kernel[1] if transposed else kernel[0]
        # Input channel c is only ever multiplied with slice c of the kernel's `in` dim.
        flow.unify(dims[1], incoming)
        row = made
        column = incoming
    else:
        made, row, column = _grouped(flow, node, dims[1])
    if flow.value(weight).weight_like:
        flow.mark("row", row)
        flow.mark("column", column)
    # An output channel without its kernel would still give its bias, so the two are removed together.
    if bias is not None:
        made = flow.unify(made, flow.dims(bias)[0])
    shape = flow.graph.values[node.outputs[0]].shape
    # Every output element is a sum over a kernel's inputs; transposed, every input element is spread over its outputs.
    macs = math.prod(flow.shape(source) if transposed else shape) * math.prod(flow.shape(weight)[1:])
    # With groups, channels in and out shrink together, so they count once.
    flow.count_macs(macs, (dims[1], made) if groups == 1 else (made,))
    flow.set_dims(node.outputs[0], [dims[0], made, *[None] * (len(shape) - 2)])


def _grouped(flow: Flow, node: Node, channels: Dim) -> tuple[Dim, Dim, Dim]:
    """Return the output channels of a grouped convolution, and what counts as rows and columns of its kernel.

    Input and output channels are seen as (group, channel within). A group is removed entirely, on both sides.
    A channel within is removed from every group at once, since the kernel's second dim is shared by all of them.
    Depthwise is the case of one input channel in each group.
    """
    weight = node.inputs["weight"]
    groups = node.inputs["groups"]
    first, second = flow.dims(weight)[:2]
    n, within = flow.shape(weight)[:2]
    count = flow.shape(node.inputs["input"])[1]
    if node.inputs.get("transposed", False):
        # The kernel has shape (in, out / groups, ...): its second dim holds output channels.
        # A transposed kernel's first dim holds the input channels of all groups, so channel c has slice c of it.
        flow.unify(channels, first)
        outer, _ = flow.split(first, (groups, count // groups))
        # Output channel k of group i is (i, k): removed with the group, or with slice k of the kernel's second dim,
        # which all groups share.
        return flow.merge((outer, second), (groups, within)), None, first
    if within == 1 and n == groups:
        # Depthwise with one output for each input: no product is needed, and none should be made for so common a case.
        made = flow.unify(channels, first)
        return made, None, None
    # 8 input channels in 4 groups: channel 5 is (2, 1), the second one of group 2, and meets column 1 of the kernel.
    group_in, inside = flow.split(channels, (groups, count // groups))
    group_out, _ = flow.split(first, (groups, n // groups))
    flow.unify(group_in, group_out)
    # With one input channel in each group the kernel has one column, which goes with the group.
    if within > 1:
        flow.unify(inside, second)
    return first, first, second


def batch_statistics(node: Node) -> bool:
    """Return whether a batch norm takes its statistics from what it normalises, not from buffers."""
    return bool(node.inputs.get("training", False)) or node.inputs.get("running_mean") is None


def _batch_norm(flow: Flow, node: Node) -> None:
    """Pass channels, each with its own weight and statistics; mark the other dims if the batch gives the statistics."""
    dims = flow.dims(node.inputs["input"])
    if batch_statistics(node):
        # The mean runs over samples and places, so its divisor would change with their number, not with that of
        # channels.
        for dim in (dims[0], *dims[2:]):
            flow.mark("norm", dim)
    for name in ("weight", "bias", "running_mean", "running_var"):
        if node.inputs.get(name) is not None:
            dims[1] = flow.unify(dims[1], flow.dims(node.inputs[name])[0])
    flow.set_dims(node.outputs[0], dims)
    channels = flow.shape(node.inputs["input"])[1]
    for value in node.outputs[1:]:
        # Saved statistics: one number for each channel, or empty, as kernels differ.
        shape = flow.graph.values[value].shape
        flow.set_dims(value, [dims[1] if size == channels else None for size in shape])


def _group_norm(flow: Flow, node: Node) -> None:
    """Pass complete groups; mark the channels within one, and the places, which are normalised together."""
    dims = flow.dims(node.inputs["input"])
    groups = node.inputs["group"]
    channels = node.inputs["C"]
    for name in ("weight", "bias"):
        if node.inputs[name] is not None:
            dims[1] = flow.unify(dims[1], flow.dims(node.inputs[name])[0])
    # With as many groups as channels, each channel is normalised by itself and can be removed alone.
    outer = dims[1]
    if groups != channels:
        outer, inner = flow.split(dims[1], (groups, channels // groups))
        flow.mark("norm", inner)
    for places in dims[2:]:
        flow.mark("norm", places)
    flow.set_dims(node.outputs[0], dims)
    for value in node.outputs[1:]:
        flow.set_dims(value, [dims[0], outer])


def _layer_norm(flow: Flow, node: Node) -> None:
    """Unify weight and bias with the last dims, and mark these: the norm divides by how many elements they have."""
    source = node.inputs["input"]
    dims = flow.dims(source)
    count = len(node.inputs["normalized_shape"])
    for name in ("weight", "bias"):
        if node.inputs.get(name) is not None:
            # Called for what it unifies. The result has the dims of the input, with which those of the weight now
            # agree.
            flow.broadcast((source, node.inputs[name]), flow.shape(source))
    for dim in dims[-count:]:
        flow.mark("norm", dim)
    flow.set_dims(node.outputs[0], dims)
    for value in node.outputs[1:]:
        # The saved mean and standard deviation keep the rank, with one element along the normalised dims.
        flow.set_dims(value, dims[:-count] + [None] * count)


def _weight_norm(flow: Flow, node: Node) -> None:
    """Pass the dims of v in weight = g · v / ‖v‖, whose norm runs over all dims but one.

    Along that one a slice of zeros is 0 / 0, so it counts as a norm; along the others zeros add nothing.
    """
    dims = flow.dims(node.inputs["v"])
    dim = node.inputs["dim"]
    dims[dim] = flow.unify(dims[dim], flow.dims(node.inputs["g"])[dim])
    flow.mark("norm", dims[dim])
    flow.set_dims(node.outputs[0], dims)
    for value in node.outputs[1:]:
        flow.set_dims(value, flow.dims(node.inputs["g"]))


def _places(flow: Flow, node: Node) -> None:
    """Pin the places of pooling and resampling, as many dims as the operator's name says; pass the dims before them."""
    count = int(re.search(r"(\d)d", node.op)[1])  # type: ignore[index]
    dims = flow.dims(next(node.refs()))
    # Counted from the right, as the batch dim may be missing.
    flow.pin(dims[-count:])
    for value in list(node.refs())[1:]:
        flow.pin(flow.dims(value))
    for value in node.outputs:
        flow.set_dims(value, dims[:-count] + [None] * count)


def _resample(flow: Flow, node: Node) -> None:
    """Pin the places and the grid that says where they are read; pass the channels."""
    dims = flow.dims(node.inputs["input"])
    grid = flow.dims(node.inputs["grid"])
    flow.pin([*dims[2:], *grid[1:]])
    batch = flow.unify(dims[0], grid[0])
    flow.set_dims(node.outputs[0], [batch, dims[1], *[None] * (len(dims) - 2)])


def _im2col(flow: Flow, node: Node) -> None:
    """Turn (batch, channels, height, width) into (batch, channels · kernel, blocks)."""
    _into_channels(flow, node, math.prod(node.inputs["kernel_size"]))


def _col2im(flow: Flow, node: Node) -> None:
    """Turn (batch, channels · kernel, blocks) into (batch, channels, height, width)."""
    _out_of_channels(flow, node, -2, math.prod(node.inputs["kernel_size"]))


def _pixel_shuffle(flow: Flow, node: Node) -> None:
    """Turn (…, channels · r², height, width) into (…, channels, height · r, width · r)."""
    _out_of_channels(flow, node, -3, node.inputs["upscale_factor"] ** 2)


def _pixel_unshuffle(flow: Flow, node: Node) -> None:
    """Turn (…, channels, height · r, width · r) into (…, channels · r², height, width)."""
    _into_channels(flow, node, node.inputs["downscale_factor"] ** 2)


def _into_channels(flow: Flow, node: Node, count: int) -> None:
    """Turn places, which are pinned, into `count` channels for every channel."""
    dims = flow.dims(node.inputs["self"])
    shape = flow.shape(node.inputs["self"])
    flow.pin(dims[-2:])
    # A product with a pinned factor: all `count` channels carry the id of the one that they came from.
    result = [*dims[:-3], flow.merge((dims[-3], None), (shape[-3], count))]
    places = len(flow.graph.values[node.outputs[0]].shape) - len(result)
    flow.set_dims(node.outputs[0], [*result, *[None] * places])


def _out_of_channels(flow: Flow, node: Node, dim: int, count: int) -> None:
    """Turn every `count` channels along `dim`, which are removed together, into places of one channel."""
    dims = flow.dims(node.inputs["self"])
    shape = flow.shape(node.inputs["self"])
    flow.pin(dims[dim + 1 :])
    outer, inner = flow.split(dims[dim], (shape[dim] // count, count))
    # Pinning the inner factor reduces the products to their outer one, which ties the `count` channels to each other.
    flow.pin([inner])
    flow.set_dims(node.outputs[0], [*dims[:dim], outer, None, None])


_POOLS = (
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
    "adaptive_max_pool2d",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "_upsample_nearest_exact2d",
    "upsample_linear1d",
    "upsample_bilinear2d",
    "_upsample_bilinear2d_aa",
    "upsample_bicubic2d",
    "_upsample_bicubic2d_aa",
    "upsample_trilinear3d",
)

CONV_RULES: dict[str, Rule] = {
    **dict.fromkeys(("convolution", "_convolution", "convolution_overrideable"), _convolution),
    **dict.fromkeys(
        (
            "native_batch_norm",
            "_native_batch_norm_legit",
            "_native_batch_norm_legit_no_training",
            "_batch_norm_no_update",
        ),
        _batch_norm,
    ),
    "native_group_norm": _group_norm,
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), _layer_norm),
    "_weight_norm_interface": _weight_norm,
    **dict.fromkeys(_POOLS, _places),
    **dict.fromkeys(("grid_sampler_2d", "grid_sampler_3d"), _resample),
    "im2col": _im2col,
    "col2im": _col2im,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
}
"""Operator name to rule."""
