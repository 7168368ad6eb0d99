"""Guards of a run: what a base optimizer must be and hold, checked before training, and what became NaN in training.

Bad values are noted at every step without waiting for the device, and read at period boundaries and saves.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from geta_hf.costs.quantizer_table import Named, Quantizers
from geta_hf.errors import GETAError
from geta_hf.methods.base import AVERAGES
from geta_hf.qadg.group_labels import family_starts
from geta_hf.qadg.group_types import Family
from geta_hf.utils.shards import add_up, local, shard_of

logger = logging.getLogger(__name__)

_NAMED = 4
"""How many families a warning names."""

_BAD_VALUES = ("d, q_m or t", "the gradient")
"""What the two rows of `bad_step` are about."""

# --- before training --------------------------------------------------------------------------------------------------


def check_base(base: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> None:
    """Raise GETAError for an optimizer that does not step each element once, or a parameter that cannot be cut.

    Args:
        base: to be wrapped.
        named: its parameters by name.
    """
    kind = type(base).__name__
    if isinstance(base, torch.optim.LBFGS):
        raise GETAError(
            f"{kind} evaluates the loss several times a step, which the stages can't follow; use AdamW or SGD"
        )
    if isinstance(base, torch.optim.SparseAdam):
        raise GETAError(f"{kind} takes sparse gradients, but groups are slices of dense ones; use AdamW or SGD")
    # Schedule-free optimizers can be told by their two modes; they live in packages that need not be installed.
    if hasattr(base, "train") and hasattr(base, "eval"):
        raise GETAError(f"{kind} {AVERAGES}")
    # By name, as this module is below the one that defines it.
    if kind == "QASSO":
        raise GETAError("the base optimizer is a QASSO already; wrap the optimizer that it was made of")
    for name, parameter in named.items():
        if not parameter.is_floating_point():
            raise GETAError(
                f"{name} is {parameter.dtype}; only floating-point parameters can be trained under QASSO: "
                f"load the model unquantized, or leave the parameter out of the optimizer"
            )
        if parameter.layout != torch.strided:
            raise GETAError(
                f"{name} is stored as {parameter.layout}; only dense parameters can be cut: convert it first"
            )


def check_covered(
    named: Mapping[str, Tensor], families: Sequence[Family], quantizers: Mapping[str, str], inputs: Sequence[str]
) -> None:
    """Raise GETAError unless all that families cut and all quantizers are trained, and on one device.

    Args:
        named: the base optimizer's parameters by name.
        families: those that may lose groups.
        quantizers: weight name -> prefix of its quantizer.
        inputs: prefixes of the quantizers of layers' inputs.
    """
    for family in families:
        for member in family.members:
            if member.tensor not in named:
                raise GETAError(
                    f"{family.name} cuts {member.tensor}, which is not trained; "
                    f"set its requires_grad or mark the family unprunable"
                )
    owners = {**{prefix: weight for weight, prefix in quantizers.items()}, **{prefix: prefix for prefix in inputs}}
    for prefix, owner in owners.items():
        if f"{prefix}.d" not in named or f"{prefix}.q_m" not in named:
            raise GETAError(f"the quantizer of {owner} is not in the base optimizer; add {prefix}.d and .q_m")
    cut = [member.tensor for family in families for member in family.members]
    _check_one_device(named, [*cut, *quantizers, *(f"{prefix}.d" for prefix in owners)])


def _check_one_device(named: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Raise GETAError for a model that is split over devices: groups and widths are compared across all layers."""
    # Of frozen weights nothing is known here; their quantizers lie where they do.
    places = {named[name].device: name for name in reversed(names) if name in named}
    if len(places) > 1:
        (one, first), (other, second) = list(places.items())[:2]
        raise GETAError(
            f"{first} is on {one} and {second} on {other}, but all that is cut or quantized has to be on one device; "
            f"load the model without device_map, and start the script with `accelerate launch` for several GPUs"
        )


