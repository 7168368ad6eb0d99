"""Round or cut the inputs of a linear layer so that the remaining weights make up for what is lost.

Both functions minimize the squared change of a layer's outputs over calibration data, tr((W - Q) Σ (W - Q)ᵀ), with Σ
the covariance of its inputs, Σ = E[x xᵀ] (not centered, and in any scale). They know nothing of modules and of data.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from geta_hf.errors import GETAError
from geta_hf.quantization.maths import four_level_step, quantize, quantize_four_levels

DAMPING = 0.01
"""Share of the mean of Σ's diagonal that is added to the diagonal, as in GPTQ."""

_REACH = 0.49
"""How far from a level of the grid `within_bins` goes, in distances of two levels; at 0.5 the other one is as near."""

_ATTEMPTS = 6
"""How often the damping is multiplied by 10 where Σ is still not positive definite."""


def output_error(change: Tensor, covariance: Tensor) -> Tensor:
    """Return the squared change of every output, the diagonal of (W - Q) Σ (W - Q)ᵀ, shape (out,).

    Args:
        change: W - Q, shape (out, in).
        covariance: Σ, shape (in, in).
    """
    return (change @ covariance * change).sum(1)


@torch.no_grad()
def round_compensated(
    weight: Tensor,
    covariance: Tensor,
    d: Tensor,
    q_m: Tensor,
    *,
    channel_dim: int = 0,
    by_activation: bool = True,
    damping: float = DAMPING,
    block: int = 64,
    four_levels: bool = False,
) -> Tensor:
    """Return a weight on its grid, rounded with compensation of errors.

    This is GPTQ (https://arxiv.org/abs/2210.17323, Eq. 2-3). Inputs are rounded one after the other. The error of each
    is spread over those that are not rounded yet, by the rows of the Cholesky factor of Σ^-1. A channel for which
    rounding to nearest happens to be better is rounded to nearest.

    Args:
        weight: shape (out, in), or (in, out) with `channel_dim=1`, as in transformers' Conv1D.
        covariance: Σ of the inputs, shape (in, in), symmetric.
        d, q_m: step size and clipping value, shape (1,), (out,) for one of each output channel, or (out, in) for one of
            each weight, such as those of blocks.
        channel_dim: the dim of `weight` that output channels run along. Default 0.
        by_activation: round the inputs of the largest mean square first; otherwise in their natural order.
        damping: share of the mean of Σ's diagonal that is added to it. Default 0.01.
        block: columns whose errors are spread over all later blocks at once; changes speed only. Default 64.
        four_levels: round to four levels, of which an exact zero of the weight has none. Default False.

    Returns:
        The rounded weight d · n, shape and dtype of `weight`.

    Raises:
        GETAError: Σ is not finite.
    """
    original = (weight if channel_dim == 0 else weight.t()).float()
    d, q_m = (value.to(original) if value.dim() == 2 else value.reshape(-1, 1).to(original) for value in (d, q_m))
    to_grid = quantize_four_levels if four_levels else quantize
    # Where the largest inputs come last, nothing remains that could take their errors.
    natural = torch.arange(original.shape[1], device=original.device)
    order = torch.argsort(covariance.diagonal(), descending=True, stable=True) if by_activation else natural
    factor = _inverse_factor(covariance[order][:, order], damping).to(original)
    rounded = torch.empty_like(original)
    steps, ends = (_columns(value, order) for value in (d, q_m))
    rounded[:, order] = _round_columns(original[:, order], factor, steps, ends, block, to_grid)
    nearest = to_grid(original, d, q_m)
    sigma = covariance.to(original)
    better = output_error(original - nearest, sigma) < output_error(original - rounded, sigma)
    rounded[better] = nearest[better]
    return (rounded if channel_dim == 0 else rounded.t()).to(weight.dtype).contiguous()


@torch.no_grad()
def within_bins(wish: Tensor, rounded: Tensor, d: Tensor, q_m: Tensor, *, four_levels: bool = False) -> Tensor:
    """Return the values nearest to a wish that are rounded to nearest as `rounded`, for training to start from.

    In the middle of what is rounded alike a weight needs many steps before it is rounded otherwise; next to where it
    was before rounding it needs few, and nothing changes until then.

    Args:
        wish: what the values were before rounding, any shape.
        rounded: on the grid, in the shape of `wish`.
        d, q_m: step size and clipping value, in a shape that broadcasts over it.
        four_levels: whether the grid has four levels. Default False.

    Returns:
        In the shape and dtype of `rounded`, which is returned as it is where the dtype is too coarse.
    """
    to_grid = quantize_four_levels if four_levels else quantize
    distance = 2 * four_level_step(d) if four_levels else d
    level = rounded.float()
    # Beyond q_m no gradient would come back.
    low = torch.maximum(level - _REACH * distance, -q_m)
    high = torch.minimum(level + _REACH * distance, q_m)
    found = torch.minimum(torch.maximum(wish.float(), low), high).to(rounded.dtype)
    return torch.where(to_grid(found, d, q_m) == to_grid(rounded, d, q_m), found, rounded)


