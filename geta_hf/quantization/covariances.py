"""Measure the covariance of what comes into layers, Σ = E[x xᵀ], while a model runs calibration batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geta_hf.errors import GETAError
from geta_hf.quantization.fixed import output_dim

_CHUNK = 1 << 24
"""Elements of a layer's input that are converted to single precision at once."""


def as_rows(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight with a row for each output, shape (out, inputs of one output); a view where there is one.

    Args:
        layer: a linear layer, a Conv1D or a Conv2d.
        weight: of it, or a tensor of the same shape.
    """
    if output_dim(layer) == 1:
        return weight.t()
    return weight.flatten(1)


def has_covariance(layer: nn.Module) -> bool:
    """Return whether all outputs of a layer read the same inputs, which those of a grouped convolution do not."""
    return getattr(layer, "groups", 1) == 1


def input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what a layer multiplies its weight with, one row for each use of the weight, shape (uses, inputs).

    Args:
        layer: a linear layer, a Conv1D or a Conv2d.
        x: its input.
    """
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        # As the layer pads by itself before it convolves; these amounts are (left, right, top, bottom).
        x = F.pad(
            x,
            layer._reversed_padding_repeated_twice,
            "constant" if layer.padding_mode == "zeros" else layer.padding_mode,
        )
        padding: Any = 0
    else:
        padding = layer.padding
    patches = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


class Covariance:
    """The sum of x xᵀ over what came into one layer.

    Attributes:
        total: fp32, shape (inputs, inputs); None before the first input.
        count: how many x were added up.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def add(self, rows: Tensor) -> None:
        """Add inputs of shape (uses, inputs), in any dtype."""
        if self.total is None:
            self.total = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
        for part in rows.split(max(1, _CHUNK // max(rows.shape[1], 1))):
            part = part.float()
            self.total += part.t() @ part
        self.count += len(rows)

    def mean(self, name: str) -> Tensor | None:
        """Return Σ, or None where nothing came in.

        Args:
            name: path of the layer, for the error.

        Raises:
            GETAError: it is not finite.
        """
        if self.total is None or not self.count:
            return None
        if not bool(torch.isfinite(self.total).all()):
            raise GETAError(
                f"the inputs of {name} overflow on the calibration data; load the model in float32 or bfloat16, or "
                f"exclude the layer"
            )
        return self.total / self.count


@contextmanager
def collecting(
    layers: Mapping[str, nn.Module], shared: Mapping[str, str], mask: Sequence[Tensor | None]
) -> Iterator[dict[str, Covariance]]:
    """Collect the covariances of layers' inputs while a model runs within the context.

    Args:
        layers: by path.
        shared: path -> path of the layer whose inputs it shares, itself where it has its own.
        mask: one entry: which tokens of the present batch count, bool, shape (batch, tokens); None for all of them.

    Returns:
        Path -> covariance, of the layers that `shared` names.
    """
    owners = {shared[name] for name in layers}
    found = {name: Covariance() for name in owners}

    def watch(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        x = x.detach()
        if mask[0] is not None and x.shape[:2] == mask[0].shape and not isinstance(layer, nn.Conv2d):
            x = x[mask[0]]
        found[name].add(input_rows(layer, x))

    with ExitStack() as stack:
        for name in owners:
            hook = layers[name].register_forward_pre_hook(
                lambda layer, args, kwargs, name=name: watch(name, layer, args, kwargs), with_kwargs=True
            )
            stack.callback(hook.remove)
        yield found