def warn_of_equal_scores(families: Sequence[Family], scores: Tensor, removed: Tensor, taken: Tensor) -> None:
    """Warn, by the families' names, where groups are removed though all that remain score alike.

    Args:
        families: those that may lose groups.
        scores: shape (groups,), finite, on CPU.
        removed: bool, shape (groups,): groups that were removed before.
        taken: numbers of the groups that are chosen now.
    """
    chosen = torch.zeros_like(removed)
    chosen[taken] = True
    equal = []
    for start, family in zip(family_starts(families), families, strict=True):
        own = slice(start, start + family.size)
        remaining = scores[own][~removed[own]]
        picked = int(chosen[own].sum())
        # With all of them chosen, or one alone, there was nothing to decide.
        if 0 < picked < len(remaining) and bool((remaining == remaining[0]).all()):
            equal.append(f"{family.name} (all {len(remaining)} score {float(remaining[0]):g})")
    if equal:
        more = f" and {len(equal) - _NAMED} more" if len(equal) > _NAMED else ""
        logger.warning(
            "the saliency does not tell groups apart in %s%s, so those of the lowest index are removed; check that the "
            "loss depends on them",
            ", ".join(equal[:_NAMED]),
            more,
        )


# --- in training ------------------------------------------------------------------------------------------------------


def note_bad(
    bad_step: Tensor,
    step: int,
    quantizers: Quantizers,
    named: Named,
    gradient: Tensor,
) -> Tensor:
    """Return the first step at which a layer's quantizer, or its gradient, was not finite; -1 where none was.

    Args:
        bad_step: what is known so far, int64, shape (2, layers): quantizers and gradients.
        step: the present one.
        quantizers: all of the model.
        named: parameters by name.
        gradient: shape (entries,): those of d, or what shows as well whether a weight's gradient is finite.
    """
    d, q_m, t = (torch.isfinite(value) for value in quantizers.read(named))
    finite = (d & q_m & t, torch.isfinite(gradient))
    # Over channels the mean of bad entries, so that one bad channel marks its layer.
    bad = torch.stack([quantizers.by_layer((~ok).float()) > 0 for ok in finite])
    return torch.where(bad & (bad_step < 0), step, bad_step)


def squared_gradients(quantizers: Quantizers, named: Named, stand_ins: Mapping[str, str] | None = None) -> Tensor:
    """Return ‖g‖² of every quantized weight, or its stand-in, over all processes, shape (layers,); 0 if not trained."""
    instead = stand_ins or {}
    weights = [named.get(instead.get(weight, weight)) for weight in quantizers.own_weights]
    nothing = torch.zeros(1, device=quantizers.layer.device)
    gradients = [nothing if w is None or w.grad is None else local(w.grad) for w in weights]
    # One kernel for all layers. A norm is finite exactly where all of a gradient's entries are, up to overflow.
    total = torch.stack(torch._foreach_norm(gradients)).float() ** 2
    held = next((w for w in weights if w is not None), None)
    return total if held is None else add_up(total, shard_of(held))


def refuse_bad(bad_step: Tensor, prefixes: Sequence[str]) -> None:
    """Raise GETAError where `note_bad` noted anything, naming the earliest; waits for the device.

    Args:
        bad_step: int64, shape (2, layers).
        prefixes: of the layers' quantizers.
    """
    seen = [
        (step, kind, prefix)
        for kind, steps in zip(_BAD_VALUES, bad_step.tolist(), strict=True)
        for step, prefix in zip(steps, prefixes, strict=True)
        if step >= 0
    ]
    if not seen:
        return
    step, kind, prefix = min(seen, key=lambda found: found[0])  # of one step, values come before gradients
    raise GETAError(
        f"{kind} of {prefix} was NaN or infinite at step {step}. Lower the learning rate or check the data, and "
        f"resume from a checkpoint of an earlier step, or start again where none was saved"
    )
