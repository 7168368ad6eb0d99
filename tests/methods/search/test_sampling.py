"""Shares of choices: the formulas, gradients, extreme temperatures, and the two schedules."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from geta_hf.methods.search.sampling import SAMPLING, one_hot, price_at, sample, temperature_at


def logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("sampling", ["softmax", "gumbel"])
def test_soft_shares_follow_their_formula(sampling: str) -> None:
    values = logits()
    torch.manual_seed(3)
    found = sample(values, 0.7, sampling)
    torch.manual_seed(3)
    wanted = F.gumbel_softmax(values, 0.7) if sampling == "gumbel" else torch.softmax(values / 0.7, -1)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("sampling", ["hard", "gumbel_hard"])
def test_hard_shares_are_one_choice_with_the_gradient_of_the_soft_ones(sampling: str) -> None:
    values, weight = logits(), torch.randn(5, 4)
    torch.manual_seed(3)
    found = sample(values, 0.7, sampling)
    assert found.detach().allclose(one_hot(found)) and bool((found.detach().sum(-1) == 1).all())
    (grad,) = torch.autograd.grad((found * weight).sum(), values)
    torch.manual_seed(3)
    soft = sample(values, 0.7, sampling.removesuffix("hard").removesuffix("_") or "softmax")
    torch.testing.assert_close(grad, torch.autograd.grad((soft * weight).sum(), values)[0])


def test_annealed_shares_become_exactly_one_choice_before_the_end() -> None:
    values = torch.tensor([[0.0, 1.0, 2.0]])
    shares = torch.softmax(values, -1)[0]
    stretched = [min(max(1.2 * float(share) - 0.1, 0.0), 1.0) for share in shares]
    wanted = [share / sum(stretched) for share in stretched]
    assert sample(values, 1.0, "annealed")[0].tolist() == pytest.approx(wanted)
    assert sample(values, 0.3, "annealed").tolist() == [[0.0, 0.0, 1.0]]


def test_hard_concrete_gates_open_one_option_after_the_other() -> None:
    values, weight = logits(), torch.randn(5, 4)
    torch.manual_seed(3)
    found = sample(values, 2 / 3, "hard_concrete")
    (grad,) = torch.autograd.grad((found * weight).sum(), values)
    torch.manual_seed(3)
    noise = [-torch.empty(5, 3).exponential_().log() for _ in range(2)]
    chances = torch.softmax(values, -1)
    wanted = torch.zeros(5, 4)
    for row in range(5):
        reached = torch.ones(())
        for option in range(4):
            gate = torch.zeros(())
            if option < 3:
                # Of those options that are left, all but this one.
                odds = chances[row, option + 1 :].sum() / chances[row, option]
                u = torch.sigmoid(noise[0][row, option] - noise[1][row, option])  # uniform
                concrete = torch.sigmoid((torch.log(u / (1 - u)) + torch.log(odds)) / (2 / 3))
                gate = (concrete * 1.2 - 0.1).clamp(0, 1)
            wanted[row, option] = reached * (1 - gate)
            reached = reached * gate
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(grad, torch.autograd.grad((wanted * weight).sum(), values)[0])


def test_hard_concrete_shares_are_the_residuals_of_bayesian_bits() -> None:
    values = logits()
    shares = sample(values, 2 / 3, "hard_concrete").detach()
    x2, x4, x8 = torch.randn(3)
    z2, z4, z8 = (shares[:, k:].sum(-1) / shares[:, k - 1 :].sum(-1).clamp_min(1e-30) for k in (1, 2, 3))
    nested = z2 * (x2 + z4 * ((x4 - x2) + z8 * (x8 - x4)))
    torch.testing.assert_close(shares @ torch.stack([torch.zeros(()), x2, x4, x8]), nested)


def test_hard_concrete_is_exactly_one_choice_as_often_as_its_formula_says() -> None:
    torch.manual_seed(0)
    share = sample(torch.tensor([[0.0, 0.5]]).expand(20_000, 2), 2 / 3, "hard_concrete")[:, 1]
    # P(z = 0) = sigmoid(τ log(γ / ζ) - log α), with the ends -γ = 0.1 and ζ = 1.1 of the stretched interval.
    closed, opened = (torch.sigmoid(torch.tensor(2 / 3 * math.log(0.1 / 1.1) + sign * 0.5)) for sign in (-1, 1))
    assert float((share == 0).float().mean()) == pytest.approx(float(closed), abs=0.01)
    assert float((share == 1).float().mean()) == pytest.approx(float(opened), abs=0.01)


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("temperature", [1e-30, 1e30])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_no_temperature_overflows(sampling: str, temperature: float, size: float) -> None:
    values = (logits().detach() * size).requires_grad_()
    shares = sample(values, temperature, sampling)
    (grad,) = torch.autograd.grad((shares * torch.arange(4.0)).sum(), values)
    assert bool(torch.isfinite(shares).all()) and bool(torch.isfinite(grad).all())
    torch.testing.assert_close(shares.detach().sum(-1), torch.ones(5))


def test_schedules_start_and_end_where_they_should() -> None:
    found = [temperature_at(step, 11, 2.0, 0.02) for step in range(13)]
    assert found[0] == 2 and found[10] == pytest.approx(0.02) == found[12]
    assert all(after / before == pytest.approx(0.01**0.1) for before, after in pairwise(found[:11]))
    # λ/100 + e · 0.99 λ / (E / 2), at most λ.
    assert [price_at(step, 8, 4.0) for step in (0, 2, 4, 7)] == pytest.approx([0.04, 2.02, 4.0, 4.0])
    assert temperature_at(0, 1, 1.0, 0.5) == 1.0
