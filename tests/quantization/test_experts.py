"""Experts that share tensors are taken apart and put together again; nothing that the model computes changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from geta_hf.costs.model_costs import forward_uses, measure_costs
from geta_hf.errors import GETAError
from geta_hf.qadg.space import build_space
from geta_hf.qadg.tracing.dummy_inputs import empty_model
from geta_hf.quantization import select_layers
from geta_hf.quantization.experts import (
    experts_apart,
    is_unstacked,
    restack_experts,
    stacked_experts,
    unstack_experts,
    unstacked_experts,
)
from tests.architectures import build

NAMES = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"]
EXPERTS, CHOSEN = 4, 2


def made(name: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A tiny mixture with weights large enough that its experts differ."""
    torch.manual_seed(0)
    model, batch = build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval(), batch


@pytest.mark.parametrize("name", NAMES)
def test_apart_they_compute_the_same_and_together_they_are_what_they_were(name: str) -> None:
    model, batch = made(name)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = {path: type(module) for path, module in stacked_experts(model).items()}
    expected = model(**batch).logits
    unstack_experts(model)
    assert is_unstacked(model.config) and not stacked_experts(model)
    assert list(unstacked_experts(model)) == list(kinds)
    for training in (False, True):
        # Experts without tokens run in training alone.
        assert torch.allclose(model.train(training)(**batch).logits, expected, atol=1e-5)
    model.eval().config._experts_implementation = "batched_mm"  # as a recording does
    assert torch.allclose(model(**batch).logits, expected, atol=1e-5)
    restack_experts(model)
    assert {path: type(module) for path, module in stacked_experts(model).items()} == kinds
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert not is_unstacked(model.config)


@pytest.mark.parametrize("name", NAMES)
def test_each_expert_has_linear_layers_and_channels_of_its_own(name: str) -> None:
    model, batch = made(name)
    unstack_experts(model)
    layers = select_layers(model)
    paths = [
        f"{path}.{place}.{kind}" for path in unstacked_experts(model) for place in range(4) for kind in ("up", "down")
    ]
    assert set(paths) <= layers.keys()
    families = [family for family in build_space(model, batch).prunable if ".experts." in family.name]
    assert len(families) == len(paths) // 2 and all(family.kind == "channels" for family in families)
    # What is built from the config has the same layers.
    twin = empty_model(model.config)
    assert {name: tensor.shape for name, tensor in twin.state_dict().items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }


def test_a_token_counts_for_as_many_experts_as_it_goes_to() -> None:
    """All tokens of one sample may go to the same experts: costs are those of any data."""
    model, batch = made("mixtral")
    unstack_experts(model)
    names = [name for name in select_layers(model) if ".experts." in name]
    costs = measure_costs(model, tokens=10, names=names)
    weights = sum(layer.weight.numel() for name, layer in select_layers(model).items() if name in names)
    assert costs.bops_linear == weights * 10 * CHOSEN / EXPERTS * 32 * 32
    stacked, _ = made("mixtral")
    assert measure_costs(stacked, tokens=10).macs == costs.macs
    uses = forward_uses(model, names, batch)
    assert set(uses.values()) == {batch["input_ids"].numel() * CHOSEN // EXPERTS}


def test_a_gradient_of_an_expert_without_tokens_is_zero_and_not_missing() -> None:
    """Processes whose tokens reach other experts then still agree on the parameters that have gradients."""
    model, batch = made("mixtral")
    unstack_experts(model)
    # One token reaches two of the four experts of each layer.
    model.train()(input_ids=batch["input_ids"][:1, :1]).logits.sum().backward()
    for module in unstacked_experts(model).values():
        sums = [float(expert["up"].weight.grad.abs().sum()) for expert in module.experts]
        assert sorted(value > 0 for value in sums) == [False, False, True, True]


def test_experts_of_different_sizes_can_not_share_a_tensor() -> None:
    model, _ = made("mixtral")
    unstack_experts(model)
    expert = unstacked_experts(model)["model.layers.0.mlp.experts"].experts[1]
    expert["down"].weight = torch.nn.Parameter(expert["down"].weight[:, 1:])
    with pytest.raises(GETAError, match=r"model.layers.0.mlp.experts kept different numbers .* uniform=True"):
        restack_experts(model)
    assert len(unstacked_experts(model)) == 2


def test_experts_of_older_transformers_are_found() -> None:
    """They say nothing of a norm behind each expert."""
    model, batch = made("mixtral")
    expected = model(**batch).logits
    for module in stacked_experts(model).values():
        vars(module).pop("has_post_expert_norm", None)
    unstack_experts(model)
    assert is_unstacked(model.config)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)


def test_after_a_failure_they_are_together_again() -> None:
    model, batch = made("gpt_oss")
    expected = model(**batch).logits
    untouched = copy.deepcopy(model)
    with pytest.raises(ValueError, match="failed"), experts_apart(model):
        assert unstacked_experts(model)
        raise ValueError("failed")
    assert stacked_experts(model) and torch.equal(model(**batch).logits, expected)
    with experts_apart(untouched):
        pass
    assert unstacked_experts(untouched)


@torch.no_grad()
def test_choices_behind_the_experts_add_nothing() -> None:
    model, _ = made("mixtral")
    unstack_experts(model)
    module = next(iter(unstacked_experts(model).values()))
    hidden, weights = torch.randn(3, model.config.hidden_size), torch.rand(3, 2)
    chosen = torch.tensor([[0, 4], [4, 4], [1, 0]])
    found = module(hidden, chosen, weights)
    alone = [module(hidden, torch.full((3, 1), place), torch.ones(3, 1)) for place in range(2)]
    assert torch.allclose(found[0], weights[0, 0] * alone[0][0], atol=1e-6) and not found[1].any()
    assert torch.allclose(found[2], weights[2, 0] * alone[1][2] + weights[2, 1] * alone[0][2], atol=1e-6)
    assert not module(hidden, torch.full((3, 2), 4), weights).any()
