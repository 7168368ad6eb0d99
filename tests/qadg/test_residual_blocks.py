"""Blocks that may be left out: those through which the residual stream comes unchanged when they write nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from geta_hf.qadg.residual_blocks import find_blocks, skipping
from tests.architectures import build

CAUSAL = ("phi", "phi3", "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "mixtral", "qwen2_moe")
WRITES = {
    "phi": ("self_attn.dense", "mlp.fc2"),
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
}


def reasons(name: str) -> list[str]:
    return [block.reason for block in find_blocks(*build(name))]


@pytest.mark.parametrize("name", CAUSAL)
def test_every_layer_of_a_causal_model_may_leave(name: str) -> None:
    model, batch = build(name)
    blocks = find_blocks(model, batch)
    assert [block.name for block in blocks] == ["model.layers.0", "model.layers.1"]
    assert [(block.reason, block.returns, block.series) for block in blocks] == [("", 0, "model.layers")] * 2


@pytest.mark.parametrize("name", ["bert", "bart", "opt-projected", "doge"])
def test_a_block_that_normalises_the_stream_is_refused(name: str) -> None:
    assert reasons(name) and all("does not come through unchanged" in reason for reason in reasons(name))


def test_a_block_with_more_outputs_that_runs_often_or_is_shared_is_refused() -> None:
    assert all("returns more than the residual stream" in reason for reason in reasons("t5"))
    assert all("times in a forward pass" in reason for reason in reasons("hrm_text"))
    assert reasons("albert") == []  # one block, used over and over
    model, batch = build("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    shared = "it shares a parameter with model.layers.{}.mlp.up_proj.weight"
    assert [block.reason for block in find_blocks(model, batch)] == [shared.format(1), shared.format(0)]


@pytest.mark.parametrize("name", WRITES)
@torch.no_grad()
def test_a_skipped_block_is_one_that_writes_nothing(name: str) -> None:
    """Independently of the graph: with the layers zeroed that are known to write to the stream, the logits are equal
    bit for bit."""
    model, batch = build(name)
    first = find_blocks(model, batch)[0]
    with skipping(model, [first]):
        skipped = model(**batch).logits
    assert not torch.equal(skipped, model(**batch).logits)
    for leaf in WRITES[name]:
        for parameter in model.get_submodule(f"{first.name}.{leaf}").parameters():
            parameter.zero_()
    assert torch.equal(skipped, model(**batch).logits)


def test_the_model_is_left_as_it_was() -> None:
    model, batch = build("phi")
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    blocks = find_blocks(model, batch)
    with skipping(model, blocks):
        assert all("forward" in vars(layer) for layer in model.model.layers)
    assert model.training and not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Toy(nn.Module):
    """Blocks x -> keep · x + f(x)."""

    class Block(nn.Module):
        def __init__(self, keep: float) -> None:
            super().__init__()
            self.keep, self.up, self.down = keep, nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, stream: Tensor) -> tuple[Tensor, None]:
            return self.keep * stream + self.down(self.up(stream).relu()), None

    def __init__(self, *keeps: float) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(Toy.Block(keep) for keep in keeps)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.first(x)
        for block in self.blocks:
            stream, _ = block(stream=stream)
        return self.last(stream)


@torch.no_grad()
def test_what_a_block_does_decides_and_not_its_name() -> None:
    torch.manual_seed(0)
    toy, batch = Toy(1.0, 0.5, 1.0), {"x": torch.randn(2, 4)}
    blocks = find_blocks(toy, batch)
    assert [bool(block.reason) for block in blocks] == [False, True, False]
    assert [block.returns for block in blocks] == [2, 2, 2]
    with skipping(toy, [blocks[0], blocks[2]]):
        expected = toy.last(toy.blocks[1](toy.first(batch["x"]))[0])
        assert torch.equal(toy(**batch), expected)
