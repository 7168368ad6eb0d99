"""Round the vocabulary's embedding to a few bits after training, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from geta_hf.errors import GETAError
from geta_hf.quantization import channel_clipping_values
from geta_hf.quantization.maths import integer_codes, step_size
from geta_hf.serialization.bitpack import BYTE_BITS, MIN_BITS


@dataclass(frozen=True)
class RoundedEmbedding:
    """An embedding that was rounded.

    Attributes:
        name: path of the module.
        bits: bit width of its codes.
        step_size: d of every row, fp32, shape (rows,), on CPU.
    """

    name: str
    bits: int
    step_size: Tensor

    def codes(self, layer: nn.Module) -> Tensor:
        """Return the integers n of the rounded weight, int32, in its shape.

        Raises:
            GETAError: the embedding no longer has the rows that were rounded.
        """
        weight = layer.get_parameter("weight").detach()
        if weight.shape[0] != self.step_size.numel():
            raise GETAError(
                f"{self.name} has lost rows since it was rounded to {self.bits} bits; export without embedding_bits"
            )
        # The weight is d * n rounded to its dtype, and bf16 moves an n of at most 127 by no more than a quarter.
        return torch.round(weight.float() / self.step_size.to(weight.device)[:, None]).to(torch.int32)


@contextmanager
def rounded_embedding(model: PreTrainedModel, bits: int | None) -> Iterator[RoundedEmbedding | None]:
    """Round the input embedding of a model to `bits` bits within the context, and restore it afterwards.

    Every row gets the step size of least squared error. Weights that are tied to the embedding have the same values.

    Args:
        model: with a plain embedding as its input embedding.
        bits: 2 to 8; None changes nothing.

    Raises:
        GETAError: other bits, or no embedding to round.
    """
    if bits is None:
        yield None
        return
    name, layer = input_embedding(model, bits)
    weight = layer.weight.data
    clipping = channel_clipping_values(weight, bits, name=f"{name}.weight")
    d = step_size(float(bits), clipping, torch.ones(1, device=weight.device))
    rows = d[:, None]
    # Only the data changes: the parameter is the same object, so an output layer that is tied to it computes with the
    # same rounded values.
    layer.weight.data = (integer_codes(weight, rows, clipping[:, None]).float() * rows).to(weight.dtype)
    try:
        yield RoundedEmbedding(name, bits, d.cpu())
    finally:
        layer.weight.data = weight


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
