"""Round numbers to b bits: quantizers (d, q_m, t), the layers that carry them, and the kernels that compute them fast.

Other rooms attach quantizers to a model and detach them again, ask a quantized layer for its bit width and codes, and
use the pure functions of `quantization.functional`. What is quantized, and to how many bits, is decided elsewhere.
"""

from geta_hf.quantization.attach import (
    attach_quantizers,
    cut_quantizers,
    detach_quantizers,
    float_inputs,
    input_quantizer_prefixes,
    quantized_layers,
    quantizer_prefixes,
    select_layers,
    without_quantizers,
)
from geta_hf.quantization.calibration import attach_input_quantizers
from geta_hf.quantization.clipping import channel_clipping_values, clipping_value
from geta_hf.quantization.fixed import FixedQuantizer
from geta_hf.quantization.functional import bit_width, fake_quantize, integer_codes, quantize, step_size
from geta_hf.quantization.layers import QuantConv1D, QuantConv1d, QuantConv2d, QuantizedLayer, QuantLinear
from geta_hf.quantization.quantizer import Quantizer, fixed_quantizer, freeze_quantizers

__all__ = [
    "FixedQuantizer",
    "QuantConv1D",
    "QuantConv1d",
    "QuantConv2d",
    "QuantLinear",
    "QuantizedLayer",
    "Quantizer",
    "attach_input_quantizers",
    "attach_quantizers",
    "bit_width",
    "channel_clipping_values",
    "clipping_value",
    "cut_quantizers",
    "detach_quantizers",
    "fake_quantize",
    "fixed_quantizer",
    "float_inputs",
    "freeze_quantizers",
    "input_quantizer_prefixes",
    "integer_codes",
    "quantize",
    "quantized_layers",
    "quantizer_prefixes",
    "select_layers",
    "step_size",
    "without_quantizers",
]
