"""Views, transposes, slices, splits and concatenations: exact groups, and what must stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from .cuts import Batch, channels, cuts, linears, singles

PASSES: dict[str, Callable[[Tensor], Tensor]] = {
    "clone": lambda h: h.clone().contiguous().detach(),
    "to": lambda h: h * h.bool().to(h.dtype),
    "transpose there and back": lambda h: h.transpose(1, 2).mT,
    "transpose in place": lambda h: h.clone().transpose_(1, 2).transpose_(1, 2),
    "t": lambda h: h[0].t().t()[None],
    "permute": lambda h: h.permute(2, 0, 1).permute(1, 2, 0),
    "unsqueeze": lambda h: h.unsqueeze(-1).squeeze(-1).unsqueeze(0).squeeze(),
    "unsqueeze in place": lambda h: h.clone().unsqueeze_(1).squeeze_(1),
    "flatten": lambda h: h.flatten(0, 1).unflatten(0, (2, 4)),
    "view": lambda h: h.reshape(8, 8).view(2, 4, 8),
    "expand": lambda h: h[:, :, None].expand(-1, -1, 3, -1)[:, :, 1],
    "expand stretched places": lambda h: h[:, :1].expand(-1, 4, -1),
    "repeat places": lambda h: h.repeat(1, 2, 1),
    "slice places": lambda h: h[:, 1:3],
    "select a place": lambda h: h[:, 0],
    "split places": lambda h: sum(h.split(2, dim=1)),
    "unbind places": lambda h: sum(h.unbind(1)),
    "cat places": lambda h: torch.cat([h, h[:, :1]], dim=1),
    "stack": lambda h: torch.stack([h, h * 2], dim=1).sum(1),
    "chunks joined again": lambda h: torch.cat(h.chunk(2, dim=-1), dim=-1),
    "zeros of the same kind": lambda h: h + torch.zeros_like(h) + torch.ones_like(h),
    "new zeros": lambda h: torch.cat([h, h.new_zeros(2, 1, 8)], dim=1),
    "complex": lambda h: torch.view_as_real(torch.view_as_complex(torch.stack([h, 2 * h], dim=-1)))[..., 0],
}  # fmt: skip


@pytest.mark.parametrize("name", PASSES)
def test_every_channel_passes(name):
    assert cuts(*linears(PASSES[name])) == [channels()]


def test_a_view_of_heads_and_dims_ties_neither():
    """(heads, dims) with a matrix over the dims: a head leaves with 2 channels, a dim with 4, and they take turns."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(12, 3)
            self.inner = nn.Parameter(torch.randn(4, 2, 3))

        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x).view(4, 4, 2).transpose(0, 1) @ self.inner
            return self.down(h.transpose(0, 1).flatten(1))

    heads = [[0, 1], [2, 3], [4, 5], [6, 7]]
    dims = [[0, 2, 4, 6], [1, 3, 5, 7]]
    wide = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    found = cuts(Heads(), {"x": torch.randn(4, 6)})
    assert {"inner:0": singles(4), "up.weight:0": heads, "up.bias:0": heads, "down.weight:1": wide} in found
    assert {"inner:1": singles(2), "up.weight:0": dims, "up.bias:0": dims} in found
    assert {"inner:2": singles(3), "down.weight:1": [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]} in found
    assert len(found) == 3


def test_a_transposed_view_ties_the_other_factor():
    """Channels seen as (2, 4) and turned: down reads them in another order."""
    model, batch = linears(lambda h: h.unflatten(-1, (2, 4)).mT.flatten(-2))
    (found,) = [cut for cut in cuts(model, batch) if len(cut["up.weight:0"]) == 4]
    assert found["up.weight:0"] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert found["down.weight:1"] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_a_repeated_dim_is_cut_everywhere():
    (found,) = cuts(*linears(lambda h: h.repeat(1, 1, 2), read=16))
    assert found["down.weight:1"] == [[index, index + 8] for index in range(8)]
    (found,) = cuts(*linears(lambda h: torch.cat([h, h], dim=-1), read=16))
    assert found["down.weight:1"] == [[index, index + 8] for index in range(8)]


def test_an_interleaved_dim_is_cut_in_pairs_or_in_one_copy():
    """The copies may leave by themselves besides, since stretching may as well make fewer."""
    own, copies = cuts(*linears(lambda h: h.repeat_interleave(2, dim=-1), read=16))
    assert own == channels() | {"down.weight:1": [[2 * index, 2 * index + 1] for index in range(8)]}
    assert copies == {"down.weight:1": [list(range(0, 16, 2)), list(range(1, 16, 2))]}


def test_a_sliced_dim_leaves_the_rest_in_a_family_of_its_own():
    """What is cut off by a slice of the channels feeds nothing, so only its rows leave."""
    used, unused = cuts(*linears(lambda h: h[..., 2:7], read=5))
    if "down.weight:1" not in used:
        used, unused = unused, used
    assert used == {"up.weight:0": singles(5, 2), "up.bias:0": singles(5, 2), "down.weight:1": singles(5)}
    assert unused == {"up.weight:0": [[0], [1], [7]], "up.bias:0": [[0], [1], [7]]}


