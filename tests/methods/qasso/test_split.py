"""A size that is split between pruning and widths in training, by what both are expected to cost."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from geta_hf.config import GETAConfig
from geta_hf.costs.joint_allocation import ExpectedLosses
from geta_hf.costs.quantizer_table import Quantizers
from geta_hf.costs.sensitivity import RoundingErrors
from geta_hf.errors import GETAError
from geta_hf.methods import PostTrainingConfig
from geta_hf.methods import rounding as rounding_module
from geta_hf.methods.qasso import joint_step
from geta_hf.methods.qasso import optimizer as optimizer_module
from geta_hf.methods.qasso import split as split_module
from geta_hf.methods.qasso.optimizer import QASSO
from geta_hf.methods.qasso.schedule import JOINT
from geta_hf.methods.qasso.split import Split, rounding_losses
from geta_hf.quantization import quantized_layers
from tests.methods.loop import prepare, train
from tests.methods.qasso.toy import Toy

STAGES = {"warmup": 5, "projection": 8, "joint": 31, "pruning_periods": 3}
SHARED = {**STAGES, "bits": (2, 8), "exchange_rate": 1.0}
SIZES = {"target_bops": 0.07, "target_bytes": 1240}


def config_of(split: str, size: str = "target_bops", **changes) -> GETAConfig:
    return GETAConfig(**{**SHARED, size: SIZES[size], "split": split, **changes})


def spent(optimizer: QASSO) -> float:
    bits = torch.tensor([round(width) for width in optimizer.bits().values()], dtype=torch.float64)
    weights = bits[: optimizer.quantizers.weight_layers]
    if optimizer.target.unit == "bytes":
        return optimizer.ledger.stored_bytes(optimizer.removed_mask, weights, len(bits) > len(weights))
    sides = bits[optimizer.quantizers.weight_layers :] if len(bits) > len(weights) else 32.0
    return optimizer.ledger.relative_bops(optimizer.removed_mask, weights, sides)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("split", ["early", "late"])
def test_a_run_meets_the_size_and_zeroes_what_was_decided(split: str, size: str) -> None:
    model, method, optimizer = prepare(config_of(split, size))
    assert isinstance(optimizer, QASSO)
    history = []

    def watch(step: int) -> None:
        history.append((optimizer.phase.stage, dict(optimizer.bits()), optimizer.qasso_state.decided.clone()))

    train(model, method, optimizer, watch=watch)
    removed = optimizer.removed_mask
    assert torch.equal(removed, optimizer.qasso_state.decided) and bool(removed.any())
    assert spent(optimizer) <= SIZES[size]
    in_joint = [entry for entry in history if entry[0] == JOINT][1:]
    if split == "early":
        # Decided once, and trained at the final widths from then on.
        for _, bits, decided in in_joint:
            assert list(bits.values()) == pytest.approx(list(optimizer.bits().values()), abs=1e-3)
            assert torch.equal(decided, removed)
    else:
        assert max(in_joint[0][1].values()) > 7


def test_each_channel_takes_its_own_clipping_value(monkeypatch: pytest.MonkeyPatch) -> None:
    decided = []
    written = []
    decide, write = optimizer_module.decide_split, Quantizers.write_clipping

    def noted(*args) -> Split:
        found = decide(*args)
        rounding, choices = args[5:7]
        decided.append(rounding.clips_at([choices.weights.index(bits) for bits in found.bits.weight_bits]))
        return found

    def noted_write(self: Quantizers, q_m: torch.Tensor, named: dict) -> None:
        if decided:
            written.append(q_m / self.read(named)[1])
        write(self, q_m, named)

    monkeypatch.setattr(optimizer_module, "decide_split", noted)
    monkeypatch.setattr(Quantizers, "write_clipping", noted_write)
    model, method, optimizer = prepare(config_of("early", per_channel=True))
    train(model, method, optimizer)
    assert len(decided[0]) > 4 and len(decided[0].unique()) > 4
    # The step sizes are those of fp16, and clipping values follow them.
    torch.testing.assert_close(written[0], decided[0], rtol=2**-10, atol=0)


def test_two_bits_are_trained_on_the_levels_of_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three levels in the joint stage and four after it would be a new start: 2.45 nats in place of 2.08 once."""
    model, method, optimizer = prepare(config_of("early", target_bops=0.065, per_channel=True))
    assert isinstance(optimizer, QASSO)
    fitted, history = [], []
    fit = rounding_module.fit_four_levels

    def noted(*args: Any) -> Any:
        fitted.append(optimizer.step_count)
        return fit(*args)

    def watch(step: int) -> None:
        history.append((optimizer.phase.stage, levels_of(model), dict(optimizer.bits())))

    monkeypatch.setattr(rounding_module, "fit_four_levels", noted)
    train(model, method, optimizer, watch=watch)
    joint = [entry for entry in history if entry[0] == JOINT][1:]
    assert levels_of(model) == [True, True, True, False]
    assert all(levels == levels_of(model) and bits == pytest.approx(optimizer.bits()) for _, levels, bits in joint)
    # Clipping values were learned from then on, so that the end searches for none.
    assert fitted == [STAGES["warmup"] + STAGES["projection"]]


