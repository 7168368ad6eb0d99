"""Turn layers into quantized layers and back: the original computation on a quantized weight and a quantized input.

A layer is converted in place by switching its class. Its parameters therefore keep their names, identity, dtype,
device, requires_grad and tying, its hooks remain, and `isinstance(layer, nn.Linear)` is still true.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from geta_hf.errors import GETAError
from geta_hf.quantization.fixed import InputQuantizedLayer
from geta_hf.quantization.layer_types import base_type
from geta_hf.quantization.lora import LowRank
from geta_hf.quantization.mixture import Mixture, mixed_linear, mixed_weight
from geta_hf.quantization.parametrized import removal_of
from geta_hf.quantization.quantizer import Quantizer
from geta_hf.utils.accelerate_hooks import rebind_forward


class QuantizedLayer(InputQuantizedLayer):
    """Mixin of every quantized layer.

    Attributes:
        weight_quantizer: the quantizer of `weight`.
        input_quantizer: the quantizer of the input; None where the input stays in floating point.
        lora: added to the weight before it is quantized; None where nothing is.
        mixture: of several widths, on which the layer computes while a search runs; None at any other time.
        input_mixture: the same of its input, in place of what `input_quantizer` gives.
    """

    weight: Any  # each plain layer class declares its own type
    weight_quantizer: Quantizer
    lora: LowRank | None
    mixture: Mixture | None
    input_mixture: Mixture | None

    @property
    def _untrained(self) -> list[Tensor]:
        """The quantizer's parameters, which have no part in a mixture."""
        return [value for value in self.weight_quantizer.parameters() if value.requires_grad]

    def quantized_input(self, x: Tensor) -> Tensor:
        """Return x^Q of the input, or its mixture, differentiable; x itself where it stays in floating point."""
        own = self.input_quantizer
        if own is None or self.input_mixture is None:
            return super().quantized_input(x)
        untrained = [value for value in own.parameters() if value.requires_grad]
        return mixed_weight(F.relu(x) if own.unsigned else x, self.input_mixture, untrained)

    def merged_weight(self) -> Tensor:
        """Return what is quantized, differentiable: the weight with what `lora` adds to it."""
        return self.weight if self.lora is None else self.lora.merged(self.weight)

    def quantized_weight(self) -> Tensor:
        """Return x^Q of the weight, differentiable."""
        return self.weight_quantizer(self.merged_weight())


class QuantLinear(QuantizedLayer, nn.Linear):
    """nn.Linear on the quantized weight, of which no copy is saved for backward."""

    def forward(self, input: Tensor) -> Tensor:
        x = self.quantized_input(input)
        if self.mixture is not None:
            return mixed_linear(x, self.weight, self.bias, self.mixture, untrained=self._untrained)
        return self.weight_quantizer.linear(x, self.weight, self.bias, self.lora)


class QuantConv1D(QuantizedLayer, Conv1D):
    """transformers' Conv1D, a linear layer whose weight is (in, out), on the quantized weight."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.quantized_input(x)
        if self.mixture is not None:
            return mixed_linear(x, self.weight, self.bias, self.mixture, transposed=True, untrained=self._untrained)
        if self.lora is None:
            return F.linear(x, self.quantized_weight().t(), self.bias)
        return self.weight_quantizer.linear(x, self.weight.t(), self.bias, self.lora)


class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """nn.Conv2d on the quantized weight."""

    def forward(self, input: Tensor) -> Tensor:
        x = self.quantized_input(input)
        own = self.mixture
        # The method of nn.Conv2d that takes the weight, with its padding modes.
        if own is None:
            return self._conv_forward(x, self.quantized_weight(), self.bias)
        out = self._conv_forward(
            own.scaled_inputs(x, channel_dim=1), mixed_weight(self.weight, own, self._untrained), self.bias
        )
        return own.scaled_outputs(out, channel_dim=1)


LAYER_TYPES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: QuantLinear,
    Conv1D: QuantConv1D,
    nn.Conv2d: QuantConv2d,
}


@cache
def _quantized_class(original: Any, plain: Any) -> type[nn.Module]:
    # Cached, since layers of one class have to be of one class afterwards.
    quantized = LAYER_TYPES[plain]
    return quantized if original is plain else type(f"Quant{original.__name__}", (quantized, original), {})


def check_convertible(layer: nn.Module, name: str) -> None:
    """Check that `quantize_layer` can convert a layer.

    Args:
        layer: any module.
        name: path of the layer, for the error.

    Raises:
        GETAError: the layer is quantized already, its class is not supported, or its weight is no parameter.
    """
    if isinstance(layer, QuantizedLayer):
        raise GETAError(f"{name} is already quantized; detach its quantizer first")
    if base_type(layer) is None:
        supported = ", ".join(kind.__name__ for kind in LAYER_TYPES)
        raise GETAError(
            f"{name}: {type(layer).__name__} has a forward of its own; supported are {supported} and subclasses that "
            f"keep its forward. Exclude it by a pattern"
        )
    check_parameter(layer, name)


def check_parameter(layer: nn.Module, name: str) -> None:
    """Check that the weight of a layer is a parameter of it, and not computed from others.

    Args:
        layer: one whose weight is to be quantized.
        name: path of the layer, for the error.

    Raises:
        GETAError: it is computed, such as by weight norm; names the layer, and the call that makes it a parameter.
    """
    if layer._parameters.get("weight") is not None:
        return
    found = removal_of(layer, name)
    if found is None:
        raise GETAError(f"{name}.weight is no parameter; make it one, or exclude the layer by a pattern")
    what, call = found
    raise GETAError(
        f"{name}.weight is computed by {what} and is no parameter that can be quantized; call {call} first, or exclude "
        f"the layer by a pattern"
    )


def quantize_layer(layer: nn.Module, quantizer: Quantizer) -> None:
    """Turn a plain layer into a quantized one, in place; its input is not quantized and it has no LoRA yet.

    Args:
        layer: one that `check_convertible` accepts.
        quantizer: of the layer's weight; layers whose weights are tied share one.
    """
    # Remembered on the instance, since a subclass of a plain layer must become that subclass again.
    layer.__dict__["_plain_class"] = type(layer)
    layer.__class__ = _quantized_class(type(layer), base_type(layer))  # type: ignore[arg-type]
    rebind_forward(layer)
    layer.weight_quantizer = quantizer
    layer.input_quantizer = None  # type: ignore[assignment]
    layer.lora = None  # type: ignore[assignment]
    layer.mixture = None  # type: ignore[assignment]
    layer.input_mixture = None  # type: ignore[assignment]


@torch.no_grad()
def absorb(layer: QuantizedLayer) -> None:
    """Write what `lora` adds into the weight and drop it, in place."""
    if layer.lora is not None:
        layer.weight.copy_(layer.merged_weight())
        layer.lora = None


def dequantize_layer(layer: QuantizedLayer) -> None:
    """Turn a quantized layer back into the plain layer that it was, in place.

    The weight keeps its unquantized value, with what LoRA learned merged into it.
    """
    absorb(layer)
    # Their parameters would otherwise appear in the state dict of a plain layer.
    del layer.weight_quantizer, layer.input_quantizer, layer.lora, layer.mixture, layer.input_mixture
    layer.__class__ = layer.__dict__.pop("_plain_class")
    rebind_forward(layer)
