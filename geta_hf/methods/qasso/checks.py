"""What a base optimizer must be and hold, checked before the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from geta_hf.errors import GETAError
from geta_hf.qadg.space import Family

AVERAGES = "keeps an average of the weights beside them, in which removed groups are not zero; use AdamW or SGD"
"""What is wrong with an optimizer that is schedule-free."""


def check_base(base: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> None:
    """Raises GETAError for an optimizer whose step is no step of each element, or a parameter that is no plain number.

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
    if hasattr(base, "train") and hasattr(base, "eval"):
        raise GETAError(f"{kind} {AVERAGES}")
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
    """Raises GETAError unless all that families cut and all quantizers are among the trained parameters.

    Args:
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
