"""PPSG's projection (paper Alg. 3) and the relative step of the quantizer parameters."""

from __future__ import annotations

from torch import Tensor

from geta_hf.quantization import functional


def project_step_size(
    d: Tensor, q_m: Tensor, t: Tensor, lower_bits: Tensor | float, upper_bits: Tensor | float
) -> Tensor:
    """Move d alone onto [d_min, d_max] of its own layer, so that lower_bits <= b <= upper_bits (Eq. 4c, Alg. 3)."""
    d_min = functional.step_size(upper_bits, q_m, t)
    d_max = functional.step_size(lower_bits, q_m, t)
    return d.clamp(d_min, d_max).clamp_min(functional.TINY)


def relative_step(before: Tensor, after: Tensor) -> Tensor:
    """Apply the additive step that a base optimizer took, after - before, in log space: before · exp(after - before).

    d spans 1e-5 (16 bits) to 1e-1 (2 bits) while Adam steps by about its learning rate whatever the scale, so one
    absolute step would wreck d. With the gradient scaled by the value (the chain rule of log p), this is the base
    optimizer run on log p, and the value stays positive.
    """
    return (before * (after - before).exp()).clamp_min(functional.TINY)
