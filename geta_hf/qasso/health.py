"""Where and when a run went bad: noted at every step without waiting for the device, read at boundaries and saves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from geta_hf.errors import GETAError
from geta_hf.qasso.widths import Named, Quantizers

_KINDS = ("d, q_m or t", "the gradient")


def note_bad(bad_step: Tensor, step: int, quantizers: Quantizers, named: Named) -> Tensor:
    """The first step at which a layer's quantizer, or its gradient, was not finite; -1 where none was.

    A gradient of d sums over the whole weight's, so that one bad value there shows.

    Args:
        bad_step: what is known so far, int64, shape (2, layers): quantizers and gradients.
        step: the present one.
    """
    gradient = torch.isfinite(quantizers.gather("d", named, 0.0, gradient=True))
    d, q_m, t = (torch.isfinite(value) for value in quantizers.read(named))
    bad = torch.stack([quantizers.by_layer((~ok).float()) > 0 for ok in (d & q_m & t, gradient)])
    return torch.where(bad & (bad_step < 0), step, bad_step)


def refuse_bad(bad_step: Tensor, prefixes: Sequence[str]) -> None:
    """Raises GETAError where `note_bad` noted anything, naming the earliest."""
    seen = [
        (step, kind, prefix)
        for kind, steps in zip(_KINDS, bad_step.tolist(), strict=True)
        for step, prefix in zip(steps, prefixes, strict=True)
        if step >= 0
    ]
    if seen:
        step, kind, prefix = min(seen, key=lambda found: found[0])  # of one step, values come before gradients
        raise GETAError(
            f"{kind} of {prefix} was NaN or infinite at step {step}; the last checkpoint is intact: "
            f"go back to it with a lower learning rate, or check the data"
        )
