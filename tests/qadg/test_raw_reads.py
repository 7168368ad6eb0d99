"""A weight that something other than its layer's forward reads is found, in either mode, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from geta_hf.qadg.propagation.propagate import record_and_propagate
from geta_hf.qadg.tracing.raw_reads import find_raw_reads, recorded_raw_reads
from geta_hf.quantization.layer_types import PLAIN_TYPES


class Uses(nn.Module):
    """Passes a layer and its input to a function."""

    def __init__(self, layer: nn.Module, use: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


class Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.t()


def eval_only(self: Uses, x: Tensor) -> Tensor:
    return self.layer(x) if self.training else F.linear(x, self.layer.weight)


def train_only(self: Uses, x: Tensor) -> Tensor:
    return F.linear(x, self.layer.weight) if self.training else self.layer(x)


RAW: dict[str, Callable[[Uses, Tensor], Tensor]] = {
    "the weight": lambda self, x: F.linear(x, self.layer.weight),
    "its data": lambda self, x: F.linear(x, self.layer.weight.data),
    "a view of it": lambda self, x: x @ self.layer.weight.t()[:, :4],
    "a cast": lambda self, x: x.double() @ self.layer.weight.double().t(),
    "by the class's forward": lambda self, x: nn.Linear.forward(self.layer, x),
    "a function of its own": lambda self, x: Kernel.apply(x, self.layer.weight),
    "changed in place": lambda self, x: (self.layer.weight.data.clamp_(-9, 9), self.layer(x))[1],
    "as well as the layer": lambda self, x: self.layer(x) + F.linear(x, self.layer.weight),
    "in evaluation": eval_only,
    "in training": train_only,
}
CALLED: dict[str, Callable[[Uses, Tensor], Tensor]] = {
    "the layer": lambda self, x: self.layer(x),
    "its forward": lambda self, x: self.layer.forward(x),
    "shape and dtype": lambda self, x: self.layer(x.to(self.layer.weight.dtype)) * self.layer.weight.shape[0],
    "the bias": lambda self, x: self.layer(x) + self.layer.bias,
}


def found(model: nn.Module, **batch: Tensor) -> list[str]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PLAIN_TYPES)}
    return find_raw_reads(model, layers, batch)


@pytest.mark.parametrize("how", RAW)
def test_reads_past_the_forward_are_found(how: str) -> None:
    assert found(Uses(nn.Linear(8, 6), RAW[how]), x=torch.randn(2, 8)) == ["layer"]


@pytest.mark.parametrize("how", CALLED)
def test_a_layer_that_is_called_is_not(how: str) -> None:
    assert found(Uses(nn.Linear(8, 6), CALLED[how]), x=torch.randn(2, 8)) == []


def test_other_kinds_of_layers() -> None:
    conv = Uses(nn.Conv2d(3, 4, 3), lambda self, x: self.layer._conv_forward(x, self.layer.weight, None))
    assert found(conv, x=torch.randn(1, 3, 5, 5)) == ["layer"]
    assert found(Uses(Conv1D(6, 8), lambda self, x: x @ self.layer.weight), x=torch.randn(2, 8)) == ["layer"]


def test_the_fast_path_of_torch_in_evaluation_and_its_attention() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.randn(2, 3, 8)
    assert found(model, src=x) == ["self_attn.out_proj", "linear1", "linear2"]
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert find_raw_reads(model, layers, {"src": x}, modes=(True,)) == ["self_attn.out_proj"]


def test_a_tied_weight_may_be_read_by_either_layer() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    assert found(model, input=torch.randn(2, 8)) == []
    layers = {"0": model[0]}
    assert find_raw_reads(model, layers, {"input": torch.randn(2, 8)}) == ["0"]  # 1 is not to be quantized


def test_a_recording_shows_the_same_without_weights() -> None:
    for uses, expected in ((RAW["a view of it"], ["layer"]), (CALLED["shape and dtype"], [])):
        model = Uses(nn.Linear(8, 6, device="meta"), uses)
        graph = record_and_propagate(model, {"x": torch.randn(2, 8)}).graph
        assert recorded_raw_reads(graph, model, {"layer": model.layer}) == expected


def test_a_mode_that_fails_finds_nothing_and_the_model_is_as_before() -> None:
    def use(self: Uses, x: Tensor) -> Tensor:
        if self.training:
            self.norm.running_mean.add_(1)
            self.last = x
            torch.rand(1), np.random.rand()
            raise ValueError("training needs labels")
        return F.linear(x, self.layer.weight)

    model = Uses(nn.Linear(8, 6), use)
    model.norm = nn.BatchNorm1d(8)
    model.layer.train()
    before = [module.training for module in model.modules()]
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert found(model, x=torch.randn(2, 8, generator=torch.Generator())) == ["layer"]
    assert not model.norm.running_mean.any() and "last" not in vars(model) and "forward" not in vars(model.layer)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
