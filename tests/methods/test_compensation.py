"""Weights make up for removed inputs and for rounding in the midst of training, and a resumed run does the same."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from geta_hf.config import GETAConfig
from geta_hf.errors import GETAError
from geta_hf.methods import PostTrainingConfig
from geta_hf.methods.compensation import Compensation, compensation_bytes, find_kept
from geta_hf.methods.qasso.optimizer import QASSO
from geta_hf.qadg.group_labels import find_group_labels
from geta_hf.qadg.group_types import Family, Member
from geta_hf.qadg.space import PruningSpace
from geta_hf.quantization import attach_quantizers, quantized_layers
from geta_hf.quantization import covariances as covariances_module
from geta_hf.quantization.maths import quantize
from tests.methods.loop import calibration, prepare, train
from tests.methods.qasso.toy import Toy, toy_space

STAGES = {"warmup": 5, "projection": 8, "joint": 31, "pruning_periods": 3, "bits": (3, 8), "target_sparsity": 0.5}


def read_space() -> PruningSpace:
    """The toy's space, which says which columns read the output of groups."""
    families = []
    for family in toy_space().families:
        members = tuple(replace(member, consumer=member.dim == 1) for member in family.members)
        families.append(replace(family, members=members))
    return PruningSpace(tuple(families))


def config_of(**changes) -> GETAConfig:
    return GETAConfig(**{**STAGES, **changes})


def run(config: GETAConfig, **kwargs) -> tuple[nn.Module, QASSO]:
    model, method, optimizer = prepare(config, space=read_space())
    assert isinstance(optimizer, QASSO)
    train(model, method, optimizer, **kwargs)
    method.finish()
    return model, optimizer


