"""GETATrainer on a tiny BERT: the whole way, exact resume through checkpoints, and every refusal before training."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForQuestionAnswering, BertForQuestionAnswering, TrainerCallback, TrainingArguments

from geta_hf import GETAConfig, GETATrainer
from geta_hf.errors import GETAError
from geta_hf.qadg import zero_groups
from geta_hf.quantization import detach_quantizers, quantized_layers
from tests.conftest import tiny_bert_config

pytestmark = pytest.mark.usefixtures("shared_spaces")

STEPS = 24
SMALL = {"warmup": 2, "projection": 4, "joint": 12, "projection_periods": 2, "pruning_periods": 3}


def rows(count: int = 64) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        ids = torch.randint(4, 60, (12,), generator=generator)
        ids[-3:] = 0
        where = torch.tensor(int(ids[0]) % 9)
        mask = (ids != 0).long()
        found.append({"input_ids": ids, "attention_mask": mask, "start_positions": where, "end_positions": where})
    return found


def arguments(folder: Path, **changes: object) -> TrainingArguments:
    values: dict = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "weight_decay": 0.01,
        "logging_steps": 4,
        "save_steps": STEPS,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(**{**values, **changes})


def trainer(folder: Path, config: GETAConfig | None = None, *, dropout: float = 0.1, **changes: object) -> GETATrainer:
    torch.manual_seed(0)
    model = BertForQuestionAnswering(tiny_bert_config(hidden_dropout_prob=dropout))
    config = config or GETAConfig(**SMALL)
    return GETATrainer(model, arguments(folder, **changes), geta_config=config, train_dataset=rows())


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> GETATrainer:
    made = trainer(tmp_path_factory.mktemp("run"))
    made.train()
    return made


def test_memory_is_not_pinned_without_an_accelerator(trained) -> None:
    """It would be for nothing, and torch warns of it."""
    assert trained.args.device.type == "cpu" and not trained.args.dataloader_pin_memory


def test_the_target_is_met_exactly_and_bits_are_whole(trained) -> None:
    zero = zero_groups(trained.model, trained.space)
    assert trained.space.num_groups == 2 * (4 + 48)
    assert sum(int(zero[family.name].sum()) for family in trained.space.prunable) == 52
    bits = [float(layer.weight_quantizer.bits()) for layer in quantized_layers(trained.model).values()]
    assert all(4 <= round(b) <= 8 and b == pytest.approx(round(b), abs=1e-4) for b in bits)


def test_the_state_is_logged_beside_the_loss(trained) -> None:
    logs = [entry for entry in trained.state.log_history if "loss" in entry]
    assert [entry["stage"] for entry in logs] == [2, 3, 3, 3, 4, 4]
    assert [entry["sparsity"] for entry in logs][-1] == 0.5 and logs[0]["sparsity"] == 0
    keys = {"mean_bits", "min_bits", "max_bits", "relative_bops", "gamma"}
    assert all(keys <= set(entry) for entry in logs)
    assert logs[-1]["max_bits"] <= 8 and 0 < logs[-1]["relative_bops"] < 0.25 * 0.8
    assert all((entry["gamma"] > 0) == (entry["stage"] == 3) for entry in logs)


def test_quantizers_have_a_group_of_their_own_without_decay(trained) -> None:
    groups = trained.qasso.param_groups
    quantizers = [n for n, _ in trained.model.named_parameters() if n.endswith(("quantizer.d", "quantizer.q_m"))]
    assert groups[-1]["param_names"] == quantizers and groups[-1]["weight_decay"] == 0
    assert groups[-1]["initial_lr"] == 1e-3
    assert not any("quantizer" in name for group in groups[:-1] for name in group["param_names"])


def test_exported_and_reloaded_logits_equal_the_trained_ones(trained, batch, tmp_path) -> None:
    report = trained.export_model(tmp_path / "small")
    model = trained.model.eval()
    small = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "small").eval()
    assert (model(**batch).start_logits - small(**batch).start_logits).abs().max() <= 1e-5
    assert sum(kept for kept, _ in report.kept.values()) == 52
    assert GETAConfig.load(tmp_path / "small" / "geta_config.json") == trained.geta_config
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def test_evaluation_works_with_quantizers_attached(trained) -> None:
    loss = trained.evaluate(rows(16))["eval_loss"]
    assert math.isfinite(loss)


class SaveAt(TrainerCallback):
    """Saves after some steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step in self.steps