def test_strides_of_a_slice():
    found = cuts(*linears(lambda h: h[..., ::2] * h[..., 1::2], read=4))
    pairs = [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert found == [{"up.weight:0": pairs, "up.bias:0": pairs, "down.weight:1": singles(4)}]


@pytest.mark.parametrize(
    "gate",
    [
        lambda h: h.chunk(2, dim=-1)[0] * h.chunk(2, dim=-1)[1],
        lambda h: h.split([4, 4], dim=-1)[0] + h.split([4, 4], dim=-1)[1],
        lambda h: nn.functional.glu(h, dim=-1),
        lambda h: h.unflatten(-1, (2, 4)).unbind(-2)[0] * h[..., 4:],
        lambda h: h[..., :4] * h.narrow(-1, 4, 4),
    ],
)
def test_halves_that_meet_leave_together(gate: Callable[[Tensor], Tensor]):
    pairs = [[index, index + 4] for index in range(4)]
    assert cuts(*linears(gate, read=4)) == [{"up.weight:0": pairs, "up.bias:0": pairs, "down.weight:1": singles(4)}]


def test_rotated_halves_keep_pairs_together():
    """Rotary positions: element i turns with element i + D / 2."""

    def turn(h: Tensor) -> Tensor:
        first, second = h[..., :4], h[..., 4:]
        return h * 0.6 + torch.cat([-second, first], dim=-1) * 0.8

    pairs = [[index, index + 4] for index in range(4)]
    assert cuts(*linears(turn)) == [{"up.weight:0": pairs, "up.bias:0": pairs, "down.weight:1": pairs}]


def test_concatenated_layers_are_cut_in_their_own_columns():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.down = nn.Linear(6, 3), nn.Linear(6, 2), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.cat([self.a(x), self.b(x)], dim=-1))

    assert cuts(Two(), {"x": torch.randn(2, 6)}) == [
        {"a.weight:0": singles(3), "a.bias:0": singles(3), "down.weight:1": singles(3)},
        {"b.weight:0": singles(2), "b.bias:0": singles(2), "down.weight:1": singles(2, 3)},
    ]


def test_concatenated_with_an_input_only_the_layer_is_cut():
    (found,) = cuts(*_with_input(lambda h, x: torch.cat([x, h], dim=-1), 14))
    assert found == {"up.weight:0": singles(8), "up.bias:0": singles(8), "down.weight:1": singles(8, 6)}


def _with_input(join: Callable[[Tensor, Tensor], Tensor], read: int) -> tuple[nn.Module, Batch]:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(read, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(join(self.up(x), x))

    return Joined(), {"x": torch.randn(2, 6)}


def test_a_selected_channel_stays_and_the_others_pass():
    rest = [[0], [1], [2], [4], [5], [6], [7]]
    expected = {"up.weight:0": rest, "up.bias:0": rest, "down.weight:1": rest}
    assert cuts(*linears(lambda h: h * h.select(-1, 3)[..., None])) == [expected]
    assert cuts(*linears(lambda h: h * h.select(-1, -5)[..., None])) == [expected]
    assert cuts(*linears(lambda h: h * h[..., 3:4])) == [expected]


def test_unbound_channels_all_stay():
    assert cuts(*linears(lambda h: torch.stack(h.unbind(-1)[::-1], dim=-1))) == []


def test_complex_pairs_leave_whole():
    pairs = [[0, 1], [2, 3], [4, 5], [6, 7]]

    def turn(h: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(h.unflatten(-1, (4, 2))) * (1 + 2j)).flatten(-2)

    assert cuts(*linears(turn)) == [{"up.weight:0": pairs, "up.bias:0": pairs, "down.weight:1": pairs}]


def test_a_view_across_places_and_channels_that_fits_no_factor_leaves_nothing_unsound():
    """(4 places, 8 channels) seen as (8, 4): only what is a factor in both may leave."""
    found = cuts(*linears(lambda h: h.reshape(2, 8, 4).mT.reshape(2, 4, 8)))
    for cut in found:
        assert len(cut["up.weight:0"]) in (2, 4)


def test_slices_written_in_place_pass():
    def write(h: Tensor) -> Tensor:
        out = torch.zeros(h.shape, dtype=h.dtype)
        out[..., :4].copy_(h[..., 4:])
        out[..., 4:] = h[..., :4]
        return out

    (found,) = cuts(*linears(write))
    assert found == channels() | {"down.weight:1": [[4], [5], [6], [7], [0], [1], [2], [3]]}


def test_the_output_keeps_its_shape():
    model = nn.Linear(6, 4)
    assert cuts(model, {"input": torch.randn(2, 6)}) == []


def test_an_empty_tensor_may_be_concatenated():
    assert cuts(*linears(lambda h: torch.cat([torch.empty(0), h.flatten(0, 1)]))) == [channels()]
