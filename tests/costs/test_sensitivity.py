"""Widths by sensitivity: errors against the quantizer itself, greedy spending against all allocations."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from geta_hf.costs import sensitivity
from geta_hf.costs.quantizer_table import Quantizers
from geta_hf.costs.sensitivity import (
    RoundingErrors,
    allocate,
    by_learned_width,
    by_sensitivity,
    measure_errors,
    nearest,
    rounding_errors,
)
from geta_hf.quantization import attach_quantizers
from geta_hf.quantization.clipping import BINS, PER_OCTAVE, clipping_value
from geta_hf.quantization.functional import quantize, step_size
from geta_hf.utils.shards import Shard

WIDTHS = (2, 3, 4, 6, 8)
ONE = torch.ones(1)


def test_errors_are_those_of_the_quantizer() -> None:
    torch.manual_seed(0)
    x, q_m = torch.randn(20_000), torch.tensor([2.5])
    errors, clips = rounding_errors(x, q_m, ONE, WIDTHS, search=False)
    assert clips.tolist() == [[1] * 5]
    for bits, error in zip(WIDTHS, errors, strict=True):
        d = step_size(bits, q_m, torch.ones(1))
        assert error.item() == pytest.approx(float(((quantize(x, d, q_m) - x) ** 2).sum()), rel=2e-3)


def test_a_searched_clipping_value_is_never_worse_and_narrow_widths_clip_more() -> None:
    torch.manual_seed(1)
    x = torch.randn(20_000)
    q_m = x.abs().max()
    kept, _ = rounding_errors(x, q_m, ONE, WIDTHS, search=False)
    found, clips = rounding_errors(x, q_m, ONE, WIDTHS, search=True)
    assert (found <= kept).all() and found[0] < kept[0] / 2
    assert clips[0].tolist() == sorted(clips[0].tolist())
    clip = q_m * clips[0, 1]
    d = step_size(3, clip, torch.ones(1))
    assert found[1].item() == pytest.approx(float(((quantize(x, d, clip) - x) ** 2).sum()), rel=2e-3)


def test_channels_are_weighted_by_their_own_scale() -> None:
    torch.manual_seed(2)
    x = torch.randn(4, 5000) * torch.tensor([[1.0], [10.0], [0.1], [3.0]])
    q_m = x.abs().amax(1, keepdim=True)
    errors, _ = rounding_errors(x, q_m, ONE, (4,), search=False)
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


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_each_channel_gets_its_own_best_clipping_value(dim: int, scale: float) -> None:
    """Before, one factor served all channels; and squares of 1e20 were infinite."""
    torch.manual_seed(4)
    rows = torch.randn(4, 3000) * torch.tensor([[1.0], [10.0], [0.1], [3.0]]) * scale
    rows[1, 0] *= 60
    rows[3] = 0
    present = torch.tensor([2.0, 2.0, 1.0, 5.0])[:, None] * scale
    x, clip = (rows, present) if dim == 0 else (rows.t(), present.t())
    errors, factors = rounding_errors(x, clip, ONE, (2, 4), search=True)
    assert factors.shape == (4, 2) and factors[3].tolist() == [1, 1]
    for place, bits in enumerate((2, 4)):
        wanted = [clipping_value(row, bits) for row in rows[:3]]
        assert (factors[:3, place] * present[:3, 0]).tolist() == pytest.approx(wanted, rel=1e-4)
        q_m = torch.tensor(wanted)[:, None]
        exact = quantize(rows[:3], step_size(bits, q_m, ONE), q_m).double() - rows[:3].double()
        assert errors[place].item() == pytest.approx(exact.square().sum().item(), rel=5e-3)


@pytest.mark.parametrize("search", [True, False])
def test_channels_on_two_processes_add_up_to_those_of_one(monkeypatch, search: bool) -> None:
    torch.manual_seed(6)
    x = torch.randn(5, 800) * torch.tensor([1.0, 4.0, 0.2, 1.0, 2.0])[:, None]
    clip = x.abs().amax(1, keepdim=True) * 0.8
    whole = rounding_errors(x, clip, ONE, (2, 4), search)
    top = (x.abs() / clip).max()
    monkeypatch.setattr(sensitivity, "add_up", lambda values, shard: values)
    monkeypatch.setattr(sensitivity, "largest_of", lambda value, shard: value if shard is None else top.clone())
    parts = []
    for start, stop in ((0, 3), (3, 5), (5, 5)):
        shard = Shard(0, start, stop, None)  # type: ignore[arg-type]
        if search or stop > start:
            parts.append(rounding_errors(x[start:stop], clip, ONE, (2, 4), search, shard))
    torch.testing.assert_close(sum(errors for errors, _ in parts), whole[0], rtol=1e-5, atol=0)
    if search:
        torch.testing.assert_close(sum(factors for _, factors in parts), whole[1])


def test_clipping_values_at_chosen_widths() -> None:
    clips = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    known = torch.ones(2, dtype=torch.bool)
    errors = RoundingErrors(torch.zeros(2, 2), clips, known, torch.tensor([0, 1, 1]))
    assert errors.clips_at([1, 0]).tolist() == pytest.approx([0.2, 0.3, 0.5])
    alone = RoundingErrors(torch.zeros(3, 2), clips, torch.ones(3, dtype=torch.bool))
    assert alone.clips_at([1, 0, 1]).tolist() == pytest.approx([0.2, 0.3, 0.6])


def test_errors_of_learned_exponents_are_those_of_what_is_rounded() -> None:
    torch.manual_seed(5)
    x, q_m, t = torch.randn(4000), torch.tensor([2.0]), torch.tensor([1.3])
    errors, _ = rounding_errors(x, q_m, t, (3, 5), search=False)
    values = x.abs() ** 1.3
    for error, bits in zip(errors, (3, 5), strict=True):
        d = 2.0**1.3 / (2 ** (bits - 1) - 1)
        assert error.item() == pytest.approx(
            ((values.clamp(max=2.0**1.3) / d).round() * d - values).square().sum().item(), rel=5e-3
        )


def test_a_layer_of_zeros_keeps_its_clipping_value() -> None:
    for search in (True, False):
        errors, clips = rounding_errors(torch.zeros(5, 5), torch.tensor([0.7]), ONE, (2, 4), search)
        assert errors.tolist() == [0, 0] and clips.tolist() == [[1, 1]]


@pytest.mark.parametrize("shape", [(64, 32), (7,), (3, 5, 4)])
@pytest.mark.parametrize("channel_dim", [None, 0, -1])
def test_histograms_are_those_of_a_weighted_bincount_without_its_use(
    monkeypatch, shape: tuple[int, ...], channel_dim: int | None
) -> None:
    """On a GPU a weighted `bincount` has no deterministic form, and `index_add_` adds in any order."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).abs()
    sizes = [1] * len(shape)
    if channel_dim is not None:
        sizes[channel_dim] = shape[channel_dim]
    clip = torch.rand(sizes, generator=torch.Generator().manual_seed(1)) + 0.1
    seen = []
    measure = sensitivity.squared_error
    monkeypatch.setattr(
        sensitivity,
        "squared_error",
        lambda counts, *rest, **named: seen.append(counts) or measure(counts, *rest, **named),
    )
    bincount = torch.bincount

    def without_weights(values, weights=None, minlength=0):
        assert weights is None
        return bincount(values, minlength=minlength)

    def nowhere(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(torch, "bincount", without_weights)
    monkeypatch.setattr(torch.Tensor, "index_add_", nowhere)
    rounding_errors(x, clip, ONE, (4,), search=False)
    relative = x / clip
    share = ((clip / clip.max()) ** 2).expand(shape)
    position = (PER_OCTAVE * (relative.max().log2() - relative.log2())).long().clamp(max=BINS - 1)
    wanted = bincount(position.flatten(), share.flatten(), minlength=BINS)
    assert seen[0].sum().item() == pytest.approx(wanted.sum().item())
    # An element at the border of two bins may fall into either.
    apart = (seen[0].cumsum(0) - wanted.cumsum(0)).abs() > 1e-4 * wanted.sum()
    assert apart.sum() <= 3


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("conv1d", [False, True])
def test_errors_of_blocks_are_those_of_rounding_each(conv1d: bool, search: bool) -> None:
    torch.manual_seed(0)
    layer = Conv1D(5, 70) if conv1d else torch.nn.Linear(70, 5)
    model = torch.nn.ModuleDict({"a": torch.nn.ModuleList([layer])})
    attach_quantizers(model, grid="block32", learn_t=not search, initial_bits=6)
    own = layer.weight_quantizer
    own.t.data.fill_(1.0 if search else 1.2)
    own.q_m.data.mul_(0.5)
    own.set_order(torch.randperm(70))
    named = dict(model.named_parameters())
    prefix = "a.0.weight_quantizer"
    table = Quantizers({"a.0.weight": prefix}, [], named, {prefix: own.channel_dim}, {prefix: own})
    found = measure_errors(table, table.read(named), named.get, (2, 4), search)
    rows = (layer.weight.t() if conv1d else layer.weight).detach()
    for column, bits in enumerate((2, 4)):
        clips = found.clips[:, column].view(5, 3) * own.q_m.detach()
        total = 0.0
        for place, member in enumerate(own.order.tolist()):
            z = rows[:, member].abs() ** float(own.t.detach())
            clip = clips[:, place // 32] ** float(own.t.detach())
            step = clip / (2 ** (bits - 1) - 1)
            total += float(((torch.minimum(z, clip) / step).round() * step - z).square().sum())
        assert float(found.errors[0, column]) == pytest.approx(total, rel=1e-3)
