"""Schedule, saliency, projection and Eqs. 13-14 as pure functions."""

from __future__ import annotations

import math

import pytest
import torch

from geta_hf.config import GETAConfig
from geta_hf.errors import GETAError
from geta_hf.methods.qasso.equations import (
    SHRINK,
    fisher_scores,
    forgetting_rate,
    hesso_scores,
    joint_step_size,
    project_step_size,
    relative_step,
    rounding_residue,
    taylor_scores,
)
from geta_hf.methods.qasso.schedule import Schedule, resolve_duration
from geta_hf.methods.qasso.slices import group_sums
from geta_hf.qadg.group_labels import GroupLabels, find_group_labels
from geta_hf.quantization.functional import bit_width, clip_power, quantize, step_size
from tests.methods.qasso.toy import Toy, toy_space


def parts_of(x: torch.Tensor, d: torch.Tensor, q_m: torch.Tensor, t: torch.Tensor | None):
    """clip and res."""
    clip = clip_power(x, q_m, t)
    return clip, rounding_residue(clip, d)


# --- schedule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("duration", "steps"), [(7, 7), (0.25, 25), (0.0, 0), ("30 steps", 30), ("1.5 epochs", 60), ("1 epoch", 40)]
)
def test_durations_in_steps_shares_and_epochs(duration, steps: int) -> None:
    assert resolve_duration(duration, 100, 40) == steps


@pytest.mark.parametrize("duration", [1.5, -1, "soon", "2 weeks", "x epochs", "inf steps", "nan epochs", True, None])
def test_bad_durations_are_refused(duration) -> None:
    with pytest.raises(GETAError, match="warmup"):
        resolve_duration(duration, 100, 40, "warmup")


def test_epochs_need_data_with_a_length() -> None:
    with pytest.raises(GETAError, match="no length; give steps"):
        resolve_duration("1 epoch", 100, math.nan)


@pytest.mark.parametrize("total", range(12, 40))
def test_shares_of_one_in_all_always_fit(total: int) -> None:
    schedule = Schedule.from_config(
        GETAConfig(warmup=0.3, projection=0.3, joint=0.4, pruning_periods=2, projection_periods=2), total, total
    )
    assert schedule.warmup + schedule.projection + schedule.joint <= total


def test_stages_follow_each_other_and_periods_cover_them() -> None:
    config = GETAConfig(warmup=3, projection=10, joint=17, projection_periods=4, pruning_periods=5)
    schedule = Schedule.from_config(config, 40, 10)
    phases = [schedule.at(step) for step in range(40)]
    stages = [phase.stage for phase in phases]
    assert stages == ["warm-up"] * 3 + ["projection"] * 10 + ["joint"] * 17 + ["cool-down"] * 10
    for stage, periods in (("projection", 4), ("joint", 5)):
        inside = [phase for phase in phases if phase.stage == stage]
        assert [phase.period for phase in inside if phase.starts] == list(range(periods))
        assert sum(phase.ends for phase in inside) == periods
        assert sorted({phase.length for phase in inside})[-1] - min(phase.length for phase in inside) <= 1


def test_stages_longer_than_training_and_too_few_steps_are_refused() -> None:
    with pytest.raises(GETAError, match="training has 50"):
        Schedule.from_config(GETAConfig(warmup=20, projection=20, joint=20), 50, 50)
    with pytest.raises(GETAError, match=r"training has 2 steps, but warmup, projection, joint .* train for 3 steps"):
        Schedule.from_config(GETAConfig(), 2, 2)
    with pytest.raises(GETAError, match=r"training has 0 steps, but joint .* train for 1 step "):
        Schedule.from_config(GETAConfig(warmup=0, projection=0), 0, 0)


@pytest.mark.parametrize("total", range(3, 60))
def test_periods_shrink_with_the_run_down_to_one_step_a_stage(total: int) -> None:
    schedule = Schedule.from_config(GETAConfig(), total, total)
    lengths = (schedule.warmup, schedule.projection, schedule.joint)
    assert min(lengths) >= 1 and sum(lengths) <= total
    assert schedule.projection_periods == min(4, schedule.projection)
    assert schedule.pruning_periods == min(5, schedule.joint)
    phases = [schedule.at(step) for step in range(total)]
    for stage, periods in (("projection", schedule.projection_periods), ("joint", schedule.pruning_periods)):
        assert [p.period for p in phases if p.stage == stage and p.starts] == list(range(periods))


