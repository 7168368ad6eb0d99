"""A model whose layers compute their weights from stored integers, so that a graph traced from it holds the codes.

A packed layer decodes its weight once and computes with floats; an exporter would write these. Here the weight is
int8 codes times the step size in the graph itself, and nothing is rounded a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from geta_hf.export.formats.plain import LEFT_OUT
from geta_hf.quantization.blocks import join_blocks, split_blocks
from geta_hf.quantization.fixed import FixedQuantizer
from geta_hf.quantization.maths import quantize
from geta_hf.serialization.bitpack import BYTE_BITS
from geta_hf.serialization.encode import fill, layer_codes, weight_holders
from geta_hf.serialization.packed_layers import PackedLayer, packed_layers
from geta_hf.utils.copies import copy_module

Style = Literal["operators", "arithmetic", "float"]
"""How a traced graph states the weights: by quantize and dequantize operators, in plain arithmetic, or as floats."""

_LARGEST = 127


def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy on CPU in fp32 and evaluation mode that returns no cache; packed weights are exactly d * n.

    Its configuration no longer speaks of a quantized folder.

    Args:
        model: compressed, or plain; left unchanged.
    """
    copied = copy_module(model)
    nn.Module.to(copied, "cpu")
    layers = packed_layers(copied)
    holders = weight_holders(copied, layers)
    for name, layer in layers.items():
        fill(layer, layer_codes(name, layer), torch.float32)
        for module, leaf in holders[name]:
            setattr(module, leaf, layer.weight)
    nn.Module.float(copied)  # transformers' own refuses a quantized model
    for key in LEFT_OUT:
        copied.config.__dict__.pop(key, None)
    copied.config.dtype, copied.config.architectures = torch.float32, [type(model).__name__]
    if copied.can_generate():
        # A cache would be a further output of the graph, and its length a further size that has to be free.
        copied.config.use_cache = False
    return copied.eval()


def store_integers(model: PreTrainedModel, style: Style) -> None:
    """Let every packed layer of at most 8 bits compute its weight from int8 codes, in place; round inputs traceably.

    Embeddings whose rows are decoded do so already. Wider codes, and weights that another layer shares, stay float.

    Args:
        model: as `plain_copy` gives it.
        style: how the graph is to say it.
    """
    layers, operators = packed_layers(model), style == "operators"
    holders = weight_holders(model, layers)
    for name, layer in layers.items():
        if layer.input_quantizer is not None:
            layer.input_quantizer = _Rounding(layer.input_quantizer, operators)  # type: ignore[assignment]
        embeds = isinstance(layer, nn.Embedding)
        if style != "float" and layer.bits <= BYTE_BITS and len(holders[name]) == 1 and not embeds:
            _store(name, layer, operators)


def _store(name: str, layer: PackedLayer, operators: bool) -> None:
    codes, scale = layer_codes(name, layer).to(torch.int8), layer.step_size
    inputs = 0
    if layer.in_blocks:
        # With a row for each block, these are step sizes of rows, for which there are operators.
        codes = codes if isinstance(layer, nn.Linear) else codes.t()
        inputs = codes.shape[1]
        codes, dim, scale = split_blocks(codes), 0, scale.float().flatten()
    else:
        # A Linear's are stored transposed: runtimes find integer kernels for a product only without a step between.
        dim = layer.scale_dim
        codes, dim = (codes.t(), 1 - dim) if isinstance(layer, nn.Linear) else (codes, dim)
    # A parameter in the instance would be exported next to the codes, at four times their size.
    layer.weight = None
    del layer.weight
    # A property works only on a class. The subclass remains an instance of the layer's own class, by which exporters
    # and the model's code choose what to do.
    layer.__class__ = type("Integer" + type(layer).__name__, (_kind(layer), type(layer)), {})
    layer.register_buffer("integers", codes.contiguous())
    layer.decode = _Decode(scale, dim, codes.dim(), operators, inputs)


def _kind(layer: PackedLayer) -> type[nn.Module]:
    return _IntegerConv1D if isinstance(layer, Conv1D) else _IntegerLayer


