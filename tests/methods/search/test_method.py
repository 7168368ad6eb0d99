"""A search in a plain loop on the toy network: stages, targets met exactly, gradients of choices, resumed runs."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from geta_hf import SearchConfig
from geta_hf.config import read_config
from geta_hf.errors import GETAError
from geta_hf.methods import StepMemory, make_method
from geta_hf.methods.search.sampling import SAMPLING
from geta_hf.qadg.space import PruningSpace
from geta_hf.quantization import quantized_layers
from tests.methods import loop
from tests.methods.qasso.toy import Toy, batch_at, toy_space

STEPS = 16
slow = pytest.mark.slow


def config_of(**changes: Any) -> SearchConfig:
    stages = {"warmup": 2, "search": 10}
    return SearchConfig(**{"target_sparsity": 0.5, "mean_bits": 4, "bits": (2, 6), **stages, **changes})


def prepare(config: SearchConfig, *args: Any, steps: int = STEPS, **kwargs: Any) -> tuple[nn.Module, Any, Any]:
    return loop.prepare(config, *args, steps=steps, **kwargs)


def train(model: nn.Module, method: Any, optimizer: Any, steps: int = STEPS, **kwargs: Any) -> None:
    loop.train(model, method, optimizer, steps, **kwargs)


def assert_removed_are_zero(model: nn.Module, removed: dict[str, torch.Tensor]) -> None:
    tensors = model.state_dict()
    for family in toy_space().families:
        for member in family.members:
            for group, gone in enumerate(removed[family.name].tolist()):
                piece = tensors[member.tensor].index_select(member.dim, member.index[group])
                assert bool((piece == 0).all()) == gone


@pytest.mark.parametrize("sampling", ["softmax", *(pytest.param(name, marks=slow) for name in SAMPLING[1:])])
def test_a_run_ends_with_exactly_what_was_asked_for(sampling: str) -> None:
    model, method, optimizer = prepare(config_of(sampling=sampling))
    seen = []
    train(model, method, optimizer, watch=lambda step: seen.append(method.metrics()))
    assert [line["stage"] for line in seen] == [1] + [2] * 10 + [3] * (STEPS - 11)
    found = method.result()
    assert found.removed_groups == 5 and method.removed_groups == 5
    assert_removed_are_zero(model, found.removed)
    weights = optimizer.ledger.weights(optimizer.removed)
    bits = torch.tensor([found.weight_bits[name] for name in quantized_layers(model)], dtype=torch.float64)
    # One more bit of the smallest layer would exceed the mean.
    mean = float((weights * bits).sum() / weights.sum())
    assert 4 - float(weights.min() / weights.sum()) < mean <= 4 == seen[-1]["mean_bits"] + 4 - seen[-1]["mean_bits"]
    for name, layer in quantized_layers(model).items():
        assert layer.mixture is None
        torch.testing.assert_close(
            layer.weight_quantizer.bits(), torch.full_like(layer.weight_quantizer.d, found.weight_bits[name])
        )


@pytest.mark.parametrize(
    "targets", [{"target_bops": 0.06}, {"target_bytes": 1500}, {"target_bops": 0.06, "mean_bits": 4}]
)
def test_a_size_is_met_and_spent(targets: dict[str, Any]) -> None:
    config = SearchConfig(bits=(2, 6), warmup=2, search=10, per_channel=False, **targets)
    model, method, optimizer = prepare(config)
    train(model, method, optimizer)
    found = method.result()
    bits = torch.tensor([found.weight_bits[name] for name in quantized_layers(model)], dtype=torch.float64)
    spent = optimizer.target.spent(optimizer.target.unit, optimizer.ledger, optimizer.removed, bits)
    amount = targets.get("target_bops", targets.get("target_bytes"))
    # The cheapest single change is a channel, or a bit of a layer, of a sixth of the weights.
    assert 0.85 * amount < spent <= amount
    assert_removed_are_zero(model, found.removed)


@pytest.mark.parametrize("targets", [{"target_bops": 0.015}, {"target_sparsity": 0.3, "mean_bits": 4}])
def test_inputs_have_one_width_which_bops_count(targets: dict[str, Any]) -> None:
    config = SearchConfig(bits=(2, 6), warmup=2, search=10, activation_bits=(8, 8), **targets)
    model, method, optimizer = prepare(config)
    train(model, method, optimizer)
    found = method.result()
    assert set(found.input_bits.values()) == {8} and set(found.input_bits) == set(found.weight_bits)
    for layer in quantized_layers(model).values():
        assert float(layer.input_quantizer.bits()) == pytest.approx(8, abs=1e-4)
    bits = torch.tensor([found.weight_bits[name] for name in quantized_layers(model)], dtype=torch.float64)
    spent = optimizer.ledger.relative_bops(optimizer.removed, bits, 8)
    assert 0.85 * 0.015 < spent <= 0.015 if "target_bops" in targets else found.removed_groups == 3


def choosing_inputs(**changes: Any) -> SearchConfig:
    values: dict[str, Any] = {"bits": (2, 6), "warmup": 2, "search": 10, "activation_bits": (4, 8)}
    return SearchConfig(**{**values, **changes})


@pytest.mark.parametrize(
    "targets",
    [{"target_bops": 0.015}, {"target_bops": 0.015, "target_sparsity": 0.3}, {"target_sparsity": 0.3, "mean_bits": 4}],
)
def test_widths_of_inputs_are_chosen_too(targets: dict[str, Any]) -> None:
    model, method, optimizer = prepare(choosing_inputs(activation_choices=[4, 5, 8], **targets))
    generator = torch.Generator().manual_seed(2)
    optimizer.input_logits.data.add_(torch.randn(4, 3, generator=generator))
    train(model, method, optimizer)
    found = method.result()
    assert set(found.input_bits) == set(found.weight_bits) and len(set(found.input_bits.values())) > 1
    layers = quantized_layers(model)
    for name, layer in layers.items():
        assert layer.input_mixture is None
        assert float(layer.input_quantizer.bits()) == pytest.approx(found.input_bits[name], abs=1e-3)
    bits = torch.tensor([found.weight_bits[name] for name in layers], dtype=torch.float64)
    inputs = torch.tensor([found.input_bits[name] for name in layers], dtype=torch.float64)
    assert float(inputs.mean()) <= optimizer.target.input_bits + 1e-9
    spent = optimizer.ledger.relative_bops(optimizer.removed, bits, inputs)
    assert method.metrics()["relative_bops"] == pytest.approx(spent, abs=1e-4)
    if "target_bops" in targets:
        assert 0.8 * 0.015 < spent <= 0.015
    else:
        assert optimizer.target.input_bits == 6 and found.removed_groups == 3


def test_gradients_of_widths_of_inputs_are_those_of_finite_differences() -> None:
    model, method, optimizer = prepare(choosing_inputs(target_bops=0.01, warmup=0))
    x, y = batch_at(0)

    def value() -> torch.Tensor:
        method.before_backward(model)
        return (model(x) - y).square().mean() + method.extra_loss(model)

    value().backward()
    logits = optimizer.input_logits
    found = logits.grad.clone()
    # Of the last layer, whose output no other input is rounded from: rounding has no slope that differences could show.
    for place in [(3, 0), (3, 4)]:
        ends = []
        for change in (1e-2, -1e-2):
            with torch.no_grad():
                logits[place] += change
            ends.append(float(value().detach()))
            with torch.no_grad():
                logits[place] -= change
        assert float(found[place]) == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=0.02, abs=1e-4)
    # Without any widths of weights in play, a layer computes on the mixture of its inputs.
    layer = quantized_layers(model)["layers.0"]
    own = layer.input_mixture
    rounded = [torch.round(x.clamp(-c, c) / (c / n)) * (c / n) for c, n in zip(own.clips, own.levels, strict=True)]
    wanted = sum(share * value for share, value in zip(own.shares, rounded, strict=True))
    torch.testing.assert_close(layer.quantized_input(x), wanted.view_as(x))
    assert bool((own.clips.flatten().diff() >= 0).all())  # narrow widths clip more


def test_a_run_with_widths_of_inputs_is_resumed() -> None:
    config = choosing_inputs(target_bops=0.015)
    full, method, optimizer = prepare(config)
    train(full, method, optimizer, steps=6)
    state = copy.deepcopy({"model": full.state_dict(), "optimizer": optimizer.state_dict()})
    train(full, method, optimizer)
    fresh, method, optimizer = prepare(config)
    fresh.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    train(fresh, method, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), full.parameters(), strict=True))


@pytest.mark.parametrize("stop", [pytest.param(1, marks=slow), 6, pytest.param(14, marks=slow)])
def test_a_resumed_loop_ends_the_same(stop: int) -> None:
    config = config_of(sampling="softmax")
    full, method, optimizer = prepare(config)
    train(full, method, optimizer)
    model, method, optimizer = prepare(config)
    train(model, method, optimizer, steps=stop)
    saved = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    fresh, method, optimizer = prepare(config)
    fresh.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    train(fresh, method, optimizer)
    assert method.step_count == STEPS and method.removed_groups == 5
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), full.parameters(), strict=True))


def test_gradients_of_choices_are_those_of_finite_differences() -> None:
    model, method, optimizer = prepare(config_of(warmup=0))
    x, y = batch_at(0)

    def value() -> torch.Tensor:
        method.before_backward(model)
        return (model(x) - y).square().mean() + method.extra_loss(model)

    value().backward()
    for logits in (optimizer.width_logits, optimizer.keep_logits):
        found = logits.grad.clone()
        assert bool((found != 0).any())
        for place in [(0,) * logits.dim(), tuple(size - 1 for size in logits.shape)]:
            ends = []
            for change in (1e-2, -1e-2):
                with torch.no_grad():
                    logits[place] += change
                ends.append(float(value().detach()))
                with torch.no_grad():
                    logits[place] -= change
            assert float(found[place]) == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=0.02, abs=1e-4)


def test_gradients_of_choices_are_those_of_one_step() -> None:
    """A trainer sets the gradients of the model alone to zero."""
    model, method, optimizer = prepare(config_of(warmup=0))
    for step in range(2):
        x, y = batch_at(step)
        method.before_backward(model)
        (model(x) - y).square().mean().backward()
        optimizer.step()
        model.zero_grad()
        assert optimizer.width_logits.grad is None and optimizer.keep_logits.grad is None


def test_choices_and_weights_take_turns_where_rows_are_held_out() -> None:
    model, method, optimizer = prepare(config_of(warmup=1, search=4, architecture_data=0.25))
    seen = []
    for step in range(6):
        on_held_out = method.on_held_out_rows
        choices = optimizer.width_logits.detach().clone()
        weight = model.layers[0].weight.detach().clone()
        train(model, method, optimizer, steps=step + 1)
        changed = not torch.equal(optimizer.width_logits, choices)
        seen.append((on_held_out, changed, not torch.equal(model.layers[0].weight, weight)))
    weights, own = (False, False, True), (True, True, False)
    # After the last step of the search, removed groups become zero.
    assert seen == [weights, weights, own, weights, (True, True, True), weights]
    assert method.held_out_share == 0.25


def test_gradients_add_up_over_passes_and_parts() -> None:
    model, method, optimizer = prepare(config_of(warmup=0))
    x, y = batch_at(0)

    def backward(rows: slice) -> None:
        method.before_backward(model)
        (model(x[rows]) - y[rows]).square().sum().backward()

    backward(slice(None))
    wanted = optimizer.keep_logits.grad.clone()
    optimizer.zero_grad()
    assert optimizer.keep_logits.grad is None
    backward(slice(0, 10))
    backward(slice(10, None))
    torch.testing.assert_close(optimizer.keep_logits.grad, wanted)


def test_slices_outside_of_quantized_layers_count_by_first_order() -> None:
    """The groups' columns are in a layer that is not quantized: ⟨g, x⟩ over them, times the slope of the factor."""
    families = tuple(
        replace(family, members=tuple(replace(member, consumer=member.dim == 1) for member in family.members))
        for family in toy_space().families
    )
    config = config_of(warmup=0, exclude=["layers.1", "layers.3"], strength=1e-9)
    model, method, optimizer = prepare(config, space=PruningSpace(families=families))
    assert {(cut.tensor, cut.dim) for cut in optimizer._outside} == {("layers.1.weight", 1), ("layers.3.weight", 1)}
    x, y = batch_at(0)
    method.before_backward(model)
    ((model(x) - y).square().mean() + method.extra_loss(model)).backward()
    weight = model.layers[3].weight
    wanted = (weight.grad * weight).sum(0).detach() * 0.9 * 0.1  # the slope of the factor at 0.9 and τ = 1
    given = []
    optimizer.choices.step = lambda: given.append(optimizer.keep_logits.grad.clone())
    optimizer.step()
    torch.testing.assert_close(given[0][4:], wanted)


