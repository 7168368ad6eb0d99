"""Convolutions of every kind, their norms, pooling and resampling: exact groups, and what is coupled to a norm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from geta_hf.qadg import PruningSpace
from geta_hf.qadg.propagation.propagate import record_and_propagate
from geta_hf.qadg.space import space_of

from .cuts import as_cut, channels, convs, cuts, linears, proven, singles

PICTURE = {"input": torch.randn(2, 3, 8, 8)}


def couplings(space: PruningSpace) -> list[tuple[str, ...]]:
    return [tuple(c for c in family.couplings if c != "output") for family in space.families]


PASSES: dict[str, Callable[[Tensor], Tensor]] = {
    "max pool": lambda h: functional.max_pool2d(h.relu(), 2),
    "average pool": lambda h: functional.avg_pool2d(h, 2, padding=1),
    "adaptive average pool": lambda h: functional.adaptive_avg_pool2d(h, (2, 3)),
    "adaptive max pool": lambda h: functional.adaptive_max_pool2d(h, 2),
    "1d pools": lambda h: functional.max_pool1d(functional.avg_pool1d(h.flatten(2), 2), 2).unflatten(-1, (4, 4)),
    "nearest": lambda h: functional.interpolate(h, scale_factor=2),
    "bilinear": lambda h: functional.interpolate(h, size=(5, 7), mode="bilinear"),
    "bicubic": lambda h: functional.interpolate(h, size=(5, 7), mode="bicubic", antialias=True),
    "pad": lambda h: functional.pad(h, (1, 2, 0, 1)),
    "reflection": lambda h: functional.pad(h, (1, 1, 1, 1), mode="reflect"),
    "replication": lambda h: functional.pad(h, (1, 1, 1, 1), mode="replicate"),
    "crop": lambda h: h[:, :, 1:-1, ::2],
    "places flipped": lambda h: h.flip(2).roll(1, dims=3),
    "windows of places": lambda h: h.unflatten(2, (2, 4)).transpose(2, 3).flatten(2, 3),
    "fold of unfold": lambda h: functional.fold(functional.unfold(h, 2, stride=2), (8, 8), 2, stride=2),
    "resample": lambda h: functional.grid_sample(h, torch.zeros(2, 3, 5, 2, dtype=h.dtype), align_corners=False),
    "spectrum of places": lambda h: torch.fft.rfft(h).abs(),
}


@pytest.mark.parametrize("name", PASSES)
def test_every_channel_passes(name):
    assert cuts(*convs(PASSES[name])) == [channels()]


def test_a_chain_of_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3, stride=2, bias=False), nn.Conv2d(5, 2, 1))
    assert cuts(model, PICTURE) == [
        {"0.weight:0": singles(4), "0.bias:0": singles(4), "2.weight:1": singles(4)},
        {"2.weight:0": singles(5), "3.weight:1": singles(5)},
    ]


def test_one_dim_and_three_dims():
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Flatten(2), nn.Conv1d(4, 2, 1))
    assert cuts(model, {"input": torch.randn(2, 3, 8)}) == [
        {"0.weight:0": singles(4), "0.bias:0": singles(4), "2.weight:1": singles(4)}
    ]
    model = nn.Sequential(nn.Conv3d(3, 4, 2), nn.MaxPool3d(2), nn.Conv3d(4, 2, 1))
    assert cuts(model, {"input": torch.randn(2, 3, 5, 5, 5)}) == [
        {"0.weight:0": singles(4), "0.bias:0": singles(4), "2.weight:1": singles(4)}
    ]


def test_depthwise_convolutions_leave_with_their_channel():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1))
    names = ("0.weight:0", "0.bias:0", "1.weight:0", "1.bias:0", "2.weight:1")
    assert cuts(model, PICTURE) == [{name: singles(4) for name in names}]


def test_a_depthwise_multiplier_leaves_with_its_channel_or_from_every_channel_alike():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 2, 1))
    pairs = [[0, 1], [2, 3], [4, 5], [6, 7]]
    each = [[0, 2, 4, 6], [1, 3, 5, 7]]
    found = cuts(model, PICTURE)
    made = ("1.weight:0", "1.bias:0", "2.weight:1")
    assert {"0.weight:0": singles(4), "0.bias:0": singles(4)} | dict.fromkeys(made, pairs) in found
    assert dict.fromkeys(made, each) in found
    assert len(found) == 2


def test_grouped_convolutions_lose_whole_groups_or_the_same_channels_of_every_group():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 2, 1))
    whole = {"0.weight:0": [[0, 1], [2, 3]], "0.bias:0": [[0, 1], [2, 3]]}
    whole |= {key: [[0, 1, 2], [3, 4, 5]] for key in ("1.weight:0", "1.bias:0", "2.weight:1")}
    into = {"0.weight:0": [[0, 2], [1, 3]], "0.bias:0": [[0, 2], [1, 3]], "1.weight:1": singles(2)}
    outof = {key: [[0, 3], [1, 4], [2, 5]] for key in ("1.weight:0", "1.bias:0", "2.weight:1")}
    found = cuts(model, PICTURE)
    assert whole in found and into in found and outof in found and len(found) == 3


def test_transposed_convolutions_have_their_inputs_first():
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2, stride=2), nn.ConvTranspose2d(4, 5, 3), nn.Conv2d(5, 2, 1))
    assert cuts(model, PICTURE) == [
        {"0.weight:1": singles(4), "0.bias:0": singles(4), "1.weight:0": singles(4)},
        {"1.weight:1": singles(5), "1.bias:0": singles(5), "2.weight:1": singles(5)},
    ]


def test_grouped_transposed_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.Conv2d(6, 2, 1))
    rows, wide = [[0, 1], [2, 3]], [[0, 1, 2], [3, 4, 5]]
    whole = {"0.weight:0": rows, "0.bias:0": rows, "1.weight:0": rows, "1.bias:0": wide, "2.weight:1": wide}
    within = {"1.weight:1": singles(3), "1.bias:0": [[0, 3], [1, 4], [2, 5]], "2.weight:1": [[0, 3], [1, 4], [2, 5]]}
    found = cuts(model, PICTURE)
    assert whole in found and within in found


def test_a_residual_connection_ties_channels():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.c(h + self.b(h))

    names = ("a.weight:0", "a.bias:0", "b.weight:0", "b.bias:0", "b.weight:1", "c.weight:1")
    (found,) = cuts(Residual(), {"x": PICTURE["input"]})
    assert found == dict.fromkeys(names, singles(4))


def test_batch_norm_leaves_with_its_channels_and_its_statistics():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1))
    space = proven(model, PICTURE)
    names = ("0.weight:0", "0.bias:0", "1.weight:0", "1.bias:0", "1.running_mean:0", "1.running_var:0", "3.weight:1")
    assert [as_cut(family) for family in space.families] == [dict.fromkeys(names, singles(4))]
    assert couplings(space) == [()] and set(space.buffers) == {"1.running_mean", "1.running_var"}


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4, track_running_stats=False), nn.InstanceNorm2d(4, affine=True)])
def test_statistics_of_the_batch_itself_leave_every_channel_by_itself(norm):
    space = proven(nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Conv2d(4, 2, 1)), PICTURE)
    names = ("0.weight:0", "0.bias:0", "1.weight:0", "1.bias:0", "2.weight:1")
    assert [as_cut(family) for family in space.families] == [dict.fromkeys(names, singles(4))]
    assert couplings(space) == [()]


def test_group_norm_leaves_whole_groups_free_and_channels_within_coupled():
    space = proven(nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.Conv2d(6, 2, 1)), PICTURE)
    names = ("0.weight:0", "0.bias:0", "1.weight:0", "1.bias:0", "2.weight:1")
    whole, within = sorted(space.families, key=lambda family: family.size)
    assert as_cut(whole) == {key: [[0, 1, 2], [3, 4, 5]] for key in names}
    assert as_cut(within) == {key: [[0, 3], [1, 4], [2, 5]] for key in names}
    assert "norm" not in whole.couplings and "norm" in within.couplings
    assert whole.excludes == (within.name,) and within.excludes == (whole.name,)


def test_group_norm_of_one_group_couples_all_channels_and_of_single_channels_none():
    one = proven(nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(1, 6), nn.Conv2d(6, 2, 1)), PICTURE)
    assert couplings(one) == [("norm",)] and one.families[0].size == 6
    each = proven(nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(6, 6), nn.Conv2d(6, 2, 1)), PICTURE)
    assert couplings(each) == [()] and each.families[0].size == 6


NORMS_OVER_PLACES = [nn.GroupNorm(2, 4), nn.BatchNorm1d(4, track_running_stats=False)]


@pytest.mark.parametrize("norm", NORMS_OVER_PLACES)
def test_places_that_a_layer_makes_are_coupled_by_a_norm_over_them(norm):
    model = nn.Sequential(nn.Linear(6, 8), norm, nn.Linear(8, 3))
    space = space_of(record_and_propagate(model.eval(), {"input": torch.randn(2, 4, 6)}))
    assert couplings(space) == [("norm",)] and space.families[0].size == 8


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8)])
def test_a_norm_over_the_channels_couples_them(norm):
    model = nn.Sequential(nn.Linear(6, 8), norm, nn.Linear(8, 3))
    space = proven(model, {"input": torch.randn(2, 4, 6)})
    (family,) = space.families
    assert family.size == 8 and "norm" in family.couplings and as_cut(family)["1.weight:0"] == singles(8)


def test_pixel_shuffle_takes_blocks_of_channels():
    (found,) = cuts(*convs(nn.PixelShuffle(2), read=2))
    blocks = [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert found == {"up.weight:0": blocks, "up.bias:0": blocks, "down.weight:1": singles(2)}


def test_pixel_shuffle_keeps_places_that_a_layer_makes():
    assert cuts(*linears(lambda h: functional.pixel_shuffle(h[:, :, None], 2), read=16)) == []


def test_pixel_unshuffle_gives_blocks_of_channels():
    (found,) = cuts(*convs(nn.PixelUnshuffle(2), read=32))
    blocks = [[4 * channel + place for place in range(4)] for channel in range(8)]
    assert found == channels() | {"down.weight:1": blocks}


def test_unfolded_channels_leave_with_their_whole_kernel():
    (found,) = cuts(*convs(lambda h: functional.unfold(h, 2, stride=2).unflatten(-1, (4, 4)), read=32))
    blocks = [[4 * channel + place for place in range(4)] for channel in range(8)]
    assert found == channels() | {"down.weight:1": blocks}


def test_pictures_flattened_into_a_linear_layer():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(3), nn.Flatten(), nn.Linear(16, 2))
    found = cuts(model, PICTURE)
    blocks = [[4 * channel + place for place in range(4)] for channel in range(4)]
    assert {"0.weight:0": singles(4), "0.bias:0": singles(4), "3.weight:1": blocks} in found


def test_weight_norm_leaves_with_its_rows():
    model = nn.Sequential(weight_norm(nn.Conv1d(3, 4, 3)), nn.Conv1d(4, 2, 1))
    space = proven(model, {"input": torch.randn(2, 3, 8)})
    (found,) = [as_cut(family) for family in space.families if family.size == 4]
    scale, direction = "0.parametrizations.weight.original0", "0.parametrizations.weight.original1"
    assert found == dict.fromkeys((f"{scale}:0", f"{direction}:0", "0.bias:0", "1.weight:1"), singles(4))


def test_padded_channels_stay():
    assert cuts(*convs(lambda h: functional.pad(h, (0, 0, 0, 0, 1, 1)), read=10)) == []


def test_a_grid_that_parameters_made_stays():
    class Sampler(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.where = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(functional.grid_sample(self.up(x), self.where(x).movedim(1, -1), align_corners=False))

    assert cuts(Sampler(), {"x": PICTURE["input"]}) == [
        {"up.weight:0": singles(4), "up.bias:0": singles(4), "down.weight:1": singles(4)}
    ]
