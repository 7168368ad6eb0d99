"""From calls to the attributes that a cut changes, on modules whose code is seen in full."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig

from geta_hf.surgery.fixes import write_attribute
from geta_hf.surgery.size_equations import RULES, WANTED, RefusalError
from geta_hf.surgery.size_trace import InconsistentError, trace_sizes
from geta_hf.surgery.slice import slice_model
from geta_hf.surgery.solve_attributes import solve

WIDTH = 12


class Middle(nn.Module):
    """A linear layer, something of the test's own, and a linear layer back: 12 channels that can be cut."""

    def __init__(self, parts: int = 1, **attributes: Any) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, parts * WIDTH), nn.Linear(WIDTH, 5)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.down(self.middle(self.up(x)))}

    def middle(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Heads(Middle):
    """Viewed as heads and back."""

    def middle(self, x: Tensor) -> Tensor:
        x = x.view(*x.shape[:-1], self.heads, self.size)
        return x.relu().reshape(*x.shape[:-2], self.heads * self.size)


class FromConfig(Middle):
    def middle(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.config.num_attention_heads, -1).flatten(-2)


class Joined(Middle):
    def middle(self, x: Tensor) -> Tensor:
        gate, value = x.split(self.sizes, dim=-1)
        return gate * value


class Asserted(Middle):
    """The width is only ever compared."""

    def middle(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.width:
            raise ValueError("another width")
        return x


class Sliced(Middle):
    def middle(self, x: Tensor) -> Tensor:
        return torch.cat([x[..., : self.half], -x[..., self.half :]], dim=-1)


class Made(Middle):
    def middle(self, x: Tensor) -> Tensor:
        return x + torch.zeros(x.shape[0], self.width)


BATCH = {"x": torch.randn(3, 5, generator=torch.Generator().manual_seed(0))}
HEAD = torch.tensor([0, 1, 2, 3, 8, 9, 10, 11])  # the middle one of three heads of four leaves


def kept(index: Tensor, parts: int = 1) -> dict[str, dict[int, Tensor]]:
    rows = torch.cat([index + part * WIDTH for part in range(parts)])
    return {"up.weight": {0: rows}, "up.bias": {0: rows}, "down.weight": {1: index}}


def check(model: nn.Module, keep: dict[str, dict[int, Tensor]], expected: dict[str, int]) -> None:
    """The solution is the expected one, and the model then computes what it did with zeros."""
    values = solve([trace_sizes(model, BATCH, WANTED)], keep)
    assert {str(attribute): value for attribute, value in values.items()} == expected
    zeros = model.down.weight.detach().clone()
    gone = torch.ones(WIDTH, dtype=torch.bool)
    gone[keep["down.weight"][1]] = False
    zeros[:, gone] = 0
    full = model.down.weight.data
    model.down.weight.data = zeros
    reference = model(**BATCH)["y"]
    model.down.weight.data = full
    slice_model(model, keep, values)
    torch.testing.assert_close(model(**BATCH)["y"], reference)


@pytest.mark.parametrize(
    ("model", "keep", "expected"),
    [
        (Heads(heads=3, size=4), kept(HEAD), {"heads": 2}),
        (FromConfig(config=BertConfig(num_attention_heads=3)), kept(HEAD), {"config.num_attention_heads": 2}),
        (Joined(2, sizes=[12, 12]), kept(HEAD[:5], 2), {"sizes[0]": 5, "sizes[1]": 5}),
        (Asserted(width=12), kept(HEAD), {"width": 8}),
        (Sliced(half=6), kept(torch.tensor([0, 1, 7, 8, 9])), {"half": 2}),
        (Made(width=12), kept(HEAD), {"width": 8}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_attributes_follow(model: nn.Module, keep: dict, expected: dict[str, int]) -> None:
    before = {name: value for name, value in vars(model).items() if not name.startswith("_")}
    solve([trace_sizes(model, BATCH, WANTED)], keep)
    assert {name: value for name, value in vars(model).items() if not name.startswith("_")} == before
    check(model, keep, expected)


class Literal(Middle):
    def middle(self, x: Tensor) -> Tensor:
        return x.view(-1, 3, 4).flatten(1)


class RunTimeScale(Middle):
    def middle(self, x: Tensor) -> Tensor:
        return x / math.sqrt(x.shape[-1])


class TensorScale(Middle):
    def middle(self, x: Tensor) -> Tensor:
        return x * self.width


class Slopes(Middle):
    def middle(self, x: Tensor) -> Tensor:
        return x * torch.arange(self.width)


class DefaultScale(Middle):
    def middle(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(1)
        return F.scaled_dot_product_attention(x, x, x).squeeze(1)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Literal(), r"view at test_solve_attributes.py:\d+ in the model: the code fixes 3, where 2 is needed"),
        (RunTimeScale(), r"test_solve_attributes.py:\d+ computes with the number 12, which would become 8"),
        (Slopes(width=12), r"arange at test_solve_attributes.py:\d+: its content cannot lose other elements"),
        (DefaultScale(), r"the default scale at test_solve_attributes.py:\d+ computes with the number 12"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_refusals_say_where_and_why(model: nn.Module, reason: str) -> None:
    with pytest.raises(RefusalError, match=reason):
        solve([trace_sizes(model, BATCH, WANTED)], kept(HEAD))


def test_a_number_that_scales_may_not_follow() -> None:
    class Both(Middle):
        def middle(self, x: Tensor) -> Tensor:
            return x.view(-1, self.width) * self.width

    with pytest.raises(RefusalError, match=r"mul at .* computes with the number 12"):
        solve([trace_sizes(Both(width=12), BATCH, WANTED)], kept(HEAD))
    assert solve([trace_sizes(TensorScale(width=12), BATCH, WANTED)], kept(HEAD)) == {}


def test_slopes_may_lose_their_last_elements() -> None:
    assert list(solve([trace_sizes(Slopes(width=12), BATCH, WANTED)], kept(torch.arange(9))).values()) == [9]


class Grouped(nn.Module):
    """A depthwise and a normalised convolution, whose groups follow their channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depth = nn.Conv1d(5, WIDTH, 1), nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH)
        self.norm, self.last = nn.GroupNorm(WIDTH, WIDTH), nn.Conv1d(WIDTH, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.last(self.norm(self.depth(self.first(x))))}


def test_groups_of_convolutions_and_norms_follow() -> None:
    model, batch = Grouped(), {"x": torch.randn(2, 5, 7)}
    rows = {f"{n}.{leaf}": {0: HEAD} for n in ("first", "depth", "norm") for leaf in ("weight", "bias")}
    keep = {**rows, "last.weight": {1: HEAD}}
    values = solve([trace_sizes(model, batch, WANTED)], keep)
    fixes = slice_model(model, keep, values)
    assert fixes["attrs"]["depth"] == {"groups": 8, "in_channels": 8, "out_channels": 8}
    assert fixes["attrs"]["norm"] == {"num_groups": 8, "num_channels": 8}
    assert model(**batch)["y"].shape == (2, 5, 5)


def test_indices_that_do_not_leave_together_are_refused() -> None:
    keep = kept(HEAD)
    del keep["up.bias"]
    with pytest.raises(InconsistentError, match=r"dim 0 of up.bias cannot be cut"):
        solve([trace_sizes(Heads(heads=3, size=4), BATCH, WANTED)], keep)


def test_without_its_rule_a_call_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutation: with the equations of `view` and `reshape` dropped, the attribute stays, and the forward fails."""
    model = Heads(heads=3, size=4)
    for name in ("view", "reshape"):
        monkeypatch.delitem(RULES, name)
    values = solve([trace_sizes(model, BATCH, WANTED)], kept(HEAD))
    assert values == {}
    slice_model(model, kept(HEAD), values)
    with pytest.raises(RuntimeError, match="invalid for input"):
        model(**BATCH)


def test_attributes_are_written_where_they_were_read() -> None:
    config = BertConfig(num_attention_heads=3)
    model, other = FromConfig(config=config), FromConfig(config=config)
    write_attribute(model, "config.num_attention_heads", 2)
    assert (model.config.num_attention_heads, other.config.num_attention_heads) == (2, 3)
    joined = Joined(2, sizes=[12, 12])
    write_attribute(joined, "sizes[1]", 5)
    assert joined.sizes == [12, 5]
