"""The quantizer as a module: one pair (d, q_m) or one per channel, and its fixed form after training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from geta_hf.quantization import (
    FixedQuantizer,
    Quantizer,
    fixed_quantizer,
    step_size,
)

LAYERS = {"linear": nn.Linear(6, 4), "conv1d": Conv1D(4, 6), "conv2d": nn.Conv2d(3, 4, 3)}
DIM = {"linear": 0, "conv1d": 1, "conv2d": 0}


def weight_of(kind: str) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(LAYERS[kind].weight.shape, requires_grad=True)


@pytest.mark.parametrize("learn_t", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_channels_are_quantized_and_differentiated_each_for_itself(kind: str, learn_t: bool) -> None:
    weight, dim = weight_of(kind), DIM[kind]
    q_m = torch.tensor([0.5, 0.9, 1.3, 1.7])
    whole = Quantizer(q_m, 4, learn_t, channel_dim=dim)
    seed = torch.randn(weight.shape)
    whole(weight).backward(seed)
    exponents = []
    for channel in range(4):
        row = weight.detach().select(dim, channel).clone().requires_grad_()
        one = Quantizer(float(q_m[channel]), 4, learn_t)
        found = one(row)
        found.backward(seed.select(dim, channel))
        exponents.append(one.t.grad)
        assert torch.equal(whole(weight).select(dim, channel), found)
        assert torch.equal(whole.codes(weight).select(dim, channel), one.codes(row))
        torch.testing.assert_close(weight.grad.select(dim, channel), row.grad)
        torch.testing.assert_close(whole.d.grad[channel], one.d.grad[0])
        torch.testing.assert_close(whole.q_m.grad[channel], one.q_m.grad[0])
    if learn_t:
        torch.testing.assert_close(whole.t.grad, torch.stack(exponents).sum(dim=0))
    assert whole.d.grad.unique().numel() == 4
    torch.testing.assert_close(whole.bits(), torch.full((4,), 4.0))


def test_a_frozen_quantizer_passes_gradients_to_the_tensor_alone() -> None:
    weight = weight_of("linear")
    quantizer = Quantizer(0.5, 4, channel_dim=0)
    assert quantizer.frozen is False and quantizer.t.shape == (1,)
    quantizer.frozen = True
    quantizer(weight).sum().backward()
    assert torch.equal(weight.grad, (weight.abs() <= 0.5).float())
    assert not any(p.grad is not None and p.grad.any() for p in quantizer.parameters())


@pytest.mark.parametrize("learn_t", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_fixed_quantizer_gives_the_very_values_of_the_trained_one(bits: int, learn_t: bool) -> None:
    torch.manual_seed(0)
    trained = Quantizer(1.1, 8, learn_t)
    with torch.no_grad():
        trained.t.copy_(torch.tensor([1.3 if learn_t else 1.0]))
        trained.d.copy_(step_size(bits, trained.q_m, trained.t))
    fixed = fixed_quantizer(trained, bits)
    x = torch.cat([torch.randn(2000), trained.q_m.detach() * torch.tensor([1.0, -1.0, 1 - 1e-6, 5.0])])
    assert torch.equal(fixed(x), trained(x))
    assert fixed.scale.shape == ((2,) if learn_t else (1,))
    assert torch.equal(FixedQuantizer(fixed.scale, bits)(x), trained(x))
    assert not list(fixed.parameters()) and not fixed.state_dict()
    x.requires_grad_()
    fixed(x).sum().backward()
    assert x.grad.unique().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("kind", ["trained", "fixed"])
def test_no_cast_of_the_model_rounds_a_step_size(kind: str) -> None:
    quantizer = Quantizer(0.7, 8)
    module = quantizer if kind == "trained" else fixed_quantizer(quantizer, 8)
    before = [module.d.clone(), module.q_m.clone()]
    model = nn.Sequential(nn.Linear(2, 2), module).to(torch.bfloat16).half().double()
    assert model[0].weight.dtype == torch.float64
    assert all(torch.equal(a, b) for a, b in zip(before, [module.d, module.q_m], strict=True))


def test_channels_that_leave_take_their_scales_along() -> None:
    quantizer = Quantizer(torch.tensor([1.0, 2.0, 3.0]), 4, channel_dim=0)
    quantizer.q_m.requires_grad_(False)
    old = quantizer.d.detach().clone()
    quantizer.keep_channels(torch.tensor([0, 2]))
    assert torch.equal(quantizer.q_m, torch.tensor([1.0, 3.0])) and torch.equal(quantizer.d, old[[0, 2]])
    assert quantizer.d.requires_grad and not quantizer.q_m.requires_grad


@pytest.mark.parametrize(("channel_dim", "bits"), [(None, 4), (0, 4), (1, 3), (None, 2)])
def test_codes_are_those_that_training_rounds_to_where_an_exponent_is_learned(
    channel_dim: int | None, bits: int
) -> None:
    """Next to where a code changes, as trained weights are, the last digit of a power decides."""
    generator = torch.Generator().manual_seed(0)
    size = 512  # as large as those that compiled kernels take
    q_m = 0.2 if channel_dim is None else torch.full((size,), 0.2)
    quantizer = Quantizer(q_m, bits, channel_dim=channel_dim, learn_t=True)
    with torch.no_grad():
        quantizer.t.fill_(0.97)
        quantizer.d.fill_(0.2**0.97 / (2 ** (bits - 1) - 1))
    lower = torch.randint(0, 2 ** (bits - 1) - 1, (size, size), generator=generator).double()
    edges = ((lower + 0.5) * quantizer.d.detach().flatten()[0].double()) ** (1 / 0.97)
    weight = edges.float() * (torch.randint(0, 2, (size, size), generator=generator) * 2 - 1)
    step, _ = quantizer.broadcast_over(weight)
    assert torch.equal(quantizer.codes(weight) * step, quantizer(weight))
