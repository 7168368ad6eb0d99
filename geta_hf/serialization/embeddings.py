"""Round the vocabulary's embedding to a few bits after training, by row or by blocks of 32 elements of a row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from geta_hf.config import EmbeddingGrid
from geta_hf.errors import GETAError
from geta_hf.quantization.blocks import half_steps
from geta_hf.quantization.clipping import block_clipping_values, channel_clipping_values
from geta_hf.quantization.maths import block_count, integer_codes, step_size
from geta_hf.serialization.bitpack import BYTE_BITS, MIN_BITS, largest_code
from geta_hf.serialization.packed_layers import BLOCKS, spread_blocks

Kept = Mapping[str, Mapping[int, Tensor]]


@dataclass(frozen=True)
class RoundedEmbedding:
    """An embedding that was rounded.

    Attributes:
        name: path of the module.
        bits: bit width of its codes.
        step_size: d of every row, fp32, shape (rows,), or of every 32 of its elements, shape (rows, blocks); on CPU.
    """

    name: str
    bits: int
    step_size: Tensor

    def codes(self, layer: nn.Module) -> Tensor:
        """Return the integers n of the rounded weight, int32, in its shape.

        Raises:
            GETAError: the embedding no longer has the rows and blocks that were rounded.
        """
        weight = layer.get_parameter("weight").detach()
        blocks = (weight.shape[0], block_count(weight.shape[1]))
        if self.step_size.shape != blocks[: self.step_size.dim()]:
            raise GETAError(
                f"{self.name} has lost rows or columns since it was rounded to {self.bits} bits; export without "
                f"embedding_bits"
            )
        # The weight is d * n rounded to its dtype, and bf16 moves an n of at most 127 by no more than a quarter.
        steps = _of_elements(self.step_size.to(weight.device), weight.shape[1])
        return torch.round(weight.float() / steps).to(torch.int32)


@contextmanager
def rounded_embedding(
    model: PreTrainedModel, bits: int | None, grid: EmbeddingGrid = "channel", kept: Kept | None = None
) -> Iterator[RoundedEmbedding | None]:
    """Round the input embedding of a model to `bits` bits within the context, and restore it afterwards.

    Every row, or every block, gets the step size of least squared error. Weights that are tied to the embedding have
    the same values.

    Args:
        model: with a plain embedding as its input embedding.
        bits: 2 to 8; None changes nothing.
        grid: `channel`, a step size for each row, or `block32`, one in fp16 for every 32 elements of a row.
        kept: tensor name -> dim -> int64 indices that a cut will leave: blocks are formed over the columns that remain.
            The others have to be zero. Default None: all of them.

    Raises:
        GETAError: other bits, or no embedding to round.
    """
    if bits is None:
        yield None
        return
    name, layer = input_embedding(model, bits)
    weight = layer.weight.data
    columns = _kept_columns(model, layer, kept or {})
    remaining = weight if columns is None else weight[:, columns]
    d, rounded = _round_rows(remaining, bits, grid, f"{name}.weight")
    # Only the data changes: the parameter is the same object, so an output layer that is tied to it computes with the
    # same rounded values.
    layer.weight.data = rounded if columns is None else torch.zeros_like(weight).index_copy_(1, columns, rounded)
    try:
        yield RoundedEmbedding(name, bits, d.cpu())
    finally:
        layer.weight.data = weight


def _round_rows(weight: Tensor, bits: int, grid: EmbeddingGrid, name: str) -> tuple[Tensor, Tensor]:
    """Return the step sizes and the rounded values of a matrix, shape and type as those of `weight`."""
    one = torch.ones(1, device=weight.device)
    if grid == BLOCKS:
        clipping = block_clipping_values(weight, bits, name=name)
        # In fp16 from the start, so that what is stored is what was rounded.
        d = half_steps(step_size(float(bits), clipping, one), small=True)
        clipping = d * largest_code(bits)
    else:
        clipping = channel_clipping_values(weight, bits, name=name)
        d = step_size(float(bits), clipping, one)
    steps = _of_elements(d, weight.shape[1])
    codes = integer_codes(weight, steps, _of_elements(clipping, weight.shape[1]))
    return d, (codes.float() * steps).to(weight.dtype)


def _of_elements(values: Tensor, columns: int) -> Tensor:
    """Return what rows, or blocks of a row, have as one value for each element, broadcastable over the matrix."""
    return values[:, None] if values.dim() == 1 else spread_blocks(values, columns)


def _kept_columns(model: nn.Module, layer: nn.Embedding, kept: Kept) -> Tensor | None:
    """Return the columns of the embedding that a cut will leave; None for all."""
    found = next((kept[name][1] for name in weight_names(model, layer) if 1 in kept.get(name, {})), None)
    return None if found is None else found.to(layer.weight.device)


def weight_names(model: nn.Module, layer: nn.Embedding) -> list[str]:
    """Return all names of an embedding's weight: those of layers that are tied to it, too."""
    return [name for name, tensor in model.named_parameters(remove_duplicate=False) if tensor is layer.weight]


def input_embedding(model: Any, bits: int) -> tuple[str, nn.Embedding]:
    """Return the path of the embedding that `embedding_bits` refers to, and the embedding.

    Raises:
        GETAError: as `rounded_embedding`.
    """
    if not isinstance(bits, int) or isinstance(bits, bool) or not MIN_BITS <= bits <= BYTE_BITS:
        raise GETAError(f"embedding_bits is {bits!r}; give an integer from {MIN_BITS} to {BYTE_BITS}")
    try:
        layer = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        layer = None
    if not isinstance(layer, nn.Embedding):
        kind = "none" if layer is None else f"a {type(layer).__name__}"
        raise GETAError(f"the input embedding of {type(model).__name__} is {kind}; export without embedding_bits")
    return next(name for name, module in model.named_modules() if module is layer), layer
