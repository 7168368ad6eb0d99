"""Gradients that are lost are an error that names the weights; those that a model really has not are not."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from geta_hf.config import GETAConfig
from geta_hf.costs.quantizer_table import Quantizers
from geta_hf.errors import GETAError
from geta_hf.methods.qasso.schedule import Schedule
from geta_hf.methods.qasso.silent_gradients import check_learned
from tests.methods.loop import prepare, train
from tests.methods.qasso.test_optimizer import Coded
from tests.methods.qasso.toy import Toy

WARMUP = 3
LAYERS = ("layers.0", "layers.1", "layers.2", "layers.3")
SAID = "had a gradient of exactly zero in each of the first"


def config(**changes: object) -> GETAConfig:
    return GETAConfig(**{"warmup": WARMUP, "projection": 2, "joint": 4, "target_sparsity": 0.5, **changes})


def silence(model: nn.Module, *layers: str, biases: bool = False) -> None:
    """Lose the gradients of these layers' weights and quantizers on their way."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.startswith(layers) and (biases or not name.endswith("bias")):
            parameter.register_hook(torch.zeros_like)


def run(model: nn.Module, method, optimizer, steps: int = WARMUP + 1) -> None:
    train(model, method, optimizer, steps)


@pytest.mark.parametrize("changes", [{}, {"per_channel": True}, {"learn_exponent": True}, {"activation_bits": (4, 8)}])
def test_lost_gradients_end_the_run_when_warm_up_ends(changes: dict) -> None:
    model, method, optimizer = prepare(config(**changes))
    silence(model, *LAYERS)
    run(model, method, optimizer, WARMUP)
    with pytest.raises(GETAError, match=rf"^layers.0.weight, .* {SAID} 3 steps, .*without torch_compile") as raised:
        run(model, method, optimizer)
    assert all(f"{name}.weight" in str(raised.value) for name in LAYERS)
    assert method.step_count == WARMUP and method.removed_groups == 0


def test_most_layers_without_gradients_are_an_error_if_their_biases_have_one() -> None:
    model, method, optimizer = prepare(config())
    silence(model, *LAYERS[:3])
    with pytest.raises(GETAError, match=r"^layers.0.weight, layers.1.weight, layers.2.weight and their quantizers"):
        run(model, method, optimizer)


def test_layers_that_the_loss_does_not_depend_on_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """As experts that no token reached, or a branch of weight 0; their biases have no gradient either."""
    model, method, optimizer = prepare(config())
    silence(model, *LAYERS[:3], biases=True)
    with caplog.at_level(logging.WARNING):
        run(model, method, optimizer)
    said = [record.getMessage() for record in caplog.records if SAID in record.getMessage()]
    assert len(said) == 1 and said[0].startswith(
        "layers.0.weight, layers.1.weight, layers.2.weight, layers.0.bias and 2"
    )


def test_a_dead_activation_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """The layer after it has inputs of zero, but a bias with a gradient."""
    model, method, optimizer = prepare(config())
    with torch.no_grad():
        model.layers[0].bias.fill_(-1e3)
    with caplog.at_level(logging.WARNING):
        run(model, method, optimizer)
    assert f"layers.0.weight, layers.1.weight, layers.0.bias {SAID} 3 steps" in caplog.text


def test_one_step_with_a_gradient_is_enough(caplog: pytest.LogCaptureFixture) -> None:
    model, method, optimizer = prepare(config())
    run(model, method, optimizer, 1)
    silence(model, *LAYERS)
    run(model, method, optimizer)
    assert SAID not in caplog.text


def test_weights_on_the_grid_are_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    """Of weights that are all -1 or 1 neither d nor q_m has a gradient, but the weight itself has one."""
    model, method, optimizer = prepare(config())
    for name, parameter in model.named_parameters():
        if "weight_quantizer" in name and parameter.requires_grad:
            parameter.register_hook(torch.zeros_like)
    run(model, method, optimizer)
    assert SAID not in caplog.text


def test_what_has_no_gradient_at_all_is_not_looked_at(caplog: pytest.LogCaptureFixture) -> None:
    class Unused(Toy):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            up, down, *_ = self.layers
            return self.head(x + down(torch.relu(up(x))))

    run(*prepare(config(), Unused()))
    assert SAID not in caplog.text