@pytest.mark.parametrize("four_levels", [True, False])
def test_two_bits_alone_are_trained_on_the_levels_of_the_end_too(four_levels: bool) -> None:
    config = GETAConfig(**STAGES, bits=(2, 2), target_sparsity=0.5, per_channel=True, four_levels=four_levels)
    model, method, optimizer = prepare(config)
    assert isinstance(optimizer, QASSO)
    history = []
    train(model, method, optimizer, watch=lambda step: history.append((optimizer.phase.stage, levels_of(model))))
    joint = [levels for stage, levels in history if stage == JOINT][1:]
    assert joint and all(levels == levels_of(model) for levels in joint)
    assert any(levels_of(model)) == four_levels


def levels_of(model: torch.nn.Module) -> list[bool]:
    return [layer.weight_quantizer.four_levels for layer in quantized_layers(model).values()]


def test_in_the_joint_stage_no_weight_of_four_levels_is_zero_unless_it_is_removed() -> None:
    model, method, optimizer = prepare(config_of("early", target_bops=0.065, per_channel=True))
    assert isinstance(optimizer, QASSO)
    model.layers[1].weight.register_hook(lambda grad: _without(grad, 1))
    train(model, method, optimizer, 15)
    with torch.no_grad():
        model.layers[1].weight[0] = 0  # no gradient moves it
    train(model, method, optimizer, 16)
    assert levels_of(model)[1] and bool((model.layers[1].weight[0] != 0).all())


def test_inputs_share_a_budget_of_bops() -> None:
    config = config_of("early", activation_bits=(3, 8), target_bops=0.01)
    model, method, optimizer = prepare(config)
    assert isinstance(optimizer, QASSO)
    train(model, method, optimizer)
    assert spent(optimizer) <= 0.01 and bool((optimizer.qasso_state.decided_bits > 0).all())


def test_inputs_that_bytes_do_not_count_are_decided_in_the_end() -> None:
    config = config_of("early", "target_bytes", activation_bits=(3, 8), target_bytes=1700)
    model, method, optimizer = prepare(config)
    assert isinstance(optimizer, QASSO)
    train(model, method, optimizer)
    bits = [round(width) for width in optimizer.bits().values()]
    assert spent(optimizer) <= 1700 and sum(bits[4:]) <= 5.5 * 4
    assert (optimizer.qasso_state.decided_bits > 0).tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize(
    ("split", "stop"),
    [("early", 30), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("early", 12), ("late", 30)))],
)
def test_a_run_resumes_bit_for_bit(split: str, stop: int) -> None:
    model, method, optimizer = prepare(config_of(split))
    train(model, method, optimizer, stop)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    train(model, method, optimizer)
    again, other, resumed = prepare(config_of(split))
    again.load_state_dict(weights)
    resumed.load_state_dict(saved)
    train(again, other, resumed)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_rate_multiplies_what_removals_are_expected_to_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, removed = [], []
    allocate = split_module.allocate_jointly

    def noted(families: Any, limits: Any, ledger: Any, losses: ExpectedLosses, *args: Any) -> Any:
        asked.append(losses)
        return allocate(families, limits, ledger, losses, *args)

    monkeypatch.setattr(split_module, "allocate_jointly", noted)
    for rate in (1.0, 50.0):
        model, method, optimizer = prepare(config_of("early", target_bops=0.065, exchange_rate=rate))
        assert isinstance(optimizer, QASSO)
        train(model, method, optimizer)
        removed.append(int(optimizer.removed_mask.sum()))
    torch.testing.assert_close(asked[1].removal, 50 * asked[0].removal)
    torch.testing.assert_close(asked[1].rounding, asked[0].rounding)
    assert removed[0] > removed[1]


