from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from geta_hf.errors import GETAError
from geta_hf.qadg.space import kept_indices
from geta_hf.surgery.compare_outputs import TOLERANCE, attention_outputs, prove_alike, prove_equal
from geta_hf.surgery.record import record_sizes
from geta_hf.surgery.slice import slice_model
from geta_hf.surgery.solve_attributes import solve
from geta_hf.surgery.verify import mask_groups
from tests.architectures import build
from tests.export.tiny_encoders import some_batch, tiny_mixture, tiny_model
from tests.spaces import build_space


def test_outputs_cover_both_attentions_and_leave_the_model_as_it_was() -> None:
    model = tiny_model()
    model.train()
    model.bert.encoder.eval()
    implementation = model.config._attn_implementation
    outputs = attention_outputs(model, some_batch())
    assert set(outputs) == {"eager", "sdpa"}
    assert set(outputs["sdpa"]) == {"start_logits", "end_logits"}
    assert not outputs["eager"]["start_logits"].requires_grad
    assert model.training
    assert not model.bert.encoder.layer[0].training
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("training", [False, True])
def test_what_a_model_derived_from_its_weights_does_not_outlive_them(training: bool) -> None:
    """Levit keeps the biases of attention, gathered in evaluation mode, until it is in training mode."""
    model, batch = build("levit")
    biases = model.get_parameter("levit.encoder.stages.0.layers.0.module.attention_biases")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
        model.train(training)
        before = attention_outputs(model, batch)["own"]["logits"]
        biases.normal_(std=3)
        after = model.eval()(**batch).logits  # as whoever goes on with the model sees it
        biases.copy_(biases.flip(1))
        flipped = attention_outputs(model, batch)["own"]["logits"]
    assert not torch.allclose(before, after)
    assert not torch.allclose(after, flipped)


def test_same_model_is_proved_and_a_changed_one_is_named() -> None:
    model = tiny_model()
    reference = attention_outputs(model, some_batch())
    assert prove_equal(reference, attention_outputs(model, some_batch()), torch.float32, "same") == 0.0
    with torch.no_grad():
        model.qa_outputs.bias[1] += 1e-3
    with pytest.raises(GETAError, match=r"the edited model's end_logits \(eager attention\) differs by 0\.001"):
        prove_equal(reference, attention_outputs(model, some_batch()), torch.float32, "edited")


def outputs(*values: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"eager": {"logits": torch.tensor(values)}}


@pytest.mark.parametrize(
    ("reference", "found", "equal"),
    [
        (outputs(0.5), outputs(0.500009), True),
        (outputs(0.5), outputs(0.50002), False),
        (outputs(100.0), outputs(100.0005), True),
        (outputs(100.0), outputs(100.002), False),
        (outputs(0.5, float("-inf")), outputs(0.5, float("-inf")), True),
        (outputs(0.5, -1e38), outputs(0.51, -1e38), False),
        (outputs(0.5, 1.0), outputs(0.5, float("nan")), False),
        (outputs(0.5, float("nan")), outputs(0.5, 1.0), False),
    ],
)
def test_tolerance_scales_with_plain_logits_only(reference: dict, found: dict, equal: bool) -> None:
    if equal:
        prove_equal(reference, found, torch.float32, "cut")
    else:
        with pytest.raises(GETAError, match="differs by"):
            prove_equal(reference, found, torch.float32, "cut")


def test_other_shape_or_missing_output_is_refused() -> None:
    with pytest.raises(GETAError, match=r"logits .* has shape \(2,\), the trained model's \(1,\)"):
        prove_equal(outputs(1.0), outputs(1.0, 2.0), torch.float32, "cut")
    with pytest.raises(GETAError, match="has shape None"):
        prove_equal(outputs(1.0), {"eager": {}}, torch.float32, "cut")


@pytest.mark.parametrize("batch", [{"input_ids": torch.full((1, 3), 999)}, {"pixels": torch.zeros(1)}])
def test_batch_that_does_not_run_is_a_clear_error(batch: dict[str, torch.Tensor]) -> None:
    with pytest.raises(GETAError, match="BertForQuestionAnswering cannot run the batch"):
        attention_outputs(tiny_model(), batch)


def test_16_bits_alone_do_not_decide() -> None:
    """Where rounding sends tokens to other experts; a wrong weight is caught all the same."""
    masked, batches = tiny_mixture()
    space = build_space(masked, batches[0])
    removal = {family.name: torch.arange(family.size) % 3 == 0 for family in space.prunable}
    mask_groups(masked, space.prunable, removal)
    kept = kept_indices(space, removal)
    small = copy.deepcopy(masked)
    slice_model(small, kept, solve(record_sizes(masked, batches[0]).traces, kept))

    def refused(prove: Callable[[dict[str, torch.Tensor]], float]) -> int:
        count = 0
        for batch in batches:
            try:
                prove(batch)
            except GETAError:
                count += 1
        return count

    def alike(batch: dict[str, torch.Tensor]) -> float:
        return prove_alike(masked, attention_outputs(masked, batch), small, batch, "cut")

    def equal(batch: dict[str, torch.Tensor]) -> float:
        return prove_equal(attention_outputs(masked, batch), attention_outputs(small, batch), torch.bfloat16, "cut")

    assert refused(equal) > 0 and refused(alike) == 0
    with torch.no_grad():
        small.model.layers[1].self_attn.o_proj.weight.mul_(1.5)
    assert refused(alike) == 3


def test_single_precision_alone_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding in fp32 grows through tens of layers; here as if no difference were allowed."""
    first, batch = tiny_model().eval(), some_batch()
    monkeypatch.setitem(TOLERANCE, torch.float32, 1e-9)
    second = copy.deepcopy(first)
    layer = second.base_model.encoder.layer[0]
    order = torch.randperm(len(layer.intermediate.dense.bias), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # the same function, whose sums run in another order
        for tensor in layer.intermediate.dense.parameters():
            tensor.copy_(tensor[order])
        layer.output.dense.weight.copy_(layer.output.dense.weight[:, order])
    before = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    outputs = attention_outputs(first, batch)
    with pytest.raises(GETAError, match="differs by"):
        prove_equal(outputs, attention_outputs(second, batch), torch.float32, "cut")
    assert prove_alike(first, outputs, second, batch, "cut") < 1e-9
    assert all(torch.equal(tensor, before[name]) for name, tensor in first.state_dict().items())
    with torch.no_grad():
        layer.output.dense.weight.mul_(1.001)
    with pytest.raises(GETAError, match="differs by"):
        prove_alike(first, outputs, second, batch, "cut")
