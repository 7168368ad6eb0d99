"""Where and when a run went bad: noted at every step without waiting for the device, read at boundaries and saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from geta_hf.costs.quantizer_table import Named, Quantizers
from geta_hf.errors import GETAError
from geta_hf.utils.shards import add_up, local, shard_of

_KINDS = ("d, q_m or t", "the gradient")


def note_bad(
    bad_step: Tensor,
    step: int,
    quantizers: Quantizers,
    named: Named,
    frozen: bool = False,
    stand_ins: Mapping[str, str] | None = None,
) -> Tensor:
    """The first step at which a layer's quantizer, or its gradient, was not finite; -1 where none was.

    Args:
        bad_step: what is known so far, int64, shape (2, layers): quantizers and gradients.
        step: the present one.
        frozen: whether quantizers stand still and have no gradient.
        stand_ins: weight without a gradient -> a parameter whose gradient shows what is wrong with it.
    """
    d, q_m, t = (torch.isfinite(value) for value in quantizers.read(named))
    # A gradient of d sums over the whole weight's, so that one bad value there shows.
    gradient = (
        quantizers.of_weights(squared_gradients(quantizers, named, stand_ins))
        if frozen
        else quantizers.gather("d", named, 0.0, gradient=True)
    )
    bad = torch.stack([quantizers.by_layer((~ok).float()) > 0 for ok in (d & q_m & t, torch.isfinite(gradient))])
    return torch.where(bad & (bad_step < 0), step, bad_step)


def squared_gradients(quantizers: Quantizers, named: Named, stand_ins: Mapping[str, str] | None = None) -> Tensor:
    """‖g‖² of every quantized weight, or its stand-in, over all processes, shape (layers,); 0 where none is trained."""
    instead = stand_ins or {}
    weights = [named.get(instead.get(weight, weight)) for weight in quantizers.own_weights]
    nothing = torch.zeros(1, device=quantizers.layer.device)
    gradients = [nothing if w is None or w.grad is None else local(w.grad) for w in weights]
    total = torch.stack(torch._foreach_norm(gradients)).float() ** 2
    held = next((w for w in weights if w is not None), None)
    return total if held is None else add_up(total, shard_of(held))


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
