"""Define packed layers that compute on their codes and hold no float weight.

`weight` is an int8 tensor: one code per byte, or two 4-bit codes per byte. On a GPU it is padded with zeros, since the
kernels there need sizes in certain multiples. Saving starts from the codes, so the folder is the same bit for bit.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from geta_hf.errors import GETAError
from geta_hf.inference.products import MOST_INPUTS, MULTIPLE, integer_product, on_gpu, round_rows, scaled
from geta_hf.inference.weight_only import HALF_BITS, HAS_TRITON, pack_halves, unpack_halves, weight_only_linear
from geta_hf.quantization.maths import integer_codes
from geta_hf.serialization.bitpack import BYTE_BITS, largest_code
from geta_hf.serialization.encode import fill, layer_codes
from geta_hf.serialization.packed_layers import PackedConv1D, PackedLayer, PackedLinear
from geta_hf.utils.accelerate_hooks import rebind_forward

FLOAT, STATIC, DYNAMIC, WEIGHT_ONLY = "float", "int8 static", "int8 dynamic", "weight only"
"""The paths of a layer: its own forward on a float weight; integer products, with the trained step size of its input or
with one computed for each row of the input; codes that are decoded inside the product."""

FEW_ROWS = 64
"""Up to this many rows of input a GPU waits for the weights, so the path that reads the fewest bytes is fastest; for
more rows it is the one that multiplies fastest. Hence two products: codes are decoded inside the product for the few
rows of generation, and int8 is multiplied by int8 for prompts and batches."""

ROW_BYTES = 16
"""On a GPU a row of a weight takes a multiple of it: the widest load, for which every row has to begin at one."""


class IntegerLayer(PackedLayer):
    """Mixin of a linear layer that computes on its codes, without gradients.

    Attributes:
        path: `STATIC`, `DYNAMIC` or `WEIGHT_ONLY`.
        for_gpu: whether the weight is padded for a GPU.
        halved: whether a byte of the weight holds two codes.
    """

    ADDED = ("path", "for_gpu", "halved", "_dense_shape", "_totals", "_totals_of_widths")
    OWN = (*PackedLayer.OWN, *ADDED)

    bias: Any
    path: str
    for_gpu: bool
    halved: bool
    like: Tensor  # empty; its type follows casts of the model
    _dense_shape: tuple[int, ...]
    _totals: Tensor  # of the codes of each output, int32
    _totals_of_widths: dict[int, Tensor]  # the same of the inputs of each width, where inputs have step sizes

    @property
    def dense_shape(self) -> tuple[int, ...]:
        return self._dense_shape

    @property
    def float_dtype(self) -> torch.dtype:
        return self.like.dtype

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, path={self.path!r}"

    def forward(self, input: Tensor) -> Tensor:
        """Return the output of the plain layer, in the type of the input.

        Raises:
            GETAError: a gradient is wanted.
        """
        # Integer operations end the graph without a word, so that the layers below would not be trained.
        if torch.is_grad_enabled() and input.requires_grad:
            raise GETAError(
                f"a layer on the path {self.path!r} has no gradient; compute under torch.no_grad(), or call "
                f"prepare_for_inference(model, 'float') before training"
            )
        out = self._product(input.reshape(-1, input.shape[-1]))
        return out.to(input.dtype).view(*input.shape[:-1], out.shape[-1])

    def _product(self, rows: Tensor) -> Tensor:
        outputs = self._rows_first(self._dense_shape)[0]
        step = self.step_size.to(rows.device)
        stored = self._transposed(self.weight)
        if self.scales_inputs:
            return self._product_of_blocks(self.quantized_input(rows), stored, step, outputs)
        if self.path == STATIC and not self._few(rows) and self.input_quantizer is not None:
            weight = unpack_halves(stored) if self.halved else stored
            own = self.input_quantizer
            codes = integer_codes(own.entering(rows), own.d, own.q_m, own.t).to(torch.int8)
            return scaled(integer_product(codes, weight, outputs), own.d, step, self.bias)
        return self._product_of(self.quantized_input(rows), stored, step, outputs)

    def _few(self, rows: Tensor) -> bool:
        """Return whether reading the weight takes longer than multiplying, see `FEW_ROWS`."""
        return on_gpu(rows) and rows.shape[0] <= FEW_ROWS

    def _product_of(self, rows: Tensor, stored: Tensor, step: Tensor, outputs: int) -> Tensor:
        """Return the product of float rows with the codes, decoded within it or after rounding the rows."""
        few = self._few(rows)
        if few or self.path == WEIGHT_ONLY:
            fused = few and HAS_TRITON
            return weight_only_linear(rows, stored, step, self.bias, outputs, self.halved, fused)
        weight = unpack_halves(stored) if self.halved else stored
        codes, input_step, zero = round_rows(rows)
        # Σ (n_x + z) n_w = Σ n_x n_w + z Σ n_w, and the sums of the weight's codes never change.
        sums = integer_product(codes, weight, outputs).addcmul_(zero, self._totals.to(rows.device))
        return scaled(sums, input_step, step, self.bias)

    def _product_of_blocks(self, rows: Tensor, stored: Tensor, step: Tensor, outputs: int) -> Tensor:
        """Return x · (d ∘ n)ᵀ as (x ∘ d) · nᵀ, where d has a number for each input.

        The step sizes of a narrow width are many times those of a wide one, so each width has a product of its own, in
        which rows are rounded to their own range.
        """
        scaled_rows = rows.float() * step
        one = step.new_ones(1)
        if self._few(rows) or self.path == WEIGHT_ONLY:
            return self._product_of(scaled_rows.to(rows.dtype), stored, one, outputs)
        assert self.widths is not None
        weight = unpack_halves(stored) if self.halved else stored
        total = rows.new_zeros(rows.shape[0], outputs, dtype=torch.float32)
        for width, sums_of_codes in self._totals_of_widths.items():
            index = self.widths.index(width).to(rows.device)
            codes, input_step, zero = round_rows(scaled_rows.index_select(1, index))
            part = weight.index_select(1, index)
            if len(index) == 1:  # with a single input the product on a CPU computes nothing
                codes, part = F.pad(codes, (0, 1)), F.pad(part, (0, 1))
            sums = integer_product(codes, part, outputs).addcmul_(zero, sums_of_codes.to(rows.device))
            total += scaled(sums, input_step, one, None)
        return total if self.bias is None else total + self.bias.float()

    def _rows_first(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return (out, in) of a weight's shape in the plain layer."""
        return shape[::-1] if isinstance(self, Conv1D) else shape

    def _transposed(self, weight: Tensor) -> Tensor:
        """Return a weight of the plain layer as (out, in), or the reverse."""
        return weight.t() if isinstance(self, Conv1D) else weight

    def read_back(self, weight: Tensor) -> Tensor:
        outputs, inputs = self._rows_first(self._dense_shape)
        stored = self._transposed(weight)
        codes = unpack_halves(stored) if self.halved else stored
        return self._transposed(codes[:outputs, :inputs].to(torch.int32))

    def stored(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the codes as bytes, row after row of (out, in), padded for a GPU; see `PackedLayer.stored`."""
        self.__dict__["_dtype"] = dtype
        self._dense_shape = tuple(codes.shape)
        rows = self._transposed(codes)
        # Computed before the padding and the packing, from the codes themselves.
        self._totals = rows.sum(1, dtype=torch.int32)
        self._totals_of_widths = {}
        if self.widths is not None and self.scales_inputs:
            for width in self.widths.counts:
                part = rows.index_select(1, self.widths.index(width).to(rows.device))
                self._totals_of_widths[width] = part.sum(1, dtype=torch.int32)
        self.for_gpu = on_gpu(rows)
        self.halved = self.bits <= HALF_BITS and self.for_gpu
        if self.for_gpu:
            codes_of_row = 2 * ROW_BYTES if self.halved else ROW_BYTES
            rows = F.pad(rows, (0, -rows.shape[1] % codes_of_row, 0, -rows.shape[0] % MULTIPLE))
        rows = pack_halves(rows) if self.halved else rows.to(torch.int8)
        # A transposed weight has columns in memory up to here, and padding by nothing keeps them.
        return self._transposed(rows.contiguous())

    def finish_loading(self) -> None:
        like = torch.empty(0, dtype=self.__dict__.pop("_dtype"), device=self.weight.device)
        self.register_buffer("like", like, persistent=False)


class IntegerLinear(IntegerLayer, PackedLinear):
    """nn.Linear on its codes."""


class IntegerConv1D(IntegerLayer, PackedConv1D):
    """transformers' Conv1D on its codes."""


_INTEGER: dict[Any, Any] = {PackedLinear: IntegerLinear, PackedConv1D: IntegerConv1D}


def path_of(layer: PackedLayer) -> str:
    """Return the path that a layer takes now."""
    return layer.path if isinstance(layer, IntegerLayer) else FLOAT


def is_exact(layer: PackedLayer) -> bool:
    """Return whether integer products equal a layer's own forward: training rounded its input to at most 8 bits.

    Step sizes of inputs would be factors of each addend, which has no integer product.
    """
    if layer.scales_inputs:
        return False
    return layer.input_quantizer is not None and layer.input_quantizer.largest_code <= largest_code(BYTE_BITS)


def fits_integers(layer: PackedLayer) -> bool:
    """Return whether a layer has a path other than `FLOAT`: it is linear, codes fit a byte and sums fit 32 bits.

    Step sizes of blocks allow no integer products, since those add up over all inputs.
    """
    if getattr(layer, "step_size", None) is not None and layer.in_blocks:
        return False
    if not isinstance(layer, nn.Linear | Conv1D) or layer.bits > BYTE_BITS:
        return False
    inputs = layer.dense_shape[0 if isinstance(layer, Conv1D) else 1]
    # With a single input, torch's integer product on a CPU computes nothing and returns arbitrary numbers.
    return 1 < inputs <= MOST_INPUTS


def reserve_integers(layer: PackedLayer) -> None:
    """Turn a layer whose weight is yet to be loaded into an integer layer on the path `DYNAMIC`, in place.

    Args:
        layer: one that `fits_integers`.
    """
    packed_class: Any = type(layer)
    vars(layer).update(path=DYNAMIC, _dense_shape=layer.dense_shape)
    layer.__class__ = _integer_class(packed_class)


@torch.no_grad()
def set_path(name: str, layer: PackedLayer, path: str) -> None:
    """Set the path that a layer takes, in place.

    Args:
        name: path of the layer in its model, for errors.
        layer: a packed layer; one that `fits_integers` and is on a CPU or GPU, unless `path` is `FLOAT`.
        path: `FLOAT`, `STATIC` (needs `is_exact`), `DYNAMIC` or `WEIGHT_ONLY`.

    Raises:
        GETAError: the weight was changed, so that it has no codes any more.
    """
    if path_of(layer) == path == FLOAT:
        return
    if isinstance(layer, IntegerLayer) and path != FLOAT and layer.for_gpu == on_gpu(layer.weight):
        # Only the arithmetic changes; the weight is laid out as it should be.
        layer.path = path
        layer.step_size = layer.step_size.to(layer.weight.device)
        return
    # From the codes and not from the weight in memory, so any number of changes of the path loses nothing.
    codes = layer_codes(name, layer)
    dtype = layer.float_dtype
    packed_class: Any = type(layer)
    if isinstance(layer, IntegerLayer):
        # _integer_class puts the packed class second.
        packed_class = packed_class.__bases__[1]
        for leaf in layer.ADDED:
            del vars(layer)[leaf]
        del layer.like
    layer.__class__ = packed_class if path == FLOAT else _integer_class(packed_class)
    rebind_forward(layer)
    # Integer products alone use the step size in every forward, where a copy from the CPU would make the GPU wait.
    layer.step_size = layer.step_size.to("cpu" if path == FLOAT else codes.device)
    fill(layer, codes, dtype)
    if isinstance(layer, IntegerLayer):
        layer.path = path


@cache
def _integer_class(packed: Any) -> Any:
    """Return the integer class of a packed class, also of one that was made for a subclass of a plain layer."""
    return _INTEGER.get(packed) or type(packed.__name__.replace("Packed", "Integer", 1), (IntegerLayer, packed), {})