def test_what_is_forgotten_lies_on_the_levels_of_its_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, method, optimizer = prepare(config_of("early", target_bops=0.05, per_channel=True))
    seen = []
    shrink = joint_step.shrink_slice

    def noted(step: joint_step.SliceStep, *args: Any) -> None:
        seen.append((step.clip, step.d, step.quantized(None)))
        shrink(step, *args)

    monkeypatch.setattr(joint_step, "shrink_slice", noted)
    train(model, method, optimizer)
    quantized = [(clip, d, value) for clip, d, value in seen if d is not None]
    assert levels_of(model) == [True] * 4 and len(quantized) > 8
    for clip, d, value in quantized:
        levels = d[..., None] * torch.tensor([-1, -1 / 3, 1 / 3, 1])
        nearest = (clip[..., None] - levels).abs().argmin(-1, keepdim=True)
        expected = levels.expand(*clip.shape, 4).gather(-1, nearest)[..., 0]
        torch.testing.assert_close(value, torch.where(clip == 0, 0.0, expected))


def test_a_run_without_a_joint_stage_decides_before_cool_down() -> None:
    model, method, optimizer = prepare(config_of("early", joint=0))
    assert isinstance(optimizer, QASSO)
    train(model, method, optimizer)
    assert spent(optimizer) <= SIZES["target_bops"] and bool(optimizer.removed_mask.any())


def test_a_group_on_which_nothing_depends_goes_first() -> None:
    """Where pruning a group is free, it is removed though widths alone would meet the size."""
    model = Toy()
    with torch.no_grad():
        for layer, rows in ((0, slice(0, 3)), (2, slice(0, 1))):
            model.layers[layer].weight[rows] = 0
            model.layers[layer].bias[rows] = 0
    model.layers[0].weight.register_hook(lambda grad: _without(grad, 3))
    model.layers[0].bias.register_hook(lambda grad: _without(grad, 3))
    model, method, optimizer = prepare(config_of("early", target_bops=0.2), model)
    assert isinstance(optimizer, QASSO)
    train(model, method, optimizer)
    # Rows 0 to 2 are the last head, as the toy numbers them.
    assert bool(optimizer.removed["layers:heads"][3])


def _without(grad: torch.Tensor, rows: int) -> torch.Tensor:
    grad = grad.clone()
    grad[:rows] = 0
    return grad


def test_weights_of_unknown_gradient_cost_as_much_as_others() -> None:
    errors = torch.tensor([[4.0, 1.0], [0.0, 0.0], [8.0, 2.0]], dtype=torch.float64)
    known = torch.tensor([True, False, True])
    weights = torch.tensor([10.0, 20, 30], dtype=torch.float64)
    curvature = torch.tensor([10.0, 0, 60], dtype=torch.float64)
    rounding = RoundingErrors(errors, torch.ones(3, 2), known)
    found = rounding_losses(rounding, curvature, weights)
    assert found.tolist() == [[2, 0.5], [5, 1.25], [8, 2]]
    assert rounding_losses(replace(rounding, known=torch.ones(3, dtype=torch.bool)), curvature, weights)[1].sum() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "give target_bytes or target_bops alone"),
        ({"target_sparsity": 0.5, "target_bops": 0.1}, "without target_sparsity"),
        ({"mean_bits": 5, "target_bytes": 10**6}, "without mean_bits"),
        ({"saliency": "hesso", "target_bytes": 10**6}, "saliency = 'hesso'"),
        ({"bit_rule": "ppsg", "target_bytes": 10**6}, "bit_rule = 'ppsg'"),
    ],
)
def test_what_cannot_be_split_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(GETAError, match=message):
        GETAConfig(split="early", **changes)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"target_bytes": 10**6}, "early"),
        ({"target_bops": 0.1}, "early"),
        ({"target_bops": 0.1, "split": "even"}, "even"),
        ({"target_bops": 0.1, "target_parameters": 0.5}, "even"),
        ({"target_bops": 0.1, "mean_bits": 5}, "even"),
        ({"target_bops": 0.1, "saliency": "taylor"}, "even"),
        ({"target_bops": 0.1, "bit_rule": "paper"}, "even"),
        ({}, "even"),
    ],
)
def test_a_size_alone_is_split_early_where_the_rules_allow_it(changes: dict, rule: str) -> None:
    config = GETAConfig(**changes)
    assert config.split_rule == rule and config.splits_in_training is (rule == "early")


def test_widths_that_follow_training_are_not_split_in_it() -> None:
    with pytest.raises(GETAError, match="they follow it here"):
        PostTrainingConfig(split="early", target_bytes=10**6)
    assert not PostTrainingConfig(target_bytes=10**6).splits_in_training
