"""Widths of groups and of rows: what follows which choice, expected sizes by brute force, targets met exactly."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

from geta_hf import SearchConfig
from geta_hf.config import read_config
from geta_hf.errors import GETAError
from geta_hf.methods.search.choices import sorted_weights
from geta_hf.quantization import attach_quantizers, quantized_layers
from tests.methods import loop
from tests.methods.qasso.toy import Toy, batch_at, toy_space

STEPS = 12
WIDTHS = [2, 3, 6]


def config_of(granularity: str = "group", **changes: Any) -> SearchConfig:
    values = {"target_sparsity": 0.3, "mean_bits": 4, "bits": (2, 6), "bit_choices": WIDTHS, "warmup": 1, "search": 7}
    return SearchConfig(**{**values, "granularity": granularity, **changes})


def prepare(config: SearchConfig, **kwargs: Any) -> tuple[nn.Module, Any, Any]:
    return loop.prepare(config, steps=STEPS, **kwargs)


def scatter(optimizer: Any) -> None:
    """Give all choices logits of their own, so that widths differ."""
    generator = torch.Generator().manual_seed(3)
    optimizer.width_logits.data.add_(torch.randn(optimizer.width_logits.shape, generator=generator))
    optimizer.keep_logits.data.add_(torch.randn(optimizer.keep_logits.shape, generator=generator))


def layer_bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: own.weight_quantizer.bits().round().long() for name, own in quantized_layers(model).items()}


def remaining_mean(model: nn.Module) -> float:
    """The mean width of the weights that are not zero."""
    bits = total = 0.0
    for layer in quantized_layers(model).values():
        width = layer.weight_quantizer.bits().round()
        spread = width[:, None] if layer.weight_quantizer.channel_dim == 0 else width[None, :]
        there = (layer.weight != 0).double()
        bits += float((there * spread).sum())
        total += float(there.sum())
    return bits / total


def test_rows_and_columns_of_a_group_have_its_width() -> None:
    model, method, optimizer = prepare(config_of())
    dims = [layer.weight_quantizer.channel_dim for layer in quantized_layers(model).values()]
    assert dims == [0, 1, 0, 1] and optimizer.width_choices.count == 4 + 10
    scatter(optimizer)
    loop.train(model, method, optimizer, steps=STEPS)
    bits = layer_bits(model)
    found = method.result()
    differing = set()
    for family, (up, down) in zip(
        toy_space().families, (("layers.0", "layers.1"), ("layers.2", "layers.3")), strict=True
    ):
        for group, index in enumerate(family.members[0].index):
            own = {*bits[up][index].tolist(), *bits[down][family.members[2].index[group]].tolist()}
            assert len(own) == 1
            differing |= own
    assert len(differing) > 1
    assert torch.equal(found.channel_bits["layers.0"], bits["layers.0"])
    assert found.weight_bits["layers.0"] == int(bits["layers.0"].max())
    assert found.removed_groups == 3
    # A group more of one bit is at most 3 · 17 of the weights.
    assert 3.5 < remaining_mean(model) <= 4 + 1e-6
    assert method.metrics()["mean_bits"] == pytest.approx(remaining_mean(model), abs=2e-3)
    assert method.metrics()["max_bits"] == max(int(own.max()) for own in bits.values())


def test_every_row_has_a_width_of_its_own() -> None:
    model, method, optimizer = prepare(config_of("row"))
    assert {layer.weight_quantizer.channel_dim for layer in quantized_layers(model).values()} == {0}
    assert optimizer.width_choices.count == 12 + 8 + 6 + 8
    scatter(optimizer)
    loop.train(model, method, optimizer, steps=STEPS)
    bits = layer_bits(model)
    assert all(len(own.unique()) > 1 for own in bits.values())
    assert 3.9 < remaining_mean(model) <= 4 + 1e-6 and method.result().removed_groups == 3


@pytest.mark.parametrize("granularity", ["group", "row"])
@pytest.mark.parametrize("targets", [{"target_bops": 0.06}, {"target_bytes": 1540}])
def test_a_size_is_met_and_spent(granularity: str, targets: dict[str, Any]) -> None:
    config = SearchConfig(bits=(2, 6), warmup=1, search=7, granularity=granularity, **targets)
    model, method, optimizer = prepare(config)
    scatter(optimizer)
    loop.train(model, method, optimizer, steps=STEPS)
    metrics = method.metrics()
    if "target_bops" in targets:
        full = sum(layer.weight.numel() for layer in quantized_layers(model).values())
        there = sum(int((layer.weight != 0).sum()) for layer in quantized_layers(model).values())
        spent = remaining_mean(model) * there / (32 * full)
        assert 0.95 * 0.06 < spent <= 0.06 and metrics["relative_bops"] == pytest.approx(spent, abs=1e-4)
        return
    rows = optimizer._rows()
    spent = rows.stored_bytes(optimizer.ledger, optimizer.target, optimizer.removed, optimizer.entry_bits)
    # Tables of widths and their names in the header are a large part of so small a file.
    assert 1540 - 150 < spent <= 1540


@pytest.mark.parametrize("granularity", ["group", "row"])
def test_expected_widths_are_brute_force(granularity: str) -> None:
    _, _, optimizer = prepare(config_of(granularity))
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(10, generator=generator)
    choices = optimizer.width_choices
    shares = torch.rand(choices.count, 3, generator=generator).softmax(1)
    found = choices.by_weight(keep, shares)
    for number, span in enumerate(optimizer.quantizers.spans[p] for p in optimizer.quantizers.prefixes):
        total, sums = 0.0, torch.zeros(3)
        for entry in range(span.start, span.stop):
            group = int(choices.group[entry])
            there = float(keep[group]) if group < 10 else 1.0
            total += there
            sums += there * shares[int(choices.of_entry[entry])]
        torch.testing.assert_close(found[number], sums / total)


@pytest.mark.parametrize("granularity", ["group", "row"])
def test_gradients_of_choices_are_those_of_finite_differences(granularity: str) -> None:
    model, method, optimizer = prepare(config_of(granularity, warmup=0))
    scatter(optimizer)
    x, y = batch_at(0)

    def value() -> torch.Tensor:
        method.before_backward(model)
        return (model(x) - y).square().mean() + method.extra_loss(model)

    value().backward()
    grad = optimizer.width_logits.grad.clone()
    for place in torch.nonzero(grad.abs() > 0.3 * grad.abs().max()).tolist()[:4]:
        ends = []
        for change in (1e-2, -1e-2):
            with torch.no_grad():
                optimizer.width_logits[tuple(place)] += change
            ends.append(float(value().detach()))
            with torch.no_grad():
                optimizer.width_logits[tuple(place)] -= change
        assert float(grad[tuple(place)]) == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=0.03, abs=1e-4)


@pytest.mark.parametrize("sampling", ["gumbel", "hard_concrete"])
@pytest.mark.parametrize("granularity", ["group", "row"])
def test_a_resumed_loop_ends_the_same(granularity: str, sampling: str) -> None:
    config = config_of(granularity, sampling=sampling)
    torch.manual_seed(1)
    full, method, optimizer = prepare(config)
    scatter(optimizer)
    loop.train(full, method, optimizer, steps=10)
    saved = io.BytesIO()
    torch.save({"model": full.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    loop.train(full, method, optimizer, steps=STEPS)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    fresh, method, optimizer = prepare(config)
    fresh.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    loop.train(fresh, method, optimizer, steps=STEPS)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), full.parameters(), strict=True))
    assert read_config(config.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"granularity": "head"}, "SearchConfig.granularity = 'head' must be one of layer, group, row"),
        ({"per_channel": False}, "granularity = 'group' gives rows widths, but with grid = 'layer'"),
        ({"grid": "block32"}, "granularity = 'group' gives rows widths, but with grid = 'block32'"),
    ],
)
def test_bad_rules_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GETAError, match=message):
        config_of(**changes)


def test_a_model_without_a_space_has_widths_of_layers() -> None:
    """As for a plan of memory alone, where a checkpoint says which layers have columns."""
    method = loop.make_method(config_of())
    method.by_input = ["layers.1"]
    model = Toy()
    method.attach(model, None)
    dims = [layer.weight_quantizer.channel_dim for layer in quantized_layers(model).values()]
    assert dims == [0, 1, 0, 0]
    assert "layers.1.weight_quantizer.by_input" in model.state_dict()


def test_columns_are_rounded_in_one_pass_with_the_product() -> None:
    """The same outputs and gradients as from the rounded weight itself."""
    torch.manual_seed(0)
    layer = nn.ModuleList([nn.Linear(6, 4)])
    attach_quantizers(layer, initial_bits=3, include=["0"], grid="channel", by_input=["0"])
    own = layer[0]
    x = torch.randn(5, 6, requires_grad=True)
    grad = torch.randn(5, 4)

    def run(out: torch.Tensor) -> list[torch.Tensor]:
        leaves = [x, own.weight, own.bias, own.weight_quantizer.d, own.weight_quantizer.q_m]
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    expected = run(nn.functional.linear(x, own.quantized_weight(), own.bias))
    for found, wanted in zip(run(own(x)), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert own.weight_quantizer.d.shape == (6,)


def test_memory_counts_the_choices_of_rows() -> None:
    for granularity, choices, entries in (("group", 4 + 10, 12 + 12 + 6 + 6), ("row", 34, 34)):
        model, method, _ = prepare(config_of(granularity))
        kept = 4 * (entries * 3 + 4 * (choices * 3 + 10)) + 24 * entries
        assert method.memory(model, toy_space(), 3).kept == kept


def test_only_what_an_export_sorts_counts_as_sorted() -> None:
    """Channels in their order; no heads, and no weight whose rows hold all channels twice."""
    for granularity, wanted in (("group", {"layers.2.weight", "layers.3.weight"}), ("row", {"layers.2.weight"})):
        _, _, optimizer = prepare(config_of(granularity))
        optimizer.width_choices.to(torch.device("cpu"))
        found = sorted_weights(optimizer.families, optimizer.width_choices, optimizer.quantizers)
        assert found == wanted
        choices, spans = optimizer.width_choices, optimizer.quantizers.spans
        span = spans["layers.2.weight_quantizer"]
        choices.group[span] = choices.group[span].view(2, 3).t().flatten()
        assert sorted_weights(optimizer.families, choices, optimizer.quantizers) == wanted - {"layers.2.weight"}