def test_evaluation_is_of_the_likeliest_choice() -> None:
    model, method, optimizer = prepare(config_of())
    train(model, method, optimizer, steps=7)
    x, _ = batch_at(0)
    chosen = optimizer.likeliest()
    table, clips = optimizer.quantizers, optimizer.clips
    dense = copy.deepcopy(model)
    for number, weight in enumerate(table.own_weights):
        layer = dense.get_submodule(weight.removesuffix(".weight"))
        best = int(chosen.widths[number].argmax())
        clip = clips[table.spans[table.weights[weight]], best][:, None]
        step = clip / (2 ** (method.config.widths[best] - 1) - 1)
        layer.mixture = None
        layer.weight_quantizer.d.data = step.flatten()
        layer.weight_quantizer.q_m.data = clip.flatten()
        layer.weight_quantizer.set_four_levels(optimizer.four_levels[number] and method.config.widths[best] == 2)
    for family, start in zip(toy_space().families, (0, 4), strict=True):
        factor = chosen.keep[start : start + family.size]
        columns = family.members[2]
        for group, index in enumerate(columns.index):
            dense.get_parameter(columns.tensor).data[:, index] *= factor[group]
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x))
        copied = copy.deepcopy(model)  # a callback may copy the model in the middle of a search
        torch.testing.assert_close(copied(x), model(x))