def test_given_lengths_shorten_the_longest_stage_where_a_share_rounds_to_nothing() -> None:
    schedule = Schedule.from_config(GETAConfig(warmup=5, projection=0.01, joint=45), 50, 50)
    assert (schedule.warmup, schedule.projection, schedule.joint) == (5, 1, 44)


def test_a_stage_of_no_length_or_no_period_is_left_out() -> None:
    for changes in ({"joint": 0}, {"joint": 0.0}, {"joint": "0 epochs"}, {"pruning_periods": 0}):
        schedule = Schedule.from_config(GETAConfig(warmup=2, projection=8, **changes), 40, 20)
        assert schedule.joint == schedule.pruning_periods == 0
        assert [schedule.at(step).stage for step in (1, 9, 10)] == ["warm-up", "projection", "cool-down"]


# --- saliency ---------------------------------------------------------------------------------------------------------


def test_group_sums_add_all_members_on_their_own_rows() -> None:
    weight = torch.arange(15.0).view(5, 3)
    bias = torch.tensor([100.0, 200.0, 300.0, 400.0, 1e6])
    label = torch.tensor([0, 1, 1, 0, 2])  # the last row leaves with no group
    named = {"up": weight, "bias": bias, "down": weight.t().contiguous()}
    cuts = [GroupLabels("up", 0, label), GroupLabels("bias", 0, label), GroupLabels("down", 1, label)]
    sums = group_sums(cuts, named, 2, lambda x, g: x)
    assert sums.tolist() == [2 * (30 + 3) + 500, 2 * (12 + 21) + 500]
    assert group_sums(cuts, named, 2, torch.mul).tolist() == [0, 0]  # without a gradient


def test_labels_number_the_groups_of_all_families() -> None:
    families = toy_space().families
    shapes = {name: tuple(p.shape) for name, p in Toy().named_parameters()}
    found = {(cut.tensor, cut.dim): cut.label.tolist() for cut in find_group_labels(families, shapes)}
    heads, channels = [3] * 3 + [2] * 3 + [1] * 3 + [0] * 3, [4, 5, 6, 7, 8, 9]
    assert found == {
        ("layers.0.weight", 0): heads,
        ("layers.0.bias", 0): heads,
        ("layers.1.weight", 1): heads,
        ("layers.2.weight", 0): channels,
        ("layers.2.bias", 0): channels,
        ("layers.3.weight", 1): channels,
    }


def test_hesso_follows_its_formula_and_taylor_divides_by_cost() -> None:
    inner, grad_square = torch.tensor([1.0, -2.0]), torch.tensor([4.0, 9.0])
    square, cost = torch.tensor([1.0, 16.0]), torch.tensor([4.0, 4.0])
    rows = [[1, 4], [0.5, 2], [1 - 0.5, 1 + 2 / 12], [1, 2], [0.5, 2.0]]
    expected = [sum(0.2 * row[i] / math.hypot(*row) for row in rows) for i in range(2)]
    assert hesso_scores(inner, grad_square, square, cost).tolist() == pytest.approx(expected)
    assert taylor_scores(torch.tensor([4.0, 9.0]), torch.tensor([2.0, 1.0])).tolist() == [1.0, 3.0]
    assert fisher_scores(torch.tensor([4.0, 9.0]), torch.tensor([2.0, 1.0])).tolist() == [2.0, 9.0]


