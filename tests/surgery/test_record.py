"""The forwards that are recorded before surgery."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import PreTrainedModel

from geta_hf.errors import GETAError
from geta_hf.qadg import kept_indices
from geta_hf.surgery import record
from geta_hf.surgery.compare_outputs import set_attention
from geta_hf.surgery.record import other_shape, record_sizes, stepping
from geta_hf.surgery.solve_attributes import solve
from tests.architectures import build
from tests.spaces import build_space


def test_another_shape_has_another_row_and_fewer_tokens() -> None:
    model, _ = build("llama")
    batch = {"input_ids": torch.ones(2, 8, dtype=torch.int64), "attention_mask": torch.ones(2, 8)}
    assert {name: tuple(tensor.shape) for name, tensor in other_shape(model, batch).items()} == {
        "input_ids": (3, 6),
        "attention_mask": (3, 6),
    }
    model, batch = build("resnet")
    assert other_shape(model, batch)["pixel_values"].shape == (3, *batch["pixel_values"].shape[1:])


def test_stepping_gives_the_last_token_from_the_cache() -> None:
    for name in ("llama", "t5", "mamba"):
        model, batch = build(name)
        batch = {key: torch.ones_like(value) if key == "attention_mask" else value for key, value in batch.items()}
        with torch.no_grad():
            whole = model(**batch).logits[:, -1:]
            with stepping(model):
                last = model(**batch)
            torch.testing.assert_close(last, whole, rtol=1e-4, atol=1e-5)
            assert "forward" not in vars(model)


def test_an_own_forward_of_the_instance_is_put_back() -> None:
    model, _ = build("llama")
    own = model.forward
    model.forward = own
    with stepping(model):
        assert model.forward is not own
    assert model.__dict__["forward"] is own


def test_a_model_is_recorded_in_several_ways_and_left_as_it_was() -> None:
    model, batch = build("gpt2")
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    recordings = record_sizes(model, batch)
    first, together = recordings.traces
    assert before == {name: vars(module) for name, module in model.named_modules()}
    assert all(trace.original and trace.calls for trace in recordings.traces)
    assert recordings.flow is first.flow
    shapes = {value.shape for value in together.flow.graph.values if value.role == "input"}
    assert shapes == {(3, 6), (2, 8)}  # another shape, and the batch step by step and under eager attention


@pytest.mark.parametrize("name", ["gpt2", "opt", "t5", "deberta-v2", "swin"])
def test_variations_recorded_together_say_what_they_say_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build(name)
    space = build_space(model, batch)
    removal = {f.name: torch.arange(f.size) < 1 + place % (f.size - 1) for place, f in enumerate(space.prunable)}
    kept = kept_indices(space, removal)
    together = record_sizes(model, batch)
    monkeypatch.setattr(record, "_keeps_apart", lambda first, other: False)
    alone = record_sizes(model, batch)
    assert len(together.traces) == 2 < len(alone.traces) or name in ("deberta-v2", "swin")
    assert solve(together.traces, kept) == solve(alone.traces, kept)


def test_a_variation_that_ties_more_than_the_batch_is_recorded_alone() -> None:
    """Step by step, falcon's heads share what the plain forward keeps apart: a joint recording would say nothing."""
    model, batch = build("falcon")
    recordings = record_sizes(model, batch)
    assert len(recordings.traces) == 4
    apart = [record._keeps_apart(recordings.flow, trace.flow) for trace in recordings.traces]
    assert apart == [True, True, False, True]


def test_variations_that_fail_cost_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build("gpt2")

    def refused(model: object, inputs: object) -> None:
        raise ValueError("no cache")

    monkeypatch.setattr(record, "_last_logits_in_steps", refused)
    assert len(record_sizes(model, batch).traces) == 3  # the batch, another shape, eager attention


def test_the_batch_itself_must_be_recorded() -> None:
    model, _ = build("gpt2")
    with pytest.raises(GETAError, match="cannot run the batch"):
        record_sizes(model, {"pixel_values": torch.zeros(2, 3, 4, 4)})


def test_the_other_attention_is_among_what_is_recorded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build("gpt2")
    chosen, own = [], model.config._attn_implementation

    def noted(model: PreTrainedModel, implementation: str) -> None:
        chosen.append(implementation)
        set_attention(model, implementation)

    monkeypatch.setattr(record, "set_attention", noted)
    record_sizes(model, batch)
    assert (own, chosen) == ("sdpa", ["eager"])
    assert model.config._attn_implementation == own


def test_each_variation_computes_what_modules_cache() -> None:
    """Levit gathers its biases of attention once for as long as it is in evaluation mode."""
    model, batch = build("levit")
    variations = [record._Variation(batch), record._Variation(batch)]
    (together,) = record._try(model, record._joined(variations), record._all_of(model, variations))
    gathered = Counter(node.module for node in together.flow.graph.nodes if node.op == "index")
    assert gathered and all(count % 2 == 0 for count in gathered.values())
