"""W + scale · B A under a quantizer: values, gradients, memory and dtypes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from geta_hf.quantization import attach_quantizers, detach_quantizers
from geta_hf.quantization.functional import fake_quantize
from geta_hf.quantization.lora import LowRank, merge

OUT, IN, RANK, SCALE = 6, 10, 3, 0.5


def layer_of(kind: str, low_rank: bool = True, **how: object) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Linear(IN, OUT) if kind == "linear" else Conv1D(OUT, IN)
    model = nn.Sequential(layer)
    attach_quantizers(model, include=["0"], initial_bits=4, target_bits=4, **how)
    if low_rank:
        layer.lora = LowRank(torch.randn(RANK, IN), torch.randn(OUT, RANK), SCALE, kind == "conv1d")
    return layer


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_without_b_the_output_is_the_full_models_bit_for_bit(kind: str) -> None:
    plain, layer = layer_of(kind, low_rank=False), layer_of(kind)
    nn.init.zeros_(layer.lora.B)
    x = torch.randn(2, 4, IN)
    if kind == "linear":
        assert torch.equal(layer(x), plain(x))
    assert torch.allclose(layer(x), plain(x), atol=1e-6)
    assert torch.equal(layer.merged_weight(), plain.weight)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("how", [{}, {"per_channel": True}, {"learn_t": True}])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_gradients_are_autograds_through_the_merged_weight(kind: str, how: dict, frozen: bool) -> None:
    layer = layer_of(kind, **how)
    layer.weight_quantizer.frozen = frozen
    twin = copy.deepcopy(layer)
    x, target = torch.randn(2, 4, IN), torch.randn(2, 4, OUT)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    ((layer(ours) - target) ** 2).sum().backward()
    own, low = twin.weight_quantizer, twin.lora
    update = low.scale * low.B @ low.A
    weight = twin.weight + (update.t() if kind == "conv1d" else update)
    weight.retain_grad()
    whole = fake_quantize(weight, *own.broadcast_over(weight), own.exponent, own.frozen)
    ((F.linear(theirs, whole.t() if kind == "conv1d" else whole, twin.bias) - target) ** 2).sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-4)
    assert torch.allclose(layer.weight.grad, weight.grad, atol=1e-4)  # what frozen weights are scored by
    found = dict(layer.named_parameters())
    for name, parameter in twin.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(found[name].grad, parameter.grad, atol=1e-4, rtol=1e-4), name
    assert float(layer.lora.A.grad.abs().sum()) > 0 and float(layer.lora.B.grad.abs().sum()) > 0


def test_backward_keeps_no_copy_of_the_weight() -> None:
    layer, sizes = layer_of("linear"), []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() != layer.weight.data_ptr():
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(torch.randn(1, IN))
    assert sizes and max(sizes) < OUT * IN


def test_the_matrices_stay_fp32_and_autocast_does_not_change_the_sum() -> None:
    layer = layer_of("linear").to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16 and layer.lora.A.dtype == torch.float32
    assert layer.merged_weight().dtype == torch.bfloat16
    fp32 = layer_of("linear")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fp32.merged_weight(), layer_of("linear").merged_weight())


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_detached_layer_has_the_merged_weight(kind: str) -> None:
    layer = layer_of(kind)
    expected = merge(layer.weight.detach(), layer.lora.A, layer.lora.B, SCALE, kind == "conv1d")
    detach_quantizers(nn.Sequential(layer))
    assert torch.equal(layer.weight, expected)
    assert set(dict(layer.named_parameters())) == {"weight", "bias"} and type(layer) in (nn.Linear, Conv1D)
