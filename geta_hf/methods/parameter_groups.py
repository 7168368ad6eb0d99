"""The parameter groups that a compressed run adds to a base optimizer: quantizers, and weights that are not trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from geta_hf.errors import GETAError
from geta_hf.quantization import quantized_layers
from geta_hf.quantization.quantizer import Quantizer


def weight_quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Return prefix -> the quantizer of each weight."""
    return {f"{name}.weight_quantizer": layer.weight_quantizer for name, layer in quantized_layers(model).items()}


def quantizer_parameters(model: nn.Module, trained: bool = True) -> dict[str, nn.Parameter]:
    """Return quantizer parameters by name: those that are trained, or all."""
    found = {}
    for name, module in model.named_modules():
        # By type and not by name: a model may have parameters of its own that are called `d` or `t`.
        if not isinstance(module, Quantizer):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad or not trained:
                found[f"{name}.{leaf}"] = parameter
    return found


def add_quantizer_group(
    base: torch.optim.Optimizer, quantizers: Mapping[str, nn.Parameter], learning_rate: float
) -> None:
    """Move quantizers into a parameter group of their own, with their learning rate and without weight decay.

    A step size is no weight: decay would make widths drift, and a rate for weights would not suit it.

    Args:
        base: changed in place; may hold the quantizers in other groups.
        quantizers: of `quantizer_parameters`.
        learning_rate: of the group.
    """
    # By identity, since `==` of tensors compares their elements.
    own = {id(parameter) for parameter in quantizers.values()}
    for group in base.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        group.pop("param_names", None)  # QASSO names all groups itself
    base.add_param_group({"params": list(quantizers.values()), "lr": learning_rate, "weight_decay": 0.0})


def add_frozen_group(base: torch.optim.Optimizer, frozen: Sequence[Tensor]) -> None:
    """Show a base optimizer parameters that never have a gradient when it steps, so that it does not change them."""
    if frozen:
        # A base optimizer skips what has no gradient; rate and decay of 0 hold even where one does not.
        base.add_param_group({"params": list(frozen), "lr": 0.0, "weight_decay": 0.0})


def check_names(base: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> None:
    """Raise GETAError where an optimizer holds a parameter that has no name in the model."""
    for group in base.param_groups:
        if any(parameter not in names for parameter in group["params"]):
            raise GETAError(
                "the optimizer holds a parameter that the model lacks; make it from this model's parameters"
            )
