"""The forwards that are recorded before surgery."""

from __future__ import annotations

import torch

from geta_hf.surgery.record import other_shape, record, stepping
from tests.architectures import build


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
    traces = record(model, batch)
    assert len(traces) == 4  # the batch, another shape, token by token, eager attention
    assert before == {name: vars(module) for name, module in model.named_modules()}
    assert all(trace.original and trace.calls for trace in traces)
