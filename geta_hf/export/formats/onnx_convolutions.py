"""Rewrite convolutions of an ONNX graph, so that onnxruntime multiplies the integers that the model learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from onnx_ir import Graph, Node, Value

_MIDDLE = 128
"""Zero point of codes that are stored without a sign; codes of 8 bits lie in -127 ... 127."""

_FLOAT = 1  # TensorProto.FLOAT

Array = np.ndarray[Any, Any]


def fold_batch_norm(graph: Graph) -> None:
    """Fold batch norm into the convolution before it, in place, where that has stored codes.

    γ / √(variance + ε) multiplies each channel's step size, and its sign the codes, which remain the learned ones; the
    rest becomes the bias. Of a convolution with floating point weights, runtimes do the same by themselves.
    """
    for node in list(graph):
        if node.op_type != "BatchNormalization" or any(out in graph.outputs for out in node.outputs):
            continue
        conv = _only_source(node.inputs[0], "Conv")
        decode = None if conv is None else _only_source(conv.inputs[1], "DequantizeLinear")
        numbers = [_numbers(value) for value in node.inputs[1:5]]
        if conv is None or decode is None or any(each is None for each in numbers):
            continue
        codes, step = (_numbers(value) for value in decode.inputs[:2])
        if codes is None or step is None or codes.dtype != np.int8:
            continue
        _fold(graph, node, conv, decode, codes, step, numbers)  # type: ignore[arg-type]


def _fold(
    graph: Graph, node: Node, conv: Node, decode: Node, codes: Array, step: Array, numbers: Sequence[Array]
) -> None:
    import onnx_ir as ir

    gamma, beta, mean, variance = (each.astype(np.float64) for each in numbers)
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    factor = gamma / np.sqrt(variance + epsilon)
    bias = _numbers(conv.inputs[2]) if len(conv.inputs) > 2 and conv.inputs[2] is not None else np.zeros(1)
    if bias is None:
        return
    name = str(conv.name or conv.outputs[0].name)
    channels = (-1, *(1,) * (codes.ndim - 1))
    # A step size is positive: the sign goes to the codes, and a channel that is switched off keeps none.
    signed = codes * np.sign(factor).astype(np.int8).reshape(channels)
    steps = np.where(factor == 0, 1.0, step * np.abs(factor)).astype(np.float32)
    decode.replace_input_with(0, _constant(graph, f"{name}.integers", signed))
    decode.replace_input_with(1, _constant(graph, f"{name}.step", steps))
    decode.attributes["axis"] = ir.AttrInt64("axis", 0)
    conv.resize_inputs(3)
    conv.replace_input_with(2, _constant(graph, f"{name}.bias", (beta + (bias - mean) * factor).astype(np.float32)))
    node.outputs[0].replace_all_uses_with(conv.outputs[0])
    graph.remove(node, safe=True)


def multiply_integers(graph: Graph) -> None:
    """Turn each convolution of a rounded input and stored codes into a product of integers, in place.

    onnxruntime has such a kernel for a convolution between quantized tensors alone, and here an activation or a sum in
    floating point follows. Both sides are stored without a sign, whose products no CPU saturates.
    """
    rounded: dict[int, Value] = {}
    for conv in list(graph):
        if conv.op_type != "Conv" or len(conv.inputs) < 2:
            continue
        given, decode = (_source(value, "DequantizeLinear") for value in conv.inputs[:2])
        quantize = None if given is None else _source(given.inputs[0], "QuantizeLinear")
        if given is None or decode is None or quantize is None:
            continue
        codes, step = (_numbers(value) for value in decode.inputs[:2])
        input_step = _numbers(quantize.inputs[1])
        if codes is None or step is None or input_step is None or codes.dtype != np.int8 or input_step.size != 1:
            continue
        if id(quantize) not in rounded:
            rounded[id(quantize)] = _unsigned(graph, quantize)
        _multiply(graph, conv, rounded[id(quantize)], codes, step * input_step.reshape(-1))


def _unsigned(graph: Graph, quantize: Node) -> Value:
    """Return the codes of an input with 128 added, from the same values and step size."""
    import onnx_ir as ir

    zero = _constant(graph, f"{quantize.outputs[0].name}.zero", np.array(_MIDDLE, np.uint8))
    node = ir.node("QuantizeLinear", [quantize.inputs[0], quantize.inputs[1], zero])
    node.outputs[0].name = f"{quantize.outputs[0].name}.unsigned"
    graph.insert_before(quantize, node)
    return node.outputs[0]


def _multiply(graph: Graph, conv: Node, x: Value, codes: Array, step: Array) -> None:
    import onnx_ir as ir

    name = str(conv.name or conv.outputs[0].name)
    channels = (-1, *(1,) * (codes.ndim - 2))
    weight = _constant(graph, f"{name}.codes", (codes.astype(np.int16) + _MIDDLE).astype(np.uint8))
    zeros = [_constant(graph, f"{name}.zero{side}", np.array(_MIDDLE, np.uint8)) for side in range(2)]
    total = ir.Node("", "ConvInteger", [x, weight, *zeros], conv.attributes.values())
    cast = ir.node("Cast", [total.outputs[0]], {"to": _FLOAT})
    scale = _constant(graph, f"{name}.scale", step.astype(np.float32).reshape(channels))
    nodes = [total, cast, ir.node("Mul", [cast.outputs[0], scale])]
    if len(conv.inputs) > 2 and conv.inputs[2] is not None:
        bias = _numbers(conv.inputs[2])
        added = conv.inputs[2] if bias is None else _constant(graph, f"{name}.shift", bias.reshape(channels))
        if bias is None:
            return
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], added]))
    for place, node in enumerate(nodes):
        node.outputs[0].name = f"{name}.integer{place}"
    last = nodes[-1].outputs[0]
    last.type, last.shape = conv.outputs[0].type, conv.outputs[0].shape
    graph.insert_before(conv, nodes)
    conv.outputs[0].replace_all_uses_with(last)


def _source(value: Value | None, kind: str) -> Node | None:
    """Return the node that makes a value, if it is of a kind."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind else None


def _only_source(value: Value | None, kind: str) -> Node | None:
    """Return the node of a kind that makes a value which nothing else reads."""
    node = _source(value, kind)
    return node if node is not None and value is not None and len(list(value.uses())) == 1 else None


def _numbers(value: Value | None) -> Array | None:
    """Return what a constant of the graph holds; None for anything else."""
    import onnx_ir as ir

    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def _constant(graph: Graph, name: str, numbers: Array) -> Value:
    import onnx_ir as ir

    tensor = ir.Tensor(np.ascontiguousarray(numbers).reshape(numbers.shape), name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