class Pair(nn.Module):
    """A layer whose outputs are groups, and the layer that reads them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.kind = kind
        if kind == "conv":
            self.blocks = nn.ModuleList([nn.Conv2d(2, 6, 3), nn.Conv2d(6, 4, 2)])
        elif kind == "conv1d":
            self.blocks = nn.ModuleList([Conv1D(6, 5), Conv1D(4, 6)])
        else:
            self.blocks = nn.ModuleList([nn.Linear(5, 6), nn.Linear(6, 4)])

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.blocks
        return second(torch.relu(first(x)))

    def inputs(self) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        return (
            torch.randn(6, 2, 5, 5, generator=generator)
            if self.kind == "conv"
            else torch.randn(40, 5, generator=generator)
        )

    def family(self) -> Family:
        index = torch.arange(6).view(6, 1)
        out = 1 if self.kind == "conv1d" else 0
        members = (
            Member("blocks.0.weight", out, index),
            Member("blocks.0.bias", 0, index),
            Member("blocks.1.weight", 1 - out, index, consumer=True),
        )
        return Family("channels", "channels", members, prunable=True)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv"])
def test_the_reader_is_refitted_as_least_squares_has_it(kind: str) -> None:
    model = Pair(kind)
    family, x = model.family(), model.inputs()
    labels = find_group_labels([family], {name: tuple(p.shape) for name, p in model.named_parameters()})
    leaving, gone = torch.tensor([False, True, False, False, True, False]), torch.zeros(6, dtype=torch.bool)
    expected = model(x).detach()
    untouched = model.blocks[0].weight.detach().clone()
    hidden = torch.relu(model.blocks[0](x)).detach()
    Compensation(model, [{"x": x[:3]}, {"x": x[3:]}]).refit(labels, [family], leaving, gone)
    assert torch.equal(model.blocks[0].weight, untouched)

    def removed(weight: Tensor) -> Tensor:
        weight = weight.detach().clone()
        weight.index_fill_(0 if kind == "conv1d" else 1, leaving.nonzero().flatten(), 0)
        return weight

    found = removed(model.blocks[1].weight)
    # lstsq on the very inputs, without damping, is the least error that any weights can have.
    if kind == "conv":
        rows = nn.functional.unfold(hidden, 2).transpose(1, 2).reshape(-1, 24)
        kept = ~leaving.repeat_interleave(4)
        outputs = (expected - model.blocks[1].bias[:, None, None]).permute(0, 2, 3, 1).reshape(-1, 4)
        change = rows @ found.flatten(1).t() - outputs
    else:
        rows, kept = hidden, ~leaving
        outputs = expected - model.blocks[1].bias
        change = rows @ (found if kind == "conv1d" else found.t()) - outputs
    best = torch.linalg.lstsq(rows[:, kept], outputs.detach()).solution
    least = (rows[:, kept] @ best - outputs).square().sum()
    assert change.square().sum() <= 1.02 * least
    assert not torch.equal(found, removed(Pair(kind).blocks[1].weight))


@pytest.mark.parametrize("grid", ["layer", "channel", "block32"])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_rounding_on_the_quantizers_grid_loses_less_than_nearest(kind: str, grid: str) -> None:
    model = Pair(kind)
    attach_quantizers(model, include=["blocks"], initial_bits=3, target_bits=3, grid=grid)
    family, x = model.family(), model.inputs()
    labels = find_group_labels([family], {name: tuple(p.shape) for name, p in model.named_parameters()})
    gone = torch.tensor([False, False, True, False, False, False])
    layer = model.blocks[1]
    with torch.no_grad():
        for cut in labels:
            model.get_parameter(cut.tensor).index_fill_(cut.dim, torch.tensor([2]), 0)
    expected = layer.weight.detach().clone()
    hidden = torch.relu(model.blocks[0](x)).detach()
    nearest = quantize(expected, *layer.weight_quantizer.broadcast_over(expected))
    Compensation(model, [{"x": x}]).round(["blocks.1.weight"], labels, gone)
    moved = layer.weight.detach()
    found = quantize(moved, *layer.weight_quantizer.broadcast_over(moved))
    # As near to where they were as they are rounded so, and hence few of them on their grid.
    assert ((moved - expected).abs() <= (found - expected).abs() + 1e-6).all()
    assert (moved == found).float().mean() < 0.3
    wide = [w if kind == "conv1d" else w.t() for w in (expected, nearest, found)]
    errors = [(hidden @ (w - wide[0])).square().sum() for w in wide[1:]]
    assert errors[1] < errors[0]
    assert not moved.select(0 if kind == "conv1d" else 1, 2).any()


@pytest.fixture(scope="module")
def compensated() -> tuple[nn.Module, QASSO, list[int]]:
    counts = []
    model, method, optimizer = prepare(config_of(compensate=True, rounding="compensated"), space=read_space())
    train(model, method, optimizer, watch=lambda _: counts.append(optimizer.removed_groups))
    return model, optimizer, counts


def test_groups_are_removed_when_their_period_starts(compensated: tuple[nn.Module, QASSO, list[int]]) -> None:
    _, optimizer, counts = compensated
    # Of 10 groups 5 are due in three periods, of which the first starts with step 14.
    assert counts[12] == 0 and counts[13] == 1 and counts[-1] == 5
    assert [step for step in range(1, 60) if counts[step] > counts[step - 1]] == [13, 23, 33]
    assert optimizer.finished


@pytest.mark.parametrize("stop", [13, 30, pytest.param(44, marks=pytest.mark.slow)])
def test_a_run_resumes_bit_for_bit(compensated: tuple[nn.Module, QASSO, list[int]], stop: int) -> None:
    finished, _, _ = compensated
    config = config_of(compensate=True, rounding="compensated")
    model, method, optimizer = prepare(config, space=read_space())
    train(model, method, optimizer, stop)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    again, other, resumed = prepare(config, space=read_space())
    again.load_state_dict(weights)
    resumed.load_state_dict(saved)
    train(again, other, resumed)
    for name, value in finished.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_weights_are_rounded_with_compensation_when_widths_are_final() -> None:
    """They are rounded otherwise than to nearest, and stay as near to where they were as that allows."""
    config = config_of(rounding="compensated")
    model, _ = run(config, steps=44)
    plain, _ = run(replace(config, rounding="nearest"), steps=44)
    differ = False
    for layer, other in zip(quantized_layers(model).values(), quantized_layers(plain).values(), strict=True):
        rounded = layer.quantized_weight()
        # Moved only as far as the rounding asks for.
        assert ((layer.weight - other.weight).abs() <= (rounded - other.weight).abs() + 1e-6).all()
        torch.testing.assert_close(layer.weight_quantizer.d, other.weight_quantizer.d)
        differ |= not torch.allclose(rounded, other.quantized_weight())
    assert differ


def test_without_a_joint_stage_readers_are_refitted_before_cool_down() -> None:
    config = config_of(joint=0, compensate=True, bits=(16, 16))
    removed = {}
    for value in (True, False):
        model, optimizer = run(replace(config, compensate=value), steps=13)
        assert optimizer.removed_groups == 5
        x = torch.cat([batch["x"] for batch in calibration(8)])
        dense, _ = run(config, steps=12)
        removed[value] = (model(x) - dense(x)).square().mean()
    assert removed[True] < 0.9 * removed[False]


def test_rounding_after_training_is_compensated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    rounds = Compensation.round
    monkeypatch.setattr(Compensation, "round", lambda self, *args: (calls.append(1), rounds(self, *args))[1])
    values = {**STAGES, "mean_bits": 4, "rounding": "compensated"}
    model, _ = run(PostTrainingConfig(**values))
    assert len(calls) == 1
    for layer in quantized_layers(model).values():
        d, _ = layer.weight_quantizer.broadcast_over(layer.weight)
        assert ((layer.weight - layer.quantized_weight()).abs() <= 0.5 * d).all()


def test_covariances_are_measured_in_parts_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Toy()
    layers = {f"layers.{place}": layer for place, layer in enumerate(model.layers)}
    batches = calibration(2)
    (full,) = covariances_module.measure_covariances(model, layers, batches)
    parts = list(covariances_module.measure_covariances(model, layers, batches, 4 * 12 * 12))
    assert [list(part) for part in parts] == [["layers.0"], ["layers.1"], ["layers.2", "layers.3"]]
    for part in parts:
        for name, covariance in part.items():
            torch.testing.assert_close(covariance, full[name])
    assert compensation_bytes(list(layers.values())) == 4 * (64 + 144 + 64 + 36)
    monkeypatch.setattr("geta_hf.methods.compensation.COVARIANCE_BYTES", 100)
    assert compensation_bytes(list(layers.values())) == 4 * 144


def test_what_remains_of_a_weight_is_found_by_its_labels() -> None:
    model = Pair("conv")
    labels = find_group_labels([model.family()], {name: tuple(p.shape) for name, p in model.named_parameters()})
    removed = torch.tensor([True, False, False, False, False, True])
    kept = find_kept(model.blocks[1], [cut for cut in labels if cut.tensor == "blocks.1.weight"], removed)
    assert kept.rows.all() and kept.columns.tolist() == [False] * 4 + [True] * 16 + [False] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compensate": True, "bit_rule": "paper"}, "removes them at once"),
        ({"rounding": "compensated", "learn_exponent": True}, "for t = 1"),
    ],
)
def test_rules_that_exclude_each_other_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(GETAError, match=message):
        GETAConfig(**changes)


def test_an_optimizer_without_calibration_data_is_refused() -> None:
    model, _, optimizer = prepare(config_of(), space=read_space())
    assert isinstance(optimizer, QASSO)
    names = {parameter: name for name, parameter in model.named_parameters()}
    config = config_of(compensate=True)
    with pytest.raises(GETAError, match="pass compensation"):
        QASSO(optimizer.base, names, read_space(), {}, optimizer.schedule, config)
