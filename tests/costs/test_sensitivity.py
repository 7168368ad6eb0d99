"""Widths by sensitivity: errors against the quantizer itself, greedy spending against all allocations."""

from __future__ import annotations

import itertools

import pytest
import torch

from geta_hf.costs import sensitivity
from geta_hf.costs.sensitivity import allocate, by_learned_width, by_sensitivity, nearest, rounding_errors
from geta_hf.quantization.clipping import BINS
from geta_hf.quantization.functional import quantize, step_size

WIDTHS = (2, 3, 4, 6, 8)


def test_errors_are_those_of_the_quantizer() -> None:
    torch.manual_seed(0)
    x, q_m = torch.randn(20_000), torch.tensor([2.5])
    errors, clips = rounding_errors(x.abs() / q_m, q_m**2, WIDTHS, search=False)
    assert clips.tolist() == [1] * 5
    for bits, error in zip(WIDTHS, errors, strict=True):
        d = step_size(bits, q_m, torch.ones(1))
        assert error.item() == pytest.approx(float(((quantize(x, d, q_m) - x) ** 2).sum()), rel=2e-3)


def test_a_searched_clipping_value_is_never_worse_and_narrow_widths_clip_more() -> None:
    torch.manual_seed(1)
    x = torch.randn(20_000)
    q_m = x.abs().max()
    kept, _ = rounding_errors(x.abs() / q_m, q_m**2, WIDTHS, search=False)
    found, clips = rounding_errors(x.abs() / q_m, q_m**2, WIDTHS, search=True)
    assert (found <= kept).all() and found[0] < kept[0] / 2
    assert clips.tolist() == sorted(clips.tolist())
    d = step_size(3, q_m * clips[1], torch.ones(1))
    assert found[1].item() == pytest.approx(float(((quantize(x, d, q_m * clips[1]) - x) ** 2).sum()), rel=2e-3)


@pytest.mark.parametrize("search", [False, True])
def test_a_weight_of_zeros_costs_nothing_and_keeps_its_range(search: bool) -> None:
    errors, clips = rounding_errors(torch.zeros(4, 50), torch.ones(1), WIDTHS, search)
    assert errors.tolist() == [0] * 5 and clips.tolist() == [1] * 5


def test_channels_are_weighted_by_their_own_scale() -> None:
    torch.manual_seed(2)
    x = torch.randn(4, 5000) * torch.tensor([[1.0], [10.0], [0.1], [3.0]])
    q_m = x.abs().amax(1, keepdim=True)
    errors, _ = rounding_errors(x.abs() / q_m, q_m**2, (4,), search=False)
    wanted = ((quantize(x, step_size(4, q_m, torch.ones(1)), q_m) - x) ** 2).sum()
    assert errors.item() == pytest.approx(wanted.item(), rel=2e-3)


def test_a_budget_that_comes_out_even_is_spent_to_the_last_step() -> None:
    weights = torch.tensor([512.0, 1024, 1312, 1312, 1312, 512, 1024], dtype=torch.float64)
    cost = (weights / weights.sum())[:, None].expand(7, 5)
    priority = -torch.arange(5.0).expand(7, 5)
    assert allocate(priority, cost[None], [3.0]) == [3] * 7


def test_every_budget_limits_what_is_spent() -> None:
    cost = torch.tensor([[[1.0], [1.0], [1.0]], [[5.0], [1.0], [1.0]]])
    assert allocate(torch.tensor([[3.0], [2.0], [1.0]]), cost, [2.0, 4.0]) == [0, 1, 1]


@pytest.mark.parametrize("budget", [0.0, 3.0, 7.5, 11.0, 100.0])
def test_spending_is_the_best_of_all_allocations_up_to_one_step(budget: float) -> None:
    """Greedy is optimal at every total it passes; between two of them it is off by less than one step's gain."""
    torch.manual_seed(3)
    size = torch.tensor([1.0, 2.0, 1.0])
    errors = torch.rand(3, 1) * 4.0 ** -torch.arange(5.0)  # convex, as rounding errors are
    cost = size[:, None].expand(3, 4)
    priority = by_sensitivity(errors, torch.tensor([1.0, 0.5, 3.0]), cost)
    steps = allocate(priority, cost[None], [budget])
    gains = priority * cost

    def gain(chosen: tuple[int, ...]) -> float:
        return sum(float(gains[layer, :count].sum()) for layer, count in enumerate(chosen))

    def spent(chosen: tuple[int, ...]) -> float:
        return sum(float(cost[layer, :count].sum()) for layer, count in enumerate(chosen))

    best = max((c for c in itertools.product(range(5), repeat=3) if spent(c) <= budget), key=gain)
    assert spent(tuple(steps)) <= budget and spent(tuple(steps)) > min(budget, 16) - 2
    assert gain(tuple(steps)) >= gain(best) - float(gains.max()) * (gain(best) != gain(tuple(steps)))
    if budget in (0.0, 100.0):
        assert tuple(steps) == best


def test_learned_widths_move_together() -> None:
    bits = torch.tensor([7.9, 5.0, 4.1], dtype=torch.float64)
    widths = [4, 5, 6, 7, 8]
    priority = by_learned_width(bits, widths)
    cost = torch.ones(3, 4)
    assert allocate(priority, cost[None], [5]) == [4, 1, 0]
    assert allocate(priority, cost[None], [2]) == [2, 0, 0]
    assert allocate(priority, cost[None], [12]) == [4, 4, 4]


def test_the_nearest_allowed_width() -> None:
    assert nearest(torch.tensor([3.0, 5.9, 6.0, 6.1, 9.0]), [4, 8]) == [4, 4, 8, 8, 8]


@pytest.mark.parametrize("shape", [(64, 32), (7,), (3, 5, 4)])
@pytest.mark.parametrize("channel_dim", [None, 0, -1])
def test_histograms_are_those_of_a_weighted_bincount_without_its_use(
    monkeypatch, shape: tuple[int, ...], channel_dim: int | None
) -> None:
    """On a GPU a weighted `bincount` has no deterministic form, and `index_add_` adds in any order."""
    monkeypatch.setattr(sensitivity, "_COUNTS", 2 * BINS)  # several rounds
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).abs()
    sizes = [1] * len(shape)
    if channel_dim is not None:
        sizes[channel_dim] = shape[channel_dim]
    # Integers, whose sums are exact in any order.
    weight = torch.randint(1, 9, sizes, generator=torch.Generator().manual_seed(1)).float()
    seen = []
    search = sensitivity.search_clipping
    monkeypatch.setattr(
        sensitivity, "search_clipping", lambda counts, *rest: seen.append(counts) or search(counts, *rest)
    )
    bincount = torch.bincount

    def without_weights(values, weights=None, minlength=0):
        assert weights is None
        return bincount(values, minlength=minlength)

    def nowhere(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(torch, "bincount", without_weights)
    monkeypatch.setattr(torch.Tensor, "index_add_", nowhere)
    rounding_errors(x, weight, (4,), search=False)
    position = (x * (BINS / x.max())).long().clamp(max=BINS - 1)
    assert torch.equal(seen[0], bincount(position.flatten(), weight.expand(shape).flatten(), minlength=BINS))
