"""The memory plan against counts of its own kind: exact sizes, and storages that a real step keeps alive."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim.optimizer import _foreach_supported_types
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    TrainingArguments,
)

from geta_hf import GETAConfig, GETAError, attach_quantizers, dry_run, plan_memory
from geta_hf.errors import MemoryUnknown
from geta_hf.methods import make_method
from geta_hf.methods.parameter_groups import quantizer_parameters
from geta_hf.quantization.kernels import outlined
from geta_hf.training import memory
from geta_hf.training.fake_tensors import OUTLINE, Live, outlines
from geta_hf.training.memory_report import MemoryPlan

VOCABULARY, HIDDEN, LAYERS, ROWS, LENGTH = 96, 32, 2, 3, 16


def phi_config(**changes: object) -> PhiConfig:
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 64}
    return PhiConfig(vocab_size=VOCABULARY, max_position_embeddings=32, **{**sizes, **changes})


@pytest.fixture
def phi() -> PhiForCausalLM:
    torch.manual_seed(0)
    return PhiForCausalLM(phi_config(resid_pdrop=0.0))


@pytest.fixture
def batch() -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone()}


def arguments(tmp_path, **changes: object) -> TrainingArguments:
    return TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **{"optim": "adamw_torch", **changes})


def size(tensors: Iterator[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("half", [False, True])
def test_a_plain_step_keeps_as_much_alive_as_was_foreseen(phi, batch, tmp_path, half: bool) -> None:
    """The same count over real tensors in a real forward and backward."""
    foreseen = plan_memory(phi, batch, arguments(tmp_path, optim="sgd", bf16=half)).backward
    assert foreseen.total == pytest.approx(peak_of(phi, batch, half), rel=0.02)
    assert foreseen.weights == size(iter([*phi.parameters(), *phi.buffers()]))


def peak_of(model: PreTrainedModel, batch: dict[str, Tensor], half: bool) -> int:
    """The highest level of a real forward and backward, counted over real tensors."""
    live = Live()
    for tensor in (*model.parameters(), *model.buffers()):
        live.hold(tensor, "weights")
    for tensor in batch.values():
        live.hold(tensor, "activations")
    model.train()
    with live:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            outputs = model(**batch, use_cache=False)
        if half:
            outputs = {name: value.float() for name, value in outputs.items()}
        loss = outputs["loss"]
        del outputs
        loss.backward()
    return live.peak


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"intermediate_size": 64, "num_local_experts": 4, "max_position_embeddings": 32}
    return MixtralForCausalLM(MixtralConfig(vocab_size=VOCABULARY, **sizes, **experts))


@pytest.mark.parametrize(("dtype", "half"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)])
def test_experts_of_a_mixture_are_foreseen_in_every_dtype(batch, tmp_path, dtype: torch.dtype, half: bool) -> None:
    model = mixtral().to(dtype)
    foreseen = plan_memory(model, batch, arguments(tmp_path, optim="sgd", bf16=half)).backward
    assert foreseen.total == pytest.approx(peak_of(model, batch, half), rel=0.03)


def test_a_dry_run_of_a_mixture_plans_its_experts(batch, tmp_path) -> None:
    found = dry_run(mixtral(), batch, arguments(tmp_path), GETAConfig())
    assert ("channels", 4 * 2, 64) in [(row.kind, row.families, row.groups) for row in found.plan.rows]
    # Each expert is quantized; the router is no linear layer.
    assert "not quantized" in str(found) and "(model.layers.*.mlp.gate)" in str(found)


@pytest.mark.parametrize("half", [False, True])
def test_rounded_activations_are_foreseen(phi, batch, tmp_path, half: bool) -> None:
    """Against the same count over real tensors, with quantizers that allocate what fused kernels do."""
    config = GETAConfig(activation_bits=(4, 8))
    found = dry_run(phi, batch, arguments(tmp_path, optim="sgd", bf16=half), config).memory
    plain = dry_run(phi, batch, arguments(tmp_path, optim="sgd", bf16=half), GETAConfig()).memory
    assert found.step.quantizers == 2 * plain.step.quantizers == 4 * 3 * 2 * 6 * LAYERS
    make_method(config).attach(phi, lambda count: [{"input_ids": batch["input_ids"]}])
    with outlined(OUTLINE):
        peak = peak_of(phi, batch, half)
    assert found.backward.total - found.backward.pruning == pytest.approx(peak, rel=0.02)
    assert found.backward.activations > 1.05 * plain.backward.activations


def test_layers_that_can_not_go_fail_before_a_run(batch, tmp_path) -> None:
    def run(wanted: int | list[str]) -> None:
        dry_run(phi_config(num_hidden_layers=3), batch, arguments(tmp_path), GETAConfig(drop_layers=wanted))

    with pytest.raises(GETAError, match="drop_layers = 9, but at most 2 layers of PhiForCausalLM can be removed"):
        run(9)
    with pytest.raises(GETAError, match=r"names 'model.layers.7', which is no layer of the residual stream"):
        run(["model.layers.7"])
    with pytest.raises(GETAError, match=r"drop_layers names all of model.layers"):
        run([f"model.layers.{place}" for place in range(3)])
    run(2)
    run(["model.layers.1"])


def test_stages_longer_than_the_run_fail_before_it(phi, batch, tmp_path) -> None:
    short, open_ended = arguments(tmp_path, max_steps=30), arguments(tmp_path, num_train_epochs=2)
    with pytest.raises(GETAError, match="40 steps, but training has 30"):
        dry_run(phi, batch, short, GETAConfig(warmup=5, projection=10, joint=25))
    with pytest.raises(GETAError, match="take at least one each: train for 3 steps or more"):
        dry_run(phi, batch, open_ended, GETAConfig(), steps=2)
    with pytest.raises(GETAError, match="but training has 20"):
        dry_run(phi, batch, open_ended, GETAConfig(joint="3 epochs"), steps=20)
    dry_run(phi, batch, open_ended, GETAConfig(joint="3 epochs"))
    dry_run(phi, batch, short, GETAConfig(joint="3 epochs"))  # how long an epoch is, nobody said


@pytest.mark.parametrize(("optim", "per_element"), [("adamw_torch", 8), ("adamw_torch_fused", 8), ("sgd", 0)])
def test_optimizer_state_and_gradients_are_exact(phi, batch, tmp_path, optim: str, per_element: int) -> None:
    plan = plan_memory(phi, batch, arguments(tmp_path, optim=optim))
    elements = sum(parameter.numel() for parameter in phi.parameters())
    steps = 4 * len(list(phi.parameters())) if per_element else 0  # Adam's counters
    assert plan.step.optimizer == per_element * elements + steps
    assert plan.backward.optimizer == plan.step.optimizer
    assert plan.step.gradients == 4 * elements and not plan.notes


FOREACH = [
    (torch.optim.AdamW, {}, 0.01),
    (torch.optim.AdamW, {"fused": True}, 0.01),
    (torch.optim.AdamW, {"amsgrad": True}, 0.0),
    (torch.optim.Adam, {}, 0.01),
    (torch.optim.SGD, {}, 0.0),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, 0.01),
    (torch.optim.Adagrad, {}, 0.0),
    (torch.optim.RMSprop, {"centered": True}, 0.0),
    (torch.optim.NAdam, {}, 0.0),
    (torch.optim.RAdam, {}, 0.01),
    (torch.optim.Adamax, {}, 0.0),
    (torch.optim.Adadelta, {}, 0.0),
]


@pytest.mark.parametrize(("kind", "options", "decay"), FOREACH)
def test_a_step_on_cuda_is_foreseen_as_foreach_runs_it(
    kind: Callable, options: dict[str, object], decay: float
) -> None:
    """Without a GPU, against real tensors on a CPU with the implementation that is the default on CUDA."""
    shapes = [[(32, 32)] * 6 + [(64, 32)], [(32,)] * 3]

    def groups(device: str, dtype: torch.dtype) -> list[dict[str, object]]:
        return [{"params": [trained(s, device, dtype) for s in of], "weight_decay": decay} for of in shapes]

    def trained(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> Tensor:
        parameter = torch.nn.Parameter(torch.ones(shape, device=device, dtype=dtype))
        parameter.grad = torch.ones_like(parameter)
        return parameter

    for dtype in (torch.float32, torch.bfloat16):
        mode = FakeTensorMode()
        with outlines(mode):
            foreseen = memory.optimizer_memory(kind, options, groups("cuda", dtype), max_grad_norm=1.0)
        asked = options if "fused" in options else {**options, "foreach": True}
        assert foreseen == memory.optimizer_memory(kind, asked, groups("cpu", dtype), max_grad_norm=1.0)


@pytest.mark.parametrize(
    ("optim", "decay", "copies"),
    [("adamw_torch", 0.0, 1), ("adamw_torch_fused", 0.0, 0), ("sgd", 0.0, 0), ("sgd", 0.1, 1), ("adagrad", 0.0, 2)],
)
def test_a_plan_for_cuda_counts_the_temporaries_of_a_group(
    phi, batch, tmp_path, optim: str, decay: float, copies: int
) -> None:
    args = arguments(tmp_path, optim=optim, weight_decay=decay)
    plan = plan_memory(phi, batch, args, device="cuda")
    matrices = sum(p.numel() for name, p in phi.named_parameters() if "bias" not in name and "layernorm" not in name)
    assert plan.step.activations == pytest.approx(4 * copies * matrices, rel=0.02, abs=1000)
    assert not plan.notes
    # On a CPU torch updates one tensor after another.
    assert plan_memory(phi, batch, args).step.activations <= 4 * 3 * VOCABULARY * HIDDEN
    assert FakeTensor not in _foreach_supported_types


def test_adafactor_keeps_rows_and_columns(phi, batch, tmp_path) -> None:
    state = plan_memory(phi, batch, arguments(tmp_path, optim="adafactor")).step.optimizer
    kept = sum(sum(p.shape) if p.dim() == 2 else p.numel() for p in phi.parameters())
    assert 4 * kept <= state <= 4 * (kept + len(list(phi.parameters())))


def test_eight_bit_and_unknown_optimizers(phi, batch, tmp_path, monkeypatch) -> None:
    """Not installed here: the former by their definition, the latter said."""
    plan = plan_memory(phi, batch, arguments(tmp_path, optim="adamw_bnb_8bit"))
    sizes = [p.numel() for p in phi.parameters()]
    assert plan.step.optimizer == 2 * sum(4 * n if n < 4096 else n + 4 * -(-n // 256) for n in sizes)
    plan = plan_memory(phi, batch, arguments(tmp_path, optim="lomo"))
    assert plan.step.optimizer == 0 and "optim=lomo" in str(plan)


def test_quantizers_cost_their_parameters_and_no_copy_of_the_weights(batch, tmp_path) -> None:
    """On a model whose weights outweigh its activations, a copy of every quantized weight would show."""
    model = PhiForCausalLM(phi_config(hidden_size=128, intermediate_size=512, resid_pdrop=0.0))
    plain = plan_memory(model, batch, arguments(tmp_path))
    attach_quantizers(model)
    quantized = plan_memory(model, batch, arguments(tmp_path))
    assert quantized.backward.quantizers == size(iter(quantizer_parameters(model, trained=False).values()))
    largest = 128 * 512 * 4
    assert quantized.peak - plain.peak < 2 * largest < size(model.model.layers.parameters()) / 2


def test_a_quantizer_for_every_channel_costs_two_numbers_each(batch, tmp_path) -> None:
    one, each = (
        dry_run(phi_config(), batch, arguments(tmp_path), GETAConfig(per_channel=per_channel)).memory.step.quantizers
        for per_channel in (False, True)
    )
    layers, channels = 6 * LAYERS, LAYERS * (4 * HIDDEN + 64 + HIDDEN)
    assert one == 4 * 3 * layers and each == 4 * (2 * channels + layers)


def test_checkpointing_accumulation_and_a_teacher(batch, tmp_path) -> None:
    config, geta = phi_config(num_hidden_layers=4), GETAConfig(distill_logits=1.0)
    name = "activation_checkpointing"
    if name not in TrainingArguments.__dataclass_fields__:
        name = "gradient_checkpointing"
    whole, saved, twice = (
        dry_run(config, batch, arguments(tmp_path, **changes), GETAConfig()).memory
        for changes in ({}, {name: True}, {"gradient_accumulation_steps": 4})
    )
    assert saved.backward.activations < 0.7 * whole.backward.activations
    assert twice.backward.gradients > 0.9 * whole.step.gradients > whole.backward.gradients
    taught = dry_run(config, batch, arguments(tmp_path), geta).memory
    # A byte for each quantizer, of which the teacher has none: whether it has four levels.
    assert taught.backward.teacher == taught.step.teacher == whole.backward.weights - 4 * 6
    assert taught.backward.activations > whole.backward.activations + ROWS * LENGTH * VOCABULARY * 4


def test_what_pruning_keeps(batch, tmp_path) -> None:
    """Half of all groups in 5 periods: a tenth of every tensor that groups cut, once for each way it is cut."""
    found = dry_run(phi_config(), batch, arguments(tmp_path), GETAConfig())
    heads, channels = 4 * HIDDEN * HIDDEN + 3 * HIDDEN, 2 * HIDDEN * 64 + 64
    assert found.memory.step.pruning == pytest.approx(4 * LAYERS * (heads + channels) / 10, rel=0.02)
    both = GETAConfig.paper(target_sparsity=0.5)
    assert dry_run(phi_config(), batch, arguments(tmp_path), both).memory.step.pruning == pytest.approx(
        2 * found.memory.step.pruning, rel=0.02
    )


def test_rehearsal_copies_what_is_cut_once(batch, tmp_path) -> None:
    found = dry_run(phi_config(), batch, arguments(tmp_path), GETAConfig(distill_logits=1.0)).memory
    cut = 4 * LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN + 2 * HIDDEN * 64 + 64)
    logits = 3 * LENGTH * VOCABULARY * 4 * 5
    assert found.preparation.activations == cut + logits
    assert found.preparation.weights == found.preparation.teacher + LAYERS * 6 == found.step.weights


def test_lora_keeps_no_gradients_of_the_weights(batch, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["fc1", "fc2"])
    full = dry_run(phi_config(), batch, arguments(tmp_path), GETAConfig()).memory
    low_rank = dry_run(phi_config(), batch, arguments(tmp_path), GETAConfig(), lora).memory
    own = 4 * LAYERS * 2 * 2 * (HIDDEN + 64)
    assert own < low_rank.step.gradients < own + 4 * 1000 < full.step.gradients / 4
    assert low_rank.peak < full.peak


def test_a_model_stays_as_it_was(phi, batch, tmp_path) -> None:
    before = {name: value.clone() for name, value in phi.state_dict().items()}
    found = dry_run(phi, batch, arguments(tmp_path), GETAConfig())
    assert found.parameters == sum(value.numel() for value in phi.parameters())
    assert all(torch.equal(value, before[name]) for name, value in phi.state_dict().items())
    assert not phi.training or all(p.grad is None for p in phi.parameters())
    assert type(phi.model.layers[0].mlp.fc1) is torch.nn.Linear


def test_the_table_adds_up_and_names_the_peak(batch, tmp_path) -> None:
    plan = dry_run(phi_config(), batch, arguments(tmp_path)).memory
    assert isinstance(plan, MemoryPlan)
    assert plan.peak == max(plan.backward.total, plan.step.total) and plan.preparation.total == 0
    assert f"peak: {plan.peak / 1e6:.2f} MB" in str(plan) and "teacher" not in str(plan)


def test_what_can_not_be_foreseen_is_an_error_of_its_own(phi, batch, tmp_path, capfd) -> None:
    """So that it can be told from a run that does not fit; what torch logs of it is not shown."""

    def forward(input_ids: Tensor, labels: Tensor, use_cache: bool = False) -> None:
        torch.nn.functional.grouped_mm(phi.lm_head.weight, phi.lm_head.weight)  # of sizes that do not match

    phi.forward = forward
    with pytest.raises(MemoryUnknown, match="memory of PhiForCausalLM can't be foreseen"):
        plan_memory(phi, batch, arguments(tmp_path))
    assert capfd.readouterr().err == ""


def test_a_run_whose_memory_is_unknown_still_has_a_plan(phi, batch, tmp_path, monkeypatch) -> None:
    def loss(*_: object) -> None:
        raise ValueError("no data")

    monkeypatch.setattr(memory, "_loss", loss)
    with pytest.raises(MemoryUnknown, match="no data") as caught:
        dry_run(phi, batch, arguments(tmp_path), GETAConfig())
    assert "| heads" in str(caught.value.plan)
    with pytest.raises(MemoryUnknown) as caught:
        dry_run(phi, batch, arguments(tmp_path))
    assert caught.value.plan is None


def test_a_large_model_takes_seconds_and_no_memory(tmp_path) -> None:
    """A 7 B model of grouped queries: 28 GB of weights that are never there."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        architectures=[LlamaForCausalLM.__name__],
    )
    ids = torch.zeros(2, 512, dtype=torch.long)
    start = time.perf_counter()
    found = dry_run(config, {"input_ids": ids, "labels": ids}, arguments(tmp_path, bf16=True), GETAConfig())
    assert time.perf_counter() - start < 60
    assert found.memory.backward.weights == pytest.approx(4 * found.parameters, rel=1e-3)
    assert [(row.kind, row.families, row.groups) for row in found.plan.rows] == [
        ("heads", 4, 8),
        ("channels", 4, 14336),
    ]