def test_clipping_values_learn_and_widths_remain() -> None:
    ends = []
    for rate in (0.0, 1e-2):
        model, method, optimizer = prepare(config_of(quantizer_learning_rate=rate))
        train(model, method, optimizer, steps=12)
        start = {name: layer.weight_quantizer.q_m.clone() for name, layer in quantized_layers(model).items()}
        train(model, method, optimizer)
        layers = quantized_layers(model)
        ends.append(all(torch.equal(layers[name].weight_quantizer.q_m, value) for name, value in start.items()))
        for name, layer in layers.items():
            expected = torch.full_like(layer.weight_quantizer.d, method.result().weight_bits[name])
            torch.testing.assert_close(layer.weight_quantizer.bits(), expected)
    assert ends == [True, False]


@pytest.mark.parametrize("granularity", ["layer", "group", "row"])
def test_layers_of_two_bits_have_four_levels(granularity: str) -> None:
    errors = {}
    for four_levels in (True, False):
        config = config_of(bits=(2, 2), mean_bits=2, granularity=granularity, four_levels=four_levels)
        model, method, optimizer = prepare(config)
        train(model, method, optimizer, steps=5)
        layers = quantized_layers(model)
        levels = {layer.mixture.levels[0].item() for layer in layers.values()}
        assert levels == {1.5 if four_levels else 1.0}
        train(model, method, optimizer)
        found = {name: layer.weight_quantizer.four_levels for name, layer in layers.items()}
        assert set(found.values()) == {four_levels}
        assert set(method.result().weight_bits.values()) == {2}
        # Removed groups are zero on the grid without a zero too, and nothing else is.
        assert_removed_are_zero(model, method.result().removed)
        for layer in layers.values():
            own = layer.quantized_weight()
            if four_levels:
                assert torch.equal(own == 0, layer.weight == 0)
            layer.weight_quantizer.set_four_levels(not four_levels)
        method.restore(model)
        assert {layer.weight_quantizer.four_levels for layer in layers.values()} == {four_levels}
        with torch.no_grad():
            lost = [(layer.quantized_weight() - layer.weight).square().sum() for layer in layers.values()]
        errors[four_levels] = float(sum(lost))
    assert errors[True] < errors[False]


