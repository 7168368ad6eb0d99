"""What a model or a batch can do wrong is a clear error, or reported, and never a wrong space."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from geta_hf.errors import GETAError
from geta_hf.qadg import build_space, verify_space

from .models import Block

X = {"x": torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))}


class Wrapped(nn.Module):
    """A block with something odd around it."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.other = Block(torch.relu), Block(torch.tanh)


def test_an_argument_that_the_batch_lacks():
    class Needs(Wrapped):
        def forward(self, x: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
            return self.block(x) + extra

    with pytest.raises(GETAError, match=r"Needs cannot run the batch with inputs x \(2, 4, 6\): .*'extra'"):
        build_space(Needs(), X)


@pytest.mark.parametrize("output", [None, "text", 3.0, {"n": 1}, []])
def test_an_output_without_tensors(output):
    class Silent(Wrapped):
        def forward(self, x: torch.Tensor) -> object:
            self.block(x)
            return output

    with pytest.raises(GETAError, match="without a tensor"):
        build_space(Silent(), X)


def test_control_flow_that_alternates_from_call_to_call():
    class Alternating(Wrapped):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            STATE.append(1)
            return (self.block if len(STATE) % 2 else self.other)(x)

    STATE: list[int] = []
    with pytest.raises(GETAError, match="took another path when it ran the same batch a second time, first at t in"):
        build_space(Alternating(), X)


def test_control_flow_that_depends_on_the_batch_is_found_by_other_batches():
    class Choosy(Wrapped):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(x) if len(x) > 1 else self.block.norm(x + self.block.up(x)[..., :6])

    model = Choosy()
    space = build_space(model, X)
    assert [family.name for family in space.prunable] == ["block:channels"]
    with pytest.raises(GETAError, match=r"block:channels is not found again"):
        verify_space(model, X, space)


def test_a_path_that_the_content_decides_is_found_by_batches_of_both_kinds():
    class Choosy(Wrapped):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.block.up(x)
            if x.sum() > 0:
                hidden = hidden.flip(-1)
            return self.block.norm(x + self.block.down(hidden.relu()))

    model, up, down = Choosy(), {"x": X["x"].abs()}, {"x": -X["x"].abs()}
    space = build_space(model, down)
    verify_space(model, [down], space)
    with pytest.raises(GETAError, match="is not found again"):
        verify_space(model, [down, up], space)


def test_parameters_that_nothing_reads_are_reported_and_in_no_family():
    class Lazy(Wrapped):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(x)

    space = build_space(Lazy(), X)
    assert space.untouched == tuple(f"other.{name}" for name, _ in Block(torch.tanh).named_parameters())
    assert not any(member.tensor.startswith("other") for family in space.families for member in family.members)


def test_hooks_lists_and_caches_are_as_before():
    class Busy(Wrapped):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[torch.Tensor] = []
            self.cache: dict[str, torch.Tensor] = {}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.append(x)
            self.cache["up"] = self.block.up.weight
            self.block.register_forward_hook(lambda *_: None)
            self.fresh = x
            return self.block(x)

    model = Busy()
    hooks, seen, cache = model.block._forward_hooks, model.seen, model.cache
    build_space(model, X)
    assert model.block._forward_hooks is hooks and not hooks
    assert model.seen is seen and not seen and model.cache is cache and not cache
    assert not hasattr(model, "fresh")
