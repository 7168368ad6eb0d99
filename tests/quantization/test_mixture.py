"""A layer on a mixture of widths: values and gradients against autograd of the formula, written out by widths."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from geta_hf.quantization import attach_quantizers, detach_quantizers, quantized_layers
from geta_hf.quantization.attach import without_quantizers
from geta_hf.quantization.functional import fake_quantize
from geta_hf.quantization.kernels import using
from geta_hf.quantization.kernels.compiled import Attempt
from geta_hf.quantization.mixture import Mixture, levels_of, mixed_weight

WIDTHS = [2, 3, 8]


def naive(weight: Tensor, shares: Tensor, clips: Tensor) -> Tensor:
    """Σ θ_p Q_p(W), one quantizer after the other, by autograd."""
    total = torch.zeros_like(weight)
    for width, share, clip in zip(WIDTHS, shares, clips, strict=True):
        total = total + share * fake_quantize(weight, clip / (2 ** (width - 1) - 1), clip)
    return total


def make(layer: nn.Module, per_row: bool = False) -> tuple[nn.Module, Mixture]:
    """Return a model with one quantized layer, and the mixture that is on it."""
    model = nn.ModuleDict({"blocks": nn.ModuleList([layer])})
    attach_quantizers(model)
    outputs = layer.bias.numel()
    generator = torch.Generator().manual_seed(1)
    transposed = isinstance(layer, Conv1D)
    shape = (1, outputs) if transposed else (outputs, 1)
    clips = 0.3 * torch.rand(len(WIDTHS), *(shape if per_row else (1, 1)), generator=generator) + 0.1
    inputs = layer.weight.shape[0 if transposed else 1]
    layer.mixture = Mixture(
        torch.rand(len(WIDTHS), 1, 1, generator=generator).softmax(0).requires_grad_(),
        clips,
        levels_of(WIDTHS),
        torch.rand(inputs, generator=generator).requires_grad_(),
        torch.rand(outputs, generator=generator).requires_grad_(),
    )
    return model, layer.mixture


def reference(layer: nn.Module, x: Tensor) -> Tensor:
    own = layer.mixture
    if isinstance(layer, nn.Conv2d):
        mixed = naive(layer.weight.flatten(1), own.shares, own.clips).view_as(layer.weight)
        out = F.conv2d(x * own.inputs[:, None, None], mixed, layer.bias, padding=1)
        return out * own.outputs[:, None, None]
    mixed = naive(layer.weight, own.shares, own.clips)
    weight = mixed.t() if isinstance(layer, Conv1D) else mixed
    return F.linear(x * own.inputs, weight, layer.bias) * own.outputs


def leaves(layer: nn.Module) -> list[Tensor]:
    return [layer.weight, layer.bias, layer.mixture.shares, layer.mixture.inputs, layer.mixture.outputs]


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (4, 3, 6)),
    "transposed": (lambda: Conv1D(5, 6), (4, 3, 6)),
    "conv": (lambda: nn.Conv2d(6, 5, 3, padding=1), (2, 6, 4, 4)),
}


@pytest.mark.parametrize("kernel", ["eager", "blocked"])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_values_and_gradients_are_those_of_the_formula(kind: str, per_row: bool, kernel: str) -> None:
    torch.manual_seed(0)
    build, shape = LAYERS[kind]
    layer = build()
    nn.init.normal_(layer.weight, std=0.3)
    make(layer, per_row)
    x = torch.randn(shape, requires_grad=True)
    wanted = reference(layer, x)
    grad = torch.randn_like(wanted)
    expected = torch.autograd.grad(wanted, [x, *leaves(layer)], grad)
    with using(kernel):
        found = layer(x)
    gradients = torch.autograd.grad(found, [x, *leaves(layer)], grad)
    torch.testing.assert_close(found, wanted)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kernel", ["eager", "blocked"])
def test_two_bits_may_have_four_levels(kernel: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 5, bias=False)
    model = nn.ModuleDict({"blocks": nn.ModuleList([layer])})
    attach_quantizers(model)
    shares = torch.tensor([0.7, 0.2, 0.1]).view(-1, 1, 1).requires_grad_()
    clips = torch.rand(len(WIDTHS), 5, 1) * 0.3 + 0.1
    own = Mixture(shares, clips, levels_of(WIDTHS, four_levels=True))
    four = fake_quantize(layer.weight, clips[0], clips[0], four_levels=True)
    others = [fake_quantize(layer.weight, clips[i] / (2 ** (WIDTHS[i] - 1) - 1), clips[i]) for i in (1, 2)]
    wanted = sum(share * value for share, value in zip(shares, [four, *others], strict=True))
    with using(kernel):
        found = mixed_weight(layer.weight, own)
    torch.testing.assert_close(found, wanted)
    grad = torch.randn_like(wanted)
    pairs = zip(*(torch.autograd.grad(out, [layer.weight, shares], grad) for out in (found, wanted)), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)


def test_blocks_of_rows_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geta_hf.quantization.mixture.BLOCK", 12)
    test_values_and_gradients_are_those_of_the_formula("linear", True, "blocked")


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYERS)
def test_compiled_values_are_those_of_the_formula(kind: str) -> None:
    for _ in range(2):
        test_values_and_gradients_are_those_of_the_formula(kind, True, "compiled")
    assert not Attempt.broken


def test_ordinary_operators_have_the_same_gradients() -> None:
    layer = nn.Linear(6, 5)
    make(layer)
    own = layer.mixture
    wanted = layer(torch.eye(6))
    expected = torch.autograd.grad(wanted.sum(), [layer.weight, own.shares])

    class Reader(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with Reader():
        found = layer(torch.eye(6))
    assert "MixedLinear" in str(wanted.grad_fn.next_functions) and "MixedLinear" not in str(
        found.grad_fn.next_functions
    )
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), [layer.weight, own.shares]), expected)


def test_untrained_parameters_get_zeros() -> None:
    layer = nn.Linear(6, 5)
    make(layer)
    layer(torch.ones(2, 6)).sum().backward()
    for value in layer.weight_quantizer.parameters():
        assert not value.requires_grad or bool((value.grad == 0).all())
    other = nn.Parameter(torch.ones(3))
    mixed_weight(layer.weight, layer.mixture, [other]).sum().backward()
    assert other.grad.tolist() == [0, 0, 0]


def test_a_layer_without_its_quantizer_has_no_mixture() -> None:
    layer = nn.Linear(6, 5)
    model, _ = make(layer)
    dense = copy.deepcopy(layer.weight.detach())
    x = torch.randn(2, 6)
    with without_quantizers(model):
        torch.testing.assert_close(layer(x), F.linear(x, dense, layer.bias))
    assert layer.mixture is not None
    detach_quantizers(model)
    assert not quantized_layers(model) and "mixture" not in vars(layer)
    torch.testing.assert_close(layer(x), F.linear(x, dense, layer.bias))
