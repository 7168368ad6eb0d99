"""Remove inputs of one layer and round it, with compensation; estimate what rounding it costs at every width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from geta_hf.methods.compensation import Kept
from geta_hf.quantization.covariances import as_rows
from geta_hf.quantization.error_compensation import compensate_removed_inputs, round_compensated
from geta_hf.quantization.functional import quantize, step_size

_SHARES = torch.linspace(0.2, 1.0, 33)
"""Clipping values that are tried, as shares of the largest magnitude of a channel."""


@dataclass(frozen=True)
class Grid:
    """The grid on which a layer's weight is rounded.

    Attributes:
        d: step size, fp32, shape (1,) or (out,).
        q_m: clipping value, in the shape of d.
        bits: integer width.
    """

    d: Tensor
    q_m: Tensor
    bits: int


def fit_grid(rows: Tensor, bits: int, per_channel: bool, importance: Tensor | None = None) -> Grid:
    """Return the grid on which rows are rounded with the least squared error.

    Args:
        rows: shape (out, in), fp32, not all zero.
        bits: the width.
        per_channel: whether each row has a grid of its own; a row of zeros then has that of the largest row.
        importance: how much the error of each column counts, shape (in,). Default: all alike.
    """
    magnitude = rows.abs()
    largest = magnitude.amax(1) if per_channel else magnitude.max().reshape(1)
    # A weight of zeros alone has no range; any grid holds it.
    largest = torch.where(largest > 0, largest, largest.max() if bool(largest.any()) else 1.0)
    best = torch.full_like(largest, torch.inf)
    clip = largest.clone()
    one = torch.ones(1, device=rows.device)
    for share in _SHARES.tolist():
        q_m = largest * share
        error = (quantize(rows, step_size(bits, q_m, one)[:, None], q_m[:, None]) - rows) ** 2
        if importance is not None:
            error = error * importance
        of_rows = error.sum(1) if per_channel else error.sum().reshape(1)
        better = of_rows < best
        best = torch.where(better, of_rows, best)
        clip = torch.where(better, q_m, clip)
    return Grid(step_size(bits, clip, one), clip, bits)


@torch.no_grad()
def compress_layer(
    layer: nn.Module,
    covariance: Tensor | None,
    kept: Kept,
    bits: int,
    *,
    per_channel: bool = True,
    damping: float = 0.01,
    by_activation: bool = True,
    compensate: bool = True,
) -> Grid:
    """Remove inputs of a layer and round it, in place, each with compensation on the covariance of its inputs.

    Outputs that are to be removed keep their weights as they are: what reads them is compensated by their values.

    Args:
        layer: a linear layer, a Conv1D or a Conv2d.
        covariance: of its inputs; None where it is not known, and nothing can be compensated.
        kept: what remains of its weight.
        bits: the width to round to.
        per_channel: whether each output channel has a step size of its own.
        damping, by_activation: see `round_compensated`.
        compensate: False removes and rounds to nearest alone.

    Returns:
        The grid; channels that are to be removed have the mean of the others.
    """
    weight: Tensor = layer.weight  # type: ignore[assignment]
    rows = as_rows(layer, weight).float()
    if not compensate:
        covariance = None
    changed = rows
    if covariance is not None and not bool(kept.columns.all()):
        changed = compensate_removed_inputs(rows, covariance, kept.columns, damping=damping)
    inner = changed[kept.rows][:, kept.columns]
    sigma = None if covariance is None else covariance[kept.columns][:, kept.columns]
    grid = fit_grid(inner, bits, per_channel, None if sigma is None else sigma.diagonal())
    if sigma is None:
        rounded = quantize(inner, grid.d[:, None], grid.q_m[:, None])
    else:
        rounded = round_compensated(inner, sigma, grid.d, grid.q_m, by_activation=by_activation, damping=damping)
    result = rows.clone()
    within = result[kept.rows]
    within[:, kept.columns] = rounded
    within[:, ~kept.columns] = 0.0
    result[kept.rows] = within
    as_rows(layer, weight).copy_(result.view_as(as_rows(layer, weight)))
    return grid if not per_channel else _of_all_rows(grid, kept.rows)


def _of_all_rows(grid: Grid, kept: Tensor) -> Grid:
    """Return the grid with an entry for removed channels, too; their quantizer needs one until they are cut away."""
    q_m = torch.full((len(kept),), float(grid.q_m.mean()), device=grid.q_m.device)
    q_m[kept] = grid.q_m
    one = torch.ones(1, device=q_m.device)
    return Grid(step_size(grid.bits, q_m, one), q_m, grid.bits)


@torch.no_grad()
def rounding_losses(
    layers: Mapping[str, nn.Module], squares: Mapping[str, Tensor], widths: Sequence[int], per_channel: bool
) -> Tensor:
    """Return what rounding each weight to nearest is expected to cost, ½ Σ E[g²] (x^Q - x)², float64, (layers, widths).

    Args:
        layers: by path, in the order of the rows.
        squares: name of a weight -> E[g²] of each element.
        widths: integer widths.
        per_channel: whether each output channel has a step size of its own.
    """
    found = torch.zeros(len(layers), len(widths), dtype=torch.float64)
    for place, (name, layer) in enumerate(layers.items()):
        rows = as_rows(layer, layer.weight).float()  # type: ignore[arg-type]
        curvature = as_rows(layer, squares[f"{name}.weight"])
        for column, bits in enumerate(widths):
            grid = fit_grid(rows, bits, per_channel)
            change = quantize(rows, grid.d[:, None], grid.q_m[:, None]) - rows
            found[place, column] = float((curvature * change**2).sum()) / 2
    return found
