"""Let weights make up, in the midst of training, for inputs that are removed and for being rounded.

Covariances are measured within the optimizer's step in which they are needed, on batches that were drawn before the
first one. So nothing is kept from step to step, and a resumed run does the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from geta_hf.qadg.group_labels import GroupLabels, marked
from geta_hf.qadg.group_types import Family
from geta_hf.quantization import quantized_layers
from geta_hf.quantization.covariances import as_rows, covariance_bytes, like_weight, measure_covariances
from geta_hf.quantization.error_compensation import (
    compensate_removed_inputs,
    round_compensated,
    within_bins,
)
from geta_hf.quantization.fixed import output_dim
from geta_hf.quantization.layer_types import base_type
from geta_hf.quantization.layers import QuantizedLayer
from geta_hf.utils.model_io import to_device
from geta_hf.utils.shards import from_first_process

COVARIANCE_BYTES = 1 << 30
"""How much the covariances take that are in memory at a time, unless a single one is larger."""


@dataclass(frozen=True)
class Kept:
    """What remains of a layer's weight, as rows.

    Attributes:
        rows: bool, shape (out,).
        columns: bool, shape (inputs of one output,).
    """

    rows: Tensor
    columns: Tensor


def find_kept(layer: nn.Module, cuts: Sequence[GroupLabels], removed: Tensor) -> Kept:
    """Return the rows and columns of a layer's weight that no removed group takes, on the weight's device.

    Args:
        layer: a linear layer, a Conv1D or a convolution.
        cuts: the group of each index of its weight's cut dimensions.
        removed: bool, shape (groups,), on CPU.
    """
    weight: Tensor = layer.weight  # type: ignore[assignment]
    gone = {cut.dim: marked(cut.label, removed) for cut in cuts}
    rows = as_rows(layer, weight)
    out = output_dim(layer)
    inputs = 1 - out
    kept_rows = torch.ones(rows.shape[0], dtype=torch.bool)
    kept_columns = torch.ones(rows.shape[1], dtype=torch.bool)
    if out in gone:
        kept_rows = ~gone[out]
    if inputs in gone:
        # A convolution reads each channel at every place of its kernel.
        kept_columns = ~gone[inputs].repeat_interleave(rows.shape[1] // weight.shape[inputs])
    return Kept(kept_rows.to(weight.device), kept_columns.to(weight.device))


def readers(families: Sequence[Family], labels: Sequence[GroupLabels]) -> list[GroupLabels]:
    """Return the labels of the dimensions alone along which a weight reads the output of groups."""
    reading = {(member.tensor, member.dim) for family in families for member in family.members if member.consumer}
    return [cut for cut in labels if (cut.tensor, cut.dim) in reading]


class Compensation:
    """Change weights of a model so that its layers' outputs change least.

    Args:
        model: whose weights are changed; every process has all of them.
        batches: keyword arguments of its forward, on any device.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> None:
        self.model = model
        self.batches = [to_device(batch, torch.device("cpu")) for batch in batches]

    @torch.no_grad()
    def refit(self, labels: Sequence[GroupLabels], families: Sequence[Family], leaving: Tensor, gone: Tensor) -> None:
        """Let what reads groups make up for losing them, by least squares; in place, before they are set to zero.

        Args:
            labels: the group of each index of each cut dimension.
            families: those that the groups are counted over.
            leaving: bool, shape (groups,), on CPU: groups that are about to be removed.
            gone: those that are removed already.
        """
        read = readers(families, labels)
        names = {cut.tensor for cut in read if bool(marked(cut.label, leaving).any())}
        for name, layer, covariance in self._measured(names):
            kept = find_kept(layer, [cut for cut in read if cut.tensor == name], leaving | gone)
            rows = _rows(layer)
            fitted = compensate_removed_inputs(rows, covariance, kept.columns)
            _add(layer, torch.where(kept.columns, fitted - rows, 0.0))

    @torch.no_grad()
    def round(self, weights: Collection[str], labels: Sequence[GroupLabels], gone: Tensor) -> None:
        """Move weights to where their quantizers round them with compensation of errors; in place.

        They stay as near to where they were as this allows, so that training goes on from there.

        Args:
            weights: names of quantized weights.
            labels: the group of each index of each cut dimension.
            gone: bool, shape (groups,), on CPU: removed groups.
        """
        for name, layer, covariance in self._measured(weights):
            assert isinstance(layer, QuantizedLayer)
            kept = find_kept(layer, [cut for cut in labels if cut.tensor == name], gone)
            rows = _rows(layer)
            d, q_m = (_over_rows(layer, value) for value in layer.weight_quantizer.broadcast_over(layer.weight))
            inner, d, q_m = (value[kept.rows][:, kept.columns] for value in (rows, d, q_m))
            four_levels = layer.weight_quantizer.four_levels
            sigma = covariance[kept.columns][:, kept.columns]
            rounded = round_compensated(inner, sigma, d, q_m, four_levels=four_levels)
            if layer.weight.dtype == torch.float32:  # others are too coarse to add a part of a step to
                rounded = within_bins(inner, rounded, d, q_m, four_levels=four_levels)
            change = torch.zeros_like(rows)
            change[kept.rows.nonzero(), kept.columns.nonzero().t()] = rounded - inner
            _add(layer, change)

    def _measured(self, names: Collection[str]) -> Iterator[tuple[str, nn.Module, Tensor]]:
        """Yield name, layer and covariance of the weights that a layer multiplies its inputs with."""
        layers = {name: self._layer(name) for name in sorted(names)}
        found = {name.removesuffix(".weight"): layer for name, layer in layers.items() if layer is not None}
        if not found:
            return
        device = self.model.get_parameter(next(iter(names))).device
        batches = [to_device(batch, device) for batch in self.batches]
        for part in measure_covariances(self.model, found, batches, COVARIANCE_BYTES):
            for path, covariance in part.items():
                if covariance is not None:
                    yield f"{path}.weight", found[path], covariance

    def _layer(self, name: str) -> nn.Module | None:
        path, _, leaf = name.rpartition(".")
        layer = self.model.get_submodule(path)
        supported = isinstance(layer, QuantizedLayer) or base_type(layer) is not None
        return layer if leaf == "weight" and supported else None


