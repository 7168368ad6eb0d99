"""The ONNX format: one graph for onnxruntime, weights as the learned integers, any batch size and length."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel

from geta_hf.export.formats.exported import (
    ROUNDED,
    Traceable,
    describe,
    difference,
    export_program,
    load,
    require,
    save,
    traceable,
)

if TYPE_CHECKING:
    from onnx_ir import Graph, Model, Node, Value

OPSET = 21
"""The first in which codes of 4 bits have a type."""

_SMALL = 7
"""The largest code of 4 bits."""


def write_onnx(
    model: PreTrainedModel, folder: Path, batch: Mapping[str, Tensor], *, dynamic_int8: bool | None = None
) -> None:
    """Write a compressed model as model.onnx (with its weights in model.onnx.data), through transformers' exporter.

    Weights of at most 8 bits are int8 initializers, of at most 4 bits int4, at the learned step size: they are exact.
    Inputs that the model rounds to at most 8 bits (t = 1) are QuantizeLinear and DequantizeLinear pairs, which
    onnxruntime turns into integer kernels. All else is fp32. Batch size and length are free; a generating model gives
    its logits, without a cache.

    The file as it is takes onnxruntime's fast paths on CPUs, which round the inputs of the other layers to 8 bits too:
    products of weights of 5 to 8 bits are of integers, with one scale for the whole input found as it runs
    (DynamicQuantizeLinear, MatMulInteger), and those of int4 are MatMulNBits, which rounds inputs in blocks. With
    `dynamic_int8=False` no such operator is in the file; onnxruntime then still rounds inputs in blocks, unless the
    session option `session.qdq_matmulnbits_accuracy_level` is "1", or `session.disable_quant_qdq` is "1", which decodes
    all weights as it loads them. Either way the exact graph is proved first; config.json says how much outputs differ
    (`exported_as`).

    Args:
        model: compressed, or plain; left unchanged.
        folder: an existing empty folder.
        batch: what to trace and prove on. It has only what inference takes: no labels.
        dynamic_int8: whether products are of integers: None, where weights have 5 to 8 bits; True, all (int4 is then
            stored as int8); False, none. On a CPU without VNNI, sums of codes of 8 bits may saturate; 7 bits do not.

    Raises:
        GETAError: a package is missing, the exporter cannot write the model, or onnxruntime gives other outputs than
            the model, on the batch or on another batch size and length.
    """
    require("onnx", "onnx", "onnxscript", "onnxruntime")
    from transformers.exporters import OnnxConfig

    case = traceable(model, batch, "operators")
    exported = export_program(case, "ONNX", OnnxConfig(dynamic=True, opset_version=OPSET))
    exact = exported.components["model"].program = _finished(exported.program, narrow=dynamic_int8 is not True)
    if dynamic_int8 is False:
        save(exported, folder)
        exactly = _prove_exact(folder, case)
    else:
        # The exact graph is proved closely, in a place of its own, before its products round.
        with tempfile.TemporaryDirectory() as draft:
            save(exported, Path(draft))
            exactly = _prove_exact(Path(draft), case)
        exported.components["model"].program = _with_integer_products(exact)
        save(exported, folder)
    # With nothing set, as most users will run it: with the tolerance for rounded inputs.
    usual = load(folder)
    default = max(difference(usual, sample, ROUNDED, "ONNX model") for sample in case.samples)
    facts = {"dynamic_int8": dynamic_int8 is not False, "difference": {"exact": exactly, "default": default}}
    describe(case, folder, "onnx", facts)


def _prove_exact(folder: Path, case: Traceable) -> float:
    """Return the largest difference of the outputs where onnxruntime rounds no inputs of its own."""
    from onnxruntime import SessionOptions

    options = SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    exact = load(folder, session_options=options)
    return max(difference(exact, sample, case.tolerance, "ONNX model") for sample in case.samples)


def _finished(program: Model, narrow: bool) -> Model:
    """Return the graph without what is of no use to a runtime, and with codes of 4 bits where `narrow`."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass

    for node, codes in _decoders(program.graph):
        node.resize_inputs(2)  # zero is the default
        if narrow:
            _narrow(node, codes)
    ClearMetadataAndDocStringPass()(program)  # it names the files of the machine that traced it
    RemoveUnusedNodesPass()(program)
    return program


def _decoders(graph: Graph) -> Iterator[tuple[Node, Value]]:
    """Return every DequantizeLinear of stored codes, with the codes."""
    for node in graph:
        if node.op_type == "DequantizeLinear":
            codes = node.inputs[0]
            if codes is not None and codes.is_initializer():
                yield node, codes


def _narrow(node: Node, stored: Value) -> None:
    """Store codes of at most 4 bits as such, where no input is rounded: integer kernels multiply whole bytes."""
    import onnx_ir as ir

    assert stored.const_value is not None
    codes = stored.const_value.numpy()
    # By the largest code and not by the bit width: a layer of 5 bits whose codes happen to be small fits too.
    if abs(codes).max() <= _SMALL and not any(_multiplies_integers(user) for user, _ in node.outputs[0].uses()):
        stored.const_value = ir.Tensor(codes, dtype=ir.DataType.INT4, name=stored.name)
        stored.dtype = ir.DataType.INT4


def _multiplies_integers(node: Node) -> bool:
    producers = [value.producer() for value in node.inputs if value is not None]
    return all(p is not None and p.op_type == "DequantizeLinear" for p in producers[:2])


def _with_integer_products(program: Model) -> Model:
    """Rewrite every product of a float and decoded codes of a byte as one of integers."""
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass
    from onnxscript.rewriter import pattern, rewrite

    def product(op: Any, x: Any, codes: Any, scale: Any) -> Any:
        return op.MatMul(x, op.DequantizeLinear(codes, scale))

    def of_integers(op: Any, x: Any, codes: Any, scale: Any) -> Any:
        # The operator finds the range of each input by itself. MatMulInteger subtracts the zero point, so the int32
        # sum needs only the two step sizes.
        rounded, step, zero = op.DynamicQuantizeLinear(x, _outputs=3)
        total = op.Cast(op.MatMulInteger(rounded, codes, zero), to=1)
        return op.Mul(total, op.Mul(step, scale))

    def is_float(context: Any, x: Any, codes: Any, **_: Any) -> bool:
        # An input that the model rounds is decoded codes too: onnxruntime makes an exact integer product of that
        # pair, which another rounding would spoil.
        producer = x.producer()
        floats = producer is None or producer.op_type != "DequantizeLinear"
        # MatMulInteger takes int8 alone.
        return codes.is_initializer() and codes.dtype != ir.DataType.INT4 and floats

    program = rewrite(program, pattern_rewrite_rules=[pattern.RewriteRule(product, of_integers, is_float)])
    RemoveUnusedNodesPass()(program)
    return program
