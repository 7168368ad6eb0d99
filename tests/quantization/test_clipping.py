"""Clipping values: each channel's own, what has no range, and the one search that they and bit allocation use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from geta_hf.errors import GETAError
from geta_hf.quantization import channel_clipping_values, clipping_value, functional
from geta_hf.quantization.clipping import search_clipping

DIM = {"linear": 0, "conv1d": 1, "conv2d": 0}


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("kind", DIM)
def test_every_channel_starts_near_its_own_best_clipping_value(kind: str, bits: int) -> None:
    torch.manual_seed(1)
    weight, dim = torch.randn(8, 400), DIM[kind]
    weight *= torch.logspace(-3, 1, 8)[:, None]
    weight[:, 0] *= 9
    if kind != "linear":
        weight = weight.t() if dim else weight.view(8, 4, 10, 10)
    found = channel_clipping_values(weight, bits, channel_dim=dim)

    def error(row: Tensor, q_m: float) -> float:
        d, top = torch.tensor([q_m / (2 ** (bits - 1) - 1)]), torch.tensor([q_m])
        return float((functional.quantize(row, d, top) - row).square().sum())

    for channel, q_m in enumerate(found.tolist()):
        row = weight.select(dim, channel)
        best = min(error(row, share * float(row.abs().max())) for share in torch.linspace(0.1, 1, 91).tolist())
        assert error(row, q_m) <= 1.02 * best
        assert clipping_value(row, bits, "max") == float(row.abs().max())
    largest = torch.stack([weight.select(dim, channel).abs().max() for channel in range(8)])
    assert torch.equal(channel_clipping_values(weight, bits, "max", channel_dim=dim), largest)


def test_a_channel_of_zeros_gets_the_range_of_its_layer() -> None:
    weight = torch.randn(4, 50)
    weight[2] = 0
    for method in ("mse", "max"):
        found = channel_clipping_values(weight, 4, method)
        assert found[2] == clipping_value(weight, 4, method) and (found > 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tensor_without_a_range_is_refused(value: float) -> None:
    with pytest.raises(GETAError, match=r"some: max\|W\| is"):
        channel_clipping_values(torch.full((3, 3), value), 4, name="some")
    for empty in (torch.empty(0, 3), torch.empty(3, 0)):
        for find in (clipping_value, channel_clipping_values):
            with pytest.raises(GETAError, match="some has no elements to quantize"):
                find(empty, 4, name="some")
    with pytest.raises(GETAError, match="'mse' or 'max'"):
        clipping_value(torch.ones(3), 4, "best")


@pytest.mark.parametrize(("kind", "shape"), [("linear", (8, 25)), ("conv1d", (25, 8)), ("conv2d", (8, 1, 5, 5))])
def test_a_tensor_of_zeros_gets_the_range_of_an_initialization(kind: str, shape: tuple[int, ...]) -> None:
    weight, dim = torch.zeros(shape, dtype=torch.bfloat16), DIM[kind]
    for method in ("mse", "max"):
        assert clipping_value(weight, 4, method, channel_dim=dim) == pytest.approx(1 / 5)
        assert channel_clipping_values(weight, 4, method, channel_dim=dim).tolist() == pytest.approx([1 / 5] * 8)


def test_counting_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(5, 333, generator=torch.Generator().manual_seed(0))
    whole = channel_clipping_values(weight, 4)
    monkeypatch.setattr("geta_hf.quantization.clipping._CHUNK", 64)
    assert torch.equal(channel_clipping_values(weight, 4), whole)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_search_finds_the_candidate_of_least_error(bits: int) -> None:
    torch.manual_seed(2)
    counts, centers = torch.rand(3, 50), (torch.arange(50) + 0.5) / 50
    candidates = torch.tensor([0.9, 0.2, 0.5, 1.0])
    errors, clips = search_clipping(counts, centers, candidates, bits)
    for row in range(3):
        expected = []
        for clip in candidates:
            rounded = functional.quantize(centers, clip / (2 ** (bits - 1) - 1), clip)
            expected.append(float(((rounded - centers) ** 2 * counts[row]).sum()))
        assert float(errors[row]) == pytest.approx(min(expected), rel=1e-4)
        assert clips[row] == candidates[expected.index(min(expected))]
        error, clip = search_clipping(counts[row], centers, candidates, bits)
        assert clip == clips[row] and error.shape == clip.shape == ()
        assert float(error) == pytest.approx(float(errors[row]))


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 1e-35), (torch.bfloat16, 1e-39), (torch.float16, 1e-6)])
def test_a_tensor_of_subnormal_values_is_refused(dtype: torch.dtype, largest: float) -> None:
    weight = torch.full((2, 3), largest, dtype=dtype)
    assert weight.any()
    for find in (clipping_value, channel_clipping_values):
        with pytest.raises(GETAError, match=r"some: max\|W\| is .*too few digits.*scale it up"):
            find(weight, 4, name="some")
    weight[0] = 1.0
    assert channel_clipping_values(weight, 4).tolist() == [1.0, 1.0]  # that channel has no range of its own
