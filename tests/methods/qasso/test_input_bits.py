"""Widths of inputs in a run: inside their range, by sensitivity or BOPs, and final when the joint stage ends."""

from __future__ import annotations

import copy

import pytest
import torch

from geta_hf.config import GETAConfig
from geta_hf.methods.post_training import PostTrainingConfig
from geta_hf.quantization import quantized_layers
from tests.methods.loop import prepare, train
from tests.methods.qasso.toy import Toy, batch_at, small_config

RANGE = (2, 8)


def run(kind=GETAConfig, model=None, **changes):
    values = {"warmup": 2, "projection": 4, "joint": 15, "target_sparsity": 0.3, "activation_bits": RANGE, **changes}
    model, method, optimizer = prepare(kind(**values), model, steps=24)
    train(model, method, optimizer, steps=24)
    return model, method, optimizer


def relative_bops(optimizer, result) -> float:
    weights = torch.tensor([float(bits) for bits in result.weight_bits.values()], dtype=torch.float64)
    inputs = torch.tensor([float(bits) for bits in result.input_bits.values()], dtype=torch.float64)
    return optimizer.ledger.relative_bops(optimizer.removed_mask, weights, inputs)


@pytest.mark.parametrize("kind", [GETAConfig, PostTrainingConfig])
@pytest.mark.parametrize("changes", [{"mean_bits": 5}, {"target_bops": 0.015}, {"target_bops": 0.03, "bits": (3, 8)}])
def test_inputs_end_inside_their_range_and_targets_are_met(kind, changes: dict) -> None:
    model, method, optimizer = run(kind, **changes)
    result = method.result()
    widths = list(result.input_bits.values())
    assert len(widths) == 4 and all(2 <= bits <= 8 for bits in widths)
    if "target_bops" in changes:
        assert relative_bops(optimizer, result) <= changes["target_bops"]
    else:
        assert sum(widths) == 4 * 5
    for name, layer in quantized_layers(model).items():
        assert float(layer.input_quantizer.bits()) == pytest.approx(result.input_bits[name], abs=1e-4)
    assert method.metrics()["mean_input_bits"] == sum(widths) / 4


@pytest.mark.parametrize("rule", ["ppsg", "paper"])
def test_learned_widths_are_rounded_without_bops_and_moved_with_them(rule: str) -> None:
    _, method, _ = run(bit_rule=rule)
    assert all(2 <= bits <= 8 for bits in method.result().input_bits.values())
    _, method, optimizer = run(bit_rule=rule, target_bops=0.02)
    result = method.result()
    assert relative_bops(optimizer, result) <= 0.02 and min(result.input_bits.values()) >= 2


def test_rounding_costs_what_is_estimated() -> None:
    """⟨g, x^Q - x⟩ by the gradient of d, against the inputs and their gradients themselves."""
    model, _, optimizer = prepare(small_config(activation_bits=RANGE), steps=60)
    for layer in quantized_layers(model).values():
        layer.input_quantizer.d.data.mul_(2000)  # about 5 bits, so that there is an error to see
    inner = {}

    def watch(name: str, layer: torch.nn.Module) -> None:
        def note(_, args, output) -> None:
            output.register_hook(lambda g: inner.__setitem__(name, float((g * (output - args[0])).sum())))

        layer.input_quantizer.register_forward_hook(note)

    for name, layer in quantized_layers(model).items():
        layer.input_quantizer.q_m.data.mul_(100)  # nothing is clipped
        watch(name, layer)
    x, y = batch_at(3)
    (model(x) - y).square().mean().backward()
    named = dict(model.named_parameters())
    optimizer.quantizers.to(torch.device("cpu"))
    found = optimizer.quantizers.input_squares(named)
    assert found.tolist() == pytest.approx([inner[name] ** 2 for name in quantized_layers(model)], rel=1e-3)
    assert (found > 0).all()


class Uneven(Toy):
    """The outputs of the second block hardly matter."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, down, mix, out = self.layers
        x = x + down(self.activation(up(x)))
        return self.head(x + 1e-3 * out(self.activation(mix(x))))


@pytest.fixture(scope="module")
def uneven():
    torch.manual_seed(0)
    model, method, _ = run(model=Uneven())
    return model, method.result()


def test_inputs_that_the_loss_feels_get_more_bits(uneven) -> None:
    up, down, mix, out = uneven[1].input_bits.values()
    assert min(up, down) > max(mix, out)


def test_the_choice_is_better_than_the_same_bits_the_other_way_round(uneven) -> None:
    model, result = uneven

    def loss_with(widths: list[int]) -> float:
        other = copy.deepcopy(model)
        for layer, bits in zip(quantized_layers(other).values(), widths, strict=True):
            layer.input_quantizer.d.data = layer.input_quantizer.q_m.data / (2 ** (bits - 1) - 1)
        with torch.no_grad():
            return sum(float((other(x) - y).square().mean()) for x, y in map(batch_at, range(100, 108)))

    chosen = list(result.input_bits.values())
    assert loss_with(chosen) < loss_with(chosen[::-1])


def test_what_is_measured_travels_with_a_checkpoint_and_an_older_one_is_read() -> None:
    config = small_config(activation_bits=RANGE)
    model, method, optimizer = prepare(config)
    train(model, method, optimizer, steps=42)
    stored = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    first = stored[1]["state"][0]
    assert (first["qasso.input_square"] > 0).all()
    train(model, method, optimizer)
    again, resumed, other = prepare(config)
    again.load_state_dict(stored[0])
    other.load_state_dict(copy.deepcopy(stored[1]))
    train(again, resumed, other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    del first["qasso.input_square"]
    _, _, third = prepare(config)
    third.load_state_dict(stored[1])
    assert third.step_count == 42 and third.qasso_state.input_square.tolist() == [0] * 4
