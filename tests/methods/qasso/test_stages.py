"""Stages of length 0 and short runs: any stage can be left out, and every run ends with zeros and integer widths."""

from __future__ import annotations

import copy
import itertools
import logging

import pytest
import torch

from geta_hf.config import GETAConfig
from geta_hf.errors import GETAError
from geta_hf.methods.post_training import PostTrainingConfig
from tests.methods.loop import prepare, train
from tests.methods.qasso.test_optimizer import zero_masks

RULES = {
    "default": {},
    "paper": {
        "saliency": "hesso",
        "forgetting": "paper",
        "bit_rule": "paper",
        "clipping": "max",
        "learn_exponent": True,
    },
    "inputs": {"activation_bits": (4, 8)},
}


def config_of(lengths: tuple[int, int, int], rules: str = "default", kind=GETAConfig, **changes) -> GETAConfig:
    warmup, projection, joint = lengths
    values = {"warmup": warmup, "projection": projection, "joint": joint, "target_sparsity": 0.5, **RULES[rules]}
    return kind(**{**values, **changes})


def check_result(model, method, wanted: int = 5) -> None:
    result = method.result()
    assert result.removed_groups == wanted == sum(sum(mask) for mask in zero_masks(model))
    assert all(4 <= bits <= 8 for bits in result.weight_bits.values()) and len(result.weight_bits) == 4
    assert all(4 <= bits <= 8 for bits in result.input_bits.values())
    for name, layer in model.named_modules():
        if name in result.weight_bits:
            assert float(layer.weight_quantizer.bits()) == pytest.approx(result.weight_bits[name], abs=1e-4)


@pytest.mark.parametrize(("rules", "cool_down"), [("default", 0), ("default", 2), ("paper", 0), ("inputs", 1)])
@pytest.mark.parametrize("lengths", list(itertools.product((0, 1), (0, 2), (0, 4))))
def test_any_stage_can_be_left_out(lengths: tuple[int, int, int], cool_down: int, rules: str) -> None:
    steps = max(sum(lengths) + cool_down, 1)
    model, method, optimizer = prepare(config_of(lengths, rules), steps=steps)
    seen = []
    assert not method.finished
    train(model, method, optimizer, steps, watch=lambda step: seen.append(method.finished))
    first = max(sum(lengths), 1)
    assert seen == [False] * (first - 1) + [True] * (steps - first + 1)
    check_result(model, method)


@pytest.mark.parametrize("changes", [{"pruning_periods": 0}, {"projection_periods": 0}, {"target_sparsity": 0.0}])
def test_stages_without_a_period_are_left_out(changes: dict) -> None:
    model, method, optimizer = prepare(config_of((2, 4, 5), **changes), steps=12)
    train(model, method, optimizer, 12)
    check_result(model, method, 0 if "target_sparsity" in changes else 5)


def test_without_a_joint_stage_the_lowest_scores_are_removed_at_the_last_step_before_cool_down() -> None:
    model, method, optimizer = prepare(config_of((3, 4, 0)), steps=10)
    train(model, method, optimizer, 6)
    assert method.removed_groups == 0 and not method.finished
    cost = torch.tensor([63.0, 63, 63, 63, 17, 17, 17, 17, 17, 17])
    train(model, method, optimizer, 7)
    scores = optimizer.qasso_state.mean_square / cost
    assert method.finished and (optimizer.qasso_state.curvature > 0).all()
    removed = torch.cat(list(optimizer.removed.values()))
    assert set(removed.nonzero().flatten().tolist()) == set(scores.argsort()[:5].tolist())


def test_without_a_projection_stage_widths_stay_free_until_the_joint_stage_ends() -> None:
    model, method, optimizer = prepare(config_of((2, 0, 6)), steps=10)
    bounds = []
    train(model, method, optimizer, 10, watch=lambda step: bounds.append(optimizer.bit_bounds))
    assert bounds == [(4, 16)] * 7 + [(4, 8)] * 3


@pytest.mark.parametrize("steps", [3, 4, 12])
@pytest.mark.parametrize("kind", [GETAConfig, PostTrainingConfig])
def test_short_runs_end_as_long_ones_do(steps: int, kind, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model, method, optimizer = prepare(kind(target_sparsity=0.5), steps=steps)
    said = [record.getMessage() for record in caplog.records if "training has only" in record.getMessage()]
    assert len(said) == 1 and f"training has only {steps} steps: projection has" in said[0]
    assert "joint has" in said[0] if steps < 13 else "joint" not in said[0]
    train(model, method, optimizer, steps)
    check_result(model, method)


def test_a_run_of_usual_length_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        prepare(GETAConfig(target_sparsity=0.5), steps=60)
    assert "training has only" not in caplog.text


def test_the_upper_bound_falls_as_far_in_fewer_periods() -> None:
    _, _, optimizer = prepare(GETAConfig(target_sparsity=0.5, bit_reduction=2.5), steps=20)
    uppers = []
    for step in range(20):
        optimizer.param_groups[0]["qasso_step"] = step
        uppers.append(optimizer.bit_bounds[1])
    assert uppers == [16, 16, 11, 6] + [6] * 16


@pytest.mark.parametrize(("steps", "stop"), [(7, 2), (12, 5), (9, 8)])
def test_a_short_run_resumes_bit_for_bit(steps: int, stop: int) -> None:
    config = GETAConfig(target_sparsity=0.5, joint=0 if steps == 9 else 0.4)
    model, method, optimizer = prepare(config, steps=steps)
    train(model, method, optimizer, stop)
    stored = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, method, optimizer, steps)
    again, resumed, other = prepare(config, steps=steps)
    again.load_state_dict(stored[0])
    other.load_state_dict(stored[1])
    train(again, resumed, other, steps)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    _, _, third = prepare(config, steps=steps + 1)
    with pytest.raises(GETAError, match="resume with the same length of training"):
        third.load_state_dict(stored[1])


def test_a_run_too_short_for_its_stages_is_refused_before_training() -> None:
    with pytest.raises(GETAError, match="training has 2 steps, but warmup, projection, joint take at least one each"):
        prepare(GETAConfig(target_sparsity=0.5), steps=2)
    model, method, optimizer = prepare(GETAConfig(target_sparsity=0.5, warmup=0), steps=2)
    train(model, method, optimizer, 2)
    check_result(model, method)
