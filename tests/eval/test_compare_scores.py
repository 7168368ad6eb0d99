"""Scores of other methods against loops over their formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from eval.compare import scores
from geta_hf.qadg import PruningSpace
from tests.spaces import build_space
from tests.tiny_tasks import tiny_llama


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return tiny_llama().eval()


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 20, (2, 6), generator=generator) for _ in range(2)]
    return [{"input_ids": row, "labels": row} for row in rows]


@pytest.fixture(scope="module")
def space(llama: LlamaForCausalLM, batches: list[dict[str, Tensor]]) -> PruningSpace:
    return build_space(llama, batches[0])


@pytest.fixture(scope="module")
def inputs(llama: LlamaForCausalLM, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What comes into each linear layer, float64, shape (tokens, inputs)."""
    found: dict[str, list[Tensor]] = {}
    hooks = []
    for name, layer in llama.named_modules():
        if isinstance(layer, torch.nn.Linear):
            own = found.setdefault(name, [])
            hooks.append(layer.register_forward_pre_hook(lambda _, args, own=own: own.append(args[0].double())))
    with torch.no_grad():
        for batch in batches:
            llama(**batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts).flatten(0, 1) for name, parts in found.items()}


def by_reader(space: PruningSpace, score: Callable[[str, int], float]) -> Tensor:
    """Return for each group the mean of score(layer, input) over all inputs that read it."""
    found = []
    for family in space.trainable:
        for group in range(family.size):
            values = [
                score(member.tensor.removesuffix(".weight"), int(place))
                for member in family.members
                if member.consumer
                for place in member.index[group].flatten()
            ]
            found.append(sum(values) / len(values))
    return torch.tensor(found, dtype=torch.float64)


def test_taylor(llama: LlamaForCausalLM, batches: list[dict[str, Tensor]], space: PruningSpace) -> None:
    llama.zero_grad()
    sum(llama(**batch).loss for batch in batches).div(len(batches)).backward()
    named = dict(llama.named_parameters())
    expected = []
    for family in space.trainable:
        for group in range(family.size):
            total = 0.0
            for member in family.members:
                x = named[member.tensor].movedim(member.dim, 0)[member.index[group].flatten()]
                g = named[member.tensor].grad.movedim(member.dim, 0)[member.index[group].flatten()]
                total += float((x * g).abs().sum().detach())
            expected.append(total)
    found = scores.taylor(llama, space.trainable, batches)
    assert torch.allclose(found, torch.tensor(expected).double(), rtol=1e-5)
    assert all(parameter.grad is None for parameter in llama.parameters())


def test_wanda(
    llama: LlamaForCausalLM, batches: list[dict[str, Tensor]], inputs: dict[str, Tensor], space: PruningSpace
) -> None:
    def score(name: str, place: int) -> float:
        column = llama.get_submodule(name).weight[:, place].detach().double()
        norm = inputs[name][:, place].square().mean() ** 0.5
        return float(sum(abs(w) * norm for w in column))

    found = scores.wanda(llama, space.trainable, batches)
    assert torch.allclose(found, by_reader(space, score), rtol=1e-6)


def test_activation(
    llama: LlamaForCausalLM, batches: list[dict[str, Tensor]], inputs: dict[str, Tensor], space: PruningSpace
) -> None:
    expected = by_reader(space, lambda name, place: float(inputs[name][:, place].square().mean()))
    assert torch.allclose(scores.activation(llama, space.trainable, batches), expected.sqrt(), rtol=1e-6)


def test_flap(
    llama: LlamaForCausalLM, batches: list[dict[str, Tensor]], inputs: dict[str, Tensor], space: PruningSpace
) -> None:
    def score(name: str, place: int) -> float:
        column = llama.get_submodule(name).weight[:, place].detach().double()
        return float(inputs[name][:, place].var(correction=0) * sum(w * w for w in column))

    raw = by_reader(space, score)
    start = 0
    for family in space.trainable:
        own = raw[start : start + family.size]
        raw[start : start + family.size] = (own - own.mean()) / own.std()
        start += family.size
    assert torch.allclose(scores.flap(llama, space.trainable, batches), raw, rtol=1e-6, atol=1e-6)


def test_magnitude(llama: LlamaForCausalLM, space: PruningSpace) -> None:
    named = dict(llama.named_parameters())
    family = space.trainable[0]
    expected = sum(
        float(named[member.tensor].detach().movedim(member.dim, 0)[member.index[1].flatten()].square().sum())
        for member in family.members
    )
    assert float(scores.magnitude(llama, space.trainable, [])[1]) == pytest.approx(expected, rel=1e-5)