def saved_run(folder: Path, config: GETAConfig | None, *steps: int, **changes: object) -> GETATrainer:
    """A run to the end whose folder has checkpoints of some steps."""
    made = trainer(folder, config, save_total_limit=None, **changes)
    made.add_callback(SaveAt(*steps))
    made.train()
    return made


RULES = {"default": GETAConfig(**SMALL), "paper": GETAConfig.paper(**SMALL, eta=0.9)}


@pytest.fixture(scope="module", params=RULES)
def whole(request, tmp_path_factory) -> tuple[GETAConfig, GETATrainer]:
    config = RULES[request.param]
    return config, saved_run(tmp_path_factory.mktemp(request.param), config, 1, 4, 11, 20)


@pytest.mark.parametrize("stop", [1, 4, 11, 20])
def test_resume_from_a_checkpoint_is_bit_exact(tmp_path, whole, stop: int) -> None:
    config, first = whole
    again = trainer(tmp_path, config)
    again.train(resume_from_checkpoint=str(Path(first.args.output_dir) / f"checkpoint-{stop}"))
    assert again.qasso.removed_groups == first.qasso.removed_groups == 52
    state = again.model.state_dict()
    for name, value in first.model.state_dict().items():
        assert torch.equal(state[name], value), name


BY_LENGTH = {"train_sampling_strategy": "group_by_length", "max_grad_norm": 0.7}


@pytest.fixture(scope="module")
def whole_by_length(tmp_path_factory) -> GETATrainer:
    return saved_run(tmp_path_factory.mktemp("by_length"), None, 5, 11, 16, **BY_LENGTH)


@pytest.mark.parametrize("stop", [5, 11, 16])
def test_resume_is_bit_exact_with_batches_grouped_by_length(tmp_path, whole_by_length, stop: int) -> None:
    """Trainer alone draws another order when it resumes inside an epoch (here of 8 steps)."""
    again = trainer(tmp_path, **BY_LENGTH)
    checkpoint = Path(whole_by_length.args.output_dir) / f"checkpoint-{stop}"
    again.train(resume_from_checkpoint=str(checkpoint))
    state = again.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in whole_by_length.model.state_dict().items())


def test_resume_in_the_same_trainer_after_a_bad_loss(tmp_path) -> None:
    whole = trainer(tmp_path / "whole")
    whole.train()
    made = trainer(tmp_path / "run", save_steps=6)
    compute, seen = made.compute_loss, []

    def poisoned(model, inputs, **kwargs):
        seen.append(1)
        return compute(model, inputs, **kwargs) * (float("nan") if len(seen) == 8 else 1)

    made.compute_loss = poisoned
    with pytest.raises(GETAError, match=r"NaN|nan"):
        made.train()
    made.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    state = made.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in whole.model.state_dict().items())


def test_a_second_run_is_refused(trained) -> None:
    with pytest.raises(GETAError, match="24 steps already"):
        trained.train()


def test_gradient_accumulation_clipping_and_epochs(tmp_path) -> None:
    config = GETAConfig(**{**SMALL, "warmup": "0.5 epochs", "joint": "2 epochs"})
    made = trainer(tmp_path, config, gradient_accumulation_steps=2, max_steps=-1, num_train_epochs=5, max_grad_norm=0.5)
    made.train()
    assert (made.qasso.schedule.warmup, made.qasso.schedule.joint, made.qasso.schedule.total) == (2, 8, 20)
    assert made.qasso.removed_groups == 52 and made.qasso.step_count == 20


