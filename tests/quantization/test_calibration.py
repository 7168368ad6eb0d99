"""Quantizers on the inputs of layers: where their ranges come from, what is refused, and what stays as it was."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from geta_hf.errors import GETAError
from geta_hf.quantization import (
    QuantLinear,
    attach_input_quantizers,
    attach_quantizers,
    calibration,
    clipping_value,
    detach_quantizers,
    float_inputs,
    input_quantizer_prefixes,
    quantized_layers,
)
from geta_hf.quantization.calibration import _Range
from tests.quantization.test_attach import in_list


class Chain(nn.Module):
    """Two layers, each with another range of inputs, and one that no batch reaches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 4)])
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, twice: bool = False) -> torch.Tensor:
        hidden = self.layers[1](input=torch.relu(self.layers[0](self.dropout(x))))
        return self.layers[2](hidden) if twice else hidden


def some_batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [{"x": (place + 1) * torch.randn(7, 6, generator=generator)} for place in range(count)]


def chain() -> Chain:
    model = Chain()
    attach_quantizers(model)
    return model


def test_ranges_are_those_of_what_came_in_over_all_batches() -> None:
    model, batches = chain(), some_batches()
    inputs = torch.cat([batch["x"] for batch in batches])
    with torch.no_grad():
        hidden = torch.relu(model.eval().layers[0](inputs))
    found = attach_input_quantizers(model, batches, clipping="max", initial_bits=6, exclude=["2$"])
    assert list(found) == ["layers.0", "layers.1"]
    assert model.layers[0].input_quantizer.q_m.item() == inputs.abs().max().item()
    assert model.layers[1].input_quantizer.q_m.item() == pytest.approx(hidden.max().item())
    assert model.layers[0].input_quantizer.bits().item() == pytest.approx(6)
    assert model.layers[2].input_quantizer is None
    assert input_quantizer_prefixes(model) == {name: f"{name}.input_quantizer" for name in found}
    assert "layers.1.input_quantizer.d" in dict(model.named_parameters())


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_histogram_that_grew_finds_what_all_at_once_would(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [scale * torch.randn(4000, generator=generator) for scale in (0.01, 1.0, 0.3, 2.5)]
    grown = _Range()
    for part in (torch.zeros(5), torch.empty(0), *parts):
        grown.add(part)
    whole = torch.cat(parts)
    assert grown.counts.sum() == whole.numel()
    assert grown.clipping_value(bits, "max") == whole.abs().max().item()
    assert grown.clipping_value(bits, "mse") == pytest.approx(clipping_value(whole, bits), rel=0.03)


def test_ranges_are_those_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads stand for two processes, one of which has seen no negative value, and in one layer nothing at all."""
    generator = torch.Generator().manual_seed(0)
    parts = [0.01 * torch.randn(3000, generator=generator).abs(), torch.randn(5000, generator=generator)]
    both, barrier, sent = threading.Barrier(2), threading.Barrier(2), {}

    def exchange(vector: torch.Tensor, largest: bool = False) -> torch.Tensor:
        sent[threading.get_ident()] = vector
        both.wait()
        values = torch.stack(list(sent.values()))
        barrier.wait()
        return values.amax(0) if largest else values.sum(0)

    def process(number: int) -> list[_Range]:
        ranges = [_Range(), _Range()]
        ranges[0].add(parts[number])
        if number:
            ranges[1].add(parts[number])
        calibration._merge(ranges)
        return ranges

    monkeypatch.setattr(calibration, "over_processes", exchange)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(process, range(2))
    alone = _Range()
    for part in parts:
        alone.add(part)
    for found in (first[0], second[0]):
        assert (found.largest, found.top, found.negative) == (alone.largest, alone.top, True)
        assert torch.equal(found.counts, alone.counts)
    assert torch.equal(first[1].counts, second[1].counts) and first[1].largest == second[1].largest


def test_model_and_chance_are_as_before() -> None:
    model = chain().train()
    model.layers[1].eval()
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    before = torch.get_rng_state()

    class Drawing(Chain):
        def forward(self, x: torch.Tensor, twice: bool = False) -> torch.Tensor:
            return super().forward(x + 0 * torch.rand(1), twice)

    model.__class__ = Drawing
    attach_input_quantizers(model, some_batches(), include=["0$", "1$"])
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and model.dropout.training and not model.layers[1].training
    assert not model.layers[1].input_quantizer.training and model.layers[0].input_quantizer.training
    assert not any(layer._forward_pre_hooks for layer in model.layers)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("learn_t", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 4), (2, 6)),
        (Conv1D(4, 6), (2, 6)),
        (nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="circular"), (2, 3, 8, 8)),
        (nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 7, 7)),
        (nn.Conv1d(4, 6, 3, groups=2, dilation=2), (2, 4, 9)),
    ],
)
def test_each_layer_is_the_plain_one_on_quantized_weight_and_input(layer, shape, per_channel, learn_t) -> None:
    torch.manual_seed(0)
    layer = copy.deepcopy(layer)
    nn.init.normal_(layer.weight)
    x, plain = torch.randn(shape), copy.deepcopy(layer)
    model = nn.Sequential(layer)
    options = {"initial_bits": 4, "target_bits": 4, "learn_t": learn_t}
    attach_quantizers(model, include=["0"], per_channel=per_channel, **options)
    attach_input_quantizers(model, [{"input": x}], **options)
    assert layer.weight_quantizer.d.numel() == (plain(x).shape[1] if per_channel else 1)
    plain.weight.data = layer.quantized_weight().detach()
    rounded = layer.input_quantizer(x)
    assert torch.unique(rounded).numel() <= 15 and not torch.equal(rounded, x)
    out = layer(x)
    assert torch.equal(out, plain(rounded))
    out.square().sum().backward()
    learned = [p for q in (layer.weight_quantizer, layer.input_quantizer) for p in q.parameters() if p.requires_grad]
    assert len(learned) == (6 if learn_t else 4) and all(p.grad.isfinite().all() and p.grad.any() for p in learned)
    with float_inputs(model):
        assert torch.equal(layer(x), plain(x))
    assert torch.equal(layer(x), out)


def test_layers_with_one_weight_have_ranges_of_their_own() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = in_list(first, second)
    model.forward = lambda x: second(100 * first(x))
    attach_quantizers(model)
    attach_input_quantizers(model, [{"x": torch.randn(3, 4)}])
    assert first.input_quantizer is not second.input_quantizer
    assert second.input_quantizer.q_m > 3 * first.input_quantizer.q_m


def test_detaching_takes_both_quantizers_away(bert, batch) -> None:
    bert.eval()
    names, logits = list(bert.state_dict()), bert(**batch).start_logits
    attach_quantizers(bert, per_channel=True, initial_bits=4, target_bits=4)
    attach_input_quantizers(bert, [batch], initial_bits=4, target_bits=4)
    assert len(input_quantizer_prefixes(bert)) == 12
    assert not torch.allclose(bert(**batch).start_logits, logits)
    assert copy.deepcopy(bert)(**batch).start_logits.equal(bert(**batch).start_logits)
    detach_quantizers(bert)
    assert list(bert.state_dict()) == names and torch.equal(bert(**batch).start_logits, logits)
    assert not any("quantizer" in name for module in bert.modules() for name in vars(module))


def test_bad_input_is_refused_and_changes_nothing() -> None:
    model, batches = chain(), some_batches()
    nan = [*batches, {"x": torch.full((2, 6), float("nan"))}]
    refused = [
        ([], {}, "no batch to find the range"),
        (batches[0], {}, r"pass \[batch\]"),
        (batches, {}, r"no calibration batch reached layers\.2 .* exclude the layer"),
        ([{"x": torch.zeros(1, 6)}], {"include": ["0$"]}, r"reached layers\.0 with anything but zeros"),
        (nan, {"exclude": ["2$"]}, r"the input of layers\.0 reaches nan"),
        ([{"y": torch.ones(1)}], {}, "cannot run the calibration batch with"),
        (batches, {"exclude": ["3$"]}, "matches no linear layer"),
        (batches, {"exclude": ["."]}, "no quantized layer to choose from"),
        (batches, {"exclude": ["2$"], "clipping": "best"}, "'mse' or 'max'"),
    ]
    for given, options, message in refused:
        with pytest.raises(GETAError, match=message):
            attach_input_quantizers(model, given, **options)
        assert not input_quantizer_prefixes(model) and not model.layers[0]._forward_pre_hooks
    attach_input_quantizers(model, batches, exclude=["2$"])
    with pytest.raises(GETAError, match=r"layers\.0 quantizes its input already"):
        attach_input_quantizers(model, batches)
    with pytest.raises(GETAError, match="call attach_quantizers first"):
        attach_input_quantizers(Chain(), batches)
    assert all(isinstance(layer, QuantLinear) for layer in quantized_layers(model).values())


def test_batch_norm_that_has_seen_nothing_uses_the_statistics_of_each_batch() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 4, 5, 5)

    def network() -> nn.Sequential:
        model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
        model[0].weight.data *= 0.01  # a signal that only normalization makes large
        return model

    unseen, seen = network(), network()
    seen[1].train()(seen[0](x))  # one batch of training
    seen.eval()
    for model in (unseen, seen):
        before = copy.deepcopy(dict(model[1].named_buffers()))
        training = [module.training for module in model.modules()]
        attach_quantizers(model, include=["."], initial_bits=8)
        attach_input_quantizers(model, [{"input": x}], clipping="max")
        assert all(torch.equal(before[name], value) for name, value in model[1].named_buffers())
        assert [module.training for module in (model, *model)] == training and model[1].momentum == 0.1
    assert float(unseen[2].input_quantizer.q_m.detach()) > 2  # in training too this input has variance 1
    assert 0.1 < float(seen[2].input_quantizer.q_m.detach()) < 2  # running statistics of one step, which are kept to
