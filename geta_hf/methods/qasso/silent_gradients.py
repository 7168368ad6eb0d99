"""Guard against gradients that are lost on their way, so that a run ends and exports though its weights never learned.

What is refused is a quantized weight that is *silent*: the gradient of its d was exactly zero in every step so far, and
at the check those of its q_m and of the weight (under LoRA, of B) are zero too. All three are needed. That of q_m is
zero wherever nothing is clipped, as at the start, where q_m = max |W|; that of d is zero where all values lie on the
grid, as those of a ternary weight.

- All quantized weights that have a gradient are silent: an error. They share their code, so a fault in it hits all.
- More than half of them are silent though their bias has a gradient other than zero: an error. The loss does depend on
  these layers, and that the inputs of so many are zero is no accident.
- Others are silent: a warning. An expert that no token reached is, a branch that counts 0 in the loss, an input that is
  always absent, and the layers around a dead ReLU, of which the second has a bias with a gradient.

Where every other trained parameter has a gradient of zero at the check as well, the loss itself has none, as where all
rewards of a batch are equal. That says nothing of the weights, so a warning is given and the check comes again at the
next start. It is an error where no start is left.

A parameter of another kind is named in the warning alone, and only where the base optimizer's moments show that its
gradient was zero in every step. Whatever has no gradient at all (None) is not looked at: an unused pooler, an expert
that did not run, frozen weights.

The check comes at the first start of a stage or period that has two steps or more before it: the end of warm-up,
unless that has no or one step. One step would not do, since a matrix behind one that starts at zero (LoRA's A) gets its
first gradient in the second. Until then each step costs one comparison of a vector with one entry for each step size,
on the device; the host waits at the check alone, where it waits for `refuse_bad` in any case.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from geta_hf.costs.quantizer_table import Named, Quantizers
from geta_hf.errors import GETAError
from geta_hf.methods.qasso.checks import squared_gradients
from geta_hf.utils.shards import add_up, local, shard_of

logger = logging.getLogger(__name__)

_NAMED = 4
"""How many tensors a message names."""


@torch.no_grad()
def check_learned(
    learned: Tensor,
    quantizers: Quantizers,
    named: Named,
    state: Mapping[Any, Mapping[str, Any]],
    step: int,
    stand_ins: Mapping[str, str] | None = None,
    *,
    adapters: Collection[str] = (),
    last: bool = True,
) -> bool:
    """Raise GETAError where quantized weights are silent by the rule of this module, and warn of others; waits.

    Args:
        learned: step sizes that have had a gradient other than zero, the present step included, bool, shape (entries,).
        quantizers: all of the model.
        named: parameters by name, with their gradients of the present step.
        state: the base optimizer's, by parameter.
        step: how many steps came before the present one.
        stand_ins: weight without a gradient -> a parameter that is trained in its place.
        adapters: matrices of LoRA. Their gradients go through the weights' quantizers and are lost with them.
        last: whether no other check follows.

    Returns:
        Whether the check is done; it is not where the loss had no gradient at all and `last` is False.

    Raises:
        GETAError: names the silent weights.
    """
    weights = [
        weight
        for weight, prefix in zip(quantizers.own_weights, quantizers.prefixes, strict=False)  # inputs' come after them
        if named[f"{prefix}.d"].grad is not None
    ]
    without = _without_gradient(learned, quantizers, named, stand_ins)
    silent = [weight for weight in weights if weight in without]
    biases = {weight: f"{weight.removesuffix('weight')}bias" for weight in weights}
    zero = _zero_gradients([bias for bias in biases.values() if bias in named], named)
    refused = [weight for weight in silent if zero.get(biases[weight]) is False]
    others = _zero_gradients(_other_parameters(quantizers, named), named)
    if len(silent) == len(weights):
        refused = silent
        # LoRA's matrices alone say nothing of the loss: a fault of the quantizers hits them as well.
        if refused and not last and set(others) - set(adapters) and all(others.values()):
            logger.warning(
                "no trained parameter had a gradient other than zero at step %d, as where the loss is constant; "
                "whether quantized weights learn is checked again later",
                step,
            )
            return False
    elif 2 * len(refused) <= len(weights):
        refused = []
    if refused:
        raise GETAError(
            f"{_names(refused)} and their quantizers had a gradient of exactly zero in each of the first {step} steps, "
            f"so they learn nothing: the loss does not depend on them, or their gradients were lost on the way. Train "
            f"without torch_compile, check the loss, or leave the layers in floating point by GETAConfig.exclude"
        )
    idle = _idle_parameters([name for name, is_zero in others.items() if is_zero], named, state)
    if silent or idle:
        logger.warning(
            "%s had a gradient of exactly zero in each of the first %d steps: the loss does not depend on these "
            "parameters, as on those of an expert that no token reached",
            _names([*silent, *idle]),
            step,
        )
    return True


def _without_gradient(
    learned: Tensor, quantizers: Quantizers, named: Named, stand_ins: Mapping[str, str] | None
) -> set[str]:
    """Return the weights of which no d ever had a gradient other than zero, nor q_m or the weight in this step."""
    entries = learned | (quantizers.gather("q_m", named, 0.0, gradient=True) != 0)
    # One entry that learned is enough: of a layer with a step size for each channel, channels may be dead.
    of_layers = quantizers.by_layer(entries.float())[: quantizers.weight_layers] > 0
    of_layers = of_layers | (squared_gradients(quantizers, named, stand_ins) != 0)
    return {weight for weight, seen in zip(quantizers.own_weights, of_layers.tolist(), strict=True) if not seen}


def _zero_gradients(names: Sequence[str], named: Named) -> dict[str, bool]:
    """Return whether the gradient is exactly zero, over all processes; parameters without one are left out."""
    names = [name for name in names if named[name].grad is not None]
    return dict(
        zip(names, _all_zero([named[name] for name in names], [named[name].grad for name in names]), strict=True)
    )


def _all_zero(parameters: Sequence[Tensor], values: Sequence[Tensor | None]) -> list[bool]:
    """Return whether each value is zero in every element and process; it is split as its parameter is."""
    if not parameters:
        return []
    held = [None if value is None else local(value) for value in values]
    # Of a tensor without elements, as a process may hold of a short bias, there is no largest one.
    largest = [0.0 if value is None or not value.numel() else value.float().norm(torch.inf) for value in held]
    flat = torch.stack([torch.as_tensor(each, device=local(parameters[0]).device) for each in largest])
    return (add_up(flat, shard_of(parameters[0])) == 0).tolist()


def _other_parameters(quantizers: Quantizers, named: Named) -> list[str]:
    """Return the trained parameters that are neither quantized weights nor quantizers."""
    own = {*quantizers.own_weights, *(name for names in quantizers.names.values() for name in names)}
    return [name for name in named if name not in own]


def _idle_parameters(names: Sequence[str], named: Named, state: Mapping[Any, Mapping[str, Any]]) -> list[str]:
    """Return which parameters, whose gradient is zero in this step, had none before by the base optimizer's moments."""
    found = []
    for name in names:
        parameter = named[name]
        moments = [
            value
            for value in state.get(parameter, {}).values()
            if isinstance(value, Tensor) and value.shape == parameter.shape and _is_plain(local(value))
        ]
        # Without moments, as in plain SGD, or with those in 8 bits alone, nothing is known of the steps before.
        if moments and all(_all_zero([parameter] * len(moments), moments)):
            found.append(name)
    return found


def _is_plain(value: Tensor) -> bool:
    """Return whether a moment is stored as its values; one in 8 or 4 bits may be of a class that knows no norm."""
    return type(value) is Tensor and value.is_floating_point()


def _names(found: Sequence[str]) -> str:
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return ", ".join(found[:_NAMED]) + more