def test_an_optimizer_of_ones_own_is_wrapped(tmp_path) -> None:
    torch.manual_seed(0)
    model = BertForQuestionAnswering(tiny_bert_config())
    base = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    made = GETATrainer(
        model,
        arguments(tmp_path),
        geta_config=GETAConfig(**SMALL),
        train_dataset=rows(),
        optimizers=(base, None),
    )
    made.train()
    assert made.qasso.base is base and made.qasso.removed_groups == 52


def test_an_optimizer_with_names_is_wrapped_and_what_can_not_be_is_refused(tmp_path) -> None:
    def made_with(optimizers) -> GETATrainer:
        how = {"geta_config": GETAConfig(**SMALL), "train_dataset": rows(), "optimizers": optimizers}
        return GETATrainer(model, arguments(tmp_path), **how)

    model = BertForQuestionAnswering(tiny_bert_config())
    base = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(base, lambda step: 1.0)
    with pytest.raises(GETAError, match=r"pass optimizers=\(optimizer, None\)"):
        made_with((base, scheduler))
    foreign = torch.optim.AdamW([*model.parameters(), nn.Parameter(torch.ones(1))])
    with pytest.raises(GETAError, match="parameter that the model lacks"):
        made_with((foreign, None)).train()
    detach_quantizers(model)
    made = made_with((base, None))
    made.train()
    assert made.qasso.removed_groups == 52


def test_families_of_frozen_parameters_are_left_alone(tmp_path) -> None:
    torch.manual_seed(0)
    model = BertForQuestionAnswering(tiny_bert_config())
    model.bert.encoder.layer[0].requires_grad_(False)
    config = GETAConfig(**SMALL, target_sparsity=0.25)
    made = GETATrainer(model, arguments(tmp_path), geta_config=config, train_dataset=rows())
    assert made.space.num_groups == 52 and all("layer.1" in family.name for family in made.space.prunable)
    made.train()
    assert made.qasso.removed_groups == 13


# --- refusals before training -----------------------------------------------------------------------------------------


def test_a_failed_construction_leaves_the_model_plain(tmp_path) -> None:
    model = BertForQuestionAnswering(tiny_bert_config())
    with pytest.raises(GETAError, match="at most 100"):
        GETATrainer(model, arguments(tmp_path), geta_config=GETAConfig(target_sparsity=0.99), train_dataset=rows())
    assert not quantized_layers(model)
    GETATrainer(model, arguments(tmp_path), geta_config=GETAConfig(), train_dataset=rows())


def test_tied_layers_are_refused_at_once(tmp_path) -> None:
    model = BertForQuestionAnswering(tiny_bert_config())
    first, second = model.bert.encoder.layer
    second.intermediate.dense.weight = first.intermediate.dense.weight
    with pytest.raises(GETAError, match=r"layer\.1\.intermediate\.dense\.weight is tied"):
        GETATrainer(model, arguments(tmp_path), geta_config=GETAConfig(), train_dataset=rows())


def test_too_little_data_for_a_batch(tmp_path) -> None:
    model = BertForQuestionAnswering(tiny_bert_config())
    with pytest.raises(GETAError, match="no batch can be made"):
        GETATrainer(model, arguments(tmp_path, dataloader_drop_last=True), train_dataset=rows(3))


def test_unreachable_sparsity(tmp_path) -> None:
    with pytest.raises(GETAError, match=r"K = 103 of 104 groups.*at most 100"):
        trainer(tmp_path, GETAConfig(**SMALL, target_sparsity=0.99))


def test_stages_longer_than_training(tmp_path) -> None:
    """Known when the trainer is made: by steps, by epochs, and where there are too few steps for any stage."""
    with pytest.raises(GETAError, match="training has 24"):
        trainer(tmp_path, GETAConfig(**{**SMALL, "joint": 30}))
    with pytest.raises(GETAError, match="training has 2 steps, but warmup, projection, joint take at least one each"):
        trainer(tmp_path, GETAConfig(), max_steps=-1, num_train_epochs=0.25)
    with pytest.raises(GETAError, match="'joint': 24}, 30 steps, but training has 16"):
        trainer(tmp_path, GETAConfig(**{**SMALL, "joint": "3 epochs"}), max_steps=-1, num_train_epochs=2)


