"""Gate 4 on many architectures, with different counts in every layer, and what it must catch."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from geta_hf.errors import GETAError
from geta_hf.qadg import PruningSpace
from geta_hf.surgery import verify as gate
from geta_hf.surgery.size_equations import RULES
from geta_hf.surgery.slice import slice_model
from geta_hf.surgery.verify import verify_surgery
from tests.architectures import build
from tests.export.tiny_encoders import tiny_bloom
from tests.spaces import build_space

# Each follows a cut in a way of its own: torch.nn's attributes alone (llama), split sizes (gpt2), a count of heads
# (opt, gptj, deberta-v2), a configuration (phi3), shared biases (t5), depthwise convolutions (mamba), norms of groups
# (wav2vec2), windows (swin), experts (mixtral), several towers (clip), batch norms (resnet), a recurrent state.
NAMES = "llama gpt2 opt gptj deberta-v2 phi3 t5 mamba wav2vec2 swin mixtral clip resnet falcon recurrent_gemma"


def with_kinds(space: PruningSpace, *kinds: str) -> PruningSpace:
    families = [dataclasses.replace(f, prunable=f.kind in kinds and f.size > 1) for f in space.families]
    return dataclasses.replace(space, families=tuple(families))


@pytest.mark.parametrize("name", NAMES.split())
def test_cut_differently_in_every_layer(name: str) -> None:
    model, batch = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    verify_surgery(model, batch, build_space(model, batch))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_model_that_ran_before_keeps_nothing_of_its_old_weights() -> None:
    """Levit gathers its biases of attention once for as long as it is in evaluation mode."""
    model, batch = build("levit")
    with torch.no_grad():
        model(**batch)
    verify_surgery(model, batch, build_space(model, batch))


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_the_residual_stream_is_compared_with_the_graph_on_what_is_left(name: str) -> None:
    model, batch = build(name)
    space = with_kinds(build_space(model, batch), "residual")
    assert space.num_groups > 1
    verify_surgery(model, batch, space)


def test_a_trial_copies_what_is_cut_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[nn.Module] = []

    def noted(change: Any) -> Any:
        return lambda copied, *rest: tried.append(copied) or change(copied, *rest)

    model, batch = build("gpt2")
    space = with_kinds(build_space(model, batch), "channels")
    bench = gate.SurgeryTrial(model, batch, space)
    monkeypatch.setattr(gate, "slice_model", noted(gate.slice_model))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert bench.refusal({family.name: torch.arange(family.size) < 5 for family in space.prunable}) is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    cut = {member.tensor for family in space.prunable for member in family.members}
    (copied,) = tried
    theirs = dict(copied.named_parameters())
    assert cut and {name for name, tensor in model.named_parameters() if theirs[name] is not tensor} == cut


def test_masked_for_a_while_and_then_as_before_bit_for_bit() -> None:
    """A down projection loses columns to the channels and rows to the residual width, which overlap."""
    model, batch = build("llama")
    families = build_space(model, batch, prune=["residual"]).prunable
    removal = {family.name: torch.arange(family.size) < 2 for family in families}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(KeyError), gate.masked_groups(model, families, removal):
        within = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        raise KeyError
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {"residual", "channels"} <= {family.kind for family in families}
    gate.mask_groups(model, families, removal)
    for name, tensor in model.state_dict().items():
        assert torch.equal(within[name], tensor), name


@pytest.mark.parametrize(
    ("name", "attribute"),
    [
        ("gpt2", "split_size"),
        ("opt", "num_heads"),
        ("phi3", "config.num_attention_heads"),
        ("deberta-v2", "num_attention_heads"),
    ],
)
@pytest.mark.parametrize("change", ["forgotten", "wrong"])
def test_a_wrong_attribute_is_caught(name: str, attribute: str, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    solve = gate.solve

    def mutated(traces: Any, kept: Any) -> Any:
        values = solve(traces, kept)
        found = [one for one in values if one.name == attribute][:1]
        return {
            a: v + 1 if change == "wrong" else traces[0].original[a] if a in found else v for a, v in values.items()
        }

    model, batch = build(name)
    space = build_space(model, batch)
    monkeypatch.setattr(gate, "solve", mutated)
    with pytest.raises(GETAError, match=r"fails gate 4 \(surgery\)"):
        verify_surgery(model, batch, space)


@pytest.mark.parametrize(("name", "rule"), [("gpt2", "split"), ("opt", "view"), ("phi3", "__getitem__")])
def test_a_dropped_equation_is_caught(name: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build(name)
    space = build_space(model, batch)
    monkeypatch.delitem(RULES, rule)
    with pytest.raises(GETAError, match=r"fails gate 4 \(surgery\)"):
        verify_surgery(model, batch, space)


def test_a_shifted_slice_is_caught_and_the_family_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: nn.Module, kept: Any, values: Any) -> Any:
        name = "model.layers.1.mlp.down_proj.weight"
        size = model.get_parameter(name).shape[1]
        moved = {name: {1: (kept[name][1] + 1) % size}} if name in kept else {}
        return slice_model(model, {**kept, **moved}, values)

    model, batch = build("llama")
    space = build_space(model, batch)
    monkeypatch.setattr(gate, "slice_model", wrong)
    with pytest.raises(GETAError, match=r"model.layers.1.mlp:channels fails gate 4 .* differs by"):
        verify_surgery(model, batch, space)


def test_heads_with_computed_slopes_are_refused() -> None:
    model = tiny_bloom()
    batch = {"input_ids": torch.randint(3, 60, (2, 8))}
    with pytest.raises(GETAError, match=r"transformer.h:heads fails gate 4 .* arange at modeling_bloom.py"):
        verify_surgery(model, batch, build_space(model, batch))


def test_a_model_on_meta_is_refused() -> None:
    model, batch = build("bert")
    space = build_space(model, batch)
    with pytest.raises(GETAError, match="on meta"):
        verify_surgery(model.to("meta"), batch, space)


def test_every_family_is_touched_and_none_emptied() -> None:
    model, batch = build("llama")
    space = with_kinds(build_space(model, batch), "heads", "query_heads", "channels", "head_dim")
    touched = set()
    for removal in gate._removals(space.prunable, torch.Generator().manual_seed(0)):
        families = {family.name: family for family in space.prunable if family.name in removal}
        for name, family in families.items():
            assert 0 < int(removal[name].sum()) < family.size
            assert not set(family.excludes) & set(removal)
        touched |= set(removal)
    assert touched == {family.name for family in space.prunable}
