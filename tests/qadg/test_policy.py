"""The default policy, and its switches by kind, coupling and name."""

from __future__ import annotations

import pytest

from geta_hf.errors import GETAError
from geta_hf.qadg import PruningSpace, apply_policy, build_space, verify_space
from tests.architectures import build

from .models import make


@pytest.fixture
def llama() -> PruningSpace:
    return build_space(*build("llama"))


def prunable(space: PruningSpace) -> list[str]:
    return sorted(f"{family.name.split('.')[2]} {family.kind}" for family in space.prunable if "." in family.name)


def test_heads_and_channels_by_default(llama):
    assert prunable(llama) == ["0 channels", "0 heads", "1 channels", "1 heads"]


def test_a_kind_is_switched_off_and_a_pattern_keeps_what_it_matches(llama):
    assert prunable(apply_policy(llama, keep=["heads"])) == ["0 channels", "1 channels"]
    left = apply_policy(llama, keep=["model.layers.0.*"])
    assert prunable(left) == ["1 channels", "1 heads"]
    assert {f.reason for f in left.families if f.name.startswith("model.layers.0")} >= {"the policy keeps it"}


def test_keep_is_stronger_than_prune(llama):
    assert apply_policy(llama, prune=["heads", "channels"], keep=["*"]).prunable == ()


def test_query_heads_take_the_place_of_their_groups(llama):
    switched = apply_policy(llama, prune=["query_heads"])
    assert prunable(switched) == ["0 channels", "0 query_heads", "1 channels", "1 query_heads"]
    reasons = {f.reason for f in switched.families if f.kind == "heads"}
    assert reasons == {f"cuts the same indices as model.layers.{layer}.self_attn:query_heads" for layer in (0, 1)}


def test_a_pattern_switches_one_family_on(llama):
    switched = apply_policy(llama, prune=["model.layers.1.self_attn:query_heads"])
    assert prunable(switched) == ["0 channels", "0 heads", "1 channels", "1 query_heads"]


def test_a_coupling_is_lifted_where_the_kind_is_prunable(batch):
    space = build_space(make("bert-sequence"), batch)
    facing = [family for family in space.families if family.couplings == ("output",)]
    assert [family.prunable for family in facing] == [False] and "output of the model" in facing[0].reason
    lifted = apply_policy(space, prune=["output"])
    assert {f.name for f in lifted.prunable} - {f.name for f in space.prunable} == {facing[0].name}


def test_a_policy_is_decided_anew_each_time(llama):
    assert apply_policy(apply_policy(llama, prune=["residual"], keep=["heads"])) == apply_policy(llama)


@pytest.mark.parametrize("entry", ["head", "Heads", "model.layers.9.*", ""])
def test_an_entry_that_matches_nothing_is_an_error(llama, entry):
    with pytest.raises(GETAError, match=r"is no kind \(heads, query_heads, .*matches no family; families are called"):
        apply_policy(llama, prune=[entry])
    with pytest.raises(GETAError, match="matches no family"):
        apply_policy(llama, keep=[entry])


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "vit", "t5", "resnet", "mamba", "convnextv2"])
@pytest.mark.parametrize("policy", [["residual", "norm", "tied", "output"], ["query_heads"], ["head_dim"]], ids=str)
def test_whatever_is_switched_on_is_sound(name, policy):
    model, batch = build(name)
    try:
        space = build_space(model, batch, prune=policy)
    except GETAError as error:
        assert name == "convnextv2" and "nothing in" in str(error)  # all of its channels are coupled to a norm
        return
    if policy[0] == "residual":
        assert any(family.kind == "residual" for family in space.prunable)
    verify_space(model, [batch], space)
