"""Remove inputs of one layer and round it, with compensation; estimate what rounding it costs at every width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from geta_hf.methods.compensation import Kept
from geta_hf.quantization.attach import layer_grid
from geta_hf.quantization.blocks import block_of_input, half_steps, remaining_first, split_blocks
from geta_hf.quantization.clipping import largest_magnitudes, search_elements, search_rows
from geta_hf.quantization.covariances import as_rows
from geta_hf.quantization.error_compensation import (
    compensate_removed_inputs,
    follow_dense_inputs,
    round_compensated,
)
from geta_hf.quantization.functional import quantize, quantize_four_levels, step_size
from geta_hf.quantization.maths import FOUR_LEVEL_BITS, block_count, four_level_step, leave_zero


@dataclass(frozen=True)
class Grid:
    """The grid on which a layer's weight is rounded.

    Attributes:
        d: step size, fp32, shape (1,), (out,) or (out, blocks).
        q_m: clipping value, in the shape of d.
        bits: integer width.
        order: int64, shape (in,): the inputs in the order of their blocks. Default None: there are none.
        four_levels: whether it has four levels, at 2 bits. Default False.
    """

    d: Tensor
    q_m: Tensor
    bits: int
    order: Tensor | None = None
    four_levels: bool = False


def fit_grid(
    rows: Tensor, bits: int, grid: str = "channel", importance: Tensor | None = None, four_levels: bool = False
) -> Grid:
    """Return the grid on which rows are rounded with the least squared error, its steps on the grid of fp16.

    Args:
        rows: shape (out, in), fp32.
        bits: the width.
        grid: what has a grid of its own: a `layer`, a `channel` or a `block32`. What is zero has that of the largest.
        importance: how much the error of each column counts, shape (in,). Default: all alike.
        four_levels: whether 2 bits may have four levels, which they get where these cost less. Default False.
    """
    if not four_levels or bits != FOUR_LEVEL_BITS:
        return _fit(rows, bits, grid, importance, False)
    three, four = (_fit(rows, bits, grid, importance, own) for own in (False, True))
    weights = 1.0 if importance is None else importance
    lost = [float((weights * (round_on(rows, own) - rows).square()).sum()) for own in (three, four)]
    return four if lost[1] < lost[0] else three


def _fit(rows: Tensor, bits: int, grid: str, importance: Tensor | None, four_levels: bool) -> Grid:
    """Do as `fit_grid` does, for one of the two grids of 2 bits."""
    if grid == "layer":
        parts, weights = rows.reshape(1, -1), None if importance is None else importance.repeat(len(rows))[None]
    elif grid == "channel":
        parts, weights = rows, None if importance is None else importance[None]
    else:
        parts = split_blocks(rows)
        weights = None if importance is None else split_blocks(importance[None]).repeat(len(rows), 1)
    largest = largest_magnitudes(parts)
    # What has no range of its own may have any grid; one of a tensor of zeros, which has none at all, holds it as well.
    most = float(largest.max()) if largest.numel() else 0.0
    largest = torch.where(largest > 0, largest, most or 1.0)
    if grid == "block32" or weights is not None:
        shares = search_elements(parts, largest, [bits], weights, four_levels)[1]
    else:
        shares = search_rows(parts, largest, [bits], four_levels=four_levels)[1]
    return _grid_of(largest * shares[:, 0], bits, grid, len(rows), four_levels)


def _grid_of(q_m: Tensor, bits: int, grid: str, outputs: int, four_levels: bool) -> Grid:
    """Return the grid of some clipping values, with steps on the grid of fp16."""
    one = torch.ones(1, device=q_m.device)
    # With four levels the step that is stored is a third of d.
    parts = 3.0 if four_levels else 1.0
    d = half_steps(step_size(bits, q_m, one) / parts, small=grid == "block32") * parts
    if grid == "block32":
        d = d.view(outputs, -1)
    return Grid(d, d * float(2 ** (bits - 1) - 1), bits, four_levels=four_levels)


def round_on(rows: Tensor, grid: Grid) -> Tensor:
    """Return rows of shape (out, in), rounded to nearest on their grid."""
    to_grid = quantize_four_levels if grid.four_levels else quantize
    return to_grid(rows, *_along(rows, grid))


def _along(rows: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return d and q_m in shapes that broadcast over rows."""
    if grid.d.dim() == 1:
        return grid.d[:, None], grid.q_m[:, None]
    block = block_of_input(rows.shape[1], None, rows.device)
    return grid.d[:, block], grid.q_m[:, block]


def codes_on(rows: Tensor, grid: Grid) -> Tensor:
    """Return the integers of rows that are on their grid already, int8, shape (out, in); its width is 8 at most."""
    return torch.round(rows / _steps(rows, grid)).to(torch.int8)


def values_of(codes: Tensor, grid: Grid) -> Tensor:
    """Return the rows of some integers, fp32: to the bit those that `codes_on` was given."""
    return codes.float() * _steps(codes, grid)


