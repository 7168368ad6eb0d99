"""The space for a trainer: one recording gives the graph and the sizes, and few others are needed."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from geta_hf import qadg
from geta_hf.errors import GETAError
from geta_hf.qadg import PruningSpace
from geta_hf.qadg.tracing.recorder import Recorder
from geta_hf.quantization import attach_quantizers
from geta_hf.surgery.build_space import build_space, prepare_space
from geta_hf.surgery.record import record_batch
from geta_hf.surgery.trial_cut import try_cuts
from tests.architectures import build
from tests.export.tiny_encoders import some_batch, tiny_bloom, tiny_model


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How many recordings were begun."""
    counts: Counter[str] = Counter()
    enter = Recorder.__enter__

    def noted(self: Recorder) -> Recorder:
        counts["recordings"] += 1
        return enter(self)

    monkeypatch.setattr(Recorder, "__enter__", noted)
    yield counts


def same(first: PruningSpace, second: PruningSpace) -> bool:
    """Whether two spaces have the same families and reasons."""
    return str(dataclasses.asdict(first)) == str(dataclasses.asdict(second))


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit", "mixtral"])
def test_the_space_is_that_of_separate_recordings_from_three(name: str, counted: Counter[str]) -> None:
    model, batch = build(name)
    space, recordings = prepare_space(model, batch)
    assert counted["recordings"] == 3
    assert recordings is not None
    assert same(space, try_cuts(model, qadg.build_space(model, batch), batch))


def test_families_that_code_cannot_follow_are_taken_out() -> None:
    model, batch = tiny_bloom(), some_batch()
    assert {family.kind for family in prepare_space(model, batch)[0].prunable} == {"channels"}
    assert {family.kind for family in build_space(model, batch).prunable} == {"heads", "channels"}
    assert {family.kind for family in build_space(model, batch, verify=True).prunable} == {"channels"}


def test_what_narrows_the_space_comes_before_the_trial_cuts() -> None:
    model, batch = tiny_bloom(), some_batch()

    def without_heads(space: PruningSpace) -> PruningSpace:
        return qadg.apply_policy(space, keep=["heads"])

    space, _ = prepare_space(model, batch, narrow=without_heads)
    assert all("does not follow" not in family.reason for family in space.families)


def test_a_path_that_changes_is_refused() -> None:
    model, batch = tiny_model(), some_batch()
    own, calls = type(model).forward, []

    def forward(**inputs: torch.Tensor) -> object:
        calls.append(1)
        output = own(model, **inputs)
        if len(calls) % 2:
            output.start_logits = output.start_logits * 2
        return output

    model.forward = forward
    with pytest.raises(GETAError, match="took another path"):
        prepare_space(model, batch)


def test_a_module_of_another_library_has_no_trial_cuts(counted: Counter[str]) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.head = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.down(self.up(x).relu()).relu())

    narrowed = []
    model, batch = Plain(), {"x": torch.randn(2, 4)}
    space, recordings = prepare_space(model, batch, narrow=lambda space: narrowed.append(space) or space)
    assert recordings is None
    assert counted["recordings"] == 2
    assert narrowed == [space]
    assert same(space, qadg.build_space(model, batch))


@pytest.mark.parametrize("per_channel", [False, True])
def test_quantizers_change_nothing_about_the_groups(per_channel: bool) -> None:
    model, batch = tiny_model(), some_batch()
    plain = qadg.build_space(model, batch, flow=record_batch(model, batch).flow)
    attach_quantizers(model, per_channel=per_channel)
    quantized = qadg.build_space(model, batch, flow=record_batch(model, batch).flow)
    assert [family.name for family in quantized.prunable] == [family.name for family in plain.prunable]
    for family, other in zip(quantized.families, plain.families, strict=True):
        assert [(m.tensor, m.dim) for m in family.members] == [(m.tensor, m.dim) for m in other.members]
        assert all(torch.equal(m.index, o.index) for m, o in zip(family.members, other.members, strict=True))
