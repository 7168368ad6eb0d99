"""What a model cannot follow is known before training, and taken out of the space with its reason."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from transformers import PreTrainedModel

from geta_hf.errors import GETAError
from geta_hf.qadg import PruningSpace
from geta_hf.surgery import verify as gate
from geta_hf.surgery.slice import slice_model
from geta_hf.surgery.trial_cut import try_cuts
from tests.export.tiny_encoders import some_batch, tiny_bloom, tiny_mixture, tiny_model
from tests.spaces import build_space


@pytest.mark.parametrize("kind", ["bert", "distilbert", "albert", "mpnet"])
def test_a_model_that_follows_keeps_its_space_and_itself(kind: str) -> None:
    model, batch = tiny_model(kind), some_batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    space = build_space(model, batch)
    assert try_cuts(model, space, batch) is space
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_heads_whose_positions_are_computed_as_the_model_runs_are_frozen_before_training() -> None:
    model, batch = tiny_bloom(), some_batch()
    space = build_space(model, batch)
    left = try_cuts(model, space, batch)
    assert {family.kind for family in space.prunable} == {"heads", "channels"}
    assert {family.kind for family in left.prunable} == {"channels"}
    assert all("does not follow" in f.reason and "arange" in f.reason for f in left.families if f.kind == "heads")


def test_one_family_that_fails_does_not_freeze_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(model, kept, values):
        name = "bert.encoder.layer.1.intermediate.dense.weight"
        wrong = {name: {0: (kept[name][0] + 1) % 64}} if name in kept else {}
        return slice_model(model, {**kept, **wrong}, values)

    monkeypatch.setattr(gate, "slice_model", shifted)
    model, batch = tiny_model("bert"), some_batch()
    space = build_space(model, batch)
    left = try_cuts(model, space, batch)
    gone = {f.name for f in space.prunable} - {f.name for f in left.prunable}
    assert gone == {"bert.encoder.layer.1:channels"}


def test_a_wrong_cut_of_everything_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(model, kept, values):
        wrong = {n: {d: (i - 1).clamp_min(0) for d, i in c.items()} for n, c in kept.items()}
        return slice_model(model, wrong, values)

    monkeypatch.setattr(gate, "slice_model", shifted)
    model, batch = tiny_model("bert"), some_batch()
    with pytest.raises(GETAError, match=r"nothing in .* can be cut away"):
        try_cuts(model, build_space(model, batch), batch)


def test_rounding_in_16_bits_freezes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sends tokens to other experts, so the masked and the cut model go on with others."""
    model, batches = tiny_mixture()
    space = build_space(model, batches[0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert all(try_cuts(model, space, batch) is space for batch in batches)
    after = model.state_dict()
    assert all(value.dtype == after[name].dtype and torch.equal(value, after[name]) for name, value in before.items())
    monkeypatch.setattr(gate, "in_single_precision", lambda _: nullcontext())
    assert not all(_rehearsed(model, space, batch) is space for batch in batches)


def _rehearsed(model: PreTrainedModel, space: PruningSpace, batch: dict[str, torch.Tensor]) -> PruningSpace | None:
    try:
        return try_cuts(model, space, batch)
    except GETAError:  # nothing at all was left
        return None