def _steps(rows: Tensor, grid: Grid) -> Tensor:
    """Return what codes are multiplied by, in a shape that broadcasts over rows."""
    d, _ = _along(rows, grid)
    return four_level_step(d) if grid.four_levels else d


@torch.no_grad()
def compress_layer(
    layer: nn.Module,
    covariance: Tensor | None,
    kept: Kept,
    bits: int,
    *,
    grid: str = "channel",
    damping: float = 0.01,
    by_activation: bool = True,
    compensate: bool = True,
    four_levels: bool = False,
    drift: Tensor | None = None,
    follow: float = 0.0,
) -> Grid:
    """Remove inputs of a layer and round it, in place, each with compensation on the covariance of its inputs.

    Outputs that are to be removed keep their weights as they are: what reads them is compensated by their values.

    Args:
        layer: a linear layer, a Conv1D or a convolution.
        covariance: of its inputs; None where it is not known, and nothing can be compensated.
        kept: what remains of its weight.
        bits: the width to round to.
        grid: what has a step size of its own, as in `attach_quantizers`.
        damping, by_activation: see `round_compensated`.
        compensate: False removes and rounds to nearest alone.
        four_levels: whether 2 bits have four levels. Default False.
        drift: how its inputs differ from those in the dense model, E[(x' - x) xᵀ]; None where it is not known.
        follow: the share of `follow_dense_inputs`, for which `drift` is needed. Default 0.

    Returns:
        The grid; channels that are to be removed have the mean of the others. Blocks are those of the inputs that
        remain; behind them are as many unused ones as the weight has of its own.
    """
    weight: Tensor = layer.weight  # type: ignore[assignment]
    rows = as_rows(layer, weight).float()
    if not compensate:
        covariance = None
    changed = rows
    if covariance is not None and drift is not None and follow:
        changed = follow_dense_inputs(rows, covariance, drift, share=follow, damping=damping)
    if covariance is not None and not bool(kept.columns.all()):
        changed = compensate_removed_inputs(changed, covariance, kept.columns, damping=damping)
    inner = changed[kept.rows][:, kept.columns]
    sigma = None if covariance is None else covariance[kept.columns][:, kept.columns]
    own = layer_grid(layer, grid)
    fitted = fit_grid(inner, bits, own, None if sigma is None else sigma.diagonal(), four_levels)
    if fitted.four_levels:
        leave_zero(inner)
    if sigma is None:
        rounded = round_on(inner, fitted)
    else:
        d, q_m = (fitted.d, fitted.q_m) if fitted.d.dim() == 1 else _along(inner, fitted)
        rounded = round_compensated(
            inner, sigma, d, q_m, by_activation=by_activation, damping=damping, four_levels=fitted.four_levels
        )
    result = rows.clone()
    within = result[kept.rows]
    within[:, kept.columns] = rounded
    within[:, ~kept.columns] = 0.0
    result[kept.rows] = within
    as_rows(layer, weight).copy_(result.view_as(as_rows(layer, weight)))
    return fitted if own == "layer" else _of_full_weight(fitted, kept, own)


def _of_full_weight(grid: Grid, kept: Kept, kind: str) -> Grid:
    """Return the grid with entries for what is removed, too; a quantizer needs them until it is cut away."""
    shape = [len(kept.rows)]
    if kind == "block32":
        shape.append(block_count(len(kept.columns)))
    q_m = torch.full(shape, float(grid.q_m.mean()), device=grid.q_m.device)
    full = _grid_of(q_m.flatten(), grid.bits, kind, len(kept.rows), grid.four_levels)
    remaining = torch.nonzero(kept.rows).flatten()
    for own, found in ((full.d, grid.d), (full.q_m, grid.q_m)):
        part = own if kind == "channel" else own[:, : grid.d.shape[1]]
        part[remaining] = found
    return replace(full, order=remaining_first(~kept.columns)) if kind == "block32" else full


@torch.no_grad()
def rounding_losses(
    layers: Mapping[str, nn.Module],
    squares: Mapping[str, Tensor],
    widths: Sequence[int],
    grid: str,
    four_levels: bool = False,
) -> Tensor:
    """Return what rounding each weight to nearest is expected to cost, ½ Σ E[g²] (x^Q - x)², float64, (layers, widths).

    Args:
        layers: by path, in the order of the rows.
        squares: name of a weight -> E[g²] of each element.
        widths: integer widths.
        grid: what has a step size of its own, as in `attach_quantizers`.
        four_levels: whether 2 bits have four levels. Default False.
    """
    found = torch.zeros(len(layers), len(widths), dtype=torch.float64)
    for place, (name, layer) in enumerate(layers.items()):
        rows = as_rows(layer, layer.weight).float()  # type: ignore[arg-type]
        curvature = as_rows(layer, squares[f"{name}.weight"])
        for column, bits in enumerate(widths):
            own = fit_grid(rows, bits, layer_grid(layer, grid), four_levels=four_levels)
            change = round_on(rows, own) - rows
            found[place, column] = float((curvature * change**2).sum()) / 2
    return found