@pytest.mark.parametrize("granularity", ["layer", "group", "row"])
def test_a_run_with_four_levels_is_resumed(granularity: str) -> None:
    config = config_of(bits=(2, 3), mean_bits=2.5, granularity=granularity)
    full, method, optimizer = prepare(config)
    train(full, method, optimizer)
    for stop in (6, 14):
        model, method, optimizer = prepare(config)
        train(model, method, optimizer, steps=stop)
        state = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        fresh, method, optimizer = prepare(config)
        fresh.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        train(fresh, method, optimizer)
        assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), full.parameters(), strict=True))
        levels = [
            [layer.weight_quantizer.levels.tolist() for layer in quantized_layers(m).values()] for m in (fresh, full)
        ]
        assert levels[0] == levels[1] and any(map(any, levels[0]))


def test_what_was_changed_afterwards_is_restored() -> None:
    model, method, optimizer = prepare(config_of())
    with pytest.raises(GETAError, match="the search is at step 0, before its choices are fixed"):
        method.restore(model)
    train(model, method, optimizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01
    method.restore(model)
    assert_removed_are_zero(model, method.result().removed)
    for name, layer in quantized_layers(model).items():
        assert layer.weight_quantizer.bits().mean().item() == pytest.approx(method.result().weight_bits[name], abs=1e-3)


def test_a_hardware_cost_draws_choices_to_cheaper_ones() -> None:
    ends = []
    for weight in (0.0, 1000.0):
        config = config_of(cost="ne16_cycles", cost_weight=weight, strength=1e-6, target_sparsity=0.0, mean_bits=6)
        config.choice_learning_rate = 0.3
        model, method, optimizer = prepare(config)
        train(model, method, optimizer, steps=11)
        ends.append(float(optimizer.expected().keep.mean()))
    assert ends[1] < ends[0] - 0.1


def test_a_choice_that_is_not_finite_is_an_error() -> None:
    model, method, optimizer = prepare(config_of())
    train(model, method, optimizer, steps=6)
    optimizer.keep_logits.data[0] = torch.nan
    with pytest.raises(GETAError, match=r"choice of groups was NaN or infinite by step 6"):
        method.check_finite()


# --- refused before training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bit_choices": [0]}, r"SearchConfig.bit_choices = \[0\] must be widths of which at least one is not 0"),
        ({"bits": (2, 9)}, r"SearchConfig.bits = \(2, 9\) must be a pair"),
        ({"temperature": 0.0}, r"SearchConfig.temperature = 0.0 must be a number in \(1e-30"),
        ({"final_temperature": 1e-40}, r"SearchConfig.final_temperature = 1e-40 must be"),
        ({"temperature": 0.01}, r"final_temperature = 0.05 is above temperature = 0.01"),
        ({"activation_choices": [8]}, r"activation_choices = \[8\] must be None where activation_bits is None"),
        (
            {"activation_bits": (4, 8), "activation_choices": [4, 6]},
            r"activation_choices = \[4, 6\] must be widths from 4",
        ),
        ({"cost": "latency"}, r"a table is given with cost='latency'"),
        ({"cost": "mpic_cycles"}, r"cost = 'mpic_cycles' knows widths of \[2, 4, 8\] bits alone, not 3"),
        ({"sampling": "best"}, r"SearchConfig.sampling = 'best' must be one of softmax"),
    ],
)
def test_bad_rules_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GETAError, match=message):
        config_of(**changes)


