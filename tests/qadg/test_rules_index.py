"""Operators that address by position: what they choose by stays, the other dims pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from geta_hf.qadg.propagation.propagate import record_and_propagate
from geta_hf.qadg.space import space_of

from .cuts import Between, channels, cuts, linears, singles


def tokens(h: Tensor) -> Tensor:
    """One token a row, shape (rows, 1, channels)."""
    return torch.tensor([1, 3])[: len(h), None, None].expand(-1, 1, h.shape[-1])


PASSES: dict[str, Callable[[Tensor], Tensor]] = {
    "index of places": lambda h: h[:, torch.tensor([2, 0, 1])],
    "index of places that repeat": lambda h: h[:, torch.tensor([2, 2])],
    "index of rows and places": lambda h: h[torch.arange(len(h)), torch.full((len(h),), 3)],
    "mask of places": lambda h: h[:, torch.tensor([True, False, True, True])],
    "mask of rows and places": lambda h: h[torch.ones(h.shape[:2], dtype=torch.bool)],
    "index select of places": lambda h: h.index_select(1, torch.tensor([1, 0])),
    "gather of places": lambda h: h.gather(1, torch.zeros_like(h, dtype=torch.long)[:, :1]),
    "take along places": lambda h: h.take_along_dim(torch.zeros_like(h, dtype=torch.long)[:, :2], dim=1),
    "roll of places": lambda h: h.roll(1, dims=1),
    "flip of places": lambda h: h.flip(1),
    "running sum of places": lambda h: h.cumsum(1),
    "running maximum of places": lambda h: h.cummax(1).values + h.cummin(1).values,
    "windows of places": lambda h: h.unfold(1, 2, 1).mean(-1),
    "sort of places": lambda h: h.sort(dim=1).values,
    "top places": lambda h: h.topk(2, dim=1).values,
    "softmax of places": lambda h: h.softmax(1) * h,
    "spectrum of places": lambda h: torch.fft.fft(h, dim=1).abs(),
    "pad of places": lambda h: nn.functional.pad(h, (0, 0, 1, 0)),
    "triangle of rows and places": lambda h: h.movedim(-1, 0).triu().movedim(0, -1),
    "writing into places": lambda h: torch.zeros_like(h).index_put((torch.arange(2)[: len(h)],), h),
    "adding to places": lambda h: torch.zeros_like(h).index_add(1, torch.tensor([1, 0, 0, 2]), h),
    "copying to places": lambda h: torch.zeros_like(h).index_copy(1, torch.tensor([1, 0, 3, 2]), h),
    "scatter of places": lambda h: torch.zeros_like(h).scatter_add(1, torch.zeros_like(h, dtype=torch.long), h),
    "masked fill": lambda h: h.clone().masked_fill_(torch.tensor([True, False, False, True])[:, None], 0.0),
    "masked scatter of places": lambda h: h.masked_scatter(torch.tensor([1, 1, 0, 0]).bool()[:, None], h[:, 2:] * 2),
    "bucketize": lambda h: torch.bucketize(h, torch.tensor([-1.0, 0.0, 1.0], dtype=h.dtype)).to(h.dtype),
}  # fmt: skip


@pytest.mark.parametrize("name", PASSES)
def test_every_channel_passes(name):
    assert cuts(*linears(PASSES[name])) == [channels()]


def written(target: Tensor, values: Tensor) -> Tensor:
    """The target, of shape (rows, channels, places), with values at its places: the channels are in front."""
    target[:, :, torch.tensor([1, 0, 3, 2])] = values
    return target


STAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "sort": lambda h: h.sort(dim=-1).values,
    "topk": lambda h: h.topk(8, dim=-1).values,
    "cumsum": lambda h: h.cumsum(-1),
    "cummax": lambda h: h.cummax(-1).values,
    "windows": lambda h: h.unfold(-1, 4, 4).flatten(-2),
    "cumprod": lambda h: h.cumprod(-1),
    "roll": lambda h: h.roll(1, dims=-1),
    "roll of everything": lambda h: h.roll(1),
    "flip": lambda h: h.flip(-1),
    "softmax": lambda h: h.softmax(-1),
    "log softmax": lambda h: h.log_softmax(-1),
    "fft": lambda h: torch.fft.fft(h).real,
    "index that repeats": lambda h: h[..., torch.tensor([0, 0, 1, 2, 3, 4, 5, 6])],
    "index select": lambda h: h.index_select(-1, torch.arange(8).flip(0)),
    "gather": lambda h: h.gather(-1, h.argsort(-1)),
    "scatter": lambda h: torch.zeros_like(h).scatter(-1, h.argsort(-1), h),
    "index add": lambda h: torch.zeros_like(h).index_add(-1, torch.arange(8).flip(0), h),
    "triu": lambda h: h @ torch.ones(8, 8, dtype=h.dtype).triu() + h.triu(),
    "writing behind channels": lambda h: written(h.mT.clone(), torch.tensor(0.5, dtype=h.dtype)).mT,
    "written from behind channels": lambda h: written(torch.zeros(h.mT.shape, dtype=h.dtype), h.mT).mT,
    "mask of channels": lambda h: h[..., torch.tensor([True] * 4 + [False] * 4)].repeat(1, 1, 2),
}


@pytest.mark.parametrize("name", STAYS)
def test_chosen_channels_stay(name):
    assert cuts(*linears(STAYS[name])) == []


def test_an_index_of_known_places_permutes_the_channels():
    order = [3, 1, 0, 2, 7, 6, 5, 4]
    (found,) = cuts(*linears(lambda h: h[..., torch.tensor(order)]))
    assert found == channels() | {"down.weight:1": [[order.index(channel)] for channel in range(8)]}
    (found,) = cuts(*linears(lambda h: h[..., order]))
    assert found["down.weight:1"] == [[order.index(channel)] for channel in range(8)]


def test_an_index_of_some_known_places_leaves_the_others_in_a_family_of_their_own():
    found = cuts(*linears(lambda h: h[..., torch.tensor([6, 1, -3])], read=3))
    used = {"up.weight:0": [[1], [5], [6]], "up.bias:0": [[1], [5], [6]], "down.weight:1": [[1], [2], [0]]}
    unused = {"up.weight:0": [[0], [2], [3], [4], [7]], "up.bias:0": [[0], [2], [3], [4], [7]]}
    assert len(found) == 2 and used in found and unused in found


def test_an_embedding_keeps_its_rows_and_loses_columns():
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.down = nn.Embedding(10, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.words(x))

    found = cuts(Words(), {"x": torch.randint(0, 10, (2, 4))})
    assert found == [{"words.weight:1": singles(6), "down.weight:1": singles(6)}]


class Pictures(nn.Module):
    """Words, some of which are replaced by what another tower makes of pictures."""

    def __init__(self, put: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.words, self.tower, self.down = nn.Embedding(10, 6), nn.Linear(5, 6), nn.Linear(6, 3)
        self.put = put

    def forward(self, ids: Tensor, pixels: Tensor) -> Tensor:
        return self.down(self.put(self.words(ids), ids == 9, self.tower(pixels)))


def _scatter(words: Tensor, where: Tensor, pictures: Tensor) -> Tensor:
    return words.masked_scatter(where[..., None].expand_as(words), pictures)


def _thin_scatter(words: Tensor, where: Tensor, pictures: Tensor) -> Tensor:
    return words.masked_scatter(where[..., None], pictures)


def _put(words: Tensor, where: Tensor, pictures: Tensor) -> Tensor:
    words = words.clone()
    words[where] = pictures
    return words


@pytest.mark.parametrize("put", [_scatter, _thin_scatter, _put])
def test_pictures_put_among_words_share_their_width(put):
    ids = torch.tensor([[1, 9, 9, 2], [9, 3, 9, 4]])
    names = ("words.weight:1", "tower.weight:0", "tower.bias:0", "down.weight:1")
    found = cuts(Pictures(put), {"ids": ids, "pixels": torch.randn(4, 5)})
    assert found == [dict.fromkeys(names, singles(6))]


def test_experts_chosen_by_the_tokens_keep_their_number_and_lose_channels():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(6, 3)
            self.up, self.down = nn.Parameter(torch.randn(3, 6, 5)), nn.Parameter(torch.randn(3, 5, 2))

        def forward(self, x: Tensor) -> Tensor:
            expert = self.router(x).argmax(-1)
            return ((x[:, None] @ self.up[expert]).relu() @ self.down[expert])[:, 0]

    (found,) = cuts(Experts(), {"x": torch.randn(4, 6)})
    assert found == {"up:2": singles(5), "down:1": singles(5)}


def test_an_index_that_parameters_decide_keeps_what_it_chooses_among():
    model, batch = linears(lambda h: h)
    chooser = nn.Linear(6, 4)

    class Choosing(Between):
        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x)
            return self.down(h.gather(1, self.chooser(x).argmax(-1)[..., None].expand_as(h)))

    model = Choosing(lambda h: h, model.up, model.down)
    model.chooser = chooser
    assert cuts(model, batch) == [channels()]


def test_a_mask_that_parameters_made_is_reported():
    model, batch = linears(lambda h: torch.where(h > 0, h, h * 0.1)[h.sum(-1) > 0])
    space = space_of(record_and_propagate(model.eval(), batch))
    assert [frozen.operator for frozen in space.unsupported] == ["index"] and not space.families