class _IntegerLayer(nn.Module):
    """Mixin of a packed layer whose weight is computed from `integers` whenever it is asked for."""

    integers: Tensor
    decode: nn.Module
    quantized_input: Callable[[Tensor], Tensor]
    bias: Tensor

    @property
    def weight(self) -> Tensor:
        weight = self.decode(self.integers)
        return weight.t() if isinstance(self, nn.Linear) else weight


class _IntegerConv1D(_IntegerLayer):
    """A product of its own: Conv1D asks for a sum and product in one, for which runtimes have no integer kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(self.quantized_input(x), self.weight) + self.bias


class _Decode(nn.Module):
    """d * n of int8 codes.

    Args:
        scale: d, fp32, shape (1,) or (channels,).
        dim: of the codes that the channels run along.
        dims: how many dims the codes have.
        operators: whether to use operators rather than arithmetic.
        inputs: of each output, where a row of codes is a block of them; the result is then (inputs, out). Default 0:
            codes have the shape of the result.
    """

    scale: Tensor
    zero: Tensor

    def __init__(self, scale: Tensor, dim: int, dims: int, operators: bool, inputs: int = 0) -> None:
        super().__init__()
        self.inputs = inputs
        self.dim = dim
        self.operators = operators
        # The operator for a single scale takes a Python number, not a tensor.
        self.single = float(scale[0])
        self.shape = [-1 if place == dim else 1 for place in range(dims)]
        self.per_channel = scale.numel() > 1
        if self.per_channel:
            self.register_buffer("scale", scale.clone())
            # Codes are symmetric, but the operators demand a zero point for each channel.
            self.register_buffer("zero", torch.zeros(scale.numel(), dtype=torch.int8))

    def forward(self, codes: Tensor) -> Tensor:
        values = self._values(codes)
        return join_blocks(values, self.inputs).t() if self.inputs else values

    def _values(self, codes: Tensor) -> Tensor:
        if not self.operators:
            return codes.to(torch.float32) * (self.scale.view(self.shape) if self.per_channel else self.single)
        operators, span = _operators(), (-_LARGEST, _LARGEST, torch.int8)
        if self.per_channel:
            return operators.dequantize_per_channel(codes, self.scale, self.zero, self.dim, *span)
        return operators.dequantize_per_tensor(codes, self.single, 0, *span)


class _Rounding(nn.Module):
    """Round a layer's input as its own quantizer does, in operators that an exporter knows.

    Args:
        fixed: the layer's quantizer.
        operators: whether to use operators; a learned exponent, codes beyond a byte and those without a sign have none.
    """

    def __init__(self, fixed: FixedQuantizer, operators: bool) -> None:
        super().__init__()
        self.d = fixed.d
        self.q_m = fixed.q_m
        self.t = fixed.t
        self.unsigned = fixed.unsigned
        self.operators = operators and fixed.bits <= BYTE_BITS and not fixed.unsigned
        self.single, self.clipping = float(fixed.d), float(fixed.q_m)

    def forward(self, x: Tensor) -> Tensor:
        if self.unsigned:
            x = torch.relu(x)
        if self.t is not None:
            return quantize(x, self.d, self.q_m, self.t)
        # An int8 has one more value below zero than a code has, and narrower codes have fewer. The bounds are
        # numbers, since onnxscript's optimizer loses those that are tensors.
        clipped = x.clamp(-self.clipping, self.clipping)
        if not self.operators:
            return torch.round(clipped / self.single) * self.single
        span = (-_LARGEST, _LARGEST, torch.int8)
        codes = _operators().quantize_per_tensor(clipped, self.single, 0, *span)
        return _operators().dequantize_per_tensor(codes, self.single, 0, *span)


def _operators() -> torch._ops._OpNamespace:
    """Return torch's own operators for quantized graphs, which every exporter translates."""
    import torch.ao.quantization.fx._decomposed  # registers them

    return torch.ops.quantized_decomposed