@torch.no_grad()
def leave_middles(model: nn.Module, first: nn.Module) -> None:
    """Move weights from the middle of what is rounded alike to where they were, as near as it goes, in place.

    What the model computes does not change, unless inputs or outputs are removed: what is zero there has to be set to
    zero again.

    Args:
        model: with quantizers, its weights on their grids.
        first: the dense model, on the same device.
    """
    for name, layer in quantized_layers(model).items():
        own = layer.weight_quantizer
        d, q_m = own.broadcast_over(layer.weight)
        wish: Tensor = first.get_submodule(name).weight  # type: ignore[assignment]
        layer.weight.copy_(within_bins(wish, layer.weight, d, q_m, four_levels=own.four_levels))


def compensation_bytes(layers: Collection[nn.Module]) -> int:
    """Return the most that covariances of layers' inputs take at a time in `Compensation`."""
    sizes = [covariance_bytes(layer) for layer in layers]
    return max(min(sum(sizes), COVARIANCE_BYTES), *sizes) if sizes else 0


def _rows(layer: nn.Module) -> Tensor:
    """Return a weight as the layer computes with it, before it is quantized, with a row for each output; fp32."""
    weight: Tensor = layer.merged_weight() if isinstance(layer, QuantizedLayer) else layer.weight  # type: ignore[assignment]
    return as_rows(layer, weight.detach()).float()


def _over_rows(layer: QuantizedLayer, value: Tensor) -> Tensor:
    """Return a step size or clipping value for each weight, as rows."""
    return as_rows(layer, value.detach().expand_as(layer.weight))


def _add(layer: nn.Module, change: Tensor) -> None:
    """Add rows to a weight, the same on every process: they must not differ by a last digit from then on."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    weight.add_(like_weight(layer, from_first_process(change)).to(weight.dtype))
