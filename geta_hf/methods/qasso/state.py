"""What QASSO remembers from step to step, and how it travels in a checkpoint.

The vectors lie in the base optimizer's state of its first parameter, where Trainer's checkpoints find and keep them: a
checkpoint then holds plain tensors and numbers only, which `torch.load(weights_only=True)` reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geta_hf.errors import GETAError

IMPORTANT, REDUNDANT, REMOVED = 0, 1, 2
"""The status of a group: trained on, forgotten by the end of this period, zero for good."""

_PREFIX = "qasso."

_ADDED = frozenset({"input_square", "learned", "decided", "decided_bits"})
"""Vectors that checkpoints of earlier versions lack; they then start as they are in a new run."""


@dataclass
class QASSOState:
    """The vectors of a run. Next to them there is one number, the steps done so far, in `param_groups[0]`.

    Attributes:
        status: uint8, shape (groups,), always on CPU: IMPORTANT, REDUNDANT or REMOVED.
        mean_square: fp32, shape (groups,): moving average of ⟨g, x⟩² of every group.
        curvature: fp32, shape (weight layers,): moving average of ‖g‖² of every quantized weight.
        input_square: fp32, shape (inputs,): moving average of ⟨g, x^Q - x⟩² of every quantized input.
        bad_step: int64, shape (2, layers): the step at which a layer's quantizer (row 0) or its gradient (row 1) was
            first NaN or infinite; -1 where it never was.
        learned: bool, shape (entries,): step sizes that had a gradient other than zero before `check_learned`.
        decided: bool, shape (groups,), always on CPU: groups that the split of a size removes by the end; none before
            it is decided.
        decided_bits: fp32, shape (layers,): widths that it gave; 0 where they are not decided.
    """

    status: Tensor
    mean_square: Tensor
    curvature: Tensor
    input_square: Tensor
    bad_step: Tensor
    learned: Tensor
    decided: Tensor
    decided_bits: Tensor

    @classmethod
    def start(cls, groups: int, weight_layers: int, layers: int, entries: int) -> QASSOState:
        """Return the state before the first step.

        Args:
            groups: number of groups.
            weight_layers: number of quantized weights.
            layers: number of quantizers, those of inputs included.
            entries: number of step sizes of all quantizers.
        """
        return cls(
            # Zero is IMPORTANT: in the beginning nothing is forgotten.
            status=torch.zeros(groups, dtype=torch.uint8),
            mean_square=torch.zeros(groups),
            curvature=torch.zeros(weight_layers),
            input_square=torch.zeros(layers - weight_layers),
            bad_step=torch.full((2, layers), -1, dtype=torch.int64),
            learned=torch.zeros(entries, dtype=torch.bool),
            decided=torch.zeros(groups, dtype=torch.bool),
            decided_bits=torch.zeros(layers),
        )

    @property
    def redundant(self) -> Tensor:
        """bool, shape (groups,), on CPU: groups that are being forgotten."""
        return self.status == REDUNDANT

    @property
    def removed(self) -> Tensor:
        """bool, shape (groups,), on CPU: groups that are exactly zero for good."""
        return self.status == REMOVED

    def to(self, device: torch.device) -> None:
        """Move what every step updates to where the parameters are; the status is read on the host only."""
        self.mean_square = self.mean_square.to(device)
        self.curvature = self.curvature.to(device)
        self.input_square = self.input_square.to(device)
        self.bad_step = self.bad_step.to(device)
        self.learned = self.learned.to(device)
        self.decided_bits = self.decided_bits.to(device)

    def vectors(self) -> dict[str, Tensor]:
        """Return the vectors by the names that they have in a checkpoint."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def store_vectors(packed: dict[str, Any], vectors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return a base optimizer's `state_dict` with the vectors in the state of its first parameter."""
    # Copies: the inner dicts of a `state_dict` are the optimizer's own, which must not get keys that it does not know.
    state = {position: dict(values) for position, values in packed["state"].items()}
    first = packed["param_groups"][0]["params"][0]
    state.setdefault(first, {}).update({f"{_PREFIX}{name}": value.clone() for name, value in vectors.items()})
    return {**packed, "state": state}


def restore_vectors(packed: dict[str, Any], like: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what the base optimizer is to load, and the vectors; the inverse of `store_vectors`.

    Args:
        packed: parameters are keyed by position, or by name as FSDP2 does.
        like: the present vectors, whose shapes, types and devices the stored ones take.

    Raises:
        GETAError: a vector is missing or of another shape.
    """
    state = {position: dict(values) for position, values in packed["state"].items()}
    first = state.get(packed["param_groups"][0]["params"][0], {})
    vectors = {}
    for name, mine in like.items():
        # Taken out before the base loads, which casts what it holds for a parameter to the parameter's dtype.
        value = first.pop(f"{_PREFIX}{name}", mine if name in _ADDED else None)
        if value is None or value.shape != mine.shape:
            found = "nothing" if value is None else f"{tuple(value.shape)}"
            raise GETAError(
                f"the optimizer state has {found} for qasso.{name} of shape {tuple(mine.shape)}: it is of another "
                f"model or config"
            )
        vectors[name] = value.clone().to(mine.device, mine.dtype)
    # To the base, an entry without values of its own would look like a parameter that it has initialized.
    return {**packed, "state": {position: values for position, values in state.items() if values}}, vectors
