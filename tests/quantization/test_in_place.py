"""Operators in place on what a quantized layer returns give outputs and gradients of their out-of-place versions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from geta_hf.quantization import attach_input_quantizers, attach_quantizers, freeze_quantizers
from geta_hf.quantization.functional import EAGER, fake_quantize
from geta_hf.quantization.kernels import using
from geta_hf.quantization.kernels.choice import outlined
from geta_hf.quantization.lora import LowRank


def _overwrite(x: Tensor) -> Tensor:
    x[:, 1:3, ::2] = 0.5
    return x


def _overwritten(x: Tensor) -> Tensor:
    mask = torch.zeros_like(x, dtype=torch.bool)
    mask[:, 1:3, ::2] = True
    return torch.where(mask, 0.5, x)


OPERATORS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "relu": (nn.ReLU(inplace=True), F.relu),
    "dropout": (nn.Dropout(0.5, inplace=True), nn.Dropout(0.5)),
    "residual": (lambda x: x.add_(torch.ones_like(x)), lambda x: x + 1),
    "scale": (lambda x: x.mul_(torch.linspace(0, 2, x.shape[-1])), lambda x: x * torch.linspace(0, 2, x.shape[-1])),
    "assignment": (_overwrite, _overwritten),
    "part": (lambda x: (x[:, 1:].sigmoid_(), x)[1], lambda x: torch.cat((x[:, :1], x[:, 1:].sigmoid()), 1)),
}


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([layer])
        for parameter in layer.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor, operator: Callable[[Tensor], Tensor] = torch.sin) -> Tensor:
        torch.manual_seed(1)  # dropout draws the same elements again
        return operator(self.layers[0](x))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(8, 6),
    "no bias": lambda: nn.Linear(8, 6, bias=False),
    "conv1d": lambda: Conv1D(6, 8),
    "conv2d": lambda: nn.Conv2d(3, 6, 3),
}


def gradients(model: nn.Module, x: Tensor, operator: Callable[[Tensor], Tensor]) -> list[Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x, operator)
    out.square().sum().backward()
    trained = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    return [out.detach(), x.grad, *trained]  # type: ignore[list-item]


def assert_in_place_changes_nothing(model: nn.Module, x: Tensor, names: tuple[str, ...] = tuple(OPERATORS)) -> None:
    for name in names:
        in_place, plain = OPERATORS[name]
        for ours, theirs in zip(gradients(model, x, in_place), gradients(model, x, plain), strict=True):
            assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("learn_t", [False, True])
def test_every_operator_on_every_layer(kind: str, per_channel: bool, learn_t: bool) -> None:
    model = Model(LAYERS[kind]())
    attach_quantizers(model, initial_bits=4, per_channel=per_channel, learn_t=learn_t)
    x = torch.randn(2, 3, 8, 8) if kind == "conv2d" else torch.randn(2, 5, 8)
    assert_in_place_changes_nothing(model, x)
    freeze_quantizers(model)
    assert_in_place_changes_nothing(model, x, ("relu", "residual"))


@pytest.mark.parametrize("transposed", [False, True])
def test_with_quantized_inputs_and_lora(transposed: bool) -> None:
    model = Model(LAYERS["conv1d" if transposed else "linear"]())
    attach_quantizers(model, initial_bits=4)
    attach_input_quantizers(model, [{"x": torch.randn(4, 5, 8)}], initial_bits=4)
    layer = model.layers[0]
    layer.weight.requires_grad_(False)
    layer.lora = LowRank(torch.randn(2, 8), torch.randn(6, 2), 0.5, transposed)
    for shape in ((2, 5, 8), (5, 3, 8)):
        assert_in_place_changes_nothing(model, torch.randn(shape))


def assert_rounded_values_can_be_modified() -> None:
    x, d, q_m = torch.randn(3, 5), torch.tensor([0.1]), torch.tensor([1.0])
    for leaf in (x.clone().requires_grad_(), x.t().clone().t().requires_grad_()):
        rounded = fake_quantize(leaf, d, q_m)
        rounded.mul_(2)
        rounded.sum().backward()
        assert torch.equal(leaf.grad, torch.where(leaf.detach().abs() <= 1, 2.0, 0.0))


@pytest.mark.parametrize("kernel", ["eager", "blocked", pytest.param("compiled", marks=pytest.mark.slow)])
def test_what_a_kernel_returns_can_be_modified(kernel: str) -> None:
    with using(kernel):
        assert_rounded_values_can_be_modified()


def test_so_can_a_view_that_a_kernel_returns() -> None:
    """As the compiled kernel does, which takes seconds to compile."""
    viewing = replace(EAGER, quantize=lambda x, *quantizer: EAGER.quantize(x, *quantizer).view(x.shape))
    with outlined(viewing):
        assert_rounded_values_can_be_modified()


def test_one_row_without_a_batch() -> None:
    model = Model(nn.Linear(8, 6))
    attach_quantizers(model, initial_bits=4)
    ours = gradients(model, torch.arange(8.0), OPERATORS["relu"][0])
    theirs = gradients(model, torch.arange(8.0), OPERATORS["relu"][1])
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))
