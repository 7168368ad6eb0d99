"""QASSO behind the seam: a plain loop, without any Trainer."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from geta_hf import config as config_module
from geta_hf.config import CompressionConfig, GETAConfig
from geta_hf.costs.targets import solve_target
from geta_hf.errors import GETAError
from geta_hf.methods import METHODS, QASSOMethod, Run, make_method
from geta_hf.methods.qasso.schedule import STAGES
from geta_hf.qadg import PruningSpace, build_space
from geta_hf.quantization import attach_quantizers, quantized_layers
from geta_hf.training.lora import attach_lora, find_frozen_weights, plan_lora
from geta_hf.training.plan import make_ledger
from tests.methods.loop import prepare, train
from tests.methods.qasso.toy import STEPS, Toy, small_config, toy_space, train_step, wrap


def test_the_loop_is_the_optimizer_wrapped_by_hand() -> None:
    config = small_config(quantizer_learning_rate=3e-3, mean_bits=5)
    torch.manual_seed(0)
    twin = Toy()
    attach_quantizers(twin, initial_bits=16, target_bits=8)
    by_hand = wrap(twin, config)
    for step in range(STEPS):
        train_step(twin, by_hand, step)
    model, method, optimizer = prepare(config)
    train(model, method, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert method.step_count == STEPS and method.finished


def test_stages_come_in_order_and_metrics_follow() -> None:
    model, method, optimizer = prepare(small_config())
    seen, logged = [], []

    def watch(step: int) -> None:
        seen.append(method.stage)
        logged.append(method.metrics())

    assert method.stage == "warm-up" and not method.finished and method.removed_groups == 0
    train(model, method, optimizer, watch=watch)
    assert tuple(dict.fromkeys(seen)) == method.stages == STAGES
    assert [line["stage"] for line in logged] == [STAGES.index(stage) + 1 for stage in seen]
    assert set(logged[0]) == {"stage", "sparsity", "mean_bits", "min_bits", "max_bits", "relative_bops", "gamma"}
    assert logged[0]["sparsity"] == 0 and logged[-1]["sparsity"] == 0.5
    assert logged[-1]["mean_bits"] <= 6 < logged[0]["mean_bits"]
    assert any(line["gamma"] > 0 for line in logged) and logged[-1]["gamma"] == 0


def test_the_result_is_what_the_model_holds() -> None:
    model, method, optimizer = prepare(small_config(activation_bits=(4, 8)))
    with pytest.raises(GETAError, match="before the end of the joint stage"):
        method.result()
    train(model, method, optimizer)
    found = method.result()
    assert found.removed_groups == method.removed_groups == 5
    tensors = model.state_dict()
    for family in toy_space().families:
        for member in family.members:
            for group, removed in enumerate(found.removed[family.name].tolist()):
                piece = tensors[member.tensor].index_select(member.dim, member.index[group])
                assert bool((piece == 0).all()) == removed
    layers = quantized_layers(model)
    assert found.weight_bits == {name: round(float(layer.weight_quantizer.bits())) for name, layer in layers.items()}
    assert found.input_bits == {name: round(float(layer.input_quantizer.bits())) for name, layer in layers.items()}
    assert "mean_input_bits" in method.metrics()


def test_tied_layers_have_one_width() -> None:
    model = Toy()
    model.layers[2], model.layers[3] = nn.Linear(8, 12), nn.Linear(12, 8)
    model.layers[3].weight = model.layers[1].weight
    config = small_config(target_sparsity=0.0)
    _, method, optimizer = prepare(config, model, PruningSpace(families=()))
    train(model, method, optimizer)
    bits = method.result().weight_bits
    assert len(bits) == 4 and bits["layers.1"] == bits["layers.3"]


def test_quantizers_have_a_group_of_their_own_and_none_of_their_gradients_are_computed_in_cool_down() -> None:
    model, method, optimizer = prepare(small_config(quantizer_learning_rate=2e-3))
    group = optimizer.param_groups[-1]
    assert group["lr"] == 2e-3 and group["weight_decay"] == 0
    assert all("quantizer" in name for name in group["param_names"])
    assert not any("quantizer" in name for other in optimizer.param_groups[:-1] for name in other["param_names"])
    frozen = {}

    def watch(step: int) -> None:
        frozen[step] = {layer.weight_quantizer.frozen for layer in quantized_layers(model).values()}

    train(model, method, optimizer, watch=watch)
    assert frozen == {step: {step >= 44} for step in range(STEPS)}


@pytest.mark.parametrize(
    ("stop", "changes"),
    [(9, {}), (20, {}), (50, {}), (20, {"bits": (2, 8), "mean_bits": 2}), (50, {"bits": (2, 8), "mean_bits": 2})],
)
def test_a_resumed_loop_ends_the_same(stop: int, changes: dict) -> None:
    config = small_config(**changes, grid="channel")
    whole, method, optimizer = prepare(config)
    train(whole, method, optimizer)
    # Of 2 bits, and on four levels, which are not whole steps.
    assert any(layer.weight_quantizer.four_levels for layer in quantized_layers(whole).values()) == bool(changes)
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
    assert method.step_count == STEPS
    ended = whole.state_dict()
    assert all(torch.equal(value, ended[name]) for name, value in fresh.state_dict().items())


def test_what_cannot_work_is_refused_before_training() -> None:
    method = QASSOMethod(GETAConfig.paper())
    method.check(frozen_weights=False)
    with pytest.raises(GETAError, match="choose 'fisher' or 'taylor'"):
        method.check(frozen_weights=True)
    QASSOMethod(GETAConfig()).check(frozen_weights=True)
    with pytest.raises(GETAError, match="stages take"):
        QASSOMethod(GETAConfig(warmup=30, projection=30, joint=30)).check_stages(80, 80)
    with pytest.raises(GETAError, match="training has not started"):
        method.metrics()
    assert method.step_count == 0 and not method.finished
    with pytest.raises(GETAError, match="set by a GETAConfig"):
        QASSOMethod(CompressionConfig())


def test_an_optimizer_of_another_model_is_refused() -> None:
    model, method, optimizer = prepare(small_config())
    base = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    run = Run(toy_space(), optimizer.ledger, optimizer.target, STEPS, STEPS)
    with pytest.raises(GETAError, match="holds a parameter that the model lacks"):
        method.wrap_optimizer(base, {p: n for n, p in model.named_parameters()}, model, run)


def test_a_value_that_is_not_finite_is_named_when_asked() -> None:
    model, method, optimizer = prepare(small_config())
    method.check_finite()
    train(model, method, optimizer, steps=3)
    model.layers[1].weight_quantizer.q_m.data.fill_(float("nan"))
    with pytest.raises(GETAError, match=r"layers\.1\.weight_quantizer"):
        train(model, method, optimizer, steps=4)


@pytest.mark.parametrize("data", [True, False])
def test_inputs_get_quantizers_with_and_without_data(data: bool) -> None:
    asked = []

    def batches(count: int) -> list[dict[str, torch.Tensor]]:
        asked.append(count)
        return [{"x": torch.randn(4, 8)} for _ in range(count)]

    model = Toy()
    method = QASSOMethod(GETAConfig(activation_bits=(4, 6), calibration_batches=3, learn_activation_exponent=True))
    method.attach(model, batches if data else None)
    assert asked == ([3] if data else [])
    for layer in quantized_layers(model).values():
        assert layer.input_quantizer.learn_t and float(layer.input_quantizer.bits()) == pytest.approx(16, abs=1e-3)
        assert (layer.input_quantizer.q_m.item() == 1) != data
    plain = Toy()
    QASSOMethod(GETAConfig()).attach(plain, batches)
    assert all(layer.input_quantizer is None for layer in quantized_layers(plain).values())


def test_memory_counted_by_hand() -> None:
    """A fifth of 5 of 10 groups a period, so a tenth of every cut dimension; a slice of the largest weight is 9.6."""
    model = Toy()
    method = QASSOMethod(GETAConfig())
    method.attach(model, None)
    sizes = [96, 12, 96, 48, 6, 48]
    slices = [size // 10 for size in sizes]
    found = method.memory(model, toy_space(), removed_groups=5)
    assert found.kept == 4 * sum(slices)
    assert found.temporary == max(8 * sum(slices) + 12 * 9, 16 * 96)
    paper = QASSOMethod(GETAConfig.paper()).memory(model, toy_space(), removed_groups=5)
    assert paper.kept == 2 * found.kept
    assert QASSOMethod(GETAConfig()).memory(model, toy_space(), removed_groups=0).kept == 0
    model.layers[0].weight.requires_grad_(False)
    assert method.memory(model, toy_space(), removed_groups=5).kept == 4 * (sum(slices) - 9)


def test_frozen_weights_are_scored_in_the_stages_that_ask_and_end_at_zero() -> None:
    ids = torch.randint(0, 40, (4, 8), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 32}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_attention_heads=4, num_key_value_heads=2, **sizes))
    space = build_space(model, {"input_ids": ids[:2]})
    config = small_config(warmup=2, projection=4, joint=10)
    method = make_method(config)
    method.check(frozen_weights=True)
    method.attach(model, None)
    ledger = make_ledger(model, space)
    lora = LoraConfig(r=3, target_modules=["q_proj", "up_proj"])
    attach_lora(model, plan_lora(model, lora, quantized_layers(model)))
    frozen = find_frozen_weights(model, space)
    base = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    run = Run(space, ledger, solve_target(config, space.trainable, ledger), 20, 20, frozen)
    optimizer = method.wrap_optimizer(base, {p: n for n, p in model.named_parameters()}, model, run)
    weight = model.get_parameter(min(frozen.names))
    asked = []
    for _ in range(20):
        method.before_backward(model)
        asked.append((method.stage, weight.requires_grad))
        model(input_ids=ids, labels=ids).loss.backward()
        assert weight.grad is None
        optimizer.step()
        optimizer.zero_grad()
    assert set(asked) == {("warm-up", False), ("projection", True), ("joint", True), ("cool-down", False)}
    found, tensors = method.result(), dict(model.named_parameters())
    assert found.removed_groups == round(0.5 * space.num_groups)
    for family in space.trainable:
        for member in family.members:
            index = member.index[found.removed[family.name]].flatten()
            piece = frozen.merged(member.tensor, tensors).index_select(member.dim, index)
            assert bool((piece == 0).all())


def test_the_type_of_the_config_chooses_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    assert METHODS[GETAConfig] is QASSOMethod and type(make_method(GETAConfig.paper())) is QASSOMethod
    monkeypatch.setattr(config_module, "CONFIG_CLASSES", dict(config_module.CONFIG_CLASSES))

    @dataclass
    class NotEntered(CompressionConfig):
        method: ClassVar[str] = "not-entered"

    with pytest.raises(GETAError, match="no method is known for a NotEntered"):
        make_method(NotEntered())
