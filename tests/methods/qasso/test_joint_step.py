"""Every joint step of a run against the equations, written out here independently of the package."""

from __future__ import annotations

import math

import pytest
import torch

from geta_hf.config import GETAConfig
from geta_hf.methods.qasso.optimizer import bit_choices
from geta_hf.quantization import channel_clipping_values, quantized_layers
from tests.methods.loop import prepare
from tests.methods.qasso.toy import batch_at, make, small_config, status_of, toy_space, train_step

RATE, QUANTIZER_RATE, ETA, XI = 0.002, 3e-3, 0.9, 0.8
Tensors = dict[str, torch.Tensor]


def sgd(groups: list) -> torch.optim.Optimizer:
    groups[1]["lr"] = QUANTIZER_RATE
    return torch.optim.SGD(groups, lr=RATE)


def config_of(rules: str, **changes: object) -> GETAConfig:
    if rules == "default":
        return small_config(**changes)
    stages = {"warmup": 5, "projection": 8, "joint": 31}
    return GETAConfig.paper(**stages, eta=ETA, xi=XI, **changes)


def gradients(model, step: int) -> Tensors:
    x, y = batch_at(step)
    model.zero_grad()
    (model(x) - y).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def stepped_quantizer(name: str, old: Tensors, grad: Tensors, bits: tuple[float, float]) -> tuple[torch.Tensor, ...]:
    """(d, q_m, t) after SGD on their logarithms and the projection of d alone."""
    new = {}
    for leaf in ("d", "q_m", "t"):
        value = old[f"{name}.weight_quantizer.{leaf}"]
        slope = grad.get(f"{name}.weight_quantizer.{leaf}", torch.zeros(1))
        new[leaf] = value * torch.exp(-QUANTIZER_RATE * value * slope)
    power = new["q_m"] ** new["t"]
    d = torch.clamp(new["d"], power / (2 ** (bits[1] - 1) - 1), power / (2 ** (bits[0] - 1) - 1))
    return d, new["q_m"], new["t"]


