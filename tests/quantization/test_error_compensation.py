"""Rounding and cutting with compensation, against column-by-column OBQ in float64 and `torch.linalg.lstsq`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from geta_hf.errors import GETAError
from geta_hf.quantization.error_compensation import (
    compensate_removed_inputs,
    follow_dense_inputs,
    output_error,
    round_compensated,
    within_bins,
)
from geta_hf.quantization.functional import quantize, quantize_four_levels, step_size

ROWS, COLUMNS = 6, 12


def inputs(seed: int, tokens: int = 200) -> Tensor:
    """Return correlated inputs of very different sizes, float64, shape (tokens, COLUMNS)."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS, generator=generator)
    return (mixed * torch.linspace(0.1, 2.0, COLUMNS)).double()


def layer(seed: int, bits: int, per_channel: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weight, and d and q_m of its quantizer."""
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed + 100))
    q_m = 0.8 * (weight.abs().amax(1) if per_channel else weight.abs().max().reshape(1))
    return weight, step_size(bits, q_m, torch.ones(1)), q_m


def obq(weight: Tensor, sigma: Tensor, d: Tensor, q_m: Tensor, order: list[int]) -> Tensor:
    """Round column by column in a fixed order, each time with the inverse of the remaining Hessian (OBQ, Eq. 2)."""
    work = weight.double().clone()
    remaining = list(order)
    rounded = torch.zeros_like(work)
    for column in order:
        inverse = torch.linalg.inv(sigma[remaining][:, remaining])
        place = remaining.index(column)
        value = work[:, column : column + 1].clone()
        rounded[:, column : column + 1] = quantize(value, d.double().reshape(-1, 1), q_m.double().reshape(-1, 1))
        error = (value - rounded[:, column : column + 1]) / inverse[place, place]
        work[:, remaining] -= error * inverse[place]
        remaining.remove(column)
    return rounded


def damped(sigma: Tensor, damping: float) -> Tensor:
    return sigma + damping * sigma.diagonal().mean() * torch.eye(len(sigma), dtype=sigma.dtype)


@pytest.mark.parametrize("by_activation", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("block", [1, 5, 128])
def test_rounding_is_obq_in_a_fixed_order(by_activation: bool, per_channel: bool, block: int):
    for seed, bits in ((0, 3), (1, 4)):
        x = inputs(seed)
        sigma = x.t() @ x / len(x)
        weight, d, q_m = layer(seed, bits, per_channel)
        found = round_compensated(weight, sigma, d, q_m, by_activation=by_activation, damping=0.05, block=block)
        order = torch.argsort(sigma.diagonal(), descending=True) if by_activation else torch.arange(COLUMNS)
        expected = obq(weight, damped(sigma, 0.05), d, q_m, order.tolist())
        nearest = quantize(weight.double(), d.double().reshape(-1, 1), q_m.double().reshape(-1, 1))
        # A channel for which rounding to nearest is better is rounded to nearest.
        better = output_error(weight - nearest, sigma) < output_error(weight - expected, sigma)
        expected[better] = nearest[better]
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_a_step_size_of_each_weight_follows_the_order_of_the_columns():
    x = inputs(3)
    sigma = x.t() @ x / len(x)
    weight, _, _ = layer(3, 3, True)
    # As blocks of 4 columns have it.
    q_m = weight.abs().view(ROWS, -1, 4).amax(2).repeat_interleave(4, 1)
    d = step_size(3, q_m, torch.ones(1))
    found = round_compensated(weight, sigma, d, q_m, damping=0.05)
    work, remaining, expected = weight.double().clone(), list(range(COLUMNS)), torch.zeros(ROWS, COLUMNS).double()
    for column in torch.argsort(sigma.diagonal(), descending=True).tolist():
        inverse = torch.linalg.inv(damped(sigma, 0.05)[remaining][:, remaining])
        place = remaining.index(column)
        value = work[:, column].clone()
        step, clip = d[:, column].double(), q_m[:, column].double()
        expected[:, column] = (value.clamp(-clip, clip) / step).round() * step
        error = (value - expected[:, column]) / inverse[place, place]
        work[:, remaining] -= error[:, None] * inverse[place]
        remaining.remove(column)
    nearest = quantize(weight.double(), d.double(), q_m.double())
    better = output_error(weight - nearest, sigma) < output_error(weight - expected, sigma)
    expected[better] = nearest[better]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_no_channel_is_worse_than_rounded_to_nearest():
    gained = []
    for seed in range(8):
        x = inputs(seed)
        sigma = x.t() @ x
        weight, d, q_m = layer(seed, 3, True)
        found = round_compensated(weight, sigma, d, q_m)
        nearest = quantize(weight, d[:, None], q_m[:, None])
        ours = ((weight - found).double() @ x.t()).square().sum(1)
        theirs = ((weight - nearest).double() @ x.t()).square().sum(1)
        assert (ours <= theirs * (1 + 1e-5)).all()
        gained.append(float(ours.sum() / theirs.sum()))
    assert sum(gained) / len(gained) < 0.7


def test_every_value_is_on_its_grid():
    weight, d, q_m = layer(0, 3, True)
    found = round_compensated(weight, inputs(0).t() @ inputs(0), d, q_m)
    codes = found / d[:, None]
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    assert codes.abs().max() <= 3 + 1e-4
    # The quantizer itself leaves it as it is.
    assert torch.equal(quantize(found, d[:, None], q_m[:, None]), found)


def test_both_orientations_agree():
    x = inputs(2)
    weight, d, q_m = layer(2, 4, True)
    sigma = x.t() @ x
    transposed = round_compensated(weight.t().contiguous(), sigma, d, q_m, channel_dim=1)
    assert torch.equal(transposed.t(), round_compensated(weight, sigma, d, q_m))
    kept = torch.arange(COLUMNS) % 3 != 0
    changed = compensate_removed_inputs(weight.t().contiguous(), sigma, kept, channel_dim=1)
    assert torch.equal(changed.t(), compensate_removed_inputs(weight, sigma, kept))


def test_inputs_that_are_always_zero_change_nothing():
    x = inputs(3)
    x[:, [0, 7]] = 0.0
    sigma = x.t() @ x
    weight, d, q_m = layer(3, 4, False)
    alive = x.abs().sum(0) > 0
    found = round_compensated(weight, sigma, d, q_m, damping=0.0)
    assert bool(torch.isfinite(found).all())
    fewer = round_compensated(weight[:, alive].contiguous(), sigma[alive][:, alive], d, q_m, damping=0.0)
    torch.testing.assert_close(found[:, alive], fewer, rtol=0, atol=1e-5)


def test_least_squares_is_that_of_torch_on_the_activations():
    for seed in range(4):
        x = inputs(seed)
        weight = layer(seed, 4, False)[0].double()
        kept = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(seed)) > 0.4
        found = compensate_removed_inputs(weight, x.t() @ x / len(x), kept, damping=0.0)
        expected = torch.linalg.lstsq(x[:, kept], x @ weight.t()).solution.t()
        torch.testing.assert_close(found[:, kept], expected, rtol=1e-5, atol=1e-6)
        assert not found[:, ~kept].any()


def test_damping_draws_weights_to_what_they_were():
    x = inputs(5)
    weight = layer(5, 4, False)[0].double()
    kept = torch.arange(COLUMNS) % 2 == 0
    found = compensate_removed_inputs(weight, x.t() @ x, kept, damping=1e9)
    torch.testing.assert_close(found[:, kept], weight[:, kept], rtol=1e-5, atol=1e-6)


def test_all_inputs_may_be_removed():
    weight = layer(5, 4, False)[0]
    none = torch.zeros(COLUMNS, dtype=torch.bool)
    assert not compensate_removed_inputs(weight, torch.eye(COLUMNS), none).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_overflow_are_an_error(bad: float):
    weight, d, q_m = layer(0, 4, False)
    sigma = torch.eye(COLUMNS)
    sigma[2, 2] = bad
    with pytest.raises(GETAError, match="not finite"):
        round_compensated(weight, sigma, d, q_m)
    with pytest.raises(GETAError, match="not finite"):
        compensate_removed_inputs(weight, sigma, torch.arange(COLUMNS) > 0)


def test_a_covariance_of_low_rank_is_damped_until_it_can_be_used():
    x = inputs(6, tokens=4)
    weight, d, q_m = layer(6, 4, True)
    found = round_compensated(weight, x.t() @ x, d, q_m, damping=0.0)
    assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_covariances_stay_as_they_are(dtype: torch.dtype):
    sigma = inputs(7).t().to(dtype) @ inputs(7).to(dtype)
    before = sigma.clone()
    weight, d, q_m = layer(7, 4, False)
    round_compensated(weight, sigma, d, q_m)
    follow_dense_inputs(weight, sigma, sigma / 10)
    compensate_removed_inputs(weight, sigma, torch.arange(COLUMNS) > 0)
    assert torch.equal(sigma, before)


@pytest.mark.parametrize("four_levels", [False, True])
def test_values_within_bins_are_the_nearest_that_are_rounded_alike(four_levels: bool):
    """Against a search over a fine line of candidates."""
    to_grid = quantize_four_levels if four_levels else quantize
    weight, d, q_m = layer(3, 2, per_channel=True)
    d, q_m = d[:, None], q_m[:, None]
    # What GPTQ does: some weights are rounded otherwise than to nearest.
    rounded = to_grid(weight + 0.8 * d * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)), d, q_m)
    found = within_bins(weight, rounded, d, q_m, four_levels=four_levels)
    assert torch.equal(to_grid(found, d, q_m), rounded)
    assert not torch.equal(found, rounded)
    line = torch.linspace(-1, 1, 4001) * q_m.max()
    for place in torch.cartesian_prod(torch.arange(ROWS), torch.arange(COLUMNS)).tolist():
        row, column = place
        own = line[line.abs() <= q_m[row]]
        alike = own[to_grid(own[None], d[row], q_m[row])[0] == rounded[row, column]]
        best = (alike - weight[row, column]).abs().min()
        # A hundredth of the distance to the next level is left.
        assert (found[row, column] - weight[row, column]).abs() <= best + 0.021 * d[row]


def test_a_zero_of_four_levels_stays_where_it_is():
    d = torch.ones(1)
    weight = torch.tensor([0.4, 0.0])
    found = within_bins(weight, torch.tensor([1 / 3, 0.0]), d, d, four_levels=True)
    torch.testing.assert_close(found, weight)


def test_where_the_dtype_is_too_coarse_values_stay_on_the_grid():
    d, q_m = torch.tensor([0.001]), torch.tensor([0.127])
    rounded = (torch.arange(-127, 128) * d).bfloat16()
    found = within_bins(rounded.float() + 0.9 * d, rounded, d, q_m)
    assert torch.equal(quantize(found, d, q_m), quantize(rounded, d, q_m))


def test_following_the_dense_model_is_least_squares_of_its_outputs():
    x = inputs(12)
    dense = x + 0.3 * inputs(13)
    weight, _, _ = layer(12, 4, True)
    sigma = x.t() @ x / len(x)
    drift = (dense - x).t() @ x / len(x)
    # torch solves min |X B - Y| for B of shape (in, out).
    expected = torch.linalg.lstsq(x, dense @ weight.double().t()).solution.t()
    found = follow_dense_inputs(weight, sigma, drift, damping=1e-10)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    half = follow_dense_inputs(weight, sigma, drift, share=0.5, damping=1e-10)
    torch.testing.assert_close(half, (weight + found) / 2, rtol=1e-4, atol=1e-5)


def test_following_the_dense_model_changes_nothing_where_inputs_are_its_own():
    x = inputs(14)
    weight, _, _ = layer(14, 4, True)
    sigma = x.t() @ x / len(x)
    assert torch.equal(follow_dense_inputs(weight, sigma, torch.zeros_like(sigma)), weight)
