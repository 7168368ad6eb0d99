"""Turn logits into shares of choices: softmax at a temperature, with or without noise, soft or one choice alone.

The last dim of logits lists the options of each choice. Everything is computed in fp32 and relative to the largest
logit, so that no temperature overflows.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Sampling = Literal["softmax", "hard", "gumbel", "gumbel_hard", "annealed", "hard_concrete"]
"""`softmax`: softmax(a / τ). `hard`: its argmax alone, with the gradient of the softmax. `gumbel`, `gumbel_hard`: these
two with new Gumbel noise on the logits in every pass. `annealed`: a softmax without noise that is stretched by a tenth
to both sides and clipped, so that it becomes exactly 0 or 1 before τ is 0. `hard_concrete`: a gate from each option to
the next larger one, with noise, stretched and clipped likewise (Louizos et al. 2018, arXiv 1712.01312). On whether
groups remain these are CoFi's masks (arXiv 2204.00408); on widths they are Bayesian Bits (arXiv 2005.07093), whose
nested residuals z2 (x2 + z4 (x4 - x2 + ...)) are the same mixture."""

SAMPLING: tuple[Sampling, ...] = get_args(Sampling)

_STRETCH = 0.1


def sample(logits: Tensor, temperature: float, sampling: Sampling = "softmax") -> Tensor:
    """Return the share of each option, which add up to 1 along the last dim; differentiable in the logits.

    Args:
        logits: shape (..., options), in ascending order of what the options cost.
        temperature: τ, above 0.
        sampling: one of SAMPLING.
    """
    values = logits.float()
    if sampling == "hard_concrete":
        return _through_gates(values, temperature)
    if sampling.startswith("gumbel"):
        values = values + _gumbel_noise(values)
    # Relative to the largest, before the division: a quotient of a large logit and a small τ would be infinite.
    relative = values - values.detach().amax(-1, keepdim=True)
    shares = torch.softmax(relative / temperature, -1)
    if sampling == "annealed":
        stretched = _stretch(shares)
        return stretched / stretched.sum(-1, keepdim=True)
    if sampling.endswith("hard"):
        return one_hot(shares) + (shares - shares.detach())
    return shares


def one_hot(values: Tensor) -> Tensor:
    """Return 1 for the largest value along the last dim, the first of equals, and 0 for all others; no gradient."""
    chosen = values.detach().argmax(-1, keepdim=True)
    return torch.zeros_like(values).scatter_(-1, chosen, 1.0)


def _through_gates(logits: Tensor, temperature: float) -> Tensor:
    """Return the shares of options that are reached through the gates before them and left by the next one's closing.

    Without noise and stretching, at τ = 1, these are the shares of softmax.
    """
    relative = logits - logits.detach().amax(-1, keepdim=True)
    from_here_on = relative.flip(-1).logcumsumexp(-1).flip(-1)
    # The log odds of an option beyond this one.
    beyond = from_here_on[..., 1:] - relative[..., :-1]
    noise = _gumbel_noise(beyond) - _gumbel_noise(beyond)
    gates = _stretch(torch.sigmoid((beyond + noise) / temperature))
    first = torch.ones_like(relative[..., :1])
    reached = torch.cat([first, gates], -1).cumprod(-1)
    left = torch.cat([1 - gates, first], -1)
    return reached * left


def _stretch(shares: Tensor) -> Tensor:
    return ((1 + 2 * _STRETCH) * shares - _STRETCH).clamp(0, 1)


def _gumbel_noise(like: Tensor) -> Tensor:
    # Exponential noise is never 0 in fp32, unlike a uniform number.
    return -torch.empty_like(like).exponential_().clamp_min(torch.finfo(torch.float32).tiny).log()


def temperature_at(step: int, steps: int, start: float, end: float) -> float:
    """Return τ at 0-based step `step` of `steps`: from `start` to `end`, by the same factor in every step."""
    share = min(step / max(steps - 1, 1), 1.0)
    return float(start * (end / start) ** share)


def price_at(step: int, steps: int, strength: float) -> float:
    """Return λ at 0-based step `step` of `steps`: from a hundredth of `strength`, which half of the steps reach."""
    return min(strength / 100 + step * (0.99 * strength) / max(steps / 2, 1), strength)