def mask_of(member, shape: torch.Size, groups: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.index_fill_(member.dim, member.index[groups].flatten(), True)
    return mask


def expected_family(
    family, groups, old: Tensors, grad: Tensors, rules: str, left: int
) -> tuple[Tensors, Tensors, float]:
    """The family's redundant entries after the step, the new d of its layers, and γ."""
    clip, res, size, mask = {}, {}, {}, {}
    for member in family.members:
        x = old[member.tensor]
        mask[member.tensor] = mask_of(member, x.shape, groups)
        clip[member.tensor], res[member.tensor] = x, None
        if member.tensor.endswith("weight"):
            layer = member.tensor.removesuffix(".weight")
            d, q_m, t = stepped_quantizer(layer, old, grad, (4, 8))
            clip[member.tensor] = x.sign() * torch.minimum(x.abs(), q_m) ** t
            res[member.tensor] = (clip[member.tensor] / d).round() - clip[member.tensor] / d
            size[member.tensor] = (d, q_m**t / 127, q_m**t / 7)

    def inner(a: Tensors, b: Tensors, names) -> float:
        return sum(float((a[n][mask[n]] * b[n][mask[n]]).sum()) for n in names)

    steps = {name: RATE * grad[name] for name in clip}
    gamma = 1 / left
    if rules == "paper":
        along = inner(grad, clip, clip)
        if along < 0:
            gamma = (1 - ETA) * inner(grad, steps, clip) / abs(along)
        while True:
            sizes = {}
            for name in size:
                against = inner(grad, res, [name])
                budget = ETA * XI * inner(grad, steps, [name])
                sizes[name] = float(size[name][2]) if against >= 0 else budget / (gamma * abs(against))
            if all(sizes[name] >= float(size[name][1]) * (1 - 1e-6) for name in size):
                break
            gamma *= 0.8
        sizes = {name: torch.tensor([min(value, float(size[name][2]))]) for name, value in sizes.items()}
    else:
        sizes = {name: size[name][0] for name in size}
    values = {}
    for name in clip:
        quantized = clip[name] if res[name] is None else clip[name] + sizes[name] * res[name]
        values[name] = old[name] - steps[name] - gamma * quantized
    return {name: (mask[name], values[name]) for name in clip}, sizes, gamma


@pytest.mark.parametrize("rules", ["default", "paper"])
def test_every_joint_step_is_the_equations(rules: str) -> None:
    model, optimizer = make(config_of(rules), sgd)
    if rules == "paper":
        for layer in model.layers:
            layer.weight_quantizer.t.data.fill_(1.3)  # a learned exponent that is not 1
    branches = set()
    for step in range(44):
        phase = optimizer.phase
        old = {name: value.clone() for name, value in model.state_dict().items()}
        grad = gradients(model, step)
        train_step(model, optimizer, step)
        if phase.stage != "joint" or phase.ends:
            continue
        for position, family in enumerate(toy_space().families):
            groups = status_of(optimizer)[position] == 1
            if not groups.any():
                continue
            wanted, sizes, gamma = expected_family(family, groups, old, grad, rules, phase.length - phase.step)
            branches.add(gamma == 1 / (phase.length - phase.step))
            new = model.state_dict()
            for name, (mask, value) in wanted.items():
                assert torch.allclose(new[name][mask], value[mask], rtol=1e-4, atol=1e-6), (step, name)
                rest = ~mask & (old[name] != 0)
                assert torch.allclose(new[name][rest], (old[name] - RATE * grad[name])[rest], atol=1e-6), (step, name)
            for name, d in sizes.items():
                assert torch.allclose(new[f"{name}_quantizer.d"], d, rtol=1e-3), (step, name)
                quantizer = model.get_submodule(f"{name}_quantizer")
                branches.add("between" if 4.01 < quantizer.bits() < 7.9 else "bound")
    # Both branches of Eq. 13 came up, and both of Eq. 14: the formula between the bounds, and b_l bits.
    assert branches == ({True, "bound"} if rules == "default" else {True, False, "between", "bound"})


@pytest.mark.parametrize("rules", ["default", "paper"])
def test_a_family_below_epsilon_is_zero_at_once(rules: str) -> None:
    model, optimizer = make(config_of(rules, epsilon=0.9), sgd)
    for step in range(14):
        train_step(model, optimizer, step)
    groups = status_of(optimizer)[1] == 1
    rows = torch.arange(6)[groups]
    assert optimizer.gamma.nan_to_num().tolist() == [0, 0] and optimizer.mean_gamma() == 0
    assert optimizer.schedule.at(13).step == 0 and len(rows) + int((status_of(optimizer)[0] == 1).sum()) == 1
    for position, family in enumerate(toy_space().families):
        for member in family.members:
            index = member.index[status_of(optimizer)[position] == 1].flatten()
            assert (model.state_dict()[member.tensor].index_select(member.dim, index) == 0).all()


def test_gamma_zero_leaves_d() -> None:
    """AdamW's step may point against the gradient; then nothing is forgotten and d stays where it was learned."""
    model, optimizer = make(config_of("paper"), lambda groups: torch.optim.AdamW(groups, lr=1e-2))
    seen = 0
    for step in range(44):
        phase = optimizer.phase
        old = {name: value.clone() for name, value in model.state_dict().items()}
        train_step(model, optimizer, step)
        if phase.stage != "joint":
            continue
        present = [p for p in range(2) if (status_of(optimizer)[p] == 1).any()]
        for position in present if not phase.ends else ():
            if optimizer.gamma[position] == 0:
                seen += 1
                for member in toy_space().families[position].members:
                    name = f"{member.tensor}_quantizer.d"
                    if name in old:
                        assert float(model.state_dict()[name] / old[name]) == pytest.approx(1, abs=0.02)
    assert seen > 0


def scores_by_hand(
    model, mean_square: list[list[float]], grad: Tensors, saliency: str, divided: bool = False
) -> list[float]:
    found = []
    sums = []
    for family in toy_space().families:
        for group in range(family.size):
            inner = square = slope = count = 0.0
            for member in family.members:
                x = model.state_dict()[member.tensor].index_select(member.dim, member.index[group])
                g = grad[member.tensor].index_select(member.dim, member.index[group])
                inner, square = inner + float((x * g).sum()), square + float((x * x).sum())
                slope, count = slope + float((g * g).sum()), count + x.numel()
            sums.append((inner, square, slope, count))
    if saliency != "hesso":
        power = {"fisher": 1.0, "taylor": 0.5}[saliency]
        flat = [value for row in mean_square for value in row]
        return [value**power / (count if divided else 1) for value, (*_, count) in zip(flat, sums, strict=True)]
    for inner, square, slope, count in sums:
        size = math.sqrt(square)
        found.append((size, size / math.sqrt(count), 1 - inner / (size * math.sqrt(slope)), abs(inner), inner**2 / 2))
    norms = [math.hypot(*column) for column in zip(*found, strict=True)]
    return [sum(0.2 * value / norm for value, norm in zip(row, norms, strict=True)) for row in found]


def lowest(scores: list[float]) -> set[int]:
    """The five lowest of ten groups, but never the best of a family."""
    best = {max(range(4), key=scores.__getitem__), max(range(4, 10), key=scores.__getitem__)}
    return set(sorted(set(range(10)) - best, key=scores.__getitem__)[:5])


@pytest.mark.parametrize("saliency", ["fisher", "taylor", "hesso"])
def test_the_lowest_scores_become_redundant(saliency: str) -> None:
    """The moving average from the first projection step to the partition, and both scores, by hand."""
    model, optimizer = make(small_config(saliency=saliency, saliency_decay=0.7, pruning_periods=1), sgd)
    mean = [[0.0] * 4, [0.0] * 6]
    for step in range(14):
        grad = gradients(model, step)
        state = model.state_dict()
        for position, family in enumerate(toy_space().families if step >= 5 else ()):
            for group in range(family.size):
                inner = sum(
                    float((state[m.tensor] * grad[m.tensor]).index_select(m.dim, m.index[group]).sum())
                    for m in family.members
                )
                mean[position][group] = 0.7 * mean[position][group] + 0.3 * inner**2
        if step == 13:
            scores = scores_by_hand(model, mean, grad, saliency)
            # Where the target counts groups, no score is divided by their parameters.
            other = scores_by_hand(model, mean, grad, "taylor" if saliency == "hesso" else saliency, divided=True)
        train_step(model, optimizer, step)
    assert optimizer.schedule.at(13).starts and optimizer.schedule.at(13).stage == "joint"
    chosen = {group for group, status in enumerate(optimizer.status.tolist()) if status == 1}
    assert chosen == lowest(scores) != lowest(other)  # the two rules disagree here, so that the choice shows


@pytest.mark.parametrize(("bits", "snapped"), [(6.3, 6), (6.7, 7), (4.2, 4)])
def test_bits_snap_to_the_nearest_whole_number(bits: float, snapped: int) -> None:
    model, optimizer = make(small_config(bit_rule="ppsg"), sgd)
    for step in range(44):
        if step == 43:
            quantizer = model.layers[1].weight_quantizer
            quantizer.d.data = quantizer.q_m.data / (2 ** (bits - 1) - 1)
        train_step(model, optimizer, step)
    assert optimizer.phase.stage == "cool-down"
    assert float(quantizer.bits()) == pytest.approx(snapped, abs=1e-4)


def test_bits_never_snap_above_the_bound_in_force() -> None:
    model, optimizer = make(small_config(bit_reduction=2.3, bit_rule="ppsg"), sgd)
    for step in range(44):
        train_step(model, optimizer, step)
    assert [round(float(layer.weight_quantizer.bits()), 3) for layer in model.layers] == [6.0] * 4


@pytest.mark.parametrize(
    ("changes", "by_sensitivity", "search"),
    [
        ({}, True, True),
        ({"bit_rule": "ppsg"}, False, True),
        ({"bit_rule": "paper"}, False, True),
        ({"clipping": "max"}, True, False),
        ({"learn_exponent": True}, True, False),
    ],
)
def test_the_rules_of_a_config_choose_the_bits(changes: dict, by_sensitivity: bool, search: bool) -> None:
    """Clipping values are searched for at t = 1 only, and never where q_m = max|W| is asked for."""
    found = bit_choices(small_config(**changes))
    assert (found.by_sensitivity, found.search_clipping) == (by_sensitivity, search)


def test_each_channel_gets_the_clipping_value_of_its_final_width() -> None:
    config = GETAConfig(
        per_channel=True, bits=(3, 8), mean_bits=4, target_sparsity=0.0, warmup=2, projection=4, joint=4
    )
    model, _, optimizer = prepare(config, steps=24)
    model.layers[0].weight.data[2, 3] = 9.0
    optimizer.qasso_state.curvature = torch.tensor([4.0, 3.0, 2.0, 1.0])
    optimizer.fix_bits(bit_choices(config))
    widths = optimizer.bits()
    assert len(set(widths.values())) > 1 or round(min(widths.values())) == 4
    for name, layer in quantized_layers(model).items():
        bits = round(widths[f"{name}.weight_quantizer"])
        found = layer.weight_quantizer.q_m.detach()
        # Up to the grid of fp16, on which the step sizes are.
        torch.testing.assert_close(found, channel_clipping_values(layer.weight, bits), rtol=5e-4, atol=0)
        assert torch.equal(layer.weight_quantizer.d, layer.weight_quantizer.d.half().float())
