"""Where the choice of a group acts in the forward pass: on the weights that read its output.

With y = W (k ∘ a), the probability k that a group remains multiplies its output a. This is done in the quantized layers
that read it. Slices in other tensors, such as those of a layer that is not quantized, are left as they are, and the
gradient of k is ⟨g, x⟩ over them, which is that of a factor of 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from geta_hf.qadg.group_labels import GroupLabels, find_group_labels
from geta_hf.qadg.group_types import Family, Member


@dataclass(frozen=True)
class KeepFactor:
    """The factors of one side of a layer.

    Attributes:
        weight: name of the quantized weight.
        outputs: whether its outputs are multiplied; otherwise its inputs.
        label: int64, shape (size of the side,): the group of each index, or the number of groups where it has none.
    """

    weight: str
    outputs: bool
    label: Tensor


@dataclass(frozen=True)
class Sides:
    """The dims of a quantized weight that a factor can multiply; None for the inputs where they are none of its dims.

    Attributes:
        outputs: the dim of the outputs.
        inputs: the dim of the inputs.
    """

    outputs: int = 0
    inputs: int | None = 1


def place_factors(
    families: Sequence[Family], shapes: Mapping[str, Sequence[int]], sides: Mapping[str, Sides]
) -> tuple[list[KeepFactor], tuple[GroupLabels, ...]]:
    """Return the factors of quantized layers, and the slices of which ⟨g, x⟩ is taken.

    Args:
        families: those that may lose groups.
        shapes: of the tensors that they name.
        sides: of each quantized weight, by its name.
    """

    def scaled(member: Member) -> bool:
        own = sides.get(member.tensor)
        return own is not None and member.dim in (own.outputs, own.inputs)

    def makes(member: Member) -> bool:
        return member.dim == sides[member.tensor].outputs

    inside = []
    outside = []
    for family in families:
        acting = (
            tuple(member for member in family.members if member.consumer)
            # The inputs of a layer read an output by themselves; else it is multiplied where it is made.
            or tuple(member for member in family.members if scaled(member) and not makes(member))
            or tuple(member for member in family.members if scaled(member))
            or family.members
        )
        inside.append(replace(family, members=tuple(member for member in acting if scaled(member))))
        outside.append(replace(family, members=tuple(member for member in acting if not scaled(member))))
    labels = _labels(families, inside, shapes)
    factors = [KeepFactor(cut.tensor, cut.dim == sides[cut.tensor].outputs, cut.label) for cut in labels]
    return factors, _labels(families, outside, shapes)


def _labels(
    families: Sequence[Family], chosen: Sequence[Family], shapes: Mapping[str, Sequence[int]]
) -> tuple[GroupLabels, ...]:
    # A family without any member has no size, so that all of them stand for its groups, and are left out afterwards.
    wanted = {(member.tensor, member.dim) for family in chosen for member in family.members}
    full = [own if own.members else family for own, family in zip(chosen, families, strict=True)]
    return tuple(cut for cut in find_group_labels(full, shapes) if (cut.tensor, cut.dim) in wanted)
