"""Modules that count heads and have no family of heads are named, with the reason."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from geta_hf.qadg import build_space
from geta_hf.qadg.missing_heads import missing_heads

HEADS, SIZE, WIDTH = 4, 8, 32


class Attention(nn.Module):
    def __init__(self, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, kv_heads * SIZE), nn.Linear(WIDTH, kv_heads * SIZE)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, SIZE).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        attended = (self.split(self.q(x)) @ self.split(self.k(x)).transpose(2, 3)).softmax(-1) @ self.split(self.v(x))
        return self.o(attended.transpose(1, 2).reshape(x.shape))


class Looping(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        heads = []
        for place in range(HEADS):
            own = slice(SIZE * place, SIZE * (place + 1))
            heads.append((q[..., own] @ k[..., own].transpose(1, 2)).softmax(-1) @ v[..., own])
        return self.o(torch.cat(heads, -1))


class Indexing(Attention):
    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, x: Tensor) -> Tensor:
        index = torch.tensor([0, 0, 1, 1])
        k, v = self.split(self.k(x))[:, index], self.split(self.v(x))[:, index]
        attended = (self.split(self.q(x)) @ k.transpose(2, 3)).softmax(-1) @ v
        return self.o(attended.transpose(1, 2).reshape(x.shape))


class Striding(Attention):
    def split(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        return x.as_strided((batch, HEADS, length, SIZE), (length * WIDTH, SIZE, WIDTH, 1))


class Model(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.attention = attention
        self.up, self.down, self.head = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.attention(x)
        return self.head(x + self.down(self.up(x).relu()))


def texts(attention: nn.Module) -> tuple[str, ...]:
    model = Model(attention)
    return missing_heads(model, build_space(model, {"x": torch.randn(2, 6, WIDTH)}))


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (Looping(), "takes heads one by one or merges them .* attention:head_dim"),
        (Indexing(), "takes heads one by one or merges them .* attention:head_dim"),
        (Striding(), "as_strided is not followed there"),
    ],
)
def test_heads_that_are_not_found(attention: nn.Module, reason: str) -> None:
    (text,) = texts(attention)
    assert text.startswith("no heads are found in attention (num_heads = 4): ")
    assert re.search(reason, text)


def test_layers_of_torch_are_named_once() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 48, batch_first=True), 2)
    (text,) = texts(encoder)
    assert "attention.layers.*.self_attn (num_heads = 4)" in text and "attention.layers.*.self_attn:head_dim" in text


def test_heads_that_are_found_or_single_are_not_named() -> None:
    assert texts(Attention()) == ()
    single = Looping()
    single.num_heads = 1
    assert texts(single) == ()