@pytest.mark.parametrize("gradients", [None, "zeros"])
def test_other_parameters_are_named_only_where_moments_show_it(
    gradients: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    model, method, optimizer = prepare(config())
    if gradients is None:
        run(model, method, optimizer, 1)  # moments that are not zero
    silence(model, "head", biases=True)
    run(model, method, optimizer)
    assert (f"head.weight, head.bias {SAID}" in caplog.text) == (gradients == "zeros")


def silent_until(model: nn.Module, method, step: int) -> None:
    """Let all gradients be zero before a step, as those of a loss that is constant."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: gradient * (method.step_count >= step))


@pytest.mark.parametrize("steps", [WARMUP + 1, WARMUP + 2])
def test_a_loss_that_is_constant_for_some_steps_is_a_warning(steps: int, caplog: pytest.LogCaptureFixture) -> None:
    """As that of a policy while all of its rewards are equal; the check comes again where the next period starts."""
    model, method, optimizer = prepare(config(joint=8))
    silent_until(model, method, steps)
    run(model, method, optimizer, WARMUP + 2 + 8)
    assert caplog.text.count("no trained parameter had a gradient other than zero") == steps - WARMUP
    assert SAID not in caplog.text


def test_a_loss_that_remains_constant_ends_the_run_before_the_last_period() -> None:
    model, method, optimizer = prepare(config(joint=8))
    silent_until(model, method, 100)
    with pytest.raises(GETAError, match=r"^layers.0.weight, .*check the loss"):
        run(model, method, optimizer, 60)
    assert method.step_count < WARMUP + 2 + 8


def test_loras_matrices_alone_do_not_show_that_the_loss_is_constant() -> None:
    """The fault that loses the gradients of quantizers loses theirs, so there is nothing to wait for."""
    named = {"w": torch.ones(2, 2), "w_quantizer.d": torch.ones(1), "w_quantizer.q_m": torch.ones(1)}
    named |= {"w.a": torch.ones(1, 2), "w.b": torch.ones(2, 1), "norm": torch.ones(2)}
    for tensor in named.values():
        tensor.grad = torch.zeros_like(tensor)
    named["w"].grad = None
    quantizers = Quantizers({"w": "w_quantizer"}, [], named)

    def check(names: set[str]) -> bool:
        present = {name: named[name] for name in names}
        return check_learned(
            torch.tensor([False]), quantizers, present, {}, 5, {"w": "w.b"}, adapters={"w.a", "w.b"}, last=False
        )

    assert not check(set(named))
    with pytest.raises(GETAError, match=f"^w and their quantizers {SAID} 5 steps"):
        check(set(named) - {"norm"})


def test_gradients_that_are_lost_after_a_constant_loss_end_the_run() -> None:
    model, method, optimizer = prepare(config())
    silent_until(model, method, WARMUP + 1)
    silence(model, *LAYERS)
    with pytest.raises(GETAError, match=f"{SAID} {WARMUP + 1} steps"):
        run(model, method, optimizer, WARMUP + 2)


def test_parameters_without_elements_and_moments_in_eight_bits_are_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    """A process may hold nothing of a short bias, and torchao's moments know few operations."""

    class Empty(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.none = nn.Parameter(torch.zeros(0, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.none.sum()

    model, method, optimizer = prepare(config(), Empty())
    silence(model, "head", biases=True)
    run(model, method, optimizer, 1)
    optimizer.state[model.head.bias]["coded"] = torch.zeros(2).as_subclass(Coded)
    run(model, method, optimizer)
    assert f"head.bias {SAID}" in caplog.text


def test_a_run_that_resumes_within_warm_up_remembers_what_it_saw() -> None:
    model, method, optimizer = prepare(config())
    run(model, method, optimizer, 2)
    resumed, its_method, its_optimizer = prepare(config())
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    silence(resumed, *LAYERS)
    run(resumed, its_method, its_optimizer)
    assert its_method.step_count == WARMUP + 1


def test_the_check_comes_where_something_starts_after_two_steps_or_more() -> None:
    def due(warmup: int, projection: int, joint: int, total: int = 40) -> int:
        lengths = {"warmup": warmup, "projection": projection, "joint": joint}
        made = GETAConfig(**lengths, projection_periods=2, pruning_periods=2)
        return Schedule.from_config(made, total, total).first_start_after(2)

    assert due(10, 6, 8) == 10
    assert due(1, 6, 8) == 4  # the second period
    assert due(0, 2, 8) == 2
    assert due(1, 0, 0) == due(0, 0, 0) == -1
    assert due(2, 0, 0) == 2
