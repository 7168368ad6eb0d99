"""Quantizer branches: merged into single vertices, and without any effect on the groups."""

from __future__ import annotations

import pytest
import torch

from geta_hf.qadg import PruningSpace, build_space, verify_space
from geta_hf.qadg.tracing.merge import merge_branches
from geta_hf.qadg.tracing.record_forward import record_forward
from geta_hf.quantization import attach_input_quantizers, attach_quantizers, quantized_layers
from tests.architectures import build

from .models import DetachedQuantizer, FunctionQuantizer, PlainQuantizer, make, quantize_linears

QUANTIZERS = [PlainQuantizer, FunctionQuantizer, DetachedQuantizer]


def as_plain_data(space: PruningSpace) -> list:
    return [
        (f.name, f.kind, f.prunable, f.excludes, [(m.tensor, m.dim, m.index.tolist()) for m in f.members])
        for f in space.families
    ]


@pytest.mark.parametrize("activations", [False, True])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("name", ["bert-qa", "distilbert-sequence", "albert-qa"])
def test_quantizers_change_nothing_about_the_groups(name, quantizer, activations, batch):
    plain = build_space(make(name), batch)
    model = quantize_linears(make(name), quantizer, activations)
    quantized = build_space(model, batch)
    assert as_plain_data(quantized) == as_plain_data(plain)
    assert quantized.shapes == plain.shapes and quantized.unsupported == ()
    verify_space(model, batch, quantized)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_each_branch_becomes_one_vertex(quantizer, batch):
    model = quantize_linears(make("bert-qa"), quantizer, activations=True)
    linears = 2 * 6 + 1
    graph = merge_branches(record_forward(model, batch))
    attached = [node for node in graph.nodes if node.op == "attached"]
    inserted = [node for node in graph.nodes if node.op == "inserted"]
    assert len(attached) == len(inserted) == linears
    assert {node.module.rsplit(".", 1)[-1] for node in attached} == {"weight_quantizer"}
    assert {node.module.rsplit(".", 1)[-1] for node in inserted} == {"input_quantizer"}
    assert not any(node.module.endswith("_quantizer") for node in graph.nodes if not node.body)
    assert all(len(node.body) > 2 for node in attached + inserted)


def test_a_model_without_quantizers_has_nothing_to_merge(bert, batch):
    graph = record_forward(bert, batch)
    assert merge_branches(graph).nodes == graph.nodes


def test_an_activation_is_no_branch_without_a_learned_scalar(batch):
    """ALBERT's gelu is written out in elementwise operators with constants."""
    graph = merge_branches(record_forward(make("albert-qa"), batch))
    assert not any(node.body for node in graph.nodes)


def test_one_source_with_several_quantizers_gives_several_branches():
    class Fan(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = PlainQuantizer(), PlainQuantizer()
            self.up, self.left, self.right = (torch.nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = torch.nn.functional.relu(self.up(x))
            return self.left(self.first(hidden)) + self.right(self.second(hidden))

    graph = merge_branches(record_forward(Fan(), {"x": torch.randn(3, 4)}))
    assert [node.op for node in graph.nodes if node.body] == ["inserted", "inserted"]
    assert [node.op for node in graph.nodes].count("relu") == 1


def test_our_own_quantizers_change_nothing_either(bert, batch):
    plain = build_space(bert, batch)
    attach_quantizers(bert)
    quantized = build_space(bert, batch)
    assert as_plain_data(quantized) == as_plain_data(plain)
    nodes = merge_branches(record_forward(bert, batch)).nodes
    assert [node.op for node in nodes].count("attached") == 2 * 6
    verify_space(bert, batch, quantized)


@pytest.mark.parametrize(
    ("per_channel", "activations", "learn_t"), [(False, True, False), (True, False, False), (True, True, True)]
)
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "resnet"])
def test_neither_channels_nor_activations_change_the_groups(name, per_channel, activations, learn_t):
    model, batch = build(name)
    plain = build_space(model, batch)
    include = ["."] if name == "resnet" else None  # whose blocks are no list of modules
    attach_quantizers(model, include=include, per_channel=per_channel, learn_t=learn_t)
    if activations:
        attach_input_quantizers(model, [batch], learn_t=learn_t)
    quantized = build_space(model, batch)
    assert as_plain_data(quantized) == as_plain_data(plain)
    assert quantized.shapes == plain.shapes and quantized.unsupported == plain.unsupported
    nodes = merge_branches(record_forward(model, batch)).nodes
    layers = len(quantized_layers(model))
    assert [node.op for node in nodes].count("attached") == layers
    assert [node.op for node in nodes].count("inserted") == (layers if activations else 0)
    assert not any(node.op in ("round", "clamp", "minimum", "view") for node in nodes if "quantizer" in node.module)
    if per_channel and activations:
        verify_space(model, batch, quantized)


class ChannelQuantizer(torch.nn.Module):
    """A foreign one: scales and zero points of the output channels, from plain operators."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((channels, 1), 1e-3))
        self.zero = torch.nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        zero = self.zero.unsqueeze(1)
        return (torch.round(x / self.scale + zero).clamp(-128, 127) - zero) * self.scale


class Scaled(torch.nn.Module):
    """Two layers; the rows of the first weight are scaled by what is no quantizer's, then perhaps quantized."""

    def __init__(self, quantized: bool) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(5, 6), torch.nn.Linear(6, 5)
        self.gain = torch.nn.Parameter(torch.rand(6))
        self.quantizer = ChannelQuantizer(6) if quantized else torch.nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.quantizer(self.up.weight * self.gain[:, None])
        return self.down(torch.relu(torch.nn.functional.linear(x, weight, self.up.bias)))


def test_foreign_scales_of_channels_are_no_members(batch):
    plain = build_space(make("bert-qa"), batch)
    model = make("bert-qa")
    for layer in [module for module in model.modules() if type(module) is torch.nn.Linear]:
        layer.__class__ = type("Foreign", (torch.nn.Linear,), {"forward": _on_quantized_weight})
        layer.weight_quantizer = ChannelQuantizer(layer.out_features)
    assert as_plain_data(build_space(model, batch)) == as_plain_data(plain)


def _on_quantized_weight(layer, x):
    return torch.nn.functional.linear(x, layer.weight_quantizer(layer.weight), layer.bias)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_gain_of_channels_is_no_quantizer_and_leaves_with_its_channels(quantized):
    """A mutation of the rule: were the gain taken for a scale, it would stay where its channels leave."""
    torch.manual_seed(0)
    batch = {"x": torch.randn(3, 5)}
    space = build_space(Scaled(quantized), batch, prune=["output"])
    members = {(member.tensor, member.dim) for family in space.families for member in family.members}
    assert {("up.weight", 0), ("gain", 0), ("down.weight", 1)} <= members
    verify_space(Scaled(quantized), batch, space)
    assert not any("quantizer" in tensor for tensor, _ in members)