def test_fisher_has_no_preference_for_size_under_noise() -> None:
    """Of parameters that matter alike, large groups score as small ones do; the root of it would put them below."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([4, 400])
    mean_square = torch.zeros(2)
    for _ in range(2000):
        inner = torch.stack([torch.randn(int(n), generator=generator).sum() for n in sizes])
        mean_square += inner**2 / 2000
    fisher, taylor = fisher_scores(mean_square, sizes), taylor_scores(mean_square, sizes)
    assert 0.85 < fisher[1] / fisher[0] < 1.15 and taylor[1] / taylor[0] < 0.15


# --- projection -------------------------------------------------------------------------------------------------------


def test_projection_moves_d_alone_onto_the_bounds() -> None:
    q_m, t = torch.tensor([1.0]), torch.tensor([1.2])
    for start, wanted in ((2.5, 4.0), (5.5, 5.5), (12.0, 8.0)):
        d = project_step_size(step_size(start, q_m, t), q_m, t, 4, 8)
        assert bit_width(d, q_m, t).item() == pytest.approx(wanted, rel=1e-5)


def test_a_relative_step_is_the_base_optimizer_on_the_logarithm() -> None:
    """SGD on log p: p <- p · exp(-α · p · ∂f/∂p)."""
    before, grad, rate = torch.tensor([1e-4]), torch.tensor([300.0]), 0.01
    step = -rate * (grad * before)
    assert relative_step(before, step).item() == pytest.approx(1e-4 * math.exp(-rate * 300 * 1e-4), rel=1e-4)
    assert relative_step(before, torch.tensor([-50.0])).item() > 0


MAGNITUDES = [10.0**power for power in range(-6, 9)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_relative_step_is_exact_for_any_magnitude(dtype: torch.dtype) -> None:
    """Against float64, to the last digit of the type, for tiny steps as for large ones."""
    steps = torch.tensor([0.0, 1e-7, -1e-5, 1e-3, -3e-3, 0.1, -0.49, 0.51, 2.0, -9.0])
    before = torch.tensor(MAGNITUDES).to(dtype)[:, None].expand(-1, len(steps))
    found = relative_step(before, steps.expand_as(before))
    exact = (before.double() * steps.double().exp()).clamp_min(1e-12)
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= torch.finfo(dtype).eps * exact).all()


# --- Eqs. 13-14 -------------------------------------------------------------------------------------------------------


def test_clip_plus_d_res_is_the_quantized_value() -> None:
    torch.manual_seed(0)
    x, q_m = torch.randn(500), torch.tensor([1.3])
    for t in (None, torch.tensor([1.4])):
        d = step_size(4, q_m, torch.ones(1) if t is None else t)
        clip, res = parts_of(x, d, q_m, t)
        assert torch.allclose(clip + d * res, quantize(x, d, q_m, t), atol=1e-6)


def test_each_branch_of_eq_13() -> None:
    grad_clip = torch.tensor([2.0, -4.0, -4.0, -4.0, 2.0])
    grad_step = torch.tensor([1.0, 1.0, -1.0, 8.0, 1.0])
    mean = torch.tensor([1.0, 1.0, 1.0, 1.0, 1e-9])
    rate = forgetting_rate(grad_clip, grad_step, mean, steps_remaining=5, eta=0.9, epsilon=1e-8)
    assert rate.tolist() == pytest.approx([0.2, 0.1 * 1 / 4, 0.0, 0.1 * 8 / 4, 0.0])


def test_eq_13_is_the_papers_letter_for_sgd() -> None:
    """γ = -(1-η)·α·‖g‖ / (cos θ_γ · ‖clip‖) for u = α·g, θ_γ between -g and -clip."""
    torch.manual_seed(1)
    grad, clip, alpha, eta = torch.randn(50), torch.randn(50), 0.1, 0.999
    if grad @ clip > 0:
        clip = -clip
    cosine = (grad @ clip) / (grad.norm() * clip.norm())
    expected = -(1 - eta) * alpha * grad.norm() / (cosine * clip.norm())
    rate = forgetting_rate((grad @ clip)[None], (alpha * grad @ grad)[None], torch.ones(1), 5, eta, 1e-8)
    assert rate.item() == pytest.approx(expected.item(), rel=1e-4)


def test_each_branch_of_eq_14() -> None:
    bounds = torch.tensor([0.1, 0.1, 0.1]), torch.tensor([1.0, 1.0, 1.0])
    grad_res, grad_step = torch.tensor([1.0, -2.0, -2.0]), torch.tensor([1.0, 0.5, 9.0])
    rate, d = joint_step_size(torch.tensor([0.5]), torch.zeros(3).long(), grad_res, grad_step, bounds, 0.9, 0.8)
    assert rate.item() == 0.5
    assert d.tolist() == pytest.approx([1.0, 0.72 * 0.5 / (0.5 * 2), 1.0])  # b_l bits; formula; formula capped at d_max


def test_appendix_c_shrinks_gamma_until_d_is_feasible() -> None:
    d_min, d_max = torch.tensor([0.2]), torch.tensor([1.0])
    rate, d = joint_step_size(
        torch.tensor([0.5]), torch.tensor([0]), torch.tensor([-2.0]), torch.tensor([0.1]), (d_min, d_max), 0.9, 0.8
    )
    shrinks = math.log(rate.item() / 0.5) / math.log(SHRINK)
    assert shrinks == pytest.approx(round(shrinks), abs=1e-4) and shrinks > 0
    assert d_min.item() <= d.item() <= d_max.item()
    assert 0.72 * 0.1 / (rate.item() / SHRINK * 2) < d_min.item()  # one shrink fewer was infeasible


def test_no_descent_to_spend_means_no_forgetting() -> None:
    bounds = torch.tensor([0.2]), torch.tensor([1.0])
    rate, d = joint_step_size(
        torch.tensor([0.5]), torch.tensor([0]), torch.tensor([-2.0]), torch.tensor([-1.0]), bounds, 0.9, 0.8
    )
    assert rate.item() == 0 and torch.isfinite(d).all()


def test_families_do_not_mix_in_eq_14() -> None:
    """Two families at once are what each of them is alone."""
    rate, family = torch.tensor([0.5, 0.3]), torch.tensor([0, 1, 1])
    grad_res, grad_step = torch.tensor([-2.0, 1.0, -3.0]), torch.tensor([0.1, 1.0, 0.5])
    bounds = torch.full((3,), 0.2), torch.ones(3)
    both, sizes = joint_step_size(rate, family, grad_res, grad_step, bounds, 0.9, 0.8)
    for f in (0, 1):
        own = family == f
        alone, d = joint_step_size(
            rate[f : f + 1],
            torch.zeros(int(own.sum())).long(),
            grad_res[own],
            grad_step[own],
            (bounds[0][own], bounds[1][own]),
            0.9,
            0.8,
        )
        assert both[f] == alone[0] and torch.equal(sizes[own], d)


@pytest.mark.parametrize("seed", range(40))
def test_proposition_5_1_the_update_is_a_descent_direction(seed: int) -> None:
    """⟨g, u + γ x^Q⟩ > 0 on random problems of three layers with SGD steps, whatever the angles."""
    generator = torch.Generator().manual_seed(seed)
    q_m, t, alpha, eta, xi = torch.tensor([1.0]), torch.tensor([1.0]), 0.1, 0.9, 0.9
    x = [torch.randn(30, generator=generator) for _ in range(3)]
    g = [torch.randn(30, generator=generator) - seed % 3 * layer for layer in x]
    parts = [parts_of(layer, step_size(4 + i, q_m, t), q_m, None) for i, layer in enumerate(x)]
    grad_clip = sum(a @ clip for a, (clip, _) in zip(g, parts, strict=True))
    grad_step = torch.stack([alpha * a @ a for a in g])
    grad_res = torch.stack([a @ res for a, (_, res) in zip(g, parts, strict=True)])
    rate = forgetting_rate(grad_clip[None], grad_step.sum()[None], torch.ones(1), 5, eta, 1e-8)
    bounds = step_size(8, q_m, t).expand(3), step_size(4, q_m, t).expand(3)
    rate, d = joint_step_size(rate, torch.zeros(3).long(), grad_res, grad_step, bounds, eta, xi)
    descent = sum(
        a @ (alpha * a + rate * (clip + size * res)) for a, (clip, res), size in zip(g, parts, d, strict=True)
    )
    assert rate > 0 and descent > 0
    assert ((d >= bounds[0]) & (d <= bounds[1])).all()