def test_zero_among_the_widths_stands_for_removal() -> None:
    config = SearchConfig(bit_choices=[0, 2, 4, 8], target_bops=0.1)
    assert config.widths == [2, 4, 8] and config.splits_in_training
    assert read_config(config.to_dict()) == config and not config_of().splits_in_training


@pytest.mark.parametrize(
    ("changes", "steps", "message"),
    [
        ({"search": 0}, STEPS, "SearchConfig.search = 0 is no step of 16"),
        ({"warmup": 7}, STEPS, "warm-up takes 7 steps and the search 10, but training has 16"),
        ({"target_sparsity": None, "mean_bits": None, "target_bops": 1e-4}, STEPS, "target_bops .* can't be reached"),
    ],
)
def test_what_a_run_cannot_do_is_refused(changes: dict[str, Any], steps: int, message: str) -> None:
    with pytest.raises(GETAError, match=message):
        prepare(config_of(**changes), steps=steps)


def test_a_table_without_the_shapes_is_refused_before_the_model_changes(tmp_path: Any) -> None:
    (tmp_path / "table.json").write_text('{"layers": []}')
    model = Toy()
    config = config_of(cost="latency", latency_table=str(tmp_path / "table.json"))
    with pytest.raises(GETAError, match=r"layers.0: the latency table has no layer of 12 outputs and 8 inputs"):
        prepare(config, model)
    assert not quantized_layers(model)