def test_a_model_without_quantizable_layers(tmp_path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(60, 2)

    with pytest.raises(GETAError, match="no layer to quantize"):
        GETATrainer(Plain(), arguments(tmp_path), geta_config=GETAConfig(), train_dataset=rows())


def test_a_batch_the_model_cannot_run(tmp_path) -> None:
    model = BertForQuestionAnswering(tiny_bert_config())
    bad = [{**row, "input_ids": row["input_ids"].repeat(5)} for row in rows()]
    with pytest.raises(GETAError, match="input_ids"):
        GETATrainer(model, arguments(tmp_path), geta_config=GETAConfig(), train_dataset=bad)


def test_no_model_or_no_data(tmp_path) -> None:
    with pytest.raises(GETAError, match="needs `model`"):
        GETATrainer(args=arguments(tmp_path))
    with pytest.raises(GETAError, match="needs `train_dataset`"):
        GETATrainer(BertForQuestionAnswering(tiny_bert_config()), arguments(tmp_path))


def test_resume_from_another_config_or_model_or_folder(tmp_path, trained) -> None:
    checkpoint = Path(trained.args.output_dir) / f"checkpoint-{STEPS}"
    with pytest.raises(GETAError, match=r"target_sparsity: 0.5 there, 0.25 here"):
        trainer(tmp_path, GETAConfig(**SMALL, target_sparsity=0.25)).train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(GETAError, match=r"stages .*24.*resume with the same length"):
        trainer(tmp_path, max_steps=30).train(resume_from_checkpoint=str(checkpoint))
    torch.manual_seed(0)
    other = BertForQuestionAnswering(tiny_bert_config(intermediate_size=40))
    made = GETATrainer(other, arguments(tmp_path), geta_config=GETAConfig(**SMALL), train_dataset=rows())
    with pytest.raises(GETAError, match="checkpoint of another model"):
        made.train(resume_from_checkpoint=str(checkpoint))
    for missing, message in (
        ("geta_config.json", "not a checkpoint of GETATrainer"),
        ("optimizer.pt", "save_only_model"),
        ("scheduler.pt", "no scheduler.pt"),
    ):
        (checkpoint / missing).rename(checkpoint / "gone")
        try:
            with pytest.raises(GETAError, match=message):
                trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))
        finally:
            (checkpoint / "gone").rename(checkpoint / missing)


def test_what_would_undo_the_compression_is_refused(tmp_path) -> None:
    with pytest.raises(GETAError, match="auto_find_batch_size"):
        trainer(tmp_path, auto_find_batch_size=True)
    for name in ("lomo", "adalomo", "galore_adamw_layerwise", "apollo_adamw_layerwise"):
        with pytest.raises(GETAError, match=f"optim = '{name}' updates weights while gradients are computed"):
            trainer(tmp_path, optim=name)
    with pytest.raises(GETAError, match="optim = 'schedule_free_adamw' keeps an average of the weights"):
        trainer(tmp_path, optim="schedule_free_adamw")


def test_an_export_before_the_groups_are_zero(tmp_path) -> None:
    made = trainer(tmp_path)
    with pytest.raises(GETAError, match="at step 0, before the end of the joint stage"):
        made.export_model(tmp_path / "small")
    made = trainer(tmp_path)
    made.train()
    with torch.no_grad():
        made.model.bert.encoder.layer[0].output.dense.weight.add_(1e-3)
    with pytest.raises(GETAError, match=r"whose weights are not zero .* as a method does before it has finished"):
        made.export_model(tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(tmp_path) -> None:
    made = trainer(tmp_path, save_steps=6)
    seen = []
    compute = made.compute_loss

    def poisoned(model, inputs, **kwargs):
        seen.append(1)
        loss = compute(model, inputs, **kwargs)
        return loss * float("nan") if len(seen) == 9 else loss

    made.compute_loss = poisoned
    with pytest.raises(GETAError, match=r"NaN or infinite|is nan at step"):
        made.train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
