"""The equations of QASSO (arXiv 2502.16638, Sec. 5) as pure functions of tensors, in the paper's order.

x are weights, g their gradients, u the base optimizer's step on them (before - after; α g for SGD), (d, q_m, t) the
quantizers, and G_R the redundant groups. Layers, families and groups are handled all at once, in vectors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from geta_hf.quantization import functional

SHRINK = 0.8
"""Appendix C multiplies γ by this until every d is feasible."""

# --- Algorithm 3: partial projected stochastic gradient (PPSG) --------------------------------------------------------


def relative_step(before: Tensor, step: Tensor) -> Tensor:
    """Take an additive step in log space: before · exp(step), rounded once.

    d spans 1e-5 (16 bits) to 1e-1 (2 bits) while Adam steps by about its learning rate whatever the scale, so one
    absolute step would wreck d. With the gradient scaled by the value (the chain rule of log p), this is the base
    optimizer run on log p. One learning rate then suits every layer and width, and the value stays positive.

    The step is not read off as a difference p_after - p_before: at p = 20,000 neighboring fp32 numbers are 2e-3 apart,
    which is more than a usual step of 1e-3.

    Args:
        before: d, q_m or t before the base step, shape (entries,).
        step: what a base step on p · ∂f/∂p adds to a parameter that is 0, shape (entries,).
    """
    value = before.float()
    step = step.float()
    # exp(step) - 1 keeps all digits of a small step, exp(step) those of a large one.
    stepped = torch.where(step.abs() < 0.5, torch.addcmul(value, value, step.expm1()), value * step.exp())
    return stepped.clamp_min(functional.TINY).to(before.dtype)


def project_step_size(
    d: Tensor, q_m: Tensor, t: Tensor, lower_bits: Tensor | float, upper_bits: Tensor | float
) -> Tensor:
    """Project d alone onto [d_min, d_max], so that b_l <= b <= b_u (Eq. 4c; Algorithm 3, lines 3 and 4).

        d_min = q_m^t / (2^(b_u - 1) - 1)        d_max = q_m^t / (2^(b_l - 1) - 1)        (Eq. 3, solved for d)

    Each entry has bounds of its own: with one d for all layers of a group, some layers would end out of range.

    Args:
        d, q_m, t: shape (entries,).
        lower_bits, upper_bits: b_l and b_u, shape (entries,) or one number for all.
    """
    d_min = functional.step_size(upper_bits, q_m, t)
    d_max = functional.step_size(lower_bits, q_m, t)
    return d.clamp(d_min, d_max).clamp_min(functional.TINY)


# --- Algorithm 2, line 11: saliency -----------------------------------------------------------------------------------


def fisher_scores(mean_square: Tensor, cost: Tensor) -> Tensor:
    """Return the average of ⟨g, x⟩² for each parameter removed, shape (groups,).

    With the Hessian taken as E[g gᵀ], half of E⟨g, x⟩² is the loss that removing a group costs near an optimum, and the
    costs of many groups add up. Its root does not: that grows with √n under noise, so that per parameter large groups
    would always seem the cheaper ones.

    Args:
        mean_square: moving average of ⟨g, x⟩² of every group, shape (groups,).
        cost: number of parameters n of every group, shape (groups,).
    """
    return mean_square / cost


def taylor_scores(mean_square: Tensor, cost: Tensor) -> Tensor:
    """Return the root of the average of ⟨g, x⟩² for each parameter removed; shapes as in `fisher_scores`."""
    return mean_square.sqrt() / cost


def hesso_scores(inner: Tensor, grad_square: Tensor, square: Tensor, cost: Tensor) -> Tensor:
    """Return HESSO's saliency, the paper's choice (Sec. 5), shape (groups,).

        S(g) = Σ_c w_c s_c(g) / ‖s_c‖₂,    w_c = 0.2 over five criteria

    The criteria are magnitude ‖x‖, mean magnitude ‖x‖/√n, cosine of (x, -g) + 1, and the first- and second-order
    Taylor estimates |⟨g, x⟩| and ½⟨g, x⟩² of the change in loss (the Hessian taken as g gᵀ). Norms are over all groups.

    Args:
        inner: ⟨g, x⟩ of every group, shape (groups,).
        grad_square, square: ‖g‖² and ‖x‖² of every group, shape (groups,).
        cost: number of parameters n of every group, shape (groups,).
    """
    magnitude = square.sqrt()
    cosine = -inner / (magnitude * grad_square.sqrt()).clamp_min(1e-30)
    criteria = (
        magnitude,
        magnitude / cost.sqrt(),
        cosine + 1,
        inner.abs(),
        0.5 * inner**2,
    )
    return sum((0.2 * score / score.norm().clamp_min(1e-30) for score in criteria), torch.zeros_like(inner))


# --- Algorithm 2, lines 16 to 19: the joint stage ---------------------------------------------------------------------


def rounding_residue(clip: Tensor, d: Tensor) -> Tensor:
    """Return res = sgn(x) · R(x) (Eq. 11), so that x^Q = clip + d · res (Eq. 9).

        clip = sgn(x) · min(|x|, q_m)^t        res = round(clip / d) - clip / d

    Args:
        clip: of any shape.
        d: broadcastable against `clip`.
    """
    scaled = clip / d
    return torch.round(scaled) - scaled


def forgetting_rate(
    grad_clip: Tensor, grad_step: Tensor, mean_clip: Tensor, steps_remaining: int, eta: float, epsilon: float
) -> Tensor:
    """Return γ by Eq. 13 (line 16), shape (families,).

        γ = 0                                  where mean|clip| <= ε: nothing remains to forget
        γ = 1 / (K_p - k)                      where ⟨g, clip⟩ >= 0, so cos θ_γ >= 0: forgetting is a descent
        γ = (1 - η) ⟨g, u⟩ / |⟨g, clip⟩|       otherwise: forgetting may undo a share 1 - η of the step's descent

    The paper writes the last line for SGD: with u = α g it is -(1 - η) α ‖g‖ / (cos θ_γ ‖clip‖), to the letter. For any
    other base optimizer it stays a descent rule, as long as ⟨g, u⟩ > 0.

    Args:
        grad_clip: ⟨g, clip⟩ over G_R, shape (families,). Its sign is that of cos θ_γ, the angle between -g and -clip.
        grad_step: ⟨g, u⟩ over G_R, shape (families,).
        mean_clip: mean |clip| over G_R (Eq. 12), shape (families,).
        steps_remaining: K_p - k, at least 1.
        eta: η in (0, 1).
        epsilon: ε.
    """
    # Where a step points against the descent, ⟨g, u⟩ < 0, the formula would make weights grow: γ = 0 instead.
    guarded = (1 - eta) * grad_step.clamp_min(0) / grad_clip.abs().clamp_min(torch.finfo(grad_clip.dtype).tiny)
    rate = torch.where(grad_clip >= 0, torch.full_like(grad_clip, 1.0 / steps_remaining), guarded)
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
    """Return γ and d by Eq. 14 (line 17) for the layers that lose groups, inside each layer's own bounds.

        d = q_m^t / (2^(b_l - 1) - 1)                  where ⟨g_l, res_l⟩ >= 0: rounding helps, so b_l bits
        d = ξ η ⟨g_l, u_l⟩ / (γ |⟨g_l, res_l⟩|)        otherwise: rounding may undo a share ξ η of the step's descent

    Where the formula falls below d_min, γ is multiplied by `SHRINK` until it no longer does (Appendix C).

    Args:
        rate: γ of every family, shape (families,).
        family: int64, shape (pairs,): the family that cuts each layer.
        grad_res, grad_step: ⟨g_l, res_l⟩ and ⟨g_l, u_l⟩ over the redundant slices of each layer, shape (pairs,).
        bounds: d_min and d_max, the step sizes of b_u and b_l bits, shape (pairs,) each.
        eta, xi: η and ξ in (0, 1).

    Returns:
        γ, shape (families,), and d, shape (pairs,). Where γ is 0, d means nothing.
    """
    d_min, d_max = bounds
    numerator = xi * eta * grad_step.clamp_min(0)
    # γ · d may be at most this for the layer's share of the descent to survive.
    budget = torch.where(grad_res >= 0, math.inf, numerator / grad_res.abs().clamp_min(1e-38))
    # One γ serves all layers of a family, so the layer with the least room decides. The number of multiplications is
    # computed and not searched for, since a loop would have to wait for the device.
    largest = torch.full_like(rate, math.inf).scatter_reduce(0, family, budget / d_min, "amin")
    powers = torch.ceil(torch.log(largest / rate.clamp_min(1e-38)) / math.log(SHRINK)).clamp_min(0)
    rate = torch.where(largest >= rate, rate, rate * SHRINK**powers)
    formula = budget / rate[family].clamp_min(1e-38)
    return rate, torch.minimum(formula, d_max).clamp_min(d_min)