def _round_columns(
    weight: Tensor, factor: Tensor, d: Tensor, q_m: Tensor, block: int, to_grid: Callable[..., Tensor]
) -> Tensor:
    """Return a weight rounded column after column, in their order. `factor` is the upper factor of Σ^-1."""
    # Transposed: an input's weights next to each other in memory take a third of the time.
    work = weight.t().contiguous()
    d, q_m = (value.t().contiguous().expand_as(work) for value in (d, q_m))
    rounded = torch.empty_like(work)
    inputs = len(work)
    for start in range(0, inputs, block):
        end = min(start + block, inputs)
        errors = torch.empty_like(work[start:end])
        for place in range(start, end):
            rounded[place] = to_grid(work[place], d[place], q_m[place])
            error = errors[place - start]
            torch.div(work[place] - rounded[place], factor[place, place], out=error)
            work[place + 1 : end].addr_(factor[place, place + 1 : end], error, alpha=-1)
        # Later blocks are changed once per block: that is one product, in place of one for each input.
        work[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    return rounded.t()


def _columns(values: Tensor, index: Tensor) -> Tensor:
    """Return some columns of values for each weight; those for each row serve all columns."""
    return values if values.shape[1] == 1 else values[:, index]


def _inverse_factor(covariance: Tensor, damping: float) -> Tensor:
    """Return the upper triangular U with Uᵀ U = (Σ + damping)^-1, float64."""
    lower = _damped_cholesky(covariance, damping)
    inverse = torch.cholesky_inverse(lower)
    del lower
    return torch.linalg.cholesky(inverse, upper=True)


def _damped_cholesky(covariance: Tensor, damping: float) -> Tensor:
    """Return the lower factor of Σ with more on its diagonal, float64; more damping where that is not enough."""
    if not bool(torch.isfinite(covariance.sum(dtype=torch.float64))):
        raise GETAError(
            "the covariance of a layer's inputs is not finite, since activations overflow; load the model in float32 "
            "or bfloat16, or leave the layer out by exclude"
        )
    # Changed in place, since each copy of a wide layer's Σ takes a gigabyte.
    sigma = covariance.to(torch.float64, copy=True)
    diagonal = sigma.diagonal().clone()
    mean = float(diagonal.mean())
    # An input that is always zero has no say; any positive number makes its row of the factor harmless.
    unit = mean if mean > 0 else 1.0
    for attempt in range(_ATTEMPTS):
        sigma.diagonal().copy_(diagonal + max(damping, 1e-10) * 10**attempt * unit)
        factor, failed = torch.linalg.cholesky_ex(sigma)
        if not int(failed):
            return factor
    raise GETAError("the covariance of a layer's inputs is not positive definite, even damped; calibrate on more data")


def _made_up(lost: Tensor, covariance: Tensor, damping: float) -> Tensor:
    """Return the change of a weight that makes up for lost outputs, E[y xᵀ] (Σ + ε)^-1, float64.

    Args:
        lost: E[y xᵀ] of the outputs y that are missing and the inputs x that are there, float64, shape (out, in).
        covariance: Σ of these inputs.
        damping: as in `round_compensated`.
    """
    return torch.cholesky_solve(lost.t(), _damped_cholesky(covariance, damping)).t()


@torch.no_grad()
def follow_dense_inputs(
    weight: Tensor, covariance: Tensor, drift: Tensor, *, share: float = 1.0, damping: float = DAMPING
) -> Tensor:
    """Return a weight whose outputs on the inputs x that it gets are nearer to those on what the dense model gives it.

    W ← W + share · W E[(x' - x) xᵀ] (Σ + ε)^-1, with x' the inputs in the dense model. With a share of 1 this is the
    least-squares fit of W x' by x. The aim, though not the way, is that of GPTAQ (https://arxiv.org/abs/2504.02692).

    Args:
        weight: shape (out, in).
        covariance: Σ = E[x xᵀ], shape (in, in).
        drift: E[(x' - x) xᵀ], shape (in, in).
        share: how much of the way to go; the entire way fits the calibration data too closely. Default 1.
        damping: share of the mean of Σ's diagonal that is added to it. Default 0.01.

    Returns:
        In the shape and dtype of `weight`.

    Raises:
        GETAError: Σ is not finite.
    """
    correction = _made_up(weight.double() @ drift.double(), covariance, damping)
    return (weight.double() + share * correction).to(weight.dtype)


@torch.no_grad()
def compensate_removed_inputs(
    weight: Tensor, covariance: Tensor, kept: Tensor, *, channel_dim: int = 0, damping: float = DAMPING
) -> Tensor:
    """Return a weight without some of its inputs, the others changed by least squares so that outputs change least.

    W_K ← W_K + W_R Σ_RK (Σ_KK + ε)^-1, with K the kept and R the removed inputs. Without damping this is
    W Σ_{:,K} Σ_KK^-1; with it, weights are drawn to what they were and not to zero.

    Args:
        weight: shape (out, in), or (in, out) with `channel_dim=1`.
        covariance: Σ of all inputs, shape (in, in), while those to be removed were still alive.
        kept: bool, shape (in,): True for inputs that remain.
        channel_dim: the dim of `weight` that output channels run along. Default 0.
        damping: share of the mean of Σ_KK's diagonal that is added to it. Default 0.01.

    Returns:
        The weight, shape and dtype of `weight`; exactly zero for removed inputs.

    Raises:
        GETAError: Σ is not finite.
    """
    rows = weight if channel_dim == 0 else weight.t()
    changed = torch.zeros_like(rows)
    if bool(kept.any()):
        lost = rows[:, ~kept].double() @ covariance[~kept][:, kept].double()
        correction = _made_up(lost, covariance[kept][:, kept], damping)
        changed[:, kept] = (rows[:, kept].double() + correction).to(rows.dtype)
    return changed if channel_dim == 0 else changed.t().contiguous()