def test_removal_without_a_family_to_prune_is_refused() -> None:
    targets: dict[str, Any] = {"target_sparsity": 0.0, "mean_bits": 4}
    nothing = PruningSpace(families=tuple(replace(family, prunable=False) for family in toy_space().families))
    with pytest.raises(GETAError, match="bit_choices has 0, which removes groups, but no family may be pruned"):
        prepare(config_of(bit_choices=[0, 2, 6], **targets), space=nothing)
    _, method, _ = prepare(config_of(bit_choices=[2, 6], **targets), space=nothing)
    assert method.config.widths == [2, 6]


def test_frozen_weights_are_refused() -> None:
    with pytest.raises(GETAError, match="SearchMethod needs trained weights; leave peft_config out"):
        make_method(config_of()).check(frozen_weights=True)


def test_a_state_of_another_run_is_refused() -> None:
    _, _, optimizer = prepare(config_of())
    state = optimizer.state_dict()
    with pytest.raises(GETAError, match="not that of a search"):
        optimizer.load_state_dict({key: value for key, value in state.items() if key != "search"})
    with pytest.raises(GETAError, match=r"stages \[2, 10, 16\], this run \[5, 10, 16\]"):
        prepare(config_of(warmup=5))[2].load_state_dict(state)
    with pytest.raises(GETAError, match=r"choices of widths of shape \(4, 5\), not \(4, 4\)"):
        prepare(config_of(bits=(2, 5)))[2].load_state_dict(state)
    with pytest.raises(GETAError, match="no further parameters"):
        optimizer.add_param_group({"params": []})


def test_memory_counts_choices_and_clipping_values() -> None:
    model, method, _ = prepare(config_of())
    found = method.memory(model, toy_space(), 4)
    assert found == StepMemory(kept=4 * (5 * 34 + 4 * (4 * 5 + 10)), temporary=16 * 96)
