"""Clipping values: each channel's own, what has no range, and the one search that they and bit allocation use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from geta_hf.errors import GETAError
from geta_hf.quantization import channel_clipping_values, clipping_value, functional
from geta_hf.quantization.clipping import BINS, PER_OCTAVE, count_magnitudes, search_clipping, squared_error

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
    counts = torch.zeros(3, BINS)
    counts[:, :: PER_OCTAVE // 3] = torch.rand(3, len(range(0, BINS, PER_OCTAVE // 3)))
    centers = torch.exp2(-(torch.arange(BINS) + 0.5) / PER_OCTAVE)
    candidates = torch.exp2(-torch.arange(0, 8 * 64) / 64)
    errors, clips = search_clipping(counts, [bits])
    for row in range(3):
        expected = []
        for clip in candidates:
            rounded = functional.quantize(centers, clip / (2 ** (bits - 1) - 1), clip)
            expected.append(float(((rounded - centers) ** 2 * counts[row]).sum()))
        assert float(errors[row]) == pytest.approx(min(expected), rel=1e-2)
        # Two clipping values next to each other may be as good.
        assert expected[int((-64 * clips[row].log2()).round())] <= 1.01 * min(expected)
        error, clip = search_clipping(counts[row], [bits])
        assert clip == clips[row] and error.shape == clip.shape == (1,)
        assert float(error) == pytest.approx(float(errors[row]))


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    normal = torch.randn(20_000)
    outlier = normal.clone()
    outlier[3] = 90
    return {
        "normal": normal,
        "laplace": torch.distributions.Laplace(0.0, 1.0).sample((20_000,)),
        "student": torch.distributions.StudentT(2.0).sample((20_000,)),
        "outlier": outlier,
        "three outliers": torch.cat([normal, torch.tensor([300.0, -1000.0, 250.0])]),
        "pruned": normal * (torch.rand(20_000) < 0.05),
        "constant": torch.full((50,), -0.3),
        "ternary": torch.tensor([0.3, -0.3, 0.0] * 20),
        "tiny": 1e-20 * normal,
        "huge": 1e20 * outlier,
        "bf16": (0.02 * normal).bfloat16(),
    }


@pytest.mark.parametrize("kind", tensors())
def test_the_error_found_is_within_a_hundredth_of_the_best(kind: str) -> None:
    """Against a dense grid of the quantizer's own errors, down to a thousandth of rms."""
    weight = tensors()[kind]
    exact = weight.double() / float(weight.abs().max())

    def error(clip: float, bits: int) -> float:
        d = clip / (2 ** (bits - 1) - 1)
        return float(((exact.clamp(-clip, clip) / d).round() * d - exact).square().sum())

    for bits in (2, 3, 4, 6, 8):
        found = clipping_value(weight, bits) / float(weight.abs().max())
        best = min(error(2.0 ** (-step / 40), bits) for step in range(12 * 40))
        assert error(found, bits) <= 1.01 * best + 1e-12 * float(exact.square().sum())


def test_errors_of_a_histogram_are_those_of_the_quantizer() -> None:
    weight = tensors()["student"]
    top = weight.abs().max()
    counts = count_magnitudes(weight[None], top[None])[0]
    for bits in (2, 4, 8, 12, 16):
        for share in (0.05, 0.4, 1.0):
            clip = share * top
            d = clip / (2 ** (bits - 1) - 1)
            exact = float((functional.quantize(weight.double(), d, clip) - weight).double().square().sum())
            rounded = float((functional.quantize(weight, d, clip) - weight.clamp(-clip, clip)).square().sum())
            found = squared_error(counts, share, bits) * top**2
            assert float(found) == pytest.approx(exact, rel=0.02)
            if bits < 12:  # beyond, rounding of fp32 itself counts
                without = squared_error(counts, share, bits, clipped=False) * top**2
                assert float(without) == pytest.approx(rounded, rel=0.02)


def test_rows_are_searched_as_if_each_were_alone() -> None:
    rows = torch.stack([tensor.float()[:3000] for tensor in tensors().values() if len(tensor) > 3000])
    rows[2] = 0
    top = rows.abs().amax(1)
    counts = count_magnitudes(rows, top)
    assert counts.sum(1).tolist() == [3000] * len(rows) and counts[2, -1] == 3000
    errors, clips = search_clipping(counts, [3, 5])
    for row in range(len(rows)):
        error, clip = search_clipping(counts[row], [3, 5])
        torch.testing.assert_close(errors[row], error)
        # Not to the bit: how sums are vectorized depends on the shape and the processor.
        torch.testing.assert_close(clips[row], clip)


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 1e-35), (torch.bfloat16, 1e-39), (torch.float16, 1e-6)])
def test_a_tensor_of_subnormal_values_is_refused(dtype: torch.dtype, largest: float) -> None:
    weight = torch.full((2, 3), largest, dtype=dtype)
    assert weight.any()
    for find in (clipping_value, channel_clipping_values):
        with pytest.raises(GETAError, match=r"some: max\|W\| is .*too few digits.*scale it up"):
            find(weight, 4, name="some")
    weight[0] = 1.0
    assert channel_clipping_values(weight, 4).tolist() == [1.0, 1.0]  # that channel has no range of its own
