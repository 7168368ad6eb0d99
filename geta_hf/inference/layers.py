"""Packed layers that compute on their codes and hold no float weight.

`weight` is an int8 tensor: the codes as they are, or two 4-bit codes to a byte. On a GPU zeros lie around them, since
its kernels want sizes in multiples of 8. What is saved is made of the codes, so a folder stays the same bit for bit.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from geta_hf.errors import GETAError
from geta_hf.inference.products import MOST_INPUTS, integer_product, on_gpu, round_rows, scaled
from geta_hf.inference.weight_only import HALF_BITS, HAS_TRITON, pack_halves, unpack_halves, weight_only_linear
from geta_hf.quantization.maths import integer_codes
from geta_hf.serialization.bitpack import BYTE_BITS
from geta_hf.serialization.encode import fill, layer_codes
from geta_hf.serialization.packed_layers import PackedConv1D, PackedLayer, PackedLinear
from geta_hf.utils.accelerate_hooks import rebind_forward

FLOAT, STATIC, DYNAMIC, WEIGHT_ONLY = "float", "int8 static", "int8 dynamic", "weight only"
"""The paths of a layer: its own forward on a float weight; integer products, with the trained step size of its input or
with one found for each row; codes that are decoded inside the product."""

FEW_ROWS = 64
"""Up to here a GPU waits for weights, so what reads the fewest bytes wins; beyond, what multiplies fastest."""

_MULTIPLE = 8  # what a GPU wants sizes to be multiples of


class IntegerLayer(PackedLayer):
    """Mixin of a linear layer that computes on its codes, without gradients.

    Attributes:
        path: `STATIC`, `DYNAMIC` or `WEIGHT_ONLY`.
        for_gpu: whether the weight lies as a GPU wants it.
        halved: whether a byte of the weight holds two codes.
    """

    ADDED = ("path", "for_gpu", "halved", "_dense_shape", "_totals")
    OWN = (*PackedLayer.OWN, *ADDED)

    bias: Any
    path: str
    for_gpu: bool
    halved: bool
    like: Tensor  # empty; its type follows casts of the model
    _dense_shape: tuple[int, ...]
    _totals: Tensor  # of the codes of each output, int32

    @property
    def dense_shape(self) -> tuple[int, ...]:
        return self._dense_shape

    @property
    def float_dtype(self) -> torch.dtype:
        return self.like.dtype

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, path={self.path!r}"

    def forward(self, input: Tensor) -> Tensor:
        """What the plain layer gives, in the type of the input."""
        if torch.is_grad_enabled() and input.requires_grad:
            raise GETAError(
                f"a layer on the path {self.path!r} has no gradient; compute under torch.no_grad(), or call "
                f"prepare_for_inference(model, 'float') before training"
            )
        out = self._product(input.reshape(-1, input.shape[-1]))
        return out.to(input.dtype).view(*input.shape[:-1], out.shape[-1])

    def _product(self, rows: Tensor) -> Tensor:
        outputs, step = self._rows_first(self._dense_shape)[0], self.step_size.to(rows.device)
        few, stored = on_gpu(rows) and rows.shape[0] <= FEW_ROWS, self._transposed(self.weight)
        if few or self.path == WEIGHT_ONLY:
            x, fused = self.quantized_input(rows), few and HAS_TRITON
            return weight_only_linear(x, stored, step, self.bias, outputs, self.halved, fused)
        weight = unpack_halves(stored) if self.halved else stored
        own = self.input_quantizer
        if self.path == STATIC and own is not None:
            codes, input_step = integer_codes(rows, own.d, own.q_m, own.t).to(torch.int8), own.d
            return scaled(integer_product(codes, weight, outputs), input_step, step, self.bias)
        codes, input_step, zero = round_rows(self.quantized_input(rows))
        sums = integer_product(codes, weight, outputs).addcmul_(zero, self._totals.to(rows.device))
        return scaled(sums, input_step, step, self.bias)

    def _rows_first(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(out, in) of a shape as the plain layer has it."""
        return shape[::-1] if isinstance(self, Conv1D) else shape

    def _transposed(self, weight: Tensor) -> Tensor:
        """A weight (out, in) of one as the plain layer has it, or back."""
        return weight.t() if isinstance(self, Conv1D) else weight

    def read_back(self, weight: Tensor) -> Tensor:
        outputs, inputs = self._rows_first(self._dense_shape)
        stored = self._transposed(weight)
        codes = unpack_halves(stored) if self.halved else stored
        return self._transposed(codes[:outputs, :inputs].to(torch.int32))

    def stored(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """The codes as bytes, row after row of (out, in); `dtype` is kept for the way back."""
        self.__dict__["_dtype"], self._dense_shape = dtype, tuple(codes.shape)
        rows = self._transposed(codes)
        self._totals = rows.sum(1, dtype=torch.int32)
        self.for_gpu = on_gpu(rows)
        self.halved = self.bits <= HALF_BITS and self.for_gpu
        if self.for_gpu:
            wanted = 2 * _MULTIPLE if self.halved else _MULTIPLE
            rows = F.pad(rows, (0, -rows.shape[1] % wanted, 0, -rows.shape[0] % _MULTIPLE))
        rows = pack_halves(rows) if self.halved else rows.to(torch.int8, memory_format=torch.contiguous_format)
        return self._transposed(rows)

    def finish_loading(self) -> None:
        like = torch.empty(0, dtype=self.__dict__.pop("_dtype"), device=self.weight.device)
        self.register_buffer("like", like, persistent=False)


class IntegerLinear(IntegerLayer, PackedLinear):
    """nn.Linear on its codes."""


class IntegerConv1D(IntegerLayer, PackedConv1D):
    """transformers' Conv1D on its codes."""


_INTEGER: dict[Any, Any] = {PackedLinear: IntegerLinear, PackedConv1D: IntegerConv1D}


def path_of(layer: PackedLayer) -> str:
    """The path that a layer takes now."""
    return layer.path if isinstance(layer, IntegerLayer) else FLOAT


def is_exact(layer: PackedLayer) -> bool:
    """Whether integer products of a layer are those of its own forward: its input was trained to be 8-bit integers."""
    return layer.input_quantizer is not None and layer.input_quantizer.bits <= BYTE_BITS


def fits_integers(layer: PackedLayer) -> bool:
    """Whether a layer has any path but `FLOAT`: a linear layer whose codes fit a byte and whose sums fit 32 bits."""
    if not isinstance(layer, nn.Linear | Conv1D) or layer.bits > BYTE_BITS:
        return False
    inputs = layer.dense_shape[0 if isinstance(layer, Conv1D) else 1]
    # Where a single input is left, torch's product of integers on a CPU is not even computed.
    return 1 < inputs <= MOST_INPUTS


def reserve_integers(layer: PackedLayer) -> None:
    """Let a layer that `fits_integers`, and whose weight is yet to be loaded, become one on the path `DYNAMIC`."""
    kind: Any = type(layer)
    vars(layer).update(path=DYNAMIC, _dense_shape=layer.dense_shape)
    layer.__class__ = _integer_class(kind)


@torch.no_grad()
def set_path(name: str, layer: PackedLayer, path: str) -> None:
    """Let a layer take another path, in place.

    Args:
        name: of the layer in its model, for errors.
        layer: one that `fits_integers`, on a CPU or GPU, where the path is not `FLOAT`.
        path: `FLOAT`, `STATIC` (needs `is_exact`), `DYNAMIC` or `WEIGHT_ONLY`.

    Raises:
        GETAError: the weight is no longer what its codes say.
    """
    if path_of(layer) == path == FLOAT:
        return
    if isinstance(layer, IntegerLayer) and path != FLOAT and layer.for_gpu == on_gpu(layer.weight):
        layer.path, layer.step_size = path, layer.step_size.to(layer.weight.device)
        return
    codes, dtype = layer_codes(name, layer), layer.float_dtype
    kind: Any = type(layer)
    if isinstance(layer, IntegerLayer):
        kind = kind.__bases__[1]
        for leaf in layer.ADDED:
            del vars(layer)[leaf]
        del layer.like
    layer.__class__ = kind if path == FLOAT else _integer_class(kind)
    rebind_forward(layer)
    layer.step_size = layer.step_size.to("cpu" if path == FLOAT else codes.device)
    fill(layer, codes, dtype)
    if isinstance(layer, IntegerLayer):
        layer.path = path


@cache
def _integer_class(packed: Any) -> Any:
    """The integer kind of a packed class, and of one made for a subclass of a plain layer."""
    return _INTEGER.get(packed) or type(packed.__name__.replace("Packed", "Integer", 1), (IntegerLayer, packed), {})
