"""Gates 2 and 3: all encoders pass, and every broken space or broken rule is caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from geta_hf.errors import GETAError
from geta_hf.qadg import Family, Member, PruningSpace, build_space, verify_space
from geta_hf.qadg.propagation.propagate import RULES
from tests import spaces

from .models import MODELS, Block, make


@pytest.mark.parametrize("name", MODELS)
def test_every_encoder_passes(name, batch):
    model = make(name)
    verify_space(model, batch, build_space(model, batch))


def mutated(space: PruningSpace, kind: str, change: Callable[[list[Member]], list[Member]]) -> tuple[PruningSpace, str]:
    """The space with the members of its second family of a kind changed, and that family's name."""
    target = [family for family in space.prunable if family.kind == kind][1]
    families = [replace(f, members=tuple(change(list(f.members)))) if f is target else f for f in space.families]
    return replace(space, families=tuple(families)), target.name


def drop(position: int) -> Callable[[list[Member]], list[Member]]:
    return lambda members: members[:position] + members[position + 1 :]


def edit(position: int, change: Callable[[Member], Member]) -> Callable[[list[Member]], list[Member]]:
    return lambda members: [change(m) if p == position else m for p, m in enumerate(members)]


def shift(member: Member) -> Member:
    return replace(member, index=member.index.roll(1, dims=0))


def swap_two(member: Member) -> Member:
    index = member.index.clone()
    index[[0, 1]] = index[[1, 0]]
    return replace(member, index=index)


def slide(member: Member) -> Member:
    """Every row one element further, so that groups straddle."""
    return replace(member, index=member.index.flatten().roll(-1).reshape(member.index.shape))


def other_side(member: Member) -> Member:
    return replace(member, dim=1 - member.dim)


CASES = [("heads", drop(p), 2) for p in range(7)] + [("channels", drop(p), 2) for p in range(3)]


@pytest.mark.parametrize(("kind", "change", "gate"), CASES)
def test_a_dropped_member_fails_completeness(kind, change, gate, bert, batch):
    space, name = mutated(spaces.build_space(bert, batch), kind, change)
    with pytest.raises(GETAError, match=rf"^{name} fails gate {gate}"):
        verify_space(bert, batch, space)


# Member 3 of the heads, the bias of the keys, adds the same to all scores of a query: softmax never shows it.
SEEN = [("heads", p) for p in (0, 1, 2, 4, 5, 6)] + [("channels", p) for p in range(3)]


@pytest.mark.parametrize("change", [shift, swap_two, slide])
@pytest.mark.parametrize(("kind", "position"), SEEN)
def test_a_shifted_index_fails(kind, position, change, bert, batch):
    if kind == "channels" and change is slide:
        change = shift
    space, name = mutated(spaces.build_space(bert, batch), kind, edit(position, change))
    with pytest.raises(GETAError, match=rf"^{name} fails gate 3"):
        verify_space(bert, batch, space)


@pytest.mark.parametrize(("kind", "position"), [("heads", 0), ("heads", 6)])
def test_the_wrong_side_of_a_square_weight_fails_completeness(kind, position, bert, batch):
    space, name = mutated(spaces.build_space(bert, batch), kind, edit(position, other_side))
    with pytest.raises(GETAError, match=rf"^{name} fails gate 2"):
        verify_space(bert, batch, space)


@pytest.mark.parametrize("kind", ["heads", "channels"])
def test_an_unrelated_slice_fails_completeness(kind, bert, batch):
    def add(members: list[Member]) -> list[Member]:
        rows = torch.arange(members[0].index.shape[0])[:, None] % 32
        return [*members, Member("bert.embeddings.word_embeddings.weight", 0, rows)]

    space, name = mutated(spaces.build_space(bert, batch), kind, add)
    with pytest.raises(GETAError, match=rf"^{name} fails gate 2"):
        verify_space(bert, batch, space)


def test_the_residual_stream_passes_with_corrected_divisors(bert, batch):
    verify_space(bert, batch, build_space(bert, batch, prune=["residual"]))


def test_the_residual_stream_fails_alignment_if_its_coupling_to_norms_is_forgotten(bert, batch):
    space = build_space(bert, batch, prune=["residual"], keep=["heads", "channels"])
    families = [replace(family, couplings=()) for family in space.families]
    with pytest.raises(GETAError, match=r"residual fails gate 3"):
        verify_space(bert, batch, replace(space, families=tuple(families)))


def test_heads_and_head_dims_together_pass_since_they_take_turns(bert, batch):
    space = build_space(bert, batch)
    families = [replace(f, prunable=f.kind in ("heads", "head_dim")) for f in space.families]
    verify_space(bert, batch, replace(space, families=tuple(families)))


@pytest.mark.parametrize("operator", ["addmm", "view", "bmm", "transpose", "embedding"])
def test_a_rule_that_forgets_something_is_caught(operator, monkeypatch, batch):
    """A rule that passes no ids on leaves groups incomplete, whatever it forgets."""

    def forgetful(flow, node) -> None:
        for value in node.outputs:
            flow.set_dims(value, [flow.ids.fresh(n) for n in flow.graph.values[value].shape])

    monkeypatch.setitem(RULES, operator, forgetful)
    model = make("mpnet-qa")
    space = build_space_with_all_prunable(model, batch)
    with pytest.raises(GETAError, match=r"gate [23]"):
        verify_space(model, batch, space)


def build_space_with_all_prunable(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> PruningSpace:
    from geta_hf.qadg.families.find import find_families
    from geta_hf.qadg.propagation.propagate import record_and_propagate

    flow = record_and_propagate(model, batch)
    families: list[Family] = [replace(f, prunable=f.size > 1) for f in find_families(flow)]
    shapes = {v.names[0]: v.shape for v in flow.graph.values if v.role in ("parameter", "buffer")}
    return PruningSpace(tuple(families), shapes)


def test_a_norm_inside_a_block_is_unprunable_and_a_rule_that_overlooks_it_is_caught(monkeypatch):
    model, batch = nn.Sequential(Block(nn.LayerNorm(10)), Block(torch.relu)), {"input": torch.randn(2, 3, 6)}
    assert [f.name for f in build_space(model, batch).prunable] == ["1:channels"]
    real = RULES["native_layer_norm"]

    def unmarked(flow, node) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(flow, "mark", lambda flag, dim: None)
            real(flow, node)

    monkeypatch.setitem(RULES, "native_layer_norm", unmarked)
    space = build_space(model, batch)
    assert "0:channels" in [f.name for f in space.prunable]
    with pytest.raises(GETAError, match=r"^0:channels fails gate 3"):
        verify_space(model, batch, space)


def test_the_model_is_left_alone(bert, batch):
    before = {name: tensor.clone() for name, tensor in bert.state_dict().items()}
    space = build_space(bert, batch)
    verify_space(bert.train(), batch, space)
    assert bert.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in bert.state_dict().items())


def test_a_space_of_another_model_is_refused(bert, batch):
    with pytest.raises(GETAError, match="build the space for this very model"):
        verify_space(bert, batch, build_space(make("bert-qa"), batch))


def test_a_single_row_batch_without_padding_passes(bert):
    batch = {"input_ids": torch.arange(5)[None] + 5}
    verify_space(bert, batch, build_space(bert, batch), seed=3)


def test_ids_beyond_the_vocabulary_are_the_batch_s_fault(bert):
    batch = {"input_ids": torch.full((1, 5), 1000)}
    space = build_space(bert, batch)  # on meta nothing looks a token up
    with pytest.raises(GETAError, match=r"cannot run the batch: .*embedding.*index out of range"):
        verify_space(bert, batch, space)
