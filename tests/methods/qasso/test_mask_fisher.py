"""The mask score: ⟨g, x⟩ over what reads a group's output is the derivative of the loss by a mask on that output."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForQuestionAnswering, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from geta_hf.config import GETAConfig
from geta_hf.methods.qasso.equations import fisher_scores
from geta_hf.methods.qasso.slices import group_sums
from geta_hf.qadg import PruningSpace, build_space
from geta_hf.qadg.group_labels import consumers, find_group_labels
from tests.conftest import tiny_bert_config
from tests.methods.loop import prepare
from tests.methods.qasso.toy import Toy, batch_at, toy_space


class Convolutions(nn.Module):
    """Channels that a depthwise convolution, a norm and a pool pass on before two layers read them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.each = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.left = nn.Conv2d(8, 5, 1)
        self.right = nn.Conv2d(8, 5, 1)
        self.head = nn.Linear(5 * 16, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.each(self.norm(self.first(x)).relu()).sigmoid()
        return self.head((self.left(hidden) * self.right(hidden)).flatten(1))


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(2, 26).view(2, 12)}


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    return BertForQuestionAnswering(tiny_bert_config(num_hidden_layers=1)), tokens()


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, num_hidden_layers=1, **sizes)), tokens()


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_head=4, n_layer=1, n_positions=16)), tokens()


def convolutions() -> tuple[nn.Module, dict[str, Tensor]]:
    return Convolutions(), {"x": torch.randn(2, 3, 4, 4)}


MODELS: dict[Callable, dict[str, list[str]]] = {
    bert: {
        "heads": ["bert.encoder.layer.0.attention.output.dense"],
        "channels": ["bert.encoder.layer.0.output.dense"],
    },
    llama: {"heads": ["model.layers.0.self_attn.o_proj"], "channels": ["model.layers.0.mlp.down_proj"]},
    gpt2: {"heads": ["transformer.h.0.attn.c_proj"], "channels": ["transformer.h.0.mlp.c_proj"]},
    convolutions: {"channels": ["left", "right"]},
}
"""Which layers read what, by hand."""


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    output = model(**batch)
    values = output if isinstance(output, Tensor) else output[0]
    return (values * torch.linspace(-1, 1, values.numel()).view(values.shape)).square().sum()


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_it_is_the_derivative_by_a_mask_on_the_output(make: Callable) -> None:
    torch.manual_seed(0)
    model, batch = make()
    model.double().eval()
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    space = build_space(model, batch)
    families = [family for family in space.prunable if family.kind in MODELS[make]]
    if make is convolutions:
        families = [family for family in families if family.size == 8]
    assert {family.kind for family in families} == set(MODELS[make])
    masks, handles = {}, []
    for family in families:
        readers = MODELS[make][family.kind]
        reading = {member.tensor: member for member in family.members if member.consumer}
        assert sorted(reading) == sorted(f"{name}.weight" for name in readers)
        mask = masks[family.name] = torch.ones(family.size, dtype=torch.float64, requires_grad=True)
        for name in readers:
            index = reading[f"{name}.weight"].index
            # The oracle's own count of elements: the output's size, shared evenly by the groups, each once.
            assert sorted(index.flatten().tolist()) == list(range(index.numel()))
            owner = torch.empty(index.numel(), dtype=torch.int64)
            owner[index.flatten()] = torch.arange(family.size).repeat_interleave(index.shape[1])

            def multiply(_, args, mask=mask, owner=owner):
                factor = mask[owner]
                return (args[0] * (factor[:, None, None] if args[0].dim() == 4 else factor),)

            handles.append(model.get_submodule(name).register_forward_pre_hook(multiply))
    loss_of(model, batch).backward()
    named = dict(model.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in named.items()}
    groups = sum(family.size for family in families)
    labels = find_group_labels(consumers(families), shapes)
    found = group_sums(labels, named, groups, torch.mul)
    wanted = torch.cat([masks[family.name].grad for family in families])
    assert wanted.abs().min() > 0
    torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-6)


def toy_with_consumers() -> PruningSpace:
    found = []
    for family in toy_space().families:
        members = tuple(
            replace(member, index=member.index.clone(), consumer=member.dim == 1) for member in family.members
        )
        found.append(replace(family, members=members))
    return PruningSpace(families=tuple(found))


@pytest.mark.parametrize("target", ["target_parameters", "target_sparsity"])
@pytest.mark.parametrize("saliency", ["fisher", "mask_fisher"])
def test_training_averages_the_squares_of_what_is_read_and_divides_by_what_is_counted(
    saliency: str, target: str
) -> None:
    config = GETAConfig(saliency=saliency, saliency_decay=0.5, warmup=0, projection=4, joint=15, **{target: 0.3})
    model, _, optimizer = prepare(config, steps=24, space=toy_with_consumers())
    expected = torch.zeros(10)
    for step in range(3):
        x, y = batch_at(step)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        down, out = (model.layers[place].weight for place in (1, 3))
        heads, channels = (down * down.grad).sum(0), (out * out.grad).sum(0)
        if saliency == "fisher":
            for place, rows in ((0, heads), (2, channels)):
                weight, bias = model.layers[place].weight, model.layers[place].bias
                rows += (weight * weight.grad).sum(1) + bias * bias.grad
        heads = heads.view(4, 3).sum(1).flip(0)
        expected = 0.5 * expected + 0.5 * torch.cat([heads, channels]).detach() ** 2
        optimizer.step()
    torch.testing.assert_close(optimizer.qasso_state.mean_square, expected)
    cost = torch.tensor([3 * 8 + 3 + 3 * 8] * 4 + [8 + 1 + 8] * 6)
    if target == "target_sparsity":
        cost = torch.ones(10)
    found = optimizer._scores(optimizer._named())
    torch.testing.assert_close(found, fisher_scores(expected, cost))


def test_families_that_nothing_is_known_to_read_count_entirely_and_that_is_said(caplog) -> None:
    half = toy_with_consumers().families[0]
    space = PruningSpace(families=(half, toy_space().families[1]))
    with caplog.at_level(logging.WARNING):
        _, _, optimizer = prepare(GETAConfig(saliency="mask_fisher"), steps=60, space=space)
    assert "no weight is known to read the output of layers:channels, so" in caplog.text
    scored = {(cut.tensor, cut.dim) for cut in optimizer._scored}
    assert scored == {("layers.1.weight", 1), ("layers.2.weight", 0), ("layers.2.bias", 0), ("layers.3.weight", 1)}
    caplog.clear()
    prepare(GETAConfig(saliency="mask_fisher"), Toy(), steps=60, space=toy_with_consumers())
    assert "no weight is known" not in caplog.text


def test_a_saved_space_knows_its_consumers_and_an_older_one_none(tmp_path) -> None:
    space = replace(toy_with_consumers(), shapes={n: tuple(p.shape) for n, p in Toy().named_parameters()})
    space.save(tmp_path)
    members = [member.consumer for family in PruningSpace.load(tmp_path).families for member in family.members]
    assert members == [False, False, True] * 2
    assert "consumer" not in (tmp_path / "pruning_space.json").read_text().replace('"consumer": true', "")
