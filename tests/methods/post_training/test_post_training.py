"""Rounding after training: the numbers of the procedure that it replaces, which is written out here."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch

from geta_hf.config import GETAConfig, read_config
from geta_hf.costs.targets import solve_target
from geta_hf.errors import GETAError
from geta_hf.methods import PostTrainingConfig, PostTrainingMethod, make_method
from geta_hf.methods.qasso.optimizer import bit_choices
from geta_hf.methods.rounding import round_bits
from geta_hf.quantization import quantized_layers
from tests.methods.loop import prepare, train
from tests.methods.qasso.toy import STEPS

LIMITS = {
    "mean bits": {"target_parameters": 0.5, "bits": (3, 8), "mean_bits": 4},
    "bops": {"target_parameters": 0.4, "target_bops": 0.09},
    "choices": {"target_sparsity": 0.4, "bit_choices": [4, 8], "mean_bits": 6},
    "inputs": {"target_sparsity": 0.4, "activation_bits": (4, 8)},
    "channels": {"target_sparsity": 0.4, "mean_bits": 5.5, "per_channel": True},
    "learned exponent": {"target_sparsity": 0.4, "mean_bits": 5, "learn_exponent": True},
    "nearest": {"target_sparsity": 0.4, "bit_rule": "ppsg"},
}


def config_of(name: str) -> PostTrainingConfig:
    return PostTrainingConfig(warmup=5, projection=8, joint=31, **LIMITS[name])


def trained_by_hand(config: PostTrainingConfig) -> torch.nn.Module:
    """Prune at 16 bits under a config of its own, then allocate widths by the real config and target."""
    values = {name: value for name, value in config.to_dict().items() if name != "method"}
    final = GETAConfig(**values)
    high = {"bits": (16, 16), "mean_bits": 16, "bit_choices": None, "target_bops": None}
    model, method, qasso = prepare(replace(final, **high))
    train(model, method, qasso)
    named = dict(model.named_parameters())
    target = solve_target(final, qasso.families, qasso.ledger)
    arguments = (qasso.curvature, qasso.ledger, target, qasso.removed_mask, bit_choices(final))
    round_bits(qasso.quantizers, named, named.get, *arguments)
    return model


@pytest.mark.parametrize("name", LIMITS)
def test_it_gives_the_numbers_of_the_procedure_it_replaces(name: str) -> None:
    config = config_of(name)
    expected = trained_by_hand(config).state_dict()
    model, method, optimizer = prepare(config)
    train(model, method, optimizer)
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key
    bits = method.result().weight_bits
    assert all(config.bits[0] <= width <= config.bits[1] for width in bits.values())


def test_weights_have_their_first_width_until_training_ends() -> None:
    model, method, optimizer = prepare(config_of("mean bits"))

    def watch(step: int) -> None:
        if step == STEPS - 1:
            return  # the last step rounds
        layers = quantized_layers(model).values()
        assert all(float(layer.weight_quantizer.bits()) == pytest.approx(16, abs=1e-3) for layer in layers)
        assert not method.finished

    train(model, method, optimizer, watch=watch)
    assert method.finished and method.result().removed_groups == method.removed_groups > 0
    assert method.metrics()["mean_bits"] <= 4


def test_the_end_of_a_stopped_run_is_not_rounded() -> None:
    model, method, optimizer = prepare(config_of("mean bits"))
    train(model, method, optimizer, steps=20)
    with pytest.raises(GETAError, match="before the end of the joint stage"):
        method.result()
    train(model, method, optimizer, steps=STEPS - 1)
    assert not method.finished
    assert all(bits == pytest.approx(16, abs=1e-3) for bits in optimizer.bits().values())
    with pytest.raises(GETAError, match=f"rounded in the last step, {STEPS}, and this is step {STEPS - 1}"):
        method.result()
    train(model, method, optimizer)
    assert method.finished and set(method.result().weight_bits.values()) <= set(range(3, 9))


def test_a_run_whose_scaler_skipped_steps_is_rounded_when_training_ends() -> None:
    """An fp16 scaler skips steps, so that the optimizer never reaches the last one."""
    model, method, optimizer = prepare(config_of("mean bits"))
    train(model, method, optimizer, steps=STEPS - 2)
    assert not method.finished
    method.finish()
    assert method.finished and set(method.result().weight_bits.values()) <= set(range(3, 9))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    method.finish()  # a second time changes nothing
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    train(model, method, optimizer, steps=STEPS - 1)
    assert not method.finished


@pytest.mark.parametrize("stop", [20, 50, STEPS])
def test_a_resumed_loop_ends_the_same(stop: int) -> None:
    whole, method, optimizer = prepare(config_of("mean bits"))
    train(whole, method, optimizer)
    model, method, optimizer = prepare(config_of("mean bits"))
    saved = io.BytesIO()

    def watch(step: int) -> None:
        if step == stop - 1:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)

    train(model, method, optimizer, steps=stop, watch=watch)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    fresh, method, optimizer = prepare(config_of("mean bits"))
    fresh.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    train(fresh, method, optimizer)
    assert method.finished
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), whole.parameters(), strict=True))


def test_the_config_is_found_by_its_method_and_chooses_it() -> None:
    config = config_of("mean bits")
    assert read_config(config.to_dict()) == config and config.to_dict()["method"] == "post-training"
    assert type(make_method(config)) is PostTrainingMethod
