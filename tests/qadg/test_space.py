"""`zero_groups` and `kept_indices`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from geta_hf.errors import GETAError
from geta_hf.qadg import Family, PruningSpace, UnsupportedOperator, build_space, kept_indices, zero_groups

from .models import make

HEADS_0 = "bert.encoder.layer.0.attention:heads"
CHANNELS_1 = "bert.encoder.layer.1:channels"


@pytest.fixture
def space(bert, batch) -> PruningSpace:
    return build_space(bert, batch)


def family_of(space: PruningSpace, name: str) -> Family:
    return next(family for family in space.families if family.name == name)


def zero(model: torch.nn.Module, family: Family, group: int, skip: str = "") -> None:
    for member in family.members:
        if member.tensor != skip:
            model.get_parameter(member.tensor).data.index_fill_(member.dim, member.index[group], 0.0)


def test_only_groups_with_every_slice_zero_count(bert, space):
    for parameter in bert.parameters():
        torch.nn.init.normal_(parameter)
    zero(bert, family_of(space, HEADS_0), 2)
    zero(bert, family_of(space, CHANNELS_1), 5)
    zero(bert, family_of(space, CHANNELS_1), 6, skip="bert.encoder.layer.1.intermediate.dense.bias")
    found = zero_groups(bert, space)
    assert set(found) == {family.name for family in space.prunable}
    assert torch.equal(found[HEADS_0], torch.arange(4) == 2)
    assert torch.equal(found[CHANNELS_1], torch.arange(48) == 5)
    assert sum(int(mask.sum()) for mask in found.values()) == 2
    assert all(mask.dtype == torch.bool for mask in found.values())


def test_another_model_is_refused(batch, space):
    with pytest.raises(GETAError, match="build the space for this very model"):
        zero_groups(make("bert-qa"), space)
    with pytest.raises(GETAError, match="which the model lacks"):
        zero_groups(make("distilbert-qa"), space)


def test_kept_indices_list_what_stays_of_what_is_cut(space):
    removed = {HEADS_0: torch.arange(4) == 1, CHANNELS_1: torch.arange(48) >= 40}
    kept = kept_indices(space, removed)
    heads = torch.cat([torch.arange(8), torch.arange(16, 32)])
    path = "bert.encoder.layer.0.attention"
    assert torch.equal(kept[f"{path}.self.key.bias"][0], heads)
    assert torch.equal(kept[f"{path}.output.dense.weight"][1], heads)
    assert torch.equal(kept["bert.encoder.layer.1.output.dense.weight"][1], torch.arange(40))
    assert len(kept) == 7 + 3 and all(len(dims) == 1 for dims in kept.values())


def test_nothing_removed_cuts_nothing(space):
    assert kept_indices(space, {}) == {}
    assert kept_indices(space, {HEADS_0: torch.zeros(4, dtype=torch.bool)}) == {}


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ({"nowhere:heads": torch.zeros(4, dtype=torch.bool)}, "no family nowhere:heads"),
        ({HEADS_0: torch.zeros(5, dtype=torch.bool)}, r"pass torch.bool of shape \(4,\)"),
        ({HEADS_0: torch.zeros(4)}, "is torch.float32 of shape"),
        ({HEADS_0: torch.ones(4, dtype=torch.bool)}, "would lose all of its 4 groups"),
    ],
)
def test_bad_removals_are_refused(space, removed, message):
    with pytest.raises(GETAError, match=message):
        kept_indices(space, removed)


def test_families_that_exclude_each_other_do_not_lose_groups_together(space):
    first, second = torch.arange(4) == 0, torch.arange(8) == 0
    with pytest.raises(GETAError, match="cut the same indices"):
        kept_indices(space, {HEADS_0: first, "bert.encoder.layer.0.attention.self:head_dim": second})


def test_a_member_that_is_a_buffer_has_no_say(bert, space):
    family = family_of(space, CHANNELS_1)
    bert.register_buffer("mask", torch.ones(48))
    with_buffer = replace(family, members=(*family.members, replace(family.members[1], tensor="mask")))
    families = tuple(with_buffer if f is family else f for f in space.families)
    zero(bert, family, 3)
    found = zero_groups(bert, PruningSpace(families, space.shapes | {"mask": (48,)}))
    assert bool(found[CHANNELS_1][3])


def test_frozen_still_gives_the_unsupported_operators():
    operators = (UnsupportedOperator("linalg_qr", "layer", "no rule"),)
    space = PruningSpace((), unsupported=operators)
    assert space.frozen is space.unsupported is operators
