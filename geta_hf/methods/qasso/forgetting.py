"""The joint stage's equations: how fast redundant groups are forgotten, and the step sizes that keep it a descent.

Per family f, on its redundant slices R: g is the gradient, u the base optimizer's step (x_before - x_after) and
x^Q = clip + d · res, with clip = sgn(x) · min(|x|, q_m)^t and res = sgn(x) · (round(z/d) - z/d) under the present d.
The update is x_R <- x_R - u_R - γ x^Q_R (paper Sec. 5, the joint stage).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SHRINK = 0.8  # Appendix C: γ is multiplied by this until every d is feasible


def rounding_residue(clip: Tensor, d: Tensor) -> Tensor:
    """res of clip, so that x^Q = clip + d · res; shape of clip."""
    scaled = clip / d
    return torch.round(scaled) - scaled


def forget_rate(
    grad_clip: Tensor, grad_step: Tensor, mean_clip: Tensor, steps_left: int, eta: float, epsilon: float
) -> Tensor:
    """γ by Eq. 13, one value a family.

    Args:
        grad_clip: ⟨g, clip⟩ over R, shape (families,). Its sign is that of cos θ_γ, the angle between -g and -clip.
        grad_step: ⟨g, u⟩ over R; u = α g for SGD, which gives Eq. 13 to the letter. Below 0 it counts as 0, since the
            weights would otherwise grow.
        mean_clip: mean |clip| over R; at most `epsilon` means forgotten already, γ = 0.
        steps_left: K_p - k, at least 1.
        eta: η in (0, 1).
    """
    guarded = (1 - eta) * grad_step.clamp_min(0) / grad_clip.abs().clamp_min(torch.finfo(grad_clip.dtype).tiny)
    rate = torch.where(grad_clip >= 0, torch.full_like(grad_clip, 1.0 / steps_left), guarded)
    return torch.where(mean_clip <= epsilon, torch.zeros_like(rate), rate)


def joint_step_size(
    rate: Tensor,
    family: Tensor,
    grad_res: Tensor,
    grad_step: Tensor,
    bounds: tuple[Tensor, Tensor],
    eta: float,
    xi: float,
) -> tuple[Tensor, Tensor]:
    """d by Eq. 14 for the layers that lose groups, inside each layer's own bounds.

    Args:
        rate: γ of every family, shape (families,).
        family: int64, shape (layers,): the family that cuts each layer.
        grad_res, grad_step: ⟨g_l, res_l⟩ and ⟨g_l, u_l⟩ over the redundant slices of each layer, shape (layers,).
        bounds: d_min and d_max, the step sizes of b_u and b_l bits, shape (layers,) each.
        eta, xi: η and ξ in (0, 1).

    Returns:
        (γ, d): γ shrunk by powers of SHRINK where the formula fell below a d_min (Appendix C), d of shape (layers,).
        Where ⟨g_l, res_l⟩ >= 0 rounding helps the descent and d is d_max, b_l bits. d means nothing where γ is 0.
    """
    d_min, d_max = bounds
    numerator = xi * eta * grad_step.clamp_min(0)
    # γ · d may be at most this for the layer's share of the descent to survive.
    budget = torch.where(grad_res >= 0, math.inf, numerator / grad_res.abs().clamp_min(1e-38))
    largest = torch.full_like(rate, math.inf).scatter_reduce(0, family, budget / d_min, "amin")
    powers = torch.ceil(torch.log(largest / rate.clamp_min(1e-38)) / math.log(SHRINK)).clamp_min(0)
    rate = torch.where(largest >= rate, rate, rate * SHRINK**powers)
    formula = budget / rate[family].clamp_min(1e-38)
    return rate, torch.minimum(formula, d_max).clamp_min(d_min)
