"""What a model cannot follow is known before training, and taken out of the space with its reason."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from geta_hf.errors import GETAError
from geta_hf.qadg import PruningSpace
from geta_hf.surgery import verify as gate
from geta_hf.surgery.size_equations import RefusalError
from geta_hf.surgery.slice import slice_model
from geta_hf.surgery.solve_attributes import solve
from geta_hf.surgery.trial_cut import _ends_and_middle, _one_end, try_cuts
from tests.architectures import build
from tests.export.tiny_encoders import some_batch, tiny_bloom, tiny_mixture, tiny_model
from tests.spaces import build_space

Split = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


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


def test_on_meta_the_sizes_alone_show_what_the_code_fixes() -> None:
    """PVTv2 writes the joint width of its heads as that of the stage."""
    model, batch = build("pvt_v2")
    space = build_space(model, batch)
    expected = try_cuts(model, space, batch)
    found = try_cuts(model.to("meta"), space, batch)
    assert {family.kind for family in space.prunable} == {"heads", "channels"}
    assert {family.kind for family in found.prunable} == {"channels"}
    assert [(f.name, f.prunable, f.reason) for f in found.families] == [
        (f.name, f.prunable, f.reason) for f in expected.families
    ]


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
    monkeypatch.setattr(gate, "in_next_precision", lambda _: nullcontext())
    assert not all(_rehearsed(model, space, batch) is space for batch in batches)


def _rehearsed(model: PreTrainedModel, space: PruningSpace, batch: dict[str, torch.Tensor]) -> PruningSpace | None:
    try:
        return try_cuts(model, space, batch)
    except GETAError:  # nothing at all was left
        return None


# --- both ends of every family ------------------------------------------------------------------------------------


def test_every_family_loses_both_ends_and_more_of_one_half() -> None:
    for size in range(2, 20):
        family = SimpleNamespace(size=size)
        counts = set()
        for place in range(3):
            mask, end = _ends_and_middle(family, place), _one_end(family, place)
            assert mask.dtype == torch.bool and not mask.all() and int(end.sum()) == 1
            assert (mask | end)[0] and (mask | end)[-1]
            half = size // 2
            assert size % 2 or int(mask[:half].sum()) != int(mask[size - half :].sum())
            counts.add(int(mask.sum()))
        assert len(counts) == 3 or size < 7


@pytest.mark.parametrize("end", [0, -1])
def test_an_end_that_cannot_be_cut_freezes_its_family(end: int, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "bert.encoder.layer.1.intermediate.dense.weight"

    def shifted(model, kept, values):
        removed = name in kept and int(kept[name][0][end]) != range(64)[end]
        return slice_model(model, {**kept, name: {0: (kept[name][0] + 1) % 64}} if removed else kept, values)

    monkeypatch.setattr(gate, "slice_model", shifted)
    model, batch = tiny_model("bert"), some_batch()
    space = build_space(model, batch)
    assert next(f for f in space.prunable if f.name == "bert.encoder.layer.1:channels").size == 64
    left = try_cuts(model, space, batch)
    assert {f.name for f in space.prunable} - {f.name for f in left.prunable} == {"bert.encoder.layer.1:channels"}


def test_so_does_one_end_whose_sizes_no_attribute_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "bert.encoder.layer.1.intermediate.dense.weight"

    def refuse(traces, kept):
        if name in kept and len(kept[name][0]) == 63:
            raise RefusalError("one alone")
        return solve(traces, kept)

    monkeypatch.setattr(gate, "solve", refuse)
    model, batch = tiny_model("bert"), some_batch()
    left = try_cuts(model, build_space(model, batch), batch)
    refused = next(f for f in left.families if f.name == "bert.encoder.layer.1:channels")
    assert not refused.prunable and "one alone" in refused.reason


class Strides(nn.Module):
    """Multiplies two halves of its channels, which `split` takes apart."""

    def __init__(self, split: Split) -> None:
        super().__init__()
        self.channels, self.split = 6, split
        self.up, self.down = nn.Linear(16, 12), nn.Linear(6, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.split(self.up(x), self.channels)
        return x + self.down(gate.sigmoid() * up)


class StridesConfig(PreTrainedConfig):
    model_type = "strides"


class StridesModel(PreTrainedModel):
    config_class = StridesConfig

    def __init__(self, config: StridesConfig, split: Split) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(20, 16)
        self.layers = nn.ModuleList([Strides(split), Strides(split)])
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, input_ids: torch.Tensor, return_dict: bool = True) -> BaseModelOutput:
        x = self.embeddings(input_ids)
        for layer in self.layers:
            x = layer(x)
        return BaseModelOutput(last_hidden_state=x)


SPLITS: dict[str, Split] = {
    "interleaved": lambda x, n: (x[..., ::2], x[..., 1::2]),
    "interleaved, with bounds": lambda x, n: (x[..., 0 : 2 * n : 2], x[..., 1 : 2 * n : 2]),
    "interleaved, from the end": lambda x, n: (x[..., -2 * n :: 2], x[..., 1 - 2 * n :: 2]),
    "unflattened": lambda x, n: (x.unflatten(-1, (n, 2))[..., 0], x.unflatten(-1, (-1, 2))[..., 1]),
    "halves": lambda x, n: (x[..., :n], x[..., n:]),
    "halves, from the end": lambda x, n: (x[..., :-n], x[..., -n:]),
    "chunks": lambda x, n: x.chunk(2, -1),
}


@pytest.mark.parametrize("split", SPLITS)
def test_groups_at_either_end_can_be_cut_however_halves_are_taken_apart(split: str) -> None:
    torch.manual_seed(0)
    model, batch = StridesModel(StridesConfig(), SPLITS[split]).eval(), {"input_ids": torch.arange(12).view(2, 6)}
    space = build_space(model, batch)
    names = [family.name for family in space.prunable if family.kind == "channels"]
    assert len(names) == 2 and try_cuts(model, space, batch) is space
    trial = gate.SurgeryTrial(model, batch, space)
    for groups in ([0], [5], [0, 5], [0, 1, 2, 3, 4], [1, 2, 3, 4, 5]):
        mask = torch.zeros(6, dtype=torch.bool)
        mask[groups] = True
        assert trial.refusal({names[0]: mask, names[1]: ~mask}) is None
