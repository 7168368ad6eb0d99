"""Groups that were made wrong on purpose are caught by a gate, on architectures of every structure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

from geta_hf.errors import GETAError
from geta_hf.qadg import Family, Member, PruningSpace, build_space, verify_space
from geta_hf.qadg.propagation.flow import Flow
from geta_hf.qadg.propagation.propagate import record_and_propagate
from tests.architectures import build

ARCHITECTURES = ["gpt2", "llama", "phi3", "falcon", "qwen2_moe", "mamba", "t5", "swin", "resnet", "wav2vec2"]
Members = tuple[Member, ...]


def drop(members: Members, space: PruningSpace) -> Members:
    """The last parameter does not leave with the group."""
    return members[:-1]


def shift(members: Members, space: PruningSpace) -> Members:
    """The last parameter loses its neighbours' slices."""
    last = members[-1]
    return (*members[:-1], replace(last, index=last.index.roll(1, dims=0)))


def add(members: Members, space: PruningSpace) -> Members:
    """A tensor that has nothing to do with the family loses as many slices."""
    cut = {member.tensor for member in members}
    size = members[0].index.shape[0]
    for name, shape in space.shapes.items():
        if name not in cut and len(shape) > 1 and shape[0] >= size and name not in space.buffers:
            return (*members, Member(name, 0, torch.arange(size)[:, None]))
    raise AssertionError("no unrelated tensor")


def swap_side(members: Members, space: PruningSpace) -> Members:
    """A matrix loses columns in place of rows, or the other way round."""
    position, member = next((p, m) for p, m in enumerate(members) if len(space.shapes[m.tensor]) > 1)
    other = 1 if member.dim == 0 else 0
    swapped = replace(member, dim=other, index=member.index % space.shapes[member.tensor][other])
    return (*members[:position], swapped, *members[position + 1 :])


def swap_groups(members: Members, space: PruningSpace) -> Members:
    """Two groups trade their slices of one tensor."""
    index = members[-1].index.clone()
    index[[0, -1]] = index[[-1, 0]]
    return (*members[:-1], replace(members[-1], index=index))


@lru_cache(maxsize=1)
def recorded(name: str) -> tuple[nn.Module, dict[str, Tensor], PruningSpace, Flow]:
    """A model, its batch and space, and a recording, for all mutations: gates leave them as they are."""
    model, batch = build(name)
    return model, batch, build_space(model, batch), record_and_propagate(model, batch)


@pytest.mark.parametrize("mutate", [drop, shift, add, swap_side, swap_groups], ids=lambda mutate: mutate.__name__)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_wrong_group_is_caught(name: str, mutate: Callable[[Members, PruningSpace], Members]) -> None:
    model, batch, space, flow = recorded(name)
    kind = "heads" if any(family.kind == "heads" for family in space.prunable) else "channels"
    target = next(family for family in space.prunable if family.kind == kind)
    # Alone, so that nothing else can be what fails; parameters last, since a buffer may shift without harm.
    ordered = sorted(target.members, key=lambda member: member.tensor not in space.buffers)
    wrong: Family = replace(target, members=mutate(tuple(ordered), space))
    families = (wrong if f.name == target.name else replace(f, prunable=False) for f in space.families)
    with pytest.raises(GETAError, match=r"fails gate [23]"):
        verify_space(model, [batch], replace(space, families=tuple(families)), flow=flow)
